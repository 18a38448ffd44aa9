"""Lend host memory to whoever stages bytes for a moment, and use it again.

Memory comes from the kernel in whole pages, not from malloc: that keeps what was freed in one arena per thread, so
that eight threads with 16 MiB each would hold hundreds of MiB. Pages that nobody has touched cost nothing. Knows
sizes only; how much may be lent at once is the budget's business. Any thread may enter.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Scratch"]


class Scratch:
    """Memory that is taken, given back and taken again: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

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
        return memoryview(mmap.mmap(-1, size_bytes))[:size_bytes]

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
