"""Laws of the one retry layer: caps and deadlines for every fault, and a create that never lies.

Time and chance are the tests' own, so a deadline of minutes passes at once.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CommitUnknownError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
    ThrottledError,
    TransientError,
)
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Listing, Store
from cloudckpt.store.gate import Gate
from cloudckpt.store.limit import led, limit_now, note_move, one_deadline
from cloudckpt.store.retrying import RetryingStore
from cloudckpt.store.stats import OpStats, StoreStats
from tests.store.fault_store import Bucket, Crash, Fault, FaultKind, FaultStore, Op, denied, expired, refused

POLICY = RetryPolicy(max_attempts=6, deadline_s=100.0, request_timeout_s=10.0, backoff_base_s=1.0, backoff_max_s=8.0)


@dataclass
class Time:
    """A clock that moves only by sleeping, and by the requests that take time."""

    now_s: float = 1000.0
    sleeps_s: list[float] = field(default_factory=list)
    limits_s: list[float] = field(default_factory=list)
    request_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.sleeps_s.append(seconds)
        self.now_s += seconds

    def request(self, op: Op) -> None:
        """Take the time of a request, which fails at its limit."""
        limit = limit_now()
        assert limit is not None
        self.limits_s.append(limit.still_s)
        self.now_s += min(self.request_s, limit.still_s)
        if self.request_s > limit.still_s:
            raise TransientError("it took too long", op=op.verb)


@dataclass
class End:
    """An end that is announced at a time, and was false once it has passed."""

    time: Time
    announced_s: float = math.inf
    stop_s: float = math.inf

    def __call__(self) -> Deadline:
        is_ahead = self.announced_s <= self.time.now_s < self.stop_s
        return Deadline(stop_s=self.stop_s, reason="preemption") if is_ahead else NEVER


def throttled(op: Op, retry_after_s: float = 0.0) -> ThrottledError:
    """The store asks for fewer requests."""
    error = ThrottledError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)
    error.retry_after_s = retry_after_s
    return error


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def inner(time: Time) -> FaultStore:
    return FaultStore(hook=time.request)


def retrying(inner: Store, time: Time, policy: RetryPolicy = POLICY, seed: int = 0) -> RetryingStore:
    return RetryingStore(inner, policy, sleep=time.sleep, clock=lambda: time.now_s, rng=random.Random(seed))


@pytest.fixture
def store(inner: FaultStore, time: Time) -> RetryingStore:
    inner.bucket.raw_put("there", b"12345")
    return retrying(inner, time)


VERBS: dict[str, Callable[[RetryingStore], Any]] = {
    "put": lambda store: store.put("new", [memoryview(b"abc"), memoryview(b"de")]),
    "get": lambda store: bytes(store.get("there", start=1, stop=4)),
    "read": lambda store: store.read("there", limit_bytes=9),
    "head": lambda store: store.head("there").size_bytes,
    "list": lambda store: [info.key for info in store.list("th").objects],
    "delete": lambda store: store.delete(["there", "absent"]),
    "create": lambda store: store.create("new", b"abcde"),
}
RESULTS = {"put": None, "get": b"234", "read": b"12345", "head": 5, "list": ["there"], "delete": None, "create": None}
IDEMPOTENT = [verb for verb in VERBS if verb != "create"]


@pytest.mark.parametrize("verb", VERBS)
class TestEveryVerb:
    def test_one_request_is_enough_when_all_is_well(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        assert VERBS[verb](store) == RESULTS[verb]
        assert [op.verb for op in inner.trace] == [verb]
        assert time.sleeps_s == []

    @pytest.mark.parametrize("kind", [FaultKind.BEFORE, FaultKind.LOST_ACK])
    def test_a_transient_fault_is_survived(
        self, store: RetryingStore, inner: FaultStore, verb: str, kind: FaultKind
    ) -> None:
        fault = inner.inject(kind=kind, verbs=[verb], times=2)
        assert VERBS[verb](store) == RESULTS[verb]
        assert fault.fired >= 1
        if verb in ("put", "create"):
            assert inner.bucket.raw_get("new") == b"abcde"

    def test_a_fault_for_ever_ends_at_the_cap(self, store: RetryingStore, inner: FaultStore, verb: str) -> None:
        inner.inject(times=None)
        with pytest.raises(StorageError) as caught:
            VERBS[verb](store)
        assert inner.op_count == POLICY.max_attempts
        assert caught.value.attempts == POLICY.max_attempts
        assert caught.value.op == verb

    def test_no_number_of_attempts_ends_it_before_a_deadline_that_is_the_last(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        last = store.within(Deadline(stop_s=time.now_s + 90.0, reason="preemption", is_last=True))
        inner.inject(times=2 * POLICY.max_attempts)
        assert VERBS[verb](last) == RESULTS[verb]

    def test_attempts_count_where_another_deadline_comes_before_the_last_one(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        last = store.within(Deadline(stop_s=time.now_s + 90.0, reason="preemption", is_last=True))
        inner.inject(times=None)
        with pytest.raises(StorageError) as caught:
            VERBS[verb](last.within(Deadline(stop_s=time.now_s + 80.0, reason="a look")))
        assert caught.value.attempts == POLICY.max_attempts

    def test_a_fault_for_ever_ends_by_the_deadline(
        self, inner: FaultStore, time: Time, store: RetryingStore, verb: str
    ) -> None:
        store = retrying(inner, time, RetryPolicy(max_attempts=10**6, deadline_s=100.0, request_timeout_s=10.0))
        time.request_s = 10.0
        inner.inject(times=None)
        began_s = time.now_s
        with pytest.raises(StorageError) as caught:
            VERBS[verb](store)
        assert 50.0 < time.now_s - began_s <= 100.0
        assert caught.value.elapsed_s == time.now_s - began_s

    def test_a_definite_refusal_is_not_repeated(self, store: RetryingStore, inner: FaultStore, verb: str) -> None:
        inner.inject(verbs=[verb], error=denied, times=None)
        with pytest.raises(AccessDeniedError) as caught:
            VERBS[verb](store)
        assert [op.verb for op in inner.trace].count(verb) == 1
        assert (caught.value.op, caught.value.key) == (verb, inner.trace[0].key)

    def test_expired_credentials_are_refreshed_once_and_the_request_repeated(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        inner.inject(error=expired, times=None, until_refresh=True)
        assert VERBS[verb](store) == RESULTS[verb]
        assert inner.refresh_count == 1
        assert [op.verb for op in inner.trace] == [verb, verb]
        assert time.sleeps_s == [0.0]

    def test_credentials_that_stay_expired_are_an_error_after_one_refresh(
        self, store: RetryingStore, inner: FaultStore, verb: str
    ) -> None:
        inner.inject(error=expired, times=None)
        with pytest.raises(CredentialsExpiredError):
            VERBS[verb](store)
        assert inner.refresh_count == 1
        assert [op.verb for op in inner.trace] == [verb, verb]

    def test_a_crash_passes_through(self, store: RetryingStore, inner: FaultStore, verb: str) -> None:
        inner.crash_at(1)
        with pytest.raises(Crash):
            VERBS[verb](store)
        assert inner.op_count == 1

    def test_an_error_that_is_none_of_ours_passes_through(
        self, store: RetryingStore, inner: FaultStore, verb: str
    ) -> None:
        inner.inject(error=lambda op: ZeroDivisionError(op.verb), times=None)  # type: ignore[arg-type, return-value]
        with pytest.raises(ZeroDivisionError):
            VERBS[verb](store)
        assert inner.op_count == 1


class TestExhaustion:
    def test_the_error_says_what_how_often_how_long_and_what_to_do(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        inner.inject(times=None)
        with pytest.raises(RetryExhaustedError, match=r"get of 'there' on memory://bucket/root failed 6 times in") as c:
            store.get("there", start=0, stop=1)
        error = c.value
        assert (error.op, error.key, error.attempts, error.elapsed_s) == ("get", "there", 6, time.now_s - 1000.0)
        assert "injected into get of 'there'" in str(error)
        assert "RetryPolicy" in str(error)
        assert isinstance(error.__cause__, TransientError)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.attempts) == (str(error), 6)

    def test_the_layers_own_signals_do_not_show(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(times=None)
        with pytest.raises(RetryExhaustedError) as caught:
            store.head("there")
        seen: BaseException | None = caught.value
        chain = []
        while seen is not None:
            chain.append(type(seen))
            seen = seen.__cause__
        assert chain == [RetryExhaustedError, TransientError]

    def test_no_request_may_outlast_the_deadline_and_another_one_fits_behind_it(
        self, inner: FaultStore, time: Time
    ) -> None:
        policy = RetryPolicy(max_attempts=99, deadline_s=30.0, request_timeout_s=20.0, backoff_base_s=0.001)
        time.request_s = 6.0
        inner.inject(times=None)
        with pytest.raises(RetryExhaustedError, match=r"the end by RetryPolicy\.deadline_s"):
            retrying(inner, time, policy).head("there")
        assert time.limits_s[:4] == pytest.approx([15.0, 12.0, 9.0, 6.0], abs=0.01)
        assert inner.op_count > 5
        assert time.now_s - 1000.0 <= 30.0

    @pytest.mark.parametrize("deadline_s", [60.0, 30.0, 1.0])
    def test_a_deadline_as_short_as_one_request_still_gives_a_second_one(
        self, inner: FaultStore, time: Time, deadline_s: float
    ) -> None:
        inner.inject(times=1)
        inner.bucket.raw_put("there", b"12345")
        assert (
            retrying(inner, time, RetryPolicy(deadline_s=deadline_s, request_timeout_s=60.0)).head("there").size_bytes
            == 5
        )
        assert time.limits_s[0] == pytest.approx(deadline_s / 2)

    def test_waits_are_random_below_a_bound_that_doubles_up_to_its_cap(self, inner: FaultStore) -> None:
        bounds_s = [1.0, 2.0, 4.0, 8.0, 8.0]
        waits_s = []
        for seed in range(200):
            time = Time()
            inner.faults = [Fault(times=None)]
            with pytest.raises(RetryExhaustedError):
                retrying(inner, time, seed=seed).head("there")
            waits_s.append(time.sleeps_s)
        for bound_s, column in zip(bounds_s, zip(*waits_s, strict=True), strict=True):
            assert all(0.0 <= wait_s <= bound_s for wait_s in column)
            assert min(column) < 0.1 * bound_s
            assert max(column) > 0.9 * bound_s

    def test_many_attempts_do_not_overflow_the_back_off(self, inner: FaultStore, time: Time) -> None:
        policy = RetryPolicy(max_attempts=3000, deadline_s=1e9, request_timeout_s=1.0, backoff_max_s=1.0)
        inner.inject(times=None)
        with pytest.raises(RetryExhaustedError):
            retrying(inner, time, policy).head("there")
        assert inner.op_count == 3000


class TestAnEndThatComesNearer:
    """An end that is announced while something is under way counts at once."""

    @pytest.fixture
    def end(self, inner: FaultStore, time: Time) -> End:
        inner.bucket.raw_put("there", b"12345")
        return End(time)

    def test_a_pause_under_way_is_cut_short(self, inner: FaultStore, time: Time, end: End) -> None:
        inner.inject(error=lambda op: throttled(op, retry_after_s=40.0))
        end.announced_s, end.stop_s = 1010.0, 1030.0
        retrying(inner, time).within(end).head("there")
        assert 1020.0 <= time.now_s <= 1020.2, "half of what was left when it was announced"

    def test_so_is_the_wait_for_fewer_in_flight(self, inner: FaultStore, time: Time, end: End) -> None:
        store = retrying(inner, time)
        store._means.gate._limit = 0
        end.announced_s, end.stop_s = 1010.0, 1030.0
        store.within(end).head("there")
        assert 1020.0 <= time.now_s <= 1020.2

    def test_a_request_under_way_sees_it(self, inner: FaultStore, time: Time, end: End) -> None:
        seen_s: list[tuple[float, float]] = []

        def note(op: Op) -> None:
            for _ in range(2):
                seen_s.append((limit_now().still_s, limit_now().stop_s - monotonic()))
                time.now_s += 6.0

        inner.hook = note
        end.announced_s, end.stop_s = 1005.0, 1018.0
        retrying(inner, time).within(end).head("there")
        assert [still_s for still_s, _ in seen_s] == [10.0, 6.0]
        assert [left_s for _, left_s in seen_s] == pytest.approx([100.0, 12.0], abs=0.5)

    @pytest.mark.parametrize("verb", VERBS)
    def test_one_that_blocks_is_left_behind_and_not_made_again(self, inner: FaultStore, verb: str) -> None:
        answer = threading.Event()

        class Blocking(FaultStore):
            def _request(self, *args: Any, **options: Any) -> Any:
                return led(partial(super()._request, *args, **options))

        inner = Blocking(inner.bucket, hook=lambda _: answer.wait(60))  # type: ignore[arg-type, return-value]
        known: list[Deadline] = []

        def end() -> Deadline:
            if inner.op_count and not known:
                known.append(Deadline.after(0.4, "preemption (test)"))
            return known[0] if known else NEVER

        store = RetryingStore(inner, POLICY).within(end)
        with pytest.raises(StorageError, match=r"preemption \(test\).*left behind") as caught:
            VERBS[verb](store)
        assert (
            type(caught.value) is CommitUnknownError
            if verb == "create"
            else isinstance(caught.value, RetryExhaustedError)
        )
        assert inner.op_count == 1
        answer.set()

    def test_an_end_that_may_be_false_fails_nothing(self, inner: FaultStore, time: Time, end: End) -> None:
        end.announced_s, end.stop_s = 1000.0, 1020.0
        time.request_s = 9.0
        clear_s = 1023.0
        inner.hook = lambda op: time.request(op) if time.now_s < clear_s else None
        policy = RetryPolicy(max_attempts=6, deadline_s=100.0, request_timeout_s=8.0, backoff_base_s=0.001)
        store = retrying(inner, time, policy).hurried_by(end)
        store.put("new", [memoryview(b"abc")])
        assert inner.bucket.raw_get("new") == b"abc"
        assert len(time.limits_s) > policy.max_attempts
        assert time.limits_s[-1] == 16.0, "twice the patience, as after any request that had its time"

    def test_one_that_may_not_is_the_end(self, inner: FaultStore, time: Time, end: End) -> None:
        end.announced_s, end.stop_s = 1000.0, 1020.0
        time.request_s = 19.0
        with pytest.raises(RetryExhaustedError, match="the end by preemption"):
            retrying(inner, time, RetryPolicy(max_attempts=99)).within(end).put("new", [memoryview(b"abc")])
        assert time.now_s <= 1020.0


class TestThrottling:
    """What the store answers with "slower" costs time, and no attempt."""

    def test_throttled_requests_go_on_until_the_deadline_and_not_until_the_cap(
        self, inner: FaultStore, time: Time
    ) -> None:
        inner.inject(times=None, error=throttled)
        with pytest.raises(RetryExhaustedError, match=r"the end by RetryPolicy\.deadline_s"):
            retrying(inner, time).head("there")
        assert inner.op_count > POLICY.max_attempts
        assert 0.9 * POLICY.deadline_s <= time.now_s - 1000.0 <= POLICY.deadline_s

    def test_a_throttled_create_may_go_on_beyond_the_cap_too(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(verbs=["create"], times=2 * POLICY.max_attempts, error=throttled)
        store.create("manifest", b"ours")
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_other_faults_between_them_count(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(times=5, error=throttled)
        inner.inject(times=None)
        with pytest.raises(RetryExhaustedError, match="max_attempts"):
            store.head("there")
        assert inner.op_count == 5 + POLICY.max_attempts

    def test_the_pause_that_the_store_asks_for_is_heeded(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        inner.inject(error=lambda op: throttled(op, retry_after_s=7.0))
        store.head("there")
        assert 7.0 <= time.sleeps_s[0] <= 8.0

    def test_a_pause_that_leaves_no_time_is_shortened(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        inner.inject(error=lambda op: throttled(op, retry_after_s=3600.0))
        store.head("there")
        assert time.sleeps_s[0] <= POLICY.deadline_s / 2

    def test_a_request_that_had_too_little_time_gets_more(self, inner: FaultStore, time: Time) -> None:
        time.request_s = 35.0
        policy = RetryPolicy(deadline_s=300.0, request_timeout_s=10.0, backoff_base_s=0.001)
        retrying(inner, time, policy).list()
        assert time.limits_s == [10.0, 20.0, 40.0]

    def test_fewer_are_in_flight_after_a_refusal_and_more_again_after_successes(self) -> None:
        gate = Gate()
        tickets = [gate.enter(is_forced=False) for _ in range(8)]
        for ticket in tickets:
            assert ticket is not None
            gate.leave(ticket, is_slower=True, is_success=False)
        assert _width(gate) == 4
        for _ in range(3):
            ticket = gate.enter(is_forced=False)
            assert ticket is not None
            gate.leave(ticket, is_slower=False, is_success=True)
        assert _width(gate) == 7

    def test_who_has_no_time_to_wait_passes_a_closed_gate(self, inner: FaultStore, time: Time) -> None:
        store = retrying(inner, time)
        held = [store._means.gate.enter(is_forced=False) for _ in range(2)]
        store._means.gate.leave(held[0] or 0, is_slower=True, is_success=False)
        store.list()
        assert POLICY.deadline_s / 2 <= time.now_s - 1000.0 <= POLICY.deadline_s / 2 + 1


def _width(gate: Gate) -> int:
    """Tell how many may be in flight."""
    tickets = list(
        itertools.takewhile(lambda ticket: ticket is not None, (gate.enter(is_forced=False) for _ in "x" * 99))
    )
    for ticket in tickets:
        gate.leave(ticket or 0, is_slower=False, is_success=False)
    return len(tickets)


class TestDeadline:
    """One value goes down to each request, page, batch and read-back."""

    @pytest.fixture
    def paged(self, time: Time) -> FaultStore:
        inner = FaultStore(hook=time.request, page_size=2)
        for number in range(9):
            inner.bucket.raw_put(f"many/{number}", b"x")
        return inner

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_ends_by_a_deadline_from_above(self, inner: FaultStore, time: Time, verb: str) -> None:
        time.request_s = 1e9
        inner.inject(times=None)
        deadline = Deadline.after(20.0, "preemption (SIGTERM)", now_s=time.now_s)
        with pytest.raises(StorageError, match=r"preemption \(SIGTERM\)"):
            VERBS[verb](retrying(inner, time).within(deadline))
        assert time.limits_s[0] == 10.0
        assert inner.op_count >= 3
        assert time.now_s - 1000.0 <= 20.0

    def test_a_503_with_20_s_left_is_tried_again(self, inner: FaultStore, time: Time) -> None:
        inner.inject()
        store = retrying(inner, time, RetryPolicy()).within(Deadline.after(20.0, "the end", now_s=time.now_s))
        store.put("shard", [memoryview(b"x")])
        assert inner.bucket.raw_get("shard") == b"x"

    def test_a_create_whose_reply_was_lost_with_20_s_left_is_read_back(self, inner: FaultStore, time: Time) -> None:
        def lose(op: Op) -> StorageError:
            time.sleep(10.0)  # all that it has
            return TransientError("no reply", op=op.verb)

        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"], error=lose)
        retrying(inner, time, RetryPolicy()).within(Deadline.after(20.0, "the end", now_s=time.now_s)).create("m", b"x")
        assert time.now_s - 1000.0 == 10.0
        assert [op.verb for op in inner.trace] == ["create", "read"]

    def test_credentials_that_expired_with_20_s_left_are_refreshed(self, inner: FaultStore, time: Time) -> None:
        inner.inject(error=expired, times=None, until_refresh=True)
        retrying(inner, time, RetryPolicy()).within(Deadline.after(20.0, "the end", now_s=time.now_s)).list()
        assert inner.refresh_count == 1

    def test_the_earlier_of_two_deadlines_counts(self, store: RetryingStore, time: Time) -> None:
        near = Deadline.after(5.0, "near", now_s=time.now_s)
        far = Deadline.after(50.0, "far", now_s=time.now_s)
        assert store.within(near).within(far).deadline is near

    def test_what_comes_after_the_deadline_is_not_sent(self, inner: FaultStore, time: Time) -> None:
        late = retrying(inner, time).within(Deadline.after(-0.1, "preemption", now_s=time.now_s))
        with pytest.raises(RetryExhaustedError, match="was not tried: the time of preemption was over"):
            late.create("m", b"x")
        assert inner.op_count == 0

    def test_a_listing_goes_on_at_the_page_that_failed(self, paged: FaultStore, time: Time) -> None:
        paged.inject(skip=3, times=2)
        found = retrying(paged, time).list("many/").objects
        assert [info.key for info in found] == [f"many/{number}" for number in range(9)]
        assert paged.op_count == 5 + 2

    def test_all_pages_of_a_listing_end_by_one_deadline(self, paged: FaultStore, time: Time) -> None:
        time.request_s = 3.0
        with pytest.raises(RetryExhaustedError, match=r"RetryPolicy\.deadline_s"):
            retrying(paged, time, RetryPolicy(max_attempts=99, deadline_s=10.0)).list("many/")
        assert time.now_s - 1000.0 <= 10.0

    @pytest.mark.parametrize("circle", ["A", "AB", "ABC"])
    def test_a_listing_that_leads_back_to_a_page_before_is_an_error(
        self, inner: FaultStore, time: Time, circle: str
    ) -> None:
        marks = itertools.cycle(circle)
        inner.list = lambda *_, **__: Listing(mark=next(marks))  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(StorageError, match="circles"):
            retrying(inner, time).list()

    def test_a_page_that_comes_again_is_asked_for_once_more(self, paged: FaultStore, time: Time) -> None:
        pages: list[Listing] = []
        ask = paged.list

        def answered_twice(prefix: str = "", **more: str) -> Listing:
            if len(pages) == 2:  # the third question is answered as the second was
                pages.append(pages[1])
            else:
                pages.append(ask(prefix, **more))
            return pages[-1]

        paged.list = answered_twice  # type: ignore[method-assign, assignment]
        found = retrying(paged, time).list("many/").objects
        assert [info.key for info in found] == [f"many/{number}" for number in range(9)]
        assert len(pages) == 5 + 1

    def test_a_store_that_knows_no_pages_is_asked_once(self, inner: FaultStore, time: Time) -> None:
        inner.list = lambda prefix="", *, delimiter="": Listing()  # type: ignore[method-assign, assignment, misc]
        assert retrying(inner, time).list() == Listing()

    def test_a_delete_of_many_goes_in_batches_and_asks_again_for_what_is_left(
        self, inner: FaultStore, time: Time
    ) -> None:
        def some_left(op: Op) -> StorageError:
            error = TransientError("busy", op=op.verb)
            error.left_keys = op.keys[-3:]
            return error

        keys = [f"k{number:04}" for number in range(2500)]
        inner.inject(skip=1, error=some_left)
        retrying(inner, time).delete(keys)
        assert [len(op.keys) for op in inner.trace] == [1000, 1000, 3, 500]

    def test_all_batches_of_a_delete_end_by_one_deadline(self, inner: FaultStore, time: Time) -> None:
        time.request_s = 3.0
        with pytest.raises(RetryExhaustedError):
            retrying(inner, time, RetryPolicy(deadline_s=10.0)).delete([f"k{number}" for number in range(9000)])
        assert time.now_s - 1000.0 <= 10.0

    def test_what_a_store_refuses_to_delete_keeps_no_other(self, inner: FaultStore, time: Time) -> None:
        def locked(op: Op) -> StorageError:
            error = StorageError("locked", op=op.verb)
            error.left_keys = op.keys[:1]
            return error

        inner.inject(error=locked)
        with pytest.raises(StorageError, match="locked"):
            retrying(inner, time).delete([f"k{number}" for number in range(1500)])
        assert [len(op.keys) for op in inner.trace] == [1000, 500]

    def test_a_second_question_shares_the_deadline_of_the_first(self, inner: FaultStore, time: Time) -> None:
        time.request_s = 1e9
        inner.inject(times=None)
        store = retrying(inner, time)
        with one_deadline():
            for _ in range(2):
                with pytest.raises(RetryExhaustedError):
                    store.head("there")
        assert time.now_s - 1000.0 <= POLICY.deadline_s
        with pytest.raises(RetryExhaustedError):
            store.head("there")
        assert time.now_s - 1000.0 > 1.5 * POLICY.deadline_s


MOVING = ["put", "get", "read"]


class TestBytesThatMove:
    """A put or a read is late when its bytes stand still, and not when a number of seconds has passed."""

    POLICY = RetryPolicy(max_attempts=50, deadline_s=100.0, request_timeout_s=10.0, backoff_base_s=1.0)

    @pytest.fixture
    def store(self, inner: FaultStore, time: Time) -> RetryingStore:
        inner.bucket.raw_put("there", b"12345")
        return retrying(inner, time, self.POLICY)

    @staticmethod
    def cut_at(inner: FaultStore, time: Time, *cuts: int) -> None:
        """Let each request take a second a byte, and break after so many of them; those after the last one end well."""
        left = list(cuts)

        def slow(_: Op) -> None:
            stop = left.pop(0) if left else 200
            for moved_bytes in range(stop):
                time.now_s += 1.0
                note_move(moved_bytes + 1)
            if stop < 200:
                raise TransientError("it was cut")

        inner.hook = slow

    @pytest.mark.parametrize("verb", VERBS)
    def test_no_number_of_seconds_ends_a_request_whose_bytes_move(
        self, store: RetryingStore, inner: FaultStore, verb: str
    ) -> None:
        seen_s: list[float] = []
        inner.hook = lambda _: seen_s.append(limit_now().stop_s)
        VERBS[verb](store)
        assert math.isinf(seen_s[0]) == (verb in MOVING), "other verbs move no more than a few bytes"

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_deadline_from_above_ends_it_all_the_same(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        seen_s: list[float] = []
        inner.hook = lambda _: seen_s.append(limit_now().stop_s - monotonic())
        VERBS[verb](store.within(Deadline(stop_s=time.now_s + 30.0, reason="preemption")))
        assert seen_s[0] == pytest.approx(30.0, abs=0.5)

    @pytest.mark.parametrize("verb", MOVING)
    def test_one_that_got_on_is_tried_again_after_its_deadline(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        self.cut_at(inner, time, 120, 180)
        assert VERBS[verb](store) == RESULTS[verb]
        assert time.now_s - 1000.0 > 3 * self.POLICY.deadline_s

    @pytest.mark.parametrize("verb", MOVING)
    def test_one_that_gets_no_further_ends_by_its_deadline(
        self, store: RetryingStore, inner: FaultStore, time: Time, verb: str
    ) -> None:
        self.cut_at(inner, time, *[90] * 50)
        with pytest.raises(RetryExhaustedError, match=r"the end by RetryPolicy\.deadline_s"):
            VERBS[verb](store)
        assert inner.op_count == 3

    def test_what_follows_in_the_same_row_has_time_after_one_that_took_long(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        self.cut_at(inner, time)
        with one_deadline():
            store.get("there", start=0, stop=5)
            assert bytes(store.get("there", start=0, stop=5)) == b"12345"

    def test_bytes_that_moved_in_time_are_no_time_out(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        self.cut_at(inner, time, 120)
        store.put("new", [memoryview(b"abc")])
        assert _width(store._means.gate) == _width(Gate()), "no fewer in flight for it"


class TestRefresh:
    def test_threads_whose_requests_expired_together_refresh_once(self, time: Time) -> None:
        barrier = threading.Barrier(8)
        inner = FaultStore(hook=lambda op: barrier.wait(10) if op.number <= 8 else None)  # type: ignore[arg-type, return-value]
        inner.bucket.raw_put("there", b"12345")
        inner.inject(error=expired, times=None, until_refresh=True)
        store = retrying(inner, time)
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(lambda _: store.head("there").size_bytes, range(8)))
        assert sizes == [5] * 8
        assert inner.refresh_count == 1

    def test_a_refresh_that_fails_for_a_moment_is_tried_again(self, inner: FaultStore, time: Time) -> None:
        failures = [TransientError("the metadata service is busy")]
        refresh = inner.refresh

        def flaky() -> None:
            if failures:
                raise failures.pop()
            refresh()

        inner.refresh = flaky  # type: ignore[method-assign]
        inner.bucket.raw_put("there", b"12345")
        inner.inject(error=expired, times=None, until_refresh=True)
        assert retrying(inner, time).head("there").size_bytes == 5

    def test_an_expiry_after_another_fault_is_still_refreshed(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject()
        inner.inject(error=expired, until_refresh=True, times=None)
        assert store.head("there").size_bytes == 5
        assert inner.refresh_count == 1


class TestCreate:
    """FORMAT invariant 6."""

    def create(self, store: RetryingStore) -> None:
        store.create("manifest", b"ours")

    def verbs(self, inner: FaultStore) -> list[str]:
        return [op.verb for op in inner.trace]

    def test_a_lost_acknowledgement_is_a_success(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        self.create(store)
        assert self.verbs(inner) == ["create", "read"]

    def test_our_own_object_of_a_request_repeated_below_us_is_a_success(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.bucket.raw_put("manifest", b"ours")
        self.create(store)
        assert self.verbs(inner) == ["create", "read"]

    @pytest.mark.parametrize("other", [b"", b"their", b"ours and more", b"x" * 10, b"their larger one" * 10**5])
    def test_anothers_object_stands(self, store: RetryingStore, inner: FaultStore, other: bytes) -> None:
        inner.bucket.raw_put("manifest", other)
        with pytest.raises(ObjectExistsError, match="another writer's") as caught:
            self.create(store)
        assert inner.bucket.raw_get("manifest") == other
        assert caught.value.attempts == inner.op_count <= 3

    @pytest.mark.parametrize("kind", [FaultKind.LOST_ACK, None], ids=["lost reply", "taken"])
    def test_a_look_that_brought_other_bytes_is_made_once_more(
        self, store: RetryingStore, inner: FaultStore, kind: FaultKind | None
    ) -> None:
        if kind is None:
            inner.bucket.raw_put("manifest", b"ours")
        else:
            inner.inject(kind=kind, verbs=["create"])
        read, spoilt = inner.read, [b"0urs"]
        inner.read = lambda key, **limit: spoilt.pop() if spoilt else read(key, **limit)  # type: ignore[method-assign]
        self.create(store)
        assert spoilt == []
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_a_fault_that_left_nothing_is_tried_again(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(verbs=["create"], times=2)
        self.create(store)
        assert self.verbs(inner) == ["create", "read", "create", "read", "create"]
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_the_read_back_is_tried_again(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        inner.inject(verbs=["read"], times=3)
        self.create(store)
        assert self.verbs(inner) == ["create", "read", "read", "read", "read"]

    def test_the_read_back_follows_at_once_and_another_create_after_a_wait(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        inner.inject(verbs=["create"])
        self.create(store)
        assert len(time.sleeps_s) == 2
        assert time.sleeps_s[0] == 0.0 < time.sleeps_s[1]

    def test_absent_at_the_end_is_unknown_because_it_may_still_land(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(kind=FaultKind.LATE, verbs=["create"], times=None)
        with pytest.raises(CommitUnknownError, match="delete nothing") as caught:
            self.create(store)
        assert (caught.value.op, caught.value.key, caught.value.attempts) == ("create", "manifest", 6)
        assert inner.bucket.raw_list() == ["there"]
        inner.bucket.deliver_late()
        assert inner.bucket.raw_get("manifest") == b"ours"

    @pytest.mark.parametrize("error", [denied, refused, expired])
    def test_unreadable_after_a_doubtful_create_is_unknown(
        self, store: RetryingStore, inner: FaultStore, error: Callable[[Op], StorageError]
    ) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        inner.inject(verbs=["read", "head"], error=error, times=None)
        with pytest.raises(CommitUnknownError):
            self.create(store)
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_taken_and_unreadable_is_unknown(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.bucket.raw_put("manifest", b"ours?")
        inner.inject(verbs=["read"], error=denied, times=None)
        with pytest.raises(CommitUnknownError):
            self.create(store)

    def test_one_of_our_size_that_cannot_be_read_is_unknown(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.bucket.raw_put("manifest", b"size")
        inner.inject(verbs=["read"], error=refused, times=None)
        with pytest.raises(CommitUnknownError):
            self.create(store)

    @pytest.mark.parametrize("kind", [TransientError, StorageError])
    def test_what_was_refused_or_never_sent_is_not_unknown_though_nothing_can_be_read(
        self, store: RetryingStore, inner: FaultStore, kind: type[StorageError]
    ) -> None:
        def unsent(op: Op) -> StorageError:
            error = kind("no route to the host", op=op.verb)
            error.may_have_landed = False
            return error

        inner.inject(verbs=["create", "read", "head"], error=unsent, times=None)
        with pytest.raises(RetryExhaustedError if kind is TransientError else StorageError) as caught:
            self.create(store)
        assert not isinstance(caught.value, CommitUnknownError)

    @pytest.mark.parametrize("kind", [FaultKind.BEFORE, FaultKind.LOST_ACK])
    def test_who_may_not_see_that_a_key_is_free_finds_out_by_another_create(
        self, store: RetryingStore, inner: FaultStore, kind: FaultKind
    ) -> None:
        inner.inject(kind=kind, verbs=["create"])
        inner.inject(verbs=["read"], error=denied)
        self.create(store)
        assert self.verbs(inner)[:3] == ["create", "read", "create"]
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_options_that_go_wrong_after_a_doubtful_create_leave_it_unknown(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        inner.inject(verbs=["read"], error=lambda _: OptionsError("the token file is away"))  # type: ignore[arg-type, return-value]
        with pytest.raises(CommitUnknownError, match="token file"):
            self.create(store)

    def test_an_unknown_commit_tells_whether_the_store_called_the_key_taken(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(verbs=["read"], error=denied, times=None)
        with pytest.raises(CommitUnknownError) as taken:
            store.create("there", b"ours")
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        with pytest.raises(CommitUnknownError) as lost:
            self.create(store)
        assert (taken.value.is_taken, lost.value.is_taken) == (True, False)

    def test_each_create_is_looked_after_anew(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(verbs=["create"])
        inner.inject(verbs=["read"], error=refused)
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        self.create(store)
        assert self.verbs(inner) == ["create", "read", "head", "create", "read"]

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (denied, AccessDeniedError),
            (refused, StorageError),
            (lambda op: BucketNotFoundError("no such bucket", op=op.verb), BucketNotFoundError),
        ],
    )
    def test_a_definite_refusal_is_raised_as_it_is(
        self,
        store: RetryingStore,
        inner: FaultStore,
        error: Callable[[Op], StorageError],
        kind: type[StorageError],
    ) -> None:
        inner.inject(verbs=["create"], error=error, times=None)
        with pytest.raises(kind) as caught:
            self.create(store)
        assert type(caught.value) is kind
        assert self.verbs(inner) == ["create", "read"]

    def test_a_definite_refusal_does_not_wait_for_a_read_back_that_fails(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(verbs=["create"], error=denied, times=None)
        inner.inject(verbs=["read"], times=None)
        with pytest.raises(AccessDeniedError):
            self.create(store)
        assert self.verbs(inner) == ["create", "read"]

    def test_an_answer_that_nobody_can_place_is_unknown_without_a_read_back(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"], error=refused, times=None)
        inner.inject(verbs=["read"], times=None)
        with pytest.raises(CommitUnknownError):
            self.create(store)
        assert inner.bucket.raw_get("manifest") == b"ours"

    def test_a_definite_refusal_after_a_doubtful_request_is_unknown(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(kind=FaultKind.LATE, verbs=["create"])
        inner.inject(verbs=["create"], error=denied, times=None)
        with pytest.raises(CommitUnknownError) as caught:
            self.create(store)
        assert isinstance(caught.value.__cause__, AccessDeniedError)

    def test_a_conflict_of_two_requests_that_both_failed_is_tried_again(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(verbs=["create"], error=lambda op: ObjectExistsError("409 conflict", op=op.verb))
        self.create(store)
        assert self.verbs(inner) == ["create", "read", "create"]

    def test_taken_but_never_there_is_exhausted_and_not_unknown(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(verbs=["create"], error=lambda op: ObjectExistsError("409 conflict", op=op.verb), times=None)
        with pytest.raises(RetryExhaustedError, match="409 conflict"):
            self.create(store)

    def test_what_the_store_itself_calls_unknown_is_not_read_back(
        self, store: RetryingStore, inner: FaultStore
    ) -> None:
        inner.inject(
            kind=FaultKind.LOST_ACK, verbs=["create"], error=lambda op: CommitUnknownError("not durable", op=op.verb)
        )
        with pytest.raises(CommitUnknownError, match="not durable"):
            self.create(store)
        assert self.verbs(inner) == ["create"]

    def test_without_a_request_left_to_look_a_doubtful_create_is_unknown(self, inner: FaultStore, time: Time) -> None:
        inner.inject(verbs=["create"])
        with pytest.raises(CommitUnknownError):
            self.create(retrying(inner, time, RetryPolicy(max_attempts=1)))
        assert inner.op_count == 1

    def test_an_empty_object_can_be_created_and_recognised(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        store.create("empty", b"")
        assert inner.bucket.raw_get("empty") == b""

    @given(
        faults=st.lists(
            st.tuples(
                st.sampled_from([FaultKind.BEFORE, FaultKind.LOST_ACK, FaultKind.LATE]),
                st.sampled_from(["create", "read", "head"]),
                st.sampled_from(["transient", "denied", "refused", "expired"]),
                st.integers(0, 3),
            ),
            max_size=6,
        ),
        theirs=st.sampled_from([None, b"", b"their", b"t" * 10**5]),
        theirs_at=st.integers(1, 6),
    )
    def test_whatever_happens_the_answer_is_true(
        self, faults: list[tuple[FaultKind, str, str, int]], theirs: bytes | None, theirs_at: int
    ) -> None:
        time, bucket = Time(), Bucket()
        errors = {"denied": denied, "refused": refused, "expired": expired}

        def come_between(op: Op) -> None:
            if op.number == theirs_at and theirs is not None:
                other = FaultStore(bucket)
                if "manifest" not in bucket.objects:
                    other.create("manifest", theirs)

        inner = FaultStore(bucket, hook=come_between)
        for kind, verb, error, skip in faults:
            more = {"error": errors[error]} if error in errors else {}
            # An effect goes with a fault that leaves it open, and with no definite refusal.
            inner.inject(kind=FaultKind.BEFORE if more else kind, verbs=[verb], skip=skip, **more)
        outcome: BaseException | None = None
        try:
            retrying(inner, time).create("manifest", b"ours")
        except StorageError as exc:
            outcome = exc
        there = bucket.objects["manifest"].data if "manifest" in bucket.objects else None
        bucket.deliver_late()
        finally_there = bucket.objects["manifest"].data if "manifest" in bucket.objects else None
        if outcome is None:
            assert there == b"ours"
        elif isinstance(outcome, ObjectExistsError):
            assert there == theirs
        elif not isinstance(outcome, CommitUnknownError):
            assert finally_there != b"ours"
        assert inner.op_count <= POLICY.max_attempts
        assert time.now_s - 1000.0 <= POLICY.deadline_s


class TestArguments:
    @pytest.mark.parametrize("key", ["", "/a", "a/../b", "a//b"])
    @pytest.mark.parametrize("verb", ["put", "create", "get", "read", "head", "delete"])
    def test_a_bad_key_reaches_no_store(self, store: RetryingStore, inner: FaultStore, verb: str, key: str) -> None:
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: store.put(key, []),
            "create": lambda: store.create(key, b""),
            "get": lambda: store.get(key, start=0, stop=1),
            "read": lambda: store.read(key, limit_bytes=1),
            "head": lambda: store.head(key),
            "delete": lambda: store.delete(["there", key]),
        }
        with pytest.raises(OptionsError):
            calls[verb]()
        assert inner.op_count == 0

    def test_deleting_nothing_asks_nothing(self, store: RetryingStore, inner: FaultStore) -> None:
        store.delete([])
        assert inner.op_count == 0

    def test_bytes_are_read_into_the_callers_memory(self, store: RetryingStore) -> None:
        into = bytearray(3)
        view = store.get("there", start=1, stop=4, into=memoryview(into))
        assert view.obj is into
        assert into == b"234"

    @pytest.mark.parametrize("faults", [0, 1, 6])
    def test_the_callers_memory_is_let_go_at_once(self, store: RetryingStore, inner: FaultStore, faults: int) -> None:
        inner.inject(times=faults)
        memory = bytearray(100)
        gc.disable()
        try:
            with suppress(RetryExhaustedError):
                store.put("a", [memoryview(memory)])
            memory.extend(b"a buffer that somebody still looks at cannot grow")
        finally:
            gc.enable()

    def test_what_the_store_is_shows_through(self, store: RetryingStore, inner: FaultStore) -> None:
        assert (store.url, store.engine, store.is_create_atomic) == (inner.url, "memory", True)
        assert store.inner is inner
        assert repr(store) == "RetryingStore(memory, 'memory://bucket/root')"
        assert isinstance(store, Store)

    def test_leaving_the_with_block_closes_once(self, inner: FaultStore, time: Time) -> None:
        closes = itertools.count()
        inner.close = lambda: next(closes)  # type: ignore[method-assign, assignment, return-value]
        with retrying(inner, time) as store:
            store.list()
        store.close()
        assert next(closes) == 1

    def test_a_refresh_can_be_asked_for(self, store: RetryingStore, inner: FaultStore) -> None:
        store.refresh()
        assert inner.refresh_count == 1


class TestLog:
    def test_each_retry_is_one_warning_with_its_reason(
        self, store: RetryingStore, inner: FaultStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        inner.inject(times=2)
        with caplog.at_level(logging.DEBUG, "cloudckpt"):
            store.head("there")
        first, second = (record.getMessage() for record in caplog.records)
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        assert first.startswith("head of 'there': request 1 failed, 1 of at most 6 that count; the next in ")
        assert second.startswith("head of 'there': request 2 failed, 2 of at most 6 that count; the next in ")
        assert first.endswith("(TransientError: injected into head of 'there')")

    def test_success_and_a_taken_key_warn_of_nothing(
        self, store: RetryingStore, inner: FaultStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        inner.bucket.raw_put("manifest", b"theirs")
        with caplog.at_level(logging.INFO, "cloudckpt"):
            store.head("there")
            with pytest.raises(ObjectExistsError):
                store.create("manifest", b"ours")
            with pytest.raises(ObjectNotFoundError):
                store.head("absent")
        assert caplog.records == []

    def test_a_create_that_had_landed_says_so(
        self, store: RetryingStore, inner: FaultStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"])
        store.create("manifest", b"ours")
        assert "had landed" in caplog.records[-1].getMessage()


class TestStats:
    def test_requests_retries_bytes_and_seconds_are_counted_per_verb(
        self, store: RetryingStore, inner: FaultStore, time: Time
    ) -> None:
        time.request_s = 0.5
        inner.inject(verbs=["get"], times=2)
        store.put("a", [memoryview(b"123"), memoryview(b"45")])
        store.get("a", start=1, stop=4)
        store.read("a", limit_bytes=9)
        store.create("b", b"xy")
        assert dict(store.stats()) == {
            "put": OpStats(requests=1, bytes=5, seconds=0.5),
            "get": OpStats(requests=3, retries=2, bytes=3, seconds=1.5),
            "read": OpStats(requests=1, bytes=5, seconds=0.5),
            "create": OpStats(requests=1, bytes=2, seconds=0.5),
        }

    def test_read_backs_are_requests_of_the_create(self, store: RetryingStore, inner: FaultStore) -> None:
        inner.inject(verbs=["create"])
        store.create("b", b"xy")
        assert dict(store.stats()) == {"create": OpStats(requests=3, retries=2, bytes=2)}

    def test_snapshots_do_not_change_and_subtract(self, store: RetryingStore) -> None:
        store.head("there")
        before = store.stats()
        store.head("there")
        store.read("there", limit_bytes=9)
        after = store.stats()
        assert dict(before) == {"head": OpStats(requests=1)}
        assert dict(after - before) == {"head": OpStats(requests=1), "read": OpStats(requests=1, bytes=5)}
        spent = after - before
        assert (spent.requests, spent.retries) == (2, 0)
        assert spent.total == OpStats(requests=2, bytes=5)
        assert dict(after - after) == {}

    def test_a_verb_that_was_not_used_costs_nothing(self) -> None:
        assert StoreStats()["put"] == OpStats()
        assert StoreStats().total == OpStats()
        assert "put" not in StoreStats()

    def test_no_request_of_any_thread_is_lost(self, store: RetryingStore) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: [store.head("there") for _ in range(100)], range(8)))
        assert store.stats()["head"].requests == 800
