"""Lead the ranks of a group through one save: the same steps as DCP's own `save`, over messages that cannot hang.

    flat state ──open──▶ _Opened ──agree──▶ Order ──plan, lay out──▶ _Laid ──(stage)──▶ RankPart ──commit──▶ Checkpoint
                                 │ alike?           │ who writes what? alike?        │ plan == results?
                                 ╰──────────────── rank 0: Coordinator ─────────────╯

Each arrow makes a value that does not change any more; an error on the way is a value, too, until the exchange in
which all ranks hear of it. `begin_save` goes as far as _Laid in the training's thread; `PendingSave.stage` copies
there, where that is wanted; `PendingSave.finish` does the rest, in that thread or another one.

DCP's planner says which boxes of which tensors this rank holds and hands out their data; who writes a box that
several ranks hold is decided here, because DCP weighs a box by its whole tensor, and because thousands of ranks'
plans as objects are too much for one. Keeps FORMAT invariants 2, 3, 4 and 13.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec
import torch
import xxhash

from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    CommitUnknownError,
    RetryExhaustedError,
    StalledError,
    StorageError,
    is_outage,
)
from cloudckpt.format import BoxTable, Column, Flat, JsonValue, codec, record_of_call
from cloudckpt.options import Options
from cloudckpt.ranks import Group, RanksFailedError
from cloudckpt.root import BaseGoneError, Checkpoint, Destination, Target
from cloudckpt.saving.coordinator import Coordinator, MakeRoom, Opening, Order, PlanMemory, RankPart
from cloudckpt.saving.holding import Holding
from cloudckpt.saving.output import RankOutput, Record, stats_of
from cloudckpt.saving.replicas import Details, details_of, digests_of_sets, doubtful_sets, refuse_replicas
from cloudckpt.saving.reuse import Reuse
from cloudckpt.saving.session import Session
from cloudckpt.saving.snapshot import Staged, take_snapshot
from cloudckpt.saving.source import Source
from cloudckpt.saving.uncommitted import Uncommitted
from cloudckpt.saving.values import differences_of, digest_of_values, digests_of, refuse_values, wanted_values
from cloudckpt.state import collector_awake, is_tensor
from cloudckpt.store import LeftBehindError
from cloudckpt.transfer import AbandonedError, Gauge, Puts, Slabs, Stage, StageClosedError

__all__ = ["PendingSave", "PlanMemory", "begin_save"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_SHOWN = 8
# Before a root is tried once more.
_PAUSE_S = 0.5


def begin_save(  # noqa: PLR0913 (keyword-only options, each of its own kind)
    session: Session,
    flat: Flat | Exception,
    destination: Destination,
    *,
    fallback: Destination | None = None,
    end: Callable[[], Deadline] | None = None,
    memory: PlanMemory | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
    slabs: Slabs | None = None,
    room: MakeRoom | None = None,
    reuse: Reuse | None = None,
) -> PendingSave:
    """Agree with all ranks on what is saved and who writes it; `PendingSave` does the rest, and ends the session.

    Args:
        session: of the ranks that save, which all of them have entered.
        flat: this rank's named leaves, or why there are none: all ranks are to hear of it.
        destination: where the checkpoint goes; rank 0's is asked. One that is not claimed yet is claimed in `finish` of
            a save from a copy, because that takes requests.
        fallback: where it goes instead, at once and with the same bytes, if the store there is down; each of the two
            is tried again while there is time until an end.
        end: tells by when the save must be done, as far as is known; also one that is announced when it is under
            way. None: none will ever be known.
        memory: the plan of an earlier save, which is used again while nothing changed.
        metrics: numbers to be kept with the checkpoint.
        metadata: values to be kept with the checkpoint.
        slabs: memory for copies of the tensors, which may change once they were staged; None uploads them as they are.
        room: removes what nobody needs at a root that has no room for the save, which is tried again then; rank 0's is
            asked, and all ranks have one or none has.
        reuse: leaves out what another checkpoint holds already; all ranks have one, or none has.

    Raises:
        RanksFailedError: ranks failed, or hold different states; nothing was committed.
        RankLostError: ranks were lost; nothing was committed.
        CloudCkptError: as the end of the session makes it of these.
    """
    group, what, options = session.group, session.what, session.options
    memory = memory or PlanMemory()
    coordinator = Coordinator(
        destination, memory, options, claims_later=slabs is not None, fallback=fallback, end=end, room=room, reuse=reuse
    )
    places = [one for one in (destination, fallback) if one is not None]
    opened = _tried(lambda: _open(_got(flat), group))
    record = _tried(lambda: _record(session, metrics, metadata, destination))
    with _waiting(group):
        order = group.agree(
            f"{what}: opening", lambda: _opening(opened, record, memory, places, reuse), coordinator.decide
        )
    mine, record = _got(opened), _got(record)
    with _waiting(group):
        if not order.is_alike:
            _tell_values_apart(mine, group, what)
        memory.turn = order.turn
        doubtful = order.doubtful if order.is_planned else _plan(mine, memory, coordinator, group, what)
        if doubtful:
            phase = f"{what}: comparing replicas"
            group.agree(phase, lambda: mine.details(memory, doubtful, group.rank), refuse_replicas)
    if reuse is not None:
        reuse.agree(order.base)
    engines = [one.catalog.store.engine for one in places]
    # What this raises is raised by `finish`, which all ranks hear of.
    staged = partial(Staged.of, options=options, engines=engines, rank=group.rank, is_kept=room is not None)
    laid = _tried(
        lambda: _lay_out(
            mine,
            memory.rows,
            order.attempt,
            options,
            None if slabs is None else partial(staged, slabs),
            is_grouped=reuse is not None,
        )
    )
    lead = _Lead(
        what=what,
        group=group,
        options=options,
        coordinator=coordinator,
        order=order,
        record=replace(
            record,
            seconds={"plan_s": time.monotonic() - session.began_s, "in_background": float(slabs is not None)},
        ),
        # All ranks have the same, which was checked; one of them writes them down.
        values=mine.values if group.rank == 0 else {},
        reuse=reuse,
    )
    return PendingSave(lead, laid, session.hand_over())


class PendingSave:
    """A save on which all ranks have agreed: to be staged, if it has memory for that, and finished.

    Two threads may have it at once: one that stages, and one that finishes.
    """

    def __init__(self, lead: _Lead, laid: _Laid | Exception, stack: ExitStack) -> None:
        self._lead = lead
        self._laid = laid
        self._stack = stack
        self._abandoned = ""
        self._stage_s = 0.0
        self._puts = Puts()

    @property
    def size_bytes(self) -> int:
        """Bytes of this rank's part."""
        return 0 if isinstance(self._laid, Exception) else sum(shard.size_bytes for shard in self._laid.source.shards)

    def stage(self) -> None:
        """Copy this rank's part; afterwards the state may change. Needs `finish` at work in another thread.

        Raises:
            StageClosedError: `finish` has ended, by an error that says why.
        """
        laid = self._laid
        if isinstance(laid, Exception) or laid.staged is None:
            raise StageClosedError("there is no room to stage in") from (laid if isinstance(laid, Exception) else None)
        began_s = time.monotonic()
        take_snapshot(laid.staged, laid.source)
        self._stage_s = time.monotonic() - began_s
        laid.source.forget()

    def abandon(self, why: str) -> None:
        """Let `finish` fail soon, unless the commit is decided. Any thread may call it."""
        self._abandoned = why
        self._close_stage()

    def _close_stage(self) -> None:
        if (stage := self._stage) is not None:
            stage.close()

    @property
    def _stage(self) -> Stage | None:
        staged = None if isinstance(self._laid, Exception) else self._laid.staged
        return None if staged is None else staged.stage

    def _check(self) -> None:
        if self._abandoned:
            raise AbandonedError(f"the save was abandoned: {self._abandoned}")
        self._lead.group.check()

    def finish(self, gauge: Gauge | None = None) -> Checkpoint:
        """Upload and commit with all ranks. In any thread, once, or `finish_parts`.

        Args:
            gauge: is told how many bytes have moved.

        Raises:
            SaveFailedError: ranks failed or were lost; nothing was committed.
            CommitUnknownError: the outcome is not known (rank 0 was lost at the end); nothing was deleted.
            CloudCkptError: what the one process, or rank 0 for all, was refused with; nothing was committed.
        """
        return self._ended(gauge, self._lead.commit)

    def finish_parts(self, gauge: Gauge | None = None) -> Uncommitted:
        """Upload with all ranks, and commit nothing: what is returned does. Raises as `finish` does."""
        return self._ended(gauge, self._lead.write)

    def _ended(self, gauge: Gauge | None, end: _End[_T]) -> _T:
        try:
            return self._finish(gauge, end)
        except CommitUnknownError:
            raise
        except Exception as exc:
            # The session has ended by now, and with it what the ranks were at. A process that ends has no time for it.
            if not self._abandoned:
                self.take_back()
                if self._lead.coordinator.may_discard(exc):
                    self._lead.coordinator.discard()
            raise

    @property
    def look(self) -> Callable[[], Checkpoint | None]:
        """What asks the store, on rank 0, whether it has committed, if an exception does not tell. Holds no tensor."""
        return self._lead.coordinator.look

    @property
    def take_back(self) -> Callable[[], None]:
        """What removes, on rank 0 after the end, what it left on a root that was down. Holds no tensor."""
        return self._lead.coordinator.take_back

    def _finish(self, gauge: Gauge | None, end: _End[_T]) -> _T:
        lead = self._lead
        lead.group.take_over()
        with self._stack:
            if (stage := self._stage) is not None:
                stage.wait_for_first()
            try:
                return lead.finish(lambda prefix: self._upload(prefix, gauge), self._check, self._is_whole, end)
            except BaseException:
                # Whatever it was, the next save is planned anew: a plan that does not fit must not fail every save.
                lead.coordinator.memory.plan_id = ""
                raise
            finally:
                self._close_stage()

    def _is_whole(self) -> bool:
        """Tell whether this rank's part can be uploaded once more."""
        self._check()
        return self._stage is None or self._stage.is_whole

    def _upload(self, prefix: str, gauge: Gauge | None) -> RankPart:
        laid, lead = _got(self._laid), self._lead
        began_s = time.monotonic()
        turn, end = lead.coordinator.turn, lead.coordinator.turn.whole()
        store = lead.coordinator.destination.catalog.store
        still_s, limit = lead.options.transfer_limit(store.engine)

        def check() -> None:
            self._check()
            turn.check()
            # No request to a disk that hangs ends by itself.
            if store.engine == "local" and end.left_s(time.monotonic()) <= 0:
                raise StalledError(f"the upload to {store.url} did not end before the end of {end.reason}")

        watch = replace(
            lead.group.watch(still_s),
            check=check,
            gauge=gauge,
            limit=limit if math.isinf(end.stop_s) else f"{limit} or {end.reason}",
        )
        target = Target(catalog=lead.coordinator.destination.by(turn.for_uploads).catalog, prefix=prefix)
        output = RankOutput(
            target=target,
            attempt=lead.order.attempt,
            rank=lead.group.rank,
            options=lead.options,
            watch=watch,
            puts=self._puts,
            sieve=None if lead.reuse is None else lead.reuse.at(target.catalog),
        )
        written = output.write(laid.source, lead.values, laid.staged)
        sent = written.encode() if lead.group.size > 1 else written
        return RankPart(sent, time.monotonic() - began_s, self._stage_s + output.stage_s, time.monotonic())


