"""Tell which modules and optimizers only PyTorch's own code saves and loads, and look at them without it.

Of such a module `state_dict` says no more than which tensors it holds, and `load_state_dict` does no more than copy
into them; of such an optimizer `state_dict` gives its parameters numbers. Each takes as long as all that we have to do
for a small one. What may do more is not plain: a method of its own, a hook, extra state, a wrapper, a tensor that is
not simply memory, code that somebody has put in the place of PyTorch's.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Container, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from cloudckpt.state.wrappers import is_wrapper

__all__ = ["PlainModules", "PlainOptimizers"]

_LOADING = "_load_from_state_dict"
_METHODS = frozenset(
    (
        *("state_dict", "_save_to_state_dict", "get_extra_state"),
        *("load_state_dict", _LOADING, "set_extra_state"),
        *("named_modules", "named_parameters", "_named_members"),
        *("__getattr__", "__getattribute__"),
    )
)
# What these add in loading is a count of batches, to a state that lacks one: no state that has all of their names.
_USUAL_LOADING = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)  # noqa: SLF001 (where torch has them)
_HIDDEN = "_non_persistent_buffers_set"
_REGISTRIES = (
    *("_parameters", "_buffers", "_modules", _HIDDEN),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_DICTS = (dict, OrderedDict)

_OPTIMIZER_METHODS = ("state_dict", "__getattribute__")
_BEFORE, _AFTER = "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"
_STATES = (dict, defaultdict)
# What PyTorch's own code gives an optimizer; in anything else there may be an optimizer that it wraps.
_OPTIMIZER_ATTRIBUTES = frozenset(
    (
        *("state", "param_groups", "defaults", "step", _BEFORE, _AFTER),
        *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
        *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
        *("_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured", "_opt_called"),
        *("_need_device_dtype_check_for_fused", "_step_supports_amp_scaling", "_params", "_numel_cache"),
    )
)


class PlainModules:
    """Looks at modules, and at each type of theirs once."""

    def __init__(self) -> None:
        self._types: dict[type, bool] = {}

    def tensors_of(self, module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]] | None:
        """Return the tensors of a plain module as its `state_dict` has them, not detached, and what versions it names.

        Returns:
            name → tensor; and path of a part → its version, of those parts whose is not 1. None of any other module.
        """
        tensors: dict[str, torch.Tensor] = {}
        versions: dict[str, object] = {}
        try:
            return (tensors, versions) if self._walk(module, "", tensors, versions) else None
        except KeyError:  # it never was initialized, which PyTorch's code says
            return None

    def parameters_of(self, module: nn.Module) -> list[tuple[str, nn.Parameter]] | None:
        """Return every parameter of a plain module under every name that it has; None of any other module."""
        found = self.tensors_of(module)
        if found is None:
            return None
        return [(name, tensor) for name, tensor in found[0].items() if isinstance(tensor, nn.Parameter)]

    def _walk(
        self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor], versions: dict[str, object]
    ) -> bool:
        """Note what a module and its parts hold, in the order of PyTorch's walk; tell whether all of them are plain."""
        kind = type(module)
        is_plain = self._types.get(kind)
        if is_plain is None:
            is_plain = self._types[kind] = _is_plain(kind)
        if not is_plain:
            return False
        held = module.__dict__
        parameters, buffers, parts = held["_parameters"], held["_buffers"], held["_modules"]
        if (
            not held.keys().isdisjoint(_METHODS)
            or _has_hooks(held)
            or type(parts) not in _DICTS
            or not _take(parameters, nn.Parameter, (), prefix, tensors)
            or not (_is_empty(buffers) or _take(buffers, torch.Tensor, held[_HIDDEN], prefix, tensors))
        ):
            return False
        if (version := module._version) != 1:  # noqa: SLF001 (where torch has it)
            versions[prefix[:-1]] = version
        return not parts or all(
            part is None or self._walk(part, f"{prefix}{name}.", tensors, versions) for name, part in parts.items()
        )


def _is_empty(held: object) -> bool:
    return not held and type(held) in _DICTS


def _take(
    held: Mapping[str, torch.Tensor | None],
    kind: type[torch.Tensor],
    hidden: Container[str],
    prefix: str,
    tensors: dict[str, torch.Tensor],
) -> bool:
    """Note the tensors in a registry of a module's; tell whether all of them are plain."""
    if type(held) not in _DICTS:
        return False
    for name, tensor in held.items():
        if tensor is not None and name not in hidden:
            if type(tensor) is not kind:
                return False
            tensors[prefix + name] = tensor
    return True


def _is_plain(kind: type) -> bool:
    if not issubclass(kind, nn.Module) or is_wrapper(kind) or any(hasattr(kind, name) for name in _REGISTRIES):
        return False
    return (
        getattr(kind, _LOADING) in _USUAL_LOADING
        and all(_is_unchanged(kind, nn.Module, name) for name in _METHODS - {_LOADING})
        and _is_torchs(getattr(kind, _LOADING))
    )


def _is_unchanged(kind: type, base: type, name: str) -> bool:
    """Tell whether a type has a method from a base of PyTorch's, where it is PyTorch's still."""
    return getattr(kind, name) is (method := getattr(base, name)) and _is_torchs(method)


def _is_torchs(method: object) -> bool:
    """Tell whether the code of a method is PyTorch's, or Python's; what wraps it may bear its name."""
    if method is object.__getattribute__:
        return True
    place = getattr(method, "__globals__", {}).get("__name__", "")
    return str(place).partition(".")[0] == "torch"


def _has_hooks(held: Mapping[str, object]) -> bool:
    return bool(
        held["_state_dict_hooks"]
        or held["_state_dict_pre_hooks"]
        or held["_load_state_dict_pre_hooks"]
        or held["_load_state_dict_post_hooks"]
    )


class PlainOptimizers:
    """Looks at optimizers, and at each type of theirs once."""

    def __init__(self) -> None:
        self._types: dict[type, bool] = {}

    def holds(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer's `state_dict` is PyTorch's own code alone, and there is none that it wraps."""
        kind = type(optimizer)
        is_plain = self._types.get(kind)
        if is_plain is None:
            is_plain = self._types[kind] = _is_plain_optimizer(kind)
        held = optimizer.__dict__
        return (
            is_plain
            and held.keys() <= _OPTIMIZER_ATTRIBUTES
            and not held.get(_BEFORE, True)
            and not held.get(_AFTER, True)
            and type(held.get("state")) in _STATES
            and type(held.get("param_groups")) is list
        )


def _is_plain_optimizer(kind: type) -> bool:
    is_known = f"{kind.__module__}.".startswith("torch.optim.")
    return is_known and all(_is_unchanged(kind, Optimizer, name) for name in _OPTIMIZER_METHODS)
