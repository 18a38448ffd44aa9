"""The codec keeps a value exactly or refuses it, and foreign data becomes a value or a `ManifestError`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import json
import math
import os
import pathlib
import random
import re
import struct
import uuid
import warnings
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler, swa_utils

from cloudckpt.errors import ManifestError, UnsupportedValueError
from cloudckpt.format import codec
from cloudckpt.format.codec import DTYPE_NAMES, DTYPES, walk
from cloudckpt.format.codec.walk import MAX_DEPTH, MAX_INLINE_BYTES, MAX_INT_DIGITS, MAX_NODES

Json = Any


def round_trip(value: object) -> object:
    """Encode, write as text, read and decode, by both JSON libraries that a reader may use."""
    data = codec.encode(value, key="value")
    by_json = codec.decode(json.loads(json.dumps(data, allow_nan=False)), key="value")
    by_msgspec = codec.decode(msgspec.json.decode(msgspec.json.encode(data)), key="value")
    assert fingerprint(by_msgspec) == fingerprint(by_json)
    return by_json


def fingerprint(value: object) -> object:  # noqa: C901, PLR0911  one row a type
    """Return what two values share only if they have the same types and the same content, bit for bit."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().resolve_neg().contiguous()
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        return kind, value.dtype, tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, np.ndarray):
        return kind, value.dtype.str, value.shape, value.flags.f_contiguous, value.tobytes("C")
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.view("i8") if value.dtype.kind in "mM" else repr(value)
    if isinstance(value, float):
        return kind, "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, complex):
        return kind, fingerprint(value.real), fingerprint(value.imag)
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return kind, factory, [(fingerprint(key), fingerprint(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(fingerprint(item)) for item in value)
    if isinstance(value, slice):
        return kind, [fingerprint(part) for part in (value.start, value.stop, value.step)]
    if isinstance(value, list | tuple):
        return kind, [fingerprint(item) for item in value]
    if (content := content_of(value)) is not None:
        return kind, fingerprint(content)
    return kind, value


def content_of(value: object) -> object:  # noqa: PLR0911  one row a type
    """Return what a value is made of where `==` does not tell all of it, else None."""
    match value:
        case datetime.datetime() | datetime.time():
            return value.isoformat(), value.fold, None if value.tzinfo is None else repr(value.tzinfo)
        case decimal.Decimal():
            return value.as_tuple()
        case deque():
            return list(value), value.maxlen
        case argparse.Namespace() | SimpleNamespace():
            return vars(value)
        case io.BytesIO():
            return value.getvalue(), value.tell()
        case random.Random():
            return value.getstate()
        case np.random.Generator():
            seed: Any = value.bit_generator.seed_seq  # type: ignore[attr-defined]
            return value.bit_generator.state, {name: str(part) for name, part in seed.state.items()}
        case np.random.RandomState():
            return value.get_state(legacy=False)
        case torch.Generator():
            return str(value.device), value.get_state()
    return None


def assert_kept(value: object) -> None:
    assert fingerprint(round_trip(value)) == fingerprint(value)


# --- what is kept


def stream_at(data: bytes, position: int) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.seek(position)
    return stream


BIG = 16**MAX_INT_DIGITS - 1
PLAIN = [None, True, False, 0, -1, 2**53 - 1, 0.1, -0.0, 5e-324, 1.7976931348623157e308, "", "é\x00\u2028🙂", [], {}]
EXACT: dict[str, list[object]] = {
    "int": [2**53, -(2**53), 2**64, -(2**63) - 1, 10**400, BIG, -BIG],
    "float": [math.inf, -math.inf, math.nan],
    "str": ["\ud800", "a\udcffb", "\udfff\ud800"],
    "bytes": [b"", b"\x00\xff", bytearray(b""), bytearray(b"abc")],
    "complex": [0j, complex(-0.0, math.inf), complex(math.nan, -1.5)],
    "tuple": [(), (1, (2.0, ("x",))), [(), [()]]],
    "range and slice": [range(0), range(10, -5, -3), range(2**70), slice(None), slice(1, None, -2)],
    "set": [set(), {1, 2.5, "a", None, (1, 2)}, frozenset({frozenset(), b"x"}), {True, 0, "0"}],
    "dict": [
        {1: "a", "1": "b", 2.5: "c", None: "d", (1, (2,)): "e"},
        {False: 1},
        {b"k": {2: {}}},
        {"\udc80": 1},
        {np.str_("a"): 1},
    ],
    "tag-like dict": [{"$": 1}, {"$tuple": [1]}, {"$$tuple": [1]}, {"$dict": 1, "a": 2}, {"$int": {"$int": "0x1"}}],
    "OrderedDict": [OrderedDict(), OrderedDict([("b", 1), ("a", OrderedDict({3: 4}))])],
    "Counter": [Counter(), Counter({30: 1, 80: 2}), Counter("aba")],
    "defaultdict": [
        *(defaultdict(kind, {"a": 1, (2, 3): [4]}) for kind in (None, int, list, dict, set, OrderedDict, deque)),
        defaultdict(list),
    ],
    "deque": [deque(), deque([1, (2,), {"a": 3}]), deque([1, 2], maxlen=2), deque(maxlen=0)],
    "namespace": [
        *(argparse.Namespace(), argparse.Namespace(lr=0.1, layers=[1, 2])),
        *(SimpleNamespace(a=SimpleNamespace(b=None)), SimpleNamespace(**{"not a name": 1, "$x": 2, "__class__": 3})),
    ],
    "path": [
        *(pathlib.PurePosixPath("/a/b"), pathlib.PurePosixPath(""), pathlib.PurePosixPath("//a/\udcff")),
        *(pathlib.PureWindowsPath("C:\\a b"), pathlib.PureWindowsPath("c:x"), pathlib.Path("data/x")),
    ],
    "time": [
        *(datetime.date(2026, 1, 2), datetime.date.min, datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)),  # noqa: DTZ001
        *(datetime.datetime.max, datetime.datetime.min, datetime.datetime(2026, 10, 25, 2, 30, fold=1)),  # noqa: DTZ001, DTZ901
        *(datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.time(1, 2, 3, 4, fold=1)),
        datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.time(1, tzinfo=datetime.timezone(datetime.timedelta(hours=-5, seconds=1), "odd")),
        *(datetime.timedelta(-1, 5, 7), datetime.timedelta.max, datetime.timedelta.min, datetime.UTC),
        *(datetime.timezone(datetime.timedelta(hours=5)), datetime.timezone(datetime.timedelta(0), "GMT")),
    ],
    "fraction and decimal": [
        *(fractions.Fraction(-6, 4), fractions.Fraction(10**100, 3)),
        *map(decimal.Decimal, ["0", "-0.00", "1E+400", "NaN", "-sNaN123", "-Infinity", "0.1", "1.10"]),
    ],
    "uuid": [uuid.UUID(int=0), uuid.UUID("12345678123456781234567812345678")],
    "stream": [io.BytesIO(), io.BytesIO(b"abc"), stream_at(b"abc", 2), stream_at(b"abc", 10)],
    "keys of these": [
        {datetime.date(2026, 1, 2): 1, fractions.Fraction(1, 2): 2, decimal.Decimal("0.1"): 3, uuid.UUID(int=1): 4},
        {datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1), pathlib.PurePosixPath("a")},
    ],
    "torch": [torch.Size([]), torch.Size([2, 0, 2**40]), torch.device("cuda:3"), torch.device("cpu")],
    "numpy scalar": [
        *(np.dtype(name).type(1) for name in "?bBhHiIlLefdFD"),
        *(np.float32(0.1), np.float16(-0.0), np.float64("nan"), np.uint64(2**64 - 1), np.int64(-(2**63))),
        *(
            np.complex64(complex(0.1, math.inf)),
            np.str_("a\x00"),
            np.str_(""),
            np.str_("\udc80"),
            np.bytes_(b"\x00a\x00"),
        ),
        *(np.datetime64("2026-01-02T03:04:05", "ns"), np.datetime64("NaT"), np.datetime64(3, "25s")),
        *(np.timedelta64(-5, "m"), np.timedelta64("NaT"), np.timedelta64(7)),
    ],
}


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_what_json_can_say_stays_as_it_is(value: object) -> None:
    assert fingerprint(codec.encode(value, key="k")) == fingerprint(value)
    assert_kept(value)


