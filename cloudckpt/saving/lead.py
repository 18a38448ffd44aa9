"""Lead the ranks of a group through one save: the same steps as DCP's own `save`, over messages that cannot hang.

    opening   every rank: names, values and boxes   ──▶ rank 0: all alike? a place, an attempt id
    plan      boxes of every rank                   ──▶ rank 0: who writes which; left out while nothing changed
    upload    every rank: its shards                ──▶ rank 0: plan == results? index, manifest ──▶ committed

DCP's planner says which boxes of which tensors this rank holds and hands out their data; who writes a box that
several ranks hold is decided here, because DCP weighs a box by its whole tensor, and because thousands of ranks'
plans as objects are too much for one. Keeps FORMAT invariants 2, 3, 4 and 13.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import torch
import xxhash
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    OptionsError,
    RankLostError,
    SaveFailedError,
)
from cloudckpt.format import (
    Box,
    BoxTable,
    Column,
    Flat,
    JsonValue,
    Manifest,
    PathElement,
    codec,
    metadata_to_json,
    metrics_to_json,
    new_attempt,
)
from cloudckpt.options import Options
from cloudckpt.ranks import Group, RanksFailedError, UndecidedError
from cloudckpt.root import Catalog, Checkpoint
from cloudckpt.saving.dedup import share_out
from cloudckpt.saving.output import Part, RankOutput, Record, Target, commit_index, lay_out_part, stats_of
from cloudckpt.saving.snapshot import Staged, take_snapshot
from cloudckpt.saving.source import Source, check_layout, check_tensor, chunk_of
from cloudckpt.saving.tally import Written, assemble, check_against_names
from cloudckpt.state import is_tensor
from cloudckpt.transfer import AbandonedError, Slabs, StageClosedError

__all__ = ["PendingSave", "PlanMemory", "begin_save", "save_state"]

logger = logging.getLogger(__name__)

_SHOWN = 8


@dataclass(slots=True)
class PlanMemory:
    """What the plan of one save leaves for the next save of a state with the same structure.

    Attributes:
        plan_id: which plan; all ranks must have the same one to use it again.
        digest: of this rank's names and boxes when it was made.
        rows: which of its boxes this rank writes.
        paths: name → path in the nested state, on rank 0 of all ranks' names.
        tensors: names of all tensors, on rank 0.
    """

    plan_id: str = ""
    digest: bytes = b""
    rows: Column = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


def save_state(  # noqa: PLR0913 (keyword-only, each of its own kind)
    capture: Callable[[], Flat],
    place: Callable[[], Target],
    *,
    catalog: Catalog,
    group: Group,
    options: Options,
    memory: PlanMemory | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
    what: str = "save",
) -> Checkpoint:
    """Save a state with all ranks of the group; return, on every rank, once it is committed.

    Args:
        capture: returns this rank's named leaves; called on every rank.
        place: returns where the checkpoint goes, and refuses if it may not go there; called on rank 0.
        catalog: this rank's own, over the store that `place` names.
        group: the ranks that save.
        options: sizes, parallelism, patience.
        memory: the plan of an earlier save, which is used again while nothing changed.
        metrics: numbers to be kept with the checkpoint.
        metadata: values to be kept with the checkpoint.
        what: what the ranks do, with the step; ranks that do different things are told so.

    Raises:
        SaveFailedError: ranks failed, were lost, or hold different states; nothing was committed.
        CommitUnknownError: the outcome is not known (rank 0 was lost at the end); nothing was deleted.
        CloudCkptError: what the one process, or rank 0 for all, was refused with; nothing was committed.
    """
    pending = begin_save(
        capture,
        place,
        catalog=catalog,
        group=group,
        options=options,
        memory=memory,
        metrics=metrics,
        metadata=metadata,
        what=what,
    )
    return pending.finish()


def begin_save(  # noqa: PLR0913 (keyword-only, each of its own kind)
    capture: Callable[[], Flat],
    place: Callable[[], Target],
    *,
    catalog: Catalog,
    group: Group,
    options: Options,
    memory: PlanMemory | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
    what: str = "save",
    slabs: Slabs | None = None,
    is_placed_later: bool = False,
) -> PendingSave:
    """Agree with all ranks on what is saved and who writes it; `PendingSave` does the rest.

    Takes what `save_state` takes, and raises what that raises. With `slabs`, memory for copies of the tensors, these
    may change once they were staged; without, they are uploaded as they are then. `place` is called here, unless rank 0
    says that it is called later, because it has to ask the store.
    """
    saving = _Saving(capture, catalog, group, options, memory or PlanMemory())
    with ExitStack() as stack:
        stack.enter_context(_plain_errors(group))
        stack.enter_context(group.session(what, deadline_s=options.progress_timeout_s))
        saving.begin(place, what, metrics, metadata, is_placed_later=is_placed_later)
        if slabs is not None:
            saving.find_room(slabs)
        group.hand_over()
        return PendingSave(saving, group, stack.pop_all())


class PendingSave:
    """A save on which all ranks have agreed: to be staged, if it has memory for that, and finished."""

    def __init__(self, saving: _Saving, group: Group, stack: ExitStack) -> None:
        """Made by `begin_save`."""
        self._saving = saving
        self._group = group
        self._stack = stack

    @property
    def size_bytes(self) -> int:
        """Bytes of this rank's part."""
        return self._saving.size_bytes

    def stage(self) -> None:
        """Copy this rank's part; afterwards the state may change. Needs `finish` at work in another thread.

        Raises:
            StageClosedError: `finish` has ended, by an error that says why.
        """
        self._saving.stage()

    def abandon(self, why: str) -> None:
        """Let `finish` fail soon, unless the commit is decided. Any thread may call it."""
        self._saving.abandon(why)

    def finish(self) -> Checkpoint:
        """Upload and commit with all ranks; raises as `save_state`. In any thread, once."""
        self._group.take_over()
        with self._stack:
            return self._saving.finish()


