"""Remove the checkpoints of one root that no retention rule keeps: manifests first, shards a grace time later.

Called by whichever thread has committed a checkpoint, and by the manager's; never by two at once. Keeps FORMAT
invariants 7 and 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from cloudckpt.errors import CheckpointExistsError, CloudCkptError
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.retention import RetentionRule, removable

__all__ = ["Pruner"]

logger = logging.getLogger(__name__)


class Pruner:
    """The retention rules of a root, and what they have left to be removed."""

    def __init__(
        self, catalog: Catalog, rules: Sequence[RetentionRule], *, grace_s: float, clock: Callable[[], float]
    ) -> None:
        """Prune by `rules`; without any, nothing is pruned."""
        self._catalog = catalog
        self._rules = tuple(rules)
        self._grace_s = grace_s
        self._clock = clock
        # Prefixes whose manifest is gone, and since when: their shards go once readers had time to notice.
        self._uncommitted_s: dict[str, float] = {}

    def prune_after(self, checkpoint: Checkpoint, *, go_on: Callable[[], bool] = lambda: True) -> None:
        """Uncommit what no rule keeps, and remove what is due; never the checkpoint that was just committed.

        It ends early, between two of them, when `go_on` says so; the rest is left to the next time.
        A failure is logged and left to the next save, because the checkpoint itself is safe.
        """
        try:
            self._prune(checkpoint, go_on)
        except Exception as exc:  # noqa: BLE001 (rules may be anybody's code, and the checkpoint is committed)
            said = exc if isinstance(exc, CloudCkptError) else repr(exc)
            logger.warning(
                "step %s is saved, but pruning failed and is left to the next save: %s", checkpoint.step, said
            )

    def _prune(self, newest: Checkpoint, go_on: Callable[[], bool]) -> None:
        if self._rules:
            # Our own newest is never in question, even when a newer epoch has checkpoints of its own by now.
            removed = removable(self._catalog.all(), self._rules, protected={newest.order})
            if removed:
                # A newer job may be restoring what we would remove.
                self._catalog.fence(newest.epoch)
            for checkpoint in removed:
                if not go_on():
                    return
                self._catalog.uncommit(checkpoint)
                self._uncommitted_s[checkpoint.prefix] = self._clock()
                logger.info("pruned step %s of epoch %d", checkpoint.step, checkpoint.epoch)
        self._remove_due(go_on)

    def end(self) -> None:
        """Remove what is due; shards still in their grace time stay for a sweep, and so does what cannot be removed."""
        try:
            self._remove_due()
        except CloudCkptError as exc:
            logger.warning("pruned shards could not be removed and stay for a sweep: %s", exc)

    def _remove_due(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Remove the shards of what was uncommitted a grace time ago."""
        due = [prefix for prefix, at_s in self._uncommitted_s.items() if self._clock() - at_s >= self._grace_s]
        for prefix in due:
            if not go_on():
                return
            try:
                self._catalog.remove_objects(prefix)
            except CheckpointExistsError:
                logger.warning("%s was committed again while it was pruned; it stays", prefix)
            del self._uncommitted_s[prefix]
