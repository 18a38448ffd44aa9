"""Let fewer requests be in flight while a store says "slower", or a link is too slow for so many.

All that come may pass until then. A wave of refusals or time-outs halves what was in flight, once; each success adds
one. Knows no clock: who finds the gate closed comes again. Any thread may enter.
"""

from __future__ import annotations

from cloudckpt.threads import new_lock

__all__ = ["Gate"]

# More than any concurrency that makes sense: at this many the gate is as good as none.
_MOST = 128


class Gate:
    """The requests in flight of one store, and how many there may be."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._in_flight = 0
        self._limit = _MOST
        self._cuts = 0

    def enter(self, *, is_forced: bool) -> int | None:
        """Let a request begin; return its ticket for `leave`, or None if it has to come again.

        `is_forced` lets it pass a closed gate: its time would else run out here.
        """
        with self._lock:
            if self._in_flight >= self._limit and not is_forced:
                return None
            self._in_flight += 1
            return self._cuts

    def leave(self, ticket: int, *, is_slower: bool, is_success: bool) -> None:
        """Note the end of a request, and whether it was refused for its rate or had no time, or went well."""
        with self._lock:
            # Those that began before the last cut say nothing new.
            if is_slower and ticket == self._cuts:
                self._limit = max(1, min(self._limit, self._in_flight) // 2)
                self._cuts += 1
            if is_success and self._limit < _MOST:
                self._limit += 1
            self._in_flight -= 1
