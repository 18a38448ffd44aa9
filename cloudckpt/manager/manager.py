"""Own one root of checkpoints for one job: when to save, what to keep, what to resume from.

The outside of it: what is promised, and who of `saves`, `loading` and `root` keeps it. With several ranks each has a
manager and calls the same of it; only rank 0's claims, lists and prunes. Keeps FORMAT invariants 5, 8 and 10. A manager
belongs to one thread, and has at most one save under way. All managers of ranks that share a process group belong to
the same thread: two would call in another order on another rank. In a forked child a manager reads, and saves nothing.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self

import torch

from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.format import check_name, step_number
from cloudckpt.loading import Contents, Rest, load_state, read_contents, read_files, read_state
from cloudckpt.manager.parts import SavedParts
from cloudckpt.manager.saves import Asked, Exists, Home, Saves
from cloudckpt.manager.tolerance import OnError, Tolerance
from cloudckpt.options import Options, as_clock, as_flag, as_seconds
from cloudckpt.preemption import EXIT_PREEMPTED, Preemption, Schedule
from cloudckpt.ranks import ProcessGroup, Ranks, check_part, refuse_lonely_rank, taking_part
from cloudckpt.report import Advice, Journal, OnEvent, Prices, Progress, Show, advise, prices_from
from cloudckpt.root import (
    Catalog,
    Checkpoint,
    Choice,
    Cleaner,
    Orphan,
    Pin,
    Pruner,
    Retention,
    RetentionScope,
    Unreadable,
    Wanted,
    checked_rules,
    named,
    names_of,
    pins_of,
    sweep,
    watched_rules,
)
from cloudckpt.saving import SaveHandle
from cloudckpt.state import Allowed, Files, Resize
from cloudckpt.store import RetryingStore, open_store

__all__ = ["CheckpointManager"]

logger = logging.getLogger(__name__)


def _preemption(given: object) -> Preemption | None:
    if given is True or given == "auto":
        return Preemption()
    if given is None or given is False or isinstance(given, Preemption):
        return given or None
    raise OptionsError(f"preemption is {given!r}; give True, False, 'auto' or a cloudckpt.Preemption")


def _refuse_same(stores: Sequence[RetryingStore]) -> None:
    if len({store.url for store in stores}) < len(stores):
        raise OptionsError(f"the fallback is {stores[0].url} itself; give another root, on another store")


def _step_before(step: object, state: object) -> int:
    """Return the step of a call that names it before the state."""
    if isinstance(step, Mapping) and not isinstance(state, Mapping):
        raise OptionsError("the state stands where the step belongs; call save(step, state)")
    return step_number(step)


def _asked(
    metrics: Mapping[str, float] | None,
    metadata: Mapping[str, object] | None,
    files: Files | None,
    name: str | None,
    exists: Exists,
) -> Asked:
    given = "" if name is None else check_name(name)
    return Asked(metrics=metrics, metadata=metadata, files=files, name=given, exists=exists)


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
                break  # the end of the block waits for the save
        else:
            manager.save(total - 1, state, exists="skip")  # the last one, unless it is saved already
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
        options: Options | Mapping[str, object] | None = None,
        retention: Retention = (),
        retention_scope: RetentionScope = "line",
        save_every_steps: int | None = None,
        save_every_seconds: float | None = None,
        preemption: bool | Literal["auto"] | Preemption | None = False,
        on_error: OnError = "raise",
        max_failures: int = 3,
        fallback: str | os.PathLike[str] | None = None,
        fallback_storage_options: Mapping[str, object] | None = None,
        save_rng: bool = True,
        reuse_unchanged: bool = False,
        prune_grace_s: float = 60.0,
        sweep_after_s: float | None = 3600.0,
        ranks: Ranks = "all",
        process_group: ProcessGroup | None = None,
        progress: Show = "auto",
        on_event: OnEvent = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a root; nothing is written before the first save.

        Args:
            url: the root: a directory, `s3://…`, `gs://…` or any fsspec URL. It need not exist; a bucket must.
            storage_options: fsspec's own options, the same for every engine.
            engine: what moves the bytes: `auto` (the best that serves the URL), `local`, `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
            retention: what of the checkpoints stays: a rule such as `KeepLast(3)`, a list of rules of which each keeps
                some, a function that is given all (oldest first) and returns those that stay, or a number: so many of
                the newest. Without rules all are kept.
            retention_scope: what the rules are about: `line`, what this job saves and what led to the checkpoint that
                it went on from; or `root`, all below the root, also of jobs that this one knows nothing of.
            save_every_steps: the interval of `should_save`: each step above 0 that is a multiple of it.
            save_every_seconds: its interval in seconds since the newest save began; both may be given.
            preemption: heed notices that this machine goes: True or `auto` for SIGTERM and what the machine itself
                offers (EC2, GCE, Azure, Slurm, there SIGUSR1, too), or a `Preemption`, which is started here and
                stopped by whoever made it.
            on_error: where a store fails a save: `raise`, or `warn` and let training go on without that checkpoint;
                `save` then returns None. What is no outage of a store is raised in any case: a wrong call, a newer job,
                a rank that is lost.
            max_failures: with `warn`, so many failed saves in a row raise.
            fallback: a second root, such as `file:///nvme/run-7`, that takes a save, the same bytes, when the store of
                the first is down. Before each further save the first is asked for 10 s whether it takes writes again.
                Both together are one history: `restore`, `latest` and the like read both and know which checkpoint is
                newer, so give the same fallback to the job that resumes; they raise if one of the two cannot be read.
                With several ranks it must be one for all of them, as the first is. Nothing is copied back.
            fallback_storage_options: fsspec's own options for it.
            save_rng: save and restore the random number generators of this process, also of a state without a
                `RandomState`; a checkpoint that lacks them is no error then.
            reuse_unchanged: leave out of a save the shards that the newest checkpoint of this line of history holds
                already, byte for byte, such as those of a frozen backbone beside adapters (LoRA) or of an average that
                is renewed at long intervals: the new checkpoint refers to them. Each stays as long as a checkpoint
                needs it, whatever is removed; one that is damaged is missed by all that share it. The first save pays
                for strong digests (0.13 s of a core for 1 GB with `pip install 'cloudckpt[reuse]'`, else 0.5), later
                ones for those of what stays. Older releases refuse what is saved so (format version 2). `save_parts`,
                saves by another number of ranks than before, and those to the other root send all.
            prune_grace_s: seconds between the end of a pruned checkpoint and that of its shards, for readers of it.
            sweep_after_s: seconds without a write after which what earlier jobs left (attempts that were never
                committed, pruned shards) is removed in the background of saves; None leaves it to `sweep`.
            ranks: `all`: every rank of the process group has a manager and calls the same of it; or `self`: this
                process saves and restores by itself, and waits for nobody, such as rank 0 for all of a DDP job, or a
                helper process of a rank. A tensor of which it holds a part is refused.
            process_group: whose ranks have a manager and call the same of it: those of this group, such as
                `dist.new_group` or `mesh["dp"].get_group()` return, among themselves; ranks outside of it are not
                waited for, and are refused. None: those of the default group; what gives None to ranks outside
                (`use_local_synchronization=True`) needs them to make no call. In a group ranks are counted from 0: so
                in `PerRank`, in errors, and for the world size that a manifest tells. A state is saved where these
                hold all of it: a DTensor or an FSDP module that is cut over others, too, is refused unless the parts
                that are here make it whole. One root is for one group: of two the one that came first is fenced.
            progress: what rank 0 shows on stderr: `auto` a bar on a terminal and a line for each save and restore that
                is done, unless the log shows it; `bar` a bar in any case, `line` the line alone, `off` nothing.
            on_event: is told, on rank 0, what happens to checkpoints: a callable, or several, that take an `Event`.
                They are called in order, in a thread of their own, soon after; what they raise is noted for `report`,
                and one that is slow delays nothing. `close` waits 5 s for them.
            clock: monotonic seconds, for the grace time, intervals and notices; the same as that of a `Preemption`.

        Raises:
            OptionsError: a wrong URL, engine, rule, interval or choice. So does each call whose clock gives no number.
        """
        clock = as_clock(clock)
        if fallback is None and fallback_storage_options is not None:
            raise OptionsError("fallback_storage_options are given without a fallback; give both, or none of them")
        as_seconds("prune_grace_s", prune_grace_s)
        self._part = check_part(ranks, process_group)
        with taking_part(self._part):
            refuse_lonely_rank()
        shown, self._retention = Progress(progress), checked_rules(retention)
        self._owns_preemption = preemption is True or preemption == "auto"
        self._preemption = _preemption(preemption)
        schedule = Schedule(
            every_steps=save_every_steps, every_s=save_every_seconds, preemption=self._preemption, clock=clock
        )
        chosen = Options.of(options)
        stores = [open_store(url, storage_options=storage_options, engine=engine, options=chosen)]
        if fallback is not None:
            stores.append(open_store(fallback, storage_options=fallback_storage_options, options=chosen))
        _refuse_same(stores)
        self._store = stores[0]
        self._journal = Journal(self._store, shown, clock=clock, on_event=on_event)

        def pruner(catalog: Catalog) -> Pruner:
            cleaner = Cleaner(
                catalog,
                grace_s=prune_grace_s,
                sweep_after_s=sweep_after_s,
                clock=clock,
                is_held=lambda: schedule.end is not None,
                note=self._journal.note,
            )
            rules, told = watched_rules(self._retention), self._journal.pruned
            return Pruner(catalog, rules, cleaner, scope=retention_scope, on_pruned=told)

        self._saves = Saves(
            [Home.of(store, pruner, chosen, clock) for store in stores],
            options=chosen,
            schedule=schedule,
            journal=self._journal,
            tolerance=Tolerance(self._journal, on_error, max_failures),
            save_rng=as_flag("save_rng", save_rng),
            reuse_unchanged=as_flag("reuse_unchanged", reuse_unchanged),
        )
        self._is_closed, self._pid = False, os.getpid()
        if self._preemption is not None:
            self._preemption.start()

    @property
    def url(self) -> str:
        """The root, without credentials."""
        return self._store.url

    def should_save(self, step: int) -> bool:
        """Tell whether to save after `step`: by the intervals, or because of a preemption notice.

        At each step above 0 that is a multiple of `save_every_steps`, as Orbax and Lightning (`global_step`) do, so
        that `KeepEvery` counts the same ones; `save_every_seconds` after the newest save began; and when notice was
        given, until a save of the step of that notice or a later one is committed, or the end has passed: so again
        after a save that failed, or that the state refused. An older save that is under way is waited for first, if its
        snapshot is less than 5 seconds old, or there is no time for both. The same answer on every rank: with several,
        and with seconds or preemption, they vote, so every rank must ask at every step (0.25 ms for 2 ranks on 2 cores;
        3 ms for 4 ranks that share these).

        Raises:
            OptionsError: the ranks ask about different steps.
            RankLostError: another rank did not come to ask.
        """
        self._refuse_closed()
        with taking_part(self._part):
            return self._saves.are_due(step_number(step))

    @property
    def preempted(self) -> bool:
        """Whether notice was given that this job's machine goes; as of the last `should_save`, if that is asked.

        No longer once the end that was announced has passed: the notice was false then, and all is as before.
        """
        with taking_part(self._part):
            return self._saves.is_preempted

    @property
    def exit_code(self) -> int:
        """What to exit with after a preemption, so that a scheduler tells it from success: 143 unless chosen."""
        return self._preemption.exit_code if self._preemption is not None else EXIT_PREEMPTED

    def report(self, mtbf_s: float | None = None, *, prices: Prices | str | os.PathLike[str] | None = None) -> Advice:
        """Say what saves and restores cost, how often to save, and what went wrong; printed, a few lines for a person.

        Args:
            mtbf_s: mean seconds between failures of the job; None if not known.
            prices: what the store asks for, or a JSON file with the fields of `Prices`; None takes the usual ones of
                S3 and GCS, and none for other stores. What is counted are this rank's requests to the first root.

        Raises:
            OptionsError: `mtbf_s` is not a finite number above 0; or the prices are none.
        """
        chosen = prices_from(prices) if isinstance(prices, str | os.PathLike) else prices or Prices.of(self._store)
        return replace(
            advise(self._journal.meter.costs(), mtbf_s),
            troubles=tuple(self._journal.troubles),
            spent=self._journal.spent(),
            prices=chosen,
        )

    def save(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        files: Files | None = None,
        name: str | None = None,
        exists: Exists = "raise",
    ) -> Checkpoint | None:
        """Save `state` as the checkpoint of `step`; return once it is committed, then prune.

        Nothing is pruned while the end of a preemption is near. An earlier save that failed in the background is no
        reason not to save; who was not told of it is by `wait` or `close`.

        With several ranks, every rank calls it with its own objects and the same plain values; rank 0's `metrics` and
        `metadata` are kept.

        Args:
            step: the training step, not yet committed by this job. One below the newest begins a new line of history,
                as after a restore of an older checkpoint, so that it is what the next restore finds.
            state: name → nn.Module, Optimizer, object with state_dict/load_state_dict, tensor, container, value.
            metrics: numbers to choose the best by, non-finite ones allowed.
            metadata: values to be kept with the checkpoint.
            files: whole files to go with the state, streamed, verified and committed with it: path in the checkpoint →
                a file here, or its bytes; a path that ends in a slash → a directory, with all that is below it:
                `{"tokenizer/": "out/tokenizer", "config.json": "out/config.json"}`. `restore_files` writes them
                back. Rank 0's are taken. What they hold goes, and neither their modes nor empty directories. One of
                more than 64 MiB is not read at once: do not cut it short before this returns.
            name: that the checkpoint gets, such as `last` or `epoch=3`, for `restore(state, name)`. The name moves here
                in the moment in which this is committed. A checkpoint that has a name stays, whatever the rules say;
                one that the name has moved on from is the rules', and without rules goes, unless it has another name
                or is pinned.
            exists: where the newest that this job has saved is that step: `raise`; `skip` this one and return that,
                if it is still there (for a last save after the loop, whose step an interval may have saved), which gets
                the name, too; or `replace` it, which begins a new epoch: the old one goes once the new one is
                committed, unless it is pinned or has another name.

        Returns:
            The checkpoint; None only with `on_error="warn"`, if it was not saved.

        Raises:
            CheckpointExistsError: this job has committed that step; it was not changed.
            OptionsError: a wrong argument; or this process was forked from the one that opened the manager, and needs
                its own.
            FencedError: a newer job has claimed the root; nothing was committed.
            UnsupportedValueError: a value that the format cannot hold; nothing was written.
            SaveFailedError: ranks failed, were lost, or hold different states (`.failures`); nothing was committed. Or
                an end that was announced left no time for what had to come first: another save, or what a restore left
                for later.
            StorageError: nothing was committed (after `CommitUnknownError`: perhaps).
            BaseException: an interrupt, an exit or what a signal's handler raises, as it comes. One that comes after
                the commit, also from a retention rule, has a note that the step is saved. Whether one was committed
                while it came, the next call for that step asks.
        """
        self._refuse_forked()
        asked = _asked(metrics, metadata, files, name, exists)
        with taking_part(self._part):
            return self._saves.save(_step_before(step, state), state, asked)

    def async_save(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        on_busy: Literal["wait", "skip"] = "wait",
        files: Files | None = None,
        name: str | None = None,
        exists: Exists = "raise",
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
            files: as for `save`; they are copied as the state is.
            name: as for `save`.
            exists: as for `save`; one of that step that is under way is waited for.

        Raises:
            EarlierSaveFailedError: an earlier one failed in the background and nobody was told; this one is under way
                all the same (`.handle`). After a preemption notice the log is told of it instead.
            SaveFailedError: this one failed before it was staged.
            CloudCkptError: as `save` raises.
        """
        self._refuse_forked()
        number = _step_before(step, state)
        asked = _asked(metrics, metadata, files, name, exists)
        with taking_part(self._part):
            return self._saves.async_save(number, state, asked, on_busy=on_busy)

    def save_parts(
        self,
        step: int,
        state: MutableMapping[str, object],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        background: bool = False,
        files: Files | None = None,
        name: str | None = None,
        exists: Exists = "raise",
    ) -> SavedParts:
        """Write all that a checkpoint of `step` needs, and commit nothing: what is returned does, when it is told to.

        For who decides by itself when a checkpoint counts, as after a barrier of its own. Until then nobody finds it,
        and its name, what it replaces and the rules wait for it. What is never committed is removed by `abandon` or
        `close`, and after the end of the process by a sweep. Other saves may be made meanwhile; but a step is committed
        before the next one is.

        Args:
            step: as for `save`.
            state: as for `save`.
            metrics: as for `save`.
            metadata: as for `save`.
            background: return when the state is copied, as `async_save`; else when the parts of all ranks are durable.
            files: as for `save`.
            name: as for `save`.
            exists: as for `save`; what is skipped is committed already.

        Raises:
            CloudCkptError: as `save` raises, but for a failure of the store that `on_error` forgives: `commit` returns
                None then.
        """
        self._refuse_forked()
        asked = replace(_asked(metrics, metadata, files, name, exists), commits=False)
        number, background = _step_before(step, state), as_flag("background", background)
        with taking_part(self._part):
            written = self._saves.save_parts(number, state, asked, background=background)
        return SavedParts(self._saves, written, self._taking_part)

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        self._refuse_forked()
        with taking_part(self._part):
            yield

    def prepare(self, state: MutableMapping[str, object]) -> None:
        """Make the memory ready that `async_save` will need, in the background, so that the first one is fast, too.

        Fresh memory is 10 times slower to write to than memory in use. Call it once, before training; what optimizers
        make in their first step is added at the first `should_save`. Saves nothing, asks nobody.
        """
        self._refuse_forked()
        with taking_part(self._part):
            self._saves.prepare(state)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for what a restore left for later, for a save under way, and for what is pruned after it.

        For the last one not while the end of a preemption is near.

        Args:
            timeout: seconds to wait; None waits as long as their own deadlines let them live.

        Raises:
            OptionsError: `timeout` is no number of seconds.
            TimeoutError: the restore, or the save, goes on.
            RestoreFailedError: what was left did not come whole.
            SaveFailedError: it failed; also one that failed before and nobody was told.
        """
        patience_s = None if timeout is None else as_seconds("timeout", timeout)
        if self._saves.coming is not None:
            stop_s = math.inf if patience_s is None else time.monotonic() + patience_s
            self._saves.coming.wait(patience_s)
            patience_s = None if patience_s is None else max(0.0, stop_s - time.monotonic())
        self._saves.settle(patience_s)

    def _refuse_forked(self) -> None:
        """Refuse what writes as this job's: a forked child would be a second writer in its epoch."""
        self._refuse_closed()
        if os.getpid() != self._pid:
            raise OptionsError(
                f"the manager of {self.url} is that of process {self._pid}, from which this one was forked; to save or "
                "delete here, open a manager of its own in this process"
            )

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise OptionsError(f"the manager of {self.url} is closed; open another one")

    def restore(
        self,
        state: MutableMapping[str, object],
        step: Wanted = "latest",
        *,
        strict: bool = True,
        cast: bool = False,
        materialize: str | torch.device | None = None,
        resize: Resize | None = None,
        only: str | Sequence[str] | None = None,
        wait: str | Sequence[str] | None = None,
    ) -> Checkpoint | None:
        """Restore `state` in place; return the checkpoint that it came from.

        With several ranks, every rank calls it; all of them restore the same checkpoint, whatever number saved it.

        Args:
            state: as for `save`.
            step: `latest` (the newest good one; a corrupt one is skipped with a warning that says why), `best` (by the
                first `KeepBest` rule of this manager), a name that `save` gave, a step, or a checkpoint of this root.
            strict: as for `load`.
            cast: as for `load`.
            materialize: as for `load`.
            resize: as for `load`.
            only: as for `load`; the generators of this process stay as they are, too. Of the job's history this is
                a restore like any other: it goes on from that checkpoint. To take a part of one and go on from where
                it is, call `cloudckpt.load(state, checkpoint.url, only=…)`.
            wait: names of what is whole at the return, such as `["model"]`, so that the first forward need not wait for
                an optimizer; None: all is. Left for later are the moments of optimizers of PyTorch's own that are not
                named; their groups, and all else of the state, are restored at the return in any case. What is left
                comes in the background, verified as ever, and is waited for where it is needed: by the optimizer's
                `step` and `state_dict`, by a save, another restore, `wait` and `close`. Only who reads
                `optimizer.state` itself has to call `wait` before. With several ranks each gives the same names.

        Returns:
            The checkpoint, or None if nothing was ever committed (for a step: never): a fresh start. Where a job at
            work prunes what is being read, it is the newest of now.

        Raises:
            CheckpointNotFoundError: no commit of that step; or none has that name, and there are some.
            StateMismatchError: names, shapes or dtypes differ, or an object refuses its state; nothing was changed.
            RestoreFailedError: an object did not take its state after others had; says what was changed. With `wait`
                also raised where the rest is waited for, each time, if that did not come whole: an older step is not
                taken by itself then, because the model is of this one. Restore again, without `wait`.
            IntegrityError: the checkpoint (for `latest`: every checkpoint) is corrupt, or all manifests of the root
                have been removed. Tensors may hold a mixture.
            OptionsError: no checkpoint is the best, because none has that metric; or one is of another root.
            RankLostError: another rank died, hangs or never came. Tensors may hold a mixture.
            StorageError: the store could not be read; that is never taken for "nothing there".
        """
        self._refuse_closed()
        self._saves.rest()
        choice = Choice(self._saves.roots, step, self._retention)
        allowed = Allowed(strict=strict, cast=cast, materialize=materialize, resize=resize, only=only)
        rest = None if wait is None else Rest(wait)
        with taking_part(self._part):
            return self._restored(state, choice, allowed, rest)

    def begin_anew(self) -> None:
        """Let the next save begin a line of history of its own, as in a job that has restored nothing.

        For a second training in one process: its steps may be those of the first. What that has saved is this job's
        still, and older, so that rules of the manager let it go first. A save under way is waited for. With several
        ranks every rank calls it. No request.

        Raises:
            OptionsError: the manager is closed, or another process's.
        """
        self._refuse_forked()
        self._saves.begin_anew()

    def _restored(
        self, state: MutableMapping[str, object], choice: Choice, allowed: Allowed, rest: Rest | None
    ) -> Checkpoint | None:
        refuse_lonely_rank()
        # Ranks that were given other names would wait for each other in other steps.
        first = "" if rest is None else f", {', '.join(sorted(rest.wait_for))} first"
        checkpoint = load_state(
            state,
            choice.candidates(),
            roots=self._saves.roots,
            journal=self._journal,
            options=self._saves.options,
            allowed=allowed,
            what=f"restore of {choice}{first}",
            shown=f"restoring {choice}",
            generators=self._saves.save_rng,
            rest=rest,
        )
        self._saves.resume(checkpoint, rest)
        return checkpoint

    def read(self, step: Wanted = "latest", keys: str | Sequence[str] | None = None) -> dict[str, object]:
        """Read a checkpoint, or a part of it, without a state, as `cloudckpt.read` does; each process for itself.

        The job goes on from where it is, and a save under way is not waited for.

        Args:
            step: as for `restore`.
            keys: as for `cloudckpt.read`.

        Raises:
            CheckpointNotFoundError: nothing is committed, or no commit of that step; or a key matches nothing.
            IntegrityError: the checkpoint (for `latest`: every checkpoint) is corrupt, or all manifests of the root
                have been removed.
            OptionsError: no checkpoint is the best, or one is of another root.
            StorageError: the store could not be read.
        """
        self._refuse_closed()
        roots = self._saves.roots
        candidates = Choice(roots, step, self._retention).candidates()
        with self._journal.begin(rank=0).bar("reading") as bar:
            return read_state(candidates, keys, roots=roots, options=self._saves.options, gauge=bar)

    def restore_files(
        self,
        directory: str | os.PathLike[str],
        step: Wanted = "latest",
        names: str | Sequence[str] | None = None,
    ) -> list[str]:
        """Write the files that were saved with a checkpoint into a directory, as `cloudckpt.restore_files` does.

        Each process for itself: with several ranks on one machine let one of them call it.

        Args:
            directory: where they go, on a disk or at any URL; it need not exist.
            step: as for `restore`.
            names: as for `cloudckpt.restore_files`.

        Returns:
            Their paths below it.

        Raises:
            CheckpointNotFoundError: nothing is committed, or not that; or it holds no files, or none of a name.
            CloudCkptError: as `read` raises. Each file is whole, or not changed.
        """
        self._refuse_closed()
        roots = self._saves.roots
        candidates = Choice(roots, step, self._retention).candidates()
        with (
            open_store(directory, options=self._saves.options) as folder,
            self._journal.begin(rank=0).bar("reading files") as bar,
        ):
            return read_files(candidates, folder, names, roots=roots, options=self._saves.options, gauge=bar)

    def contents(self, step: Wanted = "latest") -> Contents:
        """Return the names, shapes, dtypes and sizes of all that a checkpoint holds; its manifest and index are read.

        Args:
            step: as for `restore`.

        Raises:
            CloudCkptError: as `read` raises, but for keys.
        """
        self._refuse_closed()
        return read_contents(Choice(self._saves.roots, step, self._retention).candidates(), self._saves.roots)

    def latest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint by (epoch, step), or None when none was ever committed.

        None is said, too, where `delete` has deleted all of them.

        Raises:
            ManifestError: checkpoints are there and none can be read; or none is there, and some were committed.
            FormatVersionError: the newest is of a newer format.
            StorageError: the store cannot be listed or read.
        """
        self._refuse_closed()
        return self._saves.roots.newest()

    def best(self, metric: str, mode: Literal["min", "max"] = "min") -> Checkpoint | None:
        """Return the checkpoint with the smallest (`min`) or largest (`max`) `metric`; the newer of equals.

        Checkpoints without that metric, or with nan, do not count; None if none counts.

        Raises:
            OptionsError: the metric has no name, or the mode is neither `min` nor `max`.
            CloudCkptError: what `checkpoints` raises.
        """
        self._refuse_closed()
        return self._saves.roots.best(metric, mode)

    def checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint, oldest first by (epoch, step).

        Raises:
            ManifestError: checkpoints are there and none can be read; or none is there, and some were committed.
            StorageError: the store cannot be listed or read.
        """
        self._refuse_closed()
        return self._saves.roots.all()

    def all_steps(self) -> list[int]:
        """Return the steps of all readable checkpoints, ascending, each once; raises what `checkpoints` raises."""
        return sorted({checkpoint.step for checkpoint in self.checkpoints()})

    def latest_step(self) -> int | None:
        """Return the step of the newest readable checkpoint, which need not be the highest; None if there is none.

        Raises what `latest` raises.
        """
        newest = self.latest()
        return None if newest is None else newest.step

    def pin(self, step: int, note: str = "") -> Pin:
        """Keep the checkpoint that `restore(state, step)` would take, whatever the rules say, until `unpin`.

        It holds for every job, for `delete`, and for the command line, from the moment that this returns: also if a
        pass that removes it is under way at that time, here or elsewhere. One that is pinned already stays so, and
        keeps its note. With a fallback the root that holds it is meant. With several ranks every rank calls it; rank 0
        pins, and all have the answer.

        Args:
            step: of a checkpoint that is committed; one of a save under way is not.
            note: why, for people: at most 1,000 characters.

        Raises:
            CheckpointNotFoundError: no commit of that step; or it was removed while it was being pinned.
            ManifestError: its manifest cannot be read.
            OptionsError: the note is no text, or too long.
            StorageError: the store did not answer: it may be pinned, and asking again is safe.
        """
        self._refuse_forked()
        with taking_part(self._part):
            return self._saves.pin(step_number(step), note)

    def unpin(self, step: int) -> Pin:
        """Take the pin of a step away, and return it: the rules decide over the checkpoint from the next save on.

        With several ranks every rank calls it, and rank 0 does it.

        Raises:
            CheckpointNotFoundError: no checkpoint of that step is pinned; says which are.
            StorageError: the store did not answer.
        """
        self._refuse_forked()
        with taking_part(self._part):
            return self._saves.unpin(step_number(step))

    def pins(self) -> list[Pin]:
        """Return all pins of the root (and of the fallback), by (epoch, step).

        Raises:
            StorageError: the store cannot be listed or read.
        """
        self._refuse_closed()
        return pins_of(self._saves.roots)

    def why_kept(self, step: int) -> tuple[str, ...]:
        """Say what keeps the checkpoint that `restore(state, step)` would take; () if the next save would prune it.

        The words are `newest`, `pinned`, `named NAME`, `in use` (this job went on from it, and has saved nothing
        since), `another line of history` (the rules are not about it), and the rules that keep it, as their repr has
        them; without rules that is `KeepAll()`.

        Raises:
            CheckpointNotFoundError: no commit of that step.
            CloudCkptError: what `checkpoints` raises.
        """
        self._refuse_closed()
        return self._saves.why_kept(step_number(step))

    def delete(self, step: int) -> None:
        """Delete the checkpoint that `restore(state, step)` would take: at once nobody finds it any more.

        In a root and its fallback, if it stands in both. One that cannot be read goes, too, with all that stands there.
        Its shards go `prune_grace_s` later, as those of a pruned one do: with the next save, with `close`, or by a
        sweep. A save under way is waited for. With several ranks every rank calls it, and rank 0 deletes.

        Raises:
            CheckpointNotFoundError: no commit of that step.
            PinnedError: it is pinned; nothing was deleted.
            FencedError: a newer job has claimed the root; nothing was deleted.
            FormatVersionError: a newer release has saved it; nothing was deleted.
            StorageError: the store could not be asked; the checkpoint is whole or not there.
        """
        self._refuse_forked()
        with taking_part(self._part):
            self._saves.delete(step_number(step))

    def prune(self, retention: Retention) -> None:
        """Remove what neither these rules nor the manager's own keep, as is done after a save.

        So the newest, what is pinned or named, and other lines of history (`retention_scope`) stay. Nothing goes
        before this job has saved, and while the end of a preemption is near. With several ranks every rank calls it,
        and rank 0 removes.

        Args:
            retention: as for the manager.

        Raises:
            OptionsError: it says nothing; or a rule fails.
            FencedError: a newer job has claimed the root; nothing was removed.
            StorageError: the store could not be asked; each checkpoint is whole or not there, and asking again is safe.
        """
        self._refuse_forked()
        rules = checked_rules(retention)
        with taking_part(self._part):
            self._saves.prune(rules)

    def named(self, name: str) -> Checkpoint | None:
        """Return the checkpoint that has a name, None if none has.

        Raises:
            OptionsError: it can be no name.
            ManifestError: the newest that was given it cannot be read.
            StorageError: the store cannot be listed or read.
        """
        self._refuse_closed()
        return named(self._saves.roots, check_name(name))

    def names(self) -> dict[str, Checkpoint]:
        """Return all names, and the checkpoint that has each; raises as `named` does."""
        self._refuse_closed()
        return names_of(self._saves.roots)

    def remove(self, checkpoint: Checkpoint | str) -> None:
        """Remove just this checkpoint, with all its names; or take a name away, with what nothing else keeps.

        What a name alone has kept is the rules' then, and without rules goes with it; what is pinned, or has another
        name, stays. Else as for `delete`: at once nobody finds it any more, and its shards go `prune_grace_s` later.
        With several ranks every rank calls it, and rank 0 removes.

        Args:
            checkpoint: one of this root; or a name that `save` gave.

        Raises:
            CheckpointNotFoundError: it is not there; or nothing has that name.
            PinnedError: the checkpoint is pinned; nothing was removed.
            FencedError: a newer job has claimed the root; nothing was removed.
            OptionsError: it is neither, or of another root.
            StorageError: the store could not be asked; the checkpoint is whole or not there, and asking again is safe.
        """
        self._refuse_forked()
        if isinstance(checkpoint, Checkpoint):
            if not any(one.holds(checkpoint) for one in self._saves.roots.catalogs):
                raise OptionsError(
                    f"{checkpoint.url} is no checkpoint of {self.url}; remove it with a manager of its root"
                )
        else:
            check_name(checkpoint)
        with taking_part(self._part):
            self._saves.remove(checkpoint)

    def unreadable(self) -> list[Unreadable]:
        """Return what stands in either root and cannot be read, oldest first by (epoch, step), with its error.

        No retention rule counts it, it is never the best, and nothing but `delete` removes it.
        """
        self._refuse_closed()
        return list(self._saves.roots.survey().unreadable)

    def sweep(self, *, dry_run: bool = True, older_than_s: float = 86_400.0) -> list[Orphan]:
        """Remove what killed jobs left behind: attempts of older epochs without a commit, and pruned leftovers.

        On a disk what killed writers did not finish goes as well; that is not in the list.

        Args:
            dry_run: only return what would be removed. That writes nothing, so that ages are by the local clock.
            older_than_s: spare attempts whose newest object is younger than this, by the store's clock.

        Raises:
            OptionsError: an argument of another kind; nothing was removed.
        """
        self._refuse_closed()
        dry_run, older_than_s = as_flag("dry_run", dry_run), as_seconds("older_than_s", older_than_s)
        catalogs = self._saves.roots.catalogs
        return [one for catalog in catalogs for one in sweep(catalog, older_than_s=older_than_s, dry_run=dry_run)]

    def close(self) -> None:
        """Wait for a save under way, remove what is due, and release the store and the memory. Idempotent.

        Shards still in their grace time stay for the next job. Where earlier jobs left a lot, its removal goes on for a
        few seconds, and the rest stays, too. What is due is given up after `options.finish_timeout_s`, or 30 s if that
        is longer; after an interrupt nothing is removed.

        Raises:
            SaveFailedError: a save failed in the background and nobody was told, or did not end within
                `options.finish_timeout_s` and was abandoned. All is released.
            CommitUnknownError: one was abandoned, and may be committed all the same.
        """
        if self._is_closed:
            return
        self._saves.background.refuse_own_thread()
        self._is_closed = True
        try:
            self._saves.give_up_coming()
            with taking_part(self._part):
                self._saves.end(is_forked=os.getpid() != self._pid)
        finally:
            if self._preemption is not None and self._owns_preemption:
                self._preemption.stop()
            for home in self._saves.homes:
                home.store.close()
            self._journal.end(is_interrupted=self._saves.is_interrupted)
        self._saves.background.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._saves.is_interrupted = True
        if error is not None:
            self._saves.give_up_coming(is_wanted=False)
        try:
            self.close()
        except CloudCkptError as exc:
            if error is None:
                raise
            # The exception that ends the block is the one to be seen.
            logger.error("while the manager was closed: %s", exc)  # noqa: TRY400
