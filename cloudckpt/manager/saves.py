"""Make the saves of one job on one root, one at a time, and tell all who are to know what became of each.

    begin: wait for the one before ─▶ capture ─▶ agree with all ranks ─▶ schedule.begun
    then:  upload, commit                    here, or from a copy in a thread of its own
    ended: epoch, schedule and journal are told
    tidy:  prune, while no end is near: no part of a save, and the next one does not wait for it

A save that has failed in the background keeps no new one from being made: the work is done first, and told of then.

The training's thread enters; that of a save in the background ends it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal, TypeVar, get_args

import xxhash

from cloudckpt.deadline import NEVER, Deadline
from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    FormatVersionError,
    ManifestError,
    OptionsError,
    RankLostError,
    SaveFailedError,
    tells_outcome,
)
from cloudckpt.loading import Rest
from cloudckpt.manager.tolerance import Tolerance
from cloudckpt.options import Options
from cloudckpt.preemption import Schedule
from cloudckpt.ranks import Accord, Group, Vote, plain_errors, refuse_lonely_rank
from cloudckpt.report import Entry, Journal
from cloudckpt.root import (
    Catalog,
    Checkpoint,
    Epoch,
    Pin,
    Pruner,
    RetentionRule,
    Roots,
    committed_as,
    give_name,
    named_candidates,
    no_name,
    pin,
    prefix_of,
    refuse_pinned,
    unpin,
)
from cloudckpt.saving import (
    Background,
    PendingSave,
    PlanMemory,
    Reuse,
    ReuseMemory,
    SaveHandle,
    Session,
    Uncommitted,
    begin_save,
    expected_shards,
)
from cloudckpt.state import Files, bind, capture, captured, collector_at_rest
from cloudckpt.store import RetryingStore
from cloudckpt.threads import new_lock
from cloudckpt.transfer import Gauge, Slabs

__all__ = ["Asked", "Exists", "Home", "Saves", "Written"]

logger = logging.getLogger(__name__)

# How often a wait for what is pruned looks whether an end is near.
_LOOK_S = 0.1
# How long a save waits for what is pruned after it, and the end of a job for what is removed.
_PRUNING_S = 10.0
_ENDING_S = 30.0
# How much two ends may differ and be one: the clock moves while they are computed.
_NOISE_S = 0.05

_Result = TypeVar("_Result")

Exists = Literal["raise", "skip", "replace"]
"""What a save does where this job has committed that step already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a caller asks of one save, beside its step and its state.

    Attributes:
        metrics: numbers to be kept.
        metadata: values to be kept.
        files: to go beside the state.
        name: that the checkpoint gets; "" for none.
        exists: what to do where the step is saved.
        commits: whether it is committed as soon as it can be.
    """

    metrics: Mapping[str, float] | None = None
    metadata: Mapping[str, object] | None = None
    files: Files | None = None
    name: str = ""
    exists: Exists = "raise"
    commits: bool = True

    def __post_init__(self) -> None:
        if self.exists not in get_args(Exists):
            raise OptionsError(f"exists is {self.exists!r}; give {' or '.join(map(repr, get_args(Exists)))}")


@dataclass(slots=True, kw_only=True, eq=False)
class Written:
    """A save of which all ranks have written their parts, or do so, and what became of it.

    Attributes:
        step: the training step.
        entry: the journal's; None where nothing was to be written.
        handle: of the thread that writes; None if that is done.
        parts: what is to be committed, once all is written.
        replaced: the checkpoint that goes when this one is committed.
        checkpoint: what is committed.
        error: why nothing can be committed, which was forgiven.
        is_abandoned: whether it was given up.
    """

    step: int
    entry: Entry | None = None
    handle: SaveHandle | None = None
    parts: Uncommitted | None = None
    replaced: Checkpoint | None = None
    checkpoint: Checkpoint | None = None
    error: BaseException | None = None
    is_abandoned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """One root of a job, and what is done there.

    Attributes:
        store: the root's.
        catalog: over that store.
        pruner: by the job's rules.
        epoch: the job's there.
    """

    store: RetryingStore
    catalog: Catalog
    pruner: Pruner
    epoch: Epoch

    @classmethod
    def of(
        cls,
        store: RetryingStore,
        pruner: Callable[[Catalog], Pruner],
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ) -> Home:
        """Put together what a root needs; nothing is asked of it."""
        catalog = Catalog(store)
        epoch = Epoch(catalog, is_single_writer=options.single_writer, clock=clock)
        return cls(store=store, catalog=catalog, pruner=pruner(catalog), epoch=epoch)


class Saves:
    """The saves of one job.

    Attributes:
        homes: the root that saves go to, and perhaps one that takes them when the first is down.
        roots: the same, to be read as one.
        options: sizes, parallelism, patience; also of restores.
        save_rng: whether the generators of this process go with every state.
        background: the save that may be under way.
        is_interrupted: whether a person has interrupted the job: its end waits for no removals then.
        coming: what the newest restore left for later; None if nothing.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        *,
        options: Options,
        schedule: Schedule,
        journal: Journal,
        tolerance: Tolerance,
        save_rng: bool,
        reuse_unchanged: bool,
    ) -> None:
        self.homes = tuple(homes)
        self.roots = Roots([home.catalog for home in homes])
        for home, other in permutations(homes, 2):
            home.epoch.beside = other.epoch
        self._tolerance = tolerance
        self.background = Background(patience_s=options.finish_timeout_s, tidy=self._prune)
        self.options = options
        self._schedule = schedule
        self._journal = journal
        self.save_rng = save_rng
        self._plan = PlanMemory()
        # Of the shards that were saved last; None where all are sent each time.
        self._shards = ReuseMemory() if reuse_unchanged else None
        self._slabs = Slabs()
        self._vote: Vote | None = None
        self._accord: Accord | None = None
        self._accord_of: Group | None = None
        # What was compared by the accord, and under which names.
        self._compared: set[str] = set()
        self._call_count = 0
        self._call = ""
        self._to_prepare: MutableMapping[str, object] | None = None
        self._is_beginning = False
        # The step of a save of which nothing is known, and what asks the store.
        self._doubted: tuple[int, Callable[[], Checkpoint | None]] | None = None
        self.is_interrupted = False
        self.coming: Rest | None = None
        # What the save under way replaces.
        self._to_replace: Checkpoint | None = None
        # What is written, and neither committed nor abandoned.
        self._uncommitted: list[Written] = []
        # The newest commit after which nothing was pruned yet.
        self._to_prune: deque[Checkpoint] = deque(maxlen=1)
        # Held by who prunes: the thread of the save before, or of one that has no room.
        self._pruning = new_lock()
        self._was_end_near = False
        # The step of the newest `should_save`, and whether a notice is told.
        self._asked_step, self._is_notice_told = -1, False
        # Removes what the newest save left on a root that was down.
        self._to_take_back: deque[Callable[[], None]] = deque(maxlen=1)

    def are_due(self, step: int) -> bool:
        """Tell whether to save after `step`, as the schedule and all ranks have it; asked at every step."""
        self._journal.meter.note_step(step)
        self._asked_step = step
        if self._to_prepare is not None:
            # By now the optimizers have their state.
            state, self._to_prepare = self._to_prepare, None
            self._touch_ahead(state)
        self._compare("should_save", self._schedule.terms())
        is_due = self._schedule.ask(step, self._votes())
        self._tell_notice()
        if self._was_end_near and self._may_prune():
            self.background.tidy_alone()  # what the notice had put off, which was false
        self._was_end_near = not self._may_prune()
        return is_due

    def _votes(self) -> Vote:
        group = Group.of_world()
        if self._vote is None or self._vote.size != group.size:
            timeout_s = self.options.progress_timeout_s
            self._vote = Vote(
                rank=group.rank,
                size=group.size,
                timeout_s=timeout_s,
                check=self._check,
                place=group.place,
                home=group.home,
            )
        return self._vote

    def _compare(self, name: str, mine: Mapping[str, str | int | None]) -> None:
        """Compare, once, what this job's ranks are asked for; raises OptionsError, on every rank, if they differ."""
        group = Group.of_world()
        if group.size == 1:
            return
        if self._accord is None or self._accord_of is not group:
            place = xxhash.xxh3_64_hexdigest(self.homes[0].store.url.encode())
            self._accord, self._accord_of = group.accord(place), group
            self._compared.clear()
        if name not in self._compared:
            self._accord.compare(name, mine)
            self._compared.add(name)

    def _compare_call(self, step: int, asked: Asked, on_busy: str) -> None:
        """Compare what the ranks give to a save: some of it decides whether a rank comes to meet the others."""
        group = Group.of_world()
        if group.size == 1:
            return
        self._compare("save", self._tolerance.terms)
        if group.rank == 0 or self.homes[0].pruner.has_rules:
            # Only rank 0 prunes.
            self._compare("retention", {"retention": "given" if self.homes[0].pruner.has_rules else "not given"})
        mine: dict[str, str | int | None] = {} if self._schedule.is_preempted else {"on_busy": on_busy}
        if self.background.step == step or self.homes[0].epoch.newest_of(step) is not None:
            mine["exists"] = asked.exists
        if asked.name:
            mine["name"] = asked.name
        before, self._call_count = self._call, self._call_count + 1
        self._call = f"save {self._call_count} of step {step}"
        self._compare(self._call, mine)
        self._compared.discard(before)
        if group.rank == 0 and before and self._accord is not None:
            self._accord.forget(before)

    @property
    def _check(self) -> Callable[[], None] | None:
        """What raises if other ranks were asked for something else, and will not come."""
        return None if self._accord is None else self._accord.check

    def resume(self, checkpoint: Checkpoint | None, coming: Rest | None = None) -> None:
        """Go on from a checkpoint, of which something may still be to come, or from nothing."""
        self.coming = coming
        self.homes[0].epoch.resume(checkpoint)
        if not self.homes[0].epoch.number:
            self._doubted = None  # what that save has committed is of the line that was left

    def begin_anew(self) -> None:
        """Go on from nothing, also after saves; what failed in the background before is told all the same."""
        self.rest()
        self.resume(None, self.coming)

    def save(
        self,
        step: int,
        state: MutableMapping[str, object],
        asked: Asked,
    ) -> Checkpoint | None:
        """Save, and return once it is committed; raises as `CheckpointManager.save` does."""
        if (found := self._already(step, asked, "wait")) is not None:
            return found
        try:
            return self._save(step, state, asked)
        except CloudCkptError as exc:
            if not self._tolerance.forgives(step, exc):
                raise
            return None

    def _save(
        self,
        step: int,
        state: MutableMapping[str, object],
        asked: Asked,
    ) -> Checkpoint:
        self.background.refuse_own_thread()
        entry, pending = self._begin(step, state, asked, slabs=None)

        def finish() -> Checkpoint:
            with entry.bar(f"saving step {step}") as bar:
                checkpoint = pending.finish(bar)
            entry.unblocked(step)
            return checkpoint

        return self._finished(step, entry, pending, finish)

    def _finished(
        self, step: int, entry: Entry, what: PendingSave | Uncommitted, finish: Callable[[], Checkpoint]
    ) -> Checkpoint:
        """Commit here, note what became of it, and prune."""
        self._doubted = step, what.look
        try:
            checkpoint = finish()
        except BaseException as exc:
            self.is_interrupted = isinstance(exc, KeyboardInterrupt)
            self._ended(step, entry, what.take_back, self._all_the_same(step, exc) or exc)
            raise
        try:
            self._ended(step, entry, what.take_back, checkpoint)
            self._doubted = None
            if self._schedule.is_preempted:
                self.background.log_earlier(step)
            # The checkpoint is safe; a store that answers no delete must not keep training from going on.
            end = Deadline.after(_PRUNING_S, "what is pruned while training waits")
            self._wait_tidy(_PRUNING_S)
            # What was begun before an announced end is not drawn out if that passes meanwhile: it may be a little late.
            if not self._was_end_near and self.background.wait_tidy(0):
                self._prune(end)
        except BaseException as exc:
            self.is_interrupted = isinstance(exc, KeyboardInterrupt)
            _note_saved(step, exc)
            raise
        return checkpoint

    def save_parts(self, step: int, state: MutableMapping[str, object], asked: Asked, *, background: bool) -> Written:
        """Have all ranks write their parts, here or from a copy; raises as `CheckpointManager.save_parts` does."""
        if (found := self._already(step, asked, "wait")) is not None:
            return Written(step=step, checkpoint=found)
        written = Written(step=step)
        try:
            entry, pending = self._begin(step, state, asked, slabs=self._slabs if background else None)
            written.entry = entry
            written.replaced, self._to_replace = self._to_replace, None
            ended = partial(self._ended, step, entry, pending.take_back)
            if background:
                finish = partial(self._write, written, pending)
                written.handle = self.background.begin(step, pending, ended, finish)
            else:
                self._write_here(written, pending, ended)
        except CloudCkptError as exc:
            if not self._tolerance.forgives(step, exc):
                self.background.note_earlier(exc)
                raise
            written.error = exc
            return written
        entry.unblocked(step, staged_bytes=pending.size_bytes if background else None)
        return written

    def _write(self, written: Written, pending: PendingSave, gauge: Gauge | None = None) -> None:
        written.parts = pending.finish_parts(gauge)
        self._uncommitted.append(written)
        if written.entry is not None:
            written.entry.rest()

    def _write_here(
        self, written: Written, pending: PendingSave, ended: Callable[[Checkpoint | BaseException], bool]
    ) -> None:
        try:
            with self._journal.begin(rank=Group.of_world().rank).bar(f"writing step {written.step}") as bar:
                self._write(written, pending, bar)
        except BaseException as exc:
            self.is_interrupted = isinstance(exc, KeyboardInterrupt)
            ended(exc)
            raise

    def commit_parts(self, written: Written) -> Checkpoint | None:
        """Commit what was written, with all ranks; raises as `SavedParts.commit` does."""
        self.background.refuse_own_thread()
        step, error = written.step, written.error
        if written.is_abandoned:
            raise OptionsError(f"what was written of step {step} was abandoned, and cannot be committed; save it again")
        if written.handle is not None:
            error = written.handle.exception()
        if error is not None:
            if self._tolerance.forgives(step, error):
                return None
            raise error
        entry, parts = written.entry, written.parts
        if entry is None or parts is None or (written.checkpoint is not None and Group.of_world().size == 1):
            return written.checkpoint
        self.background.wait()  # its session would be in the way
        commit = partial(
            parts.commit, self.options, may=partial(self._refuse_late, written, parts.epoch), check=self._check
        )
        if written.checkpoint is not None:
            return commit()  # for a rank that was not told
        entry.resume()
        self._to_replace = written.replaced
        try:
            written.checkpoint = self._finished(step, entry, parts, commit)
        except CloudCkptError as exc:
            entry.rest()
            if not self._tolerance.forgives(step, exc):
                raise
            return None
        self._forget(written)
        return written.checkpoint

    def _refuse_late(self, written: Written, epoch: int) -> None:
        """Refuse, on rank 0, to commit what would not be the newest of this job."""
        home = next((home for home in self.homes if home.epoch.number == epoch), None)
        newest = self.homes[0].epoch.newest
        if home is None or (newest is not None and newest.order > (epoch, written.step)):
            newer = "another epoch" if home is None or newest is None else f"step {newest.step}"
            raise OptionsError(
                f"step {written.step} was written in epoch {epoch} of this job, which has committed or begun {newer} "
                "since, so that nobody would find it; commit in the order of the steps. Nothing was committed: abandon "
                "it, and save again"
            )

    def abandon_parts(self, written: Written) -> None:
        """Give up what was written, and remove it, on rank 0; nothing if it is committed."""
        if written.is_abandoned or written.checkpoint is not None or written.entry is None:
            return
        written.is_abandoned = True
        self._forget(written)
        if written.handle is not None and written.handle.exception() is not None:
            return
        if written.parts is not None:
            written.parts.discard()
            self._schedule.failed(written.step)
            written.entry.failed(written.step, SaveFailedError("what was written of it was abandoned"))

    def _forget(self, written: Written) -> None:
        if written in self._uncommitted:
            self._uncommitted.remove(written)

    def _all_the_same(self, step: int, error: BaseException) -> Checkpoint | None:
        """Return what a save has committed though it raised; an exception that is no answer of the store tells nothing.

        If the store tells nothing yet, because the request is still under way, the next call for that step asks again.
        """
        if isinstance(error, CommitUnknownError):
            return None
        if tells_outcome(error):
            self._doubted = None
        found = self._doubtful(step)
        if found is not None:
            _note_saved(step, error)
        # Several ranks would not all know of it.
        return found if Group.of_world().size == 1 else None

    def _doubtful(self, step: int) -> Checkpoint | None:
        """Ask whether a save of this step, of which nothing is known, was committed; then that is known."""
        if self._doubted is None or self._doubted[0] != step:
            return None
        if (found := self._doubted[1]()) is not None:
            self._doubted = None
        return found

    def async_save(
        self,
        step: int,
        state: MutableMapping[str, object],
        asked: Asked,
        *,
        on_busy: Literal["wait", "skip"],
    ) -> SaveHandle:
        """Copy, and return while the copy is saved; raises as `CheckpointManager.async_save` does."""
        if on_busy not in ("wait", "skip"):
            raise OptionsError(f"on_busy is {on_busy!r}; give 'wait' or 'skip'")
        if (found := self._already(step, asked, on_busy)) is not None:
            return SaveHandle.ended(step, found)
        if on_busy == "skip" and not self.is_preempted and self._is_busy(step):
            logger.info("rank %d: step %d is skipped: another save is under way", Group.of_world().rank, step)
            return SaveHandle(step)
        try:
            entry, pending = self._begin(step, state, asked, slabs=self._slabs)
            handle = self.background.begin(step, pending, partial(self._ended, step, entry, pending.take_back))
        except CloudCkptError as exc:
            if not self._tolerance.forgives(step, exc):
                self.background.note_earlier(exc)
                raise
            return SaveHandle.ended(step, exc)
        entry.unblocked(step, staged_bytes=pending.size_bytes)
        if self._schedule.is_preempted:
            # What this raised would end the process by an error, not by its exit code.
            self.background.log_earlier(step, handle)
        self.background.tell_earlier(handle)
        return handle

    def _already(self, step: int, asked: Asked, on_busy: str) -> Checkpoint | None:
        """Return what this job has saved of a step already, if that is to do; the same on every rank."""
        self._compare_call(step, asked, on_busy)
        if Group.of_world().size == 1 and (late := self._doubtful(step)) is not None:
            logger.warning("step %d was saved, though its save was interrupted", step)
            for home in self.homes:
                home.epoch.note(late)
        if asked.exists == "raise":
            return None
        if self.background.step == step:
            self.background.wait()
        if asked.exists == "replace" or (found := self.homes[0].epoch.newest_of(step)) is None:
            return None
        rank = Group.of_world().rank
        is_gone = rank == 0 and not self._home_of(found).epoch.is_there(found)
        if self._votes().largest([int(is_gone)], what=f"save of step {step}, if it is gone")[0]:
            logger.warning("rank %d: step %d was saved already, and is gone: it is saved again", rank, step)
            return None
        logger.info("rank %d: step %d is saved already", rank, step)
        if asked.name:
            home = self._home_of(found)
            give = partial(give_name, home.catalog, found, asked.name, epoch=home.epoch.number)
            self._led(f"name of step {step}", give)
        return found

    @property
    def is_preempted(self) -> bool:
        """Whether notice was given; a lone process hears it at once."""
        if Group.of_world().size == 1:
            self._schedule.hear()
            self._tell_notice()
        return self._schedule.is_preempted

    def _tell_notice(self) -> None:
        """Tell once, on rank 0, that notice was given; once more if it was false and another one comes."""
        end = self._schedule.deadline
        if end is not None and not self._is_notice_told and (group := Group.of_world()).rank == 0:
            left_s = self._schedule.seconds_left()
            self._journal.preempted(self._asked_step, reason=end.reason, left_s=left_s, world_size=group.size)
        self._is_notice_told = end is not None

    def prepare(self, state: MutableMapping[str, object]) -> None:
        """Make memory ready for copies, now and once more when training has made a step."""
        self._touch_ahead(state)
        self._to_prepare = state

    def _touch_ahead(self, state: MutableMapping[str, object]) -> None:
        group = Group.of_world()
        sizes, is_pinned = expected_shards(
            capture(bind(state)).leaves,
            self.options,
            rank=group.rank,
            size=group.size,
            engine=self._journal.store.engine,
        )
        self._slabs.touch_ahead(sizes, is_pinned=is_pinned)

    def delete(self, step: int) -> None:
        """Delete the checkpoint of a step, on rank 0; raises as `CheckpointManager.delete` does, on every rank."""
        self.background.wait()  # it may be pruning
        self._led(f"delete of step {step}", lambda: self._delete(step))
        for home in self.homes:
            home.epoch.forget(step)

    def prune(self, rules: Sequence[RetentionRule]) -> None:
        """Prune after the newest commit by more rules, on rank 0; raises as `CheckpointManager.prune` does."""
        self.rest()
        self._led("prune", partial(self._prune_by, rules))

    def _prune_by(self, rules: Sequence[RetentionRule]) -> None:
        newest = self.homes[0].epoch.newest
        if newest is None or not self._may_prune():
            return
        home = self._home_of(newest)
        with self._pruning:
            try:
                home.pruner.prune_after(newest, home.epoch.line, go_on=self._may_prune, more=rules)
            finally:
                home.pruner.clean()

    def pin(self, step: int, note: str) -> Pin:
        """Pin the checkpoint of a step; raises as `CheckpointManager.pin` does."""
        return self._led(f"pin of step {step}", lambda: pin(self.roots, step, note))

    def unpin(self, step: int) -> Pin:
        """Take the pin of a step away; raises as `CheckpointManager.unpin` does."""
        return self._led(f"unpin of step {step}", lambda: unpin(self.roots, step))

    def why_kept(self, step: int) -> tuple[str, ...]:
        """Say what keeps the checkpoint of a step; raises as `CheckpointManager.why_kept` does."""
        found = self.roots.find(step)
        home = self._home_of(found)
        line = home.epoch.line_so_far([one.catalog.claims for one in self.homes])
        in_use = home.epoch.resumed_from if home.epoch.newest is None else None
        return home.pruner.why_kept(line, in_use).get(found.order, ())

    def _led(self, what: str, call: Callable[[], _Result]) -> _Result:
        """Let rank 0 do what every rank asks for, and every rank have what came of it, also an error."""
        group = Group.of_world()
        if group.size == 1:
            return call()
        self.background.wait()  # its session would be in the way
        deadline_s = self.options.progress_timeout_s
        with plain_errors(about=group.about), group.session(what, deadline_s=deadline_s, check=self._check):
            return group.agree(what, lambda: None, lambda _: call())

    def remove(self, what: Checkpoint | str) -> None:
        """Remove a checkpoint, or a name with what nothing else keeps; raises as `CheckpointManager.remove` does."""
        self.background.wait()  # it may be pruning
        said = what if isinstance(what, str) else what.url
        call = partial(self._remove_name, what) if isinstance(what, str) else partial(self._remove_one, what)
        gone = self._led(f"removal of {said}", call)
        for home in self.homes:
            if home.epoch.newest is not None and home.epoch.newest.order in gone:
                home.epoch.forget(home.epoch.newest.step)

    def _remove_one(self, checkpoint: Checkpoint) -> list[tuple[int, int]]:
        self._delete_these(self.roots.holders_of(checkpoint))
        return [checkpoint.order]

    def _remove_name(self, name: str) -> list[tuple[int, int]]:
        """Take a name away, and let go of what only that has kept: without rules it goes, before its name does."""
        places = named_candidates(self.roots).get(name)
        if not places:
            raise no_name(self.roots, name)
        going: list[tuple[Catalog, Checkpoint | ManifestError]] = []
        taken = []
        for home in self.homes:
            mine = [one for catalog, one in places if catalog is home.catalog]
            held = home.catalog.pins.held() if mine else None
            if held is None:
                continue
            taken.append((home.catalog, mine))
            kept = held.pinned.union(one.prefix for one in held.names if one.name != name)
            found = [committed_as(home.catalog, one) for one in mine if one.prefix not in kept]
            unnamed = [] if home.pruner.has_rules else [one for one in found if one is not None]
            going += [(home.catalog, one) for one in unnamed if home.catalog.is_still(one)]
        if going:
            self._delete_these(going)
        for catalog, mine in taken:
            catalog.pins.take(mine)
        return [one.order for _, one in going if isinstance(one, Checkpoint)]

    def _delete(self, step: int) -> None:
        """Delete it wherever it stands; also what nobody can read, because it was asked for by name."""
        self._delete_these(self.roots.holders(step))

    def _delete_these(self, holders: Sequence[tuple[Catalog, Checkpoint | ManifestError]]) -> None:
        homes = [next(home for home in self.homes if home.catalog is catalog) for catalog, _ in holders]
        for home, (_, found) in zip(homes, holders, strict=True):
            if isinstance(found, FormatVersionError):
                raise found
            refuse_pinned(home.catalog, prefix_of(found))
            if home.epoch.number:
                home.catalog.claims.fence(home.epoch.number)
        for home, (catalog, found) in zip(homes, holders, strict=True):
            if not isinstance(found, Checkpoint):
                logger.warning("deleting what cannot be read: %s", found)
            home.pruner.delete(found, self._note_deleted)
            logger.info("deleted %s at %s", prefix_of(found).rstrip("/"), catalog.store.url)
        self.roots.mark_if_emptied()

    def _note_deleted(self, found: Checkpoint | ManifestError) -> None:
        if isinstance(found, Checkpoint):
            self._journal.pruned(found, "delete")

    def end(self, *, is_forked: bool = False) -> None:
        """Wait for the save under way, or abandon it; then release the memory. What it raises is `Background.end`'s.

        In a forked child nothing is removed: what the job has pruned is the parent's to remove.
        """
        try:
            self.background.end()
            if not (self.is_interrupted or is_forked):
                self._abandon_all()
            # Who interrupts waits for nothing that is not for a checkpoint.
            patience_s = 0.0 if self.is_interrupted else min(self.options.finish_timeout_s, _ENDING_S)
            stop_s = time.monotonic() + patience_s
            self._wait_tidy(patience_s)
            if not (self.is_interrupted or is_forked) and self._may_prune() and self.background.wait_tidy(0):
                # What a notice had put off.
                self._prune(Deadline(stop_s=stop_s, reason="the end of the job"))
                for home in self.homes:
                    home.pruner.end(stop_s - time.monotonic())
        finally:
            for home in self.homes:
                home.pruner.stop()
            self._slabs.close()

    def _abandon_all(self) -> None:
        for written in self._uncommitted.copy():
            logger.warning("step %d was written and never committed; what was written of it is removed", written.step)
            self.abandon_parts(written)

    def settle(self, timeout: float | None) -> None:
        """Wait for the save under way, and for what is pruned after it; what it raises is `Background.settle`'s."""
        began_s = time.monotonic()
        self.background.settle(timeout)
        self._wait_tidy(None if timeout is None else timeout - (time.monotonic() - began_s))

    def rest(self) -> None:
        """Wait for the save under way and what is pruned after it, whatever became of it."""
        self.background.wait()
        self._wait_tidy()

    def _is_busy(self, step: int) -> bool:
        """Tell whether any rank has a save under way, and none has one that failed and nobody was told."""
        mine = [int(self.background.is_busy), int(self.background.is_untold)]
        try:
            # A rank that knows of the failure comes, too: another one may not know yet, and would wait for it here.
            found = self._votes().largest(mine, what=f"async_save of step {step}")
        except RankLostError:
            if self.background.is_untold:
                self.background.settle()
            raise
        return bool(found[0]) and not found[1]

    def _begin(
        self,
        step: int,
        state: MutableMapping[str, object],
        asked: Asked,
        *,
        slabs: Slabs | None,
    ) -> tuple[Entry, PendingSave]:
        """Wait for a save under way, and agree with all ranks on this one."""
        if self._is_beginning:
            # What a state_dict() of the user's own asks for would take this save's plan away.
            raise OptionsError("this began in the middle of another save; let that one end first")
        refuse_lonely_rank()  # the group of before may have been destroyed
        group = Group.of_world()
        entry = self._journal.begin(rank=group.rank, world_size=group.size)
        try:
            return entry, self._agreed(step, state, asked, entry, group, slabs)
        except BaseException as exc:
            entry.failed(step, exc, is_forgiven=isinstance(exc, CloudCkptError) and self._tolerance.forgives(step, exc))
            raise

    def _agreed(
        self,
        step: int,
        state: MutableMapping[str, object],
        asked: Asked,
        entry: Entry,
        group: Group,
        slabs: Slabs | None,
    ) -> PendingSave:
        self._wait_for_turn(step)
        entry.working(step, in_background=slabs is not None)
        end = self._schedule.end_of_saves()
        options = self.options if end is NEVER else self.options.within(end.left_s(time.monotonic()))
        before = self.homes[0].epoch.newest_of(step) if asked.exists == "replace" else None
        destinations = [home.epoch.step(step, name=asked.name, is_again=before is not None) for home in self.homes]
        self._is_beginning = True
        try:
            with (
                Session.of(
                    group, f"save of {'' if asked.commits else 'parts of '}step {step}", options, check=self._check
                ) as session,
                collector_at_rest(),
            ):
                pending = begin_save(
                    session,
                    captured(state, generators=self.save_rng, files=asked.files, marks_frozen=self._shards is not None),
                    destinations[0],
                    fallback=destinations[1] if len(destinations) > 1 else None,
                    end=self._schedule.end_of_saves if self._schedule.may_end else None,
                    memory=self._plan,
                    metrics=asked.metrics,
                    metadata=asked.metadata,
                    slabs=slabs,
                    room=self._make_room,
                    reuse=self._reuse(asked, group, options),
                )
        finally:
            self._is_beginning = False
        if asked.name:
            for home in self.homes:
                home.pruner.gives_names = True
        self._to_replace = before
        self._schedule.begun(step, entry.work_began_s)
        return pending

    def _reuse(self, asked: Asked, group: Group, options: Options) -> Reuse | None:
        """Return what leaves out of a save what the newest checkpoint of this line holds; the same on every rank.

        A save in two phases sends all: it may be committed when its base is long gone.
        """
        if self._shards is None or not asked.commits:
            return None
        epoch = self.homes[0].epoch
        base = epoch.newest or epoch.resumed_from
        return Reuse(self._shards, base, rank=group.rank, size=group.size, block_bytes=options.block_bytes)

    def _wait_for_turn(self, step: int) -> None:
        """Wait for the save under way, and for what a restore left for later, as long as there is time."""
        left_s = self._time_left()
        while not self.background.wait(max(0.0, min(_LOOK_S, left := left_s()))):
            if left <= 0:
                raise SaveFailedError(
                    f"step {step} was not saved: the save before it is still under way, and has taken all of the time "
                    "that was left before the end"
                )
        # Here, and not where the state is captured: that is in the middle of what the ranks do together.
        if self.coming is not None and not self.coming.ended(left_s):
            raise SaveFailedError(
                f"step {step} was not saved: {self.coming}, is still on its way, and has taken all of the time that "
                "was left before the end. What it belongs to has made no step since, so that the checkpoint which was "
                "restored is the one to go on from"
            )

    def _time_left(self, patience_s: float = math.inf) -> Callable[[], float]:
        """Return what says how much of some seconds from now is left; less once an end is announced before."""
        stop_s = time.monotonic() + patience_s

        def left_s() -> float:
            nonlocal stop_s
            # The earliest that was ever announced: the next one is for saves after it.
            stop_s = min(stop_s, self._schedule.end_of_saves().stop_s)
            return stop_s - time.monotonic()

        return left_s

    def give_up_coming(self, *, is_wanted: bool = True) -> None:
        """Wait for what a restore left for later as the end of a job waits for a save; then read no more of it."""
        if self.coming is not None:
            is_left = is_wanted and not self.is_interrupted
            self.coming.give_up(self._time_left(self.options.finish_timeout_s if is_left else 0.0))

    def _home_of(self, checkpoint: Checkpoint) -> Home:
        return next((home for home in self.homes if home.catalog.holds(checkpoint)), self.homes[0])

    def _ended(
        self, step: int, entry: Entry, take_back: Callable[[], None], outcome: Checkpoint | BaseException
    ) -> bool:
        """Note what became of a save; perhaps in a background save's thread.

        Args:
            step: the training step.
            entry: the journal's.
            take_back: removes what it left on the first root, if it went to the second one.
            outcome: what is committed, or what it failed with.

        Returns:
            Whether nobody need be told that it has failed.
        """
        if isinstance(outcome, BaseException):
            self._schedule.failed(step)
            is_forgiven = self._tolerance.forgives(step, outcome)
            entry.failed(step, outcome, is_forgiven=is_forgiven)
            return is_forgiven
        home, first = self._home_of(outcome), self.homes[0]
        for one in self.homes:
            one.epoch.note(outcome)
        first.epoch.is_doubted = home is not first
        self._tolerance.saved()
        self._schedule.committed(step)
        if home is not first and entry.rank == 0:
            self._journal.note(f"step {step} is saved to {home.store.url}, because {first.store.url} is down")
        is_preempted = self._schedule.is_preempted
        entry.committed(outcome, left_s=self._schedule.seconds_left() if is_preempted else None)
        if entry.rank == 0:
            self._to_prune.append(outcome)
            if home is not first:
                self._to_take_back.append(take_back)
        return False

    def _prune(self, end: Deadline = NEVER) -> None:
        """Prune after the newest commit; later, if an end is near, because deletes would take a save's time."""
        with self._pruning:
            self._prune_now(end)

    def _prune_now(self, end: Deadline) -> None:
        while self._may_prune() and self._to_prune:
            newest = self._to_prune.pop()
            with self._journal.harmless(
                f"step {newest.step} is saved, but pruning failed and is left to the next save"
            ):
                home = self._home_of(newest)
                try:
                    self._remove_replaced(newest)
                    home.pruner.prune_after(newest, home.epoch.line, go_on=self._may_prune, until=end)
                finally:
                    for one in self.homes:
                        one.pruner.clean()
        while self._may_prune() and self._to_take_back:
            self._to_take_back.pop()()

    def _remove_replaced(self, newest: Checkpoint) -> None:
        """Uncommit what the newest commit was to replace, unless a pin or another name than its own keeps it."""
        old = self._to_replace
        if old is None or old.step != newest.step or old.order >= newest.order:
            return  # it is of the save after that, which is under way
        self._to_replace = None
        home = self._home_of(old)
        held = home.catalog.pins.held()
        mine = {one.name for one in held.names if (one.prefix, one.attempt) == (newest.prefix, newest.attempt)}
        kept = {one.prefix for one in held.names if one.name not in mine} | held.pinned
        if old.prefix in kept:
            logger.warning("%s was to be replaced, and stays, because it is pinned or has another name", old.url)
        else:
            home.catalog.claims.fence(home.epoch.number)
            home.pruner.delete(old, self._note_deleted)

    def _make_room(self, catalog: Catalog, go_on: Callable[[], bool]) -> int:
        """Remove at a root that has no room for a save what no checkpoint needs; return how many objects. On rank 0.

        No checkpoint is pruned while an end is near; what was pruned before goes all the same, when it is due.
        """
        home = next(home for home in self.homes if home.store.url == catalog.store.url)
        while not self._pruning.acquire(timeout=_LOOK_S):
            if not go_on():
                return 0
        try:
            newest = home.epoch.newest or home.epoch.resumed_from
            if newest is not None and home.epoch.number and home.catalog.holds(newest) and self._may_prune():
                with self._journal.harmless("there was no room for a save, and pruning failed"):
                    home.pruner.prune_after(
                        newest, home.epoch.line, epoch=home.epoch.number, go_on=lambda: go_on() and self._may_prune()
                    )
            count = home.pruner.make_room(go_on=go_on)
        finally:
            self._pruning.release()
        self._journal.note(f"{home.store.url} had no room for a save; {count} objects that nobody needs were removed")
        return count

    def _may_prune(self) -> bool:
        return not self._schedule.is_end_near

    def _wait_tidy(self, timeout: float | None = None) -> None:
        """Wait until nothing is pruned any more, or an end is near."""
        stop_s = math.inf if timeout is None else time.monotonic() + timeout
        while self._may_prune() and (left_s := stop_s - time.monotonic()) > 0:
            if self.background.wait_tidy(min(_LOOK_S, left_s)):
                break


def _note_saved(step: int, error: BaseException) -> None:
    """Say beside an exception that comes after the commit what is safe."""
    said = f"step {step} is saved"
    if not any(note.startswith(said) for note in getattr(error, "__notes__", ())):
        error.add_note(f"{said}: this came after the commit")
