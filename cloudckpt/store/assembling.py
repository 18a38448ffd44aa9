"""Write one large object of a known size in any order, so that it is there whole or not at all.

    on a disk    temp name in its directory ▶ written in place … ▶ fsync ▶ rename      nothing is written twice
    elsewhere    memory, or a file without a name here ▶ written … ▶ one put           a put takes its object whole

For what other programs read, whose objects are as large as those want them: a shard is put from tensor memory. Knows
keys and bytes. Any number of threads place bytes at once, each its own; who yields waits for none of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from cloudckpt.errors import OptionsError, StorageError
from cloudckpt.options import MIB
from cloudckpt.store.base import Store
from cloudckpt.store.buffers import new_memory
from cloudckpt.store.local import local_below

__all__ = ["Append", "Place", "appended", "assembled", "refuse_beyond_one_put"]

Place = Callable[[int, memoryview], None]
"""Takes bytes of an object, and where in it they begin; they may change as soon as it has returned."""

Append = Callable[[memoryview], None]
"""Takes the next bytes of an object; they may change as soon as it has returned."""

# What is larger is gathered on a disk: a put of it must not take its size in memory.
_IN_MEMORY_BYTES = 64 * MIB
# S3 takes no more by one put.
_S3_LIMIT_BYTES = 5 << 30


def refuse_beyond_one_put(store: Store, key: str, size_bytes: int, *, advice: str) -> None:
    """Refuse an object of so many bytes, or more, that a store does not take by one put; raises `OptionsError`."""
    if size_bytes > _S3_LIMIT_BYTES and store.url.startswith("s3"):
        raise OptionsError(
            f"{key!r} has {size_bytes} bytes or more, and S3 takes no more than {_S3_LIMIT_BYTES} by one put; {advice}"
        )


@contextmanager
def assembled(store: Store, key: str, *, size_bytes: int) -> Iterator[Place]:
    """Yield what places bytes of a new object; it stands under its key, durable, once the block ends without an error.

    All of its bytes are to be placed, each once or again.

    Raises:
        OptionsError: it is larger than the store takes by one put; nothing was placed.
        StorageError: it could not be written; what stood under the key stands there still.
    """
    refuse_beyond_one_put(store, key, size_bytes, advice="write several smaller ones, or write it to a disk")
    local = local_below(store)
    if local is not None:
        with local.assembled(key) as place:
            yield place
    elif size_bytes <= _IN_MEMORY_BYTES:
        with _in_memory(store, key, size_bytes) as place:
            yield place
    else:
        with _in_file(store, key, size_bytes) as place:
            yield place


@contextmanager
def appended(store: Store, key: str) -> Iterator[Append]:
    """Yield what takes a new object from its first byte to its last, of a size that nobody knows before.

    For one thread. Else as `assembled`.
    """
    local = local_below(store)
    if local is None:
        with _in_spool(store, key) as append:
            yield append
        return
    with local.assembled(key) as place:
        end = 0

        def append(data: memoryview) -> None:
            nonlocal end
            place(end, data)
            end += data.nbytes

        yield append


@contextmanager
def _in_spool(store: Store, key: str) -> Iterator[Append]:
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES, prefix="cloudckpt-") as file:
        size_bytes = 0

        def append(data: memoryview) -> None:
            nonlocal size_bytes
            try:
                file.write(data)
            except OSError as exc:
                raise _no_room(key, exc) from exc
            size_bytes += data.nbytes

        yield append
        if size_bytes <= _IN_MEMORY_BYTES:
            file.seek(0)
            store.put(key, [memoryview(file.read())] if size_bytes else [])
            return
        file.rollover()
        file.flush()
        with mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
            store.put(key, [view])


@contextmanager
def _in_memory(store: Store, key: str, size_bytes: int) -> Iterator[Place]:
    memory = memoryview(new_memory(max(1, size_bytes)))[:size_bytes]
    array = np.frombuffer(memory, dtype=np.uint8)

    def place(at: int, data: memoryview) -> None:
        np.copyto(array[at : at + data.nbytes], np.frombuffer(data, dtype=np.uint8))

    yield place
    store.put(key, [memory] if size_bytes else [])


@contextmanager
def _in_file(store: Store, key: str, size_bytes: int) -> Iterator[Place]:
    with tempfile.TemporaryFile(prefix="cloudckpt-") as file:

        def place(at: int, data: memoryview) -> None:
            try:
                while data.nbytes:
                    taken = os.pwrite(file.fileno(), data, at)
                    at, data = at + taken, data[taken:]
            except OSError as exc:
                raise _no_room(key, exc) from exc

        file.truncate(size_bytes)
        yield place
        with mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
            store.put(key, [view])


def _no_room(key: str, cause: OSError) -> StorageError:
    return StorageError(
        f"{key!r} is gathered in a file below {tempfile.gettempdir()} before it is put, and that could not be written: "
        f"{cause.strerror}; free space there, or name another directory in TMPDIR",
        op="put",
        key=key,
    )
