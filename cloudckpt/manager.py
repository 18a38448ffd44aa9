"""Own one root of checkpoints for one job: when to save, what to keep, what to resume from.

    save     claim epoch (once) ─▶ save_state ─▶ committed ─▶ prune by the retention rules
    restore  newest ─▶ load_state; corrupt? say so loudly and try the next older one

Policy only: the catalog decides what exists, `saving` and `loading` lead the ranks. With several ranks each has a
manager and calls `save` and `restore`; only rank 0's claims, lists and prunes. Keeps FORMAT invariants 5, 8 and 10.
A manager belongs to one thread.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch

from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.errors import CheckpointExistsError, CloudCkptError, OptionsError
from cloudckpt.group import Group
from cloudckpt.index import Index
from cloudckpt.keys import checkpoint_prefix
from cloudckpt.loading import Candidate, Extra, load_state
from cloudckpt.options import Options
from cloudckpt.output import Target
from cloudckpt.resume import apply_rng, packed_rng, rng_name, rng_targets
from cloudckpt.retention import KeepBest, RetentionRule, plan
from cloudckpt.saving import PlanMemory, save_state
from cloudckpt.state import bind, capture
from cloudckpt.store import StoreStats, open_store, probe_create
from cloudckpt.sweep import Orphan, sweep
from cloudckpt.tree import Flat
from cloudckpt.writer import refuse_lonely_rank

__all__ = ["CheckpointManager"]

logger = logging.getLogger(__name__)

_PHASES = ("plan", "stage", "upload", "gather", "commit")


@dataclass(slots=True)
class _Removal:
    """A checkpoint whose manifest is gone and whose shards go once readers had time to notice."""

    prefix: str
    uncommitted_s: float


class CheckpointManager:
    """The checkpoints of one training job, below one root URL.

    ```python
    with CheckpointManager("s3://bucket/run-7", retention=[KeepLast(3)], save_every_steps=500) as manager:
        restored = manager.restore(state)
        for step in range(restored.step + 1 if restored else 0, total):
            loss = train_step()
            if manager.should_save(step):
                manager.save(step, state, metrics={"loss": float(loss)})
    ```
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
            save_rng: save and restore the random number generators of this process.
            prune_grace_s: seconds between the end of a pruned checkpoint and the removal of its shards, for
                readers that are in the middle of it.
            clock: monotonic seconds, for the grace time.

        Raises:
            OptionsError: a wrong URL, engine, rule or interval.
        """
        if save_every_steps is not None and save_every_steps < 1:
            raise OptionsError(f"save_every_steps is {save_every_steps}; give 1 or more, or None")
        if prune_grace_s < 0:
            raise OptionsError(f"prune_grace_s is {prune_grace_s}; give 0 or more seconds")
        refuse_lonely_rank()
        self._options = options or Options()
        self._store = open_store(os.fspath(url), storage_options=storage_options, engine=engine, options=self._options)
        self._catalog = Catalog(self._store)
        self._retention = tuple(retention)
        self._save_every_steps = save_every_steps
        self._save_rng = save_rng
        self._prune_grace_s = prune_grace_s
        self._clock = clock
        self._plan = PlanMemory()
        self._epoch = 0
        self._resumed_from: Checkpoint | None = None
        self._newest_own: Checkpoint | None = None
        self._removals: list[_Removal] = []
        self._is_closed = False

    @property
    def url(self) -> str:
        """The root, without credentials."""
        return self._store.url

    # -- saving --------------------------------------------------------------------------------------------

    def should_save(self, step: int) -> bool:
        """Tell whether the interval asks for a save after `step`: every `save_every_steps` steps, counted from 1."""
        return self._save_every_steps is not None and (step + 1) % self._save_every_steps == 0

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
        self._refuse_closed()
        began_s, before = time.monotonic(), self._store.stats()
        group = Group.of_world()
        checkpoint = save_state(
            lambda: self._capture(step, state, group.rank),
            lambda: self._place(step),
            catalog=self._catalog,
            group=group,
            options=self._options,
            memory=self._plan,
            metrics=metrics,
            metadata=metadata,
            what=f"save of step {step}",
        )
        self._epoch, self._newest_own = checkpoint.epoch, checkpoint
        self._log("saved", checkpoint, time.monotonic() - began_s, before, group.rank)
        if group.rank == 0:
            self._prune_after(checkpoint)
        return checkpoint

    def _capture(self, step: int, state: MutableMapping[str, object], rank: int) -> Flat:
        checkpoint_prefix(step, self._epoch or 1)  # refuses a step that has no key, before anything is claimed
        flat = capture(bind(state))
        if self._save_rng:
            flat.leaves[rng_name(rank)] = packed_rng()
        return flat

    def _place(self, step: int) -> Target:
        """Claim the root with the first save, and return where a step goes; on rank 0."""
        if self._epoch == 0:
            probe_create(self._store, single_writer=self._options.single_writer)
            self._epoch = self._catalog.claim(resumed_from=self._resumed_from)
        prefix = checkpoint_prefix(step, self._epoch)
        if self._newest_own is not None and self._catalog.knows(prefix):
            raise self._catalog.exists_error(prefix)
        return Target(catalog=self._catalog, prefix=prefix, step=step, epoch=self._epoch)

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise OptionsError(f"the manager of {self.url} is closed; open another one")

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
            self._log("restored", checkpoint, time.monotonic() - began_s, before, group.rank)
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

    def _prune_after(self, checkpoint: Checkpoint) -> None:
        """Prune; a failure is logged and left to the next save, because the checkpoint itself is safe."""
        if not self._retention and not self._removals:
            return
        try:
            self._prune()
        except CloudCkptError as exc:
            logger.warning(
                "step %s is saved, but pruning failed and is left to the next save: %s", checkpoint.step, exc
            )

    def _prune(self) -> None:
        """Uncommit what no rule keeps; remove the shards of what was uncommitted a grace time ago."""
        if self._retention:
            existing = {found.order: found for found in self._catalog.all()}
            # Our own newest is never in question, even when a newer epoch has checkpoints of its own by now.
            protected = {self._newest_own.order} if self._newest_own else set()
            removed = plan(list(existing.values()), self._retention, protected=protected).remove
            if removed:
                # A newer job may be restoring what we would remove.
                self._catalog.fence(self._epoch)
            for epoch_step in removed:
                self._uncommit(existing[epoch_step])
        self._remove_due()

    def _uncommit(self, checkpoint: Checkpoint) -> None:
        self._catalog.uncommit(checkpoint)
        self._removals.append(_Removal(checkpoint.prefix, self._clock()))
        logger.info("pruned step %s of epoch %d", checkpoint.step, checkpoint.epoch)

    def _remove_due(self) -> None:
        due = [removal for removal in self._removals if self._clock() - removal.uncommitted_s >= self._prune_grace_s]
        for removal in due:
            try:
                self._catalog.remove_objects(removal.prefix)
            except CheckpointExistsError:
                logger.warning("%s was committed again while it was pruned; it stays", removal.prefix)
            self._removals.remove(removal)

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
        """Remove what is due and release the store. Idempotent. Shards still in their grace time stay for a sweep."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._remove_due()
        except CloudCkptError as exc:
            logger.warning("pruned shards could not be removed and stay for a sweep: %s", exc)
        finally:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
