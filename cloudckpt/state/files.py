"""Turn whole files that go with a state into named bytes: a tokenizer, a configuration, a log.

    "tokenizer/": directory ──▶ every file below it     "trainer_state.json": file, or bytes ──▶ that one

Each becomes a uint8 tensor `cloudckpt.file.<path>`, so that it is uploaded, verified and committed with the others.
Small ones are read at once; large ones are mapped, so that they take no memory. Knows the disk; no store.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping

import torch

from cloudckpt.errors import OptionsError, SourceError
from cloudckpt.store import is_key

__all__ = ["FILES", "Files", "files_of"]

FILES = "cloudckpt.file."
"""With what the names of files begin."""

Files = Mapping[str, "str | os.PathLike[str] | bytes"]
"""Path in the checkpoint → file here, or its bytes; one that ends in a slash → directory."""

# What is larger is mapped: it takes pages of the kernel's then, which it can have back.
_READ_BYTES = 64 << 20
_DEPTH_LIMIT = 64
# What the file systems of Linux, macOS and Windows take as a name.
_PART_BYTES = 255


def files_of(files: Files) -> dict[str, torch.Tensor]:
    """Return the bytes of files by the names that they are saved under.

    A file that is mapped (of more than 64 MiB) must not be cut short or changed before the save has read it.

    Raises:
        OptionsError: a path that can stand for none, or twice, or that no disk could hold beside the others.
        SourceError: a file cannot be read, or is none.
    """
    if not isinstance(files, Mapping):
        raise OptionsError(f"files is a {type(files).__name__}; give a dict such as {{'tokenizer/': directory}}")
    found: dict[str, torch.Tensor] = {}
    for path, data in _all(files):
        name = f"{FILES}{path}"
        if not is_key(path):
            raise OptionsError(
                f"{path!r} can be no path of a file in a checkpoint; give one such as 'tokenizer/a.json'"
            )
        if long := next((part for part in path.split("/") if len(os.fsencode(part)) > _PART_BYTES), None):
            raise OptionsError(
                f"{long[:40] + '…'!r} in the path of a file has {len(os.fsencode(long))} bytes, and no disk takes more "
                f"than {_PART_BYTES} in a name, so that it could never be written back; give it a shorter one"
            )
        if name in found:
            raise OptionsError(f"two files are both {path!r} in the checkpoint; give one of them another path")
        found[name] = data
    paths = [name.removeprefix(FILES) for name in found]
    folders = {folder: path for path in paths for folder in _folders_of(path)}
    if both := next((path for path in paths if path in folders), None):
        raise OptionsError(
            f"{both!r} is a file, and the folder of {folders[both]!r}, so that the two could never be written back "
            "together; give one of them another path"
        )
    return found


def _folders_of(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def _all(files: Files) -> Iterator[tuple[str, torch.Tensor]]:
    for path, source in files.items():
        if not isinstance(path, str):
            raise OptionsError(f"files names {path!r}; give paths, such as 'config.json' or 'tokenizer/'")
        if isinstance(source, bytes | bytearray):
            yield path, _tensor_of(bytearray(source))
        elif isinstance(source, str | os.PathLike):
            yield from _below(path, os.fspath(source)) if path.endswith("/") else [(path, _read(os.fspath(source)))]
        else:
            raise OptionsError(f"file {path!r} is a {type(source).__name__}; give the path of one here, or its bytes")


def _below(path: str, directory: str, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what lies in a directory and below it, in order; links count as what they lead to."""
    if depth > _DEPTH_LIMIT:
        raise SourceError(f"{directory} is more than {_DEPTH_LIMIT} directories deep; does a link lead back above it?")
    try:
        with os.scandir(directory) as found:
            entries = sorted((entry.name, entry.path, entry.is_dir()) for entry in found)
    except OSError as exc:
        raise SourceError(f"files names {path!r}, and {directory} cannot be read: {exc.strerror}") from exc
    for name, place, is_directory in entries:
        if is_directory:
            yield from _below(f"{path}{name}/", place, depth + 1)
        else:
            yield f"{path}{name}", _read(place)


def _read(path: str) -> torch.Tensor:
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{path} is no file; give a file, or a directory under a path that ends in a slash")
            if found.st_size > _READ_BYTES:
                return torch.frombuffer(
                    mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_COPY), dtype=torch.uint8
                )
            return _tensor_of(bytearray(file.readall()))
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror}") from exc


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def _tensor_of(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
