"""Add up what saves and restores cost a job, as it runs: the facts behind the advice on the interval.

Seconds, requests and bytes. The training's thread and that of a background save may both enter.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cloudckpt.report.advice import Costs
from cloudckpt.store import Traffic
from cloudckpt.threads import new_lock

__all__ = ["Meter"]


class Meter:
    """What one job's saves have cost so far."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = new_lock()
        self._blocked_s: list[float] = []
        self._commit_s: list[float] = []
        self._restart_s: float | None = None
        self._asked: tuple[int, float, float] | None = None
        self._steps = 0
        self._training_s = 0.0
        self._saving, self._restoring = Traffic(), Traffic()

    def note_step(self, step: int) -> None:
        """Note that training has come to the end of a step."""
        with self._lock:
            now_s, blocked_s = self._clock(), sum(self._blocked_s)
            if self._asked is not None and step > self._asked[0]:
                self._steps += step - self._asked[0]
                self._training_s += max(0.0, now_s - self._asked[1] - (blocked_s - self._asked[2]))
            self._asked = step, now_s, blocked_s

    def note_blocked(self, seconds: float) -> None:
        """Note for how long a save kept training waiting."""
        with self._lock:
            self._blocked_s.append(seconds)

    def note_commit(self, seconds: float) -> None:
        """Note how long a save took from its begin to its commit."""
        with self._lock:
            self._commit_s.append(seconds)

    def note_saving(self, traffic: Traffic) -> None:
        """Note what a save has asked of the store, whatever became of it."""
        with self._lock:
            self._saving += traffic

    def note_restore(self, seconds: float, traffic: Traffic) -> None:
        """Note how long a restore took, and what it has asked of the store."""
        with self._lock:
            self._restart_s = seconds
            self._restoring += traffic

    def spent(self) -> tuple[Traffic, Traffic]:
        """Return what all saves have asked of the store so far, and all restores."""
        with self._lock:
            return self._saving, self._restoring

    def costs(self) -> Costs:
        """Return the means so far."""
        with self._lock:
            saves = len(self._blocked_s)
            blocked_s = sum(self._blocked_s) / saves if saves else None
            commit_s = sum(self._commit_s) / len(self._commit_s) if self._commit_s else None
            return Costs(
                saves=saves,
                blocked_s=blocked_s,
                # Of the same saves but for the one under way, so that noise could turn them round.
                commit_s=None if commit_s is None or blocked_s is None else max(commit_s, blocked_s),
                interval_s=self._training_s / saves if saves and self._training_s > 0 else None,
                restart_s=self._restart_s,
                step_s=self._training_s / self._steps if self._steps and self._training_s > 0 else None,
            )
