"""Say what stands at a URL that is no checkpoint, and what to do: people mistake one thing for another.

Asked only after a manifest was not found. Keeps FORMAT invariant 7: what a cut-off replacement left is told, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cloudckpt.errors import BucketNotFoundError, ManifestError, StorageError
from cloudckpt.format import MANIFEST_NAME, is_attempt, parse_checkpoint_prefix
from cloudckpt.root.claims import Claims
from cloudckpt.store import Listing, Store

__all__ = ["lost", "mistaken_for", "set_aside_key", "what_is_there"]

_NOTHING = "list what is there with `cloudckpt ls`"
_WEIGHTS = re.compile(r"\.(?:safetensors(?:\.index\.json)?|bin\.index\.json|pt|pth|ckpt)\Z|\Apytorch_model.*\.bin\Z")
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
    return (not prefix and mistaken_for(store)) or _NOTHING


def mistaken_for(store: Store) -> str:
    """Return a clause that says what stands at a URL that is no checkpoint, and the next action; "" if nothing known.

    Raises:
        BucketNotFoundError: nothing can be there.
    """
    try:
        top = store.list("", delimiter="/")
        return _mistaken(store, top) or _unfinished(store, top)
    except BucketNotFoundError:
        raise
    except StorageError:
        # A listing may be refused where reading is not; what is raised is that nothing is committed.
        return ""


def lost(url: str, attempts: Sequence[str], claims: Claims) -> ManifestError | None:
    """Return what tells that something was committed at a root where nothing is; None if nothing speaks for it.

    For it speak the mark of a first commit, and what a claim says that its job went on from; against it, that all of
    it was deleted by `delete`.

    Args:
        url: of the root.
        attempts: prefixes that stand there, newest first.
        claims: of the root.
    """
    why = _history(claims)
    if not why:
        return None
    left = f"{len(attempts)} attempts stand there without a manifest" if attempts else "no attempt stands there"
    such = f", such as {attempts[0]}{MANIFEST_NAME}" if attempts else ""
    return ManifestError(
        f"nothing is committed at {url}, though {why}, and {left}: the manifests were removed, by hand or by a "
        f"lifecycle rule. Have them back from a backup{such}; to start afresh, save without a restore, or to another "
        "root",
        key=attempts[0] + MANIFEST_NAME if attempts else "",
    )


def _history(claims: Claims) -> str:
    """Say which epoch has committed something that nobody has deleted; "" if none has, as far as is known."""
    epochs = claims.epochs()
    for epoch in [epoch for epoch in epochs if epoch > claims.emptied][:_CLAIMS]:
        claim = claims.read(epoch)
        links = [] if claim is None else [link for link in (claim.resumed_from, *(claim.line or ())) if link]
        if links and max(of for _, of in links) > claims.emptied:
            return f"the job of epoch {epoch} went on from step {links[0][0]}"
    return f"the job of epoch {claims.marked} has committed there" if claims.marked > claims.emptied else ""


def _mistaken(store: Store, top: Listing) -> str:
    names = {info.key for info in top.objects}
    if ".metadata" in names or any(name.endswith((".distcp", ".metadata")) for name in names):
        return (
            "it is one of torch.distributed.checkpoint's own format (.metadata, .distcp). `cloudckpt import` makes a "
            "checkpoint of it; or load it with torch.distributed.checkpoint.load and its FileSystemReader "
            "(FsspecReader for a bucket), then save the state with cloudckpt.save or a CloudWriter"
        )
    weights = [name for name in sorted(names) if _WEIGHTS.search(name)]
    if weights:
        return (
            f"it is a folder of another format ({weights[0]}): a model of Hugging Face's, safetensors or torch.save. "
            "`cloudckpt import` makes a checkpoint of it"
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
    return (
        f"{len(attempts)} attempts to save there are under way, or were cut off before they committed; what is pinned "
        "its root still finds, and `cloudckpt sweep` of that puts it back"
    )
