"""Many ranks against a store that serves so many requests a second and no more: played, on a simulated clock.

virtual rank: thread ──▶ RetryingStore ──▶ Metered (a token bucket)
                 ╰── sleep, clock, rng ──▶ Stage: of all threads one runs, the one whose time comes first
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from cloudckpt.errors import RetryExhaustedError, ThrottledError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.retrying import RetryingStore
from tests.effort import examples
from tests.store.fault_store import FaultStore

LATENCY_S = 0.05
_LONG = [pytest.mark.skipif(not examples(4, short=0), reason="in the long profile"), pytest.mark.timeout(900)]


class Stage:
    """A clock that moves when all who play on it sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._sleepers: list[tuple[float, int, threading.Lock]] = []
        self._count = 0

    def sleep(self, seconds: float) -> None:
        turn = threading.Lock()
        turn.acquire()
        self._push(seconds, turn)
        self._wake_next()
        turn.acquire()

    def play(self, parts: Sequence[Callable[[], None]]) -> None:
        """Play all parts to their end, each on a thread of its own."""
        threads = []
        before_bytes = threading.stack_size(256 * 1024)
        try:
            for part in parts:
                turn = threading.Lock()
                turn.acquire()
                self._push(0.0, turn)
                threads.append(threading.Thread(target=self._perform, args=(part, turn)))
                threads[-1].start()
        finally:
            threading.stack_size(before_bytes)
        self._wake_next()
        for thread in threads:
            thread.join()

    def _perform(self, part: Callable[[], None], turn: threading.Lock) -> None:
        turn.acquire()
        try:
            part()
        finally:
            self._wake_next()

    def _push(self, seconds: float, turn: threading.Lock) -> None:
        self._count += 1
        heapq.heappush(self._sleepers, (self.now_s + max(0.0, seconds), self._count, turn))

    def _wake_next(self) -> None:
        if self._sleepers:
            self.now_s, _, turn = heapq.heappop(self._sleepers)
            turn.release()


class Metered(FaultStore):
    """A bucket that serves `rate` requests a second, after a burst of a second's worth, and refuses the others."""

    def __init__(self, stage: Stage, rate: float) -> None:
        super().__init__()
        self.served: Counter[int] = Counter()
        self.refused: Counter[int] = Counter()
        self._stage = stage
        self._rate = rate
        self._tokens = rate
        self._filled_s = 0.0

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        self._stage.sleep(LATENCY_S)
        now_s = self._stage.now_s
        self._tokens = min(self._rate, self._tokens + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
        if self._tokens < 1:
            self.refused[int(now_s)] += 1
            raise ThrottledError("SlowDown", op="put", key=key)
        self._tokens -= 1
        self.served[int(now_s)] += 1


def played(*, ranks: int, in_flight: int, puts: int, rate: float, policy: RetryPolicy) -> tuple[Metered, list[str]]:
    """Let each rank put so many objects, so many at once; return the store, and what was lost."""
    stage = Stage()
    store = Metered(stage, rate)
    lost: list[str] = []

    def part(mine: RetryingStore, names: Sequence[str]) -> Callable[[], None]:
        def perform() -> None:
            for name in names:
                try:
                    mine.put(name, [])
                except RetryExhaustedError:
                    lost.append(name)

        return perform

    parts = []
    for rank in range(ranks):
        rng = random.Random(rank)
        mine = RetryingStore(store, policy, sleep=stage.sleep, clock=lambda: stage.now_s, rng=rng)
        names = [f"r{rank:05}-{number:04}" for number in range(puts)]
        parts += [part(mine, names[place::in_flight]) for place in range(in_flight)]
    stage.play(parts)
    return store, lost


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "cloudckpt")


@pytest.mark.parametrize(
    ("ranks", "in_flight", "puts", "rate"),
    [
        pytest.param(64, 8, 16, 100.0, id="64 ranks, 100 requests/s"),
        pytest.param(512, 1, 15, 400.0, id="512 ranks, 400 requests/s"),
        # Two minutes, nearly all of them for the change of threads.
        pytest.param(4096, 1, 15, 3500.0, id="4,096 ranks, 3,500 requests/s", marks=_LONG),
    ],
)
def test_no_put_is_lost_to_throttling(ranks: int, in_flight: int, puts: int, rate: float) -> None:
    store, lost = played(ranks=ranks, in_flight=in_flight, puts=puts, rate=rate, policy=RetryPolicy())
    assert lost == []
    assert store.served.total() == ranks * puts
    seconds = max(store.served)
    assert seconds < 3 * ranks * puts / rate, "the store stands idle while ranks wait"
    assert store.refused.total() < 5 * ranks * puts, "ranks ask again and again"


def test_after_the_first_seconds_most_requests_are_served() -> None:
    store, _ = played(ranks=64, in_flight=8, puts=32, rate=100.0, policy=RetryPolicy())
    half = max(store.served) // 2
    served = sum(store.served[second] for second in range(5, half))
    refused = sum(store.refused[second] for second in range(5, half))
    assert served > refused


def test_with_little_time_left_each_is_tried_until_the_end() -> None:
    """A store that serves all in half of the time: nobody may give up before."""
    _, lost = played(ranks=64, in_flight=4, puts=16, rate=100.0, policy=RetryPolicy(deadline_s=20.0))
    assert lost == []
