"""Have an optimizer load its state by its own code, without the one thing that torch does to it there: casts.

`Optimizer.load_state_dict` makes every tensor of a parameter's state the parameter's dtype, whatever it was: a count in
int64 becomes a float, float32 moments of a bfloat16 parameter lose their bits; and it builds containers anew, so that a
text becomes that of a generator, and a deque forgets how long it may be. So the state passes by that code in boxes,
from the last hook that sees what is given to the `__setstate__` that torch calls with what it made. What an optimizer's
own code and hooks do, before and after, stays done. Lists of groups stay the same lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.optim import Optimizer

from cloudckpt.state.beside import wrapped_in

__all__ = ["saved_types"]


@contextmanager
def saved_types(optimizer: Optimizer, changed: Mapping[int, torch.dtype]) -> Iterator[None]:
    """Keep the types of a state that `optimizer` loads meanwhile: of its tensors, and of what holds them.

    Args:
        optimizer: whose state it is; what it wraps counts, too.
        changed: id of a parameter → its dtype when it was saved, of those that have another one now. State of the
            saved dtype follows its parameter into the new one, unless it is a single number.
    """
    with ExitStack() as undo:
        undo.callback(_keep_lists, [(each, vars(each).get("param_groups")) for each in wrapped_in(optimizer)])
        for each in wrapped_in(optimizer):
            # A wrapper that never was initialized as an optimizer has no hooks.
            if isinstance(vars(each).get("_optimizer_load_state_dict_pre_hooks"), dict):
                undo.callback(each.register_load_state_dict_pre_hook(_box).remove)
                undo.callback(_unbox_in, each, changed)  # for code that sets the state without __setstate__
                vars(each)["__setstate__"] = partial(_set_state, each.__setstate__, changed)
                undo.callback(vars(each).pop, "__setstate__", None)
        yield


def _keep_lists(groups: list[tuple[Optimizer, object]]) -> None:
    """Have each optimizer go on with the list of groups that it had: a wrapper and what it wraps may share one."""
    for optimizer, before in groups:
        if isinstance(before, list):
            before[:] = list(optimizer.param_groups)
    for optimizer, before in groups:
        if isinstance(before, list):
            optimizer.param_groups = before


@dataclass(frozen=True, slots=True)
class _Boxed:
    """State of one parameter, in which torch sees no tensor and no container."""

    state: object
    is_step_moved: bool


def _box(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        # The only ones that keep the count of steps beside the parameter; others have it on the CPU.
        is_step_moved = bool(group.get("fused") or group.get("capturable"))
        for number in group["params"]:
            if number in state and not isinstance(state[number], _Boxed):
                state[number] = _Boxed(state[number], is_step_moved)
    return {**state_dict, "state": state}


def _set_state(own: Callable[[dict[str, Any]], None], changed: Mapping[int, torch.dtype], made: dict[str, Any]) -> None:
    """Unbox what torch has made before the optimizer's `own` __setstate__ sees it."""
    _unbox(made["state"], changed)
    own(made)


def _unbox_in(optimizer: Optimizer, changed: Mapping[int, torch.dtype]) -> None:
    _unbox(optimizer.state, changed)


def _unbox(state: dict[torch.Tensor, Any], changed: Mapping[int, torch.dtype]) -> None:
    for parameter, boxed in state.items():
        if isinstance(boxed, _Boxed):
            state[parameter] = _moved(boxed.state, partial(_placed, parameter, boxed, changed), None)


def _placed(
    parameter: torch.Tensor, boxed: _Boxed, changed: Mapping[int, torch.dtype], part: torch.Tensor, key: object
) -> torch.Tensor:
    """Return a tensor of a parameter's state on the device where torch wants it."""
    is_following = part.dim() > 0 and part.dtype == changed.get(id(parameter))
    is_left = key == "step" and not boxed.is_step_moved
    return part.to(
        device=part.device if is_left else parameter.device, dtype=parameter.dtype if is_following else part.dtype
    )


def _moved(value: object, move: Callable[[torch.Tensor, object], torch.Tensor], key: object) -> object:
    """Return a value with its tensors moved, in containers of their own that are of the same types."""
    if isinstance(value, torch.Tensor):
        return move(value, key)
    if isinstance(value, dict | list | deque):
        new = cast("dict[object, object]", copy(value))
        for place, child in value.items() if isinstance(value, dict) else enumerate(value):
            new[place] = _moved(child, move, place if isinstance(value, dict) else None)
        return new
    if isinstance(value, tuple):
        children = [_moved(child, move, None) for child in value]
        if all(new is child for new, child in zip(children, value, strict=True)):
            return value
        return type(value)._make(children) if hasattr(value, "_make") else type(value)(children)
    if isinstance(value, set | frozenset):
        return type(value)(_moved(child, move, None) for child in value)
    return value