# -- the values on the way ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """What one rank brings: its boxes as DCP's planner has them, its values, and names, boxes and paths for rank 0.

    `parts` are digests of what of the values is too large to stand among them, and is among the boxes. No other rank
    has `of_first_rank`.
    """

    holding: Holding
    values: dict[str, JsonValue]
    parts: dict[str, str]
    of_first_rank: set[str]
    alike: dict[str, list[str]]
    message: bytes
    digest: bytes
    flat: Flat

    @property
    def boxes(self) -> BoxTable:
        return self.holding.table

    def told(self) -> dict[str, JsonValue]:
        """Return what is to be the same on all ranks: each value, and a digest of its parts if it has some."""
        values = {
            name: [value, self.parts[name]] if self.parts[name] else value
            for name, value in self.values.items()
            if name not in self.of_first_rank
        }
        return {**values, **{f"{name}: its names": list[JsonValue](names) for name, names in self.alike.items()}}

    def digests(self, memory: PlanMemory, turn: int, *, is_first: bool) -> dict[int, bytes]:
        return digests_of_sets(memory.replicas, self._tensor, turn=turn, is_first=is_first)

    def details(self, memory: PlanMemory, sets: frozenset[int], rank: int) -> dict[int, Details]:
        return details_of(memory.replicas, self._tensor, self.boxes, sets=sets, rank=rank)

    def _tensor(self, row: int) -> torch.Tensor:
        return self.holding.tensor(row).detach()


@dataclass(frozen=True, slots=True)
class _Laid:
    """What one rank writes: its boxes placed into shards, and where copies of them go, if any are to be made."""

    source: Source
    staged: Staged | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lead:
    """What all ranks have agreed on, and with whom; `values` are empty but on rank 0."""

    what: str
    group: Group
    options: Options
    coordinator: Coordinator
    order: Order
    record: Record
    values: Mapping[str, JsonValue]
    reuse: Reuse | None

    def finish(
        self,
        upload: Callable[[str], RankPart],
        check: Callable[[], None],
        is_whole: Callable[[], bool],
        end: _End[_T],
    ) -> _T:
        """Have every rank upload, and rank 0 end it; return, on every rank, what `end` does.

        Where the store has no room, what nobody needs is removed there, and it is tried again. Where it is down it goes
        to the fallback, if every rank's part `is_whole` still; before an end both are tried in turns, as long as there
        is time.
        """
        prefix, record, said = self.order.prefix, self.record, list[str]()
        has_made_room = False
        while True:
            url = self.coordinator.destination.catalog.store.url
            try:
                if prefix is None:
                    prefix = self.group.agree(
                        f"{self.what}: claiming", lambda: None, lambda _: self.coordinator.place()
                    )
                return end(partial(upload, prefix), check, prefix, record)
            except Exception as exc:
                if self._sends_all(exc, is_whole):
                    continue
                if self._has_room_again(exc, is_whole, check, is_first=not has_made_room):
                    has_made_room = True
                    continue
                if not self._is_diverted(exc, is_whole):
                    if not said:
                        raise
                    raise _beside(exc, said[-1]) from exc
                said.append(f"the save to {url} failed: {_causes_of(exc)[0]}")
            if len(said) > 1:
                check()
                time.sleep(_PAUSE_S)
            prefix, has_made_room = None, False
            record = replace(self.record, spent_before=stats_of(self.coordinator.destination.catalog.store))

    def _has_room_again(
        self, error: Exception, is_whole: Callable[[], bool], check: Callable[[], None], *, is_first: bool
    ) -> bool:
        """Tell whether the save is to be tried again because room was made for it; the same on all ranks, as the error.

        The first time in any case, because what killed writers left is not counted; then as long as something goes.
        Where parts of a copy are gone, the next save has that room.
        """
        causes = _causes_of(error)
        is_full = any(isinstance(cause, StorageError) and cause.is_full for cause in causes)
        is_known = not any(isinstance(cause, CommitUnknownError) for cause in causes)
        if self.coordinator.room is None or not (is_full and is_known and all(map(is_outage, causes))):
            return False

        def check_and_get_on() -> None:
            # Shards in their grace time are waited for, which may take longer than a rank may stand still.
            self.group.tick()
            check()

        def make_room(are_whole: Sequence[bool]) -> bool:
            logger.warning("rank 0: %s had no room, so that what nobody needs is removed: %s", self.what, causes[0])
            return (self.coordinator.make_room(check_and_get_on) > 0 or is_first) and all(are_whole)

        return self.group.agree(f"{self.what}: making room", is_whole, make_room)

    def _sends_all(self, error: Exception, is_whole: Callable[[], bool]) -> bool:
        """Tell whether the save is to be tried again without its base, which is gone; the same on all ranks."""
        if self.reuse is None or not all(isinstance(cause, BaseGoneError) for cause in _causes_of(error)):
            return False
        self.reuse.forget_base()
        logger.warning("rank %d: %s sends all of its bytes: %s", self.group.rank, self.what, _causes_of(error)[0])
        return self.group.agree(f"{self.what}: sending all", is_whole, all)

    def _is_diverted(self, error: Exception, is_whole: Callable[[], bool]) -> bool:
        """Tell whether the fallback takes the save from here on; all ranks have the same error, and the same answer."""
        causes = _causes_of(error)
        fallback = self.coordinator.fallback
        if fallback is None or not all(map(is_outage, causes)):
            return False
        url, other = self.coordinator.destination.catalog.store.url, fallback.catalog.store.url
        are_whole, is_ending = self.group.agree(
            f"{self.what}: to the fallback", lambda: (is_whole(), self._is_ending), _all_and_any
        )
        if not are_whole:
            logger.error(
                "rank %d: %s to %s failed, and parts of its copy are gone, so that it cannot go to %s; raise "
                "memory_budget_bytes to hold the state",
                *(self.group.rank, self.what, url, other),
            )
            return False
        logger.error("rank %d: %s to %s failed and goes to %s: %s", self.group.rank, self.what, url, other, causes[0])
        is_known = not any(isinstance(cause, CommitUnknownError) for cause in causes)
        may_return = is_ending and is_known and all(map(_may_pass, causes))
        self.coordinator.divert(is_known=is_known, may_return=may_return)
        return True

    @property
    def _is_ending(self) -> bool:
        return math.isfinite(self.coordinator.turn.whole().stop_s)

    def commit(
        self, upload: Callable[[], RankPart], check: Callable[[], None], prefix: str, record: Record
    ) -> Checkpoint:
        """End it by the commit."""

        def commit(parts: Sequence[RankPart]) -> bytes:
            check()
            self.coordinator.write_index(parts, self.order.attempt, record, self.group)
            return self.coordinator.commit()

        data = self.group.conclude(f"{self.what}: upload and commit", upload, commit)
        catalog = self.coordinator.destination.catalog
        made = catalog.adopt(data, prefix=prefix)
        if self.reuse is not None:
            self.reuse.remember(catalog, made)
        return made

    def write(
        self, upload: Callable[[], RankPart], check: Callable[[], None], prefix: str, record: Record
    ) -> Uncommitted:
        """End it with all that a commit needs."""

        def write_index(parts: Sequence[RankPart]) -> None:
            check()
            self.coordinator.write_index(parts, self.order.attempt, record, self.group)

        self.group.agree(f"{self.what}: upload", upload, write_index)
        return Uncommitted(self.what, self.group, self.coordinator, prefix)


_End: TypeAlias = Callable[[Callable[[], RankPart], Callable[[], None], str, Record], _T]
"""How a save ends that has a place: by the upload of a rank's part, a check, the place and what the manifest says."""


