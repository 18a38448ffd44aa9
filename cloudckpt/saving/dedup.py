"""Decide which rank writes which box, when several ranks could: each box exactly once, the bytes spread evenly.

    a table per rank ──agree on dtypes and shapes──▶ boxes in the order of their places ──equal places are replicas──▶
    ──largest first, to the holder with the least to write──▶ the rows of its own table that each rank writes
    ──the same boxes on the same ranks together──▶ the rows of which each rank has to show that they are alike

Pure columns: nothing here walks over boxes one by one. Runs on the coordinator, before a byte is written, and so is
the place where ranks that do not hold parts of the same state are found out (FORMAT invariant 3).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudckpt.errors import SaveFailedError
from cloudckpt.format import BoxTable, Column, TensorEntry, Tensors, ragged_places, row_products, untiled
from cloudckpt.ranks import named_ranks

__all__ = ["Replicas", "Shares", "share_out"]

_SHOWN = 8
# Boxes that together are less than this part of the largest load are not worth spreading: a thousand step counters
# on as many ranks would cost every restoring rank a request to each of them.
_DUST = 1024


class Replicas(NamedTuple):
    """Boxes that the same ranks hold, as one of these ranks knows them.

    Attributes:
        number: of this set of boxes, the same on all of its holders.
        first_rank: the first of the holders.
        rows: the boxes in the rank's own table, in an order that is the same on all holders.
    """

    number: int
    first_rank: int
    rows: Column


class Shares(NamedTuple):
    """What each rank does: `rows` of its own table that it writes, ascending, and which of its boxes others hold, too.

    Boxes without elements are no replicas.
    """

    rows: list[Column]
    replicas: list[list[Replicas]]


def share_out(tables: Sequence[BoxTable], of_others: Sequence[Collection[str]] = ()) -> Shares:
    """Return for each rank which boxes of its own table it writes, and which ones other ranks hold as well.

    Every element of every tensor is written exactly once. Boxes that only one rank has are its own; the others go,
    largest first, to the least loaded of the ranks that have them; small ones that do not count, all to one of them.
    Empty boxes are left out, except that a tensor without elements keeps one. The same tables always give the same
    answer.

    Args:
        tables: one per rank, in the order of ranks: the boxes that the rank could write.
        of_others: for each rank the tensors that it may neither write nor be compared in, because another rank's
            contents count; none by default.

    Raises:
        SaveFailedError: the ranks differ in what a tensor or a box is, or have no box for some of its elements.
    """
    if len(tables) == 1 and not any(of_others) and tables[0].is_whole():
        return Shares([np.arange(len(tables[0]), dtype=np.int64)], [[]])
    tensors = _agree(tables)
    boxes = _Boxes.of(tables, tensors)
    if any(of_others):
        boxes = boxes.without(_rows_of(tables, of_others))
    is_first = boxes.are_first()
    _refuse_other_sizes(tables, boxes, is_first)
    held = _Held.of(boxes, is_first)
    is_written = np.zeros(sum(map(len, tables)), dtype=np.bool_)
    is_written[boxes.at[_choose(held, len(tables))]] = True
    starts = _starts(tables)
    rows = [np.flatnonzero(is_written[start:stop]) for start, stop in itertools.pairwise(starts)]
    _refuse_untiled(tables, tensors, rows)
    return Shares(rows, _replicas(held, boxes.at, starts))


# -- the tensors, which all ranks must know alike -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tensors:
    """The tensors of all ranks together: where each table's own ones stand among them, and their elements in a row."""

    names: list[str]
    of_table: list[Column]
    columns: Tensors
    is_hollow: NDArray[np.bool_]  # of each tensor: it has no elements
    firsts: Column  # of each tensor: the number of its first element; one without elements takes a number, too
    strides: Column  # of each dimension, row-major

    @classmethod
    def of(cls, entries: Mapping[str, TensorEntry], of_table: list[Column]) -> _Tensors:
        shapes = [entry.shape for entry in entries.values()]
        strides = [math.prod(shape[axis + 1 :]) for shape in shapes for axis in range(len(shape))]
        return cls(
            names=list(entries),
            of_table=of_table,
            columns=Tensors(list(entries.values())),
            is_hollow=np.asarray([0 in shape for shape in shapes], dtype=np.bool_),
            firsts=np.cumsum([0, *(max(1, math.prod(shape)) for shape in shapes)], dtype=np.int64)[:-1],
            strides=np.asarray(strides, dtype=np.int64),
        )


