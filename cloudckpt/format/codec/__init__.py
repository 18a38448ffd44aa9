"""Turn a Python value into JSON-able data and back, exactly, and never by pickle.

What JSON can say stays as it is, so that a manifest stays readable; everything else becomes an object with one
key, a tag: `{"$tuple": [1, 2]}`. A user's own key that starts with `$` gets a second one. A value is kept exactly or
refused: if its type would come back as another one, saving fails, and says where it stands and what to do.
Decoding trusts nothing. The same value gives the same data; a dict keeps its order, so whoever writes the data as
text must not sort keys.

Not kept: identity (a list held twice comes back as two), a tensor's device, strides and `requires_grad` (it comes back
contiguous, on the CPU), the payload bits of a NaN in a numpy scalar, a UUID's `is_safe`, and attributes that a program
set on an object of the standard library.
Pure values: no I/O, no clock, no threads of its own; both functions may be called from any thread.

    encoding  decoding     the two directions
    standard  generators   types that are kept as the plain values that they are made of
    configs                configurations of OmegaConf, where a program has it
    registry               types and functions of the program's own, by names that it chose
    parts                  payloads that are too large to stand among values
    dtypes  walk           names and bytes of elements; place, limits, keys
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from cloudckpt.format.codec.decoding import Decoder
from cloudckpt.format.codec.dtypes import DTYPE_NAMES, DTYPES
from cloudckpt.format.codec.encoding import Encoder
from cloudckpt.format.codec.parts import Parts, is_part_name, part_name, part_names
from cloudckpt.format.codec.registry import register, register_code
from cloudckpt.format.codec.walk import MAX_NODES, JsonValue

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "JsonValue",
    "Parts",
    "decode",
    "decode_json",
    "encode",
    "encode_json",
    "is_part_name",
    "part_name",
    "part_names",
    "register",
    "register_code",
]


def encode(value: object, *, key: str, parts: Parts | None = None) -> JsonValue:
    """Return `value` as data that JSON can hold and that `decode` turns back into an equal value of the same type.

    `key` names the value in errors. Payloads of more than 64 KiB together are added to `parts`, if it is there, and
    may share memory with `value`; all else shares none.

    Raises:
        UnsupportedValueError: `value` holds something that would not come back as it is; `.key` is the whole way
            there (`scheduler.lr_lambdas[0]`).
    """
    return Encoder(key, parts).value(value)


def decode(data: JsonValue, *, key: str, parts: Mapping[int, torch.Tensor] | None = None) -> object:
    """Return the value that `encode` was given; its tensors and arrays are writable.

    They are new, except that one which is all of a part takes that part's memory over.

    Args:
        data: what `encode` returned.
        key: names the value in errors.
        parts: what was added to its `Parts`, by number: uint8 of one dimension, contiguous, on the CPU.

    Raises:
        ManifestError: `data` is nothing that `encode` makes; the message names the way there from `key`.
        UnsupportedValueError: it is right, and this program or machine lacks what it needs: a type that is not
            registered, a time zone, a device.
    """
    return Decoder(key, parts).value(data)


def encode_json(data: JsonValue, *, key: str) -> JsonValue:
    """Return what `encode` makes of data that is JSON already: where nothing in it begins with `$`, the data itself."""
    return data if _stands_for_itself(data) else encode(data, key=key)


def decode_json(data: JsonValue, *, key: str) -> object:
    """Return what `decode` makes of data; where that is the data itself, its containers are the same ones."""
    return data if _stands_for_itself(data) else decode(data, key=key)


def _stands_for_itself(data: JsonValue) -> bool:
    # Notes on many thousands of modules: a walk in Python takes a hundred times as long.
    text = msgspec.json.encode(data)
    return b'"$' not in text and text.count(b",") + text.count(b"{") + text.count(b"[") < MAX_NODES
