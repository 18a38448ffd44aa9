"""Ranks that were asked for different things find so at once, and nothing else is taken for a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from cloudckpt import OptionsError
from cloudckpt.ranks import Accord


@pytest.fixture
def ranks() -> list[Accord]:
    store = dist.HashStore()
    return [Accord("a job", rank=rank, connect=lambda: store) for rank in range(3)]


def check_until_told(accord: Accord) -> None:
    while True:
        accord.check()


def test_ranks_that_are_alike_go_on(ranks: list[Accord]) -> None:
    for call in ("first", "second"):
        for accord in ranks:
            accord.compare(call, {"on_busy": "wait", "steps": 5})
            accord.check()


def test_whoever_comes_later_names_both_values_with_their_ranks(ranks: list[Accord]) -> None:
    ranks[2].compare("a call", {"on_busy": "skip", "steps": 5})

    with pytest.raises(OptionsError, match=r"^on_busy is 'wait' on rank 1 and 'skip' on rank 2; give every rank"):
        ranks[1].compare("a call", {"on_busy": "wait", "steps": 5})


def test_whoever_came_first_is_told_while_it_waits_and_at_the_next_call(ranks: list[Accord]) -> None:
    for accord, steps in zip(ranks, (5, 5, None), strict=True):
        if steps:
            accord.compare("a call", {"steps": steps})
        else:
            with pytest.raises(OptionsError, match="steps is 5 on rank 0 and None on rank 2"):
                accord.compare("a call", {"steps": steps})

    with pytest.raises(OptionsError, match="steps is 5 on rank 0 and None on rank 2"):
        check_until_told(ranks[0])
    with pytest.raises(OptionsError, match="steps is 5 on rank 0 and None on rank 2"):
        ranks[1].compare("another call", {})


def test_what_only_one_of_two_ranks_names_is_no_difference(ranks: list[Accord]) -> None:
    ranks[0].compare("a call", {"on_busy": "wait", "exists": "skip"})
    ranks[1].compare("a call", {"on_busy": "wait"})


def test_ranks_at_different_calls_are_not_compared(ranks: list[Accord]) -> None:
    ranks[0].compare("a call", {"on_busy": "wait"})
    ranks[1].compare("another call", {"on_busy": "skip"})


def test_a_call_that_is_forgotten_is_compared_with_nothing(ranks: list[Accord]) -> None:
    ranks[0].compare("a call", {"on_busy": "wait"})
    ranks[0].forget("a call").result()
    ranks[1].compare("a call", {"on_busy": "skip"})


def test_a_store_that_is_gone_is_no_difference() -> None:
    def gone() -> Any:
        raise RuntimeError("connection reset")

    accord = Accord("a job", rank=0, connect=gone)
    accord.compare("a call", {"on_busy": "wait"})
    for _ in range(3):
        accord.check()
