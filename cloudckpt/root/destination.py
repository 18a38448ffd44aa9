"""Say where a save goes: a URL of its own, or the next step of a root, which a job's first save claims.

own_url    probe, and refuse a URL that holds a checkpoint
Epoch      of one job on one root: claimed with its first save; then every step has one place
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cloudckpt.errors import StorageError
from cloudckpt.format import Manifest, checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.replacing import Exists, check_place, replace
from cloudckpt.store import probe_create, probe_write

__all__ = ["Destination", "Epoch", "Target", "own_url"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one checkpoint goes: a catalog, and the step and epoch of a root (or the URL itself).

    Attributes:
        exists: what becomes of a checkpoint at the URL itself.
    """

    catalog: Catalog
    prefix: str = ""
    step: int | None = None
    epoch: int = 0
    exists: Exists = "raise"

    def commit(self, manifest: Manifest) -> Checkpoint:
        """Make a finished attempt the checkpoint there; raises what `Catalog.commit` or `replace` raises."""
        if self.exists == "replace":
            return replace(self.catalog, manifest)
        return self.catalog.commit(manifest, prefix=self.prefix)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a save may go, once rank 0 has asked the store.

    Attributes:
        catalog: this rank's own, over the store that the shards go to.
        take: returns where the checkpoint goes; on rank 0. Raises `CheckpointExistsError` if there is one, which is not
            changed, and `StorageError` if the store cannot be written to, or ignores what a create asks of it.
        is_claimed: whether `take` asks the store for nothing, so that training need not be kept waiting for it.
    """

    catalog: Catalog
    take: Callable[[], Target]
    is_claimed: bool


def own_url(catalog: Catalog, *, is_single_writer: bool, exists: Exists = "raise") -> Destination:
    """Return a URL that is to hold one checkpoint; `take` probes the store, and refuses one that `check_place` does."""

    def take() -> Target:
        probe_create(catalog.store, single_writer=is_single_writer)
        check_place(catalog, exists)
        return Target(catalog=catalog, exists=exists)

    return Destination(catalog, take, is_claimed=False)


class Epoch:
    """One job's epoch on its root, and what it has committed in it.

    A job may have a second root, which takes saves when the first is down, and an epoch there. A save never goes to a
    root in a lower epoch than the job has on the other one: there the next one is claimed first, at least as high. So
    (epoch, step) tells over both roots which checkpoint is newer.

    The thread of a background save may note a commit while the training's thread asks.

    Attributes:
        number: 0 until the first save has claimed it, or until another rank's has.
        resumed_from: the checkpoint that the job went on from.
        newest: the newest checkpoint of this line, on either root; it may have been deleted since.
        beside: the epoch on the job's other root.
        is_doubted: whether a save has gone to the other root, because this one was down: it is asked before the next.
    """

    def __init__(
        self, catalog: Catalog, *, is_single_writer: bool, hurried: Callable[[], Catalog] | None = None
    ) -> None:
        """Nothing is written before the first `take` of a step.

        Args:
            catalog: the root's.
            is_single_writer: whether the caller promises that nobody else writes there.
            hurried: returns the same catalog with little patience, to ask whether the root is there.
        """
        self._catalog = catalog
        self._is_single_writer = is_single_writer
        self._hurried = hurried or (lambda: catalog)
        self.number = 0
        self.resumed_from: Checkpoint | None = None
        self.newest: Checkpoint | None = None
        self.beside: Epoch | None = None
        self.is_doubted = False
        self._deleted: set[int] = set()

    def step(self, step: int, catalog: Catalog) -> Destination:
        """Return where a step goes, by a catalog over the store with the patience that this save has. No request.

        Raises:
            OptionsError: a step that is negative, or larger than keys hold.
        """
        checkpoint_prefix(step, self.number or 1)
        is_claimed = self._is_high_enough and not self.is_doubted
        return Destination(catalog, partial(self._take, step, catalog), is_claimed=is_claimed)

    @property
    def _is_high_enough(self) -> bool:
        return self.number > 0 and (self.beside is None or self.number >= self.beside.number)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a checkpoint; from one before this line's newest, in an epoch of its own: a new line is newer."""
        self.resumed_from = checkpoint
        if self.newest is not None and (checkpoint is None or checkpoint.order < self.newest.order):
            self.number, self.newest = 0, None

    def note(self, checkpoint: Checkpoint) -> None:
        """Note a commit of this job, on this root or the other one; on every rank."""
        if self._catalog.holds(checkpoint):
            self.number = checkpoint.epoch
        self.newest = checkpoint
        self._deleted.discard(checkpoint.step)

    def forget(self, step: int) -> None:
        """Note that a step was deleted; on every rank."""
        self._deleted.add(step)

    def newest_of(self, step: int) -> Checkpoint | None:
        """Return the newest checkpoint of this line if it is of this step; the same on every rank. No request."""
        is_there = self.newest is not None and self.newest.step == step and step not in self._deleted
        return self.newest if is_there else None

    def _take(self, step: int, catalog: Catalog) -> Target:
        if self.is_doubted:
            probe_write(self._hurried().store)
            self.is_doubted = False
        if not self._is_high_enough:
            if self.number == 0:
                probe_create(catalog.store, single_writer=self._is_single_writer)
            self.number = catalog.claim(resumed_from=self.newest or self.resumed_from, least=self._least())
        prefix = checkpoint_prefix(step, self.number)
        if self.newest is not None and catalog.knows(prefix):
            raise catalog.exists_error(prefix)
        return Target(catalog=catalog, prefix=prefix, step=step, epoch=self.number)

    def _least(self) -> int:
        """Return the lowest epoch that is newer than all that the job knows of its other root."""
        if self.beside is None:
            return 1
        if self.beside.number:
            return self.beside.number
        known = 0 if self.resumed_from is None else self.resumed_from.epoch
        try:
            known = max(known, self.beside._hurried().highest_epoch())  # noqa: SLF001 (its own kind)
        except StorageError as exc:
            logger.warning("the epochs of the other root are not known, and taken to be %d: %s", known, exc)
        return known + 1
