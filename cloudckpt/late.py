"""Stand for types of PyTorch's whose modules take a second to import, without importing them.

Of a type whose module nobody has imported there is no instance, and no subclass: `isinstance` and `issubclass` of a
type here ask the real one, once it is there, and say no before. Nothing else can be done with them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = [
    "AsyncCollectiveTensor",
    "BytesStorageMetadata",
    "CheckpointWrapper",
    "DTensor",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FSDPModule",
    "FakeTensor",
    "FullyShardedDataParallel",
    "Replicate",
    "Shard",
    "ShardedTensor",
]

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:

    class _Late(type):
        """The type of what stands for another type."""

        place = ""

        def real(cls) -> type | None:
            """Return the type that this one stands for; None where nobody can have it."""
            module = sys.modules.get(cls.place)
            return None if module is None else getattr(module, cls.__name__, None)

        def __instancecheck__(cls, value: object) -> bool:
            real = cls.real()
            return real is not None and isinstance(value, real)

        def __subclasscheck__(cls, kind: type) -> bool:
            real = cls.real()
            return real is not None and issubclass(kind, real)

    def _late(place: str, name: str) -> type:
        return _Late(name, (), {"place": place})

    FakeTensor = _late("torch._subclasses.fake_tensor", "FakeTensor")
    AsyncCollectiveTensor = _late("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    ShardedTensor = _late("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
    CheckpointWrapper = _late("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper")
    DefaultLoadPlanner = _late("torch.distributed.checkpoint.default_planner", "DefaultLoadPlanner")
    DefaultSavePlanner = _late("torch.distributed.checkpoint.default_planner", "DefaultSavePlanner")
    BytesStorageMetadata = _late("torch.distributed.checkpoint.metadata", "BytesStorageMetadata")
    FSDPModule = _late("torch.distributed.fsdp", "FSDPModule")
    FullyShardedDataParallel = _late("torch.distributed.fsdp", "FullyShardedDataParallel")
    DTensor = _late("torch.distributed.tensor", "DTensor")
    Replicate = _late("torch.distributed.tensor", "Replicate")
    Shard = _late("torch.distributed.tensor", "Shard")
