"""Put laid-out shards on a store in parallel, digesting their bytes on the way.

    ShardJob.open(staging) ──▶ [header, view, view, …] ──▶ block digests ──▶ store.put, one request ──▶ the digests

Knows bytes, budgets and threads; knows nothing of tensors, steps or manifests. The views are tensor memory
wherever that is possible, and else lie in the staging memory; nothing is copied here. Each job runs on one pool
thread. The first fault stops what has not begun, waits for what has, and surfaces (FORMAT invariants 4 and 15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial

from cloudckpt.errors import StorageError
from cloudckpt.format import block_digests
from cloudckpt.store import LeftBehindError, Store, note_move
from cloudckpt.threads import new_lock
from cloudckpt.transfer.memory import Scratch
from cloudckpt.transfer.pool import AbandonedError, Budget, Watch, Work, run_all

__all__ = ["ShardJob", "upload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to be put.

    Attributes:
        key: where, below the store's root.
        size_bytes: how large it is.
        cost_bytes: host memory that it may take while it is in flight, staging included.
        staging_bytes: host memory that `open` is to be given.
        open: returns its bytes as views, whose memory stays unchanged until the put has returned.
        release: is called once they are not used any more, by whoever called `open`.
        unchanged: returns the digests of its blocks if it need not be sent, because the store has those bytes.
    """

    key: str
    size_bytes: int
    cost_bytes: int
    staging_bytes: int
    open: Callable[[memoryview], Sequence[memoryview]]
    release: Callable[[], None] = lambda: None
    unchanged: Callable[[Sequence[memoryview]], bytes | None] = lambda _: None


class _UnchangedError(Exception):
    """A shard was not put, and need not be: no put that anybody may wait for."""

    def __init__(self, digests: bytes) -> None:
        super().__init__("the store has it")
        self.digests = digests


class Puts:
    """What the puts of one save became: one that was given up and goes on, or has ended since, is not made twice."""

    # Nor is one that was left behind where nobody hears of it: by the time that it reads its memory, that may hold
    # another save, and it may land after a second one.

    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], Future[bytes | None]] = {}
        self._lost: set[tuple[str, str]] = set()
        self._is_closed = False
        self._lock = new_lock()

    def once(self, place: tuple[str, str], put: Callable[[], bytes]) -> bytes:
        """Return what the put at a place returns: one under way or done, else this one; a failed one is made again.

        Raises:
            StorageError: one was left behind.
        """
        while True:
            with self._lock:
                if self._is_closed:
                    raise AbandonedError(f"nobody wants {place[1]!r} on {place[0]} any more")
                if place in self._lost:
                    raise StorageError(f"an earlier put of {place[1]!r} on {place[0]} was left behind", key=place[1])
                known = self._ends.get(place)
                mine = Future[bytes | None]()
                if known is None:
                    self._ends[place] = mine
            if known is None:
                return self._make(place, put, mine)
            wait((known,))
            if (digests := known.result()) is not None:
                return digests

    def close(self, timeout_s: float) -> bool:
        """Begin no more, and wait for those under way; tell whether none is any more, so that what stands, stands."""
        with self._lock:
            self._is_closed = True
            ends = list(self._ends.values())
            is_left = bool(self._lost)
        return not wait(ends, timeout=timeout_s).not_done and not is_left

    def _make(self, place: tuple[str, str], put: Callable[[], bytes], end: Future[bytes | None]) -> bytes:
        digests: bytes | None = None
        try:
            digests = put()
        except LeftBehindError:
            self._lost.add(place)
            raise
        finally:
            if digests is None:
                with self._lock:
                    del self._ends[place]
            # None for a fault: the error itself would keep the memory that its stack has.
            end.set_result(digests)
        return digests


def upload(
    store: Store,
    jobs: Sequence[ShardJob],
    *,
    block_bytes: int,
    concurrency: int,
    budget: Budget,
    watch: Watch | None = None,
    puts: Puts | None = None,
) -> list[bytes]:
    """Put every shard; return the digests of each one's blocks, 8 bytes per block, once all of them are durable.

    Raises:
        CloudCkptError: the first fault, when no put is under way any more. Objects already put stay: they carry an
            attempt id that nothing refers to.
        StalledError: a put stood still; it was left to itself.
    """
    scratch = Scratch()

    done = puts or Puts()

    def put(job: ShardJob) -> bytes:
        try:
            with scratch.lend(job.staging_bytes) as staging:
                buffers = job.open(staging)
                if (known := job.unchanged(buffers)) is not None:
                    raise _UnchangedError(known)
                digests = block_digests(buffers, block_bytes=block_bytes)
                store.put(job.key, buffers)
        finally:
            job.release()
        return digests

    def put_once(job: ShardJob) -> bytes:
        try:
            return done.once((store.url, job.key), partial(put, job))
        except _UnchangedError as exc:
            note_move(job.size_bytes)
            return exc.digests
        finally:
            budget.free(job.cost_bytes)

    work = [
        Work(name=job.key, size_bytes=job.size_bytes, cost_bytes=job.cost_bytes, call=partial(put_once, job))
        for job in jobs
    ]
    return run_all(work, concurrency=concurrency, budget=budget, watch=replace(watch or Watch(), url=store.url))