@pytest.mark.parametrize("group", EXACT)
def test_values_come_back_with_type_and_content(group: str) -> None:
    for value in EXACT[group]:
        assert_kept(value)
        assert_kept({"in": [value, (value,)]})


def test_each_dtype_comes_back() -> None:
    assert_kept(list(DTYPES.values()))


def test_the_dtype_table_holds_all_that_a_dense_tensor_can_hold() -> None:
    everything = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    left_out = {str(dtype).removeprefix("torch.") for dtype in everything - set(DTYPE_NAMES)}

    assert [name for name in left_out if not re.fullmatch(r"qu?int\d+(x\d)?|bits\d+(x\d)?|u?int[1-7]", name)] == []
    assert {str(dtype) for dtype in DTYPE_NAMES} == {f"torch.{name}" for name in DTYPES}
    assert {name: DTYPE_NAMES[dtype] for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}


def tensor_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of arbitrary bits, so NaNs with payloads too."""
    generator = torch.Generator().manual_seed(7)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (0, 5), (2, 0, 3)], ids=str)
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_kept(tensor_of(dtype, *shape))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_view_of_a_tensor_comes_back_contiguous(dtype: torch.dtype) -> None:
    base = tensor_of(dtype, 4, 6)
    for view in (base.t(), base[:, ::2], base[1], base[2:3].expand(5, 6), base[0, 0]):
        twin = round_trip(view)
        assert isinstance(twin, torch.Tensor)
        assert twin.is_contiguous()
        assert twin.shape == view.shape
        carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[dtype.itemsize]
        expected = view.view(carrier).clone(memory_format=torch.contiguous_format).view(dtype)
        assert fingerprint(twin) == fingerprint(expected)


def test_a_lazily_conjugated_tensor_is_stored_conjugated() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])

    assert_kept(base.conj())
    assert_kept(base.conj().imag)


def test_a_single_element_comes_back_whatever_its_stride() -> None:
    assert_kept(torch.arange(2.0)[::2])
    assert_kept(torch.arange(6.0).view(2, 3)[:, ::3][:1].view(torch.int32))


def test_a_decoded_tensor_is_plain_memory_of_its_own() -> None:
    data = codec.encode(torch.ones(3), key="k")

    with torch.device("meta"):
        twin = codec.decode(data, key="k")

    assert isinstance(twin, torch.Tensor)
    assert (twin.device.type, twin.requires_grad) == ("cpu", False)
    assert twin.add_(1).resize_(8)[:3].tolist() == [2.0, 2.0, 2.0]


def test_a_tensor_that_had_a_gradient_may_have_one_again() -> None:
    twin = round_trip([torch.ones(3, requires_grad=True), torch.ones(2)])
    assert isinstance(twin, list)
    assert [each.requires_grad for each in twin] == [True, False]


NUMPY_DTYPES = ["?", "i1", "u1", "<i2", ">i8", "<f2", ">f4", "<f8", "<c8", ">c16", "S3", "<U2", ">U2", "V3"]
NUMPY_TIMES = ["<M8", "<M8[ns]", ">M8[25s]", "<m8[D]", ">m8[us]"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES + NUMPY_TIMES)
def test_an_array_comes_back_with_dtype_byte_order_and_memory_order(dtype: str) -> None:
    letters = np.frombuffer(random.Random(3).randbytes(24), "u1") % 2 + 64 * ("U" in dtype)
    wide = np.repeat(letters, 4) if "U" not in dtype else letters
    base = wide.astype("u4").astype(dtype) if dtype != "V3" else np.frombuffer(bytes(72), "V3")
    square = base[:24].reshape(4, 6)
    for array in (square, np.asfortranarray(square), square[::2, 1:], square[0], base[:0], base[:1].reshape(())):
        assert_kept(array)


def test_a_decoded_array_is_writable() -> None:
    twin = round_trip(np.zeros((2, 2)))

    assert isinstance(twin, np.ndarray)
    twin[0, 0] = 7
    assert twin.sum() == 7


def test_a_set_encodes_in_one_order_whatever_its_own() -> None:
    names = [f"name-{number:02}" for number in range(40)]

    assert codec.encode(set(names), key="k") == {"$set": names}
    assert codec.encode(frozenset(reversed(names)), key="k") == {"$frozenset": names}


def test_one_list_held_twice_is_no_cycle() -> None:
    shared = [1]

    assert_kept([shared, shared, {"a": shared}])


# --- the format: what is written here must be readable by every later version

WRITTEN: list[tuple[object, Json]] = [
    ({"$a": [1, 1.5, None, True, "x"]}, {"$$a": [1, 1.5, None, True, "x"]}),
    (2**64, {"$int": "0x10000000000000000"}),
    (-(2**53), {"$int": "-0x20000000000000"}),
    (-math.inf, {"$float": "-inf"}),
    ("\ud800", {"$str": "7aCA"}),
    (b"\x00\xff", {"$bytes": "AP8="}),
    (bytearray(b"a"), {"$bytearray": "YQ=="}),
    (complex(1, math.inf), {"$complex": [1.0, {"$float": "inf"}]}),
    ((1, ()), {"$tuple": [1, {"$tuple": []}]}),
    ({1: 2}, {"$dict": [[1, 2]]}),
    (OrderedDict(a=1), {"$OrderedDict": [["a", 1]]}),
    (Counter({5: 1}), {"$Counter": [[5, 1]]}),
    ({2, 1}, {"$set": [1, 2]}),
    (frozenset([None]), {"$frozenset": [None]}),
    (range(3), {"$range": [0, 3, 1]}),
    (slice(1, None), {"$slice": [1, None, None]}),
    (np.float32(0.5), {"$numpy.scalar": ["<f4", 0.5]}),
    (np.str_("a"), {"$numpy.scalar": ["U", "a"]}),
    (np.bytes_(b"a"), {"$numpy.scalar": ["S", {"$bytes": "YQ=="}]}),
    (np.datetime64(3, "s"), {"$numpy.scalar": ["<M8[s]", 3]}),
    (
        np.array([[1], [2]], ">i2"),
        {"$numpy.ndarray": {"dtype": ">i2", "shape": [2, 1], "order": "C", "data": "AAEAAg=="}},
    ),
    (
        torch.tensor(1.0, dtype=torch.bfloat16),
        {"$torch.tensor": {"dtype": "bfloat16", "shape": [], "data": "gD8="}},
    ),
    (
        torch.ones((), dtype=torch.bfloat16, requires_grad=True),
        {"$torch.requires_grad": {"$torch.tensor": {"dtype": "bfloat16", "shape": [], "data": "gD8="}}},
    ),
    (torch.Size([2, 3]), {"$torch.Size": [2, 3]}),
    (torch.float8_e4m3fn, {"$torch.dtype": "float8_e4m3fn"}),
    (torch.device("cuda", 1), {"$torch.device": "cuda:1"}),
    (defaultdict(list, a=[1]), {"$defaultdict": {"factory": "list", "items": {"a": [1]}}}),
    (defaultdict(None, {1: 2}), {"$defaultdict": {"factory": None, "items": {"$dict": [[1, 2]]}}}),
    (deque([1], 3), {"$deque": {"items": [1], "maxlen": 3}}),
    (argparse.Namespace(lr=0.5), {"$argparse.Namespace": {"lr": 0.5}}),
    (SimpleNamespace(a=(1,)), {"$SimpleNamespace": {"a": {"$tuple": [1]}}}),
    (pathlib.PurePosixPath("a/b"), {"$PurePosixPath": "a/b"}),
    (pathlib.PureWindowsPath("C:/a"), {"$PureWindowsPath": "C:\\a"}),
    (pathlib.PosixPath("/a"), {"$PosixPath": "/a"}),
    (datetime.date(2026, 1, 2), {"$date": "2026-01-02"}),
    (
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        {"$datetime": {"text": "2026-01-02T03:04:05.000006", "fold": 1, "zone": {"$ZoneInfo": "Europe/Berlin"}}},
    ),
    (datetime.time(1, 2), {"$time": {"text": "01:02:00", "fold": 0, "zone": None}}),
    (datetime.timedelta(-1, 5), {"$timedelta": [-1, 5, 0]}),
    (datetime.UTC, {"$timezone": {"offset": {"$timedelta": [0, 0, 0]}, "name": None}}),
    (zoneinfo.ZoneInfo("UTC"), {"$ZoneInfo": "UTC"}),
    (fractions.Fraction(-2, 6), {"$Fraction": [-1, 3]}),
    (decimal.Decimal("1.10"), {"$Decimal": "1.10"}),
    (uuid.UUID(int=1), {"$UUID": "00000000-0000-0000-0000-000000000001"}),
    (stream_at(b"\x00\xff", 1), {"$BytesIO": {"data": {"$bytes": "AP8="}, "position": 1}}),
]
OF_GENERATORS = {
    "$random.Random": random.Random(1),
    "$numpy.Generator": np.random.default_rng(1),
    "$numpy.RandomState": np.random.RandomState(1),
    "$torch.Generator": torch.Generator(),
}


@pytest.mark.parametrize(("value", "data"), WRITTEN, ids=lambda pair: type(pair).__name__)
def test_the_written_form_is_this_one(value: object, data: Json) -> None:
    assert fingerprint(codec.encode(value, key="k")) == fingerprint(data)
    assert fingerprint(codec.decode(data, key="k")) == fingerprint(value)


@pytest.mark.parametrize("tag", OF_GENERATORS)
def test_a_generator_is_written_under_its_tag(tag: str) -> None:
    data = codec.encode(OF_GENERATORS[tag], key="k")

    assert isinstance(data, dict)
    assert list(data) == [tag]
    assert_kept(OF_GENERATORS[tag])


def test_a_path_of_another_system_is_read_as_the_pure_path_that_is_equal() -> None:
    here, pure = (pathlib.PosixPath, pathlib.PurePosixPath) if os.name == "posix" else (pathlib.Path, pathlib.PurePath)
    assert type(codec.decode({"$PosixPath": "/a/b"}, key="k")) is here
    other = codec.decode({"$WindowsPath": "C:\\a"}, key="k")
    assert type(other) is (pathlib.PureWindowsPath if pure is pathlib.PurePosixPath else pathlib.WindowsPath)
    assert other == pathlib.PureWindowsPath("C:/a")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"$ZoneInfo": "Europe/Atlantis"}, "tzdata"),
        ({"$torch.Generator": {"device": {"$torch.device": "cuda:99"}, "state": {"$torch.tensor": 0}}}, None),
    ],
)
def test_what_this_machine_lacks_is_no_damage(data: Json, reason: str | None) -> None:
    with pytest.raises(UnsupportedValueError if reason else ManifestError, match=r"\Ak\[0\]") as caught:
        codec.decode([data], key="k")
    assert reason is None or reason in str(caught.value)


# --- states of the libraries that people train with


def test_states_of_random_generators_continue_the_same_sequence() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002  the global states are what is stored
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    twins: Any = round_trip({"states": states})
    python_state, numpy_state, torch_state = twins["states"]
    random.setstate(python_state), np.random.set_state(numpy_state), torch.set_rng_state(torch_state)  # noqa: NPY002

    assert_kept(states)
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected  # noqa: NPY002


BIT_GENERATORS = ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"]


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_states_of_numpy_bit_generators_come_back(name: str) -> None:
    generator = getattr(np.random, name)(3)
    generator.random_raw(5)
    state = generator.state
    expected = generator.random_raw(4).tolist()

    generator.state = round_trip(state)

    assert generator.random_raw(4).tolist() == expected


def test_generators_among_values_draw_the_very_next_number() -> None:
    generators = {
        "python": random.Random(5),
        "torch": torch.Generator().manual_seed(5),
        "legacy": np.random.RandomState(5),
        **{name: np.random.Generator(getattr(np.random, name)([5, 6])) for name in BIT_GENERATORS},
    }
    drew = [draw_odd(generator) for generator in generators.values()]  # odd places: some keep a number in reserve
    twins = round_trip(generators)

    assert len(drew) == 8
    assert isinstance(twins, dict)
    assert fingerprint(twins) == fingerprint(generators)
    for name, generator in generators.items():
        assert [draw_odd(twins[name]) for _ in range(700)] == [draw_odd(generator) for _ in range(700)]


def test_a_numpy_generator_comes_back_to_spawn_the_very_next_child() -> None:
    generator = np.random.default_rng([2**70, 3])
    generator.spawn(2)

    twin = round_trip(generator)

    assert isinstance(twin, np.random.Generator)
    assert fingerprint(twin.spawn(1)[0]) == fingerprint(generator.spawn(1)[0])


def draw_odd(generator: Any) -> object:
    match generator:
        case random.Random():
            return generator.gauss(0, 1)
        case torch.Generator():
            return torch.randn(1, generator=generator).item()
        case np.random.RandomState():
            return generator.normal()
    return generator.integers(9, dtype=np.uint32)


OPTIMIZERS = [name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name, None), type)]


def optimizer_of(name: str) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)), torch.nn.Parameter(torch.ones(4, 2))]
    options = {"amsgrad": True} if name in ("Adam", "AdamW") else {"momentum": 0.9} if name == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.full_like(parameter, 0.25)
            parameter.grad = gradient.to_sparse() if type(optimizer).__name__ == "SparseAdam" else gradient
    optimizer.step(lambda: torch.tensor(1.0)) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"Optimizer", "LBFGS"}))
def test_the_state_of_each_torch_optimizer_comes_back(name: str) -> None:
    optimizer, twin = optimizer_of(name), optimizer_of(name)
    step(optimizer)

    state = optimizer.state_dict()
    twin.load_state_dict(round_trip(state))  # type: ignore[arg-type]

    assert len(state["state"]) == 2
    assert fingerprint(twin.state_dict()) == fingerprint(state)


def test_the_state_of_lbfgs_comes_back() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.LBFGS([parameter], lr=0.1)
    step(optimizer)

    assert len(optimizer.state_dict()["state"][0]) > 3
    assert_kept(optimizer.state_dict())


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [2])], milestones=[1]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, mode="exp_range", cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float lr", "tensor lr"])
def test_the_state_of_each_torch_scheduler_comes_back(name: str, lr: float | torch.Tensor) -> None:
    def build() -> tuple[torch.optim.Optimizer, Any]:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([parameter], lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        return optimizer, SCHEDULERS[name](optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        step(optimizer)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR calls its own deprecated signature
        first, second = build(), build()
        advance(*first)
        state = first[1].state_dict()
        second[1].load_state_dict(round_trip(state))

    assert_kept(state)
    assert fingerprint(second[1].state_dict()) == fingerprint(state)


def test_the_state_of_a_gradient_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)  # type: ignore[attr-defined]
    scaler.scale(torch.ones(()))

    twin = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    twin.load_state_dict(round_trip(scaler.state_dict()))  # type: ignore[arg-type]

    assert twin.state_dict() == scaler.state_dict()
    assert twin.state_dict()["scale"] == 512.0


def test_nested_loader_states_come_back() -> None:
    assert_kept(
        {
            "_snapshot": {
                "_main_snapshot": {"_num_workers": 2, "_sampler_iter_state": None, "_base_seed": 2**63 + 11},
                "_worker_snapshots": {"worker_0": {"fetcher_state": {"ended": False}, "rng": random.getstate()}},
                "shuffle": torch.randperm(50),
            },
            "_steps_since_snapshot": 3,
            "cursor": (b"\x01", "part-\udcff.parquet", {0: [1, 2], 1: []}),
        }
    )


# --- what is refused, and where


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


class Text(str):
    __slots__ = ()


class Rows(list[int]):
    pass


class Queue(deque[int]):
    pass


class Moment(datetime.datetime):
    pass


class Somewhere(datetime.tzinfo):
    pass


@dataclasses.dataclass
class Setup:
    width: int


class Dice(np.random.PCG64):
    """The state of a subclass bears another name."""


def unseeded() -> np.random.BitGenerator:
    twisted = np.random.MT19937()
    twisted._legacy_seeding(1)  # type: ignore[attr-defined]
    return twisted


def closed_stream() -> io.BytesIO:
    stream = io.BytesIO()
    stream.close()
    return stream


class Opaque:
    pass


class Stateful:
    def state_dict(self) -> dict[str, object]:
        return {}


def nested_tensor() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls it a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])  # type: ignore[no-any-return]


REFUSED: list[tuple[Callable[[], object], str, str]] = [
    (lambda: lambda: 0, "function", "leave it out"),
    (lambda: len, "builtin_function_or_method", "leave it out"),
    (lambda: Opaque, "type", "leave it out"),
    (Opaque, "Opaque", "state_dict"),
    (Stateful, "Stateful", r"store its `state_dict\(\)`"),
    (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear", r"store its `state_dict\(\)`"),
    (lambda: Colour.RED, "Colour", r"cloudckpt\.register"),
    (lambda: Point(1, 2), "Point", r"cloudckpt\.register.*_asdict"),
    (lambda: Setup(1), "Setup", r"cloudckpt\.register.*dataclasses\.asdict"),
    (lambda: Text("a"), "Text", r"`str\(value\)`"),
    (nested_tensor, "torch.Tensor", "dense"),
    (Rows, "Rows", r"`list\(value\)`"),
    (lambda: defaultdict(lambda: 0), "collections.defaultdict", r"`dict\(value\)`"),
    (lambda: Queue([1]), "Queue", "store a deque"),
    (lambda: Moment(2026, 1, 1), "Moment", "store a datetime"),
    (lambda: datetime.datetime(2026, 1, 1, tzinfo=Somewhere()), "datetime.datetime", "astimezone"),
    (random.SystemRandom, "random.SystemRandom", "store a Random"),
    (lambda: np.random.Generator(Dice()), "numpy.random._generator.Generator", "bit generator is none of"),
    (lambda: np.random.Generator(unseeded()), "numpy.random._generator.Generator", r"bit_generator\.state"),
    (closed_stream, "_io.BytesIO", "closed"),
    (lambda: io.StringIO("a"), "_io.StringIO", "plain values"),
    (lambda: MappingProxyType({}), "mappingproxy", r"`dict\(value\)`"),
    (collections.ChainMap, "collections.ChainMap", "plain values"),
    (lambda: decimal.Decimal("1" * 5000), "decimal.Decimal", "characters"),
    (lambda: torch.max(torch.ones(1), 0), "torch.return_types.max", r"`tuple\(value\)`"),
    (lambda: np.dtype("f4"), "numpy.dtypes.Float32DType", r"`value\.str`"),
    (lambda: memoryview(b"a"), "memoryview", r"`bytes\(value\)`"),
    (lambda: iter([1]), "list_iterator", "plain values"),
    (lambda: 16**MAX_INT_DIGITS, "int", "bytes"),
    (lambda: bytes(MAX_INLINE_BYTES + 1), "bytes", "put it into the state"),
    (lambda: bytearray(MAX_INLINE_BYTES + 1), "bytearray", "put it into the state"),
    (lambda: torch.zeros(MAX_INLINE_BYTES // 4 + 1), "torch.Tensor", "put it into"),
    (lambda: torch.zeros(1).expand(2**50), "torch.Tensor", "put it into"),
    (lambda: torch.empty(0, 2**31, 2**31), "torch.Tensor", "reshape"),
    (lambda: torch.zeros([1] * 65), "torch.Tensor", "reshape"),
    (lambda: torch.empty(2, device="meta"), "torch.Tensor", "dense"),
    (lambda: torch.eye(2).to_sparse(), "torch.Tensor", "dense"),
    (lambda: torch.nn.Parameter(torch.ones(1)), "torch.nn.parameter.Parameter", "tensor entry"),
    (lambda: torch.int4, "torch.dtype", "no dense tensor"),
    (lambda: torch.strided, "torch.layout", "plain values"),
    (lambda: torch.device("cuda:200"), "torch.device", "8 bits"),
    (lambda: np.zeros(MAX_INLINE_BYTES + 1, "u1"), "numpy.ndarray", "put it into"),
    (lambda: np.broadcast_to(np.zeros(1), 2**50), "numpy.ndarray", "put it into"),
    (lambda: np.array([object()]), "numpy.ndarray", "object"),
    (lambda: np.zeros(1, [("a", "i4"), ("b", "f4")]), "numpy.ndarray", "convert"),
    (lambda: np.zeros(1, [("a", "i4")])[0], "numpy.void", "tuple or bytes"),
    (lambda: np.longdouble(1), "numpy.longdouble", "longdouble|float128|float64"),
    (lambda: np.zeros(1, np.longdouble), "numpy.ndarray", "convert"),
    (lambda: np.zeros(1, np.dtype("f4", metadata={"a": 1})), "numpy.ndarray", "convert"),
    (lambda: np.empty(1, np.dtypes.StringDType()), "numpy.ndarray", "convert"),
    (lambda: np.ma.masked_array([1.0]), "numpy.ma.MaskedArray", "numpy.array"),
]


@pytest.mark.parametrize(("make", "type_name", "advice"), REFUSED, ids=[row[1] + ": " + row[2] for row in REFUSED])
def test_a_refusal_names_the_place_and_the_type_and_says_what_to_do(
    make: Callable[[], object], type_name: str, advice: str
) -> None:
    with pytest.raises(UnsupportedValueError, match=advice) as caught:
        codec.encode({"lr_lambdas": [None, make()]}, key="scheduler")

    assert caught.value.key == "scheduler.lr_lambdas[1]"
    assert caught.value.type_name.removeprefix(f"{__name__}.") == type_name
    assert str(caught.value).startswith(f"scheduler.lr_lambdas[1] ({caught.value.type_name}) ")


@pytest.mark.parametrize(
    ("value", "way"),
    [
        ({"a": {"b c": [Opaque()]}}, "top.a['b c'][0]"),
        ({"a.b": Opaque()}, "top['a.b']"),
        ({3: {None: Opaque()}}, "top[3][None]"),
        ({(1, 2): (0, Opaque())}, "top[(1, 2)][1]"),
        ({"$tag": Opaque()}, "top['$tag']"),
        ({1: 1, Opaque(): 2}, "top{key 1}"),
        ({1: {(0, Opaque())}}, "top[1]{key 0}[1]"),
        (OrderedDict(a=slice(Opaque())), "top.a[1]"),
        ({"a": 1, Text("b"): 2}, "top{key 1}"),
        (Opaque(), "top"),
    ],
)
def test_a_refusal_names_the_whole_way(value: object, way: str) -> None:
    with pytest.raises(UnsupportedValueError) as caught:
        codec.encode(value, key="top")

    assert caught.value.key == way


def test_a_way_without_a_name_starts_with_the_first_step() -> None:
    with pytest.raises(UnsupportedValueError) as caught:
        codec.encode({"a": Opaque()}, key="")

    assert caught.value.key == "a"


def cycle_of_list() -> object:
    value: list[object] = [1]
    value.append({"again": (value,)})
    return value


def cycle_of_dict() -> object:
    value: dict[object, object] = {}
    value[1] = OrderedDict(again=value)
    return value


@pytest.mark.parametrize("make", [cycle_of_list, cycle_of_dict])
def test_a_value_that_contains_itself_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UnsupportedValueError, match="contains itself"):
        codec.encode(make(), key="k")


@pytest.mark.parametrize("key", [torch.ones(1), (1, torch.ones(1)), np.datetime64("2026-01-01"), slice], ids=repr)
def test_a_key_that_would_not_be_found_again_is_refused(key: Any) -> None:
    for value in ({key: 1}, {key}):
        with pytest.raises(UnsupportedValueError):
            codec.encode(value, key="k")


def nested(value: object, depth: int) -> object:
    kinds = (lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}, lambda v: OrderedDict(k=v))
    for level in range(depth):
        value = kinds[level % len(kinds)](value)  # type: ignore[no-untyped-call]
    return value


LEAVES = [1, 2**60, math.inf, "\ud800", b"x", [], {}, set(), np.float32(1), np.ones(2), torch.ones(2), torch.float16]


@pytest.mark.parametrize("leaf", LEAVES, ids=repr)
def test_depth_is_counted_alike_both_ways(leaf: object) -> None:
    assert_kept(nested(leaf, MAX_DEPTH))
    with pytest.raises(UnsupportedValueError, match="deeper"):
        codec.encode(nested(leaf, MAX_DEPTH + 1), key="k")


def test_deeper_data_is_refused() -> None:
    data: Json = 1
    for _ in range(MAX_DEPTH + 1):
        data = {"$tuple": [data]}

    with pytest.raises(ManifestError, match="deeper"):
        codec.decode(data, key="k")


def test_a_list_nested_beyond_the_interpreters_stack_is_refused() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(UnsupportedValueError, match="deeper"):
        codec.encode(value, key="k")
    with pytest.raises(ManifestError, match="deeper"):
        codec.decode(value, key="k")  # type: ignore[arg-type]


def test_the_number_of_values_is_limited_alike_both_ways() -> None:
    most = [None] * (MAX_NODES - 1)

    assert codec.decode(codec.encode(most, key="k"), key="k") == most  # type: ignore[arg-type]
    with pytest.raises(UnsupportedValueError, match="one tensor"):
        codec.encode([*most, None], key="k")
    with pytest.raises(ManifestError, match="values"):
        codec.decode([*most, None], key="k")


def test_shared_lists_that_unfold_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MAX_NODES", 1000)  # the true limit is a million, which takes seconds
    value: list[object] = []
    for _ in range(60):
        value = [value, value]

    with pytest.raises(UnsupportedValueError, match="after 1000 other values"):
        codec.encode(value, key="k")


@pytest.mark.parametrize("make", [bytes, bytearray, lambda n: np.zeros(n, "u1"), lambda n: torch.zeros(n // 4)])
def test_the_largest_inline_value_is_kept(make: Callable[[int], object]) -> None:
    assert_kept(make(MAX_INLINE_BYTES))


# --- foreign data

TENSOR = {"dtype": "float32", "shape": [2], "data": "AACAPwAAAEA="}
ARRAY = {"dtype": "<f4", "shape": [2], "order": "C", "data": "AACAPwAAAEA="}
NOTHING = {"dtype": "<f4", "shape": [0], "order": "C", "data": ""}  # right for every dtype, so the dtype is at fault


def spoiled(tag: str, *way: Json) -> Json:
    """Return a generator's data with the last of `way` where the rest of it leads."""
    data: Json = json.loads(json.dumps(codec.encode(OF_GENERATORS[tag], key="k")))
    *steps, last, value = way
    place = data[tag]
    for step in steps:
        place = place[step]
    place[last] = value
    return data


