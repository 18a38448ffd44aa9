"""Finish a save in a thread of its own, and keep what became of it for whoever asks.

    begin ──▶ stage (the caller waits) ──▶ the caller goes on
      ╰─ thread: upload as shards are staged ──▶ commit ──▶ done, or failed: logged at once, and kept ──▶ tidy up

`Background` holds the one save of a job that may be under way, and failed ones of which nobody was told: they keep no
new one from being begun. What is tidied up afterwards is no part of a save, and nobody waits for it but who wants to.
Tidying is done for one save at a time. The thread is a daemon, so that a store that hangs
cannot keep a process from ending; the end of the interpreter waits for it all the same, for as long as the options say.
"""

# ruff: noqa: SLF001 (a handle is the outside of what this module does)
from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    EarlierSaveFailedError,
    OptionsError,
    SaveFailedError,
    text_of,
)
from cloudckpt.root import Checkpoint
from cloudckpt.saving.lead import PendingSave
from cloudckpt.threads import begin, new_lock, revoke, started, worker
from cloudckpt.transfer import StageClosedError

__all__ = ["Background", "SaveHandle"]

logger = logging.getLogger(__name__)

# How long an abandoned save may take to notice.
_NOTICING_S = 2.0


class SaveHandle:
    """One async save: under way, committed, failed or skipped. Any thread may ask.

    Attributes:
        step: the training step.
        is_skipped: whether nothing was saved, because another save was under way (`on_busy="skip"`).
    """

    def __init__(
        self,
        step: int,
        pending: PendingSave | None = None,
        ended_with: Callable[[Checkpoint | BaseException], bool] = lambda _: False,
        patience_s: float = 0.0,
        finish: Callable[[], Checkpoint | None] | None = None,
    ) -> None:
        """Made by `CheckpointManager.async_save`."""
        self.step = step
        self.is_skipped = pending is None
        self._pending = pending
        self._finish = pending.finish if finish is None and pending is not None else finish
        self._ended_with = ended_with
        self._patience_s = patience_s
        self._checkpoint: Checkpoint | None = None
        self._error: BaseException | None = None
        self._is_told = False
        self._is_abandoned = False
        self._ended = threading.Event()
        # Held while the end is noted, and while a call for it is.
        self._lock = new_lock()
        self._calls: list[Callable[[SaveHandle], object]] = []
        if self.is_skipped:
            self._ended.set()

    @classmethod
    def ended(cls, step: int, outcome: Checkpoint | BaseException) -> SaveHandle:
        """Return the handle of a save that needs no thread any more; nobody need be told of it."""
        handle = cls(step)
        handle.is_skipped = False
        handle._checkpoint = outcome if isinstance(outcome, Checkpoint) else None
        handle._error = outcome if isinstance(outcome, BaseException) else None
        handle._is_told = True
        return handle

    def __repr__(self) -> str:
        end = "failed" if self._error is not None else "committed"
        word = "skipped" if self.is_skipped else end if self.done() else "under way"
        return f"SaveHandle(step={self.step}, {word})"

    # -- asking --------------------------------------------------------------------------------------------

    @property
    def staged(self) -> bool:
        """Whether the state was copied, so that it may change: `async_save` returns no earlier. False if skipped."""
        return not self.is_skipped

    def done(self) -> bool:
        """Tell whether the save has ended, one way or another."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> Checkpoint | None:
        """Wait for the end; return the committed checkpoint, or None if the save was skipped.

        With several ranks, ask on all of them: a failure is raised by the next call of the manager on each rank that
        was not told it here.

        Args:
            timeout: seconds to wait; None waits as long as the save's own deadlines let it live.

        Raises:
            TimeoutError: it goes on.
            SaveFailedError: it failed; nothing was committed.
            CloudCkptError: as `save` raises it.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the save of step {self.step} goes on after {timeout} s")
        self._is_told = True
        if self._error is not None:
            raise self._error
        return self._checkpoint

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return what the save has failed with, None if it has not. Whoever asks was told.

        Args:
            timeout: seconds to wait; None waits as long as the save's own deadlines let it live.

        Raises:
            TimeoutError: it goes on.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the save of step {self.step} goes on after {timeout} s")
        self._is_told = True
        return self._error

    def add_done_callback(self, call: Callable[[SaveHandle], object]) -> None:
        """Have `call(handle)` called once, when the save has ended, in the thread that ends it; at once if it has.

        What it raises goes to the log, and to nobody else. That it was called tells nobody of a failure: `result` and
        `exception` do. It keeps what comes after the save from beginning, so it should be short, and it may not wait
        for the manager, which refuses that with `OptionsError`. In a process that is forked meanwhile it is not called.
        """
        with self._lock:
            if not self.done():
                self._calls.append(call)
                return
        self._called(call)

    def _called(self, call: Callable[[SaveHandle], object]) -> None:
        try:
            call(self)
        except Exception:
            logger.exception("a callback of the save of step %d has raised", self.step)

    # -- ending --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._finish is not None and (found := self._finish()) is not None:
                self._checkpoint = found
                self._ended_with(found)
        except BaseException as exc:  # noqa: BLE001 (the end of a thread: kept, and raised where somebody waits)
            self._error = exc
        try:
            if self._error is not None:
                self._is_told = self._ended_with(self._error) or self._is_told
                # At once: the next call that raises it may be an hour away.
                logger.error("the save of step %d failed in the background: %s", self.step, self._error)
        finally:  # also where a program's own handler of the log raises
            self._end()

    def _end(self) -> None:
        self._pending = self._finish = None
        with self._lock:
            self._ended.set()
            calls, self._calls = self._calls, []
        if self in _UNDER_WAY:
            _UNDER_WAY.remove(self)
        for call in calls:
            self._called(call)

    def _abandon(self, why: str) -> None:
        """Begin nothing more, and wait a moment for that to be noticed."""
        self._is_abandoned = True
        if (pending := self._pending) is not None:
            pending.abandon(why)
        self._ended.wait(_NOTICING_S)

    def _finish_or_abandon(self, timeout_s: float) -> None:
        """Wait for the end for so long, then abandon the save; an interrupt of the wait abandons it, too.

        Raises:
            SaveFailedError: it was abandoned; nothing was committed.
            CommitUnknownError: it was abandoned, and may be committed all the same.
        """
        try:
            if self._ended.wait(timeout_s):
                return
        except BaseException:
            self._abandon("the wait for it was interrupted")
            raise
        self._abandon(f"it did not end within {timeout_s:g} s")
        self._is_told = True
        if not self.done() or isinstance(self._error, CommitUnknownError):
            raise CommitUnknownError(
                f"the save of step {self.step} did not end within {timeout_s:g} s, so the checkpoint is whole or not "
                "there",
                op="create",
            ) from self._error
        if self._error is not None:
            raise SaveFailedError(
                f"the save of step {self.step} was abandoned after {timeout_s:g} s; nothing was committed"
            ) from self._error

    def _disown(self) -> None:
        """Count as ended, in a process that was forked from the one whose thread goes on with it."""
        self._pending = self._finish = None
        self._error = CloudCkptError(f"the save of step {self.step} belongs to the process that this was forked from")
        self._is_told = True
        # The old one's lock may have been held when the process was forked.
        self._ended = threading.Event()
        self._ended.set()
        self._calls = []


