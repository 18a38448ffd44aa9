"""Say which boxes of the state's tensors this rank holds, and hand out the tensors behind them.

    plain dense tensors, nearly all ──▶ a box each, all of the tensor
    DTensors, ShardedTensors, tensors that plan themselves ──DCP's planner──▶ a box for each part that this rank has

Knows tensors and DCP's planner; knows nothing of stores, shards or commits. A state may have many thousands of tensors,
of which each has one look here before the save, and DCP's planner would have five.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from cloudckpt.errors import OptionsError
from cloudckpt.format import DTYPE_NAMES, Box, BoxTable, Column
from cloudckpt.saving.source import check_tensor, is_plainly_dense, whole_box

__all__ = ["Holding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one rank could write.

    Attributes:
        boxes: in the order of the state.
        table: the same as columns.
    """

    boxes: Sequence[Box]
    table: BoxTable
    _tensors: Sequence[torch.Tensor | Callable[[], torch.Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, object]) -> Holding:
        """Look at the tensors of a state, by name.

        Raises:
            UnsupportedValueError: one that has no dense bytes.
        """
        boxes: list[Box] = []
        found: list[torch.Tensor | Callable[[], torch.Tensor]] = []
        others = {
            name: tensor for name, tensor in tensors.items() if not is_plainly_dense(cast("torch.Tensor", tensor))
        }
        planned = _planned(others) if others else {}
        for name, tensor in tensors.items():
            if name in others:
                boxes += [box for box, _ in planned.get(name, ())]
                found += [resolve for _, resolve in planned.get(name, ())]
            else:
                plain = cast("torch.Tensor", tensor)
                boxes.append(whole_box(name, plain))
                found.append(plain)
        return cls(boxes=boxes, table=BoxTable.of(boxes), _tensors=found)

    def tensor(self, row: int) -> torch.Tensor:
        """Return the tensor behind a box: on its device, in its strides; it may need a gradient.

        Raises:
            OptionsError: it has another dtype or shape by now than when it was looked at.
        """
        found = self._tensors[row]
        if not isinstance(found, torch.Tensor):
            return found()
        box = self.boxes[row]
        if found.shape != box.shape or DTYPE_NAMES.get(found.dtype) != box.dtype:
            raise OptionsError(
                f"tensor {box.name!r} was {box.dtype} {box.shape} when the save began, and is {found.dtype} "
                f"{tuple(found.shape)} now; change nothing of a state before its save has returned"
            )
        return found

    def some(self, rows: Column) -> Holding:
        """Return some of the boxes, in the order of `rows`."""
        if len(rows) == len(self.boxes):
            return self
        chosen = rows.tolist()
        boxes = [self.boxes[row] for row in chosen]
        return Holding(boxes=boxes, table=BoxTable.of(boxes), _tensors=[self._tensors[row] for row in chosen])


def _planned(tensors: Mapping[str, object]) -> dict[str, list[tuple[Box, Callable[[], torch.Tensor]]]]:
    """Have DCP's planner say what this rank holds of tensors; each box with what returns its tensor."""
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    from cloudckpt.saving.source import chunk_of, is_elsewhere, tensor_of

    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, ShardedTensor):
            check_tensor(name, tensor)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), None, is_coordinator=True)
    found: dict[str, list[tuple[Box, Callable[[], torch.Tensor]]]] = {}
    for item in planner.create_local_plan().items:
        if not is_elsewhere(item):
            found.setdefault(item.index.fqn, []).append((chunk_of(item), partial(tensor_of, item, planner)))
    return found
