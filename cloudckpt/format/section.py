"""Turn what one rank wrote into the columns of its section of an index, and back.

A section says which shards the rank wrote, their digests, and which box of which tensor lies where in them. Its rows
are pieces in the order of their bytes, so that what stands in a column is nearly the same from row to row. Pure
values; decoding takes no more memory than eight times the section, and believes nothing (FORMAT, "Section").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloudckpt.format.boxes import Column, ragged_places, row_products, starts_of
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.content import CONTENT_BYTES
from cloudckpt.format.record import NUMBER_LIMIT
from cloudckpt.format.shard import DIGEST_BYTES, block_counts
from cloudckpt.keys import shown

__all__ = ["ChunkEntry", "Origins", "Section", "SectionError", "TensorEntry", "Tensors"]

# The length of a safetensors header stands before it, so no piece starts earlier.
_LENGTH_BYTES = 8
_WIDTHS = {1: "<i1", 2: "<i2", 4: "<i4", 8: "<i8"}
# A row has at least a tensor, a shard and a gap; a shard at least a size and one digest.
_ROW_BYTES = 3
_SHARD_BYTES = 1 + DIGEST_BYTES


class SectionError(ValueError):
    """A section's bytes cannot be what they claim to be."""


class ChunkEntry(NamedTuple):
    """One piece: a dense row-major box of a tensor in one shard.

    Attributes:
        offsets: where the box starts in the tensor.
        sizes: the box's extent.
        rank: whose shard it lies in.
        number: the shard's number.
        start: the box's first byte in the shard object.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int
    number: int
    start: int


class TensorEntry(msgspec.Struct, frozen=True, gc=False):
    """One tensor: torch's dtype name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize_bytes(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize


