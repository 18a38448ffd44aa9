"""Remove the checkpoints of one root that no retention rule keeps: manifests first, shards a grace time later.

    commit ──▶ what the rules let go, of this job's line ──what they keep is looked for──▶ uncommitted
                 ╰─ what is pinned or has a name stays     what was pinned meanwhile ◀── put back ─╯
           ──▶ what a name has moved on from: by the rules; without any it goes
    `Cleaner` ──▶ the shards, once due

Pins are listed where something would go, and once more when it has gone: one that was set in between holds, too, and
whoever comes after a pass that was cut off puts it back (FORMAT invariant 8). Called by whichever thread has committed
a checkpoint, and by the manager's; never by two at once. Keeps FORMAT invariants 7 to 9.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import ManifestError, OptionsError, PinnedError, RetryExhaustedError, StorageError
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, prefix_of
from cloudckpt.root.claims import Line
from cloudckpt.root.cleaning import Cleaner
from cloudckpt.root.naming import committed_as, forget_names, names_given, superseded
from cloudckpt.root.pinning import refuse_pinned
from cloudckpt.root.retention import KeepAll, RetentionRule, removable, why_kept

__all__ = ["Pruner", "RetentionScope", "delete_unpinned", "uncommit_each", "what_goes"]

logger = logging.getLogger(__name__)

RetentionScope = Literal["line", "root"]
"""Whose checkpoints retention removes: those of the job's own line of history, or all below the root."""

_SHOWN = 5

_Any = Checkpoint | ManifestError
_Gone = TypeVar("_Gone", Checkpoint, _Any)


