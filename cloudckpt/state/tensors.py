"""Save and restore tensors that stand in a state side by side, all of them at once.

A state may be one flat dict of many thousands of tensors. Where each of them is saved as it stands here, and filled
where it is, there is nothing to say of one that is not said of all; else each is looked at by itself, as a
`ValueEntry`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import cast

import torch
from torch import nn

from cloudckpt.format import Flat, check_text
from cloudckpt.state.entry import Entry, Place, named_twice
from cloudckpt.state.values import ValueEntry

__all__ = ["TensorsEntry", "is_plain_tensor"]

_PLAIN = frozenset((torch.Tensor, nn.Parameter))


def is_plain_tensor(value: object) -> bool:
    """Tell whether a value is a tensor, or a parameter, of PyTorch's own type."""
    return type(value) in _PLAIN


class TensorsEntry(Entry):
    """Tensors of PyTorch's own types, each under a key of the state that is its name."""

    is_itself = is_plain = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], holder: MutableMapping[str, object]) -> None:
        """Restore the tensors that `holder` has under these keys now."""
        super().__init__(Place([], "", tensors, holder, None))
        self._names = list(tensors)
        self._holder = holder

    @property
    def tops(self) -> list[str]:
        return self._names

    def singly(self) -> list[Entry]:
        return [
            ValueEntry(Place([name], name, self._holder[name], self._holder, name), frozenset()) for name in self._names
        ]

    def current(self) -> dict[str, object]:
        return {name: self._holder[name] for name in self._names}

    def plain_tensors(self) -> Mapping[str, torch.Tensor]:
        return cast("Mapping[str, torch.Tensor]", self.current())

    def flat(self, nested: object) -> Flat:
        flat = Flat()
        self._put(cast("Mapping[str, torch.Tensor]", nested), flat)
        return flat

    def put_into(self, flat: Flat) -> bool:
        self._put(self.plain_tensors(), flat)
        return True

    def _put(self, tensors: Mapping[str, torch.Tensor], flat: Flat) -> None:
        leaves, paths = flat.leaves, flat.paths
        for name, tensor in tensors.items():
            check_text(name)
            if name in leaves:
                raise named_twice(name)
            leaves[name] = tensor
            paths[name] = [name]
            if tensor.requires_grad:
                flat.notes[name] = {"requires_grad": True, "parameter": type(tensor) is nn.Parameter}

    def takes(self, name: str) -> bool:
        return False

    def is_done(self, live: object) -> bool:
        return True

    def load(self, restored: object, live: object) -> None:
        """Put those in their places that got memory of their own."""
        now = cast("Mapping[str, object]", live)
        for name, tensor in cast("Mapping[str, object]", restored).items():
            if tensor is not now[name]:
                self._holder[name] = tensor
