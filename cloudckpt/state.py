"""Turn what a training program holds into named tensors and values, and put restored ones back.

Everything in the caller's `state` dict is of one of five kinds; each kind has one adapter here:

    nn.Module        get_model_state_dict       tensors restored in place (DDP and FSDP names unwrapped)
    Optimizer        state_dict by parameter names, so that it survives resharding and reordering
    Stateful         state_dict / load_state_dict
    Tensor           restored in place
    anything else    containers and plain values, restored into the dict

A dict, list or tuple with modules, optimizers or other objects in it is taken apart, and each is an entry of its own.
Knows PyTorch's objects; knows nothing of stores, steps or shards, nor of what a checkpoint holds (`restore` does).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeGuard, cast

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError
from cloudckpt.tree import Flat, PathElement, add_leaves, children, name_of

__all__ = ["Entry", "Misfit", "bind", "capture", "is_tensor"]

_DEPTH_LIMIT = 64
# What a wrapper adds to the names of the parameters inside it.
_WRAPPED = {"module": DistributedDataParallel, "_checkpoint_wrapped_module": CheckpointWrapper}


def is_tensor(value: object) -> bool:
    """Tell whether a value is stored as a tensor (dense, distributed or sharded)."""
    return isinstance(value, torch.Tensor | ShardedTensor)


@dataclass(slots=True)
class Misfit:
    """What of an entry and of a checkpoint does not fit together.

    Attributes:
        missing: names that the entry has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the entry lacks.
        reasons: what else, in words.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Entry(ABC):
    """One object of the state: how it becomes plain nested state, and takes restored state back."""

    def __init__(self, path: Sequence[PathElement]) -> None:
        self.path = list(path)
        self.name = name_of(path)

    @abstractmethod
    def current(self) -> object:
        """Return the nested state now; its tensors are the live ones wherever the object shares them."""

    @abstractmethod
    def load(self, restored: object, live: object) -> None:
        """Take restored nested state; `live` is what `current` returned, whose tensors were filled in place."""

    @property
    def follows_checkpoint(self) -> bool:
        """Whether the checkpoint decides which names the entry has (else the live object does)."""
        return True

    @property
    def keeps_shapes(self) -> bool:
        """Whether a live tensor is restored in place or not at all."""
        return not self.follows_checkpoint

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a target for a saved tensor that the live state has no place for; `below` is its path in the entry."""
        return torch.empty(shape, dtype=dtype)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare with the nested state to be restored, whose tensors are not filled yet; change nothing.

        Args:
            restored: what `load` will be given.
            dtypes: name → saved dtype, of all tensors in the checkpoint.
        """
        return Misfit()


class _ModuleEntry(Entry):
    def __init__(self, path: Sequence[PathElement], module: nn.Module) -> None:
        super().__init__(path)
        self._module = module

    @property
    def follows_checkpoint(self) -> bool:
        return False

    def current(self) -> object:
        # Not strict: a module without parameters (a loss) has a state, an empty one.
        return get_model_state_dict(self._module, options=StateDictOptions(strict=False))

    def load(self, restored: object, live: object) -> None:
        state = _mapping(restored, self.name)
        if self._is_filled_in_place(state):
            return
        given = cast("dict[str, torch.Tensor]", state)
        set_model_state_dict(self._module, given, options=StateDictOptions(strict=False))

    def _is_filled_in_place(self, state: Mapping[str, object]) -> bool:
        """Tell whether loading would only copy the module's memory to itself."""
        if any(_notices_a_load(part) for part in self._module.modules()):
            return False
        own = {
            tensor.data_ptr() for tensor in [*self._module.parameters(), *self._module.buffers()] if _is_plain(tensor)
        }
        return all(_is_plain(value) and value.data_ptr() in own for value in state.values())


