"""Storage for PyTorch's own `torch.distributed.checkpoint.save` and `load`, which lead; we write and read."""

from cloudckpt.dcp.reader import CloudReader
from cloudckpt.dcp.writer import CloudWriter

__all__ = ["CloudReader", "CloudWriter"]
