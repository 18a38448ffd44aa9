"""Read and write `.metadata`, the pickle in which DCP says what its folder holds, without running what is in it.

    Metadata, places ──encode──▶ a pickle as DCP's own writer makes it
    a pickle ──decode: records of its types, and no other name──▶ checked names, shapes, dtypes, chunks, places, paths

No class or function of this process is ever in the hands of a pickle that is read, which could change it.

The only module that knows pickle beside what ranks send each other. Pure values over bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeGuard, cast

import torch
from torch.distributed.checkpoint import filesystem
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
from cloudckpt.format import DTYPE_NAMES, Box, shown

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


class _Record:
    """What a `.metadata` says of one object: of which type, made of what, with which fields. It is never that object.

    Each decoding has classes of its own, one for each name that is admitted: whatever is done to one of them is gone
    with it.
    """

    __slots__ = ("arguments", "state")
    named = ("", "")
    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object) -> Self:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, {}
        return record

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> object:
        """Return a field, None if there is no such."""
        return self.state.get(name) if type(self.state) is dict else None


_DCP = "torch.distributed.checkpoint"
_METADATA, _TENSOR, _BYTES, _CHUNK, _INDEX, _PROPERTIES = (
    (f"{_DCP}.metadata", kind.__name__)
    for kind in (
        *(Metadata, TensorStorageMetadata, BytesStorageMetadata),
        *(ChunkStorageMetadata, MetadataIndex, TensorProperties),
    )
)
_INFO = (f"{_DCP}.filesystem", _StorageInfo.__name__)
_SIZE, _LAYOUT = ("torch", "Size"), ("torch.serialization", "_get_layout")
_DTYPES = {
    ("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype
}
_ADMITTED = frozenset(
    (
        *(_METADATA, _TENSOR, _BYTES, _CHUNK, _INDEX, _PROPERTIES, _INFO, _SIZE, _LAYOUT, *_DTYPES),
        *((f"{_DCP}.metadata", name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
        ("collections", "OrderedDict"),
        # Of the folder itself, as DCP was told it; in Python 3.13 the module is another one.
        *(
            (module, f"{kind}Path")
            for module in ("pathlib", "pathlib._local")
            for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
        ),
    )
)
# No other operations are in what DCP writes. Of those that are left out some take memory by a number alone.
_OPERATIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD),
    *(pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)


# Of C's machine, the public one, no operation can be taken away.
_Machine: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore] # noqa: SLF001


class _Unpickler(_Machine):  # type: ignore[misc]
    """Makes records of what DCP's own types would be, and knows no other name of anything."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {op[0]: _Machine.dispatch[op[0]] for op in _OPERATIONS}

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> object:
        named = module, name
        if named not in _ADMITTED:
            raise SourceError(
                f".metadata names {module[:_SHOWN]}.{name[:_SHOWN]}, which is none of DCP's own types, so that reading "
                "it could run code, and nothing was read; load it with torch.distributed.checkpoint where you trust it "
                "and save the state with cloudckpt",
                key=".metadata",
            )
        if named not in self._kinds:
            self._kinds[named] = type(name, (_Record,), {"__slots__": (), "named": named})
        return self._kinds[named]

    def persistent_load(self, pid: object) -> object:
        raise SourceError(".metadata refers to objects outside of it; it is damaged or foreign", key=".metadata")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[object]) -> None:
        # What has a hash is not computed: that of a tuple of tuples may take for ever.
        if not all(type(key) is str or isinstance(key, _Record) for key in items[::2]):
            raise _damaged("it has a table by other keys than names")
        if isinstance(self.stack[-1], _Record):  # an OrderedDict, of which DCP itself makes none
            return
        if type(self.stack[-1]) is not dict:
            raise _damaged("it fills a table that is none")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _is(value: object, named: tuple[str, str]) -> TypeGuard[_Record]:
    return isinstance(value, _Record) and value.named == named


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
    if not _is(found, _METADATA):
        raise _damaged(f"it holds a {type(found).__name__}")
    entries, stored = _table(found.get("state_dict_metadata")), _table(found.get("storage_data"))
    places = {}
    for index, info in stored.items():
        if not _is(index, _INDEX) or not _is(info, _INFO):
            raise _damaged("its table of places has other entries")
        offset = index.get("offset")
        places[_text(index.get("fqn")), None if offset is None else _sizes(offset)] = _place(info)
    chunks: list[tuple[Box, Place]] = []
    values: dict[str, Place] = {}
    for key, entry in entries.items():
        fqn = _text(key)
        if _is(entry, _BYTES):
            _expect((fqn, None) in places, f"it does not say where {shown(fqn)} is")
            values[fqn] = places[fqn, None]
        elif _is(entry, _TENSOR):
            chunks += _chunks(fqn, entry, places)
        else:
            raise _damaged(f"{shown(fqn)} is neither a tensor nor a value")
    return Described(chunks, values, _paths(found.get("planner_data"), [_text(name) for name in entries]))