def _causes_of(error: Exception) -> list[BaseException]:
    return list(error.failures.values()) if isinstance(error, RanksFailedError) else [error]


def _all_and_any(parts: list[tuple[bool, bool]]) -> tuple[bool, bool]:
    wholes, ends = zip(*parts, strict=True)
    return all(wholes), any(ends)


def _may_pass(error: BaseException | None) -> bool:
    """Tell whether a store that failed so may do better in a while: it has refused nothing for good.

    Nor was a request left behind, which may land when it should not any more.
    """
    while error is not None:
        if isinstance(error, LeftBehindError):
            return False
        if isinstance(error, RetryExhaustedError | StalledError):
            return True
        error = error.__cause__
    return False


def _beside(error: BaseException, said: str) -> Exception:
    """Return the error that says what both roots have said."""
    if isinstance(error, RanksFailedError):
        return RanksFailedError({rank: _beside(one, said) for rank, one in error.failures.items()})
    both = CommitUnknownError if isinstance(error, CommitUnknownError) else StorageError
    made = both(f"{error}; before that, {said}")
    made.__cause__ = error
    return made


# -- one rank's steps ---------------------------------------------------------------------------------------


def _open(flat: Flat, group: Group) -> _Opened:
    """Look at a rank's leaves, and refuse, before a byte is written, what has no place in the format."""
    tensors = {name: leaf for name, leaf in flat.leaves.items() if is_tensor(leaf)}
    parts = {name: codec.Parts() for name in flat.leaves if name not in tensors}
    values = {name: codec.encode(flat.leaves[name], key=name, parts=of_name) for name, of_name in parts.items()}
    for name, of_name in parts.items():
        tensors |= of_name.tensors(name)
    holding = Holding.of(tensors)
    message = digest = b""
    # One process has nobody to tell, nor to compare with: names may be many, and parts of values large.
    if group.size > 1:
        about = msgspec.json.encode((flat.paths, flat.notes))
        message = msgspec.msgpack.encode((holding.table.encode(), about, sorted(flat.of_others)))
        # A plan serves the same ranks only: a process group that was made anew may have others.
        digest = xxhash.xxh3_128_digest(message + f"{group.rank}/{group.size}".encode())
    return _Opened(
        holding=holding,
        values=values,
        parts={name: of_name.digest() if group.size > 1 else "" for name, of_name in parts.items()},
        of_first_rank=flat.of_first_rank,
        alike=flat.alike if group.size > 1 else {},
        message=message,
        digest=digest,
        flat=flat,
    )


