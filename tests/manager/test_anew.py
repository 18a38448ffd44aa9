"""A training that begins anew in one process saves its steps on a line of its own; for rules both are one job's."""

from __future__ import annotations

from pathlib import Path

import torch

from cloudckpt import CheckpointManager, KeepLast, Options
from tests.ranks.processes import run


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((10,), value)}


def test_a_training_that_begins_anew_saves_the_same_steps_and_is_what_is_restored(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(3)], prune_grace_s=0.0, progress="off") as manager:
        for step in (1, 2):
            manager.save(step, state_of(1.0))
        manager.begin_anew()
        manager.async_save(1, state_of(2.0)).result()
        manager.save(2, state_of(2.0))
        assert [(one.epoch, one.step) for one in manager.checkpoints()] == [(1, 2), (2, 1), (2, 2)]
    with CheckpointManager(tmp_path, progress="off") as manager:
        state = state_of(0.0)
        assert manager.restore(state) is not None
        assert state["w"][0] == 2.0


def test_before_the_first_save_there_is_nothing_to_begin_anew(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress="off") as manager:
        manager.begin_anew()
        assert manager.save(1, state_of(1.0)).epoch == 1


def begins_anew_and_prunes(root: str) -> list[tuple[int, int]]:
    with CheckpointManager(root, prune_grace_s=0.0, progress="off", options=Options(progress_timeout_s=20)) as manager:
        for value in (1.0, 2.0):
            for step in (1, 2):
                manager.save(step, state_of(value))
            manager.begin_anew()
        manager.save(1, state_of(3.0))
        manager.prune(KeepLast(2))
        return [(one.epoch, one.step) for one in manager.checkpoints()]


def test_ranks_begin_anew_and_prune_together(tmp_path: Path) -> None:
    found = run(2, begins_anew_and_prunes, str(tmp_path))
    assert found == [[(2, 2), (3, 1)]] * 2
    with CheckpointManager(tmp_path, progress="off") as manager:
        assert manager.read()["w"][0] == 3.0
