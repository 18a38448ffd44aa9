"""Nested state becomes named leaves and comes back as it was; what could not come back is refused when saving."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt.errors import ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.format.codec import register
from cloudckpt.format.tree import PATH_LIMIT, Flat, flatten, unflatten
from tests.effort import examples


class Tensor:
    """Stands for a tensor, which this room never looks into."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and other.number == self.number

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Tensor({self.number})"


class Pair(NamedTuple):
    left: object
    right: object


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def flat(state: Mapping[str, object]) -> Flat:
    return flatten(state, is_tensor=is_tensor)


def rebuild(found: Flat) -> dict[str, object]:
    """Build again what went to a store and back as JSON, where leaves are elsewhere."""
    paths = msgspec.json.decode(msgspec.json.encode(found.paths))
    return unflatten(found.leaves, paths)


keys = (
    st.sampled_from(["a", "b", "a.b", "0", "", "key", "tuple", "$x", "Ω", "True"])
    | st.integers(-3, 2**70)
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.tuples(st.integers(0, 3), st.text(max_size=2))
    | st.binary(max_size=3)
)
leaves = st.builds(Tensor, st.integers(0, 99)) | st.none() | st.integers() | st.text(max_size=3)
trees = st.recursive(
    leaves,
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(keys, children, max_size=3)
        | st.dictionaries(keys, children, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, children, max_size=3).map(lambda made: defaultdict(list, made))
    ),
    max_leaves=12,
)
states = st.dictionaries(st.sampled_from(["model", "optimizer", "a", "a.b", "Ω"]), trees, max_size=4)


def same(one: object, other: object) -> bool:
    """Tell whether two states are equal, types and the order of keys included."""
    if type(one) is not type(other):
        return False
    if getattr(one, "default_factory", None) is not getattr(other, "default_factory", None):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        is_same_order = [*map(repr, one)] == [*map(repr, other)]
        return is_same_order and all(same(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])
@given(states)
def test_a_nested_state_comes_back_with_types_and_order(state: dict[str, object]) -> None:
    try:
        found = flat(state)
    except OptionsError as exc:
        assert "both named" in str(exc)  # noqa: PT017  a collision is a law of its own
        return

    assert same(rebuild(found), state)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(states)
def test_every_tensor_is_a_leaf_of_its_own(state: dict[str, object]) -> None:
    try:
        found = flat(state)
    except OptionsError:
        return

    def holds_tensor(value: object) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return is_tensor(value) or any(map(holds_tensor, inner))

    assert [leaf for leaf in found.leaves.values() if holds_tensor(leaf) and not is_tensor(leaf)] == []
    assert list(found.paths) == list(found.leaves)


def test_names_join_the_path_as_pytorch_does() -> None:
    state = {"model": {"layers.0.weight": Tensor(1)}, "optimizer": {"state": {7: {"exp_avg": Tensor(2), "step": 3}}}}

    found = flat(state)

    assert found.leaves == {
        "model.layers.0.weight": Tensor(1),
        "optimizer.state.7.exp_avg": Tensor(2),
        "optimizer.state.7.step": 3,
    }
    assert found.paths["optimizer.state.7.step"] == ["optimizer", "state", {"key": 7}, "step"]


def test_a_container_without_tensors_is_one_leaf() -> None:
    state = {"config": {"lr": 0.1, "betas": (0.9, 0.95), "nothing": {}}, "empty": [], "mixed": [Tensor(), {}, ()]}

    found = flat(state)

    assert found.leaves == {
        "config": state["config"],
        "empty": [],
        "mixed.0": Tensor(),
        "mixed.1": {},
        "mixed.2": (),
    }
    assert same(rebuild(found), state)


