"""Laws of the scale benchmark: what it plays is what real ranks send, and its steps fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.many_ranks import scale_steps
from benchmarks.many_ranks.layouts import MODELS, Fsdp, Model
from benchmarks.many_ranks.requests import count_on
from benchmarks.many_ranks.scale_steps import Size
from benchmarks.scale import Row, growth_table
from benchmarks.shared.targets import Ground
from cloudckpt.format.boxes import BoxTable
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.layout import lay_out
from cloudckpt.options import Options
from cloudckpt.saving.dedup import share_out
from cloudckpt.saving.tally import Written

SMALL = Model(layers=2, hidden=64, ffn=96, kv=3, vocab=50)


def test_the_models_have_as_many_parameters_as_their_names_say() -> None:
    counts = dict.fromkeys(MODELS, 0)
    for name, model in MODELS.items():
        for _, shape in model.parameters():
            counts[name] += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert {name: round(count / 1e9) for name, count in counts.items()} == {"70B": 71, "405B": 406}


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_a_table_is_that_of_the_boxes_that_a_rank_lists(rank: int) -> None:
    layout = Fsdp(SMALL.state(), 7)
    assert layout.table(rank).encode() == BoxTable.of(layout.boxes(rank)).encode()


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_the_played_pieces_are_those_of_a_real_layout(rank: int) -> None:
    layout = Fsdp(SMALL.state(), 7)
    rows = share_out([layout.table(of_rank) for of_rank in range(7)]).rows[rank]
    for earlier in range(rank):  # so that what ranks have in common was laid out for another one
        layout.written(earlier, rows)
    played = layout.written(rank, rows)
    chunks = list(layout.table(rank).take(rows))
    shards = lay_out(chunks, shard_bytes=Options().shard_bytes, metadata={})
    real = Written.of(BoxTable.of(chunks), shards, [b""] * len(shards), {}, rank=rank, attempt=layout.attempt)
    assert list(played.boxes) == list(real.boxes)
    assert played.shard.tolist() == real.shard.tolist()


def test_the_steps_of_a_save_and_a_restore_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "70B", SMALL)
    monkeypatch.setattr(scale_steps, "in_a_process", lambda step, *args: step(*args))
    size = Size(model="70B", ranks=6)
    found = scale_steps.measure_plan(size, tmp_path) | scale_steps.measure_index(size, tmp_path)
    state = SMALL.state()
    assert found["boxes"] == 6 * len(state)
    assert found["stored_bytes"] > sum(DTYPES[t.dtype].itemsize * (t.shape[0] if t.shape else 1) for t in state)
    assert found["index_bytes"] == (tmp_path / "index").stat().st_size
    assert found["own_s"] > 0
    assert found["other_s"] > 0
    stored = scale_steps.measure_stores(tmp_path / "index", Ground(url=str(tmp_path / "store")))
    assert stored["index_bytes"] == found["index_bytes"]


def test_the_newest_is_found_with_one_listing_and_one_read(tmp_path: Path) -> None:
    found = scale_steps.measure_latest(Ground(url=str(tmp_path)), 30)
    assert (found["checkpoints"], found["requests"]) == (30, 2)


def test_growth_is_told_from_one_number_of_ranks_to_the_next_of_one_model() -> None:
    sizes = [("70B", 2), ("70B", 8), ("405B", 2)]
    rows = [Row(size=Size(model=model, ranks=ranks), found={"boxes": ranks, "decode_s": 3.0}) for model, ranks in sizes]
    lines = growth_table(rows, {"boxes": "", "decode_s": ""}).splitlines()
    assert lines[-1] == "| 70B, FSDP | 2 → 8 | × 4.0 | × 1.0 |"
    assert len(lines) == 5


def test_requests_are_counted_for_each_part_of_a_rank_s_run() -> None:
    (found,) = count_on(1)
    assert list(found.parts) == ["first save", "save", "restore"]
    assert found.parts["save"]["create"] == 1  # the manifest
    assert found.parts["save"]["put"] == 2  # one shard and the index
    assert sum(found.parts["first save"].values()) > sum(found.parts["save"].values())
    assert "create" not in found.parts["restore"]
