"""Lead the ranks of a group through one restore: the same steps as DCP's own `load`, over messages that cannot hang.

    find    rank 0: the checkpoint, its manifest and index ──▶ every rank
    parts   of large values, if there are any: planned and read like targets, because what fits depends on values
    match   every rank: state and checkpoint               ──▶ rank 0: what no rank has a use for
    ask     every rank: what objects may refuse is read, and they are asked; nothing else is changed yet
    plan    every rank: its targets and boxes              ──▶ rank 0: who reads what several ranks need
    read    every rank: its own bytes, verified            ──▶ passed on to whoever needs the same
    apply   every rank: restored values into its objects, once every rank has all it needs

Only rank 0 lists, and reads the manifest and the index; nothing is changed anywhere before every rank's state was
found to fit. Keeps FORMAT invariants 1, 11, 12 and 13.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeGuard, cast

import torch

from cloudckpt.ahead import Ahead
from cloudckpt.errors import OptionsError
from cloudckpt.format import DTYPE_NAMES, DTYPES, NOTES, Box, BoxPlace, BoxTable, Index, codec
from cloudckpt.late import DTensor, Replicate
from cloudckpt.loading.input import Pieces, RankInput, by_part_name, decode_index, describe, part_targets
from cloudckpt.loading.landing import take_wholes
from cloudckpt.loading.passing import Step, plan_passing
from cloudckpt.loading.rest import Rest
from cloudckpt.loading.search import Found, Search
from cloudckpt.options import Options
from cloudckpt.ranks import Group, MissingPartsError, Packet, RanksFailedError, plain_errors
from cloudckpt.report import Journal
from cloudckpt.root import Candidate, Checkpoint, Fit, Roots
from cloudckpt.state import (
    Allowed,
    Entry,
    Restoration,
    Saved,
    bind,
    collector_at_rest,
    local_parts,
    plan_restore,
    taken_over,
)
from cloudckpt.store import Store
from cloudckpt.transfer import Gauge, inner_names

if TYPE_CHECKING:
    from cloudckpt.loading.noting import NotingPlanner

__all__ = ["load_state"]

logger = logging.getLogger(__name__)


def load_state(  # noqa: PLR0913 (keyword-only, each of its own kind)
    state: MutableMapping[str, object],
    candidates: Iterator[Candidate],
    *,
    roots: Roots,
    journal: Journal,
    options: Options,
    allowed: Allowed,
    what: str,
    shown: str,
    generators: bool = False,
    rest: Rest | None = None,
) -> Checkpoint | None:
    """Restore a state on all ranks from the first candidate that is whole.

    Args:
        state: this rank's objects.
        candidates: checkpoints, best first; only rank 0's are asked for, one after the other. Each one that is corrupt
            is logged, and the next one is tried.
        roots: this rank's own.
        journal: is told.
        options: sizes, parallelism, patience.
        allowed: what may be done where a checkpoint and `state` differ.
        what: what the ranks do; ranks that do different things are told so.
        shown: the same for a person who watches.
        generators: whether the process's generators are restored, too, also into a state without a `RandomState`.
        rest: takes over what may come after the return; None: all is whole then.

    Returns:
        The checkpoint, with what of it fits this rank's state, or None when there was no candidate.

    Raises:
        StateMismatchError: the state does not fit, or an object refuses it; nothing was changed on any rank.
        RestoreFailedError: an object did not take its state, after others had.
        IntegrityError: every candidate is corrupt; the first one's error. Tensors may hold a mixture.
        RankLostError: a rank was lost. Tensors may hold a mixture.
        CloudCkptError: what else a rank met, in words of the first one.
    """
    group = Group.of_world()
    entry = journal.begin(rank=group.rank, world_size=group.size)
    # One process refuses a wrong call before anything is asked of the store; with several, all hear of it.
    with collector_at_rest():
        entries = allowed.checked(bind(state, generators=generators)) if group.size == 1 else None
    ahead = Ahead(one.store for one in roots.catalogs)
    search = Search(candidates, roots, over=ahead.over)
    checkpoint = None
    with taken_over() as tell_restored, ExitStack() as stack:
        stack.enter_context(closing(ahead))
        bar = stack.enter_context(entry.bar(shown))
        stack.enter_context(plain_errors(about=group.about))
        stack.enter_context(group.session(what, deadline_s=options.progress_timeout_s))
        while (found := group.agree(f"{what}: finding", lambda: None, lambda _: search.next())) is not None:
            catalog = roots.catalogs[found.root]
            checkpoint = catalog.adopt(found.manifest, prefix=found.prefix)
            store = ahead.over(catalog.store)
            loading = _Loading(checkpoint, found, store, group, options, bar, entries, generators, rest)
            entries = None  # they remember what they saw of one checkpoint
            told = f"{what} of {checkpoint.url}"
            try:
                fit = loading.run(told, state, allowed)
            except RanksFailedError as exc:
                if not search.may_go_on(checkpoint, exc.failures):
                    raise
            else:
                checkpoint = replace(checkpoint, fit=fit)
                tell_restored(loading.subjects)
                if rest is not None and loading.has_rest:
                    loading.leave_to(rest, told, stack, partial(entry.restored, checkpoint))
                    return checkpoint
                break
    entry.restored(checkpoint)
    return checkpoint


@dataclass(frozen=True, slots=True)
class _Met:
    """What ranks must know of each other before they go on.

    Attributes:
        unexpected: names that a rank, or all of them, has no use for.
        needs_memory: whether modules are to get memory.
    """

    unexpected: set[str]
    needs_memory: bool

    @classmethod
    def of_all(cls, found: Sequence[_Met]) -> _Met:
        """A name is left over only if no rank has a use for it: in a pipeline each has the names of its own stage."""
        return cls(set.intersection(*(one.unexpected for one in found)), any(one.needs_memory for one in found))


@dataclass
class _Loading:
    """The restore of one checkpoint, on one rank."""

    checkpoint: Checkpoint
    found: Found
    store: Store
    group: Group
    options: Options
    gauge: Gauge | None
    entries: Sequence[Entry] | None
    generators: bool
    rest: Rest | None
    # What this rank found on the way, for the steps after it.
    _parts: Mapping[str, Mapping[int, torch.Tensor]] = field(init=False, default_factory=dict)
    _saved: Saved = field(init=False)
    _restoration: Restoration = field(init=False)
    _filling: _Filling = field(init=False)
    _late: Mapping[str, object] = field(init=False, default_factory=dict)

    def run(self, what: str, state: MutableMapping[str, object], allowed: Allowed) -> Fit:
        """Go through the steps; raises as the group's exchanges do."""
        if self.found.has_parts:
            self._fill(f"{what}: values", lambda: self._plan_parts(state, allowed))
        met = self.group.agree(f"{what}: match", lambda: self._match(state, allowed), _Met.of_all)
        try:
            self.group.agree(f"{what}: ask", lambda: self._ask(met.unexpected), lambda _: None)
            if met.needs_memory:
                self.group.agree(f"{what}: memory", lambda: self._give_memory(state, allowed), lambda _: None)
            self._fill(what, self._due)
        except BaseException:
            # An object has its new state already, and what belongs to it does not come.
            self._restoration.undo()
            raise
        self.group.agree(f"{what}: apply", self._restoration.apply, lambda _: None)
        return self._restoration.fit

    @property
    def subjects(self) -> Sequence[object]:
        """The objects that are restored."""
        return self._restoration.subjects

    @property
    def has_rest(self) -> bool:
        """Whether something is left to be filled, on any rank."""
        return bool(self._late) or self.group.size > 1

    def _due(self) -> Mapping[str, object]:
        """Return what is filled before all is applied."""
        if self.rest is not None:
            self._late = self._restoration.put_off(self.rest.wait_for)
        return self._restoration.tensors

    def leave_to(self, rest: Rest, what: str, stack: ExitStack, note: Callable[[], None]) -> None:
        """Fill what is left in another thread, and hold those whose state it is until it is there.

        Args:
            rest: has the thread.
            what: is restored.
            stack: ends what the ranks are in together; it goes along.
            note: is called when all is whole.
        """
        going, optimizers, copies = stack.pop_all(), self._restoration.late, self._restoration.copies()

        def work() -> None:
            with going:
                self.group.take_over()
                self._fill(f"{what}: the rest", lambda: self._late)
                with torch.no_grad():
                    for copy, filled in copies or ():
                        copy.copy_(filled)
                for device in {part.device for one in self._late.values() for part in local_parts(one)}:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # training may use another stream
            note()

        self.group.hand_over()
        rest.begin(what, optimizers, work)
        if copies is None:
            rest.wait()
            self._restoration.load_late()

    def _fill(self, what: str, plan: Callable[[], Mapping[str, object]]) -> None:
        """Have every rank plan what it wants filled, and read it together."""
        steps = self._deal(what, plan)
        self.group.agree(f"{what}: read", lambda: self._read(steps), lambda _: None)

    def _deal(self, what: str, plan: Callable[[], Mapping[str, object]]) -> Sequence[Step]:
        """Have every rank plan what it wants filled, and learn who reads what several want."""
        return self.group.deal(
            f"{what}: plan",
            lambda: self._shareable(plan()).encode(),
            partial(plan_passing, is_read_once=self._is_read_once()),
        )

    @cached_property
    def _index(self) -> Index:
        return decode_index(self.checkpoint, self.found.index)

    def _plan_parts(self, state: Mapping[str, object], allowed: Allowed) -> Mapping[str, object]:
        """Return the parts of the values that the state asks for, to be filled."""
        self._parts = part_targets(self._index, _wanted_values(self._index, state, allowed))
        return by_part_name(self._parts)

    def _match(self, state: MutableMapping[str, object], allowed: Allowed) -> _Met:
        with collector_at_rest():
            self._saved = self._said(state, allowed)
            self._restoration = plan_restore(
                self.entries or bind(state, generators=self.generators), self._saved, allowed
            )
        return _Met(set(self._restoration.unexpected), self._restoration.needs_memory)

    def _said(self, state: Mapping[str, object], allowed: Allowed) -> Saved:
        """Return what the index says that there is."""
        index = self._index
        wanted = _wanted_values(index, state, allowed)
        values = {
            # What nobody asks for need not be there, nor be of a type that this program knows.
            name: codec.decode(value, key=name, parts=self._parts.get(name)) if name in wanted else None
            for name, value in index.values.items()
            if name != NOTES
        }
        notes = codec.decode_json(index.values.get(NOTES, {}), key=NOTES)
        return Saved(
            shapes={name: tensor.shape for name, tensor in index.tensors.items()},
            dtypes={name: DTYPES[tensor.dtype] for name, tensor in index.tensors.items()},
            values=values,
            paths=index.paths,
            notes=notes if isinstance(notes, dict) else {},
        )

    def _give_memory(self, state: MutableMapping[str, object], allowed: Allowed) -> None:
        """Give modules memory, now that nothing refuses, and match again with what they have."""
        self._restoration.materialize()
        again = plan_restore(bind(state, generators=self.generators), self._saved, replace(allowed, materialize=None))
        again.go_on_from(self._restoration)
        self._restoration = again

    def _shareable(self, tensors: Mapping[str, object]) -> BoxTable:
        with collector_at_rest():
            self._filling = _Filling(dict(tensors), self._index, near=self.group.rank, is_alone=self.group.size == 1)
        return self._filling.shareable() if self.group.size > 1 else BoxTable.of(())

    def _is_read_once(self) -> bool:
        choice = self.options.read_once
        if self.group.size == 1:
            return False
        return choice == "always" or (choice == "auto" and self.store.engine != "local")

    def _source(self) -> RankInput:
        still_s, limit = self.options.transfer_limit(self.store.engine)
        watch = replace(self.group.watch(still_s), gauge=self.gauge, limit=limit)
        if (rest := self.rest) is not None:
            watch = replace(watch, check=partial(_all_of, self.group.check, rest.check))
        return RankInput(self.store, self.checkpoint, self._index, self.options, watch)

    def _ask(self, unexpected: set[str]) -> None:
        self._restoration.leave(unexpected)
        if self._restoration.early:
            early = dict(self._restoration.early)
            _Filling(early, self._index, near=self.group.rank, is_alone=True).read(self._source())
        self._restoration.ask()

    def _read(self, steps: Sequence[Step]) -> None:
        packets = self._filling.take_over(steps, self.group.rank)
        passing = self.group.begin_passing(packets)
        try:
            self._filling.read(self._source())
        except BaseException:
            # What this rank met says more than that another one, too, has not read what it was to pass on.
            with suppress(MissingPartsError):
                self._end_passing(packets, passing)
            raise
        self._end_passing(packets, passing)

    def _end_passing(self, packets: Sequence[Packet], passing: Future[list[int]] | None) -> None:
        for packet in packets:
            packet.give_up()
        self.group.end_passing(passing)


