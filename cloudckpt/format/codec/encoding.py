"""Turn a Python value into data that JSON can hold, or refuse it with advice.

Dispatch is by exact type, so that a subclass is never silently stored as its base.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from cloudckpt.errors import UnsupportedValueError, text_of
from cloudckpt.format.codec.configs import config_kind
from cloudckpt.format.codec.dtypes import DTYPE_NAMES, extent_bytes, numpy_dtype, tensor_to_bytes
from cloudckpt.format.codec.generators import generator_kinds
from cloudckpt.format.codec.parts import Parts
from cloudckpt.format.codec.registry import KEPT, Registered, registered, registered_code
from cloudckpt.format.codec.standard import Kind, standard_kinds
from cloudckpt.format.codec.walk import (
    MAX_DEPTH,
    MAX_INLINE_BYTES,
    MAX_INT_DIGITS,
    MAX_NODES,
    MAX_PLAIN_INT,
    PLAIN_BITS,
    SPILL_BYTES,
    WITHIN,
    JsonValue,
    KeyAt,
    Walk,
    is_key,
    is_text,
    type_name,
)

__all__ = ["KINDS", "Encoder"]

KINDS: Mapping[type, Kind] = {**standard_kinds, **generator_kinds}
"""Types that are kept as the plain values that they are made of."""

_LONG_TEXT = 1024  # characters, from which on a text is weighed as a payload
_NUMPY_SCALARS = frozenset(np.sctypeDict.values())


class Encoder(Walk):
    """One walk over one value, from Python to JSON."""

    def __init__(self, key: str, parts: Parts | None = None) -> None:
        super().__init__(key)
        self.open_ids: list[int] = []
        self.parts = parts
        self.inline_bytes = 0

    def error(self, reason: str, value: object) -> UnsupportedValueError:
        name = type_name(value)
        return UnsupportedValueError(f"{self.where()} ({name}) {reason}", key=self.where(), type_name=name)

    def refusal(self, value: object, advice: str) -> UnsupportedValueError:
        return self.error(f"cannot be stored in a checkpoint: {advice}", value)

    def value(self, value: object) -> JsonValue:
        self.count(value)
        kind = type(value)
        if kind in _SCALARS:
            return _SCALARS[kind](self, value)
        if kind in _CONTAINERS:
            return self.container(value, _CONTAINERS[kind])
        if kind in KINDS:
            return self.container(value, partial(_encode_kind, kind=KINDS[kind]))
        if kind in _NUMPY_SCALARS:
            return _encode_numpy_scalar(self, value)
        if (known := registered(kind) or registered_code(value)) is not None:
            return self.container(value, partial(_encode_registered, known=known))
        if (config := config_kind(kind)) is not None:
            return self.container(value, partial(_encode_kind, kind=config))
        raise self.refusal(value, _advice(value))

    def child(self, value: object, segment: object) -> Any:  # noqa: ANN401  see `value`
        # Most of what stands in containers is itself in JSON, too.
        if _is_itself(value) and self.node_count < MAX_NODES and len(self.way) < MAX_DEPTH:
            self.node_count += 1
            return value
        return super().child(value, segment)

    def container(self, value: object, encoder: Callable[[Encoder, Any], JsonValue]) -> JsonValue:
        if id(value) in self.open_ids:
            raise self.refusal(value, "it contains itself; break the cycle")
        self.open_ids.append(id(value))
        data = encoder(self, value)
        self.open_ids.pop()
        return data

    def items(self, values: Iterable[object]) -> list[JsonValue]:
        return [self.child(value, index) for index, value in enumerate(values)]

    def keyed(self, key: object, index: int) -> JsonValue:
        """Encode a key of a mapping or an element of a set; `index` is its place."""
        with self.whole():
            data: JsonValue = self.child(key, KeyAt(index))
        if not is_key(key):
            self.way.append(KeyAt(index))
            raise self.refusal(key, "a key or an element of a set must be a str, a number, or a tuple of such")
        return data

    def pairs(self, mapping: dict[object, object]) -> list[JsonValue]:
        self.check_hashes(mapping, mapping)
        return [[self.keyed(key, n), self.child(value, key)] for n, (key, value) in enumerate(mapping.items())]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have what is encoded here stand in the JSON, with all of its payloads: there it is compared and sorted."""
        parts, self.parts = self.parts, None
        yield
        self.parts = parts

    def payload(self, value: object, raw: bytes | bytearray | memoryview) -> JsonValue:
        """Return the bytes as text or, of a value that has too many of them for that, their place in its parts."""
        if self.parts is not None and len(raw) and self.inline_bytes + len(raw) > SPILL_BYTES:
            return [*self.parts.add(raw)]
        self.check_size(value, len(raw))
        self.inline_bytes += len(raw)
        return base64.b64encode(raw).decode("ascii")

    def shape(self, value: object, dims: Sequence[int], strides: Sequence[int], itemsize_bytes: int) -> list[JsonValue]:
        """Return the shape as data, after a look at how much memory it stands for."""
        size_bytes = extent_bytes(dims, itemsize_bytes)
        if size_bytes is None:
            raise self.refusal(value, "no memory can hold its shape; reshape it")
        if self.parts is None:
            self.check_size(value, size_bytes)
        elif size_bytes > MAX_INLINE_BYTES and any(
            not step and dim > 1 for dim, step in zip(dims, strides, strict=True)
        ):
            raise self.refusal(value, "its elements share memory (it is expanded); store what it was expanded from")
        return [*dims]

    def check_size(self, value: object, size_bytes: int) -> None:
        if size_bytes > MAX_INLINE_BYTES:
            raise self.refusal(
                value,
                f"it has {size_bytes} bytes, and in metadata, keys and sets there may be {MAX_INLINE_BYTES}; put it "
                "into the state, as a value or a tensor",
            )


