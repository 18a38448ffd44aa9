"""Write one rank's part of a save as shards, and commit what all ranks wrote.

    planned items ──▶ chunks ──layout──▶ shards ──upload──▶ what the rank wrote     (every rank)
                                            ╰──stage──▶ copies ──upload──▶ the same, while the tensors change
    what all ranks wrote ──plan == results?──▶ index ──put──▶ manifest ──create──▶ committed     (the coordinator)
                             ╰──── listed: is all of it stored? ────╯

Used by `CloudWriter`, whom DCP leads through a save, and by `lead`, which leads one itself. Knows DCP's planners; keeps
FORMAT invariants 2, 3 and 4.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    AccessDeniedError,
    CloudCkptError,
    CredentialsExpiredError,
    ObjectNotFoundError,
    SaveFailedError,
)
from cloudckpt.format import (
    FORMAT_VERSION,
    SHARING_VERSION,
    Index,
    IndexRef,
    JsonValue,
    Manifest,
    Metric,
    ShardLayout,
    digest_of,
    index_key,
    shard_key,
)
from cloudckpt.options import Options
from cloudckpt.root import Catalog, Checkpoint, Target
from cloudckpt.saving.environment import environment
from cloudckpt.saving.reuse import Sieve, layout_of
from cloudckpt.saving.snapshot import Staged
from cloudckpt.saving.source import PieceSource, Staging
from cloudckpt.saving.tally import Written
from cloudckpt.state import collector_at_rest
from cloudckpt.store import PROVEN_BYTES, RetryingStore, Store, StoreStats, Traffic
from cloudckpt.threads import each, new_lock
from cloudckpt.transfer import Budget, Puts, ShardJob, Watch, upload

__all__ = ["RankOutput", "Record", "commit_index", "discard", "made", "stats_of", "write_index"]

logger = logging.getLogger(__name__)

# What a save that failed leaves behind must not keep it long from being told: of its patience, and at most.
_DISCARD_SHARE = 0.1
_DISCARD_S = 10.0
# What a manifest cannot have counted: the listing that looks for a newer epoch, if there are any, and its own put.
_FENCE_REQUESTS = 1
_MANIFEST_REQUESTS = 1
_ONE_FOR_ALL = frozenset({"s3", "gs", "az", "abfs", "abfss"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a manifest says besides what was written.

    Attributes:
        metrics, metadata: the caller's, in their JSON form.
        world_size: ranks that saved.
        began_s: monotonic seconds at which the save began.
        spent_before: the store's counts at that time.
        seconds: phase → seconds.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    world_size: int = 1
    began_s: float = field(default_factory=time.monotonic)
    spent_before: StoreStats = field(default_factory=StoreStats)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class RankOutput:
    """The shards that one rank writes to `target`, in one attempt.

    Attributes:
        stage_s: thread seconds spent on copies into host memory.
        sieve: tells what need not be sent.
    """

    target: Target
    attempt: str
    rank: int
    options: Options
    watch: Watch | None = None
    puts: Puts | None = None
    sieve: Sieve | None = None
    stage_s: float = 0.0
    _lock: threading.Lock = field(default_factory=new_lock)

    def write(self, source: PieceSource, values: Mapping[str, JsonValue], staged: Staged | None = None) -> Written:
        """Upload the shards; return what became of them, with `values`, once all is durable.

        The bytes are those of the tensors themselves, or what was copied from them into `staged`.
        """
        with collector_at_rest():  # and not while bytes travel
            layouts = [] if self.sieve is None else [layout_of(source.chunks, shard) for shard in source.shards]
            jobs = [
                self._job(shard, source) if staged is None else self._staged_job(shard, staged)
                for shard in source.shards
            ]
            if (sieve := self.sieve) is not None:
                jobs = [
                    replace(job, unchanged=partial(sieve.unchanged, layout, shard))
                    for job, layout, shard in zip(jobs, layouts, source.shards, strict=True)
                ]
        digests = upload(
            self.target.catalog.store,
            jobs,
            block_bytes=self.options.block_bytes,
            concurrency=self.options.concurrency,
            budget=Budget(self.options.transfer_budget_bytes if staged is None else staged.transfer_bytes),
            watch=self.watch,
            puts=self.puts,
        )
        with collector_at_rest():
            written = Written.of(source.table, source.shards, digests, values, rank=self.rank, attempt=self.attempt)
            if sieve is None:
                return written
            return replace(written, origins=sieve.origins(layouts, source.shards, digests), content=sieve.kind)

    def _job(self, shard: ShardLayout, source: PieceSource) -> ShardJob:
        def open_shard(staging: memoryview) -> list[memoryview]:
            began_s = time.monotonic()
            room = Staging(staging)
            with nullcontext() if len(staging) else collector_at_rest():  # copies may take long
                views = source.views(shard.pieces, room)
            with self._lock:
                self.stage_s += time.monotonic() - began_s
            return [memoryview(shard.header), *views]

        staging_bytes = source.staging_bytes(shard.pieces)
        return ShardJob(
            key=self._key(shard),
            size_bytes=shard.size_bytes,
            # A transport may copy a body once.
            cost_bytes=shard.size_bytes + staging_bytes,
            staging_bytes=staging_bytes,
            open=open_shard,
        )

    def _staged_job(self, shard: ShardLayout, staged: Staged) -> ShardJob:
        return ShardJob(
            key=self._key(shard),
            size_bytes=shard.size_bytes,
            cost_bytes=0 if staged.is_sent_in_place else shard.size_bytes,
            staging_bytes=0,
            open=lambda _: [memoryview(shard.header), staged.stage.open(shard.number)],
            release=lambda: staged.stage.release(shard.number),
        )

    def _key(self, shard: ShardLayout) -> str:
        return self.target.prefix + shard_key(self.attempt, self.rank, shard.number)


def commit_index(target: Target, index: Index, record: Record) -> Checkpoint:
    """Put a checked index, then create the manifest; raises what `Target.commit` raises."""
    return target.commit(write_index(target, index, record))


def write_index(target: Target, index: Index, record: Record) -> Manifest:
    """Put a checked index; return the manifest that commits it."""
    began_s = time.monotonic()
    _refuse_shards_elsewhere(target, index, record.world_size)
    key = target.prefix + index_key(index.attempt)
    data = index.encode()
    store = target.catalog.store

    def put() -> None:
        store.put(key, [memoryview(data)])

    # At once, so that a look at what was stored before costs no time.
    look: Callable[[], None] = partial(_refuse_lost_shards, target, index)
    is_proven = record.world_size == 1 and index.total_bytes <= PROVEN_BYTES
    work = [put, look] if _scheme_of(store) in _ONE_FOR_ALL and not is_proven else [put]
    each(work, lambda one: one(), threads=len(work), name="cloudckpt-commit")
    seconds = {**record.seconds, "commit_s": time.monotonic() - began_s}
    return _manifest(target, index, data, record, seconds)


def made(target: Target, attempt: str, options: Options) -> Checkpoint | None:
    """Return what an attempt has committed, by a look with little patience; None if nothing, as far as that tells."""
    try:
        return _hurried(target, options, "a look at what a save has committed").made_by([attempt], prefix=target.prefix)
    except CloudCkptError as exc:
        logger.warning("whether %s%s is committed is not known: %s", target.catalog.store.url, target.prefix, exc)
        return None


def _hurried(target: Target, options: Options, what: str) -> Catalog:
    """Return the catalog of a place with little patience."""
    catalog = target.catalog
    if isinstance(catalog.store, RetryingStore):
        left_s = min(options.retry.deadline_s, catalog.store.deadline.left_s(time.monotonic()))
        patience_s = min(_DISCARD_S, _DISCARD_SHARE * left_s)
        deadline = Deadline.after(patience_s, what)
        catalog = catalog.with_store(catalog.store.within(deadline))
    return catalog


def discard(target: Target, attempts: Collection[str], options: Options) -> bool:
    """Remove what a save has written that failed and of which no commit can follow, soon or not at all.

    What stays is an orphan, and then this returns False; a disk that was full has its space back.
    """
    catalog = _hurried(target, options, "the removal of what a failed save has written")
    try:
        catalog.discard(attempts, prefix=target.prefix)
    except Exception as exc:  # noqa: BLE001 (how the save ended is decided, and is what the caller hears)
        with suppress(Exception):  # a program's own handler of the log
            logger.warning("what the failed save has written below %s stays for a sweep: %s", catalog.store.url, exc)
        return False
    return True


def _refuse_shards_elsewhere(target: Target, index: Index, world_size: int) -> None:
    """Refuse to commit what other ranks wrote where this one does not see it: to disks of their own.

    A bucket is one for all who name it; of a directory, or a file system in memory, one request a rank tells.
    """
    store = target.catalog.store
    if _scheme_of(store) in _ONE_FOR_ALL:
        return
    for rank in sorted(set(range(1, world_size)).intersection(index.ranks)):
        section = index.section(rank)
        if not section.is_own.any():
            continue
        key = target.prefix + shard_key(section.attempt, rank, int(section.is_own.argmax()))
        try:
            store.head(key)
        except ObjectNotFoundError as exc:
            raise SaveFailedError(
                f"the save failed and nothing was committed: rank {rank} has written {key}, and {store.url} as rank 0 "
                "sees it has no such object; save to a directory that all machines share, or to a bucket",
                failures={rank: exc},
            ) from exc


def _scheme_of(store: Store) -> str:
    return store.url.partition("://")[0]


def _refuse_lost_shards(target: Target, index: Index) -> None:
    """Refuse to commit what a bucket does not hold, whatever has answered the puts: one request for 1,000 objects.

    A page of a proxy's may look like an answer to a put, and a rank may have asked another server of the same name. Who
    has no right to list is believed.
    """
    store = target.catalog.store
    is_one = len(index.attempts) == 1
    try:
        listed = store.list(f"{target.prefix}{index.attempt}/" if is_one else target.prefix).objects
    except CredentialsExpiredError:
        raise
    except AccessDeniedError as exc:
        logger.debug("whether all shards are stored cannot be seen: %s", exc)
        return
    sizes = {info.key: info.size_bytes for info in listed}
    for rank in index.ranks:
        attempt, count, total_bytes = index.stored(rank)
        keys = [target.prefix + shard_key(attempt, rank, number) for number in range(count)]
        if sum(sizes.get(key, -1) for key in keys) == total_bytes:
            continue
        section = index.section(rank)
        for key, size_bytes, is_own in zip(keys, section.shard_sizes.tolist(), section.is_own, strict=True):
            if is_own and sizes.get(key) != size_bytes:
                _refuse_lost(store, key, size_bytes, rank)


def _refuse_lost(store: Store, key: str, size_bytes: int, rank: int) -> None:
    """Look at a shard that a listing lacks, or has in another size: a store may be late with its listings."""
    problem, cause = "it is not there", None
    try:
        found_bytes = store.head(key).size_bytes
        if found_bytes == size_bytes:
            return
        problem = f"an object of {found_bytes} bytes stands there, where {size_bytes} were sent"
    except ObjectNotFoundError as exc:
        cause = exc
    raise SaveFailedError(
        f"the save failed and nothing was committed: rank {rank} was told that {key} is stored, and as rank 0 sees "
        f"{store.url}, {problem}; see what else answers in the store's place (a proxy, an edge, another server of that "
        "name), and save again",
        failures={} if cause is None else {rank: cause},
    ) from cause


def _manifest(target: Target, index: Index, data: bytes, record: Record, seconds: Mapping[str, float]) -> Manifest:
    store = target.catalog.store
    elapsed_s = time.monotonic() - record.began_s
    references = index.references() if index.content else msgspec.UNSET
    held_bytes = sum(one.total_bytes for one in references or ())
    spent = stats_of(store) - record.spent_before
    to_come = Traffic(puts=_MANIFEST_REQUESTS, lists=_FENCE_REQUESTS if target.epoch else 0)
    classes = Traffic.of(spent) + to_come
    return Manifest(
        format_version=SHARING_VERSION if index.content else FORMAT_VERSION,
        references=references,
        state="committed",
        step=target.step,
        epoch=target.epoch,
        attempt=index.attempt,
        created_at="",
        world_size=record.world_size,
        total_bytes=index.total_bytes,
        tensor_count=len(index.tensors),
        shard_count=index.shard_count,
        index=IndexRef(size_bytes=len(data), sha256=digest_of(data)),
        metrics=dict(record.metrics),
        metadata=dict(record.metadata),
        environment=environment(store.url, store.engine),
        summary={
            "seconds": round(elapsed_s, 4),
            "bytes_per_s": round(index.total_bytes / max(elapsed_s, 1e-9), 1),
            **({"sent_bytes": float(index.total_bytes - held_bytes)} if index.content else {}),
            "requests": float(spent.requests + to_come.requests),
            "retries": float(spent.retries),
            **{name: float(count) for name, count in classes.by_class.items()},
            **{phase: round(value, 4) for phase, value in seconds.items()},
        },
    )


def stats_of(store: Store) -> StoreStats:
    """Return what a store has counted so far."""
    return store.stats() if isinstance(store, RetryingStore) else StoreStats()
