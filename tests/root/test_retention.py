"""Retention as laws over arbitrary histories: what always stays, and that rules only ever keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.errors import OptionsError
from cloudckpt.root.retention import (
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    Kept,
    RetentionRule,
    best_first,
    order_of,
    plan,
)


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    epoch: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    created_at_s: float = 0.0


def saved(*losses: float) -> list[Saved]:
    """Steps 1, 2, 3… of epoch 1 with these losses."""
    return [Saved(step, metrics={"loss": loss}) for step, loss in enumerate(losses, start=1)]


values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan])
histories = st.dictionaries(
    st.tuples(st.integers(1, 3), st.integers(0, 12)),
    st.tuples(st.dictionaries(st.sampled_from(["loss", "acc"]), values), st.floats(0, 1e6)),
    max_size=14,
).map(lambda found: [Saved(step, epoch, *facts) for (epoch, step), facts in found.items()])
rules = st.one_of(
    st.integers(1, 5).map(KeepLast),
    st.builds(KeepBest, st.sampled_from(["loss", "acc"]), st.integers(1, 4), st.sampled_from(["min", "max"])),
    st.integers(1, 7).map(lambda steps: KeepEvery(steps=steps)),
    st.floats(1, 1e6).map(lambda seconds: KeepFor(seconds=seconds)),
)
rule_lists = st.lists(rules, max_size=4)
orders = st.sets(st.tuples(st.integers(1, 3), st.integers(0, 12)), max_size=5)


@given(histories, rule_lists, orders)
def test_keep_and_remove_split_the_whole_history(
    history: list[Saved], chosen: list[RetentionRule], protected: set[tuple[int, int]]
) -> None:
    decided = plan(history, chosen, protected=protected)

    assert sorted([*decided.keep, *decided.remove]) == sorted(map(order_of, history))


@given(histories, rule_lists, orders)
def test_the_newest_and_the_protected_always_stay(
    history: list[Saved], chosen: list[RetentionRule], protected: set[tuple[int, int]]
) -> None:
    decided = plan(history, chosen, protected=protected)

    present = set(map(order_of, history))
    newest = {max(present)} if present else set()
    assert set(decided.remove) & (newest | protected) == set()


@given(histories, rule_lists.filter(bool), rules, orders)
def test_a_further_rule_never_removes_more(
    history: list[Saved], chosen: list[RetentionRule], further: RetentionRule, protected: set[tuple[int, int]]
) -> None:
    before = plan(history, chosen, protected=protected)
    after = plan(history, [*chosen, further], protected=protected)

    assert set(after.remove) <= set(before.remove)


@given(histories, rule_lists, orders, st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(
    history: list[Saved],
    chosen: list[RetentionRule],
    protected: set[tuple[int, int]],
    random: Random,
) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)

    assert plan(shuffled, chosen, protected=protected) == plan(history, chosen, protected=protected)


@given(histories, rule_lists, orders)
def test_removal_goes_oldest_first(
    history: list[Saved], chosen: list[RetentionRule], protected: set[tuple[int, int]]
) -> None:
    decided = plan(history, chosen, protected=protected)

    assert list(decided.remove) == sorted(decided.remove)
    assert list(decided.keep) == sorted(decided.keep)


@given(histories, rule_lists, orders)
def test_pruning_twice_removes_nothing_the_second_time(
    history: list[Saved], chosen: list[RetentionRule], protected: set[tuple[int, int]]
) -> None:
    first = plan(history, chosen, protected=protected)
    survivors = [one for one in history if order_of(one) in first.keep]

    assert plan(survivors, chosen, protected=protected).remove == ()


@given(histories, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_keep_best_keeps_none_worse_than_one_it_drops(history: list[Saved], n: int, mode: str) -> None:
    rule = KeepBest("loss", n, mode)  # type: ignore[arg-type]
    usable = [one for one in history if not math.isnan(one.metrics.get("loss", math.nan))]

    kept = rule.keep(history)

    assert len(kept) == min(n, len(usable))
    inside = [one.metrics["loss"] for one in usable if order_of(one) in kept]
    outside = [one.metrics["loss"] for one in usable if order_of(one) not in kept]
    worse = (lambda a, b: a > b) if mode == "min" else (lambda a, b: a < b)
    assert not [(a, b) for a in inside for b in outside if worse(a, b)]


def test_without_rules_everything_stays() -> None:
    decided = plan(saved(3.0, 2.0, 1.0), [])

    assert list(decided.keep) == [(1, 1), (1, 2), (1, 3)]


def test_nothing_saved_is_a_plan_for_nothing() -> None:
    decided = plan([], [KeepLast(1), KeepFor(hours=1)], protected={(1, 1)})

    assert (decided.keep, decided.remove) == ({}, ())


def test_the_lowest_loss_is_the_one_that_stays() -> None:
    decided = plan(saved(0.9, 0.1, 0.5, 0.7), [KeepBest("loss")])

    assert decided.remove == ((1, 1), (1, 3))


def test_mode_max_keeps_the_largest() -> None:
    assert KeepBest("loss", mode="max").keep(saved(0.9, 0.1, 0.5)) == {(1, 1)}


def test_nan_and_missing_metrics_are_never_best() -> None:
    history = [*saved(math.nan, 5.0), Saved(3), Saved(4, metrics={"acc": 0.0})]

    assert KeepBest("loss", n=3).keep(history) == {(1, 2)}


@pytest.mark.parametrize(("mode", "best"), [("min", -math.inf), ("max", math.inf)])
def test_infinite_metrics_take_their_place(mode: str, best: float) -> None:
    ranked = best_first(saved(-math.inf, 0.0, math.inf), "loss", mode)  # type: ignore[arg-type]

    assert ranked[0].metrics["loss"] == best


def test_of_equal_metrics_the_newer_is_better() -> None:
    history = [Saved(9, epoch=1, metrics={"loss": 1.0}), Saved(2, epoch=2, metrics={"loss": 1.0})]

    assert KeepBest("loss").keep(history) == {(2, 2)}
    assert KeepBest("loss", mode="max").keep(history) == {(2, 2)}


def test_a_later_epoch_is_newer_than_a_higher_step() -> None:
    history = [Saved(900, epoch=1), Saved(901, epoch=1), Saved(100, epoch=2)]

    assert plan(history, [KeepLast(1)]).remove == ((1, 900), (1, 901))


def test_keep_every_counts_step_zero() -> None:
    history = [Saved(step) for step in (0, 5, 10, 15, 20)]

    assert KeepEvery(steps=10).keep(history) == {(1, 0), (1, 10), (1, 20)}


def test_keep_for_measures_age_against_the_newest_checkpoint() -> None:
    history = [Saved(step, created_at_s=1000.0 + 3600 * step) for step in range(5)]

    assert KeepFor(hours=2).keep(history) == {(1, 2), (1, 3), (1, 4)}
    assert KeepFor(hours=1, seconds=3600).keep(history) == {(1, 2), (1, 3), (1, 4)}


def test_keep_for_keeps_what_claims_to_be_newer_than_the_newest() -> None:
    history = [Saved(1, created_at_s=9e9), Saved(2, created_at_s=0.0)]

    assert plan(history, [KeepFor(seconds=1)]).remove == ()


def test_every_reason_is_named() -> None:
    history = saved(0.1, 0.9, 0.8)
    chosen = [KeepLast(2), KeepBest("loss"), KeepEvery(steps=3), KeepFor(hours=1)]

    decided = plan(history, chosen, protected={(1, 2), (7, 7)})

    age = "not 3600 s older than the newest"
    assert decided.keep == {
        (1, 1): ("best 1 by loss (min)", age),
        (1, 2): ("protected", "last 2", age),
        (1, 3): ("newest", "last 2", "every 3 steps", age),
    }


def test_a_rule_of_ones_own_takes_part() -> None:
    class KeepFirst:
        def keep(self, checkpoints: Sequence[Kept]) -> set[tuple[int, int]]:
            return {order_of(checkpoints[0]), (99, 99)}

        def __str__(self) -> str:
            return "the first"

    decided = plan(saved(1.0, 2.0, 3.0), [KeepFirst()])

    assert decided.keep == {(1, 1): ("the first",), (1, 3): ("newest",)}


def test_one_checkpoint_listed_twice_is_refused() -> None:
    with pytest.raises(OptionsError, match="same"):
        plan([Saved(1), Saved(1)], [KeepLast(1)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(True),
        lambda: KeepLast(1.5),  # type: ignore[arg-type]
        lambda: KeepBest(""),
        lambda: KeepBest("loss", n=0),
        lambda: KeepBest("loss", mode="lowest"),  # type: ignore[arg-type]
        lambda: KeepEvery(steps=0),
        lambda: KeepEvery(steps=-5),
        KeepFor,
        lambda: KeepFor(hours=-1),
        lambda: KeepFor(hours=math.inf),
        lambda: KeepFor(seconds=math.nan),
        lambda: best_first([], "loss", "least"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_when_made(make: Callable[[], object]) -> None:
    with pytest.raises(OptionsError):
        make()
