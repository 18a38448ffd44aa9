"""Turn dtypes into names, and the elements of small tensors into bytes, the same on every machine.

Names come from explicit tables, never from looking up an attribute that data names. Bytes are little-endian.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cloudckpt.format.codec.parts import Raw

__all__ = ["DTYPES", "DTYPE_NAMES", "extent_bytes", "numpy_dtype", "tensor_from_bytes", "tensor_to_bytes"]

_NAMES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2"
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split() if hasattr(torch, name)}
"""Every dtype of this torch that a dense tensor can hold and copy. Left out: quantized ones (their scale is no
element), `bits*`, and ints narrower than a byte (torch can allocate them, no more)."""
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The way back: dtype → name."""

# A tensor is copied as integers of its width: torch cannot copy each dtype everywhere, and warns about complex32.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

# What is stored is little-endian.
_IS_SWAPPED = sys.byteorder == "big"

# Long doubles are missing on purpose: the same name means other bytes on other processors.
_NUMPY_NAME = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(?:8|16)|\|[SV][1-9][0-9]{0,6}|[<>]U[1-9][0-9]{0,6}"
    r"|[<>][mM]8(?:\[(?:[1-9][0-9]{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
_MAX_DIMS = 64  # both numpy 2 and torch's iterators stop there
_MAX_EXTENT_BYTES = 2**62  # an empty array may still claim dimensions whose strides overflow 64 bits


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Return numpy's dtype if the format knows it under exactly this name (its `.str`), else None."""
    if not _NUMPY_NAME.fullmatch(name):
        return None
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype if dtype.str == name else None


def extent_bytes(shape: Sequence[int], itemsize_bytes: int) -> int | None:
    """Return the bytes of a dense array, or None if none can have this shape (empty dimensions count as 1)."""
    if len(shape) > _MAX_DIMS or any(dim < 0 for dim in shape):
        return None
    if math.prod(max(dim, 1) for dim in shape) * itemsize_bytes > _MAX_EXTENT_BYTES:
        return None
    return math.prod(shape) * itemsize_bytes


def tensor_to_bytes(tensor: torch.Tensor) -> Raw:
    """Return the elements of a dense tensor on any device, in row-major order: its own memory, where they lie so."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    dense = plain.view(_CARRIERS[plain.element_size()]).contiguous()
    # A single element may keep any stride, also through `reshape`.
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
    return _swapped(flat.copy(), tensor.dtype) if _IS_SWAPPED else flat


def tensor_from_bytes(raw: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor over `raw`, uint8 of one dimension with exactly the bytes of `shape`."""
    if _IS_SWAPPED:
        _swapped(raw.numpy(), dtype)
    return raw.view(dtype).reshape(shape)


def _swapped(raw: Raw, dtype: torch.dtype) -> Raw:
    """Reverse the bytes of each word, in place."""
    word = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    raw.view(f"u{word}").byteswap(inplace=True)
    return raw
