"""Retention as laws over arbitrary histories: what always stays, and that rules only ever keep."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from cloudckpt.errors import OptionsError
from cloudckpt.format import FORMAT_VERSION, Manifest
from cloudckpt.preemption.schedule import Schedule
from cloudckpt.ranks.vote import Vote
from cloudckpt.root.checkpoint import Checkpoint, best_first
from cloudckpt.root.retention import (
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    RetentionRule,
    checked_rules,
    removable,
    watched_rules,
    why_kept,
)

Order = tuple[int, int]


def one(step: int, epoch: int = 1, metrics: Mapping[str, float] | None = None, created_at_s: float = 0.0) -> Checkpoint:
    return Checkpoint(
        step=step,
        epoch=epoch,
        attempt="0" * 16,
        url="",
        metrics=metrics or {},
        created_at=datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=created_at_s),
        total_bytes=0,
        world_size=1,
        digest="",
        manifest=Manifest(
            format_version=FORMAT_VERSION, state="committed", step=step, epoch=epoch, attempt="0" * 16, created_at=""
        ),
        prefix="",
    )


def saved(*losses: float) -> list[Checkpoint]:
    """Steps 1, 2, 3… of epoch 1 with these losses."""
    return [one(step, metrics={"loss": loss}) for step, loss in enumerate(losses, start=1)]


def removed(
    history: Sequence[Checkpoint], chosen: Sequence[RetentionRule], protected: set[Order] | None = None
) -> list[Order]:
    return orders_of(removable(history, chosen, protected=protected or set()))


def orders_of(history: Sequence[Checkpoint]) -> list[Order]:
    return [checkpoint.order for checkpoint in history]


values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan])
histories = st.dictionaries(
    st.tuples(st.integers(1, 3), st.integers(0, 12)),
    st.tuples(st.dictionaries(st.sampled_from(["loss", "acc"]), values), st.floats(0, 1e6)),
    max_size=14,
).map(lambda found: [one(step, epoch, *facts) for (epoch, step), facts in found.items()])
rules = st.one_of(
    st.integers(1, 5).map(KeepLast),
    st.builds(KeepBest, st.sampled_from(["loss", "acc"]), st.integers(1, 4), st.sampled_from(["min", "max"])),
    st.integers(1, 7).map(lambda steps: KeepEvery(steps=steps)),
    st.floats(1, 1e6).map(lambda seconds: KeepFor(seconds=seconds)),
    st.floats(1, 1e6).map(lambda seconds: KeepEvery(seconds=seconds)),
    st.just(KeepAll()),
)
rule_lists = st.lists(rules, max_size=4)
orders = st.sets(st.tuples(st.integers(1, 3), st.integers(0, 12)), max_size=5)


@given(histories, rule_lists, orders)
def test_the_newest_and_the_protected_always_stay(
    history: list[Checkpoint], chosen: list[RetentionRule], protected: set[Order]
) -> None:
    gone = set(removed(history, chosen, protected))

    newest = {max(orders_of(history))} if history else set()
    assert gone & (newest | protected) == set()
    assert gone <= set(orders_of(history))


@given(histories, rule_lists.filter(bool), rules, orders)
def test_a_further_rule_never_removes_more(
    history: list[Checkpoint], chosen: list[RetentionRule], further: RetentionRule, protected: set[Order]
) -> None:
    before = removed(history, chosen, protected)
    after = removed(history, [*chosen, further], protected)

    assert set(after) <= set(before)


@given(histories, rule_lists, orders, st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(
    history: list[Checkpoint],
    chosen: list[RetentionRule],
    protected: set[Order],
    random: Random,
) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)

    assert removed(shuffled, chosen, protected) == removed(history, chosen, protected)


@given(histories, rule_lists, orders)
def test_removal_goes_oldest_first(
    history: list[Checkpoint], chosen: list[RetentionRule], protected: set[Order]
) -> None:
    gone = removed(history, chosen, protected)

    assert gone == sorted(gone)


@given(histories, rule_lists, orders)
def test_pruning_twice_removes_nothing_the_second_time(
    history: list[Checkpoint], chosen: list[RetentionRule], protected: set[Order]
) -> None:
    gone = removed(history, chosen, protected)
    survivors = [found for found in history if found.order not in gone]

    assert removed(survivors, chosen, protected) == []


@given(histories, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_keep_best_keeps_none_worse_than_one_it_drops(history: list[Checkpoint], n: int, mode: str) -> None:
    rule = KeepBest("loss", n, mode)  # type: ignore[arg-type]
    usable = [found for found in history if not math.isnan(found.metrics.get("loss", math.nan))]

    kept = rule.keep(history)

    assert len(kept) == min(n, len(usable))
    inside = [found.metrics["loss"] for found in usable if found.order in kept]
    outside = [found.metrics["loss"] for found in usable if found.order not in kept]
    worse = (lambda a, b: a > b) if mode == "min" else (lambda a, b: a < b)
    assert not [(a, b) for a in inside for b in outside if worse(a, b)]


def test_without_rules_everything_stays() -> None:
    assert removed(saved(3.0, 2.0, 1.0), []) == []


def test_of_nothing_nothing_is_removed() -> None:
    assert removed([], [KeepLast(1), KeepFor(hours=1)], protected={(1, 1)}) == []


def test_the_lowest_loss_is_the_one_that_stays() -> None:
    assert removed(saved(0.9, 0.1, 0.5, 0.7), [KeepBest("loss")]) == [(1, 1), (1, 3)]


def test_mode_max_keeps_the_largest() -> None:
    assert KeepBest("loss", mode="max").keep(saved(0.9, 0.1, 0.5)) == {(1, 1)}


def test_nan_and_missing_metrics_are_never_best() -> None:
    history = [*saved(math.nan, 5.0), one(3), one(4, metrics={"acc": 0.0})]

    assert KeepBest("loss", n=3).keep(history) == {(1, 2)}


@pytest.mark.parametrize(("mode", "best"), [("min", -math.inf), ("max", math.inf)])
def test_infinite_metrics_take_their_place(mode: str, best: float) -> None:
    ranked = best_first(saved(-math.inf, 0.0, math.inf), "loss", mode)  # type: ignore[arg-type]

    assert ranked[0].metrics["loss"] == best


def test_of_equal_metrics_the_newer_is_better() -> None:
    history = [one(9, epoch=1, metrics={"loss": 1.0}), one(2, epoch=2, metrics={"loss": 1.0})]

    assert KeepBest("loss").keep(history) == {(2, 2)}
    assert KeepBest("loss", mode="max").keep(history) == {(2, 2)}


def test_a_later_epoch_is_newer_than_a_higher_step() -> None:
    history = [one(900, epoch=1), one(901, epoch=1), one(100, epoch=2)]

    assert removed(history, [KeepLast(1)]) == [(1, 900), (1, 901)]


def test_keep_every_counts_step_zero() -> None:
    history = [one(step) for step in (0, 5, 10, 15, 20)]

    assert KeepEvery(steps=10).keep(history) == {(1, 0), (1, 10), (1, 20)}


def test_keep_for_measures_age_against_the_newest_checkpoint() -> None:
    history = [one(step, created_at_s=1000.0 + 3600 * step) for step in range(5)]

    assert KeepFor(hours=2).keep(history) == {(1, 2), (1, 3), (1, 4)}
    assert KeepFor(hours=1, seconds=3600).keep(history) == {(1, 2), (1, 3), (1, 4)}


def worked(step: int, worked_s: float | None, epoch: int = 1, created_at_s: float = 0.0) -> Checkpoint:
    """A checkpoint that was committed when its line had been at work for so long."""
    plain = one(step, epoch, created_at_s=created_at_s)
    summary = {} if worked_s is None else {"worked_s": worked_s}
    return replace(plain, manifest=structs.replace(plain.manifest, summary=summary))


@pytest.mark.parametrize("clock", [0.0, 3 * 86_400.0, -3 * 86_400.0], ids=["right", "fast", "slow"])
def test_keep_for_counts_work_whatever_the_clock_says(clock: float) -> None:
    history = [worked(step, 3600.0 * step, created_at_s=1e6 + clock * (step == 5)) for step in range(1, 6)]

    assert KeepFor(hours=2).keep(history) == {(1, 3), (1, 4), (1, 5)}


def test_keep_for_counts_no_pause_between_jobs() -> None:
    history = [worked(step, 60.0 * step, created_at_s=60.0 * step) for step in range(1, 6)]
    history.append(worked(6, 400.0, epoch=2, created_at_s=9 * 86_400.0))

    assert removed(history, [KeepFor(hours=1)]) == []
    assert removed(history, [KeepFor(seconds=100)]) == [(1, 1), (1, 2), (1, 3), (1, 4)]


def test_keep_for_counts_what_does_not_tell_its_work_as_older_than_what_does() -> None:
    history = [worked(1, None, created_at_s=0.0), worked(2, None, created_at_s=100.0), worked(3, 50.0), worked(4, 60.0)]

    assert removed(history, [KeepFor(seconds=60)]) == [(1, 1)]
    assert removed(history, [KeepFor(seconds=59)]) == [(1, 1), (1, 2)]
    assert removed(history[:2], [KeepFor(seconds=99)]) == [(1, 1)]


def test_keep_for_keeps_what_claims_to_be_newer_than_the_newest() -> None:
    history = [one(1, created_at_s=9e9), one(2, created_at_s=0.0)]

    assert removed(history, [KeepFor(seconds=1)]) == []


def test_a_rule_of_ones_own_takes_part() -> None:
    class KeepFirst:
        def keep(self, checkpoints: Sequence[Checkpoint]) -> set[Order]:
            return {checkpoints[0].order}

    assert removed(saved(1.0, 2.0, 3.0), [KeepFirst()]) == [(1, 2)]


@pytest.mark.parametrize(
    "words",
    [
        lambda all_: {one.step for one in all_},
        lambda all_: {(one.epoch,) for one in all_},
        lambda all_: [[one.epoch, one.step] for one in all_],
        lambda all_: {(99, 99)},
        lambda all_: [one(9)],
        lambda all_: [True] * len(all_),
    ],
    ids=["steps", "epochs", "lists", "foreign orders", "foreign checkpoints", "a mask"],
)
def test_a_rule_that_says_what_it_keeps_in_other_words_removes_nothing(words: Callable[[Any], Any]) -> None:
    class InOtherWords:
        def keep(self, checkpoints: Sequence[Checkpoint]) -> set[Order]:
            return words(checkpoints)  # type: ignore[no-any-return]

    with pytest.raises(
        OptionsError, match=r"neither a checkpoint nor the \(epoch, step\) of one .* return the `order` of each"
    ):
        removed(saved(1.0, 2.0, 3.0), [InOtherWords()])


@pytest.mark.parametrize("said", [None, 3, removed], ids=["None", "a number", "a function"])
def test_a_rule_that_returns_nothing_to_keep_by_removes_nothing(said: object) -> None:
    with pytest.raises(OptionsError, match="return the checkpoints that are to stay"):
        removed(saved(1.0, 2.0, 3.0), checked_rules(lambda _: said))


def test_a_rule_that_swaps_step_and_epoch_is_told_so() -> None:
    with pytest.raises(OptionsError, match=r"keeps \(5, 1\), which is the \(step, epoch\) of one"):
        removed([one(5), one(6)], checked_rules(lambda all_: [(one.step, one.epoch) for one in all_]))


def test_what_a_rule_does_to_its_list_changes_nothing_for_the_others() -> None:
    def best(all_: list[Checkpoint]) -> list[Checkpoint]:
        all_.sort(key=lambda one: one.metrics["loss"])
        kept = [all_.pop(0)]
        all_.clear()
        return kept

    assert removed(saved(5.0, 4.0, 3.0, 1.0, 2.0), checked_rules([best, KeepLast(2)])) == [(1, 1), (1, 2), (1, 3)]
    assert removed(saved(1.0, 2.0, 3.0, 4.0, 5.0), checked_rules([best, KeepLast(2)])) == [(1, 2), (1, 3)]


@pytest.mark.parametrize("rules", [[3], [KeepLast], KeepLast, None, "rules", {3}, True, 2.0], ids=repr)
def test_what_says_nothing_of_what_stays_is_refused(rules: object) -> None:
    with pytest.raises(OptionsError, match=r"retention holds .*, which is no rule; give KeepLast\(3\)"):
        checked_rules(rules)


def test_no_checkpoint_at_all_is_no_number_to_keep() -> None:
    with pytest.raises(OptionsError, match="whole number from 1"):
        checked_rules(0)


@pytest.mark.parametrize(
    "said",
    [
        2,
        KeepLast(2),
        [KeepLast(2)],
        lambda all_: all_[-2:],
        lambda all_: {one.order for one in all_[-2:]},
        [lambda all_: all_[-2:]],
    ],
    ids=["number", "rule", "rules", "function", "function of orders", "functions"],
)
def test_what_stays_may_be_said_as_a_number_a_rule_rules_or_a_function(said: object) -> None:
    assert removed(saved(1.0, 2.0, 3.0), list(checked_rules(said))) == [(1, 1)]


@pytest.mark.parametrize("every", [1, 4, 5])
def test_keep_every_counts_the_steps_at_which_the_schedule_saves(every: int) -> None:
    schedule = Schedule(every_steps=every)
    history = [one(step) for step in range(101) if schedule.ask(step, Vote(rank=0, size=1, timeout_s=1))]

    assert KeepEvery(steps=20).keep(history) == {(1, 20), (1, 40), (1, 60), (1, 80), (1, 100)}


# -- rules that never match ----------------------------------------------------------------------------------


def told(rule: RetentionRule, histories: Sequence[Sequence[Checkpoint]], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says while checkpoints are pruned time after time."""
    (watched,) = watched_rules([rule])
    with caplog.at_level(logging.WARNING):
        for history in histories:
            removable(history, [watched], protected=())
    return [record.getMessage() for record in caplog.records]


