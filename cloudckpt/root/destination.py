"""Say where a save goes: a URL of its own, or the next step of a root, which a job's first save claims.

OwnUrl     probe, and refuse a URL that holds a checkpoint
Epoch      of one job on one root: claimed with its first save; then every step has one place
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cloudckpt.format import checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.store import RetryingStore, probe_create

__all__ = ["Destination", "Epoch", "OwnUrl", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one checkpoint goes: a catalog, and the step and epoch of a root (or the URL itself)."""

    catalog: Catalog
    prefix: str = ""
    step: int | None = None
    epoch: int = 0


class Destination(Protocol):
    """Where a save may go, once rank 0 has asked the store.

    Attributes:
        catalog: this rank's own, over the store that the shards go to.
        is_claimed: whether `take` asks the store for nothing, so that training need not be kept waiting for it.
    """

    @property
    def catalog(self) -> Catalog: ...

    @property
    def is_claimed(self) -> bool: ...

    def take(self) -> Target:
        """Return where the checkpoint goes; on rank 0.

        Raises:
            CheckpointExistsError: there is one; it was not changed.
            StorageError: the store cannot be written to, or ignores what a create asks of it.
        """
        ...


@dataclass(frozen=True, slots=True)
class OwnUrl:
    """A URL that is to hold one checkpoint."""

    catalog: Catalog
    store: RetryingStore
    is_single_writer: bool
    is_claimed: bool = False

    def take(self) -> Target:
        """Probe the store, and refuse a URL that holds a checkpoint."""
        probe_create(self.store, single_writer=self.is_single_writer)
        if self.catalog.is_taken(""):
            raise self.catalog.exists_error("")
        return Target(catalog=self.catalog)


class Epoch:
    """One job's epoch on its root, and what it has committed in it.

    The thread of a background save may note a commit while the training's thread asks.

    Attributes:
        number: 0 until the first save has claimed it, or until another rank's has.
        resumed_from: the checkpoint that the job went on from.
        newest: the newest checkpoint of this epoch.
    """

    def __init__(self, catalog: Catalog, store: RetryingStore, *, is_single_writer: bool) -> None:
        """Nothing is written before the first `take` of a step."""
        self._catalog = catalog
        self._store = store
        self._is_single_writer = is_single_writer
        self.number = 0
        self.resumed_from: Checkpoint | None = None
        self.newest: Checkpoint | None = None

    def step(self, step: int, catalog: Catalog) -> Destination:
        """Return where a step goes; refuse, without a request, one that has no place.

        Args:
            step: the training step.
            catalog: the root's, over the store with the patience that this save has.

        Raises:
            OptionsError: a step that is negative, or larger than keys hold.
        """
        checkpoint_prefix(step, self.number or 1)
        return _Step(self, step, catalog)

    def note(self, checkpoint: Checkpoint) -> None:
        """Note a commit of this epoch; on every rank."""
        self.number, self.newest = checkpoint.epoch, checkpoint

    def claim(self) -> None:
        """Claim the epoch, if that is still to be done; on rank 0."""
        if self.number == 0:
            probe_create(self._store, single_writer=self._is_single_writer)
            self.number = self._catalog.claim(resumed_from=self.resumed_from)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of an epoch."""

    epoch: Epoch
    step: int
    catalog: Catalog

    @property
    def is_claimed(self) -> bool:
        return self.epoch.number > 0

    def take(self) -> Target:
        self.epoch.claim()
        prefix = checkpoint_prefix(self.step, self.epoch.number)
        if self.epoch.newest is not None and self.catalog.knows(prefix):
            raise self.catalog.exists_error(prefix)
        return Target(catalog=self.catalog, prefix=prefix, step=self.step, epoch=self.epoch.number)