def test_leaves_are_the_objects_of_the_state_and_not_copies() -> None:
    state = {"tensor": Tensor(), "config": {"lr": [0.1]}}

    found = flat(state)

    assert found.leaves["tensor"] is state["tensor"]
    assert found.leaves["config"] is state["config"]


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": Tensor(1)}, "a.b": Tensor(2)},
        {"a": {0: Tensor(1), "0": Tensor(2)}},
        {"a": [Tensor(1)], "a.0": 5},
        {"a": ({"b": Tensor(1)}, 2), "a.0.b": Tensor(2)},
        {"a": {True: Tensor(1), "True": 1}},
    ],
    ids=["dot", "int key", "list", "tuple", "bool key"],
)
def test_two_leaves_of_one_name_are_refused(state: dict[str, object]) -> None:
    with pytest.raises(OptionsError, match="are both named 'a"):
        flat(state)


@pytest.mark.parametrize(
    "value",
    [
        *(Pair(Tensor(), 1), MappingProxyType({"x": Tensor()}), type("Listed", (list,), {})([Tensor()])),
        *(type("Named", (dict,), {})(x=Tensor()), Counter(x=Tensor())),
    ],
    ids=["namedtuple", "mapping", "list subclass", "dict subclass", "counter"],
)
def test_a_container_with_tensors_that_could_not_be_built_again_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedValueError, match=f"'a.x' is a {type(value).__name__}") as caught:
        flat({"a": {"x": value}})

    assert (caught.value.key, caught.value.type_name) == ("a.x", type(value).__name__)


def test_a_container_without_tensors_may_be_of_any_type() -> None:
    """The codec decides about values, and refuses those that it cannot keep."""
    assert flat({"a": Pair(1, 2)}).leaves == {"a": Pair(1, 2)}


@pytest.mark.parametrize(
    "make",
    [OrderedDict, *(partial(defaultdict, kind) for kind in (None, int, list, dict, set, tuple, OrderedDict))],
    ids=repr,
)
def test_a_dict_around_tensors_comes_back_as_the_dict_that_it_was(make: Any) -> None:
    inner = make([("b", Tensor(1)), (3, 5), ("$x", make([((1, "k"), Tensor(2))]))])
    state = {"model": inner, "deep": [{"x": make(a=Tensor(3))}]}

    twin = rebuild(flat(state))

    assert same(twin, state)
    assert list(flat(state).leaves) == ["model.b", "model.3", "model.$x.{'$tuple': [1, 'k']}", "deep.0.x.a"]


def test_a_default_dict_around_tensors_whose_factory_is_code_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match=r"'a\.x': its default factory is code") as caught:
        flat({"a": {"x": defaultdict(lambda: 0, t=Tensor())}})

    assert (caught.value.key, caught.value.type_name) == ("a.x", "defaultdict")


class Registered(NamedTuple):
    left: object


def test_a_registered_type_around_tensors_is_one_value() -> None:
    """The codec keeps it, with its tensors, by the functions that it was registered with."""
    register(Registered, name="tests.format.test_tree.Registered")
    assert flat({"a": [Registered(Tensor()), Tensor()]}).leaves == {"a.0": Registered(Tensor()), "a.1": Tensor()}


def _cycle_through_dict() -> object:
    state: dict[str, object] = {"tensor": Tensor()}
    state["self"] = state
    return state


def _cycle_before_the_tensor() -> object:
    state: dict[str, object] = {}
    state["self"] = state
    state["tensor"] = Tensor()
    return state


def _cycle_through_list() -> object:
    state: list[object] = [Tensor(), 1]
    state.append([state])
    return state


def _cycle_without_tensor() -> object:
    state: dict[str, object] = {}
    state["self"] = [state, state]
    return state


def _deep(levels: int, leaf: object) -> object:
    for _ in range(levels):
        leaf = [leaf]
    return leaf