def test_a_metric_that_no_save_reports_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    found = told(KeepBest("loss"), [[one(step, metrics={"acc": 1.0})] for step in range(20)], caplog)

    assert len(found) == 1
    assert "has kept nothing so far: no checkpoint has a number for the metric 'loss'" in found[0]
    assert "the newest one's metrics: 'acc'" in found[0]


def test_steps_that_are_never_a_multiple_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    found = told(KeepEvery(steps=100), [[one(step)] for step in range(9, 1000, 10)], caplog)

    assert len(found) == 1
    assert "none of them is a multiple of 100" in found[0]


def test_a_rule_whose_turn_has_not_come_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert told(KeepEvery(steps=1000), [[one(step)] for step in range(10, 1000, 10)], caplog) == []
    assert told(KeepEvery(steps=100), [[one(step)] for step in range(10, 3000, 10)], caplog) == []
    reports = [[one(step, metrics={"loss": 1.0} if step % 5 == 0 else {})] for step in range(50)]
    assert told(KeepBest("loss"), reports, caplog) == []


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


# -- by time worked, and what keeps what ---------------------------------------------------------------------


def line_of(*seconds: float | None) -> list[Checkpoint]:
    """Steps 1, 2, 3… that were committed when so many seconds had been worked."""
    return [worked(step, one) for step, one in enumerate(seconds, start=1)]


