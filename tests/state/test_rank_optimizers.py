"""Optimizer state that is distributed otherwise than its parameter comes back so, and the next step is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

import cloudckpt
from cloudckpt import StateMismatchError
from tests.ranks.processes import run
from tests.state.nets import Matrices, State, bits, train


class Factored(Optimizer):
    """Keeps means over rows and columns, an echo of the gradient on all ranks, and a plain count per row."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                square = parameter.grad.square() + 1e-3
                state = self.state[parameter]
                if not state:
                    state["row"] = square.mean(dim=1, keepdim=True)
                    state["column"] = _whole(square.mean(dim=0))
                    state["echo"] = _whole(square)
                    state["counts"] = torch.zeros(3, dtype=torch.int64)
                state["row"].lerp_(square.mean(dim=1, keepdim=True), 0.5)
                state["column"].lerp_(_whole(square.mean(dim=0)), 0.5)
                state["echo"].lerp_(_whole(square), 0.5)
                state["counts"] += 1
                parameter.sub_(group["lr"] * parameter.grad / (state["row"] * state["column"]).sqrt())
        return loss


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return tensor


LAYOUTS: dict[str, Callable[[nn.Module], object]] = {
    "single": lambda model: model,
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))),
    "hsdp": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copy", "shard"))),
    "nameless": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
}


def _parts(layout: str, seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = Matrices()
    LAYOUTS[layout](model)
    return model, Factored(model.parameters())


def _kinds(optimizer: Optimizer) -> list[dict[str, object]]:
    return [
        {key: str(part.placements) if isinstance(part, DTensor) else type(part).__name__ for key, part in state.items()}
        for state in optimizer.state.values()
    ]


def save(layout: str, url: Path) -> tuple[object, list[float], object]:
    torch.set_num_threads(1)
    model, optimizer = _parts(layout, 1)
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url)
    found = bits([optimizer.state[each] for each in model.parameters()]), _kinds(optimizer)
    losses = train(model, optimizer, begin=3)
    return found[0], losses, found[1]


def restore(layout: str, url: Path) -> tuple[object, list[float], object]:
    torch.set_num_threads(1)
    model, optimizer = _parts(layout, 2)
    cloudckpt.load({"model": model, "optimizer": optimizer}, url)
    found = bits([optimizer.state[each] for each in model.parameters()]), _kinds(optimizer)
    losses = train(model, optimizer, begin=3)
    return found[0], losses, found[1]


