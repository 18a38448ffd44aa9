"""Say whether committed checkpoints are whole: by two reads and a listing, or by every byte.

    shallow   manifest (seal) ──▶ index (size, SHA-256, consistent) ──▶ one listing: every shard, in its size
    deep      … ──▶ every block of every shard, in parallel, against its digest

What is wrong is told with the object, its blocks and the tensors that lie there, and nothing is raised for it; what
keeps a store from being asked at all is raised. Holds a few spans at a time (FORMAT invariant 15). Writes nothing.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cloudckpt.copying.places import (
    LOOK_BYTES,
    Onward,
    Place,
    is_of_one_object,
    opened,
    runs_of,
    source_of,
    spans_of,
)
from cloudckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    ChecksumError,
    CredentialsExpiredError,
    FormatVersionError,
    IntegrityError,
    ManifestError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import MANIFEST_NAME, Index, ShardEntry, index_key, parse_checkpoint_prefix
from cloudckpt.loading import decode_index, read_index_bytes
from cloudckpt.options import READERS, Options
from cloudckpt.report import Progress, Show
from cloudckpt.root import Catalog, Checkpoint, Roots, ShardPlaces
from cloudckpt.threads import each
from cloudckpt.transfer import Budget, Fetch, Gauge, Watch, download

__all__ = ["Damage", "Verified", "verify", "verify_all"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is wrong with one object.

    Attributes:
        key: the object, below the root, or the URL, that the checkpoint is in.
        problem: what is wrong with it.
        blocks: the first block that is wrong, and the one after the last of this run; None where it is the object.
        byte_range: [start, stop) of them in the object; None where it is the object.
        tensors: names of the tensors that have bytes there; none where nobody can tell.
    """

    key: str
    problem: str
    blocks: tuple[int, int] | None = None
    byte_range: tuple[int, int] | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a look at one checkpoint has found.

    Attributes:
        url: of the checkpoint.
        step: training step, -1 for one outside of a root.
        epoch: incarnation of the job that saved it, 0 outside of a root.
        state: `whole`; `damaged`: an object is missing, or is not what was committed; `unreadable`: nobody here can
            tell, because a newer cloudckpt wrote it or the store refuses an object of it.
        damages: what is wrong, object after object.
        reason: why it is unreadable; "" otherwise.
        is_deep: whether every byte was compared.
        object_count: objects that make it up, as far as its index tells.
        total_bytes: bytes of its shards.
        whole_instead: URL of the newest older checkpoint of the same root that is whole, as far as the same look
            tells; "" where there is none, or this one is whole.
    """

    url: str
    step: int
    epoch: int
    state: Literal["whole", "damaged", "unreadable"]
    damages: tuple[Damage, ...] = ()
    reason: str = ""
    is_deep: bool = False
    object_count: int = 0
    total_bytes: int = 0
    whole_instead: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it can be restored, as far as this look tells."""
        return self.state == "whole"


def verify(
    url: str | os.PathLike[str],
    *,
    deep: bool = False,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
    every_s: float = math.inf,
) -> Verified:
    """Look whether a checkpoint is whole.

    Args:
        url: a checkpoint, or a root, whose newest one is meant.
        deep: read every byte; else the manifest, the index, and one listing for presence and size of every shard.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        options: sizes, parallelism, patience. Without `memory_budget_bytes` less than 256 MiB are held.
        progress: `bar` or `auto` show a bar on a terminal.
        every_s: where no bar is shown, a line every so many seconds.

    Returns:
        What was found. Where it is not whole, older checkpoints of the same root are looked at in the same way until
        one is.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL, or it was removed meanwhile.
        StorageError: the store cannot be reached.
    """
    chosen = Options.of(options).lean(LOOK_BYTES)
    with (
        opened(url, storage_options=storage_options, engine=engine, options=chosen) as place,
        Progress(progress).bar("verifying", rank=0, every_s=every_s) as bar,
    ):
        newest = place.newest()
        bar.begin(newest.total_bytes if deep and isinstance(newest, Checkpoint) else 0)
        look = _Look(place.catalog, chosen, deep, bar)
        found = look.at(newest)
        return found if found.is_whole else look.instead(found)


def verify_all(
    url: str | os.PathLike[str],
    *,
    deep: bool = False,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
    every_s: float = math.inf,
    on_verified: Callable[[Verified], None] = lambda _: None,
) -> tuple[Verified, ...]:
    """Look whether all checkpoints of a root are whole, oldest first. One that is removed meanwhile is left out.

    Args:
        url: a root; of a checkpoint, it alone is looked at.
        deep: read every byte, as for `verify`.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes.
        options: sizes, parallelism, patience.
        progress: what is shown.
        every_s: where no bar is shown, a line every so many seconds.
        on_verified: is told of each as soon as it is known.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        ManifestError: nothing is, and something was.
        StorageError: the store cannot be reached.
    """
    chosen = Options.of(options).lean(LOOK_BYTES)
    with (
        opened(url, storage_options=storage_options, engine=engine, options=chosen) as place,
        Progress(progress).bar("verifying", rank=0, every_s=every_s) as bar,
    ):
        candidates = _all_of(place)
        bar.begin(sum(one.total_bytes for one in candidates if deep and isinstance(one, Checkpoint)))
        look = _Look(place.catalog, chosen, deep, bar)
        done: list[Verified] = []
        newest_whole = ""
        for candidate in candidates:
            try:
                found = look.at(candidate)
            except CheckpointNotFoundError as exc:
                logger.warning("%s", exc)
                continue
            if found.is_whole:
                newest_whole = found.url
            else:
                found = replace(found, whole_instead=newest_whole)
            done.append(found)
            on_verified(found)
        return tuple(done)


