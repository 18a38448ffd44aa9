"""Read one object of a source at any place: into memory, or as the file that PyTorch and zipfile want.

No more than is asked for is read, and a place that is not in the object is refused before. Any thread may enter.
"""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloudckpt.errors import ObjectNotFoundError, SourceError
from cloudckpt.format import shown
from cloudckpt.options import KIB, MIB
from cloudckpt.store import Store, is_key, local_path

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Blob", "SizedFile", "damaged", "refuse_special"]

_READ_BYTES = 8 * MIB
# What reads a directory or a header asks for a few bytes at a time.
_AHEAD_BYTES = 64 * KIB
# At its two ends an archive has all but the tensors, and its readers jump between them.
_END_BYTES = 64 * KIB


def damaged(blob: Blob, why: str) -> SourceError:
    """Return the error for an object that is not what it should be."""
    return SourceError(f"{blob.key!r} is damaged: {why}; get it anew", key=blob.key)


def refuse_special(store: Store, key: str) -> None:
    """Refuse a name on a disk that is a pipe, a device or a socket, which nobody reads twice; raises `SourceError`."""
    try:
        mode = Path(local_path(store.url), key).stat().st_mode if store.engine == "local" else stat.S_IFREG
    except (OSError, ValueError):  # the store itself says more
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError(
            f"{shown(key)} in {store.url} is no regular file, but a pipe, a device or a socket; give a file", key=key
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """Some bytes of an object: all of it, or a range that counts from its own first byte.

    Attributes:
        store, key: where it is.
        size_bytes: how many bytes.
        modified_s: when the object was written last.
        first: its first byte in the object.
    """

    store: Store
    key: str
    size_bytes: int
    modified_s: float
    first: int = 0

    @classmethod
    def of(cls, store: Store, key: str) -> Blob:
        """Return an object whole.

        Raises:
            SourceError: it is not there, is no regular file, or has a name that none can have.
        """
        if not is_key(key):
            raise SourceError(f"{shown(key)} is no name of a file in {store.url}; get what names it anew", key=key)
        refuse_special(store, key)
        try:
            info = store.head(key)
        except ObjectNotFoundError as exc:
            raise SourceError(f"{key!r} is not in {store.url}; give the whole folder, or another one", key=key) from exc
        return cls(store=store, key=key, size_bytes=info.size_bytes, modified_s=info.modified_s)

    def part(self, start: int, size_bytes: int) -> Blob:
        """Return a range of it; raises `SourceError` if that leaves it."""
        self._check(start, start + size_bytes)
        return Blob(
            store=self.store,
            key=self.key,
            size_bytes=size_bytes,
            modified_s=self.modified_s,
            first=self.first + start,
        )

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size_bytes:
            raise SourceError(
                f"{self.key!r} has {self.size_bytes} bytes, and what is in it names those from {start} to {stop}: "
                "it was cut short or is damaged; get it anew",
                key=self.key,
            )

    def read_into(self, start: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes from `start` on."""
        self._check(start, start + memory.nbytes)
        for at in range(0, memory.nbytes, _READ_BYTES):
            into = memory[at : at + _READ_BYTES]
            first = self.first + start + at
            self.store.get(self.key, start=first, stop=first + into.nbytes, into=into)

    def read(self, start: int, size_bytes: int) -> bytes:
        """Return bytes."""
        self._check(start, start + size_bytes)
        data = bytearray(size_bytes)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def file(self) -> io.BufferedReader:
        """Return it as a file that is open for reading."""
        return io.BufferedReader(_Raw(self), _AHEAD_BYTES)

    def is_unchanged(self) -> bool:
        """Tell whether the object is still the one that was found first."""
        info = self.store.head(self.key)
        return info.modified_s == self.modified_s and self.first + self.size_bytes <= info.size_bytes


class SizedFile(io.RawIOBase):
    """A file that is read at any place, and whose size is known."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at


class _Raw(SizedFile):
    """A blob as a file. Each of its ends is read once, by one request, however often it is looked at."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob.size_bytes)
        self._blob = blob
        self._ends: dict[int, bytes] = {}

    def readinto(self, buffer: WriteableBuffer) -> int:
        memory = memoryview(buffer).cast("B")
        tail = max(0, self._blob.size_bytes - _END_BYTES)
        if not memory.nbytes or self._at >= self._blob.size_bytes:
            return 0
        if self._at < _END_BYTES:
            size_bytes = self._copy_end(0, memory)
        elif self._at >= tail:
            size_bytes = self._copy_end(tail, memory)
        else:
            size_bytes = min(memory.nbytes, tail - self._at)
            self._blob.read_into(self._at, memory[:size_bytes])
        self._at += size_bytes
        return size_bytes

    def _copy_end(self, start: int, memory: memoryview) -> int:
        """Copy from the end that begins at `start`; return how many bytes."""
        end = self._ends.get(start)
        if end is None:
            end = self._ends[start] = self._blob.read(start, min(_END_BYTES, self._blob.size_bytes))
        data = end[self._at - start : self._at - start + memory.nbytes]
        memory[: len(data)] = data
        return len(data)
