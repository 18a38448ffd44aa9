"""A rank's tensors are looked up once each, however many questions the upload has."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from cloudckpt.errors import UnsupportedValueError
from cloudckpt.saving.source import Source, Staging, check_tensor


def test_a_tensor_is_looked_up_once_from_the_question_how_it_goes_to_its_last_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = {"a": torch.arange(64.0), "b": torch.ones(4, 4).t()}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(state, None, True)
    asked: list[str] = []
    look_up = DefaultSavePlanner.lookup_object

    def noting(self: DefaultSavePlanner, index: object) -> object:
        asked.append(index.fqn)  # type: ignore[attr-defined]
        return look_up(self, index)  # type: ignore[arg-type]

    monkeypatch.setattr(DefaultSavePlanner, "lookup_object", noting)
    source = Source.planned(planner.create_local_plan().items, planner, attempt="0" * 16, shard_bytes=64)
    pieces = [piece for shard in source.shards for piece in shard.pieces]
    asked.clear()

    staged = [source.staging_bytes([piece]) > 0 for piece in pieces]

    assert staged == [source.chunks[piece.chunk].name == "b" for piece in pieces]
    room = Staging(memoryview(bytearray(1 << 10)))
    found = {
        name: b"".join(source.view(p, room) for p in pieces if source.chunks[p.chunk].name == name) for name in "ab"
    }

    assert found == {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}
    assert sorted(asked) == ["a", "b"]


class _Named(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3),
        torch.nn.Parameter(torch.ones(2, 2).t()),
        torch.ones(0),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3).as_subclass(_Named),
    ],
    ids=["plain", "parameter", "empty", "conjugated", "subclass"],
)
def test_a_dense_tensor_is_taken_whatever_look_it_needs(tensor: torch.Tensor) -> None:
    check_tensor("a", tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.nn.LazyLinear(2).weight,
    ],
    ids=["sparse", "meta", "lazy"],
)
def test_a_tensor_of_a_plain_type_that_is_not_dense_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedValueError, match="tensor 'a'"):
        check_tensor("a", tensor)


def test_a_plain_tensor_that_is_a_part_of_another_is_refused() -> None:
    tensor = torch.ones(3)
    for attribute in ("global_shape", "global_offsets", "local_offsets", "local_sizes"):
        setattr(tensor, attribute, (3,))
    with pytest.raises(UnsupportedValueError, match="part of a larger one"):
        check_tensor("a", tensor)


def test_a_plain_tensor_whose_storage_was_freed_is_refused() -> None:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedValueError, match="has no memory"):
        check_tensor("a", tensor)
