"""Turn foreign data back into the Python value that it stands for, or into a `ManifestError`.

The data may come from anyone. Nothing in it is imported, called or evaluated; every type, length and shape is checked
before memory is taken for it; keys that would make a hash table slow are refused.
"""

from __future__ import annotations

import base64
import math
import re
import reprlib
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from cloudckpt.errors import ManifestError, UnsupportedValueError, text_of
from cloudckpt.format.codec.configs import CONFIG_KINDS
from cloudckpt.format.codec.dtypes import DTYPES, extent_bytes, numpy_dtype, tensor_from_bytes
from cloudckpt.format.codec.encoding import KINDS, Encoder
from cloudckpt.format.codec.registry import registered_as
from cloudckpt.format.codec.standard import Kind, NotHereError
from cloudckpt.format.codec.walk import (
    MAX_INLINE_BYTES,
    MAX_INT_DIGITS,
    MAX_PLAIN_INT,
    PLAIN_BITS,
    WITHIN,
    KeyAt,
    Walk,
    is_key,
    is_text,
    type_name,
)

__all__ = ["Decoder"]

_T = TypeVar("_T")
_NAN = re.compile(r"[7f]ff[0-9a-f]{13}")
_INT = re.compile(r"-?0x[1-9a-f][0-9a-f]*")
_DEVICE = re.compile(r"[a-z]{1,32}(?::([0-9]{1,3}))?")
# What constructors raise for values that cannot be theirs.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_NUMPY_ITEM = {"b": bool, "i": int, "u": int, "f": float, "c": complex, "m": int, "M": int}


