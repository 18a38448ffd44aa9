"""Read and write `.metadata`, the pickle in which DCP says what its folder holds, without running what is in it.

    Metadata, places ──encode──▶ a pickle as DCP's own writer makes it
    a pickle ──decode: its types, and no other name──▶ checked names, shapes, dtypes, chunks, places, paths

The only module that knows pickle beside what ranks send each other. Pure values over bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePosixPath, PureWindowsPath
from typing import cast

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.errors import SourceError
from cloudckpt.format import DTYPE_NAMES, Box

__all__ = ["Described", "Place", "decode_metadata", "encode_metadata"]

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stored part stands: a file of the folder, and its bytes there."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Described:
    """What a folder holds, by its `.metadata`.

    Attributes:
        chunks: boxes of tensors, and where each is stored.
        values: name → where the value is stored.
        paths: name → its path in the nested state, keys and places.
    """

    chunks: list[tuple[Box, Place]]
    values: dict[str, Place]
    paths: dict[str, list[str | int]]


def encode_metadata(described: Metadata, places: Mapping[MetadataIndex, Place]) -> bytes:
    """Return the bytes of a `.metadata` as DCP's `FileSystemWriter` writes it."""
    stored = {
        index: _StorageInfo(relative_path=place.file, offset=place.offset, length=place.length)
        for index, place in places.items()
    }
    version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    full = replace(described, storage_data=stored, storage_meta=StorageMeta(), version=version)
    data = io.BytesIO()
    pickle.dump(full, data)
    return data.getvalue()


# -- reading ------------------------------------------------------------------------------------------------


def _layout(name: object) -> torch.layout:
    """Return a layout by the name that torch pickles it by."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {str(name)[:_SHOWN]!r}")
    return torch.strided


_DCP = "torch.distributed.checkpoint"
_KNOWN: dict[tuple[str, str], object] = {
    **{
        (f"{_DCP}.metadata", kind.__name__): kind
        for kind in (
            *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
            *(TensorProperties, TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING),  # noqa: SLF001 (part of its files)
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): OrderedDict,
    # Of the folder itself, as DCP was told it; in Python 3.13 the module is another one.
    **{
        (module, f"{pure}PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local") for pure in ("", "Pure")
    },
    **{
        (module, f"{pure}WindowsPath"): PureWindowsPath
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if type(dtype) is torch.dtype
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows DCP's own types, and no other name of anything."""

    def find_class(self, module: str, name: str) -> object:
        found = _KNOWN.get((module, name))
        if found is None:
            raise SourceError(
                f".metadata names {module[:_SHOWN]}.{name[:_SHOWN]}, which is none of DCP's own types, so that reading "
                "it could run code, and nothing was read; load it with torch.distributed.checkpoint where you trust it "
                "and save the state with cloudckpt",
                key=".metadata",
            )
        return found

    def persistent_load(self, pid: object) -> object:
        raise SourceError(".metadata refers to objects outside of it; it is damaged or foreign", key=".metadata")


def decode_metadata(data: bytes) -> Described:
    """Read a `.metadata`; nothing in it is run.

    Raises:
        SourceError: it names other types than DCP's, is damaged, or contradicts itself.
    """
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except SourceError:
        raise
    except Exception as exc:  # pickle's machine raises whatever the operations in it run into
        raise _damaged(f"it cannot be read ({type(exc).__name__}: {str(exc)[:_SHOWN]})") from exc
    try:
        return _described(found)
    except (AttributeError, TypeError, ValueError, OverflowError) as exc:
        if isinstance(exc, SourceError):
            raise
        raise _damaged(f"what it says is malformed ({type(exc).__name__}: {str(exc)[:_SHOWN]})") from exc


def _damaged(why: str) -> SourceError:
    return SourceError(f".metadata is damaged or foreign: {why}; save the folder again", key=".metadata")


def _expect(is_right: object, why: str) -> None:
    if not is_right:
        raise _damaged(why)


