"""What ranks report becomes one index of all of them, or an error that says which ranks contradict each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.errors import SaveFailedError, UnsupportedValueError
from cloudckpt.format.boxes import Box, BoxTable
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.index import Index
from cloudckpt.format.layout import lay_out
from cloudckpt.format.section import ChunkEntry, TensorEntry
from cloudckpt.saving.tally import Written, assemble, check_against_plan

ATTEMPT = "0123456789abcdef"
BLOCK_BYTES = 1 << 20


def written(
    rank: int, boxes: list[Box], *, values: dict[str, int] | None = None, attempt: str = ATTEMPT, gap: int = 64
) -> Written:
    """Return what a rank reports that wrote boxes one after the other into one shard."""
    table = BoxTable.of(boxes)
    stops = gap + np.cumsum(np.concatenate(([0], table.nbytes())))
    return Written(
        rank=rank,
        attempt=attempt,
        boxes=table,
        shard=np.zeros(len(table), dtype=np.int64),
        start=stops[:-1],
        shard_sizes=stops[-1:],
        digests=bytes([rank]) * 8,
        values=dict(values or {}),
    )


def row(name: str, rank: int, ranks: int, *, dtype: str = "float32", columns: int = 3) -> Box:
    return Box(name, dtype, (ranks, columns), (rank, 0), (1, columns))


def assembled(*reports: Written) -> Index:
    return assemble(reports, attempt=ATTEMPT, block_bytes=BLOCK_BYTES, paths={})


def planned(index: Index) -> Metadata:
    """Return the plan that an index fulfils."""
    tensors = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=DTYPES[entry.dtype]),
            size=torch.Size(entry.shape),
            chunks=[ChunkStorageMetadata(offsets=torch.Size([]), sizes=torch.Size([]))],
        )
        for name, entry in index.tensors.items()
    }
    return Metadata(state_dict_metadata={**tensors, **{name: BytesStorageMetadata() for name in index.values}})


def test_a_message_brings_everything_to_the_coordinator() -> None:
    sent = written(3, [row("w", 0, 2), Box("s", "bfloat16", (), (), ())], values={"lr": 1}, attempt="f" * 16)

    got = Written.decode(sent.encode())

    assert (got.rank, got.attempt, got.digests, got.values) == (3, "f" * 16, bytes([3]) * 8, {"lr": 1})
    assert list(got.boxes) == list(sent.boxes)
    for column in ("shard", "start", "shard_sizes"):
        assert getattr(got, column).tolist() == getattr(sent, column).tolist()


def test_messages_of_ranks_that_name_the_same_tensors_share_the_names() -> None:
    messages = [written(rank, [row("w", rank, 2), row("v", rank, 2)]).encode() for rank in range(2)]

    one, other = (Written.decode(message).boxes for message in messages)

    assert (one.names is other.names, one.shapes is other.shapes) == (True, True)


def test_what_was_laid_out_is_what_is_reported() -> None:
    chunks = [
        Box("w", "float32", (8, 16), (4, 0), (4, 16)),
        Box("b", "int8", (3,), (0,), (3,)),
    ]
    shards = lay_out(chunks, shard_bytes=128, metadata={})

    found = Written.of(BoxTable.of(chunks), shards, [b"01234567"] * len(shards), {"lr": 1}, rank=1, attempt=ATTEMPT)

    pieces = [(shard, piece) for shard in shards for piece in shard.pieces]
    assert len(shards) > 1
    assert [(box.name, box.offsets, box.sizes) for box in found.boxes] == [
        (chunks[piece.chunk].name, piece.offsets, piece.sizes) for _, piece in pieces
    ]
    assert {box.shape for box in found.boxes if box.name == "w"} == {(8, 16)}
    assert found.shard.tolist() == [shard.number for shard, _ in pieces]
    assert found.start.tolist() == [piece.start for _, piece in pieces]
    assert found.shard_sizes.tolist() == [shard.size_bytes for shard in shards]
    assert found.digests == b"01234567" * len(shards)


def test_ranks_that_name_tensors_in_different_orders_are_merged() -> None:
    reports = [
        written(1, [row("b", 1, 2), row("a", 1, 2)], values={"y": 2}),
        written(0, [row("a", 0, 2), row("c", 0, 1), row("b", 0, 2)], values={"x": 1}, attempt="f" * 16),
    ]

    index = assembled(*(Written.decode(report.encode()) for report in reports))

    check_against_plan(planned(index), index)
    assert index.ranks == (0, 1)
    assert index.tensors == {
        "b": TensorEntry("float32", (2, 3)),
        "a": TensorEntry("float32", (2, 3)),
        "c": TensorEntry("float32", (1, 3)),
    }
    assert index.all_pieces()["a"] == [
        ChunkEntry(offsets=(0, 0), sizes=(1, 3), rank=0, number=0, start=64),
        ChunkEntry(offsets=(1, 0), sizes=(1, 3), rank=1, number=0, start=76),
    ]
    assert index.all_pieces()["c"] == [ChunkEntry(offsets=(0, 0), sizes=(1, 3), rank=0, number=0, start=76)]
    assert [(shard.rank, shard.attempt, shard.digests) for shard in index.shards()] == [
        (0, "f" * 16, bytes(8)),
        (1, ATTEMPT, bytes([1]) * 8),
    ]
    assert index.values == {"x": 1, "y": 2}


def test_ranks_that_name_the_same_tensors_are_merged() -> None:
    names = [f"t{number}" for number in range(50)]
    reports = [written(rank, [row(name, rank, 8) for name in names]) for rank in range(8)]

    index = assembled(*(Written.decode(report.encode()) for report in reports))

    check_against_plan(planned(index), index)
    assert list(index.tensors) == names
    assert index.piece_counts() == dict.fromkeys(names, 8)


@pytest.mark.parametrize("other", [{"dtype": "int32"}, {"columns": 4}])
def test_ranks_that_describe_a_tensor_differently_are_named(other: dict[str, object]) -> None:
    with pytest.raises(SaveFailedError, match=r"'w' is float32 of \(2, 3\) on rank 4 and .* on rank 7"):
        assembled(written(4, [row("w", 0, 2)]), written(7, [row("w", 1, 2, **other)]))  # type: ignore[arg-type]


def test_a_value_of_two_ranks_names_them() -> None:
    with pytest.raises(SaveFailedError, match="'lr' was written by rank 0 and by rank 1"):
        assembled(written(0, [], values={"lr": 1}), written(1, [], values={"lr": 1}))


def test_a_rank_reports_once() -> None:
    with pytest.raises(SaveFailedError, match="rank 2 reported twice"):
        assembled(written(2, [row("w", 0, 1)]), written(2, []))


def test_every_difference_from_the_plan_is_listed() -> None:
    index = assembled(written(0, [row("a", 0, 1), row("b", 0, 1), row("c", 0, 1)], values={"x": 1, "y": 2}))
    plan = planned(index).state_dict_metadata
    plan["b"] = replace(plan["b"], size=torch.Size([3, 1]))
    plan["c"] = BytesStorageMetadata()
    plan["y"] = plan["a"]
    plan["z"] = BytesStorageMetadata()
    del plan["x"]

    with pytest.raises(SaveFailedError) as caught:
        check_against_plan(Metadata(state_dict_metadata=plan), index)

    text = str(caught.value)
    assert "'x' was written and never planned" in text
    assert "tensor 'b': planned as float32 of (3, 1), written as float32 of (1, 3)" in text
    assert "value 'c' was not written as one" in text
    assert "tensor 'y' was not written as one" in text
    assert "value 'z' was not written as one" in text
    assert "'a'" not in text


@pytest.mark.parametrize("ranks", [[0], [0, 1, 1, 2], [0, 2, 3]])
def test_a_tensor_that_is_not_covered_exactly_once_is_listed(ranks: list[int]) -> None:
    reports = [written(number, [row("w", rank, 3)] if rank < 3 else []) for number, rank in enumerate(ranks)]
    index = assembled(*reports)

    with pytest.raises(SaveFailedError, match="'w' is not tiled"):
        check_against_plan(planned(index), index)


def test_a_piece_beyond_its_shard_is_a_failed_save() -> None:
    report = written(0, [row("w", 0, 1)])
    index = assembled(replace(report, start=report.start + 1))

    with pytest.raises(SaveFailedError, match=r"'w' has a piece .* that leaves the tensor or its shard"):
        check_against_plan(planned(index), index)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match="lone surrogates") as caught:
        written(0, [], values={"a\udc80": 1}).encode()

    assert caught.value.key == "a\udc80"
