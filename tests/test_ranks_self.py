"""A rank saves and restores by itself where it says so, and what all do together goes on as before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Options, OptionsError
from tests.ranks.processes import fork, run

# What waits for a rank in vain ends by this, and the test fails.
SOON = Options(progress_timeout_s=20)


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((10,), float(step)), "step": step}


def read_step(url: str) -> object:
    return cloudckpt.read(url)["step"]


def saves_alone_between_common_ones(root: str) -> list[object]:
    rank = dist.get_rank()
    cloudckpt.save(state_of(1), f"{root}/together-1", options=SOON)
    if rank == 0:
        cloudckpt.save(state_of(2), f"{root}/alone", options=SOON, ranks="self")
    cloudckpt.save(state_of(3), f"{root}/together-2", options=SOON)
    found = []
    for name in ("together-1", "alone", "together-2"):
        state = state_of(0)
        if rank == 1:
            cloudckpt.load(state, f"{root}/{name}", ranks="self")
            found.append(state["step"])
    return found


def test_a_save_of_one_rank_waits_for_nobody_and_the_next_of_all_works(tmp_path: Path) -> None:
    outcomes = run(2, saves_alone_between_common_ones, str(tmp_path))
    assert outcomes == [[], [1, 2, 3]]
    assert [read_step(f"{tmp_path}/{name}") for name in ("together-1", "alone", "together-2")] == [1, 2, 3]


def each_has_a_manager_of_its_own(root: str) -> list[int | None]:
    rank = dist.get_rank()
    with CheckpointManager(f"{root}/all", options=SOON) as common:
        common.save(1, state_of(1))
        # Not as often on each rank, and not at the same time.
        with CheckpointManager(f"{root}/{rank}", options=SOON, ranks="self", save_every_seconds=1e-9) as own:
            for step in range(1, 2 + rank):
                assert own.should_save(step)
                own.save(step, state_of(step))
                own.async_save(step + 10, state_of(step + 10)).result()
            state = state_of(0)
            restored = own.restore(state)
            assert restored is not None
            assert state["step"] == restored.step
        common.save(2, state_of(2))
        return [*common.all_steps(), restored.step]


def test_each_rank_may_have_a_manager_of_its_own_beside_one_of_all(tmp_path: Path) -> None:
    outcomes = run(2, each_has_a_manager_of_its_own, str(tmp_path))
    assert outcomes == [[1, 2, 11], [1, 2, 12]]


def saves_a_part_alone(root: str) -> str:
    model = fully_shard(nn.Linear(8, 8))
    if dist.get_rank() != 0:
        return ""
    with pytest.raises(CloudCkptError) as caught:
        cloudckpt.save({"model": model}, root, ranks="self")
    return str(caught.value)


def test_a_tensor_of_which_a_rank_holds_a_part_is_not_saved_by_it_alone(tmp_path: Path) -> None:
    outcomes = run(2, saves_a_part_alone, str(tmp_path / "run"))
    assert "weight" in outcomes[0]
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        cloudckpt.read(tmp_path / "run")


def saves_as_a_helper(pipe: Any, url: str) -> None:
    os.environ["WORLD_SIZE"], os.environ["RANK"] = "2", "1"
    with CheckpointManager(url) as manager:
        manager.save(1, state_of(1))
    pipe.send("saved")


def test_a_helper_of_a_rank_has_its_environment_and_is_no_rank(tmp_path: Path) -> None:
    process, pipe = fork(saves_as_a_helper, str(tmp_path))
    assert pipe.recv() == "saved"
    process.join()


def test_who_seems_to_be_one_of_several_ranks_is_told_how_to_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionsError, match=r'init_process_group\(\).*ranks="self"'):
        cloudckpt.save(state_of(1), tmp_path / "a")
    cloudckpt.save(state_of(1), tmp_path / "a", ranks="self")
    with CheckpointManager(tmp_path / "b", ranks="self") as manager:
        manager.save(1, state_of(1))
    assert read_step(f"{tmp_path}/a") == 1


@pytest.mark.parametrize("ranks", ["rank 0", 0, None, ["self"]])
def test_who_takes_part_is_one_of_two_words(tmp_path: Path, ranks: Any) -> None:
    with pytest.raises(OptionsError, match=r"give 'all', .* or 'self'"):
        cloudckpt.save(state_of(1), tmp_path, ranks=ranks)
    with pytest.raises(OptionsError, match=r"give 'all', .* or 'self'"):
        CheckpointManager(tmp_path, ranks=ranks)
