"""A type of the program's own comes back by the name that it was registered with, or the load says what to register."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import OptionsError, StateMismatchError, UnsupportedValueError
from cloudckpt.errors import IntegrityError
from cloudckpt.format import codec
from cloudckpt.format.codec import registry


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test register what it likes."""
    monkeypatch.setattr(registry, "_BY_KIND", dict(registry._BY_KIND))
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    monkeypatch.setattr(registry, "_BY_ID", dict(registry._BY_ID))


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: object
    y: object = 0


@dataclasses.dataclass
class Config:
    width: int
    layers: list[Any] = dataclasses.field(default_factory=list)

    @cached_property
    def doubled(self) -> int:
        return 2 * self.width


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    name: str


class Vocabulary:
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    __hash__ = None  # type: ignore[assignment]


def register_all() -> None:
    for kind in (Colour, Mode, Point, Config, Key):
        cloudckpt.register(kind, name=f"tests.{kind.__name__}")
    cloudckpt.register(Vocabulary, name="words", encode=lambda value: value.words, decode=Vocabulary)


def round_trip(value: object) -> Any:
    return codec.decode(codec.encode(value, key="v"), key="v")


VALUES: list[object] = [
    *(Colour.GREEN, Mode.READ | Mode.WRITE, Point(1, (2,)), Point(Point(1), Colour.RED), Config(3, [Config(4)])),
    *(Key("a"), Vocabulary(["a", "b"]), {Colour.RED: 1, Key("x"): 2, Point(1, 2): 3}, {Colour.RED, Key("x")}),
    {"deep": [(Vocabulary([]),), deque([Mode.WRITE])]},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_of_a_registered_type_comes_back_as_that_type(value: object) -> None:
    register_all()
    twin = round_trip(value)
    assert type(twin) is type(value)
    assert twin == value
    assert not isinstance(value, enum.Enum) or twin is value


def test_what_is_written_is_the_name_and_no_way_to_import_it() -> None:
    register_all()
    assert codec.encode(Config(3, []), key="v") == {"$registered": ["tests.Config", {"width": 3, "layers": []}]}
    assert codec.encode(Colour.RED, key="v") == {"$registered": ["tests.Colour", "RED"]}
    assert codec.encode(Mode.WRITE, key="v") == {"$registered": ["tests.Mode", 2]}
    assert codec.encode(Vocabulary(["a"]), key="v") == {"$registered": ["words", ["a"]]}


def test_a_cached_property_is_made_again_and_another_attribute_is_refused() -> None:
    register_all()
    config = Config(3)
    assert config.doubled == 6
    assert round_trip(config) == config
    config.note = "kept nowhere"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedValueError, match=r"v\[0\].*no fields: note"):
        codec.encode([config], key="v")


def test_a_subclass_of_a_registered_type_is_refused() -> None:
    register_all()

    class Wider(Config):
        pass

    with pytest.raises(UnsupportedValueError, match=r"cloudckpt\.register"):
        codec.encode(Wider(1), key="v")


def test_large_payloads_of_a_registered_value_go_to_its_parts() -> None:
    register_all()
    parts = codec.Parts()
    data = codec.encode(Config(1, [torch.arange(400_000)]), key="v", parts=parts)
    held = dict(enumerate(parts.tensors("v").values(), start=1))
    twin: Any = codec.decode(data, key="v", parts=held)
    assert torch.equal(twin.layers[0], torch.arange(400_000))


def test_a_value_that_contains_itself_or_unfolds_without_end_is_refused() -> None:
    register_all()
    config = Config(1)
    config.layers.append(config)
    with pytest.raises(UnsupportedValueError, match="contains itself"):
        codec.encode(config, key="v")
    cloudckpt.register(Endless, name="endless", encode=lambda _: Endless(), decode=lambda _: Endless())
    with pytest.raises(UnsupportedValueError, match="deeper"):
        codec.encode(Endless(), key="v")


class Endless:
    pass


# -- what does not fit -----------------------------------------------------------------------------------------------


def unregistered(name: str) -> None:
    del registry._BY_KIND[registry._BY_NAME.pop(name).kind]


