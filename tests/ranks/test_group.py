"""Ranks that agree: values and errors reach every rank, and no live rank waits for ever for another."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cloudckpt.errors import AccessDeniedError, FencedError, OptionsError, RankLostError
from cloudckpt.ranks.calling import Caller
from cloudckpt.ranks.group import Group
from cloudckpt.ranks.meeting import Meeting
from cloudckpt.ranks.outcome import RanksFailedError, UndecidedError
from tests.effort import first
from tests.ranks.processes import World, free_port, run

DEADLINE_S = 1.5


def _sum_of_ranks() -> tuple[int, list[int]]:
    group = Group.of_world()
    with group.session("adding", deadline_s=30):
        total = group.agree("sum", lambda: group.rank, sum)
        mine = group.deal("share", lambda: group.rank, lambda values: [value * 10 for value in values])
    return total, [mine]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_has_the_decision_on_all_parts_or_its_own_answer(size: int) -> None:
    assert run(size, _sum_of_ranks) == [(sum(range(size)), [rank * 10]) for rank in range(size)]


def _raise_on(ranks: tuple[int, ...], where: str) -> list[str]:
    group = Group.of_world()

    def mine() -> int:
        if group.rank in ranks and where == "mine":
            raise AccessDeniedError(f"rank {group.rank} may not", key="a")
        return 1

    def decide(values: list[int]) -> int:
        if where == "decide":
            raise FencedError("an older job")
        return len(values)

    seen = []
    for _ in range(2):  # an error that all know of leaves the group usable
        try:
            with group.session("work", deadline_s=30):
                group.agree("part", mine, decide)
        except RanksFailedError as exc:
            seen.append(f"{sorted(exc.failures)} {type(exc.failures[ranks[0]]).__name__} {exc.failures[ranks[0]].key}")  # type: ignore[attr-defined]
        except FencedError as exc:
            seen.append(str(exc))
    return seen


@pytest.mark.parametrize("ranks", [(0,), (2,), (0, 1, 2)])
def test_an_error_of_some_ranks_reaches_all_with_its_fields(ranks: tuple[int, ...]) -> None:
    assert run(3, _raise_on, ranks, "mine") == [[f"{list(ranks)} AccessDeniedError a"] * 2] * 3


def test_an_error_of_the_decision_reaches_all() -> None:
    assert run(2, _raise_on, (0,), "decide") == [["an older job"] * 2] * 2


class _OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def _raise_odd() -> str:
    group = Group.of_world()

    def mine() -> None:
        if group.rank == 1:
            raise _OddError(1, 2)

    try:
        with group.session("work", deadline_s=30):
            group.agree("part", mine, len)
    except RanksFailedError as exc:
        return f"{type(exc.failures[1]).__name__}: {exc.failures[1]}"
    return ""


def test_an_error_that_does_not_pickle_is_told_by_its_text() -> None:
    assert run(2, _raise_odd)[0] == "CloudCkptError: _OddError: odd"


def _different_calls() -> str:
    group = Group.of_world()
    try:
        with group.session("x", deadline_s=30):
            group.agree("save step 1" if group.rank else "save step 2", lambda: 0, len)
    except OptionsError as exc:
        return str(exc)
    return ""


def test_ranks_that_make_different_calls_are_told_so() -> None:
    said = run(3, _different_calls)
    assert (
        said
        == ["rank 0 is at 'save step 2' and rank 1 at 'save step 1'; call the same save or restore on every rank"] * 3
    )


def _meet_then(how: str, victim: int, *, warm: bool, recover: bool = False) -> tuple[str, tuple[int, ...], float, str]:
    group = Group.of_world()
    if warm:
        with group.session("warm-up", deadline_s=30):
            group.agree("sum", lambda: 1, sum)
    began_s = time.monotonic()
    after = ""
    try:
        if group.rank == victim and how == "absent":
            time.sleep(3 * DEADLINE_S)
        with group.session("work", deadline_s=DEADLINE_S):
            group.agree("one", lambda: 1, sum)
            if group.rank == victim:
                _suffer(how)
            group.agree("two", lambda: 1, sum)
    except RankLostError as exc:
        text, ranks = str(exc), exc.ranks
    else:
        return "nothing", (), 0.0, ""
    elapsed_s = time.monotonic() - began_s
    if recover:
        time.sleep(3 * DEADLINE_S)
        with group.session("again", deadline_s=30):
            after = f"{group.agree('three', lambda: 1, sum)} ranks again"
    return text, ranks, elapsed_s, after


def _suffer(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "raise":
        raise ValueError("of its own")
    time.sleep(4 * DEADLINE_S)  # hangs without progress


CASES = [(how, victim) for how in ("kill", "stop", "raise", "hang") for victim in (0, 1, 2)]
CASES += [("absent", 0), ("absent", 2)]


@pytest.fixture(scope="module")
def lost_again() -> dict[tuple[str, int], list[Any]]:
    return _lose_all(CASES, warm=True)


@pytest.fixture(scope="module")
def lost_at_first() -> dict[tuple[str, int], list[Any]]:
    return _lose_all(CASES, warm=False)


def _lose_all(cases: list[tuple[str, int]], *, warm: bool) -> dict[tuple[str, int], list[Any]]:
    """Go through several cases at the same time: they do nothing but wait."""
    found = {}
    for start in range(0, len(cases), 5):
        worlds = {case: World(3, _job, *case, warm) for case in cases[start : start + 5]}
        for (how, victim), world in worlds.items():
            outcomes = world.outcomes(timeout_s=DEADLINE_S + 30, but=[victim])
            found[how, victim] = [outcome for outcome in outcomes if outcome.rank != victim]
    return found


def _job(how: str, victim: int, warm: bool) -> Any:
    return _meet_then(how, victim, warm=warm)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_live_rank_raises_within_the_deadline_and_names_the_rank_that_is_lost(
    lost_again: dict[tuple[str, int], list[Any]], case: tuple[str, int]
) -> None:
    _check_lost(lost_again[case], *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_rank_lost_in_the_first_session_is_named_as_well(
    lost_at_first: dict[tuple[str, int], list[Any]], case: tuple[str, int]
) -> None:
    _check_lost(lost_at_first[case], *case)


def _check_lost(outcomes: list[Any], how: str, victim: int) -> None:
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome.has_ended, outcome
        assert outcome.error is None, outcome.trace
        text, ranks, elapsed_s, _ = outcome.value
        assert ranks == (victim,), text
        assert f"rank {victim}" in text or victim == 0
        assert elapsed_s < DEADLINE_S + 10
        if how == "absent":
            assert f"rank {victim} has not come" in text or f"rank {victim} is silent" in text


def _recover(victim: int) -> Any:
    return _meet_then("hang", victim, warm=True, recover=True)


def test_ranks_that_lost_one_meet_again_when_it_is_back() -> None:
    values = run(3, _recover, 1)
    assert [value[3] for value in values] == ["3 ranks again"] * 3


def _lose_in_the_decision() -> list[str]:
    group = Group.of_world()

    def decide(_: list[int]) -> int:
        raise RankLostError("rank 1 was lost before", ranks=[1])

    seen = []
    with pytest.raises(RankLostError) as caught, group.session("work", deadline_s=30):
        group.conclude("commit", lambda: 1, decide)
    seen.append(str(caught.value))
    with group.session("again", deadline_s=30):
        seen.append(str(group.conclude("commit", lambda: 1, sum)))
    return seen


def test_a_loss_that_was_the_decision_leaves_the_group_usable() -> None:
    assert run(2, _lose_in_the_decision) == [["rank 1 was lost before", "2"]] * 2


def _decide_and_stand_still() -> str:
    group, held = Group.of_world(), threading.Event()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cloudckpt.ranks").addHandler(handler)

    def decide(values: list[int]) -> int:
        group._open_link().submit(held.wait)  # the thread gets to no message
        return sum(values)

    try:
        with group.session("work", deadline_s=DEADLINE_S):
            total = group.conclude("commit", lambda: 1, decide)
    except UndecidedError:
        return "undecided"  # by rank 1, if it was not told in the end
    held.set()
    return f"{total}: {lines}"


def test_ranks_that_could_not_be_told_of_what_stands_are_named_also_if_sending_never_began() -> None:
    said = run(2, _decide_and_stand_still)[0]
    assert said == "2: [\"rank 0: rank 1 could not be told of 'commit', which stands\"]"


def _leave_by_an_error() -> list[str]:
    group = Group.of_world()
    with pytest.raises((ValueError, RankLostError)), group.session("work", deadline_s=DEADLINE_S):
        _suffer("raise") if group.rank == 1 else group.agree("one", lambda: 1, sum)
    stop_s = time.monotonic() + 30
    while (names := _threads_of_ours()) and group.rank == 1 and time.monotonic() < stop_s:
        time.sleep(0.01)
    return names


def _threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cloudckpt")]


def test_a_link_that_was_given_up_keeps_no_thread() -> None:
    assert run(2, _leave_by_an_error)[1] == []


def _join_late() -> int:
    """Let the thread that meets the other ranks begin when it was looked for three times."""
    begin, looks = threading.Event(), iter(range(3))
    serve, fault = Caller._serve, Meeting.fault

    def serve_late(self: Caller) -> None:
        begin.wait()
        serve(self)

    def look(self: Meeting) -> RankLostError | None:
        if next(looks, None) is None:
            begin.set()
        return fault(self)

    Caller._serve, Meeting.fault = serve_late, look  # type: ignore[method-assign]
    group = Group.of_world()
    with group.session("work", deadline_s=30):
        return group.agree("one", lambda: 1, sum)


def test_no_rank_is_lost_because_a_thread_of_ours_begins_late() -> None:
    assert run(2, _join_late) == [2, 2]


def _come_alone(how: str) -> tuple[tuple[int, ...], float]:
    group = Group.of_world()
    dist.barrier()
    if group.rank == 0:
        time.sleep(0.2)  # until the other one has left the barrier
        _suffer(how)
    time.sleep(0.6)
    began_s = time.monotonic()
    with pytest.raises(RankLostError) as caught, group.session("work", deadline_s=DEADLINE_S):
        group.agree("one", lambda: 1, sum)
    return caught.value.ranks, time.monotonic() - began_s


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_0_that_was_lost_before_the_first_session_is_named_in_time(how: str) -> None:
    outcome = World(2, _come_alone, how).outcomes(timeout_s=DEADLINE_S + 30, but=[0])[1]
    assert outcome.has_ended, "rank 1 waits for ever"
    assert outcome.error is None, outcome.trace
    ranks, elapsed_s = outcome.value
    assert ranks == (0,)
    assert elapsed_s < DEADLINE_S + 10


def test_a_process_without_a_group_decides_alone() -> None:
    assert not dist.is_initialized()
    group = Group.of_world()
    with group.session("alone", deadline_s=1):
        assert group.agree("x", lambda: 4, lambda values: values) == [4]
        assert group.deal("x", lambda: 4, lambda values: values) == 4
        with pytest.raises(RanksFailedError) as caught:
            group.agree("x", lambda: 1 // 0, len)
    assert isinstance(caught.value.failures[0], ZeroDivisionError)


_ENDING = """
import atexit, sys, threading
import torch.distributed as dist

