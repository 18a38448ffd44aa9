"""Say in what two checkpoints differ: names, shapes, dtypes, elements, values.

    shards that lie alike in both ──▶ blocks of equal digests are equal, unread │ the others: read from both, compared
    tensors that do not           ──▶ cut into parts ──▶ each read from both, compared

Of the first kind are two steps of one job: then no more is read than has changed. Every byte was verified before it is
compared. Holds one part of either side, and what is in flight for it (FORMAT invariants 12 and 15). Writes nothing.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from cloudckpt.copying.comparing import Sums
from cloudckpt.copying.places import LOOK_BYTES, opened, runs_of, source_of
from cloudckpt.errors import OptionsError
from cloudckpt.format import DTYPES, ChunkEntry, Index, ShardEntry, Span, codec, split_box
from cloudckpt.loading import RankInput, read_index
from cloudckpt.options import MIB, Options
from cloudckpt.report import Progress, Show
from cloudckpt.root import Catalog, Checkpoint, ShardPlaces
from cloudckpt.threads import each
from cloudckpt.transfer import Gauge, Scratch, Watch, read_verified, span_bytes_for

__all__ = ["Change", "Difference", "diff"]

_OURS = "cloudckpt."
# Of one side at once.
_PART_BYTES = 16 * MIB
_Place = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A tensor whose elements differ.

    Attributes:
        name: under which both have it.
        shape: of both.
        dtypes: in the one and in the other.
        count: elements that differ.
        largest: the largest absolute difference between elements that are numbers on both sides; None where elements
            are no numbers: what the library keeps in bytes, and dtypes that torch cannot compute with.
        largest_relative: the largest of differences each in relation to the larger element; None likewise.
        nan_counts: elements that differ and are no number in the one, and in the other.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    count: int
    largest: float | None
    largest_relative: float | None
    nan_counts: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """In what two checkpoints differ.

    Attributes:
        a: URL of the one.
        b: URL of the other.
        only_a: names of tensors and values that `b` lacks, sorted.
        only_b: names that `a` lacks.
        shapes: name → the two shapes of a tensor, where they differ; its elements are not compared.
        dtypes: name → the two dtypes, where they differ.
        kinds: names that are a tensor in one of them and a value in the other, sorted.
        changed: tensors whose elements differ, the largest absolute difference first, those without one last.
        values: name → the two values, in the codec's JSON, where they differ.
        paths: names that stand at another place of the nested state, or in a container of another type.
        metrics: name → what either manifest says, None for nothing, where they differ. That does not count.
        environment: the same of machine and versions.
        read_bytes: bytes that were read to tell, of both together.
    """

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[str, str]]
    kinds: tuple[str, ...]
    changed: tuple[Change, ...]
    values: Mapping[str, tuple[object, object]]
    paths: tuple[str, ...]
    metrics: Mapping[str, tuple[object, object]]
    environment: Mapping[str, tuple[object, object]]
    read_bytes: int

    @property
    def is_equal(self) -> bool:
        """Whether a restore of either gives the same state."""
        found = (self.only_a, self.only_b, self.shapes, self.dtypes, self.kinds, self.changed, self.values, self.paths)
        return not any(found)


def diff(  # noqa: PLR0913 (keyword-only, each of its own kind)
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    tolerance: float | None = None,
    storage_options: Mapping[str, object] | None = None,
    b_storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    b_engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
    every_s: float = math.inf,
) -> Difference:
    """Compare two checkpoints, anywhere.

    Args:
        a: a checkpoint, or a root, of which the newest is meant.
        b: the other.
        tolerance: None: elements are equal whose bits are, so that 0.0 and -0.0 differ. Else: that are no further
            apart, two NaNs, and an infinity and itself; of complex ones also where that is a part.
        storage_options: fsspec's own options for `a`.
        b_storage_options: the same for `b`.
        engine: what moves the bytes of `a`, as for `save`.
        b_engine: the same for `b`.
        options: sizes, parallelism, patience. Without `memory_budget_bytes` less than 256 MiB are held.
        progress: `bar` or `auto` show a bar on a terminal.
        every_s: where no bar is shown, a line every so many seconds.

    Raises:
        OptionsError: the tolerance is negative, or no number.
        CheckpointNotFoundError: nothing is committed at a URL.
        IntegrityError: an object is missing or differs from what was committed.
        StorageError: a store could not be read.
    """
    if tolerance is not None and not tolerance >= 0:
        raise OptionsError(f"tolerance is {tolerance!r}; give a number from 0")
    chosen = Options.of(options).lean(LOOK_BYTES)
    with (
        opened(a, storage_options=storage_options, engine=engine, options=chosen) as place_a,
        opened(b, storage_options=b_storage_options, engine=b_engine, options=chosen) as place_b,
        Progress(progress).bar("comparing", rank=0, every_s=every_s) as bar,
    ):
        sides = tuple(_Side.of(place.catalog, place.one(), chosen) for place in (place_a, place_b))
        return _Comparison(sides[0], sides[1], tolerance, chosen, bar).run()


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two."""

    catalog: Catalog
    checkpoint: Checkpoint
    index: Index
    input: RankInput
    places: ShardPlaces

    @classmethod
    def of(cls, catalog: Catalog, checkpoint: Checkpoint, options: Options) -> _Side:
        index = read_index(catalog, checkpoint)
        still_s, limit = options.transfer_limit(catalog.store.engine)
        watch = Watch(deadline_s=still_s, limit=limit)
        reading = RankInput(catalog.store, checkpoint, index, options, watch)
        return cls(catalog, checkpoint, index, reading, ShardPlaces.of(catalog.store, checkpoint))

    def read(self, entry: ShardEntry, spans: Sequence[tuple[Span, memoryview]]) -> None:
        shard = source_of(self.places.key(entry), entry, self.index.block_bytes)
        each(
            spans,
            lambda one: read_verified(self.places.store, shard, *one),
            threads=4,
            name="cloudckpt-diff",
        )


