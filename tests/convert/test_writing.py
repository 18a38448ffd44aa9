"""A file is written in any order, from pieces however they lie, and its sums are those of its bytes."""

from __future__ import annotations

import itertools
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import cloudckpt
from cloudckpt.convert import Kind, dcp_metadata, export, import_, opened, writing
from cloudckpt.format import ChunkEntry
from tests.convert.alike import assert_alike


@pytest.mark.parametrize("sizes", [[], [5], [1, 0, 7], [4096, 3, 70_000, 1]], ids=str)
def test_the_sum_of_parts_is_that_of_the_whole_in_whatever_order_they_come(sizes: list[int]) -> None:
    parts = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    starts = list(itertools.accumulate(sizes, initial=0))
    total = writing._Sum()
    for number in sorted(range(len(parts)), key=lambda number: -number % 3):
        total.add(starts[number], memoryview(parts[number]))
    assert total.value() == zlib.crc32(b"".join(parts))


def test_a_piece_is_written_as_one_only_where_its_bytes_lie_together() -> None:
    shape = (2, 3, 1, 4)
    numbers = np.arange(24).reshape(shape)
    cuts = [[(start, stop - start) for start in range(n) for stop in range(start + 1, n + 1)] for n in shape]
    for axes in itertools.product(*cuts):
        offsets, sizes = zip(*axes, strict=True)
        box = numbers[tuple(slice(start, start + size) for start, size in axes)].ravel()
        is_one = bool((np.diff(box) == 1).all())
        found = writing._first_byte(ChunkEntry(offsets, sizes, 0, 0, 0), shape, 2)
        assert found == (2 * int(box[0]) if is_one else None), axes


def saved_in_columns(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return a state and the checkpoint of it, as ranks write it that have some columns of a tensor each."""
    state = {"columns": torch.randn(6, 10), "whole": torch.randn(7), "none": torch.empty(0, 3)}
    stored = {"columns": [(0, 4), (4, 3), (7, 3)], "whole": [(0, 7)], "none": [(0, 3)]}
    described, places = {}, {}
    data = b""
    for name, tensor in state.items():
        chunks = []
        for start, size in stored[name]:
            part = tensor[..., start : start + size].clone()
            offsets = (*(0 for _ in part.shape[:-1]), start)
            path = folder / "part"
            torch.save(part, path)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            places[MetadataIndex(name, offsets)] = dcp_metadata.Place("__0_0.distcp", len(data), path.stat().st_size)
            data += path.read_bytes()
        described[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    source = folder / "source"
    source.mkdir()
    (source / "__0_0.distcp").write_bytes(data)
    (source / ".metadata").write_bytes(dcp_metadata.encode_metadata(Metadata(described), places))  # type: ignore[arg-type]
    return state, import_(source, folder / "saved", progress="off").url


@pytest.mark.parametrize(
    ("to", "target"), [("safetensors", "x.safetensors"), ("huggingface", "hf"), ("torch", "x.pt"), ("dcp", "dcp")]
)
def test_an_export_holds_tensors_whose_pieces_lie_across_their_rows(
    to: Kind, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "PART_BYTES", 48)
    state, url = saved_in_columns(tmp_path)
    export(url, tmp_path / target, to=to, progress="off")
    import_(tmp_path / target, tmp_path / "back", progress="off")
    assert_alike(state, cloudckpt.read(tmp_path / "back", progress="off"), types=False)