FOREIGN: list[Json] = [
    *(2**53, -(2**64), math.inf, math.nan, "\ud800", (1,), b"x", object(), {1: 2}, {"\ud800": 1}),
    *({"$nope": 1}, {"$": 1}, {"$tuple": [1], "a": 1}, {"a": 1, "$tuple": [1]}, {"$tuple": 1}, {"$tuple": {}}),
    *({"$int": text} for text in (5, "5", "0x5", "0x0", "-0x1fffffffffffff", "0x020000000000000", "0X20000000000000")),
    *(
        {"$int": text}
        for text in ("0x" + "f" * (MAX_INT_DIGITS + 1), "-0x", "0x2000000000000_0", "0x2\u0660000000000000")
    ),
    *({"$float": text} for text in (1.0, "1.0", "Infinity", "NAN", " inf", "")),
    *({"$str": text} for text in ("YQ==", "7aC", "7aCB=", "/w==", 1, "")),
    *({"$bytes": text} for text in ("A", "AP8", "AP8=\n", "AP9=", "é", 1, None, [0], "A" * (2 * MAX_INLINE_BYTES))),
    *({"$complex": parts} for parts in ([1.0], [1.0, 2], [1.0, 2.0, 3.0], [True, 1.0], "ab")),
    *({"$dict": pairs} for pairs in ([1], [[1]], [[1, 2, 3]], [[1, 2], [1, 3]], [[1, 2], [True, 3]], {"a": 1})),
    *({"$dict": [[key, 1]]} for key in ([], {}, {"$set": []}, {"$torch.tensor": TENSOR}, {"$slice": [1, 2, 3]})),
    *({"$dict": [[key, 1]]} for key in ({"$tuple": [{"$torch.tensor": TENSOR}]}, {"$numpy.scalar": ["<M8[s]", 1]})),
    *({"$set": items} for items in ([1, 1], [0, False], [[]], [{"$numpy.ndarray": ARRAY}], "ab", {})),
    *({"$Counter": 3}, {"$OrderedDict": [["a", 1], ["a", 2]]}, {"$frozenset": [{"$bytearray": ""}]}),
    *({"$range": parts} for parts in ([0, 1], [0, 1, 0], [0, 1.0, 1], [True, 2, 1], [None, 1, 1])),
    *({"$slice": [1, 2]}, {"$torch.Size": [1.0]}, {"$torch.Size": [True]}, {"$torch.Size": [{"$int": hex(2**63)}]}),
    *({"$defaultdict": record} for record in ({}, [], {"factory": "list"}, {"factory": "list", "items": []})),
    *({"$defaultdict": {"factory": name, "items": {}}} for name in ("eval", "", 1, ["list"], {"$torch.dtype": "bool"})),
    *({"$deque": {"items": items, "maxlen": most}} for items, most in (([1, 2], 1), ({}, None), ([], -1), ([], 2.0))),
    {"$deque": {"items": [], "maxlen": {"$int": hex(2**64)}}},
    *({tag: attributes} for tag in ("$argparse.Namespace", "$SimpleNamespace") for attributes in ([], 1, "a", None)),
    *({"$SimpleNamespace": {"$dict": [[1, 2]]}}, {"$argparse.Namespace": {"$OrderedDict": []}}),
    *({tag: text} for tag in ("$PosixPath", "$PurePosixPath") for text in ("a//b", "a/", "./a", 1, None, ["a"])),
    *({"$PureWindowsPath": text} for text in ("C:/a", "a\\\\b", 1)),
    *({"$date": text} for text in ("2026-1-2", "20260102", "2026-W01-1", "0000-01-01", "2026-13-01", 5, None, "")),
    *(
        {"$datetime": {"text": text, "fold": 0, "zone": None}}
        for text in ("2026-01-02", "2026-01-02 03:04:05", "2026-01-02T03:04:05+00:00", "2026-01-02T03", "T", 1)
    ),
    *(
        {"$datetime": {"text": "2026-01-02T03:04:05", "fold": fold, "zone": zone}}
        for fold, zone in ((2, None), (True, None), (-1, None), (0, "UTC"), (0, 0), (0, {"$date": "2026-01-02"}))
    ),
    *({"$time": record} for record in ("01:02:03", {}, {"text": "25:00:00", "fold": 0, "zone": None})),
    *({"$timedelta": parts} for parts in ([0, 0], [0, 86400, 0], [0, -1, 0], [10**9, 0, 0], [0.0, 0, 0], [True, 0, 0])),
    *({"$timezone": record} for record in (0, {}, {"offset": 0, "name": None}, {"offset": {"$timedelta": [1, 0, 0]}})),
    {"$timezone": {"offset": {"$timedelta": [1, 0, 0]}, "name": None}},
    {"$timezone": {"offset": {"$timedelta": [0, 3600, 0]}, "name": "UTC+01:00"}},
    *({"$ZoneInfo": key} for key in ("", "/etc/passwd", "../../etc/passwd", "a/../b", "UTC\x00", "a" * 99, 1, None)),
    *({"$Fraction": parts} for parts in ([2, 4], [1, 0], [1, -2], [1], [1.0, 2], [True, 2], "1/2")),
    *({"$Decimal": text} for text in ("1e5", " 1", "0x1", "", "1_0", "nan", "1" * 5000, "1E9999999999999999999", 1)),
    *({"$UUID": text} for text in ("0" * 32, "{00000000-0000-0000-0000-000000000001}", "0", "", 1, None)),
    *({"$BytesIO": record} for record in ({}, "AA==", {"data": {"$bytes": ""}}, {"data": "", "position": 0})),
    *(
        {"$BytesIO": {"data": {"$bytes": ""}, "position": place}}
        for place in (-1, 0.0, True, None, {"$int": hex(2**64)})
    ),
    *({"$random.Random": state} for state in (1, [], {"$tuple": []}, {"$tuple": [3, {"$tuple": [1, 2]}, None]})),
    *(
        spoiled("$random.Random", *way)
        for way in (("$tuple", 0, 2), ("$tuple", 1, "$tuple", 624, 625), ("$tuple", 2, 1))
    ),
    *(spoiled("$random.Random", "$tuple", 1, "$tuple", 624, place) for place in (-1, 1.0, True, 2**32)),
    *(spoiled("$random.Random", "$tuple", 1, "$tuple", 0, word) for word in (-1, 2**32, 1.0)),
    *(
        spoiled("$numpy.RandomState", "state", "pos", place)
        for place in (-1, 625, 2**31, 1.0, None, {"$int": hex(2**64)})
    ),
    *(spoiled("$numpy.RandomState", name, 2) for name in ("has_gauss", "gauss", "bit_generator", "state", "extra")),
    *(spoiled("$numpy.RandomState", "state", "key", value) for value in (0, [0] * 624, {"$numpy.ndarray": ARRAY})),
    *(
        spoiled("$numpy.Generator", "state", name, value)
        for name in ("has_uint32", "uinteger")
        for value in (-1, 2**33)
    ),
    *(spoiled("$numpy.Generator", "state", "state", "state", value) for value in (-1, {"$int": hex(2**128)}, 1.0, "1")),
    *(spoiled("$numpy.Generator", "state", "bit_generator", name) for name in ("MT19937", "os", 1, ["PCG64"])),
    *(spoiled("$numpy.Generator", "seed", "pool_size", size) for size in (0, 3, 2**20, -1, True)),
    *(spoiled("$numpy.Generator", "seed", "entropy", value) for value in (-1, "1", 0.5, [-1], ["a"])),
    *(spoiled("$numpy.Generator", "seed", "spawn_key", value) for value in (1, [-1], ["a"], [0.5], [True])),
    *(spoiled("$numpy.Generator", "seed", value) for value in (None, [], {})),
    *(spoiled("$torch.Generator", "state", value) for value in (0, {"$torch.tensor": TENSOR}, {"$bytes": "AAAA"})),
    *(spoiled("$torch.Generator", "device", value) for value in ("cpu", 0)),
    *({"$registered": parts} for parts in ([], ["a"], [1, 2], "a", ["a", 1, 2], {})),
    *({tag: ["0", 0, 1]} for tag in ("$bytes", "$bytearray", "$str")),
    *({tag: [0, 0, 1]} for tag in ("$bytes", "$bytearray", "$str")),
    *(
        {"$torch.requires_grad": made}
        for made in (0, {"$torch.Size": []}, {"$torch.tensor": {**TENSOR, "dtype": "int8"}})
    ),
    *({"$torch.dtype": name} for name in ("load", "torch.float32", "int4", "qint8", "", 1, None)),
    *(
        {"$torch.device": name}
        for name in ("cuda:128", "cuda:256", "cuda:-1", "cuda:01", "os", "CPU", "cpu:", 0, "cuda:\u0661")
    ),
    *({"$torch.tensor": {**TENSOR, "shape": shape}} for shape in ([1], [3], [-2], [2.0], [True, 2], 2, "2", [2**40])),
    *({"$torch.tensor": {**TENSOR, "shape": shape, "data": ""}} for shape in ([0, 2**62], [0, -1], [0] * 65)),
    *({"$torch.tensor": {**TENSOR, "dtype": name}} for name in ("float64", "object", "quint8", 1, "__class__")),
    *({"$torch.tensor": fields} for fields in ({}, {**TENSOR, "extra": 1}, {"dtype": "bool"}, [], None)),
    *({"$numpy.ndarray": {**NOTHING, "dtype": name}} for name in ("f4", "=f4", "|O8", "O", "<f16", "float32", "|V0")),
    *(
        {"$numpy.ndarray": {**NOTHING, "dtype": name}}
        for name in ("<M8[0s]", "<M8[1s]", "i4,f4", "(2,)<f4", "<U0", "T")
    ),
    *({"$numpy.ndarray": {**NOTHING, "dtype": name}} for name in ("|V99999999", ["<f4"], None, "<i\u0664", "<b1")),
    *({"$numpy.ndarray": {**ARRAY, "order": order}} for order in ("K", "A", "", None, 1, ["C"])),
    *({"$numpy.ndarray": {**ARRAY, "shape": shape}} for shape in ([1], [2**62, 4], [-1, -2], [2, 2**63], [1] * 65)),
    {"$numpy.ndarray": {**ARRAY, "dtype": "<f8"}},
    {"$numpy.ndarray": {"dtype": "<U1", "shape": [1], "order": "C", "data": "AAARAA=="}},
    *({"$numpy.scalar": parts} for parts in ([], ["<f4"], ["<f4", 0.1], ["<f4", 1e300], ["<f4", 1], ["<f4", "1"])),
    *({"$numpy.scalar": parts} for parts in (["|i1", 128], ["|u1", -1], ["|i1", True], ["|b1", 1], [">f4", 1.0])),
    *({"$numpy.scalar": parts} for parts in (["U", 1], ["S", "a"], ["|V3", "a"], ["O", None], ["<M8[s]", 1.0], [1, 1])),
    *(
        {"$numpy.scalar": parts}
        for parts in (["<M8[s]", {"$int": hex(2**63)}], ["<c8", 1.0], ["<i8", {"$int": hex(2**63)}])
    ),
]


