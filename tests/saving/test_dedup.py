"""Laws of sharing out boxes: every element once, evenly, always alike; and a message where the ranks differ."""

from __future__ import annotations

import heapq
import math
import pickle
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cloudckpt.errors import SaveFailedError
from cloudckpt.format.boxes import Box, BoxTable
from cloudckpt.format.codec import DTYPES
from cloudckpt.saving.dedup import share_out
from tests.effort import examples
from tests.ranks.processes import run

Shape = tuple[int, ...]


def whole(name: str, shape: Shape, dtype: str = "float32") -> Box:
    return Box(name, dtype, shape, (0,) * len(shape), shape)


def rows_of(name: str, shape: Shape, start: int, stop: int, dtype: str = "float32") -> Box:
    rest = shape[1:]
    return Box(name, dtype, shape, (start, *(0 for _ in rest)), (stop - start, *rest))


def tables_of(*ranks: Sequence[Box]) -> list[BoxTable]:
    return [BoxTable.of(boxes) for boxes in ranks]


def written(tables: Sequence[BoxTable]) -> list[list[Box]]:
    return [list(table.take(rows)) for table, rows in zip(tables, share_out(tables).rows, strict=True)]


def bytes_of(box: Box) -> int:
    return math.prod(box.sizes) * DTYPES[box.dtype].itemsize


def loads_of(shares: Sequence[Sequence[Box]]) -> list[int]:
    return [sum(map(bytes_of, boxes)) for boxes in shares]


def failure_of(tables: Sequence[BoxTable]) -> str:
    with pytest.raises(SaveFailedError) as caught:
        share_out(tables)
    assert caught.value.failures == {}
    return str(caught.value)


# -- every element exactly once ------------------------------------------------------------------------------


