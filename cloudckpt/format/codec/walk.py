"""Know where a walk over a value stands: the way down to it, the limits, and what may be a key.

Shared by encoding and decoding, so that both count alike: what one of them accepts, the other does too.
"""

from __future__ import annotations

import math
import re
import reprlib
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import numpy as np
import torch

from cloudckpt.errors import CloudCkptError
from cloudckpt.format.codec.registry import registered
from cloudckpt.options import KIB, MIB

__all__ = [
    "MAX_DEPTH",
    "MAX_INLINE_BYTES",
    "MAX_INT_DIGITS",
    "MAX_NODES",
    "MAX_PLAIN_INT",
    "PLAIN_BITS",
    "SPILL_BYTES",
    "WITHIN",
    "JsonValue",
    "KeyAt",
    "Walk",
    "is_key",
    "is_text",
    "type_name",
]

if TYPE_CHECKING:
    JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"
else:
    JsonValue = Any  # msgspec reads annotations at run time, and has no recursive aliases

MAX_DEPTH = 64
"""Containers inside containers, at most."""
MAX_NODES = 1_000_000
"""Values inside one value, at most."""
MAX_INLINE_BYTES = MIB
"""Bytes of one payload (`bytes`, an array, a tensor) in JSON, at most; larger ones go into shards, as parts."""
SPILL_BYTES = 64 * KIB
"""Bytes of all payloads of one value in its JSON, at most, where it may have parts."""
MAX_INT_DIGITS = 4096
"""Hexadecimal digits of one int, at most."""
PLAIN_BITS = tuple(struct.pack(">d", value) for value in (math.inf, -math.inf, math.nan))
"""Floats that are no numbers and have names of their own; other NaNs are told by their bits."""
MAX_PLAIN_INT = 2**53 - 1
"""JSON readers that hold numbers as doubles are exact up to here."""

_MAX_HASH_TWINS = 256  # keys chosen to share one hash make a dict quadratic; honest ones share it by a few
_KEY_TYPES = (
    *(type(None), str, int, float, complex, bytes, range, np.generic, torch.dtype, torch.device),
    *(date, time, timedelta, Fraction, UUID, PurePath),
)
_IDENTIFIER = re.compile(r"[^\W\d]\w*")


WITHIN = object()
"""In a way: not a step that a person would take, but from a value to the plain one that stands for it."""


class KeyAt(int):
    """In a way: not the nth value of a container, but its nth key."""


class Walk(ABC):
    """The way down from a named value to where the walk stands, and how many values it has met."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.way: list[object] = []
        self.node_count = 0

    @abstractmethod
    def error(self, reason: str, value: object) -> CloudCkptError:
        """Return what to raise because of `value`, which the way points at."""

    @abstractmethod
    def value(self, value: Any) -> Any:  # noqa: ANN401  one side is any object, the other any JSON
        """Walk over a value and return what it becomes."""

    def where(self) -> str:
        return (self.key + "".join(map(_segment, self.way))).removeprefix(".") or "the value"

    def count(self, value: object) -> None:
        self.node_count += 1
        if self.node_count > MAX_NODES:
            raise self.error(f"comes after {MAX_NODES} other values; store long sequences as one tensor", value)

    def child(self, value: object, segment: object) -> Any:  # noqa: ANN401  see `value`
        """Walk one step down; after an error the way still points at the culprit."""
        if len(self.way) == MAX_DEPTH:
            raise self.error(f"holds values nested deeper than {MAX_DEPTH} levels; flatten it", value)
        self.way.append(segment)
        result = self.value(value)
        self.way.pop()
        return result

    def check_hashes(self, keys: Iterable[object], value: object) -> None:
        twins = Counter(map(hash, keys))
        if twins and max(twins.values()) > _MAX_HASH_TWINS:
            raise self.error(f"has over {_MAX_HASH_TWINS} keys of one hash; store a list of pairs", value)


def is_key(value: object) -> bool:
    """Tell whether `value` hashes and compares by value, so that it finds its entry again after a round trip.

    Not so a tensor (by identity), nor numpy's times (comparing two units may overflow).
    """
    if isinstance(value, tuple | frozenset):
        return all(map(is_key, value))
    if isinstance(value, np.generic):
        return value.dtype.kind in "biufcSU"
    if isinstance(value, Decimal):
        return not value.is_snan()  # which has no hash
    if registered(type(value)) is not None:
        return type(value).__hash__ not in (None, object.__hash__)
    return isinstance(value, _KEY_TYPES)


def is_text(value: str) -> bool:
    """Tell whether JSON text can hold `value`: lone surrogates are no Unicode (undecodable file names have them)."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def type_name(value: object) -> str:
    """Return the type's name as a message shows it."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _segment(step: object) -> str:
    if step is WITHIN:
        return ""
    if isinstance(step, KeyAt):
        return f"{{key {int(step)}}}"
    if isinstance(step, str) and _IDENTIFIER.fullmatch(step):
        return f".{step}"
    return f"[{reprlib.repr(step)}]"
