"""Find the pieces that cover wanted boxes, from as few sections as it takes.

A rank that restores what it saved finds nearly everything in its own section; a rank of another topology looks
through all of them. Either way the pieces found cover every wanted box exactly once, or there is an error: reading a
part of an index is as safe as checking all of it. Pure values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cloudckpt.format.boxes import Column, ragged_places, starts_of
from cloudckpt.format.section import ChunkEntry, Section, Tensors
from cloudckpt.format.tiling import Tiling

__all__ = ["Cover"]

# Pairs of a piece and a wanted box that are compared at once; bounds the memory, whatever is wanted.
_PAIRS = 1 << 20

_Boxes = NDArray[np.int64]


class Cover:
    """Wanted boxes, and the pieces found for them so far."""

    def __init__(self, tensors: Tensors, wanted: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> None:
        """Remember what is wanted: (number of the tensor, offsets, sizes), each inside its tensor."""
        self._tensors = tensors
        self._axes = max((len(offsets) for _, offsets, _ in wanted), default=0)
        tensor = np.asarray([number for number, _, _ in wanted], dtype=np.int64)
        # Boxes of fewer dimensions get axes of extent 1 behind theirs, so that all of them are rows of one table.
        self._starts = self._padded([offsets for _, offsets, _ in wanted], 0)
        self._sizes = self._padded([sizes for _, _, sizes in wanted], 1)
        self._counts = np.bincount(tensor, minlength=len(tensors)).astype(np.int64)
        self._firsts = starts_of(self._counts)
        self._by_tensor = np.argsort(tensor, kind="stable")
        self._missing = self._sizes.prod(axis=1)
        self._tiling = Tiling([tuple(sizes) for sizes in self._sizes.tolist()])
        self._found: list[tuple[Section, Column]] = []

    def _padded(self, values: Sequence[tuple[int, ...]], filler: int) -> _Boxes:
        rows = [(*row, *(filler for _ in range(self._axes - len(row)))) for row in values]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), self._axes)

    def is_complete(self) -> bool:
        """Tell whether as many elements were found as are wanted, of every box."""
        return not (self._missing > 0).any()

    def missing_tensors(self) -> Column:
        """Return the numbers of the tensors of which something is missing."""
        is_missing = np.zeros(len(self._tensors), dtype=bool)
        wanted = np.repeat(np.arange(len(self._tensors)), self._counts)
        is_missing[wanted[self._missing[self._by_tensor] > 0]] = True
        return np.flatnonzero(is_missing)

    def take(self, section: Section) -> None:
        """Keep the pieces of a section that overlap a wanted box."""
        pairs = self._counts[section.tensor]
        rows = np.flatnonzero(pairs)
        kept = [self._take(section, block) for block in _blocks(rows, pairs[rows])]
        found = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)
        if len(found):
            self._found.append((section, found))

    def _take(self, section: Section, rows: Column) -> Column:
        """Keep those of some pieces that overlap a wanted box, and return them."""
        tensor = section.tensor[rows]
        piece = np.repeat(np.arange(len(rows)), self._counts[tensor])
        wanted = self._by_tensor[ragged_places(self._firsts, tensor)]
        offsets, sizes = self._boxes_of(section, rows)
        starts = np.maximum(offsets[piece], self._starts[wanted])
        stops = np.minimum((offsets + sizes)[piece], (self._starts + self._sizes)[wanted])
        is_hit = (stops > starts).all(axis=1)
        piece, wanted, starts, stops = piece[is_hit], wanted[is_hit], starts[is_hit], stops[is_hit]
        np.subtract.at(self._missing, wanted, (stops - starts).prod(axis=1))
        self._tiling.add(wanted, (starts - self._starts[wanted]).reshape(-1), (stops - starts).reshape(-1))
        kept: Column = rows[np.unique(piece)]
        return kept

    def _boxes_of(self, section: Section, rows: Column) -> tuple[_Boxes, _Boxes]:
        firsts = self._tensors.firsts(section.tensor)[rows]
        dimensions = self._tensors.dimensions[section.tensor[rows]]
        offsets = np.zeros((len(rows), self._axes), dtype=np.int64)
        sizes = np.ones((len(rows), self._axes), dtype=np.int64)
        for axis in range(self._axes):
            has_axis = dimensions > axis
            offsets[has_axis, axis] = section.offsets[firsts[has_axis] + axis]
            sizes[has_axis, axis] = section.sizes[firsts[has_axis] + axis]
        return offsets, sizes

    def uncovered(self) -> list[int]:
        """Return the places of the wanted boxes that what was found does not cover exactly once."""
        places: list[int] = self._tiling.untiled().tolist()
        return places

    def chunks(self) -> Iterator[tuple[int, ChunkEntry]]:
        """Yield the pieces found, each with its tensor's number."""
        for section, rows in self._found:
            yield from section.chunks(rows, self._tensors)


def _blocks(rows: Column, pairs: Column) -> Iterator[Column]:
    """Cut rows into blocks of bounded numbers of pairs, at least one row each."""
    if len(rows):
        block = np.cumsum(pairs) // _PAIRS
        yield from np.split(rows, np.flatnonzero(np.diff(block)) + 1)
