"""The system calls that the local store stands on, one method each: the seam where a test can fail any of them.

Names are looked up below an open directory and never through a symbolic link. Knows nothing of keys or of our
errors: whatever the system refuses is raised as the `OSError` that it gave. Holds no state, so any thread may enter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Sequence

__all__ = ["Disk"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody planted must not wait for its writer; regular files ignore it.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
# File systems without an fsync of directories (some network and FUSE ones) say so by these.
_NO_DIRECTORY_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class Disk:
    """What the kernel offers for objects in directories."""

    def open_path(self, path: str) -> int:
        """Open the directory at `path`, following links: where a root lies is the user's own choice."""
        return os.open(path, _DIRECTORY)

    def open_directory(self, name: str, *, at: int) -> int:
        """Open a directory below another; `ELOOP` if the name is a symbolic link."""
        try:
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        except NotADirectoryError:
            # The kernel says so of a link, too, and that one must not read as "there is nothing below".
            if stat.S_ISLNK(os.lstat(name, dir_fd=at).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
            raise

    def open_to_read(self, name: str, *, at: int) -> int:
        """Open what may be an object; `ELOOP` if the name is a symbolic link."""
        return os.open(name, _READ, dir_fd=at)

    def open_new(self, name: str, *, at: int) -> int:
        """Make and open a file that was not there, for its owner alone."""
        return os.open(name, _WRITE_NEW, 0o600, dir_fd=at)

    def make_directory(self, name: str, *, at: int | None) -> None:
        """Make a directory, for its owner alone; without `at`, `name` is a path."""
        os.mkdir(name, 0o700, dir_fd=at)

    def write(self, fd: int, buffers: Sequence[memoryview], *, offset: int) -> int:
        """Gather buffers into the file at `offset`; return how many bytes the kernel took."""
        return os.pwritev(fd, buffers, offset)

    def read(self, fd: int, into: memoryview, *, offset: int) -> int:
        """Fill `into` from `offset`; return how many bytes came, 0 at the end."""
        return os.preadv(fd, [into], offset)

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
            if exc.errno not in _NO_DIRECTORY_FSYNC:
                raise

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
