"""Build one trained model and its optimizer, whole from a seed, then sharded in any of PyTorch's layouts.

    reference(seed) ──▶ Reference: every full tensor, bit for bit, without a process group
    build(layout, seed) ──▶ Replica: this rank's part of the same, in a layout
    Replica.full() ──▶ Reference again, gathered by PyTorch alone

The optimizer's state is not trained in the layout: reductions differ in their last bits with the number of ranks, and
then no full tensor would be known. Nothing here imports cloudckpt, so that what it compares with is not its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=False)


class Uneven(nn.Module):
    """First dimensions that no world divides, a row smaller than the world, scalars, buffers, a tied weight, bfloat16.

    FSDP wants one dtype per unit, and tied weights in the same unit: `embed` and `head` belong to the root.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.five = nn.Linear(3, 5)
        self.seven = nn.Linear(5, 7)
        self.one = nn.Linear(7, 1)
        self.low = nn.Linear(6, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    # The submodules that FSDP shards as units of their own.
    unit_names = ("five", "seven", "one", "low")

    def scalars(self) -> list[nn.Parameter]:
        """What FSDP must ignore, because it shards no scalars."""
        return [self.scale]

    def tensor_parallel(self) -> dict[str, Any]:
        first = {"five": ColwiseParallel(), "seven": RowwiseParallel()}
        return first | {"one": ColwiseParallel(), "low": RowwiseParallel()}


class Tall(nn.Module):
    """Many parameters of one size, to see how bytes spread over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(16))

    unit_names = tuple(f"layers.{number}" for number in range(16))

    def scalars(self) -> list[nn.Parameter]:
        return []

    def tensor_parallel(self) -> dict[str, Any]:
        return {"layers.*": ColwiseParallel()}


KINDS: dict[str, Callable[[], nn.Module]] = {"uneven": Uneven, "tall": Tall}


@dataclass
class Reference:
    """Full tensors by name: what every layout stands for.

    Attributes:
        tensors: the module's state_dict, tied names both.
        state: parameter → its optimizer state.
        groups: the options of each parameter group, with the names in it.
    """

    tensors: dict[str, torch.Tensor]
    state: dict[str, dict[str, torch.Tensor]]
    groups: list[dict[str, Any]]


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        values = torch.randn(tensor.shape, generator=generator) * 100
        tensor.data.copy_(values.to(tensor.dtype))


def whole(kind: str, seed: int) -> nn.Module:
    """Return the full module with values that depend on the seed alone."""
    module = KINDS[kind]()
    _fill(module, torch.Generator().manual_seed(seed))
    return module


def optimizer_of(module: nn.Module, *, seed: int = 0) -> torch.optim.AdamW:
    """Return a fresh optimizer with two groups: whole units, since an FSDP1 flat parameter is in one group."""
    late = [parameter for name, parameter in module.named_parameters() if _is_late(name)]
    early = [parameter for name, parameter in module.named_parameters() if not _is_late(name)]
    first = {"params": early, "lr": 0.01 + seed / 64, "betas": (0.75, 0.5 + seed / 64)}
    # One by one: the scalar that FSDP ignores is no DTensor, and foreach takes no mixture.
    return torch.optim.AdamW([first, {"params": late, "lr": 0.5, "weight_decay": seed / 32}], foreach=False)


def _is_late(name: str) -> bool:
    """Tell which parameters get their first gradient later, so that counters of steps differ."""
    return any(part in ("low", "one", "3") for part in name.split("."))


def reference(kind: str, seed: int) -> Reference:
    """Return the full state after three steps with made-up gradients."""
    module = whole(kind, seed)
    optimizer = optimizer_of(module, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    for step in range(3):
        for name, parameter in module.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if step == 0 and _is_late(name) else gradient
        optimizer.step()
    return _plain_reference(module, optimizer)


def _plain_reference(module: nn.Module, optimizer: torch.optim.Optimizer) -> Reference:
    names: dict[torch.Tensor, str] = {parameter: clean(name) for name, parameter in module.named_parameters()}
    return Reference(
        tensors={clean(name): _full(tensor) for name, tensor in module.state_dict().items()},
        state={
            names[parameter]: {key: _full(value) for key, value in of_parameter.items()}
            for parameter, of_parameter in optimizer.state.items()
        },
        groups=[
            {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
        ],
    )


def clean(name: str) -> str:
    """Drop what wrappers put into a parameter's name."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def _full(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


# -- layouts -----------------------------------------------------------------------------------------------------


def _mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def _fully_sharded(module: Any, mesh: DeviceMesh) -> nn.Module:
    for name in module.unit_names:
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=set(module.scalars()))
    return module  # type: ignore[no-any-return]


def _fsdp2(module: Any) -> nn.Module:
    return _fully_sharded(module, _mesh(dist.get_world_size()))


