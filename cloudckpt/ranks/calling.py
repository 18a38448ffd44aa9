"""Call what may never return, on daemon threads whose every error surfaces.

    Caller.submit(call) ──▶ its thread, one call after the other ──▶ a future

Whoever waits for the future may stop waiting. The end of the interpreter waits a moment for the threads: one that comes
back from C++ after Python has gone aborts the process.
"""

from __future__ import annotations

import atexit
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, cast

from cloudckpt.threads import started

__all__ = ["Caller", "begun"]

_Result = TypeVar("_Result")

# How long threads that have nothing more to do may take to end.
_ENDING_S = 1.0


class Caller:
    """One thread that calls what it is given, until it is told to stop."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = started(self._serve, name=name)
        _CALLERS.add(self)

    def submit(self, call: Callable[[], _Result]) -> Future[_Result]:
        """Have the thread call something, after what it was given before."""
        future: Future[_Result] = Future()
        self._calls.put((cast("Future[object]", future), call))
        return future

    def stop(self) -> None:
        """Let the thread end when it has called what it was given. Returns at once; `join` waits."""
        self._calls.put(None)

    def join(self, timeout_s: float = _ENDING_S) -> None:
        """Wait a moment for the end of a thread that was told to stop."""
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            _call(*item)
            del item  # it may hold the gloo group
        _CALLERS.discard(self)


def begun(call: Callable[[], _Result]) -> Future[_Result]:
    """Call something on a thread of its own."""
    caller = Caller("cloudckpt-asking")
    future = caller.submit(call)
    caller.stop()
    return future


def _call(future: Future[object], call: Callable[[], object]) -> None:
    try:
        future.set_result(call())
    except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: it is raised where the future is awaited)
        future.set_exception(exc)


_CALLERS: set[Caller] = set()


@atexit.register
def _end() -> None:
    stop_s = time.monotonic() + _ENDING_S
    callers = _CALLERS.copy()
    for caller in callers:
        caller.stop()
    for caller in callers:
        caller.join(max(0.0, stop_s - time.monotonic()))
