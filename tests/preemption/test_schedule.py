"""All ranks save at the same steps: by steps, by seconds, and once before the end that any of them knows of."""

from __future__ import annotations

import contextlib
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

from cloudckpt import AccumulationWindow, CheckpointManager, CloudCkptError, KeepLast, Options, OptionsError
from cloudckpt.deadline import NEVER
from cloudckpt.errors import SaveFailedError, StorageError
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
    "a new one will hardly end in time, and costs nothing": ([(50.0, "begun", 4), (81.0, "committed", 4)], True),
    "a new one can end in time": ([(50.0, "begun", 4), (79.0, "committed", 4)], True),
    "one under way leaves no time for another": (
        [(50.0, "begun", 3), (75.0, "committed", 3), (90.0, "begun", 4)],
        False,
    ),
    "one under way leaves time for another": ([(50.0, "begun", 3), (60.0, "committed", 3), (91.0, "begun", 4)], True),
}


def tell(schedule: Schedule, event: str, step: int, now_s: float) -> None:
    if event == "begun":
        schedule.begun(step, now_s)
    else:
        getattr(schedule, event)(step)


@pytest.mark.parametrize("name", STORIES)
def test_a_notice_asks_for_a_save_unless_one_is_under_way_that_will_do(name: str) -> None:
    story, expected = STORIES[name]
    now_s = 0.0
    schedule = Schedule(preemption=noticed(30.0, 100.0), clock=lambda: now_s)
    for now_s, event, step in story:
        tell(schedule, event, step, now_s)
    now_s = 100.0
    assert schedule.ask(5, ALONE) == expected
    if expected:
        schedule.begun(5, now_s)
    assert [schedule.ask(step, ALONE) for step in range(6, 9)] == [False] * 3
    assert schedule.deadline is not None
    assert (schedule.deadline.stop_s, schedule.deadline.reason) == (130.0, "preemption (test)")


class Job:
    """A schedule on a clock that a test turns, and a preemption that is told what the test says."""

    def __init__(self, **options: Any) -> None:
        self.now_s = 100.0
        self.preemption = quiet(clock=lambda: self.now_s)
        self.schedule = Schedule(preemption=self.preemption, clock=lambda: self.now_s, **options)

    def notice(self, left_s: float | None, reason: str = "r") -> None:
        deadline_s = None if left_s is None else self.now_s + left_s
        self.preemption._take(Notice(source="test", reason=reason, deadline_s=deadline_s, received_s=self.now_s))

    def ask(self, step: int) -> bool:
        return self.schedule.ask(step, ALONE)

    def save(self, step: int, outcome: str = "committed") -> None:
        self.schedule.begun(step, self.now_s)
        getattr(self.schedule, outcome)(step)


def test_until_something_newer_is_committed_a_notice_asks_again_and_again() -> None:
    job = Job()
    job.notice(30.0)
    assert job.ask(5)
    job.save(5, "failed")
    assert [job.ask(6), job.ask(7)] == [True, True], "a state that refuses begins no save"
    job.save(7)
    assert not job.ask(8)


def test_what_is_older_than_the_notice_is_waited_for_and_not_taken_for_what_it_asks() -> None:
    job = Job()
    job.schedule.begun(4, 98.0)
    job.notice(30.0)
    assert not job.ask(5)
    job.schedule.committed(4)
    assert job.ask(6)
    job.save(6)
    assert not job.ask(7)


def test_a_deadline_that_has_passed_is_over_and_all_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(every_s=50.0)
    job.notice(30.0)
    assert job.ask(5)
    job.save(5)
    assert (job.schedule.is_preempted, job.schedule.is_end_near) == (True, True)
    job.now_s = 130.0
    assert not job.ask(6)
    assert (job.schedule.is_preempted, job.schedule.is_end_near) == (False, False)
    assert job.preemption.notice is None
    assert caplog.messages[-1].startswith("the end announced by test did not come, and this job is still there")
    job.now_s = 150.0
    assert job.ask(7), "the interval is over"


def test_nothing_is_asked_for_any_more_when_the_deadline_has_passed_in_vain() -> None:
    job = Job()
    job.notice(30.0)
    assert job.ask(5)
    job.save(5, "failed")
    job.now_s = 131.0
    assert not job.ask(6)


def test_a_notice_after_one_that_is_over_counts_anew() -> None:
    job = Job()
    for step in (5, 7):
        job.notice(30.0)
        assert job.ask(step)
        job.save(step)
        assert not job.ask(step + 1)
        job.now_s += 40.0
        assert not job.ask(step + 1)
        assert not job.schedule.is_preempted


def test_a_notice_that_is_heard_when_its_time_is_over_asks_for_a_save_all_the_same() -> None:
    job = Job()
    job.notice(30.0)
    job.now_s = 140.0
    assert [job.ask(5), job.ask(6)] == [True, True]
    assert (job.schedule.is_preempted, job.schedule.end_of_saves()) == (True, NEVER)
    job.save(6)
    assert (job.ask(7), job.schedule.is_preempted) == (False, False)


