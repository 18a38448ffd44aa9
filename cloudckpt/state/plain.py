"""Tell which modules are saved and loaded by PyTorch's own code and nothing else, and look at them without it.

Of such a module `state_dict` says no more than which tensors it holds, and `load_state_dict` does no more than copy
into them; each takes as long as all that we have to do for a small module. What may do more is not plain: a method of
its own, a hook, extra state, a wrapper, a tensor that is not simply memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping

import torch
from torch import nn

from cloudckpt.state.wrappers import is_wrapper

__all__ = ["PlainModules"]

_METHODS = frozenset(
    (
        *("state_dict", "_save_to_state_dict", "get_extra_state"),
        *("load_state_dict", "_load_from_state_dict", "set_extra_state"),
        *("__getattr__", "__getattribute__"),
    )
)
_DICTS = (dict, OrderedDict)
_TENSORS = (nn.Parameter, torch.Tensor)


class PlainModules:
    """Looks at modules, and at each type of theirs once."""

    def __init__(self) -> None:
        self._types: dict[type[nn.Module], bool] = {}

    def tensors_of(self, module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]] | None:
        """Return the tensors of a plain module as its `state_dict` has them, not detached, and what versions it names.

        Returns:
            name → tensor; and path of a part → its version, of those parts whose is not 1. None of any other module.
        """
        tensors: dict[str, torch.Tensor] = {}
        versions: dict[str, object] = {}
        return (tensors, versions) if self._walk(module, "", tensors, versions) else None

    def _walk(
        self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor], versions: dict[str, object]
    ) -> bool:
        """Note what a module and its parts hold, in the order of PyTorch's walk; tell whether all of them are plain."""
        held = module.__dict__
        parts = held["_modules"]
        if not (
            self._is_plain(module, held)
            and type(parts) in _DICTS
            and _take(held["_parameters"], (), prefix, tensors)
            and _take(held["_buffers"], held["_non_persistent_buffers_set"], prefix, tensors)
        ):
            return False
        if (version := module._version) != 1:  # noqa: SLF001 (where torch has it)
            versions[prefix[:-1]] = version
        return not parts or all(
            part is None or self._walk(part, f"{prefix}{name}.", tensors, versions) for name, part in parts.items()
        )

    def _is_plain(self, module: nn.Module, held: dict[str, object]) -> bool:
        kind = type(module)
        is_plain = self._types.get(kind)
        if is_plain is None:
            is_plain = self._types[kind] = _is_plain(kind)
        return is_plain and not _has_hooks(held) and held.keys().isdisjoint(_METHODS)


def _take(
    held: Mapping[str, torch.Tensor | None], hidden: Container[str], prefix: str, tensors: dict[str, torch.Tensor]
) -> bool:
    """Note the tensors in a registry of a module's; tell whether all of them are plain."""
    if type(held) not in _DICTS:
        return False
    for name, tensor in held.items():
        if tensor is not None and name not in hidden:
            if type(tensor) not in _TENSORS:
                return False
            tensors[prefix + name] = tensor
    return True


def _is_plain(kind: type[nn.Module]) -> bool:
    return not is_wrapper(kind) and all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)


def _has_hooks(held: dict[str, object]) -> bool:
    return bool(
        held["_state_dict_hooks"]
        or held["_state_dict_pre_hooks"]
        or held["_load_state_dict_pre_hooks"]
        or held["_load_state_dict_post_hooks"]
    )
