"""Decide which checkpoints of a root stay, as a pure function of what is committed.

Rules only ever keep: what any rule keeps stays, and so do the newest checkpoint and the protected ones. Only
committed checkpoints count, so failed saves never push a good one out. Removing is done elsewhere; here is no I/O and
no clock: age is measured against the newest checkpoint, so a long pause or a wrong local clock removes nothing more.
Keeps the parts of FORMAT invariants 8 and 10 that are decisions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from cloudckpt.errors import OptionsError
from cloudckpt.root.checkpoint import Checkpoint, best_first, check_metric

__all__ = ["KeepBest", "KeepEvery", "KeepFor", "KeepLast", "RetentionRule", "checked_rules", "removable"]


@runtime_checkable
class RetentionRule(Protocol):
    """A reason to keep checkpoints; one of your own is any object with this method."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        """Return which of `checkpoints` (committed, not empty, oldest first) must stay, by their (epoch, step)."""


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", "n", self.n)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        return {checkpoint.order for checkpoint in checkpoints[-self.n :]}


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the `n` best by `metric`: the smallest where `mode` is `min`, the largest where it is `max`.

    A checkpoint without the metric, or with NaN, is never among the best. Of equal ones the newer is better.
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_metric(self.metric, self.mode)
        _check_count("KeepBest", "n", self.n)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        return {checkpoint.order for checkpoint in best_first(checkpoints, self.metric, self.mode)[: self.n]}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepEvery:
    """Keep each checkpoint whose step is a multiple of `steps` (0 is one)."""

    steps: int

    def __post_init__(self) -> None:
        _check_count("KeepEvery", "steps", self.steps)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        return {one.order for one in checkpoints if one.step % self.steps == 0}


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

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        newest = checkpoints[-1].created_at
        return {one.order for one in checkpoints if (newest - one.created_at).total_seconds() <= self.age_s}


def removable(
    checkpoints: Sequence[Checkpoint], rules: Sequence[RetentionRule], *, protected: Collection[tuple[int, int]]
) -> list[Checkpoint]:
    """Return which of the committed `checkpoints`, in whatever order they come, may go; oldest first.

    The newest and the `protected`, by their (epoch, step), always stay. Without rules everything does; from the first
    rule on, a further rule never removes more.
    """
    if not checkpoints or not rules:
        return []
    oldest_first = sorted(checkpoints, key=lambda one: one.order)
    kept = {oldest_first[-1].order, *protected}.union(*(_kept(rule, oldest_first) for rule in rules))
    return [one for one in oldest_first if one.order not in kept]


def checked_rules(rules: object) -> tuple[RetentionRule, ...]:
    """Return retention rules as a tuple.

    Raises:
        OptionsError: they are no rules, or stand in no list.
    """
    if not isinstance(rules, Sequence):
        raise OptionsError(f"retention is {rules!r}; give a list of rules, such as [KeepLast(3)]")
    for rule in rules:
        if not isinstance(rule, RetentionRule) or isinstance(rule, type):
            raise OptionsError(f"retention holds {rule!r}, which is no rule; give KeepLast(3) or the like")
    return tuple(rules)


def _kept(rule: RetentionRule, oldest_first: Sequence[Checkpoint]) -> Iterable[tuple[int, int]]:
    """Return what a rule keeps; one of the user's own that says it in other words must not let everything go."""
    kept = list(rule.keep(oldest_first))
    for order in kept:
        if not (isinstance(order, tuple) and [type(part) for part in order] == [int, int]):
            raise OptionsError(
                f"retention rule {rule!r} keeps {order!r}, which is no (epoch, step); return the `order` of each "
                "checkpoint that is to stay"
            )
    return kept


def _check_count(rule: str, name: str, count: int) -> None:
    if type(count) is not int or count < 1:
        raise OptionsError(f"{rule} has {name}={count!r}; give a whole number from 1")