def _all_of(*checks: Callable[[], None]) -> None:
    for check in checks:
        check()


def _wanted_values(index: Index, state: Mapping[str, object], allowed: Allowed) -> set[str]:
    """Return the names of the values that stand below what is restored of the state, and of the library's own."""
    tops = {top for top in state if allowed.may_hold(top)} if isinstance(state, Mapping) else set()
    return {
        name
        for name in index.values
        if name.startswith("cloudckpt.") or str(index.paths.get(name, name.split(".", 1))[0]) in tops
    }


class _Filling:
    """The targets of one rank, and which of their boxes it reads itself."""

    def __init__(self, tensors: dict[str, object], index: Index, *, near: int, is_alone: bool) -> None:
        self._wholes = take_wholes(tensors, index) if is_alone else {}
        self._tensors = tensors
        self._boxes = {name: _boxes_of(name, tensor) for name, tensor in tensors.items()}
        self._pieces = index.covering(self._boxes, near=near)
        self._index = index
        self._table = BoxTable.of(())
        self._planned = _planned(tensors, index, self._pieces) if tensors else None

    def shareable(self) -> BoxTable:
        """Return the boxes that other ranks may need just as they are, in the order in which they are stored.

        With the dtypes of their targets: read and converted once, a box is passed on as it lies there.
        """
        targets = {name: tensor for name, tensor in self._tensors.items() if _is_replicated(tensor)}
        self._table = BoxTable.of(
            Box(name, DTYPE_NAMES[targets[name].dtype], self._index.tensors[name].shape, *box)
            for name in sorted(targets, key=self._place)
            for box in self._boxes[name]
        )
        return self._table

    def _place(self, name: str) -> tuple[int, int, int]:
        places = [(piece.rank, piece.number, piece.start) for piece in self._pieces[name]]
        return min(places, default=(0, 0, 0))

    def take_over(self, steps: Sequence[Step], rank: int) -> list[Packet]:
        """Leave to others what they read; return what is passed between the ranks, in the order of `steps`."""
        if not steps:
            return []
        boxes = list(self._table)
        keys = [(box.name, box.offsets) for box in boxes]
        if self._planned is None:
            raise OptionsError("a rank without tensors has none that others read")
        taken = {keys[row] for step in steps if step.reader != rank for row in step.rows}
        planner = self._planned
        planner.leave(taken)
        return [
            Packet(
                reader=step.reader,
                takers=step.takers,
                tensors=tuple(planner.local(keys[row]) for row in step.rows),
                is_ready=planner.watch([keys[row] for row in step.rows]) if step.reader == rank else None,
            )
            for step in steps
        ]

    def read(self, source: RankInput) -> None:
        """Read what is left to this rank."""
        with torch.no_grad():
            planned = self._planned
            source.read([] if planned is None else planned.items, planned, self._pieces, self._wholes)


def _boxes_of(name: str, tensor: object) -> list[BoxPlace]:
    """Return the boxes of a tensor that this rank holds; none, for a rank outside of a DTensor's mesh.

    Raises:
        OptionsError: they cannot be filled.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if isinstance(local, torch.Tensor) and inner_names(local):
        raise OptionsError(
            f"{name!r} is a {type(local).__name__} in the state, which has no memory of its own to be filled; restore "
            "into a plain tensor, and make it from that"
        )
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return []  # torch says a box there, of other dimensions than the tensor's
    from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

    chunks = _create_chunk_list(cast("torch.Tensor", tensor))
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def _is_replicated(tensor: object) -> TypeGuard[torch.Tensor]:
    """Tell whether other ranks may hold the same box of a tensor."""
    if isinstance(tensor, DTensor):
        return any(isinstance(placement, Replicate) for placement in tensor.placements)
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _planned(tensors: dict[str, object], index: Index, pieces: Pieces) -> NotingPlanner:
    """Have DCP's planner say which pieces go where."""
    from cloudckpt.loading.noting import NotingPlanner

    return NotingPlanner.of(tensors, describe(index, pieces))
