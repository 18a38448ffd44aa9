"""Train by Lightning's Trainer, and carry on from the bucket wherever the last process ended, on any machine.

    python examples/integrations/train_lightning.py --url s3://bucket/run-7 --ranks 2

Lightning sees files in ./checkpoints; what they stand for is in the bucket. Told to end (SIGTERM), it saves the batch
that it is at. What fsspec needs to know beyond the URL stands in CLOUDCKPT_STORAGE_OPTIONS, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from cloudckpt import ResumableSampler
from cloudckpt.integrations.lightning import (
    CloudCheckpointIO,
    CloudModelParallelStrategy,
    CloudPreemption,
    CloudRandomState,
)


class Batches:
    """A loader with a position, so that Lightning goes on in the middle of an epoch with the batches that are left."""

    def __init__(self, batch_size: int) -> None:
        """Hold 96 samples, the same in each process."""
        numbers = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(96, 16, generator=numbers), torch.randn(96, 4, generator=numbers))
        self._sampler, self._going = ResumableSampler(data, seed=7), iter(())
        self._loader = DataLoader(data, batch_sampler=self._sampler.in_batches(batch_size))
        self._length = self._sampler.steps_left(batch_size)
        self.state_dict, self._batch_size = self._sampler.state_dict, batch_size

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self._going, "close"):
            self._going.close()
        if not self._sampler.steps_left(self._batch_size):
            self._sampler.set_data_epoch(
                int(str(self._sampler.state_dict()["data_epoch"])) + 1
            )  # Lightning asks for no more
        self._going = self._sampler.batches(self._loader)
        return self._going

    def __len__(self) -> int:
        return self._length

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._sampler.load_state_dict(state)


class Model(lightning.LightningModule):
    """Two layers with dropout, whose losses come out as one JSON object a line."""

    def __init__(self, width: int = 32, *, shard: bool = False) -> None:
        """Make the layers; `width` is saved as a hyper-parameter."""
        super().__init__()
        self.save_hyperparameters(ignore=["shard"])
        self._shard = shard
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))

    def configure_model(self) -> None:
        """Shard them over the ranks, if that is wanted."""
        if self._shard and not hasattr(self.net, "set_reshard_after_forward"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch, and print it with its bits."""
        del index
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        line = {"rank": self.global_rank, "step": self.trainer.global_step, "loss": float(loss).hex()}
        sys.stdout.write(json.dumps(line) + "\n")  # at once: ranks share it
        sys.stdout.flush()
        return loss

    def train_dataloader(self) -> Batches:
        """Return the loader, made where there are ranks to share the samples."""
        return Batches(8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    """Train to the last epoch, from where the newest checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the root of the checkpoints")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=3, help="save at each step that is a multiple of it")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--shard", action="store_true", help="FSDP2 in the place of DDP")
    parser.add_argument("--background", action="store_true", help="save while training goes on")
    args = parser.parse_args()
    options = json.loads(os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "null"))
    lightning.seed_everything(3)
    sharded = CloudModelParallelStrategy(data_parallel_size=args.ranks, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        plugins=[CloudCheckpointIO(args.url, storage_options=options, background=args.background)],
        callbacks=[
            ModelCheckpoint(
                "checkpoints", save_last=True, save_top_k=2, monitor="step", mode="max", every_n_train_steps=args.every,
                save_on_exception=True,
            ),
            CloudRandomState(),
            CloudPreemption(),
        ],
        strategy=sharded if args.shard else "ddp" if args.ranks > 1 else "auto",
        accelerator="cpu", devices=args.ranks, max_epochs=args.epochs, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(shard=args.shard), ckpt_path="last")


if __name__ == "__main__":
    main()