class Pruner:
    """The retention rules of a root, and what they have left to be removed."""

    def __init__(
        self,
        catalog: Catalog,
        rules: Sequence[RetentionRule],
        cleaner: Cleaner,
        *,
        scope: RetentionScope = "line",
        on_pruned: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """Prune by `rules`; without any, nothing is pruned. `on_pruned` is told what they let go.

        Raises:
            OptionsError: an unknown scope.
        """
        if scope not in get_args(RetentionScope):
            raise OptionsError(f"retention_scope is {scope!r}; give {' or '.join(map(repr, get_args(RetentionScope)))}")
        self._until = NEVER
        self._catalog = catalog.within(lambda: self._until)
        self._rules = tuple(rules)
        self._cleaner = cleaner
        self._scope = scope
        self._on_pruned = on_pruned
        self._has_named = False
        # Whether this job gives names: without, no pass looks for what they have moved on from.
        self.gives_names = False
        # What the store refuses to delete, and that was raised.
        self._told: set[str] = set()
        self._above: set[str] = set()

    def why_kept(self, line: Line, in_use: Checkpoint | None) -> dict[tuple[int, int], tuple[str, ...]]:
        """Say what keeps each checkpoint of the root, as the function of that name does; without rules all do.

        Args:
            line: this job's.
            in_use: what it went on from, if it has saved nothing since.
        """
        found = self._catalog.survey().checkpoints
        is_all = self._scope == "root"
        mine = found if is_all else self._catalog.native([one for one in found if line.holds(one.order)])
        held = self._catalog.pins.held()
        return why_kept(
            found,
            self._rules or (KeepAll(),),
            pinned=[one.order for one in found if one.prefix in held.pinned],
            names=names_given(held, found),
            in_use=[] if in_use is None else [in_use.order],
            others={one.order for one in found} - {one.order for one in mine} if self._rules else (),
        )

    @property
    def has_rules(self) -> bool:
        """Whether anything is ever pruned."""
        return bool(self._rules)

    def prune_after(
        self,
        checkpoint: Checkpoint,
        line: Line,
        *,
        epoch: int = 0,
        go_on: Callable[[], bool] = lambda: True,
        until: Deadline = NEVER,
        more: Sequence[RetentionRule] = (),
    ) -> None:
        """Uncommit what no rule keeps, and what names have moved on from; never the checkpoint just committed.

        It ends early, between two of them, when `go_on` says so; the rest is left to the next time. One that the store
        refuses to delete keeps no other one from going; it is tried again each time, and raised once. Whatever it
        raises, also what a rule of the caller's own does, is left to the next save: the checkpoint is safe.

        Args:
            checkpoint: the newest of this job, or what it went on from.
            line: of which only checkpoints are removed, unless the scope is the root.
            epoch: in which this job writes, if that is not the one of the checkpoint.
            go_on: whether there is time for the next one.
            until: by when it ends, also in the middle of a request.
            more: rules for this one time; what these keep stays as well as what the job's own do.
        """
        self._until = until
        try:
            self._prune_after(checkpoint, line, epoch or checkpoint.epoch, go_on, (*self._rules, *more))
            if not epoch:
                self._catalog.claims.mark_committed(checkpoint.epoch)
        finally:
            self._until = NEVER

    def _prune_after(
        self,
        checkpoint: Checkpoint,
        line: Line,
        epoch: int,
        go_on: Callable[[], bool],
        rules: Sequence[RetentionRule],
    ) -> None:
        if self.gives_names:
            self._let_go_of_names(checkpoint, line, epoch, go_on)
        going = self._going(checkpoint, line, epoch, rules)
        is_through, refused = uncommit_each(self._catalog, self._cleaner, going, self._on_pruned, go_on)
        if not is_through:
            return
        self._told &= refused.keys()
        news = refused.keys() - self._told
        # Where nothing goes at all, each save has one more that does not: that is told already.
        if news and (not self._told or len(refused) < len(going)):
            self._told |= news
            raise next(refused[prefix] for prefix in refused if prefix in news)

    def _let_go_of_names(self, newest: Checkpoint, line: Line, epoch: int, go_on: Callable[[], bool]) -> None:
        """Uncommit, without rules, what no name keeps any more; then let go of what said that one does."""
        held = self._catalog.pins.held()
        stale = superseded(self._catalog, held)
        if not stale:
            return
        kept = {one.prefix for one in held.names if one not in stale} | held.pinned | {newest.prefix}
        found = [committed_as(self._catalog, one) for one in stale if one.prefix not in kept]
        unnamed = list({one.prefix: one for one in found if one is not None}.values())
        if self._scope == "line":
            unnamed = self._catalog.native([one for one in unnamed if line.holds(one.order)])
        going = [] if self._rules else unnamed
        if going:
            if not self._catalog.standing([newest]):
                return
            self._catalog.claims.fence(epoch)
        gone: set[str] = set()

        def tell(old: Checkpoint) -> None:
            gone.add(old.prefix)
            self._on_pruned(old)

        _, refused = uncommit_each(self._catalog, self._cleaner, going, tell, go_on)
        left = {one.prefix for one in going} - gone
        self._catalog.pins.take([one for one in stale if one.prefix not in left])
        for error in refused.values():
            raise error

    def _going(self, newest: Checkpoint, line: Line, epoch: int, rules: Sequence[RetentionRule]) -> list[Checkpoint]:
        places = self._catalog.places()
        self._tell_above(places, newest)
        if not rules:
            return []
        is_all = self._scope == "root"
        held = [prefix for prefix, order in places.items() if is_all or line.holds(order)]
        found = self._catalog.recall(held).checkpoints
        # Another root's checkpoint may have been copied here under an epoch's number of this line.
        mine = found if is_all else self._catalog.native(found)
        self._name_others(places.keys() - {one.prefix for one in mine})
        # Our own newest is never in question, even when a newer epoch has checkpoints of its own by now.
        going = what_goes(self._catalog, rules, mine, protected={newest.order}, put_back=self._put_back)
        if going:
            # A newer job may be restoring what we would remove.
            self._catalog.claims.fence(epoch)
        return going

    def _tell_above(self, places: Mapping[str, tuple[int, int]], newest: Checkpoint) -> None:
        """Say, once, what was copied here that the next job would take for newer than what this one has just saved."""
        above = [prefix for prefix, order in places.items() if order > newest.order and prefix not in self._above]
        found = self._catalog.recall(above).checkpoints
        self._above.update(one.prefix for one in found)
        if found:
            logger.warning(
                "%s is there, of an epoch above this job's, %d, whose next save claims one above it; until then it is "
                "what a restore finds: it was copied here while this job is at work, or a newer job has taken over",
                *(found[-1].url, newest.epoch),
            )

    def _put_back(self, prefix: str) -> bool:
        return self._cleaner.put_back(prefix, by=self._catalog)

    def delete(self, found: Checkpoint | ManifestError, on_gone: Callable[[_Any], None]) -> None:
        """Let a checkpoint exist no more, also what nobody can read; as `delete_unpinned` does."""
        delete_unpinned(self._catalog, self._cleaner, found, on_gone)

    def clean(self) -> None:
        """Have removed what is due, without waiting for that."""
        self._cleaner.wake()

    def make_room(self, *, go_on: Callable[[], bool]) -> int:
        """Remove at once what no checkpoint needs any more; return how many objects that were."""
        return self._cleaner.make_room(go_on=go_on)

    def _name_others(self, prefixes: Collection[str]) -> None:
        """Say, once, what retention leaves alone because it is of another line of history."""
        if self._has_named:
            return
        others = self._catalog.recall(prefixes).checkpoints
        self._has_named = True
        if others:
            shown = ", ".join(f"{one.step} of epoch {one.epoch}" for one in others[-_SHOWN:])
            logger.warning(
                "%d checkpoints at %s are not of the line of history that this job began or went on from (the newest: "
                "step %s): retention leaves them alone. If the job was to go on from one, call restore() before the "
                'first save; if they are to go by its rules, give retention_scope="root"',
                *(len(others), self._catalog.store.url, shown),
            )

    def settle(self) -> None:
        """Wait until what was due is removed."""
        self._cleaner.settle()

    def end(self, patience_s: float) -> None:
        """Remove what is due, within `patience_s`; shards still in their grace time stay for the next job."""
        self._cleaner.end(patience_s)

    def stop(self) -> None:
        """Remove nothing more."""
        self._cleaner.stop()


def what_goes(
    catalog: Catalog,
    rules: Sequence[RetentionRule],
    checkpoints: Sequence[Checkpoint],
    *,
    protected: Collection[tuple[int, int]],
    put_back: Callable[[str], bool],
) -> list[Checkpoint]:
    """Return what may go of the committed `checkpoints`, once all that stays instead was found to be there.

    Args:
        catalog: the root's.
        rules: what stays by them stays.
        checkpoints: in whatever order they come.
        protected: (epoch, step) of what stays beside the newest and the pinned ones.
        put_back: commits again what is pinned under a prefix and has lost its manifest; tells whether it stands.
    """
    seen: set[str] = set()
    pinned, held = frozenset[str](), frozenset[str]()
    if removable(checkpoints, rules, protected=protected):
        # Asked only now: most passes have nothing to remove, and cost no request for pins.
        found = catalog.pins.held()
        pinned, held = found.pinned, found.prefixes
        known = {one.prefix for one in catalog.recall(pinned).checkpoints}
        seen |= {prefix for prefix in sorted(pinned - known) if put_back(prefix)}
    while True:
        stays = {*protected, *(one.order for one in checkpoints if one.prefix in held)}
        removed = removable(checkpoints, rules, protected=stays)
        going = {one.prefix for one in removed}
        unseen = [one for one in checkpoints if one.prefix not in going | seen]
        if not removed or not unseen:
            return removed
        there = {one.prefix for one in catalog.standing(unseen)}
        seen |= there
        seen |= {one.prefix for one in unseen if one.prefix in pinned - there and put_back(one.prefix)}
        checkpoints = [one for one in checkpoints if one.prefix in going | seen]


def uncommit_each(
    catalog: Catalog,
    cleaner: Cleaner,
    going: Sequence[Checkpoint],
    on_gone: Callable[[Checkpoint], None],
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[bool, dict[str, StorageError]]:
    """Uncommit one after the other while it may go on, and put back what was pinned meanwhile.

    Args:
        catalog: the root's.
        cleaner: removes the shards later.
        going: what is to go.
        on_gone: is told, at the end, of each that is gone and stays so; whatever ends this, of those until then.
        go_on: whether there is time for the next one.

    Returns:
        Whether there was time for all of them; and by prefix why the store refused some.

    Raises:
        RetryExhaustedError: the store is away, for the next one, too.
    """
    refused: dict[str, StorageError] = {}
    with _telling(catalog, cleaner, on_gone) as gone:
        for old in going:
            if not go_on():
                return False, refused
            try:
                cleaner.uncommit(old, by=catalog)
            except RetryExhaustedError:
                raise
            except StorageError as exc:
                refused[old.prefix] = exc
                continue
            gone.append(old)
            logger.info("pruned step %s of epoch %d", old.step, old.epoch)
    return True, refused


@contextmanager
def _telling(catalog: Catalog, cleaner: Cleaner, on_gone: Callable[[_Gone], None]) -> Iterator[list[_Gone]]:
    """Tell of each that the block puts into a list once it is uncommitted, and stays so.

    What was pinned since the pins were listed is put back, and taken from the list; one listing, if that has any. Of a
    block that fails, or where nobody can say what is pinned, all are told: they are gone until whoever removes
    their shards asks for pins, which the store may not answer now.
    """
    gone: list[_Gone] = []
    try:
        yield gone
        pinned = catalog.pins.prefixes() if gone else set()
        gone[:] = [
            one for one in gone if prefix_of(one) not in pinned or not cleaner.put_back(prefix_of(one), by=catalog)
        ]
    finally:
        for old in gone:
            on_gone(old)


def delete_unpinned(
    catalog: Catalog, cleaner: Cleaner, found: Checkpoint | ManifestError, on_gone: Callable[[_Any], None]
) -> None:
    """Uncommit one that was asked for by name, and tell of it, unless it is pinned, or is while this is asked.

    Raises:
        PinnedError: it is; the checkpoint stands.
    """
    prefix = prefix_of(found)
    refuse_pinned(catalog, prefix)
    with _telling(catalog, cleaner, on_gone) as gone:
        cleaner.uncommit(found, by=catalog)
        gone.append(found)
    if not gone:
        raise PinnedError(
            f"{catalog.store.url.removesuffix('/')}/{prefix.rstrip('/')} was pinned while it was being deleted, and "
            "stands; unpin it first, if it is to go"
        )
    if isinstance(found, Checkpoint):
        forget_names(catalog, [found])
