"""Values of many types in containers, drawn as trees of plain data and made from them."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import random
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Generator, nn

_TENSOR_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "float8": torch.float8_e4m3fn,
}
_SHAPES = [(), (0,), (1,), (3,), (2, 3), (1, 2, 0)]
_LAYOUTS = ["dense", "turned", "sliced", "conjugate", "parameter"]


def _tensor(described: tuple[str, tuple[int, ...], str], generator: Generator) -> torch.Tensor:
    dtype, shape, layout = described
    kind = _TENSOR_DTYPES[dtype]
    if layout == "sliced":
        shape = tuple(size * 2 for size in shape)
    made = torch.rand(shape, generator=generator) * 100 - (0 if kind in (torch.bool, torch.uint8) else 50)
    tensor = (made > 50) if kind is torch.bool else made.to(kind)
    if kind is torch.complex64:
        tensor = torch.complex(made, made + 1)
    if layout == "turned" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return tensor[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "conjugate":
        return tensor.conj()
    if layout == "parameter" and kind.is_floating_point and dtype != "float8":
        return nn.Parameter(tensor)
    return tensor


_tensors = st.tuples(st.just("tensor"), st.tuples(*map(st.sampled_from, (list(_TENSOR_DTYPES), _SHAPES, _LAYOUTS))))  # type: ignore[arg-type]
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(allow_nan=False, max_magnitude=1e9),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3]), 2**70, -(2**63), "a.b", ""]),
)
# What a program may hold beside numbers and text. Each is restored exactly, or refused when it is saved.
Pair = collections.namedtuple("Pair", ["one", "two"])  # noqa: PYI024 (as users write them)


class Color(enum.Enum):
    """What a user's own configuration is made of."""

    RED = 1


@dataclasses.dataclass
class Config:
    """The same."""

    width: int = 3


def _bytes_io() -> io.BytesIO:
    data = io.BytesIO(b"abcdef")
    data.seek(2)
    return data


RICH: dict[str, Callable[[], Any]] = {
    "slice": lambda: slice(1, None, 2),
    "range": lambda: range(3, 9, 2),
    "set": lambda: {1, "a", (2, 3)},
    "frozenset": lambda: frozenset({1, 2}),
    "deque": lambda: collections.deque([1, "a"], maxlen=3),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "counter": lambda: collections.Counter("abca"),
    "named tuple": lambda: Pair(1, 2),
    "enum": lambda: Color.RED,
    "dataclass": Config,
    "namespace": lambda: argparse.Namespace(lr=0.1, name="x"),
    "simple namespace": lambda: types.SimpleNamespace(a=1),
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "datetime": lambda: datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
    "timedelta": lambda: datetime.timedelta(days=1, microseconds=3),
    "fraction": lambda: fractions.Fraction(1, 3),
    "decimal": lambda: decimal.Decimal("1.10"),
    "uuid": lambda: uuid.UUID(int=7),
    "numpy array": lambda: np.arange(6, dtype=np.int16).reshape(2, 3),
    "numpy scalar": lambda: np.float32(0.1),
    "numpy bool": lambda: np.bool_(1),
    "random state": lambda: random.Random(3).getstate(),
    "bytes io": _bytes_io,
    "large bytes": lambda: b"ab" * (700 << 10),
    "string with surrogates": lambda: "a\ud800b",
    "function": lambda: len,
    "type": lambda: int,
}
_rich = st.tuples(st.just("rich"), st.sampled_from(list(RICH)))
_plain = st.tuples(st.just("plain"), _scalars)
_keys = st.one_of(
    st.sampled_from(["a", "b", "x.y", "model", "0", "", "params"]), st.integers(-2, 3), st.booleans(), st.floats(0, 1)
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(
        st.tuples(_keys, inner), max_size=3, unique_by=lambda pair: str(pair[0])
    )  # 0 and "0" have one name: refused
    rows = st.lists(inner, max_size=3)
    return st.one_of(
        st.tuples(st.sampled_from(["dict", "ordered"]), items.map(tuple)),
        st.tuples(st.sampled_from(["list", "tuple"]), rows.map(tuple)),
    )


values = st.recursive(_plain | _tensors | _plain | _tensors | _rich, _containers, max_leaves=6)
"""Trees of (kind, what is in it), from which values are made."""


def value_of(tree: Any, generator: Generator, *, is_blank: bool = False) -> Any:
    """Make a value: tensors from the generator; `is_blank`, with zeros for what is plain in it."""
    kind, inner = tree
    if kind in ("plain", "rich"):
        return 0 if is_blank else inner if kind == "plain" else RICH[inner]()
    if kind == "tensor":
        return _tensor(inner, generator)
    if kind in ("dict", "ordered"):
        pairs = [(key, value_of(child, generator, is_blank=is_blank)) for key, child in inner]
        return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
    children = [value_of(child, generator, is_blank=is_blank) for child in inner]
    return children if kind == "list" else tuple(children)


def is_rich(tree: Any) -> bool:
    """Tell whether something in a tree may be refused when it is saved."""
    kind, inner = tree
    if kind in ("dict", "ordered"):
        return any(is_rich(child) for _, child in inner)
    return kind == "rich" or (kind in ("list", "tuple") and any(map(is_rich, inner)))
