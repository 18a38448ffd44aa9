"""Save and restore an optimizer by the names of its parameters, so that it survives resharding and reordering.

Names come from the modules that stand beside it in the state. Knows PyTorch's optimizers and wrappers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp._common_utils import _get_param_to_fqns
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError
from cloudckpt.format import PathElement
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of, shape_of

__all__ = ["clean_name", "optimizer_entry"]

# What a wrapper adds to the names of the parameters inside it.
_WRAPPED = {"module": DistributedDataParallel, "_checkpoint_wrapped_module": CheckpointWrapper}


class _NamedEntry(Entry):
    """An optimizer whose state is named by the parameters of the modules in the state.

    DCP's `get_optimizer_state_dict` is not used: to have names for the state of a fresh optimizer it takes a step
    with zero gradients, which counts as a step from then on. Here the checkpoint says which state there is, and each
    part that is as large as its parameter is allocated like that parameter (device and placement included).
    """

    def __init__(self, place: Place, optimizer: Optimizer, names: Mapping[int, _Named]) -> None:
        super().__init__(place)
        self._optimizer = optimizer
        self._numbered = [parameter for group in _groups(optimizer) for parameter in group["params"]]
        self._named = [names[id(parameter)] for parameter in self._numbered]
        self._groups = [
            [name for parameter in group["params"] for name in names[id(parameter)].names]
            for group in _groups(optimizer)
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

    def _restored_state(self, restored: object) -> dict[str, object]:
        """Return the restored state of the parameters here by name, and the state that belongs to no parameter."""
        own = set(chain.from_iterable(self._groups))
        known = _names_in(_saved_groups(restored, self.name))
        state = mapping_of(mapping_of(restored, self.name).get("state", {}), f"{self.name}.state")
        return {name: value for name, value in state.items() if name in own or name not in known}

    def _restored_groups(self, restored: object) -> list[dict[str, object]]:
        """Return the groups here, with their own parameters and the restored options."""
        saved = _saved_groups(restored, self.name)
        groups = [
            {**_most_alike(saved, names, live), "params": names}
            for names, live in zip(self._groups, _groups(self._optimizer), strict=True)
        ]
        for group in groups:
            group.pop("param_names", None)  # in the saved order; the optimizer has its own
        return groups

    def _load(self, state: Mapping[object, object], groups: Sequence[Mapping[str, object]]) -> None:
        """Give the optimizer a state_dict of its own kind, with numbered parameters."""
        self._optimizer.load_state_dict({"state": dict(state), "param_groups": list(groups)})
        self._undo_casts(state)

    def _undo_casts(self, state: Mapping[object, object]) -> None:
        """Give state its saved dtype back where `load_state_dict` made it the parameter's.

        Wanted when the parameter itself has another dtype than when it was saved; else it loses bits: of NAdam's
        running product, for example, which is float32 whatever the parameters are.
        """
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


class _OptimizerEntry(_NamedEntry):
    """An optimizer each of whose parameters has one name."""

    def __init__(self, place: Place, optimizer: Optimizer, names: Mapping[int, _Named]) -> None:
        super().__init__(place, optimizer, names)
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
        name = _parameter_of(below)
        parameter = self._numbered[self._numbers[name]] if name in self._numbers else None
        if parameter is None or tuple(parameter.size()) != shape:
            return super().allocate(below, shape, dtype)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def load(self, restored: object, live: object) -> None:
        state: dict[object, object] = {
            self._numbers.get(name, name): value for name, value in self._restored_state(restored).items()
        }
        groups = [
            {**group, "params": [self._numbers[name] for name in names]}
            for group, names in zip(self._restored_groups(restored), self._groups, strict=True)
        ]
        self._load(state, groups)


def _parameter_of(below: Sequence[PathElement]) -> str:
    """Return which parameter a part of the state belongs to, by its path."""
    return str(below[1]) if len(below) == 3 and below[0] == "state" else ""


def _names_in(groups: Sequence[dict[str, list[str]]]) -> set[str]:
    return {str(name) for group in groups for name in group["params"]}


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


class _FlatOptimizerEntry(_NamedEntry):
    """The optimizer of an FSDP1 module: each rank has pieces of flattened parameters, where only PyTorch finds tensors.

    For a save it gathers them and cuts them again along their first dimension. A restore fills tensors that are cut
    like the module's own, from which PyTorch makes the pieces.
    """

    def __init__(self, place: Place, optimizer: Optimizer, names: Mapping[int, _Named], module: nn.Module) -> None:
        super().__init__(place, optimizer, names)
        self._module = module
        self._fsdp_names = {
            _without_compile(name): name
            for names_of_one in _get_param_to_fqns(module).values()
            for name in names_of_one
        }

    def current(self) -> object:
        with _sharded(self._module) as group:
            found = FullyShardedDataParallel.optim_state_dict(self._module, self._optimizer, group=group)
        # A parameter without state has an empty one, if only its unit was gathered.
        state = {_without_compile(name): value for name, value in found["state"].items() if value != {}}
        groups = zip(found["param_groups"], self._groups, strict=True)
        return {"state": state, "param_groups": [{**group, "params": names} for group, names in groups]}

    def fillable(self) -> object:
        return {}  # `current` makes copies

    @cached_property
    def _cuts(self) -> Mapping[str, object]:
        """The module's tensors, cut over the ranks as a part of the state that is as large is."""
        return get_model_state_dict(self._module, options=StateDictOptions(strict=False))

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        name = _parameter_of(below)
        alike = self._cuts.get(name) if name else None
        if isinstance(alike, ShardedTensor) and shape_of(alike) == shape:
            return cast("torch.Tensor", _empty_like_sharded(alike, dtype))
        if isinstance(alike, torch.Tensor) and shape_of(alike) == shape:
            return torch.empty_like(alike, dtype=dtype, requires_grad=False)
        return super().allocate(below, shape, dtype)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare also what is flattened into one parameter, which has one state."""
        misfit = super().compare(restored, dtypes)
        state = self._restored_state(restored)
        for named in self._named:
            keys = {frozenset(mapping_of(state.get(name, {}), self.name)) for name in named.names}
            if len(keys) > 1:
                misfit.reasons.append(
                    f"{self.name} has one state for all of {', '.join(named.names)}, and not so there"
                )
        return misfit

    def load(self, restored: object, live: object) -> None:
        state = {self._fsdp_names.get(name, name): value for name, value in self._restored_state(restored).items()}
        groups = self._restored_groups(restored)
        for group, names in zip(groups, self._groups, strict=True):
            group["params"] = [self._fsdp_names[name] for name in names]
        with _sharded(self._module) as process_group:
            flat = FullyShardedDataParallel.optim_state_dict_to_load(
                self._module,
                self._optimizer,
                {"state": state, "param_groups": groups},
                group=process_group,
            )
        self._load(flat["state"], flat["param_groups"])


@contextmanager
def _sharded(module: nn.Module) -> Iterator[ProcessGroup | None]:
    """Have FSDP1 give and take optimizer state in parts, not whole; yields the ranks that share the module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"FSDP\.state_dict_type\(\)", category=FutureWarning)
        with FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        ):
            yield FullyShardedDataParallel.fsdp_modules(module)[0].process_group


