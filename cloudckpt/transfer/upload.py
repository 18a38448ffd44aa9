"""Put laid-out shards on a store in parallel, digesting their bytes on the way.

    ShardJob.open(staging) ──▶ [header, view, view, …] ──▶ store.put, one request ──╮
                                                     ╰───▶ block digests ───────────┴▶ the digests

Knows bytes, budgets and threads; knows nothing of tensors, steps or manifests. The views are tensor memory
wherever that is possible, and else lie in the staging memory; nothing is copied here. Each job runs on one pool
thread. The first fault stops what has not begun, waits for what has, and surfaces (FORMAT invariants 4 and 15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue

from cloudckpt.errors import CloudCkptError, StorageError
from cloudckpt.format import block_digests
from cloudckpt.options import MIB
from cloudckpt.store import LeftBehindError, Store, joined, note_move
from cloudckpt.threads import new_lock, started
from cloudckpt.transfer.memory import Scratch
from cloudckpt.transfer.pool import AbandonedError, Budget, Watch, Work, run_all
from cloudckpt.transfer.share import copying_threads

__all__ = ["ShardJob", "upload"]

# One makes 25 to 35 GB/s (10 without AVX), and each takes a core from the transport.
_CORES_A_DIGEST = 4
# Less takes no longer than to hand it over.
_AT_ONCE_BYTES = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to be put.

    Attributes:
        key: where, below the store's root.
        size_bytes: how large it is.
        cost_bytes: host memory that it may take while it is in flight, staging included.
        staging_bytes: host memory that `open` is to be given.
        open: returns its bytes as views, whose memory stays unchanged until `release`: read by the put and the digests.
        release: is called once they are not used any more, by whoever called `open`.
        unchanged: is given what `open` returned; returns the digests of its blocks if it need not be sent, because the
            store has those bytes.
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
    scratch, done = Scratch(), puts or Puts()
    digests = _Digests(block_bytes)

    def put(job: ShardJob) -> bytes:
        try:
            with scratch.lend(job.staging_bytes) as staging:
                views = job.open(staging)
                if (known := job.unchanged(views)) is not None:
                    raise _UnchangedError(known)
                # Once, here: over ten thousand views, digests and transport took Python's lock from each other.
                buffers = list(joined(views))
                made = digests.begin(buffers)
                try:
                    store.put(job.key, buffers)
                finally:
                    wait((made,))  # until then the memory is not given back, whatever became of the put
        finally:
            job.release()
        return made.result()

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
    watch = replace(watch or Watch(), url=store.url)
    try:
        return run_all(work, concurrency=concurrency, budget=budget, watch=watch, hires_ahead=True)
    finally:
        digests.close()


class _Digests:
    """Makes digests of shards while the same bytes are on their way.

    On a thread or two of its own: made before each put, by all threads at once, they kept the wire waiting, and one
    core makes them at many times the rate of a network.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._most = max(1, copying_threads() // _CORES_A_DIGEST)
        self._threads = 0
        self._is_closed = False
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = new_lock()

    def begin(self, buffers: Sequence[memoryview]) -> Future[bytes]:
        """Begin with the digests of a shard's blocks; its bytes must stay as they are until the future has ended."""
        made = Future[bytes]()
        call = partial(self._make, buffers, made)
        is_small = sum(buffer.nbytes for buffer in buffers) <= _AT_ONCE_BYTES
        with self._lock:
            if is_given := not is_small and not self._is_closed and self._has_threads():
                self._calls.put(call)
        if not is_given:
            call()
        return made

    def close(self) -> None:
        """Let the threads end, after what was begun."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._threads):
                self._calls.put(None)

    def _has_threads(self) -> bool:
        if self._threads < self._most:
            with suppress(CloudCkptError):  # the machine has none: those that are there do all, or the callers
                started(self._serve, name=f"cloudckpt-digests-{self._threads}")
                self._threads += 1
        return self._threads > 0

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # and with it the memory

    def _make(self, buffers: Sequence[memoryview], made: Future[bytes]) -> None:
        try:
            made.set_result(block_digests(buffers, block_bytes=self._block_bytes))
        except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: raised by who waits)
            made.set_exception(exc)
