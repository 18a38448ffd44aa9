"""Turn all that is in a state into plain data by name, to be compared bit for bit and sent to another process."""

from __future__ import annotations

import collections
import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from tests.any_state.building import Built
from tests.any_state.modules import clean, clean_names


def bits(value: Any) -> Any:  # noqa: PLR0911 (a kind of value a line)
    """Turn any value into plain data: two are equal if and only if types, dtypes, shapes and all bits are."""
    name = type(value).__name__
    if isinstance(value, torch.Tensor):
        return name, _bits_of_tensor(value)
    if isinstance(value, dict):
        # Of a dict the order is kept where its type is about it.
        pairs = [(bits(key), bits(child)) for key, child in value.items()]
        more = getattr(value, "default_factory", None)
        return name, pairs if isinstance(value, collections.OrderedDict) else sorted(pairs, key=repr), repr(more)
    if isinstance(value, list | tuple | collections.deque):
        return name, [bits(child) for child in value], getattr(value, "maxlen", None)
    if isinstance(value, set | frozenset):
        return name, sorted((bits(child) for child in value), key=repr)
    if isinstance(value, io.BytesIO):
        return name, value.getvalue(), value.tell()
    if isinstance(value, np.ndarray | np.generic):
        return name, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, float | complex):
        return name, struct.pack("<dd", value.real, value.imag)
    return name, repr(value)


def _bits_of_tensor(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "uninitialized"
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def look(built: Built) -> dict[str, Any]:
    """Return all that is in a state by name, as plain data: of modules and optimizers by clean names."""
    found: dict[str, Any] = {}
    for name, module in built.modules.items():
        found[name] = _look_at_module(module)
    names = {key: f"{top}.{name}" for top, module in built.modules.items() for key, name in clean_names(module).items()}
    for name, optimizer in built.optimizers.items():
        found[name] = _look_at_optimizer(optimizer, names)
    for name, (of, scheduler) in built.schedulers.items():
        groups = built.optimizers[of].param_groups
        order = [min((names.get(id(each), "") for each in group["params"]), default="") for group in groups]
        found[name] = bits(_by_group(scheduler.state_dict(), order))
    for name, stateful in built.statefuls.items():
        found[name] = bits(stateful.state_dict())
    for name in built.values:
        value = built.value(name)
        if name.startswith("c"):
            module = built.modules[f"m{name[1:]}"]
            value = {clean(module, key): child for key, child in value.items()}
        found[name] = _as_plain(bits(value))
    return found


def _as_plain(found: Any) -> Any:
    """Take a Parameter among values for the tensor that it is where none stood to be filled."""
    if isinstance(found, tuple | list):
        return type(found)("Tensor" if each == "Parameter" else _as_plain(each) for each in found)
    return found


def _look_at_module(module: nn.Module) -> Any:
    state = {clean(module, name): bits(value) for name, value in module.state_dict().items()}
    tensors = {
        clean(module, path): bits(parameter) for path, parameter in module.named_parameters(remove_duplicate=False)
    }
    ids = collections.defaultdict(list)
    for path, tensor in module.named_parameters(remove_duplicate=False):
        ids[id(tensor)].append(clean(module, path))
    tied = sorted(sorted(names) for names in ids.values())
    upgrades = sum(getattr(part, "upgrades", 0) for part in module.modules())
    return {"state": state, "parameters": tensors, "tied": tied, "upgrades": upgrades}


def _look_at_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> Any:
    of_each: dict[str, Any] = {}
    empty = []
    for group in optimizer.param_groups:
        options = {key: bits(value) for key, value in group.items() if key not in ("params", "param_names")}
        if not group["params"]:
            empty.append(options)
        for place, parameter in enumerate(group["params"]):
            own = bits(optimizer.state.get(parameter, {}))
            given = group["param_names"][place] if "param_names" in group else None
            of_each[names.get(id(parameter), f"?{place}")] = (own, options, given)
    rest = {key: bits(value) for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}
    return {"each": of_each, "empty": empty, "rest": rest}


def _by_group(value: Any, order: Sequence[str]) -> Any:
    """Turn each list with a number per group into those by the groups' names, which may stand in another order."""
    if isinstance(value, dict):
        return {key: _by_group(child, order) for key, child in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) == len(order) and all(child is None or isinstance(child, float) for child in value):
        return dict(zip(order, value, strict=True))
    return [_by_group(child, order) for child in value]


def lost(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Name what differs, as deep as it can be named."""
    for key in dict.fromkeys([*wanted, *found]):
        one, other = found.get(key, "nothing"), wanted.get(key, "nothing")
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key}.{name}" for name in lost(one, other))
        else:
            yield f"{key}: {str(one)[:200]} and not {str(other)[:200]}"