def test_a_name_that_nobody_registered_is_told_and_is_no_damage(tmp_path: Path) -> None:
    register_all()
    saved = cloudckpt.save({"config": Config(3), "w": torch.ones(2)}, tmp_path / "c")
    unregistered("tests.Config")
    live: dict[str, object] = {"config": None, "w": torch.zeros(2)}

    with pytest.raises(
        UnsupportedValueError, match=r"config is of a type .* 'tests.Config'.*cloudckpt.register"
    ) as caught:
        cloudckpt.load(live, saved.url)

    assert not isinstance(caught.value, IntegrityError)
    assert (caught.value.key, caught.value.type_name) == ("config", "tests.Config")
    assert torch.equal(live["w"], torch.zeros(2))  # type: ignore[arg-type]
    alone = {"w": torch.zeros(2)}
    with pytest.raises(StateMismatchError, match="config"):
        cloudckpt.load(alone, saved.url)
    cloudckpt.load(alone, saved.url, strict=False)
    assert alone["w"].tolist() == [1.0, 1.0]
    assert cloudckpt.read(saved.url, "w")["w"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]


def test_a_registered_value_is_restored_by_another_class_of_the_same_name(tmp_path: Path) -> None:
    register_all()
    saved = cloudckpt.save({"words": Vocabulary(["a", "b"])}, tmp_path / "c")
    unregistered("words")
    unregistered("tests.Key")
    cloudckpt.register(Key, name="words", encode=lambda key: [key.name], decode=lambda words: Key("".join(words)))
    assert cloudckpt.read(saved.url) == {"words": Key("ab")}


@pytest.mark.parametrize("failing", ["encode", "decode"])
def test_an_error_of_the_program_s_own_function_is_told_with_its_place(failing: str) -> None:
    def fail(_: object) -> Any:
        raise ZeroDivisionError("mine")

    functions = {"encode": lambda value: value.words, "decode": Vocabulary, failing: fail}
    cloudckpt.register(Vocabulary, name="words", **functions)
    with pytest.raises(UnsupportedValueError, match=rf"v\[1\].*{failing}.*mine") as caught:
        round_trip([0, Vocabulary([])])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_decode_that_makes_another_type_is_refused() -> None:
    cloudckpt.register(Vocabulary, name="words", encode=lambda value: value.words, decode=list)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedValueError, match="made a list"):
        round_trip(Vocabulary([]))


def test_an_enum_member_that_is_gone_is_told() -> None:
    register_all()
    with pytest.raises(UnsupportedValueError, match=r"v cannot be had.*'BLUE'"):
        codec.decode({"$registered": ["tests.Colour", "BLUE"]}, key="v")


@dataclasses.dataclass
class Derived:
    width: int
    area: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass
class Output(dict[str, int]):
    """What it holds stands in two places."""

    k: int = 0


@dataclasses.dataclass
class Scaled:
    """Makes something else of what it is given."""

    rate: float
    area: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.rate *= 4
        self.area = self.rate**2


def test_a_dataclass_comes_back_by_its_fields_and_not_by_its_constructor() -> None:
    cloudckpt.register(Scaled, name="Scaled of the registry's tests")
    value = Scaled(0.1)
    assert codec.decode(codec.encode(value, key="v"), key="v") == value


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: cloudckpt.register(Vocabulary, name="v"), "both encode= and decode="),
        (lambda: cloudckpt.register(Output, name="d"), "both encode= and decode="),
        (lambda: cloudckpt.register(Config, name="c", encode=dataclasses.asdict), "both encode= and decode="),
        (lambda: cloudckpt.register(Config, name=""), "printable name"),
        (lambda: cloudckpt.register(Config, name="a\nb"), "printable name"),
        (lambda: cloudckpt.register(Config(1), name="a"), "takes a type"),  # type: ignore[arg-type]
        *[
            (lambda kind=kind: cloudckpt.register(kind, name="k", encode=str, decode=kind), "kept as it is")
            for kind in (int, dict, torch.Tensor, np.ndarray, np.float32, deque)
        ],
    ],
)
def test_a_registration_that_cannot_work_is_refused(call: Any, reason: str) -> None:
    with pytest.raises(OptionsError, match=reason):
        call()


def test_one_name_is_one_type_s_and_one_type_has_one_name() -> None:
    cloudckpt.register(Colour, name="c")
    cloudckpt.register(Colour, name="c")
    with pytest.raises(OptionsError, match="registered name of Colour"):
        cloudckpt.register(Mode, name="c")
    with pytest.raises(OptionsError, match="registered as 'c'"):
        cloudckpt.register(Colour, name="d")