class Decoder(Walk):
    """One walk over foreign data, from JSON to Python; large payloads come from `parts`, by number."""

    def __init__(self, key: str, parts: Mapping[int, torch.Tensor] | None = None) -> None:
        super().__init__(key)
        self.parts = parts or {}
        self.left_bytes = {number: part.numel() for number, part in self.parts.items()}

    def error(self, reason: str, value: object = None) -> ManifestError:
        return ManifestError(f"{self.where()} {reason}: the record is damaged or foreign; restore an older step")

    def not_here(self, reason: str, kind: str) -> UnsupportedValueError:
        """Return the error for a value that is right, and that this program cannot have."""
        return UnsupportedValueError(f"{self.where()} {reason}", key=self.where(), type_name=kind)

    def value(self, data: object) -> object:
        self.count(data)
        kind = type(data)
        if kind not in _PLAIN:
            raise self.error(f"is a {type_name(data)}, which JSON has not")
        return _PLAIN[kind](self, data)

    def expect(self, data: object, kind: type[_T]) -> _T:
        """Return `data` if it is of exactly this type (so a bool is no int)."""
        if type(data) is not kind:
            raise self.error(f"has a {type_name(data)} where a {kind.__name__} belongs")
        return data

    def parts_of(self, data: object, count: int | None = None) -> list[Any]:
        listed: list[Any] = self.expect(data, list)
        if count is not None and len(listed) != count:
            raise self.error(f"has {len(listed)} parts where {count} belong")
        return listed

    def items(self, data: object, count: int | None = None) -> list[Any]:
        return [self.child(item, index) for index, item in enumerate(self.parts_of(data, count))]

    def typed_items(self, data: object, kind: type[_T], count: int | None = None) -> list[_T]:
        return [self.expect(item, kind) for item in self.items(data, count)]

    def pairs(self, data: object) -> list[tuple[Any, Any]]:
        pairs = [self.pair(index, *self.parts_of(pair, 2)) for index, pair in enumerate(self.parts_of(data))]
        self.check_distinct([key for key, _ in pairs])
        return pairs

    def pair(self, index: int, key_data: object, data: object) -> tuple[Any, Any]:
        key = self.keyed(key_data, index)
        return key, self.child(data, key)

    def elements(self, data: object) -> list[Any]:
        elements = [self.keyed(item, index) for index, item in enumerate(self.parts_of(data))]
        self.check_distinct(elements)
        return elements

    def keyed(self, data: object, index: int) -> Any:  # noqa: ANN401  any type that may be a key
        key = self.child(data, KeyAt(index))
        if not is_key(key):
            raise self.error(f"has a {type_name(key)} as a key")
        return key

    def check_distinct(self, keys: list[Any]) -> None:
        self.check_hashes(keys, keys)
        if len(set(keys)) != len(keys):
            raise self.error("has a key twice")

    def fields(self, data: object, *names: str) -> list[Any]:
        record: dict[str, Any] = self.expect(data, dict)
        if set(record) != set(names):
            raise self.error(f"has not exactly the fields {', '.join(names)}")
        return [record[name] for name in names]

    def base64(self, text: str) -> bytes:
        """Return the bytes of base64 text that has no second spelling."""
        try:
            raw = base64.b64decode(text, validate=True)
        except ValueError as exc:
            raise self.error("has bytes that are not base64") from exc
        if base64.b64encode(raw).decode("ascii") != text:
            raise self.error("has bytes that are not canonical base64")
        return raw

    def payload(self, data: object) -> torch.Tensor:
        """Return bytes as a tensor, uint8 of one dimension, that is all of its own memory."""
        if type(data) is list:
            return self.part(*self.typed_items(data, int, 3))
        text = self.expect(data, str)
        if len(text) > 4 * ((MAX_INLINE_BYTES + 2) // 3):
            raise self.error(f"has more than {MAX_INLINE_BYTES} bytes")
        raw = self.base64(text)
        # Not by `numpy()`, after which torch takes the memory for somebody else's and does not resize it.
        shared = torch.frombuffer(bytearray(raw or b"?"), dtype=torch.uint8)
        return shared[: len(raw)].clone()

    def part(self, number: int, start: int, stop: int) -> torch.Tensor:
        if number not in self.parts:
            raise self.error(f"has bytes in a part {reprlib.repr(number)} that is not there")
        part = self.parts[number]
        # Bytes that many payloads share would become more memory than there is.
        self.left_bytes[number] -= stop - start
        if not 0 <= start < stop <= part.numel() or self.left_bytes[number] < 0:
            raise self.error("has bytes that its part has not")
        taken = part[start:stop]
        return taken if taken.numel() == taken.untyped_storage().nbytes() else taken.clone()

    def elements_of(
        self, shape_data: object, itemsize_bytes: int, data: object
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return a shape and the bytes of its elements, neither more nor fewer."""
        shape = tuple(self.expect(dim, int) for dim in self.parts_of(shape_data))
        size_bytes = extent_bytes(shape, itemsize_bytes)
        if size_bytes is None:
            raise self.error("has a shape that cannot be")
        raw = self.payload(data)
        if raw.numel() != size_bytes:
            raise self.error(f"has {raw.numel()} bytes where its shape needs {size_bytes}")
        return shape, raw


def _decode_plain_int(walk: Decoder, data: int) -> int:
    if abs(data) > MAX_PLAIN_INT:
        raise walk.error("is an int that JSON readers may round, and is not tagged")
    return data


def _decode_plain_float(walk: Decoder, data: float) -> float:
    if not math.isfinite(data):
        raise walk.error("is not finite, and is not tagged")
    return data


def _decode_plain_str(walk: Decoder, data: str) -> str:
    if not is_text(data):
        raise walk.error("has lone surrogates, and is not tagged")
    return data


def _decode_object(walk: Decoder, data: dict[str, Any]) -> object:
    for name in data:
        if not is_text(walk.expect(name, str)):
            raise walk.error("has a key with lone surrogates")
        if name.startswith("$") and not name.startswith("$$"):
            return _decode_tagged(walk, data)
    names = {name: name.removeprefix("$") for name in data}
    return {names[name]: walk.child(value, names[name]) for name, value in data.items()}


def _decode_tagged(walk: Decoder, data: dict[str, Any]) -> object:
    if len(data) != 1:
        raise walk.error("has a tag beside other keys")
    ((tag, payload),) = data.items()
    if tag not in _TAGS:
        raise walk.error(f"has the tag {reprlib.repr(tag)}, which this release does not know, but a later one may")
    return _TAGS[tag](walk, payload)


def _decode_int(walk: Decoder, data: object) -> int:
    text = walk.expect(data, str)
    if not _INT.fullmatch(text):
        raise walk.error("has a malformed int")
    value = int(text, 16)
    if abs(value) <= MAX_PLAIN_INT or value.bit_length() > 4 * MAX_INT_DIGITS:
        raise walk.error("has an int of a size that is not tagged")
    return value


def _decode_float(walk: Decoder, data: object) -> float:
    text = walk.expect(data, str)
    if text in ("inf", "-inf", "nan"):
        return float(text)
    bits = bytes.fromhex(text) if _NAN.fullmatch(text) else b""
    value: float = struct.unpack(">d", bits)[0] if bits and bits not in PLAIN_BITS else 0.0
    if not math.isnan(value):
        raise walk.error("has a malformed float")
    return value


def _decode_str(walk: Decoder, data: object) -> str:
    raw = _bytes(walk.payload(data)) if type(data) is list else walk.base64(walk.expect(data, str))
    try:
        value = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise walk.error("has a malformed str") from exc
    if is_text(value) and type(data) is str:
        raise walk.error("has a tagged str that needs no tag")
    return value


def _decode_range(walk: Decoder, data: object) -> range:
    start, stop, step = walk.typed_items(data, int, 3)
    if step == 0:
        raise walk.error("has a range of step 0")
    return range(start, stop, step)


def _decode_size(walk: Decoder, data: object) -> torch.Size:
    dims = walk.typed_items(data, int)
    if not all(-(2**63) <= dim < 2**63 for dim in dims):
        raise walk.error("has a dimension beyond 64 bits")
    return torch.Size(dims)


def _decode_dtype(walk: Decoder, data: object) -> torch.dtype:
    name = walk.expect(data, str)
    if name not in DTYPES:
        raise walk.error(f"has the dtype {reprlib.repr(name)}, which this torch has not")
    return DTYPES[name]


def _decode_device(walk: Decoder, data: object) -> torch.device:
    match = _DEVICE.fullmatch(walk.expect(data, str))
    if match is None or int(match[1] or 0) > 127:  # torch keeps the index in 8 bits, and wraps it silently
        raise walk.error("has a malformed device")
    try:
        return torch.device(match[0])
    except RuntimeError as exc:
        raise walk.error(f"has the device {match[0]}, which this torch has not") from exc


def _decode_tensor(walk: Decoder, data: object) -> torch.Tensor:
    name, dims, text = walk.fields(data, "dtype", "shape", "data")
    dtype = _decode_dtype(walk, name)
    shape, raw = walk.elements_of(dims, dtype.itemsize, text)
    return tensor_from_bytes(raw, dtype, shape)


def _decode_requires_grad(walk: Decoder, data: object) -> torch.Tensor:
    tensor = walk.child(data, WITHIN)
    if (
        type(tensor) is not torch.Tensor
        or tensor.requires_grad
        or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        raise walk.error("is no tensor that can have a gradient")
    return tensor.requires_grad_()


def _decode_array(walk: Decoder, data: object) -> np.ndarray[Any, Any]:
    name, dims, order, text = walk.fields(data, "dtype", "shape", "order", "data")
    dtype = numpy_dtype(walk.expect(name, str))
    if dtype is None or order not in ("C", "F"):
        raise walk.error("has a malformed array dtype or order")
    shape, elements = walk.elements_of(dims, dtype.itemsize, text)
    raw = elements.numpy()
    # numpy finds a character beyond Unicode only when it is read, and then as a SystemError.
    if dtype.kind == "U" and np.any(raw.view(f"{name[0]}u4") > sys.maxunicode):
        raise walk.error("has characters beyond Unicode")
    try:
        array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=raw, order=order)
    except ValueError as exc:  # numpy 1 stops at 32 dimensions
        raise walk.error("has a shape that this numpy cannot hold") from exc
    # A large one is not copied; it lies in memory that nothing else has.
    return array if raw.size > MAX_INLINE_BYTES else array.copy(order)


def _bytes(raw: torch.Tensor) -> bytes:
    return raw.numpy().tobytes()


def _decode_kind(walk: Decoder, data: object, kind: Kind) -> object:
    name = kind.tag.removeprefix("$")
    plain = walk.child(data, WITHIN)
    try:
        made = kind.decode(plain)
        is_written_so = not kind.is_small or _agrees(data, Encoder(walk.key).value(kind.encode(made)))
    except NotHereError as exc:
        raise walk.not_here(str(exc), name) from exc
    except _NONSENSE as exc:
        raise walk.error(f"is no {name}") from exc
    if not is_written_so:
        raise walk.error(f"is a {name} in a spelling that is not written")
    return made


def _agrees(data: object, written: object) -> bool:
    """Tell whether data are what is written; a later numpy may write more about its generators."""
    if type(data) is not type(written):
        return False
    if isinstance(data, dict) and isinstance(written, dict):
        return all(name in written and _agrees(item, written[name]) for name, item in data.items())
    if isinstance(data, list) and isinstance(written, list):
        return len(data) == len(written) and all(map(_agrees, data, written))
    return data == written


def _decode_registered(walk: Decoder, data: object) -> object:
    name, plain_data = walk.parts_of(data, 2)
    known = registered_as(walk.expect(name, str))
    if known is None:
        shown = reprlib.repr(name)
        raise walk.not_here(
            f"is of a type (or is code) that was registered as {shown}; call cloudckpt.register(..., name={shown}), or "
            "register_code, before the load",
            name,
        )
    plain = walk.child(plain_data, WITHIN)
    try:
        made = known.decode(plain)
    except Exception as exc:  # whatever the program's own function raises
        raise walk.not_here(
            f"cannot be had: the `decode` registered as {name!r} raised {text_of(exc, repr)}", name
        ) from exc
    if type(made) is not known.kind:
        raise walk.not_here(f"cannot be had: the `decode` registered as {name!r} made a {type_name(made)}", name)
    return made


def _decode_numpy_scalar(walk: Decoder, data: object) -> np.generic:
    name, item_data = walk.parts_of(data, 2)
    item = walk.value(item_data)
    if name == "U":
        return np.str_(walk.expect(item, str))
    if name == "S":
        return np.bytes_(walk.expect(item, bytes))
    dtype = numpy_dtype(walk.expect(name, str))
    if dtype is None or dtype.kind not in _NUMPY_ITEM or name.startswith(">"):
        raise walk.error("has a malformed scalar dtype")
    return _numpy_scalar(walk, dtype.newbyteorder("="), walk.expect(item, _NUMPY_ITEM[dtype.kind]))


def _numpy_scalar(walk: Decoder, dtype: np.dtype[Any], item: Any) -> np.generic:  # noqa: ANN401  see _NUMPY_ITEM
    carrier: np.dtype[Any] = np.dtype(np.int64) if dtype.kind in "mM" else dtype
    if carrier.kind in "iu" and not np.iinfo(carrier).min <= item <= np.iinfo(carrier).max:
        raise walk.error(f"has a number that {dtype} cannot hold")
    with np.errstate(all="ignore"):  # what overflows is found by the comparison
        array = np.array(item, carrier)
    if array.item() != item and not np.isnan(array):
        raise walk.error(f"has a number that {dtype} cannot hold")
    scalar: np.generic = array.reshape(1).view(dtype)[0]
    return scalar


_PLAIN: dict[type, Callable[[Decoder, Any], object]] = {
    type(None): lambda _walk, _data: None,
    bool: lambda _walk, data: data,
    int: _decode_plain_int,
    float: _decode_plain_float,
    str: _decode_plain_str,
    list: lambda walk, data: walk.items(data),
    dict: _decode_object,
}
_TAGS: dict[str, Callable[[Decoder, object], object]] = {
    "$int": _decode_int,
    "$float": _decode_float,
    "$str": _decode_str,
    "$bytes": lambda walk, data: _bytes(walk.payload(data)),
    "$bytearray": lambda walk, data: bytearray(walk.payload(data).numpy()),
    "$complex": lambda walk, data: complex(*walk.typed_items(data, float, 2)),
    "$tuple": lambda walk, data: tuple(walk.items(data)),
    "$dict": lambda walk, data: dict(walk.pairs(data)),
    "$OrderedDict": lambda walk, data: OrderedDict(walk.pairs(data)),
    "$Counter": lambda walk, data: Counter(dict(walk.pairs(data))),
    "$set": lambda walk, data: set(walk.elements(data)),
    "$frozenset": lambda walk, data: frozenset(walk.elements(data)),
    "$range": _decode_range,
    "$slice": lambda walk, data: slice(*walk.items(data, 3)),
    "$numpy.scalar": _decode_numpy_scalar,
    "$numpy.ndarray": _decode_array,
    "$torch.tensor": _decode_tensor,
    "$torch.requires_grad": _decode_requires_grad,
    "$torch.Size": _decode_size,
    "$torch.dtype": _decode_dtype,
    "$torch.device": _decode_device,
    "$registered": _decode_registered,
    **{kind.tag: partial(_decode_kind, kind=kind) for kind in (*KINDS.values(), *CONFIG_KINDS.values())},
}
