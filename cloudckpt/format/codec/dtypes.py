"""Turn dtypes into names, and the elements of small tensors into bytes, the same on every machine.

Names come from explicit tables, never from looking up an attribute that data names. Bytes are little-endian.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

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


def tensor_to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements of a dense tensor on any device, in row-major order."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    flat = plain.view(_CARRIERS[plain.element_size()]).contiguous().reshape(-1).view(torch.uint8)
    word = _word_bytes(tensor.dtype)
    return flat.numpy().view(f"=u{word}").astype(f"<u{word}", copy=False).tobytes()


def tensor_from_bytes(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a new tensor on the CPU; `raw` has exactly the bytes of `shape`."""
    word = _word_bytes(dtype)
    words = np.ndarray((len(raw) // word,), f"<u{word}", buffer=raw).astype(f"=u{word}")
    return torch.from_numpy(words.view(np.uint8)).clone().view(dtype).reshape(shape)


def _word_bytes(dtype: torch.dtype) -> int:
    """Bytes that a processor of the other byte order swaps as one."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
