"""Train with payloads in the manner of torch_checkpointing, kept at a URL; start it again after a kill.

python examples/integrations/torch_checkpointing_loop.py --url s3://bucket/run-7
torchrun --standalone --nproc-per-node 2 examples/integrations/torch_checkpointing_loop.py --url s3://bucket/run-7
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from cloudckpt import CheckpointManager, KeepLast
from cloudckpt.integrations.torch_checkpointing import CloudPayloads


def main() -> None:
    """Train to the last step, from where the newest payload is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the root of the checkpoints")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    chosen = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # as torchrun would say
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, chosen.width), nn.ReLU(), nn.Linear(chosen.width, 1))
    for layer in (*model, model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def payload(step: int) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "step": step}

    manager = CheckpointManager(
        chosen.url, save_every_steps=chosen.every, retention=KeepLast(3), preemption=True, save_rng=False
    )
    with manager, CloudPayloads(manager) as payloads:
        step = 0
        if (newest := payloads.latest()) is not None:
            found = payloads.load(newest, into=payload(step))
            set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
            step = found["step"]
        while step < chosen.steps:
            step += 1
            numbers = torch.Generator().manual_seed(1000 * rank + step)
            x = torch.randn(8, 16, generator=numbers)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            torch.autograd.backward(loss)
            optimizer.step()
            dist.all_reduce(total := loss.detach().clone())
            if rank == 0:
                print("step", step, float(total).hex(), flush=True)
            if manager.should_save(step):
                payloads.save(f"step_{step}", payload(step))
            if manager.preempted:
                manager.wait()
                sys.exit(manager.exit_code)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
