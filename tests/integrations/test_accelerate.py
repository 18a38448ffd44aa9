from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", minversion="1.15", reason="make integrations installs the frameworks")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration

from cloudckpt import CheckpointManager
from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.integrations.accelerate import load_state, save_state
from raw_access import FreshPrefix
from tests.integrations.interrupted import assert_a_run_goes_on_from_a_bucket

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(1, ()), (1, ("--stateful",)), (2, ()), (2, ("--fsdp",)), (2, ("--stateful",))],
    ids=["alone", "stateful", "ddp", "fsdp2", "stateful-ddp"],
)
def test_a_loop_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int, arguments: tuple[str, ...]
) -> None:
    assert_a_run_goes_on_from_a_bucket("accelerate_loop.py", s3_url, *arguments, ranks=ranks)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def prepared(**more: Any) -> tuple[Accelerator, nn.Module, Counter]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **more)
    model, counter = nn.Linear(2, 2), Counter()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(counter)
    return accelerator, model, counter


def test_what_is_prepared_and_registered_comes_back(tmp_path: Path) -> None:
    accelerator, model, counter = prepared()
    counter.count, accelerator.step = 3, 7
    with CheckpointManager(tmp_path) as manager:
        save_state(accelerator, manager, 5, metrics={"loss": 0.5})
        other, twin, there = prepared()
        resumed = load_state(other, manager)
        found = manager.best("loss")
    assert resumed.step == 5
    assert found is not None
    assert (there.count, other.step) == (3, 7)
    assert torch.equal(twin.weight, model.weight)


def test_a_fresh_start_has_no_checkpoint_and_step_0(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        resumed = load_state(prepared()[0], manager)
    assert (resumed.checkpoint, resumed.step) == (None, 0)
    assert list(resumed.batches([1, 2])) == [1, 2]


def test_automatic_naming_counts_on_after_a_restore_and_keeps_total_limit(tmp_path: Path) -> None:
    project = {"automatic_checkpoint_naming": True, "total_limit": 2}
    with CheckpointManager(tmp_path) as manager:
        accelerator = prepared(project_config=ProjectConfiguration(**project))[0]
        for _ in range(3):
            save_state(accelerator, manager)
        assert manager.all_steps() == [1, 2]
        again = prepared(project_config=ProjectConfiguration(**project))[0]
        load_state(again, manager)
        save_state(again, manager)
        assert manager.all_steps() == [2, 3]


def numbering(limit: int) -> tuple[Accelerator, nn.Module]:
    project = ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=limit)
    return prepared(project_config=project)[:2]


def test_total_limit_never_removes_what_was_just_saved_in_place_of_an_older_line_of_history(tmp_path: Path) -> None:
    for value in (1.0, 2.0):  # the second job loads nothing, and counts from 0 again
        accelerator, model = numbering(1)
        with CheckpointManager(tmp_path) as manager:
            torch.nn.init.constant_(model.weight, value)
            save_state(accelerator, manager)
            assert [one.order for one in manager.checkpoints()] == [(epoch, 0) for epoch in range(1, int(value) + 1)]
            torch.nn.init.zeros_(model.weight)
            load_state(accelerator, manager)
        assert model.weight[0, 0].item() == value


def test_total_limit_passes_over_what_is_pinned(tmp_path: Path) -> None:
    accelerator, _ = numbering(1)
    with CheckpointManager(tmp_path) as manager:
        save_state(accelerator, manager)
        manager.pin(0)
        for _ in range(3):
            save_state(accelerator, manager)
        assert manager.all_steps() == [0, 3]


def test_the_number_is_taken_again_after_a_save_that_failed(tmp_path: Path) -> None:
    accelerator, _, counter = prepared(project_config=ProjectConfiguration(automatic_checkpoint_naming=True))
    with CheckpointManager(tmp_path) as manager:
        counter.count = object()  # type: ignore[assignment]
        with pytest.raises(UnsupportedValueError):
            save_state(accelerator, manager)
        counter.count = 1
        save_state(accelerator, manager)
        assert manager.all_steps() == [0]


def test_no_step_and_hooks_that_want_a_folder_are_refused_with_what_to_do(tmp_path: Path) -> None:
    accelerator = prepared()[0]
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(OptionsError, match="automatic_checkpoint_naming=True"):
            save_state(accelerator, manager)
        accelerator.register_save_state_pre_hook(lambda *_: None)
        accelerator.register_load_state_pre_hook(lambda *_: None)
        with pytest.raises(OptionsError, match="register_for_checkpointing"):
            save_state(accelerator, manager, 1)
        with pytest.raises(OptionsError, match="register_for_checkpointing"):
            load_state(accelerator, manager)


def test_a_kind_that_saves_by_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = prepared()[0]
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with CheckpointManager(tmp_path) as manager, pytest.raises(OptionsError, match="DEEPSPEED keeps its state"):
        save_state(accelerator, manager, 1)


def test_a_loader_that_shuffles_without_a_seed_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = prepared()[0]
    with CheckpointManager(tmp_path) as manager:
        save_state(accelerator, manager, 1)
        other = prepared()[0]
        other.prepare(DataLoader(TensorDataset(torch.zeros(4)), shuffle=True))
        with caplog.at_level("WARNING", "cloudckpt"):
            load_state(other, manager)
    assert "use_seedable_sampler=True" in caplog.text
