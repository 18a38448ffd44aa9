"""Ranks see the largest of their numbers, and name in time whoever does not come."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from cloudckpt import RankLostError
from cloudckpt.ranks.vote import Vote
from tests.effort import diagonal
from tests.ranks.processes import World, run

TIMEOUT_S = 2.0


def vote_of(timeout_s: float = 30.0) -> Vote:
    return Vote(rank=dist.get_rank(), size=dist.get_world_size(), timeout_s=timeout_s)


def test_one_rank_agrees_with_itself() -> None:
    assert Vote(rank=0, size=1, timeout_s=1).largest([3, -4], what="a test") == [3, -4]


def vote_often() -> list[list[int]]:
    vote, rank = vote_of(), dist.get_rank()
    return [vote.largest([rank * round_, -rank, 2**60 + rank], what="a test") for round_ in range(50)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_sees_the_largest_at_each_place(size: int) -> None:
    expected = [[(size - 1) * round_, 0, 2**60 + size - 1] for round_ in range(50)]
    assert run(size, vote_often) == [expected] * size


def lose(how: str, victim: int, is_warm: bool) -> tuple[Any, float]:
    vote = vote_of(TIMEOUT_S)
    if is_warm:
        vote.largest([1], what="the first vote")
    dist.barrier()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    began_s = time.monotonic()
    with pytest.raises(RankLostError) as caught:
        vote.largest([1], what="should_save of step 7")
    elapsed_s = time.monotonic() - began_s
    if dist.get_rank() == 0:
        time.sleep(4.0)  # its store is what the others ask who is there
    return caught.value, elapsed_s


@diagonal("how, victim, is_warm", ["stop", "kill"], [2, 0], [True, False])
def test_a_lost_rank_is_named_by_every_live_one_in_time(how: str, victim: int, is_warm: bool) -> None:
    outcomes = World(3, lose, how, victim, is_warm).outcomes(timeout_s=60, but=[victim])
    for rank in {0, 1, 2} - {victim}:
        assert outcomes[rank].error is None, outcomes[rank].trace
        assert outcomes[rank].has_ended, f"rank {rank} waits for ever"
        error, elapsed_s = outcomes[rank].value
        assert elapsed_s < TIMEOUT_S + 8
        assert error.phase == "should_save of step 7"
        assert error.ranks == (victim,)


def be_signalled() -> tuple[list[int], bool]:
    vote = vote_of()
    vote.largest([0], what="the first vote")
    seen: list[float] = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(time.monotonic()))
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1.0)
    else:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    found = vote.largest([dist.get_rank()], what="a test")
    ended_s = time.monotonic()
    return found, dist.get_rank() == 1 or (len(seen) == 1 and seen[0] < ended_s - 0.2)


def test_handlers_of_signals_run_while_a_rank_waits() -> None:
    assert run(2, be_signalled) == [([1], True)] * 2
