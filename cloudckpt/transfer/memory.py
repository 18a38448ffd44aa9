"""Hold host memory: look at a tensor's as bytes, and use again what was taken once; fresh pages cost more than a copy.

    Scratch   lent for a moment to whoever stages a piece, or completes one
    Slabs     kept from save to save for the copies of whole shards, and touched ahead of time

Knows sizes only; how much may be held at once is its callers' business (FORMAT invariant 15). Any thread may enter.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cloudckpt.errors import CloudCkptError
from cloudckpt.late import FakeTensor
from cloudckpt.store import new_memory
from cloudckpt.threads import new_lock, started

__all__ = ["COMMON_DTYPES", "Scratch", "Slab", "Slabs", "address_of", "bytes_of", "slab_bytes", "tensor_over"]

_ROUNDING_BYTES = 2 << 20
# Between two touches of so many bytes: training gets the core.
_TOUCH_PAUSE_S = 0.0005


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a dense host tensor as bytes; the array keeps the tensor alive."""
    return np.asarray(_Memory(tensor))


class _Bytes:
    """Bytes for numpy, which is told that they may be written to: PyTorch warns of any that may not."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data  # alive as long as somebody has the memory
        address = data.__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address, False), "shape": data.shape, "typestr": "|u1", "version": 3}


COMMON_DTYPES = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
)
"""Those of which PyTorch can join and part tensors, everywhere."""


def tensor_over(data: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of one dimension over bytes, which are not copied; nobody may write to it."""
    return torch.frombuffer(np.asarray(_Bytes(data)), dtype=dtype)


def has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements lie in memory; those of some subclasses lie in other tensors, or nowhere."""
    if inner_names(tensor) or isinstance(tensor, FakeTensor):
        return False
    # A pointer says nothing of other devices, some of which have none.
    return tensor.numel() == 0 or tensor.device.type not in ("cpu", "cuda") or tensor.data_ptr() != 0


def inner_names(tensor: torch.Tensor) -> Sequence[str]:
    """Return the names of the tensors that a subclass consists of; none for a tensor that has memory itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return () if flatten is None else tuple(flatten()[0])


