"""Have PyTorch's own writer make everything of a file of `torch.save` but the tensors' bytes.

    state, hollow tensors ──torch.save, which leaves holes──▶ Skeleton: what stands around them, and their sums

So that no dtype or detail of its format is known twice.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from cloudckpt.errors import CloudCkptError

__all__ = ["Hole", "Skeleton", "hollow", "place_of"]

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL_SUM_AT, _CENTRAL_SUM_AT, _DESCRIPTOR_SUM_AT = 14, 16, 4
_HAS_DESCRIPTOR = 0x08


@dataclass(frozen=True, slots=True)
class Hole:
    """Where the bytes of a tensor are to be, and where their CRC-32 stands, which is 0 yet."""

    at: int
    size_bytes: int
    sums_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A file with holes.

    Attributes:
        size_bytes: of it, holes included.
        literals: all that is no hole, and where it begins.
        holes: in order.
        read_back: what was saved, as it is read back: with tensors that know the place of their hole (`place_of`).
    """

    size_bytes: int
    literals: tuple[tuple[int, bytes], ...]
    holes: tuple[Hole, ...]
    read_back: object

    @classmethod
    def of(cls, state: object, name: str) -> Skeleton:
        """Save a state whose tensors are `hollow`; `name` is of the file, which PyTorch notes in it."""
        with tempfile.TemporaryDirectory(prefix="cloudckpt-") as folder:
            path = Path(folder) / name
            with torch.serialization.skip_data():
                torch.save(state, path)
            read_back = torch.load(path, map_location="meta", weights_only=True)
            places = {place_of(tensor) for tensor in _tensors_in(read_back) if tensor.numel()}
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                holes = sorted(_holes(archive, file, places), key=lambda hole: hole.at)
                size_bytes = path.stat().st_size
                return cls(size_bytes, tuple(_literals(file, holes, size_bytes)), tuple(holes), read_back)


def hollow(kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """Return a tensor of each shape and dtype that takes no memory as long as nobody touches its bytes.

    They share an empty file, mapped, and are no tensor's views of another. (PyTorch's fake tensors would do as well;
    the first one of a process takes 0.4 s.)
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    # torch.save refuses what two dtypes have in one place.
    most: dict[torch.dtype, int] = defaultdict(int)
    for (_, dtype), size_bytes in zip(kinds, sizes, strict=True):
        most[dtype] = max(most[dtype], size_bytes)
    maps = {dtype: _untouched(size_bytes) for dtype, size_bytes in most.items() if size_bytes}
    return [
        torch.frombuffer(maps[dtype], dtype=torch.uint8, count=size_bytes).view(dtype).view(tuple(shape))
        if size_bytes
        else torch.empty(tuple(shape), dtype=dtype)
        for (shape, dtype), size_bytes in zip(kinds, sizes, strict=True)
    ]


def _untouched(size_bytes: int) -> mmap.mmap:
    # Of a file, since what no file is behind may count as taken before it is.
    with tempfile.TemporaryFile(prefix="cloudckpt-") as file:
        file.truncate(size_bytes)
        return mmap.mmap(file.fileno(), size_bytes)


def place_of(tensor: torch.Tensor) -> int:
    """Return the first byte, in its file, of the storage of a tensor that was loaded without its bytes."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if type(place) is not int:
        raise CloudCkptError(f"torch {torch.__version__} does not say where in a file a tensor is; upgrade it")
    return place


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(child)


def _holes(archive: zipfile.ZipFile, file: BinaryIO, places: Iterable[int]) -> Iterator[Hole]:
    in_directory = _sums_in_directory(_read(file, archive.start_dir, os.fstat(file.fileno()).st_size))
    for record in archive.infolist():
        head = _read(file, record.header_offset, record.header_offset + _LOCAL.size)
        *_, name_bytes, extra_bytes = _LOCAL.unpack(head)
        at = record.header_offset + _LOCAL.size + int(name_bytes) + int(extra_bytes)
        if at not in places:
            continue
        has_descriptor = record.flag_bits & _HAS_DESCRIPTOR
        sum_at = at + record.file_size + _DESCRIPTOR_SUM_AT if has_descriptor else record.header_offset + _LOCAL_SUM_AT
        yield Hole(at, record.file_size, (sum_at, archive.start_dir + in_directory[record.filename]))


def _sums_in_directory(directory: bytes) -> dict[str, int]:
    """Return name of a record → where in an archive's directory its sum stands."""
    found = {}
    at = 0
    while directory[at : at + 4] == b"PK\x01\x02":
        _, *_, name_bytes, extra_bytes, comment_bytes, _, _, _, _ = _CENTRAL.unpack_from(directory, at)
        found[directory[at + _CENTRAL.size : at + _CENTRAL.size + name_bytes].decode()] = at + _CENTRAL_SUM_AT
        at += _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
    return found


def _literals(file: BinaryIO, holes: Iterable[Hole], size_bytes: int) -> Iterator[tuple[int, bytes]]:
    at = 0
    for hole in holes:
        yield at, _read(file, at, hole.at)
        at = hole.at + hole.size_bytes
    yield at, _read(file, at, size_bytes)


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    return os.pread(file.fileno(), stop - start, start)
