"""Small models, a training of them that depends on its steps alone, and the bits of whatever a state holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import cloudckpt
from cloudckpt import Options
from cloudckpt.options import KIB

CUT = Options(shard_bytes=256, block_bytes=64, span_bytes=128, memory_budget_bytes=8 * KIB, concurrency=3)
State = dict[str, Any]


class Net(nn.Module):
    """Buffers, a normalization, a frozen and an unused parameter."""

    def __init__(self, *, is_reordered: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [
            ("first", nn.Linear(6, 8, dtype=dtype)),
            ("norm", nn.BatchNorm1d(8, dtype=dtype)),
            ("last", nn.Linear(8, 3, dtype=dtype)),
            ("frozen", nn.Linear(3, 3, dtype=dtype)),
            ("unused", nn.Linear(2, 2, dtype=dtype)),
        ]
        for name, part in reversed(parts) if is_reordered else parts:
            self.add_module(name, part)
        self.get_submodule("frozen").requires_grad_(requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden: torch.Tensor = self.frozen(self.last(torch.tanh(self.norm(self.first(x)))))  # type: ignore[operator]
        return hidden


class Matrices(nn.Module):
    """Two-dimensional parameters only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8, bias=False, dtype=dtype)
        self.two = nn.Linear(8, 3, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return result


def train(model: nn.Module, optimizer: Optimizer, *, begin: int, steps: int = 3) -> list[float]:
    """Take steps on data that depends on the step alone; return the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(begin, begin + steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        losses.append(loss.item())  # type: ignore[attr-defined]
    return losses


def bits(value: object) -> object:
    """Return nested state with every tensor as dtype and exact bytes."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        dense = value.detach().cpu().contiguous()
        return str(dense.dtype), tuple(dense.shape), dense.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [bits(child) for child in value]
    return value


def state_of(model: nn.Module, optimizer: Optimizer) -> object:
    return bits([dict(model.state_dict()), optimizer.state_dict()])


def check_goes_on(url: Path, make: Callable[[], tuple[nn.Module, Optimizer]], options: Options | None = None) -> None:
    """Train, save, train on; restore into new objects and train on: the same bits."""
    torch.manual_seed(1)
    model, optimizer = make()
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url, options=options)
    at_save = state_of(model, optimizer)
    losses = train(model, optimizer, begin=3)

    torch.manual_seed(2)
    again, fresh = make()
    memory = [parameter.data_ptr() for parameter in again.parameters()]
    cloudckpt.load({"model": again, "optimizer": fresh}, url, options=options)

    assert state_of(again, fresh) == at_save
    assert [parameter.data_ptr() for parameter in again.parameters()] == memory
    assert train(again, fresh, begin=3) == losses
    assert state_of(again, fresh) == state_of(model, optimizer)
