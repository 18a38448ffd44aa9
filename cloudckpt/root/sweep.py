"""Remove what killed jobs left behind: attempts of older epochs that never committed, and pruned leftovers.

    one flat listing ──▶ Orphan, of a prefix without a commit ──old enough──▶ void ──▶ listed again ──▶ objects deleted
                                                                               ╰── nobody can be alive ──▶ void deleted

An orphan is voided before its objects go, so that a zombie's late commit loses to the sweep, or the sweep to it, and
never both succeed (FORMAT invariant 9). The void manifest stays as long as a zombie could be alive: it is what keeps
it from committing to nothing. Ages are told by the store's clock alone. Knows the catalog and its store; knows nothing
of tensors.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloudckpt.errors import StorageError
from cloudckpt.format import EPOCHS_PREFIX, MANIFEST_NAME, parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.claims import highest_claim
from cloudckpt.root.removal import delete_below
from cloudckpt.store import ObjectInfo, Store, one_deadline

__all__ = ["Orphan", "find_orphans", "remove_orphan", "sweep"]

# No process outlives the loss of its epoch by a week: long before, it has met the fence or its own deadlines.
_VOID_S = 7 * 86_400.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Objects of a prefix that never was, or no longer is, a checkpoint.

    Attributes:
        prefix: below the root, with its slash.
        object_count: objects, the void manifest of an earlier sweep not counted; 0 where that is all.
        total_bytes: their size.
        age_s: seconds since the newest of them was written, by the store's clock.
    """

    prefix: str
    object_count: int
    total_bytes: int
    age_s: float

    def is_due(self, older_than_s: float) -> bool:
        """Tell whether it is old enough to go; a void manifest alone only when no zombie can be alive."""
        return self.age_s >= (older_than_s if self.object_count else max(older_than_s, _VOID_S))


def sweep(catalog: Catalog, *, older_than_s: float, dry_run: bool) -> list[Orphan]:
    """Void and remove orphans; return what was removed, or would be in a dry run.

    Their epoch is not the highest that was claimed, and their newest object is older than `older_than_s`: no running
    job can own them any more. One flat listing, and one more for each that goes.
    """
    due = [orphan for orphan in find_orphans(catalog) if orphan.is_due(older_than_s)]
    return due if dry_run else [orphan for orphan in due if remove_orphan(catalog, orphan)]


def find_orphans(catalog: Catalog) -> list[Orphan]:
    """Return what no checkpoint owns, whatever its age; of the highest epoch nothing, because that may be at work."""
    claims: list[str] = []
    below: dict[str, list[ObjectInfo]] = {}
    for info in catalog.store.list("").objects:
        top = info.key.partition("/")[0] + "/"
        if top == EPOCHS_PREFIX:
            claims.append(info.key)
        elif parse_checkpoint_prefix(top):
            below.setdefault(top, []).append(info)
    highest = highest_claim(claims)
    left = {prefix: found for prefix, found in below.items() if _is_orphan(catalog, prefix, found, highest)}
    now_s = _now_s(catalog.store) if left else 0.0
    return [_orphan(prefix, found, now_s) for prefix, found in left.items()]


def _is_orphan(catalog: Catalog, prefix: str, found: Sequence[ObjectInfo], highest: int) -> bool:
    """Tell whether nothing is committed there; a manifest that cannot be read counts as a commit."""
    place = parse_checkpoint_prefix(prefix)
    if place is None or place[1] >= highest:
        return False
    return all(info.key != prefix + MANIFEST_NAME for info in found) or catalog.is_void(prefix)


def _orphan(prefix: str, found: Sequence[ObjectInfo], now_s: float) -> Orphan:
    rest = [info for info in found if info.key != prefix + MANIFEST_NAME]
    return Orphan(
        prefix=prefix,
        object_count=len(rest),
        total_bytes=sum(info.size_bytes for info in rest),
        age_s=now_s - max(info.modified_s for info in rest or found),
    )


@one_deadline()
def _now_s(store: Store) -> float:
    """Return the store's clock: the time that it gives to an object written just now."""
    key = f"{EPOCHS_PREFIX}clock-{secrets.token_hex(8)}"
    store.put(key, [memoryview(b"now")])
    try:
        return store.head(key).modified_s
    finally:
        try:
            store.delete([key])
        except StorageError as exc:
            # What kept the clock from being read, if anything did, is what is raised.
            logger.warning("the object %r stays on %s: %s", key, store.url, exc)


def remove_orphan(catalog: Catalog, orphan: Orphan, *, go_on: Callable[[], bool] = lambda: True) -> bool:
    """Void an orphan and delete its objects; of one that is a void manifest alone, that. False if one committed."""
    if not catalog.void(orphan.prefix):
        return False
    # Listed again: what a zombie has put since then goes, too.
    keys = [info.key for info in catalog.store.list(orphan.prefix).objects]
    rest = [key for key in keys if key != orphan.prefix + MANIFEST_NAME]
    is_gone = delete_below(catalog.store, rest, below=[orphan.prefix], go_on=go_on)
    if not orphan.object_count and not rest:
        catalog.unvoid(orphan.prefix)
    return is_gone
