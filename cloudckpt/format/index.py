"""The index: where every piece of every tensor lies, the digests of every shard, and the small values inline.

    magic | length of the header | header: names, shapes, values, a table of the ranks | one section per rank

A pure value with strict decoding. The header is JSON, read whole; a section holds columns, and is decoded when it is
asked for, so that a rank of thousands reads what concerns it. Limits are enforced before memory is taken, and a
decoded section is consistent in itself (FORMAT, "Index"). Names in it are compared, never used as keys.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import xxhash

from cloudckpt.errors import ManifestError, OptionsError
from cloudckpt.format.builder import Writers
from cloudckpt.format.cover import Cover
from cloudckpt.format.header import Header, Holder, header_problems, table_problems
from cloudckpt.format.manifest import Reference
from cloudckpt.format.record import (
    SHARING_VERSION,
    compress,
    decode_record,
    decompress,
    lone_surrogates,
    may_decode,
)
from cloudckpt.format.section import ChunkEntry, Section, SectionError, TensorEntry, Tensors
from cloudckpt.format.shard import DIGEST_BYTES, block_counts
from cloudckpt.format.tiling import Tiling
from cloudckpt.keys import shard_key, shown

__all__ = ["BoxPlace", "Index", "ShardEntry"]

BoxPlace = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a box."""

_MAGIC = b"cloudckpt index\n"
_LENGTH = struct.Struct("<Q")
# Up to here everything is checked when an index is decoded, which takes less than a second.
_CHECKED_PIECES = 100_000
# And up to here decoded sections are kept; beyond, only those that were asked for one by one.
_KEPT_PIECES = 1_000_000


class ShardEntry(msgspec.Struct, frozen=True, gc=False):
    """One shard: what its key is derived from, its size, and its digests, 8 bytes per block.

    Attributes:
        holder: the checkpoint that holds it; None where that is the one of the index.
        stored_number: the number in its key there.
        content: the strong digest of its bytes behind the header, b"" where there is none.
    """

    rank: int
    number: int
    attempt: str
    size_bytes: int
    digests: bytes
    holder: Holder | None = None
    stored_number: int = 0
    content: bytes = b""

    def key(self, prefix: str, *, is_copied: bool = False) -> str:
        """Return its key below the root, of the checkpoint under a prefix.

        Args:
            prefix: of the checkpoint, with its slash.
            is_copied: whether that is a copy, which has what others held below its own prefix.
        """
        if self.holder is None:
            return prefix + shard_key(self.attempt, self.rank, self.number)
        name = shard_key(self.holder.attempt, self.rank, self.stored_number)
        return (prefix if is_copied else self.holder.prefix) + name


