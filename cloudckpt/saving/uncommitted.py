"""Hold what all ranks have written of one save and nobody sees, until it is committed or given up.

    parts of all ranks ──plan == results?──▶ index, put ──▶ Uncommitted ──commit──▶ manifest, created
                                                                 ╰──discard──▶ removed; else a sweep's

The second half of a save, in a session of its own. Holds no tensor. Keeps FORMAT invariants 2, 4, 5 and 13.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudckpt.options import Options
from cloudckpt.ranks import Group
from cloudckpt.root import Checkpoint
from cloudckpt.saving.coordinator import Coordinator
from cloudckpt.saving.session import Session

__all__ = ["Uncommitted"]


class Uncommitted:
    """One attempt of which every shard and the index are durable."""

    def __init__(self, what: str, group: Group, coordinator: Coordinator, prefix: str) -> None:
        """Made by `PendingSave.finish_parts`, on every rank."""
        self._what = f"commit of the {what}"
        self._group = group
        self._coordinator = coordinator
        self._prefix = prefix
        self._error: BaseException | None = None

    @property
    def epoch(self) -> int:
        """That of its place, on rank 0."""
        return self._coordinator.epoch

    @property
    def look(self) -> Callable[[], Checkpoint | None]:
        """What asks the store, on rank 0, whether it has committed, if an exception does not tell."""
        return self._coordinator.look

    @property
    def take_back(self) -> Callable[[], None]:
        """What removes, on rank 0 after the end, what it left on a root that was down."""
        return self._coordinator.take_back

    def commit(
        self, options: Options, *, may: Callable[[], None], check: Callable[[], None] | None = None
    ) -> Checkpoint:
        """Commit with all ranks; once it is committed, tell them so again.

        Args:
            options: patience.
            may: raises, on rank 0, why it may not be committed any more.
            check: as for `Session.of`.

        Raises:
            CloudCkptError: as `PendingSave.finish` raises. It may be tried again.
        """

        def commit(_: list[None]) -> bytes:
            if not self._coordinator.has_committed:
                may()
            return self._coordinator.commit()

        try:
            with Session.of(self._group, self._what, options, check=check):
                data = self._group.conclude(self._what, lambda: None, commit)
        except BaseException as exc:
            self._error = exc
            raise
        return self._coordinator.destination.catalog.adopt(data, prefix=self._prefix)

    def discard(self) -> None:
        """Remove it, on rank 0, unless it is or may be committed; no commit may follow."""
        if self._error is None or self._coordinator.may_discard(self._error):
            self._coordinator.discard()
