"""Lead all ranks through one restore: who reads what for whom, verified bytes into tensors, then the values."""

from cloudckpt.loading.files import read_files
from cloudckpt.loading.input import (
    Pieces,
    RankInput,
    by_part_name,
    decode_index,
    describe,
    part_targets,
    read_index,
    read_index_bytes,
)
from cloudckpt.loading.landing import Taker
from cloudckpt.loading.lead import load_state
from cloudckpt.loading.numbers import Group, groups_of, tensor_numbers
from cloudckpt.loading.reading import Contents, TensorInfo, read_contents, read_state
from cloudckpt.loading.rest import Rest

__all__ = [
    "Contents",
    "Group",
    "Pieces",
    "RankInput",
    "Rest",
    "Taker",
    "TensorInfo",
    "by_part_name",
    "decode_index",
    "describe",
    "groups_of",
    "load_state",
    "part_targets",
    "read_contents",
    "read_files",
    "read_index",
    "read_index_bytes",
    "read_state",
    "tensor_numbers",
]
