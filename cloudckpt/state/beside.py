"""Say what stands beside the optimizers of a state: how their parameters are called, and who keeps lists of groups.

    objects of the state ──▶ Beside: parameter → names, optimizer → schedulers

Made once for a state: looking through every module for every optimizer costs the square of their number. Knows
PyTorch's modules and schedulers; knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from cloudckpt.state.wrappers import clean_name

__all__ = ["Beside", "named_parameters"]

# What torch's schedulers keep for each group, by its place.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")

_DEPTH_LIMIT = 64


class Beside:
    """What stands beside an optimizer in the state."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        """Look through `objects` of the state by full name: modules, tensors, containers of tensors, schedulers."""
        self._objects = objects  # ids of what is in them are theirs as long as they live
        self._ids = set(map(id, objects.values()))
        self._names: dict[int, list[str]] = {}
        self._keepers: dict[int, list[tuple[str, object]]] = {}
        self._sources: dict[int, Sequence[int | None]] = {}
        modules = {name: value for name, value in objects.items() if isinstance(value, nn.Module)}
        for top, module in modules.items():
            for name, parameter in named_parameters(module):
                self._names.setdefault(id(parameter), []).append(f"{top}.{name}")
        for top, value in objects.items():
            for name, tensor in _tensors_in(value, top, depth=0):
                self._names.setdefault(id(tensor), []).append(name)
            for keeper in () if top in modules else _keepers_in(value):
                self._keepers.setdefault(id(_optimizer_of(keeper)), []).append((top, keeper))
        self.fsdp1 = {
            name: module
            for name, module in modules.items()
            if any(isinstance(part, FullyShardedDataParallel) for part in module.modules())
        }
        """Modules with parts that FSDP1 has wrapped, by name."""

    def holds(self, value: object) -> bool:
        """Tell whether an object is one of the state's own."""
        return id(value) in self._ids

    def names_of(self, parameter: torch.Tensor) -> Sequence[str]:
        """Return the full names of a parameter (a tied one has several), the one that it is saved as first."""
        return self._names.get(id(parameter), ())

    def carry(self, optimizers: Sequence[Optimizer], sources: Sequence[int | None]) -> list[str]:
        """Note in which order the groups were saved, so that what schedulers keep for each of them follows.

        Args:
            optimizers: the one whose groups are meant, and those that it wraps.
            sources: of each group here, its place among the saved ones; None for one that was not saved.

        Returns:
            The names of the objects in the state that refer to one of `optimizers` and that nobody can read.
        """
        foreign = []
        for optimizer in optimizers:
            self._sources[id(optimizer)] = sources
            foreign += [name for name, keeper in self._keepers.get(id(optimizer), ()) if not _is_of_torch(keeper)]
        return list(dict.fromkeys(foreign))

    def in_group_order(self, keeper: object, state: dict[str, object]) -> dict[str, object]:
        """Return the restored state of an object of the state, with what it has for each group in the order here."""
        optimizer = _optimizer_of(keeper)
        sources = None if optimizer is None else self._sources.get(id(optimizer))
        inner, below = getattr(keeper, "_schedulers", None), state.get("_schedulers")
        if isinstance(inner, list) and isinstance(below, list) and len(inner) == len(below):
            state = {**state, "_schedulers": [self.in_group_order(*pair) for pair in zip(inner, below, strict=True)]}
        if sources is None:
            return state
        moved = {key: _moved(state[key], getattr(keeper, key, None), sources) for key in _PER_GROUP if key in state}
        return {**state, **moved}


def _moved(saved: object, live: object, sources: Sequence[int | None]) -> object:
    """Return a list by group in the order here; of a group that was not saved, what stands there now."""
    if not isinstance(saved, list | tuple):
        return saved
    now = live if isinstance(live, list | tuple) and len(live) == len(sources) else [None] * len(sources)
    return type(saved)(
        saved[source] if source is not None and source < len(saved) else now[place]
        for place, source in enumerate(sources)
    )


def _optimizer_of(keeper: object) -> Optimizer | None:
    # Not by getattr: what a property of somebody else's object does is not to be found out here.
    found = getattr(keeper, "__dict__", {}).get("optimizer")
    return found if isinstance(found, Optimizer) else None


def _keepers_in(value: object) -> Iterator[object]:
    """Yield an object that refers to an optimizer, and what it is made of (a chain of schedulers)."""
    if isinstance(value, Optimizer) or _optimizer_of(value) is None:
        return
    yield value
    for inner in getattr(value, "_schedulers", None) or ():
        yield from _keepers_in(inner)


def _is_of_torch(keeper: object) -> bool:
    return type(keeper).__module__.partition(".")[0] == "torch"


def _tensors_in(value: object, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth < _DEPTH_LIMIT and isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(child, f"{name}.{key}", depth + 1)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has, without what wrappers put into names."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        above, _, step = path.rpartition(".")
        holder, prefix = found[above] if path else (module, "")
        if path and clean_name(holder, step):
            prefix = f"{prefix}{step}."
        found[path] = part, prefix
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}{name}", parameter
