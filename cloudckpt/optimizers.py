"""Save and restore an optimizer by the names of its parameters, so that it survives resharding and reordering.

Names come from the modules that stand beside it in the state. Knows PyTorch's optimizers and wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import (
    OptimizerStateType,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cloudckpt.entry import Entry, Misfit, Place, mapping_of
from cloudckpt.errors import OptionsError
from cloudckpt.tree import PathElement

__all__ = ["optimizer_entry"]

# What a wrapper adds to the names of the parameters inside it.
_WRAPPED = {"module": DistributedDataParallel, "_checkpoint_wrapped_module": CheckpointWrapper}


class _OptimizerEntry(Entry):
    """An optimizer, its state named by the parameters of the modules in the state.

    DCP's `get_optimizer_state_dict` is not used: to have names for the state of a fresh optimizer it takes a step
    with zero gradients, which counts as a step from then on. Here the checkpoint says which state there is, and each
    part that is as large as its parameter is allocated like that parameter (device and placement included).
    """

    def __init__(self, place: Place, optimizer: Optimizer, names: Mapping[int, _Named]) -> None:
        super().__init__(place)
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
        state = mapping_of(restored, self.name)
        saved = _saved_groups(restored, self.name)
        numbers = {name: number for number, name in enumerate(chain.from_iterable(self._groups))}
        groups = [
            {**_most_alike(saved, names, live), "params": [numbers[name] for name in names]}
            for names, live in zip(self._groups, _groups(self._optimizer), strict=True)
        ]
        for group in groups:
            group.pop("param_names", None)  # in the saved order; the optimizer has its own
        known = {str(name) for group in saved for name in group["params"]}
        of_parameters: dict[object, object] = {
            numbers.get(name, name): value
            for name, value in mapping_of(state.get("state", {}), f"{self.name}.state").items()
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

    def __init__(self, place: Place, optimizer: Optimizer, module: nn.Module) -> None:
        super().__init__(place)
        self._optimizer = optimizer
        self._module = module

    @property
    def follows_checkpoint(self) -> bool:
        return False

    def current(self) -> object:
        return get_optimizer_state_dict(self._module, self._optimizer)

    def load(self, restored: object, live: object) -> None:
        state = cast("OptimizerStateType", mapping_of(restored, self.name))
        set_optimizer_state_dict(self._module, self._optimizer, state)


@dataclass(frozen=True, slots=True)
class _Named:
    """A parameter's name in its optimizer's state, and the name of the tensor that it is saved as."""

    name: str
    full_name: str


def optimizer_entry(place: Place, optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> Entry:
    """Return the adapter of an optimizer over parameters of `modules`, which the state holds under those names."""
    for module in modules.values():
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            return _FlatOptimizerEntry(place, optimizer, module)
    return _OptimizerEntry(place, optimizer, _parameter_names(optimizer, modules))


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
