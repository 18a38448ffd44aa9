"""Ranks commit only what all of them wrote to one place, as the ranks that they are now."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt import CheckpointManager, Options, OptionsError, SaveFailedError
from tests.ranks.processes import free_port, run

CALM = Options(progress_timeout_s=60)


def rank_of_this() -> int:
    return int(os.environ["RANK"])


def sharded(value: float) -> dict[str, object]:
    """What each rank writes a part of."""
    return {f"w{number}": torch.full((4096,), value + number) for number in range(4)}


def told(call: Callable[[], object]) -> str:
    with pytest.raises(SaveFailedError) as caught:
        call()
    return str(caught.value)


def save_to_places_of_their_own(url: str) -> list[str]:
    own = f"{url}/{rank_of_this()}"
    found = [told(lambda: cloudckpt.save(sharded(0), f"{own}/c", options=CALM))]
    with CheckpointManager(f"{own}/root", options=CALM) as manager:
        found.append(told(lambda: manager.save(1, sharded(1))))
        found.append(told(lambda: manager.async_save(1, sharded(1))))
    return found


def test_ranks_that_save_to_different_urls_are_told_so_and_write_nothing(tmp_path: Path) -> None:
    for found in run(2, save_to_places_of_their_own, str(tmp_path)):
        for text in found:
            assert (
                f"the ranks save to different places, and nothing was written: rank 0 to {tmp_path.as_uri()}/0" in text
            )
            assert f"rank 1 to {tmp_path.as_uri()}/1" in text
    assert list(tmp_path.rglob("*.safetensors")) == []


def lose_what_rank_1_writes(url: str, how: str) -> str:
    """Play a directory that is on a disk of each machine's own: rank 0 does not see what rank 1 has written."""
    if rank_of_this() == 0:
        from cloudckpt.store.local import LocalStore

        head = LocalStore.head

        def blind(store: LocalStore, key: str) -> Any:
            if "r00001-" in key:
                (Path(url) / key).unlink()
            return head(store, key)

        LocalStore.head = blind  # type: ignore[method-assign]
    if how == "function":
        return told(lambda: cloudckpt.save(sharded(0), url, options=CALM))
    with CheckpointManager(url, options=CALM) as manager:
        return told(lambda: manager.save(1, sharded(1)))


@pytest.mark.parametrize("how", ["function", "manager"])
def test_what_rank_0_does_not_see_of_another_rank_is_not_committed(tmp_path: Path, how: str) -> None:
    for text in run(2, lose_what_rank_1_writes, str(tmp_path), how):
        assert "rank 1 has written " in text
        assert "save to a directory that all machines share, or to a bucket" in text
    assert list(tmp_path.rglob("manifest.json")) == []


def save_again_in_a_smaller_world(url: str, ports: list[int]) -> list[int]:
    rank = rank_of_this()
    steps = []
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, sharded(1))
        for size, port, step in zip((2, 2), ports, (2, 3), strict=True):
            dist.destroy_process_group()
            if rank >= size:
                return steps
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
            steps.append(manager.save(step, sharded(step)).step)
    return steps


def test_a_plan_serves_only_the_ranks_that_made_it(tmp_path: Path) -> None:
    outcomes = run(3, save_again_in_a_smaller_world, str(tmp_path), [free_port(), free_port()], together=False)
    assert outcomes == [[2, 3], [2, 3], []]
    with CheckpointManager(tmp_path) as manager:
        assert [(one.step, one.world_size) for one in manager.checkpoints()] == [(1, 3), (2, 2), (3, 2)]


def save_and_restore_without_a_group(url: str) -> list[str]:
    found = []
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(1, sharded(1))
        dist.barrier()
        dist.destroy_process_group()
        for call in (
            lambda: manager.save(2, sharded(2)),
            lambda: manager.async_save(2, sharded(2)),
            lambda: manager.restore(sharded(0)),
        ):
            with pytest.raises(OptionsError, match="WORLD_SIZE is 2 and no process group exists") as caught:
                call()
            found.append(str(caught.value))
    return found


def test_a_manager_whose_process_group_was_destroyed_saves_and_restores_nothing_alone(tmp_path: Path) -> None:
    for found in run(2, save_and_restore_without_a_group, str(tmp_path), together=False):
        assert len(found) == 3
    with CheckpointManager(tmp_path) as manager:
        assert [one.step for one in manager.checkpoints()] == [1]