class Tensors:
    """The tensors of an index as columns; a tensor's place is its number.

    Attributes:
        shapes: each tensor's shape.
        dimensions: each tensor's number of dimensions.
        bases: where each tensor's extents begin in `extents`, and where the last one's end.
        extents: all extents, tensor after tensor.
        item_bytes: bytes per element.
    """

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        """Take tensors whose dtypes are known and whose shapes are possible."""
        self.shapes = tuple(entry.shape for entry in entries)
        self.dimensions = _column([len(shape) for shape in self.shapes])
        self.bases = starts_of(self.dimensions)
        self.extents = _column([size for shape in self.shapes for size in shape])
        self.item_bytes = _column([entry.itemsize_bytes for entry in entries])

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.shapes)

    def firsts(self, tensor: Column) -> Column:
        """Return where the values of boxes of these tensors begin in a ragged column, and where the last one's end."""
        return starts_of(self.dimensions[tensor])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Origins:
    """Whose objects the shards of one rank are, and what they hold; a value for each shard.

    Attributes:
        holder: 0 where it is the rank's own, else 1 + the place of who holds it among the index's holders.
        number: that in the key of the object, where it is another's; else 0.
        contents: the strong digest of its bytes behind the header; b"" where nobody has made one.
    """

    holder: Column
    number: Column
    contents: Sequence[bytes]

    def encode(self) -> bytes:
        """Return the columns as they stand in a section."""
        is_known = np.asarray([bool(content) for content in self.contents], dtype=np.int64)
        return b"".join([_packed(self.holder), _packed(self.number), _packed(is_known), *self.contents])

    @classmethod
    def decode(cls, source: _Source, count: int, *, holder_count: int) -> Origins:
        """Read back what `encode` gave of so many shards; raises `SectionError` if it cannot be."""
        holder, number, is_known = source.column(count), source.column(count), source.column(count)
        if ((holder < 0) | (holder > holder_count) | (number < 0) | (number >= NUMBER_LIMIT)).any():
            raise SectionError("it has a shard of a holder that is not listed")
        if (number[holder == 0] != 0).any() or ((is_known < 0) | (is_known > 1)).any():
            raise SectionError("it has an own shard with another's number, or a flag that is none")
        contents = [source.take(CONTENT_BYTES) if one else b"" for one in is_known.tolist()]
        return cls(holder=holder, number=number, contents=contents)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """What one rank wrote.

    Attributes:
        rank: the rank.
        attempt: the attempt that its shards' keys carry.
        shard_sizes: bytes of each shard object; a shard's place here is its number.
        digests: 8 bytes per block, shard after shard.
        tensor: of each piece, the number of its tensor.
        shard: of each piece, the number of its shard.
        start: of each piece, its first byte in the shard object.
        offsets: where the pieces start in their tensors, one value per dimension, piece after piece.
        sizes: their extents, in the same way.
        origins: whose objects the shards are; None where all are its own, and no other checkpoint's.
    """

    rank: int
    attempt: str
    shard_sizes: Column
    digests: bytes
    tensor: Column
    shard: Column
    start: Column
    offsets: Column
    sizes: Column
    origins: Origins | None = None

    def __len__(self) -> int:
        """Return how many pieces there are."""
        return len(self.tensor)

    @property
    def is_own(self) -> NDArray[np.bool_]:
        """Which of the shards are the rank's own, and not another checkpoint's."""
        return np.ones(len(self.shard_sizes), dtype=bool) if self.origins is None else self.origins.holder == 0

    def nbytes(self, tensors: Tensors) -> Column:
        """Return each piece's bytes."""
        return row_products(self.sizes, tensors.firsts(self.tensor)) * tensors.item_bytes[self.tensor]

    def chunks(self, rows: Column, tensors: Tensors) -> Iterator[tuple[int, ChunkEntry]]:
        """Yield some of the pieces one by one, each with its tensor's number."""
        places = ragged_places(tensors.firsts(self.tensor), rows)
        offsets, sizes = self.offsets[places].tolist(), self.sizes[places].tolist()
        stops = np.cumsum(tensors.dimensions[self.tensor[rows]]).tolist()
        columns = (self.tensor[rows].tolist(), self.shard[rows].tolist(), self.start[rows].tolist())
        for tensor, number, start, first, stop in zip(*columns, [0, *stops], stops, strict=False):
            yield tensor, ChunkEntry(tuple(offsets[first:stop]), tuple(sizes[first:stop]), self.rank, number, start)

    # -- bytes -------------------------------------------------------------------------------------------------

    def encode(self, tensors: Tensors) -> bytes:
        """Return the columns as they stand in a frame."""
        stops = self.start + self.nbytes(tensors)
        gaps = self.start - np.where(_is_head(self.shard), 0, _before(stops))
        columns = [_packed(self.shard_sizes), self.digests]
        columns += [] if self.origins is None else [self.origins.encode()]
        columns += [_packed(np.diff(values, prepend=0)) for values in (self.tensor, self.shard)]
        columns.append(_packed(gaps))
        for places in _axes(tensors, self.tensor):
            columns += [_packed(self.offsets[places]), _packed(self.sizes[places])]
        return b"".join(columns)

    @classmethod
    def decode(
        cls,
        data: bytes,
        tensors: Tensors,
        *,
        rank: int,
        attempt: str,
        counts: tuple[int, int],
        block_bytes: int,
        holder_count: int | None = None,
    ) -> Section:
        """Read back what `encode` gave; `counts` are its shards and pieces, and without holders it has no origins.

        Raises:
            SectionError: too short, too long, or it speaks of shards or tensors that cannot be. What is returned
                may still be inconsistent: `problems` says how.
        """
        shards, pieces = counts
        source = _Source(data)
        if shards * _SHARD_BYTES + pieces * _ROW_BYTES > len(data):
            raise SectionError(f"{len(data)} bytes cannot hold {shards} shards and {pieces} pieces")
        shard_sizes = source.column(shards)
        if ((shard_sizes <= _LENGTH_BYTES) | (shard_sizes >= NUMBER_LIMIT)).any():
            raise SectionError("it has a shard without data, or beyond any store")
        blocks = block_counts(shard_sizes, block_bytes)
        # Added up in floating point first: a sum of hostile integers may wrap around to a small one.
        if blocks.sum(dtype=np.float64) * DIGEST_BYTES > len(data):
            raise SectionError(f"{len(data)} bytes cannot hold the digests of its shards")
        digests = source.take(DIGEST_BYTES * int(blocks.sum()))
        origins = None if holder_count is None else Origins.decode(source, shards, holder_count=holder_count)
        tensor = np.cumsum(source.column(pieces))
        if ((tensor < 0) | (tensor >= len(tensors))).any():
            raise SectionError("it has a piece of a tensor that is not listed")
        shard, gaps = np.cumsum(source.column(pieces)), source.column(pieces)
        offsets, sizes = source.boxes(tensors, tensor)
        source.close()
        nbytes = row_products(sizes, tensors.firsts(tensor)) * tensors.item_bytes[tensor]
        return cls(
            rank=rank,
            attempt=attempt,
            shard_sizes=shard_sizes,
            digests=digests,
            tensor=tensor,
            shard=shard,
            start=_starts(shard, gaps, nbytes),
            offsets=offsets,
            sizes=sizes,
            origins=origins,
        )

    # -- consistency -------------------------------------------------------------------------------------------

    def problems(self, names: Sequence[str], tensors: Tensors) -> Iterator[str]:
        """Yield what is wrong with a decoded section by itself: bounds, and bytes that two pieces claim."""
        firsts = tensors.firsts(self.tensor)
        is_wrong = ~self._is_inside(tensors, firsts)
        is_wrong |= ~((self.shard >= 0) & (self.shard < len(self.shard_sizes)))
        if is_wrong.any():
            yield self._misplaced(names, firsts, int(np.argmax(is_wrong)))
            return
        nbytes = self.nbytes(tensors)
        is_wrong = (self.start < _LENGTH_BYTES) | (self.start > self.shard_sizes[self.shard] - nbytes)
        if is_wrong.any():
            yield self._misplaced(names, firsts, int(np.argmax(is_wrong)))
            return
        yield from self._overlaps(nbytes)

    def _is_inside(self, tensors: Tensors, firsts: Column) -> NDArray[np.bool_]:
        lengths = np.diff(firsts)
        axes = np.arange(firsts[-1]) + np.repeat(tensors.bases[self.tensor] - firsts[:-1], lengths)
        # In this order, because the difference of an extent and a size cannot overflow.
        is_out = (self.offsets < 0) | (self.sizes < 0) | (self.offsets > tensors.extents[axes] - self.sizes)
        is_inside = np.ones(len(self.tensor), dtype=bool)
        is_inside[np.repeat(np.arange(len(lengths)), lengths)[is_out]] = False
        return is_inside

    def _misplaced(self, names: Sequence[str], firsts: Column, row: int) -> str:
        part = slice(firsts[row], firsts[row + 1])
        piece = (self.offsets[part].tolist(), self.sizes[part].tolist(), int(self.shard[row]), int(self.start[row]))
        name = shown(names[self.tensor[row]])
        return f"tensor {name} has a piece {shown(piece)} of rank {self.rank} that leaves the tensor or its shard"

    def _overlaps(self, nbytes: Column) -> Iterator[str]:
        """Yield where two pieces claim the same byte; also pieces that are out of order, which could hide it."""
        rows = np.flatnonzero(nbytes)
        shard, start = self.shard[rows], self.start[rows]
        stop = start + nbytes[rows]
        is_twice = (shard[1:] < shard[:-1]) | ((shard[1:] == shard[:-1]) & (start[1:] < stop[:-1]))
        if is_twice.any():
            row = int(np.argmax(is_twice)) + 1
            yield f"two pieces share byte {start[row]} of shard {(self.rank, int(shard[row]))}"


