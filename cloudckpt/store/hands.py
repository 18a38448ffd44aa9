"""Have calls made on other threads that are kept for the next ones: a wait costs a hand-over, and no new thread.

    lent(call) ──▶ an idle hand, or a new one ──▶ Lent: waited for, or left to itself

A hand whose call never comes back is never idle again. Knows nothing of stores. Any thread may enter, a signal's
handler in the middle of it, too, and so may a forked child, which has no hands yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from cloudckpt.store.aside import pinned, waitable_s
from cloudckpt.threads import started

__all__ = ["Lent", "lent"]

T = TypeVar("T")

# How long a hand stays that nobody needs.
_IDLE_S = 10.0

# Without a lock: a handler may come while this thread holds it. Appending, popping and removing are one step each.
_idle: list[_Hand] = []
os.register_at_fork(after_in_child=_idle.clear)


class Lent(Generic[T]):
    """A call on another thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call: Callable[[], T] | None = call
        self._context = copy_context()
        self._is_done = threading.Lock()
        self._is_done.acquire()
        self._outcome: list[T] = []
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make the call; raises nothing."""
        if (call := self._call) is None:
            return
        try:
            self._outcome.append(self._context.run(call))
        except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: raised by who waits)
            self._error = pinned(exc)
        finally:
            # The stack of what was raised holds this frame, and that the caller's memory.
            del call
            self._call = None

    def tell(self) -> None:
        """Let who waits go on."""
        self._is_done.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; tell whether it has come."""
        if self._is_done.acquire(timeout=waitable_s(max(0.0, timeout_s))):
            self._is_done.release()
            return True
        return False

    def result(self) -> T:
        """Return what the call returned, once it has ended, or raise what it raised; once."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._outcome.pop()
        finally:
            del error


class _Hand:
    """A thread, and what it is to call next."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Lent[object]] = SimpleQueue()
        started(self._serve, name="cloudckpt-hand")

    def give(self, call: Lent[object]) -> None:
        self._calls.put(call)

    def _serve(self) -> None:
        while (call := self._next()) is not None:
            call.make()
            _idle.append(self)  # before anybody hears of it, who may have the next call
            call.tell()
            del call

    def _next(self) -> Lent[object] | None:
        while True:
            try:
                return self._calls.get(timeout=_IDLE_S)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # somebody has it, and gives it a call now
                return None


def lent(call: Callable[[], T]) -> Lent[T]:
    """Begin to call on another thread, in a copy of this context.

    Raises:
        CloudCkptError: there is no thread for it.
    """
    begun: Lent[T] = Lent(call)
    try:
        hand = _idle.pop()
    except IndexError:
        hand = _Hand()
    hand.give(begun)  # type: ignore[arg-type]
    return begun