def _notices_a_load(module: nn.Module) -> bool:
    """Tell whether a module does more in `load_state_dict` than to copy; what PyTorch ships only copies."""
    kind = type(module)
    if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return True
    is_overridden = any(
        getattr(kind, method) is not getattr(nn.Module, method)
        for method in ("load_state_dict", "_load_from_state_dict", "set_extra_state")
    )
    return is_overridden and not kind.__module__.startswith("torch.nn.modules.")


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    return type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and bool(cast("torch.Tensor", value).numel())


class _OptimizerEntry(Entry):
    """An optimizer, its state named by the parameters of the modules in the state.

    DCP's `get_optimizer_state_dict` is not used: to have names for the state of a fresh optimizer it takes a step
    with zero gradients, which counts as a step from then on. Here the checkpoint says which state there is, and each
    part that is as large as its parameter is allocated like that parameter (device and placement included).
    """

    def __init__(self, path: Sequence[PathElement], optimizer: Optimizer, names: Mapping[int, _Named]) -> None:
        super().__init__(path)
        self._optimizer = optimizer
        self._groups = [[names[id(parameter)].name for parameter in group["params"]] for group in _groups(optimizer)]
        self._parameters = {
            names[id(parameter)].name: parameter for group in _groups(optimizer) for parameter in group["params"]
        }
        self._full_names = {named.name: named.full_name for named in names.values()}
        self._as_saved: set[str] = set()

    def current(self) -> object:
        state = self._optimizer.state_dict()
        numbered = dict(enumerate(chain.from_iterable(self._groups)))
        groups = [{**group, "params": names} for group, names in zip(state["param_groups"], self._groups, strict=True)]
        # State that belongs to no parameter has keys of its own.
        return {
            "state": {numbered.get(key, key): value for key, value in state["state"].items()},
            "param_groups": groups,
        }

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        parameter = self._parameters.get(str(below[1])) if len(below) == 3 and below[0] == "state" else None
        if parameter is None or tuple(parameter.size()) != shape:
            return super().allocate(below, shape, dtype)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare the parameters and their groups."""
        saved = _saved_groups(restored, self.name)
        self._as_saved = {
            name
            for name, parameter in self._parameters.items()
            if dtypes.get(self._full_names[name]) == parameter.dtype
        }
        here = set(self._parameters)
        there = {str(name) for group in saved for name in group["params"]}
        misfit = Misfit(
            missing=[f"{self.name}.{name}" for name in self._parameters if name not in there],
            unexpected=[f"{self.name}.{name}" for name in sorted(there - here)],
        )
        partition = {frozenset(names) for names in self._groups}
        if here == there and (partition != {frozenset(group["params"]) for group in saved}):
            misfit.reasons.append(f"{self.name} has the same parameters in other groups")
        return misfit

    def load(self, restored: object, live: object) -> None:
        state = _mapping(restored, self.name)
        saved = _saved_groups(restored, self.name)
        numbers = {name: number for number, name in enumerate(chain.from_iterable(self._groups))}
        groups = [
            {**_most_alike(saved, names, live), "params": [numbers[name] for name in names]}
            for names, live in zip(self._groups, _groups(self._optimizer), strict=True)
        ]
        for group in groups:
            group.pop("param_names", None)  # in the saved order; the optimizer has its own
        known = {str(name) for group in saved for name in group["params"]}
        of_parameters = {
            numbers.get(name, name): value
            for name, value in _mapping(state.get("state", {}), f"{self.name}.state").items()
            if name in numbers or name not in known
        }
        self._optimizer.load_state_dict({"state": of_parameters, "param_groups": groups})
        self._undo_casts(of_parameters, numbers)

    def _undo_casts(self, of_parameters: Mapping[object, object], numbers: Mapping[str, int]) -> None:
        """Give state its saved dtype back where `load_state_dict` made it the parameter's.

        Wanted when the parameter itself has another dtype than when it was saved; else it loses bits: of NAdam's
        running product, for example, which is float32 whatever the parameters are.
        """
        for name, parameter in self._parameters.items():
            saved = of_parameters.get(numbers[name])
            loaded = self._optimizer.state.get(parameter)
            if not isinstance(saved, dict) or not isinstance(loaded, dict):
                continue
            for key, value in saved.items():
                now = loaded.get(key)
                is_exact = name in self._as_saved or (isinstance(value, torch.Tensor) and value.dim() == 0)
                if is_exact and isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
                    loaded[key] = now if now.dtype == value.dtype else value.to(now.device)


def _groups(optimizer: Optimizer) -> list[dict[str, list[torch.Tensor]]]:
    return optimizer.param_groups


def _saved_groups(restored: object, name: str) -> list[dict[str, list[str]]]:
    groups = restored.get("param_groups") if isinstance(restored, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise OptionsError(f"the checkpoint holds no optimizer under {name!r}; give the object that was saved there")
    return groups


def _most_alike(
    saved: Sequence[dict[str, list[str]]], names: Sequence[str], live: Mapping[str, object]
) -> dict[str, object]:
    """Return the saved group with the most of these parameters, or the live one where none has any."""
    best = max(saved, key=lambda group: len(set(group["params"]).intersection(names)), default=None)
    if best is None or not set(best["params"]).intersection(names):
        return dict(live)
    return dict(best)


class _FlatOptimizerEntry(Entry):
    """The optimizer of an FSDP1 module, whose flat parameters only PyTorch can name."""

    def __init__(self, path: Sequence[PathElement], optimizer: Optimizer, module: nn.Module) -> None:
        super().__init__(path)
        self._optimizer = optimizer
        self._module = module

    @property
    def follows_checkpoint(self) -> bool:
        return False

    def current(self) -> object:
        return get_optimizer_state_dict(self._module, self._optimizer)

    def load(self, restored: object, live: object) -> None:
        state = cast("dict[str, dict[str, torch.Tensor]]", _mapping(restored, self.name))
        set_optimizer_state_dict(self._module, self._optimizer, state)


class _StatefulEntry(Entry):
    def __init__(self, path: Sequence[PathElement], stateful: Stateful) -> None:
        super().__init__(path)
        self._stateful = stateful

    def current(self) -> object:
        return self._stateful.state_dict()

    def load(self, restored: object, live: object) -> None:
        self._stateful.load_state_dict(_mapping(restored, self.name))


class _ValueEntry(Entry):
    """A tensor, a container or a plain value: put back where it stands, in place where it can be."""

    def __init__(self, path: Sequence[PathElement], holder: object, key: object) -> None:
        super().__init__(path)
        self._holder = holder
        self._key = key

    @property
    def keeps_shapes(self) -> bool:
        return True

    def current(self) -> object:
        return self._holder[self._key]  # type: ignore[index]

    def load(self, restored: object, live: object) -> None:
        if isinstance(live, dict) and isinstance(restored, dict):
            live.clear()
            live.update(restored)
        elif isinstance(live, list) and isinstance(restored, list):
            live[:] = restored
        elif restored is not live:
            self._holder[self._key] = restored  # type: ignore[index]


def _mapping(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise OptionsError(
            f"the checkpoint holds a {type(value).__name__} under {name!r}, where a state_dict is expected"
        )
    return value


def bind(state: MutableMapping[str, object]) -> list[Entry]:
    """Choose the adapter of each object in the caller's state.

    Raises:
        OptionsError: the state is no dict with string keys, is empty, or has a key that is not a plain name.
    """
    if not isinstance(state, MutableMapping) or not state:
        raise OptionsError(f"state is a {type(state).__name__}; give a non-empty dict such as {{'model': model}}")
    for name in state:
        if not isinstance(name, str) or not name or name.startswith("cloudckpt."):
            raise OptionsError(
                f"state key {name!r} is not a usable name; give a string that does not start with 'cloudckpt.'"
            )
    places = [place for name, value in state.items() for place in _places([name], value, state, name)]
    modules = {place.path_name: place.value for place in places if isinstance(place.value, nn.Module)}
    return [_entry(place, modules) for place in places]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value of the state stands: its path, and the container that holds it under `key`."""

    path: list[PathElement]
    value: object
    holder: object
    key: object

    @property
    def path_name(self) -> str:
        return name_of(self.path)


