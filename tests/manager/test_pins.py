"""What a job pins stays, for this job and every other one, on one rank or several, in a root or its fallback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    KeepBest,
    KeepEvery,
    KeepLast,
    OptionsError,
    PinnedError,
)
from servers import FreshPrefix
from tests.ranks.processes import run


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((10,), float(step))}


def opened(path: Path | str, **options: object) -> CheckpointManager:
    options = {"progress": "off", "save_rng": False, "prune_grace_s": 0.0, **options}
    return CheckpointManager(path, **options)  # type: ignore[arg-type]


def save_steps(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_of(step), metrics={"loss": 1 / step})


def restored(manager: CheckpointManager, step: int) -> float:
    state = state_of(0)
    manager.restore(state, step)
    return float(state["w"][0])


def test_a_pinned_checkpoint_outlives_the_rules_of_every_job_until_it_is_unpinned(tmp_path: Path) -> None:
    with opened(tmp_path, retention=KeepLast(1)) as manager:
        save_steps(manager, 1)
        made = manager.pin(1, "for the paper")
        save_steps(manager, 2, 3)
        manager.wait()
        assert (manager.all_steps(), manager.pins()) == ([1, 3], [made])
    with opened(tmp_path, retention=KeepLast(1), retention_scope="root") as manager:
        save_steps(manager, 4)
        assert restored(manager, 1) == 1.0
        with pytest.raises(PinnedError, match="for the paper"):
            manager.delete(1)
        assert manager.unpin(1) == made
        save_steps(manager, 5)
        manager.wait()
        assert manager.all_steps() == [5]


def test_what_keeps_a_checkpoint_is_said(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        save_steps(manager, 1, 2)
        assert [manager.why_kept(step) for step in (1, 2)] == [("KeepAll()",), ("newest", "KeepAll()")]
    rules = [KeepLast(1), KeepEvery(steps=4), KeepBest("loss")]
    with opened(tmp_path, retention=rules) as manager:
        assert manager.why_kept(2) == ("newest", "another line of history")
        assert manager.why_kept(1) == ("another line of history",)
        assert manager.restore(state_of(0)) is not None
        assert manager.why_kept(1) == ()
        assert manager.why_kept(2) == ("newest", "in use", "KeepLast(n=1)", "KeepBest(metric='loss', n=1, mode='min')")
        manager.pin(1)
        save_steps(manager, 4, 5)
        manager.wait()
        assert {step: manager.why_kept(step) for step in manager.all_steps()} == {
            1: ("pinned",),
            4: ("KeepEvery(steps=4)",),
            5: ("newest", "KeepLast(n=1)", "KeepBest(metric='loss', n=1, mode='min')"),
        }
        with pytest.raises(CheckpointNotFoundError):
            manager.why_kept(9)


def test_a_pinned_checkpoint_whose_manifest_is_gone_is_restored_and_put_back_by_the_next_pass(tmp_path: Path) -> None:
    manifest = tmp_path / "step-0000000001-e0001" / "manifest.json"
    with opened(tmp_path, retention=KeepLast(1)) as manager:
        save_steps(manager, 1)
        manager.pin(1)
        text = manifest.read_bytes()
        manifest.unlink()
        assert restored(manager, 1) == 1.0
        assert not manifest.exists()
        save_steps(manager, 2, 3)
        manager.wait()
        assert manifest.read_bytes() == text


def test_with_a_fallback_the_root_that_holds_the_step_holds_its_pin(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with opened(second) as manager:
        save_steps(manager, 1)
    with opened(first, fallback=second, retention=KeepLast(1), retention_scope="root") as manager:
        made = manager.pin(1)
        assert made.url == f"file://{second}/step-0000000001-e0001"
        save_steps(manager, 2, 3)
        assert manager.all_steps() == [1, 3]
        with pytest.raises(PinnedError):
            manager.delete(1)
        assert manager.unpin(1) == made


def test_rules_given_once_remove_what_neither_they_nor_the_managers_own_keep(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        save_steps(manager, 9)  # another line of history
    with opened(tmp_path, retention=KeepEvery(steps=2), retention_scope="line") as manager:
        manager.prune(1)
        assert manager.all_steps() == [9]
        save_steps(manager, 1, 2, 3)
        manager.pin(3)
        save_steps(manager, 4, 5)
        manager.prune(KeepLast(1))
        assert [one.order for one in manager.checkpoints()] == [(1, 9), (2, 2), (2, 3), (2, 4), (2, 5)]
    with opened(tmp_path) as manager:
        save_steps(manager, 1, 2, 3)
        manager.prune([KeepLast(2)])
        assert [step for epoch, step in (one.order for one in manager.checkpoints()) if epoch == 3] == [2, 3]
        with pytest.raises(OptionsError, match="retention"):
            manager.prune("2")


def test_a_manager_that_is_closed_pins_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        save_steps(manager, 1)
    for call in (lambda: manager.pin(1), lambda: manager.unpin(1), manager.pins, lambda: manager.why_kept(1)):
        with pytest.raises(OptionsError, match="is closed"):
            call()


def on_every_rank(path: Path) -> list[str]:
    said = []
    with opened(path, retention=KeepLast(1)) as manager:
        save_steps(manager, 1)
        said.append(manager.pin(1, "ours").note)
        save_steps(manager, 2)
        for call in (lambda: manager.delete(1), lambda: manager.pin(9)):
            try:
                call()
            except (PinnedError, CheckpointNotFoundError) as exc:
                said.append(type(exc).__name__)
        save_steps(manager, 3)
        manager.wait()
        torch.distributed.barrier()
        said += [str(manager.all_steps()), manager.unpin(1).note]
        manager.delete(1)
        torch.distributed.barrier()
        said.append(str(manager.all_steps()))
        torch.distributed.barrier()
    return said


def test_all_ranks_hear_what_came_of_a_pin_and_of_a_delete(tmp_path: Path) -> None:
    expected = ["ours", "PinnedError", "CheckpointNotFoundError", "[1, 3]", "ours", "[3]"]
    assert run(2, on_every_rank, tmp_path) == [expected] * 2


@pytest.mark.parametrize("server", ["s3_url", "gs_url"])
def test_pins_hold_on_real_servers(server: str, request: pytest.FixtureRequest) -> None:
    place: FreshPrefix = request.getfixturevalue(server)
    with opened(place.url, storage_options=place.storage_options, retention=KeepLast(1)) as manager:
        save_steps(manager, 1)
        made = manager.pin(1, "é")
        assert manager.pin(1, "again") == made
        save_steps(manager, 2, 3)
        manager.wait()
        assert (manager.all_steps(), manager.pins()) == ([1, 3], [made])
        manager.unpin(1)
        save_steps(manager, 4)
        manager.wait()
        assert (manager.all_steps(), manager.pins()) == ([4], [])