def _record(
    session: Session,
    metrics: Mapping[str, float] | None,
    metadata: Mapping[str, object] | None,
    destination: Destination,
) -> Record:
    """Begin what the manifest will say; refuses, before a byte is written, what it has no room for."""
    in_json, about = record_of_call(metrics, metadata)
    spent_before = stats_of(destination.catalog.store)
    return Record(metrics=in_json, metadata=about, began_s=session.began_s, spent_before=spent_before)


def _opening(
    opened: _Opened | Exception,
    record: Record | Exception,
    memory: PlanMemory,
    places: Sequence[Destination],
    reuse: Reuse | None,
) -> Opening:
    mine = _got(opened)
    _got(record)
    values = digest_of_values(mine.told()) if mine.digest else b""
    plan_id = memory.plan_id if mine.digest and memory.digest == mine.digest else ""
    replicas = mine.digests(memory, memory.turn + 1, is_first=False) if plan_id else {}
    urls = " or ".join(one.catalog.store.url for one in places)
    return Opening(urls, values, plan_id, replicas, "" if reuse is None else reuse.digest)


def _tell_values_apart(mine: _Opened, group: Group, what: str) -> None:
    """Raise, on all ranks, what differs between their values."""
    phase = f"{what}: comparing values"
    differences = group.agree(phase, lambda: digests_of(mine.told(), mine.boxes.names), differences_of)
    group.agree(
        phase,
        lambda: wanted_values(mine.told(), differences, group.rank),
        lambda found: refuse_values(differences, found),
    )


