"""Keep objects as plain files below one directory of a local or mounted disk: each whole and durable, or not there.

    put     temp name ▶ write ▶ fsync ▶ rename over the key     ▶ fsync of the directory
    create  temp name ▶ write ▶ fsync ▶ link, refused if taken  ▶ fsync of the directory
    get     walk from the root ▶ preadv into the caller's memory

The bytes go from the caller's memory to the kernel without a copy of ours. Knows keys and bytes; directories and
temp names are `local_tree`'s. Keeps FORMAT invariants 2 and 7 where they speak of disks. Any thread may enter.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from cloudckpt.errors import (
    AccessDeniedError,
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    TransientError,
)
from cloudckpt.options import MIB
from cloudckpt.store.base import Listing, ObjectInfo
from cloudckpt.store.buffers import check_destination, flat
from cloudckpt.store.disk import Disk
from cloudckpt.store.local_tree import ABSENT, LocalTree, describe, new_temp_name, segments_of

__all__ = ["LocalStore", "local_path"]

_SCHEME = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*):(?=/)")
_IOV_MAX = 1024
# After each so many bytes the device is told to start, so that the fsync at the end waits only for the last of them.
_WRITEBACK_BYTES = 8 * MIB
# A concurrent delete may take a directory that a put has just made for an empty one; this often it starts anew.
_REMAKE_LIMIT = 50
# How file systems say that they have no hard links (FAT, some network and FUSE ones), or no exclusive rename.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_EXCLUSIVE_RENAME = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

_FULL = "free space or let retention remove old checkpoints, then save again"
_DENIED = "check the owner and the mode of the directory"
_COLLISION = "an object and a directory cannot share a name on a disk; choose other keys or another root"
_BUSY = "the file system is busy"
_ADVICE: dict[int, tuple[type[StorageError], str]] = {
    errno.ENOENT: (ObjectNotFoundError, "there is no object of that key"),
    errno.ENOSPC: (StorageError, _FULL),
    errno.EDQUOT: (StorageError, _FULL),
    errno.EFBIG: (StorageError, "lower shard_bytes, or raise the limit of the process or the file system"),
    errno.EROFS: (AccessDeniedError, "the file system is mounted read-only; choose another root, or remount it"),
    errno.EACCES: (AccessDeniedError, _DENIED),
    errno.EPERM: (AccessDeniedError, _DENIED),
    errno.EIO: (StorageError, "the device is failing; look at the kernel's log, and save elsewhere"),
    errno.ENAMETOOLONG: (StorageError, "choose a shorter root or key"),
    errno.ELOOP: (StorageError, "a symbolic link below the root is never followed; put what it points to in its place"),
    errno.ENOTDIR: (StorageError, _COLLISION),
    errno.EISDIR: (StorageError, _COLLISION),
    errno.ENOTEMPTY: (StorageError, _COLLISION),
    errno.EMFILE: (TransientError, "too many open files; raise `ulimit -n` or lower the concurrency"),
    errno.ENFILE: (TransientError, "too many open files on this machine"),
    errno.ENOMEM: (TransientError, "the kernel is short of memory"),
    errno.EAGAIN: (TransientError, _BUSY),
    errno.EBUSY: (TransientError, _BUSY),
    errno.ETIMEDOUT: (TransientError, "the network file system did not answer"),
    errno.ESTALE: (TransientError, "the network file system lost the handle"),
}

# The store has a verb `list`, so that its methods cannot name the type.
_Buffers = list[memoryview]
_Names = list[str]
_Kept = list[tuple[str, OSError]]


class LocalStore:
    """Objects below one directory; `create` is exclusive among all processes that see the same disk."""

    def __init__(self, url: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        """Look at `url` (see `local_path`); nothing is made before the first write.

        Directories are made with mode 0700 and objects with 0600, less the umask: weights are their owner's.
        """
        self._root = local_path(url)
        self._disk = disk or Disk()
        self._tree = LocalTree(self._root, self._disk)

    @property
    def url(self) -> str:
        return "file://" + quote_from_bytes(os.fsencode(self._root), safe="/")

    @property
    def engine(self) -> str:
        return "local"

    @property
    def is_create_atomic(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        with self._our_errors("put", key):
            self._publish("put", key, flat(buffers), self._replace)

    def create(self, key: str, data: bytes) -> None:
        with self._our_errors("create", key):
            self._publish("create", key, flat([memoryview(data)]), self._claim)

    def get(self, key: str, *, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        view = check_destination(start, stop, into)
        if view is None:
            view = memoryview(bytearray(stop - start))
        with self._our_errors("get", key), self._tree.object(key) as fd:
            size_bytes = self._disk.status(fd).st_size
            if stop > size_bytes or not self._fill(fd, view, start):
                raise StorageError(
                    f"{key!r} in {self._root} has {size_bytes} bytes, and [{start}, {stop}) were asked for; "
                    "it was cut short, or is not the object that was meant",
                    op="get",
                    key=key,
                )
        return view

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        with self._our_errors("read", key), self._tree.object(key) as fd:
            size_bytes = self._disk.status(fd).st_size
            data = bytearray(min(size_bytes, limit_bytes))
            if size_bytes > limit_bytes or not self._fill(fd, memoryview(data), 0):
                raise StorageError(
                    f"{key!r} in {self._root} has {size_bytes} bytes, and {limit_bytes} are the most allowed",
                    op="read",
                    key=key,
                )
        return bytes(data)

    def head(self, key: str) -> ObjectInfo:
        with self._our_errors("head", key), self._tree.object(key) as fd:
            return describe(key, self._disk.status(fd))

    def list(self, prefix: str = "", *, delimiter: str = "") -> Listing:
        if delimiter not in ("", "/"):
            raise OptionsError(f"delimiter {delimiter!r} is unknown to a disk; give '/' or none")
        with self._our_errors("list", prefix):
            return self._tree.listing(prefix, by_directory=bool(delimiter))

    def delete(self, keys: Sequence[str]) -> None:
        groups: dict[tuple[str, ...], _Names] = {}
        for key in keys:
            *parents, name = segments_of(key)
            groups.setdefault(tuple(parents), []).append(name)
        kept: _Kept = []
        for directory, names in groups.items():
            kept += self._delete_below(directory, names)
        if kept:
            key, cause = kept[0]
            also = f"; {len(kept)} of {len(keys)} objects may still be there"
            raise self._explained(cause, "delete", key, also=also) from cause

    def refresh(self) -> None:
        """Do nothing: a disk knows no credentials."""

    def close(self) -> None:
        """Do nothing: no descriptor outlives a verb."""

    def remove_leftovers(self) -> int:
        """Remove all temp names that crashed writers left below the root; return how many.

        `delete` does the same in the directories that it empties, so this is for what no checkpoint owns.
        """
        with self._our_errors("delete", ""):
            return self._tree.remove_leftovers()

    # -- writing -------------------------------------------------------------------------------------------

    def _publish(self, op: str, key: str, buffers: _Buffers, publish: Callable[[int, str, str], None]) -> None:
        *parents, name = segments_of(key)
        for _ in range(_REMAKE_LIMIT):
            with suppress(FileNotFoundError), self._tree.directory(parents, make=True) as fd:
                return self._write_and_publish(fd, name, buffers, publish)
        raise TransientError(
            f"{op} of {key!r} in {self._root}: its directory vanished {_REMAKE_LIMIT} times; see what deletes there",
            op=op,
            key=key,
        )

    def _write_and_publish(
        self, fd: int, name: str, buffers: _Buffers, publish: Callable[[int, str, str], None]
    ) -> None:
        temp = new_temp_name()
        file = self._disk.open_new(temp, at=fd)
        try:
            self._disk.lock(file)
            self._write(file, buffers)
            self._disk.sync(file)
            publish(fd, temp, name)
        except BaseException:  # an interrupt, too, must not leave a shard's worth of bytes behind
            self._discard(temp, at=fd)
            raise
        finally:
            self._disk.close(file)

    def _write(self, file: int, buffers: _Buffers) -> None:
        offset = started = 0
        for batch in _batches(buffers):
            rest = batch
            while rest:
                taken = self._disk.write(file, rest, offset=offset)
                offset += taken
                rest = _rest(rest, taken)
            if offset - started >= _WRITEBACK_BYTES:
                self._disk.start_writeback(file, offset=started, size_bytes=offset - started)
                started = offset

    def _replace(self, fd: int, temp: str, name: str) -> None:
        self._disk.rename(temp, name, at=fd)
        self._disk.sync_directory(fd)

    def _claim(self, fd: int, temp: str, name: str) -> None:
        try:
            self._link(fd, temp, name)
        except FileExistsError as exc:
            raise ObjectExistsError(
                f"{name!r} in {self._root} is taken; the object there was left as it is", op="create", key=name
            ) from exc
        self._discard(temp, at=fd)
        try:
            self._disk.sync_directory(fd)
        except OSError as exc:
            raise CommitUnknownError(
                f"{name!r} in {self._root} was created, but the disk did not confirm it ({_errno_name(exc)}), so a "
                "power cut may undo it; look at the device, then whether the object is there",
                op="create",
                key=name,
            ) from exc

    def _link(self, fd: int, temp: str, name: str) -> None:
        """Give the temp object its key, exclusively: by a link, else by a rename that never replaces."""
        try:
            self._disk.link(temp, name, at=fd)
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            self._rename_new(fd, temp, name)

    def _rename_new(self, fd: int, temp: str, name: str) -> None:
        try:
            self._disk.rename_new(temp, name, at=fd)
        except OSError as exc:
            if exc.errno not in _NO_EXCLUSIVE_RENAME:
                raise
            raise CreateNotEnforcedError(
                f"the file system of {self._root} has neither hard links nor exclusive renames, so two jobs could both "
                "commit there; choose a root on another file system",
                op="create",
                key=name,
            ) from exc

    def _discard(self, temp: str, *, at: int) -> None:
        # What cannot be removed now is hidden, and goes with its directory later.
        with suppress(OSError):
            self._disk.unlink(temp, at=at)

    # -- reading and deleting ------------------------------------------------------------------------------

    def _fill(self, fd: int, view: memoryview, start: int) -> bool:
        filled = 0
        while filled < view.nbytes:
            count = self._disk.read(fd, view[filled:], offset=start + filled)
            if not count:
                return False
            filled += count
        return True

    def _delete_below(self, parents: tuple[str, ...], names: Sequence[str]) -> _Kept:
        """Delete names of one directory; return (key, reason) of those that may still be there."""
        kept: _Kept = []
        try:
            with suppress(*ABSENT), self._tree.directory(parents) as fd:
                for name in names:
                    kept += self._unlink(fd, parents, name)
                # Else a power cut could bring a manifest back while its shards stay away (FORMAT invariant 7).
                self._disk.sync_directory(fd)
        except StorageError:
            raise  # some of ours are an OSError, too
        except OSError as exc:
            return [("/".join([*parents, name]), exc) for name in names]
        self._tree.remove_hollow(parents)
        return kept

    def _unlink(self, fd: int, parents: tuple[str, ...], name: str) -> _Kept:
        try:
            self._disk.unlink(name, at=fd)
        except (FileNotFoundError, IsADirectoryError):  # a directory is no object, so no object has that key
            return []
        except OSError as exc:
            return [("/".join([*parents, name]), exc)]
        return []

    # -- errors --------------------------------------------------------------------------------------------

    @contextmanager
    def _our_errors(self, op: str, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError as exc:
            exc.op, exc.key = op, key
            raise
        except OSError as exc:
            raise self._explained(exc, op, key) from exc

    def _explained(self, cause: OSError, op: str, key: str, *, also: str = "") -> StorageError:
        kind, advice = _ADVICE.get(cause.errno or 0, (StorageError, "the system's manual explains this error"))
        what = os.strerror(cause.errno) if cause.errno else str(cause)
        message = f"{op} of {key!r} in {self._root}: {what} ({_errno_name(cause)}); {advice}{also}"
        return kind(message, op=op, key=key)


def local_path(url: str | os.PathLike[str]) -> str:
    """Return the absolute path that a local URL or path names.

    `dir`, `./dir` and `/abs` are paths as they stand; a leading `~` is the home directory (`./~` is a directory of
    that name). `file:///abs` is percent-decoded, and knows no `~`.

    Raises:
        OptionsError: it is empty, of another scheme or host, or holds a NUL.
    """
    path = os.fspath(url)
    scheme = _SCHEME.match(path)
    path = _expanded(path) if scheme is None else _path_of_url(path, scheme[1].lower(), path[scheme.end() :])
    if not path or "\0" in path:
        raise OptionsError(f"{path!r} is no path; give a directory")
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links, so that the URL shows another place


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as exc:
        raise OptionsError(
            f"{path!r} names the home directory of nobody; write ./~ for a directory of that name"
        ) from exc


def _path_of_url(url: str, scheme: str, rest: str) -> str:
    if scheme not in ("file", "local"):
        raise OptionsError(f"a URL of scheme {scheme} is no path on a disk")
    # Three slashes: an empty host and an absolute path. Two would make the first directory a host.
    if not rest.startswith("///"):
        raise OptionsError(f"{url!r} does not name an absolute path on this machine; write {scheme}:///abs/path")
    return os.fsdecode(unquote_to_bytes(rest[2:]))


def _batches(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut buffers into what one system call takes, small enough that write-back starts early on a large one, too."""
    batch: list[memoryview] = []
    batch_bytes = 0
    for piece in _pieces(buffers):
        if len(batch) == _IOV_MAX or batch_bytes + piece.nbytes > _WRITEBACK_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(piece)
        batch_bytes += piece.nbytes
    yield batch


def _pieces(buffers: list[memoryview]) -> Iterator[memoryview]:
    for buffer in buffers:
        for start in range(0, buffer.nbytes, _WRITEBACK_BYTES):
            yield buffer[start : start + _WRITEBACK_BYTES]


def _rest(batch: list[memoryview], taken: int) -> list[memoryview]:
    """Return what is left of `batch` after its first `taken` bytes."""
    for index, buffer in enumerate(batch):
        if taken < buffer.nbytes:
            return [buffer[taken:], *batch[index + 1 :]]
        taken -= buffer.nbytes
    return []


def _errno_name(cause: OSError) -> str:
    return errno.errorcode.get(cause.errno or 0, type(cause).__name__)