def _places(path: list[PathElement], value: object, holder: object, key: object) -> Iterator[_Place]:
    """Yield the value, or what is in it when it is a container of objects."""
    if _is_object(value) or not _holds_object(value, depth=0):
        if not isinstance(holder, MutableMapping | MutableSequence) and not (_is_object(value) or is_tensor(value)):
            raise OptionsError(
                f"{name_of(path)!r} stands in a {type(holder).__name__} beside modules or the like, where it cannot be "
                "restored; put it into a dict or list"
            )
        yield _Place(path, value, holder, key)
        return
    steps = list(value) if isinstance(value, dict) else range(len(cast("list[object]", value)))
    for step, (element, child) in zip(steps, children(value, name=name_of(path)), strict=True):
        yield from _places([*path, element], child, value, step)


def _is_object(value: object) -> bool:
    is_stateful = isinstance(value, Stateful) and not isinstance(value, type)
    return is_stateful or isinstance(value, nn.Module | Optimizer)


def _holds_object(value: object, depth: int) -> bool:
    """Tell whether an object stands somewhere in a container; one that holds itself is refused later, by name."""
    if depth > _DEPTH_LIMIT or not isinstance(value, dict | list | tuple):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_is_object(child) or _holds_object(child, depth + 1) for child in inner)


