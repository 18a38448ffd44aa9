"""Modules that people have, each with something that a checkpoint may lose, and what is wrapped around them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

WIDTH = 4


class Tied(nn.Module):
    """One weight with two names, which stand in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(self.one(x))
        return out


class Buffers(nn.Module):
    """Buffers of all kinds: persistent or not, None, counters, none of one element, none that is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.rand(WIDTH) > 0.5)
        self.register_buffer("wave", torch.rand(3, dtype=torch.complex64))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.rand(2, 3).t())
        self.register_buffer("cache", torch.rand(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x


class Named(nn.Module):
    """Containers of parameters, and names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"_orig": nn.Linear(WIDTH, WIDTH), "module": nn.Linear(WIDTH, WIDTH)})
        self.many = nn.ParameterList(nn.Parameter(torch.rand(shape)) for shape in [(), (0,), (3, 2)])
        self.by_name = nn.ParameterDict({"b": torch.rand(2), "a": torch.rand(1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module["module"](self.module["_orig"](x))
        return out


class Recurrent(nn.Module):
    """A recurrent layer, whose forward gives two things."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.cell(x)[0]
        return out


class Extra(nn.Linear):
    """State of its own beside its tensors, which grows."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.history: list[torch.Tensor] = []

    def get_extra_state(self) -> object:
        return {"history": list(self.history), "count": len(self.history)}

    def set_extra_state(self, state: Any) -> None:
        self.history = list(state["history"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(torch.full((len(self.history) + 1,), float(len(self.history))))
        return super().forward(x)


class ExtraTensor(nn.Linear):
    """A tensor for state of its own."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.own = torch.rand(2)

    def get_extra_state(self) -> torch.Tensor:
        return self.own

    def set_extra_state(self, state: Any) -> None:
        self.own.zero_()
        self.own.copy_(state)


class Bank(nn.Module):
    """A buffer that grows in use, and that its own loading gives the size that was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.rand(1, 2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}bank" in state_dict:
            self.bank = torch.empty_like(state_dict[f"{prefix}bank"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bank = torch.cat([self.bank, self.bank[-1:] + 1])
        return x


class Versioned(nn.Linear):
    """Stores its weight halved since version 2; what is older is not, and is upgraded when it is loaded."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.upgrades = 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] / 2
            self.upgrades += 1
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Hooked(nn.Linear):
    """Renames and adds keys in hooks, as adapters of other libraries do."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.scale = 1.5
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: Any, state_dict: Any, prefix: str, metadata: Any) -> None:
        state_dict[f"{prefix}kernel"] = state_dict.pop(f"{prefix}weight").t()
        state_dict[f"{prefix}scale"] = torch.tensor(module.scale)

    @staticmethod
    def _rename_back(module: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").t()
        module.scale = float(state_dict.pop(f"{prefix}scale"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale += 0.25
        return super().forward(x)


def _parametrized(way: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings(action="ignore"):
            return way(nn.Linear(WIDTH, WIDTH))

    return make


def _lazy() -> nn.Module:
    module = nn.LazyLinear(WIDTH)
    module(torch.rand(2, WIDTH))
    return module


def _channels_last() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (WIDTH, 1, 1)), nn.Conv2d(WIDTH, WIDTH, 1).to(memory_format=torch.channels_last), nn.Flatten()
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False)),
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "batch norm without statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "tied": Tied,
    "buffers": Buffers,
    "named": Named,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "lazy": _lazy,
    "extra state": Extra,
    "extra tensor": ExtraTensor,
    "growing buffer": Bank,
    "versioned": Versioned,
    "hooked": Hooked,
    "no parameters": nn.ReLU,
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False),
    "channels last": _channels_last,
    "weight norm": _parametrized(nn.utils.parametrizations.weight_norm),
    "old weight norm": _parametrized(nn.utils.weight_norm),
    "orthogonal": _parametrized(nn.utils.parametrizations.orthogonal),
    "spectral norm": _parametrized(nn.utils.parametrizations.spectral_norm),
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0),
    "averaged": lambda: AveragedModel(nn.Linear(WIDTH, WIDTH)),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FLOAT32_ALONE = {
    "buffers",
    "orthogonal",
    "spectral norm",
    "lstm",
    "gru",
    "hooked",
    "attention",
}  # what their forward can do
_WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "submodule": nn.Sequential,
}


def wrapped(module: nn.Module, wraps: Sequence[str]) -> nn.Module:
    for wrap in wraps:
        module = _WRAPS[wrap](module)
    return module


def clean_names(module: nn.Module) -> dict[int, str]:
    """Return the id of each parameter and buffer → its first name, without what wrappers add."""
    named = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    names: dict[int, str] = {}
    for path, tensor in sorted(named, key=lambda pair: clean(module, pair[0])):
        names.setdefault(id(tensor), clean(module, path))
    return names


def clean(module: nn.Module, path: str) -> str:
    """Drop what wrappers add to a name, by what stands there and not by how it is spelled."""
    kept, here = [], module
    for step in path.split("."):
        while isinstance(here, CheckpointWrapper) and step != "_checkpoint_wrapped_module":
            here = here._checkpoint_wrapped_module  # its hook keeps it out of the names of a state_dict
        is_wrapper = (step == "_orig_mod" and isinstance(here, OptimizedModule)) or (
            step == "_checkpoint_wrapped_module" and isinstance(here, CheckpointWrapper)
        )
        kept += [] if is_wrapper else [step]
        here = getattr(here, step, here) if step else here
    return ".".join(kept)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what wrappers were given, so that nothing is compiled."""
    while isinstance(module, OptimizedModule | CheckpointWrapper):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module._checkpoint_wrapped_module
    return module
