"""Train a small GPT with FSDP2 on any number of ranks, and carry on from the bucket with any other number.

    torchrun --standalone --nproc-per-node 4 train_fsdp.py --url s3://bucket/run-8
    torchrun --standalone --nproc-per-node 2 train_fsdp.py --url s3://bucket/run-8     # goes on where the 4 ended

Each rank holds a slice of every parameter and of the optimizer's moments, and trains on its share of each batch. The
batch of a step is the same whatever the number of ranks, so a training can shrink or grow and stay the same training.
For checkpoints every rank does what one process does in `train_gpt.py`; nobody gathers anything.

What fsspec needs to know beyond the URL stands in CLOUDCKPT_STORAGE_OPTIONS, as JSON, as for the `cloudckpt` command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from corpus import Loader, read_corpus
from fsdp_record import Record
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from train_gpt import warm_up_then_cosine

from cloudckpt import CheckpointManager, KeepBest, KeepLast, Options

CONTEXT = 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training job; every field is an option of the command line.

    Attributes:
        url: the root that holds the checkpoints.
        record: file for one line of JSON per step, restore and save; none if empty.
        steps: training steps in all, over all starts.
        batch_size: sequences per step over all ranks; a multiple of the number of ranks.
    """

    url: str
    record: str = ""
    steps: int = 200
    save_every: int = 20
    shard_mib: float = 64.0
    layers: int = 4
    width: int = 256
    batch_size: int = 12
    seed: int = 20


def train(settings: Settings, device: torch.device) -> None:
    """Train to the last step, saving on the way; picks up the newest checkpoint under `settings.url` first."""
    model = sharded_model(settings, device)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total=settings.steps))
    loader = Loader(read_corpus(), context=CONTEXT, batch_size=settings.batch_size, seed=settings.seed)
    state: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    record = Record(Path(settings.record) if settings.record else None)

    with CheckpointManager(
        settings.url,
        storage_options=json.loads(os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "{}")),
        retention=[KeepLast(3), KeepBest("loss", n=1, mode="min")],
        save_every_steps=settings.save_every,
        options=Options(shard_bytes=int(settings.shard_mib * 2**20)),
    ) as manager:
        restored = manager.restore(state)
        first = 0
        if restored and restored.step is not None:
            first = restored.step + 1
            record.restored(restored.step, restored.url, state)
        for step in range(first, settings.steps):
            inputs, targets = (share_of_this_rank(batch).to(device) for batch in next(loader))
            loss = train_step(model, optimizer, scheduler, inputs, targets)
            record.step(step, loss)
            if manager.should_save(step):
                manager.save(step, state, metrics={"loss": loss})
                record.saved(step, state)


def sharded_model(settings: Settings, device: torch.device) -> nn.Module:
    """Return the model with each block, and the rest, sharded over all ranks."""
    torch.manual_seed(settings.seed)  # the same weights on every rank, until each keeps its slice of them
    # No dropout: each rank would draw its own, and another number of ranks would be another training.
    model = GPT(GPTConfig(context=CONTEXT, layers=settings.layers, width=settings.width, dropout=0.0)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def share_of_this_rank(batch: Tensor) -> Tensor:
    """Return this rank's part of a global batch; all parts are of one size, so a mean of their means is the mean."""
    share, rest = divmod(len(batch), dist.get_world_size())
    if rest:
        raise ValueError(f"a batch of {len(batch)} cannot be split evenly over {dist.get_world_size()} ranks")
    start = dist.get_rank() * share
    return batch[start : start + share]


def train_step(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, inputs: Tensor, targets: Tensor
) -> float:
    """Take one optimizer step and return the loss of the global batch, the same number on every rank."""
    loss = model(inputs, targets)
    optimizer.zero_grad()
    loss.backward()  # FSDP leaves each rank its slice of the gradient's mean over the ranks
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total.item()) / dist.get_world_size()


def join() -> torch.device:
    """Join the ranks that torchrun started and return this rank's device."""
    torch.use_deterministic_algorithms(mode=True)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # float sums depend on how work is split
        dist.init_process_group("gloo")
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by the deterministic algorithms
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and log to standard error."""
    parser = argparse.ArgumentParser(description="Train a small GPT on several ranks, with its checkpoints under URL.")
    parser.add_argument("--url", required=True)
    for field in fields(Settings)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    settings = Settings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    train(settings, join())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Not by way of Python's own end: FSDP keeps gloo's threads alive beyond `destroy_process_group`, and one that is
    # still letting go of a tensor by then would abort a process that has done all its work.
    os._exit(0)