@dataclass(frozen=True, slots=True)
class _Opening:
    """What a rank says first: a digest of its values, and which plan it could use again."""

    values: bytes
    plan_id: str


@dataclass(frozen=True, slots=True)
class _Order:
    """What rank 0 answers: where to write; or that the ranks' values differ, or that a plan is to be made."""

    prefix: str = ""
    attempt: str = ""
    is_alike: bool = True
    is_planned: bool = False
    is_placed: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank has done."""

    written: bytes
    upload_s: float
    stage_s: float


class _Saving:
    """One save, on one rank."""

    def __init__(
        self, capture: Callable[[], Flat], catalog: Catalog, group: Group, options: Options, memory: PlanMemory
    ) -> None:
        self._capture = capture
        self._catalog = catalog
        self._group = group
        self._options = options
        self._memory = memory
        self._planner = DefaultSavePlanner(flatten_state_dict=False)
        self._items: list[WriteItem] = []
        self._values: dict[str, JsonValue] = {}
        self._message = b""
        self._digest = b""
        self._what = ""
        self._abandoned = ""
        self._record = Record()
        self._order = _Order()
        self._target: Target | None = None
        self._place: Callable[[], Target]
        self._is_placed_later = False
        self._part = Part([], [], Source((), self._planner, ()))
        self._fault: Exception | None = None
        self._staged: Staged | None = None
        self._stage_s = 0.0
        self._ended_s = 0.0
        self._began_s = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._spent_before = stats_of(catalog.store)

    def begin(
        self,
        place: Callable[[], Target],
        what: str,
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, object] | None,
        *,
        is_placed_later: bool,
    ) -> None:
        """Agree on what is saved, where, and who writes what; raises as the steps do."""
        self._what, self._place, self._is_placed_later = what, place, is_placed_later

        def opening() -> _Opening:
            self._record = Record(metrics=metrics_to_json(metrics), metadata=metadata_to_json(metadata))
            return self._open()

        self._order = self._group.agree(f"{what}: opening", opening, self._decide)
        if not self._order.is_alike:
            self._group.agree(f"{what}: comparing values", lambda: _digests(self._values), _refuse_values)
        if not self._order.is_planned:
            self._plan()
        self._seconds["plan_s"] = time.monotonic() - self._began_s

    def find_room(self, slabs: Slabs) -> None:
        """Place what this rank writes into shards, and find room for copies of them.

        What that raises is raised by `finish`, which all ranks hear of.
        """
        try:
            self._lay_out()
            engine = self._catalog.store.engine
            self._staged = Staged.of(slabs, self._part.shards, self._part.source, self._options, engine=engine)
        except Exception as exc:  # noqa: BLE001 (the end of a rank's part: raised again on every rank)
            self._fault = exc

    def _lay_out(self) -> None:
        items = [self._items[row] for row in self._memory.rows.tolist()]
        self._part = lay_out_part(items, self._planner, attempt=self._order.attempt, options=self._options)

    def abandon(self, why: str) -> None:
        """Let the upload, or the commit that has not begun, raise."""
        self._abandoned = why
        if self._staged is not None:
            self._staged.stage.close()

    def _check(self) -> None:
        if self._abandoned:
            raise AbandonedError(f"the save was abandoned: {self._abandoned}")
        self._group.check()

    @property
    def size_bytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(shard.size_bytes for shard in self._part.shards)

    def stage(self) -> None:
        """Copy what this rank writes, and let go of the caller's tensors."""
        if self._staged is None:
            raise StageClosedError("there is no room to stage in") from self._fault
        began_s = time.monotonic()
        take_snapshot(self._staged, self._part.shards, self._part.chunks, self._part.source)
        self._stage_s = time.monotonic() - began_s
        self._part.source.forget()
        self._planner, self._items = DefaultSavePlanner(), []
        self._capture = lambda: Flat({}, {})

    def finish(self) -> Checkpoint:
        """Upload, and commit what all ranks have uploaded."""
        if self._staged is not None:
            self._staged.stage.wait_for_first()
        try:
            if not self._order.is_placed:
                self._order = self._group.agree(f"{self._what}: claiming", lambda: None, lambda _: self._placed())
            data = self._group.conclude(f"{self._what}: upload and commit", self._upload, self._commit)
        finally:
            if self._staged is not None:
                self._staged.stage.close()
        return self._catalog.adopt(Manifest.decode(data, key=self._order.prefix), prefix=self._order.prefix)

    # -- opening -------------------------------------------------------------------------------------------

    def _open(self) -> _Opening:
        flat = self._capture()
        tensors = {name: leaf for name, leaf in flat.leaves.items() if is_tensor(leaf)}
        self._values = {
            # Refused here, before a byte is written.
            name: codec.encode(leaf, key=name)
            for name, leaf in flat.leaves.items()
            if name not in tensors
        }
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, ShardedTensor):
                check_tensor(name, tensor)
        self._planner.set_up_planner(tensors, None, self._group.rank == 0)
        self._items = self._planner.create_local_plan().items
        table = BoxTable.of(map(_box_of, self._items))
        self._message = msgspec.msgpack.encode((table.encode(), msgspec.json.encode(flat.paths)))
        self._digest = xxhash.xxh3_128_digest(self._message)
        values = xxhash.xxh3_128_digest(msgspec.json.encode(self._values))
        return _Opening(values, self._memory.plan_id if self._memory.digest == self._digest else "")

    def _decide(self, openings: Sequence[_Opening]) -> _Order:
        if len({opening.values for opening in openings}) > 1:
            return _Order(is_alike=False)
        plans = {opening.plan_id for opening in openings}
        self._order = _Order(attempt=new_attempt(), is_planned=len(plans) == 1 and bool(plans.pop()))
        return self._order if self._is_placed_later else self._placed()

    def _placed(self) -> _Order:
        self._target = self._place()
        return replace(self._order, prefix=self._target.prefix, is_placed=True)

    # -- plan ----------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        # Rank 0 overwrites what belongs to the plan before it is known that all ranks get the new one.
        self._memory.plan_id = ""
        plan_id, rows = self._group.deal(f"{self._what}: plan", lambda: self._message, self._share_out)
        self._memory.plan_id, self._memory.digest = plan_id, self._digest
        self._memory.rows = np.frombuffer(rows, dtype=np.int64)

    def _share_out(self, messages: Sequence[bytes]) -> list[tuple[str, bytes]]:
        decoded = [msgspec.msgpack.decode(message, type=tuple[bytes, bytes]) for message in messages]
        tables = [BoxTable.decode(table) for table, _ in decoded]
        rows = share_out(tables)
        self._memory.tensors = frozenset(name for table in tables for name in table.names)
        self._memory.paths = {}
        # The ranks of a sharded model have the same paths, byte for byte; each is looked at once.
        for data in dict.fromkeys(paths for _, paths in decoded):
            for name, path in msgspec.json.decode(data, type=dict[str, list[PathElement]]).items():
                self._memory.paths.setdefault(name, path)
        plan_id = secrets.token_hex(8)
        return [(plan_id, of_rank.astype(np.int64).tobytes()) for of_rank in rows]

    # -- upload and commit ---------------------------------------------------------------------------------

    def _upload(self) -> _Part:
        if self._fault is not None:
            raise self._fault
        began_s = time.monotonic()
        target = self._target or Target(catalog=self._catalog, prefix=self._order.prefix)
        watch = replace(self._group.watch(self._options.progress_timeout_s), check=self._check)
        output = RankOutput(
            target, attempt=self._order.attempt, rank=self._group.rank, options=self._options, watch=watch
        )
        if self._staged is None:
            self._lay_out()
        # All ranks have the same values, which was checked; one of them writes them down.
        values = self._values if self._group.rank == 0 else {}
        written = output.write(self._part, values, self._staged)
        self._ended_s = time.monotonic()
        return _Part(written.encode(), self._ended_s - began_s, self._stage_s + output.stage_s)

    def _commit(self, parts: Sequence[_Part]) -> bytes:
        if self._target is None:
            raise OptionsError("only rank 0 commits")
        self._check()
        slowest = max(range(len(parts)), key=lambda rank: parts[rank].upload_s)
        self._seconds |= {
            "stage_s": max(part.stage_s for part in parts),
            "upload_s": parts[slowest].upload_s,
            "gather_s": time.monotonic() - self._ended_s,
        }
        written = [Written.decode(part.written) for part in parts]
        index = assemble(
            written, attempt=self._order.attempt, block_bytes=self._options.block_bytes, paths=self._memory.paths
        )
        self._group.tick()
        check_against_names(self._memory.tensors, index)
        self._group.tick()
        full = replace(
            self._record,
            world_size=self._group.size,
            began_s=self._began_s,
            spent_before=self._spent_before,
            seconds={**self._seconds, "slowest_rank": float(slowest)},
        )
        return commit_index(self._target, index, full).manifest.encode()


