"""Read the roots of one job as one history: the one that it saves to, and the one that takes saves when that is down.

A job's epochs grow over both roots, as `destination` claims them, so that (epoch, step) says of any two checkpoints
which is newer, wherever they are; of two that are equal the first root's is taken. A root that cannot be read is never
one where nothing is: what asks for the newest raises then, rather than going back in time. Nor is "none" said where
something tells that there was one: not here, and so nowhere. Keeps FORMAT invariant 10.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal

from cloudckpt.errors import CheckpointNotFoundError, FormatVersionError, ManifestError, StorageError
from cloudckpt.format import parse_checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Survey, Unreadable, best_first

__all__ = ["Roots"]

logger = logging.getLogger(__name__)


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
        return self.catalog_of(checkpoint).stands(checkpoint)

    def newest_first(self) -> Iterator[Checkpoint | ManifestError]:
        """Yield what all roots hold from the newest down, as `Catalog.newest_first` does.

        Raises:
            FormatVersionError: it is the turn of one of a newer format; going past it would silently go back in time.
            ManifestError: nothing is committed, but something was.
            StorageError: a root cannot be listed or read; that is never "none".
        """
        is_empty = True
        lost: ManifestError | None = None
        for _ in range(2):
            ways = [one.newest_first() for one in self.catalogs]
            for found in heapq.merge(*ways, key=_order_of, reverse=True):
                if isinstance(found, FormatVersionError):
                    raise found
                is_empty = False
                yield found
            # A job may have made its first commit since it was looked for.
            if not is_empty or lost is not None or (lost := self._lost()) is None:
                break
        if is_empty and lost is not None:
            raise lost

    def _lost(self) -> ManifestError | None:
        """Return what says that something was committed, where nothing is; None if nothing ever was."""
        return next((error for one in self.catalogs if (error := one.lost()) is not None), None)

    def newest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint, or None when none was ever committed.

        Raises:
            ManifestError: checkpoints are there and none can be read; or none is there, and some were committed.
            FormatVersionError: the newest is of a newer format.
            StorageError: a root cannot be listed or read; that is never "none".
        """
        failures = []
        for found in self.newest_first():
            if isinstance(found, Checkpoint):
                return found
            logger.warning("skipping a checkpoint whose manifest cannot be read: %s", found)
            failures.append(found)
        self._refuse(failures)
        return None

    def refuse(self, unreadable: Sequence[Unreadable]) -> None:
        """Raise why the newest of these, oldest first, cannot be read: nothing can be, where something stands."""
        self._refuse([one.error for one in reversed(unreadable)])

    def _refuse(self, failures: Sequence[ManifestError | StorageError]) -> None:
        """Raise the first of these, if there is one: nothing can be read where something stands."""
        if failures and isinstance(failures[0], StorageError):
            raise failures[0]
        if failures:
            raise ManifestError(
                f"{len(failures)} checkpoints are at {self.url} and none can be read; the newest: {failures[0]}",
                key=failures[0].key,
            ) from failures[0]

    def all(self) -> list[Checkpoint]:
        """Return every readable checkpoint, oldest first by (epoch, step).

        Raises:
            ManifestError, StorageError: checkpoints are there and none can be read.
            ManifestError: none is there, and some were committed.
            StorageError: a root cannot be listed or reached; that is never "none".
        """
        return self.readable(self.survey())

    def readable(self, survey: Survey) -> list[Checkpoint]:
        """Return the checkpoints that were found; raises as `all` does."""
        if not survey.checkpoints:
            self.refuse(survey.unreadable)
        if not survey.checkpoints and (lost := self._lost()) is not None:
            # A job may have made its first commit since it was looked for.
            survey = self.survey()
            if not survey.checkpoints:
                raise lost
        return list(survey.checkpoints)

    def mark_if_emptied(self) -> None:
        """Mark all roots as emptied on purpose, if nothing stands in any of them; call when something was deleted.

        Only then: who is cut off before is told that the history of that root is gone, which is no loss.
        """
        survey = self.survey()
        # A pinned one without its manifest will be put back.
        if survey.checkpoints or survey.unreadable or any(one.pins.prefixes() for one in self.catalogs):
            return
        for catalog in self.catalogs:
            catalog.claims.mark_emptied()

    def survey(self) -> Survey:
        """Look at all that stands below all roots, as `Catalog.survey` does."""
        surveys = [one.survey() for one in self.catalogs]
        # The first root's last, so that it stands for both.
        found = {one.order: one for survey in reversed(surveys) for one in survey.checkpoints}
        return Survey.of([*found.values(), *(one for survey in surveys for one in survey.unreadable)])

    def best(self, metric: str, mode: Literal["min", "max"]) -> Checkpoint | None:
        """Return the checkpoint with the smallest (`min`) or largest (`max`) metric; the newer of equals.

        Checkpoints without that metric, or with nan, do not count; None if none counts.

        Raises:
            OptionsError: the metric has no name, or the mode is neither `min` nor `max`.
            CloudCkptError: what `all` raises.
        """
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

    def holders_of(self, checkpoint: Checkpoint) -> list[tuple[Catalog, Checkpoint | ManifestError]]:
        """Return the catalogs that hold just this checkpoint.

        Raises:
            CheckpointNotFoundError: none does.
        """
        found: list[tuple[Catalog, Checkpoint | ManifestError]] = []
        for catalog in self.catalogs:
            with suppress(CheckpointNotFoundError, ManifestError):
                there = catalog.open(checkpoint.prefix)
                found += [(catalog, there)] if there.digest == checkpoint.digest else []
        if not found:
            raise CheckpointNotFoundError(f"{checkpoint.url} is not committed at {self.url}, or not any more")
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
