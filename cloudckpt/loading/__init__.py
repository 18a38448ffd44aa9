"""Lead all ranks through one restore: who reads what for whom, verified bytes into tensors, then the values."""

from cloudckpt.loading.input import Pieces, RankInput, describe, read_index
from cloudckpt.loading.lead import fill, load_state

__all__ = ["Pieces", "RankInput", "describe", "fill", "load_state", "read_index"]