def _all_of(place: Place) -> list[Checkpoint | _Unread]:
    """Return what stands at a place, oldest first.

    Raises:
        CheckpointNotFoundError: nothing does.
    """
    if not place.prefix and place.catalog.places():
        there = place.all()
        found: list[Checkpoint | _Unread] = [*there.checkpoints]
        found += [_Unread(one.url, one.step, one.epoch, one.error) for one in there.unreadable]
        if found:
            return sorted(found, key=lambda one: (one.epoch, one.step))
        if (lost := place.catalog.lost()) is not None:
            raise lost
    newest = place.newest()
    return [newest] if isinstance(newest, Checkpoint) else [_Unread.of(place.catalog, newest)]


@dataclass(frozen=True, slots=True)
class _Unread:
    """A checkpoint whose manifest cannot be read, and why."""

    url: str
    step: int
    epoch: int
    error: ManifestError | StorageError

    @classmethod
    def of(cls, catalog: Catalog, error: ManifestError) -> _Unread:
        prefix, slash, _ = error.key.rpartition("/")
        step, epoch = parse_checkpoint_prefix(prefix + slash) or (-1, 0)
        return cls(f"{catalog.store.url.removesuffix('/')}/{prefix}".rstrip("/"), step, epoch, error)


class _Look:
    """Looks at checkpoints of one root."""

    def __init__(self, catalog: Catalog, options: Options, deep: bool, gauge: Gauge) -> None:  # noqa: FBT001
        self._catalog = catalog
        self._options = options
        self._deep = deep
        self._gauge = gauge

    def at(self, candidate: Checkpoint | _Unread | ManifestError) -> Verified:
        """Return what a checkpoint is; raises `CheckpointNotFoundError` if it was removed meanwhile."""
        if isinstance(candidate, ManifestError):
            candidate = _Unread.of(self._catalog, candidate)
        if isinstance(candidate, _Unread):
            return self._unread(candidate)
        checkpoint = candidate
        index, shards, damages = None, list[ShardEntry](), list[Damage]()
        reason = ""
        try:
            index, damages = self._index_of(checkpoint)
            if index is not None:
                shards, places = list(index.shards()), ShardPlaces.of(self._catalog.store, checkpoint)
                lacks = self._lacks(places, index, shards)
                bad = {damage.key for damage in lacks}
                whole = [entry for entry in shards if places.key(entry) not in bad]
                damages += [*lacks, *(self._read(places, index, whole) if self._deep else ())]
        except FormatVersionError as exc:
            reason = str(exc)
        except StorageError as exc:
            if not is_of_one_object(exc):
                raise
            reason = str(exc)
        if (damages or reason) and not self._catalog.stands(checkpoint):
            raise CheckpointNotFoundError(
                f"{checkpoint.url} was removed while it was looked at (a retention rule?); look again"
            )
        return Verified(
            url=checkpoint.url,
            step=checkpoint.step,
            epoch=checkpoint.epoch,
            state="damaged" if damages else "unreadable" if reason else "whole",
            damages=tuple(sorted(damages, key=lambda damage: (damage.key, damage.blocks or (0, 0)))),
            reason=reason,
            is_deep=self._deep,
            object_count=len(shards) + 2 if shards else checkpoint.manifest.shard_count + 2,
            total_bytes=checkpoint.total_bytes,
        )

    def instead(self, found: Verified) -> Verified:
        """Return what was found, with the newest older checkpoint that is whole."""
        if not found.epoch:
            return found
        for other in Roots([self._catalog]).newest_first() if self._catalog.places() else ():
            if not isinstance(other, Checkpoint) or other.order >= (found.epoch, found.step):
                continue
            try:
                if self.at(other).is_whole:
                    return replace(found, whole_instead=other.url)
            except CheckpointNotFoundError as exc:
                logger.info("%s", exc)
        return found

    def _unread(self, candidate: _Unread) -> Verified:
        is_damaged = isinstance(candidate.error, ManifestError) and not isinstance(candidate.error, FormatVersionError)
        key = getattr(candidate.error, "key", "") or MANIFEST_NAME
        return Verified(
            url=candidate.url,
            step=candidate.step,
            epoch=candidate.epoch,
            state="damaged" if is_damaged else "unreadable",
            damages=(Damage(key=key, problem=str(candidate.error)),) if is_damaged else (),
            reason="" if is_damaged else str(candidate.error),
            is_deep=self._deep,
        )

    def _index_of(self, checkpoint: Checkpoint) -> tuple[Index | None, list[Damage]]:
        """Return the index if it is what was committed, and what is wrong with it or what it says of the manifest."""
        try:
            index = decode_index(checkpoint, read_index_bytes(self._catalog, checkpoint))
            index.check()
        except FormatVersionError:
            raise
        except IntegrityError as exc:
            key = exc.key or checkpoint.prefix + index_key(checkpoint.attempt)
            return None, [Damage(key=key, problem=str(exc))]
        manifest = checkpoint.manifest
        told = (manifest.shard_count, manifest.total_bytes, manifest.tensor_count)
        held = (index.shard_count, index.total_bytes, len(index.tensors))
        if told == held:
            return index, []
        problem = f"it tells of {told} shards, bytes and tensors, and its index of {held}"
        return index, [Damage(key=checkpoint.prefix + MANIFEST_NAME, problem=problem)]

    def _lacks(self, places: ShardPlaces, index: Index, shards: Sequence[ShardEntry]) -> list[Damage]:
        """Return what is wrong with the presence and the sizes of shards."""
        sizes = self._sizes(places, index, shards)
        found = []
        for entry in shards:
            size_bytes = sizes.get(key := places.key(entry))
            if size_bytes == entry.size_bytes:
                continue
            problem = f"it has {size_bytes} bytes, and {entry.size_bytes} were committed"
            names = tuple(index.tensors_in(entry, 0, entry.size_bytes))
            found.append(Damage(key=key, problem="it is missing" if size_bytes is None else problem, tensors=names))
        return found

    def _sizes(self, places: ShardPlaces, index: Index, shards: Sequence[ShardEntry]) -> Mapping[str, int]:
        """Return the size of each shard that is there: by one listing, or one by one without the right to list."""
        store = places.store
        below = {f"{places.prefix}{index.attempt}/" if len(index.attempts) == 1 else places.prefix}
        # Of others' too: a listing for each that holds some.
        below |= {f"{places.key(entry).rpartition('/')[0]}/" for entry in shards if entry.holder is not None}
        try:
            return {info.key: info.size_bytes for one in sorted(below) for info in store.list(one).objects}
        except CredentialsExpiredError:
            raise
        except AccessDeniedError:
            pass

        def size_of(entry: ShardEntry) -> tuple[str, int | None]:
            key = places.key(entry)
            try:
                return key, store.head(key).size_bytes
            except ObjectNotFoundError:
                return key, None

        found = each(shards, size_of, threads=READERS, name="cloudckpt-verify")
        return {key: size_bytes for key, size_bytes in found if size_bytes is not None}

    def _read(self, places: ShardPlaces, index: Index, shards: Sequence[ShardEntry]) -> list[Damage]:
        """Read every block of these shards, and return what is wrong."""
        entries = {places.key(entry): entry for entry in shards}
        blocks: dict[str, list[int]] = defaultdict(list)
        problems: dict[str, str] = {}

        def note(job: Fetch, error: IntegrityError) -> None:
            if isinstance(error, ChecksumError) and error.blocks:
                blocks[job.shard.key] += error.blocks
            else:
                problems[job.shard.key] = str(error)

        options, store = self._options, places.store
        still_s, limit = options.transfer_limit(store.engine)
        download(
            store,
            list(_fetches(places, index, shards, options)),
            concurrency=options.concurrency,
            budget=Budget(options.transfer_budget_bytes),
            watch=Watch(deadline_s=still_s, limit=limit, gauge=Onward(self._gauge)),
            on_damage=note,
        )
        found = [
            Damage(key=key, problem=problem, tensors=tuple(index.tensors_in(entries[key], 0, entries[key].size_bytes)))
            for key, problem in problems.items()
        ]
        for key, bad in blocks.items():
            if key not in problems:
                found += [_of_blocks(key, index, entries[key], run) for run in runs_of(sorted(bad))]
        return found


def _fetches(places: ShardPlaces, index: Index, shards: Sequence[ShardEntry], options: Options) -> Iterator[Fetch]:
    total_bytes = sum(entry.size_bytes for entry in shards)
    for entry in shards:
        shard = source_of(places.key(entry), entry, index.block_bytes)
        spans = spans_of(entry, index.block_bytes, options, total_bytes=total_bytes)
        yield from (Fetch(shard=shard, span=span, consume=lambda _, __: None) for span in spans)


def _of_blocks(key: str, index: Index, entry: ShardEntry, run: tuple[int, int]) -> Damage:
    start, stop = run[0] * index.block_bytes, min(run[1] * index.block_bytes, entry.size_bytes)
    which = f"block {run[0]}" if run[1] - run[0] == 1 else f"blocks {run[0]} to {run[1] - 1}"
    return Damage(
        key=key,
        problem=f"{which} (bytes {start} to {stop}): not what was committed, by the digest",
        blocks=run,
        byte_range=(start, stop),
        tensors=tuple(index.tensors_in(entry, start, stop)),
    )
