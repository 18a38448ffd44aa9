"""Find the tensors of safetensors files, of which nothing is believed that does not fit the file.

The header is read by ours and not by the safetensors package's code: that opens files on a disk alone. What it refuses
is refused here, too, which tests compare.
"""

from __future__ import annotations

import json
import math
import struct

from cloudckpt.convert.blob import Blob, damaged
from cloudckpt.convert.origin import Bytes, Origin
from cloudckpt.convert.to_safetensors import NAMED
from cloudckpt.errors import SourceError
from cloudckpt.format import DTYPES, Box, shown

__all__ = ["add_safetensors", "is_safetensors", "names_in_index"]

_HEADER_LIMIT_BYTES = 100_000_000
_INDEX_LIMIT_BYTES = 256 << 20
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_SHOWN = 200
_DTYPES = {named: dtype for dtype, named in NAMED.items()} | (
    {"F8_E8M0": "float8_e8m0fnu"} if "float8_e8m0fnu" in DTYPES else {}
)


def is_safetensors(head: bytes) -> bool:
    """Tell whether an object that begins so is meant to be a safetensors file."""
    return len(head) > _LENGTH.size and head[_LENGTH.size : _LENGTH.size + 1] == b"{"


def add_safetensors(origin: Origin, blob: Blob) -> None:
    """Add the tensors of one file.

    Raises:
        SourceError: its header is damaged, lies, or names what is there already.
    """
    (header_bytes,) = _LENGTH.unpack(blob.read(0, _LENGTH.size))
    if header_bytes > _HEADER_LIMIT_BYTES or _LENGTH.size + header_bytes > blob.size_bytes:
        raise damaged(blob, f"its header would have {header_bytes} bytes of {blob.size_bytes}")
    first = _LENGTH.size + header_bytes
    header = _read_json(blob, blob.read(_LENGTH.size, header_bytes))
    header.pop(_METADATA, None)
    data = blob.part(first, blob.size_bytes - first)
    origin.blobs.append(blob)
    stop = 0
    # Without holes and without an overlap, as its own reader wants it: else one byte could be many tensors'.
    for name, (box, start) in sorted(
        ((name, _entry(blob, name, entry)) for name, entry in header.items()),
        key=lambda item: (item[1][1], item[1][0].nbytes),
    ):
        if start != stop:
            raise damaged(blob, f"the bytes of {shown(name)} begin at {start} where the last ones end at {stop}")
        stop = start + box.nbytes
        if name in origin.paths:
            raise SourceError(f"{shown(name)} stands in several files, and nothing says which one is meant", key=name)
        origin.paths[name] = [name]
        origin.boxes.append((box, _reader(data, start)))
    if stop != data.size_bytes:
        raise damaged(blob, f"its tensors have {stop} bytes, and {data.size_bytes} follow its header")


def _entry(blob: Blob, name: str, entry: object) -> tuple[Box, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(blob, f"the entry of {shown(name)} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise damaged(blob, f"the entry of {shown(name)} is malformed")
    if dtype not in _DTYPES:
        raise SourceError(
            f"{shown(name)} in {blob.key!r} has dtype {dtype[:_SHOWN]!r}, which cloudckpt does not read; convert "
            f"it to one of {', '.join(_DTYPES)}",
            key=name,
        )
    sizes = tuple(shape)
    box = Box(name, _DTYPES[dtype], sizes, (0,) * len(sizes), sizes)
    if len(sizes) > 64 or math.prod(sizes) >= 2**60 or offsets[1] - offsets[0] != box.nbytes:
        raise damaged(blob, f"{shown(name)} is {dtype} of {shape} in bytes {offsets[0]} to {offsets[1]}"[: 2 * _SHOWN])
    return box, offsets[0]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**53 for number in value)


def _reader(data: Blob, start: int) -> Bytes:
    return lambda at, memory: data.read_into(start + at, memory)


def names_in_index(blob: Blob) -> dict[str, str]:
    """Return name → file in the same folder, of the index of a model in several files.

    Raises:
        SourceError: it is damaged, or names files elsewhere.
    """
    if blob.size_bytes > _INDEX_LIMIT_BYTES:
        raise damaged(blob, f"it has {blob.size_bytes} bytes")
    names = _read_json(blob, blob.read(0, blob.size_bytes)).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise damaged(blob, "it has no weight_map")
    for file in names.values():
        if not isinstance(file, str) or not file or file.startswith(".") or "/" in file or "\\" in file:
            raise damaged(blob, f"it names the file {shown(str(file))}, which is none of its folder")
    return names


def _read_json(blob: Blob, data: bytes) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in it")
        return found

    try:
        found = json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as exc:
        raise damaged(blob, f"it is no JSON ({str(exc)[:_SHOWN]})") from exc
    if not isinstance(found, dict):
        raise damaged(blob, "it is no JSON object")
    return found
