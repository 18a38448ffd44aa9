"""Keep the state that an object has now, so that it can be given back when a restore fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch

from cloudckpt.state.protocol import Stateful

__all__ = ["backup_of"]

# It is kept for as long as it may have to be given back.
_LIMIT_BYTES = 64 << 20


def backup_of(stateful: Stateful) -> Callable[[], None] | None:
    """Return what gives an object its present state back; None if there is none, it is large, or cannot be copied."""
    try:
        before = stateful.state_dict()
        kept = copy.deepcopy(before) if sum(_sizes(before)) <= _LIMIT_BYTES else None
    except Exception:  # noqa: BLE001 (a user's object; what cannot be had or copied cannot be given back)
        kept = None
    if kept is None:
        return None
    return partial(_give_back, stateful, kept, set(getattr(stateful, "__dict__", ())))


def _give_back(stateful: Stateful, state: dict[str, object], attributes: set[str]) -> None:
    """Give an object its old state, and take away the attributes that it had not then."""
    stateful.load_state_dict(state)
    for name in set(getattr(stateful, "__dict__", ())) - attributes:
        delattr(stateful, name)


def _sizes(value: object) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.nbytes
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _sizes(child)
