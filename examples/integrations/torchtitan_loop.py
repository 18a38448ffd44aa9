"""Train with torchtitan's parts (optimizers, schedules, loader, FSDP2), and go on from a URL wherever it was killed.

torchrun --standalone --nproc-per-node 2 examples/integrations/torchtitan_loop.py --url s3://bucket/run-7

In torchtitan's own Trainer it is one line of a config: `checkpoint=CloudCheckpointManager.Config(…)`. That one needs a
GPU; this loop calls the manager of checkpoints as it does, and runs on any machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from cloudckpt.integrations.torchtitan import CloudCheckpointManager


class Samples(IterableDataset[dict[str, Tensor]]):
    """An endless stream of numbers, another one on each rank, that knows where it stands."""

    def __init__(self, rank: int) -> None:
        """Begin at the beginning."""
        self._rank, self._index = rank, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            numbers = torch.Generator().manual_seed(1000 * self._rank + self._index)
            self._index += 1
            x = torch.randn(16, generator=numbers)
            yield {"x": x, "y": x.sum(0, keepdim=True)}

    def state_dict(self) -> dict[str, int]:
        """Return the number of samples given."""
        return {"index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place."""
        self._index = state["index"]


class Progress:
    """What torchtitan's Trainer saves of itself."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step that was the last one."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be at a saved step."""
        self.step = state["step"]


def main() -> None:
    """Train to the last step, from where the newest checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the root of the checkpoints")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    chosen = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # as torchrun would say
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, chosen.width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(chosen.width, 1))
    for layer in (*model, model):
        fully_shard(layer)
    optimizers = default_adamw(lr=1e-2).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=5).build(optimizers=optimizers, training_steps=chosen.steps)
    rank, progress = dist.get_rank(), Progress()
    loader = ParallelAwareDataloader(Samples(rank), rank, dist.get_world_size(), batch_size=8)
    checkpointer = CloudCheckpointManager.Config(
        enable=True, folder=chosen.url, interval=chosen.interval, keep_latest_k=3, async_mode="async",
        last_save_model_only=False,
    ).build(
        dataloader=loader, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers,
        states={"train_state": progress}, sd_adapter=None,
    )  # fmt: skip

    checkpointer.load()
    batches = iter(loader)
    while progress.step < chosen.steps:
        progress.step += 1
        batch = next(batches)
        optimizers.zero_grad()
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        torch.autograd.backward(loss)
        optimizers.step()
        schedulers.step()
        dist.all_reduce(total := loss.detach().clone())
        if rank == 0:
            print("step", progress.step, float(total).hex(), flush=True)
        checkpointer.save(progress.step, last_step=progress.step == chosen.steps)
    checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
