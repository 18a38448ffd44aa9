"""Decide at which steps a job saves: by steps, by seconds, and when it is about to be preempted.

    own interval, clock and notice ──vote──▶ the same answer on every rank
    begun ──▶ committed │ failed             what became of the newest save, told by whoever makes it

Whether a rank is asked to save by its clock, or by a notice that only its machine was given, is its own affair; so the
ranks vote, at every step, wherever one of the two may happen. Knows no store and saves nothing. The training's thread
asks; how a save ended may be told by the thread that made it in the background.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cloudckpt.deadline import Deadline
from cloudckpt.errors import OptionsError
from cloudckpt.preemption.watch import Preemption
from cloudckpt.ranks import Vote

__all__ = ["Schedule"]

logger = logging.getLogger(__name__)

# Of the time left before the end, kept for what follows the commit.
_MARGIN_S = 0.5
# A save gets no less, however little is left.
_LEAST_S = 1.0
# A snapshot under way that is younger than this is waited for, not repeated.
_RECENT_S = 5.0
_FAR_MS = 10**12


@dataclass(frozen=True, slots=True)
class _Newest:
    """The job's newest save: its step, when its snapshot was taken, and what became of it."""

    step: int
    began_s: float
    state: Literal["under way", "committed", "failed"]


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
        if every_steps is not None and (type(every_steps) is not int or every_steps < 1):
            raise OptionsError(f"save_every_steps is {every_steps!r}; give a whole number from 1, or None")
        if every_s is not None and (type(every_s) not in (int, float) or not 0 < every_s < math.inf):
            raise OptionsError(f"save_every_seconds is {every_s!r}; give a number of seconds above 0, or None")
        self._every_steps = every_steps
        self._every_s = every_s
        self._preemption = preemption
        self._clock = clock
        self._began_s = clock()
        self._lock = threading.Lock()
        self._newest: _Newest | None = None
        self._took_s = 0.0
        self.deadline: Deadline | None = None
        self._is_answered = False
        self._is_asked = False

    # -- what became of saves ------------------------------------------------------------------------------

    def begun(self, step: int, began_s: float) -> None:
        """Note that all ranks have agreed on a save, whose state is that of `began_s` on the clock."""
        with self._lock:
            self._newest = _Newest(step, began_s, "under way")

    def committed(self, step: int) -> None:
        """Note that a save was committed, just now."""
        with self._lock:
            if self._newest is not None and self._newest.step == step:
                self._took_s = self._clock() - self._newest.began_s
                self._newest = replace(self._newest, state="committed")

    def failed(self, step: int) -> None:
        """Note that a save has failed, or that nobody knows what became of it."""
        with self._lock:
            if self._newest is not None and self._newest.step == step:
                self._newest = replace(self._newest, state="failed")

    # -- the end -------------------------------------------------------------------------------------------

    @property
    def is_preempted(self) -> bool:
        """Whether notice was given that this job ends."""
        return self.deadline is not None

    def seconds_for_a_save(self) -> float | None:
        """Return how long a save may take before the end; None if no end is known.

        A time that has passed was wrong: the machine is still there.
        """
        left_s = self.seconds_left()
        return None if not 0 < left_s < math.inf else max(_LEAST_S, left_s - _MARGIN_S)

    def seconds_left(self) -> float:
        """Return the seconds until the end as far as it is known; inf if it is not."""
        return math.inf if self.deadline is None else self.deadline.left_s(self._clock())

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
        mine = [step, -step, int(self._is_time(now_s)), -left_ms, *self._standing(step, now_s)]
        most, least, is_time, left, is_old, needed_ms = vote.largest(mine, what=f"should_save of step {step}")
        if most != -least:
            raise OptionsError(f"ranks ask about different steps, {-least} to {most}; call should_save with the same")
        if -left < _FAR_MS:
            self._note(now_s, -left)
        if self.deadline is not None and not self._is_answered:
            return self._answer(step, now_s, is_wanted=bool(is_old) and -left >= needed_ms)
        return is_due or bool(is_time)

    def _is_time(self, now_s: float) -> bool:
        newest = self._newest
        since_s = self._began_s if newest is None else max(newest.began_s, self._began_s)
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
            self.deadline = Deadline(stop_s=stop_s, reason=notice.source if notice is not None else "another rank")

    def _answer(self, step: int, now_s: float, *, is_wanted: bool) -> bool:
        """Save once, unless the newest snapshot is as good, or nothing newer could be saved in time."""
        self._is_answered = True
        if self.deadline is None:
            return False
        left_s = self.deadline.left_s(now_s)
        left = "an unknown time" if math.isinf(left_s) else f"{left_s:.1f} s"
        newest = self._newest
        if is_wanted or newest is None:
            logger.warning("preempted (%s), %s left: step %d is to be saved", self.deadline.reason, left, step)
            return True
        logger.warning("preempted (%s), %s left: the save of step %d will do", self.deadline.reason, left, newest.step)
        return False

    def _standing(self, step: int, now_s: float) -> tuple[int, int]:
        """Return whether a new snapshot is wanted beside the newest, and how many ms the end of its save is away."""
        newest, took_s = self._newest, self._took_s
        if newest is None or newest.state == "failed":
            return 1, 0
        if newest.step == step:
            return 0, 0
        if newest.state == "committed":
            return 1, int(1000 * took_s)
        # One more can only begin when this one has ended.
        age_s = now_s - newest.began_s
        return int(age_s > _RECENT_S), int(1000 * (max(0.0, took_s - age_s) + took_s))
