"""What every rank must give alike is compared before ranks wait for each other, and named with the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, OptionsError, Preemption
from tests.effort import diagonal
from tests.ranks.processes import run

# Ranks that wait for each other in vain do so for that long, and then raise another error.
OPTIONS = {"progress_timeout_s": 20}
DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "preemption": (
        "save_every_seconds or preemption is 'not given' on rank 0 and 'given' on rank 1",
        {},
        {"preemption": True},
    ),
    "seconds": (
        "save_every_seconds or preemption is 'given' on rank 0 and 'not given' on rank 1",
        {"save_every_seconds": 1000.0},
        {},
    ),
    "steps": ("save_every_steps is 2 on rank 0 and 3 on rank 1", {"save_every_steps": 2}, {"save_every_steps": 3}),
    "on_error": ("on_error is 'raise' on rank 0 and 'warn' on rank 1", {}, {"on_error": "warn"}),
    "retention": ("retention is 'not given' on rank 0 and 'given' on rank 1", {}, {"retention": 2}),
}


def state() -> dict[str, Any]:
    return {"w": torch.ones(100)}


def rank_of() -> int:
    return torch.distributed.get_rank()


def met(call: Callable[[], object]) -> str:
    """Return what a call is refused with, once every rank is done with it."""
    try:
        call()
    except OptionsError as exc:
        return str(exc)
    finally:
        torch.distributed.barrier()
    return ""


def train(path: Path, mine: list[dict[str, Any]], *, asks: bool = True) -> str:
    def steps() -> None:
        manager = CheckpointManager(path, options=OPTIONS, **mine[rank_of()])
        for step in range(1, 4):
            if asks:
                manager.should_save(step)
            manager.save(step, state())

    return met(steps)


@pytest.mark.parametrize("name", DIFFERENT)
def test_options_that_differ_are_named_on_every_rank(tmp_path: Path, name: str) -> None:
    words, *mine = DIFFERENT[name]

    for said in run(2, train, tmp_path, mine):
        assert said == f"{words}; give every rank the same, and start the job again"


def watch_otherwise(path: Path) -> str:
    every = {"save_every_seconds": 1000.0}
    with Preemption(signals=(), check=lambda: None) as preemption:
        return train(path, [every, {"preemption": preemption}])


def test_ranks_that_vote_may_have_reasons_of_their_own(tmp_path: Path) -> None:
    assert run(2, watch_otherwise, tmp_path) == ["", ""]


def test_rank_0_alone_may_have_rules(tmp_path: Path) -> None:
    assert run(2, train, tmp_path, [{"retention": 2}, {}]) == ["", ""]


def ask_on_rank_0_alone(path: Path) -> list[bool]:
    with CheckpointManager(path, options=OPTIONS, save_every_steps=2 if rank_of() == 0 else None) as manager:
        due = []
        for step in range(1, 5):
            told = [manager.should_save(step) if rank_of() == 0 else None]
            torch.distributed.broadcast_object_list(told)
            due.append(bool(told[0]))
            if told[0]:
                manager.save(step, state())
        return due


def test_rank_0_alone_may_ask_for_the_steps(tmp_path: Path) -> None:
    assert run(2, ask_on_rank_0_alone, tmp_path) == [[False, True, False, True]] * 2


def skip_on_one(path: Path, first: int, how: str) -> tuple[str, list[int]]:
    with CheckpointManager(path, options=OPTIONS) as manager:
        manager.save(1, state())

        def save() -> None:
            if rank_of() == first:
                (path / "first").touch()
            while not (path / "first").exists():
                time.sleep(0.01)
            time.sleep(0.5 * (rank_of() != first))  # till the other one waits
            if rank_of() == 1:
                manager.async_save(2, state(), on_busy="skip")
            elif how == "async":
                manager.async_save(2, state(), on_busy="wait")
            else:
                manager.save(2, state())

        return met(save), manager.all_steps()


@diagonal("first, how", [0, 1], ["async", "sync"])
def test_a_rank_that_skips_and_one_that_waits_are_told_so_whoever_comes_first(
    tmp_path: Path, first: int, how: str
) -> None:
    words = "on_busy is 'wait' on rank 0 and 'skip' on rank 1; give every rank the same, and start the job again"

    assert run(2, skip_on_one, tmp_path, first, how) == [(words, [1])] * 2


def save_again(path: Path) -> list[str]:
    with CheckpointManager(path, options=OPTIONS) as manager:
        manager.save(1, state(), exists="skip" if rank_of() else "raise")  # is of no matter: nothing is there yet
        return [
            met(lambda: manager.save(1, state(), exists="skip" if rank_of() else "raise")),
            met(lambda: manager.save(2, state())),
        ]


def test_a_rank_that_takes_what_is_saved_and_one_that_does_not_are_told_so(tmp_path: Path) -> None:
    words = "exists is 'raise' on rank 0 and 'skip' on rank 1; give every rank the same, and start the job again"

    one, other = run(2, save_again, tmp_path)

    assert {one[0], other[0]} <= {words, ""}
    assert words in (one[0], other[0])
    assert one[1] == other[1] == words


def open_again(path: Path) -> list[str]:
    each = [[{"save_every_steps": 2}] * 2, [{"save_every_steps": 3, "preemption": True}] * 2]
    return [train(path, mine, asks=True) if place == 0 else ask(path, mine) for place, mine in enumerate(each)]


def ask(path: Path, mine: list[dict[str, Any]]) -> str:
    with CheckpointManager(path, options=OPTIONS, **mine[rank_of()]) as manager:
        return met(lambda: manager.should_save(7))


def test_a_manager_is_not_compared_with_the_one_before(tmp_path: Path) -> None:
    assert run(2, open_again, tmp_path) == [["", ""]] * 2
