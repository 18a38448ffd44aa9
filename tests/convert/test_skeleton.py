"""PyTorch's writer makes all of a file but the tensors' bytes, whatever these would take."""

from __future__ import annotations

import pytest
import torch

from cloudckpt.convert.skeleton import Skeleton, hollow, place_of
from cloudckpt.format import DTYPES

TIB = 1 << 40


def test_a_file_larger_than_any_memory_is_laid_out() -> None:
    first, second, other = hollow([((TIB // 4,), torch.float32), ((3, 5), torch.float32), ((TIB // 8,), torch.int64)])
    made = Skeleton.of({"first": first, "second": torch.nn.Parameter(second), "other": other}, "x.pt")
    assert [hole.size_bytes for hole in made.holes] == [TIB, 60, TIB // 8 * 8]
    assert isinstance(made.read_back, dict)
    assert [place_of(made.read_back[name]) for name in ("first", "second", "other")] == [hole.at for hole in made.holes]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 7)])
def test_hollow_tensors_of_any_dtype_are_each_a_storage_of_their_own(shape: tuple[int, ...]) -> None:
    dtypes = [dtype for dtype in DTYPES.values() for _ in range(2)]
    made = hollow([(shape, dtype) for dtype in dtypes])
    assert [(tensor.shape, tensor.dtype) for tensor in made] == [(shape, dtype) for dtype in dtypes]
    whole = Skeleton.of(made, "x.pt")
    assert len(whole.holes) == (len(dtypes) if 0 not in shape else 0)
