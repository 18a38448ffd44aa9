"""Record what the local store does to a disk, and rebuild what a power cut at any point may leave of it.

What the kernel promises, and no more: written bytes are durable after the file's fsync, and a name after the fsync
of its directory. Of what came since, any part may be there: each change of a directory or none, each write or none.
A rename is one change. Operations also run for real, so that the store sees what it would see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cloudckpt.store.disk import Disk

__all__ = ["Journal", "JournalDisk"]

_ROOT = 0
_ELSEWHERE = -1


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Names of one directory set to nodes, or removed (None)."""

    directory: int
    names: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class _Write:
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class _Sync:
    node: int


@dataclass
class Journal:
    """All operations since the start, in order, by all disks that write to it, below one directory that is durable."""

    base: str
    log: list[_Change | _Write | _Sync] = field(default_factory=list)
    tree: dict[int, dict[str, int]] = field(default_factory=lambda: {_ROOT: {}})
    node_count: int = 0

    def new_node(self) -> int:
        self.node_count += 1
        return self.node_count

    def change(self, directory: int, names: Mapping[str, int | None]) -> None:
        self.log.append(_Change(directory=directory, names=names))
        _apply(self.tree, directory, names)

    def node_at(self, path: str) -> int:
        if os.path.commonpath([self.base, path]) != self.base:
            return _ELSEWHERE
        node = _ROOT
        for name in os.path.relpath(path, self.base).split("/"):
            node = node if name == "." else self.tree[node][name]
        return node

    def files_after(self, length: int, survives: Callable[[], bool]) -> dict[str, bytes]:
        """Return path → bytes after a cut behind the first `length` operations; `survives` decides what is not safe."""
        log = self.log[:length]
        synced = {}
        for index, step in enumerate(log):
            if isinstance(step, _Sync):
                synced[step.node] = index
        tree: dict[int, dict[str, int]] = {_ROOT: {}}
        data: dict[int, bytearray] = {}
        for index, step in enumerate(log):
            if isinstance(step, _Change) and (index < synced.get(step.directory, -1) or survives()):
                _apply(tree, step.directory, step.names)
            if isinstance(step, _Write) and (index < synced.get(step.node, -1) or survives()):
                content = data.setdefault(step.node, bytearray())
                content.extend(bytes(max(0, step.offset + len(step.data) - len(content))))
                content[step.offset : step.offset + len(step.data)] = step.data
        directories = {step.directory for step in self.log if isinstance(step, _Change)}
        return dict(_walk(tree, data, directories, _ROOT, ""))


def _apply(tree: dict[int, dict[str, int]], directory: int, names: Mapping[str, int | None]) -> None:
    entries = tree.setdefault(directory, {})
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _walk(
    tree: Mapping[int, Mapping[str, int]], data: Mapping[int, bytearray], directories: set[int], node: int, base: str
) -> Iterable[tuple[str, bytes]]:
    for name, child in tree.get(node, {}).items():
        if child in directories:
            yield from _walk(tree, data, directories, child, f"{base}{name}/")
        else:
            yield base + name, bytes(data.get(child, b""))


class JournalDisk(Disk):
    """A disk that writes every change into a journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.nodes: dict[int, int] = {}

    def open_path(self, path: str) -> int:
        fd = super().open_path(path)
        self.nodes[fd] = self.journal.node_at(path)
        return fd

    def open_directory(self, name: str, *, at: int, follow: bool = False) -> int:
        fd = super().open_directory(name, at=at, follow=follow)
        self.nodes[fd] = self.journal.tree[self.nodes[at]][name]
        return fd

    def open_to_read(self, name: str, *, at: int, follow: bool = False) -> int:
        fd = super().open_to_read(name, at=at, follow=follow)
        self.nodes[fd] = self.journal.tree[self.nodes[at]][name]
        return fd

    def open_new(self, name: str, *, at: int) -> int:
        fd = super().open_new(name, at=at)
        self.nodes[fd] = self.journal.new_node()
        self.journal.change(self.nodes[at], {name: self.nodes[fd]})
        return fd

    def make_directory(self, name: str, *, at: int | None) -> None:
        super().make_directory(name, at=at)
        parent, _, last = name.rpartition("/")
        node = self.journal.new_node()
        self.journal.change(self.journal.node_at(parent) if at is None else self.nodes[at], {last: node})

    def write(self, fd: int, buffers: Sequence[memoryview], *, offset: int) -> int:
        taken = super().write(fd, buffers, offset=offset)
        self.journal.log.append(_Write(node=self.nodes[fd], offset=offset, data=b"".join(buffers)[:taken]))
        return taken

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.journal.log.append(_Sync(node=self.nodes[fd]))

    def sync_directory(self, fd: int) -> None:
        super().sync_directory(fd)
        self.journal.log.append(_Sync(node=self.nodes[fd]))

    def link(self, name: str, new_name: str, *, at: int) -> None:
        super().link(name, new_name, at=at)
        directory = self.nodes[at]
        self.journal.change(directory, {new_name: self.journal.tree[directory][name]})

    def rename(self, name: str, new_name: str, *, at: int) -> None:
        super().rename(name, new_name, at=at)
        directory = self.nodes[at]
        self.journal.change(directory, {new_name: self.journal.tree[directory][name], name: None})

    def rename_new(self, name: str, new_name: str, *, at: int) -> None:
        super().rename_new(name, new_name, at=at)
        directory = self.nodes[at]
        self.journal.change(directory, {new_name: self.journal.tree[directory][name], name: None})

    def unlink(self, name: str, *, at: int) -> None:
        super().unlink(name, at=at)
        self.journal.change(self.nodes[at], {name: None})

    def remove_directory(self, name: str, *, at: int) -> None:
        super().remove_directory(name, at=at)
        self.journal.change(self.nodes[at], {name: None})
