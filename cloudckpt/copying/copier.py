"""Bring one checkpoint from one store to another: the same bytes, under the same attempt, the manifest last.

    index ──▶ shards that the target lacks ──a few at a time──▶ ranged reads, digests compared ──▶ one put each
                                                      ──▶ index ──▶ listed: all are there ──▶ manifest (create)
                                                                                 of others' ──▶ are these there still?

Until the manifest stands the target holds nothing but objects that no checkpoint leads to, which a sweep removes. What
stands there when a copy begins again is not sent again if it has its size: a put is whole or not there, and nobody else
writes below an attempt's 64 random bits, so that size and name say which bytes these are. Who doubts the store has them
read back. What other checkpoints of its root hold stays a reference where they hold it in the target, too, or come to
as one of several that are copied; else the copy holds it itself. Holds a few whole shards (FORMAT invariants 1, 2, 4,
12, 15 and 17).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from cloudckpt.copying.places import Onward, source_of, spans_of
from cloudckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    CredentialsExpiredError,
    IntegrityError,
    ManifestError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import Index, Reference, ShardEntry, Span, index_key
from cloudckpt.loading import decode_index, read_index_bytes
from cloudckpt.options import Options
from cloudckpt.root import Catalog, Checkpoint, ShardPlaces
from cloudckpt.store import note_move
from cloudckpt.threads import each, new_lock
from cloudckpt.transfer import (
    Budget,
    Fetch,
    Gauge,
    Slab,
    Slabs,
    Watch,
    Work,
    download,
    read_verified,
    run_all,
)

__all__ = ["Copied", "Copier"]

logger = logging.getLogger(__name__)

# Of one shard at once.
_READERS = 4
_ON_THE_WAY_BYTES = 4 << 20
# How often who waits for its turn says that it is not what stands still.
_LOOK_S = 0.2
# With as many under way a target is busy while the next shard is read.
_BUSY_COUNT = 2
# As long as the first touch of a shard's memory takes at worst: a fast target gives some back before.
_PATIENCE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One checkpoint that stands in the target.

    Attributes:
        source: its URL where it was copied from.
        url: its URL in the target.
        step: training step, -1 for one outside of a root.
        epoch: incarnation of the job that saved it, 0 outside of a root.
        is_new: whether this copy has committed it; it stood there already otherwise.
        total_bytes: bytes of its shards.
        sent_count: objects that were sent, the manifest not counted.
        sent_bytes: bytes of them.
        kept_count: shards that stood there when the copy began, and were not sent.
        is_pinned: whether this copy has pinned it there, as it is in the source.
    """

    source: str
    url: str
    step: int
    epoch: int
    is_new: bool
    total_bytes: int
    sent_count: int = 0
    sent_bytes: int = 0
    kept_count: int = 0
    is_pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Copier:
    """Copies checkpoints from one place to another.

    Attributes:
        source: where they are.
        target: where they go.
        options: sizes, parallelism, patience.
        checks: whether what stands in the target is read back, also of a checkpoint that is committed there.
        gauge: is told of bytes that have moved, or need not.
        slabs: memory for shards in flight, kept from one checkpoint to the next.
        is_one_of_several: whether what several share is brought to where they share it, though nothing is committed
            there.
    """

    source: Catalog
    target: Catalog
    options: Options
    checks: bool
    gauge: Gauge
    slabs: Slabs
    is_one_of_several: bool = False

    def copy(self, checkpoint: Checkpoint, prefix: str, *, is_there: bool) -> Copied:
        """Copy one checkpoint; return once it is committed.

        Args:
            checkpoint: of the source.
            prefix: where it is to stand in the target.
            is_there: whether it is committed there: it is looked at only to be checked and mended.

        Raises:
            CheckpointNotFoundError: it was removed from the source meanwhile.
            IntegrityError: it is not whole in the source.
            CheckpointExistsError: another one was committed there meanwhile.
            StorageError: a store could not be read or written. In each case the target has no more checkpoints than
                before, and what was sent stays for another try.
        """
        if is_there and not self.checks:
            self.gauge.move(checkpoint.total_bytes)
            return _told(checkpoint, self._url(prefix), is_new=False)
        try:
            return self._copy(checkpoint, prefix, is_there=is_there)
        except IntegrityError as exc:
            if self.source.stands(checkpoint):
                exc.add_note(f"{checkpoint.url} is not copied; `cloudckpt verify` tells all that is wrong with it")
                raise
            raise CheckpointNotFoundError(
                f"{checkpoint.url} was removed while it was copied (a retention rule of a job at work?), and is not in "
                "the target; copy another step, or pin it first"
            ) from exc

    def _copy(self, checkpoint: Checkpoint, prefix: str, *, is_there: bool) -> Copied:
        manifest = self.source.manifest_bytes(checkpoint)
        data = read_index_bytes(self.source, checkpoint)
        index = decode_index(checkpoint, data)
        shards, key = list(index.shards()), prefix + index_key(index.attempt)
        goal, sizes = self._looked_at(checkpoint, prefix, index, is_there=is_there)
        standing = [entry for entry in shards if sizes.get(goal.key(entry)) == entry.size_bytes]
        if self.checks:
            standing = self._sound(standing, goal, index)
        # On a disk a put also makes durable what a killed copy has put beside it.
        is_sure = is_there or self.target.store.engine != "local"
        standing = standing if is_sure else goal.without_doubtful(standing)
        kept = {(entry.rank, entry.number) for entry in standing}
        lacking = [entry for entry in shards if (entry.rank, entry.number) not in kept]
        self.gauge.move(sum(entry.size_bytes for entry in standing))
        self._send(checkpoint, lacking, goal, index)
        sent_bytes, sent_count = sum(entry.size_bytes for entry in lacking), len(lacking)
        if not (is_sure and self._is_index(key, sizes.get(key), data)):
            self.target.store.put(key, [memoryview(data)])
            sent_bytes, sent_count = sent_bytes + len(data), sent_count + 1
        if sent_count:
            wanted = {goal.key(entry): entry.size_bytes for entry in shards} | {key: len(data)}
            self._refuse_lost(wanted, self._sizes(goal, index))
        if not is_there:
            made = self.target.commit_copy(manifest, prefix=prefix)
            if not goal.is_whole:
                self._refuse_removed(made)
        logger.info(
            "copied %s to %s: %d objects with %d bytes, %d stood there",
            *(checkpoint.url, self._url(prefix), sent_count, sent_bytes, len(standing)),
        )
        return _told(
            checkpoint,
            self._url(prefix),
            is_new=not is_there,
            sent=(sent_count, sent_bytes),
            kept_count=len(standing),
        )

    def _url(self, prefix: str) -> str:
        return f"{self.target.store.url.removesuffix('/')}/{prefix}".rstrip("/") if prefix else self.target.store.url

    def _looked_at(
        self, checkpoint: Checkpoint, prefix: str, index: Index, *, is_there: bool
    ) -> tuple[_Goal, Mapping[str, int]]:
        """Return where the shards are to stand, and the sizes of what does there by now."""
        held = checkpoint.manifest.held_elsewhere
        goal = _Goal(prefix, is_whole=True)
        sizes = self._sizes(goal, index)
        # What stands below it is of a whole copy, that a reader takes for one: a copy goes on as it began.
        is_begun = sizes is None or any(key.startswith(f"{prefix}{one.attempt}/") for one in held for key in sizes)
        if not (held and prefix) or is_begun or not (is_there or all(map(self._may_hold, held))):
            return goal, sizes or {}
        bare = frozenset(one.prefix for one in held if not self.target.is_taken(one.prefix))
        goal = _Goal(prefix, is_whole=False, bare=bare)
        return goal, self._sizes(goal, index) or {}

    def _may_hold(self, one: Reference) -> bool:
        """Tell whether another checkpoint may hold shards in the target: it stands there, or nothing does."""
        try:
            return self.target.open(one.prefix).attempt == one.attempt
        except ManifestError:
            return False
        except CheckpointNotFoundError:
            return self.is_one_of_several and not self.target.is_taken(one.prefix)

    def _refuse_removed(self, made: Checkpoint) -> None:
        """Take a commit back of which what others hold was being removed when it came; from now on it is spared."""
        if lack := self.target.lack_of_others(made):
            self.target.uncommit(made.prefix)
            raise StorageError(
                f"{made.url} is not copied, because {lack}, in the target; copy again, and it holds all of it itself",
                op="create",
                key=made.prefix,
            )

    def _sizes(self, goal: _Goal, index: Index) -> Mapping[str, int] | None:
        """Return the sizes of what stands in the target where shards are to; None where nobody may see."""
        prefix, is_lone = goal.prefix, len(index.attempts) == 1 and not index.holders
        places = [f"{prefix}{index.attempt}/" if is_lone else prefix]
        if not goal.is_whole:
            places += [f"{one.prefix}{one.attempt}/" for one in index.holders]
        try:
            found = [info for below in places for info in self.target.store.list(below).objects]
            return {info.key: info.size_bytes for info in found}
        except CredentialsExpiredError:
            raise
        except AccessDeniedError as exc:
            logger.warning(
                "each object is sent, or asked for: what stands at %s is not told: %s", self._url(prefix), exc
            )
            return None

    def _is_index(self, key: str, size_bytes: int | None, data: bytes) -> bool:
        """Tell whether what stands there, of that size, is the index."""
        if size_bytes != len(data):
            return False
        return not self.checks or self.target.store.read(key, limit_bytes=len(data)) == data

    def _sound(self, shards: Sequence[ShardEntry], goal: _Goal, index: Index) -> list[ShardEntry]:
        """Return which of these shards in the target have the bytes that they should have, by reading them."""
        bad: set[str] = set()
        store, total_bytes = self.target.store, sum(entry.size_bytes for entry in shards)
        fetches = [
            Fetch(shard=shard, span=span, consume=lambda _, __: None)
            for entry in shards
            for shard in [source_of(goal.key(entry), entry, index.block_bytes)]
            for span in spans_of(entry, index.block_bytes, self.options, total_bytes=total_bytes)
        ]
        download(
            store,
            fetches,
            concurrency=self.options.concurrency,
            budget=Budget(self.options.transfer_budget_bytes),
            watch=self._watch(store.engine),
            on_damage=lambda job, _: bad.add(job.shard.key),
        )
        for key in sorted(bad):
            logger.warning("%s on %s is not what was sent, and is sent again", key, store.url)
        return [entry for entry in shards if goal.key(entry) not in bad]

    def _send(self, checkpoint: Checkpoint, shards: Sequence[ShardEntry], goal: _Goal, index: Index) -> None:
        budget_bytes = self.options.transfer_budget_bytes
        # Kept from shard to shard: fresh memory costs more than what is copied into it.
        budget, slabs = Budget(budget_bytes), self.slabs
        places, target = ShardPlaces.of(self.source.store, checkpoint), self.target.store
        source = places.store
        # A disk gives one shard after the other: the first one is on its way while the next ones are read.
        turn = new_lock() if source.engine == "local" else None
        room = _Room(slabs, budget_bytes)

        def read(entry: ShardEntry) -> Slab:
            shard = source_of(places.key(entry), entry, index.block_bytes)
            slab = room.take(entry.size_bytes)

            def read_span(span: Span) -> None:
                read_verified(source, shard, span, slab.memory[span.start : span.stop])

            spans = spans_of(entry, index.block_bytes, self.options, total_bytes=entry.size_bytes)
            try:
                each(spans, read_span, threads=_READERS, name="cloudckpt-copy")
            except BaseException:
                slabs.give(slab)
                raise
            return slab

        def send(entry: ShardEntry, cost_bytes: int) -> None:
            try:
                with nullcontext() if turn is None else _in(turn):
                    slab = read(entry)
                target.put(goal.key(entry), [slab.memory[: entry.size_bytes]])
                # Not after a fault: a request that was left behind may still read it.
                slabs.give(slab)
            finally:
                budget.free(cost_bytes)

        work = []
        for entry in shards:
            # What engines hold of what is on its way.
            own_bytes = 0 if source.engine == "local" else _READERS * min(_ON_THE_WAY_BYTES, entry.size_bytes)
            cost_bytes = entry.size_bytes + own_bytes
            call = partial(send, entry, cost_bytes)
            work.append(Work(name=goal.key(entry), size_bytes=entry.size_bytes, cost_bytes=cost_bytes, call=call))
        engine = source.engine if target.engine == "local" else target.engine
        watch = self._watch(engine, url=target.url)
        run_all(work, concurrency=self.options.concurrency, budget=budget, watch=watch)

    def _watch(self, engine: str, url: str = "") -> Watch:
        still_s, limit = self.options.transfer_limit(engine)
        return Watch(deadline_s=still_s, limit=limit, url=url, gauge=Onward(self.gauge if url else None))

    def _refuse_lost(self, wanted: Mapping[str, int], listed: Mapping[str, int] | None) -> None:
        """Refuse to commit what the target does not hold, whatever has answered the puts, or was swept meanwhile."""
        store = self.target.store
        doubtful = [key for key, size_bytes in wanted.items() if listed is None or listed.get(key) != size_bytes]

        def look(key: str) -> None:
            try:
                is_there = store.head(key).size_bytes == wanted[key]
            except ObjectNotFoundError:
                is_there = False
            if not is_there:
                raise StorageError(
                    f"{key} on {store.url} has not the {wanted[key]} bytes that were sent, and nothing was committed; "
                    "see what else writes there, and copy again",
                    op="head",
                    key=key,
                )

        each(doubtful, look, threads=_READERS, name="cloudckpt-copy")


