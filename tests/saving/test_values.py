"""Values are the same on all ranks, in whatever order their dicts were filled; else the place that differs is named."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt import Options, SaveFailedError
from cloudckpt.format import codec
from cloudckpt.saving.values import (
    describe_difference,
    differences_of,
    digest_of_values,
    digests_of,
    refuse_values,
    wanted_values,
)
from tests.ranks.processes import run

CALM = Options(progress_timeout_s=60)


def encoded(**values: object) -> dict[str, Any]:
    return {name: codec.encode(value, key=name) for name, value in values.items()}


ALIKE = [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ([{"x": {"a": 1, "b": 2}}], [{"x": {"b": 2, "a": 1}}]),
    ({1: "a", 2: "b"}, {2: "b", 1: "a"}),
    ({"k": {(1, 2): {3: 4, 5: 6}, "z": 0}}, {"k": {"z": 0, (1, 2): {5: 6, 3: 4}}}),
    (Counter("aab"), Counter("baa")),
    ({1, 2, 3}, {3, 2, 1}),
]
DIFFERENT = [
    (0.1, 0.2, "0.1 and 0.2"),
    (1, 1.0, "1 and 1.0"),
    (1, True, "1 and True"),
    ([1], (1,), "[1] and (1,)"),
    ({"optim": {"lr": [0.1, 0.2]}}, {"optim": {"lr": [0.1, 0.3]}}, "0.2 and 0.3 at ['optim']['lr'][1]"),
    ({"a": (1, {2: "x"})}, {"a": (1, {2: "y"})}, "'x' and 'y' at ['a'][1][2]"),
    ({"a": 1}, {"a": 1, "b": None}, "nothing and None at ['b']"),
    ([1, 2], [1], "2 and nothing at [1]"),
    ({"$x": 1}, {"$x": 2}, "1 and 2 at ['$x']"),
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), "OrderedDict"),
    ("x" * 200, "x" * 199 + "y", f"'{'x' * 58}… and '{'x' * 58}…"),
    (b"\0\1", b"\0\2", r"b'\x00\x01' and b'\x00\x02'"),
    ({"t": torch.tensor([1])}, {"t": torch.tensor([2])}, "tensor([1]) and tensor([2]) at ['t']"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_the_order_of_a_dict_is_no_difference(one: object, other: object) -> None:
    assert digests_of(encoded(v=one)) == digests_of(encoded(v=other))
    assert digest_of_values(encoded(v=one, w=1)) == digest_of_values(encoded(w=1, v=other))


@pytest.mark.parametrize(("one", "other", "said"), DIFFERENT)
def test_what_differs_is_shown_with_the_way_to_it(one: object, other: object, said: str) -> None:
    left, right = encoded(v=one), encoded(v=other)
    assert digest_of_values(left) != digest_of_values(right)
    assert said in describe_difference(left["v"], right["v"])


def test_names_and_values_do_not_run_into_each_other() -> None:
    assert digest_of_values(encoded(a=1, b=2)) != digest_of_values(encoded(a=2, b=1))
    assert digest_of_values(encoded(a=1)) != digest_of_values(encoded(a=1, b=1))


def test_ranks_are_told_what_is_missing_and_what_differs_and_the_rest_is_counted() -> None:
    ranks = [encoded(lr=0.1, **{f"v{n:02}": n for n in range(20)}), encoded(lr=0.1), encoded(lr=0.2)]
    differences = differences_of([digests_of(values) for values in ranks])
    found = [wanted_values(values, differences, rank) for rank, values in enumerate(ranks)]
    assert [sorted(of_rank) for of_rank in found] == [["lr", *(f"v{n:02}" for n in range(7))], [], ["lr"]]
    with pytest.raises(SaveFailedError) as caught:
        refuse_values(differences, found)
    assert "'lr' differs between ranks 0-1 and rank 2: 0.1 and 0.2; 'v00' is missing on ranks 1-2; " in str(
        caught.value
    )
    assert "; and 13 more. Give every rank the same values" in str(caught.value)


# -- ranks --------------------------------------------------------------------------------------------------------


def save_in_an_order_of_its_own(url: str) -> list[str]:
    names = ["a", "b", "c"] if dist.get_rank() else ["c", "b", "a"]
    state = {
        "config": {name: {1: name, 2: [name]} for name in names},
        "mixed": {name: torch.ones(2) if name == "b" else ord(name) for name in names},
    }
    cloudckpt.save(state, url, options=CALM)
    found: Any = cloudckpt.read(url)
    assert found["config"] == state["config"]
    return [*found["config"], *found["mixed"]]


def test_the_order_of_rank_0_is_written_where_dicts_differ_in_their_order(tmp_path: Path) -> None:
    assert run(2, save_in_an_order_of_its_own, str(tmp_path / "c")) == [["c", "b", "a"] * 2] * 2


def save_with_other_containers(url: str) -> str:
    tensors = [torch.ones(1), torch.ones(2)]
    state: dict[str, Any] = {"alike": tensors, "a": {"b": tuple(tensors) if dist.get_rank() else tensors}}
    with pytest.raises(SaveFailedError) as caught:
        cloudckpt.save(state, url, options=CALM)
    return str(caught.value)


def test_containers_of_tensors_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    for text in run(2, save_with_other_containers, str(tmp_path / "c")):
        assert "'a.b.0' is state['a']['b'][0] on rank 0 and state['a']['b'](0) on rank 1" in text
        assert "'alike" not in text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def save_a_tensor_beside_a_value(url: str) -> str:
    state: dict[str, Any] = {"w": torch.ones(2), "best": torch.tensor(0.5) if dist.get_rank() else 0.5}
    with pytest.raises(SaveFailedError) as caught:
        cloudckpt.save(state, url, options=CALM)
    return str(caught.value)


def test_a_value_that_is_a_tensor_on_another_rank_is_named(tmp_path: Path) -> None:
    for text in run(2, save_a_tensor_beside_a_value, str(tmp_path / "c")):
        assert "'best' is a value on rank 0 and a tensor on rank 1" in text
    assert not (tmp_path / "c").exists()
