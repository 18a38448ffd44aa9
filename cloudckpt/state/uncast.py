"""Have an optimizer load its state by its own code, and undo one thing that torch does there: casts.

`Optimizer.load_state_dict` makes every tensor of a parameter's state the parameter's dtype, whatever it was: a count in
int64 becomes a float, float32 moments of a bfloat16 parameter lose their bits, and a text becomes that of a generator.
Two hooks stand nearest to that code: one sees what it is given (after all hooks of others), one gives back (before
those). What an optimizer's own code and hooks do stays done. Lists of groups stay the same lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["saved_types", "wrapped_in"]


def wrapped_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, from the outermost."""
    found: dict[int, Optimizer] = {}
    pending: list[object] = [optimizer]
    while pending:
        each = pending.pop(0)
        if isinstance(each, list | tuple):
            pending += [item for item in each if isinstance(item, Optimizer)]
        elif isinstance(each, Optimizer) and id(each) not in found:
            found[id(each)] = each
            pending += vars(each).values()
    return list(found.values())


@contextmanager
def saved_types(optimizer: Optimizer, changed: Mapping[int, torch.dtype]) -> Iterator[None]:
    """Keep the dtypes of a state that `optimizer` loads meanwhile.

    Args:
        optimizer: whose state it is; what it wraps counts, too.
        changed: id of a parameter → its dtype when it was saved, of those that have another one now. State of the
            saved dtype follows its parameter into the new one, unless it is a single number.
    """
    with ExitStack() as hooks:
        hooks.callback(_keep_lists, [(each, vars(each).get("param_groups")) for each in wrapped_in(optimizer)])
        for each in wrapped_in(optimizer):
            # A wrapper that never was initialized as an optimizer has no hooks.
            if isinstance(vars(each).get("_optimizer_load_state_dict_pre_hooks"), dict):
                given: list[dict[str, Any]] = []
                before = each.register_load_state_dict_pre_hook(partial(_see, given))
                after = each.register_load_state_dict_post_hook(partial(_give_back, given, changed), prepend=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield


def _keep_lists(groups: list[tuple[Optimizer, object]]) -> None:
    """Have each optimizer go on with the list of groups that it had: a wrapper and what it wraps may share one."""
    for optimizer, before in groups:
        if isinstance(before, list):
            before[:] = list(optimizer.param_groups)
    for optimizer, before in groups:
        if isinstance(before, list):
            optimizer.param_groups = before


def _see(given: list[dict[str, Any]], _: Optimizer, state_dict: dict[str, Any]) -> None:
    given[:] = [state_dict]


def _give_back(given: list[dict[str, Any]], changed: Mapping[int, torch.dtype], optimizer: Optimizer) -> None:
    saved = given.pop()
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"] and parameter in optimizer.state:
            loaded = optimizer.state[parameter]
            optimizer.state[parameter] = _exact(saved["state"][number], loaded, changed.get(id(parameter)))


def _exact(saved: object, loaded: Any, followed: torch.dtype | None) -> Any:  # noqa: ANN401 (whatever a state holds)
    """Return what was loaded, as it was saved; what the optimizer has made another kind of thing stays that."""
    if isinstance(saved, torch.Tensor):
        is_same = not isinstance(loaded, torch.Tensor) or loaded.dtype == saved.dtype
        is_following = saved.dim() > 0 and saved.dtype == followed
        return loaded if is_same or is_following else saved.to(loaded.device)
    if isinstance(saved, str):
        return saved
    if isinstance(saved, dict) and isinstance(loaded, dict):
        for key in saved.keys() & loaded.keys():
            loaded[key] = _exact(saved[key], loaded[key], followed)
    elif isinstance(saved, list | tuple) and type(saved) is type(loaded) and len(saved) == len(loaded):
        return type(saved)(_exact(*pair, followed) for pair in zip(saved, loaded, strict=True))
    return loaded
