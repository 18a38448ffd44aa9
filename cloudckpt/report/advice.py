"""Turn what saves cost and how often the job fails into the interval at which to save.

All of it is one model: failures come at random (exponentially, `mtbf_s` apart on average, for the whole job: of n
machines that fail each M, M/n), also while the job recovers. A cycle is an interval of training and then the time that
a save blocks it, which alone is what a save costs; an asynchronous one goes on in the background. It is of use only
from its commit on, so a failure costs about half an interval, the commit lag and the restart. Pure values; the clock
is the caller's. An interval here is the training between two saves, the saves themselves not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cloudckpt.errors import OptionsError
from cloudckpt.report.prices import Prices, money
from cloudckpt.report.progress import as_bytes
from cloudckpt.store import Traffic

__all__ = ["Advice", "Costs", "advise", "best_interval_s", "daly_interval_s", "goodput", "young_interval_s"]


def young_interval_s(save_cost_s: float, mtbf_s: float) -> float:
    """Return the interval of the first order, √(2CM), for saves that block C and failures M apart.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9),
    1974. Good where C is much smaller than M.

    Raises:
        OptionsError: a number is negative, not finite, or `mtbf_s` is 0.
    """
    _check("save_cost_s", save_cost_s)
    _check("mtbf_s", mtbf_s, is_zero_allowed=False)
    return math.sqrt(2 * save_cost_s) * math.sqrt(mtbf_s)


def daly_interval_s(save_cost_s: float, mtbf_s: float) -> float:
    """Return the interval of higher order: √(2CM)·[1 + ⅓√(C/2M) + ⅑(C/2M)] − C where C < 2M, else M.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22(3), 2006.

    Raises:
        OptionsError: a number is negative, not finite, or `mtbf_s` is 0.
    """
    first_s = young_interval_s(save_cost_s, mtbf_s)
    ratio = save_cost_s / (2 * mtbf_s)
    return first_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_cost_s if ratio < 1 else mtbf_s


def best_interval_s(save_cost_s: float, mtbf_s: float) -> float:
    """Return the interval at which `goodput` is highest, to the precision of a float.

    There its derivative is 0: 1 − e^(−(τ+C)/M) = τ/M. The left side less the right falls from above 0 at τ = 0 to
    below it at τ = M, so that halving finds the place. Neither restart nor commit lag moves it.

    Raises:
        OptionsError: a number is negative, not finite, or `mtbf_s` is 0.
    """
    _check("save_cost_s", save_cost_s)
    _check("mtbf_s", mtbf_s, is_zero_allowed=False)
    low, high = 0.0, 1.0  # of M
    while low < (middle := (low + high) / 2) < high:
        if -math.expm1(-middle - save_cost_s / mtbf_s) > middle:
            low = middle
        else:
            high = middle
    return low * mtbf_s if save_cost_s else 0.0


def goodput(interval_s: float, save_cost_s: float, mtbf_s: float, restart_s: float, commit_lag_s: float = 0.0) -> float:
    """Return the expected share of wall time, 0 to 1, in which the job gets on.

    Between two failures lies a time U, exponential with mean M. In it the job restarts (R), and its j-th checkpoint is
    committed j cycles of τ + C and the lag L later; what was not committed is lost. So as many intervals are gained as
    there are j with U ≥ R + L + j(τ+C); their expected number is e^(−(R+L)/M) / (e^((τ+C)/M) − 1), and each is worth τ
    of the M seconds. Without L this is the complete model of Daly (2006), and here it is exact for any L at which
    saves may overlap; saves that do not need τ + C ≥ C + L.

    Args:
        interval_s: training between two saves, above 0.
        save_cost_s: seconds that a save blocks training.
        mtbf_s: mean seconds between failures of the whole job.
        restart_s: seconds from a failure until training goes on: to notice it, to start again, to restore.
        commit_lag_s: seconds from the end of the block until the checkpoint is committed.

    Raises:
        OptionsError: a number is negative, not finite, or `interval_s` or `mtbf_s` is 0.
    """
    _check("interval_s", interval_s, is_zero_allowed=False)
    _check("save_cost_s", save_cost_s)
    _check("mtbf_s", mtbf_s, is_zero_allowed=False)
    _check("restart_s", restart_s)
    _check("commit_lag_s", commit_lag_s)
    cycle = interval_s / mtbf_s + save_cost_s / mtbf_s
    # The same in three factors, none above 1: not in saves, not trained in vain, not in restarts.
    saving = interval_s / (interval_s + save_cost_s)
    losing = cycle * math.exp(-cycle) / -math.expm1(-cycle) if cycle > 0 else 1.0
    return min(1.0, saving * losing * math.exp(-(restart_s + commit_lag_s) / mtbf_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What was measured of a job's saves, each the mean of one; None for what was not.

    Attributes:
        saves: how many were measured.
        blocked_s: seconds for which a save blocks training.
        commit_s: seconds from the begin of a save to its commit; not less than `blocked_s`.
        interval_s: seconds of training between two saves.
        restart_s: seconds of a restore.
        step_s: seconds of a training step.
    """

    saves: int = 0
    blocked_s: float | None = None
    commit_s: float | None = None
    interval_s: float | None = None
    restart_s: float | None = None
    step_s: float | None = None

    def __post_init__(self) -> None:
        if type(self.saves) is not int or self.saves < 0:
            raise OptionsError(f"saves is {self.saves!r}; give a whole number from 0")
        for name in ("blocked_s", "commit_s", "restart_s", "interval_s", "step_s"):
            if (value := getattr(self, name)) is not None:
                _check(name, value, is_zero_allowed=name not in ("interval_s", "step_s"))
        if self.commit_s is not None and self.blocked_s is not None and self.commit_s < self.blocked_s:
            raise OptionsError(
                f"commit_s is {self.commit_s}, less than blocked_s ({self.blocked_s}): both begin together"
            )

    @property
    def commit_lag_s(self) -> float:
        """Seconds from the end of the block to the commit; 0 if one of the two was not measured."""
        return 0.0 if self.commit_s is None or self.blocked_s is None else self.commit_s - self.blocked_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """How often to save, and what it would gain; None for what cannot be said.

    Attributes:
        costs: what was measured.
        mtbf_s: mean seconds between failures.
        young_s: Young's interval.
        daly_s: Daly's interval.
        best_s: the interval to take: the best of the model, and not shorter than a save needs in the background.
        best_steps: the same in training steps, from 1.
        present_interval_s: the interval as it is.
        goodput_present: expected goodput with it.
        goodput_best: expected goodput with `best_s` (in whole steps, if a step's time is known).
        troubles: the last things that went wrong beside saves, or in saves that were let fail; oldest first.
        spent: what of the store's requests went into `saves`, `restores` and `rest` (retention, claims, listings and
            what else the manager was asked for): those of this rank, and of the first root alone.
        prices: of the store; None where nobody knows them.
    """

    costs: Costs
    mtbf_s: float | None
    young_s: float | None = None
    daly_s: float | None = None
    best_s: float | None = None
    best_steps: int | None = None
    present_interval_s: float | None = None
    goodput_present: float | None = None
    goodput_best: float | None = None
    troubles: tuple[str, ...] = ()
    spent: Mapping[str, Traffic] = field(default_factory=dict)
    prices: Prices | None = None

    def __str__(self) -> str:
        """Say it for a person, a line for each subject; what is not known comes with how to learn it."""
        subjects = {"saves": self._saves(), "restore": self._restore()}
        if self.costs.blocked_s is not None:
            subjects |= {"interval": self._interval(), "goodput": self._gain()}
        told = [*subjects.items(), *self._requests(), *(("trouble", trouble) for trouble in self.troubles)]
        return "\n".join(f"{subject:<10}{said}" for subject, said in told if said)

    def _saves(self) -> str:
        costs = self.costs
        if costs.blocked_s is None:
            return "none was measured yet; ask again after the first save"
        committed = "" if costs.commit_s is None else f", are committed after {_span(costs.commit_s)}"
        saves = "1 save" if costs.saves == 1 else f"{costs.saves} saves"
        return f"block training for {_span(costs.blocked_s)}{committed} ({saves})"

    def _requests(self) -> Iterator[tuple[str, str]]:
        for what, traffic in self.spent.items():
            if traffic.requests:
                counts = ", ".join(f"{count:,} {name}" for name, count in traffic.by_class.items() if count)
                moved = f"{as_bytes(traffic.sent_bytes)} sent, {as_bytes(traffic.received_bytes)} received"
                prices = self.prices
                cost = "" if prices is None else f"; {money(prices.cost_of(traffic), prices.currency)}"
                yield "requests", f"of {what}: {counts}; {moved}{cost}"
        if self.prices is not None and self.spent:
            yield "prices", self.prices.source or "given"

    def _restore(self) -> str:
        if self.costs.restart_s is not None:
            return f"takes {_span(self.costs.restart_s)}"
        return (
            "" if self.costs.blocked_s is None else "was not measured and counts nothing; manager.restore measures it"
        )

    def _interval(self) -> str:
        now = _span(self.present_interval_s) if self.present_interval_s is not None else "unknown (ask should_save)"
        if self.best_s is None:
            return f"now {now}; give mtbf_s, the seconds between failures, to learn the best"
        best = f"now {now}, best {_span(self.best_s)}"
        if self.best_steps is not None:
            best += f" (save_every_steps={self.best_steps})"
        return (
            f"{best} with a failure every {_span(self.mtbf_s)}; Young {_span(self.young_s)}, Daly {_span(self.daly_s)}"
        )

    def _gain(self) -> str:
        if self.goodput_best is None:
            return ""
        best = f"at best {_percent(self.goodput_best)}"
        if self.present_interval_s is None:
            return best
        lost_s = self.present_interval_s / 2 + self.costs.commit_lag_s + (self.costs.restart_s or 0.0)
        return f"now {_percent(self.goodput_present)}, {best}; a failure costs about {_span(lost_s)} now"


