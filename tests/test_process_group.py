"""Ranks of a process group save and restore among themselves: nobody else is waited for, and nobody else may come."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    FencedError,
    Options,
    OptionsError,
    PerRank,
    RankZero,
    SaveFailedError,
)
from tests.ranks.processes import run

# What waits for a rank in vain ends by this, and the test fails.
SOON = Options(progress_timeout_s=20)
HALVES = ([0, 1], [2, 3])


def my_half() -> tuple[int, dist.ProcessGroup]:
    groups = [dist.new_group(ranks) for ranks in HALVES]
    half = dist.get_rank() // 2
    return half, groups[half]  # type: ignore[return-value]


class Own:
    """What each rank has for itself."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def state_of(half: int, step: int, rank: int) -> dict[str, Any]:
    return {
        "w": torch.full((10,), 100.0 * half + step),
        "step": step,
        "own": PerRank(Own(1000 + rank)),
        "first": RankZero(2000 + rank),
    }


def each_half_has_a_manager(root: str) -> dict[str, Any]:
    rank = dist.get_rank()
    half, group = my_half()
    common = CheckpointManager(f"{root}/all", options=SOON)
    common.save(1, {"w": torch.ones(3)})
    # Not as often in each half, and not at the same time as in the other one.
    steps = range(1, 3 + half)
    with CheckpointManager(f"{root}/{half}", options=SOON, process_group=group, save_every_seconds=1e-9) as manager:
        for step in steps:
            assert manager.should_save(step)
            manager.save(step, state_of(half, step, rank), name="last")
            manager.async_save(step + 10, state_of(half, step + 10, rank)).result()
        manager.pin(steps[-1] + 10, "the last")
        state = state_of(9, 0, 0)
        restored = manager.restore(state)
        assert restored is not None
    common.save(2, {"w": torch.ones(3)})
    common.close()
    again = state_of(9, 0, 0)
    loaded = cloudckpt.load(again, restored.url, process_group=group, options=SOON)
    return {
        "step": restored.step,
        "world": loaded.manifest.world_size,
        "w": [float(state["w"][0]), float(again["w"][0])],
        "own": [state["own"].inner.value, again["own"].inner.value],
        "first": [state["first"].value, again["first"].value],
        "common": common.url,
    }


def test_each_of_two_groups_saves_to_a_root_of_its_own_while_all_have_one_besides(tmp_path: Path) -> None:
    outcomes = run(4, each_half_has_a_manager, str(tmp_path))
    for rank, found in enumerate(outcomes):
        half = rank // 2
        step = 12 + half
        assert found["step"] == step
        assert found["world"] == 2, "a manifest tells how many ranks have saved"
        assert found["w"] == [100.0 * half + step] * 2
        assert found["own"] == [1000 + rank] * 2, "PerRank goes by the rank in the group"
        assert found["first"] == [2000 + 2 * half] * 2, "RankZero is the group's first rank"
    with CheckpointManager(tmp_path / "all") as common:
        assert common.all_steps() == [1, 2]


def halves_of_a_mesh(root: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row, column = mesh.get_coordinate() or (0, 0)
    model = fully_shard(nn.Linear(8, 8), mesh=mesh["dp"])
    full = torch.arange(32.0).reshape(8, 4)
    held = {
        "model": model,
        "rows": distribute_tensor(full, mesh["dp"], [Shard(0)]),
        # Cut over others, too; but all of it is here.
        "wide": distribute_tensor(full, mesh, [Shard(0), Replicate()]),
    }
    group = mesh["dp"].get_group()
    saved = cloudckpt.save(held, f"{root}/{column}", process_group=group, options=SOON)
    weight = model.weight.full_tensor().detach().clone()  # type: ignore[operator]
    nn.init.zeros_(model.weight)
    held["wide"] = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0), Replicate()])
    cloudckpt.load(held, saved.url, process_group=group, options=SOON)
    grid = distribute_tensor(full, mesh, [Shard(0), Shard(1)])
    with pytest.raises(SaveFailedError) as caught:
        cloudckpt.save({"grid": grid}, f"{root}/refused-{column}", process_group=group, options=SOON)
    wide = held["wide"]
    assert isinstance(wide, DTensor)
    return [
        torch.equal(model.weight.full_tensor(), weight),  # type: ignore[operator]
        torch.equal(wide.full_tensor(), full),
        str(caught.value),
        caught.value.__notes__,
        row,
    ]


