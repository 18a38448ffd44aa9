"""A model that was built on the meta device and sharded there gets memory, and what was saved, on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import cloudckpt
from cloudckpt import StateMismatchError
from tests.ranks.processes import run


class Tower(nn.Module):
    """Layers of which two share a weight, and a buffer that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.layers[0].weight  # type: ignore[assignment]
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        out: torch.Tensor = self.head(self.norm(x)) * self.scale
        return out


def sharded(model: Tower) -> Tower:
    fully_shard(model.layers[1])
    fully_shard(model)
    return model


def restored(url: Path, expected: Path) -> list[str]:
    """Restore a tower built on the meta device; return what differs from the one that was saved."""
    with torch.device("meta"):
        model = sharded(Tower())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    try:
        cloudckpt.load({"model": model, "optimizer": optimizer}, url)
    except StateMismatchError as exc:
        problems = [] if "model.layers.1.weight is on the meta device" in str(exc) else [str(exc)]
    else:
        problems = ["a model without memory was restored"]
    cloudckpt.load({"model": model, "optimizer": optimizer}, url, materialize="cpu")
    wanted = torch.load(expected, weights_only=False)
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(full, wanted["model"][name]):
            problems.append(name)
    if model.head.weight is not model.layers[0].weight:
        problems.append("the weights are not tied any more")
    if not model.scale.is_meta:
        problems.append("scale was made up")
    model.scale = torch.full((1,), 2.0)
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    if not torch.equal(model.head.weight.full_tensor(), wanted["next"]):  # type: ignore[operator]
        problems.append("the next step differs")
    return problems


def test_a_sharded_model_on_the_meta_device_gets_memory_and_goes_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    cloudckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    torch.save({"model": state, "next": model.head.weight.detach()}, tmp_path / "expected.pt")

    assert run(2, restored, tmp_path / "c", tmp_path / "expected.pt") == [[], []]