def _box_of(item: WriteItem) -> Box:
    data = item.tensor_data
    if data is not None:
        check_layout(item.index.fqn, data.properties.layout, data.properties.dtype)
    chunk = chunk_of(item)
    return Box(chunk.name, chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)


# -- ranks that differ --------------------------------------------------------------------------------------


def _digests(values: Mapping[str, JsonValue]) -> dict[str, bytes]:
    return {name: xxhash.xxh3_128_digest(msgspec.json.encode(value)) for name, value in values.items()}


def _refuse_values(found: Sequence[Mapping[str, bytes]]) -> None:
    """Say which ranks have which values that others have not; a checkpoint would hold one of them only."""
    parts = []
    for name in sorted({name for digests in found for name in digests}):
        by_value: dict[bytes | None, list[int]] = {}
        for rank, digests in enumerate(found):
            by_value.setdefault(digests.get(name), []).append(rank)
        missing = by_value.pop(None, [])
        if missing:
            parts.append(f"{name!r} is missing on {_ranks(missing)}")
        if len(by_value) > 1:
            parts.append(f"{name!r} differs between {' and '.join(_ranks(ranks) for ranks in by_value.values())}")
    shown = "; ".join(parts[:_SHOWN])
    raise SaveFailedError(
        f"the ranks hold different states, and nothing was written: {shown}. Give every rank the same values, or keep "
        "what belongs to one rank out of the state"
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', …' if len(ranks) > _SHOWN else ''}"


