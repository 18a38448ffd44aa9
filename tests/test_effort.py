"""The default run tries a part of the examples, a long one all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.effort import LONG, LONGEST, SHORT, diagonal, examples, first, portion


@pytest.fixture(autouse=True)
def _profile() -> Iterator[None]:
    before = settings.get_current_profile_name()
    yield
    settings.load_profile(before)


@pytest.mark.parametrize(("profile", "tried"), [(SHORT, 75), (LONG, 300)])
def test_the_profile_says_what_part_of_the_examples_is_tried(profile: str, tried: int) -> None:
    settings.load_profile(profile)
    assert examples(300) == tried
    assert examples(300, short=7) == (7 if profile == SHORT else 300)
    assert settings().deadline is None
    assert not settings().derandomize


def test_tests_that_share_values_try_each_once_by_default_and_each_of_them_all_in_a_long_run() -> None:
    settings.load_profile(SHORT)
    assert sorted(value for place in range(5) for value in portion(range(13), place, of=5)) == list(range(13))
    settings.load_profile(LONG)
    assert [list(portion(range(13), place, of=5)) for place in range(5)] == [list(range(13))] * 5


@pytest.mark.parametrize("sizes", [(1,), (5, 2), (4, 4), (8, 4, 2), (2, 3, 7)], ids=str)
def test_the_default_run_of_a_product_has_each_value_of_each_axis_and_no_more_than_its_longest(
    sizes: tuple[int, ...],
) -> None:
    (_, cells) = diagonal("names", *(range(size) for size in sizes)).args
    kept = [cell.values for cell in cells if not cell.marks]
    assert len(cells) == math.prod(sizes)
    assert len(kept) == max(sizes)
    assert [set(column) for column in zip(*kept, strict=True)] == [set(range(size)) for size in sizes]


def test_an_axis_that_is_half_as_long_as_another_meets_it_in_other_pairs_each_time() -> None:
    (_, cells) = diagonal("a, b", "wxyz", [pytest.param(1, id="one"), pytest.param(2, id="two")]).args
    assert [cell.id for cell in cells if not cell.marks] == ["w-one", "x-two", "y-two", "z-one"]


def test_what_is_not_chosen_is_slow_and_stays_in_its_place() -> None:
    kept, slow = first("ab", "a")
    assert kept == "a"
    assert slow.values == ("b",)
    assert [mark.name for mark in slow.marks] == ["slow"]


def test_the_files_that_are_begun_first_are_there() -> None:
    assert [name for name in LONGEST if not (Path(__file__).parent / name).is_file()] == []
