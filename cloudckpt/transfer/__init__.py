"""Pump bytes between tensors' memory and a store: in parallel, within a budget, and verified on the way in.

What is copied, and into which memory; who waits for whom, and for how long. Knows shards and blocks, but not what is
in them.
"""

from cloudckpt.transfer.download import Fetch, ShardSource, download, read_verified, span_bytes_for
from cloudckpt.transfer.memory import (
    COMMON_DTYPES,
    Scratch,
    Slab,
    Slabs,
    bytes_of,
    has_memory,
    inner_names,
    slab_bytes,
    tensor_over,
)
from cloudckpt.transfer.pool import AbandonedError, Budget, Gauge, Watch, Work, run_all
from cloudckpt.transfer.share import copying_threads, free_bytes, ranks_here
from cloudckpt.transfer.staging import Copy, Stage, StageClosedError
from cloudckpt.transfer.upload import Puts, ShardJob, upload

__all__ = [
    "COMMON_DTYPES",
    "AbandonedError",
    "Budget",
    "Copy",
    "Fetch",
    "Gauge",
    "Puts",
    "Scratch",
    "ShardJob",
    "ShardSource",
    "Slab",
    "Slabs",
    "Stage",
    "StageClosedError",
    "Watch",
    "Work",
    "bytes_of",
    "copying_threads",
    "download",
    "free_bytes",
    "has_memory",
    "inner_names",
    "ranks_here",
    "read_verified",
    "run_all",
    "slab_bytes",
    "span_bytes_for",
    "tensor_over",
    "upload",
]
