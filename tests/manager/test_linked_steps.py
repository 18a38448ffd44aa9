"""A step that somebody moved to another disk and linked is found, and never deleted there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from cloudckpt import CheckpointManager, KeepLast, StorageError


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return where step 2 of steps 1 and 2 lies."""
    with CheckpointManager(tmp_path / "root") as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.full((100,), float(step))})
    outside = (tmp_path / "root/step-0000000002-e0001").rename(tmp_path / "moved")
    (tmp_path / "root/step-0000000002-e0001").symlink_to(outside)
    return outside


def objects_below(path: Path) -> list[Path]:
    return sorted(found.relative_to(path) for found in path.rglob("*") if found.is_file())


def test_a_step_that_was_moved_and_linked_is_listed_and_restored(tmp_path: Path, outside: Path) -> None:
    state: dict[str, torch.Tensor] = {"w": torch.zeros(100)}
    with CheckpointManager(tmp_path / "root") as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2]
        restored = manager.restore(state)
    assert restored is not None
    assert restored.step == 2
    assert torch.equal(state["w"], torch.full((100,), 2.0))


def test_a_step_whose_link_leads_nowhere_is_named_and_no_older_one_restored(tmp_path: Path, outside: Path) -> None:
    outside.rename(tmp_path / "unmounted")
    with (
        CheckpointManager(tmp_path / "root") as manager,
        pytest.raises(StorageError, match=r"'step-0000000002-e0001'.*is a symbolic link to nothing"),
    ):
        manager.restore({"w": torch.zeros(100)})


def test_pruning_deletes_nothing_through_a_link_and_names_it(
    tmp_path: Path, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = objects_below(outside)
    with (
        CheckpointManager(tmp_path / "root", retention=[KeepLast(1)], prune_grace_s=0) as manager,
        caplog.at_level(logging.WARNING, "cloudckpt"),
    ):
        manager.restore({"w": torch.zeros(100)})
        for step in (3, 4, 5):
            manager.save(step, {"w": torch.full((100,), float(step))})
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2, 5], "and it keeps no other from going"
        (trouble,) = manager.report().troubles
    assert objects_below(outside) == before
    assert caplog.text.count("through a symbolic link") == 1, "once, not at each save"
    assert "step-0000000002-e0001/manifest.json' in" in trouble


def test_another_step_that_cannot_be_deleted_is_named_too(tmp_path: Path, outside: Path) -> None:
    with CheckpointManager(tmp_path / "root", retention=[KeepLast(1)], prune_grace_s=0) as manager:
        manager.restore({"w": torch.zeros(100)})
        for step in (3, 4):
            manager.save(step, {"w": torch.full((100,), float(step))})
        moved = (tmp_path / "root/step-0000000004-e0002").rename(tmp_path / "moved too")
        (tmp_path / "root/step-0000000004-e0002").symlink_to(moved)
        for step in (5, 6, 7):
            manager.save(step, {"w": torch.full((100,), float(step))})
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2, 4, 7]
        first, second = manager.report().troubles
    assert "step-0000000002-e0001/manifest.json' in" in first
    assert "step-0000000004-e0002/manifest.json' in" in second
