"""Train on workers of Ray, whose state goes to a URL; Ray starts them anew where one dies, and they go on from there.

python examples/integrations/ray_train.py --url s3://bucket/run-7 --workers 2
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed.fsdp import fully_shard

from cloudckpt.integrations.ray import RayCheckpoints, url_of

KEEP = CheckpointConfig(num_to_keep=3)


def train(config: dict[str, Any]) -> None:
    """Train on one worker, to the last step, from where the newest checkpoint is."""
    rank = get_context().get_world_rank()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, config["width"]), nn.ReLU(), nn.Dropout(0.1), nn.Linear(config["width"], 1))
    if config["workers"] > 1:
        for layer in (*model, model):
            fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    with RayCheckpoints(config["url"], keep=KEEP) as checkpoints:
        restored = checkpoints.restore(state)
        for step in range(restored.step + 1 if restored else 1, config["steps"] + 1):
            numbers = torch.Generator().manual_seed(1000 * rank + step)
            x = torch.randn(8, 16, generator=numbers)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            torch.autograd.backward(loss)
            optimizer.step()
            if dist.is_initialized():
                dist.all_reduce(loss := loss.detach().clone())
            print("rank", rank, os.getpid(), "step", step, float(loss.detach()).hex(), flush=True)
            if step % config["every"] == 0 or step == config["steps"]:
                checkpoints.report(step, state, {"loss": float(loss.detach()), "step": step})


def main() -> None:
    """Start the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the root of the checkpoints")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    ray.init(num_cpus=chosen.workers + 1, include_dashboard=False)
    result = TorchTrainer(
        train,
        train_loop_config=vars(chosen),
        scaling_config=ScalingConfig(num_workers=chosen.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            storage_path=tempfile.mkdtemp(), checkpoint_config=KEEP, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()
    print("saved", url_of(result.checkpoint), flush=True)


if __name__ == "__main__":
    main()
