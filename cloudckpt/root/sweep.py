"""Remove what killed jobs left behind: attempts of older epochs that never committed, and pruned leftovers.

    one flat listing ──▶ Orphan, of a prefix without a commit ──old enough──▶ void ──▶ listed again ──▶ objects deleted
                          ╰── pinned: put back, never removed                  ╰── nobody can be alive ──▶ void deleted
                          ╰── what others share stays, under the void one

An orphan is voided before its objects go, so that a zombie's late commit loses to the sweep, or the sweep to it, and
never both succeed (FORMAT invariant 9). The void manifest stays as long as a zombie could be alive: it is what keeps
it from committing to nothing. Ages are told by the store's clock alone; only a dry run, which writes nothing, takes the
local one for it. On a disk, what killed writers did not finish goes, too. Knows the catalog and its store; knows
nothing of tensors.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from cloudckpt.errors import StorageError
from cloudckpt.format import (
    EPOCHS_PREFIX,
    MANIFEST_NAME,
    PINS_PREFIX,
    parse_checkpoint_prefix,
    parse_name_key,
    parse_pin_key,
)
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.claims import highest_claim
from cloudckpt.root.pins import Named
from cloudckpt.root.removal import delete_below, nested
from cloudckpt.root.sharing import Shared, shared_below
from cloudckpt.store import ObjectInfo, Store, one_deadline, scrub

__all__ = ["Orphan", "find_orphans", "remove_orphan", "remove_unfinished", "sweep"]

# No process outlives the loss of its epoch by a week: long before, it has met the fence or its own deadlines.
_VOID_S = 7 * 86_400.0
_CLOCK = re.compile(rf"\A{EPOCHS_PREFIX}clock-[0-9a-f]{{16}}\Z")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Objects of a prefix that never was, or no longer is, a checkpoint.

    Attributes:
        prefix: below the root, with its slash.
        object_count: objects, the void manifest of an earlier sweep not counted; 0 where that is all.
        total_bytes: their size.
        age_s: seconds since the newest of them was written, by the store's clock.
        may_be_shared: whether checkpoints of this root share anything; what they do share of this is not counted.
    """

    prefix: str
    object_count: int
    total_bytes: int
    age_s: float
    may_be_shared: bool = False

    def is_due(self, older_than_s: float) -> bool:
        """Tell whether it is old enough to go; a void manifest alone only when no zombie can be alive."""
        return self.age_s >= (older_than_s if self.object_count else max(older_than_s, _VOID_S))


def sweep(
    catalog: Catalog, *, older_than_s: float, dry_run: bool, clock: Callable[[], float] = time.time
) -> list[Orphan]:
    """Void and remove orphans; return what was removed, or would be in a dry run, which writes nothing.

    Their epoch is not the highest that was claimed, and their newest object is older than `older_than_s`: no running
    job can own them any more. One flat listing, and one more for each that goes. On a disk, unfinished objects of
    killed writers go as well, untold.

    Args:
        catalog: the root's.
        older_than_s: by the store's clock; in a dry run by `clock`.
        dry_run: remove nothing.
        clock: seconds since 1970, taken for the store's.
    """
    found = find_orphans(catalog, older_than_s=older_than_s, clock=clock if dry_run else None)
    due = [orphan for orphan in found if orphan.is_due(older_than_s)]
    if dry_run:
        return due
    removed: list[Orphan] = []
    try:
        removed.extend(orphan for orphan in due if remove_orphan(catalog, orphan))
        remove_unfinished(catalog.store, older_than_s=older_than_s)
    except KeyboardInterrupt as exc:
        exc.add_note(f"{len(removed)} of {len(due)} were removed whole; the rest stays for another sweep")
        raise
    return removed


def find_orphans(catalog: Catalog, *, older_than_s: float, clock: Callable[[], float] | None = None) -> list[Orphan]:
    """Return what no checkpoint owns, whatever its age; of the highest epoch nothing, because that may be at work.

    A pinned checkpoint whose manifest is gone is no orphan, but put back, and names of what never was committed go,
    unless `clock` says that nothing is written.

    Args:
        catalog: the root's.
        older_than_s: how old an object must be by which somebody read the store's clock, and was killed, to be removed.
        clock: is believed, so that nothing is written to the store to read its own.
    """
    listed = _Listed.of(catalog.store.list("").objects)
    if clock is None:
        for prefix in listed.uncommitted_pins():
            catalog.put_back(prefix)
    highest = highest_claim(listed.claims)
    if clock is None:
        catalog.pins.take(listed.idle_names(highest))
    left = {
        prefix: found
        for prefix, found in listed.below.items()
        if prefix not in listed.pinned
        and _is_orphan(catalog, prefix, found, highest)
        and not _holds_another(catalog, prefix, found)
    }
    shared = shared_below(catalog, left, committed=listed.committed(), pinned=listed.pinned)
    left = {prefix: found for prefix, found in left.items() if not _is_all_shared(prefix, found, shared)}
    if not (left or listed.clocks):
        return []
    if clock is None:
        try:
            now_s = _now_s(catalog.store, listed.clocks, older_than_s)
        except StorageError as exc:
            if not exc.is_full:
                raise
            # What was written last may be old: so ages are only told too low, which spares.
            now_s = min(listed.newest_s, time.time())
    else:
        # Whatever the local clock says, nothing was written in the future.
        now_s = max(clock(), *(info.modified_s for found in left.values() for info in found), 0.0)
    return [_orphan(prefix, found, now_s, shared) for prefix, found in left.items()]


