"""Share the time until an end between the two roots that a save may go to.

    first ── half of what is left ──▶ second ── half ──▶ first ──▶ …     one that has refused for good is left out

Without an end each has all the patience there is, once. Makes no request. The end may be announced while a turn
is under way, so it is asked for again and again; any thread may ask.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import StalledError
from cloudckpt.store import RetryingStore

__all__ = ["Turn"]

_SHARE = 0.5
# Less is not worth to be divided.
_LEAST_S = 1.0
# How much nearer an end seems to come by the clock's own noise.
_NOISE_S = 0.05


class Turn:
    """One root's turn to take a save."""

    def __init__(self, end: Callable[[], Deadline] | None, *, is_only: bool) -> None:
        """Begin.

        Args:
            end: tells by when all must be done as it is known now; None if none will ever be known.
            is_only: whether no other root is left.
        """
        self._end = end
        self._is_only = is_only
        self._of = self._own = NEVER

    def whole(self) -> Deadline:
        """Return by when all must be done: what is under way goes on while the other root has its turn."""
        end = NEVER if self._end is None else self._end()
        return replace(end, is_last=self._is_only and end.stop_s < math.inf)

    def part(self) -> Deadline:
        """Return by when this turn ends, as far as is known now."""
        end = self.whole()
        if self._is_only:
            return end
        if end.stop_s < self._of.stop_s - _NOISE_S or math.isinf(end.stop_s):
            left_s = end.left_s(time.monotonic())
            self._of = end
            self._own = end if not _LEAST_S < left_s < math.inf else Deadline.after(_SHARE * left_s, end.reason)
        return self._own

    def for_uploads(self, store: RetryingStore) -> RetryingStore:
        """Return a root's store with the time for what goes on while another root has its turn.

        Nothing ends by an end that is announced only meanwhile, for it may be false; but it hurries all.
        """
        if self._end is None:
            return store
        end, hurried = self.whole(), store.hurried_by(self.whole)
        return hurried if math.isinf(end.stop_s) else hurried.within(end)

    def for_commits(self, store: RetryingStore) -> RetryingStore:
        """Return it with the time for all that ends with the turn."""
        if self._end is None or self._is_only:
            return self.for_uploads(store)
        return store.within(self.part)

    def check(self) -> None:
        """Raise `StalledError` when the turn is over and another root is to be tried."""
        part = self.part()
        if not self._is_only and part.left_s(time.monotonic()) <= 0:
            raise StalledError(
                f"the upload did not end in its share of the time until the end of {part.reason}; it goes on while the "
                "other root is tried"
            )
