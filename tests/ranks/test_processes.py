"""The ranks of the other tests start warm, and a failure of one is told."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.programs import run_to_end
from tests.ranks.processes import PRELOADED, Crew, run


def _missing() -> list[str]:
    return [name for name in PRELOADED if name not in sys.modules]


def test_a_rank_finds_imported_what_takes_seconds_to_import() -> None:
    assert run(1, _missing) == [[]]


def test_a_rank_searches_nothing_that_was_imported_for_garbage() -> None:
    (frozen,) = run(1, gc.get_freeze_count)
    assert frozen > 100_000


_OTHERS_FIRST = """
import multiprocessing
from tests.ranks.processes import start_server
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([])
context.Process(target=print).start()
start_server()
"""


def test_a_server_that_others_started_without_the_modules_is_refused_by_name() -> None:
    command = [sys.executable, "-c", _OTHERS_FIRST]
    done = run_to_end(command, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "RuntimeError: the fork server has not imported torch, torch._dynamo" in done.stderr


def _fail_on_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("of rank 1")


def test_the_error_of_a_rank_is_raised_with_its_trace() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*_fail_on_one.*of rank 1") as caught:
        run(2, _fail_on_one)
    assert isinstance(caught.value.__cause__, ValueError)


def _end_on_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os._exit(1)


def test_a_crew_runs_one_function_after_the_other_on_the_same_ranks() -> None:
    crew = Crew(2)
    pids = crew.run(os.getpid)
    assert len({*pids, os.getpid()}) == 3
    assert crew.run(os.getpid) == pids
    crew.end()


@pytest.mark.parametrize(
    ("function", "said"), [(_fail_on_one, r"(?s)rank 1 failed:.*of rank 1"), (_end_on_one, "rank 1 did not end")]
)
def test_a_crew_of_which_a_rank_fails_says_so_and_is_over(function: Callable[[], None], said: str) -> None:
    crew = Crew(2)
    with pytest.raises(AssertionError, match=said):
        crew.run(function)
    assert crew.is_over
