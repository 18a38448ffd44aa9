"""The one time by which something must have ended, and why: made by who knows the end, handed down to every request.

Pure but for the default clock: a value, compared and asked, never waited on.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

__all__ = ["NEVER", "Deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """An end in time.

    Attributes:
        stop_s: when, in monotonic seconds; inf if never, or if nobody knows.
        reason: whose word or which limit it is, for errors and logs: `preemption (SIGTERM)`, `RetryPolicy.deadline_s`.
        is_last: whether nobody will be there to try again afterwards, so that no number of attempts ends it before.
    """

    stop_s: float
    reason: str
    is_last: bool = False

    @classmethod
    def after(cls, seconds: float, reason: str, *, now_s: float | None = None) -> Deadline:
        """Return the one that is `seconds` after `now_s`, or after now by `time.monotonic`."""
        return cls(stop_s=(time.monotonic() if now_s is None else now_s) + seconds, reason=reason)

    def left_s(self, now_s: float) -> float:
        """Return the seconds that are left at `now_s`; below 0 once it has passed."""
        return self.stop_s - now_s

    def earlier(self, other: Deadline) -> Deadline:
        """Return which of the two comes first; this one if they are the same time."""
        return other if other.stop_s < self.stop_s else self


NEVER = Deadline(stop_s=math.inf, reason="none")
