"""Have PyTorch's own writer make everything of a file of `torch.save` but the tensors' bytes.

    state, tensors without memory ──torch.save, which leaves holes──▶ Skeleton: what stands around them, and their sums

So that no dtype or detail of its format is known twice.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from cloudckpt.errors import CloudCkptError

__all__ = ["Hole", "Skeleton", "place_of"]

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
        """Save a state whose tensors have no memory; `name` is of the file, which PyTorch notes in it."""
        with tempfile.TemporaryDirectory(prefix="cloudckpt-") as folder:
            path = Path(folder) / name
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(state, path)
            read_back = torch.load(path, map_location="meta", weights_only=True)
            places = {place_of(tensor) for tensor in _tensors_in(read_back) if tensor.numel()}
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                holes = sorted(_holes(archive, file, places), key=lambda hole: hole.at)
                size_bytes = path.stat().st_size
                return cls(size_bytes, tuple(_literals(file, holes, size_bytes)), tuple(holes), read_back)


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