def _hsdp(module: Any) -> nn.Module:
    return _fully_sharded(module, _mesh(2, dist.get_world_size() // 2))


def _tp(module: Any) -> nn.Module:
    return parallelize_module(module, _mesh(dist.get_world_size()), module.tensor_parallel())


def _two_dimensional(module: Any) -> nn.Module:
    mesh = _mesh(dist.get_world_size() // 2, 2)
    return _fully_sharded(parallelize_module(module, mesh["inner"], module.tensor_parallel()), mesh["outer"])


def _fsdp1(module: Any, **options: Any) -> nn.Module:
    def wrap(part: nn.Module, **more: Any) -> nn.Module:
        return FullyShardedDataParallel(part, device_id=torch.device("cpu"), **options, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of FSDP1 as a whole, and of one rank
        for name in module.unit_names:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, wrap(module.get_submodule(name)))
        return wrap(module, ignored_states=module.scalars())


LAYOUTS: dict[str, Callable[[Any], nn.Module]] = {
    "single": lambda module: module,
    "ddp": DistributedDataParallel,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp": _tp,
    "2d": _two_dimensional,
    "fsdp1": lambda module: _fsdp1(module, use_orig_params=True),
    "fsdp1flat": lambda module: _fsdp1(module, use_orig_params=False),
    "fsdp1mesh": lambda module: _fsdp1(module, use_orig_params=True, device_mesh=_mesh(dist.get_world_size())),
}


@dataclass
class Replica:
    """This rank's part of a model and its optimizer."""

    layout: str
    module: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def is_fsdp1(self) -> bool:
        return self.layout.startswith("fsdp1")

    def full(self) -> Reference:
        """Gather the full state on every rank, with what PyTorch has for it."""
        if not self.is_fsdp1:
            return _plain_reference(self.module, self.optimizer)
        with _quiet():
            found = get_optimizer_state_dict(self.module, self.optimizer, options=WHOLE)
            tensors = get_model_state_dict(self.module, options=WHOLE)
        return Reference(tensors=tensors, state=found["state"], groups=found["param_groups"])  # type: ignore[arg-type]


def _quiet() -> warnings.catch_warnings[Any]:
    """Silence what FSDP1 says of the functions that it calls itself."""
    return warnings.catch_warnings(action="ignore")


def blank(layout: str, kind: str, seed: int) -> Replica:
    """Return a replica with values of its own and a fresh optimizer, for a restore to fill."""
    module = LAYOUTS[layout](whole(kind, seed))
    return Replica(layout, module, optimizer_of(module))


def build(layout: str, kind: str, seed: int) -> Replica:
    """Return this rank's part of `reference(kind, seed)`."""
    wanted = reference(kind, seed)
    module = _laid_out(layout, kind, wanted.tensors)
    optimizer = optimizer_of(module, seed=seed)
    if layout.startswith("fsdp1"):
        given: Any = {"state": wanted.state, "param_groups": wanted.groups}
        with _quiet():
            set_optimizer_state_dict(module, optimizer, given, options=WHOLE)
    else:
        _give_state(optimizer, module, layout, kind, wanted.state)
    return Replica(layout, module, optimizer)


def _laid_out(layout: str, kind: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    module = KINDS[kind]()
    module.load_state_dict(tensors)
    return LAYOUTS[layout](module)


def _give_state(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    layout: str,
    kind: str,
    state: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Shard the optimizer's state as the parameters of a twin are sharded: not every placement can be asked for."""
    twins = {
        key: {clean(name): tensor.detach() for name, tensor in _laid_out(layout, kind, values).named_parameters()}
        for key, values in _moments(kind, state)
    }
    for name, parameter in module.named_parameters():
        own = state[clean(name)]
        moments = {key: twin[clean(name)] for key, twin in twins.items()}
        optimizer.state[parameter] = {"step": own["step"].clone(), **moments}


def _moments(
    kind: str, state: Mapping[str, Mapping[str, torch.Tensor]]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the parts of the state that are as large as their parameter, each as the state_dict of a module."""
    for key in ("exp_avg", "exp_avg_sq"):
        twin = KINDS[kind]()
        for name, parameter in twin.named_parameters():
            parameter.data = state[name][key]
        yield key, twin.state_dict()


# -- comparing ---------------------------------------------------------------------------------------------------


def is_same(one: object, other: object) -> bool:
    """Compare nested values, tensors by dtype, shape and bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and one == other


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(found: Reference, wanted: Reference) -> list[str]:
    """Name everything that is not the same, and what only one of the two has."""
    return [
        *_differing("model", found.tensors, wanted.tensors),
        *_differing("state", found.state, wanted.state),
        *_differing("options", _options(found), _options(wanted)),
    ]


def _options(of: Reference) -> dict[str, dict[str, Any]]:
    """The options of each parameter's group, by the parameter's name."""
    return {
        name: {key: value for key, value in group.items() if key != "params"}
        for group in of.groups
        for name in group["params"]
    }


def _differing(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*wanted, *found])
    return [f"{what} {name}" for name in names if not is_same(found.get(name), wanted.get(name))]
