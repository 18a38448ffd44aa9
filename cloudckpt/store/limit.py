"""Say how long the request that is being made may take, and by when a row of operations must have ended.

    retrying ──limited()──▶ a verb, on the same thread ──▶ limit_now() ◀── wires, errands
                                             a call that blocks ──led()──▶ a thread that can be left behind
                                             a disk's ──awaited()──▶ the same, and it is told when nobody waits any more
    retrying, a pool ◀──told_of_moves()── note_move() ◀── wires, disks: bytes of the request have moved

So a verb keeps its signature, and no engine keeps a limit from its construction. The limits are context variables: each
thread has its own, and a coroutine that a thread sends to an event loop takes them along. A limit may come nearer while
the request runs, so whoever can end one asks `limit_now` again and again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import CloudCkptError, RetryExhaustedError
from cloudckpt.store.aside import audible_s, begun, in_main
from cloudckpt.store.hands import lent
from cloudckpt.threads import new_lock

__all__ = [
    "Errand",
    "LeftBehindError",
    "Limit",
    "LimitNow",
    "Patience",
    "StandsStillError",
    "awaited",
    "get_on",
    "is_limited",
    "is_watched",
    "led",
    "limit_now",
    "limited",
    "note_move",
    "one_deadline",
    "patience",
    "told_of_moves",
    "watched",
]

T = TypeVar("T")

# What a request may take that nobody has limited, as on a thread of a library's own.
_DEFAULT_S = 60.0
# Of a request's time, what may go to an errand before it.
_ERRAND_SHARE = 0.5
# How often who waits looks whether the limit has come nearer.
_LOOK_S = 0.1
# How long an interrupt waits for a call that is under way, so that nothing changes after it that need not.
_INTERRUPTED_S = 0.5


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


_listeners: ContextVar[tuple[Callable[[int], None], ...]] = ContextVar("cloudckpt_listeners", default=())


@contextmanager
def told_of_moves(tell: Callable[[int], None]) -> Iterator[None]:
    """Tell, of each request in the block whose bytes are seen to move, how many have; blocks may be nested.

    `tell` is called on any thread, and may neither block nor raise.
    """
    token = _listeners.set((*_listeners.get(), tell))
    try:
        yield
    finally:
        _listeners.reset(token)


def note_move(moved_bytes: int) -> None:
    """Tell whoever waits for the request of this thread or coroutine that so many bytes of it have moved by now."""
    for tell in _listeners.get():
        tell(moved_bytes)


class Errand(Generic[T]):
    """What a library does before a request can be sent, with a time limit of its own or none: asks for credentials.

    Done on a thread of its own, by one for all who need it at the moment; each waits no longer than half of what its
    own request may take, and leaves it to itself then.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._under_way: Future[T] | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, or what the call under way does, which another one has begun.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
        """
        with self._lock:
            future = self._under_way
            if future is None or future.done():
                self._under_way = future = begun(call, name="errand")
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
        wait((future,), timeout=audible_s(min(left_s, _LOOK_S) if limit.may_change else left_s))


class LeftBehindError(RetryExhaustedError):
    """A request blocks that has no more time; what becomes of it is not known, and it may go on."""


def led(call: Callable[[], T]) -> T:
    """Return what a request returns that nothing can end before its own time limit, which it was given when it began.

    It runs on a thread of its own where an end may be announced meanwhile, and where it would keep the main thread from
    hearing a signal. Its memory must be left to it as it is, or whatever it writes be of no use: it may read what
    stands there later.

    Raises:
        LeftBehindError: it has no more time; it goes on, and nobody hears what becomes of it.
    """
    if not (limit_now().may_change or in_main()):
        return call()
    try:
        future = begun(call, name="request")
    except RuntimeError:  # there is room for no thread more
        return call()
    while not wait((future,), timeout=_LOOK_S).done:
        if time.monotonic() >= limit_now().cut_s:
            raise LeftBehindError("a request that blocks was left behind, because the end came near")
    return future.result()


class StandsStillError(Exception):
    """A call that was awaited has no more time."""


class _UnwantedError(Exception):
    """Nobody waits for this call any more: it is to change nothing more."""


@dataclass(slots=True, eq=False)
class _Wait:
    """Who waits for a call, and when the call got on last."""

    moved_s: float
    is_over: bool = False


_wait_of: ContextVar[_Wait | None] = ContextVar("cloudckpt_wait", default=None)


def awaited(call: Callable[[], T]) -> T:
    """Return what a call returns that the kernel may never let come back; it ends by the limit of this request.

    It is made on another thread, so that this one hears signals, too. It calls `get_on` as it gets on.

    Raises:
        StandsStillError: it has no more time; it goes on as far as the kernel's call that it is in.
    """
    wait = _Wait(time.monotonic())

    def made() -> T:
        _wait_of.set(wait)
        return call()

    try:
        done = lent(made)
    except CloudCkptError:  # there is room for no thread more
        return call()
    try:
        while True:
            limit, now_s = limit_now(), time.monotonic()
            left_s = min(wait.moved_s + limit.still_s, limit.stop_s) - now_s
            if done.wait(audible_s(min(left_s, _LOOK_S) if limit.may_change else left_s)):
                break
            if left_s <= 0:
                raise StandsStillError("it stood still" if now_s < limit.stop_s else "its time was up")  # noqa: TRY301
    except BaseException as exc:
        wait.is_over = True
        if not isinstance(exc, StandsStillError):
            done.wait(_INTERRUPTED_S)
        raise
    return done.result()


def get_on() -> None:
    """Note that an awaited call gets on, and end it where nobody waits for it any more."""
    if (wait := _wait_of.get()) is not None:
        if wait.is_over:
            raise _UnwantedError
        wait.moved_s = time.monotonic()


_is_watched: ContextVar[bool] = ContextVar("cloudckpt_is_watched", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """Say that another thread sees whether the requests in the block get on, and leaves this one if they do not."""
    token = _is_watched.set(True)
    try:
        yield
    finally:
        _is_watched.reset(token)


def is_watched() -> bool:
    """Tell whether somebody watches over what this thread does."""
    return _is_watched.get()


@dataclass(slots=True, eq=False)
class Patience:
    """By when the operations that share it must have got on."""

    deadline: Deadline = NEVER

    def put_off(self, stop_s: float) -> None:
        """Wait until then, because bytes have moved."""
        self.deadline = replace(self.deadline, stop_s=max(self.deadline.stop_s, stop_s))


_row: ContextVar[Patience | None] = ContextVar("cloudckpt_row", default=None)


@contextmanager
def one_deadline() -> Iterator[None]:
    """Let all operations in the block end by the deadline of the first, in place of one after the other.

    For a second question that only a failure makes needed, and for what is asked page by page. Blocks may be nested.
    """
    token = _row.set(_row.get() or Patience())
    try:
        yield
    finally:
        _row.reset(token)


def patience(deadline: Deadline) -> Patience:
    """Return the patience with an operation that begins now and has `deadline` itself."""
    row = _row.get() or Patience()
    row.deadline = row.deadline.earlier(deadline)
    return row
