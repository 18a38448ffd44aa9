"""Say what stands beside the optimizers of a state: how their parameters are called, and who keeps lists of groups.

    objects of the state ──▶ Beside: parameter → names, optimizer → who holds it

Made once for a state: looking through every module for every optimizer costs the square of their number. Knows
PyTorch's modules and schedulers; knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from types import MemberDescriptorType
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from cloudckpt.state.plain import PlainModules, PlainOptimizers
from cloudckpt.state.wrappers import clean_name, is_fsdp1

__all__ = ["Beside", "named_parameters", "wrapped_in"]

# What torch's schedulers keep for each group, by its place.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")

_DOTS_LIMIT = 500
# A longer container is data, whose items are not looked into one by one.
_HELD_LIMIT = 1000
_SCALARS = frozenset((type(None), bool, int, float, str))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def wrapped_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, in whatever containers, from the outermost."""
    return [optimizer, *_optimizers_in(optimizer, lambda value: isinstance(value, Optimizer))]


def _optimizers_in(holder: object, looks_into: Callable[[object], bool]) -> list[Optimizer]:
    """Return the optimizers that an object holds in its attributes, in containers and in objects to be looked into."""
    seen: dict[int, object] = {id(holder): holder}
    pending = deque(_attributes(holder))
    while pending:
        value = pending.popleft()
        if type(value) in _SCALARS or id(value) in seen:
            continue
        if isinstance(value, _CONTAINERS):
            if not value:  # as most of an optimizer's are, for hooks
                continue
            seen[id(value)] = value
            items = list(value.values() if isinstance(value, dict) else value)
            pending += items if len(items) <= _HELD_LIMIT else [item for item in items if isinstance(item, Optimizer)]
        elif looks_into(value):
            seen[id(value)] = value
            pending += _attributes(value)
    return [value for value in seen.values() if isinstance(value, Optimizer) and value is not holder]


def _attributes(value: object) -> Iterator[object]:
    """Yield what an object has; what a property of somebody else's object does is not to be found out here."""
    skipped = ("state", "param_groups") if isinstance(value, Optimizer) else ()  # large, and torch's
    yield from (child for name, child in getattr(value, "__dict__", {}).items() if name not in skipped)
    for member in _slots_of(type(value)):  # type: ignore[arg-type]  # (every type has a hash)
        with suppress(AttributeError):
            yield member.__get__(value)


@lru_cache(maxsize=256)  # a state may have many thousands of optimizers, of few types
def _slots_of(kind: type) -> tuple[MemberDescriptorType, ...]:
    members = chain.from_iterable(vars(each).values() for each in kind.__mro__)
    return tuple(member for member in members if isinstance(member, MemberDescriptorType))


class Beside:
    """What stands beside an optimizer in the state."""

    def __init__(self, objects: Mapping[str, object], plain: PlainModules) -> None:
        """Look through `objects` of the state by full name: modules, tensors, containers of tensors, schedulers."""
        self._objects = objects  # ids of what is in them are theirs as long as they live
        self._ids = set(map(id, objects.values()))
        self._names: dict[int, list[str]] = {}
        self._keepers: dict[int, list[tuple[str, bool]]] = {}
        self._sources: dict[int, Sequence[int | None]] = {}
        self.plain = PlainOptimizers()
        is_asked = any(isinstance(value, Optimizer) for value in objects.values())
        modules = {name: value for name, value in objects.items() if is_asked and isinstance(value, nn.Module)}
        for top, module in modules.items():
            found = plain.parameters_of(module)
            for name, parameter in named_parameters(module) if found is None else found:
                self._names.setdefault(id(parameter), []).append(f"{top}.{name}")
        for top, value in objects.items() if is_asked else ():
            if isinstance(value, Optimizer):
                continue  # which is no container, and keeps its own groups
            for name, tensor in _tensors_in(value, top, seen={}):
                self._names.setdefault(id(tensor), []).append(name)
            for optimizer, is_known in () if top in modules else _kept_by(value):
                self._keepers.setdefault(id(optimizer), []).append((top, is_known))
        self._taken = set(chain.from_iterable(self._names.values()))
        self.fsdp1 = {name: module for name, module in modules.items() if is_fsdp1(module)}
        """Modules with parts that FSDP1 has wrapped, by name."""

    def holds(self, value: object) -> bool:
        """Tell whether an object is one of the state's own."""
        return id(value) in self._ids

    def names_of(self, parameter: torch.Tensor) -> Sequence[str]:
        """Return the full names of a parameter (a tied one has several), the one that it is saved as first."""
        return self._names.get(id(parameter), ())

    def has_name(self, name: str) -> bool:
        """Tell whether something beside the optimizers has a full name."""
        return name in self._taken

    def carry(self, optimizers: Sequence[Optimizer], sources: Sequence[int | None]) -> list[str]:
        """Note in which order the groups were saved, so that what schedulers keep for each of them follows.

        Args:
            optimizers: the one whose groups are meant, and those that it wraps.
            sources: of each group here, its place among the saved ones; None for one that was not saved.

        Returns:
            The names of the objects in the state that hold one of `optimizers` and that nobody can read.
        """
        foreign = []
        for optimizer in optimizers:
            self._sources[id(optimizer)] = sources
            foreign += [name for name, is_known in self._keepers.get(id(optimizer), ()) if not is_known]
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
        # What stands here is asked for as it is saved: of a function, that is None.
        now = cast("lr_scheduler.LRScheduler", keeper).state_dict() if None in sources else {}
        return {**state, **{key: _moved(state[key], now.get(key), sources) for key in _PER_GROUP if key in state}}


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


def _kept_by(value: object) -> Iterator[tuple[Optimizer, bool]]:
    """Yield the optimizers for whose groups an object may keep something, and whether it is known what that is."""
    if type(value).__module__.partition(".")[0] != "torch":
        yield from ((optimizer, False) for optimizer in _optimizers_in(value, _has_state))
        return
    optimizer = _optimizer_of(value)
    if optimizer is not None:
        yield optimizer, True
        for inner in getattr(value, "_schedulers", None) or ():  # a chain
            yield from _kept_by(inner)


def _has_state(value: object) -> bool:
    """Tell whether an object has state that the one which holds it may save with its own."""
    return hasattr(type(value), "state_dict") and not isinstance(value, nn.Module)


def _tensors_in(value: object, name: str, seen: dict[int, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in containers, each of which is looked at once, and none that lies too deep to be saved."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen and name.count(".") < _DOTS_LIMIT:
        seen[id(value)] = value
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(child, torch.Tensor | dict | list | tuple):  # a history may have millions of numbers
                yield from _tensors_in(child, f"{name}.{key}", seen)


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
