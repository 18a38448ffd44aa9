"""Turn one block of pre-faulted memory into many object bodies.

A benchmark that allocates while it measures measures the kernel's page faults: here every page is touched
before the first request, and the memory of a removed object is used again. Knows nothing of HTTP or S3.
Any thread may enter; `Arena` locks its free list, bodies are written by one thread and then only read.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Arena", "ArenaFullError", "Extent"]

_PAGE_BYTES = 4096


class ArenaFullError(MemoryError):
    """The arena has no room for a body; start it with more memory."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes inside the arena: where it starts and how many bytes of it are used."""

    start: int
    length_bytes: int


class Arena:
    """Memory in a memfd, so that a body can be received into it and sent from it without a copy in user space."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = _round_up(capacity_bytes)
        self.fd = os.memfd_create("sink")
        os.posix_fallocate(self.fd, 0, self.capacity_bytes)
        self._map = mmap.mmap(self.fd, self.capacity_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._view = memoryview(self._map)
        self._free = [(0, self.capacity_bytes)]
        self._lock = threading.Lock()

    @property
    def memory(self) -> memoryview:
        """All of it, writable."""
        return self._view

    def allocate(self, length_bytes: int) -> list[Extent]:
        """Take memory for one body: one extent where a free run is long enough, several otherwise.

        Raises:
            ArenaFullError: not enough is free; nothing was taken.
        """
        with self._lock:
            wanted = _round_up(length_bytes)
            if sum(stop - start for start, stop in self._free) < wanted:
                raise ArenaFullError(f"no room for {length_bytes} bytes in {self.capacity_bytes}")
            taken = [self._take(*run) for run in self._choose_runs(wanted)]
        return list(_trim(taken, length_bytes))

    def release(self, extents: list[Extent]) -> None:
        """Give a body's memory back; the caller keeps no view of it."""
        with self._lock:
            runs = [(e.start, e.start + _round_up(e.length_bytes)) for e in extents if e.length_bytes]
            self._free = _merge(sorted(self._free + runs))

    def views(self, extents: list[Extent]) -> Iterator[memoryview]:
        """Yield the memory of each extent, writable."""
        for extent in extents:
            yield self._view[extent.start : extent.start + extent.length_bytes]

    def slice(self, extents: list[Extent], start: int, stop: int) -> Iterator[Extent]:
        """Yield the extents that hold the bytes [start, stop) of a body."""
        at = 0
        for extent in extents:
            low, high = max(start - at, 0), min(stop - at, extent.length_bytes)
            if low < high:
                yield Extent(extent.start + low, high - low)
            at += extent.length_bytes

    def close(self) -> None:
        """Give the memory back to the system; no view may be left."""
        self._view.release()
        self._map.close()
        os.close(self.fd)

    def _choose_runs(self, wanted: int) -> list[tuple[int, int]]:
        whole = next((run for run in self._free if run[1] - run[0] >= wanted), None)
        if whole:
            return [(whole[0], whole[0] + wanted)]
        chosen: list[tuple[int, int]] = []
        for start, stop in self._free:
            if wanted <= 0:
                break
            chosen.append((start, min(stop, start + wanted)))
            wanted -= stop - start
        return chosen

    def _take(self, start: int, stop: int) -> Extent:
        index = next(i for i, run in enumerate(self._free) if run[0] <= start and stop <= run[1])
        low, high = self._free[index]
        self._free[index : index + 1] = [run for run in ((low, start), (stop, high)) if run[0] < run[1]]
        return Extent(start, stop - start)


def _trim(extents: list[Extent], length_bytes: int) -> Iterator[Extent]:
    for extent in extents:
        used = min(extent.length_bytes, length_bytes)
        yield Extent(extent.start, used)
        length_bytes -= used


def _merge(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _round_up(length_bytes: int) -> int:
    return -(-length_bytes // _PAGE_BYTES) * _PAGE_BYTES
