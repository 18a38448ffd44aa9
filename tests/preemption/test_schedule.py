"""All ranks save at the same steps: by steps, by seconds, and once before the end that any of them knows of."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, CloudCkptError, KeepLast, Options, OptionsError
from cloudckpt.errors import StorageError
from cloudckpt.preemption.notices import Notice
from cloudckpt.preemption.schedule import Schedule
from cloudckpt.preemption.watch import Preemption
from cloudckpt.ranks.vote import Vote
from tests.ranks.processes import run
from tests.store.gates import Failure, Gate, anything, before

ALONE = Vote(rank=0, size=1, timeout_s=1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers as they were before a test, and are after it."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "config": {"step": step}}


def quiet(**options: Any) -> Preemption:
    return Preemption(**{"sources": (), **options})


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def save_and_wait(manager: CheckpointManager, how: str) -> None:
    getattr(manager, how)(1, state_of(1))
    manager.wait()


# -- intervals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every_steps", "expected"), [(1, [1, 2, 3]), (2, [2]), (3, [3]), (None, [])])
def test_a_step_above_zero_that_is_a_multiple_of_the_interval_is_saved(
    every_steps: int | None, expected: list[int]
) -> None:
    schedule = Schedule(every_steps=every_steps)
    assert [step for step in range(4) if schedule.ask(step, ALONE)] == expected


def test_seconds_are_counted_from_the_begin_of_the_newest_save() -> None:
    now_s = 100.0
    schedule = Schedule(every_s=10, clock=lambda: now_s)
    saved_at = []
    for step in range(40):
        if schedule.ask(step, ALONE):
            saved_at.append(now_s)
            schedule.begun(step, now_s)
            schedule.committed(step)
        now_s += 4.0
    assert saved_at == [112.0 + 12.0 * number for number in range(len(saved_at))]
    assert len(saved_at) == 13


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 0},
        {"every_steps": 1.5},
        {"every_steps": True},
        {"every_s": "1"},
        {"every_s": 0},
        {"every_s": math.inf},
        {"every_s": math.nan},
    ],
)
def test_an_interval_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match="save_every_"):
        Schedule(**options)


# -- notices -----------------------------------------------------------------------------------------------


def noticed(left_s: float | None, now_s: float) -> Preemption:
    """A preemption that was told so."""
    preemption = quiet()
    deadline_s = None if left_s is None else now_s + left_s
    preemption._seen.append(Notice(source="test", reason="r", deadline_s=deadline_s, received_s=now_s))
    return preemption


# What happened to the newest save at which seconds, before somebody asks about step 5 at 100: each event and its step.
STORIES: dict[str, tuple[list[tuple[float, str, int]], bool]] = {
    "nothing is saved": ([], True),
    "a recent one is saved": ([(97.0, "begun", 4), (97.0, "committed", 4)], True),
    "this very step is saved": ([(97.0, "begun", 5), (97.0, "committed", 5)], False),
    "a recent one is under way": ([(97.0, "begun", 4)], False),
    "a recent one failed": ([(97.0, "begun", 4), (98.0, "failed", 4)], True),
    "this very step failed": ([(97.0, "begun", 5), (98.0, "failed", 5)], True),
    "one before the newest failed": ([(97.0, "begun", 4), (98.0, "failed", 3)], False),
    "the newest is old": ([(94.0, "begun", 4)], True),
    "a new one could not end in time": ([(50.0, "begun", 4), (81.0, "committed", 4)], False),
    "a new one can end in time": ([(50.0, "begun", 4), (79.0, "committed", 4)], True),
    "one under way leaves no time for another": (
        [(50.0, "begun", 3), (75.0, "committed", 3), (90.0, "begun", 4)],
        False,
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_notice_asks_for_a_save_once_unless_the_newest_one_will_do(name: str) -> None:
    story, expected = STORIES[name]
    now_s = 0.0
    schedule = Schedule(preemption=noticed(30.0, 100.0), clock=lambda: now_s)
    for now_s, event, step in story:
        if event == "begun":
            schedule.begun(step, now_s)
        else:
            getattr(schedule, event)(step)
    now_s = 100.0
    assert schedule.ask(5, ALONE) == expected
    assert [schedule.ask(step, ALONE) for step in range(6, 9)] == [False] * 3
    assert schedule.deadline is not None
    assert schedule.deadline.stop_s == 130.0


def test_a_save_gets_the_seconds_before_the_end_and_all_its_time_when_the_end_has_passed() -> None:
    now_s = 100.0
    schedule = Schedule(preemption=noticed(30.0, 100.0), clock=lambda: now_s)
    assert schedule.seconds_for_a_save() is None
    schedule.ask(5, ALONE)
    assert schedule.seconds_for_a_save() == 29.5
    now_s = 129.9
    assert schedule.seconds_for_a_save() == 1.0
    now_s = 130.1
    assert schedule.seconds_for_a_save() is None
    assert schedule.is_preempted


def test_a_notice_without_a_time_asks_for_a_save_too() -> None:
    schedule = Schedule(preemption=noticed(None, 100.0), clock=lambda: 100.0)
    assert schedule.ask(5, ALONE)
    assert schedule.deadline is not None
    assert math.isinf(schedule.deadline.stop_s)


def ask_with_a_notice_on_rank_1(url: str) -> tuple[list[bool], list[bool], bool, float]:
    rank = int(os.environ["RANK"])
    with quiet(grace_s=40.0) as preemption, CheckpointManager(url, preemption=preemption) as manager:
        answers, known = [], []
        for step in range(6):
            if rank == 1 and step == 3:
                send(signal.SIGUSR1)
            answers.append(manager.should_save(step))
            known.append(manager.preempted)
            if answers[-1]:
                manager.save(step, state_of(step))
        deadline = manager._saves._schedule.deadline
        assert deadline is not None
        return answers, known, deadline.source == "SIGUSR1", deadline.left_s(time.monotonic())


def test_a_notice_on_any_rank_asks_all_of_them_for_the_same_step_once(tmp_path: Path) -> None:
    outcomes = run(3, ask_with_a_notice_on_rank_1, str(tmp_path))
    for rank, (answers, known, is_own, left_s) in enumerate(outcomes):
        assert answers == [False] * 3 + [True] + [False] * 2
        assert known == [False] * 3 + [True] * 3
        assert is_own == (rank == 1)
        assert 0 < left_s <= 40.0
    assert [checkpoint.step for checkpoint in CheckpointManager(tmp_path).checkpoints()] == [3]


def ask_about_different_steps(url: str) -> str:
    with CheckpointManager(url, save_every_seconds=1000) as manager:
        with pytest.raises(OptionsError) as caught:
            manager.should_save(5 + int(os.environ["RANK"]))
        return str(caught.value)


def test_ranks_that_ask_about_different_steps_are_told_so(tmp_path: Path) -> None:
    for told in run(2, ask_about_different_steps, str(tmp_path)):
        assert "ranks ask about different steps, 5 to 6" in told


# -- the manager -------------------------------------------------------------------------------------------


def test_a_preempted_manager_saves_at_the_next_step_and_keeps_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = [KeepLast(1)]
    with (
        quiet(grace_s=30.0) as preemption,
        CheckpointManager(tmp_path, preemption=preemption, retention=rules, prune_grace_s=0) as manager,
        caplog.at_level(logging.WARNING),
    ):
        manager.save(1, state_of(1))
        assert (manager.should_save(2), manager.preempted) == (False, False)
        send()
        assert not manager.preempted, "a loop that ended now would not have saved"
        assert (manager.should_save(3), manager.preempted) == (True, True)
        manager.async_save(3, state_of(3)).result()
        assert not manager.should_save(4)
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 3], "pruning can wait"
        assert manager.exit_code == 143
    assert "preempted (SIGTERM), " in caplog.text
    assert "step 3 is safe, " in caplog.text
    assert " s before the end" in caplog.text


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_save_that_failed_is_no_reason_not_to_save_before_the_end(tmp_path: Path, how: str) -> None:
    with quiet() as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        failure = Failure(manager, StorageError("the disk is full", op="put", key="k"))
        with pytest.raises(StorageError):
            save_and_wait(manager, how)
        failure.is_on = False
        send()
        assert manager.should_save(2)
        assert manager.save(2, state_of(2)).step == 2


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_store_that_hangs_fails_the_last_save_before_the_end(tmp_path: Path, how: str) -> None:
    options = Options(finish_timeout_s=30)
    with (
        quiet(grace_s=2.0) as preemption,
        CheckpointManager(tmp_path, preemption=preemption, options=options) as manager,
    ):
        manager.save(0, state_of(0))
        manager._saves._schedule._newest = None
        with Gate(manager, when=anything):
            send()
            assert manager.should_save(1)
            began_s = time.monotonic()
            with pytest.raises(CloudCkptError):
                save_and_wait(manager, how)
            # Far less than the 600 s that a save may stand still otherwise.
            assert time.monotonic() - began_s < 10
    assert [checkpoint.step for checkpoint in CheckpointManager(tmp_path).checkpoints()] == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_in_the_middle_of_a_save_and_a_restore_disturb_neither(tmp_path: Path, number: signal.Signals) -> None:
    with quiet() as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        before(manager, lambda key: [signal.pthread_kill(threading.main_thread().ident or 0, number)], when=anything)
        before(manager, lambda key: send(number), verb="get", when=anything)
        checkpoint = manager.save(1, state_of(1))
        first = preemption.notice
        state = state_of(0)
        assert manager.restore(state) == checkpoint
        assert state["config"] == {"step": 1}
        assert torch.equal(state["w"], torch.full((100,), 1.0))
        assert first is not None
        assert (first.source, preemption.notice) == (number.name, first)
        assert manager.preempted
