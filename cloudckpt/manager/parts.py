"""Let who saves decide later when a checkpoint comes to be: its parts are written now, and nobody sees them before.

    save_parts ──▶ SavedParts ──commit──▶ Checkpoint
                       ╰──abandon, close, the end of the process──▶ nothing

The outside of it; `Saves` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from cloudckpt.manager.saves import Saves, Written
from cloudckpt.root import Checkpoint

__all__ = ["SavedParts"]


class SavedParts:
    """One save whose parts are written, or on their way, and that becomes a checkpoint with `commit`.

    With several ranks each has one, and calls `commit` of it, as `save`. The thread of its manager calls.

    Attributes:
        step: the training step.
    """

    def __init__(self, saves: Saves, written: Written, within: Callable[[], AbstractContextManager[None]]) -> None:
        """Made by `CheckpointManager.save_parts`."""
        self.step = written.step
        self._saves = saves
        self._written = written
        self._within = within

    def __repr__(self) -> str:
        written = self._written
        end = "abandoned" if written.is_abandoned else "committed" if written.checkpoint is not None else "uncommitted"
        return f"SavedParts(step={self.step}, {end if self.done() else 'under way'})"

    def done(self) -> bool:
        """Tell whether this rank writes no more, one way or another."""
        return self._written.handle is None or self._written.handle.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the parts of all ranks are durable; at once, unless they are written in the background.

        Args:
            timeout: seconds to wait; None waits as long as the save's own deadlines let it live.

        Raises:
            TimeoutError: it goes on.
            CloudCkptError: as `save` raises; nothing can be committed.
        """
        if self._written.handle is not None:
            self._written.handle.result(timeout)

    def commit(self) -> Checkpoint | None:
        """Wait for the parts, and make them the checkpoint of their step; then its name moves, and the rules prune.

        Once it is committed, it is returned again. After an error it may be tried again, also after
        `CommitUnknownError`, where it tells what became of it.

        Returns:
            The checkpoint; None only with `on_error="warn"`, if the store has failed its parts or its commit.

        Raises:
            CheckpointExistsError: another save of that step was committed first; it was not changed.
            FencedError: a newer job has claimed the root; nothing was committed.
            OptionsError: it was abandoned; or this job has committed a later step since, or gone on from another
                checkpoint, so that nobody would find it. Nothing was committed.
            SaveFailedError: ranks failed, or were lost; nothing was committed.
            StorageError: nothing was committed (after `CommitUnknownError`: perhaps).
        """
        with self._within():
            return self._saves.commit_parts(self._written)

    def abandon(self) -> None:
        """Give it up, unless it is committed: wait for what is under way, and remove, on rank 0, what was written.

        What may be committed, because nobody knows, stays. The ranks need not come together for it.
        """
        if not self._written.is_abandoned and self._written.checkpoint is None:
            with self._within():
                self._saves.abandon_parts(self._written)