def test_the_oldest_of_each_stretch_of_work_stays_and_what_tells_no_time() -> None:
    history = line_of(0, 50, 100, 199, 250, None, 310, 320)
    assert removed(history, [KeepEvery(seconds=100)]) == [(1, 2), (1, 4)]


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=12).map(sorted), st.floats(1, 1e4))
def test_what_was_kept_by_seconds_is_kept_when_the_rest_has_gone_and_more_has_come(
    seconds: list[float], every_s: float
) -> None:
    rule = KeepEvery(seconds=every_s)
    kept: list[Checkpoint] = []
    held: set[Order] = set()
    for one in line_of(*seconds):
        kept = [*kept, one]
        held |= rule.keep(kept)
        kept = [one for one in kept if one not in removable(kept, [rule], protected=set())]
        assert held <= set(orders_of(kept))


@pytest.mark.parametrize("given", [{}, {"steps": 1, "seconds": 1.0}, {"seconds": 0}, {"seconds": -1}, {"steps": 0}])
def test_every_is_by_steps_or_by_seconds(given: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=r"KeepEvery"):
        KeepEvery(**given)


def test_a_rule_by_seconds_is_never_said_to_be_idle(caplog: pytest.LogCaptureFixture) -> None:
    (rule,) = watched_rules([KeepEvery(seconds=1e9)])
    for _ in range(9):
        rule.keep(line_of(1.0, 2.0))
    assert caplog.text == ""
    assert repr(rule) == "KeepEvery(seconds=1000000000.0)"


