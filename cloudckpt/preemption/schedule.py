"""Decide at which steps a job saves: by steps, by seconds, and when it is about to be preempted.

    own interval, clock and notice ──vote──▶ the same answer on every rank
    begun ──▶ committed │ failed             what became of the newest save, told by whoever makes it

Whether a rank is asked to save by its clock, or by a notice that only its machine was given, is its own affair; so the
ranks vote, at every step, wherever one of the two may happen: on facts, from which each then draws the same conclusion.

    notice ──▶ a goal: the next save ──▶ asked for until it is committed, or the end has passed ──▶ over

Knows no store and saves nothing. The training's thread asks; how a save ended may be told by the thread that made it
in the background, and whether an end is near may be asked by any.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import OptionsError
from cloudckpt.options import as_count, as_seconds
from cloudckpt.preemption.notices import Notice
from cloudckpt.preemption.watch import Preemption
from cloudckpt.ranks import Vote
from cloudckpt.threads import new_lock

__all__ = ["Schedule"]

logger = logging.getLogger(__name__)

# Of the time left before the end, kept for what follows the commit.
_MARGIN_S = 0.5
# A save gets no less, however little is left.
_LEAST_S = 1.0
# A snapshot under way that is younger than this is waited for first; ends closer to each other are one.
_RECENT_S = 5.0
# What a rank says that knows of no end, and one that knows of an end without a time.
_NO_END_MS = 10**12
_TIMELESS_MS = _NO_END_MS - 1


@dataclass(frozen=True, slots=True)
class _Newest:
    """The job's newest save: the how manieth it is, its step, when its own work began, and what became of it."""

    number: int
    step: int
    began_s: float
    state: Literal["under way", "committed", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    """The save that a notice asks for, by its number, and the end for which it was set."""

    number: int
    stop_s: float


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the ranks know together: of each number, the largest that any of them has.

    Attributes:
        left_ms: until the earliest end, `_TIMELESS_MS` or `_NO_END_MS`.
        is_news: whether that end asks for a save of its own.
        safe_number: of the last save that is committed.
        is_failed: whether the newest save has failed.
        is_old: whether the snapshot of the newest save is so old that a newer one is worth having.
        needed_ms: until the newest save and one more would have ended.
    """

    left_ms: int
    is_news: bool
    safe_number: int
    is_failed: bool
    is_old: bool
    needed_ms: int


class Schedule:
    """When to save, asked at every step.

    Attributes:
        deadline: the end that all ranks have agreed on; None while none is known, and once it has passed.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_s: float | None = None,
        preemption: Preemption | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Combine the reasons to save.

        Raises:
            OptionsError: an interval that is none.
        """
        self._every_steps = None if every_steps is None else as_count("save_every_steps", every_steps, least=1)
        self._every_s = None if every_s is None else as_seconds("save_every_seconds", every_s, is_zero_allowed=False)
        self._preemption = preemption
        self._clock = clock
        self._began_s = clock()
        self._lock = new_lock()
        self._newest: _Newest | None = None
        self._safe_number = 0
        self._took_s = 0.0
        self.deadline: Deadline | None = None
        self._goal = _Goal(number=0, stop_s=math.inf)
        self._source = ""
        # Whether the end of a notice lay ahead when it was first heard.
        self._was_ahead: dict[Notice, bool] = {}
        self._told: tuple[bool, int] | None = None
        self._is_asked = False

    def terms(self) -> dict[str, str | int | None]:
        """Return what must be the same on every rank that asks, by the names of the manager's options.

        One that does not vote would be waited for by those that do; of these, each may have reasons of its own.
        """
        votes = self._every_s is not None or self._preemption is not None
        return {
            "save_every_steps": self._every_steps,
            "save_every_seconds or preemption": "given" if votes else "not given",
        }

    # -- what became of saves ------------------------------------------------------------------------------

    def begun(self, step: int, began_s: float) -> None:
        """Note that all ranks have agreed on a save, whose own work began at `began_s` on the clock."""
        with self._lock:
            self._newest = _Newest(self._count + 1, step, began_s, "under way")

    def committed(self, step: int) -> None:
        """Note that a save was committed, just now."""
        with self._lock:
            if self._newest is not None and self._newest.step == step:
                self._took_s = self._clock() - self._newest.began_s
                self._newest = replace(self._newest, state="committed")
                self._safe_number = self._newest.number

    def failed(self, step: int) -> None:
        """Note that a save has failed, or that nobody knows what became of it."""
        with self._lock:
            if self._newest is not None and self._newest.step == step:
                self._newest = replace(self._newest, state="failed")

    @property
    def _count(self) -> int:
        return 0 if self._newest is None else self._newest.number

    # -- the end -------------------------------------------------------------------------------------------

    @property
    def is_preempted(self) -> bool:
        """Whether notice was given that this job ends, and that end has not passed."""
        return self.deadline is not None

    @property
    def is_end_near(self) -> bool:
        """Whether an end whose time is known lies ahead, so that nothing should be done but to save; in any thread."""
        end = self.end
        return end is not None and end.stop_s < math.inf

    @property
    def end(self) -> Deadline | None:
        """The earliest end ahead, of the one that the ranks agreed on and those that this rank heard of since.

        What time a rank gives its own requests needs no vote, and it may have waited long since it was last asked.
        """
        now_s = self._clock()
        own = None if self._preemption is None else self._preemption.next_end(now_s)
        # One that has passed was wrong: the machine is still there.
        ends = (end for end in (self.deadline, own) if end is not None and end.left_s(now_s) > 0)
        return min(ends, key=lambda end: end.stop_s, default=None)

    @property
    def may_end(self) -> bool:
        """Whether an end may be announced at all."""
        return self._preemption is not None

    def end_of_saves(self) -> Deadline:
        """Return by when a save has to be done as far as is known now, or `NEVER`; in seconds of `time.monotonic`.

        For any thread, and to be asked again and again by what is under way.
        """
        end = self.end
        if end is None or math.isinf(end.stop_s):
            return NEVER
        return Deadline.after(max(_LEAST_S, end.left_s(self._clock()) - _MARGIN_S), end.reason)

    def seconds_left(self) -> float:
        """Return the seconds until the end as far as it is known; inf if it is not."""
        deadline = self.deadline
        return math.inf if deadline is None else deadline.left_s(self._clock())

    def hear(self) -> None:
        """Heed a notice at once, where there is no other rank to agree with, and nobody asks at every step.

        Who asks is answered first: a notice between `should_save` and `preempted` would end a loop that has not saved.
        """
        if self._is_asked:
            return
        now_s = self._clock()
        left_ms = self._left_ms(now_s)
        self._heed(now_s, left_ms, own_ms=left_ms, step=None, is_news=self._is_news(now_s, left_ms))

    def ask(self, step: int, vote: Vote) -> bool:
        """Tell whether to save after `step`; the same on every rank.

        Raises:
            OptionsError: the ranks ask about different steps.
            RankLostError: another rank did not come to ask.
        """
        self._is_asked = True
        is_due = self._every_steps is not None and step > 0 and step % self._every_steps == 0
        if self._every_s is None and self._preemption is None:
            return is_due  # no rank could answer differently
        now_s = self._clock()
        left_ms = self._left_ms(now_s)
        mine = [step, -step, int(self._is_time(now_s)), -left_ms, *self._standing(now_s, left_ms)]
        most, least, is_time, left, news, safe, failed, old, needed_ms = vote.largest(
            mine, what=f"should_save of step {step}"
        )
        if most != -least:
            raise OptionsError(f"ranks ask about different steps, {-least} to {most}; call should_save with the same")
        facts = _Facts(-left, bool(news), safe, bool(failed), bool(old), needed_ms)
        self._heed(now_s, facts.left_ms, own_ms=left_ms, step=step, is_news=facts.is_news)
        if self.deadline is not None and facts.safe_number < self._goal.number:
            return self._answer(step, facts)
        return is_due or bool(is_time)

    def _is_time(self, now_s: float) -> bool:
        newest = self._newest
        since_s = self._began_s if newest is None else max(newest.began_s, self._began_s)
        return self._every_s is not None and now_s - since_s >= self._every_s

    def _left_ms(self, now_s: float) -> int:
        """Return the milliseconds until the earliest end that this rank was told of and that has not passed."""
        told = self._preemption
        if told is None:
            return _NO_END_MS
        return min((self._left_of(notice, now_s, told) for notice in told.pending), default=_NO_END_MS)

    def _left_of(self, notice: Notice, now_s: float, preemption: Preemption) -> int:
        """Return the milliseconds that a notice leaves, and dismiss it if it is over."""
        left_s = notice.seconds_left(now_s)
        is_answered = notice in self._was_ahead and self._safe_number >= self._goal.number
        was_ahead = self._was_ahead.setdefault(notice, left_s is not None and left_s > 0)
        if left_s:
            return min(_TIMELESS_MS - 1, int(left_s * 1000))
        # Who asks seldom hears of an end when it has passed. The machine is still there, so there is time, nobody knows
        # how much: as with a notice without a time, it is over only when its save is safe.
        is_over = preemption.is_withdrawn(notice) and is_answered if left_s is None else was_ahead or is_answered
        if not is_over:
            return _TIMELESS_MS
        preemption.dismiss(notice)
        return _NO_END_MS

    def _is_news(self, now_s: float, left_ms: int) -> bool:
        """Tell whether the end that this rank knows asks for a save of its own: the first, a much earlier, the next."""
        if left_ms == _NO_END_MS:
            return False
        goal_s = self._goal.stop_s
        return self.deadline is None or _stop_s(now_s, left_ms) < goal_s - _RECENT_S or goal_s <= now_s

    def _standing(self, now_s: float, left_ms: int) -> tuple[int, ...]:
        """Return this rank's part of the facts from `is_news` on."""
        newest, took_s = self._newest, self._took_s
        age_s = 0.0 if newest is None else now_s - newest.began_s
        return (
            int(self._is_news(now_s, left_ms)),
            self._safe_number,
            int(newest is not None and newest.state == "failed"),
            int(age_s > _RECENT_S),
            # One more can only begin when this one has ended.
            int(1000 * (max(0.0, took_s - age_s) + took_s)),
        )

    def _heed(self, now_s: float, left_ms: int, *, own_ms: int, step: int | None, is_news: bool) -> None:
        """Keep the earliest end that any rank knows, and set the goal that it asks for; or let it be over."""
        if left_ms == _NO_END_MS:
            if self.deadline is not None:
                self.deadline = None
                logger.warning(
                    "the end announced by %s did not come, and this job is still there: all goes on as usual",
                    self._source,
                )
            return
        stop_s = _stop_s(now_s, left_ms)
        if is_news:
            is_there = self._newest is not None and self._newest.step == step
            self._goal = _Goal(number=self._count if is_there else self._count + 1, stop_s=stop_s)
            self._told = None
        known = self.deadline
        if known is None or stop_s < known.stop_s or known.stop_s <= now_s:
            notice = self._preemption.notice if self._preemption is not None and own_ms <= left_ms else None
            self._source = notice.source if notice is not None else "another rank"
            self.deadline = Deadline(stop_s=stop_s, reason=f"preemption ({self._source})")

    def _answer(self, step: int, facts: _Facts) -> bool:
        """Save anew, unless a save is under way that will do, or after which there is no time for another one.

        A commit is atomic, so nothing is lost by a save that comes too late: where none is under way, one is begun.
        """
        is_under_way = self._newest is not None and not facts.is_failed and facts.safe_number < self._count
        is_wanted = not is_under_way
        if is_under_way and self._count < self._goal.number:
            is_wanted = facts.is_old and facts.left_ms >= facts.needed_ms
        if self._told != (is_wanted, self._count):
            self._told = is_wanted, self._count
            self._tell(step, is_wanted=is_wanted)
        return is_wanted

    def _tell(self, step: int, *, is_wanted: bool) -> None:
        left_s = self.seconds_left()
        left = "an unknown time" if math.isinf(left_s) else f"{left_s:.1f} s"
        if is_wanted or self._newest is None:
            logger.warning("preempted (%s), %s left: step %d is to be saved", self._source, left, step)
        else:
            logger.warning(
                "preempted (%s), %s left: the save of step %d is under way", self._source, left, self._newest.step
            )


def _stop_s(now_s: float, left_ms: int) -> float:
    return math.inf if left_ms == _TIMELESS_MS else now_s + left_ms / 1000