class _Source:
    """Take columns from bytes, each only if it is there in full."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self._data) - self._at:
            raise SectionError("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def column(self, count: int) -> Column:
        """Return the next column, of `count` values."""
        (width,) = self.take(1)
        if width not in _WIDTHS:
            raise SectionError(f"it has a column of width {width}")
        return np.frombuffer(self.take(width * count), dtype=_WIDTHS[width]).astype(np.int64)

    def boxes(self, tensors: Tensors, tensor: Column) -> tuple[Column, Column]:
        """Return the offsets and sizes of boxes of these tensors."""
        # A row of 64 dimensions has 128 bytes at least: claimed values are compared with the bytes that are left.
        values = int(tensors.dimensions[tensor].sum())
        if 2 * values > len(self._data) - self._at:
            raise SectionError("it ends too early")
        offsets, sizes = np.empty(values, dtype=np.int64), np.empty(values, dtype=np.int64)
        for places in _axes(tensors, tensor):
            offsets[places] = self.column(len(places))
            sizes[places] = self.column(len(places))
        return offsets, sizes

    def close(self) -> None:
        """Refuse bytes that nothing took."""
        if self._at != len(self._data):
            raise SectionError(f"{len(self._data) - self._at} bytes follow its columns")


def _axes(tensors: Tensors, tensor: Column) -> Iterator[Column]:
    """Yield, axis by axis, the places of that axis's values in a ragged column."""
    dimensions = tensors.dimensions[tensor]
    firsts = np.cumsum(dimensions) - dimensions
    for axis in range(int(dimensions.max(initial=0))):
        yield firsts[dimensions > axis] + axis


def _packed(values: Column) -> bytes:
    """Return one column: its width in bytes, and the values in the narrowest width that holds them."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    width = next(width for width in _WIDTHS if -(1 << 8 * width - 1) <= low and high < 1 << 8 * width - 1)
    return bytes([width]) + values.astype(_WIDTHS[width]).tobytes()


def _starts(shard: Column, gaps: Column, nbytes: Column) -> Column:
    """Return each piece's first byte: its gap after the piece before it, or after the shard's first byte."""
    # Sums may wrap around where the columns lie; then the first piece beyond its shard still shows, since it is at most
    # one gap and one piece away from a right one.
    is_head = _is_head(shard)
    sums = np.cumsum(gaps + np.where(is_head, 0, _before(nbytes)))
    bases = (sums - gaps)[is_head]
    starts: Column = sums - bases[np.cumsum(is_head) - 1]
    return starts


def _is_head(shard: Column) -> NDArray[np.bool_]:
    """Tell which pieces stand first in the run of pieces of their shard."""
    is_head = np.ones(len(shard), dtype=bool)
    is_head[1:] = shard[1:] != shard[:-1]
    return is_head


def _before(values: Column) -> Column:
    """Return the value of the row before each row."""
    return np.concatenate((np.zeros(1, dtype=np.int64), values))[:-1]


def _column(values: Sequence[int]) -> Column:
    return np.asarray(values, dtype=np.int64)
