"""Where a machine has no thread left, fewer do the work, and nobody waits for one that never comes."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt.threads as threads_room
from cloudckpt import CheckpointManager, CloudCkptError
from cloudckpt.threads import begin, each, revoke, started, worker
from cloudckpt.transfer.pool import Budget, Watch, Work, run_all
from tests.programs import run_forked


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what lets so many more threads start; the others are refused, or do not come."""
    real = threading._start_new_thread  # type: ignore[attr-defined]

    def allow(count: int, *, is_silent: bool = False) -> None:
        left = iter(range(count))

        def start(*args: Any) -> Any:
            is_there = next(left, None) is not None
            monkeypatch.setattr(threads_room, "_TURNS", 100 if is_there else 0)
            if not is_there and not is_silent:
                raise RuntimeError("can't start new thread")
            return real(*args) if is_there else 0

        monkeypatch.setattr(threading, "_start_new_thread", start)

    return allow


LIMITS = pytest.mark.parametrize("is_silent", [False, True], ids=["refused", "not coming"])


@LIMITS
@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_is_called_by_those_that_are_there(allow: Any, count: int, is_silent: bool) -> None:
    allow(count, is_silent=is_silent)
    assert each(range(50), lambda number: number * number, threads=8, name="t") == [n * n for n in range(50)]


def test_the_first_fault_is_raised_and_nothing_new_begins() -> None:
    called: list[int] = []

    def call(number: int) -> None:
        called.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        each(range(1000), call, threads=4, name="t")
    assert len(called) <= 4


@LIMITS
def test_a_thread_that_cannot_start_is_an_error_of_ours_and_never_works(allow: Any, is_silent: bool) -> None:
    allow(0, is_silent=is_silent)
    with pytest.raises(CloudCkptError, match=r"a thread could not be started: .*ulimit"):
        started(lambda: None, name="t")


class InterruptedHereError(Exception):
    """What a signal's handler raises."""


@pytest.mark.parametrize("is_quick", [False, True], ids=["before the thread came", "when it had come"])
def test_a_start_that_is_interrupted_raises_what_interrupted_it(
    monkeypatch: pytest.MonkeyPatch, is_quick: bool
) -> None:
    real = threading._start_new_thread  # type: ignore[attr-defined]
    worked = threading.Event()

    def start(*args: Any) -> Any:
        if is_quick:
            real(*args)
            worked.wait(60)
        raise InterruptedHereError

    monkeypatch.setattr(threading, "_start_new_thread", start)
    thread = worker(worked.set, name="t")
    with pytest.raises(InterruptedHereError):
        begin(thread)
    assert revoke(thread) is not is_quick


def test_a_worker_that_is_revoked_never_works() -> None:
    worked = threading.Event()
    thread = worker(worked.set, name="t")
    assert revoke(thread)
    thread.start()
    thread.join()
    assert not worked.is_set()


def test_locks_that_nobody_has_any_more_are_forgotten() -> None:
    for _ in range(3000):
        threads_room.new_lock()
    assert len(threads_room._LOCKS) < 3000


def test_every_lock_is_one_that_a_forked_child_finds_open() -> None:
    package = Path(threads_room.__file__).parent
    makers = {
        path.name for path in package.rglob("*.py") if re.search(r"(?<!: )threading\.Lock(\(\)|\))", path.read_text())
    }
    # In `hands` one is a signal between two threads, of which a child has at most one.
    assert makers == {"threads.py", "hands.py"}


def work_of(count: int, budget: Budget) -> list[Work[int]]:
    return [
        Work(name=str(number), size_bytes=1, cost_bytes=0, call=lambda number=number: number)  # type: ignore[misc]
        for number in range(count)
    ]


@LIMITS
def test_transfers_go_by_the_threads_that_are_there(allow: Any, is_silent: bool) -> None:
    allow(1, is_silent=is_silent)
    budget = Budget(10)
    assert run_all(work_of(30, budget), concurrency=8, budget=budget, watch=Watch()) == list(range(30))


@LIMITS
def test_transfers_without_any_thread_say_so(allow: Any, is_silent: bool) -> None:
    allow(0, is_silent=is_silent)
    budget = Budget(10)
    with pytest.raises(CloudCkptError, match="a thread could not be started"):
        run_all(work_of(3, budget), concurrency=8, budget=budget, watch=Watch())


@pytest.mark.parametrize("how", ["save", "async_save", "restore", "checkpoints"])
@LIMITS
def test_a_manager_without_threads_does_it_or_says_why(tmp_path: Path, allow: Any, how: str, is_silent: bool) -> None:
    state = {"w": torch.arange(1000.0)}
    with CheckpointManager(tmp_path, progress="off") as manager:
        for step in (1, 2, 3):
            manager.save(step, state)
        calls = {
            "save": lambda: manager.save(4, state),
            "async_save": lambda: manager.async_save(4, state),
            "restore": lambda: manager.restore(state),
            "checkpoints": manager.checkpoints,
        }
        allow(0, is_silent=is_silent)
        if how == "checkpoints":
            assert len(calls[how]()) == 3
        else:
            with pytest.raises(CloudCkptError, match="a thread could not be started"):
                calls[how]()
        allow(100)
        manager.save(5, state)


AT_EXIT = """
import atexit, sys, torch
from cloudckpt import CheckpointManager, CloudCkptError
manager = CheckpointManager(sys.argv[1], progress="off")
def end():
    state = {"w": torch.ones(3)}
    for call in (
        lambda: manager.save(2, state), lambda: manager.async_save(3, state).result(30), manager.checkpoints,
        lambda: manager.restore(state), manager.close,
    ):
        try:
            call()
        except CloudCkptError as exc:
            assert "save before it does, not in atexit" in str(exc), exc
    print("all is ours")
atexit.register(end)
"""


def test_what_is_asked_in_atexit_is_done_or_says_why(tmp_path: Path) -> None:
    ended = run_forked("-c", AT_EXIT, tmp_path / "r")
    assert "all is ours" in ended.stdout, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
