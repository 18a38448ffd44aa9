"""Who reads what several ranks need: each shared box once, evenly, and in one order on all ranks."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.format.boxes import Box, BoxTable
from cloudckpt.loading.passing import Step, plan_passing

ROWS = 1 << 20


def box(name: str, place: int = 0, rows: int = ROWS) -> Box:
    return Box(name, "float32", (8 * ROWS,), (place * ROWS,), (rows,))


def message(*boxes: Box) -> bytes:
    return BoxTable.of(boxes).encode()


def test_a_box_that_one_rank_alone_needs_is_read_by_that_rank() -> None:
    assert plan_passing([message(box("a", 0)), message(box("a", 1)), message()]) == [[], [], []]


def test_a_lone_rank_passes_nothing_on() -> None:
    assert plan_passing([message(box("a"))]) == [[]]


def test_what_all_need_is_read_by_one_and_known_to_all_by_their_own_rows() -> None:
    plan = plan_passing([message(box("a"), box("b", 1)), message(box("b", 1)), message()])

    assert plan == [[Step(0, (1,), (1,))], [Step(0, (), (0,))], []]


def test_small_boxes_travel_together_and_large_ones_alone() -> None:
    small = [box(f"s{number}", rows=10) for number in range(5)]
    (steps, _) = plan_passing([message(box("large", rows=4 * ROWS), *small)] * 2)

    assert sorted(step.rows for step in steps) == [(0,), (1, 2, 3, 4, 5)]


def test_an_empty_box_is_not_passed_on() -> None:
    assert plan_passing([message(box("a", rows=0))] * 2) == [[], []]


@given(st.lists(st.sets(st.integers(0, 11), max_size=8), min_size=2, max_size=6))
def test_every_shared_box_is_read_once_and_reaches_every_other_holder_in_one_order(needs: list[set[int]]) -> None:
    tables = [[box(f"t{number}", rows=number + 1) for number in sorted(need)] for need in needs]
    plan = plan_passing([message(*table) for table in tables])

    holders = Counter(found for table in tables for found in table)
    for rank, steps in enumerate(plan):
        rows = [tables[rank][row] for step in steps for row in step.rows]
        assert sorted(rows) == sorted(found for found in tables[rank] if holders[found] > 1)
        for step in steps:
            if step.reader == rank:
                boxes = {tables[rank][row] for row in step.rows}
                for taker in step.takers:
                    assert boxes <= set(tables[taker])
    order = [[(step.reader, tables[rank][step.rows[0]]) for step in steps] for rank, steps in enumerate(plan)]
    for one in order:
        for other in order:
            common = set(one) & set(other)
            assert [step for step in one if step in common] == [step for step in other if step in common]


def test_replicas_share_the_reading_evenly() -> None:
    table = message(*(box(f"t{number}", rows=ROWS) for number in range(40)))
    plan = plan_passing([table] * 4)

    reads = Counter(step.reader for step in plan[0] for _ in step.rows)
    assert reads == {0: 10, 1: 10, 2: 10, 3: 10}


def test_neighbours_are_read_by_the_same_rank_because_they_lie_in_the_same_blocks() -> None:
    table = message(*(box(f"t{number:02d}", rows=ROWS + number) for number in range(40)))
    steps = plan_passing([table] * 4)[0]

    runs = [sorted(row for step in steps if step.reader == reader for row in step.rows) for reader in range(4)]
    assert [rows[-1] - rows[0] + 1 for rows in runs] == [len(rows) for rows in runs]
