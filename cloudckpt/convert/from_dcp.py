"""Find the tensors and values of a folder that `torch.distributed.checkpoint` saved, by its `.metadata`.

.metadata ──decoded by DCP's own types alone──▶ boxes, each stored by torch.save in a range of a file
a box ──when its bytes are asked for──▶ that range's archive ──▶ its bytes
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field

import torch

from cloudckpt.convert.blob import Blob
from cloudckpt.convert.dcp_metadata import Place, decode_metadata
from cloudckpt.convert.from_torch import Archive, no_bytes
from cloudckpt.convert.origin import Bytes, Origin, of_source, reader_of
from cloudckpt.errors import SourceError
from cloudckpt.format import DTYPE_NAMES, Box, flatten_at, shown
from cloudckpt.store import Store
from cloudckpt.threads import new_lock

__all__ = ["METADATA", "add_dcp"]

METADATA = ".metadata"
_METADATA_LIMIT_BYTES = 256 << 20
# Values are kept until the end; what is large in a state is a tensor.
_VALUES_LIMIT_BYTES = 256 << 20


def add_dcp(origin: Origin, store: Store) -> None:
    """Add all that a folder holds.

    Raises:
        SourceError: it is damaged, lies, or holds more than tensors and plain values.
        UnsupportedValueError: it holds a value that the format cannot.
    """
    head = Blob.of(store, METADATA)
    if head.size_bytes > _METADATA_LIMIT_BYTES:
        raise SourceError(f".metadata has {head.size_bytes} bytes, more than is read; it is damaged", key=METADATA)
    found = decode_metadata(head.read(0, head.size_bytes))
    places = [*(place for _, place in found.chunks), *found.values.values()]
    files = {name: _file(store, name) for name in dict.fromkeys(place.file for place in places)}
    origin.blobs += [head, *files.values()]
    for name, path in found.paths.items():
        origin.paths[name] = [*path]
    for box, place in found.chunks:
        stored = _Stored(box, files[place.file].part(place.offset, place.length))
        origin.boxes.append((box, stored.read))
    if sum(place.length for place in found.values.values()) > _VALUES_LIMIT_BYTES:
        raise SourceError(f"the values in {store.url} have more than {_VALUES_LIMIT_BYTES} bytes", key=METADATA)
    for name, place in found.values.items():
        _add_value(origin, name, _value(name, files[place.file], place))


def _file(store: Store, name: str) -> Blob:
    if "/" in name or "\\" in name or name.startswith("."):
        raise SourceError(f".metadata names the file {shown(name)}, which is none of its folder", key=METADATA)
    return Blob.of(store, name)


@dataclass(slots=True)
class _Stored:
    """One box, and the range that it was stored in; opened when it is first read."""

    box: Box
    blob: Blob
    _bytes: Bytes | None = None
    _lock: threading.Lock = field(default_factory=new_lock)

    def read(self, start: int, memory: memoryview) -> None:
        with self._lock:
            if self._bytes is None:
                self._bytes = self._open()
        self._bytes(start, memory)

    def _open(self) -> Bytes:
        archive = Archive.open(self.blob)
        tensor, box = archive.content, self.box
        is_right = isinstance(tensor, torch.Tensor) and DTYPE_NAMES.get(tensor.dtype) == box.dtype
        if not is_right or tuple(tensor.shape) != box.sizes:  # type: ignore[attr-defined]
            raise SourceError(
                f"{shown(box.name)} at {box.offsets} is no {box.dtype} of {box.sizes} in {self.blob.key!r}, as "
                ".metadata says; the folder is damaged, or was saved to twice",
                key=box.name,
            )
        return archive.reader(box.name, tensor)  # type: ignore[arg-type]


def _value(name: str, file: Blob, place: Place) -> object:
    blob = file.part(place.offset, place.length)
    Archive.open(blob)  # refuses what is more than weights, by name
    try:
        value: object = torch.load(io.BytesIO(blob.read(0, blob.size_bytes)), map_location="cpu", weights_only=True)
    except Exception as exc:  # pickle's errors, and whatever the operations in it run into
        raise SourceError(f"the value {shown(name)} in {file.key!r} is damaged", key=name) from exc
    return value


def _add_value(origin: Origin, name: str, value: object) -> None:
    """Add a value that DCP kept as one, such as a tuple; the tensors in it become tensors again."""
    path = origin.paths.pop(name)
    with of_source(METADATA):
        flat = flatten_at(value, name, path, is_tensor=lambda one: isinstance(one, torch.Tensor))
    for leaf_name, leaf in flat.leaves.items():
        if leaf_name in origin.paths:
            raise SourceError(f"{shown(leaf_name)} stands twice in .metadata", key=leaf_name)
        origin.paths[leaf_name] = flat.paths[leaf_name]
        if not isinstance(leaf, torch.Tensor):
            origin.values[leaf_name] = leaf
        elif leaf.layout is not torch.strided or leaf.dtype not in DTYPE_NAMES:
            raise SourceError(
                f"{shown(leaf_name)} is {leaf.dtype} {leaf.layout}, which has no dense bytes", key=leaf_name
            )
        elif leaf.is_meta:
            raise no_bytes(leaf_name, METADATA)
        else:
            shape = tuple(leaf.shape)
            box = Box(leaf_name, DTYPE_NAMES[leaf.dtype], shape, (0,) * len(shape), shape)
            origin.boxes.append((box, reader_of(leaf)))
