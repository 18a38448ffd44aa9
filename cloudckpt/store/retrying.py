"""Turn single requests that may fail into operations that end by a deadline: the only retry layer there is.

    verb ──▶ gate ──▶ request, with a limit of its own ──▶ done
                         │ throttled        ──▶ longer wait, fewer at once ──▶ gate …    until the deadline
                         │ transient        ──▶ wait (full jitter)         ──▶ gate …    … or the attempt cap
                         │ expired          ──▶ refresh, once              ──▶ gate …
                         │ another size     ──▶ wait, until one comes twice ──▶ gate …
                         ╰ definite         ──▶ raised as it is
    create ──▶ request ──▶ done
               ╰ any failure      ──▶ read back ──▶ ours: done │ other: exists │ absent: again │ else: unknown

A request's limit is a share of what is left, so that another one fits behind it. An end that is announced meanwhile
counts at once: for the pause, the wait at the gate and the request that are under way. tenacity keeps the waits and the
counting. Keeps FORMAT invariants 6 and 14. Knows no backend. Any thread may enter; each call has a state of its own.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Generic, NoReturn, Self, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import (
    AccessDeniedError,
    CommitUnknownError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
    ThrottledError,
    TransientError,
    is_transient,
)
from cloudckpt.options import KIB, RetryPolicy
from cloudckpt.store.base import Listing, ObjectInfo, Store, check_key
from cloudckpt.store.gate import Gate
from cloudckpt.store.intake import Intake, RangeGets
from cloudckpt.store.limit import LeftBehindError, Limit, Patience, limited, one_deadline, patience, told_of_moves
from cloudckpt.store.lone import LoneCreation
from cloudckpt.store.putting import Putting
from cloudckpt.store.stats import OpStats, Recorder, StoreStats
from cloudckpt.threads import new_lock

__all__ = ["RetryingStore"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Another writer's object of about our size is told from ours by one read; only a much larger one needs a second look.
_READ_BACK_EXCESS_BYTES = 64 * KIB
# S3 takes no more keys in one request.
_DELETE_LIMIT = 1000
# Of the time that is left, what a pause may take, so that another request fits behind it.
_SHARE = 0.5
# What takes as long as its bytes do: its own deadline is put off when they get further than in any request before.
_MOVING = frozenset({"put", "get", "read"})
# Less is no request: a connection alone takes about as long.
_LEAST_S = 0.1
# A row of several operations.
_LEAST_ROW_S = 1.0
# A request took its whole limit, or so nearly that no other fault can be meant.
_NEARLY = 0.9
# How often, where an end may be announced meanwhile, a pause or a request that blocks looks whether it has come nearer;
# and how much nearer is no more than the clocks' own noise.
_LOOK_S = 0.1
_NOISE_S = 0.05
# How long to stay away from a closed gate: a request takes about as long, and no two threads come together.
_GATE_PAUSE_S = (0.02, 0.1)


End = Callable[[], Deadline]
"""Tells the end as it is known when it is asked; `NEVER` while there is none, or once one has passed."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Means:
    """What all calls on one store share, whatever their patience."""

    store: Store
    sleep: Callable[[float], None]
    clock: Callable[[], float]
    rng: random.Random
    gate: Gate = field(default_factory=Gate)
    recorder: Recorder = field(default_factory=Recorder)
    refresh_count: int = 0
    refresh_lock: threading.Lock = field(default_factory=new_lock)

    def refresh_since(self, refresh_count: int) -> None:
        """Refresh, unless another thread has done so since the request that failed had begun."""
        with self.refresh_lock:
            if refresh_count == self.refresh_count:
                self.store.refresh()
                self.refresh_count += 1