def _without_compile(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _empty_like_sharded(tensor: ShardedTensor, dtype: torch.dtype) -> ShardedTensor:
    """Return a tensor of another dtype, cut in the same way; without any word to the other ranks."""
    metadata = tensor.metadata()
    shards = [Shard(torch.empty_like(shard.tensor, dtype=dtype), shard.metadata) for shard in tensor.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(  # noqa: SLF001 (the public ways all talk)
        shards,
        replace(metadata, tensor_properties=replace(metadata.tensor_properties, dtype=dtype, requires_grad=False)),
        process_group=tensor._process_group,  # noqa: SLF001 (of the ranks that share it)
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """What a parameter is called in its optimizer's state; a flattened one has many names.

    Attributes:
        names: of the tensors in it.
        full_name: what the (first) tensor is saved as.
    """

    names: Sequence[str]
    full_name: str


def optimizer_entry(place: Place, optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> Entry:
    """Return the adapter of an optimizer over parameters of `modules`, which the state holds under those names.

    Raises:
        OptionsError: it has parameters of an FSDP1 module and others besides.
    """
    own = {id(parameter) for group in _groups(optimizer) for parameter in group["params"]}
    for top, module in modules.items():
        if not _is_fsdp1(module) or own.isdisjoint(map(id, module.parameters())):
            continue
        names = {
            id(parameter): _Named(clean := [_without_compile(name) for name in found], f"{top}.{clean[0]}")
            for parameter, found in _get_param_to_fqns(module).items()
        }
        if own <= names.keys():
            return _FlatOptimizerEntry(place, optimizer, names, module)
        raise OptionsError(
            f"{place.name!r} has parameters of the FSDP module {top!r} and others besides, which cannot be named "
            "together; give each such module an optimizer of its own"
        )
    return _OptimizerEntry(place, optimizer, _parameter_names(optimizer, modules))


def _is_fsdp1(module: nn.Module) -> bool:
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def _parameter_names(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> dict[int, _Named]:
    """Name an optimizer's parameters as the modules in the state do; by place, if those do not know all of them."""
    names: dict[int, _Named] = {}
    for top, module in modules.items():
        for path, parameter in module.named_parameters():
            name = clean_name(module, path)
            names.setdefault(id(parameter), _Named([name], f"{top}.{name}"))
    own = [id(parameter) for group in _groups(optimizer) for parameter in group["params"]]
    if len({names[key].names[0] for key in own if key in names}) == len(own):
        return {key: names[key] for key in own}
    return {key: _Named([str(place)], "") for place, key in enumerate(own)}


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