def test_a_class_that_was_made_anew_takes_the_name_over() -> None:
    """So does every class of a module that is loaded again, and of a cell that runs again."""

    def cell() -> type:
        @dataclasses.dataclass
        class Again:
            x: int

        return Again

    first, second = cell(), cell()
    cloudckpt.register(first, name="again")
    data = codec.encode(first(1), key="v")
    cloudckpt.register(second, name="again")
    assert type(codec.decode(data, key="v")) is second
    with pytest.raises(UnsupportedValueError):
        codec.encode(first(1), key="v")


# -- functions and classes ----------------------------------------------------------------------------------


def scaled(value: float, by: float = 1.0) -> float:
    return value * by


@pytest.mark.parametrize(
    "code",
    [scaled, len, torch.nn.functional.gelu, torch.nn.GELU, Colour],
    ids=["python", "built-in", "torch", "class", "enum"],
)
def test_code_that_has_a_name_comes_back_as_itself(code: Any) -> None:
    cloudckpt.register_code(code, name="test.code")
    data = codec.encode({"act": [code]}, key="hparams")
    assert data == {"act": [{"$registered": ["test.code", None]}]}
    assert codec.decode(data, key="hparams")["act"][0] is code  # type: ignore[index]


def test_a_partial_of_code_that_has_a_name_comes_back_with_all_of_its_arguments() -> None:
    cloudckpt.register_code(scaled, name="test.scaled")
    made = partial(scaled, 3.0, by=torch.tensor(2.0))
    found = codec.decode(codec.encode(made, key="loss"), key="loss")
    assert isinstance(found, partial)
    assert (found.func, found.args, found()) == (scaled, (3.0,), torch.tensor(6.0))


def test_a_partial_of_other_code_is_refused_with_the_way_to_it_and_the_way_out() -> None:
    with pytest.raises(
        UnsupportedValueError, match=r"^hparams\.loss\.function \(function\) .*register_code\(value, name"
    ) as caught:
        codec.encode({"loss": partial(scaled, 1.0)}, key="hparams")
    assert caught.value.key == "hparams.loss.function"
    with_attributes: Any = partial(len)
    with_attributes.note = 1
    with pytest.raises(UnsupportedValueError, match=r"^loss .*attributes, which would be lost"):
        codec.encode(with_attributes, key="loss")


def test_code_that_this_program_has_not_named_is_asked_for_by_name() -> None:
    with pytest.raises(
        UnsupportedValueError, match=r"registered as 'other\.code'; call .* or register_code, before the load"
    ):
        codec.decode({"$registered": ["other.code", None]}, key="act")


@pytest.mark.parametrize(
    "data",
    [
        {"function": 1, "args": {"$tuple": []}, "keywords": {}},
        {"function": {"$registered": ["test.scaled", None]}, "args": [], "keywords": {}},
        {"function": {"$registered": ["test.scaled", None]}, "args": {"$tuple": []}, "keywords": {"$dict": [[1, 2]]}},
        {"function": {"$registered": ["test.scaled", None]}},
        [],
    ],
)
def test_a_partial_in_foreign_data_is_an_integrity_error_and_nothing_is_called(data: Any) -> None:
    cloudckpt.register_code(scaled, name="test.scaled")
    with pytest.raises(IntegrityError, match=r"is no functools\.partial"):
        codec.decode({"$functools.partial": data}, key="loss")


def test_one_name_is_one_thing_and_one_thing_has_one_name() -> None:
    cloudckpt.register_code(scaled, name="a")
    cloudckpt.register_code(scaled, name="a")  # again, as in a notebook
    cloudckpt.register(Colour, name="b")
    for code, name, told in [
        (len, "a", "is the registered name of scaled"),
        (scaled, "c", "scaled is registered as 'a'"),
        (len, "b", "is the registered name of Colour"),
        (Colour, "b", "is the registered name of values of Colour"),
        (3, "d", "takes a function or a class"),
        (len, "", "takes a function or a class"),
    ]:
        with pytest.raises(OptionsError, match=told):
            cloudckpt.register_code(code, name=name)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="is the registered name of scaled"):
        cloudckpt.register(Point, name="a")


def test_a_tag_of_a_later_release_is_refused_by_name() -> None:
    with pytest.raises(IntegrityError, match=r"^x\.y has the tag '\$later', which this release does not know"):
        codec.decode({"y": {"$later": 1}}, key="x")
