"""Save and restore an optimizer by the names of its parameters, so that it survives resharding and reordering.

Names come from the modules that stand beside it in the state. Knows PyTorch's optimizers and wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError
from cloudckpt.format import PathElement
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of

__all__ = ["Named", "NamedEntry", "OptimizerEntry", "clean_name", "groups_of", "parameter_of"]

# What a wrapper adds to the names of the parameters inside it.
_WRAPPED = {"module": DistributedDataParallel, "_checkpoint_wrapped_module": CheckpointWrapper}


@dataclass(frozen=True, slots=True)
class Named:
    """What a parameter is called in its optimizer's state; a flattened one has many names.

    Attributes:
        names: of the tensors in it.
        full_name: what the (first) tensor is saved as.
    """

    names: Sequence[str]
    full_name: str


class NamedEntry(Entry):
    """An optimizer whose state is named by the parameters of the modules in the state; what both kinds share.

    DCP's `get_optimizer_state_dict` is not used: to have names for the state of a fresh optimizer it takes a step
    with zero gradients, which counts as a step from then on. Here the checkpoint says which state there is, and each
    part that is as large as its parameter is allocated like that parameter (device and placement included).
    """

    def __init__(self, place: Place, optimizer: Optimizer, names: Mapping[int, Named]) -> None:
        super().__init__(place)
        self._optimizer = optimizer
        self._numbered = [parameter for group in groups_of(optimizer) for parameter in group["params"]]
        self._named = [names[id(parameter)] for parameter in self._numbered]
        self._groups = [
            [name for parameter in group["params"] for name in names[id(parameter)].names]
            for group in groups_of(optimizer)
        ]
        self._as_saved: set[int] = set()

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare the parameters and their groups."""
        saved = _saved_groups(restored, self.name)
        self._as_saved = {
            number
            for number, (named, parameter) in enumerate(zip(self._named, self._numbered, strict=True))
            if dtypes.get(named.full_name) == parameter.dtype
        }
        own = list(chain.from_iterable(self._groups))
        here = set(own)
        there = _names_in(saved)
        misfit = Misfit(
            missing=[f"{self.name}.{name}" for name in own if name not in there],
            unexpected=[f"{self.name}.{name}" for name in sorted(there - here)],
        )
        partition = {frozenset(names) for names in self._groups}
        if here == there and (partition != {frozenset(group["params"]) for group in saved}):
            misfit.reasons.append(f"{self.name} has the same parameters in other groups")
        return misfit

    def restored_state(self, restored: object) -> dict[str, object]:
        """Return the restored state of the parameters here by name, and the state that belongs to no parameter."""
        own = set(chain.from_iterable(self._groups))
        known = _names_in(_saved_groups(restored, self.name))
        state = mapping_of(mapping_of(restored, self.name).get("state", {}), f"{self.name}.state")
        return {name: value for name, value in state.items() if name in own or name not in known}

    def restored_groups(self, restored: object) -> list[dict[str, object]]:
        """Return the groups here, with their own parameters and the restored options."""
        saved = _saved_groups(restored, self.name)
        return [
            {**_most_alike(saved, names, live), "params": names}
            for names, live in zip(self._groups, groups_of(self._optimizer), strict=True)
        ]

    def load_numbered(self, state: Mapping[object, object], groups: Sequence[Mapping[str, object]]) -> None:
        """Give the optimizer a state_dict of its own kind, with numbered parameters."""
        self._optimizer.load_state_dict({"state": dict(state), "param_groups": list(groups)})
        self._undo_casts(state)

    def _undo_casts(self, state: Mapping[object, object]) -> None:
        """Give state its saved dtype back where `load_state_dict` made it the parameter's."""
        # Wanted when the parameter itself has another dtype than when it was saved; else it loses bits: of NAdam's
        # running product, for example, which is float32 whatever the parameters are.
        for number, parameter in enumerate(self._numbered):
            saved = state.get(number)
            loaded = self._optimizer.state.get(parameter)
            if not isinstance(saved, dict) or not isinstance(loaded, dict):
                continue
            for key, value in saved.items():
                now = loaded.get(key)
                is_exact = number in self._as_saved or (isinstance(value, torch.Tensor) and value.dim() == 0)
                if is_exact and isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
                    loaded[key] = now if now.dtype == value.dtype else value.to(now.device)


