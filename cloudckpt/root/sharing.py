"""Keep shards that several checkpoints share as long as one of them stands.

    save    base stands? ──▶ manifest created ──▶ base stands still? ──▶ acknowledged
    remove  `void` created ──▶ manifests listed, then pins ──▶ what they name is spared, the rest goes

Whoever saves refers to shards of its *base* alone, or to what that refers to. A removal that has listed before the new
manifest was there has seen the base, if that stands after it, or its pin: so the same shards are spared. Where the base
is gone by then, no holder may be void: a removal that is yet to begin will see the new manifest. A holder of which
something is spared stays void, so that nobody takes it for whole, or for nobody's. Keeps FORMAT invariants 5, 7 and 17.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    ManifestError,
    SaveFailedError,
    StorageError,
)
from cloudckpt.format import Manifest, parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.holders import shared_keys_of

__all__ = ["BaseGoneError", "Shared", "commit_sharing", "shared_below"]

logger = logging.getLogger(__name__)


class BaseGoneError(SaveFailedError):
    """The checkpoint whose shards a save was to share is gone; nothing was committed, and all may be sent again."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What committed checkpoints name of others that are being removed.

    Attributes:
        keys: of these objects.
        below: prefixes of which nobody can tell what is named there.
        is_used: whether a younger one shares anything, or may: without, none that comes can share what is removed.
    """

    keys: frozenset[str] = frozenset()
    below: tuple[str, ...] = ()
    is_used: bool = False

    def spares(self, key: str) -> bool:
        """Tell whether an object has to stay."""
        return key in self.keys or key.startswith(self.below)


def commit_sharing(catalog: Catalog, manifest: Manifest, *, prefix: str, base: Checkpoint) -> Checkpoint:
    """Commit what shares shards with its base; raises as `Catalog.commit`.

    Raises:
        BaseGoneError: the base is gone; nothing was committed.
        SaveFailedError: it went while this was committed, and shards with it; it is uncommitted again.
        CommitUnknownError: it is committed, and nobody can tell whether the base is there.
    """
    if not catalog.is_still(base):
        raise BaseGoneError(f"{base.url}, whose shards step {manifest.step} was to share, was removed meanwhile")
    made = catalog.commit(manifest, prefix=prefix)
    try:
        lack = "" if catalog.is_still(base) else catalog.lack_of_others(made)
        if lack:
            catalog.uncommit(prefix)
    except StorageError as exc:
        raise CommitUnknownError(
            f"{made.url} is committed, and shares shards with {base.url}, of which the store does not tell whether it "
            f"is there: {exc}",
            op="create",
            key=prefix,
        ) from exc
    if lack:
        raise SaveFailedError(
            f"step {manifest.step} was not committed: {base.url}, whose shards it shares, was removed at that moment, "
            f"and {lack}; save again, and all of it is sent"
        )
    return made


def shared_below(
    catalog: Catalog,
    prefixes: Collection[str],
    *,
    committed: Collection[str] | None = None,
    pinned: Collection[str] | None = None,
) -> Shared:
    """Return what of the objects below prefixes without a manifest is named by others. A listing, and what is new.

    It holds if it is asked after each of them was made void: what refers to them from then on is not acknowledged.

    Args:
        catalog: the root's.
        prefixes: of what is to be removed.
        committed: prefixes under which a manifest stands, by a listing of before; None asks for one.
        pinned: prefixes of all that is pinned, likewise.

    Raises:
        StorageError: the root cannot be listed or read.
    """
    if not prefixes:
        return Shared()
    oldest = min(map(_order, prefixes))
    found = catalog.places() if committed is None else committed
    asked = [one for one in found if _order(one) > oldest and one not in prefixes]
    survey = catalog.committed(asked)
    keys, below = set[str](), set[str]()
    is_used = any(one.manifest.is_sharing for one in survey.checkpoints)
    # What this process takes for damaged, others may read: not always is it the store that has the wrong bytes.
    if survey.unreadable:
        return _all_of(prefixes, survey.unreadable[0].url, survey.unreadable[0].error)
    told = {one.prefix: one.manifest for one in survey.checkpoints if _refers(one.manifest, prefixes)}
    gone = {prefix for prefix in told if not catalog.is_taken(prefix)}
    told = {prefix: manifest for prefix, manifest in told.items() if prefix not in gone}
    unseen = gone.union(asked).difference(told, (one.prefix for one in survey.checkpoints if one.prefix not in gone))
    if hidden_prefix := next((prefix for prefix in sorted(unseen) if catalog.is_shown(prefix)), None):
        return _all_of(prefixes, hidden_prefix, "a listing shows its manifest, which a read does not find")
    # After the manifests: a pin that was acknowledged was there before its manifest went.
    held = catalog.pins.prefixes() if pinned is None else pinned
    for prefix in [one for one in held if one not in told and _order(one) > oldest]:
        try:
            if (record := catalog.pins.read(prefix)) is not None:
                manifest, _ = record.checkpoint_manifest()
                is_used |= manifest.is_sharing
                told |= {prefix: manifest} if _refers(manifest, prefixes) else {}
        except ManifestError as exc:
            return _all_of(prefixes, prefix, exc)
    for prefix, manifest in told.items():
        try:
            keys |= catalog.once(manifest.sha256, partial(shared_keys_of, catalog.store, prefix, manifest))
        except CloudCkptError as exc:
            logger.warning("which shards %s shares with others cannot be read, so all of theirs stay: %s", prefix, exc)
            below |= {one.prefix for one in manifest.held_elsewhere if one.prefix in prefixes}
    return Shared(frozenset(keys), tuple(below), is_used=is_used)


def _order(prefix: str) -> tuple[int, int]:
    step, epoch = parse_checkpoint_prefix(prefix) or (-1, 0)
    return epoch, step


def _all_of(prefixes: Collection[str], what: str, why: object) -> Shared:
    logger.warning(
        "nobody can tell what %s shares with older checkpoints, so their shards stay until it can be read, or is "
        "deleted by name: %s",
        what,
        why,
    )
    return Shared(below=tuple(prefixes), is_used=True)


def _refers(manifest: Manifest, prefixes: Collection[str]) -> bool:
    return any(one.prefix in prefixes for one in manifest.held_elsewhere)