def _described(found: object) -> Described:
    _expect(type(found) is Metadata, f"it holds a {type(found).__name__}")
    assert_dicts = (found.state_dict_metadata, found.storage_data)  # type: ignore[attr-defined]
    _expect(all(type(one) is dict for one in assert_dicts), "it has no tables of names and places")
    entries, stored = assert_dicts
    places = {}
    for index, info in stored.items():
        _expect(type(index) is MetadataIndex and type(info) is _StorageInfo, "its table of places has other entries")
        places[_text(index.fqn), None if index.offset is None else _sizes(index.offset)] = _place(info)
    chunks: list[tuple[Box, Place]] = []
    values: dict[str, Place] = {}
    for fqn, entry in entries.items():
        if type(entry) is BytesStorageMetadata:
            _expect((_text(fqn), None) in places, f"it does not say where {fqn!r} is")
            values[fqn] = places[fqn, None]
        else:
            _expect(type(entry) is TensorStorageMetadata, f"{str(fqn)[:_SHOWN]!r} is neither a tensor nor a value")
            chunks += _chunks(_text(fqn), entry, places)
    return Described(chunks, values, _paths(getattr(found, "planner_data", None), [*entries]))


def _chunks(
    fqn: str, entry: TensorStorageMetadata, places: Mapping[tuple[str, tuple[int, ...] | None], Place]
) -> list[tuple[Box, Place]]:
    properties, shape = entry.properties, _sizes(entry.size)
    _expect(type(properties) is TensorProperties, f"{fqn!r} has no properties")
    dtype = DTYPE_NAMES.get(properties.dtype)
    if dtype is None or properties.layout is not torch.strided:
        raise SourceError(f"{fqn!r} is {properties.dtype} {properties.layout}, which cloudckpt does not hold", key=fqn)
    found = []
    _expect(type(entry.chunks) is list and entry.chunks, f"{fqn!r} has no chunks")
    for chunk in entry.chunks:
        _expect(type(chunk) is ChunkStorageMetadata, f"{fqn!r} has chunks that are none")
        offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        _expect(len(offsets) == len(sizes) == len(shape), f"a chunk of {fqn!r} has other dimensions")
        fits = all(at + size <= extent for at, size, extent in zip(offsets, sizes, shape, strict=True))
        _expect(fits, f"a chunk of {fqn!r} leaves the tensor")
        # A tensor that is stored whole may be found without an offset, too.
        place = places.get((fqn, offsets)) or places.get((fqn, None))
        if place is None:
            raise _damaged(f"it does not say where {fqn!r} at {offsets} is")
        box = Box(fqn, dtype, shape, offsets, sizes)
        _expect(
            box.nbytes <= place.length, f"{fqn!r} at {offsets} has {box.nbytes} bytes in {place.length} stored ones"
        )
        found.append((box, place))
    return found


def _place(info: _StorageInfo) -> Place:
    offset, length = info.offset, info.length
    _expect(type(offset) is int and type(length) is int and offset >= 0 and length >= 0, "it has a place of no bytes")
    if getattr(info, "transform_descriptors", None):
        raise SourceError(
            f"{_text(info.relative_path)!r} was stored through extensions ({info.transform_descriptors!r}"[:_SHOWN]
            + "), which are not read; save the folder again without them",
            key=_text(info.relative_path),
        )
    return Place(_text(info.relative_path), offset, length)


def _text(value: object) -> str:
    _expect(type(value) is str, "a name in it is no text")
    return str(value)


def _sizes(value: object) -> tuple[int, ...]:
    _expect(isinstance(value, tuple | list), "it has sizes that are none")
    numbers = tuple(cast("Sequence[int]", value))
    _expect(all(type(number) is int and 0 <= number < 2**53 for number in numbers), "it has sizes that are none")
    _expect(math.prod(max(1, number) for number in numbers) < 2**60, "it has sizes beyond any memory")
    return numbers


def _paths(planner_data: object, names: list[str]) -> dict[str, list[str | int]]:
    """Return the paths that DCP's planner noted; without notes a name is a key of the state itself."""
    if planner_data is None:
        return {name: [name] for name in names}
    _expect(type(planner_data) is dict, "its paths are none")
    paths: dict[str, list[str | int]] = {}
    for name in names:
        path = planner_data.get(name, (name,))  # type: ignore[attr-defined]
        _expect(type(path) in (tuple, list) and path, f"{name!r} has no path")
        _expect(all(type(step) in (str, int) for step in chain(path)), f"{name!r} has a path of other steps")
        paths[name] = [step if index or isinstance(step, str) else str(step) for index, step in enumerate(path)]
    return paths