@pytest.mark.parametrize(
    "value",
    [
        _cycle_through_dict(),
        _cycle_before_the_tensor(),
        _cycle_through_list(),
        _cycle_without_tensor(),
        _deep(PATH_LIMIT, Tensor()),
        [Tensor(), _deep(PATH_LIMIT, Tensor())],
        _deep(100_000, 1),
    ],
    ids=["dict", "first", "list", "no tensor", "deep", "deep beside a tensor", "very deep value"],
)
def test_a_state_that_holds_itself_or_is_too_deep_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedValueError, match="nested deeper than 65 levels or holds itself"):
        flat({"a": value})


def test_the_deepest_state_that_is_taken_comes_back() -> None:
    state = {"a": _deep(PATH_LIMIT - 1, Tensor())}

    assert same(rebuild(flat(state)), state)


def test_a_value_that_is_held_many_times_is_looked_at_once() -> None:
    """2**60 ways lead to the innermost list; only the codec may say that this is too much."""
    value: object = [1]
    for _ in range(60):
        value = [value, value]

    assert flat({"a": value, "b": {"t": Tensor(), "v": value}}).leaves == {"a": value, "b.t": Tensor(), "b.v": value}


@pytest.mark.parametrize(
    "key",
    [float("nan"), (float("nan"), 1), Tensor(), object(), type("Named", (str,), {})("x")],
    ids=["nan", "nan in a tuple", "tensor", "object", "another string"],
)
def test_a_key_that_would_not_come_back_is_refused(key: Any) -> None:
    with pytest.raises(UnsupportedValueError, match=r"^a\b|'a'"):
        flat({"a": {key: {"x": Tensor(), "y": Tensor()}}})


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match=r"'a\.\\udc80' has lone surrogates") as caught:
        flat({"a": {"\udc80": Tensor()}})

    assert caught.value.key == "a.\udc80"


# -- building ------------------------------------------------------------------------------------------------


def test_a_name_without_a_path_is_a_top_level_key() -> None:
    assert unflatten({"a.b": 1, "c": 2}, {"c": ["x", "y"]}) == {"x": {"y": 2}, "a.b": 1}


def test_a_path_without_a_leaf_is_skipped() -> None:
    """A partial load has the paths of the whole checkpoint."""
    assert unflatten({"a": 1}, {"b": ["b"], "a": ["x", "a"]}) == {"x": {"a": 1}}


def test_places_may_come_in_any_order() -> None:
    paths = {"c": ["x", 2], "a": ["x", 0], "b": ["x", 1]}

    assert unflatten({"a": "A", "b": "B", "c": "C"}, paths) == {"x": ["A", "B", "C"]}


