"""Put laid-out shards on a store in parallel, digesting their bytes on the way.

    ShardJob.open(staging) ──▶ [header, view, view, …] ──▶ block digests ──▶ store.put, one request ──▶ Uploaded

Knows bytes, budgets and threads; knows nothing of tensors, steps or manifests. The views are tensor memory
wherever that is possible, and else lie in the staging memory; nothing is copied here. Each job runs on one pool
thread. The first fault stops what has not begun, waits for what has, and surfaces (FORMAT invariants 4 and 15).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cloudckpt.scratch import Scratch
from cloudckpt.shard import block_digests
from cloudckpt.store.base import Store

__all__ = ["Budget", "ShardJob", "Uploaded", "run_all", "upload"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to be put.

    Attributes:
        key: where, below the store's root.
        size_bytes: of the whole object.
        cost_bytes: host memory that it may take while it is in flight, staging included.
        staging_bytes: host memory that `open` is to be given.
        open: returns its bytes as views, whose memory stays unchanged until the put has returned.
    """

    key: str
    size_bytes: int
    cost_bytes: int
    staging_bytes: int
    open: Callable[[memoryview], Sequence[memoryview]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """One durable shard: its size, and 8 digest bytes per block."""

    key: str
    size_bytes: int
    digests: bytes


class Budget:
    """Bytes of memory that jobs may have in use at once."""

    def __init__(self, limit_bytes: int) -> None:
        """Allow `limit_bytes`."""
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._running = 0
        self._changed = threading.Condition()

    def admit(self, size_bytes: int) -> None:
        """Let one job begin: wait until its bytes fit, or no other job runs (so that the largest one can run, alone).

        Called by one thread, job after job; that keeps their order, and no large job is passed for ever.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._used_bytes + size_bytes <= self._limit_bytes or not self._running)
            self._used_bytes += size_bytes
            self._running += 1

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


def upload(
    store: Store, jobs: Sequence[ShardJob], *, block_bytes: int, concurrency: int, budget: Budget
) -> list[Uploaded]:
    """Put every shard; return their records in the order of `jobs`.

    Raises:
        CloudCkptError: the first fault, when no put is under way any more. Objects already put stay: they carry an
            attempt id that nothing refers to.
    """
    scratch = Scratch()

    def put(job: ShardJob) -> Uploaded:
        try:
            with scratch.lend(job.staging_bytes) as staging:
                buffers = job.open(staging)
                digests = block_digests(buffers, block_bytes=block_bytes)
                store.put(job.key, buffers)
        finally:
            budget.free(job.cost_bytes)
        return Uploaded(key=job.key, size_bytes=job.size_bytes, digests=digests)

    costs_bytes = [job.cost_bytes for job in jobs]
    work = [partial(put, job) for job in jobs]
    return run_all(work, costs_bytes, concurrency=concurrency, budget=budget, name="cloudckpt-upload")


def run_all(
    work: Sequence[Callable[[], _Result]],
    costs_bytes: Sequence[int],
    *,
    concurrency: int,
    budget: Budget,
    name: str,
) -> list[_Result]:
    """Call everything in `work` on a pool, each once its cost was admitted; return the results in order.

    Whoever is called frees its own bytes. On the first fault, or an interrupt of the calling thread, nothing more
    begins; what is under way is waited for, and the fault is raised.
    """
    futures: list[Future[_Result]] = []
    faults: list[BaseException] = []
    is_stopping = threading.Event()

    def note_end(future: Future[_Result]) -> None:
        fault = None if future.cancelled() else future.exception()
        if fault is not None and not isinstance(fault, _StoppedError):
            faults.append(fault)
            is_stopping.set()
        budget.end()

    with ThreadPoolExecutor(max(1, min(concurrency, len(work))), thread_name_prefix=name) as pool:
        try:
            for call, cost_bytes in zip(work, costs_bytes, strict=True):
                budget.admit(cost_bytes)
                if is_stopping.is_set():
                    break  # a budget serves one call, so nobody misses these bytes
                futures.append(pool.submit(_begin, call, is_stopping))
                futures[-1].add_done_callback(note_end)
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            is_stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if faults:
        raise faults[0]
    return [future.result() for future in futures]


def _begin(call: Callable[[], _Result], is_stopping: threading.Event) -> _Result:
    if is_stopping.is_set():
        raise _StoppedError
    return call()


class _StoppedError(Exception):
    """A job that had not begun when another failed."""
