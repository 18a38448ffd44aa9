"""How many examples a property test tries: a quarter of them by default, all with `--hypothesis-profile=long`."""

from __future__ import annotations

from hypothesis import settings

__all__ = ["LONG", "SHORT", "examples"]

SHORT, LONG = "short", "long"
_ALL = 100  # of a property that does not say how many

# No deadline: on a busy machine any example may take long. Other examples in each run, also where CI is set.
settings.register_profile(LONG, deadline=None, derandomize=False, max_examples=_ALL)
settings.register_profile(SHORT, deadline=None, derandomize=False, max_examples=_ALL // 4)


def examples(count: int, *, short: int | None = None) -> int:
    """Return how many to try of `count`, by the profile, which pytest's plugin chooses before it collects.

    Args:
        count: of the long profile.
        short: of the short one, where a quarter of them takes too long.
    """
    is_short = settings().max_examples < _ALL
    return short if short is not None and is_short else count * settings().max_examples // _ALL