def test_a_notice_without_a_time_is_over_when_its_source_takes_it_back_and_its_save_is_safe() -> None:
    job = Job()
    for step in (5, 15):
        job.notice(None)
        assert job.ask(step)
        job.preemption._withdraw(job.preemption.seen[-1])
        assert (job.ask(step + 1), job.schedule.is_preempted) == (True, True)
        job.save(step + 1)
        assert (job.ask(step + 2), job.schedule.is_preempted) == (False, False)


def test_a_notice_without_a_time_stays_while_its_source_says_it() -> None:
    job = Job()
    job.notice(None)
    job.preemption._withdraw(job.preemption.seen[-1])
    job.notice(None)
    assert job.ask(5)
    job.save(5)
    assert [job.ask(6), job.schedule.is_preempted, job.schedule.is_end_near] == [False, True, False]


def test_an_end_that_comes_much_nearer_asks_for_a_save_of_its_own_and_one_beside_it_does_not() -> None:
    job = Job()
    job.notice(120.0)
    assert job.ask(5)
    job.save(5)
    job.now_s += 10.0
    job.notice(109.0, "much the same")
    assert not job.ask(6)
    job.notice(30.0, "sooner")
    assert job.ask(7)
    job.save(7)
    assert not job.ask(8)
    job.now_s += 31.0
    assert job.ask(9), "the other end still lies ahead"


def test_who_asks_for_nothing_but_preempted_is_no_longer_when_the_deadline_has_passed() -> None:
    job = Job()
    job.notice(30.0)
    told = []
    for job.now_s in (100.0, 129.0, 131.0):
        job.schedule.hear()
        told.append(job.schedule.is_preempted)
    assert told == [True, True, False]


def test_a_save_gets_the_seconds_before_the_end_and_all_its_time_when_the_end_has_passed() -> None:
    now_s = 100.0
    schedule = Schedule(preemption=noticed(30.0, 100.0), clock=lambda: now_s)
    # Before the ranks have agreed on it, too: a save may have waited for another one since this was last asked.
    assert schedule.end_of_saves().left_s(time.monotonic()) == pytest.approx(29.5, abs=0.4)
    schedule.ask(5, ALONE)
    assert schedule.end_of_saves().left_s(time.monotonic()) == pytest.approx(29.5, abs=0.4)
    now_s = 129.9
    assert schedule.end_of_saves().left_s(time.monotonic()) == pytest.approx(1.0, abs=0.4)
    now_s = 130.1
    assert schedule.end_of_saves() is NEVER


def test_a_notice_without_a_time_asks_for_a_save_too() -> None:
    schedule = Schedule(preemption=noticed(None, 100.0), clock=lambda: 100.0)
    assert schedule.ask(5, ALONE)
    assert schedule.deadline is not None
    assert math.isinf(schedule.deadline.stop_s)


def ask_with_a_notice_on_rank_1(url: str) -> tuple[list[bool], list[bool], bool, float]:
    rank = int(os.environ["RANK"])
    with quiet(grace_s={signal.SIGUSR1: 40.0}) as preemption, CheckpointManager(url, preemption=preemption) as manager:
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
        return answers, known, deadline.reason == "preemption (SIGUSR1)", deadline.left_s(time.monotonic())


def test_a_notice_on_any_rank_asks_all_of_them_for_the_same_step_once(tmp_path: Path) -> None:
    outcomes = run(3, ask_with_a_notice_on_rank_1, str(tmp_path))
    for rank, (answers, known, is_own, left_s) in enumerate(outcomes):
        assert answers == [False] * 3 + [True] + [False] * 2
        assert known == [False] * 3 + [True] * 3
        assert is_own == (rank == 1)
        assert 0 < left_s <= 40.0
    assert [checkpoint.step for checkpoint in CheckpointManager(tmp_path).checkpoints()] == [3]


def fail_on_rank_1(url: str) -> list[bool]:
    rank = int(os.environ["RANK"])
    with quiet(grace_s=600.0) as preemption, CheckpointManager(url, preemption=preemption) as manager:
        schedule, answers = manager._saves._schedule, []
        for step in range(4):
            if rank == 0 and step == 0:
                send()
            answers.append(manager.should_save(step))
            if answers[-1]:
                schedule.begun(step, time.monotonic())
                # The others hear of it later, by the answer to the next question.
                if step > 0:
                    schedule.committed(step)
                elif rank == 1:
                    schedule.failed(step)
        return answers


def test_a_failure_that_one_rank_knows_of_asks_all_of_them_again(tmp_path: Path) -> None:
    assert run(2, fail_on_rank_1, str(tmp_path)) == [[True, True, False, False]] * 2


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


