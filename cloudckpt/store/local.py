"""Keep objects as plain files below one directory of a local or mounted disk: each whole and durable, or not there.

    put     temp name ▶ write ▶ fsync ▶ rename over the key     ▶ fsync of the directory
    create  temp name ▶ write ▶ fsync ▶ link, refused if taken  ▶ fsync of the directory
    get     walk from the root ▶ preadv into memory of who takes the bytes

The bytes go from the caller's memory to the kernel without a copy of ours. Knows keys and bytes; directories and
temp names are `local_tree`'s. Keeps FORMAT invariants 2 and 7 where they speak of disks. Any thread may enter.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote_from_bytes

from cloudckpt.errors import (
    AccessDeniedError,
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    TransientError,
)
from cloudckpt.options import MIB
from cloudckpt.store.base import Listing, ObjectInfo, check_delimiter
from cloudckpt.store.buffers import check_end, check_limit, check_range, flat, pieces
from cloudckpt.store.disk import NOT_OFFERED, Disk, is_special, temp_name
from cloudckpt.store.facts import BodyLengthError, ObjectSizeError
from cloudckpt.store.intake import Flow, Intake, RangeGets, Whole
from cloudckpt.store.limit import StandsStillError, awaited, get_on, is_limited, is_watched, limited, note_move
from cloudckpt.store.local_tree import ABSENT, LocalTree, describe, segments_of, try_lock
from cloudckpt.store.location import local_path

__all__ = ["LocalStore", "local_below", "scrub"]

T = TypeVar("T")

# After each so many bytes the device is told to start, so that the fsync at the end waits only for the last of them.
_BATCH_BYTES = 8 * MIB
# What a read that may be left to itself holds in memory of its own.
_OWN_BYTES = 8 * MIB
# A concurrent delete may take a directory that a put has just made for an empty one; this often it starts anew.
_REMAKE_LIMIT = 50
# What a network disk says when the answer to a link or a rename was lost.
_UNHEARD = frozenset({errno.EIO, errno.ETIMEDOUT, errno.ESTALE})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_FULL = "there is no room left: free some, raise the quota, let retention keep fewer checkpoints, or save elsewhere"
_DENIED = "check the owner and the mode of the directory"
_COLLISION = "an object and a directory cannot share a name on a disk; choose other keys or another root"
_BUSY = "the file system is busy, or somebody holds the file"
_LINK = "nothing is written or deleted through a symbolic link; put what it points to in its place, or remove the link"
_GONE = "what the path was mounted from is gone; mount it again, or choose another root"
_DAMAGED = "the file system is damaged; save elsewhere, and have it checked (fsck)"
_ADVICE: dict[int | None, tuple[type[StorageError], str]] = {
    errno.ENOENT: (ObjectNotFoundError, "there is no object of that key"),
    errno.ENOSPC: (StorageError, _FULL),
    errno.EDQUOT: (StorageError, _FULL),
    errno.EFBIG: (StorageError, "lower shard_bytes, or raise the limit of the process or the file system"),
    errno.EROFS: (AccessDeniedError, "the file system is mounted read-only; choose another root, or remount it"),
    errno.EACCES: (AccessDeniedError, _DENIED),
    errno.EPERM: (AccessDeniedError, _DENIED),
    errno.EIO: (StorageError, "the device is failing; look at the kernel's log, and save elsewhere"),
    errno.ENAMETOOLONG: (StorageError, "choose a shorter root or key"),
    errno.EUCLEAN: (StorageError, _DAMAGED),
    errno.EBADMSG: (StorageError, _DAMAGED),
    errno.ENODEV: (StorageError, _GONE),
    errno.ENXIO: (StorageError, _GONE),
    errno.ENOTCONN: (TransientError, _GONE),
    errno.ELOOP: (StorageError, _LINK),
    errno.ENOTDIR: (StorageError, _COLLISION),
    errno.EISDIR: (StorageError, _COLLISION),
    errno.ENOTEMPTY: (StorageError, _COLLISION),
    errno.EMFILE: (TransientError, "too many open files; raise `ulimit -n` or lower the concurrency"),
    errno.ENFILE: (TransientError, "too many open files on this machine"),
    errno.ENOMEM: (TransientError, "the kernel is short of memory"),
    errno.EAGAIN: (TransientError, _BUSY),
    errno.EBUSY: (TransientError, _BUSY),
    errno.ETXTBSY: (TransientError, _BUSY),
    errno.EINTR: (TransientError, _BUSY),
    errno.ETIMEDOUT: (TransientError, "the network file system did not answer"),
    errno.ESTALE: (TransientError, "the network file system lost the handle"),
}

# The store has a verb `list`, so that its methods cannot name the type.
_Names = list[str]
# Gives a temp name its key, in an open directory.
_Publish = Callable[[int, str, str], None]


class LocalStore(RangeGets):
    """Objects below one directory; `create` is exclusive among all processes that see the same disk."""

    engine = "local"
    endpoint = ""
    is_create_atomic = True

    def __init__(self, url: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        """Look at `url` (see `local_path`); nothing is made before the first write.

        Directories and objects get the modes that the umask leaves, as those of `torch.save` do: a umask of 077 keeps
        weights to their owner, and 002 shares them with a group.
        """
        self._root = local_path(url)
        self._disk = disk or Disk()
        self._tree = LocalTree(self._root, self._disk)

    @property
    def url(self) -> str:
        return "file://" + quote_from_bytes(os.fsencode(self._root), safe="/")

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def file_system(self) -> str:
        """Return what tells the mounted file system of the root from others, or of where it will be made.

        "" where that is not known, or where not the kernel serves the disk's calls.
        """
        if type(self._disk) is not Disk:
            return ""
        try:
            with limited():
                return self._asked("stat", "", lambda: _file_system_of(self._root))
        except (OSError, TransientError):
            return ""

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        self._write("put", key, buffers, self._replace)

    def create(self, key: str, data: bytes) -> None:
        self._write("create", key, [memoryview(data)], self._claim)

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        check_range(start, stop)
        flow = Flow(into, stop - start)
        if is_watched() or not is_limited():
            return self._stream(key, start, stop, flow)
        # What is left to itself must not write to what is somebody's again.
        own = memoryview(bytearray(min(stop - start, _OWN_BYTES)))
        for at in range(start, stop, _OWN_BYTES) or [start]:
            end = min(at + _OWN_BYTES, stop)
            part = Flow(Whole(own, at), end - at)
            self._asked("get", key, partial(self._stream, key, at, end, part))
            flow.take(own[: end - at])
        return None

    def _stream(self, key: str, start: int, stop: int, flow: Flow) -> None:
        with self._our_errors("get", key), self._tree.object(key) as fd:
            check_end(os.fstat(fd).st_size, start, stop)
            self._disk.read_ahead(fd, offset=start, size_bytes=stop - start)
            self._read_on(fd, stop, flow)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        return self._asked("read", key, lambda: self._read(key, limit_bytes))

    def _read(self, key: str, limit_bytes: int) -> bytes:
        with self._our_errors("read", key), self._tree.object(key) as fd:
            check_limit(size_bytes := os.fstat(fd).st_size, limit_bytes)
            data = bytearray(size_bytes)
            self._read_on(fd, size_bytes, Flow(Whole(memoryview(data), 0), size_bytes))
        return bytes(data)

    def head(self, key: str) -> ObjectInfo:
        return self._asked("head", key, lambda: self._head(key))

    def _head(self, key: str) -> ObjectInfo:
        with self._our_errors("head", key), self._tree.object(key) as fd:
            return describe(key, os.fstat(fd))

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        """List everything at once: a disk has no pages, and gives no mark."""
        check_delimiter(delimiter)
        return self._asked("list", prefix, lambda: self._listed(prefix, by_directory=bool(delimiter)))

    def _listed(self, prefix: str, *, by_directory: bool) -> Listing:
        with self._our_errors("list", prefix):
            return self._tree.listing(prefix, by_directory=by_directory)

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            self._asked("delete", keys[0], lambda: self._delete(keys))

    def _delete(self, keys: Sequence[str]) -> None:
        names: dict[tuple[str, ...], _Names] = {}
        for key in keys:
            *parents, name = segments_of(key)
            names.setdefault(tuple(parents), []).append(name)
        kept: dict[str, OSError] = {}
        for directory, below in names.items():
            kept |= self._delete_below(directory, below)
        if kept:
            key, cause = next(iter(kept.items()))
            also = f"; {len(kept)} of {len(keys)} objects may still be there"
            raise self._explained(cause, "delete", key, also=also) from cause

    def scrub(self, *, older_than_s: float, is_ours: Callable[[str], bool]) -> float:
        """Remove what writers that were killed did not finish, and directories in which nothing came to stand.

        Args:
            older_than_s: seconds since it was last written to, by the disk's clock.
            is_ours: whether a directory of that name directly below the root may be looked into.

        Returns:
            Seconds until more of it is old enough; infinite if nothing is left.
        """
        return self._asked("scrub", "", lambda: self._scrub(older_than_s, is_ours))

    def _scrub(self, older_than_s: float, is_ours: Callable[[str], bool]) -> float:
        with self._our_errors("scrub", ""):
            return self._tree.scrub(older_than_s, is_ours)

    def refresh(self) -> None:
        """Do nothing: a disk knows no credentials."""

    def close(self) -> None:
        """Do nothing: no descriptor outlives a verb."""

    def _asked(self, op: str, key: str, call: Callable[[], T]) -> T:
        """Return what a verb returns, within the time that the request has: a disk that hangs says nothing.

        What is watched over is left by who watches; and without a limit there is nothing to keep.
        """
        if is_watched() or not is_limited():
            return call()
        try:
            return awaited(call)
        except StandsStillError as exc:
            raise TransientError(
                f"{op} of {key!r} in {self._root}: the disk does not answer ({exc}); see whether it, or the server "
                "that it is mounted from, still works",
                op=op,
                key=key,
            ) from exc

    # -- writing -------------------------------------------------------------------------------------------

    @contextmanager
    def assembled(self, key: str) -> Iterator[Callable[[int, memoryview], None]]:
        """Yield what places bytes of a new object, from any thread; it is published, as by `put`, once the block ends.

        What the block itself raises passes as it is.
        """
        *parents, name = segments_of(key)
        temp = temp_name()
        with ExitStack() as stack:
            with self._our_errors("put", key):
                fd = stack.enter_context(self._tree.directory(parents, make=True))
                self._refuse_special(name, at=fd)
                file = self._disk.open_new(temp, at=fd)
                stack.callback(os.close, file)
                try_lock(file)

            def place(at: int, data: memoryview) -> None:
                with self._our_errors("put", key):
                    for batch in _batches([data]):
                        at = self._write_batch(file, batch, at)

            try:
                yield place
                with self._our_errors("put", key):
                    self._disk.sync(file)
                    self._replace(fd, temp, name)
            except BaseException:
                self._discard(temp, at=fd)
                raise

    def _write(self, op: str, key: str, buffers: Sequence[memoryview], publish: _Publish) -> None:
        self._asked(op, key, lambda: self._write_whole(op, key, buffers, publish))

    def _write_whole(self, op: str, key: str, buffers: Sequence[memoryview], publish: _Publish) -> None:
        *parents, name = segments_of(key)
        with self._our_errors(op, key):
            for _ in range(_REMAKE_LIMIT):
                with suppress(FileNotFoundError), self._tree.directory(parents, make=True) as fd:
                    return self._write_below(fd, name, flat(buffers), publish)
            raise TransientError(
                f"{op} of {key!r} in {self._root}: its directory vanished {_REMAKE_LIMIT} times; see what deletes there"
            )

    def _write_below(self, fd: int, name: str, buffers: Sequence[memoryview], publish: _Publish) -> None:
        temp = temp_name()
        file = self._disk.open_new(temp, at=fd)
        try:
            try_lock(file)
            offset = 0
            for batch in _batches(buffers):
                offset = self._write_batch(file, batch, offset)
            self._disk.sync(file)
            get_on()
            publish(fd, temp, name)
        except BaseException:  # an interrupt, too, must not leave a shard's worth of bytes behind
            self._discard(temp, at=fd)
            raise
        finally:
            os.close(file)

    def _write_batch(self, file: int, batch: Sequence[memoryview], start: int) -> int:
        offset = start
        while batch:
            taken = self._disk.write(file, batch, offset=offset)
            offset += taken
            note_move(offset)
            get_on()
            batch = _rest(batch, taken)
        if offset - start >= MIB:  # small ones share pages, each of which would be written once for each of them
            self._disk.start_writeback(file, offset=start, size_bytes=offset - start)
        return offset

    def _replace(self, fd: int, temp: str, name: str) -> None:
        self._refuse_special(name, at=fd)
        self._disk.rename(temp, name, at=fd)
        self._disk.sync_directory(fd)

    def _refuse_special(self, name: str, *, at: int) -> None:
        # A rename would put a file in the place of /dev/null, for root.
        if is_special(name, at=at):
            raise StorageError(
                f"{name!r} in {self._root} is a device, a pipe or a socket, which an object would take the place of; "
                "choose another name"
            )

    def _claim(self, fd: int, temp: str, name: str) -> None:
        try:
            self._link(fd, temp, name)
        except FileExistsError as exc:
            raise ObjectExistsError(f"{name!r} in {self._root} is taken; the object there was left as it is") from exc
        self._discard(temp, at=fd)
        try:
            self._disk.sync_directory(fd)
        except OSError as exc:
            raise CommitUnknownError(
                f"{name!r} in {self._root} was created, but the disk did not confirm it ({_errno_name(exc)}), so a "
                "power cut may undo it; look at the device, then whether the object is there"
            ) from exc

    def _link(self, fd: int, temp: str, name: str) -> None:
        """Give the temp object its key, exclusively: by a link, else by a rename that never replaces."""
        try:
            return self._disk.link(temp, name, at=fd)
        except OSError as exc:
            no_link = exc
        if no_link.errno not in NOT_OFFERED["link"]:
            raise no_link
        get_on()
        try:
            self._disk.rename_new(temp, name, at=fd)
        except OSError as exc:
            if exc.errno not in NOT_OFFERED["rename_new"]:
                raise
            raise CreateNotEnforcedError(
                f"the file system of {self._root} has neither hard links ({_errno_name(no_link)}) nor exclusive "
                f"renames ({_errno_name(exc)}), so two jobs could both commit there; choose a root on another one, or "
                "pass Options(single_writer=True) if no other job ever writes to this root"
            ) from exc

    def _discard(self, temp: str, *, at: int) -> None:
        # What cannot be removed now is hidden, and goes with its directory later.
        with suppress(OSError):
            self._disk.unlink(temp, at=at)

    # -- reading and deleting ------------------------------------------------------------------------------

    def _read_on(self, fd: int, stop: int, flow: Flow) -> None:
        while flow.left_bytes:
            count = self._disk.read(fd, flow.room(flow.left_bytes), offset=stop - flow.left_bytes)
            if not count:
                flow.end()
            flow.took(count)
            get_on()

    def _delete_below(self, parents: tuple[str, ...], names: Sequence[str]) -> dict[str, OSError]:
        """Delete names of one directory; return key → reason of those that may still be there."""
        kept: dict[str, OSError] = {}
        keys = {name: "/".join([*parents, name]) for name in names}
        try:
            with suppress(*ABSENT), self._tree.directory(parents) as fd:
                for name, key in keys.items():
                    get_on()
                    try:
                        self._disk.unlink(name, at=fd)
                    except (FileNotFoundError, IsADirectoryError):
                        pass  # a directory is no object, so no object has that key
                    except OSError as exc:
                        kept[key] = exc
                # Else a power cut could bring a manifest back while its shards stay away (FORMAT invariant 7).
                self._disk.sync_directory(fd)
        except OSError as exc:
            return dict.fromkeys(keys.values(), exc)
        self._tree.tidy(parents)
        return kept

    # -- errors --------------------------------------------------------------------------------------------

    @contextmanager
    def _our_errors(self, op: str, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError as exc:
            exc.op, exc.key = op, key
            exc.may_have_landed = isinstance(exc, CommitUnknownError)
            raise
        except (BodyLengthError, ObjectSizeError) as exc:
            raise StorageError(
                f"{op} of {key!r} in {self._root}: {exc}; it was cut short, or is not the object that was meant",
                op=op,
                key=key,
            ) from exc
        except OSError as exc:
            raise self._explained(exc, op, key) from exc

    def _explained(self, cause: OSError, op: str, key: str, *, also: str = "") -> StorageError:
        kind, advice = _ADVICE.get(cause.errno, (StorageError, "the system's manual explains this error"))
        what = os.strerror(cause.errno) if cause.errno else str(cause)
        message = f"{op} of {key!r} in {self._root}: {what} ({_errno_name(cause)}); {advice}{also}"
        error = kind(message, op=op, key=key)
        error.may_have_landed = cause.errno in _UNHEARD
        error.is_full = cause.errno in _NO_ROOM
        return error


def scrub(store: object, *, older_than_s: float, is_ours: Callable[[str], bool]) -> float:
    """Do as `LocalStore.scrub` if that is what moves a store's bytes; no other leaves unfinished objects."""
    below = local_below(store)
    if below is None:
        return math.inf
    with limited(total_s=math.inf):
        return below.scrub(older_than_s=older_than_s, is_ours=is_ours)


def local_below(store: object) -> LocalStore | None:
    """Return what moves a store's bytes if that is a disk."""
    below = store
    while below is not None and not isinstance(below, LocalStore):
        below = getattr(below, "inner", None)
    return below


def _file_system_of(root: str) -> str:
    # The number of a device may be given to another file system later, and some have no id.
    there = next(path for path in (Path(root), *Path(root).parents) if os.path.lexists(path))
    return f"{there.stat().st_dev}.{os.statvfs(there).f_fsid}"


def _batches(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cut buffers into what one system call takes, small enough that write-back starts early on a large one, too."""
    batch: list[memoryview] = []
    batch_bytes = 0
    for piece in pieces(buffers):
        batch.append(piece)
        batch_bytes += piece.nbytes
        if batch_bytes >= _BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _rest(batch: Sequence[memoryview], taken: int) -> Sequence[memoryview]:
    """Return what is left of `batch` after its first `taken` bytes."""
    for index, buffer in enumerate(batch):
        if taken < buffer.nbytes:
            return [buffer[taken:], *batch[index + 1 :]]
        taken -= buffer.nbytes
    return []


def _errno_name(cause: OSError) -> str:
    return errno.errorcode.get(cause.errno or 0, type(cause).__name__)