def cuts(extent: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut an axis as FSDP2 does: equal parts, of which the last ones may be short or empty."""
    step = -(-extent // parts) or 1
    return ((min(part * step, extent), min(part * step + step, extent)) for part in range(parts))


def grid(name: str, dtype: str, shape: Shape, parts: Sequence[int]) -> list[Box]:
    spans = [list(cuts(extent, count)) for extent, count in zip(shape, parts, strict=True)]
    return [
        Box(name, dtype, shape, tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
        for box in product(*spans)
    ]


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Box]]:
    """Ranks with tensors that each are cut into a grid; each box lies on one rank or on several."""
    ranks: list[list[Box]] = [[] for _ in range(draw(st.integers(1, 5)))]
    some = st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=len(ranks), unique=True)
    for number in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        parts = [draw(st.integers(1, 4)) for _ in shape]
        for box in grid(f"t{number}", draw(st.sampled_from(["float32", "bfloat16", "int64"])), shape, parts):
            for rank in draw(some):
                ranks[rank].append(box)
    return [draw(st.permutations(boxes)) for boxes in ranks]


@given(jobs())
@settings(max_examples=examples(300), deadline=None)
def test_every_element_is_written_exactly_once_by_a_rank_that_has_it(job: list[list[Box]]) -> None:
    tables = tables_of(*job)
    shares = written(tables)
    counts = {box.name: np.zeros(box.shape, dtype=int) for boxes in job for box in boxes}
    boxes_of_name = dict.fromkeys(counts, 0)
    for rank, boxes in enumerate(shares):
        for box in boxes:
            assert box in job[rank]
            boxes_of_name[box.name] += 1
            counts[box.name][tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] += 1
    assert {name: count.tolist() for name, count in counts.items()} == {
        name: np.ones_like(count).tolist() for name, count in counts.items()
    }
    assert all(boxes_of_name[name] == 1 for name, count in counts.items() if not count.size)


@given(jobs())
@settings(max_examples=examples(60), deadline=None)
def test_the_same_tables_give_the_same_shares_after_a_journey(job: list[list[Box]]) -> None:
    tables = tables_of(*job)
    again = share_out([BoxTable.decode(table.encode()) for table in tables])
    assert [rows.tolist() for rows in again.rows] == [rows.tolist() for rows in share_out(tables).rows]


def test_ranks_that_number_the_tensors_in_another_order_still_share_them() -> None:
    a, b = whole("a", (4,)), whole("b", (4,))
    assert sorted(box.name for boxes in written(tables_of([a, b], [b, a])) for box in boxes) == ["a", "b"]


def test_a_box_that_a_rank_lists_twice_is_written_once() -> None:
    box = whole("w", (4,))
    assert [len(boxes) for boxes in written(tables_of([box, box], [box]))] == [1, 0]


def test_a_scalar_on_every_rank_is_written_once() -> None:
    assert [len(boxes) for boxes in written(tables_of(*[[whole("step", ())]] * 3))] == [1, 0, 0]


def test_a_tensor_without_elements_keeps_one_box() -> None:
    halves = [[rows_of("w", (4, 0), 0, 2)], [rows_of("w", (4, 0), 2, 4)]]
    assert [len(boxes) for boxes in written(tables_of(*halves))] == [1, 0]


def test_empty_boxes_are_not_written_beside_full_ones() -> None:
    shares = written(tables_of([rows_of("w", (1, 3), 0, 1)], [rows_of("w", (1, 3), 1, 1)]))
    assert shares == [[whole("w", (1, 3))], []]


def test_no_ranks_and_ranks_without_boxes_write_nothing() -> None:
    assert share_out([]) == ([], [])
    assert [rows.tolist() for rows in share_out(tables_of([], [])).rows] == [[], []]
    assert share_out(tables_of([], [])).replicas == [[], []]


def _boxes_of_dtensors() -> list[Box]:
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    state: dict[str, DTensor] = {
        "small": distribute_tensor(torch.ones(3, 2), flat, [Shard(0)]),
        "hollow": distribute_tensor(torch.ones(0, 2), flat, [Shard(0)]),
        "copied": distribute_tensor(torch.ones(6, 2), square, [Replicate(), Shard(0)]),
        "crossed": distribute_tensor(torch.ones(5, 3), square, [Shard(1), Shard(0)]),
    }
    boxes = []
    for name, tensor in state.items():
        for item in _create_write_items(name, tensor):
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            boxes.append(Box(name, "float32", tuple(tensor.shape), tuple(chunk.offsets), tuple(chunk.sizes)))
    return boxes


def test_what_dtensors_report_is_shared_out_whole() -> None:
    shares = written(tables_of(*run(4, _boxes_of_dtensors)))
    full = {"small": 6, "hollow": 0, "copied": 12, "crossed": 15}
    found = dict.fromkeys(full, 0)
    for box in (box for boxes in shares for box in boxes):
        found[box.name] += math.prod(box.sizes)
    assert found == full
    assert [sum(box.name == "small" for box in boxes) for boxes in shares] == [1, 1, 1, 0]


# -- replicas ------------------------------------------------------------------------------------------------------


@given(jobs())
@settings(max_examples=examples(200), deadline=None)
def test_every_box_that_several_ranks_hold_is_known_to_all_of_them_in_one_order(job: list[list[Box]]) -> None:
    tables = tables_of(*job)
    found: dict[int, dict[int, list[Box]]] = {}
    firsts: dict[int, set[int]] = {}
    for rank, replicas in enumerate(share_out(tables).replicas):
        for alike in replicas:
            found.setdefault(alike.number, {})[rank] = list(tables[rank].take(alike.rows))
            firsts.setdefault(alike.number, set()).add(alike.first_rank)
    holders: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(job):
        for box in dict.fromkeys(boxes):
            holders.setdefault(box, []).append(rank)
    known: dict[Box, list[int]] = {}
    for number, by_rank in found.items():
        (boxes,) = {tuple(of_rank) for of_rank in by_rank.values()}
        assert firsts[number] == {min(by_rank)}
        for box in boxes:
            assert box not in known
            known[box] = sorted(by_rank)
    assert known == {box: ranks for box, ranks in holders.items() if len(ranks) > 1 and bytes_of(box)}


def test_what_is_another_ranks_word_is_neither_written_nor_compared() -> None:
    boxes = [whole("a", (4,)), whole("mean", (100,)), whole("b", (4,))]
    shares = share_out(tables_of(boxes, boxes, boxes), [(), ("mean",), ("mean", "other")])
    assert [1 in rows for rows in shares.rows] == [True, False, False]
    assert [alike.rows.tolist() for of_rank in shares.replicas for alike in of_rank] == [[0, 2]] * 3


def test_what_every_rank_takes_for_another_ones_word_is_refused() -> None:
    tables = tables_of([whole("a", (4,))], [whole("a", (4,)), whole("mean", (3,))])
    with pytest.raises(SaveFailedError, match=r"do not cover mean \(3,\) exactly once, rank 0 has none of it"):
        share_out(tables, [(), ("mean",)])


# -- evenly ---------------------------------------------------------------------------------------------------

sizes_of_job = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(sizes_of_job, st.integers(1, 7))
@settings(max_examples=examples(200), deadline=None)
def test_replicas_are_spread_as_a_greedy_walk_from_the_largest_would(sizes: list[int], world_size: int) -> None:
    boxes = [whole(f"t{number}", (size,)) for number, size in enumerate(sizes)]
    heap = [(0, rank) for rank in range(world_size)]
    for size in sorted(sizes, reverse=True):
        load, rank = heapq.heappop(heap)
        heapq.heappush(heap, (load + 4 * size, rank))
    loads = loads_of(written(tables_of(*[boxes] * world_size)))
    assert sorted(loads) == sorted(load for load, _ in heap)
    assert max(loads) <= sum(loads) / world_size + 4 * max(sizes)


def test_ranks_with_boxes_of_their_own_take_fewer_of_the_shared_ones() -> None:
    shared = [whole(f"s{number}", (10,)) for number in range(10)]
    own = whole("own", (60,))
    assert loads_of(written(tables_of([own, *shared], shared))) == [4 * 80, 4 * 80]


def test_a_shard_counts_with_its_own_bytes_and_not_with_those_of_its_tensor() -> None:
    # Two replicas of four shards: by the size of whole tensors "big" would outweigh everything.
    quarters = [rows_of("big", (400,), 100 * part, 100 * part + 100) for part in range(4)]
    shared = [whole("small", (100,))]
    jobs_of = [[quarters[part], *shared] for part in (0, 1, 2, 3)] + [
        [quarters[part], *shared] for part in (0, 1, 2, 3)
    ]
    loads = loads_of(written(tables_of(*jobs_of)))
    assert sum(loads) == 4 * 500
    assert max(loads) == 4 * 100


def test_boxes_too_small_to_count_stay_together_on_the_rank_with_the_least() -> None:
    counters = [whole(f"step{number}", ()) for number in range(50)]
    shards = [[rows_of("w", (10**6 - 1,), *span)] for span in ((0, 400_000), (400_000, 700_000), (700_000, 10**6 - 1))]
    shares = written(tables_of(*[counters + boxes for boxes in shards]))
    assert [len(boxes) for boxes in shares] == [1, 1, 51]


def test_many_small_boxes_that_do_count_are_spread() -> None:
    small = [whole(f"t{number}", (4,)) for number in range(3000)]
    assert [len(boxes) for boxes in written(tables_of(*[small] * 3))] == [1000, 1000, 1000]


def test_ranks_of_other_sets_of_holders_are_balanced_together() -> None:
    pairs = [[whole(f"{'ab'[rank // 2]}{number}", (8,)) for number in range(6)] for rank in range(4)]
    everywhere = [whole(f"c{number}", (8,)) for number in range(4)]
    loads = loads_of(written(tables_of(*[boxes + everywhere for boxes in pairs])))
    assert loads == [4 * 8 * 4] * 4


# -- what ranks do not agree on ---------------------------------------------------------------------------------


def test_another_shape_on_one_rank_is_named() -> None:
    good, bad = whole("model.w", (4, 8)), whole("model.w", (4, 9))
    message = failure_of(tables_of([good], [bad], [good]))
    assert "model.w is float32 (4, 8) on ranks 0, 2 and float32 (4, 9) on rank 1" in message
    assert message.endswith("and save again")


def test_another_dtype_on_one_rank_is_named_even_where_it_has_no_box() -> None:
    empty = rows_of("w", (2,), 2, 2, dtype="bfloat16")
    message = failure_of(tables_of([whole("w", (2,))], [empty]))
    assert "w is float32 (2,) on rank 0 and bfloat16 (2,) on rank 1" in message


def test_boxes_of_other_sizes_at_one_place_are_named() -> None:
    first, longer, rest = (rows_of("w", (6, 2), *span) for span in ((0, 3), (0, 4), (3, 6)))
    message = failure_of(tables_of([first], [first], [longer], [rest]))
    assert "the box of w at (0, 0) is (3, 2) on ranks 0-1 and (4, 2) on rank 2" in message


def test_a_hole_is_named_with_the_ranks_that_have_nothing_of_the_tensor() -> None:
    message = failure_of(tables_of([rows_of("w", (4,), 0, 2), whole("v", (1,))], [rows_of("w", (4,), 4, 4)], []))
    assert "do not cover w (4,) exactly once, ranks 1-2 have none of it" in message
    assert " v " not in message


def test_boxes_that_overlap_are_refused() -> None:
    message = failure_of(tables_of([rows_of("w", (4,), 0, 3)], [rows_of("w", (4,), 2, 4)]))
    assert "do not cover w (4,) exactly once;" in message


def test_a_tensor_that_is_named_and_that_no_rank_has_a_box_of_is_refused() -> None:
    nothing = BoxTable.of([whole("w", (0,))]).take([])
    assert "do not cover w (0,) exactly once, ranks 0-1 have none of it" in failure_of([nothing, nothing])


@pytest.mark.parametrize(("start", "stop"), [(3, 5), (-1, 1)])
def test_a_box_that_leaves_its_tensor_is_named_with_its_rank(start: int, stop: int) -> None:
    message = failure_of(tables_of([whole("w", (4,))], [rows_of("w", (4,), start, stop)]))
    assert f"w has shape (4,), and rank 1 a box of (2,) at ({start},)" in message


def test_at_most_eight_names_are_listed_and_the_others_counted() -> None:
    ours = [whole(f"t{number:02}", (4,)) for number in range(20)]
    theirs = [whole(f"t{number:02}", (5,)) for number in range(20)]
    for message in (
        failure_of(tables_of(ours, theirs)),
        failure_of(tables_of([box._replace(sizes=(3,)) for box in ours])),
    ):
        assert sum(f"t{number:02}" in message for number in range(20)) == 8
        assert "; and 12 more; " in message


def test_long_lists_of_ranks_are_cut() -> None:
    ranks = [[whole("w", (4 + rank % 2,))] for rank in range(100)]
    assert "on ranks 0, 2, 4, 6, 8, 10, 12, 14, and 42 more" in failure_of(tables_of(*ranks))


def test_a_failure_travels_between_ranks() -> None:
    with pytest.raises(SaveFailedError) as caught:
        share_out(tables_of([whole("w", (4,))], [whole("w", (5,))]))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
