"""Fetch spans of shards in parallel, verify every block, and hand the verified bytes on, block by block.

    Fetch(shard, span) ──▶ store.stream, one ranged read ──▶ a block's memory ──digest compared──▶ consume(at, view)
    read_verified      ──▶ the same of one span, into the caller's memory

A block is taken while it is in the processor's cache, so that its bytes cross the memory once. Knows bytes, digests,
budgets and threads; knows nothing of tensors. `consume` runs on the pool thread that reads the span and sees the bytes
of a block only after they were verified; the view is valid only during the call. Keeps FORMAT invariants 12 and 15.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumError,
    IntegrityError,
    MissingShardError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import Span, verify_blocks
from cloudckpt.options import MIB, Options
from cloudckpt.store import IntakeError, Store, new_memory, one_deadline
from cloudckpt.transfer.pool import AbandonedError, Budget, Watch, Work, run_all
from cloudckpt.transfer.share import copying_threads

__all__ = ["Fetch", "ShardSource", "download", "read_verified", "span_bytes_for"]

logger = logging.getLogger(__name__)

# Wrong bytes may come from the way (a proxy, a bad cable) as well as from the store: ask again before giving up.
_READS_PER_BLOCK = 3
# What an engine may hold of a reply before it is taken: chunks on their way, records of TLS.
_ON_THE_WAY_BYTES = 4 * MIB
# What each of the connections reads should be so many spans, so that all have work until the end.
_SPANS_PER_CONNECTION = 4
# Of a disk: one copies while another waits, however few cores there are.
_LEAST_THREADS = 2
# A shorter one would be mostly waiting for its first byte.
_LEAST_SPAN_BYTES = 8 * MIB


def span_bytes_for(total_bytes: int, *, block_bytes: int, options: Options) -> int:
    """Return how long the spans should be in which so many bytes are read: whole blocks, one or more.

    A request costs a round trip, and about a millisecond of both ends' processors: 8 MiB came at 0.8 of the rate of
    obstore's ranges, 32 MiB at 1.15 (2 GiB from a sink in memory).
    """
    even_bytes = max(_LEAST_SPAN_BYTES, total_bytes // (_SPANS_PER_CONNECTION * options.concurrency))
    return max(1, min(options.span_bytes, even_bytes) // block_bytes) * block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """One shard as the index describes it: where it lies, its size, and its block digests."""

    key: str
    size_bytes: int
    digests: bytes
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """One span of one shard, and who takes its bytes.

    Attributes:
        shard: the object.
        span: which of its bytes: whole blocks.
        consume: takes a block of them, which starts at byte `at` of the shard; each once, in order.
        buffer_bytes: host memory that `consume` begins to hold with this span, and gives back to the budget itself.
    """

    shard: ShardSource
    span: Span
    consume: Callable[[int, memoryview], None]
    buffer_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """How many bytes are read."""
        return self.span.stop - self.span.start

    @property
    def cost_bytes(self) -> int:
        """Host memory while the span is read: a block, and what is on its way."""
        return min(self.size_bytes, self.shard.block_bytes) + min(self.size_bytes, _ON_THE_WAY_BYTES)


class _BlockBuffer(threading.local):
    """Memory for a block per pool thread, reused from block to block: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def take(self, start: int, stop: int) -> memoryview:
        """Return memory for the bytes [start, stop) of a shard."""
        if self._memory is None or len(self._memory) < stop - start:
            self._memory = new_memory(stop - start)
        return memoryview(self._memory)[: stop - start]


class _Blocks:
    """The intake of one span: blocks, each handed on once it is whole and right.

    Attributes:
        bad: numbers of the blocks that stay wrong, and were passed over.
    """

    def __init__(
        self,
        shard: ShardSource,
        span: Span,
        memory: Callable[[int, int], memoryview],
        consume: Callable[[int, memoryview], None],
        *,
        passes_over: bool = False,
    ) -> None:
        """Take a span, which memory its blocks come into, who takes them, and whether wrong ones are passed over."""
        self.bad: list[int] = []
        self._shard = shard
        self._stop = span.stop
        self._memory_for = memory
        self._consume = consume
        self._passes_over = passes_over
        self._reads = 0
        # Of whoever wants the bytes: what he does with them is no move of this request's.
        self._context = copy_context()
        self._begin(span.start)

    def _begin(self, at: int) -> None:
        """Begin the block at byte `at`, for the first time."""
        self._at, self._filled = at, 0
        if not self.is_whole:
            self._memory = self._memory_for(at, min(at + self._shard.block_bytes, self._stop))

    @property
    def is_whole(self) -> bool:
        """Whether all blocks have been handed on, or passed over."""
        return self._at >= self._stop

    def room(self) -> memoryview:
        """Return what is not filled of the block's memory."""
        return self._memory[self._filled :]

    def took(self, count: int) -> None:
        """Go on, and hand the block on if it is whole."""
        self._filled += count
        if self._filled == self._memory.nbytes:
            try:
                self._finish()
            except Exception as exc:
                raise IntakeError(str(exc)) from exc

    def restart(self) -> int:
        """Return where the block under way begins."""
        self._filled = 0
        return self._at

    def _finish(self) -> None:
        shard, number = self._shard, self._at // self._shard.block_bytes
        self._reads += 1
        is_right = verify_blocks(self._memory, shard.digests, first_block=number, block_bytes=shard.block_bytes) is None
        if is_right:
            self._context.run(self._consume, self._at, self._memory)
        elif self._reads < _READS_PER_BLOCK:
            raise _SpoiltError(f"block {number} of {shard.key} differs from its digest; reading it again")
        else:
            self.bad.append(number)
            if not self._passes_over:
                raise self.damage()
        self._reads = 0
        self._begin(self._at + self._memory.nbytes)

    def damage(self) -> ChecksumError:
        """Return what is to be said of the blocks that stay wrong."""
        error = ChecksumError(
            f"block {self.bad[0]} of shard {self._shard.key} (bytes from {self.bad[0] * self._shard.block_bytes}) "
            f"differs from its digest in {_READS_PER_BLOCK} reads; restore an older step",
            key=self._shard.key,
        )
        error.blocks = tuple(self.bad)
        return error


