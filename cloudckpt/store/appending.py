"""Write one large object from its first byte to its last, so that it is there whole or not at all.

    on a disk    temp name in its directory ▶ write … ▶ fsync ▶ rename      nothing is written twice
    elsewhere    a file without a name here ▶ write … ▶ one put of its pages

For what other programs read, whose objects are as large as those want them: a shard is put from tensor memory. Knows
keys and bytes. One thread at a time appends.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloudckpt.errors import StorageError
from cloudckpt.store.base import Store
from cloudckpt.store.local import local_below

__all__ = ["Append", "appended"]

Append = Callable[[memoryview], None]
"""Takes the next bytes of an object; they may change as soon as it has returned."""


@contextmanager
def appended(store: Store, key: str) -> Iterator[Append]:
    """Yield what appends to a new object; it stands under its key, durable, once the block has ended without an error.

    Raises:
        StorageError: it could not be written; what stood under the key stands there still.
    """
    local = local_below(store)
    if local is not None:
        with local.appended(key) as append:
            yield append
        return
    with tempfile.TemporaryFile(prefix="cloudckpt-") as file:

        def append_here(data: memoryview) -> None:
            try:
                file.write(data)
            except OSError as exc:
                raise _no_room(key, exc) from exc

        yield append_here
        try:
            file.flush()
        except OSError as exc:
            raise _no_room(key, exc) from exc
        if file.tell() == 0:
            store.put(key, [])
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
            store.put(key, [view])


def _no_room(key: str, cause: OSError) -> StorageError:
    return StorageError(
        f"{key!r} is gathered in a file below {tempfile.gettempdir()} before it is put, and that could not be written: "
        f"{cause.strerror}; free space there, or name another directory in TMPDIR",
        op="put",
        key=key,
    )