def _foreign_id(data: object) -> str:
    # Without an address, which differs from worker to worker.
    return "object" if type(data) is object else repr(data)[:60].encode("unicode_escape").decode()


@pytest.mark.parametrize("data", FOREIGN, ids=_foreign_id)
def test_data_that_encode_never_makes_is_refused_by_name(data: Json) -> None:
    with pytest.raises(ManifestError, match=r"\Aloader\.state\[1\]") as caught:
        codec.decode({"state": [0, data]}, key="loader")

    assert "restore an older step" in str(caught.value)


def test_keys_of_one_hash_are_refused_before_a_table_holds_them() -> None:
    twins = [hex(number * (2**61 - 1)) for number in range(1, 100_000)]

    with pytest.raises(ManifestError, match="one hash"):
        codec.decode({"$set": [{"$int": twin} for twin in twins if int(twin, 16) >= 2**53]}, key="k")
    with pytest.raises(UnsupportedValueError, match="one hash"):
        codec.encode({number * (2**61 - 1): 0 for number in range(1, 1000)}, key="k")


def test_a_refusal_of_foreign_data_shows_none_of_its_content() -> None:
    with pytest.raises(ManifestError) as caught:
        codec.decode({"$bytes": "secret!"}, key="k")

    assert "secret" not in str(caught.value)


