"""Who reads what several ranks need: each shared box once, evenly, and in one order on all ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import Options, StateMismatchError
from cloudckpt.format.boxes import Box, BoxTable
from cloudckpt.loading.passing import Step, plan_passing
from tests.ranks.processes import run

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


def test_nothing_is_passed_on_where_every_rank_reads_for_itself() -> None:
    assert plan_passing([message(box("a"))] * 2, is_read_once=False) == [[], []]


@pytest.mark.parametrize("is_read_once", [True, False])
def test_other_dtypes_of_one_name_are_refused_with_their_ranks(is_read_once: bool) -> None:
    half = box("a")._replace(dtype="bfloat16")
    messages = [message(box("a"), box("b")), message(half, box("b")), message(box("b")), message(half)]
    with pytest.raises(StateMismatchError) as caught:
        plan_passing(messages, is_read_once=is_read_once)
    assert "a is float32 on rank 0 and bfloat16 on ranks 1, 3. Build" in str(caught.value)


def test_at_most_eight_names_are_listed_and_the_others_counted() -> None:
    ours = [box(f"t{number:02}") for number in range(20)]
    with pytest.raises(StateMismatchError) as caught:
        plan_passing([message(*ours), message(*(one._replace(dtype="float64") for one in ours))])
    assert sum(f"t{number:02}" in str(caught.value) for number in range(20)) == 8
    assert "; and 12 more. " in str(caught.value)


# -- ranks --------------------------------------------------------------------------------------------------------


def load_into_other_dtypes(url: str, read_once: Any) -> tuple[str, list[float]]:
    saved = {"half": torch.ones(3, dtype=torch.bfloat16), "alike": torch.ones(2)}
    cloudckpt.save(saved, url)
    dist.barrier()
    live = {"half": torch.zeros(3, dtype=torch.bfloat16 if dist.get_rank() else torch.float32), "alike": torch.zeros(2)}
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load(live, url, options=Options(read_once=read_once, progress_timeout_s=60))
    return str(caught.value), [*live["half"].tolist(), *live["alike"].tolist()]


@pytest.mark.parametrize("read_once", ["always", "never"])
def test_ranks_that_restore_into_other_dtypes_are_told_so_and_nothing_is_changed(
    tmp_path: Path, read_once: str
) -> None:
    for text, live in run(2, load_into_other_dtypes, str(tmp_path / "c"), read_once):
        assert "half is float32 on rank 0 and bfloat16 on rank 1" in text
        assert live == [0.0] * 5


def save_other_dtypes(url: str) -> str:
    with pytest.raises(cloudckpt.SaveFailedError) as caught:
        cloudckpt.save({"w": torch.ones(3, dtype=torch.bfloat16 if dist.get_rank() else torch.float32)}, url)
    return str(caught.value)


def test_ranks_that_save_other_dtypes_are_told_so(tmp_path: Path) -> None:
    for text in run(2, save_other_dtypes, str(tmp_path / "c")):
        assert "w is float32 (3,) on rank 0 and bfloat16 (3,) on rank 1" in text


def load_into_a_wider_dtype(url: str) -> list[float]:
    cloudckpt.save({"half": torch.full((3,), 0.5, dtype=torch.bfloat16)}, url)
    dist.barrier()
    live = {"half": torch.zeros(3)}
    cloudckpt.load(live, url, options=Options(read_once="always", progress_timeout_s=60))
    return live["half"].tolist()


def test_what_is_widened_by_its_reader_is_passed_on_wide(tmp_path: Path) -> None:
    assert run(2, load_into_a_wider_dtype, str(tmp_path / "c")) == [[0.5] * 3] * 2


def restore_what_both_find_damaged(url: str) -> int | None:
    small = Options(shard_bytes=4096, block_bytes=1024, span_bytes=1024, read_once="always", memory_budget_bytes=65536)
    with cloudckpt.CheckpointManager(url, options=small) as manager:
        for step in (1, 2):
            manager.save(step, {f"w{number}": torch.full((900,), float(step)) for number in range(4)})
        if dist.get_rank() == 0:
            for path in Path(url).glob("step-0000000002*/*/*.safetensors"):
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
        dist.barrier()
        state = {f"w{number}": torch.zeros(900) for number in range(4)}
        restored = manager.restore(state)
        assert all(torch.equal(one, torch.ones(900)) for one in state.values())
        return None if restored is None else restored.step


def test_an_older_step_is_taken_where_each_rank_finds_what_it_was_to_pass_on_damaged(tmp_path: Path) -> None:
    assert run(2, restore_what_both_find_damaged, str(tmp_path)) == [1, 1]
