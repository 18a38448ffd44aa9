"""Compare the elements of two tensors, a few at a time, and add up in what they differ. Pure values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Sums"]

# As many as torch takes by one thread, and as stay in the cache while several passes go over them.
_PART = 1 << 15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# Whose elements torch can only move.
_OPAQUE = frozenset({getattr(torch, "float4_e2m1fn_x2", None)})


@dataclass(slots=True)
class Sums:
    """In what two tensors differ, as far as their parts were added.

    Attributes:
        count: elements that differ.
        largest: the largest absolute difference, of elements that are numbers on both sides.
        largest_relative: the largest of these, each in relation to the larger of the two elements; at most 2.
        nan_a: elements that differ, and are no number in the one.
        nan_b: elements that differ, and are no number in the other.
    """

    count: int = 0
    largest: float = 0.0
    largest_relative: float = 0.0
    nan_a: int = 0
    nan_b: int = 0

    def add(self, a: torch.Tensor, b: torch.Tensor, *, tolerance: float | None) -> None:
        """Add the same elements of both.

        Args:
            a: flat, of the one.
            b: flat, of the other, as many elements; their dtypes may differ.
            tolerance: None: elements differ whose bits do, and of two dtypes, whose numbers do. Else: whose numbers
                are further apart; two NaNs are not.
        """
        for one, other in zip(torch.split(a, _PART), torch.split(b, _PART), strict=True):
            self._add(one, other, tolerance)

    def _add(self, a: torch.Tensor, b: torch.Tensor, tolerance: float | None) -> None:
        if a.dtype == b.dtype:
            is_unlike = _is_unlike(a, b)
            if not is_unlike.any():
                return
        else:
            is_unlike = np.ones(len(a), dtype=bool)
        if {a.dtype, b.dtype} & _OPAQUE:
            self.count += int(is_unlike.sum())
            return
        wide_a, wide_b = _wide(a)[is_unlike], _wide(b)[is_unlike]
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(wide_a - wide_b)
        apart[wide_a == wide_b] = 0  # two infinities
        nan_a, nan_b = np.isnan(wide_a), np.isnan(wide_b)
        if a.dtype == b.dtype and not _has_fraction(a):
            apart = np.maximum(apart, 1.0)  # float64 does not tell all whole numbers of 64 bits apart
        if tolerance is not None:
            differs = (apart > tolerance) | (nan_a != nan_b)
        elif a.dtype == b.dtype:
            differs = np.ones(len(apart), dtype=bool)
        else:
            differs = (apart > 0) | (nan_a != nan_b)
        self.count += int(differs.sum())
        self.nan_a += int((nan_a & differs).sum())
        self.nan_b += int((nan_b & differs).sum())
        is_number = differs & ~(nan_a | nan_b)
        self._note(apart[is_number], np.maximum(np.abs(wide_a), np.abs(wide_b))[is_number])

    def _note(self, apart: NDArray[np.float64], sizes: NDArray[np.float64]) -> None:
        if not apart.size:
            return
        self.largest = max(self.largest, float(apart.max()))
        # Of infinities the difference is all there is.
        relative = np.divide(apart, sizes, out=np.zeros_like(apart), where=np.isfinite(sizes) & (sizes > 0))
        relative[np.isinf(sizes) & (apart > 0)] = 1.0
        self.largest_relative = max(self.largest_relative, float(relative.max()))


def _is_unlike(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.bool_]:
    """Tell which elements of two tensors of one dtype have other bits."""
    bits_a, bits_b = (part.view(_WORDS[part.dtype.itemsize]).numpy() for part in (a, b))
    if a.dtype.itemsize > np.dtype(np.int64).itemsize:
        pairs = np.not_equal(bits_a.view(np.int64), bits_b.view(np.int64)).reshape(-1, 2)
        return np.asarray(pairs.any(axis=1), dtype=bool)
    return np.asarray(np.not_equal(bits_a, bits_b), dtype=bool)


def _has_fraction(part: torch.Tensor) -> bool:
    return part.is_floating_point() or part.is_complex()


def _wide(part: torch.Tensor) -> NDArray[Any]:
    return part.to(torch.complex128 if part.is_complex() else torch.float64).numpy()
