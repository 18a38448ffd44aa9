"""Read the roots of one job as one history: the one that it saves to, and the one that takes saves when that is down.

A job's epochs grow over both roots, as `destination` claims them, so that (epoch, step) says of any two checkpoints
which is newer, wherever they are; of two that are equal the first root's is taken. A root that cannot be read is never
one where nothing is: what asks for the newest raises then, rather than going back in time. Keeps FORMAT invariant 10.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Literal

from cloudckpt.errors import CheckpointNotFoundError, ManifestError
from cloudckpt.format import parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Survey, best_first

__all__ = ["Roots"]


class Roots:
    """One or two roots of one job.

    Attributes:
        catalogs: of each; the first is where saves go.
    """

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        """Read these as one."""
        self.catalogs = tuple(catalogs)

    @property
    def url(self) -> str:
        """Where saves go."""
        return self.catalogs[0].store.url

    def catalog_of(self, checkpoint: Checkpoint) -> Catalog:
        """Return the catalog of the root that holds a checkpoint; the first, if none does."""
        return next((one for one in self.catalogs if one.holds(checkpoint)), self.catalogs[0])

    def stands(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a checkpoint is still the one that is committed there; it may have been pruned meanwhile."""
        return self.catalog_of(checkpoint).is_still(checkpoint)

    def newest_first(self) -> Iterator[Checkpoint | ManifestError]:
        """Yield what all roots hold from the newest down, as `Catalog.newest_first` does."""
        ways = [one.newest_first() for one in self.catalogs]
        return iter(heapq.merge(*ways, key=_order_of, reverse=True))

    def newest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint, or None when none was ever committed; raises as `Catalog.newest`."""
        found, unreadable = [], []
        for catalog in self.catalogs:
            try:
                found.append(catalog.newest())
            except ManifestError as exc:
                unreadable.append(exc)
        readable = [one for one in found if one is not None]
        if unreadable and not readable:
            raise unreadable[0]
        return max(readable, key=lambda one: one.order, default=None)

    def all(self) -> list[Checkpoint]:
        """Return every readable checkpoint, oldest first by (epoch, step); raises as `Catalog.all` does."""
        return self.catalogs[0].readable(self.survey())

    def survey(self) -> Survey:
        """Look at all that stands below all roots, as `Catalog.survey` does."""
        surveys = [one.survey() for one in self.catalogs]
        # The first root's last, so that it stands for both.
        found = {one.order: one for survey in reversed(surveys) for one in survey.checkpoints}
        return Survey.of([*found.values(), *(one for survey in surveys for one in survey.unreadable)])

    def best(self, metric: str, mode: Literal["min", "max"]) -> Checkpoint | None:
        """Return the best by a metric, as `Catalog.best` does."""
        return next(iter(best_first(self.all(), metric, mode)), None)

    def find(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, of the newest epoch that committed it.

        Raises:
            CheckpointNotFoundError: no epoch committed that step, in any root.
            ManifestError: it cannot be read, in any root that holds it.
        """
        found = self.holders(step)[0][1]
        if isinstance(found, ManifestError):
            raise found
        return found

    def holders(self, step: int) -> list[tuple[Catalog, Checkpoint | ManifestError]]:
        """Return the catalogs that hold that checkpoint, what can be read first; raises as `find` does."""
        found, missing = [], []
        for catalog in self.catalogs:
            try:
                found.append((catalog, catalog.what_is(step)))
            except CheckpointNotFoundError as exc:
                missing.append(exc)
        if not found:
            raise CheckpointNotFoundError("; ".join(map(str, missing))) from missing[0]
        newest = max(_order_of(one) for _, one in found)
        same = [one for one in found if _order_of(one[1]) == newest]
        return sorted(same, key=lambda one: isinstance(one[1], ManifestError))


def _order_of(found: Checkpoint | ManifestError) -> tuple[int, int]:
    """Return (epoch, step), of one that cannot be read by its place."""
    if isinstance(found, Checkpoint):
        return found.order
    place = parse_checkpoint_prefix(f"{found.key.partition('/')[0]}/")
    return (0, 0) if place is None else place[::-1]
