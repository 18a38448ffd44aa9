"""What differs between ranks is saved as the first rank has it, and every rank gets that, but for what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cloudckpt
from cloudckpt import OptionsError, PerRank, RankZero, SaveFailedError
from tests.ranks.processes import run


class Trainer:
    """An object whose state differs between ranks, and that counts how often it was asked."""

    def __init__(self, rank: int) -> None:
        self.state: dict[str, Any] = {"step": rank, "is_zero": rank == 0, "log": [torch.full((2,), float(rank))]}
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _state(rank: int, shift: int = 0) -> dict[str, Any]:
    return {
        "plain": RankZero({"at": rank + shift, "is_zero": rank == 0, "big": bytes([rank]) * 100_000}, own=["is_zero"]),
        "number": RankZero(rank + shift),
        "tensors": RankZero({"w": torch.full((2 + rank,), float(rank + shift)), **({"extra": 1} if rank else {})}),
        "trainer": RankZero(Trainer(rank + shift), own=["is_zero"]),
        "model": nn.Linear(1, 1, bias=False),
    }


def _save(url: str) -> object:
    state = _state(dist.get_rank())
    nn.init.ones_(state["model"].weight)
    cloudckpt.save(state, url, progress="off")
    return state["trainer"].value.asked


def _load(url: str) -> object:
    rank = dist.get_rank()
    state = _state(rank, shift=5)
    state["trainer"].value.state["is_zero"] = rank == 0
    held = state["plain"].value
    cloudckpt.load(state, url, progress="off")
    trainer = state["trainer"].value.state
    return (
        {**held, "big": held["big"] == bytes(100_000)},
        state["number"].value,
        {name: part.tolist() for name, part in state["tensors"].value.items()},
        {**trainer, "log": trainer["log"][0].tolist()},
        state["model"].weight.item(),
    )


def test_every_rank_gets_what_the_first_one_had_beside_its_own_keys(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/c"
    assert run(2, _save, url) == [1, 0]  # the second rank is not asked
    for rank, outcome in enumerate(run(3, _load, url)):
        assert outcome == (
            {"at": 0, "is_zero": rank == 0, "big": True},
            0,
            {"w": [0.0, 0.0]},
            {"step": 0, "is_zero": rank == 0, "log": [0.0, 0.0]},
            1.0,
        )
    found = cloudckpt.read(tmp_path / "c", ["plain", "number", "trainer"], progress="off")
    assert found["plain"] == {"at": 0, "big": bytes(100_000)}
    assert found["number"] == 0
    assert found["trainer"]["step"] == 0  # type: ignore[call-overload, index]


def _refused(state: dict[str, Any], url: str) -> str:
    with pytest.raises(SaveFailedError) as caught:
        cloudckpt.save(state, url, progress="off")
    return str(caught.value)


def _save_unlike(url: str) -> str:
    return _refused({"marked": RankZero(dist.get_rank()), "plain": dist.get_rank()}, url)


def test_what_is_not_marked_and_differs_is_refused_as_ever(tmp_path: Path) -> None:
    for outcome in run(2, _save_unlike, f"file://{tmp_path}/c"):
        assert "'plain' differs between rank 0 and rank 1: 0 and 1" in outcome
        assert "marked" not in outcome


def _save_distributed(url: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    return _refused({"t": RankZero([distribute_tensor(torch.ones(4), mesh, [Shard(0)])])}, url)


def test_a_distributed_tensor_is_no_one_rank_s(tmp_path: Path) -> None:
    for outcome in run(2, _save_distributed, f"file://{tmp_path}/c"):
        assert "'t.0' is a distributed tensor, of which the first rank has a part" in outcome


def test_marked_and_unmarked_are_restored_into_each_other(tmp_path: Path) -> None:
    cloudckpt.save({"a": RankZero({"x": 1}), "b": 2}, tmp_path / "c", progress="off")
    state: dict[str, Any] = {"a": {}, "b": RankZero(0)}
    cloudckpt.load(state, tmp_path / "c", progress="off")
    assert (state["a"], state["b"].value) == ({"x": 1}, 2)


def test_a_value_is_updated_where_it_is_held(tmp_path: Path) -> None:
    cloudckpt.save({"a": RankZero({"x": [1, 2], "own": 9}, own="own")}, tmp_path / "c", progress="off")
    held: dict[str, Any] = {"x": [], "own": 3, "y": 0}
    inner = held["x"]
    cloudckpt.load({"a": RankZero(held, own="own")}, tmp_path / "c", progress="off")
    assert held == {"x": [1, 2], "own": 3}
    assert held["x"] is inner


@pytest.mark.parametrize(
    ("value", "own"),
    [
        (nn.Linear(1, 1), ()),
        ({"a": [nn.Linear(1, 1)]}, ()),
        (PerRank(Trainer(0)), ()),
        ([Trainer(0)], ()),
        (RankZero(1), ()),
        (3, ["x"]),
    ],
    ids=["module", "module-within", "per-rank", "object-within", "twice", "no-keys"],
)
def test_what_all_ranks_share_or_each_has_for_itself_is_not_marked(value: object, own: list[str]) -> None:
    with pytest.raises(OptionsError, match=r"RankZero is for|has no keys"):
        RankZero(value, own=own)
