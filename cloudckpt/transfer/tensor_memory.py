"""Look at the memory of a dense host tensor as bytes, without a copy and without a claim on it."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["bytes_of"]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a dense host tensor as bytes; the array keeps the tensor alive."""
    return np.asarray(_Memory(tensor))


class _Memory:
    """The memory of a dense tensor, for numpy. After `Tensor.numpy` the trainer's storage could not be resized."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor  # alive as long as somebody has the memory
        shape = (tensor.numel() * tensor.itemsize,)
        self.__array_interface__ = {"data": (tensor.data_ptr(), False), "shape": shape, "typestr": "|u1", "version": 3}