class Background:
    """The save of one job that may be under way in the background; one at a time."""

    def __init__(self, *, patience_s: float, tidy: Callable[[], None] = lambda: None) -> None:
        """Nothing is under way; the end waits for `patience_s` at most. `tidy` is called when a save has ended."""
        self._patience_s = patience_s
        self._tidy = tidy
        self._handle = SaveHandle(-1)  # of none
        self._earlier: list[SaveHandle] = []
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return not self._handle.done()

    @property
    def step(self) -> int:
        """The step of the save that is under way, or was the last one; -1 before the first."""
        return self._handle.step

    @property
    def is_untold(self) -> bool:
        """Whether one has failed, and nobody was told yet."""
        return bool(self._untold())

    def _untold(self) -> list[SaveHandle]:
        """Return the handles of those, the oldest first."""
        handles = [*self._earlier, self._handle]
        return [handle for handle in handles if handle.done() and handle._error is not None and not handle._is_told]

    def begin(
        self,
        step: int,
        pending: PendingSave,
        ended_with: Callable[[Checkpoint | BaseException], bool],
        finish: Callable[[], Checkpoint | None] | None = None,
    ) -> SaveHandle:
        """Stage a save in this thread and finish it in another; return once it is staged.

        Args:
            step: the training step.
            pending: what all ranks have agreed on.
            ended_with: is called with the checkpoint, or with what the save failed with, in the other thread, before
                the save counts as done; returns whether nobody need be told of a failure.
            finish: finishes it in place of `pending.finish`, there; returns None where nothing is committed yet.

        Raises:
            CloudCkptError: it failed before everything was staged; nothing was committed.
        """
        handle = SaveHandle(step, pending, ended_with, self._patience_s, finish)
        before = self._thread
        work = partial(self._run, handle, before)
        thread = worker(work, name="cloudckpt-save")
        # An interrupt may come anywhere below.
        try:
            self._earlier, self._handle, self._thread = self._untold(), handle, thread
            _UNDER_WAY.append(handle)
            begin(thread)
            pending.stage()
        except StageClosedError:
            handle.result()  # raises why
            raise
        except BaseException as exc:
            handle._is_told = True
            if revoke(thread):
                self._thread = before
                # The ranks' session has to end, and the other ranks to hear why.
                pending.abandon(str(exc) or "it was interrupted before it began")
                handle._run()
            else:
                handle._abandon("its state could not be staged")
            if isinstance(exc, CloudCkptError) and isinstance(handle._error, CloudCkptError):
                raise handle._error from exc
            raise
        return handle

    def _run(self, handle: SaveHandle, before: threading.Thread | None) -> None:
        handle._run()
        if before is not None:
            before.join()
        self._tidy()

    def tidy_alone(self) -> None:
        """Tidy up in a thread of its own, without a save; one that is under way does so itself."""
        if self.wait_tidy(0):
            with suppress(CloudCkptError):  # without a thread it is left to the next save
                self._thread = started(self._tidy, name="cloudckpt-tidy")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the save under way, without asking what became of it; tell whether it has ended."""
        return self._handle._ended.wait(timeout)

    def refuse_own_thread(self) -> None:
        """Refuse to wait, in the thread that ends a save, for that thread: a callback of the save's may have asked.

        Raises:
            OptionsError: this is that thread.
        """
        if self._thread is threading.current_thread():
            raise OptionsError(
                "a callback of a save may not wait for its manager (wait, save, restore, close and the like), which "
                "waits for the callback; let the training's thread do it, or begin a thread in the callback"
            )

    def wait_tidy(self, timeout: float | None = None) -> bool:
        """Wait until what follows a save is done, too; tell whether it is."""
        self.refuse_own_thread()
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def settle(self, timeout: float | None = None) -> None:
        """Wait for the save under way; raise what one has failed with, also if that was long ago and nobody was told.

        Raises:
            TimeoutError: it goes on.
            CloudCkptError: it failed.
        """
        if not self._handle._ended.wait(timeout):
            self._handle.result(0)
        for handle in self._untold():
            handle.result(0)

    def tell_earlier(self, handle: SaveHandle) -> None:
        """Raise what one before `handle` has failed with, if nobody was told.

        Raises:
            EarlierSaveFailedError: of the oldest; has `handle`.
        """
        for failed in self._untold():
            if failed is not handle:
                failed._is_told = True
                raise EarlierSaveFailedError(
                    f"the save of step {failed.step} failed in the background: {text_of(failed._error)}; that of step "
                    f"{handle.step} is under way all the same",
                    step=failed.step,
                    handle=handle,
                ) from failed._error

    def note_earlier(self, error: BaseException) -> None:
        """Tell of them beside the error with which the save that was asked for could not be begun."""
        for failed in self._untold():
            failed._is_told = True
            error.add_note(
                f"before that, the save of step {failed.step} failed in the background: {text_of(failed._error)}"
            )

    def log_earlier(self, step: int, handle: SaveHandle | None = None) -> None:
        """Tell the log instead, because the save of `step`, of `handle` if any, may be the last one of this process."""
        for failed in self._untold():
            if failed is not handle:
                failed._is_told = True
                logger.error("step %d was not saved: %s; step %d is saved instead", failed.step, failed._error, step)

    def end(self) -> None:
        """Wait for the save under way, and abandon it when the patience is over.

        Raises:
            SaveFailedError: it was abandoned; nothing was committed.
            CommitUnknownError: it was abandoned, and may be committed all the same.
        """
        self._handle._finish_or_abandon(self._patience_s)


_UNDER_WAY: list[SaveHandle] = []


def _after_fork() -> None:
    for handle in _UNDER_WAY:
        handle._disown()
    _UNDER_WAY.clear()


os.register_at_fork(after_in_child=_after_fork)


def _at_exit() -> None:
    """Let the end of the interpreter wait for saves whose manager was not closed."""
    for handle in _UNDER_WAY.copy():
        if handle._is_abandoned:
            continue
        patience_s = handle._patience_s
        logger.warning("the process ends; waiting up to %g s for the save of step %d", patience_s, handle.step)
        try:
            handle._finish_or_abandon(patience_s)
        except (SaveFailedError, CommitUnknownError) as exc:
            logger.error("%s", exc)  # noqa: TRY400


# Before the pools of concurrent.futures refuse work, which fsspec's event loop gives them; atexit would be after that.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