def _agree(tables: Sequence[BoxTable]) -> _Tensors:
    """Number the tensors of all ranks; raise if two ranks give one name to different tensors."""
    numbers: dict[str, int] = {}
    entries: dict[str, TensorEntry] = {}
    conflicts: dict[str, None] = {}
    of_table: list[Column] = []
    for table, before in zip(tables, [None, *tables], strict=False):
        if before is not None and table.has_same_tensors(before):  # as neighbouring ranks of most jobs do
            of_table.append(of_table[-1])
            continue
        for name, entry in _entries_in(table):
            numbers.setdefault(name, len(numbers))
            if entries.setdefault(name, entry) != entry:
                conflicts[name] = None
        of_table.append(np.asarray([numbers[name] for name in table.names], dtype=np.int64))
    if conflicts:
        raise _failure(_describe_conflicts(tables, conflicts))
    return _Tensors.of(entries, of_table)


def _entries_in(table: BoxTable) -> Iterator[tuple[str, TensorEntry]]:
    return zip(table.names, map(TensorEntry, table.dtypes, table.shapes), strict=True)


def _describe_conflicts(tables: Sequence[BoxTable], conflicts: Mapping[str, None]) -> list[str]:
    found: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in conflicts}
    for rank, table in enumerate(tables):
        for name, entry in _entries_in(table):
            if name in found:
                found[name][f"{entry.dtype} {entry.shape}"].append(rank)
    return [f"{name} is {_variants(of_name)}" for name, of_name in found.items()]


# -- the boxes, in the order of their places ----------------------------------------------------------------


class _Boxes(NamedTuple):
    """Boxes of all ranks in the order of their places, those of one place in the order of ranks.

    An element has the number that its tensor's base and its row-major place give; inside one tensor a box is known
    by the numbers of its first and its last element.
    """

    first: Column
    last: Column
    nbytes: Column
    rank: Column
    at: Column  # the box's row in all tables, one after the other

    @classmethod
    def of(cls, tables: Sequence[BoxTable], tensors: _Tensors) -> _Boxes:
        """Collect the boxes that may have to be written; raise if one leaves its tensor."""
        starts = _starts(tables)
        parts = [cls(*np.zeros((5, 0), dtype=np.int64))]
        parts += [
            cls._in(table, of_table[table.tensor], tensors, rank, starts[rank])
            for rank, (table, of_table) in enumerate(zip(tables, tensors.of_table, strict=True))
        ]
        # Stable, so that ranks stay in order. Each rank's boxes are one ascending run, which this sort merges.
        order = np.argsort(np.concatenate([part.first for part in parts]), kind="stable")
        return cls(*(np.concatenate(columns)[order] for columns in zip(*parts, strict=True)))

    @classmethod
    def _in(cls, table: BoxTable, tensor: Column, tensors: _Tensors, rank: int, start: int) -> _Boxes:
        """Return one rank's boxes, whose table begins at row `start` of all."""
        firsts, places = tensors.columns.firsts(tensor), ragged_places(tensors.columns.bases, tensor)
        elements = row_products(table.sizes, firsts)
        rows = np.flatnonzero((elements > 0) | tensors.is_hollow[tensor])
        _refuse_outside(table, rows, tensors.columns.extents[places], firsts, rank)
        strides, is_full = tensors.strides[places], elements > 0
        first = tensors.firsts[tensor] + _row_sums(table.offsets * strides, firsts) * is_full
        last = tensors.firsts[tensor] + _row_sums((table.offsets + table.sizes - 1) * strides, firsts) * is_full
        nbytes = elements * tensors.columns.item_bytes[tensor]
        return cls(first[rows], last[rows], nbytes[rows], np.full(len(rows), rank, dtype=np.int64), rows + start)

    def without(self, is_left_out: NDArray[np.bool_]) -> _Boxes:
        """Return all but some, which are marked among the rows of all tables."""
        is_kept = ~is_left_out[self.at]
        return _Boxes(*(column[is_kept] for column in self))

    def are_first(self) -> NDArray[np.bool_]:
        """Tell of each box whether it is the first one at its place."""
        return np.concatenate(([True] * bool(len(self.first)), self.first[1:] != self.first[:-1])).astype(np.bool_)


