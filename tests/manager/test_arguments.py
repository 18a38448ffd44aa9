"""What a manager is given is refused by name if it is of another kind; whole numbers are taken whosever they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloudckpt import CheckpointManager, KeepBest, KeepEvery, KeepFor, KeepLast, Options, OptionsError

NAN = float("nan")


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((4,), float(step))}


def manager_of(root: Path, **arguments: Any) -> CheckpointManager:
    return CheckpointManager(root, progress="off", **arguments)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("older_than_s", lambda m, bad=bad: m.sweep(older_than_s=bad)) for bad in ("1h", None, [], -1, NAN, True)),
        *(("dry_run", lambda m, bad=bad: m.sweep(dry_run=bad)) for bad in (None, 0, "no")),
        *(("timeout", lambda m, bad=bad: m.wait(bad)) for bad in ("1", [], -1, NAN)),
        *(("metric", lambda m, bad=bad: m.best(bad)) for bad in (["x"], 1, {"x": 1})),
    ],
)
def test_a_call_names_the_argument_that_is_of_another_kind(
    tmp_path: Path, name: str, call: Callable[[CheckpointManager], object]
) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1), metrics={"x": 1.0})
        with pytest.raises(OptionsError, match=name):
            call(manager)
        assert manager.all_steps() == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"clock": 1},
        {"save_rng": "x"},
        {"save_rng": 1},
        {"fallback_storage_options": {}},
        {"prune_grace_s": "1"},
        {"prune_grace_s": True},
        {"sweep_after_s": "1"},
        {"sweep_after_s": -1},
        {"save_every_steps": 1.0},
        {"save_every_steps": True},
        {"save_every_seconds": "1"},
        {"save_every_seconds": 0},
        {"max_failures": 1.5},
    ],
    ids=str,
)
def test_a_manager_names_the_argument_that_is_of_another_kind(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=next(iter(arguments))):
        manager_of(tmp_path, **arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepFor(hours="1"),  # type: ignore[arg-type]
        lambda: KeepFor(hours=None),  # type: ignore[arg-type]
        lambda: KeepFor(seconds=True),
        lambda: KeepBest(["loss"]),  # type: ignore[arg-type]
        lambda: KeepBest(1),  # type: ignore[arg-type]
        lambda: KeepLast("1"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_of_another_kind_is_refused_when_made(make: Callable[[], object]) -> None:
    with pytest.raises(OptionsError):
        make()


@pytest.mark.parametrize(
    "three", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=lambda it: str(type(it))
)
def test_whole_numbers_are_taken_whosever_they_are(tmp_path: Path, three: Any) -> None:
    assert (type(KeepLast(three).n), KeepBest("x", n=three).n, KeepEvery(steps=three).steps) == (int, 3, 3)
    assert Options(concurrency=three) == Options(concurrency=3)
    with manager_of(tmp_path, retention=three, save_every_steps=three, max_failures=three) as manager:
        for step in range(1, 6):
            manager.save(step, state_of(step))
        assert manager.all_steps() == [3, 4, 5]
        assert [manager.should_save(step) for step in (2, 3)] == [False, True]


def test_seconds_are_taken_whosever_they_are(tmp_path: Path) -> None:
    assert KeepFor(hours=np.float32(1)).age_s == KeepFor(seconds=np.int64(3600)).age_s == 3600.0
    seconds = {"prune_grace_s": np.float64(1), "sweep_after_s": np.int64(1), "save_every_seconds": np.float32(1)}
    with manager_of(tmp_path, **seconds) as manager:
        manager.save(1, state_of(1))
        manager.wait(np.float64(5))
        assert manager.sweep(older_than_s=np.float64(0)) == []


@pytest.mark.parametrize("end", [SystemExit("no disk"), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_who_ends_the_program_while_it_prunes_is_heard_and_told_that_the_step_is_saved(
    tmp_path: Path, end: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(checkpoints: list[Any]) -> list[Any]:
        if len(checkpoints) == 2:
            raise end
        return checkpoints

    with caplog.at_level(logging.WARNING), manager_of(tmp_path, retention=rule) as manager:
        manager.save(1, state_of(1))
        with pytest.raises(type(end)) as raised:
            manager.save(2, state_of(2))
        assert "step 2 is saved" in raised.value.__notes__[0]
        assert any("step 2 is saved" in one for one in caplog.messages)
        assert any("step 2 is saved" in one for one in manager.report().troubles)
        manager.save(3, state_of(3))
        assert manager.all_steps() == [1, 2, 3]
