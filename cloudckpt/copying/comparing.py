"""Compare the elements of two tensors, a few at a time, and add up in what they differ. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Sums"]

# As many as torch takes by one thread, and as stay in the cache while several passes go over them.
_PART = 1 << 15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# Up to these the whole numbers of a wide dtype are floats, too; above them without their lowest bits.
_FLOAT_BITS, _LOW_BITS = 53, 0x7FF
# Whose elements torch can only move.
_OPAQUE = frozenset({getattr(torch, "float4_e2m1fn_x2", None)})

_Flags = NDArray[np.bool_]
_Floats = NDArray[np.float64]
# Numbers as sums of two floats each; None: the first is all.
_Exact = tuple[_Floats, _Floats | None]


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
                are further apart, whole ones by not a bit less than they are. No tolerance takes a NaN, or an
                infinity, for another number; nor such a part of a complex one.
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
        is_by_number = tolerance is not None or a.dtype != b.dtype
        if {a.dtype, b.dtype} & _OPAQUE:
            self.count += int(is_unlike.sum())
            return
        with np.errstate(invalid="ignore", over="ignore"):
            found = _apart(a, b, is_unlike, tolerance or 0.0)
            self._add_apart(found, found.is_beyond(tolerance or 0.0) if is_by_number else np.ones_like(found.nan_a))

    def _add_apart(self, found: _Apart, differs: _Flags) -> None:
        self.count += int(differs.sum())
        self.nan_a += int((found.nan_a & differs).sum())
        self.nan_b += int((found.nan_b & differs).sum())
        is_number = differs & ~(found.nan_a | found.nan_b)
        apart, sizes = found.distances[is_number], found.sizes[is_number]
        if not apart.size:
            return
        self.largest = max(self.largest, float(apart.max()))
        relative = np.divide(apart, sizes, out=np.zeros_like(apart), where=np.isfinite(sizes) & (sizes > 0))
        # Of infinities the difference is all there is; that of two large numbers may be beyond all floats.
        relative[np.isinf(sizes) & np.isinf(apart)] = 1.0
        self.largest_relative = max(self.largest_relative, float(np.minimum(relative, 2.0).max()))


@dataclass(frozen=True, slots=True)
class _Apart:
    """How far elements are apart, each from its other one.

    Attributes:
        distances: as the nearest float64; 0 between two NaNs, and between an infinity and itself.
        rests: what these lack to the distance itself, as far as it decides which of two is larger.
        never: where one is a NaN or an infinity that the other is not.
        sizes: the larger of the two absolute values.
        nan_a: where the one is no number, or a part of it is none.
        nan_b: where the other is none.
    """

    distances: _Floats
    rests: _Floats
    never: _Flags
    sizes: _Floats
    nan_a: _Flags
    nan_b: _Flags

    def is_beyond(self, tolerance: float) -> _Flags:
        """Tell which are further apart."""
        at_it = (self.distances == tolerance) & (self.rests > 0)
        return np.asarray(self.never | at_it | (self.distances > tolerance), dtype=bool)


def _is_unlike(a: torch.Tensor, b: torch.Tensor) -> _Flags:
    """Tell which elements of two tensors of one dtype have other bits."""
    bits_a, bits_b = (part.view(_WORDS[part.dtype.itemsize]).numpy() for part in (a, b))
    if a.dtype.itemsize > np.dtype(np.int64).itemsize:
        pairs = np.not_equal(bits_a.view(np.int64), bits_b.view(np.int64)).reshape(-1, 2)
        return np.asarray(pairs.any(axis=1), dtype=bool)
    return np.asarray(np.not_equal(bits_a, bits_b), dtype=bool)


def _apart(a: torch.Tensor, b: torch.Tensor, chosen: _Flags, tolerance: float) -> _Apart:
    """Compare these elements, complex ones by their parts: of NaN + 1j and NaN + 2j one is like the other."""
    parts_a, parts_b = _parts(a, chosen), _parts(b, chosen)
    if len(parts_a) == len(parts_b) == 1:
        return _apart_real(parts_a[0], parts_b[0], tolerance)
    none = np.zeros(len(parts_a[0][0])), None
    real, imaginary = (
        _apart_real(one, other, tolerance) for one, other in zip_longest(parts_a, parts_b, fillvalue=none)
    )
    is_flat = (real.distances == 0) | (imaginary.distances == 0)
    return _Apart(
        np.hypot(real.distances, imaginary.distances),
        np.where(is_flat, real.rests + imaginary.rests, 0.0),
        real.never | imaginary.never,
        np.maximum(_size(parts_a), _size(parts_b)),
        real.nan_a | imaginary.nan_a,
        real.nan_b | imaginary.nan_b,
    )


def _parts(part: torch.Tensor, chosen: _Flags) -> list[_Exact]:
    """Return the real part of these elements, and the imaginary one of complex ones."""
    if part.is_complex():
        wide = part.to(torch.complex128).numpy()[chosen]
        return [(wide.real, None), (wide.imag, None)]
    if part.is_floating_point() or part.dtype.itemsize < np.dtype(np.int64).itemsize:
        return [(part.to(torch.float64).numpy()[chosen], None)]
    whole = part.numpy()[chosen]
    above = (whole >> _FLOAT_BITS).astype(np.int64)
    low = np.where((above == 0) | (above == -1), 0, whole & _LOW_BITS).astype(whole.dtype)
    return [((whole - low).astype(np.float64), low.astype(np.float64))]


def _size(parts: Sequence[_Exact]) -> _Floats:
    """Return the absolute values of numbers by their parts."""
    sizes = [np.abs(high if low is None else high + low) for high, low in parts]
    return sizes[0] if len(sizes) == 1 else np.asarray(np.hypot(sizes[0], sizes[1]))


def _apart_real(a: _Exact, b: _Exact, tolerance: float) -> _Apart:
    (high_a, low_a), (high_b, low_b) = a, b
    near = high_a - high_b
    nobody, lost = np.zeros(near.shape, dtype=bool), np.zeros(near.shape)
    if low_a is not None or low_b is not None:
        near, lost = _sum(high_a, -high_b)
        near, lost = _sum(near, lost + ((0.0 if low_a is None else low_a) - (0.0 if low_b is None else low_b)))
    elif np.any(np.abs(near) == tolerance):
        near, lost = _sum(high_a, -high_b)
    distances, rests = np.abs(near), np.where(near < 0, -lost, lost)
    sizes = np.maximum(_size([a]), _size([b]))
    if np.isfinite(distances).all():
        return _Apart(distances, rests, nobody, sizes, nobody, nobody)
    nan_a, nan_b = np.isnan(high_a), np.isnan(high_b)
    is_finite = np.isfinite(high_a) & np.isfinite(high_b)
    is_same = (high_a == high_b) | (nan_a & nan_b)
    return _Apart(np.where(is_same & ~is_finite, 0.0, distances), rests, ~(is_same | is_finite), sizes, nan_a, nan_b)


def _sum(a: _Floats, b: _Floats) -> tuple[_Floats, _Floats]:
    """Return the sum of floats, and what it lacks to the true one: both together are exact, by Knuth's two-sum."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(lost), lost, 0.0)
