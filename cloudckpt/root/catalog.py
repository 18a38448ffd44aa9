"""Decide which checkpoints exist: the only room that creates or deletes a manifest, and that claims epochs.

    commit    manifest created, last        ──▶ the checkpoint exists
    uncommit  manifest deleted, first       ──▶ it does not; its shards go in a later pass
    claim     epochs/NNN.json created       ──▶ older epochs are fenced
    void      `void` manifest created       ──▶ an orphan attempt can never commit; then `sweep` removes its objects

Knows keys, manifests and one store; knows nothing of tensors. Keeps FORMAT invariants 2 and 5 to 10. A catalog
may be used by several threads; it keeps no state but the manifests that it has read, which never change.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

import msgspec

from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    FencedError,
    FormatVersionError,
    ManifestError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.format import (
    EPOCHS_PREFIX,
    FORMAT_VERSION,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    EpochClaim,
    Manifest,
    decode_claim,
    digest_of,
    epoch_key,
    new_attempt,
    parse_checkpoint_prefix,
    parse_epoch_key,
)
from cloudckpt.root.absence import what_is_there
from cloudckpt.root.checkpoint import Checkpoint, best_first
from cloudckpt.store import Store, one_deadline

__all__ = ["Catalog"]

logger = logging.getLogger(__name__)

_CLAIM_LIMIT_BYTES = 64 << 10
_READERS = 16


class Catalog:
    """The checkpoints below one root, or the one checkpoint at a URL."""

    def __init__(self, store: Store) -> None:
        """Wrap `store`, which stays the caller's to close."""
        self.store = store
        self._known: dict[str, Checkpoint] = {}
        self._lock = threading.Lock()

    def with_store(self, store: Store) -> Catalog:
        """Return this catalog over another way to the same objects; what either has read, both know."""
        other = Catalog(store)
        other._known, other._lock = self._known, self._lock
        return other

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
        self._check_place(manifest, prefix)
        if manifest.state == "void":
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
        return Manifest.decode(data, key=key), data

    def adopt(self, data: bytes, *, prefix: str) -> Checkpoint:
        """Return the checkpoint whose manifest has these bytes, which rank 0 has read or created. No request."""
        return self._remember(Manifest.decode(data, key=prefix + MANIFEST_NAME), data, prefix)

    def _check_place(self, manifest: Manifest, prefix: str) -> None:
        place = parse_checkpoint_prefix(prefix)
        if place is not None and place != (manifest.step, manifest.epoch):
            raise ManifestError(
                f"the manifest at {prefix} is of step {manifest.step}, epoch {manifest.epoch}: it was copied there; "
                "restore an older step",
                key=prefix + MANIFEST_NAME,
            )

    def _remember(self, manifest: Manifest, data: bytes, prefix: str) -> Checkpoint:
        checkpoint = Checkpoint(
            step=-1 if manifest.step is None else manifest.step,
            epoch=manifest.epoch,
            attempt=manifest.attempt,
            url=self._url(prefix),
            metrics=manifest.metric_values(),
            metadata=manifest.metadata_values(),
            created_at=manifest.created(),
            total_bytes=manifest.total_bytes,
            world_size=manifest.world_size,
            digest=digest_of(data),
            manifest=manifest,
            prefix=prefix,
        )
        with self._lock:
            self._known[prefix] = checkpoint
        return checkpoint

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a checkpoint is one of this root, by its URL. No request."""
        return checkpoint.url == self._url(checkpoint.prefix)

    def _url(self, prefix: str) -> str:
        return f"{self.store.url.removesuffix('/')}/{prefix}".rstrip("/") if prefix else self.store.url

    def places(self) -> dict[str, tuple[int, int]]:
        """Return (epoch, step) of all attempts below the root, committed or not, by their prefix; newest first."""
        prefixes = self.store.list("", delimiter="/").prefixes
        found = {prefix: place[::-1] for prefix in prefixes if (place := parse_checkpoint_prefix(prefix))}
        return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))

    def newest_first(self) -> Iterable[Checkpoint | ManifestError]:
        """Yield committed checkpoints from the newest down, reading each manifest only when it is asked for.

        One that cannot be read is yielded as its error, so that the caller decides; a store that cannot be
        reached raises. A manifest of a newer format raises `FormatVersionError`: going past it would silently
        go back in time.
        """
        for prefix in self.places():
            found = self._look(prefix)
            if isinstance(found, FormatVersionError):
                raise found
            if found is not None:
                yield found

    def _look(self, prefix: str) -> Checkpoint | ManifestError | None:
        try:
            return self.open(prefix)
        except CheckpointNotFoundError:
            return None
        except ManifestError as exc:
            return exc

    def newest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint, or None when none was ever committed.

        Raises:
            ManifestError: checkpoints are there and none can be read.
            StorageError: the store cannot be listed or read; that is never "none".
        """
        failures = []
        for found in self.newest_first():
            if isinstance(found, Checkpoint):
                return found
            logger.warning("skipping a checkpoint whose manifest cannot be read: %s", found)
            failures.append(found)
        self._refuse_unreadable(failures)
        return None

    def all(self) -> list[Checkpoint]:
        """Return every readable checkpoint, oldest first by (epoch, step); manifests already read are not read again.

        Raises what `newest` raises.
        """
        prefixes = self.places()
        with self._lock:
            known = {prefix: self._known[prefix] for prefix in prefixes if prefix in self._known}
        unknown = [prefix for prefix in prefixes if prefix not in known]
        failures = []
        with ThreadPoolExecutor(_READERS, thread_name_prefix="cloudckpt-catalog") as pool:
            for found in pool.map(self._look, unknown):
                if isinstance(found, Checkpoint):
                    known[found.prefix] = found
                elif found is not None:
                    logger.warning("a checkpoint's manifest cannot be read: %s", found)
                    failures.append(found)
        if not known:
            self._refuse_unreadable(failures)
        return sorted(known.values(), key=lambda checkpoint: checkpoint.order)

    def _refuse_unreadable(self, failures: Sequence[ManifestError]) -> None:
        if failures:
            raise ManifestError(
                f"{len(failures)} checkpoints are at {self.store.url} and none can be read; the newest: {failures[0]}",
                key=failures[0].key,
            ) from failures[0]

    def best(self, metric: str, mode: Literal["min", "max"]) -> Checkpoint | None:
        """Return the checkpoint with the smallest (`min`) or largest (`max`) `metric`; the newer of equals.

        Checkpoints without that metric, or with nan, do not count; None if none counts.

        Raises:
            OptionsError: the metric has no name, or the mode is neither `min` nor `max`.
            CloudCkptError: what `all` raises.
        """
        return next(iter(best_first(self.all(), metric, mode)), None)

    def find(self, step: int) -> Checkpoint:
        """Return the checkpoint of `step`, of the newest epoch that committed it.

        Raises:
            CheckpointNotFoundError: no epoch committed that step; the message names the nearest ones.
        """
        places = self.places()
        for prefix, (_, found_step) in places.items():
            found = self._look(prefix) if found_step == step else None
            if isinstance(found, ManifestError):
                raise found
            if found is not None:
                return found
        steps = sorted({found_step for _, found_step in places.values()})
        raise CheckpointNotFoundError(
            f"no committed checkpoint of step {step} at {self.store.url}; steps there: {_few(steps)}"
        )

    # -- epochs --------------------------------------------------------------------------------------------

    def highest_epoch(self) -> int:
        """Return the highest epoch that anybody claimed, 0 if nobody did. One listing."""
        listing = self.store.list(EPOCHS_PREFIX)
        return max((parse_epoch_key(info.key) or 0 for info in listing.objects), default=0)

    def claim(self, *, resumed_from: Checkpoint | None, least: int = 1) -> int:
        """Claim the next epoch, `least` or a higher one, so that every older writer is fenced, and return it.

        Two jobs that claim at once get different epochs; the higher one wins.
        """
        epoch = max(self.highest_epoch() + 1, least)
        while True:
            claim = EpochClaim(
                format_version=FORMAT_VERSION,
                epoch=epoch,
                nonce=secrets.token_hex(8),
                created_at=_now(),
                host=platform.node(),
                pid=os.getpid(),
                resumed_from=None if resumed_from is None else (resumed_from.step, resumed_from.epoch),
            )
            try:
                self.store.create(epoch_key(epoch), claim.encode())
            except ObjectExistsError:
                epoch += 1
                continue
            logger.info("claimed epoch %d of %s", epoch, self.store.url)
            return epoch

    @one_deadline()
    def fence(self, epoch: int) -> None:
        """Raise `FencedError` if a newer epoch than `epoch` was claimed. One listing."""
        highest = self.highest_epoch()
        if highest > epoch:
            raise FencedError(
                f"epoch {highest} has claimed {self.store.url}{self._claimed_by(highest)}, and this job writes as "
                f"epoch {epoch}; stop this job, or start it again to take over"
            )

    def _claimed_by(self, epoch: int) -> str:
        """Describe the claimer for people; a claim that cannot be read does not hide the fence."""
        key = epoch_key(epoch)
        try:
            claim = decode_claim(self.store.read(key, limit_bytes=_CLAIM_LIMIT_BYTES), key=key)
        except (StorageError, ManifestError):
            return ""
        return f" (host {claim.host!r}, process {claim.pid}, at {claim.created_at})"

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
            self.fence(manifest.epoch)
        manifest = msgspec.structs.replace(manifest, created_at=_now())
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

    def knows(self, prefix: str) -> bool:
        """Tell whether this catalog has read or made the commit under `prefix`. No request."""
        with self._lock:
            return prefix in self._known

    def uncommit(self, checkpoint: Checkpoint) -> None:
        """Delete the manifest, so that the checkpoint no longer exists; its shards stay for `remove_objects`."""
        self.store.delete([checkpoint.prefix + MANIFEST_NAME])
        with self._lock:
            self._known.pop(checkpoint.prefix, None)

    def recommit(self, checkpoint: Checkpoint) -> None:
        """Create the manifest of a checkpoint that `uncommit` took away again, byte for byte; raises as `commit`."""
        data = checkpoint.manifest.encode()
        self.store.create(checkpoint.prefix + MANIFEST_NAME, data)
        self.adopt(data, prefix=checkpoint.prefix)

    def remove_objects(self, prefix: str) -> None:
        """Delete what an uncommitted prefix still holds. Never removes a manifest.

        Raises:
            CheckpointExistsError: the prefix is committed; nothing was deleted.
        """
        objects = self.store.list(prefix).objects
        if any(info.key == prefix + MANIFEST_NAME for info in objects):
            raise self.exists_error(prefix)
        self.store.delete([info.key for info in objects])

    def void(self, prefix: str) -> bool:
        """Decide that no attempt under `prefix` ever commits: create its manifest as `void`. False if one committed."""
        place = parse_checkpoint_prefix(prefix)
        if place is None:
            raise CheckpointNotFoundError(f"{prefix!r} is no checkpoint prefix")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            state="void",
            step=place[0],
            epoch=place[1],
            attempt=new_attempt(),
            created_at=_now(),
        )
        try:
            self.store.create(prefix + MANIFEST_NAME, manifest.encode())
        except ObjectExistsError:
            return self.is_void(prefix)
        return True

    def is_void(self, prefix: str) -> bool:
        """Tell whether a readable `void` manifest stands under `prefix`."""
        key = prefix + MANIFEST_NAME
        try:
            return Manifest.decode(self.store.read(key, limit_bytes=MANIFEST_LIMIT_BYTES), key=key).state == "void"
        except (ManifestError, ObjectNotFoundError):
            return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _few(steps: Sequence[int]) -> str:
    if not steps:
        return "none"
    shown = ", ".join(str(step) for step in steps[-5:])
    return shown if len(steps) <= 5 else f"…, {shown}"
