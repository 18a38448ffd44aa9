"""Say what stands at a URL that is no checkpoint, and what to do: people mistake one thing for another.

Asked only after a manifest was not found. Keeps FORMAT invariant 7: what a cut-off replacement left is told, and stays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cloudckpt.errors import BucketNotFoundError, ManifestError, StorageError
from cloudckpt.format import MANIFEST_NAME, is_attempt, parse_checkpoint_prefix
from cloudckpt.root.claims import Claims
from cloudckpt.store import Listing, Store

__all__ = ["refuse_lost", "set_aside_key", "what_is_there"]

logger = logging.getLogger(__name__)

_NOTHING = "list what is there with `cloudckpt ls`"
# One claim tells of all before it; those that a job left which has not restored tell nothing.
_CLAIMS = 16


def set_aside_key(attempt: str) -> str:
    """Return where the manifest of a checkpoint is kept while the next one at the same URL takes its place."""
    return f"{attempt}/{MANIFEST_NAME}"


def what_is_there(store: Store, prefix: str) -> str:
    """Return a clause for an error: what was found below `prefix` in place of a manifest, and the next action.

    Raises:
        BucketNotFoundError: nothing can be there. Of an object alone not every store tells that its bucket is missing.
    """
    if prefix:
        return _NOTHING
    try:
        top = store.list("", delimiter="/")
        return _mistaken(store, top) or _unfinished(store, top) or _NOTHING
    except BucketNotFoundError:
        raise
    except StorageError:
        # A listing may be refused where reading is not; what is raised is that nothing is committed.
        return _NOTHING


def refuse_lost(url: str, attempts: Sequence[str], claims: Claims) -> None:
    """Warn of attempts, newest first, where nothing is committed.

    Raises:
        ManifestError: something was: a claim says that its job went on from a checkpoint.
    """
    for epoch in claims.epochs()[:_CLAIMS]:
        claim = claims.read(epoch)
        links = [] if claim is None else [link for link in (claim.resumed_from, *(claim.line or ())) if link]
        if not links:
            continue
        went_on = f"the job of epoch {epoch} went on from step {links[0][0]}"
        raise ManifestError(
            f"nothing is committed at {url}, though {went_on}, and {len(attempts)} attempts stand there without a "
            "manifest: the manifests were removed, by hand or by a lifecycle rule. Have them back from a backup, such "
            f"as {attempts[0]}{MANIFEST_NAME}; to start afresh, save without a restore, or to another root",
            key=attempts[0] + MANIFEST_NAME,
        )
    logger.warning(
        "nothing is committed at %s, but %d attempts stand there without a manifest (the newest: %s): jobs were "
        "stopped in their first save, or manifests were removed",
        *(url, len(attempts), attempts[0]),
    )


def _mistaken(store: Store, top: Listing) -> str:
    names = {info.key for info in top.objects}
    if ".metadata" in names or any(name.endswith((".distcp", ".metadata")) for name in names):
        return (
            "it is one of torch.distributed.checkpoint's own format (.metadata, .distcp). To import it, load it with "
            "torch.distributed.checkpoint.load and its FileSystemReader (FsspecReader for a bucket), then save the "
            "state with cloudckpt.save or a CloudWriter"
        )
    steps = [name for name in top.prefixes if parse_checkpoint_prefix(name)]
    if steps:
        return (
            f"it is the root of a CheckpointManager with {len(steps)} steps; restore through CheckpointManager, or "
            f"give the URL of one step such as {store.url.removesuffix('/')}/{steps[-1].rstrip('/')}"
        )
    return ""


def _unfinished(store: Store, top: Listing) -> str:
    attempts = [name for name in top.prefixes if is_attempt(name.rstrip("/"))]
    if not attempts:
        return ""
    kept = {set_aside_key(name.rstrip("/")) for name in attempts}
    aside = [info for info in store.list("").objects if info.key in kept]
    root = store.url.removesuffix("/")
    if aside:
        newest = max(aside, key=lambda info: info.modified_s)
        return (
            "a save that was to replace the checkpoint there is under way, or was cut off, or the store has carried "
            f"out a delete of it late: copy {root}/{newest.key} to {root}/{MANIFEST_NAME} to have the checkpoint back, "
            "or save again"
        )
    return f"{len(attempts)} attempts to save there are under way, or were cut off before they committed"
