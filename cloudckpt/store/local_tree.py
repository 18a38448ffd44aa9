"""Find, make, list and clean the directories below one root of a disk.

A key's directories are opened one below the other, each by its own name. Who reads follows symbolic links: a step that
somebody moved to another disk and linked is found. Who writes or deletes never does, so that nothing that was put
there leads a change out of the root. A link that leads nowhere is an error to whoever reads below it: what it stood for
is away, and not absent.

A directory exists only for the objects in it: one without objects is not listed, and goes with the last of them. Its
name is durable before a writer gets to use it (FORMAT invariant 2). A temp name is `.cloudckpt-tmp-` and 32 hexadecimal
digits. No listing shows it and no key may name it; its writer holds a lock on it, so that one without a lock, left by a
crash, may be removed by whoever finds it. Raises the disk's own `OSError`; knows no contents. Any thread may enter, and
so may a forked child.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

from cloudckpt.errors import OptionsError, StorageError
from cloudckpt.store.base import Listing, ObjectInfo, check_key, is_key
from cloudckpt.store.disk import TEMP_PREFIX, Disk, is_link, temp_name
from cloudckpt.store.limit import get_on

__all__ = ["ABSENT", "LocalTree", "describe", "segments_of", "try_lock"]

logger = logging.getLogger(__name__)

# How a disk says that there is nothing of that name: also when a part of the path is an object.
ABSENT = (FileNotFoundError, NotADirectoryError)

_TEMP = re.compile(rf"\A{re.escape(TEMP_PREFIX)}[0-9a-f]{{32}}\Z")
_REMEMBERED_DIRECTORIES = 4096


class LocalTree:
    """The directories below one root."""

    def __init__(self, root: str, disk: Disk) -> None:
        """Look at the absolute path `root`, which need not exist."""
        self.root = root
        self._disk = disk
        self._durable: dict[tuple[str, ...], int] = {}
        self._skipped: set[str] = set()

    # -- opening and making --------------------------------------------------------------------------------

    @contextmanager
    def directory(self, segments: Sequence[str], *, make: bool = False, follow: bool = False) -> Iterator[int]:
        """Open the directory of those names; with `make`, have it durable first; with `follow`, through links."""
        if make:
            self._make_root()
        fd = self._open_root()
        try:
            for depth, name in enumerate(segments, 1):
                if make:
                    self._make(fd, tuple(segments[:depth]))
                with self._resolved(name, at=fd):
                    child = self._disk.open_directory(name, at=fd, follow=follow)
                os.close(fd)
                fd = child
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def object(self, key: str) -> Iterator[int]:
        """Open an object to read; whatever is no regular file is none."""
        *parents, name = segments_of(key)
        absent = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
        try:
            with self.directory(parents, follow=True) as directory, self._resolved(name, at=directory):
                fd = self._disk.open_to_read(name, at=directory, follow=True)
        except NotADirectoryError as exc:
            raise absent from exc
        with _closing(fd):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise absent
            yield fd

    @contextmanager
    def _resolved(self, name: str, *, at: int) -> Iterator[None]:
        """Tell a name that is not there from a link to something that is away."""
        try:
            yield
        except FileNotFoundError:
            if is_link(name, at=at):
                raise _link_to_nothing(f"{name!r} in {self.root}") from None
            raise

    def _open_root(self) -> int:
        try:
            return self._disk.open_path(self.root)
        except NotADirectoryError as exc:
            # Not ABSENT: "cannot be listed" must never read as "holds nothing".
            raise StorageError(f"{self.root} is not a directory; choose another root") from exc
        except FileNotFoundError:
            self._refuse_lost()
            raise

    def _refuse_lost(self) -> None:
        """Refuse a root at or below a link that leads nowhere: a disk is away, and nothing is made in its place."""
        with suppress(PermissionError):  # whoever may not look there is told by what follows
            for path in (Path(self.root), *Path(self.root).parents):
                if path.is_symlink() and not path.exists():
                    raise _link_to_nothing(str(path))

    def _make_root(self) -> None:
        root = Path(self.root)
        if not root.is_dir():
            self._refuse_lost()
        missing = list(takewhile(lambda path: not path.is_dir(), (root, *root.parents)))
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._disk.make_directory(str(path), at=None)
            self._sync_path(path.parent)
        if () not in self._durable and root.is_dir():
            # Whoever made it may have died before this; but a parent that we may not read is its owner's care.
            with suppress(PermissionError):
                self._sync_path(root.resolve().parent)
            self._durable[()] = 0

    def _make(self, fd: int, path: tuple[str, ...]) -> None:
        """Have a directory, and make its name survive a power cut: who made it may have died before doing so."""
        try:
            self._disk.make_directory(path[-1], at=fd)
            self._durable.pop(path, None)  # it may have the inode of one that was there before
        except FileExistsError:
            pass
        inode = os.stat(path[-1], dir_fd=fd, follow_symlinks=False).st_ino
        if self._durable.get(path) != inode:
            self._disk.sync_directory(fd)
            if len(self._durable) >= _REMEMBERED_DIRECTORIES:
                self._durable.clear()
            self._durable[path] = inode

    def _sync_path(self, path: Path) -> None:
        with _closing(self._disk.open_path(str(path))) as fd:
            self._disk.sync_directory(fd)

    # -- listing -------------------------------------------------------------------------------------------

    def listing(self, prefix: str, *, by_directory: bool) -> Listing:
        """List the objects whose key starts with `prefix`; with `by_directory` those beside it, and directories."""
        parent, slash, _ = prefix.rpartition("/")
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        with suppress(*ABSENT), self.directory(segments_of(parent) if slash else (), follow=True) as fd:
            for key, entry in self._entries(fd, parent + slash):
                if not key.startswith(prefix):
                    continue
                found = self._objects((fd,), key, entry)
                if not by_directory or _is_file(entry):
                    objects += found
                # Nobody knows what is behind a link that leads nowhere; who reads there is told.
                elif _is_lost(entry) or any(True for _ in found):
                    prefixes.append(key + "/")
        return Listing(objects=tuple(sorted(objects, key=lambda info: info.key)), prefixes=tuple(sorted(prefixes)))

    def _objects(self, above: tuple[int, ...], key: str, entry: os.DirEntry[str]) -> Iterator[ObjectInfo]:
        """Describe the object that an entry of the last of some open directories is, or all that are below it."""
        with suppress(*ABSENT):  # deleted while we looked
            if _is_file(entry):
                yield describe(key, entry.stat())
            elif not _is_lost(entry) and entry.is_dir():
                with _closing(self._disk.open_directory(entry.name, at=above[-1], follow=True)) as child:
                    if not (entry.is_symlink() and _leads_back(child, above)):
                        for name, below in self._entries(child, key + "/"):
                            yield from self._objects((*above, child), name, below)
            elif key not in self._skipped:
                self._skipped.add(key)
                logger.warning("%r in %s is a special file or a link to nothing, so it is skipped", key, self.root)

    def _entries(self, fd: int, base: str) -> list[tuple[str, os.DirEntry[str]]]:
        """Return what an open directory holds, each with its key, objects first; foreign names are passed over."""
        get_on()
        keys = [(base + entry.name, entry) for entry in self._objects_first(fd) if not _TEMP.match(entry.name)]
        return [(key, entry) for key, entry in keys if is_key(key)]

    # -- cleaning ------------------------------------------------------------------------------------------

    def tidy(self, parents: Sequence[str]) -> None:
        """Remove a directory without objects, and those above it; below the root itself, what killed writers left."""
        # What stays behind is no object, so whatever keeps it is no failure of a delete. Nor is it made durable: an
        # empty directory that a power cut brings back holds no object.
        with suppress(OSError):
            for depth in range(len(parents), 0, -1):
                with self.directory(parents[: depth - 1]) as fd:
                    if not self._remove_hollow(fd, parents[depth - 1], even_empty=True):
                        return
            if not parents:
                with self.directory(()) as fd:
                    for entry in self._disk.entries(fd):
                        with suppress(OSError):  # an empty directory may be the user's own
                            self._remove_leftover(fd, entry, even_empty=False)

    def scrub(self, older_than_s: float, is_ours: Callable[[str], bool]) -> float:
        """Remove dead writers' temp names, and empty directories below those that are ours, if they are so old.

        Return in how many seconds the next one is; infinite if none is left.
        """
        with suppress(*ABSENT), self.directory(()) as fd:
            # Nothing is written where nothing is found.
            return self._scrub(fd, cache(lambda: self._now_s(fd) - older_than_s), is_ours)
        return math.inf

    def _now_s(self, fd: int) -> float:
        """Return the disk's clock: the time that it gives to a file made just now."""
        temp = temp_name()
        with _closing(self._disk.open_new(temp, at=fd)) as file:
            self._disk.unlink(temp, at=fd)
            return os.fstat(file).st_mtime

    def _scrub(self, fd: int, before_s: Callable[[], float], is_ours: Callable[[str], bool] = lambda _: True) -> float:
        """Clean an open directory of what was last written to before a time; return how much later the next was."""
        left_s = [math.inf]
        for entry in self._disk.entries(fd):
            get_on()
            with suppress(OSError):  # it is gone, or not ours to remove
                if entry.is_dir(follow_symlinks=False):
                    if is_ours(entry.name):
                        left_s.append(self._scrub_directory(fd, entry.name, before_s))
                elif _TEMP.match(entry.name):
                    later_s = _written_s(entry.stat(follow_symlinks=False)) - before_s()
                    if later_s > 0:
                        left_s.append(later_s)
                    else:
                        self._remove_if_dead(fd, entry.name)
        return min(left_s)

    def _scrub_directory(self, fd: int, name: str, before_s: Callable[[], float]) -> float:
        with _closing(self._disk.open_directory(name, at=fd)) as child:
            written_s = _written_s(os.fstat(child))
            left_s = self._scrub(child, before_s)
            if any(True for _ in self._disk.entries(child)):
                return left_s
        if (later_s := written_s - before_s()) > 0:
            return later_s
        self._disk.remove_directory(name, at=fd)
        return math.inf

    def _remove_leftover(self, fd: int, entry: os.DirEntry[str], *, even_empty: bool) -> bool:
        if entry.is_dir(follow_symlinks=False):
            return self._remove_hollow(fd, entry.name, even_empty=even_empty)
        return bool(_TEMP.match(entry.name)) and self._remove_if_dead(fd, entry.name)

    def _remove_hollow(self, fd: int, name: str, *, even_empty: bool) -> bool:
        """Remove a directory if nothing below it is an object or a living writer's; tell whether it is gone."""
        with _closing(self._disk.open_directory(name, at=fd)) as child:
            entries = self._objects_first(child)
            if not (entries or even_empty):
                return False
            if not all(self._remove_leftover(child, entry, even_empty=even_empty) for entry in entries):
                return False
        self._disk.remove_directory(name, at=fd)
        return True

    def _remove_if_dead(self, fd: int, temp: str) -> bool:
        with _closing(self._disk.open_to_read(temp, at=fd)) as file:
            is_dead = try_lock(file)
            if is_dead:  # a writer that lives after all, on a network disk without locks, will start anew
                self._disk.unlink(temp, at=fd)
            return is_dead

    def _objects_first(self, fd: int) -> list[os.DirEntry[str]]:
        """Return what an open directory holds; who looks for one object need not look into directories before."""
        return sorted(self._disk.entries(fd), key=lambda entry: entry.is_dir(follow_symlinks=False))


def _is_lost(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a link that cannot be followed."""
    try:
        return entry.is_symlink() and not entry.stat()
    except OSError:
        return True


def _is_file(entry: os.DirEntry[str]) -> bool:
    return not _is_lost(entry) and entry.is_file()


def _leads_back(fd: int, above: Sequence[int]) -> bool:
    """Tell whether an open directory is one of those above it."""
    return any(os.path.samestat(os.fstat(fd), os.fstat(one)) for one in above)


def _link_to_nothing(what: str) -> StorageError:
    return StorageError(f"{what} is a symbolic link to nothing; mount or make its target, or remove the link")


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Mark an open file as in use until it is closed; False if somebody else did, or if nobody can tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
    return ObjectInfo(key=key, size_bytes=status.st_size, modified_s=_written_s(status))


def _written_s(status: os.stat_result) -> float:
    # A copy may bring an old mtime along; its ctime is the disk's own.
    return max(status.st_mtime, status.st_ctime)
