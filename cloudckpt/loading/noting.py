"""Plan which pieces of a checkpoint go into which targets, by DCP's planner, and note which boxes are complete.

Imported where a load has tensors of which that is not plain: distributed ones, several pieces, other memory than dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from cloudckpt.ranks import Countdown

__all__ = ["NotingPlanner"]

_Key = tuple[str, tuple[int, ...]]
"""Name of a tensor, and where a box of it starts."""


class NotingPlanner(DefaultLoadPlanner):
    """The stock planner, which also notes which boxes are complete, so that they can be passed on.

    Attributes:
        items: what is to be read.
    """

    items: Sequence[ReadItem] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, object], described: Metadata) -> Self:
        """Plan how tensors are filled, by name, from what a checkpoint is described to have."""
        planner = cls(flatten_state_dict=False)
        with torch.no_grad():
            planner.set_up_planner(dict(tensors), described, is_coordinator=False)
            planner._expect(planner.create_local_plan().items)
        return planner

    def leave(self, keys: Collection[_Key]) -> None:
        """Leave some boxes to others."""
        self._expect([item for item in self.items if _key_of(item.dest_index) not in keys])

    def local(self, key: _Key) -> torch.Tensor:
        """Return the memory of a box here."""
        found = self.lookup_tensor(MetadataIndex(key[0], torch.Size(key[1])))
        return found.detach()

    def _expect(self, items: Sequence[ReadItem]) -> None:
        """Count the parts of each box that are to come."""
        self.items = items
        self._missing = Counter(_key_of(item.dest_index) for item in items)
        self._watched: dict[_Key, Countdown] = {}

    def watch(self, keys: Sequence[_Key]) -> Countdown:
        """Return a countdown over some boxes."""
        open_keys = [key for key in keys if self._missing[key]]
        countdown = Countdown(len(open_keys))
        self._watched.update(dict.fromkeys(open_keys, countdown))
        return countdown

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Note that a part is complete; called by one thread at a time."""
        key = _key_of(read_item.dest_index)
        self._missing[key] -= 1
        if self._missing[key] == 0 and key in self._watched:
            self._watched[key].count_down()


def _key_of(index: MetadataIndex) -> _Key:
    return index.fqn, tuple(index.offset or ())