def test_a_dimension_of_a_mesh_saves_what_it_holds_whole_and_is_refused_what_it_does_not(tmp_path: Path) -> None:
    outcomes = run(4, halves_of_a_mesh, str(tmp_path))
    for rank, (is_model, is_wide, text, notes, _) in enumerate(outcomes):
        assert is_model
        assert is_wide
        assert "do not cover grid (8, 4) exactly once" in text
        assert "from all ranks that hold parts of it, and save again" in text
        column = rank % 2
        assert notes == [f"ranks are counted in the process group of ranks {column}, {column + 2} of the job"]
        read = cloudckpt.read(f"{tmp_path}/{column}")
        assert torch.equal(read["wide"], torch.arange(32.0).reshape(8, 4))  # type: ignore[arg-type]
        assert not (tmp_path / f"refused-{column}" / "manifest.json").exists()


def come_from_outside(root: str) -> list[str]:
    rank = dist.get_rank()
    pair = dist.new_group([1, 2])
    found = []

    def refused(call: Any) -> None:
        with pytest.raises(OptionsError) as caught:
            call()
        found.append(str(caught.value))

    if rank in (1, 2):
        cloudckpt.save({"rank": 7}, f"{root}/c", process_group=pair, options=SOON)  # type: ignore[arg-type]
    else:
        refused(lambda: cloudckpt.save({}, f"{root}/c", process_group=pair))  # type: ignore[arg-type]
        refused(lambda: CheckpointManager(root, process_group=pair))  # type: ignore[arg-type]
    dist.barrier()
    mesh = init_device_mesh("cpu", (3,))
    refused(lambda: CheckpointManager(root, process_group=mesh))  # type: ignore[arg-type]
    world = dist.group.WORLD
    refused(lambda: cloudckpt.load({}, root, ranks="self", process_group=world))
    if rank in (1, 2):
        manager = CheckpointManager(root, process_group=pair)  # type: ignore[arg-type]
        dist.destroy_process_group(pair)  # type: ignore[arg-type]
        refused(lambda: CheckpointManager(root, process_group=pair))  # type: ignore[arg-type]
        manager.save(1, {"rank": 7})  # it needs no more than to know who they are
    dist.barrier()  # rank 0 hosts the store
    dist.destroy_process_group()
    if rank in (1, 2):
        refused(lambda: manager.save(2, {"rank": 7}))
    return found


def test_who_is_not_in_the_group_is_told_so_and_no_group_is_taken_for_one(tmp_path: Path) -> None:
    outcomes = run(3, come_from_outside, str(tmp_path), together=False)
    assert cloudckpt.read(f"{tmp_path}/c") == {"rank": 7}
    mesh, both = "process_group is a DeviceMesh; give a torch", "ranks is 'self' and a process_group is given"
    outside = "rank 0 is not in the process group that was given: it is NON_GROUP_MEMBER"
    of_1 = [mesh, both, "or was destroyed; make another one", "the process group of ranks 1-2 was destroyed"]
    for found, wanted in zip(outcomes, [[outside, outside, mesh, both], of_1, of_1], strict=True):
        assert len(found) == len(wanted)
        for text, part in zip(found, wanted, strict=True):
            assert part in text


def test_a_group_needs_a_default_process_group(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"no default process group; call torch.distributed.init_process_group\(\)"):
        CheckpointManager(tmp_path, process_group=object())  # type: ignore[arg-type]


def one_does_not_come(root: str) -> tuple[str, list[str]]:
    half, group = my_half()
    hurried = Options(progress_timeout_s=1.0)
    rank, found = dist.get_rank(), ("", list[str]())
    with CheckpointManager(f"{root}/{half}", process_group=group, options=hurried) as manager:
        if rank != 3:
            try:
                manager.save(1, {"half": half})
            except SaveFailedError as exc:
                found = str(exc), exc.__notes__
    dist.barrier()
    with CheckpointManager(f"{root}/{half}", process_group=group, options=SOON) as manager:
        manager.save(2, {"half": half})
    return found