CONTRADICTIONS: dict[str, list[list[Any]]] = {
    "empty path": [[]],
    "too deep": [["x"] * (PATH_LIMIT + 1)],
    "starts in a list": [[0]],
    "starts in a tuple": [[{"tuple": 0}]],
    "starts with an int key": [[{"key": 5}]],
    "the same twice": [["x"], ["x"]],
    "the same twice, spelled differently": [["x", "a"], ["x", {"key": "a"}]],
    "leaf, then container": [["x"], ["x", "y"]],
    "container, then leaf": [["x", "y"], ["x"]],
    "dict and list": [["x", "y"], ["x", 0]],
    "list and tuple": [["x", 0], ["x", {"tuple": 1}]],
    "list and dict with int key": [["x", 0], ["x", {"key": 1}]],
    "a hole": [["x", 0], ["x", 2]],
    "a place without its first": [["x", 1]],
    "a negative place": [["x", 0], ["x", -1]],
    "a huge place": [["x", 2**60]],
    "a hole in a tuple": [["x", {"tuple": 1}]],
    "a bool as a place": [["x", {"tuple": 0}], ["x", {"tuple": True}]],
    "a bool as a place in a list": [["x", 0], ["x", True]],
    "a float as a place": [["x", {"tuple": 0.0}]],
    "null as a place": [["x", {"tuple": None}]],
    "a text as a place": [["x", {"tuple": "0"}]],
    "dict and ordered dict": [["x", "a"], ["x", {"OrderedDict": "b"}]],
    "ordered dict and int key": [["x", {"OrderedDict": 1}], ["x", {"key": 2}]],
    "two factories": [["x", {"defaultdict": ["int", "a"]}], ["x", {"defaultdict": ["list", "b"]}]],
    "a factory that is none": [["x", {"defaultdict": ["eval", "a"]}]],
    "a factory that is a number": [["x", {"defaultdict": [1, "a"]}]],
    "a factory that is a list": [["x", {"defaultdict": [["int"], "a"]}]],
    "a default dict without a factory": [["x", {"defaultdict": "a"}]],
    "a default dict of three": [["x", {"defaultdict": ["int", "a", 1]}]],
    "a list as a key of an ordered dict": [["x", {"OrderedDict": [1]}]],
    "a step in a named tuple": [["x", {"namedtuple": 0}]],
    "an empty step": [["x", {}]],
    "an unknown step": [["x", {"set": 0}]],
    "two steps in one": [["x", {"key": 1, "tuple": 0}]],
    "a step of null": [["x", None]],
    "a step that is a list": [["x", [0]]],
    "a list as a key": [["x", {"key": [1]}]],
    "a dict as a key": [["x", {"key": {"a": 1}}]],
    "a tensor as a key": [["x", {"key": {"$torch.tensor": {"dtype": "uint8", "shape": [], "data": "AA=="}}}]],
    "an array in a tuple as a key": [["x", {"key": {"$tuple": [{"$tuple": [[1]]}]}}]],
    "an unknown tag as a key": [["x", {"key": {"$eval": "1"}}]],
    "a key beyond plain ints": [["x", {"key": 2**60}]],
}


@pytest.mark.parametrize("paths", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictory_paths_are_refused(paths: list[list[Any]]) -> None:
    named = {str(number): path for number, path in enumerate(paths)}

    with pytest.raises(ManifestError, match="restore an older step"):
        unflatten(dict.fromkeys(named, 1), named)


steps = (
    st.sampled_from(["a", "b"])
    | st.integers(-1, 2)
    | st.fixed_dictionaries({"OrderedDict": st.sampled_from(["a", 0])})
    | st.fixed_dictionaries({"defaultdict": st.lists(st.sampled_from(["int", "a", None, 0]), max_size=3)})
    | st.fixed_dictionaries({"tuple": st.integers(-1, 2) | st.booleans() | st.none()})
    | st.fixed_dictionaries({"key": st.integers(0, 2) | st.sampled_from(["a", None, [1], {"$tuple": [1]}, {"$x": 1}])})
)


@settings(max_examples=examples(500))
@given(st.lists(st.lists(steps, max_size=4), max_size=6))
def test_any_paths_build_a_state_or_are_refused(paths: list[list[Any]]) -> None:
    named = {str(number): path for number, path in enumerate(paths)}
    try:
        state = unflatten({name: Tensor(int(name)) for name in named}, named)
    except ManifestError:
        return

    again = flat(state)
    assert sorted(leaf.number for leaf in again.leaves.values()) == list(range(len(paths)))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "step",
    [lambda number: number * (2**61 - 1), lambda number: {"key": {"$int": hex((number + 1) * (2**61 - 1))}}],
    ids=["places", "keys"],
)
def test_keys_chosen_to_share_a_hash_are_refused_before_they_cost_quadratic_time(step: Any) -> None:
    paths = {str(number): ["x", step(number)] for number in range(100_000)}

    with pytest.raises(ManifestError, match="keys of one hash"):
        unflatten(dict.fromkeys(paths, 1), paths)


def test_a_message_about_foreign_names_is_short_and_printable() -> None:
    name = "\x1b[31m\n" + "a" * 1_000_000

    with pytest.raises(ManifestError) as caught:
        unflatten({name: 1}, {name: ["x", {"key": 1, name: 2}]})

    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
