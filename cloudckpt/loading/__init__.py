"""Lead all ranks through one restore: who reads what for whom, verified bytes into tensors, then the values."""

from cloudckpt.loading.input import Pieces, RankInput, by_part_name, describe, part_targets, read_index
from cloudckpt.loading.lead import load_state
from cloudckpt.loading.numbers import Group, groups_of, tensor_numbers
from cloudckpt.loading.reading import Contents, TensorInfo, read_contents, read_state

__all__ = [
    "Contents",
    "Group",
    "Pieces",
    "RankInput",
    "TensorInfo",
    "by_part_name",
    "describe",
    "groups_of",
    "load_state",
    "part_targets",
    "read_contents",
    "read_index",
    "read_state",
    "tensor_numbers",
]
