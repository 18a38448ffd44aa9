"""Find, make, list and clean the directories below one root of a disk, following no symbolic link on the way.

A key's directories are opened one below the other, each by its own name, so that nothing that somebody planted
there can lead out of the root. A directory exists only for the objects in it: one without objects is not listed,
and goes with the last of them. Its names are durable before a writer gets to use it (FORMAT invariant 2).

A temp name is `.cloudckpt-tmp-` and 32 hexadecimal digits. No listing shows it and no key may name it; its writer
holds a lock on it, so that one without a lock, left by a crash, may be removed by whoever finds it.
Raises the disk's own `OSError`; knows no contents. Any thread may enter.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cloudckpt.errors import OptionsError, StorageError
from cloudckpt.store.base import Listing, ObjectInfo, check_key
from cloudckpt.store.disk import Disk

__all__ = ["ABSENT", "LocalTree", "describe", "new_temp_name", "segments_of"]

logger = logging.getLogger(__name__)

# How a disk says that there is nothing of that name: also when a part of the path is an object.
ABSENT = (FileNotFoundError, NotADirectoryError)

_TEMP = re.compile(r"\A\.cloudckpt-tmp-[0-9a-f]{32}\Z")
_REMEMBERED_DIRECTORIES = 4096
_NOT_REMOVABLE = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR})


class LocalTree:
    """The directories below one root."""

    def __init__(self, root: str, disk: Disk) -> None:
        """Look at the absolute path `root`, which need not exist."""
        self.root = root
        self._disk = disk
        self._lock = threading.Lock()
        self._durable: dict[tuple[str, ...], int] = {}
        self._skipped: set[str] = set()

    # -- opening and making --------------------------------------------------------------------------------

    @contextmanager
    def directory(self, segments: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """Open the directory of those names; with `make`, have it durable first."""
        fd = self._open_root(make=make)
        try:
            for depth in range(1, len(segments) + 1):
                child = self._enter(fd, tuple(segments[:depth]), make=make)
                self._disk.close(fd)
                fd = child
            yield fd
        finally:
            self._disk.close(fd)

    @contextmanager
    def object(self, key: str) -> Iterator[int]:
        """Open an object to read; whatever is no regular file is none."""
        *parents, name = segments_of(key)
        try:
            with self.directory(parents) as directory:
                fd = self._disk.open_to_read(name, at=directory)
        except NotADirectoryError as exc:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key) from exc
        try:
            if not stat.S_ISREG(self._disk.status(fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
            yield fd
        finally:
            self._disk.close(fd)

    def _enter(self, fd: int, path: tuple[str, ...], *, make: bool) -> int:
        try:
            child = self._disk.open_directory(path[-1], at=fd)
        except FileNotFoundError:
            if not make:
                raise
            with suppress(FileExistsError):
                self._disk.make_directory(path[-1], at=fd)
            child = self._disk.open_directory(path[-1], at=fd)
        if make:
            with self._closing_on_error(child):
                self._make_durable(fd, path, child)
        return child

    def _make_durable(self, fd: int, path: tuple[str, ...], child: int) -> None:
        """Once per directory, make its name survive a power cut: who made it may have died before doing so."""
        inode = self._disk.status(child).st_ino
        if self._durable.get(path) == inode:
            return
        self._disk.sync_directory(fd)
        with self._lock:
            if len(self._durable) >= _REMEMBERED_DIRECTORIES:
                self._durable.clear()
            self._durable[path] = inode

    def _open_root(self, *, make: bool) -> int:
        try:
            fd = self._disk.open_path(self.root)
        except NotADirectoryError as exc:
            # Not ABSENT: "cannot be listed" must never read as "holds nothing".
            raise StorageError(f"{self.root} is not a directory; choose another root") from exc
        except FileNotFoundError:
            if self._disk.is_link(self.root, at=None):
                raise StorageError(f"{self.root} is a symbolic link to nothing; mount or make its target") from None
            if not make:
                raise
            self._make_path(self.root)
            fd = self._disk.open_path(self.root)
        if make:
            with self._closing_on_error(fd):
                self._make_root_durable(fd)
        return fd

    def _make_path(self, path: str) -> None:
        parent = Path(path).parent
        if not parent.is_dir():
            self._make_path(str(parent))
        with suppress(FileExistsError):
            self._disk.make_directory(path, at=None)
        self._sync_path(str(parent))

    def _make_root_durable(self, fd: int) -> None:
        inode = self._disk.status(fd).st_ino
        if self._durable.get(()) == inode:
            return
        # A parent that we may not read was not made by us: its names are its owner's care.
        with suppress(PermissionError):
            self._sync_path(str(Path(self.root).resolve().parent))
        with self._lock:
            self._durable[()] = inode

    def _sync_path(self, path: str) -> None:
        fd = self._disk.open_path(path)
        try:
            self._disk.sync_directory(fd)
        finally:
            self._disk.close(fd)

    @contextmanager
    def _closing_on_error(self, fd: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._disk.close(fd)
            raise

    @contextmanager
    def _below(self, fd: int, name: str) -> Iterator[int]:
        child = self._disk.open_directory(name, at=fd)
        try:
            yield child
        finally:
            self._disk.close(child)

    # -- listing -------------------------------------------------------------------------------------------

    def listing(self, prefix: str, *, by_directory: bool) -> Listing:
        """List the objects whose key starts with `prefix`; with `by_directory` those beside it, and directories."""
        parent, slash, _ = prefix.rpartition("/")
        objects: list[ObjectInfo] = []
        prefixes: list[str] | None = [] if by_directory else None
        with suppress(*ABSENT), self.directory(segments_of(parent) if parent or slash else ()) as fd:
            self._walk(fd, parent + slash, prefix, objects, prefixes)
        return Listing(
            objects=tuple(sorted(objects, key=lambda info: info.key)), prefixes=tuple(sorted(prefixes or ()))
        )

    def _walk(self, fd: int, base: str, prefix: str, objects: list[ObjectInfo], prefixes: list[str] | None) -> None:
        """Collect what is below an open directory; its directories go to `prefixes`, unentered, if that is given."""
        for entry in self._matching(fd, base, prefix):
            key = base + entry.name
            with suppress(*ABSENT):  # deleted while we looked
                if entry.is_file(follow_symlinks=False):
                    objects.append(describe(key, entry.stat(follow_symlinks=False)))
                elif prefixes is None:
                    with self._below(fd, entry.name) as child:
                        self._walk(child, key + "/", prefix, objects, None)
                elif self._holds_object(fd, entry.name, key + "/"):
                    prefixes.append(key + "/")

    def _holds_object(self, fd: int, name: str, base: str) -> bool:
        with suppress(*ABSENT), self._below(fd, name) as child:
            entries = self._matching(child, base, "")
            return any(entry.is_file(follow_symlinks=False) for entry in entries) or any(
                self._holds_object(child, entry.name, f"{base}{entry.name}/") for entry in entries
            )
        return False

    def _matching(self, fd: int, base: str, prefix: str) -> Sequence[os.DirEntry[str]]:
        """Return the objects under the prefix, and the directories that may hold some."""
        found = []
        for entry in self._disk.entries(fd):
            key = base + entry.name
            is_directory = entry.is_dir(follow_symlinks=False)
            if not (key + "/" if is_directory else key).startswith(prefix) or not _is_key(key):
                continue
            if is_directory or entry.is_file(follow_symlinks=False):
                found.append(entry)
            else:
                self._warn_of_skipped(key)
        return found

    def _warn_of_skipped(self, key: str) -> None:
        with self._lock:
            is_new = key not in self._skipped
            self._skipped.add(key)
        if is_new:
            logger.warning("%r in %s is a symbolic link or a special file, so it is skipped", key, self.root)

    # -- cleaning ------------------------------------------------------------------------------------------

    def remove_hollow(self, parents: Sequence[str]) -> None:
        """Remove a directory, and those above it up to the root, for as long as there is no object in them."""
        # A directory that stays behind is no object, so whatever keeps it is no failure of a delete.
        with suppress(OSError):
            for depth in range(len(parents), 0, -1):
                if not self._remove_below(parents[: depth - 1], parents[depth - 1]):
                    return

    def remove_leftovers(self) -> int:
        """Remove every temp name of a dead writer below the root, and then-empty directories; count the names."""
        with suppress(FileNotFoundError), self.directory(()) as fd:
            return self._clear(fd)[0]
        return 0

    def _remove_below(self, parents: Sequence[str], name: str) -> bool:
        with suppress(*ABSENT), self.directory(parents) as fd:
            # Not made durable: an empty directory that a power cut brings back holds no object.
            return self._remove_directory(fd, name) or self._clear_below(fd, name, until_object=True)[1]
        return True

    def _remove_directory(self, fd: int, name: str) -> bool:
        try:
            self._disk.remove_directory(name, at=fd)
        except FileNotFoundError:
            return True
        except OSError as exc:
            if exc.errno not in _NOT_REMOVABLE:
                raise
            return False
        return True

    def _clear(self, fd: int, *, until_object: bool = False) -> tuple[int, bool]:
        """Remove what crashes left in a directory; return how many temp names, and whether nothing is left."""
        removed, is_hollow = 0, True
        for entry in self._disk.entries(fd):
            if entry.is_dir(follow_symlinks=False):
                count, is_gone = self._clear_below(fd, entry.name, until_object=until_object)
            else:
                is_gone = _TEMP.match(entry.name) is not None and self._remove_if_dead(fd, entry.name)
                count = int(is_gone)
            removed += count
            is_hollow = is_hollow and is_gone
            if until_object and not is_hollow:
                break
        return removed, is_hollow

    def _clear_below(self, fd: int, name: str, *, until_object: bool) -> tuple[int, bool]:
        with suppress(*ABSENT), self._below(fd, name) as child:
            removed, is_hollow = self._clear(child, until_object=until_object)
            return removed, is_hollow and self._remove_directory(fd, name)
        return 0, True

    def _remove_if_dead(self, fd: int, temp: str) -> bool:
        try:
            file = self._disk.open_to_read(temp, at=fd)
        except FileNotFoundError:
            return True
        try:
            if not self._disk.lock(file):
                return False
            # A writer that lives after all (on a network disk without locks) finds its temp gone, and starts anew.
            with suppress(FileNotFoundError):
                self._disk.unlink(temp, at=fd)
        finally:
            self._disk.close(file)
        return True


def new_temp_name() -> str:
    """Return a temp name that nobody else has."""
    return f".cloudckpt-tmp-{secrets.token_hex(16)}"


def segments_of(key: str) -> Sequence[str]:
    """Return a key's names, if a disk may hold it.

    Raises:
        OptionsError: the key is none, or holds a temp name.
    """
    segments = check_key(key).split("/")
    if any(_TEMP.match(segment) for segment in segments):
        raise OptionsError(f"object key {key!r} looks like a temp name of the disk store")
    return segments


def describe(key: str, status: os.stat_result) -> ObjectInfo:
    """Say what the disk knows of an object."""
    return ObjectInfo(key=key, size_bytes=status.st_size, modified_s=status.st_mtime)


def _is_key(name: str) -> bool:
    """Tell whether a name on the disk can be a key: others are foreign, and never listed."""
    try:
        name.encode()
        segments_of(name)
    except (OptionsError, UnicodeEncodeError):
        return False
    return True
