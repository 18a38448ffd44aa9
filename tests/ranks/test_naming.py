"""Lists of ranks read alike everywhere, and stay short for thousands."""

from __future__ import annotations

import pytest

from cloudckpt.ranks import named_ranks


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0, 2"),
        ([0, 1], "ranks 0-1"),
        (range(2048), "ranks 0-2047"),
        ([7, 5, 6, 1, 5], "ranks 1, 5-7"),
        (range(0, 100, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, and 42 more"),
    ],
)
def test_ranks_are_named_in_runs_and_no_more_than_people_read(ranks: list[int], text: str) -> None:
    assert named_ranks(ranks) == text
