"""Fetch spans of shards in parallel, verify every block, and hand the verified bytes on.

    Fetch(shard, span) ──▶ store.get, one ranged read ──▶ digests compared ──▶ consume(view)
    read_verified      ──▶ the same of one span, into the caller's memory

Knows bytes, digests, budgets and threads; knows nothing of tensors. `consume` runs on the pool thread that read
the span and sees its bytes only after they were verified; the view is valid only during the call. Keeps FORMAT
invariants 12 and 15.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumError,
    IntegrityError,
    MissingShardError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import Span, verify_blocks
from cloudckpt.store import Store, new_memory, one_deadline
from cloudckpt.transfer.pool import AbandonedError, Budget, Watch, Work, run_all

__all__ = ["Fetch", "ShardSource", "download", "read_verified"]

logger = logging.getLogger(__name__)

# Wrong bytes may come from the way (a proxy, a bad cable) as well as from the store: ask again before giving up.
_READS_PER_SPAN = 3


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
        span: which of its bytes.
        consume: takes them.
        buffer_bytes: host memory that `consume` begins to hold with this span, and gives back to the budget itself.
    """

    shard: ShardSource
    span: Span
    consume: Callable[[memoryview], None]
    buffer_bytes: int = 0

    @property
    def cost_bytes(self) -> int:
        """Host memory while the span is read: an engine may gather the body in pieces, and then join them."""
        return 2 * (self.span.stop - self.span.start)


class _Memory(Protocol):
    """Where a span may be read to."""

    def take(self, size_bytes: int) -> memoryview | None:
        """Return memory to be filled, or None: the engine is to answer with its own."""

    def note(self, offered: memoryview | None, returned: memoryview) -> None:
        """Note what was returned where that was offered."""


class _ReadBuffer(threading.local):
    """A read buffer per pool thread, reused from span to span: fresh pages cost more than the copy.

    An engine that answers with memory of its own once is not offered any again: it would only stay empty.
    """

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._is_wanted = True

    def take(self, size_bytes: int) -> memoryview | None:
        if not self._is_wanted:
            return None
        if self._buffer is None or len(self._buffer) < size_bytes:
            self._buffer = new_memory(size_bytes)
        return memoryview(self._buffer)[:size_bytes]

    def note(self, offered: memoryview | None, returned: memoryview) -> None:
        if offered is not None and returned.obj is not self._buffer:
            self._is_wanted = False
            self._buffer = None


@dataclass(frozen=True, slots=True)
class _Given:
    """Memory of the caller's, which takes a span from its first byte on."""

    memory: memoryview

    def take(self, size_bytes: int) -> memoryview:
        return self.memory[:size_bytes]

    def note(self, offered: memoryview | None, returned: memoryview) -> None:
        # An engine that cannot fill what it is offered answers with memory of its own.
        if offered is not None and returned.obj is not offered.obj:
            offered[:] = returned


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
    with one_deadline():
        _verified(store, shard, span, _Given(into))


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
        concurrency: reads at once.
        budget: what they may hold.
        watch: how they are watched over.
        on_damage: is told, on any of the threads, of a span that is missing or differs; the others are read all the
            same. None: that is raised.

    Raises:
        MissingShardError: an object that the index names is not there.
        ChecksumError: a block differs from its digest, or the object has another size than the index says.
        StorageError: the store could not be read.
        StalledError: a read stood still; it was left to itself.
        In each case no byte of the span at fault was handed on; other spans may have been.
    """
    buffer, is_left = _ReadBuffer(), threading.Event()

    def fetch(job: Fetch) -> None:
        try:
            try:
                with one_deadline():
                    data = _verified(store, job.shard, job.span, buffer)
            except IntegrityError as exc:
                if on_damage is None:
                    raise
                on_damage(job, exc)
                return
            if is_left.is_set():
                raise AbandonedError(f"nobody waits for {job.shard.key} any more, and its memory may be used otherwise")
            job.consume(data)
        finally:
            budget.free(job.cost_bytes)

    work = [
        Work(
            name=job.shard.key,
            size_bytes=job.span.stop - job.span.start,
            cost_bytes=job.cost_bytes + job.buffer_bytes,
            call=partial(fetch, job),
        )
        for job in fetches
    ]
    try:
        run_all(work, concurrency=concurrency, budget=budget, watch=replace(watch or Watch(), url=store.url))
    finally:
        is_left.set()


def _verified(store: Store, shard: ShardSource, span: Span, buffer: _Memory) -> memoryview:
    first_block = span.start // shard.block_bytes
    bad = data = None
    for _ in range(_READS_PER_SPAN):
        data = _get(store, shard, span, buffer)
        bad = verify_blocks(data, shard.digests, first_block=first_block, block_bytes=shard.block_bytes)
        if bad is None:
            return data
        logger.warning("block %d of %s differs from its digest; reading it again", bad, shard.key)
    error = ChecksumError(
        f"block {bad} of shard {shard.key} (bytes from {(bad or 0) * shard.block_bytes}) differs from its digest in "
        f"{_READS_PER_SPAN} reads; restore an older step",
        key=shard.key,
    )
    if data is not None:
        error.blocks = tuple(_bad_blocks(data, shard, first_block))
    raise error


def _bad_blocks(data: memoryview, shard: ShardSource, number: int) -> Iterator[int]:
    """Yield the blocks that differ in what was read from block `number` on."""
    first_block, bad = number, verify_blocks(data, shard.digests, first_block=number, block_bytes=shard.block_bytes)
    while bad is not None:
        yield bad
        number = bad + 1
        rest = data[(number - first_block) * shard.block_bytes :]
        bad = verify_blocks(rest, shard.digests, first_block=number, block_bytes=shard.block_bytes)


def _get(store: Store, shard: ShardSource, span: Span, buffer: _Memory) -> memoryview:
    into = buffer.take(span.stop - span.start)
    try:
        data = store.get(shard.key, start=span.start, stop=span.stop, into=into)
    except BucketNotFoundError:
        raise  # no older step is there, either
    except ObjectNotFoundError as exc:
        raise MissingShardError(
            f"shard {shard.key}, which the index names, is not on the store; restore an older step", key=shard.key
        ) from exc
    except StorageError as exc:
        raise _explain(store, shard, exc) from exc
    buffer.note(into, data)
    return data


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