def _is_itself(value: object) -> bool:
    kind = type(value)
    if kind is float:
        return -math.inf < value < math.inf  # type: ignore[operator]  # (not of a NaN)
    if kind is int:
        return -MAX_PLAIN_INT <= value <= MAX_PLAIN_INT  # type: ignore[operator]
    if kind is str:
        return len(value) <= _LONG_TEXT and value.isascii()  # type: ignore[arg-type, attr-defined]
    return kind is bool or value is None


def _encode_kind(walk: Encoder, value: object, kind: Kind) -> JsonValue:
    try:
        plain = kind.encode(value)
    except ValueError as exc:
        raise walk.refusal(value, str(exc)) from exc
    with walk.whole() if kind.is_small else nullcontext():
        return {kind.tag: walk.child(plain, WITHIN)}


def _encode_registered(walk: Encoder, value: object, known: Registered) -> JsonValue:
    try:
        plain = known.encode(value)
    except Exception as exc:  # whatever the program's own function raises
        raise walk.refusal(
            value, f"the `encode` it was registered with raised {text_of(exc, repr)}; mend that"
        ) from exc
    return {"$registered": [known.name, walk.child(plain, WITHIN)]}


def _encode_int(walk: Encoder, value: int) -> JsonValue:
    if abs(value) <= MAX_PLAIN_INT:
        return value
    if value.bit_length() > 4 * MAX_INT_DIGITS:
        raise walk.refusal(value, f"it has more than {MAX_INT_DIGITS} hexadecimal digits; store it as bytes")
    return {"$int": f"{value:#x}"}


def _encode_float(_: Encoder, value: float) -> JsonValue:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value)
    # A NaN has a sign and a payload, which torch.save keeps.
    return {"$float": str(value) if bits in PLAIN_BITS else bits.hex()}


def _encode_str(walk: Encoder, value: str) -> JsonValue:
    if walk.parts is not None and len(value) > _LONG_TEXT:
        raw = value.encode("utf-8", "surrogatepass")
        if walk.inline_bytes + len(raw) > SPILL_BYTES:
            return {"$str": walk.payload(value, raw)}
        walk.inline_bytes += len(raw)
    if is_text(value):
        return value
    return {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode("ascii")}


def _encode_dict(walk: Encoder, value: dict[Any, object]) -> JsonValue:
    if not all(type(name) is str and is_text(name) for name in value):
        return {"$dict": walk.pairs(value)}
    return {f"${name}" if name.startswith("$") else name: walk.child(item, name) for name, item in value.items()}


def _encode_set(walk: Encoder, value: set[object] | frozenset[object]) -> list[JsonValue]:
    """Sorted by their JSON text: a set's own order changes from process to process."""
    walk.check_hashes(value, value)
    return sorted((walk.keyed(element, index) for index, element in enumerate(value)), key=json.dumps)


def _encode_tensor(walk: Encoder, tensor: torch.Tensor) -> JsonValue:
    name = DTYPE_NAMES.get(tensor.dtype)
    if name is None or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        raise walk.refusal(
            tensor, f"only a dense tensor with bytes can, not {tensor.dtype} {tensor.layout} {tensor.device}"
        )
    shape = walk.shape(tensor, tensor.shape, tensor.stride(), tensor.element_size())
    data: JsonValue = {
        "$torch.tensor": {"dtype": name, "shape": shape, "data": walk.payload(tensor, tensor_to_bytes(tensor).data)}
    }
    return {"$torch.requires_grad": data} if tensor.requires_grad else data


def _encode_dtype(walk: Encoder, dtype: torch.dtype) -> JsonValue:
    if dtype not in DTYPE_NAMES:
        raise walk.refusal(dtype, f"no dense tensor is saved as {dtype}; store `str(value)`")
    return {"$torch.dtype": DTYPE_NAMES[dtype]}


def _encode_device(walk: Encoder, device: torch.device) -> JsonValue:
    if not 0 <= (device.index or 0) <= 127:
        raise walk.refusal(device, "its index does not fit torch's 8 bits")
    return {"$torch.device": str(device)}