def _rows_of(tables: Sequence[BoxTable], names: Sequence[Collection[str]]) -> NDArray[np.bool_]:
    """Mark the rows of some tensors of each table among the rows of all tables."""
    marks = (
        np.asarray([name in chosen for name in table.names], dtype=np.bool_)[table.tensor]
        for table, chosen in zip(tables, names, strict=True)
    )
    return np.concatenate(list(marks))


def _joined(columns: Sequence[Column]) -> Column:
    return np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def _starts(tables: Sequence[BoxTable]) -> list[int]:
    """Return where each table's rows begin when all tables stand one after the other, and where the last ends."""
    return [0, *np.cumsum([len(table) for table in tables], dtype=np.int64).tolist()]


def _row_sums(values: Column, firsts: Column) -> Column:
    """Add up the values of each row of a ragged column; a row without values gives 0."""
    sums = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(values)))
    return sums[firsts[1:]] - sums[firsts[:-1]]


# -- who writes a box that several ranks have ---------------------------------------------------------------


class _Held(NamedTuple):
    """Who holds what: the holders of one box after those of the box before it, a rank once."""

    places: Column  # of each holder's box among all boxes
    ranks: Column
    starts: Column  # of each box: where its holders begin
    counts: Column
    nbytes: Column

    @classmethod
    def of(cls, boxes: _Boxes, is_first: NDArray[np.bool_]) -> _Held:
        places = np.flatnonzero(is_first | (boxes.rank != np.roll(boxes.rank, 1)))
        starts = np.flatnonzero(is_first[places])
        counts = np.diff(starts, append=len(places))
        return cls(places, boxes.rank[places], starts, counts, boxes.nbytes[places[starts]])

    def sets(self) -> NDArray[np.uint64]:
        """Return a number for the set of each box's holders; two sets have the same one as good as never."""
        sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(_scattered(self.ranks))))
        of_sets: NDArray[np.uint64] = sums[self.starts + self.counts] - sums[self.starts]
        return of_sets


def _replicas(held: _Held, at: Column, starts: Sequence[int]) -> list[list[Replicas]]:
    """Return for each rank the boxes that others hold as well, those of the same holders together.

    Args:
        held: who holds what.
        at: the row of each box in all tables, one after the other.
        starts: where each table begins there.
    """
    is_shared = (held.counts > 1) & (held.nbytes > 0)
    _, numbers = np.unique(held.sets()[is_shared], return_inverse=True)
    counts = held.counts[is_shared]
    number, first = np.repeat(numbers, counts), np.repeat(held.ranks[held.starts[is_shared]], counts)
    is_member = np.repeat(is_shared, held.counts)
    rank, row = held.ranks[is_member], at[held.places[is_member]]
    # Stable, so that the boxes of one set stand in the order of their places, on every holder.
    order = np.lexsort((number, rank))
    rank, row, number, first = rank[order], row[order], number[order], first[order]
    found: list[list[Replicas]] = [[] for _ in starts[1:]]
    bounds = 1 + np.flatnonzero((np.diff(rank) != 0) | (np.diff(number) != 0))
    for start, stop in itertools.pairwise([0, *bounds.tolist(), len(rank)]) if len(rank) else ():
        of_rank = int(rank[start])
        rows = row[start:stop] - starts[of_rank]
        found[of_rank].append(Replicas(int(number[start]), int(first[start]), rows))
    return found