def tell():  # after what the package does at the end
    print([thread.name for thread in threading.enumerate() if thread.name.startswith("cloudckpt")], file=sys.stderr)
    if sys.argv[1] == "give up" and group.rank == 1:
        store.set("ended", "yes")

atexit.register(tell)
from cloudckpt.errors import RankLostError
from cloudckpt.ranks.group import Group

dist.init_process_group("gloo")
group = Group.of_world()
store = dist.distributed_c10d._get_default_store()
with group.session("work", deadline_s=30):
    assert group.agree("sum", lambda: 1, sum) == 2
if sys.argv[1] == "give up":  # rank 0 does not come to an exchange, in which the other one waits for it in C++
    try:
        with group.session("more", deadline_s=30):
            if group.rank == 0:
                raise ValueError("no")
            group.agree("sum", lambda: 1, sum)
    except (ValueError, RankLostError) as exc:
        assert "no" in str(exc), exc
    if group.rank == 0:
        store.get("ended")  # no end of this process lets the other's thread go
if sys.argv[1] == "destroy":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", first(["destroy", "leave", "give up"], ["give up"]))
def test_processes_end_well_and_without_a_thread_of_ours_whatever_became_of_their_group(
    how: str,
) -> None:
    port = str(free_port())
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ENDING, how],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    try:
        ended = [(process.communicate()[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()

    # A daemon thread that is left may hold the gloo group when the interpreter goes, and the process aborts.
    assert ended == [("[]\n", 0)] * 2