def _table(value: object) -> dict[object, object]:
    if type(value) is not dict:
        raise _damaged("it has no tables of names and places")
    return value


def _chunks(
    fqn: str, entry: _Record, places: Mapping[tuple[str, tuple[int, ...] | None], Place]
) -> list[tuple[Box, Place]]:
    shape, dtype, chunks = _sizes(entry.get("size")), _dtype(fqn, entry.get("properties")), entry.get("chunks")
    if type(chunks) is not list or not chunks:
        raise _damaged(f"{shown(fqn)} has no chunks")
    found = []
    for chunk in chunks:
        if not _is(chunk, _CHUNK):
            raise _damaged(f"{shown(fqn)} has chunks that are none")
        offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
        _expect(len(offsets) == len(sizes) == len(shape), f"a chunk of {shown(fqn)} has other dimensions")
        fits = all(at + size <= extent for at, size, extent in zip(offsets, sizes, shape, strict=True))
        _expect(fits, f"a chunk of {shown(fqn)} leaves the tensor")
        # A tensor that is stored whole may be found without an offset, too.
        place = places.get((fqn, offsets)) or places.get((fqn, None))
        if place is None:
            raise _damaged(f"it does not say where {shown(fqn)} at {offsets} is")
        box = Box(fqn, dtype, shape, offsets, sizes)
        _expect(
            box.nbytes <= place.length,
            f"{shown(fqn)} at {offsets} has {box.nbytes} bytes in {place.length} stored ones",
        )
        found.append((box, place))
    return found


def _dtype(fqn: str, properties: object) -> str:
    """Return the name of the dtype in what DCP notes of a tensor: dtype, layout, and what it does not use itself."""
    if not _is(properties, _PROPERTIES) or type(properties.state) is not tuple or len(properties.state) < 2:
        raise _damaged(f"{shown(fqn)} has no properties")
    kind, layout = properties.state[:2]
    dtype = _DTYPES.get(kind.named) if isinstance(kind, type) and issubclass(kind, _Record) else None
    known = None if dtype is None else DTYPE_NAMES.get(dtype)
    if known is None or not _is(layout, _LAYOUT) or layout.arguments != ("torch.strided",):
        what = f"{dtype or 'of no dtype'}{'' if known is None else ', and not strided'}"
        raise SourceError(f"{shown(fqn)} is {what}, which cloudckpt does not hold", key=fqn)
    return known


def _place(info: _Record) -> Place:
    file, offset, length = _text(info.get("relative_path")), info.get("offset"), info.get("length")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise _damaged("it has a place of no bytes")
    if info.get("transform_descriptors"):
        raise SourceError(
            f"{shown(file)} was stored through extensions (transform_descriptors), which are not read; save the "
            "folder again without them",
            key=file,
        )
    return Place(file, offset, length)


def _text(value: object) -> str:
    _expect(type(value) is str, "a name in it is no text")
    return str(value)


def _sizes(value: object) -> tuple[int, ...]:
    if _is(value, _SIZE) and len(value.arguments) == 1:
        value = value.arguments[0]
    _expect(isinstance(value, tuple | list), "it has sizes that are none")
    numbers = tuple(cast("Sequence[int]", value))
    _expect(all(type(number) is int and 0 <= number < 2**53 for number in numbers), "it has sizes that are none")
    _expect(math.prod(max(1, number) for number in numbers) < 2**60, "it has sizes beyond any memory")
    return numbers


def _paths(planner_data: object, names: list[str]) -> dict[str, list[str | int]]:
    """Return the paths that DCP's planner noted; without notes a name is a key of the state itself."""
    if planner_data is None:
        return {name: [name] for name in names}
    if type(planner_data) is not dict:
        raise _damaged("its paths are none")
    paths: dict[str, list[str | int]] = {}
    for name in names:
        path = planner_data.get(name, (name,))
        _expect(type(path) in (tuple, list) and path, f"{shown(name)} has no path")
        _expect(all(type(step) in (str, int) for step in path), f"{shown(name)} has a path of other steps")
        paths[name] = [step if index or isinstance(step, str) else str(step) for index, step in enumerate(path)]
    return paths