def _plan(mine: _Opened, memory: PlanMemory, coordinator: Coordinator, group: Group, what: str) -> frozenset[int]:
    """Learn which boxes this rank writes, and remember it; return the sets of replicas that seem to differ."""
    # Rank 0 overwrites what belongs to the plan before it is known that all ranks get the new one.
    memory.plan_id = ""
    if group.size == 1:
        alone = group.deal(f"{what}: plan", lambda: mine, lambda one: [coordinator.share_alone(mine.boxes, mine.flat)])
        memory.rows, memory.replicas = alone, ()
        return frozenset()
    part = group.deal(f"{what}: plan", lambda: mine.message, coordinator.share_out)
    memory.plan_id, memory.digest = part.plan_id, mine.digest
    memory.rows, memory.replicas = part.rows, part.replicas
    return group.agree(
        f"{what}: comparing replicas", lambda: mine.digests(memory, memory.turn, is_first=True), doubtful_sets
    )


def _lay_out(
    mine: _Opened,
    rows: Column,
    attempt: str,
    options: Options,
    staged: Callable[[Source], Staged] | None,
    *,
    is_grouped: bool,
) -> _Laid:
    """Place what this rank writes into shards, and find room for copies of them."""
    frozen = mine.flat.frozen

    def group_of(name: str) -> tuple[str, bool]:
        return name.partition(".")[0], name in frozen

    chosen = mine.holding.some(rows)
    source = Source(
        chosen.boxes,
        chosen.tensor,
        table=chosen.table,
        attempt=attempt,
        shard_bytes=options.shard_bytes,
        group_of=group_of if is_grouped else None,
    )
    return _Laid(source, None if staged is None else staged(source))


def _waiting(group: Group) -> AbstractContextManager[None]:
    """Have garbage collected as ever while ranks may wait for each other, which may take minutes."""
    return collector_awake() if group.size > 1 else nullcontext()


def _tried(call: Callable[[], _T]) -> _T | Exception:
    """Return what a call returns, or what it raises: for an exchange that tells all ranks."""
    try:
        return call()
    except Exception as exc:  # noqa: BLE001 (a value from here on, until `_got` raises it)
        return exc


def _got(value: _T | Exception) -> _T:
    """Return a value, or raise the error that stands in its place."""
    if isinstance(value, Exception):
        raise value
    return value
