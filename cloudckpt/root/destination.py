"""Say where a save goes: a URL of its own, or the next step of a root, which a job's first save claims.

own_url    probe, and refuse a URL that holds a checkpoint
Epoch      of one job on one root: claimed with its first save; then every step has one place
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from cloudckpt.deadline import Deadline
from cloudckpt.errors import StorageError
from cloudckpt.format import Manifest, checkpoint_prefix
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import WORKED, Checkpoint
from cloudckpt.root.claims import Claims, Line, leading_to
from cloudckpt.root.pins import Named
from cloudckpt.root.replacing import Exists, check_place, check_root, replace
from cloudckpt.root.sharing import commit_sharing
from cloudckpt.store import RetryingStore, probe_create, probe_write

__all__ = ["Destination", "Epoch", "Target", "own_url"]

logger = logging.getLogger(__name__)

# How long a root that may be down is asked whether it is there again, and which epochs it has; of the time that is left
# to a save, no more than that share, so that the save itself fits behind it, or behind that in the other root.
_LOOK_S = 10.0
_LOOK_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one checkpoint goes: a catalog, and the step and epoch of a root (or the URL itself).

    Attributes:
        exists: what becomes of a checkpoint at the URL itself.
        worked_s: returns how long the line of history has been at work; None outside a root.
        name: that the checkpoint gets; "" for none.
    """

    catalog: Catalog
    prefix: str = ""
    step: int | None = None
    epoch: int = 0
    exists: Exists = "raise"
    worked_s: Callable[[], float] | None = None
    name: str = ""

    def commit(self, manifest: Manifest, base: Checkpoint | None = None) -> Checkpoint:
        """Make a finished attempt the checkpoint there; raises what `Catalog.commit`, `replace` or `commit_sharing` do.

        Args:
            manifest: what is to be committed.
            base: with which it shares shards, if it does.
        """
        if self.exists == "replace":
            return replace(self.catalog, manifest)
        if self.worked_s is not None:
            manifest = structs.replace(manifest, summary={**manifest.summary, WORKED: round(self.worked_s(), 3)})
        if self.name:
            # First: it says nothing while nothing is committed, and so moves in the very request that commits.
            self.catalog.pins.give(Named(self.name, self.prefix, manifest.attempt))
        if base is not None and manifest.held_elsewhere:
            return commit_sharing(self.catalog, manifest, prefix=self.prefix, base=base)
        return self.catalog.commit(manifest, prefix=self.prefix)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a save may go, once rank 0 has asked the store.

    Attributes:
        catalog: this rank's own, over the store that the shards go to.
        take_by: returns where the checkpoint goes, asked of a catalog; see `take`.
        is_claimed: whether `take` asks the store for nothing, so that training need not be kept waiting for it.
    """

    catalog: Catalog
    take_by: Callable[[Catalog], Target]
    is_claimed: bool

    def take(self) -> Target:
        """Return where the checkpoint goes; on rank 0.

        Raises:
            CheckpointExistsError: there is one, which is not changed.
            StorageError: the store cannot be written to, or ignores what a create asks of it.
        """
        return self.take_by(self.catalog)

    def by(self, patience: Callable[[RetryingStore], RetryingStore]) -> Destination:
        """Return the same place, over its store with another patience."""
        store = self.catalog.store
        if not isinstance(store, RetryingStore) or (other := patience(store)) is store:
            return self
        return dataclasses.replace(self, catalog=self.catalog.with_store(other))


def own_url(catalog: Catalog, *, is_single_writer: bool, exists: Exists = "raise") -> Destination:
    """Return a URL that is to hold one checkpoint; `take` probes the store, and refuses one that `check_place` does."""

    def take(catalog: Catalog) -> Target:
        probe_create(catalog.store, single_writer=is_single_writer)
        check_place(catalog, exists)
        return Target(catalog=catalog, exists=exists)

    return Destination(catalog, take, is_claimed=False)


class Epoch:
    """One job's epoch on its root, and what it has committed in it.

    A job may have a second root, which takes saves when the first is down, and an epoch there. A save never goes to a
    root in a lower epoch than the job has on the other one: there the next one is claimed first, at least as high. So
    (epoch, step) tells over both roots which checkpoint is newer. A new line is above all that the job has ever seen of
    either root, whether that can be asked now or not.

    The thread of a background save may note a commit while the training's thread asks.

    Attributes:
        number: 0 until the first save has claimed it, or until another rank's has.
        resumed_from: the checkpoint that the job went on from.
        newest: the newest checkpoint of this line, on either root; it may have been deleted since.
        line: what this job has committed, in this epoch and others, and what led to where it went on from; on both.
        beside: the epoch on the job's other root.
        is_doubted: whether a save has gone to the other root, because this one was down: it is asked before the next.
    """

    def __init__(
        self, catalog: Catalog, *, is_single_writer: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing is written before the first `take` of a step.

        Args:
            catalog: the root's.
            is_single_writer: whether the caller promises that nobody else writes there.
            clock: monotonic seconds, of how long the line has been at work.
        """
        self._catalog = catalog
        self._is_single_writer = is_single_writer
        self._clock = clock
        self._resumed_at_s, self._worked_before_s = clock(), 0.0
        self.number = 0
        self.resumed_from: Checkpoint | None = None
        self.newest: Checkpoint | None = None
        self.line = Line()
        self.beside: Epoch | None = None
        self.is_doubted = False
        # What this job has claimed here last, also when it goes on in a newer epoch.
        self._claimed = 0
        self._deleted: set[int] = set()
        self._has_gone_back = False

    def step(self, step: int, *, name: str = "", is_again: bool = False) -> Destination:
        """Return where a step goes. No request.

        Args:
            step: of the training.
            name: that its checkpoint gets; "" for none.
            is_again: save it in a new epoch, where this one has committed it.

        Raises:
            OptionsError: a step that is negative, or larger than keys hold.
        """
        checkpoint_prefix(step, self.number or 1)
        is_claimed = self._is_high_enough and not self._goes_back(step) and not self.is_doubted and not is_again
        return Destination(self._catalog, partial(self._take, step, name, is_again), is_claimed=is_claimed)

    @property
    def _is_high_enough(self) -> bool:
        # Seen after the commit before: a checkpoint that was copied here is above this epoch, or all was deleted.
        claims = self._catalog.claims
        above = max(claims.seen, claims.emptied + 1, 0 if self.beside is None else self.beside.number)
        return self.number > 0 and self.number >= above

    def _goes_back(self, step: int) -> bool:
        """Tell whether a step is below the newest one of its epoch: in that nobody would find it."""
        return self.newest is not None and step < self.newest.step and self.newest.epoch >= self.number

    def _is_used(self, step: int) -> bool:
        """Tell whether the step was committed in this epoch, also if it was deleted: no key is committed to twice."""
        return self._catalog.is_used(checkpoint_prefix(step, self.number))

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a checkpoint, on both roots; from any but the one that the next save follows, in a new epoch.

        The new one is above that of the checkpoint, whoever put it there; but a job that is fenced claims none.
        """
        base = self.newest or self.resumed_from
        is_base = checkpoint is base or (checkpoint is not None and base is not None and checkpoint.order == base.order)
        for epoch in self._both:
            epoch.resumed_from = checkpoint
            epoch._work_from(checkpoint)  # noqa: SLF001 (its own kind)
            if not is_base:
                epoch.number, epoch.newest = 0, None

    def _work_from(self, checkpoint: Checkpoint | None) -> None:
        self._resumed_at_s = self._clock()
        self._worked_before_s = 0.0 if checkpoint is None else checkpoint.worked_s or 0.0

    def _worked_s(self) -> float:
        """Return how long the line of history has been at work: up to where it was resumed, and since then."""
        return self._worked_before_s + self._clock() - self._resumed_at_s

    @property
    def _both(self) -> tuple[Epoch, ...]:
        return (self,) if self.beside is None else (self, self.beside)

    def note(self, checkpoint: Checkpoint) -> None:
        """Note a commit of this job, on this root or the other one; on every rank."""
        if self._catalog.holds(checkpoint):
            self.number = checkpoint.epoch
        self.newest = checkpoint
        self.line = self.line.joined(Line({checkpoint.epoch: checkpoint.step}))
        self._deleted.discard(checkpoint.step)

    def forget(self, step: int) -> None:
        """Note that a step was deleted; on every rank."""
        self._deleted.add(step)

    def newest_of(self, step: int) -> Checkpoint | None:
        """Return the newest checkpoint of this line if it is of this step; the same on every rank. No request."""
        is_there = self.newest is not None and self.newest.step == step and step not in self._deleted
        return self.newest if is_there else None

    def line_so_far(self, claims: Sequence[Claims]) -> Line:
        """Return the line; before the first save has found it, the one that leads to where the job went on from.

        Args:
            claims: of all roots that it may lead through; one of them is read.
        """
        base = self.newest or self.resumed_from
        if base is None or self.line.holds(base.order):
            return self.line
        return self.line.joined(leading_to((base.step, base.epoch), claims, since=0))

    def is_there(self, checkpoint: Checkpoint) -> bool:
        """Ask this root whether a checkpoint of this job still stands there; if it does not answer, it is believed."""
        try:
            return _is_committed(self._hurried(self._catalog), checkpoint.prefix)
        except StorageError as exc:
            logger.warning("whether %s is still there is not known: %s", checkpoint.url, exc)
            return True

    def _take(self, step: int, name: str, is_again: bool, catalog: Catalog) -> Target:  # noqa: FBT001 (a `partial`)
        if self.is_doubted:
            probe_write(self._hurried(catalog).store)
            self.is_doubted = False
        is_used = self._is_used(step)
        if is_used and not is_again and _is_committed(catalog, taken := checkpoint_prefix(step, self.number)):
            raise catalog.exists_error(taken)
        if self._goes_back(step):
            self._tell_back(step)
            self._claim(catalog)
        elif is_used:
            logger.info("step %d of epoch %d is saved again, in a new epoch", step, self.number)
            self._claim(catalog)
        elif not self._is_high_enough:
            if self.number == 0:
                check_root(catalog)
                probe_create(catalog.store, single_writer=self._is_single_writer)
            self._claim(catalog)
        prefix = checkpoint_prefix(step, self.number)
        return Target(catalog=catalog, prefix=prefix, step=step, epoch=self.number, worked_s=self._worked_s, name=name)

    def _tell_back(self, step: int) -> None:
        if self.newest is not None and not self._has_gone_back:
            self._has_gone_back = True
            logger.warning(
                "step %d is below step %d, which epoch %d has saved: a new epoch begins with it, as after a restore of "
                "an older checkpoint, so that it is the newest",
                *(step, self.newest.step, self.newest.epoch),
            )

    def _claim(self, catalog: Catalog) -> None:
        """Claim an epoch that is newer than all that the job knows of both roots; then its line is known, too.

        A job that has lost a root to a newer one does not take it back.
        """
        if self._claimed:
            catalog.claims.fence(self._claimed)
        base = self.newest or self.resumed_from
        link = None if base is None else (base.step, base.epoch)
        here = {epoch for epoch, _ in catalog.places().values()}
        there = self._there(catalog)
        epochs = None if there.epochs is None else here | there.epochs
        line = self.line
        if base is not None and link is not None and not line.holds(base.order):
            claims = [catalog.claims, *there.claims]
            line = line.joined(leading_to(link, claims, since=min(epochs or {0})))
        above = max([there.above, 0 if base is None else base.epoch, *here, self._catalog.claims.seen])
        self.number = catalog.claims.claim(above=above, resumed_from=link, links=line.links(epochs))
        self._claimed = self.number
        for epoch in self._both:
            epoch.line = line

    def _there(self, by: Catalog) -> _There:
        """Look at the job's other root, unless it has claimed an epoch there: then the line is known, too.

        A root that cannot be asked still has what was seen of it.
        """
        if self.beside is None:
            return _There(0, set())
        if self.beside.number:
            return _There(self.beside.number - 1, None)
        known = self.beside._catalog.claims  # noqa: SLF001 (its own kind)
        try:
            catalog = self.beside._hurried(by)  # noqa: SLF001
            epochs = {epoch for epoch, _ in catalog.places().values()}
            catalog.claims.highest()
            return _There(known.seen, epochs, (catalog.claims,))
        except StorageError as exc:
            least = max([*self.line.steps, 0 if self.resumed_from is None else self.resumed_from.epoch])
            if not known.has_looked:
                logger.warning(
                    "nobody knows which epochs the other root of this job has, because it cannot be asked; what stands "
                    "there of an epoch above %d will be taken for newer than this save: %s",
                    max(least, self._catalog.claims.seen) + 1,
                    exc,
                )
            return _There(max(least, known.seen), None)

    def _hurried(self, by: Catalog) -> Catalog:
        """Return this root's catalog with little patience, and no more than a save has whose catalog is `by`."""
        store, other = self._catalog.store, by.store
        if not isinstance(store, RetryingStore) or not isinstance(other, RetryingStore):
            return self._catalog
        left_s = other.deadline.left_s(time.monotonic())
        look = Deadline.after(min(_LOOK_S, _LOOK_SHARE * left_s), "a look at a root that was down")
        return self._catalog.with_store(store.within(look))


@dataclass(frozen=True, slots=True)
class _There:
    """What a job knows of its other root when it claims an epoch.

    Attributes:
        above: the highest epoch that a new one has to be above.
        epochs: of which something stands there; None if nobody has looked.
        claims: those there, to be read.
    """

    above: int
    epochs: set[int] | None
    claims: tuple[Claims, ...] = ()


def _is_committed(catalog: Catalog, prefix: str) -> bool:
    """Tell whether a manifest stands there that is not the one under which what was deleted is being removed."""
    return catalog.is_taken(prefix) and not catalog.is_void(prefix)