def _entry(place: _Place, modules: Mapping[str, nn.Module]) -> Entry:
    value = place.value
    if isinstance(value, nn.Module):
        return _ModuleEntry(place.path, value)
    if isinstance(value, Optimizer):
        return _optimizer_entry(place.path, value, modules)
    if _is_object(value):
        return _StatefulEntry(place.path, cast("Stateful", value))
    return _ValueEntry(place.path, place.holder, place.key)


@dataclass(frozen=True, slots=True)
class _Named:
    """A parameter's name in its optimizer's state, and the name of the tensor that it is saved as."""

    name: str
    full_name: str


def _optimizer_entry(path: Sequence[PathElement], optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> Entry:
    for module in modules.values():
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            return _FlatOptimizerEntry(path, optimizer, module)
    return _OptimizerEntry(path, optimizer, _parameter_names(optimizer, modules))


def _parameter_names(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> dict[int, _Named]:
    """Name an optimizer's parameters as the modules in the state do; by place, if those do not know all of them."""
    names: dict[int, _Named] = {}
    for top, module in modules.items():
        for path, parameter in module.named_parameters():
            name = _clean(module, path)
            names.setdefault(id(parameter), _Named(name, f"{top}.{name}"))
    own = [id(parameter) for group in _groups(optimizer) for parameter in group["params"]]
    if len({names[key].name for key in own if key in names}) == len(own):
        return {key: names[key] for key in own}
    return {key: _Named(str(place), "") for place, key in enumerate(own)}


def _clean(module: nn.Module, path: str) -> str:
    """Drop what wrappers (DDP, compile, activation checkpointing) put into a parameter's name."""
    kept = []
    here: object = module
    for part in path.split("."):
        is_wrapper = part == "_orig_mod" or isinstance(here, _WRAPPED.get(part, ()))
        if not is_wrapper:
            kept.append(part)
        here = getattr(here, part)
    return ".".join(kept)


def capture(entries: Sequence[Entry]) -> Flat:
    """Return every tensor and value of the state by name; tensors are the live ones, not copies."""
    flat = Flat()
    for entry in entries:
        add_leaves(flat, entry.path, entry.current(), is_tensor=is_tensor)
    return flat
