"""The system calls that the local store stands on, one method each: the seam where a test can fail any of them.

Names are looked up below an open directory, through a symbolic link only where it is told to follow. Knows nothing of
keys or of our errors: whatever the system refuses is raised as the `OSError` that it gave. Holds no state, so any
thread may enter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress

__all__ = ["NOT_OFFERED", "TEMP_PREFIX", "Disk", "is_link", "is_special", "temp_name"]

TEMP_PREFIX = ".cloudckpt-tmp-"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody planted must not wait for its writer; regular files ignore it.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1

# What a file system says to everything that it does not know.
_UNKNOWN_HERE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
NOT_OFFERED: Mapping[str, frozenset[int]] = {
    # EPERM: FAT and exFAT. EACCES: a security module without the right to link; a directory that cannot be written to
    # has refused the temp name before. EXDEV: projects with quotas, layers of an overlay. EMLINK: one name per file.
    # EIO: FUSE file systems that name no reason; where the device fails, the rename that follows does, too.
    "link": _UNKNOWN_HERE | {errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.EIO},
    # EPERM: sandboxes that do not know the system call. The rest as above.
    "rename_new": _UNKNOWN_HERE | {errno.EPERM, errno.EACCES, errno.EXDEV},
    # EBADF: it asks for a descriptor that can be written to, which no directory has. EACCES, EPERM, EISDIR: the server
    # of a network file system would have to open it so. EROFS: POSIX's word for "nothing here that could be synced".
    # None of them is said by a device that fails. EIO is, and is looked into by `sync_directory`.
    "sync_directory": _UNKNOWN_HERE | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EROFS},
}
"""By which errors of a call a file system says that it has no such thing; any other means that the call has failed."""


def temp_name() -> str:
    """Return a new name for what is no object yet."""
    return TEMP_PREFIX + secrets.token_hex(16)


class Disk:
    """What the kernel offers for objects in directories."""

    def open_path(self, path: str) -> int:
        """Open the directory at `path`, following links: where a root lies is the user's own choice."""
        return os.open(path, _DIRECTORY)

    def open_directory(self, name: str, *, at: int, follow: bool = False) -> int:
        """Open a directory below another; `ELOOP` if the name is a symbolic link, unless that is to be followed."""
        try:
            return os.open(name, _DIRECTORY | (0 if follow else os.O_NOFOLLOW), dir_fd=at)
        except NotADirectoryError:
            # The kernel says so of a link, too, and that one must not read as "there is nothing below".
            if not follow and is_link(name, at=at):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
            raise

    def open_to_read(self, name: str, *, at: int, follow: bool = False) -> int:
        """Open what may be an object; `ELOOP` if the name is a symbolic link, unless that is to be followed."""
        return os.open(name, _READ | (0 if follow else os.O_NOFOLLOW), dir_fd=at)

    def open_new(self, name: str, *, at: int) -> int:
        """Make and open a file that was not there, readable for whom the umask leaves it."""
        return os.open(name, _WRITE_NEW, 0o666, dir_fd=at)

    def make_directory(self, name: str, *, at: int | None) -> None:
        """Make a directory, with the mode that the umask leaves; without `at`, `name` is a path."""
        os.mkdir(name, 0o777, dir_fd=at)

    def write(self, fd: int, buffers: Sequence[memoryview], *, offset: int) -> int:
        """Gather buffers into the file at `offset`; return how many bytes the kernel took."""
        return os.pwritev(fd, buffers, offset)

    def read(self, fd: int, into: memoryview, *, offset: int) -> int:
        """Fill `into` from `offset`; return how many bytes came, 0 at the end."""
        return os.preadv(fd, [into], offset)

    def read_ahead(self, fd: int, *, offset: int, size_bytes: int) -> None:
        """Let the device start on bytes that will be read soon, if it knows how to. Does not wait for them."""
        with suppress(OSError):
            os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def start_writeback(self, fd: int, *, offset: int, size_bytes: int) -> None:
        """Let the device start on written bytes now, so that `sync` finds little left to do. Never waits for them."""
        # Dirty pages cannot be dropped, so all that the advice does to them is to queue them for writing.
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def sync(self, fd: int) -> None:
        """Make a file's bytes and size durable."""
        os.fsync(fd)

    def sync_directory(self, fd: int) -> None:
        """Make the names in a directory durable, where the file system knows how to."""
        try:
            os.fsync(fd)
        except OSError as exc:
            is_failure = exc.errno not in NOT_OFFERED["sync_directory"]
            if is_failure and not (exc.errno == errno.EIO and self._refuses_directories_alone(fd)):
                raise

    def _refuses_directories_alone(self, fd: int) -> bool:
        """Tell whether a directory cannot be synced and never could, which some FUSE file systems call `EIO`, too.

        A device that fails makes no new file durable either, or it had failed once and syncs the directory now.
        """
        temp = temp_name()
        try:
            file = self.open_new(temp, at=fd)
            try:
                self.write(file, [memoryview(b"durable?")], offset=0)
                self.sync(file)
            finally:
                os.close(file)
                with suppress(OSError):
                    self.unlink(temp, at=fd)
        except OSError:
            return False
        try:
            os.fsync(fd)
        except OSError as exc:
            return exc.errno == errno.EIO
        return False

    def link(self, name: str, new_name: str, *, at: int) -> None:
        """Give an object a second name; `EEXIST` if that is taken."""
        os.link(name, new_name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)

    def rename(self, name: str, new_name: str, *, at: int) -> None:
        """Rename an object over whatever object has the new name, at once."""
        os.rename(name, new_name, src_dir_fd=at, dst_dir_fd=at)

    def rename_new(self, name: str, new_name: str, *, at: int) -> None:
        """Rename an object; `EEXIST` if the new name is taken, `ENOSYS` or `EINVAL` where that is not offered."""
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), new_name)
        if rename(at, os.fsencode(name), at, os.fsencode(new_name), _RENAME_NOREPLACE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), new_name)

    def unlink(self, name: str, *, at: int) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=at)

    def remove_directory(self, name: str, *, at: int) -> None:
        """Remove a directory; `ENOTEMPTY` if it holds anything."""
        os.rmdir(name, dir_fd=at)

    def entries(self, fd: int) -> list[os.DirEntry[str]]:
        """Return what a directory holds, in no order."""
        with os.scandir(fd) as found:
            return list(found)


def is_link(name: str, *, at: int) -> bool:
    """Tell whether a name below an open directory is a symbolic link, whatever it points to."""
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=at).st_mode)
    except FileNotFoundError:
        return False


def is_special(name: str, *, at: int) -> bool:
    """Tell whether a name below an open directory is a device, a pipe or a socket."""
    try:
        mode = os.lstat(name, dir_fd=at).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))
