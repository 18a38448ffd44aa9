"""Train weights that Megatron-Core shards over ranks, saved to a URL; start it again after a kill.

python examples/integrations/megatron_loop.py --url s3://bucket/run-7
torchrun --standalone --nproc-per-node 2 examples/integrations/megatron_loop.py --url s3://bucket/run-7
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from cloudckpt.integrations.megatron import load, newest, save


class Rows:
    """This rank's rows of a weight that all ranks have together, and what trains them."""

    def __init__(self, count: int) -> None:
        """Make them, with moments that something can be loaded into."""
        self.weight = torch.randn(count, 16, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.0, foreach=False)
        self.weight.grad = torch.zeros_like(self.weight)
        self.optimizer.step()
        self.optimizer.state[self.weight]["step"].zero_()
        self.optimizer.param_groups[0]["lr"] = 1e-2

    def state(self) -> dict[str, Any]:
        """Say what of the whole this rank holds, in Megatron's words."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        moments = self.optimizer.state[self.weight]
        rows = {"weight": self.weight.data, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        return {
            "rows": {name: ShardedTensor.from_rank_offsets(name, one, (0, rank, ranks)) for name, one in rows.items()},
            "count": ShardedTensor.from_rank_offsets("count", moments["step"].reshape(1), replica_id=rank),
            "generator": ShardedObject("generator", torch.get_rng_state(), (ranks,), (rank,)),
        }

    def train(self) -> torch.Tensor:
        """Train by one sample of this rank's generator; return the loss."""
        x = torch.randn(16)
        self.optimizer.zero_grad()
        loss = (self.weight @ x - x.sum()).square().mean()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()


def main() -> None:
    """Train to the last step, from where the newest checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="what the checkpoints stand below")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    chosen = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # as torchrun would say
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    rows = Rows(chosen.width // ranks)

    found = [newest(chosen.url) if rank == 0 else None]
    dist.broadcast_object_list(found)
    step = 0
    if found[0] is not None:
        loaded = load(rows.state(), found[0][1])  # fills the tensors of the state
        torch.set_rng_state(loaded["generator"])
        step = loaded["iteration"]
    while step < chosen.steps:
        step += 1
        dist.all_reduce(loss := rows.train())
        if rank == 0:
            print("step", step, float(loss).hex(), flush=True)
        if step % chosen.every == 0:
            save({**rows.state(), "iteration": step}, f"{chosen.url}/iter_{step:07d}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
