"""Say how long the request that is being made may take, and by when a row of operations must have ended.

    retrying ──limited()──▶ a verb, on the same thread ──▶ limit_now() ◀── wires, errands

So a verb keeps its signature, and no engine keeps a limit from its construction. The limits are context variables: each
thread has its own, and a coroutine that a thread sends to an event loop takes them along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.store.aside import begun

__all__ = ["Errand", "Limit", "earliest", "is_limited", "limit_now", "limited", "one_deadline"]

T = TypeVar("T")

# What a request may take that nobody has limited, as on a thread of a library's own.
_DEFAULT_S = 60.0
# Of a request's time, what may go to an errand before it.
_ERRAND_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long one request may take.

    Attributes:
        still_s: seconds that it may stand still, none of its bytes moving; that it may take, where nobody sees them.
        stop_s: when it must have ended whatever moves, in seconds of `time.monotonic`.
        timeouts: how many requests of the same operation had stood still too long before.
    """

    still_s: float
    stop_s: float
    timeouts: int = 0

    def left_s(self) -> float:
        """Return the seconds that it may still take, standing still from now on; 0 once its time is up."""
        return max(0.0, min(self.still_s, self.stop_s - time.monotonic()))


_limit: ContextVar[Limit | None] = ContextVar("cloudckpt_limit", default=None)


@contextmanager
def limited(*, still_s: float, total_s: float, timeouts: int = 0) -> Iterator[None]:
    """Give every request in the block `still_s` seconds without progress, and the block `total_s` in all."""
    token = _limit.set(Limit(still_s=still_s, stop_s=time.monotonic() + total_s, timeouts=timeouts))
    try:
        yield
    finally:
        _limit.reset(token)


def limit_now() -> Limit:
    """Return the limit of the request that this thread or coroutine is making."""
    return _limit.get() or Limit(still_s=_DEFAULT_S, stop_s=time.monotonic() + _DEFAULT_S)


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
        """
        with self._lock:
            future = self._under_way
            if future is None or future.done():
                self._under_way = future = begun(call, name="errand")
        try:
            return future.result(timeout=_ERRAND_SHARE * limit_now().left_s())
        finally:
            with self._lock:
                if future.done() and self._under_way is future:
                    self._under_way = None  # what it brought is the caller's alone


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
