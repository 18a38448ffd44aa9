"""Small models, a training of them that depends on its steps alone, and the bits of whatever a state holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

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


# -- schedulers ---


def _warmed_up(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[4])


def _chained(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


class Decay:
    """A callable with state."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "ChainedScheduler": _chained,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR with a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR with an object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.8)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 7]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": _warmed_up,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}
