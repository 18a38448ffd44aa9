"""Decide which rank reads what several need of a checkpoint, and passes it on to the others.

    the boxes that each rank could be given ──alike?──▶ one reader per box, even in bytes ──▶ each rank its own steps,
                                                                                             in one order on all ranks

Pure values. The order is the same everywhere, so that whoever waits, waits for a step that comes earlier for the
other one, too. Ranks with the same boxes, as replicas have them, are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cloudckpt.errors import StateMismatchError
from cloudckpt.format import Box, BoxTable
from cloudckpt.ranks import named_ranks

__all__ = ["Step", "plan_passing"]

# Beyond it, the boxes as objects would take rank 0 longer than the reads that they save.
_BOXES_LIMIT = 500_000
# Small boxes travel together, because a message costs as much as some hundred KiB.
_STEP_BYTES = 8 << 20
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Step:
    """Some boxes that one rank reads and others take from it.

    Attributes:
        reader: who reads.
        takers: who takes; known to the reader only.
        rows: the boxes, as rows of the own table of whoever this step is for.
    """

    reader: int
    takers: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(slots=True)
class _Holders:
    """Which kinds of ranks have a box, in which row of their table."""

    nbytes: int
    rows: dict[int, int] = field(default_factory=dict)


def plan_passing(messages: Sequence[bytes], *, is_read_once: bool = True) -> list[list[Step]]:
    """Return for each rank the steps that it has a part in.

    Args:
        messages: one encoded `BoxTable` per rank: boxes that the rank needs and others may need, too, in the order in
            which they lie in the checkpoint, with the dtypes of the rank's own tensors.
        is_read_once: whether anything is passed on; else every rank reads for itself.

    Raises:
        StateMismatchError: ranks have tensors of different dtypes under one name, where none could take another's.
    """
    kinds: dict[bytes, list[int]] = {}
    for rank, message in enumerate(messages):
        kinds.setdefault(message, []).append(rank)
    tables = [BoxTable.decode(message) for message in kinds]
    _refuse_other_dtypes(tables, list(kinds.values()))
    if not is_read_once or len(messages) < 2 or sum(map(len, tables)) > _BOXES_LIMIT:
        return [[] for _ in messages]
    plan = _Plan(tables, list(kinds.values()))
    steps: list[list[Step]] = [[] for _ in messages]
    for reader, boxes in plan.turns(len(messages)):
        ranks = plan.ranks(boxes[0])
        takers = tuple(rank for rank in ranks if rank != reader)
        for kind in plan.holders[boxes[0]].rows:
            rows = tuple(plan.holders[box].rows[kind] for box in boxes)
            for rank in plan.members[kind]:
                steps[rank].append(Step(reader, takers if rank == reader else (), rows))
    return steps


def _refuse_other_dtypes(tables: Sequence[BoxTable], members: Sequence[Sequence[int]]) -> None:
    """Raise if a tensor is of one dtype here and of another one there, which a message between them would not survive.

    Args:
        tables: the different ones.
        members: the ranks that have each of them.
    """
    dtypes: dict[str, str] = {}
    mixed: dict[str, dict[str, list[int]]] = {}
    for table in tables:
        for name, dtype in zip(table.names, table.dtypes, strict=True):
            if dtypes.setdefault(name, dtype) != dtype:
                mixed[name] = {}
    if not mixed:
        return
    for table, ranks in zip(tables, members, strict=True):
        for name, dtype in zip(table.names, table.dtypes, strict=True):
            if name in mixed:
                mixed[name].setdefault(dtype, []).extend(ranks)
    problems = [
        f"{name} is {' and '.join(f'{dtype} on {named_ranks(sorted(ranks))}' for dtype, ranks in ranks_of.items())}"
        for name, ranks_of in mixed.items()
    ]
    left = len(problems) - _SHOWN
    shown = "; ".join([*problems[:_SHOWN], *([f"and {left} more"] if left > 0 else [])])
    raise StateMismatchError(
        f"the ranks restore into different states, and nothing was changed: {shown}. Build the state alike on every "
        "rank, and restore again"
    )


class _Plan:
    """Who reads which of the boxes that several ranks hold."""

    def __init__(self, tables: Sequence[BoxTable], members: Sequence[Sequence[int]]) -> None:
        self.members = members
        self.holders: dict[Box, _Holders] = {}
        for kind, table in enumerate(tables):
            for row, (box, nbytes) in enumerate(zip(table, table.nbytes().tolist(), strict=True)):
                self.holders.setdefault(box, _Holders(nbytes)).rows[kind] = row

    def ranks(self, box: Box) -> list[int]:
        """Return who holds a box."""
        return sorted(rank for kind in self.holders[box].rows for rank in self.members[kind])

    def turns(self, size: int) -> list[tuple[int, list[Box]]]:
        """Return what is passed on, in order: the readers take turns, so that all have something to send early."""
        batches = [self._batches(queue) for queue in self._queues(size)]
        longest = max(map(len, batches), default=0)
        return [
            (reader, of_reader[turn])
            for turn in range(longest)
            for reader, of_reader in enumerate(batches)
            if turn < len(of_reader)
        ]

    def _queues(self, size: int) -> list[list[Box]]:
        """Cut the boxes of the same holders into runs of even bytes, one for each holder."""
        # Not the best fit of single boxes: neighbours lie in the same blocks of a shard, and whole blocks are read.
        loads = [0] * size
        queues: list[list[Box]] = [[] for _ in range(size)]
        for boxes in self._by_holders().values():
            ranks = self.ranks(boxes[0])
            total_bytes = sum(loads[rank] for rank in ranks) + sum(self.holders[box].nbytes for box in boxes)
            share_bytes = total_bytes / len(ranks)
            reader = -1
            for box in boxes:
                if reader < 0 or loads[reader] >= share_bytes:
                    reader = min(ranks, key=lambda rank: (loads[rank], rank))
                loads[reader] += self.holders[box].nbytes
                queues[reader].append(box)
        return queues

    def _by_holders(self) -> dict[tuple[int, ...], list[Box]]:
        """Return the boxes that several ranks hold, in the order of the tables, by the kinds of their holders."""
        found: dict[tuple[int, ...], list[Box]] = {}
        for box, holders in self.holders.items():
            kinds = tuple(sorted(holders.rows))
            if holders.nbytes and sum(len(self.members[kind]) for kind in kinds) > 1:
                found.setdefault(kinds, []).append(box)
        return found

    def _batches(self, queue: Sequence[Box]) -> list[list[Box]]:
        """Put neighbours with the same holders together, as long as they are small."""
        batches: list[list[Box]] = []
        room = 0
        for box in queue:
            holders = self.holders[box]
            if not batches or holders.nbytes > room or holders.rows.keys() != self.holders[batches[-1][0]].rows.keys():
                batches.append([])
                room = _STEP_BYTES
            batches[-1].append(box)
            room -= holders.nbytes
        return batches
