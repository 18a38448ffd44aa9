"""Decide which checkpoints of a root stay, as a pure function of what is committed.

Rules only ever keep: what any rule keeps stays, and so do the newest checkpoint and the protected ones. Only
committed checkpoints count, so failed saves never push a good one out. Removing is done elsewhere; here is no I/O and
no clock: age is measured against the newest checkpoint, so a long pause or a wrong local clock removes nothing more.
Keeps the parts of FORMAT invariants 8 and 10 that are decisions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from cloudckpt.errors import OptionsError

__all__ = [
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "Kept",
    "Order",
    "RetentionPlan",
    "RetentionRule",
    "best_first",
    "order_of",
    "plan",
]

Order: TypeAlias = tuple[int, int]
"""(epoch, step): which checkpoint it is, and whether it is newer than another."""


class Kept(Protocol):
    """What a rule may know of one committed checkpoint."""

    @property
    def step(self) -> int | None:
        """Training step; None only outside a root, where no rule applies."""
        ...

    @property
    def epoch(self) -> int:
        """Incarnation of the job that saved it."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the caller measured at the save."""
        ...

    @property
    def created_at_s(self) -> float:
        """Seconds since 1970, by the saving job's clock."""
        ...


KeptT = TypeVar("KeptT", bound=Kept)


class RetentionRule(Protocol):
    """A reason to keep checkpoints. `str(rule)` is how a log or a dry run names the reason."""

    def keep(self, checkpoints: Sequence[Kept]) -> set[Order]:
        """Return which of `checkpoints` (committed, not empty, oldest first) must stay."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", "n", self.n)

    def keep(self, checkpoints: Sequence[Kept]) -> set[Order]:
        return {order_of(checkpoint) for checkpoint in checkpoints[-self.n :]}

    def __str__(self) -> str:
        return f"last {self.n}"


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the `n` best by `metric`: the smallest where `mode` is `min`, the largest where it is `max`.

    A checkpoint without the metric, or with NaN, is never among the best. Of equal ones the newer is better.
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_metric(self.metric, self.mode)
        _check_count("KeepBest", "n", self.n)

    def keep(self, checkpoints: Sequence[Kept]) -> set[Order]:
        return {order_of(checkpoint) for checkpoint in best_first(checkpoints, self.metric, self.mode)[: self.n]}

    def __str__(self) -> str:
        return f"best {self.n} by {self.metric} ({self.mode})"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepEvery:
    """Keep each checkpoint whose step is a multiple of `steps` (0 is one)."""

    steps: int

    def __post_init__(self) -> None:
        _check_count("KeepEvery", "steps", self.steps)

    def keep(self, checkpoints: Sequence[Kept]) -> set[Order]:
        return {order_of(one) for one in checkpoints if one.step is not None and one.step % self.steps == 0}

    def __str__(self) -> str:
        return f"every {self.steps} steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepFor:
    """Keep what is at most `hours` and `seconds` together older than the newest checkpoint."""

    hours: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.age_s < math.inf:
            raise OptionsError(f"KeepFor covers {self.age_s} seconds; give hours or seconds above 0")

    @property
    def age_s(self) -> float:
        """The whole age, in seconds."""
        return self.hours * 3600 + self.seconds

    def keep(self, checkpoints: Sequence[Kept]) -> set[Order]:
        newest_s = checkpoints[-1].created_at_s
        return {order_of(one) for one in checkpoints if newest_s - one.created_at_s <= self.age_s}

    def __str__(self) -> str:
        return f"not {self.age_s:g} s older than the newest"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What stays and why, and what goes.

    Attributes:
        keep: (epoch, step) → the reasons, oldest first.
        remove: (epoch, step) in the order of removal, oldest first.
    """

    keep: Mapping[Order, tuple[str, ...]]
    remove: tuple[Order, ...]


def plan(
    checkpoints: Sequence[Kept], rules: Sequence[RetentionRule], *, protected: Collection[Order] = ()
) -> RetentionPlan:
    """Return what stays of the committed `checkpoints`, in whatever order they come.

    The newest and the `protected` (pinned, resumed from, in flight) always stay. Without rules everything does; from
    the first rule on, a further rule never removes more.

    Raises:
        OptionsError: two checkpoints are the same one.
    """
    oldest_first = sorted(checkpoints, key=order_of)
    reasons: dict[Order, list[str]] = {order_of(checkpoint): [] for checkpoint in oldest_first}
    if len(reasons) != len(oldest_first):
        raise OptionsError("two checkpoints have the same (epoch, step); list each of a root once")
    for reason, kept in _decisions(oldest_first, rules, protected):
        for order in kept & reasons.keys():
            reasons[order].append(reason)
    return RetentionPlan(
        keep={order: tuple(why) for order, why in reasons.items() if why},
        remove=tuple(order for order, why in reasons.items() if not why),
    )


def _decisions(
    oldest_first: Sequence[Kept], rules: Sequence[RetentionRule], protected: Collection[Order]
) -> list[tuple[str, set[Order]]]:
    if not oldest_first:
        return []
    always = [("newest", {order_of(oldest_first[-1])}), ("protected", set(protected))]
    if not rules:
        return [*always, ("no rules", set(map(order_of, oldest_first)))]
    return [*always, *((str(rule), rule.keep(oldest_first)) for rule in rules)]


def best_first(checkpoints: Sequence[KeptT], metric: str, mode: Literal["min", "max"]) -> list[KeptT]:
    """Return those that have the metric, best first; of equal ones the newer first. NaN counts as absent.

    Raises:
        OptionsError: the metric has no name, or the mode is neither `min` nor `max`.
    """
    _check_metric(metric, mode)
    sign = 1 if mode == "min" else -1
    scored = [one for one in checkpoints if not math.isnan(one.metrics.get(metric, math.nan))]
    newest_first = sorted(scored, key=order_of, reverse=True)
    return sorted(newest_first, key=lambda one: sign * one.metrics[metric])


def order_of(checkpoint: Kept) -> Order:
    """Return (epoch, step), by which checkpoints are told apart and ordered."""
    return checkpoint.epoch, -1 if checkpoint.step is None else checkpoint.step


def _check_count(rule: str, name: str, count: int) -> None:
    if type(count) is not int or count < 1:
        raise OptionsError(f"{rule} has {name}={count!r}; give a whole number from 1")


def _check_metric(metric: str, mode: str) -> None:
    if not metric:
        raise OptionsError(f"the metric is {metric!r}; give the name under which `save` gets it")
    if mode not in ("min", "max"):
        raise OptionsError(f"mode is {mode!r}; 'min' keeps the smallest {metric}, 'max' the largest")