def _choose(held: _Held, world_size: int) -> Column:
    """Return the places, among all boxes, of those to be written: each box once."""
    holders, ranks, starts, counts, nbytes = held
    is_settled = (counts == 1) | (nbytes == 0)
    settled, shared = starts[is_settled], ~is_settled
    loads = np.zeros(world_size, dtype=np.int64)
    np.add.at(loads, ranks[settled], nbytes[is_settled])
    chosen = [settled]
    left_bytes = int(nbytes[shared].sum())
    for alike, of_ranks, size_bytes in _alike(held, shared):
        if left_bytes * _DUST <= loads.max():
            chosen.append(alike + np.argmin(loads[of_ranks]))
            continue
        takes = _deal(loads[of_ranks], len(alike), size_bytes)
        loads[of_ranks] += takes * size_bytes
        left_bytes -= len(alike) * size_bytes
        chosen.append(alike + np.repeat(np.arange(len(of_ranks)), takes))
    return holders[_joined(chosen)]


def _alike(held: _Held, is_shared: NDArray[np.bool_]) -> Iterator[tuple[Column, Column, int]]:
    """Yield boxes of one size on the same ranks together, largest first: (their starts, the ranks, their bytes)."""
    # Of equal sizes those with the fewest holders come first, because the others can still make up for them.
    if not is_shared.any():
        return
    ranks, starts, counts, nbytes = held.ranks, held.starts[is_shared], held.counts[is_shared], held.nbytes[is_shared]
    order = np.lexsort((held.sets()[is_shared], counts, -nbytes))
    starts, counts, nbytes = starts[order], counts[order], nbytes[order]
    is_new = np.concatenate(([True], (np.diff(nbytes) != 0) | (np.diff(counts) != 0)))
    is_new |= _differ_from_the_one_before(ranks, starts, counts)
    bounds = np.flatnonzero(is_new).tolist()
    for start, stop in zip(bounds, [*bounds[1:], len(starts)], strict=True):
        first = int(starts[start])
        yield starts[start:stop], ranks[first : first + int(counts[start])], int(nbytes[start])


