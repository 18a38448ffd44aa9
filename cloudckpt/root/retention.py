"""Decide which checkpoints of a root stay, as a pure function of what is committed.

Rules only ever keep: what any rule keeps stays, and so do the newest checkpoint and the protected ones. Only
committed checkpoints count, so failed saves never push a good one out. Removing is done elsewhere; here is no I/O and
no clock: age is measured in the time that the line of history was at work, so that neither a long pause nor a wrong
clock removes anything more.
Keeps the parts of FORMAT invariants 8 and 10 that are decisions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol, cast, runtime_checkable

from cloudckpt.errors import CloudCkptError, OptionsError, text_of
from cloudckpt.options import as_count, as_seconds
from cloudckpt.root.checkpoint import Checkpoint, best_first, check_metric

__all__ = [
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "Retention",
    "RetentionRule",
    "checked_rules",
    "kept_by",
    "removable",
    "watched_rules",
    "why_kept",
]

logger = logging.getLogger(__name__)

# A rule that has kept nothing this many times in a row is looked at: a metric may well come with every third save.
_IDLE_LIMIT = 5


@runtime_checkable
class RetentionRule(Protocol):
    """A reason to keep checkpoints; one of your own is any object with this method."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        """Return which of `checkpoints` must stay, by their (epoch, step).

        Args:
            checkpoints: all that are committed, oldest first; not empty. A list of the rule's own, which it may sort.
        """


Retention = int | RetentionRule | Callable[[Sequence[Checkpoint]], object] | Sequence[RetentionRule]
"""What a caller may say of what stays: so many of the newest, a rule or a function like `keep`, or rules."""


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep everything: what a job without rules does, said by name."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        return {checkpoint.order for checkpoint in checkpoints}


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", as_count("n of KeepLast", self.n, least=1))

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
        object.__setattr__(self, "n", as_count("n of KeepBest", self.n, least=1))

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        return {checkpoint.order for checkpoint in best_first(checkpoints, self.metric, self.mode)[: self.n]}

    def why_idle(self, first_step: int, newest: Checkpoint) -> str:
        """Say why it has kept nothing since `first_step`."""
        found = ", ".join(map(repr, sorted(newest.metrics))) or "none"
        return f"no checkpoint has a number for the metric {self.metric!r}; the newest one's metrics: {found}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class KeepEvery:
    """Keep one now and then, for ever: by steps, or by the time that was worked; give one of the two.

    Attributes:
        steps: each checkpoint whose step is a multiple of it stays (0 is one), as `save_every_steps` counts them.
        seconds: of each stretch of so many seconds of work (see `KeepFor`), counted from the begin of the line of
            history, the oldest checkpoint stays; so what was kept once is kept from then on. Those that do not tell
            how long was worked stay, too.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise OptionsError("KeepEvery takes steps or seconds, one of the two; give two rules for both")
        if self.steps is not None:
            object.__setattr__(self, "steps", as_count("steps of KeepEvery", self.steps, least=1))
            return
        object.__setattr__(self, "seconds", as_seconds("seconds of KeepEvery", self.seconds))
        if not 0 < (self.seconds or 0.0) < math.inf:
            raise OptionsError(f"seconds of KeepEvery is {self.seconds}; give a number above 0")

    def __repr__(self) -> str:
        given = f"steps={self.steps}" if self.seconds is None else f"seconds={self.seconds}"
        return f"KeepEvery({given})"

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        if self.steps is not None:
            return {one.order for one in checkpoints if one.step % self.steps == 0}
        kept: set[tuple[int, int]] = set()
        oldest: dict[float, tuple[int, int]] = {}
        for one in checkpoints:
            if one.worked_s is None:
                kept.add(one.order)
            else:
                oldest.setdefault(one.worked_s // (self.seconds or 1.0), one.order)
        return kept | set(oldest.values())

    def why_idle(self, first_step: int, newest: Checkpoint) -> str:
        """Say why it has kept nothing since `first_step`; "" while no two of its steps have passed."""
        if self.steps is None or newest.step // self.steps - first_step // self.steps < 2:
            return ""
        return (
            f"steps {first_step} to {newest.step} were saved, and none of them is a multiple of {self.steps}; save at "
            "multiples of a divisor of it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepFor:
    """Keep what is at most `hours` and `seconds` together of work older than the newest checkpoint.

    What counts is the time that jobs of the line of history were at work between the two: each from its restore (or
    from when its manager was opened) to its save, by a clock that nobody sets. Pauses between jobs do not count, nor
    does what the wall clock says. So nothing goes that was committed within that much work before the newest.

    Of a checkpoint of another line (`retention_scope="root"`) its own line's work is compared. Those that do not tell
    it, of a version before, count as if they were committed before all that do, and among each other by `created_at`.
    """

    hours: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hours", "seconds"):
            object.__setattr__(self, name, as_seconds(f"{name} of KeepFor", getattr(self, name)))
        if not 0 < self.age_s < math.inf:
            raise OptionsError(f"KeepFor covers {self.age_s} seconds; give hours or seconds above 0")

    @property
    def age_s(self) -> float:
        """The whole age, in seconds."""
        return self.hours * 3600 + self.seconds

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        worked_s = checkpoints[-1].worked_s or 0.0
        # The newest that does not tell how long its line has worked; what came after it has worked since then.
        untold = next((one.created_at for one in reversed(checkpoints) if one.worked_s is None), None)

        def age_s(one: Checkpoint) -> float:
            if one.worked_s is not None:
                return worked_s - one.worked_s
            return worked_s + (0.0 if untold is None else max(0.0, (untold - one.created_at).total_seconds()))

        return {one.order for one in checkpoints if age_s(one) <= self.age_s}


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
    kept = {oldest_first[-1].order, *protected}.union(*(kept_by(rule, oldest_first) for rule in rules))
    return [one for one in oldest_first if one.order not in kept]


def why_kept(
    checkpoints: Sequence[Checkpoint],
    rules: Sequence[RetentionRule],
    *,
    pinned: Collection[tuple[int, int]] = (),
    names: Mapping[tuple[int, int], Sequence[str]] = MappingProxyType({}),
    in_use: Collection[tuple[int, int]] = (),
    others: Collection[tuple[int, int]] = (),
) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return what keeps each checkpoint, by its (epoch, step): the words below, and the rules.

    Rules are told as their repr has them, a function by its name. `newest`; `pinned`; `named NAME`; `in use` by a job
    that went on from it; `another line of history`, which the rules are not about. What nothing keeps has no words: a
    pass by these rules would remove it.

    Args:
        checkpoints: all of the root, in whatever order they come.
        rules: of retention.
        pinned: (epoch, step) of what is pinned.
        names: (epoch, step) → the names of what has some.
        in_use: of what a job went on from that has not saved yet.
        others: of what the rules leave alone and do not count.
    """
    oldest_first = sorted(checkpoints, key=lambda one: one.order)
    words: dict[tuple[int, int], tuple[str, ...]] = {one.order: () for one in oldest_first}
    mine = [one for one in oldest_first if one.order not in others]
    said: list[tuple[str, Iterable[tuple[int, int]]]] = [
        ("newest", [one.order for one in (mine or oldest_first)[-1:]]),
        ("pinned", pinned),
        *((f"named {name}", [order]) for order, given in names.items() for name in given),
        ("in use", in_use),
        ("another line of history", others),
        *((_name_of(rule), set(kept_by(rule, mine))) for rule in rules if mine),
    ]
    for word, orders in said:
        for order in orders:
            if order in words:
                words[order] += (word,)
    return words


def checked_rules(retention: object) -> tuple[RetentionRule, ...]:
    """Return what a caller says of what stays as rules.

    Raises:
        OptionsError: it says nothing.
    """
    if isinstance(retention, Sequence) and not isinstance(retention, str | bytes):
        return tuple(map(_rule, retention))
    is_count = not isinstance(retention, bool) and hasattr(retention, "__index__")
    return (KeepLast(as_count("retention", retention, least=1)) if is_count else _rule(retention),)


def _rule(given: object) -> RetentionRule:
    if isinstance(given, RetentionRule) and not isinstance(given, type):
        return given
    if callable(given) and not isinstance(given, type):
        return _Said(cast("Callable[[Sequence[Checkpoint]], set[tuple[int, int]]]", given))
    raise OptionsError(
        f"retention holds {text_of(given, repr)}, which is no rule; give KeepLast(3), a list of rules, or 3"
    )


@dataclass(frozen=True, slots=True, repr=False)
class _Said:
    """A function as a rule."""

    keep: Callable[[Sequence[Checkpoint]], set[tuple[int, int]]]

    def __repr__(self) -> str:
        return str(getattr(self.keep, "__qualname__", None) or repr(self.keep))


def watched_rules(rules: Sequence[RetentionRule]) -> tuple[RetentionRule, ...]:
    """Return the same rules, each of which says once, in the log, when it never keeps anything."""
    return tuple(map(_Watched, rules))


class _Watched:
    """A rule that is noticed when it can never match."""

    def __init__(self, rule: RetentionRule) -> None:
        self._rule = rule
        self._idle_count = 0
        self._first_step: int | None = None
        self._is_told = False

    def __repr__(self) -> str:
        return repr(self._rule)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> set[tuple[int, int]]:
        kept = self._rule.keep(list(checkpoints))
        if isinstance(self._rule, KeepBest | KeepEvery) and not self._is_told:
            self._watch(self._rule, checkpoints, is_idle=not kept)
        return kept

    def _watch(self, rule: KeepBest | KeepEvery, checkpoints: Sequence[Checkpoint], *, is_idle: bool) -> None:
        first_step = checkpoints[0].step if self._first_step is None else self._first_step
        self._idle_count, self._first_step = (self._idle_count + 1, first_step) if is_idle else (0, None)
        why = rule.why_idle(first_step, checkpoints[-1]) if self._idle_count >= _IDLE_LIMIT else ""
        if why:
            self._is_told = True
            logger.warning("the retention rule %r has kept nothing so far: %s", rule, why)


def kept_by(rule: RetentionRule, oldest_first: Sequence[Checkpoint]) -> Collection[tuple[int, int]]:
    """Return what a rule keeps; one of the user's own that says it in other words must not let anything go.

    Raises:
        OptionsError: it is none of the checkpoints that the rule was given, nor the `order` of one; or the rule fails.
    """
    given: dict[object, tuple[int, int]] = {one.order: one.order for one in oldest_first}
    given |= {one: one.order for one in oldest_first}
    try:
        # A list of the rule's own: what it sorts or takes out is there for the others, and what was measured, too.
        said: object = rule.keep([replace(one, metrics=MappingProxyType(dict(one.metrics))) for one in oldest_first])
        kept = list(said) if isinstance(said, Iterable) and not isinstance(said, str | bytes) else None
    except CloudCkptError:
        raise
    except Exception as exc:
        raise OptionsError(
            f"retention rule {_name_of(rule)} raised {type(exc).__name__}: {text_of(exc)}; mend it"
        ) from exc
    if kept is None:
        raise OptionsError(
            f"retention rule {_name_of(rule)} returns {text_of(said, repr)}; return the checkpoints that are to stay"
        )
    return [_order(rule, one, given) for one in kept]


def _name_of(rule: RetentionRule) -> str:
    """Return how a rule is called for people; one of the user's own may have no repr."""
    try:
        return repr(rule)
    except Exception:  # noqa: BLE001 (whatever it raises, the rule has a type)
        return type(rule).__qualname__


def _order(rule: RetentionRule, said: object, given: Mapping[object, tuple[int, int]]) -> tuple[int, int]:
    """Return the (epoch, step) of a checkpoint that a rule keeps."""
    try:
        found, is_swapped = given.get(said), isinstance(said, tuple) and said[::-1] in given
    except TypeError:  # a list has no hash
        found, is_swapped = None, False
    if found is not None:
        return found
    why = "the (step, epoch)" if is_swapped else "neither a checkpoint nor the (epoch, step)"
    raise OptionsError(
        f"retention rule {_name_of(rule)} keeps {text_of(said, repr)}, which is {why} of one that it was given; return "
        "the `order` of each checkpoint that is to stay"
    )
