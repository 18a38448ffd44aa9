"""Say all that stands below a root, for a person: checkpoints, those that are unreadable, and what no commit owns.

Knows the catalog, and what was read before; writes nothing to the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cloudckpt.options import READERS
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Survey, Unreadable
from cloudckpt.root.known import Known, ManifestCache
from cloudckpt.root.naming import names_given
from cloudckpt.root.pins import Pin
from cloudckpt.root.sweep import Orphan
from cloudckpt.store import ObjectInfo
from cloudckpt.threads import each

__all__ = ["Overview", "overview"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What stands below a root.

    Attributes:
        checkpoints: what is committed and can be read, oldest first by (epoch, step).
        unreadable: what cannot be read, in the same order.
        unfinished: prefixes without a commit, by name: a save under way, one that was cut off, or what a removal has
            left. Their age is by this machine's clock.
        pins: of the root, also of what is not committed.
        names: (epoch, step) → the names of the checkpoint.
        unchecked: how many checkpoints were taken for standing because their prefixes are listed, and no more.
        check_request_count: what a look at each of them would cost; 0 where there was one.
    """

    checkpoints: Sequence[Checkpoint]
    unreadable: Sequence[Unreadable]
    unfinished: Sequence[Orphan]
    pins: Sequence[Pin] = ()
    names: Mapping[tuple[int, int], Sequence[str]] = field(default_factory=dict)
    unchecked: int = 0
    check_request_count: int = 0


def overview(
    catalog: Catalog,
    cache: ManifestCache | None = None,
    *,
    is_quick: bool | None = False,
    clock: Callable[[], float] = time.time,
) -> Overview:
    """Look at a root: a listing, one request for each manifest that is not in `cache`, each unfinished prefix and pin.

    With a cache that knows most of it, one flat listing tells which of them stand, and nothing more is asked.

    Args:
        catalog: the root's.
        cache: manifests of before; what is read now is kept there. Of a disk nothing is: it is read as fast.
        is_quick: let what is known count as committed wherever its prefix is listed, in the fewest requests; one whose
            removal has only begun counts, too. None: where to look at each would take more than ten
            requests, one after the other.
        clock: seconds since 1970, to tell ages.

    Raises:
        StorageError: the store cannot be listed or reached.
    """
    store, unchecked, check_request_count = catalog.store, 0, 0
    if cache is None or store.engine == "local":
        survey, below = catalog.survey(), dict[str, list[ObjectInfo]]()
    else:
        known = Known(cache.manifests(store), is_quick=is_quick)
        survey, below = catalog.survey(known), known.below
        cache.keep(store, survey.checkpoints, known.manifests)
        if known.is_quick:
            unchecked = sum(one.prefix in known.manifests for one in survey.checkpoints)
            check_request_count = known.look_count if unchecked else 0
    held = catalog.held_seen()
    return Overview(
        checkpoints=survey.checkpoints,
        unreadable=survey.unreadable,
        unfinished=_unfinished(catalog, survey, below, clock()),
        pins=catalog.pins.all(held),
        names=names_given(held, survey.checkpoints),
        unchecked=unchecked,
        check_request_count=check_request_count,
    )


def _unfinished(catalog: Catalog, survey: Survey, below: dict[str, list[ObjectInfo]], now_s: float) -> list[Orphan]:
    def look(prefix: str) -> Orphan | None:
        found = below.get(prefix) or catalog.store.list(prefix).objects
        if not found:
            return None  # gone meanwhile
        return Orphan(
            prefix=prefix,
            object_count=len(found),
            total_bytes=sum(info.size_bytes for info in found),
            age_s=max(0.0, now_s - max(info.modified_s for info in found)),
        )

    orphans = each(sorted(survey.undecided), look, threads=READERS, name="cloudckpt-overview")
    return [orphan for orphan in orphans if orphan is not None]