def _scattered(ranks: Column) -> NDArray[np.uint64]:
    """Return a number for each rank whose sums tell sets of ranks apart, as good as always."""
    mixed = (ranks.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _differ_from_the_one_before(ranks: Column, starts: Column, counts: Column) -> NDArray[np.bool_]:
    """Tell of each box whether its holders, of which it has as many, are others than those of the box before it."""
    stops = np.cumsum(counts)
    own = np.arange(int(stops[-1])) + np.repeat(starts - (stops - counts), counts)
    of_holders = ranks[own]
    before = np.maximum(np.arange(len(own)) - np.repeat(counts, counts), 0)
    return np.logical_or.reduceat(of_holders != of_holders[before], stops - counts)


def _deal(loads: Column, count: int, size_bytes: int) -> Column:
    """Return how many of `count` boxes each rank takes, if each goes to the one that has the least so far."""
    # One by one they would fill the ranks like water: up to a common level, with less than one box of difference.
    order = np.argsort(loads, kind="stable")
    levels = loads[order]
    volumes = count * size_bytes + np.cumsum(levels)
    surface = volumes // np.arange(1, len(loads) + 1)
    active = int(np.argmax(np.append(surface[:-1] <= levels[1:], True))) + 1
    takes = np.maximum((int(surface[active - 1]) - levels) // size_bytes, 0)
    left = count - int(takes.sum())
    takes[np.argsort(levels + takes * size_bytes, kind="stable")[:left]] += 1
    dealt = np.empty_like(takes)
    dealt[order] = takes
    return dealt


# -- what the ranks do not agree on -------------------------------------------------------------------------


def _refuse_outside(table: BoxTable, rows: Column, extents: Column, firsts: Column, rank: int) -> None:
    """Raise if one of these boxes leaves its tensor, because places are numbered inside tensors only."""
    is_outside = (table.offsets < 0) | (table.sizes < 0) | (table.offsets + table.sizes > extents)
    if not is_outside.any():
        return
    wrong = rows[_row_sums(is_outside.astype(np.int64), firsts)[rows] > 0]
    boxes = {box.name: box for box in table.take(wrong)}.values()
    if boxes:
        raise _failure(
            [
                f"{box.name} has shape {box.shape}, and rank {rank} a box of {box.sizes} at {box.offsets}"
                for box in boxes
            ]
        )


def _refuse_other_sizes(tables: Sequence[BoxTable], boxes: _Boxes, is_first: NDArray[np.bool_]) -> None:
    """Raise if boxes at one place have other sizes."""
    is_other = ~is_first & (boxes.last != np.roll(boxes.last, 1))
    if not is_other.any():
        return
    runs = np.cumsum(is_first) - 1
    starts = _starts(tables)
    found: dict[tuple[str, tuple[int, ...]], dict[str, list[int]]] = {}
    for run in np.unique(runs[is_other]).tolist()[: 16 * _SHOWN]:
        members = np.flatnonzero(runs == run)
        for rank, at in zip(boxes.rank[members].tolist(), boxes.at[members].tolist(), strict=True):
            box = next(iter(tables[rank].take([at - starts[rank]])))
            of_place = found.setdefault((box.name, box.offsets), defaultdict(list))
            of_place[str(box.sizes)].append(rank)
    raise _failure([f"the box of {name} at {at} is {_variants(sizes)}" for (name, at), sizes in found.items()])


def _refuse_untiled(tables: Sequence[BoxTable], tensors: _Tensors, rows: Sequence[Column]) -> None:
    """Raise unless the chosen boxes cover every tensor exactly once, and every tensor has a box."""
    numbers = [of_table[table.tensor] for of_table, table in zip(tensors.of_table, tables, strict=True)]
    places = [ragged_places(tensors.columns.firsts(of), chosen) for of, chosen in zip(numbers, rows, strict=True)]
    tensor = _joined([of[chosen] for of, chosen in zip(numbers, rows, strict=True)])
    offsets = _joined([table.offsets[of] for table, of in zip(tables, places, strict=True)])
    sizes = _joined([table.sizes[of] for table, of in zip(tables, places, strict=True)])
    is_missing = np.bincount(tensor, minlength=len(tensors.names)) == 0
    broken = sorted(
        {*np.flatnonzero(is_missing).tolist(), *untiled(tensors.columns.shapes, tensor, offsets, sizes).tolist()}
    )
    if broken:
        raise _failure([_describe_hole(tables, tensors, number) for number in broken[:_SHOWN]], count=len(broken))


def _describe_hole(tables: Sequence[BoxTable], tensors: _Tensors, number: int) -> str:
    name, shape = tensors.names[number], tensors.columns.shapes[number]
    empty = [rank for rank, table in enumerate(tables) if not _holds(table, name, is_hollow=0 in shape)]
    what = f"the boxes of the ranks that save do not cover {name} {shape} exactly once"
    return f"{what}, {named_ranks(empty)} {'has' if len(empty) == 1 else 'have'} none of it" if empty else what


def _holds(table: BoxTable, name: str, *, is_hollow: bool) -> bool:
    if name not in table.names:
        return False
    rows = np.flatnonzero(table.tensor == table.names.index(name))
    return bool(len(rows)) and (is_hollow or bool(table.take(rows).elements().any()))


def _failure(problems: Sequence[str], *, count: int = 0) -> SaveFailedError:
    left = max(count, len(problems)) - _SHOWN
    shown = [*problems[:_SHOWN], *([f"and {left} more"] if left > 0 else [])]
    return SaveFailedError(
        f"the ranks do not hold parts of one state, so nothing was written: {'; '.join(shown)}; build the model and "
        "the optimizer alike on every rank, pass the same state everywhere, from all ranks that hold parts of it, and "
        "save again"
    )


def _variants(ranks_of: Mapping[str, Sequence[int]]) -> str:
    return " and ".join(f"{what} on {named_ranks(ranks)}" for what, ranks in ranks_of.items())