# --- laws over arbitrary values

floats = st.floats(allow_nan=True, allow_infinity=True)
surrogates = st.text(st.characters(codec=None, categories=["Cs", "L", "Nd", "Cc"]), max_size=5)
numpy_scalars = st.one_of(
    floats.map(np.float64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.integers(0, 255).map(np.uint8),
    st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_),
    surrogates.map(np.str_),
    st.binary(max_size=5).map(np.bytes_),
)
hashables = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), floats, st.text(max_size=5), surrogates, st.binary(max_size=5)),
        *(st.complex_numbers(), numpy_scalars, st.sampled_from(list(DTYPES.values()))),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
    ),
    max_leaves=4,
)
tensors = st.builds(
    lambda dtype, shape: tensor_of(dtype, *shape),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 3), max_size=3),
)
arrays = st.builds(
    lambda dtype, shape, order: np.ones(shape, dtype, order=order),
    st.sampled_from(["?", "<i2", ">f4", "<c16", "<U3", "S2", ">M8[ms]"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from("CF"),
)


def named(attributes: dict[str, object]) -> SimpleNamespace:
    made = SimpleNamespace()
    vars(made).update(attributes)
    return made


names = st.one_of(st.text(max_size=4), surrogates, st.sampled_from(["$", "$tuple", "$$", "$int", "$dict"]))
everything = st.recursive(
    st.one_of(
        *(hashables, tensors, arrays, st.binary(max_size=9).map(bytearray)),
        *(st.integers(1, 9).map(range), st.lists(st.integers(0, 5)).map(torch.Size)),
        st.sampled_from(
            [value for group in ("path", "time", "uuid", "fraction and decimal") for value in EXACT[group]]
        ),
        *(st.sampled_from([*OF_GENERATORS.values()]), st.binary(max_size=3).map(io.BytesIO)),
        *(st.datetimes(timezones=st.none() | st.timezones()), st.timedeltas(), st.fractions(), st.decimals()),
    ),
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3).map(deque), st.dictionaries(st.text(max_size=3), inner, max_size=3).map(named)),
        st.dictionaries(hashables, inner, max_size=3).map(lambda made: defaultdict(set, made)),
        *(st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple)),
        *(st.dictionaries(names, inner, max_size=4), st.dictionaries(hashables, inner, max_size=4)),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, st.integers(), max_size=3).map(Counter),
        *(st.sets(hashables, max_size=4), st.builds(slice, inner, inner, inner)),
    ),
    max_leaves=12,
)
lenient = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@lenient
@given(everything)
def test_any_value_comes_back_with_type_and_content(value: object) -> None:
    assert_kept(value)


