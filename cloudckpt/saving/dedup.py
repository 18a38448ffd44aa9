"""Decide which rank writes which box, when several ranks could: each box exactly once, the bytes spread evenly.

    a table per rank ──agree on dtypes and shapes──▶ boxes in the order of their places ──equal places are replicas──▶
    ──largest first, to the holder with the least to write──▶ the rows of its own table that each rank writes

Pure columns: nothing here walks over boxes one by one. Runs on the coordinator, before a byte is written, and so is
the place where ranks that do not hold parts of the same state are found out (FORMAT invariant 3).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudckpt.errors import SaveFailedError
from cloudckpt.format import BoxTable, Column, TensorEntry, Tensors, ragged_places, row_products, untiled
from cloudckpt.ranks import named_ranks

__all__ = ["share_out"]

_SHOWN = 8
# Boxes that together are less than this part of the largest load are not worth spreading: a thousand step counters
# on as many ranks would cost every restoring rank a request to each of them.
_DUST = 1024


def share_out(tables: Sequence[BoxTable]) -> list[Column]:
    """Return for each rank the rows of its own table that it writes, in ascending order.

    Every element of every tensor is written exactly once. Boxes that only one rank has are its own; the others go,
    largest first, to the least loaded of the ranks that have them; small ones that do not count, all to one of them.
    Empty boxes are left out, except that a tensor without elements keeps one. The same tables always give the same
    answer.

    Args:
        tables: one per rank, in the order of ranks: the boxes that the rank could write.

    Raises:
        SaveFailedError: the ranks differ in what a tensor or a box is, or have no box for some of its elements.
    """
    tensors = _agree(tables)
    boxes = _Boxes.of(tables, tensors)
    is_first = boxes.are_first()
    _refuse_other_sizes(tables, boxes, is_first)
    is_written = np.zeros(sum(map(len, tables)), dtype=np.bool_)
    is_written[boxes.at[_choose(boxes, is_first, len(tables))]] = True
    starts = _starts(tables)
    rows = [np.flatnonzero(is_written[start:stop]) for start, stop in itertools.pairwise(starts)]
    _refuse_untiled(tables, tensors, rows)
    return rows


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

    def are_first(self) -> NDArray[np.bool_]:
        """Tell of each box whether it is the first one at its place."""
        return np.concatenate(([True] * bool(len(self.first)), self.first[1:] != self.first[:-1])).astype(np.bool_)


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


def _choose(boxes: _Boxes, is_first: NDArray[np.bool_], world_size: int) -> Column:
    """Return the places, among `boxes`, of those to be written: one of each run that begins with a first one."""
    is_holder = is_first | (boxes.rank != np.roll(boxes.rank, 1))  # a rank that has a box twice holds it once
    holders = np.flatnonzero(is_holder)
    starts = np.flatnonzero(is_first[holders])
    counts = np.diff(starts, append=len(holders))
    ranks, nbytes = boxes.rank[holders], boxes.nbytes[holders[starts]]
    is_settled = (counts == 1) | (nbytes == 0)
    settled, shared = starts[is_settled], ~is_settled
    loads = np.zeros(world_size, dtype=np.int64)
    np.add.at(loads, ranks[settled], nbytes[is_settled])
    chosen = [settled]
    left_bytes = int(nbytes[shared].sum())
    for alike, of_ranks, size_bytes in _alike(ranks, starts[shared], counts[shared], nbytes[shared]):
        if left_bytes * _DUST <= loads.max():
            chosen.append(alike + np.argmin(loads[of_ranks]))
            continue
        takes = _deal(loads[of_ranks], len(alike), size_bytes)
        loads[of_ranks] += takes * size_bytes
        left_bytes -= len(alike) * size_bytes
        chosen.append(alike + np.repeat(np.arange(len(of_ranks)), takes))
    return holders[_joined(chosen)]


def _alike(ranks: Column, starts: Column, counts: Column, nbytes: Column) -> Iterator[tuple[Column, Column, int]]:
    """Yield boxes of one size on the same ranks together, largest first: (their starts, the ranks, their bytes)."""
    # Of equal sizes those with the fewest holders come first, because the others can still make up for them.
    if not len(starts):
        return
    sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(_scattered(ranks))))
    order = np.lexsort((sums[starts + counts] - sums[starts], counts, -nbytes))
    starts, counts, nbytes = starts[order], counts[order], nbytes[order]
    is_new = np.concatenate(([True], (np.diff(nbytes) != 0) | (np.diff(counts) != 0)))
    is_new |= _differ_from_the_one_before(ranks, starts, counts)
    bounds = np.flatnonzero(is_new).tolist()
    for start, stop in zip(bounds, [*bounds[1:], len(starts)], strict=True):
        first = int(starts[start])
        yield starts[start:stop], ranks[first : first + int(counts[start])], int(nbytes[start])


def _scattered(ranks: Column) -> NDArray[np.uint64]:
    """Return a number for each rank whose sums tell sets of ranks apart, nearly always; they only bring order."""
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
    what = f"the boxes of all ranks do not cover {name} {shape} exactly once"
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
        "the optimizer alike on every rank, pass the same state everywhere, and save again"
    )


def _variants(ranks_of: Mapping[str, Sequence[int]]) -> str:
    return " and ".join(f"{what} on {named_ranks(ranks)}" for what, ranks in ranks_of.items())
