"""Say how long the request that is being made may take, and by when a row of operations must have ended.

    retrying ──limited()──▶ a verb, on the same thread ──▶ limit_now() ◀── wires, errands
                                             a call that blocks ──led()──▶ a thread that can be left behind

So a verb keeps its signature, and no engine keeps a limit from its construction. The limits are context variables: each
thread has its own, and a coroutine that a thread sends to an event loop takes them along. A limit may come nearer while
the request runs, so whoever can end one asks `limit_now` again and again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import CloudCkptError, RetryExhaustedError
from cloudckpt.threads import started

__all__ = [
    "Errand",
    "LeftBehindError",
    "Limit",
    "LimitNow",
    "earliest",
    "is_limited",
    "led",
    "limit_now",
    "limited",
    "one_deadline",
]

T = TypeVar("T")

# What a request may take that nobody has limited, as on a thread of a library's own.
_DEFAULT_S = 60.0
# Of a request's time, what may go to an errand before it.
_ERRAND_SHARE = 0.5
# How often who waits looks whether the limit has come nearer.
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long one request may take.

    Attributes:
        still_s: seconds that it may stand still, none of its bytes moving; that it may take, where nobody sees them.
        stop_s: when it must have ended whatever moves, in seconds of `time.monotonic`.
        timeouts: how many requests of the same operation had stood still too long before.
        may_change: whether an end may be announced while it runs, so that `limit_now` says less then.
        cut_s: when it has had its share of the time until an end that was announced while it ran, in the same seconds.
    """

    still_s: float
    stop_s: float
    timeouts: int = 0
    may_change: bool = False
    cut_s: float = math.inf

    def left_s(self) -> float:
        """Return the seconds that it may still take, standing still from now on; 0 once its time is up."""
        return max(0.0, min(self.still_s, self.stop_s - time.monotonic()))


LimitNow = Callable[[], Limit]

_limit: ContextVar[LimitNow | None] = ContextVar("cloudckpt_limit", default=None)


@contextmanager
def limited(
    *, still_s: float = _DEFAULT_S, total_s: float = _DEFAULT_S, timeouts: int = 0, now: LimitNow | None = None
) -> Iterator[None]:
    """Give every request in the block `still_s` seconds without progress, and the block `total_s` in all; or as `now`.

    What `now` returns may change while the block runs.
    """
    limit = Limit(still_s=still_s, stop_s=time.monotonic() + total_s, timeouts=timeouts)
    token = _limit.set(now or (lambda: limit))
    try:
        yield
    finally:
        _limit.reset(token)


def limit_now() -> Limit:
    """Return the limit of the request that this thread or coroutine is making, as it is now."""
    now = _limit.get()
    return now() if now is not None else Limit(still_s=_DEFAULT_S, stop_s=time.monotonic() + _DEFAULT_S)


def is_limited() -> bool:
    """Tell whether somebody has set the limit of what this thread or coroutine does."""
    return _limit.get() is not None


class Errand(Generic[T]):
    """What a library does before a request can be sent, with a time limit of its own or none: asks for credentials.

    Done on a thread of its own, by one for all who need it at the moment; each waits no longer than half of what its
    own request may take, and leaves it to itself then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: Future[T] | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, or what the call under way does, which another one has begun.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            CloudCkptError: there is no thread for it.
        """
        with self._lock:
            future = self._under_way
            if future is None or future.done():
                future = Future()
                started(partial(copy_context().run, _settle, future, call), name="cloudckpt-errand")
                self._under_way = future
        try:
            return _in_time(future)
        finally:
            with self._lock:
                if future.done() and self._under_way is future:
                    self._under_way = None  # what it brought is the caller's alone


def _in_time(future: Future[T]) -> T:
    """Wait for an errand, for its share of the request that it is for."""
    began_s = time.monotonic()
    while True:
        limit = limit_now()
        waited_s = time.monotonic() - began_s
        left_s = _ERRAND_SHARE * max(0.0, min(limit.still_s, limit.stop_s - began_s)) - waited_s
        if future.done() or left_s <= 0:
            return future.result(timeout=0)
        wait((future,), timeout=min(left_s, _LOOK_S) if limit.may_change else left_s)


def _settle(future: Future[T], call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - the end of a thread's work: raised by each who waits
        future.set_exception(exc)


class LeftBehindError(RetryExhaustedError):
    """A request blocks that has no more time; what becomes of it is not known, and it may go on."""


def led(call: Callable[[], T]) -> T:
    """Return what a request returns that nothing can end before its own time limit, which it was given when it began.

    Where an end may be announced meanwhile, it runs on a thread of its own. Its memory must be left to it as it is, or
    whatever it writes be of no use: it may read what stands there later.

    Raises:
        LeftBehindError: it has no more time; it goes on, and nobody hears what becomes of it.
    """
    if not limit_now().may_change:
        return call()
    future: Future[T] = Future()
    try:
        started(partial(copy_context().run, _settle, future, call), name="cloudckpt-request")
    except CloudCkptError:  # there is room for no thread more
        return call()
    while not wait((future,), timeout=_LOOK_S).done:
        if time.monotonic() >= limit_now().cut_s:
            raise LeftBehindError("a request that blocks was left behind, because the end came near")
    return future.result()


@dataclass(slots=True, eq=False)
class _Row:
    """Operations that share one deadline."""

    deadline: Deadline = NEVER


_row: ContextVar[_Row | None] = ContextVar("cloudckpt_row", default=None)


@contextmanager
def one_deadline() -> Iterator[None]:
    """Let all operations in the block end by the deadline of the first, in place of one after the other.

    For a second question that only a failure makes needed, and for what is asked page by page. Blocks may be nested.
    """
    token = _row.set(_row.get() or _Row())
    try:
        yield
    finally:
        _row.reset(token)


def earliest(deadline: Deadline) -> Deadline:
    """Return the deadline of an operation that begins now and has `deadline` itself."""
    row = _row.get()
    if row is None:
        return deadline
    row.deadline = row.deadline.earlier(deadline)
    return row.deadline
