"""Hold boxes of named tensors as columns: what a rank plans to write, or wrote, without an object per box.

A 405-billion-parameter state with Adam has 14 million boxes on 4,096 ranks; one Python object each would take
gigabytes and minutes where they meet. Pure values; `encode` is what ranks of one job send each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from cloudckpt.format.codec import DTYPES

__all__ = ["Box", "BoxTable", "Column", "ragged_places", "row_products", "starts_of"]

Column = NDArray[np.int64]

# Torch takes ten times as long to say it.
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Box(NamedTuple):
    """One box: a tensor's name, torch's name of its dtype, its whole shape, and the box's place and extent in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def itemsize_bytes(self) -> int:
        """Bytes per element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the box, row-major and dense."""
        return math.prod(self.sizes) * self.itemsize_bytes


_Head = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoxTable:
    """Boxes of tensors, one row per box.

    Attributes:
        names: the tensors, each once; a tensor's place here is its number.
        dtypes: torch's name of each tensor's dtype.
        shapes: each whole tensor's shape.
        tensor: the number of each box's tensor.
        offsets: where the boxes start, one value per dimension, box after box.
        sizes: their extents, in the same way.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tensor: Column
    offsets: Column
    sizes: Column

    @classmethod
    def of(cls, boxes: Iterable[Box]) -> BoxTable:
        """Return a table of boxes in their order."""
        numbers: dict[str, int] = {}
        tensors: list[Box] = []
        tensor: list[int] = []
        offsets: list[int] = []
        sizes: list[int] = []
        for box in boxes:
            number = numbers.setdefault(box.name, len(numbers))
            if number == len(tensors):
                tensors.append(box)
            tensor.append(number)
            offsets.extend(box.offsets)
            sizes.extend(box.sizes)
        return cls(
            names=tuple(numbers),
            dtypes=tuple(box.dtype for box in tensors),
            shapes=tuple(box.shape for box in tensors),
            tensor=np.asarray(tensor, dtype=np.int64),
            offsets=np.asarray(offsets, dtype=np.int64),
            sizes=np.asarray(sizes, dtype=np.int64),
        )

    def __len__(self) -> int:
        """Return how many boxes there are."""
        return len(self.tensor)

    def is_whole(self) -> bool:
        """Tell whether the boxes are the whole tensors, each once and in their order."""
        count = len(self.names)
        if len(self.tensor) != count or self.offsets.any() or (self.tensor != np.arange(count)).any():
            return False
        extents = [size for shape in self.shapes for size in shape]
        return bool(self.sizes.tolist() == extents)

    def has_same_tensors(self, other: BoxTable) -> bool:
        """Tell whether two tables number the same tensors alike; at no cost where they share them."""
        return (self.names, self.dtypes, self.shapes) == (other.names, other.dtypes, other.shapes)

    def dimensions(self) -> Column:
        """Return each box's number of dimensions."""
        return np.asarray([len(shape) for shape in self.shapes], dtype=np.int64)[self.tensor]

    def firsts(self) -> Column:
        """Return where each box's values begin in `offsets` and `sizes`, and where the last one's end."""
        return starts_of(self.dimensions())

    def elements(self) -> Column:
        """Return each box's number of elements."""
        return row_products(self.sizes, self.firsts())

    def nbytes(self) -> Column:
        """Return each box's bytes, dense."""
        item_bytes = np.asarray([_ITEM_BYTES[dtype] for dtype in self.dtypes], dtype=np.int64)
        return self.elements() * item_bytes[self.tensor]

    def take(self, rows: Sequence[int] | Column) -> BoxTable:
        """Return some of the boxes, in the order of `rows`; the tensors and their numbers stay."""
        chosen = np.asarray(rows, dtype=np.int64)
        places = ragged_places(self.firsts(), chosen)
        return replace(self, tensor=self.tensor[chosen], offsets=self.offsets[places], sizes=self.sizes[places])

    def __iter__(self) -> Iterator[Box]:
        """Yield the boxes one by one; for tables that are known to be small."""
        firsts = self.firsts().tolist()
        for row, number in enumerate(self.tensor.tolist()):
            part = slice(firsts[row], firsts[row + 1])
            yield Box(
                self.names[number],
                self.dtypes[number],
                self.shapes[number],
                tuple(self.offsets[part].tolist()),
                tuple(self.sizes[part].tolist()),
            )

    def encode(self) -> bytes:
        """Return the table for another rank of the same job; not a format of the store."""
        head = msgspec.msgpack.encode((self.names, self.dtypes, self.shapes))
        message = (head, self.tensor.tobytes(), self.offsets.tobytes(), self.sizes.tobytes())
        return zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(message))

    @classmethod
    def decode(cls, data: bytes) -> BoxTable:
        """Read back what `encode` gave."""
        message = zstandard.ZstdDecompressor().decompress(data)
        head, *columns = msgspec.msgpack.decode(message, type=tuple[bytes, bytes, bytes, bytes])
        names, dtypes, shapes = _decoded_head(head)
        tensor, offsets, sizes = (np.frombuffer(column, dtype=np.int64) for column in columns)
        return cls(names=names, dtypes=dtypes, shapes=shapes, tensor=tensor, offsets=offsets, sizes=sizes)


@lru_cache(maxsize=2)
def _decoded_head(head: bytes) -> _Head:
    """Decode the names of a table; thousands of ranks name the same tensors, and share them then."""
    decoded: _Head = msgspec.msgpack.decode(head, type=_Head)
    return decoded


def starts_of(lengths: Column) -> Column:
    """Return where rows of these lengths begin in a ragged column, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def row_products(values: Column, firsts: Column) -> Column:
    """Multiply the values of each row of a ragged column; a row without values gives 1."""
    products = np.ones(len(firsts) - 1, dtype=np.int64)
    lengths = np.diff(firsts)
    for axis in range(int(lengths.max(initial=0))):
        has_axis = lengths > axis
        products[has_axis] *= values[firsts[:-1][has_axis] + axis]
    return products


def ragged_places(firsts: Column, rows: Column) -> Column:
    """Return the places of the values of `rows` in a ragged column, row after row."""
    lengths = (firsts[1:] - firsts[:-1])[rows]
    stops = np.cumsum(lengths)
    total = int(stops[-1]) if len(stops) else 0
    places: Column = np.arange(total, dtype=np.int64) + np.repeat(firsts[:-1][rows] - (stops - lengths), lengths)
    return places
