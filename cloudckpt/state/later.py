"""Keep optimizers from being used while the contents of their state are still to come.

    hold ──▶ step, state_dict, load_state_dict, copies and pickles, `settle` of ours ──▶ wait for all, or raise why
    taken_over ──▶ a restore may fill what an earlier one left, whatever became of that

All else of such an optimizer is final before it is held: its groups, and which tensors it has. Knows optimizers and who
is to be waited for; reads nothing. The training's thread enters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, cast

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["Coming", "hold", "settle", "taken_over"]


class Coming(Protocol):
    """Bytes on their way into tensors of optimizers."""

    def wait(self) -> None:
        """Return when all are there; raises why they never will be."""

    def join(self) -> bool:
        """Wait for the end, whatever it is; tell whether all are there."""


class _Held:
    def __init__(self, optimizer: Optimizer, coming: Coming) -> None:
        self.coming = coming
        self._handles: Sequence[RemovableHandle] = [
            register(lambda *_: coming.wait())
            for register in (
                optimizer.register_step_pre_hook,
                optimizer.register_state_dict_pre_hook,
                optimizer.register_load_state_dict_pre_hook,
            )
        ]
        # What copy and pickle ask an object for; a copy has no hooks that would wait.
        self._attributes = vars(optimizer)
        self._attributes["__getstate__"] = partial(_state_once_there, weakref.ref(optimizer), coming)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._attributes.pop("__getstate__", None)


def _state_once_there(optimizer: weakref.ref[Optimizer], coming: Coming) -> object:
    coming.wait()
    one = cast("Optimizer", optimizer())  # who asks for its state holds it
    return type(one).__getstate__(one)


_HELD: weakref.WeakKeyDictionary[Optimizer, _Held] = weakref.WeakKeyDictionary()


def hold(optimizers: Collection[Optimizer], coming: Coming) -> None:
    """Let optimizers wait for their state at its first use."""
    for optimizer in optimizers:
        _let_go(optimizer)
        _HELD[optimizer] = _Held(optimizer, coming)


def settle(objects: Iterable[object]) -> None:
    """Wait for the state of the optimizers among some objects that are held; raises why it never comes.

    Not in a hook: it takes them away, which torch goes through meanwhile.
    """
    for one in objects if _HELD else ():
        if isinstance(one, Optimizer) and (held := _HELD.get(one)) is not None:
            held.coming.wait()
            _let_go(one)


def _let_go(optimizer: Optimizer) -> None:
    if (held := _HELD.pop(optimizer, None)) is not None:
        held.remove()


@contextmanager
def taken_over() -> Iterator[Callable[[Collection[object]], None]]:
    """Let a restore fill what earlier ones left, once nobody else does; what is not whole even so stays held.

    Yields:
        What is to be told the objects that are restored.
    """
    left: Mapping[Optimizer, Coming] = {
        optimizer: held.coming for optimizer, held in _HELD.items() if not held.coming.join()
    }
    for optimizer in list(_HELD):
        _let_go(optimizer)
    restored: set[int] = set()
    try:
        yield lambda objects: restored.update(map(id, objects))
    finally:
        for optimizer, coming in left.items():
            if id(optimizer) not in restored:
                hold([optimizer], coming)
