from __future__ import annotations

from pathlib import Path

import pytest

# The benchmarks' peers have it in an environment without the others.
pytest.importorskip("ray", reason="make integrations installs the frameworks")
pytest.importorskip("torch_checkpointing", reason="make integrations installs the frameworks")

import torch

from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    OptionsError,
    StateMismatchError,
)
from cloudckpt.integrations.torch_checkpointing import CloudPayloads
from raw_access import FreshPrefix
from tests.integrations.interrupted import assert_a_run_goes_on_from_a_bucket

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int
) -> None:
    assert_a_run_goes_on_from_a_bucket("torch_checkpointing_loop.py", s3_url, ranks=ranks)


def test_a_payload_is_found_by_its_id_and_fills_what_it_is_loaded_into(tmp_path: Path) -> None:
    weight, target = torch.randn(3), torch.zeros(3)
    with CloudPayloads(tmp_path) as payloads:
        assert payloads.latest() is None
        payloads.save("/ckpt/step_1", {"model": {"w": weight}, "step": 1})
        payloads.save("/ckpt/step_2/", {"model": {"w": weight + 1}, "step": 2})

        payloads.manager.wait()

        assert payloads.ids() == ["/ckpt/step_1", "/ckpt/step_2"]
        assert payloads.latest() == "/ckpt/step_2"
        found = payloads.load("/ckpt/step_1", into={"model": {"w": target}})

        assert found["model"]["w"] is target
        assert torch.equal(target, weight)
        assert torch.equal(payloads.load("/ckpt/step_2")["model"]["w"], weight + 1)


def test_an_id_without_a_step_and_one_that_nobody_saved_are_refused(tmp_path: Path) -> None:
    with CloudPayloads(tmp_path, background=False) as payloads:
        with pytest.raises(OptionsError, match="step_1000"):
            payloads.save("best", {"step": 1})
        assert payloads.save("step_1", {"step": 1}) is None
        with pytest.raises(CheckpointNotFoundError, match="there is step_1"):
            payloads.load("step_2")
        with pytest.raises(CheckpointExistsError):
            payloads.save("step_1", {"step": 1})
        with pytest.raises(StateMismatchError, match="bias"):
            payloads.load("step_1", into={"step": 0, "bias": torch.zeros(1)})


def test_a_manager_that_was_given_stays_open(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with CloudPayloads(manager) as payloads, payloads.lock():
            payloads.prewarm_staging({"step": 1})
            payloads.save("step_1", {"step": 1})
        manager.wait()

        assert manager.latest_step() == 1