# -- what the caller is told --------------------------------------------------------------------------------


@contextmanager
def _plain_errors(group: Group) -> Iterator[None]:
    """Turn what the ranks met into the error that says whether something was committed."""
    try:
        yield
    except RanksFailedError as exc:
        raise _failure(exc.failures, group.size) from exc
    except UndecidedError as exc:
        raise CommitUnknownError(
            f"rank 0 was lost when it was about to commit: the checkpoint is whole or not there; {exc}", op="create"
        ) from exc
    except RankLostError as exc:
        failures = dict.fromkeys(exc.ranks, exc)
        raise SaveFailedError(f"the save failed and nothing was committed: {exc}", failures=failures) from exc


def _failure(failures: Mapping[int, BaseException], size: int) -> BaseException:
    """Choose what to raise: the error that every rank met, or a `SaveFailedError` with each rank's own."""
    first = failures[min(failures)]
    kinds = {(type(error), str(error)) for error in failures.values()}
    if isinstance(first, CloudCkptError) and len(failures) == size and len(kinds) == 1:
        return first
    if size == 1 and not isinstance(first, CloudCkptError):
        return SaveFailedError(f"the save failed and nothing was committed: {first!r}", failures=failures)
    text = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(failures.items())[:_SHOWN])
    return SaveFailedError(f"the save failed and nothing was committed: {text}", failures=failures)