@pytest.mark.parametrize(("left_s", "words"), [(30.0, "30.0 s before the end"), (-10.125, "10.1 s after the end")])
def test_the_log_says_on_which_side_of_the_end_a_step_became_safe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left_s: float, words: str
) -> None:
    with CheckpointManager(tmp_path) as manager:
        checkpoint = manager.save(1, state_of(1))
        assert checkpoint is not None
        with caplog.at_level(logging.WARNING):
            manager._journal.begin(rank=0).committed(checkpoint, left_s=left_s)
    assert caplog.messages == [f"rank 0: step 1 is safe, {words}"]


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
    options = {"signals": [number]}
    with quiet(**options) as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        before(manager, lambda key: [signal.pthread_kill(threading.main_thread().ident or 0, number)], when=anything)
        before(manager, lambda key: send(number), verb="stream", when=anything)
        checkpoint = manager.save(1, state_of(1))
        first = preemption.notice
        state = state_of(0)
        assert manager.restore(state) == checkpoint
        assert state["config"] == {"step": 1}
        assert torch.equal(state["w"], torch.full((100,), 1.0))
        assert first is not None
        assert (first.source, preemption.notice) == (number.name, first)
        assert manager.preempted


class Clock:
    """A clock that a test turns."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def test_after_a_false_notice_pruning_goes_on_and_a_signal_gives_notice_anew(tmp_path: Path) -> None:
    clock = Clock()
    with (
        quiet(clock=clock) as preemption,
        CheckpointManager(
            tmp_path, preemption=preemption, retention=[KeepLast(1)], prune_grace_s=0, clock=clock
        ) as manager,
    ):
        for step in (1, 4):
            send()
            assert manager.should_save(step)
            manager.save(step, state_of(step))
            assert manager.preempted
            clock.now_s += 31.0
            assert (manager.should_save(step + 1), manager.preempted) == (False, False)
            manager.save(step + 2, state_of(step + 2))
            assert [checkpoint.step for checkpoint in manager.checkpoints()] == [step + 2]


def test_pruning_under_way_stops_when_notice_is_given(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, prune_grace_s=0)
    for step in range(4):
        manager.save(step, state_of(step))
    manager.close()
    with (
        quiet() as preemption,
        CheckpointManager(tmp_path, preemption=preemption, retention=[KeepLast(1)], prune_grace_s=0) as manager,
    ):
        manager.restore(state_of(0))
        with Gate(manager, verb="delete", when=lambda keys: "manifest.json" in str(keys)) as gate:
            manager.async_save(4, state_of(4)).result()
            gate.await_request()
            send()
            assert manager.should_save(5)
            assert manager.save(5, state_of(5)).step == 5, "it waits for no delete"
            gate.open()
            manager.close()
        left = [checkpoint.step for checkpoint in CheckpointManager(tmp_path).checkpoints()]
        assert left[-5:] == [1, 2, 3, 4, 5], "at most the one that was under way has gone"


def test_a_failure_before_the_notice_forbids_no_save_after_it_and_leaves_the_exit_code_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet() as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        failure = Failure(manager, StorageError("the disk is full", op="put", key="k"))
        handle = manager.async_save(1, state_of(1))
        manager._saves.background.wait()
        failure.is_on = False
        send()
        assert manager.should_save(2)
        assert manager.async_save(2, state_of(2)).result() == manager.latest()
        assert handle.done()
    assert "step 1 was not saved: the disk is full; step 2 is saved instead" in caplog.messages


def test_a_state_that_refuses_in_the_middle_of_a_window_is_asked_for_again_at_its_end(tmp_path: Path) -> None:
    window = AccumulationWindow([torch.nn.Parameter(torch.ones(3))], steps=3)
    with quiet() as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        send()
        saved = []
        for step in range(5):
            window.advance()
            if manager.should_save(step):
                with contextlib.suppress(OptionsError):
                    saved.append(manager.save(step, {"window": window}).step)
    assert saved == [2]


def test_a_save_before_the_end_waits_for_the_one_under_way_no_longer_than_there_is_time(tmp_path: Path) -> None:
    with quiet(grace_s=1.5) as preemption, CheckpointManager(tmp_path, preemption=preemption) as manager:
        with Gate(manager) as gate:
            handle = manager.async_save(1, state_of(1))
            gate.await_request()
            send()
            manager.should_save(2)
            with pytest.raises(SaveFailedError, match="step 2 was not saved: the save before it"):
                manager.save(2, state_of(2))
            gate.open()
        assert handle.result() == manager.latest()


def test_what_a_save_costs_is_counted_from_the_begin_of_its_own_work(tmp_path: Path) -> None:
    clock = Clock()
    with CheckpointManager(tmp_path, clock=clock) as manager:

        def open_late() -> None:
            clock.now_s += 50.0
            gate.open()

        with Gate(manager) as gate:
            manager.async_save(1, state_of(1))
            gate.await_request()
            threading.Timer(0.2, open_late).start()
            manager.async_save(2, state_of(2)).result()
        schedule = manager._saves._schedule
        assert schedule._took_s == 0.0
        assert manager._journal.meter._commit_s == [50.0, 0.0]
        assert manager._journal.meter._blocked_s == [0.0, 50.0]
