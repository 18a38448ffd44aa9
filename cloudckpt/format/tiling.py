"""Tell which tensors are covered exactly once by their boxes, for millions of boxes at a time.

Each coordinate of each axis has a random weight, and a box the product over its axes of (weight of its stop - weight
of its start) / (weight of the extent - weight of 0). Where boxes meet the weights cancel: boxes that tile a tensor
always add up to 1. Any others differ from it as polynomials in the weights, and a polynomial of degree 64 that is not
zero becomes zero for one choice of weights in 2**55. That holds in a field: modulo 2**64 the powers of two in 64
factors would cancel half of all differences, so the sums are taken modulo the prime 2**61 - 1. Weights are a keyed mix
of the coordinate, with keys of each sum's own, so whoever wrote the boxes could not know them.

Comparing boxes with each other instead takes hours for a tensor of many columns. Pure values; time is linear.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cloudckpt.format.boxes import Column, starts_of

__all__ = ["Tiling", "untiled"]

_Words = NDArray[np.uint64]

_PRIME = np.uint64((1 << 61) - 1)
_WORD_BYTES = 8
# Slabs that stay in a core's cache are three times as fast as whole columns, and bound the extra memory.
_SLAB_ROWS = 1 << 16
# Sums are taken by bincount, in float64: parts of 21 bits stay exact for 2**32 boxes.
_PART_BITS = 21


def untiled(shapes: Sequence[tuple[int, ...]], tensor: Column, offsets: Column, sizes: Column) -> Column:
    """Return the numbers, in order, of the tensors that their boxes do not cover exactly once.

    Args:
        shapes: each whole tensor's shape; a tensor without elements is covered by any boxes or none.
        tensor: the number of each box's tensor.
        offsets: where the boxes start, one value per dimension of their tensor, box after box.
        sizes: their extents, in the same way; none may be negative, and offset + size must fit 63 bits.
    """
    tiling = Tiling(shapes)
    tiling.add(tensor, offsets, sizes)
    return tiling.untiled()


class Tiling:
    """Add up boxes of some tensors, as many at a time as are at hand; `untiled` says what they did not cover once."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Draw the keys of the weights; `shapes` are those of the whole tensors."""
        self._dimensions: Column = np.fromiter((len(shape) for shape in shapes), dtype=np.int64, count=len(shapes))
        self._bases: Column = np.cumsum(self._dimensions) - self._dimensions
        self._extents: Column = np.fromiter((size for shape in shapes for size in shape), dtype=np.int64)
        self._is_empty = np.fromiter((0 in shape for shape in shapes), dtype=bool, count=len(shapes))
        self._sums = np.zeros((3, len(shapes)), dtype=np.uint64)
        keys = secrets.token_bytes(_WORD_BYTES * (int(self._dimensions.max(initial=0)) + 1))
        self._outer_key, self._inner_keys = np.frombuffer(keys, np.uint64)[0], np.frombuffer(keys, np.uint64)[1:]
        self._inverses = self._inverses_of_axes()

    def add(self, tensor: Column, offsets: Column, sizes: Column) -> None:
        """Add boxes, given as to `untiled`."""
        firsts = starts_of(self._dimensions[tensor])
        for at in range(0, len(tensor), _SLAB_ROWS):
            stop = min(at + _SLAB_ROWS, len(tensor))
            values = slice(firsts[at], firsts[stop])
            self._add(tensor[at:stop], firsts[at:stop] - firsts[at], offsets[values], sizes[values])

    def untiled(self) -> Column:
        """Return the numbers, in order, of the tensors that the added boxes do not cover exactly once."""
        low, middle, high = self._sums
        covered = _reduced(low + _times(middle, _power(_PART_BITS)) + _times(high, _power(2 * _PART_BITS)))
        wrong: Column = np.flatnonzero((covered != 1) & ~self._is_empty).astype(np.int64)
        return wrong

    def _add(self, tensor: Column, firsts: Column, offsets: Column, sizes: Column) -> None:
        products = np.ones(len(tensor), dtype=np.uint64)
        dimensions = self._dimensions[tensor]
        for axis in range(int(dimensions.max(initial=0))):
            rows = np.flatnonzero(dimensions > axis)
            axes, places = self._bases[tensor[rows]] + axis, firsts[rows] + axis
            starts, extents = offsets[places], sizes[places]
            # The product of an axis that the box spans whole, divided by that of the axis, is 1.
            is_part = (starts != 0) | (extents != self._extents[axes])
            rows, axes, starts, extents = rows[is_part], axes[is_part], starts[is_part], extents[is_part]
            shares = _times(self._differences(axis, starts, starts + extents), self._inverses[axes])
            products[rows] = _times(products[rows], shares)
        for part in range(len(self._sums)):
            bits = (products >> np.uint64(part * _PART_BITS)) & np.uint64((1 << _PART_BITS) - 1)
            found = np.bincount(tensor, weights=bits, minlength=len(self._dimensions))
            self._sums[part] += found.astype(np.uint64)

    def _inverses_of_axes(self) -> _Words:
        """Return for each axis 1 / (weight of its extent - weight of 0), so that every whole tensor weighs 1."""
        inverses = np.zeros(len(self._extents), dtype=np.uint64)
        for axis in range(len(self._inner_keys)):
            places = self._bases[self._dimensions > axis] + axis
            extents, inverse = np.unique(self._extents[places], return_inverse=True)
            weights = self._differences(axis, np.zeros_like(extents), extents)
            powers = [pow(weight, int(_PRIME) - 2, int(_PRIME)) for weight in weights.tolist()]
            inverses[places] = np.asarray(powers, dtype=np.uint64)[inverse]
        return inverses

    def _differences(self, axis: int, starts: Column, stops: Column) -> _Words:
        return _reduced(self._weights(axis, stops) + (_PRIME - self._weights(axis, starts)))

    def _weights(self, axis: int, coordinates: Column) -> _Words:
        mixed = _mixed(coordinates.astype(np.uint64) + self._inner_keys[axis])
        return _mixed(mixed ^ self._outer_key) >> np.uint64(3)


def _mixed(words: _Words) -> _Words:
    """Mix the bits of each word, one to one (the finish of splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _times(left: _Words, right: _Words) -> _Words:
    """Multiply modulo 2**61 - 1; both sides are at most that, and so is the product."""
    low_bits, middle_bits = np.uint64((1 << 31) - 1), np.uint64((1 << 30) - 1)
    left_high, left_low = left >> np.uint64(31), left & low_bits
    right_high, right_low = right >> np.uint64(31), right & low_bits
    middle = left_high * right_low + left_low * right_high
    # 2**62 is 2 and 2**61 is 1; the four terms stay below 2**64 together.
    high = ((left_high * right_high) << np.uint64(1)) + (middle >> np.uint64(30))
    return _reduced(high + ((middle & middle_bits) << np.uint64(31)) + left_low * right_low)


def _reduced(words: _Words) -> _Words:
    """Return the words modulo 2**61 - 1."""
    folded = (words & _PRIME) + (words >> np.uint64(61))
    return np.where(folded >= _PRIME, folded - _PRIME, folded)


def _power(bits: int) -> _Words:
    return np.asarray([1 << bits], dtype=np.uint64)