class RetryingStore(RangeGets):
    """A store whose verbs try again: each ends by `policy.deadline_s` and by the deadline that the store was given.

    The first of these counts from when the bytes of a put, get or read have got further than ever, and ends none that
    move; the other is kept whatever moves.

    Of the requests of one operation that fail otherwise than by throttling there are at most `policy.max_attempts`,
    unless the deadline that rules is the last one that there will ever be: then it is tried until its time is up.

    Attributes:
        inner: the store below, whose verbs make one request each.
    """

    def __init__(
        self,
        store: Store,
        policy: RetryPolicy,
        *,
        single_writer: bool = False,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Wrap `store`, which is closed with this one.

        With `single_writer` the caller promises that nobody else writes there: nothing is asked of the store then but
        plain puts, and a create is a look, a put and another look.
        """
        self.inner = store
        self._single_writer = single_writer
        self.url = store.url
        self.engine = store.engine
        self.endpoint = store.endpoint
        self.is_create_atomic = store.is_create_atomic
        self._last = NEVER
        self._limits: tuple[End, ...] = ()
        self._hints: tuple[End, ...] = ()
        self._policy = policy
        self._means = _Means(store=store, sleep=sleep, clock=clock, rng=rng or random.Random())
        self._beside: dict[str, RetryingStore] = {}
        self.opens: Callable[[str], RetryingStore] | None = None
        self._is_closed = False

    @property
    def deadline(self) -> Deadline:
        """The earliest end that is known now of what is asked of this store."""
        return self._last.earlier(_earliest(*self._limits, *self._hints))

    def within(self, end: Deadline | End) -> RetryingStore:
        """Return this store with no more time than until `end`; both count together, and this one is to be closed.

        The end is on this store's clock, `time.monotonic` unless a test gave another one. If it is a function, it is
        asked again and again, also by what is under way.
        """
        if isinstance(end, Deadline):
            return self._with(self._last.earlier(end), self._limits, self._hints)
        return self._with(self._last, (*self._limits, end), self._hints)

    def hurried_by(self, end: End) -> RetryingStore:
        """Return this store with requests and pauses that fit before `end`, as `within` does; but nothing ends by it.

        For an end that may not come true: who is still there when it has passed, goes on with all patience.
        """
        return self._with(self._last, self._limits, (*self._hints, end))

    def _with(self, last: Deadline, limits: tuple[End, ...], hints: tuple[End, ...]) -> RetryingStore:
        other = RetryingStore(self.inner, self._policy, single_writer=self._single_writer)
        other._means = self._means
        other.opens, other._beside = self.opens, self._beside
        other._last, other._limits, other._hints = last, limits, hints
        return other

    def beside(self, url: str) -> RetryingStore | None:
        """Return the store of another URL, opened as this one, and closed with it; None where nobody knows how."""
        if url not in self._beside and self.opens is not None:
            self._beside[url] = self.opens(url)
        return self._beside.get(url)

    def __repr__(self) -> str:
        return f"RetryingStore({self.engine}, {self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        check_key(key)
        putting = Putting(self.inner, key, buffers)
        self._run("put", key, putting.step, lambda _: putting.size_bytes)

    def create(self, key: str, data: bytes) -> None:
        """Create the object, or find out that it was created; see `Store.create`.

        Two writers that create the same bytes cannot be told apart, so `data` must name its writer.

        Raises:
            ObjectExistsError: another's object stands under that key.
            CommitUnknownError: it may have landed, and cannot be read back; nothing was deleted.
            StorageError: it was refused, and nothing landed.
        """
        kind = LoneCreation if self._single_writer else _Creation
        creation = kind(self.inner, check_key(key), data)
        try:
            self._run("create", key, creation.step, lambda _: len(data))
        except (ObjectExistsError, CommitUnknownError):
            raise
        except (StorageError, OptionsError) as exc:  # a file with a token may vanish between two requests
            if not creation.is_unknown and not isinstance(exc, LeftBehindError):
                raise
            unknown = CommitUnknownError(
                f"create of {key!r} on {self.url} may or may not have landed, and reading it back did not tell "
                f"({exc}); delete nothing, and look at the store once it answers",
                op="create",
                key=key,
                attempts=getattr(exc, "attempts", 0),
                elapsed_s=getattr(exc, "elapsed_s", 0.0),
            )
            unknown.is_taken = creation.is_taken
            raise unknown from exc

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        """Hand on the bytes [start, stop); after a fault what `into` does not have yet is asked for.

        Of the requests that fail there are at most `policy.max_attempts` until it has got on.
        """
        streaming = _Streaming(self.inner, check_key(key), start, stop, into)
        self._run("get", key, streaming.step, lambda size_bytes: size_bytes, streaming.begin)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        check_key(key)
        return self._run("read", key, lambda: self.inner.read(key, limit_bytes=limit_bytes), len)

    def head(self, key: str) -> ObjectInfo:
        check_key(key)
        return self._run("head", key, lambda: self.inner.head(key))

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        """List all pages from `mark` on; each is tried again by itself, and all end by one deadline."""
        pages: _Pages = []
        seen: set[str] = set()
        with one_deadline():
            while not pages or mark:
                seen.add(mark)
                pages.append(self._run("list", prefix, partial(self._page, prefix, delimiter, mark, seen)))
                mark = pages[-1].mark
        return Listing.of_pages(pages)

    def _page(self, prefix: str, delimiter: str, mark: str, seen: Collection[str]) -> Listing:
        """Return the page that begins at `mark`; one that leads back to where we were is another question's answer."""
        page = self.inner.list(prefix, delimiter=delimiter, **({"mark": mark} if mark else {}))
        if page.mark and page.mark in seen:
            raise TransientError(
                f"listing {prefix!r} in {self.url} goes round in circles: a page came again, as a cache may send it",
                op="list",
                key=prefix,
            )
        return page

    def delete(self, keys: Sequence[str]) -> None:
        """Delete any number of objects, in batches that end by one deadline; tried again is what is left of a batch.

        What the store refuses to delete does not keep the others.
        """
        names = [check_key(key) for key in keys]
        refused: StorageError | None = None
        with one_deadline():
            for start in range(0, len(names), _DELETE_LIMIT):
                batch = _Deletion(self.inner, names[start : start + _DELETE_LIMIT])
                try:
                    self._run("delete", names[start], batch.step)
                except StorageError as exc:
                    if isinstance(exc, RetryExhaustedError) or not exc.left_keys:
                        raise
                    refused = refused or exc
        if refused is not None:
            raise refused

    def pause(self, number: int) -> bool:
        """Wait before a row of operations begins again for the `number`th time; False, at once, if its time is over.

        As between requests: random below a bound that doubles, and no longer than leaves time for another operation.
        """
        policy, means = self._policy, self._means
        left_s = self._hard_end().earlier(self._patience().deadline).left_s(means.clock())
        bound_s = min(policy.backoff_max_s, policy.backoff_base_s * 2.0 ** min(number, 64), _SHARE * left_s)
        if left_s < _LEAST_ROW_S:
            return False
        means.sleep(means.rng.uniform(0.0, bound_s))
        return True

    def refresh(self) -> None:
        self.inner.refresh()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for other in self._beside.values():
                other.close()
            self.inner.close()

    def stats(self) -> StoreStats:
        """Return what was asked of the store so far; two snapshots subtract."""
        return self._means.recorder.snapshot()

    def _run(
        self,
        op: str,
        key: str,
        request: Callable[[], T],
        size_of: Callable[[T], int] = lambda _: 0,
        begin: Callable[[], int] = lambda: 0,
    ) -> T:
        time_left = _TimeLeft(self._means, self._patience(), self._hard_end(), self._limits, self._hints)
        call = _Call(self._means, self._policy, time_left, op, key, request, size_of, begin)
        retrying = Retrying(
            retry=retry_if_exception_type(_AgainError),
            stop=call.is_over,
            wait=call.wait_s,
            before=call.note_state,
            before_sleep=call.note_retry,
            retry_error_callback=call.give_up,
            sleep=call.pause,
        )
        try:
            return retrying(call.attempt)
        except StorageError as exc:
            call.fill(exc)
            raise
        finally:
            call.release()

    def _patience(self) -> Patience:
        """Return the patience with an operation that begins now."""
        return patience(Deadline.after(self._policy.deadline_s, "RetryPolicy.deadline_s", now_s=self._means.clock()))

    def _hard_end(self) -> Deadline:
        """Return by when an operation that begins now must have ended, whatever moves."""
        return self._last.earlier(_earliest(*self._limits))


# The store has a verb `list`, so that its methods cannot name the type.
_Pages = list[Listing]


class _AgainError(Exception):
    """A request failed with `cause`, and another may follow: at once, or after a wait."""

    def __init__(self, cause: StorageError, *, at_once: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.at_once = at_once


def _earliest(*ends: End) -> Deadline:
    deadline = NEVER
    for end in ends:
        deadline = deadline.earlier(end())
    return deadline


class _TimeLeft:
    """How much time an operation has, as it is known when it is asked.

    Attributes:
        own: the patience with it, which bytes that move put off.
        may_change: whether an end may be announced meanwhile.
    """

    def __init__(
        self, means: _Means, own: Patience, last: Deadline, limits: Sequence[End], hints: Sequence[End]
    ) -> None:
        self.own = own
        self._means = means
        self._last = last
        self._limits = limits
        self._hints = hints
        self.may_change = bool(limits or hints)

    @property
    def limit(self) -> Deadline:
        """By when it must have ended."""
        return self._last.earlier(_earliest(*self._limits)).earlier(self.own.deadline)

    @property
    def end(self) -> Deadline:
        """For when to plan, which may be earlier than the limit."""
        return self.limit.earlier(_earliest(*self._hints))

    @property
    def moving_left_s(self) -> float:
        """How long a request may go on whose bytes move."""
        return self._last.earlier(_earliest(*self._limits, *self._hints)).left_s(self._means.clock())

    @property
    def left_s(self) -> float:
        return self.end.left_s(self._means.clock())

    @property
    def limit_s(self) -> float:
        return self.limit.left_s(self._means.clock())

    def share(self, seconds: float) -> _Share:
        """Return so many seconds from now on, or less once an end is announced."""
        return _Share(self, seconds, self._means.clock)

    def sit_out(self) -> None:
        """Wait while an end is about to come by which nothing need have ended."""
        while self.left_s < _LEAST_S < self.limit_s:
            self._means.sleep(_LOOK_S)


class _Share:
    """What a pause or a request may take of the time left: so much, and less once the end has come nearer."""

    def __init__(self, time_left: _TimeLeft, seconds: float, clock: Callable[[], float]) -> None:
        self._time_left = time_left
        self._clock = clock
        self._known_s = time_left.end.stop_s
        self._seconds = seconds
        self._until_s = clock() + seconds
        self._cut_s = math.inf

    def _look(self) -> None:
        stop_s, now_s = self._time_left.end.stop_s, self._clock()
        if stop_s < self._known_s - _NOISE_S:
            left_s = max(0.0, _SHARE * (stop_s - now_s))
            self._seconds, self._cut_s = min(self._seconds, left_s), min(self._cut_s, now_s + left_s)
        self._known_s = stop_s

    @property
    def seconds(self) -> float:
        """How much it is in all."""
        self._look()
        return self._seconds

    @property
    def left_s(self) -> float:
        """How much of it is left now."""
        self._look()
        return min(self._until_s, self._cut_s) - self._clock()

    @property
    def cut_left_s(self) -> float:
        """How much of the share of an end is left that has come nearer meanwhile; inf if none has."""
        self._look()
        return self._cut_s - self._clock()


class _Call(Generic[T]):
    """One operation: its requests so far, its time, and what may come next."""

    def __init__(
        self,
        means: _Means,
        policy: RetryPolicy,
        time_left: _TimeLeft,
        op: str,
        key: str,
        request: Callable[[], T],
        size_of: Callable[[T], int],
        begin: Callable[[], int],
    ) -> None:
        self._means = means
        self._policy = policy
        self._time_left = time_left
        self._op = op
        self._key = key
        self._request = request
        self._size_of = size_of
        self._begin = begin
        self._done_bytes = 0
        self._began_s = self._moved_s = means.clock()
        self._got_on_s, self._furthest_bytes = -math.inf, 0
        self._requests = 0
        self._counted = 0
        self._throttles = 0
        self._timeouts = 0
        self._waits = 0
        self._pause_s = 0.0
        self._stale_since: int | None = None
        self._has_refreshed = False
        self._other_object = ""
        self._state: RetryCallState | None = None

    @property
    def _elapsed_s(self) -> float:
        return self._means.clock() - self._began_s

    @property
    def _is_late(self) -> bool:
        return self._time_left.limit_s - self._pause_s < _LEAST_S

    def attempt(self) -> T:
        """Make one request, within its share of the time that is left."""
        self._time_left.sit_out()
        if (limit := self._time_left.limit).left_s(self._means.clock()) <= 0:
            raise RetryExhaustedError(
                f"{self._op} of {self._key!r} on {self._means.store.url} was not tried: the time of "
                f"{limit.reason} was over before"
            )
        ticket = self._pass_gate()
        self._go_on()
        self._moved_s = self._means.clock()
        cause: StorageError | None = None
        is_success = False
        share = self._time_left.share(self._policy.limit_s(self._time_left.left_s, timeouts=self._timeouts))
        try:
            with self._limited(share), told_of_moves(self._note_move):
                self._refresh_if_stale()
                result = self._timed_request()
            is_success = True
        except TransientError as exc:
            cause = exc
            raise _AgainError(exc) from exc
        except StorageError as exc:
            if not exc.is_other_object or str(exc) == self._other_object:
                raise
            # Only a second look tells a damaged object from a damaged answer.
            cause, self._other_object = exc, str(exc)
            raise _AgainError(exc) from exc
        except _AgainError as exc:
            cause = exc.cause
            raise
        finally:
            has_timed_out = self._means.clock() - self._moved_s >= _NEARLY * share.seconds
            if self._op in _MOVING:
                self._time_left.own.put_off(self._got_on_s + self._policy.deadline_s)
            is_slower = cause is not None and self._is_slower(cause, share, has_timed_out=has_timed_out)
            self._means.gate.leave(ticket, is_slower=is_slower, is_success=is_success)
            cause = None  # its stack holds this frame
        return result

    def _go_on(self) -> None:
        """Find out how much need not come again; where that is more than before, what failed until then is over."""
        done_bytes = self._begin()
        if done_bytes > self._done_bytes:
            self._done_bytes = done_bytes
            self._counted = self._timeouts = self._waits = 0

    def _note_move(self, moved_bytes: int) -> None:
        self._moved_s = self._means.clock()
        if self._done_bytes + moved_bytes > self._furthest_bytes:
            self._furthest_bytes, self._got_on_s = self._done_bytes + moved_bytes, self._moved_s

    def _pass_gate(self) -> int:
        """Wait until this request may be in flight, but no longer than for its share of what is left."""
        share = self._time_left.share(_SHARE * self._time_left.left_s)
        while (ticket := self._means.gate.enter(is_forced=share.left_s <= 0)) is None:
            self._means.sleep(self._means.rng.uniform(*_GATE_PAUSE_S))
        return ticket

    def _limited(self, share: _Share) -> AbstractContextManager[None]:
        time_left, timeouts = self._time_left, self._timeouts

        def total_s() -> float:
            return time_left.moving_left_s if self._op in _MOVING else time_left.left_s

        if not time_left.may_change:
            return limited(still_s=share.seconds, total_s=total_s(), timeouts=timeouts)

        def now() -> Limit:
            still_s, now_s = share.seconds, time.monotonic()
            stop_s, cut_s = now_s + total_s(), now_s + share.cut_left_s
            return Limit(still_s=still_s, stop_s=stop_s, timeouts=timeouts, may_change=True, cut_s=cut_s)

        return limited(now=now)

    def _is_slower(self, cause: StorageError, share: _Share, *, has_timed_out: bool) -> bool:
        """Count a failed request, and tell whether fewer should be in flight."""
        is_throttled = isinstance(cause, ThrottledError)
        # One that was cut short for an end that need not come true has not had its chance.
        is_hurried = has_timed_out and share.seconds < _NEARLY * self._policy.limit_s(self._time_left.limit_s)
        self._timeouts += has_timed_out and not (is_throttled or is_hurried)
        self._counted += not (is_throttled or is_hurried)
        return has_timed_out or is_throttled

    def _refresh_if_stale(self) -> None:
        if self._stale_since is not None:
            self._means.refresh_since(self._stale_since)
            self._stale_since, self._has_refreshed = None, True

    def _timed_request(self) -> T:
        refresh_count = self._means.refresh_count
        self._requests += 1
        size_bytes = 0
        began_s = self._means.clock()
        try:
            result = self._request()
            size_bytes = self._size_of(result)
        except LeftBehindError as exc:
            # Not made once more: what it reads by then may be other bytes, and it may land after the second one.
            raise LeftBehindError(
                f"{self._op} of {self._key!r} on {self._means.store.url} had no answer when the end came near "
                f"({self._time_left.end.reason}), and was left behind"
            ) from exc
        except CredentialsExpiredError as exc:
            if self._has_refreshed:
                raise
            self._stale_since = refresh_count
            raise _AgainError(exc, at_once=True) from exc
        finally:
            spent = OpStats(requests=1, bytes=size_bytes, seconds=self._means.clock() - began_s)
            self._means.recorder.add(self._op, spent)
        return result

    def pause(self, seconds: float) -> None:
        """Wait for so long, or less once an end is announced."""
        if not self._time_left.may_change:
            self._means.sleep(seconds)
            return
        share = self._time_left.share(seconds)
        while (left_s := share.left_s) > 0:
            self._means.sleep(min(left_s, _LOOK_S))

    def wait_s(self, state: RetryCallState) -> float:
        """Return the pause before the next request: random below a bound that doubles, so that ranks spread out.

        It leaves time for another request, also where the store asks for a longer one.
        """
        again = _again(state)
        if again.at_once:
            self._pause_s = 0.0
            return 0.0
        policy, rng = self._policy, self._means.rng
        # The exponent is capped, since 2.0 ** 1024 is no float.
        bound_s = min(policy.backoff_max_s, policy.backoff_base_s * 2.0 ** min(self._waits, 64))
        pause_s = rng.uniform(0.0, bound_s)
        if isinstance(again.cause, ThrottledError):
            pause_s += again.cause.retry_after_s
        most_s = _SHARE * max(0.0, self._time_left.left_s)
        self._pause_s = pause_s if pause_s <= most_s else rng.uniform(0.0, most_s)
        self._waits += 1
        return self._pause_s

    def is_over(self, state: RetryCallState) -> bool:
        """Tell whether the attempts are used up, or the time."""
        return self._is_late or (self._counted >= self._policy.max_attempts and not self._time_left.end.is_last)

    def note_retry(self, state: RetryCallState) -> None:
        """Count a retry, and say why it is needed."""
        cause = _again(state).cause
        # That a key is taken is an answer, and no fault; whose object it is will be seen next.
        is_fault = not isinstance(cause, ObjectExistsError)
        self._means.recorder.add(self._op, OpStats(retries=int(is_fault)))
        logger.log(
            logging.WARNING if is_fault else logging.DEBUG,
            "%s of %r: request %d failed, %d of at most %s that count; the next in %.2f s, %.1f s are left (%s: %s)",
            self._op,
            self._key,
            self._requests,
            self._counted,
            "any number" if self._time_left.end.is_last else self._policy.max_attempts,
            self._pause_s,
            self._time_left.left_s,
            type(cause).__name__,
            str(cause),  # the error itself holds its stack, and that the caller's memory
        )

    def give_up(self, state: RetryCallState) -> NoReturn:
        """End an operation that has used up its attempts or its time."""
        last = _again(state).cause
        if not is_transient(last):
            raise last
        limit = self._time_left.limit.reason if self._is_late else "RetryPolicy.max_attempts"
        raise RetryExhaustedError(
            f"{self._op} of {self._key!r} on {self._means.store.url} failed {self._requests} times in "
            f"{self._elapsed_s:.1f} s, the end by {limit}; the last time: {last}. See whether the store can be reached "
            "and is well, or allow more in RetryPolicy (max_attempts, deadline_s)"
        ) from last

    def fill(self, error: StorageError) -> None:
        """Write into an error what only this layer knows."""
        error.op, error.key = self._op, self._key
        error.attempts, error.elapsed_s = self._requests, self._elapsed_s

    def note_state(self, state: RetryCallState) -> None:
        """Remember tenacity's own record of this call, for `release`."""
        self._state = state

    def release(self) -> None:
        """Break the cycles of record, error and stack, which else keep the caller's memory until a collection."""
        del self._request, self._size_of, self._begin
        if self._state is not None:
            self._state.outcome = None


class _Streaming:
    """One read that goes on where its last request has left off."""

    def __init__(self, store: Store, key: str, start: int, stop: int, into: Intake) -> None:
        self._store = store
        self._key = key
        self._start = self._at = start
        self._stop = stop
        self._into = into
        self._has_begun = False

    def begin(self) -> int:
        """Return how many bytes need not come any more."""
        if self._has_begun:
            self._at = self._into.restart()
        self._has_begun = True
        return self._at - self._start

    def step(self) -> int:
        """Make one request for what is left; return how many bytes it has brought."""
        # What is whole may have ended with an error, such as of a body that goes on.
        if self._at < self._stop or self._start == self._stop:
            self._store.stream(self._key, start=self._at, stop=self._stop, into=self._into)
        return self._stop - self._at


class _Deletion:
    """One batch of a delete: the keys that may still be there."""

    def __init__(self, store: Store, keys: Sequence[str]) -> None:
        self._store = store
        self._keys = keys

    def step(self) -> None:
        """Make one request for what is left."""
        try:
            self._store.delete(self._keys)
        except StorageError as exc:
            self._keys = exc.left_keys or self._keys
            raise


class _Creation:
    """One create: whether the next request is the create itself, or a look at what stands there since it failed."""

    def __init__(self, store: Store, key: str, data: bytes) -> None:
        self._store = store
        self._key = key
        self._data = data
        self._fault: StorageError | None = None
        self._unreadable: StorageError | None = None
        self._other: bytes | None = None
        self._is_ambiguous = False

    @property
    def is_unknown(self) -> bool:
        """Whether some request may have landed without our knowing."""
        return self._is_ambiguous or isinstance(self._fault, ObjectExistsError)

    @property
    def is_taken(self) -> bool:
        """Whether the store's only answer was that the key is taken."""
        return not self._is_ambiguous and isinstance(self._fault, ObjectExistsError)

    def step(self) -> None:
        """Make the next request; return once the object is known to be ours."""
        if self._fault is None:
            self._create()
        else:
            self._look_after(self._fault)

    def _create(self) -> None:
        try:
            self._store.create(self._key, self._data)
        except (CommitUnknownError, CredentialsExpiredError, LeftBehindError):
            raise  # the store has looked itself; nothing was tried, and a refresh comes first; or it may yet land
        except StorageError as exc:
            self._fault = exc
            self._is_ambiguous = self._is_ambiguous or (is_transient(exc) and exc.may_have_landed)
            raise _AgainError(exc, at_once=True) from exc

    def _look_after(self, fault: StorageError) -> None:
        try:
            is_ours = self._is_ours(fault)
        except ObjectNotFoundError:
            self._fault = self._unreadable = self._other = None
            error = self._absent_after(fault)
            raise error from error.__cause__
        except StorageError as exc:
            if type(exc) is AccessDeniedError and is_transient(fault):
                # Without the right to list, S3 denies an absent object, too. Only another create can tell: it finds
                # the key free, or taken, and then there is something to read.
                self._fault = self._unreadable = None
                raise _AgainError(fault) from exc
            # An answer that we cannot place says nothing about the effect; only a refusal that we know does.
            self._is_ambiguous = self._is_ambiguous or (type(fault) is StorageError and fault.may_have_landed)
            if self.is_unknown:
                raise
            raise fault from fault.__cause__  # it was refused, so nothing of ours can be there
        if not is_ours:
            raise ObjectExistsError(
                f"{self._key!r} on {self._store.url} is another writer's; it was left as it is",
                op="create",
                key=self._key,
            ) from fault
        logger.warning("create of %r had landed although it failed (%s)", self._key, type(fault).__name__)

    def _is_ours(self, fault: StorageError) -> bool:
        if self._unreadable is not None:
            if self._store.head(self._key).size_bytes == len(self._data):
                raise self._unreadable
            return False
        try:
            found = self._store.read(self._key, limit_bytes=len(self._data) + _READ_BACK_EXCESS_BYTES)
        except StorageError as exc:
            if type(exc) is not StorageError:
                raise
            self._unreadable = exc  # perhaps too large and no more, which has no type of its own: its size tells
            raise _AgainError(exc, at_once=True) from exc
        if found not in (self._data, self._other):
            # As of a damaged answer to any read: what comes twice stands there.
            self._other = found
            raise _AgainError(fault, at_once=True)
        return found == self._data

    def _absent_after(self, fault: StorageError) -> Exception:
        if is_transient(fault):
            return _AgainError(fault)
        if isinstance(fault, ObjectExistsError):
            # Some engines say "exists" for a conflict between two requests that both failed.
            return _AgainError(TransientError(f"the store said that the key is taken, and nothing is there: {fault}"))
        return fault


def _again(state: RetryCallState) -> _AgainError:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _AgainError):
        return error
    raise RuntimeError("tenacity asked about a request that nobody wants to repeat")
