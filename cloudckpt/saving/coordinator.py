"""Do rank 0's part of a save: where it goes, who writes what, whether all of it was written; then commit.

    openings of all ranks ──decide──▶ Order          boxes of all ranks ──share_out──▶ PlanPart of each
    parts of all ranks ──plan == results?──▶ index, put ──commit──▶ manifest, created: committed

Works on messages of ranks alone, and sees no tensor. Keeps FORMAT invariants 2, 3 and 13.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from cloudckpt.deadline import Deadline
from cloudckpt.errors import CommitUnknownError, OptionsError, SaveFailedError, StorageError, tells_outcome
from cloudckpt.format import BoxTable, Column, Flat, JsonValue, Manifest, PathElement, new_attempt
from cloudckpt.options import Options
from cloudckpt.ranks import Group, named_ranks
from cloudckpt.root import Catalog, Checkpoint, Destination, Target
from cloudckpt.saving.dedup import Replicas, share_out
from cloudckpt.saving.output import Record, discard, made, write_index
from cloudckpt.saving.replicas import doubtful_sets
from cloudckpt.saving.reuse import Reuse
from cloudckpt.saving.tally import Written, assemble, check_against_names
from cloudckpt.saving.turns import Turn
from cloudckpt.state import collector_at_rest

__all__ = ["Coordinator", "MakeRoom", "Opening", "Order", "PlanMemory", "PlanPart", "RankPart"]

_SHOWN = 8
# Of the time until an end, what the making of room may take, so that the save fits behind it; without an end, so long.
_ROOM_SHARE = 0.5
_ROOM_S = 120.0

MakeRoom = Callable[[Catalog, Callable[[], bool]], int]
"""Removes, of what stands in a root, what no checkpoint needs, while it may go on; returns how many objects."""


@dataclass(slots=True)
class PlanMemory:
    """What the plan of one save leaves for the next save of a state with the same structure.

    Attributes:
        plan_id: which plan; all ranks must have the same one to use it again.
        digest: of this rank's names and boxes when it was made.
        rows: which of its boxes this rank writes.
        replicas: which of its boxes other ranks hold, too.
        turn: which blocks of large replicas the last save compared.
        paths: name → path in the nested state, on rank 0 of all ranks' names.
        notes: name → what is kept about it, on rank 0 of all ranks' names.
        tensors: names of all tensors, on rank 0.
    """

    plan_id: str = ""
    digest: bytes = b""
    rows: Column = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    replicas: Sequence[Replicas] = ()
    turn: int = field(default_factory=lambda: secrets.randbelow(1 << 30))
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    notes: dict[str, JsonValue] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a rank says first.

    Attributes:
        url: where it saves.
        values: a digest of its values.
        plan_id: which plan it could use again, "" for none.
        replicas: digests of its replicas by that plan, at the turn that follows.
        base: the manifest's digest of the checkpoint whose shards it would share, "" for none.
    """

    url: str
    values: bytes
    plan_id: str
    replicas: Mapping[int, bytes]
    base: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 answers: where to write (None: said later); or that values differ, or that a plan is to be made.

    Attributes:
        turn: which blocks of large replicas are compared.
        doubtful: the sets of replicas that seem to differ, where the plan is used again.
        base: the base of all ranks, "" where they have different ones.
    """

    prefix: str | None = None
    attempt: str = ""
    is_alike: bool = True
    is_planned: bool = False
    turn: int = 0
    doubtful: frozenset[int] = frozenset()
    base: str = ""


@dataclass(frozen=True, slots=True)
class PlanPart:
    """What rank 0 deals to a rank: the plan's id, the rows that it writes, and its replicas."""

    plan_id: str
    rows: Column
    replicas: list[Replicas]


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank has done, encoded if it is one of several, and when it was done with it (on its own clock)."""

    written: Written | bytes
    upload_s: float
    stage_s: float
    ended_s: float


@dataclass(slots=True)
class Coordinator:
    """Rank 0's side: where the save goes, who writes what, and whether all of it was written. Idle on other ranks.

    Attributes:
        destination: where it goes, on every rank.
        fallback: where it goes instead if that is down.
        end: tells by when the save must be done, as far as is known; None if none will ever be known.
        room: removes what nobody needs where a save had no room, while it may go on; None where nobody can.
        reuse: rank 0's, where what did not change is not sent.
        turn: of the destination.
    """

    destination: Destination
    memory: PlanMemory
    options: Options
    claims_later: bool
    fallback: Destination | None = None
    end: Callable[[], Deadline] | None = None
    room: MakeRoom | None = None
    reuse: Reuse | None = None
    turn: Turn = field(init=False)
    _target: Target | None = None
    _left: Target | None = None
    _attempt: str = ""
    _manifest: Manifest | None = None
    # As it was committed.
    _committed: bytes = b""
    # Whether the manifest may have been asked for.
    _is_committing: bool = False

    def __post_init__(self) -> None:
        self.turn = Turn(self.end, is_only=self.fallback is None)

    def divert(self, *, is_known: bool, may_return: bool) -> None:
        """Go to the fallback from now on; on every rank.

        Args:
            is_known: that nothing was committed so far.
            may_return: whether what was left is the fallback from now on.
        """
        if self.fallback is not None:
            self._left = self._target if is_known else None
            self.destination, self.fallback = self.fallback, self.destination if may_return else None
            self._is_committing = False
            self._target, self.turn = None, Turn(self.end, is_only=not may_return)

    def decide(self, openings: Sequence[Opening]) -> Order:
        _refuse_other_places([opening.url for opening in openings])
        if len({opening.values for opening in openings}) > 1:
            return Order(is_alike=False)
        plans = {opening.plan_id for opening in openings}
        is_planned = len(plans) == 1 and bool(plans.pop())
        # With a fallback nothing is asked of the store before the part of the save that can be done twice.
        # Nor where room can be made, which a root that is full needs for the claim.
        can_again = self.fallback is not None or self.room is not None
        is_placed = self.destination.is_claimed or not (self.claims_later or can_again)
        self._attempt = new_attempt()
        return Order(
            prefix=self.place() if is_placed else None,
            attempt=self._attempt,
            is_planned=is_planned,
            turn=self.memory.turn + 1,
            base=bases.pop() if len(bases := {opening.base for opening in openings}) == 1 else "",
            doubtful=doubtful_sets([opening.replicas for opening in openings]) if is_planned else frozenset(),
        )

    def place(self) -> str:
        """Ask the store where the save goes; it refuses if it may not go there."""
        self._target = self.destination.by(self.turn.for_commits).take()
        return self._target.prefix

    def look(self) -> Checkpoint | None:
        """Ask the store, where a save was ended by what is no answer of it, whether it has committed all the same."""
        return made(self._target, self._attempt, self.options) if self._target and self._is_committing else None

    def may_discard(self, error: BaseException) -> bool:
        """Tell whether no commit can follow any more: what an interrupt has left under way may still come to stand."""
        return not self._is_committing or tells_outcome(error)

    def make_room(self, check: Callable[[], None]) -> int:
        """Remove what nobody needs where the save had no room; return how many objects that were."""
        left_s = self.turn.part().left_s(time.monotonic())
        stop_s = time.monotonic() + min(_ROOM_S, _ROOM_SHARE * left_s)

        def go_on() -> bool:
            check()
            return time.monotonic() < stop_s

        return 0 if self.room is None else self.room(self.destination.catalog, go_on)

    def discard(self) -> None:
        """Remove what all ranks have written in an attempt that failed, if it had a place."""
        self._discard(self._target)

    def take_back(self) -> None:
        """Remove what they had written before the save was diverted."""
        self._discard(self._left)

    def _discard(self, target: Target | None) -> None:
        if target is not None:
            discard(target, {self._attempt}, self.options)

    def share_out(self, messages: Sequence[bytes]) -> list[PlanPart]:
        decoded = [msgspec.msgpack.decode(message, type=tuple[bytes, bytes, list[str]]) for message in messages]
        tables = [BoxTable.decode(table) for table, _, _ in decoded]
        shares = share_out(tables, [set(names) for _, _, names in decoded])
        self.memory.paths, self.memory.notes = _merged([about for _, about, _ in decoded])
        self.memory.tensors = frozenset(name for table in tables for name in table.names)
        plan_id = secrets.token_hex(8)
        return [PlanPart(plan_id, rows, replicas) for rows, replicas in zip(*shares, strict=True)]

    def share_alone(self, boxes: BoxTable, flat: Flat) -> Column:
        """Return which of the boxes of a lone rank it writes; raises as `share_out`."""
        ((rows,), _) = share_out([boxes], [flat.of_others.intersection(boxes.names)])
        self.memory.paths, self.memory.notes = flat.paths, flat.notes
        self.memory.tensors = frozenset(boxes.names)
        return rows

    @property
    def epoch(self) -> int:
        """That of the place, on rank 0; 0 outside a root."""
        return 0 if self._target is None else self._target.epoch

    @property
    def has_committed(self) -> bool:
        """Whether `commit` has returned, on rank 0."""
        return bool(self._committed)

    def write_index(self, parts: Sequence[RankPart], attempt: str, record: Record, group: Group) -> None:
        """Compare what was written with the plan, and put the index; then all that a commit needs is durable."""
        if self._target is None:
            raise OptionsError("only rank 0 commits")
        slowest = max(range(len(parts)), key=lambda rank: parts[rank].upload_s)
        seconds = {
            **record.seconds,
            "stage_s": max(part.stage_s for part in parts),
            "upload_s": parts[slowest].upload_s,
            "gather_s": time.monotonic() - parts[group.rank].ended_s,
            "slowest_rank": float(slowest),
        }
        with collector_at_rest():
            parts_written = [part.written for part in parts]
            written = [Written.decode(one) if isinstance(one, bytes) else one for one in parts_written]
            index = assemble(
                written,
                attempt=attempt,
                block_bytes=self.options.block_bytes,
                paths=self.memory.paths,
                notes=self.memory.notes,
                content=next((one.content for one in written if one.content), ""),
                holders=[] if self.reuse is None else self.reuse.holders,
            )
        group.tick()
        check_against_names(self.memory.tensors, index)
        group.tick()
        full = replace(record, world_size=group.size, seconds=seconds)
        self._manifest = write_index(self._target, index, full)

    def commit(self) -> bytes:
        """Commit what `write_index` has put; return the manifest. Once that is done, or was done before, no request."""
        if self._target is None or self._manifest is None:
            raise OptionsError("only rank 0 commits")
        if not self._committed:
            # The time that there is now: the index may have been put long ago.
            target = replace(self._target, catalog=self.destination.by(self.turn.for_commits).catalog)
            was_asked, self._is_committing = self._is_committing, True
            found = self._made(target) if was_asked else None
            base = None if self.reuse is None else self.reuse.base
            self._committed = (found or target.commit(self._manifest, base)).manifest.encode()
        return self._committed

    def _made(self, target: Target) -> Checkpoint | None:
        """Ask what an earlier commit came to of which nobody knows."""
        try:
            return target.catalog.made_by([self._attempt], prefix=target.prefix)
        except StorageError as exc:
            raise CommitUnknownError(
                f"whether {target.prefix} is committed could not be asked: {exc}", op="create"
            ) from exc


def _refuse_other_places(urls: Sequence[str]) -> None:
    """Refuse ranks that save to different URLs: each would write its shards to its own."""
    ranks: dict[str, list[int]] = {}
    for rank, url in enumerate(urls):
        ranks.setdefault(url, []).append(rank)
    if len(ranks) > 1:
        places = "; ".join(f"{named_ranks(there)} to {url}" for url, there in list(ranks.items())[:_SHOWN])
        raise SaveFailedError(
            f"the ranks save to different places, and nothing was written: {places}. Give every rank the same URL"
        )


_Paths = dict[str, list[PathElement]]
_Notes = dict[str, JsonValue]


def _merged(messages: Sequence[bytes]) -> tuple[_Paths, _Notes]:
    """Return what all ranks say of names; of what several say, the first one's word and order.

    Raises:
        SaveFailedError: a name stands at different places on two ranks.
    """
    ranks_of: dict[bytes, list[int]] = {}
    for rank, message in enumerate(messages):
        ranks_of.setdefault(message, []).append(rank)
    paths: _Paths = {}
    notes: _Notes = {}
    first: dict[str, list[int]] = {}
    problems = []
    # The ranks of a sharded model say the same, byte for byte; each is looked at once.
    for message, ranks in ranks_of.items():
        own_paths, own_notes = msgspec.json.decode(message, type=tuple[_Paths, _Notes])
        for name, path in own_paths.items():
            if paths.setdefault(name, path) != path:
                where = f"{_way(paths[name])} on {named_ranks(first[name])} and {_way(path)} on {named_ranks(ranks)}"
                problems.append(f"{name!r} is {where}")
            first.setdefault(name, ranks)
        notes |= {name: note for name, note in own_notes.items() if name not in notes}
    if problems:
        left = len(problems) - _SHOWN
        shown = "; ".join([*problems[:_SHOWN], *([f"and {left} more"] if left > 0 else [])])
        raise SaveFailedError(
            f"the ranks hold different containers, and nothing was written: {shown}. Build the state alike on every "
            "rank, and save again"
        )
    return paths, notes


def _way(path: Sequence[PathElement]) -> str:
    """Return a path as people read it: `state['a'](0)` for the first of a tuple."""
    return "state" + "".join(map(_step, path))


def _step(element: PathElement) -> str:
    if isinstance(element, dict):
        ((kind, key),) = element.items()
        return f"({key})" if kind == "tuple" else f"[{key!r}]" if kind == "key" else f"[{kind} {key!r}]"
    return f"[{element!r}]"
