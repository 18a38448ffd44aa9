"""Save and restore the optimizer of an FSDP1 module, whose parameters are flattened and cut over the ranks.

Only PyTorch finds the tensors in them; knows its FSDP1 and the sharded tensors that come with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError
from cloudckpt.format import PathElement
from cloudckpt.late import ShardedTensor
from cloudckpt.ranks import named_ranks, those_taking_part
from cloudckpt.state.beside import Beside
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of, shape_of
from cloudckpt.state.groups import Name
from cloudckpt.state.optimizers import NamedEntry, groups_of, parameter_of

__all__ = ["flat_optimizer_entry", "refuse_fsdp1_elsewhere", "sharded"]


def refuse_fsdp1_elsewhere(name: str, module: nn.Module) -> None:
    """Refuse an FSDP1 module of which other ranks have a part that do not take part: it would wait for them for ever.

    Raises:
        OptionsError: it is; `name` is what it is called in the state.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    members = those_taking_part()
    here = {dist.get_rank()} if members is None else set(members.ranks)
    for part in FullyShardedDataParallel.fsdp_modules(module):
        ranks = dist.get_process_group_ranks(part.process_group)
        if outside := set(ranks) - here:
            raise OptionsError(
                f"{name!r} is cut by FSDP over {named_ranks(ranks)} of the job, all of which have to give their parts, "
                f"and {named_ranks(outside)} {'does' if len(outside) == 1 else 'do'} not take part; let all of them "
                "save and restore it (ranks, process_group)"
            )


def flat_optimizer_entry(place: Place, optimizer: Optimizer, beside: Beside) -> Entry | None:
    """Return the adapter of an optimizer over an FSDP1 module that stands beside it; None for any other optimizer.

    Raises:
        OptionsError: it has parameters of an FSDP1 module and others besides.
    """
    if not beside.fsdp1:
        return None
    from torch.distributed.fsdp._common_utils import _get_param_to_fqns

    own = {id(parameter) for group in groups_of(optimizer) for parameter in group["params"]}
    for top, module in beside.fsdp1.items():
        if own.isdisjoint(map(id, module.parameters())):
            continue
        fsdp_names = _get_param_to_fqns(module)
        names = {id(parameter): [_full(top, name) for name in found] for parameter, found in fsdp_names.items()}
        if own <= names.keys():
            return _FlatEntry(place, optimizer, beside, names, top)
        raise OptionsError(
            f"{place.name!r} has parameters of the FSDP module {top!r} and others besides, which cannot be named "
            "together; give each such module an optimizer of its own"
        )
    return None


class _FlatEntry(NamedEntry):
    """The optimizer of an FSDP1 module: each rank has pieces of flattened parameters, which only PyTorch can read."""

    talks = True

    # For a save it gathers them and cuts them again along their first dimension. A restore fills tensors that are cut
    # like the module's own, from which PyTorch makes the pieces.

    def __init__(
        self, place: Place, optimizer: Optimizer, beside: Beside, names: Mapping[int, Sequence[str]], top: str
    ) -> None:
        from torch.distributed.fsdp._common_utils import _get_param_to_fqns

        super().__init__(place, optimizer, beside, names)
        self._top = top
        self._module = beside.fsdp1[top]
        self._fsdp_names = {
            _full(top, name): name
            for names_of_one in _get_param_to_fqns(self._module).values()
            for name in names_of_one
        }

    def current(self) -> object:
        from torch.distributed.fsdp import FullyShardedDataParallel

        own = mapping_of(self.own_state_dict(), self.name)
        with sharded(self._module) as group:
            found = FullyShardedDataParallel.optim_state_dict(self._module, self._optimizer, own, group=group)
        # A parameter without state has an empty one, if only its unit was gathered.
        state = {self._own_key(name): value for name, value in found["state"].items() if value != {}}
        groups = zip(found["param_groups"], self._groups, strict=True)
        return {**own, "state": state, "param_groups": [{**group, "params": names} for group, names in groups]}

    def _own_key(self, name: str) -> str:
        """Return the full name of a parameter by FSDP's; what belongs to none has a key of its own."""
        full = _full(self._top, name)
        return full if full in self._fsdp_names else name

    def fillable(self) -> object:
        return {}  # `current` makes copies

    @cached_property
    def _cuts(self) -> Mapping[str, object]:
        """The module's tensors, cut over the ranks as a part of the state that is as large is."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        cuts = get_model_state_dict(self._module, options=StateDictOptions(strict=False))
        return {f"{self._top}.{name}": tensor for name, tensor in cuts.items()}

    def live_shape(self, name: Name) -> tuple[int, ...] | None:
        alike = self._cuts.get(str(name))
        return None if alike is None else shape_of(alike)

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        alike = self._cuts.get(str(parameter_of(below)))
        if isinstance(alike, ShardedTensor) and shape_of(alike) == shape:
            return cast("torch.Tensor", _empty_like_sharded(alike, dtype))
        if isinstance(alike, torch.Tensor) and shape_of(alike) == shape:
            return torch.empty_like(alike, dtype=dtype, requires_grad=False)
        return super().allocate(below, shape, dtype)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare also what is flattened into one parameter, which has one state."""
        misfit = super().compare(restored, dtypes)
        state = self.restored_state(restored)
        for names in self._names.values():
            keys = {frozenset(mapping_of(state.get(name, {}), self.name)) for name in names}
            if len(keys) > 1:
                misfit.reasons.append(
                    f"{self.name} has one state for all of {', '.join(map(str, names))}, and not so there"
                )
        return misfit

    def load(self, restored: object, live: object) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        state = self.restored_state(restored)
        if self._missing:
            kept = mapping_of(mapping_of(self.current(), self.name)["state"], self.name)
            state |= {name: kept[str(name)] for name in self._missing if name in kept}
        groups = self.restored_groups(restored)
        for group, names in zip(groups, self._groups, strict=True):
            group["params"] = [self._fsdp_names[str(name)] for name in names]
        with sharded(self._module) as process_group:
            flat = FullyShardedDataParallel.optim_state_dict_to_load(
                self._module,
                self._optimizer,
                {
                    "state": {self._fsdp_names.get(str(name), name): value for name, value in state.items()},
                    "param_groups": groups,
                },
                group=process_group,
            )
        self.load_numbered(restored, flat["state"], flat["param_groups"])


@contextmanager
def sharded(module: nn.Module) -> Iterator[ProcessGroup | None]:
    """Have FSDP1 give and take optimizer state in parts, not whole; yields the ranks that share the module."""
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"FSDP\.state_dict_type\(\)", category=FutureWarning)
        with FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        ):
            yield FullyShardedDataParallel.fsdp_modules(module)[0].process_group


def _full(top: str, name: str) -> str:
    return f"{top}.{name.replace('_orig_mod.', '')}"


def _empty_like_sharded(tensor: ShardedTensor, dtype: torch.dtype) -> ShardedTensor:
    """Return a tensor of another dtype, cut in the same way; without any word to the other ranks."""
    metadata = tensor.metadata()
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed._shard.sharded_tensor.shard import Shard

    shards = [Shard(torch.empty_like(shard.tensor, dtype=dtype), shard.metadata) for shard in tensor.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(  # noqa: SLF001 (the public ways all talk)
        shards,
        replace(metadata, tensor_properties=replace(metadata.tensor_properties, dtype=dtype, requires_grad=False)),
        process_group=tensor._process_group,  # noqa: SLF001 (of the ranks that share it)
    )