class Index:
    """What one save wrote.

    Attributes:
        attempt: the attempt that wrote it.
        attempts: all attempts in the keys of the objects that belong to it.
        block_bytes: bytes per digest, in all its shards.
        tensors: name → dtype and shape.
        values: name → value in the codec's JSON.
        paths: name → path in the nested state that it came from.
        ranks: the ranks that wrote something, ascending.
        piece_count: pieces of all tensors together.
        shard_count: shards of all ranks together.
        total_bytes: bytes of all shards.
        content: the kind of the digests of what shards hold; "" where there are none, and all shards are its own.
        holders: checkpoints that may hold some of them.
    """

    def __init__(self, header: Header, frames: Sequence[bytes | memoryview], *, key: str) -> None:
        """Use `IndexBuilder` or `Index.decode`; the header must be without `header_problems`."""
        self._header = header
        self._records = {record.rank: record for record in header.ranks}
        self._frames = dict(zip(self._records, frames, strict=True))
        self._sections: dict[int, Section] = {}
        self._shards: dict[int, list[ShardEntry]] = {}
        self._is_checked = False
        self._key = key
        self._names = list(header.tensors)
        self.tensors = {name: TensorEntry(tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
        self._columns = Tensors(list(self.tensors.values()))
        self.attempt = header.attempt
        self.attempts = frozenset(record.attempt or header.attempt for record in header.ranks) | {header.attempt}
        self.block_bytes = header.block_bytes
        self.values = header.values
        self.paths = header.paths
        self.ranks = tuple(self._records)
        self.piece_count = sum(record.piece_count for record in header.ranks)
        self.shard_count = sum(record.shard_count for record in header.ranks)
        self.total_bytes = sum(record.stored_bytes for record in header.ranks)
        self.content = "" if header.content is msgspec.UNSET else header.content
        self.holders = () if header.holders is msgspec.UNSET else tuple(header.holders)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """Return the object's bytes.

        Raises:
            OptionsError: it would be larger than a reader accepts.
            UnsupportedValueError: a name is no Unicode text.
        """
        try:
            text = msgspec.json.encode(self._header)
        except UnicodeEncodeError as exc:
            raise lone_surrogates(exc.object) from exc
        head = compress(text)
        data = b"".join((_MAGIC, _LENGTH.pack(len(head)), head, *self._frames.values()))
        decoded_bytes = len(text) + sum(record.decoded_bytes for record in self._header.ranks)
        if not may_decode(len(head), len(text)) or not may_decode(len(data), decoded_bytes):
            raise OptionsError(
                f"the index has {decoded_bytes} bytes ({len(data)} compressed), more than a reader accepts; save long "
                "lists of numbers as tensors, or lay the state out in fewer, larger pieces"
            )
        return data

    @classmethod
    def decode(cls, data: bytes, *, key: str) -> Index:
        """Read an index back; `key` names it in errors.

        The header is checked, and a section when it is decoded. An index of a usual size is checked whole.

        Raises:
            ManifestError: not an index of a known version, larger than the limits, or inconsistent in itself.
        """
        if not data.startswith(_MAGIC):
            raise ManifestError(f"{key} is no index of a checkpoint; restore an older step", key=key)
        at = len(_MAGIC) + _LENGTH.size
        (size_bytes,) = _LENGTH.unpack(data[len(_MAGIC) : at]) if len(data) >= at else (len(data),)
        if size_bytes > len(data) - at:
            raise _inconsistent(key, f"its header would have {size_bytes} bytes")
        text = decompress(memoryview(data)[at : at + size_bytes], key=key)
        header = decode_record(text, Header, key=key, written=msgspec.json.encode, newest=SHARING_VERSION)
        _refuse(header_problems(header), key)
        _refuse(table_problems(header.ranks, len(data) - at - size_bytes, len(data), len(text)), key)
        places = np.cumsum([at + size_bytes, *(record.size_bytes for record in header.ranks)]).tolist()
        index = cls(header, [memoryview(data)[start:stop] for start, stop in pairwise(places)], key=key)
        if index.piece_count < _CHECKED_PIECES:
            index.check()
        return index

    # -- consistency -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ManifestError` unless every piece lies inside its shard and the pieces tile their tensors.

        Decodes every section; takes time in proportion to the pieces, however they lie.
        """
        _refuse(self.problems(), self._key)
        self._is_checked = True

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, beyond what a section alone tells, for which `ManifestError` is raised."""
        yield from header_problems(self._header)
        tiling, writers = Tiling(self._columns.shapes), Writers()
        writers.grow(len(self._columns))
        for section in self._each_section():
            tiling.add(section.tensor, section.offsets, section.sizes)
            writers.see(section)
        for number in tiling.untiled().tolist():
            yield f"tensor {shown(self._names[number])} is not tiled by its pieces"
        claimed = [tensor.writer for tensor in self._header.tensors.values()]
        for number in np.flatnonzero(writers.found != claimed).tolist():
            yield f"tensor {shown(self._names[number])} was not all written by rank {claimed[number]} alone"

    # -- content ---------------------------------------------------------------------------------------------------

    def section(self, rank: int) -> Section:
        """Return what a rank wrote, decoded once and checked.

        Raises:
            ManifestError: it is not what the header says, or inconsistent in itself.
        """
        if rank not in self._sections:
            self._sections[rank] = self._decoded(rank)
        return self._sections[rank]

    def references(self) -> list[Reference]:
        """Return who else holds shards of it, how many, and their bytes, in the order of `holders`."""
        if not self.holders:
            return []
        counts, sizes = np.zeros((2, len(self.holders) + 1), dtype=np.int64)
        for section in self._each_section():
            if section.origins is not None:
                counts += np.bincount(section.origins.holder, minlength=len(counts))
                np.add.at(sizes, section.origins.holder, section.shard_sizes)
        told = zip(self.holders, counts[1:].tolist(), sizes[1:].tolist(), strict=True)
        return [
            Reference(step=one.step, epoch=one.epoch, attempt=one.attempt, shard_count=count, total_bytes=size_bytes)
            for one, count, size_bytes in told
            if count
        ]

    def stored(self, rank: int) -> tuple[str, int, int]:
        """Return the attempt of a rank, how many shards it wrote, and their bytes together; decodes nothing."""
        record = self._records[rank]
        return record.attempt or self.attempt, record.shard_count, record.stored_bytes

    def shard(self, rank: int, number: int) -> ShardEntry:
        """Return one shard; `number` must be one that a piece names."""
        section = self.section(rank)
        if rank not in self._shards:
            self._shards[rank] = list(self._shards_of(section))
        return self._shards[rank][number]

    def shards(self) -> Iterator[ShardEntry]:
        """Yield all shards, by rank and number."""
        for section in self._each_section():
            yield from self._shards_of(section)

    def tensors_in(self, entry: ShardEntry, start: int, stop: int) -> list[str]:
        """Return the names of the tensors that have bytes in [start, stop) of a shard, in the order of these."""
        section = self.section(entry.rank)
        rows = np.flatnonzero(section.shard == entry.number)
        firsts, stops = section.start[rows], (section.start + section.nbytes(self._columns))[rows]
        found = section.tensor[rows[(firsts < stop) & (stops > start)]].tolist()
        return [self._names[number] for number in dict.fromkeys(found)]

    def pieces_of(self, rank: int) -> Iterator[tuple[str, ChunkEntry]]:
        """Yield a rank's pieces in the order of their bytes, each with its tensor's name; an object per piece."""
        section = self.section(rank)
        for number, chunk in section.chunks(np.arange(len(section)), self._columns):
            yield self._names[number], chunk

    def piece_counts(self) -> dict[str, int]:
        """Return how many pieces each tensor has."""
        counts = np.zeros(len(self._columns), dtype=np.int64)
        for section in self._each_section():
            counts += np.bincount(section.tensor, minlength=len(counts))
        return dict(zip(self._names, counts.tolist(), strict=True))

    def single_pieces(self) -> dict[str, tuple[int, int, int]]:
        """Return where tensors lie that are one piece each, by name: rank and number of their shard, and first byte.

        Of an index that is not checked whole, because it is large, none are told.
        """
        if not self._is_checked:
            return {}
        counts = np.zeros(len(self._columns), dtype=np.int64)
        for section in self._each_section():
            counts += np.bincount(section.tensor, minlength=len(counts))
        found: dict[str, tuple[int, int, int]] = {}
        for section in self._each_section():
            rows = np.flatnonzero(counts[section.tensor] == 1)
            columns = (section.tensor[rows].tolist(), section.shard[rows].tolist(), section.start[rows].tolist())
            found.update(
                (self._names[tensor], (section.rank, shard, start))
                for tensor, shard, start in zip(*columns, strict=True)
            )
        return found

    def all_pieces(self) -> dict[str, list[ChunkEntry]]:
        """Return the pieces of every tensor, by name, and check them first; an object per piece."""
        if not self._is_checked:
            self.check()
        found: list[list[ChunkEntry]] = [[] for _ in self._names]
        for section in self._each_section():
            for number, chunk in section.chunks(np.arange(len(section)), self._columns):
                found[number].append(chunk)
        return dict(zip(self._names, found, strict=True))

    def covering(
        self, wanted: Mapping[str, Sequence[BoxPlace]], *, near: int | None = None
    ) -> dict[str, list[ChunkEntry]]:
        """Return the pieces that overlap wanted boxes, by the name of their tensor.

        Decodes the section of rank `near` first, then those of ranks that wrote a missing tensor alone, and all
        others only if something is still missing.

        Args:
            wanted: name → boxes of that tensor.
            near: the rank whose section holds most of it: on the topology of the save, the caller's own.

        Raises:
            OptionsError: a wanted box is not inside a tensor of the index.
            ManifestError: the pieces found do not cover a wanted box exactly once.
        """
        numbers = {name: number for number, name in enumerate(self._names)}
        for name, parts in wanted.items():
            if name not in numbers or not all(_is_inside(box, self.tensors[name].shape) for box in parts):
                raise OptionsError(f"{shown(name)} is no tensor of the checkpoint, or a wanted part is not inside it")
        boxes = [(numbers[name], *box) for name, parts in wanted.items() for box in parts]
        cover = Cover(self._columns, boxes)
        for section in self._likely_first(cover, near):
            cover.take(section)
        for place in cover.uncovered():
            name = self._names[boxes[place][0]]
            raise _inconsistent(self._key, f"a part of tensor {shown(name)} is not tiled by its pieces")
        found: dict[str, list[ChunkEntry]] = {name: [] for name in wanted}
        for number, chunk in cover.chunks():
            found[self._names[number]].append(chunk)
        return found

    def _likely_first(self, cover: Cover, near: int | None) -> Iterator[Section]:
        """Yield sections, those first that are likely to hold what is wanted, until nothing is missing."""
        tried = set() if near is None else {near} & self._records.keys()
        yield from (self.section(rank) for rank in tried if not cover.is_complete())
        tensors = list(self._header.tensors.values())
        alone = {tensors[number].writer for number in cover.missing_tensors().tolist()} - {-1} - tried
        yield from (self.section(rank) for rank in sorted(alone) if not cover.is_complete())
        for rank in self.ranks:
            if cover.is_complete():
                return
            if rank not in tried | alone:
                yield self._kept(rank)

    def _each_section(self) -> Iterator[Section]:
        return map(self._kept, self.ranks)

    def _kept(self, rank: int) -> Section:
        """Return a section, to be decoded again the next time if all of them together are large."""
        if rank in self._sections or self.piece_count <= _KEPT_PIECES:
            return self.section(rank)
        return self._decoded(rank)

    def _decoded(self, rank: int) -> Section:
        record, frame = self._records[rank], self._frames[rank]
        if xxhash.xxh3_64_hexdigest(frame) != record.digest:
            raise _inconsistent(self._key, f"the section of rank {rank} has not the digest that its header says")
        data = decompress(frame, key=self._key)
        if len(data) != record.decoded_bytes:
            raise _inconsistent(self._key, f"the section of rank {rank} has not the size that its header says")
        try:
            section = Section.decode(
                data,
                self._columns,
                rank=rank,
                attempt=record.attempt or self.attempt,
                counts=(record.shard_count, record.piece_count),
                block_bytes=self.block_bytes,
                holder_count=len(self.holders) if self.content else None,
            )
        except SectionError as exc:
            raise _inconsistent(self._key, f"the section of rank {rank} cannot be decoded: {exc}") from exc
        _refuse(section.problems(self._names, self._columns), self._key)
        if int(section.shard_sizes.sum()) != record.stored_bytes:
            raise _inconsistent(self._key, f"the shards of rank {rank} have not {record.stored_bytes} bytes together")
        return section

    def _shards_of(self, section: Section) -> Iterator[ShardEntry]:
        stops = (np.cumsum(block_counts(section.shard_sizes, self.block_bytes)) * DIGEST_BYTES).tolist()
        places = zip(section.shard_sizes.tolist(), [0, *stops[:-1]], stops, strict=False)
        origins = section.origins
        for number, (size_bytes, first, stop) in enumerate(places):
            digests = section.digests[first:stop]
            if origins is None:
                yield ShardEntry(section.rank, number, section.attempt, size_bytes, digests)
                continue
            place, stored = int(origins.holder[number]), int(origins.number[number])
            holder = self.holders[place - 1] if place else None
            content = origins.contents[number]
            yield ShardEntry(section.rank, number, section.attempt, size_bytes, digests, holder, stored, content)


def _inconsistent(key: str, problem: str) -> ManifestError:
    return ManifestError(f"index {key} is inconsistent: {problem}; restore an older step", key=key)


def _refuse(problems: Iterable[str], key: str) -> None:
    for problem in problems:
        raise _inconsistent(key, problem)


def _is_inside(box: BoxPlace, shape: Sequence[int]) -> bool:
    offsets, sizes = box
    if not len(offsets) == len(sizes) == len(shape):
        return False
    return all(min(at, size) >= 0 and at + size <= extent for at, size, extent in zip(*box, shape, strict=True))
