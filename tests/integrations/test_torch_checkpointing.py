from __future__ import annotations

import signal
from pathlib import Path

import pytest

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
from tests.integrations.interrupted import Run, assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    s3_url: FreshPrefix, ranks: int
) -> None:
    def run(name: str, **how: object) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program("torch_checkpointing_loop.py", root, "--width", "4000", ranks=ranks, **how)  # type: ignore[arg-type]

    alone = run("a")
    between = run("b", strike=signal.SIGKILL, after=6)
    during = run("b", strike=signal.SIGKILL, when="during a save", after=7)
    told = run("b", strike=signal.SIGTERM, after=17)
    last = run("b")

    assert (alone.code, between.code, during.code, told.code, last.code) == (0, -9, -9, 143, 0)
    # What it was told in a save that is under way, that save answers.
    assert told.newest_step is not None
    assert max(told.losses) - told.newest_step < 4
    assert min(last.losses) == told.newest_step + 1
    assert told.took_to_end_s < 30
    assert_same_losses([between, during, told, last], alone)


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
