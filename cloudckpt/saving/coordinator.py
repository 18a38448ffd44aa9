"""Do rank 0's part of a save: where it goes, who writes what, whether all of it was written; then commit.

    openings of all ranks ──decide──▶ Order          boxes of all ranks ──share_out──▶ rows of each
    parts of all ranks ──plan == results?──▶ index ──▶ manifest, created: committed

Works on messages of ranks alone, and sees no tensor. Keeps FORMAT invariants 2, 3 and 13.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import xxhash

from cloudckpt.errors import OptionsError, SaveFailedError
from cloudckpt.format import BoxTable, Column, JsonValue, PathElement, new_attempt
from cloudckpt.options import Options
from cloudckpt.ranks import Group, named_ranks
from cloudckpt.root import Destination, Target
from cloudckpt.saving.dedup import share_out
from cloudckpt.saving.output import Record, commit_index
from cloudckpt.saving.tally import Written, assemble, check_against_names

__all__ = ["Coordinator", "Opening", "Order", "PlanMemory", "RankPart", "digests_of", "refuse_values"]

_SHOWN = 8


@dataclass(slots=True)
class PlanMemory:
    """What the plan of one save leaves for the next save of a state with the same structure.

    Attributes:
        plan_id: which plan; all ranks must have the same one to use it again.
        digest: of this rank's names and boxes when it was made.
        rows: which of its boxes this rank writes.
        paths: name → path in the nested state, on rank 0 of all ranks' names.
        notes: name → what is kept about it, on rank 0 of all ranks' names.
        tensors: names of all tensors, on rank 0.
    """

    plan_id: str = ""
    digest: bytes = b""
    rows: Column = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    notes: dict[str, JsonValue] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a rank says first: where it saves, a digest of its values, and which plan it could use again."""

    url: str
    values: bytes
    plan_id: str


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 answers: where to write (None: said later); or that values differ, or that a plan is to be made."""

    prefix: str | None = None
    attempt: str = ""
    is_alike: bool = True
    is_planned: bool = False


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank has done, and when it was done with it (on its own clock)."""

    written: bytes
    upload_s: float
    stage_s: float
    ended_s: float


@dataclass(slots=True)
class Coordinator:
    """Rank 0's side: where the save goes, who writes what, and whether all of it was written. Idle on other ranks."""

    destination: Destination
    memory: PlanMemory
    options: Options
    claims_later: bool
    _target: Target | None = None

    def decide(self, openings: Sequence[Opening]) -> Order:
        _refuse_other_places([opening.url for opening in openings])
        if len({opening.values for opening in openings}) > 1:
            return Order(is_alike=False)
        plans = {opening.plan_id for opening in openings}
        is_placed = self.destination.is_claimed or not self.claims_later
        return Order(
            prefix=self.place() if is_placed else None,
            attempt=new_attempt(),
            is_planned=len(plans) == 1 and bool(plans.pop()),
        )

    def place(self) -> str:
        """Ask the store where the save goes; it refuses if it may not go there."""
        self._target = self.destination.take()
        return self._target.prefix

    def share_out(self, messages: Sequence[bytes]) -> list[tuple[str, bytes]]:
        decoded = [msgspec.msgpack.decode(message, type=tuple[bytes, bytes]) for message in messages]
        tables = [BoxTable.decode(table) for table, _ in decoded]
        rows = share_out(tables)
        self.memory.tensors = frozenset(name for table in tables for name in table.names)
        self.memory.paths, self.memory.notes = {}, {}
        # The ranks of a sharded model say the same of names, byte for byte; each is looked at once.
        for data in dict.fromkeys(about for _, about in decoded):
            paths, notes = msgspec.json.decode(data, type=tuple[dict[str, list[PathElement]], dict[str, JsonValue]])
            self.memory.paths |= paths
            self.memory.notes |= notes
        plan_id = secrets.token_hex(8)
        return [(plan_id, of_rank.astype(np.int64).tobytes()) for of_rank in rows]

    def commit(self, parts: Sequence[RankPart], attempt: str, record: Record, group: Group) -> bytes:
        """Compare what was written with the plan, and commit it; return the manifest."""
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
        written = [Written.decode(part.written) for part in parts]
        index = assemble(
            written,
            attempt=attempt,
            block_bytes=self.options.block_bytes,
            paths=self.memory.paths,
            notes=self.memory.notes,
        )
        group.tick()
        check_against_names(self.memory.tensors, index)
        group.tick()
        full = replace(record, world_size=group.size, seconds=seconds)
        return commit_index(self._target, index, full).manifest.encode()


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


def digests_of(values: Mapping[str, JsonValue]) -> dict[str, bytes]:
    """Return a digest of each value, by which ranks find out which of theirs differ."""
    return {name: xxhash.xxh3_128_digest(msgspec.json.encode(value)) for name, value in values.items()}


def refuse_values(found: Sequence[Mapping[str, bytes]]) -> None:
    """Say which ranks have which values that others have not; a checkpoint would hold one of them only."""
    parts = []
    for name in sorted({name for digests in found for name in digests}):
        by_value: dict[bytes | None, list[int]] = {}
        for rank, digests in enumerate(found):
            by_value.setdefault(digests.get(name), []).append(rank)
        missing = by_value.pop(None, [])
        if missing:
            parts.append(f"{name!r} is missing on {named_ranks(missing)}")
        if len(by_value) > 1:
            parts.append(f"{name!r} differs between {' and '.join(named_ranks(ranks) for ranks in by_value.values())}")
    shown = "; ".join(parts[:_SHOWN])
    raise SaveFailedError(
        f"the ranks hold different states, and nothing was written: {shown}. Give every rank the same values, or keep "
        "what belongs to one rank out of the state"
    )
