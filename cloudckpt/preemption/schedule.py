"""Decide at which steps a job saves: by steps, by seconds, and when it is about to be preempted.

    own interval, clock and notice ──vote──▶ the same answer on every rank

Whether a rank is asked to save by its clock, or by a notice that only its machine was given, is its own affair; so the
ranks vote, at every step, wherever one of the two may happen. Knows no store and saves nothing. One thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from cloudckpt.errors import OptionsError
from cloudckpt.preemption.watch import Preemption
from cloudckpt.ranks import Vote

__all__ = ["Deadline", "Latest", "Schedule"]

logger = logging.getLogger(__name__)

# A snapshot under way that is younger than this is waited for, not repeated.
_RECENT_S = 5.0
_FAR_MS = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The job's newest save.

    Attributes:
        step: its step.
        began_s: when its snapshot was taken, on the monotonic clock.
        is_under_way: whether it goes on.
        is_failed: whether it failed.
        took_s: how long the last whole save took, its background part included; 0 if none has ended.
    """

    step: int
    began_s: float
    is_under_way: bool
    is_failed: bool
    took_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """What all ranks know of a preemption: the end (monotonic seconds; inf if unknown) and whose word it is."""

    stop_s: float
    source: str

    def left_s(self, now_s: float) -> float:
        """Return the seconds that are left."""
        return self.stop_s - now_s


class Schedule:
    """When to save, asked at every step."""

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
        if every_steps is not None and every_steps < 1:
            raise OptionsError(f"save_every_steps is {every_steps}; give 1 or more, or None")
        if every_s is not None and not 0 < every_s < math.inf:
            raise OptionsError(f"save_every_seconds is {every_s}; give a number of seconds above 0, or None")
        self._every_steps = every_steps
        self._every_s = every_s
        self._preemption = preemption
        self._clock = clock
        self._began_s = clock()
        self.deadline: Deadline | None = None
        self._is_answered = False
        self._is_asked = False

    @property
    def needs_vote(self) -> bool:
        """Whether the ranks could answer differently by themselves."""
        return self._every_s is not None or self._preemption is not None

    def hear(self) -> None:
        """Heed a notice at once, where there is no other rank to agree with, and nobody asks at every step.

        Who asks is answered first: a notice between `should_save` and `preempted` would end a loop that has not saved.
        """
        if self._is_asked:
            return
        now_s = self._clock()
        left_ms = self._left_ms(now_s)
        if left_ms < _FAR_MS:
            self._note(now_s, left_ms)

    def ask(self, step: int, latest: Latest | None, vote: Vote) -> bool:
        """Tell whether to save after `step`; the same on every rank.

        Raises:
            OptionsError: the ranks ask about different steps.
            RankLostError: another rank did not come to ask.
        """
        self._is_asked = True
        is_due = self._every_steps is not None and (step + 1) % self._every_steps == 0
        if not self.needs_vote:
            return is_due
        now_s = self._clock()
        left_ms = self._left_ms(now_s)
        mine = [step, -step, int(self._is_time(now_s, latest)), -left_ms, *_standing(step, now_s, latest)]
        most, least, is_time, left, is_old, needed_ms = vote.largest(mine, what=f"should_save of step {step}")
        if most != -least:
            raise OptionsError(f"ranks ask about different steps, {-least} to {most}; call should_save with the same")
        if -left < _FAR_MS:
            self._note(now_s, -left)
        if self.deadline is not None and not self._is_answered:
            return self._answer(step, now_s, latest, is_wanted=bool(is_old) and -left >= needed_ms)
        return is_due or bool(is_time)

    def _is_time(self, now_s: float, latest: Latest | None) -> bool:
        since_s = self._began_s if latest is None else max(latest.began_s, self._began_s)
        return self._every_s is not None and now_s - since_s >= self._every_s

    def _left_ms(self, now_s: float) -> int:
        """Return the milliseconds until the end as this rank knows it; a far one for a notice without a time."""
        notice = self._preemption.notice if self._preemption is not None else None
        if notice is None:
            return _FAR_MS
        left_s = notice.seconds_left(now_s)
        return _FAR_MS - 1 if left_s is None else max(0, min(_FAR_MS - 1, int(left_s * 1000)))

    def _note(self, now_s: float, left_ms: int) -> None:
        """Keep the earliest end that any rank knows."""
        notice = self._preemption.notice if self._preemption is not None else None
        stop_s = math.inf if left_ms == _FAR_MS - 1 else now_s + left_ms / 1000
        if self.deadline is None or stop_s < self.deadline.stop_s:
            self.deadline = Deadline(stop_s=stop_s, source=notice.source if notice is not None else "another rank")

    def _answer(self, step: int, now_s: float, latest: Latest | None, *, is_wanted: bool) -> bool:
        """Save once, unless the newest snapshot is as good, or nothing newer could be saved in time."""
        self._is_answered = True
        if self.deadline is None:
            return False
        left_s = self.deadline.left_s(now_s)
        left = "an unknown time" if math.isinf(left_s) else f"{left_s:.1f} s"
        if is_wanted or latest is None:
            logger.warning("preempted (%s), %s left: step %d is to be saved", self.deadline.source, left, step)
            return True
        logger.warning("preempted (%s), %s left: the save of step %d will do", self.deadline.source, left, latest.step)
        return False


def _standing(step: int, now_s: float, latest: Latest | None) -> tuple[int, int]:
    """Return whether a new snapshot is wanted beside the newest one, and how many ms the end of its save is away."""
    if latest is None or latest.is_failed:
        return 1, 0
    if latest.step == step:
        return 0, 0
    age_s = now_s - latest.began_s
    if not latest.is_under_way:
        return 1, int(1000 * latest.took_s)
    # One more can only begin when this one has ended.
    return int(age_s > _RECENT_S), int(1000 * (max(0.0, latest.took_s - age_s) + latest.took_s))
