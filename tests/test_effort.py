"""The default run tries a part of the examples, a long one all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.effort import LONG, SHORT, examples


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