@lenient
@given(everything)
def test_what_was_decoded_encodes_to_the_same_data(value: object) -> None:
    data = codec.encode(value, key="k")

    assert json.dumps(codec.encode(codec.decode(data, key="k"), key="k")) == json.dumps(data)


def refuses_or_keeps(data: Json) -> None:
    """Foreign data is refused as such, or is a value that a later save keeps."""
    try:
        value = codec.decode(data, key="k")
    except (ManifestError, UnsupportedValueError):  # the latter for a zone that nobody has, a name nobody registered
        return
    assert_kept(value)


TAGS = sorted({tag for _, data in WRITTEN for tag in data if tag != "$$a"} | {*OF_GENERATORS, "$registered"})
json_leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), floats, st.text(max_size=6), st.integers(0, 3)),
    st.sampled_from(
        ["", "AAAA", "AACAPw==", "<f4", "float32", "C", "nan", "0x20000000000000", "cuda:1", "U", "<M8[s]"]
    ),
)
json_data = st.recursive(
    json_leaves,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=4), st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)),
        st.dictionaries(st.one_of(names, st.sampled_from(TAGS)), inner, max_size=2),
        st.builds(lambda tag, payload: {tag: payload}, st.sampled_from(TAGS), inner),
        st.fixed_dictionaries({"dtype": inner, "shape": st.lists(inner, max_size=2), "data": inner}),
    ),
    max_leaves=12,
)


