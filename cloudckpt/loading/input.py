"""Read what one rank needs of a checkpoint: its index, and the verified bytes that go into the rank's tensors.

    manifest ──▶ index ──▶ DCP Metadata ──▶ planner (resharding) ──▶ read items
    read items ──layout──▶ spans ──download, verified──▶ landings ──▶ target tensors

Every piece in the index is one chunk to DCP, so its planners reshard over pieces and stay untouched. Used by
`CloudReader`, whom DCP leads through a load, and by `lead`, which leads one itself. No pickle is read: a value is
decoded by our codec and, for planners that expect one, made into bytes in memory. Keeps FORMAT invariants 1 and 12.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumError,
    ManifestError,
    MissingShardError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import (
    DTYPES,
    NOTES,
    BoxPlace,
    ChunkEntry,
    Index,
    IndexRef,
    PathElement,
    ShardEntry,
    codec,
    digest_of,
    index_key,
    plan_spans,
)
from cloudckpt.loading.landing import Landing, Taker, Taking, Whole, deliver, take_wholes, takers_of
from cloudckpt.options import Options
from cloudckpt.root import Catalog, Checkpoint, ShardPlaces
from cloudckpt.state import collector_at_rest
from cloudckpt.store import Store, one_deadline
from cloudckpt.transfer import Budget, Fetch, ShardSource, Watch, download, span_bytes_for

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

__all__ = [
    "Pieces",
    "RankInput",
    "by_part_name",
    "decode_index",
    "describe",
    "part_targets",
    "read_index",
    "read_index_bytes",
]

Pieces = Mapping[str, Sequence[ChunkEntry]]
"""Name of a tensor → pieces of it."""


def read_index_bytes(catalog: Catalog, checkpoint: Checkpoint) -> bytes:
    """Read the bytes of the index that a checkpoint's manifest commits; once more if they are wrong. One request.

    Raises:
        MissingShardError: it is not on the store.
        ChecksumError: it is not byte for byte what was committed.
        ManifestError: the manifest names none.
    """
    key = checkpoint.prefix + index_key(checkpoint.attempt)
    committed = checkpoint.manifest.index
    if committed is None:
        raise ManifestError(f"the manifest of {checkpoint.url} commits no index", key=key)
    try:
        return _committed_bytes(catalog, key, committed)
    except ChecksumError:
        # Only a second look tells a damaged object from a damaged answer.
        return _committed_bytes(catalog, key, committed)


def _size_of(catalog: Catalog, key: str) -> int:
    """Return the size of an object that could not be read, 0 if that cannot be told either."""
    try:
        return catalog.store.head(key).size_bytes
    except StorageError:
        return 0


@one_deadline()
def _committed_bytes(catalog: Catalog, key: str, committed: IndexRef) -> bytes:
    try:
        data = catalog.store.read(key, limit_bytes=committed.size_bytes + 1)
    except BucketNotFoundError:
        raise  # no older step is there, either
    except ObjectNotFoundError as exc:
        raise MissingShardError(
            f"index {key}, which the manifest commits, is not on the store; restore an older step", key=key
        ) from exc
    except StorageError as exc:
        if not exc.is_other_object and _size_of(catalog, key) <= committed.size_bytes:
            raise
        raise ChecksumError(
            f"index {key} has not the {committed.size_bytes} bytes that were committed; restore an older step ({exc})",
            key=key,
        ) from exc
    if len(data) != committed.size_bytes or digest_of(data) != committed.sha256:
        raise ChecksumError(
            f"index {key} has {len(data)} bytes that differ from the {committed.size_bytes} committed; "
            "restore an older step",
            key=key,
        )
    return data


def decode_index(checkpoint: Checkpoint, data: bytes) -> Index:
    """Decode the bytes that `read_index_bytes` returned; raises `ManifestError` if it is no index of the checkpoint."""
    key = checkpoint.prefix + index_key(checkpoint.attempt)
    with collector_at_rest():
        index = Index.decode(data, key=key)
    if index.attempt != checkpoint.attempt:
        raise ManifestError(f"index {key} is of attempt {index.attempt}; restore an older step", key=key)
    return index


def read_index(catalog: Catalog, checkpoint: Checkpoint) -> Index:
    """Read and decode the index of a checkpoint; raises as the two of them."""
    return decode_index(checkpoint, read_index_bytes(catalog, checkpoint))


@dataclass(frozen=True, slots=True)
class RankInput:
    """The bytes of one checkpoint that one rank reads from a store."""

    store: Store
    checkpoint: Checkpoint
    index: Index
    options: Options
    watch: Watch | None = None

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill whole tensors on the host, by name; raises as `read` does."""
        others: dict[str, object] = dict(tensors)
        wholes = take_wholes(others, self.index)
        if not others:
            self.read([], None, {}, wholes)
            return
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        boxes = {name: [((0,) * tensors[name].dim(), tuple(tensors[name].shape))] for name in others}
        pieces = self.index.covering(boxes)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        with torch.no_grad():
            planner.set_up_planner(others, describe(self.index, pieces), is_coordinator=False)
            self.read(planner.create_local_plan().items, planner, pieces, wholes)

    def fill_boxes(self, boxes: Sequence[tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
        """Fill tensors on the host that are boxes of saved ones; raises as `read` does.

        Args:
            boxes: the saved tensor's name, where in it the box starts, and the tensor to be filled, none of them empty.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        wanted: dict[str, list[BoxPlace]] = defaultdict(list)
        for name, offsets, tensor in boxes:
            wanted[name].append((offsets, tuple(tensor.shape)))
        pieces = self.index.covering(wanted)
        described = describe(self.index, pieces)
        items: list[ReadItem] = []
        for number, (name, offsets, tensor) in enumerate(boxes):
            saved = described.state_dict_metadata[name]
            box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape)
            # To the planner each box is a tensor of its own, which starts where it starts.
            here = MetadataIndex(str(number), [0] * tensor.dim())
            found = create_read_items_for_chunk_list(name, cast("TensorStorageMetadata", saved), [box])
            items += [replace(item, dest_index=here) for item in found]
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({str(number): box[2] for number, box in enumerate(boxes)}, described)
        with torch.no_grad():
            self.read(items, planner, pieces)

    def read(
        self,
        items: Sequence[ReadItem],
        planner: LoadPlanner | None,
        pieces: Pieces,
        wholes: Mapping[tuple[int, int], Sequence[Whole]] = MappingProxyType({}),
    ) -> None:
        """Fill every target that the items name; return when all of them are complete.

        Args:
            items: what DCP's planner made of `describe(index, pieces)`.
            planner: hands out the targets; None where there are no items.
            pieces: what was described.
            wholes: what else is filled, by rank and number of the shard, in the order of its bytes.

        Raises:
            IntegrityError: an object is missing or differs from what was committed.
            StorageError: the store could not be read. In either case targets may hold a mixture.
        """
        budget = Budget(self.options.transfer_budget_bytes)
        with collector_at_rest():
            landings = {} if planner is None else self._landings(items, planner, pieces, budget)
            places = ShardPlaces.of(self.store, self.checkpoint)
            fetches = self._all_fetches(landings, places, wholes)
        concurrency = self.options.concurrency
        download(places.store, fetches, concurrency=concurrency, budget=budget, watch=self.watch)

    def hand_on(self, takers: Mapping[tuple[int, int], Sequence[Taker]]) -> None:
        """Read ranges of shards, and hand their verified bytes on as they come; raises as `read` does.

        Args:
            takers: who takes them, by rank and number of the shard.
        """
        with collector_at_rest():
            places = ShardPlaces.of(self.store, self.checkpoint)
            fetches = self._all_fetches(takers, places)
        budget = Budget(self.options.transfer_budget_bytes)
        download(places.store, fetches, concurrency=self.options.concurrency, budget=budget, watch=self.watch)

    def _all_fetches(
        self,
        takers: Mapping[tuple[int, int], Sequence[Taker]],
        places: ShardPlaces,
        wholes: Mapping[tuple[int, int], Sequence[Whole]] = MappingProxyType({}),
    ) -> list[Fetch]:
        entries = {place: self.index.shard(*place) for place in sorted(takers.keys() | wholes.keys())}
        # What is held from its first byte on is taken from the budget with its span: a long one would hold much.
        held_bytes = sum(one.buffer_bytes for some in takers.values() for one in some)
        total_bytes = sum(one.stop - one.start for by in (takers, wholes) for some in by.values() for one in some)
        span_bytes = span_bytes_for(
            0 if held_bytes else total_bytes, block_bytes=self.index.block_bytes, options=self.options
        )
        return [
            fetch
            for place, entry in entries.items()
            for fetch in self._fetches(
                entry, places.key(entry), takers.get(place, ()), wholes.get(place, ()), span_bytes
            )
        ]

    def _landings(
        self, items: Sequence[ReadItem], planner: LoadPlanner, pieces: Pieces, budget: Budget
    ) -> dict[tuple[int, int], list[Landing]]:
        """Load the values of a plan, and return where its tensors' bytes go, by rank and number of their shard."""
        from torch.distributed.checkpoint.planner import LoadItemType

        landings: dict[tuple[int, int], list[Landing]] = defaultdict(list)
        parts = part_targets(
            self.index, {item.storage_index.fqn for item in items if item.type is LoadItemType.BYTE_IO}
        )
        if parts:
            self.fill(by_part_name(parts))
        by_offset = _pieces_by_offset(pieces, {item.storage_index.fqn for item in items})
        taking = Taking(planner, budget)
        for item in items:
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                data = io.BytesIO()
                torch.save(codec.decode(self.index.values[name], key=name, parts=parts.get(name)), data)
                data.seek(0)
                planner.load_bytes(item, data)
                continue
            piece = by_offset[name, tuple(item.storage_index.offset or ())]
            landings[piece.rank, piece.number].append(Landing(item, taking, self.index.tensors[name], piece))
        return landings

    def _fetches(
        self, entry: ShardEntry, key: str, landings: Sequence[Taker], wholes: Sequence[Whole], span_bytes: int
    ) -> list[Fetch]:
        source = ShardSource(
            key=key,
            size_bytes=entry.size_bytes,
            digests=entry.digests,
            block_bytes=self.index.block_bytes,
        )
        wanted = [(landing.start, landing.stop) for landing in landings]
        spans = plan_spans(
            [*wanted, *((whole.start, whole.stop) for whole in wholes)],
            size_bytes=entry.size_bytes,
            block_bytes=self.index.block_bytes,
            span_bytes=span_bytes,
        )
        block_bytes = self.index.block_bytes
        starts = [span.start for span in spans]
        takers: dict[int, list[Taker]] = {
            at: takers_of(
                wholes[bisect_right(wholes, at, key=_stop_of) : bisect_left(wholes, stop, key=_start_of)], at, stop
            )
            for span in spans
            for at in range(span.start, span.stop, block_bytes)
            for stop in [min(at + block_bytes, span.stop)]
        }
        buffer_bytes = [0] * len(spans)
        for landing in landings:
            if landing.start == landing.stop:
                landing.finish()
                continue
            buffer_bytes[bisect_right(starts, landing.start) - 1] += landing.buffer_bytes
            for at in range(landing.start // block_bytes * block_bytes, landing.stop, block_bytes):
                takers[at].append(landing)
        consume = partial(deliver, takers)
        return [
            Fetch(shard=source, span=span, consume=consume, buffer_bytes=held_bytes)
            for span, held_bytes in zip(spans, buffer_bytes, strict=True)
        ]


_start_of, _stop_of = attrgetter("start"), attrgetter("stop")


def describe(index: Index, pieces: Pieces) -> Metadata:
    """Say in DCP's words what an index holds.

    Args:
        index: the index.
        pieces: those to list, by name: all of them, or those that cover what is wanted (`Index.covering`). Only
            tensors that are named here are described.
    """
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, of_name in pieces.items():
        tensor = index.tensors[name]
        described[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=DTYPES[tensor.dtype]),
            size=torch.Size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                for chunk in of_name
            ],
        )
    # Notes are for restores of ours; DCP has no use for them.
    described |= {name: BytesStorageMetadata() for name in index.values if name != NOTES}
    paths = {name: tuple(_plain_step(element) for element in index.paths.get(name, [name])) for name in described}
    return Metadata(state_dict_metadata=described, planner_data=paths, storage_meta=StorageMeta())


def _plain_step(element: PathElement) -> str | int:
    """Return the step of a path as DCP writes it, which knows string keys and places only."""
    if not isinstance(element, dict):
        return element
    ((kind, key),) = element.items()
    if kind == "defaultdict" and isinstance(key, list):
        key = key[1]
    return key if kind == "tuple" and isinstance(key, int) else str(key)


def _pieces_by_offset(pieces: Pieces, names: set[str]) -> dict[tuple[str, tuple[int, ...]], ChunkEntry]:
    """Map (name, offsets) to the piece there; where an empty piece shares an offset, the one with bytes wins."""
    found: dict[tuple[str, tuple[int, ...]], ChunkEntry] = {}
    for name in names & pieces.keys():
        for chunk in sorted(pieces[name], key=lambda chunk: math.prod(chunk.sizes)):
            found[name, chunk.offsets] = chunk
    return found


def part_targets(index: Index, names: Collection[str]) -> dict[str, dict[int, torch.Tensor]]:
    """Return new tensors for the parts of some values: name of the value → number of the part → tensor.

    Raises:
        ManifestError: a tensor that is called a part of one of them is none.
    """
    found = {name: of_name for name, of_name in codec.part_names(index.tensors).items() if name in names}
    for part in (part for of_name in found.values() for part in of_name.values()):
        if index.tensors[part].dtype != "uint8" or len(index.tensors[part].shape) != 1:
            raise ManifestError(f"tensor {part!r} is no part of a value; restore an older step", key=part)
    return {
        name: {
            number: torch.empty(index.tensors[part].shape, dtype=torch.uint8, device="cpu")
            for number, part in of_name.items()
        }
        for name, of_name in found.items()
    }


def by_part_name(parts: Mapping[str, Mapping[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of `part_targets` by their own names, to be filled."""
    return {codec.part_name(number, name): part for name, of_name in parts.items() for number, part in of_name.items()}
