"""Decide which checkpoints exist: the only room that creates or deletes a manifest.

    commit    manifest created, last        ──▶ the checkpoint exists
    uncommit  manifest deleted, first       ──▶ it does not; its shards go in a later pass
    void      `void` manifest created       ──▶ an orphan attempt can never commit; then `sweep` removes its objects

Knows keys, manifests and one store; knows nothing of tensors. Keeps FORMAT invariants 2 and 5 to 10. A catalog
may be used by several threads; it keeps no state but what it has read. Manifests never change, but they may go: what
protects another checkpoint is looked for in the store.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CredentialsExpiredError,
    FormatVersionError,
    ManifestError,
    ObjectExistsError,
    ObjectNotFoundError,
    RetryExhaustedError,
    StorageError,
    is_transient,
)
from cloudckpt.format import (
    FORMAT_VERSION,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    PINS_PREFIX,
    SHARD_SUFFIX,
    SHARING_VERSION,
    STEPS_BEGIN,
    Manifest,
    digest_of,
    index_key,
    is_attempt,
    new_attempt,
    parse_checkpoint_prefix,
    pin_key,
)
from cloudckpt.options import READERS
from cloudckpt.root.absence import lost, what_is_there
from cloudckpt.root.checkpoint import Checkpoint, Survey, Unreadable
from cloudckpt.root.claims import Claims
from cloudckpt.root.holders import lack_of_shared
from cloudckpt.root.known import Known
from cloudckpt.root.looking import Walk
from cloudckpt.root.pins import Held, Pins
from cloudckpt.root.removal import delete_below, nested
from cloudckpt.store import RetryingStore, Store, one_deadline
from cloudckpt.threads import each, new_lock

__all__ = ["Catalog"]

logger = logging.getLogger(__name__)

_NEAREST = 5

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Found = Checkpoint | Unreadable | None
_Stamp = tuple[str, float, int]


class _CopiedError(ManifestError):
    """The manifest of another step or epoch: what stands there is no checkpoint of that place."""


@dataclass(slots=True, eq=False)
class _Memory:
    """What the last look at each prefix found (None: nothing committed), and which unreadable ones the log has named.

    Attributes:
        stamps: under which digest, time and size the manifest of a prefix was read, or seen to be that one.
        voids: prefixes at which a void manifest stands.
        own_voids: those of them that were made here.
        deleted: prefixes whose manifest was asked to be deleted.
        by_pin: prefixes at which the last look found what is pinned, and no manifest.
        shows_pins: whether the last listing of the root had pins in it.
        named: digest of a manifest → the keys that it names of what others hold.
        sizes: digest of a manifest → its size: a void manifest, which others may put in its place, has another.
    """

    found: dict[str, _Found] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    stamps: dict[str, _Stamp] = field(default_factory=dict)
    voids: set[str] = field(default_factory=set)
    own_voids: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    by_pin: set[str] = field(default_factory=set)
    shows_pins: bool = True
    named: dict[str, frozenset[str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=new_lock)


class Catalog:
    """The checkpoints below one root, or the one checkpoint at a URL.

    Attributes:
        claims: the root's epochs.
        pins: what keeps some of its checkpoints, whatever the rules say.
    """

    def __init__(self, store: Store) -> None:
        """Wrap `store`, which stays the caller's to close."""
        self.store = store
        self.claims = Claims(store)
        self.pins = Pins(store)
        self._memory = _Memory()

    def with_store(self, store: Store) -> Catalog:
        """Return this catalog over another way to the same objects; what either has read, both know."""
        other = Catalog(store)
        other.claims, other._memory = self.claims.with_store(store), self._memory
        return other

    def within(self, end: Deadline | Callable[[], Deadline]) -> Catalog:
        """Return this catalog with no more time than until `end`, as `RetryingStore.within` has it, if it has such."""
        store = self.store
        return self.with_store(store.within(end)) if isinstance(store, RetryingStore) else self

    # -- reading -------------------------------------------------------------------------------------------

    @one_deadline()
    def open(self, prefix: str = "") -> Checkpoint:
        """Return the checkpoint under `prefix` ("" for a URL that is itself a checkpoint).

        Raises:
            CheckpointNotFoundError: nothing is committed there.
            ManifestError: its manifest cannot be trusted.
        """
        try:
            manifest, data = self._read_manifest(prefix)
        except FormatVersionError:
            raise
        except ManifestError:
            # Only a second look tells a damaged object from a damaged answer; a step must not be passed over for that.
            manifest, data = self._read_manifest(prefix)
        if manifest.state == "void":
            with self._memory.lock:
                self._memory.voids.add(prefix)
            raise CheckpointNotFoundError(f"the attempt at {self._url(prefix)} was swept before it committed")
        return self._remember(manifest, data, prefix)

    def _read_manifest(self, prefix: str) -> tuple[Manifest, bytes]:
        key = prefix + MANIFEST_NAME
        try:
            data = self.store.read(key, limit_bytes=MANIFEST_LIMIT_BYTES)
        except BucketNotFoundError:
            raise  # an object of it is absent as well, but on "no checkpoint" people start afresh
        except ObjectNotFoundError as exc:
            raise CheckpointNotFoundError(
                f"no committed checkpoint at {self._url(prefix)}; {what_is_there(self.store, prefix)}"
            ) from exc
        except StorageError as exc:
            # A size beyond the limit has no type of its own, and is no fault of the store.
            is_large = exc.is_other_object or (
                type(exc) is StorageError and self.store.head(key).size_bytes > MANIFEST_LIMIT_BYTES
            )
            if not is_large:
                raise
            raise ManifestError(
                f"manifest {key} has more than {MANIFEST_LIMIT_BYTES} bytes, so it is none; restore an older step",
                key=key,
            ) from exc
        manifest = Manifest.decode(data, key=key)
        self._check_place(manifest, prefix)
        return manifest, data

    def adopt(self, data: bytes, *, prefix: str) -> Checkpoint:
        """Return the checkpoint whose manifest has these bytes, which rank 0 has read or created. No request."""
        return self._remember(Manifest.decode(data, key=prefix + MANIFEST_NAME), data, prefix)

    def _check_place(self, manifest: Manifest, prefix: str) -> None:
        place = parse_checkpoint_prefix(prefix)
        if place is not None and place != (manifest.step, manifest.epoch):
            raise _CopiedError(
                f"the manifest at {prefix} is of step {manifest.step}, epoch {manifest.epoch}: it was copied there; "
                "restore an older step",
                key=prefix + MANIFEST_NAME,
            )

    def _remember(self, manifest: Manifest, data: bytes, prefix: str) -> Checkpoint:
        checkpoint = self._described(manifest, data, prefix)
        self._note(prefix, checkpoint)
        if prefix:
            self.claims.note([manifest.epoch])
        return checkpoint

    def _described(self, manifest: Manifest, data: bytes, prefix: str) -> Checkpoint:
        digest = digest_of(data)
        with self._memory.lock:
            self._memory.sizes[digest] = len(data)
        return Checkpoint(
            step=-1 if manifest.step is None else manifest.step,
            epoch=manifest.epoch,
            attempt=manifest.attempt,
            url=self._url(prefix),
            metrics=manifest.metric_values(),
            created_at=manifest.created(),
            total_bytes=manifest.total_bytes,
            world_size=manifest.world_size,
            digest=digest,
            manifest=manifest,
            prefix=prefix,
        )

    def _note(self, prefix: str, found: _Found) -> None:
        with self._memory.lock:
            self._memory.found[prefix] = found
            if found is not None:
                self._memory.by_pin.discard(prefix)

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a checkpoint is one of this root, by its URL. No request."""
        return checkpoint.url == self._url(checkpoint.prefix)

    def _url(self, prefix: str) -> str:
        return f"{self.store.url.removesuffix('/')}/{prefix}".rstrip("/") if prefix else self.store.url

    def places(self) -> dict[str, tuple[int, int]]:
        """Return (epoch, step) of all attempts below the root, committed or not, by their prefix; newest first."""
        return self._placed(self.store.list("", delimiter="/").prefixes)

    def held_seen(self) -> Held:
        """Return what is pinned, and what has names, for people; no request where the last listing shows none.

        Nothing may be removed by that: what was pinned since that listing is not seen.
        """
        return self.pins.held() if self._memory.shows_pins else Held(frozenset(), ())

    def _placed(self, prefixes: Collection[str]) -> dict[str, tuple[int, int]]:
        self._memory.shows_pins = PINS_PREFIX in prefixes
        found = {prefix: place[::-1] for prefix in prefixes if (place := parse_checkpoint_prefix(prefix))}
        self.claims.note([epoch for epoch, _ in found.values()], are_all=True)
        return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))

    def newest_first(self) -> Iterator[Checkpoint | ManifestError]:
        """Yield committed checkpoints from the newest down, reading each manifest only when it is asked for.

        One that has gone when the next one is asked for is followed by what is newer by now. One that cannot be read is
        yielded as its error, so that the caller decides; a store that cannot be reached raises.
        """
        walk: Walk[Checkpoint | ManifestError] = self._walk(self._found)
        return walk.newest_first(self._again)

    def _walk(
        self,
        look: Callable[[str], _Result | None],
        places: Callable[[], dict[str, tuple[int, int]]] | None = None,
    ) -> Walk[_Result]:
        return Walk(self.store.url, places or self.places, look, self._is_decided)

    def _is_decided(self, prefix: str) -> bool:
        with self._memory.lock:
            return prefix in self._memory.voids

    def _again(self, prefix: str, found: Checkpoint | ManifestError) -> Checkpoint | ManifestError | None:
        if isinstance(found, ManifestError):
            return found
        now = self._found(prefix)
        return found if isinstance(now, Checkpoint) and now.digest == found.digest else now

    def stands(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a reader still finds a checkpoint at its place, by another look."""
        return self._again(checkpoint.prefix, checkpoint) is checkpoint

    def is_still(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a checkpoint is what is committed at its place, by another look. One request."""
        now = self._tried(checkpoint.prefix)
        return isinstance(now, Checkpoint) and now.digest == checkpoint.digest

    def _found(self, prefix: str) -> Checkpoint | ManifestError | None:
        """Return what is committed under a prefix, else what is pinned there: that exists for every reader."""
        return self._tried(prefix) or self._pinned_at(prefix)

    def _pinned_at(self, prefix: str) -> Checkpoint | None:
        """Return what is pinned under a prefix without a manifest, if it is whole; whoever writes puts it back."""
        found = self.pinned(prefix) if self._memory.shows_pins else None
        if found is None:
            return None
        with self._memory.lock:
            self._memory.by_pin.add(prefix)
        return found[0]

    def stands_by_pin(self, prefix: str) -> bool:
        """Tell whether the last look found a checkpoint there by its pin alone: its manifest is gone. No request."""
        return prefix in self._memory.by_pin

    def _tried(self, prefix: str) -> Checkpoint | ManifestError | None:
        try:
            return self.open(prefix)
        except CheckpointNotFoundError:
            return None
        except ManifestError as exc:
            return exc

    def lost(self) -> ManifestError | None:
        """Return the error that says what was committed here and is gone, where nothing is; None if nothing ever was.

        Where attempts stand there all the same, the log is told, once.
        """
        attempts = [prefix for prefix in self.places() if not self._is_decided(prefix)]
        error = lost(self.store.url, attempts, self.claims)
        if error is None:
            self._tell_attempts(attempts)
        return error

    def _tell_attempts(self, attempts: Sequence[str]) -> None:
        left = [prefix for prefix in attempts if (parse_checkpoint_prefix(prefix) or (0, 0))[1] > self.claims.emptied]
        with self._memory.lock:
            news = [prefix for prefix in left if prefix not in self._memory.told]
            self._memory.told.update(news)
        if news:
            logger.warning(
                "nothing is committed at %s, but %d attempts stand there without a manifest (the newest: %s): jobs "
                "are in their first save, or were stopped in it, or manifests were removed",
                *(self.store.url, len(left), left[0]),
            )

    def survey(self, known: Known | None = None) -> Survey:
        """Look at all that stands below the root. One listing, and one request for each prefix.

        Where the newest are not committed, they are looked at again, and the root is listed again. A manifest that was
        read before is looked for, and not read again. One that cannot be read is told apart, and
        named once in the log; a store that cannot be reached raises `StorageError`.

        Args:
            known: what was read in another process; where its listing says that it stands, it is not looked at.
        """
        seen: dict[str, _Found] = {}

        def look(prefix: str) -> _Found:
            recalled = None if known is None else known.recalled(prefix)
            seen[prefix] = self._see(prefix) if recalled is None else self._remember(*recalled, prefix)
            return seen[prefix]

        def look_at_all(prefixes: Sequence[str]) -> Sequence[_Found]:
            new = [prefix for prefix in prefixes if known is None or known.recalled(prefix) is None]
            self._each(new, look)
            return [seen[prefix] if prefix in seen else look(prefix) for prefix in prefixes]

        places = None if known is None else (lambda: self._placed(known.prefixes(self.store)))
        walk: Walk[Checkpoint | Unreadable] = self._walk(look, places)
        found = walk.all(look_at_all)
        undecided = [prefix for prefix, one in seen.items() if one is None and not self._is_decided(prefix)]
        return Survey.of(found, undecided)

    def recall(self, prefixes: Iterable[str]) -> Survey:
        """Return what stands under these prefixes as far as it is remembered; only new ones are looked at.

        What was committed may be gone, so ask `standing` of what is to protect others.
        """
        asked = list(prefixes)
        with self._memory.lock:
            found = {prefix: self._memory.found[prefix] for prefix in asked if prefix in self._memory.found}
        new = self._survey([prefix for prefix in asked if prefix not in found], self._look)
        return Survey.of([*found.values(), *new.checkpoints, *new.unreadable])

    def committed(self, prefixes: Iterable[str]) -> Survey:
        """Return what stands, or stood, under these prefixes; where nothing did, it is looked at again."""
        asked = list(prefixes)
        with self._memory.lock:
            known = [one for prefix in asked if isinstance(one := self._memory.found.get(prefix), Checkpoint)]
        seen = {one.prefix for one in known}
        new = self._survey([prefix for prefix in asked if prefix not in seen], self._look)
        return Survey.of([*known, *new.checkpoints, *new.unreadable])

    def once(self, digest: str, ask: Callable[[], frozenset[str]]) -> frozenset[str]:
        """Return the keys that a manifest with this digest names of what others hold, asked for once if there are any.

        One that names none holds all itself, as a copy may, in whose place another copy may come that does not.
        """
        with self._memory.lock:
            found = self._memory.named.get(digest)
        if found is None:
            found = ask()
            with self._memory.lock:
                self._memory.named |= {digest: found} if found else {}
        return found

    def standing(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return which of these are still there, manifest and objects, as far as a listing of each tells."""
        lacks = self._each(checkpoints, self._lack)
        for checkpoint, lack in zip(checkpoints, lacks, strict=True):
            if lack:
                self._tell_broken(checkpoint, lack)
        return [checkpoint for checkpoint, lack in zip(checkpoints, lacks, strict=True) if not lack]

    def native(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return which of these were saved below this root, by the claims of their epochs: one request each, once."""
        epochs = sorted({checkpoint.epoch for checkpoint in checkpoints})
        nonces = dict(zip(epochs, self._each(epochs, self.claims.nonce_of), strict=True))
        return [one for one in checkpoints if one.manifest.claim and one.manifest.claim == nonces[one.epoch]]

    def _lack(self, checkpoint: Checkpoint) -> str:
        """Say what of a checkpoint is not there, "" if nothing is missing. A request for each 1,000 objects."""
        below = self._below(checkpoint)
        size_bytes = below.get(MANIFEST_NAME)
        if size_bytes is None or not self._is_size_of(checkpoint, size_bytes):
            return "its manifest"
        return self._lack_of_objects(checkpoint, below)

    def _below(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Return the sizes of what stands under its prefix, by their keys without that."""
        listing = self.store.list(checkpoint.prefix)
        return {info.key.removeprefix(checkpoint.prefix): info.size_bytes for info in listing.objects}

    def _lack_of_objects(self, checkpoint: Checkpoint, below: Mapping[str, int]) -> str:
        """Say what is not there of all that its manifest leads to."""
        manifest, key = checkpoint.manifest, index_key(checkpoint.attempt)
        if manifest.index is not None and below.get(key) != manifest.index.size_bytes:
            return f"its index {key}"
        shards = {name: size for name, size in below.items() if name.endswith(SHARD_SUFFIX)}
        own = [size for name, size in shards.items() if name.startswith(f"{checkpoint.attempt}/")]
        held = manifest.held_elsewhere
        own_count = manifest.shard_count - sum(one.shard_count for one in held)
        if (len(own), sum(own)) == (own_count, manifest.sent_bytes):
            return lack_of_shared(self.store, manifest, below) if held else ""
        if held:
            return f"{len(own)} of the {own_count} shards that it holds itself are there, or of another size"
        # Of several ranks through DCP each has an attempt of its own; which of them, only the index says.
        is_maybe_whole = len(own) < len(shards) >= manifest.shard_count and sum(shards.values()) >= manifest.total_bytes
        return (
            "" if is_maybe_whole else f"{len(own)} of its {manifest.shard_count} shards are there, or of another size"
        )

    def lack_of_others(self, checkpoint: Checkpoint, *, is_pinned: bool = False) -> str:
        """Say what keeps others from holding shards of a checkpoint: they are being removed, or gone; "" if nothing.

        Args:
            checkpoint: of which others hold some.
            is_pinned: whether what was closed after its pin was made, by the store's clock, keeps nothing: that pin was
                seen, and what it holds is spared.
        """
        held = checkpoint.manifest.held_elsewhere
        closed = [one for one in held if self._is_closed(one.prefix)]
        pinned_s = self._modified_s(pin_key(checkpoint.prefix)) if closed and is_pinned else math.inf
        for one in closed:
            if not is_pinned or self._modified_s(one.prefix + MANIFEST_NAME) <= pinned_s:
                return f"what step {one.step} of epoch {one.epoch} holds of it is being removed"
        return lack_of_shared(self.store, checkpoint.manifest, self._below(checkpoint)) if held else ""

    def _modified_s(self, key: str) -> float:
        """Return when an object was made, by the store's clock; of one that is not there, a time after all others."""
        with suppress(ObjectNotFoundError):
            return self.store.head(key).modified_s
        return math.inf

    def _is_closed(self, prefix: str) -> bool:
        """Tell whether a removal may be at work under a prefix, by another look: what is void, or nobody knows."""
        try:
            self.open(prefix)
        except ManifestError:
            return True
        except CheckpointNotFoundError:
            return self.is_taken(prefix)
        return False

    def _tell_broken(self, checkpoint: Checkpoint, lack: str) -> None:
        with self._memory.lock:
            is_told = checkpoint.digest in self._memory.told
            self._memory.told.add(checkpoint.digest)
        if not is_told:
            logger.warning(
                "%s is not whole, though nobody here has removed anything of it: %s. No retention rule counts it, and "
                "only delete(%d) removes it",
                *(checkpoint.url, lack, checkpoint.step),
            )

    def _survey(self, prefixes: Iterable[str], look: Callable[[str], _Found]) -> Survey:
        return Survey.of(self._each(list(prefixes), look))

    def _each(self, items: Sequence[_Item], look: Callable[[_Item], _Result]) -> list[_Result]:
        return each(items, look, threads=READERS, name="cloudckpt-catalog")

    def _see(self, prefix: str) -> _Found:
        """Return what stands under a prefix; what was read before is read again only if it is another one by now."""
        return self._see_committed(prefix) or self._pinned_at(prefix)

    def _see_committed(self, prefix: str) -> _Found:
        with self._memory.lock:
            known, stamp = self._memory.found.get(prefix), self._memory.stamps.get(prefix)
        if not isinstance(known, Checkpoint):
            return self._look(prefix)
        listing = self.store.list(prefix, delimiter="/")
        info = next((info for info in listing.objects if info.key == prefix + MANIFEST_NAME), None)
        if info is None:
            self._note(prefix, None)
            return None
        attempts = [name for name in listing.prefixes if is_attempt(name.removeprefix(prefix).rstrip("/"))]
        now = (known.digest, info.modified_s, info.size_bytes)
        # Of the time nothing is known of one that this catalog has made; but nobody else has its attempt, and a void
        # manifest in its place another size.
        is_made_here = stamp is None and attempts == [f"{prefix}{known.attempt}/"]
        if stamp != now and not (is_made_here and self._is_size_of(known, info.size_bytes)):
            found = self._look(prefix)
            if not isinstance(found, Checkpoint):
                return found
            known, now = found, (found.digest, info.modified_s, info.size_bytes)
        with self._memory.lock:
            self._memory.stamps[prefix] = now
        return known

    def _is_size_of(self, checkpoint: Checkpoint, size_bytes: int) -> bool:
        """Tell whether an object of this size, in the place of its manifest, is that."""
        with self._memory.lock:
            known = self._memory.sizes.get(checkpoint.digest)
        return self.is_still(checkpoint) if known is None else size_bytes == known

    def _look(self, prefix: str) -> _Found:
        try:
            tried = self._tried(prefix)
            found = self._unreadable(prefix, tried) if isinstance(tried, ManifestError) else tried
        except StorageError as exc:
            # Of this object alone, such as an archived one; what the store meets everywhere is raised.
            if isinstance(exc, RetryExhaustedError | CredentialsExpiredError | BucketNotFoundError) or is_transient(
                exc
            ):
                raise
            found = self._unreadable(prefix, exc)
        self._note(prefix, found)
        return found

    def _unreadable(self, prefix: str, error: ManifestError | StorageError) -> Unreadable:
        step, epoch = parse_checkpoint_prefix(prefix) or (-1, 0)
        with self._memory.lock:
            is_told = prefix in self._memory.told
            self._memory.told.add(prefix)
        if not is_told:
            logger.warning(
                "a checkpoint's manifest cannot be read: %s. No retention rule counts it, it never is the best, and "
                "only delete() of its step removes it",
                error,
            )
        return Unreadable(step=step, epoch=epoch, url=self._url(prefix), error=error)

    def find(self, step: int) -> Checkpoint:
        """Return the checkpoint of `step`, of the newest epoch that committed it.

        Raises:
            CheckpointNotFoundError: no epoch committed that step; the message names the nearest ones.
        """
        found = self.what_is(step)
        if isinstance(found, ManifestError):
            raise found
        return found

    def what_is(self, step: int) -> Checkpoint | ManifestError:
        """Return the checkpoint of `step`, of the newest epoch that committed it, or why that cannot be read.

        What was copied there from another place is passed over, if there is another one. A pinned one whose manifest
        is gone is what its pin says, until somebody who writes here puts it back.

        Raises:
            CheckpointNotFoundError: as `find` does.
        """
        copied: list[ManifestError] = []
        for prefix, (_, found_step) in self.places().items():
            if found_step != step:
                continue
            found = self._found(prefix)
            if isinstance(found, _CopiedError):
                logger.warning("passing over what is no checkpoint of its place: %s", found)
                copied.append(found)
            elif found is not None:
                return found
        if copied:
            return copied[0]
        steps = sorted({one.step for one in self.survey().checkpoints}, key=lambda there: abs(there - step))
        if not steps and (above := self.root_above()):
            raise CheckpointNotFoundError(above)
        shown = ", ".join(map(str, sorted(steps[:_NEAREST]))) or "none"
        raise CheckpointNotFoundError(
            f"no committed checkpoint of step {step} at {self.store.url}; the nearest of {len(steps)} there: {shown}"
        )

    # -- deciding ------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest, *, prefix: str) -> Checkpoint:
        """Create the manifest of a finished attempt; from then on the checkpoint exists.

        Call only when every object that the manifest leads to is durable. The store's create reads back after
        any failure, so a lost reply neither loses nor doubles a commit.

        Raises:
            FencedError: a newer epoch was claimed; nothing was committed.
            CheckpointExistsError: another attempt decided this step first; its commit stands.
            CommitUnknownError: the manifest may exist; nothing was deleted.
        """
        if manifest.epoch:
            self.claims.fence(manifest.epoch)
        claim = self.claims.own_nonce(manifest.epoch)
        manifest = msgspec.structs.replace(manifest, created_at=_now(), claim=claim)
        data = manifest.encode()
        try:
            self.store.create(prefix + MANIFEST_NAME, data)
        except ObjectExistsError as exc:
            raise self.exists_error(prefix) from exc
        return self.adopt(data, prefix=prefix)

    def exists_error(self, prefix: str) -> CheckpointExistsError:
        """Return the error that says that the place is taken."""
        advice = "another step, or delete it first" if prefix else 'another URL, or replace it with exists="replace"'
        return CheckpointExistsError(
            f"a checkpoint is already committed at {self._url(prefix)}; it was not changed. Save under {advice}"
        )

    def is_taken(self, prefix: str) -> bool:
        """Tell whether a manifest stands under `prefix`, whatever it says. One request."""
        try:
            self.store.head(prefix + MANIFEST_NAME)
        except ObjectNotFoundError:
            return False
        return True

    def is_shown(self, prefix: str) -> bool:
        """Tell whether a listing shows a manifest under `prefix` that is not known to be void. One request, or none."""
        key = prefix + MANIFEST_NAME
        return not self._is_decided(prefix) and any(one.key == key for one in self.store.list(key).objects)

    def root_above(self) -> str:
        """Say that the URL is that of one checkpoint, and which root to give; "" if it is not. One request."""
        if not self.is_taken(""):
            return ""
        above, _, name = self.store.url.rstrip("/").rpartition("/")
        what = f"give its root, {above}" if parse_checkpoint_prefix(f"{name}/") else "it has no root"
        return f"{self.store.url} is one checkpoint, not a root of checkpoints; {what}"

    def has_steps(self) -> bool:
        """Tell whether an attempt of a step stands below this root, committed or not. One request."""
        found = self.store.list(STEPS_BEGIN, delimiter="/").prefixes
        return any(parse_checkpoint_prefix(prefix) for prefix in found)

    def is_used(self, prefix: str) -> bool:
        """Tell whether this catalog has read, made or deleted a commit under `prefix`. No request.

        A delete that got no answer was asked for again, and the store may carry it out once more at any later time:
        whatever is committed there by then would go.
        """
        with self._memory.lock:
            return isinstance(self._memory.found.get(prefix), Checkpoint) or prefix in self._memory.deleted

    def uncommit(self, prefix: str) -> None:
        """Delete the manifest under a prefix, also one that nobody can read; what it led to stays for a later pass."""
        with self._memory.lock:
            self._memory.deleted.add(prefix)
        self.store.delete([prefix + MANIFEST_NAME])
        self._note(prefix, None)

    def recommit(self, data: bytes, *, prefix: str) -> Checkpoint:
        """Create the manifest of a checkpoint that `uncommit` took away again, byte for byte; raises as `commit`."""
        self.store.create(prefix + MANIFEST_NAME, data)
        return self.adopt(data, prefix=prefix)

    @one_deadline()
    def put_back(self, prefix: str) -> Checkpoint | None:
        """Commit a pinned checkpoint again whose manifest is gone, as its pin has it; not while it is being removed.

        Returns:
            What stands there then; None, and the log says why, if that is not what is pinned: there is no such pin, or
            none that can be read, its objects are not there, or something else stands there.
        """
        found = self.pinned(prefix)
        if found is None:
            return None
        pinned, data = found
        with suppress(ObjectExistsError):
            self.recommit(data, prefix=prefix)
            # What was removed meanwhile had the key void for that time alone, in which this may have been on its way.
            if lack := self._lack_of_objects(pinned, self._below(pinned)) or self.lack_of_others(
                pinned, is_pinned=True
            ):
                self.uncommit(prefix)
                self._tell_pin(prefix, lack)
                return None
            logger.warning("the manifest of %s was gone, which is pinned: it is put back", pinned.url)
            return pinned
        now = self._tried(prefix)
        if isinstance(now, Checkpoint) and now.digest == pinned.digest:
            return now
        self._tell_pin(prefix, "it is being removed" if self._is_decided(prefix) else "another manifest stands there")
        return None

    def pinned(self, prefix: str) -> tuple[Checkpoint, bytes] | None:
        """Return what is pinned under a prefix, and its manifest, if all that leads to is there. Two requests.

        None, and the log says why, if a pin there stands for nothing.
        """
        try:
            pin = self.pins.read(prefix)
        except ManifestError as exc:
            self._tell_pin(prefix, str(exc))
            return None
        if pin is None:
            return None
        manifest, data = pin.checkpoint_manifest()
        checkpoint = self._described(manifest, data, prefix)
        lack = self._lack_of_objects(checkpoint, self._below(checkpoint))
        if lack:
            self._tell_pin(prefix, f"it lacks {lack}" if lack.startswith("its") else lack)
            return None
        return checkpoint, data

    def _tell_pin(self, prefix: str, why: str) -> None:
        with self._memory.lock:
            is_told, key = pin_key(prefix) in self._memory.told, pin_key(prefix)
            self._memory.told.add(key)
        if not is_told:
            logger.warning(
                "%s is pinned by %s, but is not committed, and cannot be put back: %s. What is left of it stays until "
                "it is unpinned",
                *(self._url(prefix), key, why),
            )

    def manifest_bytes(self, checkpoint: Checkpoint) -> bytes:
        """Return a manifest as it stands on the store, or in a pin; no request where it encodes to the same bytes.

        Raises:
            CheckpointNotFoundError: it is gone, or another one stands there by now.
        """
        data = checkpoint.manifest.encode()
        if digest_of(data) != checkpoint.digest:  # of another version
            data = self._stored_manifest(checkpoint.prefix)
        if digest_of(data) != checkpoint.digest:
            raise CheckpointNotFoundError(f"{checkpoint.url} was removed, and another checkpoint stands there by now")
        return data

    def _stored_manifest(self, prefix: str) -> bytes:
        try:
            return self._read_manifest(prefix)[1]
        except CheckpointNotFoundError:
            if (pinned := self.pinned(prefix)) is None:
                raise
            return pinned[1]

    def commit_copy(self, data: bytes, *, prefix: str) -> Checkpoint:
        """Create the manifest of a checkpoint that was copied, byte for byte; nothing where it is there already.

        Call only when every object that the manifest leads to is durable here. Asks no fence: whose epoch it is stands
        in the manifest.

        Raises:
            CheckpointExistsError: another manifest stands there; it was not changed.
            CommitUnknownError: the manifest may exist; nothing was deleted.
        """
        try:
            self.store.create(prefix + MANIFEST_NAME, data)
        except ObjectExistsError as exc:
            if self.store.read(prefix + MANIFEST_NAME, limit_bytes=MANIFEST_LIMIT_BYTES) != data:
                raise self.exists_error(prefix) from exc
        return self.adopt(data, prefix=prefix)

    @one_deadline()
    def made_by(self, attempts: Collection[str], *, prefix: str) -> Checkpoint | None:
        """Return the checkpoint there if one of these attempts made it, else None. One request."""
        try:
            data = self.store.read(prefix + MANIFEST_NAME, limit_bytes=MANIFEST_LIMIT_BYTES)
        except ObjectNotFoundError:
            return None
        is_one = Manifest.decode(data, key=prefix + MANIFEST_NAME).attempt in attempts
        return self.adopt(data, prefix=prefix) if is_one else None

    @one_deadline()
    def discard(self, attempts: Collection[str], *, prefix: str) -> None:
        """Delete the objects of attempts at one save that failed, unless the manifest there is of one of them.

        Call only when no commit of it can follow.
        """
        if self.made_by(attempts, prefix=prefix) is not None:
            return
        # An index also where none was put: a disk then lets go of a directory in which nothing came to stand.
        keys = {prefix + index_key(attempt) for attempt in attempts}
        below = tuple(f"{prefix}{attempt}/" for attempt in attempts)
        listing = self.store.list(below[0] if len(below) == 1 else prefix)
        keys.update(info.key for info in listing.objects if info.key.startswith(below))
        delete_below(self.store, sorted(keys), below=below)

    @one_deadline()
    def leftovers(self, prefix: str, attempt: str) -> list[str]:
        """Return the keys of what an attempt still holds that was uncommitted; not those of another one there.

        Where the attempt is "", because nobody could read which it was, all that stands there but checkpoints that
        somebody has saved below it.

        Raises:
            CheckpointExistsError: it is committed again.
            ManifestError: a manifest stands there, and nobody can say whose.
        """
        keys = [info.key for info in self.store.list(prefix).objects]
        found = self._tried(prefix) if prefix + MANIFEST_NAME in keys and not self._is_decided(prefix) else None
        if isinstance(found, ManifestError):
            raise found
        if found is not None and attempt in ("", found.attempt):
            raise self.exists_error(prefix)
        if not attempt:
            others = (prefix + MANIFEST_NAME, *nested(prefix, keys))
            return [key for key in keys if not key.startswith(others)]
        return [key for key in keys if key.startswith(f"{prefix}{attempt}/")]

    def void(self, prefix: str, *, is_sharing: bool = False) -> bool:
        """Decide that no attempt under `prefix` ever commits: create its manifest as `void`. False if one committed.

        Where others may share what stands there, in a version that no older release sweeps.
        """
        place = parse_checkpoint_prefix(prefix)
        if place is None:
            raise CheckpointNotFoundError(f"{prefix!r} is no checkpoint prefix")
        manifest = Manifest(
            format_version=SHARING_VERSION if is_sharing else FORMAT_VERSION,
            references=[] if is_sharing else msgspec.UNSET,
            state="void",
            step=place[0],
            epoch=place[1],
            attempt=new_attempt(),
            created_at=_now(),
        )
        try:
            self.store.create(prefix + MANIFEST_NAME, manifest.encode())
        except ObjectExistsError:
            # What was seen to be void may have been removed since, and copied there again.
            with self._memory.lock:
                self._memory.voids.discard(prefix)
            return self.is_void(prefix)
        with self._memory.lock:
            self._memory.voids.add(prefix)
            self._memory.own_voids.add(prefix)
        return True

    def is_void(self, prefix: str) -> bool:
        """Tell whether a readable `void` manifest stands under `prefix`; read once."""
        if prefix in self._memory.voids:
            return True
        with self._memory.lock:
            if isinstance(self._memory.found.get(prefix), Checkpoint):
                return False
        with suppress(ManifestError, CheckpointNotFoundError):
            self.open(prefix)
        return prefix in self._memory.voids

    def unvoid(self, prefix: str) -> None:
        """Delete a void manifest, when nobody can be alive any more whom it keeps from committing there."""
        if self.is_void(prefix):
            self._delete_void(prefix)

    def withdraw_void(self, prefix: str) -> None:
        """Delete the void manifest that this catalog has made, if it has; what it was to keep from going is gone."""
        if prefix in self._memory.own_voids:
            self._delete_void(prefix)

    def _delete_void(self, prefix: str) -> None:
        with self._memory.lock:
            self._memory.deleted.add(prefix)
        self.store.delete([prefix + MANIFEST_NAME])
        with self._memory.lock:
            self._memory.voids.discard(prefix)
            self._memory.own_voids.discard(prefix)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
