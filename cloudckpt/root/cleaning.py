"""Remove objects that belong to no checkpoint any more, in a thread of its own, once readers had time to notice.

    uncommitted by this job ──grace time──▶ pinned meanwhile? ──▶ put back
                                             ╰──▶ void ──still not pinned──▶ shards deleted ──▶ void deleted
                                                                                ╰─ what others share stays, void
    left by other jobs      ──▶ `sweep`

Who puts a pinned checkpoint back creates its manifest; who removes its shards creates it, too, as `void`: the store
lets one of the two, also between processes. Whoever takes a checkpoint away does it through here.
Keeps FORMAT invariants 7 to 9.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import CheckpointExistsError, CloudCkptError, ManifestError, StorageError
from cloudckpt.options import as_seconds
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, prefix_of
from cloudckpt.root.removal import delete_below
from cloudckpt.root.sharing import Shared, shared_below
from cloudckpt.root.sweep import find_orphans, remove_orphan, remove_unfinished
from cloudckpt.threads import new_lock, started

__all__ = ["Cleaner"]

logger = logging.getLogger(__name__)

# How long the end of a job lets a sweep go on.
_SWEEPING_S = 5.0
# How often that wait looks whether it is held up.
_LOOK_S = 0.1
_AGAIN_S = 3_600.0
# A save that has no room waits no longer for shards in their grace time.
_GRACE_AT_MOST_S = 60.0


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
        # Of these others may share shards; and what of them is left because somebody does.
        self._sharing: set[tuple[str, str]] = set()
        self._remnants: set[tuple[str, str]] = set()
        self._removed_count = 0
        self._next_sweep_s = clock()
        self._lock = new_lock()
        self._thread: threading.Thread | None = None
        self._is_woken = False
        self._is_ending = False
        self._is_stopped = False
        self._end = NEVER

    def uncommit(self, found: Checkpoint | ManifestError, *, by: Catalog) -> None:
        """Uncommit a checkpoint through a catalog of the root, and remove its shards after the grace time.

        Of one that nobody can read, all that stands there.
        """
        place = prefix_of(found), found.attempt if isinstance(found, Checkpoint) else ""
        # Whoever holds the lock knows of all that this job has uncommitted.
        with self._lock:
            by.uncommit(place[0])
            if not isinstance(found, Checkpoint) or found.manifest.is_sharing:
                self._sharing.add(place)
            self._uncommitted_s[place] = self._clock()

    def put_back(self, prefix: str, *, by: Catalog) -> bool:
        """Commit a pinned checkpoint again whose manifest is gone, through a catalog of the root; tell whether it is.

        Its shards are not removed then.
        """
        with self._lock:
            if by.put_back(prefix) is None:
                return False
            for place in [place for place in self._uncommitted_s if place[0] == prefix]:
                del self._uncommitted_s[place]
            return True

    def uncommitted(self) -> int:
        """Return how many checkpoints were uncommitted of which objects may be there."""
        return len(self._uncommitted_s)

    def seconds_left(self) -> float:
        """Return in how many seconds all that was uncommitted is due; 0 if it is."""
        if len(self._due()) == len(self._uncommitted_s):
            return 0.0
        # Never 0 while one is not due, however numbers are rounded.
        return max(_LOOK_S, max(self._uncommitted_s.values()) + self._grace_s - self._clock())

    def remove_due(self) -> int:
        """Remove in this thread what is due, whatever it takes; return how many objects that were.

        Raises:
            StorageError: the store refuses, or is away.
        """
        before = self._removed_count
        self._remove_due(lambda: True)
        return self._removed_count - before

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
        pinned = self._catalog.pins.prefixes() if due else set()
        for place in due:
            if place[0] in pinned and go_on():
                self.put_back(place[0], by=self._catalog)
                self._forget(place)
        closed = [place for place in due if place[0] not in pinned and go_on() and self._close(place)]
        # A pin of which anybody was told that it holds was there before: none is put back where a void one stands.
        pinned = self._catalog.pins.prefixes() if closed else set()
        # What was shared before may not be by now: the last one that did is perhaps among these.
        left = sorted(self._remnants) if closed else []
        sharing = {place[0] for place in [*closed, *left] if place in self._sharing and place[0] not in pinned}
        shared = shared_below(self._catalog, sharing) if sharing else Shared()
        for place in [*closed, *left]:
            if not go_on():
                return
            if place[0] in pinned:
                self._forget(place)
            else:
                self._remove(place, shared, go_on)

    def _close(self, place: tuple[str, str]) -> bool:
        """Keep what is to go from being put back; False if it was put back meanwhile."""
        with self._lock:
            if place not in self._uncommitted_s:
                return False
            try:
                self._catalog.void(place[0], is_sharing=place in self._sharing)
            except StorageError as exc:
                # Where there is no room for a void manifest, there is none for a whole one, nor for a pin.
                if not exc.is_full:
                    raise
            return True

    def _remove(self, place: tuple[str, str], shared: Shared, go_on: Callable[[], bool]) -> None:
        prefix, attempt = place
        is_shared = False
        try:
            found = self._catalog.leftovers(prefix, attempt)
            keys = [key for key in found if not shared.spares(key)]
            is_shared = len(keys) < len(found)
            below = f"{prefix}{attempt}/" if attempt else prefix
            is_gone = delete_below(self._catalog.store, keys, below=[below], go_on=go_on)
            self._removed_count += len(keys) if is_gone else 0
            if is_gone and not is_shared:
                self._catalog.withdraw_void(prefix)
        except CheckpointExistsError:
            logger.warning("%s stands there again, which was pruned; it stays", prefix)
            is_gone = True
        if is_gone:
            self._forget(place)
        if is_shared:
            self._remnants.add(place)
            self._sharing.add(place)

    def _forget(self, place: tuple[str, str]) -> None:
        with self._lock:
            self._uncommitted_s.pop(place, None)
        self._remnants.discard(place)
        self._sharing.discard(place)

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
            own = {prefix for prefix, _ in [*self._uncommitted_s, *self._remnants]}
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
