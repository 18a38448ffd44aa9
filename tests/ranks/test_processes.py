"""The ranks of the other tests start warm, and a failure of one is told."""

from __future__ import annotations

import sys

import pytest

from tests.ranks.processes import PRELOADED, run


def _missing() -> list[str]:
    return [name for name in PRELOADED if name not in sys.modules]


def test_a_rank_finds_imported_what_takes_seconds_to_import() -> None:
    assert run(1, _missing) == [[]]


def _fail_on_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("of rank 1")


def test_the_error_of_a_rank_is_raised_with_its_trace() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*_fail_on_one.*of rank 1") as caught:
        run(2, _fail_on_one)
    assert isinstance(caught.value.__cause__, ValueError)
