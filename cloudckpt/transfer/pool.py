"""Call transfers on a few threads, within a budget of memory, and watch over them.

    Work ──admitted by the budget──▶ a thread ──▶ results in order, or the first fault

Knows bytes and threads, and who tells that they move; knows nothing of tensors. The threads are daemons, because a
request that never returns may hold neither the save nor the end of the process (FORMAT invariants 13 and 15).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from cloudckpt.errors import CloudCkptError, StalledError
from cloudckpt.store import told_of_moves, watched
from cloudckpt.threads import started

__all__ = ["AbandonedError", "Budget", "Gauge", "Watch", "Work", "run_all"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# How often the waiting thread looks whether something stands still.
_LOOK_S = 0.2


class AbandonedError(CloudCkptError):
    """Nobody wants what is transferred any more."""


class Budget:
    """Bytes of memory that jobs may have in use at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._running = 0
        self._changed = threading.Condition()

    def admit(self, size_bytes: int, *, timeout_s: float) -> bool:
        """Let one job begin: wait until its bytes fit, or no other job runs (so that the largest one can run, alone).

        Called by one thread, job after job; that keeps their order, and no large job is passed for ever.

        Returns:
            Whether it may begin; False only after `timeout_s`.
        """
        with self._changed:
            may_begin = self._changed.wait_for(
                lambda: self._used_bytes + size_bytes <= self._limit_bytes or not self._running, timeout=timeout_s
            )
            if may_begin:
                self._used_bytes += size_bytes
                self._running += 1
            return may_begin

    def end(self) -> None:
        """Note that an admitted job has ended; its bytes are given back by `free`."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def free(self, size_bytes: int) -> None:
        """Give bytes of some admitted job back, now or after it has ended."""
        with self._changed:
            self._used_bytes -= size_bytes
            self._changed.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[_Result]):
    """Something to be called on a thread.

    Attributes:
        name: the object that it moves, for people.
        size_bytes: how much of it.
        cost_bytes: what it takes from the budget; it gives that back itself.
        call: does it.
        tells: whether it tells the gauge itself of the bytes that have moved, as they do.
    """

    name: str
    size_bytes: int
    cost_bytes: int
    call: Callable[[], _Result]
    tells: bool = False


class Gauge(Protocol):
    """Whoever wants to know how many bytes have moved; any thread may tell it."""

    def begin(self, total_bytes: int) -> None:
        """Begin at 0 of so many bytes."""

    def move(self, size_bytes: int) -> None:
        """Note that so many bytes more have moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How transfers are watched over.

    Attributes:
        deadline_s: seconds that one transfer may stand still, none of its bytes moving; that it may take in all, its
            attempts included, where nobody sees them.
        tick: is called when one has ended or got on; from any thread.
        check: is called now and then by the waiting thread, and raises to end the wait.
        gauge: is told how many bytes have moved.
        url: the root that they go to or come from.
        limit: whose word `deadline_s` is.
    """

    deadline_s: float = 600.0
    tick: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None
    gauge: Gauge | None = None
    url: str = ""
    limit: str = "the patience with transfers"


def run_all(
    work: Sequence[Work[_Result]], *, concurrency: int, budget: Budget, watch: Watch, hires_ahead: bool = False
) -> list[_Result]:
    """Call everything in `work`, each once its cost was admitted; return the results in order.

    Threads are hired as they are needed, or all before the first call: where calls are long and keep the processors
    busy, each thread that is to come waits for these, and so does all work behind it.

    On the first fault nothing more begins; what is under way is waited for, and the fault is raised. What stands still
    for `watch.deadline_s` is left to itself: `StalledError` names it, unless something else has failed before. So is
    all that is under way when the calling thread is interrupted.
    """
    if watch.gauge is not None:
        watch.gauge.begin(sum(item.size_bytes for item in work))
    pool = _Pool(max(1, min(concurrency, len(work))), budget, watch)
    futures: list[Future[_Result]] = []
    try:
        if hires_ahead:
            pool.hire_all()
        for item in work:
            while not budget.admit(item.cost_bytes, timeout_s=_LOOK_S):
                pool.look()
            if pool.is_stopping:
                break  # a budget serves one call, so nobody misses these bytes
            futures.append(pool.submit(item))
        while wait(futures, timeout=_LOOK_S, return_when=FIRST_EXCEPTION).not_done and not pool.is_stopping:
            pool.look()
    except BaseException:  # it stands still, nobody wants it, or a signal's handler has raised
        pool.abandon()
        raise
    finally:
        pool.close()
    if pool.faults:
        raise pool.faults[0]
    return [future.result() for future in futures]


_NETWORK = "look at the network and the store, then try again"
_DISK = "see whether the disk, or the server that it is mounted from, still works, then try again"


class _Running:
    """An item that is being called, and when it last got on."""

    def __init__(self, name: str, tick: Callable[[], None]) -> None:
        self.name = name
        self.moved_s = time.monotonic()
        self._tick = tick

    def move(self, _: int) -> None:
        self.moved_s = time.monotonic()
        self._tick()


class _Pool:
    """The threads, and what they are at."""

    def __init__(self, size: int, budget: Budget, watch: Watch) -> None:
        self.faults: list[BaseException] = []
        self.is_stopping = False
        self._budget = budget
        self._watch = watch
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._size = size
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            self._idle.release()
        # For the next one, also of those that an interrupt kept from being listed.
        self._calls.put(None)

    def _hire(self) -> None:
        """Start a thread if none is idle: each one that works keeps read buffers and an arena of the allocator."""
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
            self._hire_one()

    def hire_all(self) -> None:
        """Start all threads that there may be."""
        while len(self._threads) < self._size:
            self._hire_one()

    def _hire_one(self) -> None:
        """Start a thread; where the machine has no more, those that are there do all."""
        try:
            self._threads.append(started(self._serve, name=f"cloudckpt-transfer-{len(self._threads)}"))
        except CloudCkptError as exc:
            if not self._threads:
                raise
            self._size = len(self._threads)
            logger.warning("%d transfers at once, and no more: %s", self._size, exc)

    def submit(self, item: Work[_Result]) -> Future[_Result]:
        """Have a thread call an item; after a fault it is dropped."""
        future: Future[_Result] = Future()
        self._hire()
        self._calls.put(lambda: self._call(item, future))
        return future

    def _call(self, item: Work[_Result], future: Future[_Result]) -> None:
        if self.is_stopping:
            future.cancel()
            self._budget.end()
            return
        running = self._running[id(future)] = _Running(item.name, self._watch.tick)
        try:
            with told_of_moves(running.move), watched():
                result = item.call()
        except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: raised by the thread that waits)
            self.faults.append(exc)
            self.is_stopping = True
            future.set_exception(exc)
        else:
            future.set_result(result)
            if self._watch.gauge is not None and not item.tells:
                self._watch.gauge.move(item.size_bytes)
        del self._running[id(future)]
        self._watch.tick()
        self._budget.end()

    def look(self) -> None:
        """Raise if there is a reason to stop waiting.

        Raises:
            StalledError: a transfer stands still.
        """
        self._watch.check()
        now_s = time.monotonic()
        for running in list(self._running.values()):
            still_s = now_s - running.moved_s
            if still_s > self._watch.deadline_s:
                is_disk = self._watch.url.startswith("file:")
                raise StalledError(
                    f"the transfer of {running.name} ({self._watch.url}) stands still for {still_s:.1f} s, longer than "
                    f"by {self._watch.limit}, and was given up; {_DISK if is_disk else _NETWORK}",
                    key=running.name,
                    still_s=still_s,
                )

    def abandon(self) -> None:
        """Wait for nothing more; a thread ends when its request does."""
        self.is_stopping = True
        self._stop_threads()

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        if self._threads:
            self.is_stopping = True
            threads = self._stop_threads()
            for thread in threads:
                while thread.is_alive():
                    try:
                        self.look()
                    except StalledError:
                        if not self.faults:
                            raise
                        return  # what failed first may well be why this one stands still, and says more
                    thread.join(timeout=_LOOK_S)

    def _stop_threads(self) -> list[threading.Thread]:
        threads, self._threads = self._threads, []
        self._calls.put(None)
        return threads