@dataclass(frozen=True, slots=True)
class _Goal:
    """Where the shards of a copy are to stand.

    Attributes:
        prefix: of the copy in the target.
        is_whole: whether it holds itself what others hold in the source.
        bare: prefixes of those others under which nothing is committed.
    """

    prefix: str
    is_whole: bool
    bare: frozenset[str] = frozenset()

    def key(self, entry: ShardEntry) -> str:
        """Return the key of a shard there."""
        return entry.key(self.prefix, is_copied=self.is_whole)

    def without_doubtful(self, standing: Sequence[ShardEntry]) -> list[ShardEntry]:
        """Leave out, to be put again, the smallest that stands under each prefix without a commit."""
        firsts: dict[str, ShardEntry] = {}
        for entry in sorted(standing, key=lambda entry: entry.size_bytes):
            if entry.holder is not None and entry.holder.prefix in self.bare:
                firsts.setdefault(entry.holder.prefix, entry)
        return [entry for entry in standing if entry not in firsts.values()]


class _Room:
    """Memory for shards; more of it than keeps the target busy only where that has not given some back in time."""

    def __init__(self, slabs: Slabs, budget_bytes: int) -> None:
        self._slabs = slabs
        self._budget_bytes = budget_bytes
        self._patience_s = _PATIENCE_S

    def take(self, size_bytes: int) -> Slab:
        """Return memory for a shard."""
        if self._patience_s and not self._slabs.wait_for_fewer(_BUSY_COUNT, timeout_s=self._patience_s):
            self._patience_s = 0.0  # it is slow
        return self._slabs.take(size_bytes, limit_bytes=self._budget_bytes, most_bytes=self._budget_bytes)


@contextmanager
def _in(turn: threading.Lock) -> Iterator[None]:
    """Have the turn in the block; who has it is watched, and not who waits for it."""
    while not turn.acquire(timeout=_LOOK_S):
        note_move(0)
    try:
        yield
    finally:
        turn.release()


def _told(
    checkpoint: Checkpoint, url: str, *, is_new: bool, sent: tuple[int, int] = (0, 0), kept_count: int | None = None
) -> Copied:
    return Copied(
        source=checkpoint.url,
        url=url,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        is_new=is_new,
        total_bytes=checkpoint.total_bytes,
        sent_count=sent[0],
        sent_bytes=sent[1],
        kept_count=checkpoint.manifest.shard_count if kept_count is None else kept_count,
    )
