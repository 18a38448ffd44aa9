"""Remove what killed jobs left behind: attempts of older epochs that never committed, and pruned leftovers.

An orphan is voided before its objects go, so that a zombie's late commit loses to the sweep, or the sweep to it, and
never both succeed (FORMAT invariant 9). The void manifest stays: it is what keeps the zombie from committing to
nothing. Ages are told by the store's clock alone. Knows the catalog and its store; knows nothing of tensors.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.errors import StorageError
from cloudckpt.format import EPOCHS_PREFIX, MANIFEST_NAME
from cloudckpt.root.catalog import Catalog
from cloudckpt.store import ObjectInfo, Store, one_deadline

__all__ = ["Orphan", "sweep"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Objects of a prefix that never was, or no longer is, a checkpoint.

    Attributes:
        prefix: below the root, with its slash.
        object_count: objects, the void manifest of an earlier sweep not counted.
        total_bytes: their size.
        age_s: seconds since the newest of them was written, by the store's clock.
    """

    prefix: str
    object_count: int
    total_bytes: int
    age_s: float


def sweep(catalog: Catalog, *, older_than_s: float, dry_run: bool) -> list[Orphan]:
    """Void and remove orphans; return what was removed, or would be in a dry run.

    Their epoch is not the highest that was claimed, and their newest object is older than `older_than_s`: no running
    job can own them any more.
    """
    orphans = _orphans(catalog, older_than_s=older_than_s)
    if dry_run:
        return orphans
    return [orphan for orphan in orphans if _remove(catalog, orphan)]


def _orphans(catalog: Catalog, *, older_than_s: float) -> list[Orphan]:
    highest = catalog.highest_epoch()
    now_s: float | None = None
    found = []
    for prefix, (epoch, _) in catalog.places().items():
        rest = () if epoch >= highest or catalog.knows(prefix) else _uncommitted(catalog, prefix)
        if not rest:
            continue
        now_s = _now_s(catalog.store) if now_s is None else now_s
        age_s = now_s - max(info.modified_s for info in rest)
        if age_s >= older_than_s:
            total_bytes = sum(info.size_bytes for info in rest)
            found.append(Orphan(prefix=prefix, object_count=len(rest), total_bytes=total_bytes, age_s=age_s))
    return found


def _uncommitted(catalog: Catalog, prefix: str) -> Sequence[ObjectInfo]:
    """Return a prefix's objects if nothing is committed there; a manifest that cannot be read counts as a commit."""
    objects = catalog.store.list(prefix).objects
    rest = [info for info in objects if info.key != prefix + MANIFEST_NAME]
    return rest if len(rest) == len(objects) or catalog.is_void(prefix) else ()


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


def _remove(catalog: Catalog, orphan: Orphan) -> bool:
    if not catalog.void(orphan.prefix):
        return False
    # Listed again: what a zombie has put since then goes, too.
    catalog.store.delete([info.key for info in _uncommitted(catalog, orphan.prefix)])
    return True
