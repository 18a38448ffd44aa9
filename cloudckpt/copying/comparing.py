"""Compare the elements of two tensors, a few at a time, and add up in what they differ. Pure values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Sums"]

# As many as stay in the cache while several passes go over them.
_PART = 1 << 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
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
                are further apart; two NaNs are none.
        """
        for one, other in zip(torch.split(a, _PART), torch.split(b, _PART), strict=True):
            self._add(one, other, tolerance)

    def _add(self, a: torch.Tensor, b: torch.Tensor, tolerance: float | None) -> None:
        is_alike = a.dtype == b.dtype
        if is_alike and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return
        if {a.dtype, b.dtype} & _OPAQUE:
            # Whose elements torch can only move.
            same = torch.zeros(len(a), dtype=torch.bool) if not is_alike else _same_bits(a, b)
            self.count += int((~same).sum())
            return
        wide_a, wide_b = _wide(a), _wide(b)
        apart = (wide_a - wide_b).abs()
        apart[wide_a == wide_b] = 0  # two infinities
        nan_a, nan_b = wide_a.isnan(), wide_b.isnan()
        if tolerance is not None:
            differs = (apart > tolerance) | (nan_a != nan_b)
        elif is_alike:
            differs = ~_same_bits(a, b)
        else:
            differs = (apart > 0) | (nan_a != nan_b)
        if not bool(differs.any()):
            return
        self.count += int(differs.sum())
        self.nan_a += int((nan_a & differs).sum())
        self.nan_b += int((nan_b & differs).sum())
        is_number = differs & ~(nan_a | nan_b)
        if bool(is_number.any()):
            apart = apart[is_number]
            if not (a.is_floating_point() or a.is_complex() or b.is_floating_point() or b.is_complex()):
                apart = apart.clamp(min=1)  # float64 does not tell all whole numbers of 64 bits apart
            size = torch.maximum(wide_a.abs(), wide_b.abs())[is_number]
            self.largest = max(self.largest, float(apart.max()))
            relative = torch.where(apart.isinf(), 1.0, apart / size.clamp(min=torch.finfo(torch.float64).tiny))
            self.largest_relative = max(self.largest_relative, float(relative.max()))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    word = _WORDS[a.dtype.itemsize]
    same = a.view(word) == b.view(word)
    return same.view(len(a), -1).all(dim=1)


def _wide(part: torch.Tensor) -> torch.Tensor:
    return part.to(torch.complex128 if part.is_complex() else torch.float64)