class _SpoiltError(Exception):
    """A block has come otherwise than it was written, and may be asked for once more."""


def read_verified(store: Store, shard: ShardSource, span: Span, into: memoryview) -> None:
    """Read one span into memory of the caller's; what stands there after an error means nothing.

    Args:
        store: where the shard is.
        shard: the object.
        span: whole blocks of it.
        into: writable, as many bytes as the span has.

    Raises:
        MissingShardError, ChecksumError, StorageError: as `download`.
    """

    def part(start: int, stop: int) -> memoryview:
        return into[start - span.start : stop - span.start]

    _read(store, shard, _Blocks(shard, span, part, lambda _, __: None), span)


def download(
    store: Store,
    fetches: Sequence[Fetch],
    *,
    concurrency: int,
    budget: Budget,
    watch: Watch | None = None,
    on_damage: Callable[[Fetch, IntegrityError], None] | None = None,
) -> None:
    """Fetch, verify and hand on every span.

    Args:
        store: where the shards are.
        fetches: what is read.
        concurrency: reads at once; of a disk, which reads ahead by itself, no more than cores that take the bytes.
        budget: what they may hold.
        watch: how they are watched over.
        on_damage: is told, on any of the threads, of a span that is missing, or of its blocks that differ; all others
            are read all the same. None: that is raised.

    Raises:
        MissingShardError: an object that the index names is not there.
        ChecksumError: a block differs from its digest, or the object has another size than the index says.
        StorageError: the store could not be read.
        StalledError: a read stood still; it was left to itself.
        In each case no byte of a block at fault was handed on; other blocks may have been.
    """
    buffer, is_left, watch = _BlockBuffer(), threading.Event(), replace(watch or Watch(), url=store.url)

    def fetch(job: Fetch) -> None:
        told = [job.size_bytes]

        def tell(size_bytes: int) -> None:
            told[0] -= size_bytes
            if watch.gauge is not None:
                watch.gauge.move(size_bytes)

        def consume(at: int, data: memoryview) -> None:
            if is_left.is_set():
                raise AbandonedError(f"nobody waits for {job.shard.key} any more, and its memory may be used otherwise")
            job.consume(at, data)
            tell(data.nbytes)

        blocks = _Blocks(job.shard, job.span, buffer.take, consume, passes_over=on_damage is not None)
        try:
            _read(store, job.shard, blocks, job.span)
            if blocks.bad:
                raise blocks.damage()
        except IntegrityError as exc:
            if on_damage is None:
                raise
            on_damage(job, exc)
            tell(told[0])
        finally:
            budget.free(job.cost_bytes)

    work = [
        Work(
            name=job.shard.key,
            size_bytes=job.size_bytes,
            cost_bytes=job.cost_bytes + job.buffer_bytes,
            call=partial(fetch, job),
            tells=True,
        )
        for job in fetches
    ]
    if store.engine == "local":
        # More threads than cores take each other's blocks out of the cache: 5.5 GB/s by 8 on 2 cores, 7.9 by 2.
        concurrency = min(concurrency, max(_LEAST_THREADS, copying_threads()))
    try:
        run_all(work, concurrency=concurrency, budget=budget, watch=watch)
    finally:
        is_left.set()


@one_deadline()
def _read(store: Store, shard: ShardSource, blocks: _Blocks, span: Span) -> None:
    """Read a span into its intake, blocks that were spoilt on their way once more."""
    start = span.start
    while not blocks.is_whole:
        try:
            store.stream(shard.key, start=start, stop=span.stop, into=blocks)
        except IntakeError as exc:
            if not isinstance(exc.__cause__, _SpoiltError):
                raise _cause_of(exc) from None
            logger.warning("%s", exc)
            start = blocks.restart()
        except BucketNotFoundError:
            raise  # no older step is there, either
        except ObjectNotFoundError as exc:
            raise MissingShardError(
                f"shard {shard.key}, which the index names, is not on the store; restore an older step", key=shard.key
            ) from exc
        except StorageError as exc:
            raise _explain(store, shard, exc) from exc


def _cause_of(error: IntakeError) -> BaseException:
    cause = error.__cause__
    return error if cause is None else cause


def _explain(store: Store, shard: ShardSource, error: StorageError) -> Exception:
    """Tell a shard of the wrong size from a store that cannot be read."""
    if error.is_other_object:
        return ChecksumError(
            f"shard {shard.key} has not the {shard.size_bytes} bytes that were committed; restore an older step "
            f"({error})",
            key=shard.key,
        )
    try:
        size_bytes = store.head(shard.key).size_bytes
    except StorageError:
        return error
    if size_bytes == shard.size_bytes:
        return error
    return ChecksumError(
        f"shard {shard.key} has {size_bytes} bytes on the store, and {shard.size_bytes} were committed; "
        "restore an older step",
        key=shard.key,
    )