@dataclass(slots=True)
class _Listed:
    """What one flat listing of a root shows, by what it is."""

    claims: list[str] = field(default_factory=list)
    clocks: list[ObjectInfo] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)
    names: list[Named] = field(default_factory=list)
    below: dict[str, list[ObjectInfo]] = field(default_factory=dict)
    newest_s: float = 0.0

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> Self:
        listed = cls()
        for info in objects:
            listed.newest_s = max(listed.newest_s, info.modified_s)
            top = info.key.partition("/")[0] + "/"
            if _CLOCK.match(info.key):
                listed.clocks.append(info)
            elif top == EPOCHS_PREFIX:
                listed.claims.append(info.key)
            elif top == PINS_PREFIX:
                listed.pinned.update(filter(None, [parse_pin_key(info.key)]))
                listed.names += [Named(*found) for found in [parse_name_key(info.key)] if found is not None]
            elif parse_checkpoint_prefix(top):
                listed.below.setdefault(top, []).append(info)
        return listed

    def committed(self) -> set[str]:
        """Return the prefixes at which a manifest stands."""
        return {top for top, found in self.below.items() if any(one.key == top + MANIFEST_NAME for one in found)}

    def idle_names(self, highest: int) -> list[Named]:
        """Return what gives a name to nothing, nor ever will: of older epochs, where no manifest stands."""
        kept = self.committed() | self.pinned
        return [one for one in self.names if one.order[0] < highest and one.prefix not in kept]

    def uncommitted_pins(self) -> list[str]:
        """Return the prefixes that are pinned, and at which something stands, but no manifest."""
        pinned = sorted(self.pinned & self.below.keys())
        return [prefix for prefix in pinned if all(one.key != prefix + MANIFEST_NAME for one in self.below[prefix])]


def _is_orphan(catalog: Catalog, prefix: str, found: Sequence[ObjectInfo], highest: int) -> bool:
    """Tell whether nothing is committed there; a manifest that cannot be read counts as a commit."""
    place = parse_checkpoint_prefix(prefix)
    if place is None or place[1] >= highest:
        return False
    return all(info.key != prefix + MANIFEST_NAME for info in found) or catalog.is_void(prefix)


def _holds_another(catalog: Catalog, prefix: str, found: Sequence[ObjectInfo]) -> bool:
    """Tell whether checkpoints stand below the prefix, which somebody has saved or copied there; the log names one."""
    others = nested(prefix, [info.key for info in found])
    if others:
        logger.warning(
            "%s of %s is no checkpoint any more, and stays with all that is left of it, because a checkpoint stands "
            "below it, at %s: move that one elsewhere",
            *(prefix, catalog.store.url, others[0]),
        )
    return bool(others)


def _is_all_shared(prefix: str, found: Sequence[ObjectInfo], shared: Shared) -> bool:
    """Tell whether what stands there is others' alone, beside a void manifest; nothing is, where nothing is shared."""
    rest = [info.key for info in found if info.key != prefix + MANIFEST_NAME]
    return bool(rest) and all(map(shared.spares, rest))


def _orphan(prefix: str, found: Sequence[ObjectInfo], now_s: float, shared: Shared) -> Orphan:
    own = [info for info in found if info.key != prefix + MANIFEST_NAME]
    rest = [info for info in own if not shared.spares(info.key)]
    return Orphan(
        prefix=prefix,
        object_count=len(rest),
        total_bytes=sum(info.size_bytes for info in rest),
        age_s=now_s - max(info.modified_s for info in rest or found),
        may_be_shared=shared.is_used,
    )


@one_deadline()
def _now_s(store: Store, left: Sequence[ObjectInfo], older_than_s: float) -> float:
    """Return the store's clock: the time that it gives to an object written just now; old such objects go with it."""
    key = f"{EPOCHS_PREFIX}clock-{secrets.token_hex(8)}"
    store.put(key, [memoryview(b"now")])
    old = [key]
    try:
        now_s = store.head(key).modified_s
        old += [info.key for info in left if now_s - info.modified_s >= older_than_s]
        return now_s
    finally:
        try:
            store.delete(old)
        except StorageError as exc:
            # What kept the clock from being read, if anything did, is what is raised.
            logger.warning("the object %r stays on %s: %s", key, store.url, exc)


def remove_orphan(catalog: Catalog, orphan: Orphan, *, go_on: Callable[[], bool] = lambda: True) -> bool:
    """Void an orphan and delete its objects; of one that is a void manifest alone, that.

    False if one committed; or if it is pinned by now, so that it is put back, or stays as it is where it is void.
    """
    if catalog.pins.is_pinned(orphan.prefix):
        catalog.put_back(orphan.prefix)
        return False
    is_voided = catalog.void(orphan.prefix, is_sharing=orphan.may_be_shared)
    if not is_voided or catalog.pins.is_pinned(orphan.prefix):
        return False
    # Asked again, now that nobody refers to it any more unseen.
    shared = shared_below(catalog, [orphan.prefix]) if orphan.may_be_shared else Shared()
    # Listed again: what a zombie has put since then goes, too.
    keys = [info.key for info in catalog.store.list(orphan.prefix).objects]
    rest = [key for key in keys if key != orphan.prefix + MANIFEST_NAME and not shared.spares(key)]
    is_gone = delete_below(catalog.store, rest, below=[orphan.prefix], go_on=go_on)
    if not orphan.object_count and len(keys) <= 1:
        catalog.unvoid(orphan.prefix)
    return is_gone


def remove_unfinished(store: Store, *, older_than_s: float) -> float:
    """Remove what killed writers did not finish, on a disk; return in how many seconds more of it is old enough."""
    return scrub(store, older_than_s=older_than_s, is_ours=_is_ours)


def _is_ours(directory: str) -> bool:
    return f"{directory}/" == EPOCHS_PREFIX or parse_checkpoint_prefix(f"{directory}/") is not None
