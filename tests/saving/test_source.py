"""A rank's tensors are looked up once each, however many questions the upload has."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from cloudckpt.saving.source import Source, Staging


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
    source = Source(planner.create_local_plan().items, planner, attempt="0" * 16, shard_bytes=64)
    pieces = [piece for shard in source.shards for piece in shard.pieces]
    asked.clear()

    assert [source.is_staged(piece) for piece in pieces] == [source.chunks[piece.chunk].name == "b" for piece in pieces]
    room = Staging(memoryview(bytearray(1 << 10)))
    found = {
        name: b"".join(source.view(p, room) for p in pieces if source.chunks[p.chunk].name == name) for name in "ab"
    }

    assert found == {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}
    assert sorted(asked) == ["a", "b"]