@given(histories, rule_lists.filter(bool), orders)
def test_what_no_word_keeps_is_what_would_go(
    history: list[Checkpoint], chosen: list[RetentionRule], pinned: set[Order]
) -> None:
    words = why_kept(history, chosen, pinned=pinned)
    assert sorted(order for order, said in words.items() if not said) == removed(history, chosen, pinned)


def test_what_is_of_another_line_is_said_to_be_and_no_rule_counts_it() -> None:
    words = why_kept(saved(1, 2, 3, 4), [KeepLast(2)], in_use={(1, 1)}, others={(1, 3)}, pinned={(1, 4)})
    assert words == {
        (1, 1): ("in use",),
        (1, 2): ("KeepLast(n=2)",),
        (1, 3): ("another line of history",),
        (1, 4): ("newest", "pinned", "KeepLast(n=2)"),
    }


def test_to_keep_all_is_to_remove_nothing() -> None:
    assert removed(saved(1, 2, 3), [KeepLast(1), KeepAll()]) == []


# -- rules of the user's own --------------------------------------------------------------------------------------


def test_what_a_rule_does_to_metrics_changes_nothing_for_the_others() -> None:
    history = saved(3.0, 1.0, 2.0)

    def clears(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        for checkpoint in checkpoints:
            checkpoint.metrics.clear()  # type: ignore[attr-defined]
        return []

    with pytest.raises(OptionsError, match=r"clears raised .*mend it"):
        removable(history, [*checked_rules(clears), KeepBest("loss")], protected=set())
    assert [dict(one.metrics) for one in history] == [{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}]


@pytest.mark.parametrize("said", ["", b"", "none"])
def test_a_text_is_not_taken_for_nothing_to_keep(said: object) -> None:
    with pytest.raises(OptionsError, match="return the checkpoints that are to stay"):
        removable(saved(1.0, 2.0), checked_rules(lambda _: said), protected=set())


def test_a_function_is_told_by_its_name() -> None:
    def odd(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        return [one for one in checkpoints if one.step % 2]

    words = why_kept(saved(1.0, 2.0), checked_rules(odd))
    assert [reasons[-1].rpartition(".")[2] for reasons in words.values() if "newest" not in reasons] == ["odd"]


def test_what_a_rule_raises_is_told_as_the_rules_own() -> None:
    def broken(_: Sequence[Checkpoint]) -> list[Checkpoint]:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(OptionsError, match=r"broken raised ZeroDivisionError: by nothing; mend it") as caught:
        why_kept(saved(1.0), checked_rules(broken))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
