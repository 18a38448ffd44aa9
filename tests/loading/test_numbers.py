"""The numbers of a tensor are those of its elements, however it lies on the store, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.loading import groups_of, numbers, read_index, tensor_numbers
from cloudckpt.loading.numbers import TensorNumbers
from cloudckpt.root import Catalog
from cloudckpt.store import open_store


def numbers_of(tensor: torch.Tensor, path: Path, **options: object) -> TensorNumbers:
    cloudckpt.save({"pad": torch.ones(3, dtype=torch.int8), "t": tensor}, path, options=options, progress="off")
    with open_store(path) as store:
        checkpoint = Catalog(store).open()
        return tensor_numbers(store, checkpoint, read_index(Catalog(store), checkpoint), "t")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_they_are_torchs_own(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "_RUN_BYTES", 1_000)  # many runs, that end between blocks
    tensor = torch.randn(37, 101, dtype=torch.float64).add(3).to(dtype)
    tensor[5, :7], tensor[6, 0], tensor[6, 1] = torch.nan, torch.inf, -torch.inf
    found = numbers_of(tensor, tmp_path / "c", block_bytes=4096, shard_bytes=4096, span_bytes=4096)
    wide = tensor.double()
    finite = wide[wide.isfinite()]
    assert (found.dtype, found.shape) == (str(dtype).removeprefix("torch."), (37, 101))
    assert found.pieces > 1
    assert found.total_bytes == tensor.numel() * dtype.itemsize
    assert (found.nan_count, found.inf_count) == (7, 2)
    assert (found.minimum, found.maximum) == (-torch.inf, torch.inf)
    assert found.mean == pytest.approx(finite.mean().item(), rel=1e-12)
    assert found.std == pytest.approx(finite.std(correction=0).item(), rel=1e-12)


def test_whole_numbers_are_exact(tmp_path: Path) -> None:
    found = numbers_of(torch.tensor([2**62 + 1, -(2**62) - 1]), tmp_path / "c")
    assert (found.minimum, found.maximum) == (-(2**62) - 1, 2**62 + 1)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([True, False]), (0, 1, 0.5)),
        (torch.tensor(3.0), (3.0, 3.0, 3.0)),
        (torch.zeros(0, 4), (None, None, None)),
        (torch.full((2,), torch.nan), (None, None, None)),
        (torch.tensor([3 + 4j]), (None, None, 5.0)),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), (1.0, 2.0, 1.5)),
    ],
    ids=["bool", "0-d", "empty", "nan", "complex", "float8"],
)
def test_what_has_no_smallest_element_has_none(tmp_path: Path, tensor: torch.Tensor, expected: object) -> None:
    found = numbers_of(tensor, tmp_path / "c")
    assert (found.minimum, found.maximum, found.mean) == expected


def test_a_tensor_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    cloudckpt.save({"layer": {"weight": torch.ones(2)}}, tmp_path / "c", progress="off")
    with open_store(tmp_path / "c") as store:
        checkpoint = Catalog(store).open()
        index = read_index(Catalog(store), checkpoint)
        with pytest.raises(CheckpointNotFoundError, match=r"no tensor 'weight'; it has layer\.weight"):
            tensor_numbers(store, checkpoint, index, "weight")
        (group,) = groups_of(index, 1)
        assert (group.prefix, group.tensor_count, group.total_bytes, group.share) == ("layer", 1, 8, 1.0)
