"""Let a finished save take the place of the checkpoint at its URL.

    old manifest kept aside ──▶ uncommit old ──▶ commit new ──▶ new manifest kept aside ──▶ old objects removed;
                                      ╰── nothing is committed ──╯               attempts that were cut off long ago

A reader gets all of the old checkpoint, all of the new one, or hears that there is none; no object is ever written
over. A commit that fails puts the old manifest back. A process that dies in between leaves both attempts whole, and
the old manifest beside its index, which `absence` tells; so does a delete, of this save or of one before, that got no
answer and that the store carries out late: the new manifest is kept there, too. Keeps FORMAT invariants 1, 2, 4 and 7.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from cloudckpt.errors import (
    AccessDeniedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CloudCkptError,
    CommitUnknownError,
    ConflictError,
    CredentialsExpiredError,
    FormatVersionError,
    ManifestError,
    OptionsError,
    StorageError,
)
from cloudckpt.format import MANIFEST_NAME, Index, Manifest, index_key, is_attempt, parse_checkpoint_prefix
from cloudckpt.root.absence import set_aside_key
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.removal import delete_below
from cloudckpt.store import ObjectInfo

__all__ = [
    "Exists",
    "check_exists",
    "check_own",
    "check_place",
    "check_root",
    "refuse_files",
    "refuse_nested",
    "replace",
]

logger = logging.getLogger(__name__)

# Every put of a save is newer than this, so that an attempt without one is nobody's any more.
_ABANDONED_S = 86_400.0

Exists = Literal["raise", "replace"]
"""What a save does where a checkpoint is committed already."""


def check_exists(exists: str) -> Exists:
    """Return what the caller chose, or raise `OptionsError`."""
    if exists in get_args(Exists):
        return "replace" if exists == "replace" else "raise"
    raise OptionsError(f"exists is {exists!r}; give {' or '.join(map(repr, get_args(Exists)))}")


def refuse_nested(url: str, *, is_root: bool) -> None:
    """Refuse a place for checkpoints that is below a step of a manager's root, by the form of its URL.

    A root may not be such a step either; what is to be one checkpoint is refused there by what it holds.

    Raises:
        OptionsError: it is: what stands below a step goes with that step, or with a sweep.
    """
    above = url.rstrip("/").split("/")
    names = above if is_root else above[:-1]
    step = next((place for place, name in enumerate(names) if parse_checkpoint_prefix(f"{name}/")), None)
    if step is not None:
        raise OptionsError(
            f"{url} is below {'/'.join(above[: step + 1])}, a step of a CheckpointManager, which goes with all that "
            "stands there; save beside the root, or within the state of that step"
        )


def check_root(catalog: Catalog) -> None:
    """Refuse a place early that cannot become a root. One request, and one more where something stands.

    What is both a root and a checkpoint is taken for a root, by all who read it, and stays one.

    Raises:
        OptionsError: it is a step of a manager's root, or below one.
        CheckpointExistsError: it is a checkpoint itself, which was not changed.
    """
    refuse_nested(catalog.store.url, is_root=True)
    with _unless_denied():
        if catalog.is_taken("") and not catalog.has_steps():
            raise CheckpointExistsError(
                f"{catalog.store.url} is a checkpoint itself, and no root; it was not changed. Give the URL of a root, "
                "or for one checkpoint another URL of its own"
            )


def check_own(catalog: Catalog) -> None:
    """Refuse a place early that should not become one checkpoint. One request, which `check_place` of a save spares.

    Raises:
        OptionsError: it is below a step of a manager's root.
        CheckpointExistsError: it is a root with steps, among which nobody would find that checkpoint.
    """
    refuse_nested(catalog.store.url, is_root=False)
    with _unless_denied():
        if catalog.has_steps():
            raise CheckpointExistsError(
                f"{catalog.store.url} is a root with steps, and cannot become a checkpoint itself; it was not changed. "
                "Give the step that it is to be there (step=, --step), or a URL of its own"
            )


@contextmanager
def _unless_denied() -> Iterator[None]:
    """Pass over a right that a save does not need: without that to list, S3 denies an absent object, too."""
    try:
        yield
    except CredentialsExpiredError:
        raise
    except AccessDeniedError as exc:
        logger.debug("what stands at the URL cannot be asked: %s", exc)


def refuse_files(catalog: Catalog) -> None:
    """Refuse a folder for files of other programs that is a checkpoint or a root. Two requests.

    Raises:
        OptionsError: it is, or stands below a step of a root.
    """
    url = catalog.store.url
    refuse_nested(url, is_root=True)
    what = ""
    with _unless_denied():
        if catalog.has_steps():
            what = "a root with checkpoints"
        else:
            try:
                what = f"the checkpoint of attempt {catalog.open().attempt}"
            except FormatVersionError:
                what = "a checkpoint of a newer version"
            except (CheckpointNotFoundError, ManifestError):  # another program's file may have that name
                pass
    if what:
        raise OptionsError(f"{url} is {what}, and no place for other files; nothing was written. Give another folder")


def check_place(catalog: Catalog, exists: Exists) -> None:
    """Refuse a URL early that a save could not commit to.

    Raises:
        OptionsError: it is below a step of a manager's root.
        CheckpointExistsError: it holds a checkpoint, which was not changed; or one step of a manager's root, which is
            not replaced.
        ManifestError: it holds one that cannot be read, and so is not replaced.
    """
    refuse_nested(catalog.store.url, is_root=False)
    try:
        is_taken = catalog.is_taken("")
    except CredentialsExpiredError:
        raise
    except AccessDeniedError as exc:
        if exists == "replace":
            raise
        # Without the right to list, S3 denies an absent object, too. The commit itself never overwrites.
        logger.warning("whether a checkpoint is there already shows only at the commit: %s", exc)
        return
    if not is_taken:
        return
    if exists == "raise":
        raise catalog.exists_error("")
    old = catalog.open()
    if old.epoch:
        raise CheckpointExistsError(
            f"{old.url} is step {old.step} of a CheckpointManager, which alone removes its steps; it was not changed. "
            "Save under another URL"
        )


def replace(catalog: Catalog, manifest: Manifest) -> Checkpoint:
    """Commit a finished attempt at a URL, in place of the checkpoint there, if there is one.

    Whoever reads the old one at that moment gets `MissingShardError`, or `CheckpointNotFoundError` in between.

    Raises:
        CheckpointExistsError: another save replaced it first; its commit stands.
        CommitUnknownError: the manifest may exist; the old one does not, and its objects were not deleted.
        CloudCkptError: it was not committed; the old one stands, or the log says how to have it back.
    """
    if not catalog.is_taken(""):
        new = catalog.commit(manifest, prefix="")
        _keep_copy(catalog, new)
        _remove(catalog, new, frozenset())
        return new
    old = catalog.open()
    attempts = _attempts_of(catalog, old)
    catalog.store.create(set_aside_key(old.attempt), old.manifest.encode())
    try:
        catalog.uncommit(old.prefix)
        new = catalog.commit(manifest, prefix="")
    except (ConflictError, CommitUnknownError):
        raise
    except BaseException:
        _put_back(catalog, old)
        raise
    _keep_copy(catalog, new)
    logger.info("attempt %s has replaced attempt %s at %s", new.attempt, old.attempt, new.url)
    _remove(catalog, new, attempts)
    return new


def _keep_copy(catalog: Catalog, new: Checkpoint) -> None:
    """Keep the new manifest beside its index, too, until the next save replaces it: a late delete may take the first.

    A URL of its own has one key for all its manifests, and not every store binds a delete to what stood there.
    """
    try:
        catalog.store.create(set_aside_key(new.attempt), new.manifest.encode())
    except CloudCkptError as exc:
        logger.warning("%s has no second copy of its manifest, should a late delete take the first: %s", new.url, exc)


def _attempts_of(catalog: Catalog, checkpoint: Checkpoint) -> frozenset[str]:
    """Return under which attempts the objects of a checkpoint stand; its own alone if its index cannot be read."""
    key, committed = index_key(checkpoint.attempt), checkpoint.manifest.index
    own = frozenset({checkpoint.attempt})
    try:
        data = catalog.store.read(key, limit_bytes=0 if committed is None else committed.size_bytes)
        return own | Index.decode(data, key=key).attempts
    except CloudCkptError as exc:
        logger.warning("the index of %s, which is replaced, cannot be read, so objects of it may stay: %s", key, exc)
        return own


def _put_back(catalog: Catalog, old: Checkpoint) -> None:
    try:
        catalog.recommit(old.manifest.encode(), prefix=old.prefix)
    except CloudCkptError as exc:
        logger.error(  # noqa: TRY400 (what is raised is why the save failed)
            "%s is not committed any more and could not be put back (%s): copy %s/%s to %s/%s",
            *(old.url, exc, old.url, set_aside_key(old.attempt), old.url, MANIFEST_NAME),
        )


def _remove(catalog: Catalog, new: Checkpoint, replaced: frozenset[str]) -> None:
    """Delete the objects of a checkpoint that is no more, and attempts that were cut off; what stays is an orphan.

    No sweep comes to a URL without a root. What an attempt keeps to have an older checkpoint back is out of date now.
    """
    try:
        below: dict[str, list[ObjectInfo]] = {}
        for info in catalog.store.list("").objects:
            below.setdefault(info.key.partition("/")[0], []).append(info)
        # The newest thing there was written just now.
        now_s = max((info.modified_s for found in below.values() for info in found), default=0.0)
        old = {
            attempt
            for attempt, found in below.items()
            if is_attempt(attempt) and now_s - max(info.modified_s for info in found) >= _ABANDONED_S
        }
        # Of several ranks through DCP each has an attempt of its own.
        gone = (replaced | (old - _attempts_of(catalog, new) if old else old)) - {new.attempt}
        keys = [info.key for attempt in gone for info in below.get(attempt, ())]
        delete_below(catalog.store, keys, below=[f"{attempt}/" for attempt in gone])
    except StorageError as exc:
        logger.warning("objects of the replaced checkpoint stay at %s: %s", catalog.store.url, exc)