class _Memory:
    """The memory of a dense tensor, for numpy. After `Tensor.numpy` the trainer's storage could not be resized."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor  # alive as long as somebody has the memory
        shape = (tensor.numel() * tensor.itemsize,)
        self.__array_interface__ = {"data": (tensor.data_ptr(), False), "shape": shape, "typestr": "|u1", "version": 3}


def address_of(memory: memoryview) -> int:
    """Return where bytes lie; valid as long as somebody holds the view."""
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


class Scratch:
    """Memory that is taken, given back and taken again."""

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []
        self._lock = new_lock()

    def take(self, size_bytes: int) -> memoryview:
        """Return `size_bytes` of page-aligned memory with anything in it; give the same view back with `give`."""
        if size_bytes == 0:
            return memoryview(bytearray())
        with self._lock:
            place = next((number for number, idle in enumerate(self._idle) if len(idle) >= size_bytes), None)
            if place is not None:
                return memoryview(self._idle.pop(place))[:size_bytes]
            if self._idle:
                # Too small for what is wanted now: it makes room for a larger one.
                self._idle.pop()
        return memoryview(new_memory(size_bytes))

    def give(self, memory: memoryview) -> None:
        """Take memory back, which nobody uses any more."""
        if isinstance(memory.obj, mmap.mmap):
            with self._lock:
                self._idle.append(memory.obj)

    @contextmanager
    def lend(self, size_bytes: int) -> Iterator[memoryview]:
        """Lend memory while the block runs."""
        memory = self.take(size_bytes)
        try:
            yield memory
        finally:
            self.give(memory)


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """Host memory for the copy of one shard."""

    memory: memoryview
    is_pinned: bool

    @property
    def size_bytes(self) -> int:
        """Its bytes, of which the shard takes as many as it needs."""
        return self.memory.nbytes

    def is_exact(self, size_bytes: int) -> bool:
        """Tell whether a new slab for so many bytes would be as large."""
        return self.size_bytes == slab_bytes(size_bytes)


class Slabs:
    """Host memory that is taken, given back and taken again. Any thread may enter.

    First touches of fresh pages cost ten times the copy into them (0.2 to 0.5 GB/s on a virtual machine), so memory
    is kept from save to save and can be touched ahead of time.

    Attributes:
        is_short: whether whoever stages has told that a state does not fit at once; not read here.
        lent_count: how many are lent.
    """

    def __init__(self) -> None:
        self.is_short = False
        self.lent_count = 0
        self._idle: list[Slab] = []
        self._held_bytes = 0
        self._lock = new_lock()
        self._given = threading.Condition(self._lock)
        self._toucher: threading.Thread | None = None
        self._is_hurried = threading.Event()
        self._is_closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes that are held, lent ones included."""
        return self._held_bytes

    def take(self, size_bytes: int, *, limit_bytes: int, most_bytes: int, is_pinned: bool = False) -> Slab:
        """Return the smallest idle slab that is large enough, or a new one.

        Args:
            size_bytes: of the memory wanted.
            limit_bytes: what may be held afterwards: idle slabs that do not fit make room for a new one.
            most_bytes: how large the slab may be, if it is larger than need be.
            is_pinned: page-locked, for copies from a device.
        """
        with self._lock:
            fitting = [
                slab
                for slab in self._idle
                if slab.is_pinned >= is_pinned
                and slab.size_bytes >= size_bytes
                and (slab.is_exact(size_bytes) or slab.size_bytes <= most_bytes)
            ]
            if fitting:
                slab = min(fitting, key=lambda slab: slab.size_bytes)
                self._idle.remove(slab)
                self.lent_count += 1
                return slab
            while self._idle and self._held_bytes + slab_bytes(size_bytes) > limit_bytes:
                smallest = min(self._idle, key=lambda slab: slab.size_bytes)
                self._idle.remove(smallest)
                self._held_bytes -= smallest.size_bytes
            slab = _new_slab(size_bytes, is_pinned=is_pinned)
            self._held_bytes += slab.size_bytes
            self.lent_count += 1
            return slab

    def wait_for_fewer(self, lent_count: int, *, timeout_s: float) -> bool:
        """Wait until fewer than so many are lent; tell whether it came to that."""
        with self._lock:
            return self._given.wait_for(lambda: self.lent_count < lent_count, timeout=timeout_s)

    def give(self, slab: Slab) -> None:
        """Take a slab back, which nobody uses any more."""
        with self._lock:
            self.lent_count -= 1
            self._keep(slab)

    def _keep(self, slab: Slab) -> None:
        if self._is_closed:
            self._held_bytes -= slab.size_bytes
        else:
            self._idle.append(slab)
        self._given.notify_all()

    def touch_ahead(self, sizes_bytes: Sequence[int], *, is_pinned: bool = False) -> None:
        """Have slabs of these sizes ready, touched, some time from now; returns at once."""
        self.stop_touching()
        missing = self._missing(sizes_bytes, is_pinned=is_pinned)
        if not missing:
            return
        with suppress(CloudCkptError):  # then the copy itself is what touches them
            self._toucher = started(partial(self._touch, missing, is_pinned=is_pinned), name="cloudckpt-touch")

    def _missing(self, sizes_bytes: Sequence[int], *, is_pinned: bool) -> list[int]:
        """Return the sizes for which there is no idle slab."""
        with self._lock:
            idle = Counter(slab.size_bytes for slab in self._idle if slab.is_pinned >= is_pinned)
        missing = []
        for size_bytes in sorted(sizes_bytes):
            if idle[slab_bytes(size_bytes)]:
                idle[slab_bytes(size_bytes)] -= 1
            else:
                missing.append(size_bytes)
        return missing

    def _touch(self, sizes_bytes: Sequence[int], *, is_pinned: bool) -> None:
        for size_bytes in sizes_bytes:
            if self._is_hurried.is_set():
                return
            slab = _new_slab(size_bytes, is_pinned=is_pinned)
            with self._lock:
                self._held_bytes += slab.size_bytes
            self._touch_slab(slab)
            with self._lock:
                self._keep(slab)

    def _touch_slab(self, slab: Slab) -> None:
        """Write to every page; a slab that is given up in the middle is as good, but for the time of its first use."""
        address = address_of(slab.memory)
        for start in range(0, slab.size_bytes, _ROUNDING_BYTES):
            if self._is_hurried.is_set():
                return
            # Called without Python's lock, and in small parts, so that training gets the core in between.
            ctypes.memset(address + start, 0, min(_ROUNDING_BYTES, slab.size_bytes - start))
            time.sleep(_TOUCH_PAUSE_S)

    def stop_touching(self) -> None:
        """Let `touch_ahead` end where it is: the memory is needed now."""
        toucher, self._toucher = self._toucher, None
        if toucher is not None:
            self._is_hurried.set()
            toucher.join()
            self._is_hurried.clear()

    def close(self) -> None:
        """Let go of idle memory, and of what is lent once it is given back."""
        self._is_closed = True
        self.stop_touching()
        with self._lock:
            self._held_bytes -= sum(slab.size_bytes for slab in self._idle)
            self._idle.clear()


def _new_slab(size_bytes: int, *, is_pinned: bool) -> Slab:
    if is_pinned:
        pinned = torch.empty(slab_bytes(size_bytes), dtype=torch.uint8, device="cpu", pin_memory=True)
        return Slab(memory=pinned.numpy().data, is_pinned=True)
    return Slab(memory=memoryview(new_memory(slab_bytes(size_bytes))), is_pinned=False)


def slab_bytes(size_bytes: int) -> int:
    """Return the bytes of a slab for so many; a shard of empty tensors has a page, too."""
    rounding = _ROUNDING_BYTES if size_bytes >= _ROUNDING_BYTES else mmap.PAGESIZE
    return max(1, -(-size_bytes // rounding)) * rounding
