"""Of a module in DistributedDataParallel the buffers are its first rank's, as it broadcasts them; all else is alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cloudckpt
from cloudckpt import CheckpointManager, Options, SaveFailedError
from cloudckpt.state.replicas import buffers_of_others
from tests.ranks.processes import run

CALM = Options(progress_timeout_s=60)


def normed() -> nn.Module:
    torch.manual_seed(0)
    # Large enough that its buffers are worth spreading, so that ranks but the first would write some.
    return nn.Sequential(nn.Linear(4, 512), nn.BatchNorm1d(512), nn.Linear(512, 1), nn.BatchNorm1d(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * number + dist.get_rank()))
    optimizer.zero_grad()
    model(data).square().sum().backward()
    optimizer.step()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def train(url: str, how: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Take six steps, and three and three with a save between; return what is left of both."""

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model: nn.Module = DistributedDataParallel(normed())
        if how == "inside":
            model = nn.ModuleDict({"backbone": model})
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *numbers: int) -> None:
        for number in numbers:
            step(model["backbone"] if isinstance(model, nn.ModuleDict) else model, optimizer, number)

    straight, optimizer = begin()
    steps(straight, optimizer, 0, 1, 2, 3, 4, 5)
    model, optimizer = begin()
    steps(model, optimizer, 0, 1, 2)
    state = {"model": model, "optimizer": optimizer}
    with CheckpointManager(url, options=CALM) as manager:
        if how == "async":
            manager.async_save(1, state)
            manager.wait()
        manager.save(3, state)
    model, optimizer = begin()
    with CheckpointManager(url, options=CALM) as manager:
        manager.restore({"model": model, "optimizer": optimizer})
    steps(model, optimizer, 3, 4, 5)
    return bits(straight), bits(model)


@pytest.mark.parametrize("how", ["plain", "inside", "async"])
def test_three_steps_and_three_more_are_six_on_every_rank(tmp_path: Path, how: str) -> None:
    for straight, resumed in run(2, train, str(tmp_path), how):
        assert {name for name in straight if straight[name] != resumed[name]} == set()


def save_unlike(url: str, how: str) -> str:
    rank = dist.get_rank()
    model = normed()
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["1.running_mean"])  # type: ignore[no-untyped-call]
    wrapped = DistributedDataParallel(model, broadcast_buffers=how != "not broadcast")
    if how == "hook":
        wrapped._register_buffer_comm_hook(None, lambda *_: None)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        (model[0].weight if how == "parameter" else model[1].running_mean)[3] += rank  # type: ignore[index,operator,union-attr]
    state = {"model": model if how == "without the wrapper" else wrapped}
    try:
        cloudckpt.save(state, url, options=CALM)
    except SaveFailedError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize("how", ["not broadcast", "ignored", "hook", "without the wrapper", "parameter"])
def test_what_ddp_does_not_broadcast_must_be_the_same(tmp_path: Path, how: str) -> None:
    name = "model.0.weight" if how == "parameter" else "model.1.running_mean"
    for text in run(2, save_unlike, str(tmp_path / "c"), how):
        assert f"'{name}' " in text
        assert "differs between rank 0 and rank 1" in text
        assert "give the wrapper itself" in text
        assert "running_var" not in text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def save_two_stages(url: str) -> Any:
    rank = dist.get_rank()
    group = dist.new_group([1, 2])
    if rank == 0:
        state: dict[str, Any] = {"first": nn.Linear(2, 2)}
    else:
        state = {"second": DistributedDataParallel(normed(), process_group=group)}
        state["second"].module[1].running_mean.fill_(rank)
    cloudckpt.save(state, url, options=CALM)
    found: Any = cloudckpt.read(url, "second.1.running_mean")
    return found["second"]["1.running_mean"].unique().tolist()


def test_the_first_rank_is_that_of_the_modules_own_ranks(tmp_path: Path) -> None:
    assert run(3, save_two_stages, str(tmp_path / "c")) == [[1.0]] * 3


def names_of_others() -> list[list[str]]:
    model = normed()
    model.register_module("tied", model[1])  # type: ignore[index]
    twice = nn.ModuleDict({"a": DistributedDataParallel(model), "b": nn.BatchNorm1d(2)})
    return [buffers_of_others(twice), buffers_of_others(nn.BatchNorm1d(2))]


def test_every_name_of_a_buffer_that_is_broadcast_is_the_first_ranks(tmp_path: Path) -> None:
    own, others = run(2, names_of_others)
    assert own == [[], []]
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert others == [[f"a.module.{part}.{kind}" for part in ("1", "3", "tied") for kind in kinds], []]