class OptimizerEntry(NamedEntry):
    """An optimizer each of whose parameters has one name."""

    def __init__(self, place: Place, optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> None:
        """Name the parameters as the `modules` do, which the state holds under those names."""
        super().__init__(place, optimizer, _parameter_names(optimizer, modules))
        self._numbers = {named.names[0]: number for number, named in enumerate(self._named)}

    def current(self) -> object:
        state = self._optimizer.state_dict()
        numbered = dict(enumerate(self._numbers))
        groups = [{**group, "params": names} for group, names in zip(state["param_groups"], self._groups, strict=True)]
        # State that belongs to no parameter has keys of its own.
        return {
            "state": {numbered.get(key, key): value for key, value in state["state"].items()},
            "param_groups": groups,
        }

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        name = parameter_of(below)
        parameter = self._numbered[self._numbers[name]] if name in self._numbers else None
        if parameter is None or tuple(parameter.size()) != shape:
            return super().allocate(below, shape, dtype)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def load(self, restored: object, live: object) -> None:
        state: dict[object, object] = {
            self._numbers.get(name, name): value for name, value in self.restored_state(restored).items()
        }
        groups = [
            {**group, "params": [self._numbers[name] for name in names]}
            for group, names in zip(self.restored_groups(restored), self._groups, strict=True)
        ]
        self.load_numbered(state, groups)


def parameter_of(below: Sequence[PathElement]) -> str:
    """Return which parameter a part of the state belongs to, by its path."""
    return str(below[1]) if len(below) == 3 and below[0] == "state" else ""


def _names_in(groups: Sequence[dict[str, list[str]]]) -> set[str]:
    return {str(name) for group in groups for name in group["params"]}


def groups_of(optimizer: Optimizer) -> list[dict[str, list[torch.Tensor]]]:
    """Return the groups of an optimizer's parameters, of which only these are looked at."""
    return optimizer.param_groups


def _saved_groups(restored: object, name: str) -> list[dict[str, list[str]]]:
    groups = restored.get("param_groups") if isinstance(restored, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise OptionsError(f"the checkpoint holds no optimizer under {name!r}; give the object that was saved there")
    return groups


def _most_alike(
    saved: Sequence[dict[str, list[str]]], names: Sequence[str], live: Mapping[str, object]
) -> dict[str, object]:
    """Return the options of the saved group with the most of these parameters; of the live one where none has any."""
    best = max(saved, key=lambda group: len(set(group["params"]).intersection(names)), default=None)
    alike = live if best is None or not set(best["params"]).intersection(names) else best
    # Names are in the saved order; the optimizer has its own.
    return {key: value for key, value in alike.items() if key != "param_names"}


def _parameter_names(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> dict[int, Named]:
    """Name an optimizer's parameters as the modules in the state do; by place, if those do not know all of them."""
    names: dict[int, Named] = {}
    for top, module in modules.items():
        for path, parameter in module.named_parameters():
            name = clean_name(module, path)
            names.setdefault(id(parameter), Named([name], f"{top}.{name}"))
    own = [id(parameter) for group in groups_of(optimizer) for parameter in group["params"]]
    if len({names[key].names[0] for key in own if key in names}) == len(own):
        return {key: names[key] for key in own}
    return {key: Named([str(place)], "") for place, key in enumerate(own)}


def clean_name(module: nn.Module, path: str) -> str:
    """Drop what wrappers (DDP, compile, activation checkpointing) put into a parameter's name."""
    kept = []
    here: object = module
    for part in path.split("."):
        is_wrapper = part == "_orig_mod" or isinstance(here, _WRAPPED.get(part, ()))
        if not is_wrapper:
            kept.append(part)
        here = getattr(here, part)
    return ".".join(kept)