def on(layout: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return what the first rank returned."""
    if layout == "single":
        return function(layout, *args)
    return run(2, function, layout, *args)[0]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("nameless", "nameless"),
        ("single", "fsdp2"),
        ("fsdp2", "hsdp"),
        pytest.param("fsdp2", "fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2", "single", marks=pytest.mark.slow),
        pytest.param("hsdp", "fsdp2", marks=pytest.mark.slow),
        pytest.param("hsdp", "nameless", marks=pytest.mark.slow),
    ],
)
def test_state_of_another_shape_than_its_parameter_steps_on_in_any_layout(
    tmp_path: Path, there: str, here: str
) -> None:
    saved, losses, kinds = on(there, save, tmp_path / "c")
    found, again, restored = on(here, restore, tmp_path / "c")
    assert found == saved
    assert again == pytest.approx(losses, rel=1e-5)
    if there == here:
        assert (again, restored) == (losses, kinds)


class Sharing(torch.optim.SGD):
    """Shards the state of a parameter that every rank has."""


def save_sharded_state(_: str, url: Path) -> None:
    model = Matrices()
    optimizer = Sharing(model.parameters(), lr=0.1)
    mesh = init_device_mesh("cpu", (2,))
    optimizer.state[model.one.weight]["mine"] = DTensor.from_local(torch.ones(4, 1), mesh)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url)


def restore_sharded_state(_: str, url: Path) -> str:
    model = Matrices()
    with pytest.raises(StateMismatchError) as caught:
        cloudckpt.load({"model": model, "optimizer": Sharing(model.parameters(), lr=0.1)}, url)
    return str(caught.value)


def test_a_distributed_state_whose_parameter_is_not_is_refused_where_nobody_knows_its_mesh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    on("ranks", save_sharded_state, tmp_path / "c")
    assert "optimizer.state.model.one.weight.mine was a DTensor" in on("ranks", restore_sharded_state, tmp_path / "c")


# -- FSDP1 -------------------------------------------------------------------------------------------------------


class Scaled(torch.optim.SGD):
    """Keeps something beside the state of its parameters."""

    scale = 1.0

    def state_dict(self) -> State:
        return {**super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict: State) -> None:
        self.scale = state_dict.pop("scale")
        super().load_state_dict(state_dict)


def _flat(seed: int, dtype: torch.dtype) -> tuple[nn.Module, Scaled]:
    warnings.filterwarnings("ignore", module=r"torch\.")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = FullyShardedDataParallel(Matrices(dtype), device_id=torch.device("cpu"), use_orig_params=True)
    return model, Scaled(model.parameters(), lr=0.1, momentum=0.5)


def flat_round_trip(_: str, url: Path) -> tuple[float, bool]:
    model, optimizer = _flat(1, torch.float32)
    train(model, optimizer, begin=0)
    optimizer.scale = 8.0
    cloudckpt.save({"model": model, "optimizer": optimizer}, url)
    again, fresh = _flat(2, torch.float32)
    cloudckpt.load({"model": again, "optimizer": fresh}, url)
    is_same = train(again, fresh, begin=3) == train(model, optimizer, begin=3)
    return fresh.scale, is_same


def test_an_optimizer_of_an_fsdp1_module_keeps_what_it_says_beside_its_state(tmp_path: Path) -> None:
    assert on("ranks", flat_round_trip, tmp_path / "c") == (8.0, True)


def flat_keeps_what_is_missing(_: str, url: Path) -> tuple[bool, bool]:
    torch.manual_seed(1)
    inner = Matrices()
    inner.one, inner.two = (
        FullyShardedDataParallel(part, device_id=torch.device("cpu"), use_orig_params=True)
        for part in (inner.one, inner.two)
    )
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    one, two = model.parameters()
    optimizer = torch.optim.Adam([one])
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url)
    other = torch.optim.Adam([{"params": [one]}, {"params": [two], "lr": 0.5}])
    train(model, other, begin=5)
    kept = bits(other.state[two])
    cloudckpt.load({"model": model, "optimizer": other}, url, strict=False)
    return bits(other.state[two]) == kept, bits(other.state[one]) == bits(optimizer.state[one])


def test_not_strict_leaves_the_state_that_the_checkpoint_of_an_fsdp1_module_lacks(tmp_path: Path) -> None:
    assert on("ranks", flat_keeps_what_is_missing, tmp_path / "c") == (True, True)


class Counting(torch.optim.SGD):
    """Keeps a count in int64 for each parameter, and a sum in float64."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("count", torch.tensor(2**40 + 1))
            state.setdefault("sum", torch.zeros_like(parameter, dtype=torch.float64)).add_(1 / 3)
        return loss


def flat_keeps_types(_: str, url: Path) -> bool:
    model, _ = _flat(1, torch.float32)
    optimizer, other = (Counting(model.parameters(), lr=0.1) for _ in range(2))
    train(model, optimizer, begin=0)
    cloudckpt.save({"model": model, "optimizer": optimizer}, url)
    cloudckpt.load({"model": model, "optimizer": other}, url)
    # A rank has no state for what FSDP1 keeps wholly on other ranks.
    here = [parameter for parameter in model.parameters() if parameter.numel()]
    return bits([other.state[each] for each in here]) == bits([optimizer.state[each] for each in here])


def test_state_of_an_fsdp1_module_keeps_its_types(tmp_path: Path) -> None:
    assert on("ranks", flat_keeps_types, tmp_path / "c")