def _encode_array(walk: Encoder, array: np.ndarray[Any, Any]) -> JsonValue:
    name = _numpy_name(walk, array)
    shape = walk.shape(array, array.shape, array.strides, array.itemsize)
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    order: Literal["C", "F"] = "F" if is_fortran else "C"
    # The array's own memory, where it lies dense.
    flat = np.ascontiguousarray(array.T if is_fortran else array).reshape(-1).view(np.uint8).data
    data = walk.payload(array, flat)
    return {"$numpy.ndarray": {"dtype": name, "shape": shape, "order": order, "data": data}}


def _numpy_name(walk: Encoder, value: np.ndarray[Any, Any] | np.generic) -> str:
    dtype = value.dtype
    if numpy_dtype(dtype.str) != dtype or dtype.metadata:
        kinds = "bool, int, float and complex of up to 64 bits a part, text, bytes and times"
        raise walk.refusal(value, f"of numpy's dtypes only {kinds} can, not {str(dtype)[:80]}; convert it")
    return dtype.str


def _encode_numpy_scalar(walk: Encoder, value: Any) -> JsonValue:  # noqa: ANN401
    if isinstance(value, np.str_):  # not by `.item()`, which cuts NULs off the end
        return {"$numpy.scalar": ["U", walk.value(str.__str__(value))]}
    if isinstance(value, np.bytes_):
        return {"$numpy.scalar": ["S", walk.value(bytes.__bytes__(value))]}
    if isinstance(value, np.void):
        raise walk.refusal(value, "it is a structured or raw numpy scalar; store a tuple or bytes")
    name = _numpy_name(walk, value).replace(">", "<")  # a scalar is in the machine's own byte order
    item = value.view("i8").item() if value.dtype.kind in "mM" else value.item()
    return {"$numpy.scalar": [name, walk.value(item)]}


_SCALARS: dict[type, Callable[[Encoder, Any], JsonValue]] = {
    type(None): lambda _walk, _value: None,
    bool: lambda _walk, value: bool(value),
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    bytes: lambda walk, value: {"$bytes": walk.payload(value, value)},
    bytearray: lambda walk, value: {"$bytearray": walk.payload(value, value)},
    complex: lambda walk, value: {"$complex": walk.items((value.real, value.imag))},
    range: lambda walk, value: {"$range": walk.items((value.start, value.stop, value.step))},
    np.ndarray: _encode_array,
    torch.Tensor: _encode_tensor,
    torch.Size: lambda walk, value: {"$torch.Size": walk.items(value)},
    torch.dtype: _encode_dtype,
    torch.device: _encode_device,
}
_CONTAINERS: dict[type, Callable[[Encoder, Any], JsonValue]] = {
    list: lambda walk, value: walk.items(value),
    tuple: lambda walk, value: {"$tuple": walk.items(value)},
    dict: _encode_dict,
    OrderedDict: lambda walk, value: {"$OrderedDict": walk.pairs(value)},
    Counter: lambda walk, value: {"$Counter": walk.pairs(value)},
    set: lambda walk, value: {"$set": _encode_set(walk, value)},
    frozenset: lambda walk, value: {"$frozenset": _encode_set(walk, value)},
    slice: lambda walk, value: {"$slice": walk.items((value.start, value.stop, value.step))},
}

KEPT.update(_SCALARS, _CONTAINERS, KINDS, _NUMPY_SCALARS)


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


_REGISTER = "call `cloudckpt.register(type(value), name=...)` where it is defined"
_REGISTER_CODE = "call `cloudckpt.register_code(value, name=...)` to have it kept by a name"
_ADVICE: tuple[tuple[Callable[[object], bool], str], ...] = (
    (_is(type), f"leave it out, or {_REGISTER_CODE}; a class is code, not state"),
    (_is(Enum), f"{_REGISTER}, or store its `.name`"),
    (lambda value: isinstance(value, tuple) and hasattr(value, "_asdict"), f"{_REGISTER}, or store `value._asdict()`"),
    (dataclasses.is_dataclass, f"{_REGISTER}, or store `dataclasses.asdict(value)`"),
    (_is(MappingProxyType), "store `dict(value)`"),
    (_is(memoryview), "store `bytes(value)`"),
    (_is(np.dtype), "store `value.str`"),
    (_is(torch.Tensor), "pass it as a tensor entry of the state, or store a plain tensor (`value.detach()`)"),
    (_is(np.ndarray), "store `numpy.array(value)`, a plain array"),
    (_is(np.generic), "store `value.item()`"),
    (lambda value: hasattr(type(value), "state_dict"), "store its `state_dict()`"),
    (callable, f"leave it out, and give it again on restore, or {_REGISTER_CODE}; a function is code, not state"),
)


def _advice(value: object) -> str:
    for applies, advice in _ADVICE:
        if applies(value):
            return advice
    for base in (int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, *KINDS):
        if isinstance(value, base):
            plain = f"convert it with `{base.__name__}(value)`" if base not in KINDS else f"store a {base.__name__}"
            return f"a subclass would come back as another type; {plain}, or {_REGISTER}"
    return (
        f"give its class `state_dict` and `load_state_dict`, {_REGISTER}, convert it to plain values, or leave it out"
    )
