"""PyTorch's own `dcp.save`, `dcp.load` and `dcp.async_save` with several ranks, as its documentation uses them."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import cloudckpt
from cloudckpt import CloudReader, CloudWriter
from tests.effort import diagonal
from tests.ranks.processes import run

ROWS = 7


def _full(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, 3, generator=generator) for name in ("sharded", "replicated", "plain")}


def _state(seed: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = _full(seed)
    return {
        "sharded": distribute_tensor(full["sharded"], mesh, [Shard(0)]),
        "replicated": distribute_tensor(full["replicated"], mesh, [Replicate()]),
        "plain": full["plain"],
        "step": seed,
    }


def _is(state: dict[str, Any], seed: int) -> bool:
    full = _full(seed)
    found = {name: state[name].full_tensor() if name != "plain" else state[name] for name in full}
    return all(torch.equal(found[name], full[name]) for name in full) and state["step"] == seed


def _group_of_all() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=30))  # type: ignore[return-value]


def _save(url: str, seed: int, how: str) -> None:
    state = _state(seed)
    if how == "group":
        dcp.save(state, storage_writer=CloudWriter(url), process_group=_group_of_all())
    elif how == "async":
        dcp.async_save(state, storage_writer=CloudWriter(url), process_group=_group_of_all()).result()
    else:
        dcp.save(state, storage_writer=CloudWriter(url))


def _save_and_load(url: str, how: str) -> bool:
    _save(url, 1, how)
    state = _state(2)
    dcp.load(state, storage_reader=CloudReader(url), process_group=_group_of_all() if how == "group" else None)
    return _is(state, 1)


@diagonal("size, how", [1, 2, 4], ["default", "group", "async"])
def test_what_dcp_saves_on_all_ranks_dcp_loads_on_all_ranks(tmp_path: Path, size: int, how: str) -> None:
    url = str(tmp_path / "c")

    assert run(size, _save_and_load, url, how) == [True] * size
    read = cloudckpt.read(url)
    assert {name: torch.equal(read[name], value) for name, value in _full(1).items()} == dict.fromkeys(_full(1), True)  # type: ignore[arg-type]
    assert read["step"] == 1


def _load(url: str) -> bool:
    state = _state(2)
    dcp.load(state, storage_reader=CloudReader(url))
    return _is(state, 1)


@pytest.mark.parametrize(("saved", "loaded"), [(4, 3), (2, 4), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_dcp_loads_on_another_number_of_ranks(tmp_path: Path, saved: int, loaded: int) -> None:
    url = str(tmp_path / "c")
    run(saved, _save, url, 1, "default")

    assert run(loaded, _load, url) == [True] * loaded


def _save_through_ours(url: str) -> bool:
    cloudckpt.save(_state(1), url)
    state = _state(2)
    dcp.load(state, storage_reader=CloudReader(url))
    return _is(state, 1)


def _load_through_ours(url: str) -> bool:
    _save(url, 1, "default")
    state = _state(2)
    cloudckpt.load(state, url)
    return _is(state, 1)


def test_dcp_and_our_functions_read_each_other_s_checkpoints(tmp_path: Path) -> None:
    assert run(3, _save_through_ours, str(tmp_path / "a")) == [True] * 3
    assert run(3, _load_through_ours, str(tmp_path / "b")) == [True] * 3


def _save_often(root: str) -> list[bool]:
    seen = []
    for seed in (1, 2, 3):
        url = f"{root}/{seed}"
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(_state(seed), storage_writer=CloudWriter(url), planner=planner)
        state = _state(9)
        dcp.load(state, storage_reader=CloudReader(url))
        seen.append(_is(state, seed))
    return seen


@pytest.mark.parametrize("size", [1, 3])
def test_a_planner_that_caches_its_plans_never_brings_back_an_older_save(tmp_path: Path, size: int) -> None:
    assert run(size, _save_often, str(tmp_path)) == [[True] * 3] * size


def _save_in_halves(root: str) -> bool:
    halves = [dist.new_group([0, 1], backend="gloo"), dist.new_group([2, 3], backend="gloo")]
    half = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "shard"))["shard"]
    full = _full(half)["sharded"]
    url = f"{root}/{half}"
    dcp.save(
        {"a": distribute_tensor(full, mesh, [Shard(0)])}, storage_writer=CloudWriter(url), process_group=halves[half]
    )
    state = {"a": distribute_tensor(torch.zeros(ROWS, 3), mesh, [Shard(0)])}
    dcp.load(state, storage_reader=CloudReader(url), process_group=halves[half])
    return torch.equal(state["a"].full_tensor(), full)


def test_groups_that_share_the_world_save_apart_at_the_same_time(tmp_path: Path) -> None:
    assert run(4, _save_in_halves, str(tmp_path)) == [True] * 4


def _save_alone(root: str) -> bool:
    url = f"{root}/{dist.get_rank()}"
    full = _full(dist.get_rank())
    dcp.save({"a": full["plain"]}, storage_writer=CloudWriter(url), no_dist=True)
    return torch.equal(cloudckpt.read(url)["a"], full["plain"])  # type: ignore[arg-type]


def test_a_rank_may_save_by_itself_within_a_world(tmp_path: Path) -> None:
    assert run(2, _save_alone, str(tmp_path)) == [True] * 2


def _save_twice(url: str) -> str:
    _save(url, 1, "default")
    try:
        _save(url, 2, "default")
    except CheckpointException as exc:
        return ", ".join(f"{rank}: {type(error[0]).__name__}" for rank, error in exc.failures.items())
    return ""


def test_a_taken_url_is_refused_on_every_rank_and_stays_as_it_is(tmp_path: Path) -> None:
    url = str(tmp_path / "c")

    assert run(2, _save_twice, url) == ["0: CheckpointExistsError"] * 2
    assert cloudckpt.read(url)["step"] == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_writer_and_a_reader_cross_to_another_process(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(CloudWriter(str(tmp_path / "c"))))
    dcp.save({"a": torch.ones(3)}, storage_writer=writer, no_dist=True)
    state = {"a": torch.zeros(3)}
    dcp.load(state, storage_reader=pickle.loads(pickle.dumps(CloudReader(str(tmp_path / "c")))), no_dist=True)

    assert torch.equal(state["a"], torch.ones(3))
