"""Tell which buffers of a module are another rank's word, although this rank has contents of its own in them.

`DistributedDataParallel` broadcasts buffers from the first of its ranks when a forward begins. What other ranks count
in them afterwards (statistics of a BatchNorm) lasts until then, and no run ever uses it; so the first rank's is what
a checkpoint has to hold. Knows DDP; knows nothing of names in a checkpoint.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cloudckpt.ranks import those_taking_part

__all__ = ["buffers_of_others"]


def buffers_of_others(module: nn.Module) -> list[str]:
    """Return the buffers that another rank will overwrite with its own, by their paths in `module`.

    None of a module under `broadcast_buffers=False`, or with a hook that brings buffers together in a way of its own:
    there each rank's count, and they must be the same.
    """
    overwritten = {
        id(buffer)
        for part in module.modules()
        if isinstance(part, DistributedDataParallel) and _overwrites(part)
        for name, buffer in part.module.named_buffers()
        if name not in part.parameters_to_ignore
    }
    return [path for path, buffer in module.named_buffers(remove_duplicate=False) if id(buffer) in overwritten]


def _overwrites(part: DistributedDataParallel) -> bool:
    """Tell whether the buffers of this module come from another rank when the next forward begins."""
    members = those_taking_part()
    ranks = dist.get_process_group_ranks(part.process_group)
    # Of those that save: who is left out has no say, and else nobody would have one.
    is_first = members is None or dist.get_rank() == next(filter(members.ranks.__contains__, ranks), None)
    is_synced: bool = part.will_sync_module_buffers()  # type: ignore[no-untyped-call]
    return is_synced and not hasattr(part, "buffer_hook") and not is_first