def advise(costs: Costs, mtbf_s: float | None = None) -> Advice:
    """Return how often to save, by what saves were measured to cost and how far failures are apart.

    Raises:
        OptionsError: `mtbf_s` is not a finite number above 0.
    """
    if mtbf_s is not None:
        _check("mtbf_s", mtbf_s, is_zero_allowed=False)
    blocked_s, present_s = costs.blocked_s, costs.interval_s
    if blocked_s is None or mtbf_s is None:
        return Advice(costs=costs, mtbf_s=mtbf_s, present_interval_s=present_s)
    # A save that begins before the one before it is committed would only wait for it.
    best_s = max(best_interval_s(blocked_s, mtbf_s), costs.commit_lag_s)
    steps = _best_steps(best_s, costs, mtbf_s)
    taken_s = best_s if steps is None or costs.step_s is None else steps * costs.step_s
    return Advice(
        costs=costs,
        mtbf_s=mtbf_s,
        young_s=young_interval_s(blocked_s, mtbf_s),
        daly_s=daly_interval_s(blocked_s, mtbf_s),
        best_s=best_s,
        best_steps=steps,
        present_interval_s=present_s,
        goodput_present=None if present_s is None else _goodput(present_s, costs, mtbf_s),
        goodput_best=_goodput(taken_s, costs, mtbf_s),
    )