class _Comparison:
    """A comparison under way."""

    def __init__(self, a: _Side, b: _Side, tolerance: float | None, options: Options, gauge: Gauge) -> None:
        self._a, self._b = a, b
        self._tolerance = tolerance
        self._options = options
        self._gauge = gauge
        self._sums: dict[str, Sums] = defaultdict(Sums)
        self._read_bytes = 0
        self._scratch = Scratch()

    def run(self) -> Difference:
        one, other = self._a.index, self._b.index
        names_a, names_b = {*one.tensors, *one.values}, {*other.tensors, *other.values}
        both = [name for name in one.tensors if name in other.tensors]
        shapes = {
            name: (one.tensors[name].shape, other.tensors[name].shape)
            for name in both
            if one.tensors[name].shape != other.tensors[name].shape
        }
        self._compare([name for name in both if name not in shapes])
        changed, beside = self._changes()
        values = {
            name: (one.values[name], other.values[name])
            for name in one.values
            if name in other.values and (name in beside or not _is_same(one.values[name], other.values[name]))
        }
        a, b = self._a.checkpoint.manifest, self._b.checkpoint.manifest
        return Difference(
            a=self._a.checkpoint.url,
            b=self._b.checkpoint.url,
            only_a=tuple(sorted(names_a - names_b)),
            only_b=tuple(sorted(names_b - names_a)),
            shapes=shapes,
            dtypes={
                name: (one.tensors[name].dtype, other.tensors[name].dtype)
                for name in both
                if one.tensors[name].dtype != other.tensors[name].dtype
            },
            kinds=tuple(sorted(name for name in names_a & names_b if (name in one.tensors) != (name in other.tensors))),
            changed=changed,
            values=values,
            paths=tuple(
                sorted(
                    name
                    for name in names_a & names_b
                    if not _is_same(one.paths.get(name, [name]), other.paths.get(name, [name]))
                )
            ),
            metrics=_unlike(a.metrics, b.metrics),
            environment=_unlike(a.environment, b.environment),
            read_bytes=self._read_bytes,
        )

    def _changes(self) -> tuple[tuple[Change, ...], set[str]]:
        """Return the tensors that differ, and the names of values of which what stands beside their JSON does."""
        changed, beside = [], set()
        values = {
            part: name for name, parts in codec.part_names(self._a.index.tensors).items() for part in parts.values()
        }
        for name, sums in self._sums.items():
            if not sums.count:
                continue
            if name in values:
                beside.add(values[name])
                continue
            dtypes = self._a.index.tensors[name].dtype, self._b.index.tensors[name].dtype
            is_number = not name.startswith(_OURS) and not any(dtype.startswith("float4") for dtype in dtypes)
            changed.append(
                Change(
                    name=name,
                    shape=self._a.index.tensors[name].shape,
                    dtypes=dtypes,
                    count=sums.count,
                    largest=sums.largest if is_number else None,
                    largest_relative=sums.largest_relative if is_number else None,
                    nan_counts=(sums.nan_a, sums.nan_b),
                )
            )
        order = sorted(changed, key=lambda one: (one.largest is None, -(one.largest or 0.0), one.name))
        return tuple(order), beside

    def _compare(self, names: Sequence[str]) -> None:
        """Compare tensors that have one shape: by shards, and what these do not tell by themselves."""
        twins = list(self._twins(names))
        told = {name for twin in twins for name in twin.names}
        rest = [name for name in names if name not in told]
        parts = list(self._parts(rest))
        self._gauge.begin(2 * (sum(twin.read_bytes for twin in twins) + sum(part.nbytes for part in parts)))
        for twin in twins:
            self._compare_twin(twin)
        for batch in _batches(parts):
            self._compare_batch(batch)

    # -- shards that lie alike ---------------------------------------------------------------------------------------

    def _twins(self, names: Sequence[str]) -> Iterator[_Twin]:
        """Yield the shards that hold tensors whose pieces lie at the same places in both."""
        a, b = self._a.index, self._b.index
        if a.block_bytes != b.block_bytes:
            return
        pieces_a, pieces_b = a.all_pieces(), b.all_pieces()
        held: dict[_Place, list[tuple[str, int, int]]] = defaultdict(list)
        for name in names:
            pieces = pieces_a[name]
            is_alike = a.tensors[name] == b.tensors[name] and pieces == pieces_b[name] and _aligned(a, name, pieces)
            if not is_alike or not all(_is_sized_alike(a, b, piece) for piece in pieces):
                continue
            itemsize = DTYPES[a.tensors[name].dtype].itemsize
            for piece in pieces:
                stop = piece.start + math.prod(piece.sizes) * itemsize
                held[piece.rank, piece.number].append((name, piece.start, stop))
        for place in sorted(held):
            yield _Twin.of((a.shard(*place), b.shard(*place)), held[place], a.block_bytes)

    def _compare_twin(self, twin: _Twin) -> None:
        """Read the blocks whose digests differ, from both, and compare what lies in them."""
        per_part = max(1, _PART_BYTES // self._a.index.block_bytes)
        for first, stop in twin.runs:
            for number in range(first, stop, per_part):
                self._compare_blocks(twin, number, min(stop, number + per_part))

    def _compare_blocks(self, twin: _Twin, first: int, stop: int) -> None:
        block_bytes, size_bytes = self._a.index.block_bytes, twin.entries[0].size_bytes
        begin, end = first * block_bytes, min(stop * block_bytes, size_bytes)
        step = span_bytes_for(end - begin, block_bytes=block_bytes, options=self._options)
        spans = [Span(at, min(at + step, end)) for at in range(begin, end, step)]
        with self._scratch.lend(end - begin) as memory_a, self._scratch.lend(end - begin) as memory_b:
            for side, entry, memory in zip((self._a, self._b), twin.entries, (memory_a, memory_b), strict=True):
                side.read(entry, [(span, memory[span.start - begin : span.stop - begin]) for span in spans])
                self._note(end - begin)
            for name, start, piece_stop in twin.pieces:
                low, high = max(start, begin), min(piece_stop, end)
                if low < high:
                    dtype = DTYPES[self._a.index.tensors[name].dtype]
                    self._add(
                        name,
                        torch.frombuffer(memory_a[low - begin : high - begin], dtype=dtype),
                        torch.frombuffer(memory_b[low - begin : high - begin], dtype=dtype),
                    )

    # -- tensors that do not -----------------------------------------------------------------------------------------

    def _parts(self, names: Sequence[str]) -> Iterator[_Part]:
        for name in names:
            shape = self._a.index.tensors[name].shape
            if 0 in shape:
                continue
            itemsize = max(DTYPES[side.index.tensors[name].dtype].itemsize for side in (self._a, self._b))
            for offsets, sizes in split_box(shape, limit=max(1, _PART_BYTES // itemsize)):
                yield _Part(name, offsets, sizes, math.prod(sizes) * itemsize)

    def _compare_batch(self, batch: Sequence[_Part]) -> None:
        def fill(side: _Side) -> list[torch.Tensor]:
            tensors = [torch.empty(part.sizes, dtype=DTYPES[side.index.tensors[part.name].dtype]) for part in batch]
            side.input.fill_boxes(
                [(part.name, part.offsets, tensor) for part, tensor in zip(batch, tensors, strict=True)]
            )
            return tensors

        sides = [fill(self._a), fill(self._b)]
        self._note(2 * sum(part.nbytes for part in batch))
        for part, one, other in zip(batch, *sides, strict=True):
            self._add(part.name, one.reshape(-1), other.reshape(-1))

    def _add(self, name: str, one: torch.Tensor, other: torch.Tensor) -> None:
        # What the library keeps in bytes is no number, so that none is near another.
        tolerance = None if name.startswith(_OURS) else self._tolerance
        self._sums[name].add(one, other, tolerance=tolerance)

    def _note(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes
        self._gauge.move(size_bytes)


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a tensor."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Twin:
    """Two shards with the same pieces at the same places.

    Attributes:
        entries: the two.
        pieces: name, first byte and stop of each piece that counts.
        runs: of blocks that are to be read, [first, stop).
        read_bytes: of these, in one of them.
    """

    entries: tuple[ShardEntry, ShardEntry]
    pieces: Sequence[tuple[str, int, int]]
    runs: Sequence[_Place] = ()
    read_bytes: int = 0

    @property
    def names(self) -> set[str]:
        """The tensors that have pieces here."""
        return {name for name, _, _ in self.pieces}

    @classmethod
    def of(
        cls, entries: tuple[ShardEntry, ShardEntry], pieces: Sequence[tuple[str, int, int]], block_bytes: int
    ) -> _Twin:
        """Find the blocks that differ and hold a byte of a piece."""
        one, other = (np.frombuffer(entry.digests, dtype=np.uint64) for entry in entries)
        unlike = one != other
        is_held = np.zeros(len(unlike), dtype=bool)
        for _, start, stop in pieces:
            is_held[start // block_bytes : -(-stop // block_bytes)] = True
        runs = list(runs_of(np.flatnonzero(unlike & is_held).tolist()))
        size_bytes = entries[0].size_bytes
        read_bytes = sum(min(stop * block_bytes, size_bytes) - first * block_bytes for first, stop in runs)
        return cls(entries, pieces, runs, read_bytes)


def _is_sized_alike(a: Index, b: Index, piece: ChunkEntry) -> bool:
    return a.shard(piece.rank, piece.number).size_bytes == b.shard(piece.rank, piece.number).size_bytes


def _aligned(index: Index, name: str, pieces: Sequence[ChunkEntry]) -> bool:
    """Tell whether no element of these pieces lies across two blocks, or where none can be looked at in place."""
    itemsize = DTYPES[index.tensors[name].dtype].itemsize
    return index.block_bytes % itemsize == 0 and all(piece.start % itemsize == 0 for piece in pieces)


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size_bytes = 0
    for part in parts:
        if batch and size_bytes + part.nbytes > _PART_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(part)
        size_bytes += part.nbytes
    if batch:
        yield batch


def _is_same(one: object, other: object) -> bool:
    # Python's own comparison takes True for 1, and an integer for a float.
    return msgspec.json.encode(one) == msgspec.json.encode(other)


def _unlike(one: Mapping[str, object], other: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    names = sorted(one.keys() | other.keys())
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
