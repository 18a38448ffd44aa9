"""Remove the checkpoints of one root that no retention rule keeps: manifests first, shards a grace time later.

    commit ──▶ what the rules let go, of this job's line ──what they keep is looked for──▶ uncommitted
                 ╰─ `Cleaner`, in a thread of its own ──▶ their shards, once due; what other jobs left (`sweep`)

Called by whichever thread has committed a checkpoint, and by the manager's; never by two at once. Keeps FORMAT
invariants 7 to 9.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import CheckpointExistsError, CloudCkptError, OptionsError, RetryExhaustedError, StorageError
from cloudckpt.options import as_seconds
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.claims import Line
from cloudckpt.root.removal import delete_below
from cloudckpt.root.retention import RetentionRule, removable
from cloudckpt.root.sweep import find_orphans, remove_orphan, remove_unfinished
from cloudckpt.threads import new_lock, started

__all__ = ["Cleaner", "Pruner", "RetentionScope"]

logger = logging.getLogger(__name__)

RetentionScope = Literal["line", "root"]
"""Whose checkpoints retention removes: those of the job's own line of history, or all below the root."""

# How long the end of a job lets a sweep go on.
_SWEEPING_S = 5.0
# How often that wait looks whether it is held up.
_LOOK_S = 0.1
_AGAIN_S = 3_600.0
# A save that has no room waits no longer for shards in their grace time.
_GRACE_AT_MOST_S = 60.0
_SHOWN = 5


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
        # What the store refuses to delete, and that was raised.
        self._told: set[str] = set()
        self._above: set[str] = set()

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
    ) -> None:
        """Uncommit what no rule keeps; never the checkpoint that was just committed.

        It ends early, between two of them, when `go_on` says so; the rest is left to the next time. One that the store
        refuses to delete keeps no other one from going; it is tried again each time, and raised once. Whatever it
        raises, also what a rule of the caller's own does, is left to the next save: the checkpoint is safe.

        Args:
            checkpoint: the newest of this job, or what it went on from.
            line: of which only checkpoints are removed, unless the scope is the root.
            epoch: in which this job writes, if that is not the one of the checkpoint.
            go_on: whether there is time for the next one.
            until: by when it ends, also in the middle of a request.
        """
        self._until = until
        try:
            self._prune_after(checkpoint, line, epoch or checkpoint.epoch, go_on)
            if not epoch:
                self._catalog.claims.mark_committed(checkpoint.epoch)
        finally:
            self._until = NEVER

    def _prune_after(self, checkpoint: Checkpoint, line: Line, epoch: int, go_on: Callable[[], bool]) -> None:
        going = self._going(checkpoint, line, epoch)
        refused: dict[str, StorageError] = {}
        for old in going:
            if not go_on():
                return
            try:
                self.uncommit(old)
            except RetryExhaustedError:
                raise  # the store is away, for the next one, too
            except StorageError as exc:
                refused[old.prefix] = exc
                continue
            logger.info("pruned step %s of epoch %d", old.step, old.epoch)
            self._on_pruned(old)
        self._told &= refused.keys()
        news = refused.keys() - self._told
        # Where nothing goes at all, each save has one more that does not: that is told already.
        if news and (not self._told or len(refused) < len(going)):
            self._told |= news
            raise next(refused[prefix] for prefix in refused if prefix in news)

    def _going(self, newest: Checkpoint, line: Line, epoch: int) -> list[Checkpoint]:
        places = self._catalog.places()
        self._tell_above(places, newest)
        if not self._rules:
            return []
        is_all = self._scope == "root"
        held = [prefix for prefix, order in places.items() if is_all or line.holds(order)]
        found = self._catalog.recall(held).checkpoints
        # Another root's checkpoint may have been copied here under an epoch's number of this line.
        mine = found if is_all else self._catalog.native(found)
        self._name_others(places.keys() - {one.prefix for one in mine})
        going = self._removable(mine, newest)
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

    def _removable(self, checkpoints: Sequence[Checkpoint], newest: Checkpoint) -> list[Checkpoint]:
        """Return what may go, once all that the rules keep instead was found to be there."""
        seen: set[str] = set()
        while True:
            # Our own newest is never in question, even when a newer epoch has checkpoints of its own by now.
            removed = removable(checkpoints, self._rules, protected={newest.order})
            going = {one.prefix for one in removed}
            unseen = [one for one in checkpoints if one.prefix not in going | seen]
            if not removed or not unseen:
                return removed
            there = {one.prefix for one in self._catalog.standing(unseen)}
            seen |= there
            checkpoints = [one for one in checkpoints if one.prefix in going | seen]

    def uncommit(self, checkpoint: Checkpoint) -> None:
        """Let a checkpoint exist no more; its shards go once readers had time to notice."""
        self._cleaner.uncommit(checkpoint, by=self._catalog)

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


