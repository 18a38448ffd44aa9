"""Restore what a caller means from one root: the newest good checkpoint, the best, that of a step."""

from __future__ import annotations

from collections.abc import MutableMapping

from cloudckpt.loading import load_state
from cloudckpt.options import Options
from cloudckpt.ranks import Group
from cloudckpt.report import Journal
from cloudckpt.root import Checkpoint, Choice
from cloudckpt.state import Generators, bind

__all__ = ["restore_from"]


def restore_from(
    choice: Choice,
    state: MutableMapping[str, object],
    *,
    options: Options,
    journal: Journal,
    strict: bool,
    has_rng: bool,
) -> Checkpoint | None:
    """Restore `state` in place with all ranks; raises and returns as `CheckpointManager.restore` does.

    Args:
        choice: which checkpoints may be tried; rank 0's is asked.
        state: this rank's objects.
        options: sizes, parallelism, patience.
        journal: is told.
        strict: refuse a checkpoint whose entries differ from those of `state`.
        has_rng: whether the generators of this process are put back, too.
    """
    group = Group.of_world()
    entry = journal.begin(rank=group.rank)
    if group.size == 1:
        bind(state)  # refuses a wrong call before anything is asked of the store
    with entry.bar(f"restoring {choice}") as bar:
        checkpoint = load_state(
            state,
            choice.candidates,
            catalog=choice.catalog,
            group=group,
            options=options,
            strict=strict,
            extra=Generators(group.rank) if has_rng else None,
            gauge=bar,
            what=f"restore of {choice}",
        )
    entry.restored(checkpoint)
    return checkpoint