def _best_steps(best_s: float, costs: Costs, mtbf_s: float) -> int | None:
    """Return the better one of the whole numbers of steps around an interval, but none that is shorter than the lag."""
    if costs.step_s is None:
        return None
    step_s, most = costs.step_s, max(1, math.ceil(best_s / costs.step_s))
    allowed = [steps for steps in (most - 1, most) if steps >= 1 and steps * step_s >= costs.commit_lag_s] or [most]
    return max(allowed, key=lambda steps: _goodput(steps * step_s, costs, mtbf_s))


def _goodput(interval_s: float, costs: Costs, mtbf_s: float) -> float:
    # Saves that cost nothing are best without an interval, of which the limit is that of a very short one.
    interval_s = interval_s or mtbf_s * 1e-12
    return goodput(interval_s, costs.blocked_s or 0.0, mtbf_s, costs.restart_s or 0.0, costs.commit_lag_s)


def _check(name: str, value: float, *, is_zero_allowed: bool = True) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf or (value == 0 and not is_zero_allowed):
        raise OptionsError(f"{name} is {value!r}; give seconds, {'0 or more' if is_zero_allowed else 'above 0'}")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _span(seconds: float | None) -> str:
    """Say a time in the unit that a person would choose."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2g} s"
    for limit_s, unit_s, unit in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
