"""Own one root of checkpoints for one job: when to save, what to keep, what to resume from.

    save        claim epoch (once) ─▶ agree ─▶ upload ─▶ committed ─▶ prune by the retention rules
    async_save  claim epoch (once) ─▶ agree ─▶ copy  ─▶ returns; the rest goes on in a thread of its own
    restore     newest ─▶ load_state; corrupt? say so loudly and try the next older one

Policy only: the catalog decides what exists, `saving` and `loading` lead the ranks, `schedule` says when. With several
ranks each has a manager and calls the same of it; only rank 0's claims, lists and prunes. Keeps FORMAT invariants 5, 8
and 10. A manager belongs to one thread, and has at most one save under way.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

import torch

from cloudckpt.errors import CloudCkptError, OptionsError, RankLostError
from cloudckpt.format import Flat, Index, checkpoint_prefix
from cloudckpt.loading import Candidate, Extra, load_state
from cloudckpt.options import Options
from cloudckpt.preemption import EXIT_PREEMPTED, Latest, Preemption, Schedule
from cloudckpt.ranks import Group, Vote, refuse_lonely_rank
from cloudckpt.report import Advice, Meter, advise
from cloudckpt.root import Catalog, Checkpoint, KeepBest, Orphan, Pruner, RetentionRule, sweep
from cloudckpt.saving import PendingSave, PlanMemory, SaveHandle, Target, begin_save, expected_shards
from cloudckpt.state import apply_rng, bind, capture, packed_rng, rng_name, rng_targets
from cloudckpt.store import StoreStats, open_store, probe_create
from cloudckpt.transfer import Slabs

__all__ = ["CheckpointManager"]

logger = logging.getLogger(__name__)

# Of the time left before the end, kept for what follows the commit.
_MARGIN_S = 0.5
_PHASES = ("plan", "stage", "upload", "gather", "commit")


class CheckpointManager:
    """The checkpoints of one training job, below one root URL.

    ```python
    with CheckpointManager("s3://bucket/run-7", retention=[KeepLast(3)], save_every_steps=500) as manager:
        restored = manager.restore(state)
        for step in range(restored.step + 1 if restored else 0, total):
            loss = train_step()
            if manager.should_save(step):
                manager.async_save(step, state, metrics={"loss": float(loss)})
            if manager.preempted:
                manager.wait()
                break
    ```

    The end of the `with` block waits for a save under way, for `options.finish_timeout_s` at most, also when it ends by
    an exception; a second interrupt (Ctrl-C) abandons it. So does the end of the interpreter, for a manager that was
    never closed. What is abandoned is not committed.
    """

    def __init__(  # noqa: PLR0913 (keyword-only options, each of its own kind)
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, object] | None = None,
        engine: str = "auto",
        options: Options | None = None,
        retention: Sequence[RetentionRule] = (),
        save_every_steps: int | None = None,
        save_every_seconds: float | None = None,
        preemption: bool | Preemption = False,
        save_rng: bool = True,
        prune_grace_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a root; nothing is written before the first save.

        Args:
            url: the root: a directory, `s3://…`, `gs://…` or any fsspec URL. It need not exist; a bucket must.
            storage_options: fsspec's own options, the same for both engines.
            engine: `auto` (obstore for s3, gcsfs for gs), `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
            retention: rules of which each keeps some checkpoints; without rules all are kept.
            save_every_steps: the interval of `should_save`, in training steps.
            save_every_seconds: its interval in seconds since the newest save began; both may be given.
            preemption: heed notices that this machine goes: True for SIGTERM, SIGUSR1 and what the machine itself
                offers (EC2, GCE, Slurm), or a `Preemption`, which is started here and stopped by whoever made it.
            save_rng: save and restore the random number generators of this process.
            prune_grace_s: seconds between the end of a pruned checkpoint and the removal of its shards, for
                readers that are in the middle of it.
            clock: monotonic seconds, for the grace time.

        Raises:
            OptionsError: a wrong URL, engine, rule or interval.
        """
        if prune_grace_s < 0:
            raise OptionsError(f"prune_grace_s is {prune_grace_s}; give 0 or more seconds")
        refuse_lonely_rank()
        self._preemption = Preemption() if preemption is True else preemption or None
        self._owns_preemption = preemption is True
        self._schedule = Schedule(every_steps=save_every_steps, every_s=save_every_seconds, preemption=self._preemption)
        self._options = options or Options()
        self._store = open_store(os.fspath(url), storage_options=storage_options, engine=engine, options=self._options)
        self._catalog = Catalog(self._store)
        self._retention = tuple(retention)
        self._pruner = Pruner(self._catalog, self._retention, grace_s=prune_grace_s, clock=clock)
        self._save_rng = save_rng
        self._plan = PlanMemory()
        self._slabs = Slabs()
        self._meter = Meter()
        self._vote: Vote | None = None
        self._epoch = 0
        self._resumed_from: Checkpoint | None = None
        self._newest_own: Checkpoint | None = None
        self._newest_began: tuple[int, float] | None = None
        self._handle: SaveHandle | None = None
        self._spending: tuple[Group, StoreStats]
        self._to_prepare: MutableMapping[str, object] | None = None
        self._is_beginning = False
        self._is_closed = False
        if self._preemption is not None:
            self._preemption.start()

    @property
    def url(self) -> str:
        """The root, without credentials."""
        return self._store.url

    # -- when ----------------------------------------------------------------------------------------------

    def should_save(self, step: int) -> bool:
        """Tell whether to save after `step`: by the intervals, or because of a preemption notice.

        Every `save_every_steps` steps, counted from 1; `save_every_seconds` after the newest save began; and once when
        notice was given, unless a save is under way whose snapshot is less than 5 seconds old, or nothing newer could
        be saved in time. The same answer on every rank: with several, and with seconds or preemption, they vote
        (0.25 ms for 2 ranks on 2 cores; 3 ms for 4 ranks that share these), so every rank must ask at every step.

        Raises:
            OptionsError: the ranks ask about different steps.
            RankLostError: another rank did not come to ask.
        """
        self._refuse_closed()
        self._meter.note_step(step)
        if self._to_prepare is not None:
            # By now the optimizers have their state.
            state, self._to_prepare = self._to_prepare, None
            self._touch_ahead(state)
        return self._schedule.ask(step, self._latest_save(), self._votes())

    def _latest_save(self) -> Latest | None:
        if self._newest_began is None:
            return None
        step, began_s = self._newest_began
        is_under_way = self._handle is not None and not self._handle.done()
        is_saved = self._newest_own is not None and self._newest_own.step == step
        return Latest(
            step=step,
            began_s=began_s,
            is_under_way=is_under_way,
            is_failed=not is_under_way and not is_saved,
            took_s=self._meter.last_commit_s,
        )

    def _votes(self) -> Vote:
        group = Group.of_world()
        if self._vote is None or self._vote.size != group.size:
            self._vote = Vote(rank=group.rank, size=group.size, timeout_s=self._options.progress_timeout_s)
        return self._vote

    @property
    def preempted(self) -> bool:
        """Whether notice was given that this job's machine goes; as of the last `should_save`, if that is asked."""
        if Group.of_world().size == 1:
            self._schedule.hear()
        return self._schedule.deadline is not None

    @property
    def exit_code(self) -> int:
        """What to exit with after a preemption, so that a scheduler tells it from success: 143 unless chosen."""
        return self._preemption.exit_code if self._preemption is not None else EXIT_PREEMPTED

    def report(self, mtbf_s: float | None = None) -> Advice:
        """Say what saves cost, and how often to save; `print(manager.report(mtbf_s=7200))` is for people.

        Args:
            mtbf_s: mean seconds between failures of the job; None if not known.

        Raises:
            OptionsError: `mtbf_s` is not a finite number above 0.
        """
        return advise(self._meter.costs(), mtbf_s)

    # -- saving --------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Checkpoint:
        """Save `state` as the checkpoint of `step`; return once it is committed, then prune.

        With several ranks, every rank calls it with its own objects and the same plain values; rank 0's `metrics` and
        `metadata` are kept.

        Args:
            step: the training step, not yet committed by this job.
            state: name → nn.Module, Optimizer, object with state_dict/load_state_dict, tensor, container, value.
            metrics: numbers to choose the best by, non-finite ones allowed.
            metadata: values to be kept with the checkpoint.

        Raises:
            CheckpointExistsError: this job has committed that step; it was not changed.
            FencedError: a newer job has claimed the root; nothing was committed.
            UnsupportedValueError: a value that the format cannot hold; nothing was written.
            SaveFailedError: ranks failed, were lost, or hold different states (`.failures`); nothing was committed.
            StorageError: nothing was committed (after `CommitUnknownError`: perhaps).
        """
        began_s = self._begin()
        pending = self._pending(step, state, metrics, metadata, slabs=None)
        self._newest_began = step, began_s
        checkpoint = pending.finish()
        self._meter.note_blocked(time.monotonic() - began_s)
        self._committed(checkpoint, began_s, *self._spending)
        return checkpoint

    def async_save(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        on_busy: Literal["wait", "skip"] = "wait",
    ) -> SaveHandle:
        """Copy `state`, return, and save the copy as the checkpoint of `step` in the background.

        After it returned the state may be changed or freed. The copy is kept in host memory, which is used again by the
        next async save; where `options.memory_budget_bytes` has no room for all of it, this waits for uploads to free
        some. One save is under way at a time. With several ranks, every rank calls it. The first one of a job learns in
        the background whether the root can be written to.

        Args:
            step: the training step, not yet committed by this job.
            state: as for `save`.
            metrics: as for `save`.
            metadata: as for `save`.
            on_busy: what to do while another save is under way on any rank: `wait` for it, or `skip` this one.

        Raises:
            SaveFailedError: this one failed before it was staged, or an earlier one in the background and nobody was
                told: then this one was not begun.
            CloudCkptError: as `save` raises.
        """
        if on_busy not in ("wait", "skip"):
            raise OptionsError(f"on_busy is {on_busy!r}; give 'wait' or 'skip'")
        self._refuse_closed()
        if on_busy == "skip" and not self.preempted and self._is_busy(step):
            logger.info("rank %d: step %d is skipped: another save is under way", Group.of_world().rank, step)
            return SaveHandle(step, is_skipped=True)
        began_s = self._begin()
        pending = self._pending(step, state, metrics, metadata, slabs=self._slabs)
        self._newest_began = step, began_s
        after = partial(self._committed, began_s=began_s, group=self._spending[0], before=self._spending[1])
        self._handle = SaveHandle.begin(step, pending, after, patience_s=self._options.finish_timeout_s)
        blocked_s = time.monotonic() - began_s
        self._meter.note_blocked(blocked_s)
        logger.info(
            "rank %d: staged step %d: %d bytes, training was blocked for %.3f s",
            self._spending[0].rank,
            step,
            pending.size_bytes,
            blocked_s,
        )
        return self._handle

    def prepare(self, state: MutableMapping[str, object]) -> None:
        """Make the memory ready that `async_save` will need, in the background, so that the first one is fast, too.

        Fresh memory is 10 times slower to write to than memory in use. Call it once, before training; what optimizers
        make in their first step is added at the first `should_save`. Saves nothing, asks nobody.
        """
        self._refuse_closed()
        self._touch_ahead(state)
        self._to_prepare = state

    def _touch_ahead(self, state: MutableMapping[str, object]) -> None:
        group = Group.of_world()
        sizes, is_pinned = expected_shards(
            capture(bind(state)).leaves, self._options, rank=group.rank, size=group.size, engine=self._store.engine
        )
        self._slabs.touch_ahead(sizes, is_pinned=is_pinned)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for a save under way.

        Raises:
            TimeoutError: it goes on.
            SaveFailedError: it failed; also one that failed before and nobody was told.
        """
        if self._handle is not None and not self._handle.done():
            self._handle.result(timeout)
        self._raise_untold()

    def _begin(self) -> float:
        """Wait for a save under way; return when this one begins for the caller."""
        self._refuse_closed()
        self._refuse_nested()
        began_s = time.monotonic()
        self.wait()
        return began_s

    def _raise_untold(self) -> None:
        if self._handle is not None and self._handle.is_untold:
            self._handle.result()

    def _is_busy(self, step: int) -> bool:
        """Tell whether any rank has a save under way, and none has one that failed and nobody was told."""
        handle = self._handle
        is_busy = handle is not None and not handle.done()
        is_untold = handle is not None and not is_busy and handle.is_untold
        try:
            # A rank that knows of the failure comes, too: another one may not know yet, and would wait for it here.
            found = self._votes().largest([int(is_busy), int(is_untold)], what=f"async_save of step {step}")
        except RankLostError:
            self._raise_untold()
            raise
        return bool(found[0]) and not found[1]

    def _pending(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, object] | None,
        *,
        slabs: Slabs | None,
    ) -> PendingSave:
        group = Group.of_world()
        self._spending = group, self._store.stats()
        catalog, options = self._means()
        self._is_beginning = True
        try:
            return begin_save(
                lambda: self._capture(step, state, group.rank),
                lambda: self._place(step, catalog),
                catalog=catalog,
                group=group,
                options=options,
                memory=self._plan,
                metrics=metrics,
                metadata=metadata,
                what=f"save of step {step}",
                slabs=slabs,
                # Claiming the root takes requests, which training need not wait for.
                is_placed_later=slabs is not None and self._epoch == 0,
            )
        finally:
            self._is_beginning = False

    def _means(self) -> tuple[Catalog, Options]:
        """Return what a save may use: after a preemption notice, no more time than is left."""
        deadline = self._schedule.deadline
        left_s = math.inf if deadline is None else deadline.left_s(time.monotonic())
        # A time that has passed was wrong: the machine is still there.
        if not 0 < left_s < math.inf:
            return self._catalog, self._options
        options = self._options.within(max(1.0, left_s - _MARGIN_S))
        return self._catalog.with_store(self._store.within(options.retry)), options

    def _committed(self, checkpoint: Checkpoint, began_s: float, group: Group, before: StoreStats) -> None:
        """Note a commit, and prune; perhaps in a background save's thread."""
        self._epoch, self._newest_own = checkpoint.epoch, checkpoint
        elapsed_s = time.monotonic() - began_s
        self._meter.note_commit(elapsed_s)
        self._log("saved", checkpoint, elapsed_s, before, group.rank)
        deadline = self._schedule.deadline
        if deadline is not None:
            left_s = deadline.left_s(time.monotonic())
            logger.warning("rank %d: step %s is safe, %.1f s before the end", group.rank, checkpoint.step, left_s)
        elif group.rank == 0:
            self._pruner.prune_after(checkpoint)

    def _capture(self, step: int, state: MutableMapping[str, object], rank: int) -> Flat:
        checkpoint_prefix(step, self._epoch or 1)  # refuses a step that has no key, before anything is claimed
        flat = capture(bind(state))
        if self._save_rng:
            flat.leaves[rng_name(rank)] = packed_rng()
        return flat

    def _place(self, step: int, catalog: Catalog) -> Target:
        """Claim the root with the first save, and return where a step goes; on rank 0."""
        if self._epoch == 0:
            probe_create(self._store, single_writer=self._options.single_writer)
            self._epoch = self._catalog.claim(resumed_from=self._resumed_from)
        prefix = checkpoint_prefix(step, self._epoch)
        if self._newest_own is not None and self._catalog.knows(prefix):
            raise self._catalog.exists_error(prefix)
        return Target(catalog=catalog, prefix=prefix, step=step, epoch=self._epoch)

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise OptionsError(f"the manager of {self.url} is closed; open another one")

    def _refuse_nested(self) -> None:
        """Refuse what a state_dict() of the user's own asks for: it would take this save's plan away."""
        if self._is_beginning:
            raise OptionsError("this began in the middle of another save; let that one end first")

    # -- restoring -----------------------------------------------------------------------------------------

    def restore(
        self,
        state: MutableMapping[str, object],
        step: int | Literal["latest", "best"] | Checkpoint = "latest",
        *,
        strict: bool = True,
    ) -> Checkpoint | None:
        """Restore `state` in place; return the checkpoint that it came from.

        With several ranks, every rank calls it; all of them restore the same checkpoint, whatever number saved it.

        Args:
            state: as for `save`.
            step: `latest` (the newest good one; a corrupt one is skipped with a warning that says why), `best` (by the
                first `KeepBest` rule of this manager), a step, or a checkpoint of this root.
            strict: refuse a checkpoint whose entries differ from those of `state`.

        Returns:
            The checkpoint, or None if nothing was ever committed (only for `latest` and `best`): a fresh start.

        Raises:
            CheckpointNotFoundError: no commit of that step.
            StateMismatchError: names or shapes differ; nothing was changed.
            IntegrityError: the checkpoint (for `latest`: every checkpoint) is corrupt. Tensors may hold a mixture.
            RankLostError: another rank died, hangs or never came. Tensors may hold a mixture.
            StorageError: the store could not be read; that is never taken for "nothing there".
        """
        self._refuse_closed()
        if self._handle is not None:
            self._handle.wait()
        began_s, before = time.monotonic(), self._store.stats()
        group = Group.of_world()
        if group.size == 1:
            bind(state)  # refuses a wrong call before anything is asked of the store
        checkpoint = load_state(
            state,
            lambda: self._candidates(step),
            catalog=self._catalog,
            group=group,
            options=self._options,
            strict=strict,
            extra=Extra(lambda index: rng_targets(index, group.rank), self._apply_rng) if self._save_rng else None,
            what=f"restore of {step if not isinstance(step, Checkpoint) else step.url}",
        )
        self._resumed_from = checkpoint
        if checkpoint is None:
            logger.info("rank %d: nothing is committed at %s: a fresh start", group.rank, self.url)
        else:
            elapsed_s = time.monotonic() - began_s
            self._meter.note_restore(elapsed_s)
            self._log("restored", checkpoint, elapsed_s, before, group.rank)
        return checkpoint

    def _candidates(self, step: int | str | Checkpoint) -> Iterator[Candidate]:
        """Yield what may be restored, best first; on rank 0."""
        if step == "latest":
            yield from self._catalog.newest_first()
            return
        chosen = self._chosen(step)
        if chosen is not None:
            yield chosen

    def _chosen(self, step: int | str | Checkpoint) -> Checkpoint | None:
        if isinstance(step, Checkpoint):
            return step
        if isinstance(step, int):
            return self._catalog.find(step)
        rule = next((rule for rule in self._retention if isinstance(rule, KeepBest)), None)
        if step != "best" or rule is None:
            raise OptionsError(
                f"step {step!r} says nothing here; give 'latest', a step, manager.best('name'), or 'best' with a "
                "KeepBest rule in retention"
            )
        return self.best(rule.metric, rule.mode)

    def _apply_rng(self, index: Index, filled: Mapping[str, torch.Tensor]) -> None:
        if not apply_rng(index, filled):
            logger.warning("the checkpoint holds no random number generator state; this process keeps its own")

    # -- asking --------------------------------------------------------------------------------------------

    def latest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint by (epoch, step), or None when none was ever committed.

        Raises:
            ManifestError: checkpoints are there and none can be read.
            StorageError: the store cannot be listed or read.
        """
        self._refuse_closed()
        return self._catalog.newest()

    def best(self, metric: str, mode: str = "min") -> Checkpoint | None:
        """Return the checkpoint with the smallest (`min`) or largest (`max`) `metric`; the newer of equals.

        Checkpoints without that metric, or with nan, do not count; None if none counts.
        """
        if mode not in ("min", "max"):
            raise OptionsError(f"mode is {mode!r}; give 'min' or 'max'")
        sign = 1.0 if mode == "min" else -1.0
        rated = [
            (sign * value, checkpoint)
            for checkpoint in self.checkpoints()
            if (value := checkpoint.metrics.get(metric)) is not None and not math.isnan(value)
        ]
        if not rated:
            return None
        least = min(value for value, _ in rated)
        return [checkpoint for value, checkpoint in rated if value == least][-1]

    def checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint, oldest first by (epoch, step)."""
        self._refuse_closed()
        return self._catalog.all()

    # -- removing ------------------------------------------------------------------------------------------

    def sweep(self, *, dry_run: bool = True, older_than_s: float = 86_400.0) -> list[Orphan]:
        """Remove what killed jobs left behind: attempts of older epochs without a commit, and pruned leftovers.

        Args:
            dry_run: only return what would be removed.
            older_than_s: spare attempts whose newest object is younger than this, by the store's clock.
        """
        self._refuse_closed()
        return sweep(self._catalog, older_than_s=older_than_s, dry_run=dry_run)

    # -- ending --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for a save under way, remove what is due, and release the store and the memory. Idempotent.

        Shards still in their grace time stay for a sweep.

        Raises:
            SaveFailedError: a save failed in the background and nobody was told, or did not end within
                `options.finish_timeout_s` and was abandoned. All is released.
            CommitUnknownError: one was abandoned, and may be committed all the same.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._handle is not None:
                self._handle.finish_or_abandon(self._options.finish_timeout_s)
            self._remove_due()
        finally:
            if self._preemption is not None and self._owns_preemption:
                self._preemption.stop()
            self._slabs.close()
            self._store.close()
        self._raise_untold()

    def _remove_due(self) -> None:
        try:
            self._pruner.remove_due()
        except CloudCkptError as exc:
            logger.warning("pruned shards could not be removed and stay for a sweep: %s", exc)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CloudCkptError as exc:
            # The exception that ends the block is the one to be seen.
            logger.error("while the manager was closed: %s", exc)  # noqa: TRY400

    def _log(self, did: str, checkpoint: Checkpoint, elapsed_s: float, before: StoreStats, rank: int) -> None:
        spent = self._store.stats() - before
        logger.info(
            "rank %d: %s step %s of epoch %d: %d bytes in %.3f s%s, %d requests, %d retries",
            rank,
            did,
            checkpoint.step,
            checkpoint.epoch,
            checkpoint.total_bytes,
            elapsed_s,
            _phases(checkpoint) if did == "saved" else "",
            spent.requests,
            spent.retries,
        )


def _phases(checkpoint: Checkpoint) -> str:
    """Say how long each phase of a save took."""
    summary = checkpoint.manifest.summary
    phases = [f"{name} {summary[f'{name}_s']:.3f}" for name in _PHASES if f"{name}_s" in summary]
    return f" ({', '.join(phases)})" if phases else ""
