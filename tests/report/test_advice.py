"""Interval advice: published values, laws over any costs, and a simulation that knows no formula."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.errors import OptionsError
from cloudckpt.report.advice import Costs, advise, best_interval_s, daly_interval_s, goodput, young_interval_s

MINUTE_S, HOUR_S = 60.0, 3_600.0

costs_s = st.floats(1e-4, 1e4)
mtbfs_s = st.floats(1.0, 1e7)


@pytest.mark.parametrize(
    ("mtbf_s", "interval_min"),
    # The optima of figures 3 to 5 of Daly's paper, for a dump of 5 minutes.
    [(24 * HOUR_S, 117), (6 * HOUR_S, 57), (15 * MINUTE_S, 9.1)],
)
def test_dalys_interval_is_the_published_one(mtbf_s: float, interval_min: float) -> None:
    digits = 1 if interval_min < 10 else 0

    assert round(daly_interval_s(5 * MINUTE_S, mtbf_s) / MINUTE_S, digits) == interval_min


def test_youngs_interval_is_the_root_of_twice_cost_times_mtbf() -> None:
    assert young_interval_s(2.0, 100.0) == pytest.approx(20.0)


def test_from_a_cost_of_twice_the_mtbf_on_dalys_interval_is_the_mtbf() -> None:
    assert [daly_interval_s(200.0, 100.0), daly_interval_s(1e9, 100.0)] == [100.0, 100.0]


def test_saves_without_a_cost_have_no_interval_at_all() -> None:
    assert (young_interval_s(0.0, 60.0), daly_interval_s(0.0, 60.0), best_interval_s(0.0, 60.0)) == (0.0, 0.0, 0.0)


@given(st.floats(1e-8, 1e-2), mtbfs_s)
def test_where_saves_are_cheap_all_intervals_agree(share: float, mtbf_s: float) -> None:
    cost_s = share * mtbf_s

    best_s = best_interval_s(cost_s, mtbf_s)

    assert daly_interval_s(cost_s, mtbf_s) == pytest.approx(best_s, rel=1e-3)
    assert young_interval_s(cost_s, mtbf_s) == pytest.approx(best_s, rel=0.06)


@given(costs_s, mtbfs_s, st.floats(0.01, 100.0), st.floats(0, 1e4), st.floats(0, 1e4))
def test_no_interval_beats_the_best(
    cost_s: float, mtbf_s: float, factor: float, restart_s: float, lag_s: float
) -> None:
    best_s = best_interval_s(cost_s, mtbf_s)

    other = goodput(factor * best_s, cost_s, mtbf_s, restart_s, lag_s)

    assert other <= goodput(best_s, cost_s, mtbf_s, restart_s, lag_s) * (1 + 1e-12)


@given(st.floats(1e-6, 3.0), mtbfs_s, st.floats(1.01, 3.0))
def test_dearer_saves_or_rarer_failures_mean_longer_intervals(share: float, mtbf_s: float, factor: float) -> None:
    cost_s = share * mtbf_s
    for interval_s in (young_interval_s, best_interval_s):
        assert interval_s(cost_s * factor, mtbf_s) > interval_s(cost_s, mtbf_s)
        assert interval_s(cost_s, mtbf_s * factor) > interval_s(cost_s, mtbf_s)


@given(st.floats(1e-6, 1e6), costs_s, mtbfs_s, st.floats(0, 1e4), st.floats(0, 1e4))
def test_goodput_is_a_share_and_falls_with_each_cost(
    interval_s: float, cost_s: float, mtbf_s: float, restart_s: float, lag_s: float
) -> None:
    share = goodput(interval_s, cost_s, mtbf_s, restart_s, lag_s)

    assert 0.0 <= share <= 1.0
    assert goodput(interval_s, 2 * cost_s, mtbf_s, restart_s, lag_s) <= share
    assert goodput(interval_s, cost_s, mtbf_s, restart_s + 1.0, lag_s) <= share
    assert goodput(interval_s, cost_s, mtbf_s, restart_s, lag_s + 1.0) <= share
    assert goodput(interval_s, cost_s, 2 * mtbf_s, restart_s, lag_s) >= share


def test_goodput_where_failures_are_rare_is_what_a_sum_on_paper_says() -> None:
    # 1 % in saves; per failure half a cycle, the lag and the restart are lost.
    interval_s, cost_s, restart_s, lag_s, mtbf_s = 99.0, 1.0, 20.0, 5.0, 1e6

    expected = interval_s / (interval_s + cost_s) * (1 - (100.0 / 2 + restart_s + lag_s) / mtbf_s)

    assert goodput(interval_s, cost_s, mtbf_s, restart_s, lag_s) == pytest.approx(expected, abs=1e-8)


def simulated(
    rng: Random, lives: int, *, interval_s: float, cost_s: float, mtbf_s: float, restart_s: float, lag_s: float
) -> tuple[float, float]:
    """Live through failures one event at a time; return the goodput and its standard error."""
    gains, times = [], []
    for _ in range(lives):
        failure_s = rng.expovariate(1 / mtbf_s)
        now_s, gain_s, pending = restart_s, 0.0, []
        while now_s < failure_s:
            now_s += interval_s + cost_s
            pending.append(now_s + lag_s)
            gain_s += interval_s * sum(commit_s <= min(now_s, failure_s) for commit_s in pending)
            pending = [commit_s for commit_s in pending if commit_s > min(now_s, failure_s)]
        gain_s += interval_s * sum(commit_s <= failure_s for commit_s in pending)
        gains.append(gain_s)
        times.append(failure_s)
    share = sum(gains) / sum(times)
    residues = [gain_s - share * time_s for gain_s, time_s in zip(gains, times, strict=True)]
    error = math.sqrt(sum(residue * residue for residue in residues)) / sum(times)
    return share, error


@pytest.mark.parametrize(
    "case",
    [
        {"interval_s": 60.0, "cost_s": 1.0, "mtbf_s": 3_600.0, "restart_s": 30.0, "lag_s": 0.0},
        {"interval_s": 60.0, "cost_s": 0.2, "mtbf_s": 600.0, "restart_s": 30.0, "lag_s": 20.0},
        {"interval_s": 10.0, "cost_s": 5.0, "mtbf_s": 40.0, "restart_s": 8.0, "lag_s": 0.0},
        {"interval_s": 10.0, "cost_s": 1.0, "mtbf_s": 200.0, "restart_s": 5.0, "lag_s": 35.0},
    ],
)
def test_goodput_is_what_simulated_failures_leave(case: dict[str, float]) -> None:
    share, error = simulated(Random(7), 8_000, **case)

    predicted = goodput(case["interval_s"], case["cost_s"], case["mtbf_s"], case["restart_s"], case["lag_s"])

    assert error < 0.02
    assert abs(share - predicted) < 4 * error


MEASURED = Costs(saves=8, blocked_s=0.21, commit_s=4.1, interval_s=500.0, restart_s=12.0, step_s=0.5)


def test_advice_holds_the_intervals_and_what_they_are_worth() -> None:
    advice = advise(MEASURED, 2 * HOUR_S)

    assert advice.young_s == pytest.approx(54.99, abs=0.01)
    assert advice.daly_s == pytest.approx(54.85, abs=0.01)
    assert advice.best_s == pytest.approx(advice.daly_s, rel=1e-4)
    assert advice.best_steps == 110
    assert advice.goodput_present == goodput(500.0, 0.21, 7_200.0, 12.0, 4.1 - 0.21)
    assert advice.goodput_best == goodput(55.0, 0.21, 7_200.0, 12.0, 4.1 - 0.21)


def test_printed_advice_says_costs_interval_and_goodput_in_units() -> None:
    assert str(advise(MEASURED, 2 * HOUR_S)).splitlines() == [
        "saves     block training for 0.21 s, are committed after 4.1 s (8 saves)",
        "restore   takes 12 s",
        "interval  now 8.3 min, best 55 s (save_every_steps=110) with a failure every 2.0 h; Young 55 s, Daly 55 s",
        "goodput   now 96.3 %, at best 99.0 %; a failure costs about 4.4 min now",
    ]


def test_printed_advice_says_how_to_learn_what_is_not_known() -> None:
    assert str(advise(Costs(), HOUR_S)) == "saves     none was measured yet; ask again after the first save"
    assert str(advise(Costs(saves=1, blocked_s=2.0))).splitlines() == [
        "saves     block training for 2 s (1 save)",
        "restore   was not measured and counts nothing; manager.restore measures it",
        "interval  now unknown (ask should_save); give mtbf_s, the seconds between failures, to learn the best",
    ]


def test_the_repr_of_advice_is_all_its_numbers() -> None:
    assert repr(advise(MEASURED, 2 * HOUR_S)).startswith("Advice(costs=Costs(saves=8, blocked_s=0.21, ")


def test_what_was_not_measured_counts_nothing() -> None:
    advice = advise(Costs(saves=2, blocked_s=2.0), HOUR_S)

    assert advice.goodput_best == goodput(best_interval_s(2.0, HOUR_S), 2.0, HOUR_S, 0.0)
    assert str(advice).splitlines()[2:] == [
        "interval  now unknown (ask should_save), best 119 s with a failure every 60.0 min; Young 2.0 min, Daly 119 s",
        "goodput   at best 96.7 %",
    ]


def test_the_interval_is_never_shorter_than_a_save_takes_in_the_background() -> None:
    advice = advise(Costs(saves=1, blocked_s=0.001, commit_s=40.001, step_s=3.0), 100.0)

    assert advice.best_s == pytest.approx(40.0)
    assert advice.best_steps == 14


def test_saves_that_cost_nothing_are_best_after_each_step() -> None:
    advice = advise(Costs(saves=1, blocked_s=0.0, commit_s=0.0, restart_s=10.0, step_s=2.0), 1_000.0)
    without_steps = advise(Costs(saves=1, blocked_s=0.0, restart_s=10.0), 1_000.0)

    assert (advice.best_s, advice.best_steps) == (0.0, 1)
    assert advice.goodput_best == goodput(2.0, 0.0, 1_000.0, 10.0)
    assert without_steps.goodput_best == pytest.approx(math.exp(-0.01))


@given(costs_s, st.floats(0, 100.0), st.integers(1, 2_000), st.floats(0.01, 100.0), mtbfs_s)
def test_no_number_of_steps_that_saves_allow_beats_the_advised_one(
    blocked_s: float, lag_s: float, steps: int, step_s: float, mtbf_s: float
) -> None:
    costs = Costs(saves=1, blocked_s=blocked_s, commit_s=blocked_s + lag_s, interval_s=steps * step_s, step_s=step_s)

    advice = advise(costs, mtbf_s)

    assert advice.goodput_present is not None
    assert advice.goodput_best is not None
    assert steps * step_s < costs.commit_lag_s or advice.goodput_present <= advice.goodput_best * (1 + 1e-12)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, True, "1", None])
def test_a_wrong_number_is_refused_by_name(wrong: float) -> None:
    with pytest.raises(OptionsError, match=r"^save_cost_s is"):
        young_interval_s(wrong, 1.0)
    with pytest.raises(OptionsError, match=r"^mtbf_s is"):
        daly_interval_s(1.0, wrong)
    with pytest.raises(OptionsError, match=r"^restart_s is"):
        goodput(1.0, 1.0, 1.0, wrong)


@pytest.mark.parametrize("name", ["interval_s", "step_s"])
def test_a_span_of_no_length_is_refused_by_name(name: str) -> None:
    with pytest.raises(OptionsError, match=rf"^{name} is 0.0; give seconds, above 0"):
        Costs(**{name: 0.0})  # type: ignore[arg-type]


def test_costs_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(OptionsError, match=r"^saves is -1"):
        Costs(saves=-1)
    with pytest.raises(OptionsError, match=r"^commit_s is 1\.0, less than blocked_s"):
        Costs(blocked_s=2.0, commit_s=1.0)
    with pytest.raises(OptionsError, match=r"^mtbf_s is 0"):
        advise(MEASURED, 0.0)