class Cleaner:
    """Removes objects that belong to no checkpoint, in a thread of its own and with one request at a time.

    What this job has pruned goes after its grace time. What other jobs left (attempts without a commit, pruned shards)
    goes once nothing was written to it for a while; that is looked for at the job's first save, however short the job
    is, and again as long as some of it is too young. Nothing is removed while the job is preempted.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        grace_s: float,
        sweep_after_s: float | None,
        clock: Callable[[], float],
        is_held: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = logger.warning,
    ) -> None:
        """Clean below the root of `catalog`.

        Args:
            catalog: the root's.
            grace_s: seconds between the end of a checkpoint and that of its shards.
            sweep_after_s: how old what other jobs left must be; None leaves it to `sweep`.
            clock: monotonic seconds.
            is_held: whether nothing is to be removed now; asked between requests, in the thread.
            note: is told what could not be removed.

        Raises:
            OptionsError: a number of seconds that is none.
        """
        if sweep_after_s is not None:
            sweep_after_s = as_seconds("sweep_after_s", sweep_after_s)
        self._catalog = catalog.within(lambda: self._end)
        self._grace_s = as_seconds("prune_grace_s", grace_s)
        self._sweep_after_s = sweep_after_s
        self._clock = clock
        self._is_held = is_held
        self._note = note
        # What does not exist any more, by prefix and attempt, and since when: its shards go once readers had time to
        # notice.
        self._uncommitted_s: dict[tuple[str, str], float] = {}
        self._removed_count = 0
        self._next_sweep_s = clock()
        self._lock = new_lock()
        self._thread: threading.Thread | None = None
        self._is_woken = False
        self._is_ending = False
        self._is_stopped = False
        self._end = NEVER

    def uncommit(self, checkpoint: Checkpoint, *, by: Catalog) -> None:
        """Uncommit a checkpoint through a catalog of the root, and remove its shards after the grace time."""
        # Whoever holds the lock knows of all that this job has uncommitted.
        with self._lock:
            by.uncommit(checkpoint)
            self._uncommitted_s[checkpoint.prefix, checkpoint.attempt] = self._clock()

    def wake(self) -> None:
        """Have removed what is due, without waiting for that."""
        with self._lock:
            self._is_woken = True
            if self._thread is None and self._may_remove() and self._has_work():
                self._try(self._start)

    def _start(self) -> None:
        self._thread = started(self._run, name="cloudckpt-cleaner")

    def settle(self) -> None:
        """Wait until what was due is removed, and what others left."""
        if (thread := self._thread) is not None:
            thread.join()

    def end(self, patience_s: float) -> None:
        """Remove what is due, for a moment also of what others left, until that is held up.

        A store that hangs holds up the end for no longer than `patience_s`: what is under way is given up then.
        """
        end = Deadline.after(patience_s, "the end of the job")
        self._wait(min(_SWEEPING_S, patience_s))
        self._is_ending = True
        self._end = end
        if self._wait(end.left_s(time.monotonic())):
            self._try(partial(self._remove_due, self._may_remove))
        self.stop()

    def make_room(self, *, go_on: Callable[[], bool]) -> int:
        """Remove in this thread what is due, and what others left: a save has no room, so that none after it has any.

        Where that was nothing, the shards of what was pruned last are waited for, if their grace time is over soon.

        Args:
            go_on: asked between requests, and now and then while it waits.

        Returns:
            How many objects were removed; what writers that were killed did not finish is not counted.
        """
        before = self._removed_count
        while (thread := self._thread) is not None and go_on():
            thread.join(_LOOK_S)  # it is at the same work
        self._try(partial(self._remove_due, go_on))
        self._try(partial(self._sweep, go_on, is_asked=True))
        if self._removed_count == before and self._wait_for_grace(go_on):
            self._try(partial(self._remove_due, go_on))
        return self._removed_count - before

    def _wait_for_grace(self, go_on: Callable[[], bool]) -> bool:
        """Wait until one more is due, if that is soon; tell whether it is."""
        with self._lock:
            due_s = min(self._uncommitted_s.values(), default=math.inf) + self._grace_s
        left_s = due_s - self._clock()
        if left_s > _GRACE_AT_MOST_S:
            return False
        stop_s = time.monotonic() + left_s
        while go_on() and (left_s := stop_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_S))
        return bool(self._due())

    def _wait(self, timeout_s: float) -> bool:
        """Wait until nothing is removed any more; tell whether that is so."""
        thread, stop_s = self._thread, time.monotonic() + timeout_s
        while thread is not None and thread.is_alive() and self._may_remove() and time.monotonic() < stop_s:
            thread.join(_LOOK_S)
        return thread is None or not thread.is_alive()

    def stop(self) -> None:
        """Make no further request."""
        self._is_stopped = True

    def _may_remove(self) -> bool:
        return not (self._is_stopped or self._is_held() or self._end.left_s(time.monotonic()) <= 0)

    def _may_sweep(self) -> bool:
        return not self._is_ending and self._may_remove()

    def _has_work(self) -> bool:
        return bool(self._due()) or (self._is_sweep_due() and not self._is_ending)

    def _is_sweep_due(self) -> bool:
        return self._sweep_after_s is not None and self._clock() >= self._next_sweep_s

    def _run(self) -> None:
        try:
            while not self._is_done():
                self._try(partial(self._remove_due, self._may_remove))
                self._try(partial(self._sweep, self._may_sweep))
        except BaseException:
            # The end of a thread: nobody waits for it, and no checkpoint depends on it.
            logger.exception("removing what no checkpoint needs any more failed")
            self._thread = None

    def _is_done(self) -> bool:
        """Tell whether nothing was asked for since it was looked for; from then on there is no thread."""
        with self._lock:
            is_woken, self._is_woken = self._is_woken, False
            if is_woken and self._may_remove() and self._has_work():
                return False
            self._thread = None
            return True

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CloudCkptError as exc:
            self._note(f"what no checkpoint needs any more could not be removed, and stays for a later try: {exc}")

    def _due(self) -> list[tuple[str, str]]:
        now_s = self._clock()
        return [place for place, at_s in self._uncommitted_s.items() if now_s - at_s >= self._grace_s]

    def _remove_due(self, go_on: Callable[[], bool]) -> None:
        """Remove the shards of what was uncommitted a grace time ago."""
        with self._lock:
            due = self._due()
        for prefix, attempt in due:
            if not go_on():
                return
            try:
                keys = self._catalog.leftovers(prefix, attempt)
                is_gone = delete_below(self._catalog.store, keys, below=[f"{prefix}{attempt}/"], go_on=go_on)
                self._removed_count += len(keys) if is_gone else 0
            except CheckpointExistsError:
                logger.warning("%s stands there again, which was pruned; it stays", prefix)
                is_gone = True
            if is_gone:
                with self._lock:
                    self._uncommitted_s.pop((prefix, attempt), None)

    def _sweep(self, go_on: Callable[[], bool], *, is_asked: bool = False) -> None:
        """Remove what other jobs left, and note when to look again: never, if all of it is gone."""
        if self._sweep_after_s is None or not (is_asked or self._is_sweep_due()) or not go_on():
            return
        # Should it fail, or be held up, it is not tried at every save.
        self._next_sweep_s = self._clock() + _AGAIN_S
        # First, because it needs no room: what marks an attempt as void does.
        unfinished_left_s = remove_unfinished(self._catalog.store, older_than_s=self._sweep_after_s)
        found = find_orphans(self._catalog, older_than_s=self._sweep_after_s)
        with self._lock:
            own = {prefix for prefix, _ in self._uncommitted_s}
        orphans = [orphan for orphan in found if orphan.prefix not in own]
        removed_bytes = 0
        for orphan in orphans:
            if not go_on():
                return
            is_due = orphan.is_due(self._sweep_after_s)
            if is_due and remove_orphan(self._catalog, orphan, go_on=go_on):
                removed_bytes += orphan.total_bytes
                self._removed_count += orphan.object_count
        young = [one for one in orphans if one.object_count and not one.is_due(self._sweep_after_s)]
        left_s = max((self._sweep_after_s - one.age_s for one in young), default=math.inf)
        self._next_sweep_s = self._clock() + min(left_s, unfinished_left_s)
        if removed_bytes:
            logger.info("removed %d bytes that earlier jobs left at %s", removed_bytes, self._catalog.store.url)