@lenient
@given(json_data)
def test_arbitrary_data_is_refused_or_is_a_value(data: Json) -> None:
    refuses_or_keeps(data)


def places(data: Json) -> Iterator[tuple[Any, Any]]:
    """Every (container, index) in `data`."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for index, child in children:
        yield data, index
        yield from places(child)


@lenient
@given(everything, st.data())
def test_data_with_one_part_replaced_is_refused_or_is_a_value(value: object, draw: st.DataObject) -> None:
    holder = [codec.encode(value, key="k")]
    spots = list(places(holder))
    container, index = spots[draw.draw(st.integers(0, len(spots) - 1))]

    if draw.draw(st.booleans()):
        container[index] = draw.draw(json_data)
    elif isinstance(container, dict):
        container[draw.draw(st.sampled_from(TAGS))] = container.pop(index)
    else:
        container.append(container[index])

    refuses_or_keeps(holder[0])


@lenient
@given(everything, st.data())
def test_text_with_one_character_changed_is_refused_or_is_a_value(value: object, draw: st.DataObject) -> None:
    text = json.dumps(codec.encode(value, key="k"))
    spot = draw.draw(st.integers(0, len(text) - 1))
    other = draw.draw(st.sampled_from('0123456789abcdefxAZ+/="$[]{},:.-\\ué'))

    try:
        data = json.loads(text[:spot] + other + text[spot + 1 :])
    except ValueError:
        return
    refuses_or_keeps(data)


def test_no_two_types_share_a_written_form() -> None:
    """A missing tag would make the second one of a pair come back as the first."""
    pairs = [(1, True), (1, 1.0), (1, np.int64(1)), ([], ()), ({}, OrderedDict()), ({}, Counter()), ("a", b"a")]
    pairs += [(set(), frozenset()), (b"", bytearray()), ((2,), torch.Size([2])), (np.ones(1), torch.ones(1))]
    for first, second in pairs:
        texts = [json.dumps(codec.encode(value, key="k")) for value in (first, second)]
        assert texts[0] != texts[1]


def test_collections_are_named_once() -> None:
    """Python's own names are in the tags, so a rename there must not change the format."""
    assert [kind.__name__ for kind in (collections.OrderedDict, collections.Counter)] == ["OrderedDict", "Counter"]


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0xFFF8000000000000, 0x7FFC123400000000])
def test_a_nan_keeps_its_sign_and_payload(bits: int) -> None:
    value = struct.unpack(">d", bits.to_bytes(8, "big"))[0]
    for each in (value, complex(value, 1.0), [value]):
        found = codec.decode(codec.encode(each, key="v"), key="v")
        number = found.real if isinstance(found, complex) else found[0] if isinstance(found, list) else found
        assert struct.pack(">d", number) == bits.to_bytes(8, "big")


@pytest.mark.parametrize(
    "text", ["7ff8000000000000", "7ff0000000000000", "3ff0000000000000", "7FF8000000000001", "7ff8"]
)
def test_bits_that_are_no_nan_or_have_another_spelling_are_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="malformed float"):
        codec.decode({"$float": text}, key="v")
