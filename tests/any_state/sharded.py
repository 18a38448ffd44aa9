"""Describe and build random states of two ranks, each module in a layout of its own, and gather them again.

    rank_recipes() ──▶ RankRecipe ──build(recipe, seed)──▶ Part ──look──▶ every full tensor, on every rank

A part whose layouts are all `plain` is built without any other rank: it says what the others are to be. Gradients are
made up and optimizers work element by element, so that no reduction makes last bits differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Generator, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.any_state.looking import bits
from tests.any_state.modules import Bank, Buffers, Extra, Tied

SIZE = 2


def _norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 5),
    "uneven": lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3, bias=False)),
    "tied": Tied,
    "batch norm": _norm,
    "buffers": lambda: nn.Sequential(nn.Linear(4, 2), Buffers()),
    "extra state": Extra,
    "growing buffer": lambda: nn.Sequential(nn.Linear(4, 4), Bank()),
    "half": lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, foreach=False),
}


def _mesh(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks))


def _own_mesh() -> DeviceMesh:
    """A mesh of this rank alone: each rank has its own."""
    return init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("outer", "inner"))["inner"]


def _ddp(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return DistributedDataParallel(module, init_sync=False)


LAYOUTS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda module: module,
    "ddp": _ddp,
    "fsdp2": lambda module: fully_shard(module, mesh=_mesh(0, 1)),
    "fsdp2 of one": lambda module: fully_shard(module, mesh=_own_mesh()),
    "hsdp": lambda module: fully_shard(
        module, mesh=init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("outer", "inner"))
    ),
}
VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda tensor: tensor,
    "rows": lambda tensor: _distributed(tensor, _mesh(0, 1), [Shard(0)]),
    "columns": lambda tensor: _distributed(tensor, _mesh(0, 1), [Shard(1)]),
    "replicated": lambda tensor: _distributed(tensor, _mesh(0, 1), [Replicate()]),
    "reversed": lambda tensor: _distributed(tensor, _mesh(1, 0), [Shard(0)]),
    "own mesh": lambda tensor: _distributed(tensor, _own_mesh(), [Shard(0)]),
    "first alone": lambda tensor: _distributed(tensor, _mesh(0), [Shard(0)]),
    "second alone": lambda tensor: _distributed(tensor, _mesh(1), [Shard(0)]),
}


def _distributed(tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


@dataclass(frozen=True)
class RankRecipe:
    """A state of two ranks.

    Attributes:
        modules: kind, layout when saved, layout of the twin.
        values: shape, layout when saved, layout of the twin.
        differs: what the ranks do not have alike: the `state` of an object, the `buffers` of a plain module, or of
            one in DDP (`ddp buffers`, where rank 0's are right), or the `order` of their names.
        is_tied: whether the object's tensor is a parameter of the first module.
    """

    modules: tuple[tuple[str, str, str], ...]
    optimizer: str = "SGD"
    is_split: bool = False
    values: tuple[tuple[tuple[int, ...], str, str], ...] = ()
    steps: int = 0
    twin_steps: int = 0
    differs: str = "nothing"
    is_tied: bool = False

    @property
    def is_refused(self) -> bool:
        """Whether it is no state that all ranks have alike."""
        return self.differs in ("state", "buffers")

    def plain(self) -> RankRecipe:
        """Return the same in one process."""
        modules = tuple((kind, "plain", "plain") for kind, _, _ in self.modules)
        values = tuple((shape, "plain", "plain") for shape, _, _ in self.values)
        return replace(self, modules=modules, values=values, differs="nothing")


@st.composite
def rank_recipes(draw: st.DrawFn) -> RankRecipe:
    """Draw a state of two ranks."""
    layouts = st.sampled_from(list(LAYOUTS))
    modules = draw(st.lists(st.tuples(st.sampled_from(list(MODULES)), layouts, layouts), min_size=1, max_size=2))
    places = st.sampled_from(list(VALUES))
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return RankRecipe(
        modules=tuple(modules),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        is_split=draw(st.booleans()),
        values=tuple(draw(st.lists(st.tuples(shapes, places, places), max_size=2))),
        steps=draw(st.integers(0, 2)),
        twin_steps=draw(st.integers(0, 1)),
        differs=draw(st.sampled_from(["nothing", "nothing", "state", "buffers", "ddp buffers", "order"])),
        is_tied=draw(st.booleans()),
    )


class Count:
    """An object with a tensor that is the same on all ranks, or is not."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


@dataclass
class Part:
    """What one rank has of a state."""

    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    count: Count = field(default_factory=lambda: Count(torch.zeros(2)))
    values: list[torch.Tensor] = field(default_factory=list)

    def state(self, *, is_turned: bool = False) -> dict[str, Any]:
        """Return what is saved; turned, its names stand in another order."""
        named: dict[str, Any] = {f"m{place}": module for place, module in enumerate(self.modules)}
        named |= {f"o{place}": optimizer for place, optimizer in enumerate(self.optimizers)}
        values = {f"v{place}": value for place, value in enumerate(self.values)}
        named |= {"count": self.count, "values": values, "config": {"a": 1, "b": {"c": 2, "d": 3}}}
        return _turned(named) if is_turned else named


def _turned(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _turned(child) for key, child in reversed(value.items())}


def build(recipe: RankRecipe, seed: int, *, is_twin: bool = False) -> Part:
    """Build this rank's part of a state whose full tensors depend on the seed."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    part = Part(count=Count(torch.rand(3, generator=generator)))
    for kind, saved, restored in recipe.modules:
        part.modules.append(LAYOUTS[restored if is_twin else saved](MODULES[kind]()))
    for module in part.modules:
        parameters = [each for each in module.parameters() if each.numel()]
        whole: Any = (
            [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}] if recipe.is_split else parameters
        )
        part.optimizers.append(OPTIMIZERS[recipe.optimizer](whole))
    for shape, saved, restored in recipe.values:
        part.values.append(VALUES[restored if is_twin else saved](torch.rand(shape, generator=generator)))
    for step in range(recipe.twin_steps if is_twin else recipe.steps):
        train(part, seed * 100 + step)
    if recipe.is_tied:
        part.count.tensor = next(part.modules[0].parameters()).detach()
    return part


def make_differ(part: Part, recipe: RankRecipe) -> bool:
    """Make this rank's part another one, as the recipe says; return whether there was something to be changed."""
    rank = dist.get_rank()
    if recipe.differs == "state":
        part.count.tensor = part.count.tensor + rank
        return True
    wanted = {"buffers": "plain", "ddp buffers": "ddp"}.get(recipe.differs)
    found = False
    for module, (_, layout, _) in zip(part.modules, recipe.modules, strict=True):
        for buffer in module.buffers() if layout == wanted else ():
            found |= buffer.dtype == torch.float32 and buffer.numel() > 0
            if buffer.dtype == torch.float32:
                buffer.add_(rank)
    return found


def train(part: Part, seed: int) -> None:
    """Take a step with gradients that depend on the seed and on names alone, and change buffers and values."""
    generator = Generator().manual_seed(seed)
    for module, optimizer in zip(part.modules, part.optimizers, strict=True):
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = gradient
            if isinstance(parameter, DTensor):
                parameter.grad = _distributed(gradient, parameter.device_mesh, list(parameter.placements))
        optimizer.step()
        optimizer.zero_grad()
        for buffer in module.buffers():
            if buffer.dtype == torch.float32:
                buffer.mul_(2)
        for inner in module.modules():
            if isinstance(inner, Extra):
                inner.history.append(torch.full((len(inner.history) + 1,), float(seed)))
            if isinstance(inner, Bank):
                inner.bank = torch.cat([inner.bank, inner.bank[-1:] + 1])


def look(part: Part) -> dict[str, Any]:
    """Return all full tensors by name, as plain data; every rank calls it."""
    found: dict[str, Any] = {"count": bits(_full(part.count.state_dict()))}
    for place, (module, optimizer) in enumerate(zip(part.modules, part.optimizers, strict=True)):
        found[f"m{place}"] = {_clean(name): bits(_full(value)) for name, value in module.state_dict().items()}
        names: Mapping[int, str] = {id(each): _clean(name) for name, each in module.named_parameters()}
        state = {names[id(each)]: bits(_full(own)) for each, own in optimizer.state.items()}
        options = {
            names[id(each)]: bits({key: value for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
            for each in group["params"]
        }
        found[f"o{place}"] = {"state": state, "options": options}
    for place, value in enumerate(part.values):
        found[f"v{place}"] = bits(_full(value))
    return found


def _clean(name: str) -> str:
    return name.removeprefix("module.")


def _full(value: Any) -> Any:
    """Return a value with every DTensor in it whole: what one rank alone has is told to the other."""
    if isinstance(value, dict):
        return {key: _full(child) for key, child in value.items()}
    if not isinstance(value, DTensor):
        return value
    ranks = value.device_mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):  # torch's own way puts the ranks' parts into the order of their numbers
        parts: list[Any] = [None] * SIZE
        dist.all_gather_object(parts, value.to_local().clone())
        return torch.cat([parts[rank] for rank in ranks])
    if len(ranks) == SIZE or value.device_mesh.mesh_dim_names:  # all ranks have it, or each has its own
        return value.detach().full_tensor()
    whole = value.to_local().clone() if dist.get_rank() in ranks else torch.empty(value.shape, dtype=value.dtype)
    dist.broadcast(whole, ranks[0])
    return whole