def test_a_rank_that_does_not_come_is_named_in_its_group_and_the_other_group_saves(tmp_path: Path) -> None:
    outcomes = run(4, one_does_not_come, str(tmp_path))
    assert outcomes[0] == outcomes[1] == outcomes[3] == ("", [])
    text, notes = outcomes[2]
    assert "rank 1 has not come within" in text
    assert notes == ["ranks are counted in the process group of ranks 2-3 of the job"]
    for half, steps in enumerate(([1, 2], [2])):
        with CheckpointManager(f"{tmp_path}/{half}") as manager:
            assert manager.all_steps() == steps


def both_halves_save_to(root: str) -> str:
    half, group = my_half()
    with CheckpointManager(root, process_group=group, options=SOON) as manager:
        for turn in range(2):
            dist.barrier()
            if half == turn:
                manager.save(1 + half, {"half": half})
        dist.barrier()
        try:
            manager.save(3 + half, {"half": half})
        except FencedError as exc:
            return str(exc)
    return ""


def test_of_two_groups_on_one_root_the_one_that_came_first_is_fenced(tmp_path: Path) -> None:
    outcomes = run(4, both_halves_save_to, str(tmp_path))
    assert all("epoch 2 has claimed" in text for text in outcomes[:2])
    assert outcomes[2:] == ["", ""]
    with CheckpointManager(tmp_path) as manager:
        assert [(found.step, found.epoch) for found in manager.checkpoints()] == [(1, 1), (2, 2), (4, 2)]


def save_what_fsdp1_cuts_over_more(root: str) -> list[str]:
    warnings.simplefilter("ignore")
    half, group = my_half()
    cut = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    inside = cut(nn.Linear(4, 4), process_group=group)
    cloudckpt.save({"model": inside}, f"{root}/{half}", process_group=group, options=SOON)
    outside = cut(nn.Linear(4, 4))
    found = []
    for how in ({"process_group": group}, {"ranks": "self"}):
        for call in (cloudckpt.save, cloudckpt.load):
            with pytest.raises((OptionsError, SaveFailedError)) as caught:
                call({"model": outside}, f"{root}/{half if call is cloudckpt.load else 'none'}", **how)  # type: ignore[operator]
            found.append(str(caught.value))
    return found


def test_a_module_of_fsdp1_that_would_wait_for_ranks_outside_is_refused(tmp_path: Path) -> None:
    outcomes = run(4, save_what_fsdp1_cuts_over_more, str(tmp_path))
    said = r"'model' is cut by FSDP over ranks 0-3 of the job, .* and ranks {} do not take part; let all of them"
    for rank, found in enumerate(outcomes):
        others = ["2-3", "0-1"][rank // 2], ["1-3", "0, 2-3", "0-1, 3", "0-2"][rank]
        for text, outside in zip(found, [others[0]] * 2 + [others[1]] * 2, strict=True):
            assert re.search(said.format(outside), text)


def save_counted_buffers(root: str) -> None:
    half, group = my_half()
    model = nn.BatchNorm1d(2, momentum=1.0)
    wrapped = DistributedDataParallel(model)
    wrapped(torch.full((2, 2), float(dist.get_rank())))
    cloudckpt.save({"model": wrapped}, f"{root}/{half}", process_group=group, options=SOON)
    cloudckpt.save({"model": wrapped}, f"{root}/alone-{dist.get_rank()}", ranks="self")


def test_buffers_of_ddp_are_those_of_the_first_rank_that_saves(tmp_path: Path) -> None:
    run(4, save_counted_buffers, str(tmp_path))
    for name, rank in [("0", 0), ("1", 2), *[(f"alone-{rank}", rank) for rank in range(4)]]:
        mean = cloudckpt.read(f"{tmp_path}/{name}")["model"]["running_mean"]  # type: ignore[index]
        assert torch.equal(mean, torch.full((2,), float(rank)))
