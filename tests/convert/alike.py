"""Compare nested states bit for bit, and make the state that most tests here convert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cloudckpt.format import DTYPES


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as they lie in row-major order."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_alike(one: Any, other: Any, *, types: bool = True, way: str = "") -> None:
    """Assert that two nested states hold the same, tensors bit for bit; with `types` also types and order."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), way
        assert (one.dtype, one.shape) == (other.dtype, other.shape), way
        assert bits(one) == bits(other), way
    elif isinstance(one, dict):
        mine, theirs = ({str(key): value for key, value in some.items()} for some in (one, other))
        assert (list(mine) == list(theirs)) if types else (mine.keys() == theirs.keys()), way
        for key, value in mine.items():
            assert_alike(value, theirs[key], types=types, way=f"{way}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), way
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, types=types, way=f"{way}.{place}")
    else:
        assert one == other, way
    assert not types or isinstance(one, torch.Tensor) or type(one) is type(other), way


def of_every_dtype() -> dict[str, torch.Tensor]:
    """Return a vector, a scalar and an empty tensor of every dtype, and one whose memory lies otherwise."""
    found = {}
    for name, dtype in DTYPES.items():
        size = 24 * dtype.itemsize
        raw = (torch.arange(size, dtype=torch.int64) % 2).to(torch.uint8) if name == "bool" else torch.arange(size)
        flat = raw.to(torch.uint8).view(dtype)
        found[f"{name}.vector"] = flat
        found[f"{name}.scalar"] = flat[3]
        found[f"{name}.empty"] = flat[:0].view(0, 3)
        found[f"{name}.strided"] = flat.view(4, 6).T
    return found


def training(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Return a model, its optimizer and scheduler after some steps."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for _ in range(steps):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler
