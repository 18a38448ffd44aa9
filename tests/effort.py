"""How much of what could be tried is: by default a part, in which nothing is left out; all of it in a long run.

examples(300)                  of a property: a quarter of them, or all with `--hypothesis-profile=long`
diagonal("a, b", [..], [..])   of a product: each value of each axis at least once; the rest of it is slow
portion(values, 2, of=5)       of what five tests would each try: every fifth value, so that together they try all
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import Any, TypeVar

import pytest
from hypothesis import settings

__all__ = ["LONG", "LONGEST", "SHORT", "diagonal", "examples", "first", "portion"]

T = TypeVar("T")

SHORT, LONG = "short", "long"
_ALL = 100  # of a property that does not say how many

# Files that take longest, mostly by waiting, from the longest on. A file stays on one worker: begun last, it would run
# on when the others have nothing left.
LONGEST = (
    "integrations/test_ray.py",
    "integrations/test_lightning.py",
    "benchmarks/test_benchmarks.py",
    "test_crash_points.py",
    "store/test_limits.py",
    "store/test_fsspec_engine.py",
    "store/test_contract_s3.py",
    "test_rank_faults.py",
    "ranks/test_group.py",
    "test_pages.py",
    "store/test_obstore_engine.py",
    "loading/test_reshard.py",
    "loading/test_rest.py",
    "reliability/test_simulation.py",
    "loading/test_rank_input.py",
    "saving/test_async_ranks.py",
    "copying/test_copy.py",
    "examples/test_demo.py",
    "saving/test_async_end.py",
    "test_spot_drill.py",
    "test_kill.py",
    "test_spot_signals.py",
    "test_large_values.py",
    "test_save_load.py",
    "transfer/test_staging.py",
)

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


def diagonal(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by the product of the axes; what is not on its diagonal is slow.

    Along the longest axis, each of the others goes round, shifted by one at each turn of it, so that two axes of one
    length, or one of half the length of another, do not always meet in the same pairs.

    Args:
        names: of the axes, as for `pytest.mark.parametrize`.
        axes: the values of each; one with an id of its own is a `pytest.param`.
    """
    columns = [[value if _is_param(value) else pytest.param(value, id=_id(value)) for value in axis] for axis in axes]
    steps = range(max(len(column) for column in columns))
    kept = {
        tuple((step + (place and step // len(column))) % len(column) for place, column in enumerate(columns))
        for step in steps
    }
    cells = []
    for places in product(*(range(len(column)) for column in columns)):
        cell = [column[place] for column, place in zip(columns, places, strict=True)]
        marks = [*(mark for value in cell for mark in value.marks), *([] if places in kept else [pytest.mark.slow])]
        values = [each for value in cell for each in value.values]
        cells.append(pytest.param(*values, id="-".join(str(value.id) for value in cell), marks=marks))
    return pytest.mark.parametrize(names, cells)


def first(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Return the values as parameters, of which those that are not chosen are slow."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def portion(values: Sequence[T], place: int, *, of: int) -> Sequence[T]:
    """Return what the test at `place` of so many tries: its share of the values by default, in a long run all."""
    stride = examples(1, short=of)
    return values[place % stride :: stride]


def _is_param(value: object) -> bool:
    return isinstance(value, type(pytest.param()))


def _id(value: object) -> str:
    return str(getattr(value, "__name__", value))
