"""Train a small GPT with FSDP2 on any number of ranks, and carry on from the bucket with any other number.

    torchrun --standalone --nproc-per-node 4 train_fsdp.py --url s3://bucket/run-8
    torchrun --standalone --nproc-per-node 2 train_fsdp.py --url s3://bucket/run-8     # goes on where the 4 ended

Each rank holds a slice of every parameter and of the optimizer's moments, and trains on its share of each batch. The
batch of a step is the same whatever the number of ranks, so a training can shrink or grow and stay the same training.
For checkpoints every rank does what one process does in `train_gpt.py`; nobody gathers anything. If one rank is told
to end (SIGTERM), all of them save the step that they are at, and end with status 143.

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
from corpus import Windows, endless, read_corpus
from fsdp_record import Record
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from train_gpt import warm_up_then_cosine

from cloudckpt import CheckpointManager, KeepBest, KeepLast, Options, Preemption, ResumableSampler

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
        grace_s: seconds from SIGTERM to the kill that follows it.
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
    grace_s: float = 20.0


def train(settings: Settings, device: torch.device) -> int:
    """Train to the last step, saving on the way; picks up the newest checkpoint under `settings.url` first.

    Returns the status to end with.
    """
    model = sharded_model(settings, device)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total=settings.steps))
    sampler, loader = shared_data(settings)
    state: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler}
    record = Record(Path(settings.record) if settings.record else None)

    with CheckpointManager(
        settings.url,
        storage_options=json.loads(os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "{}")),
        retention=[KeepLast(3), KeepBest("loss", n=1, mode="min")],
        save_every_steps=settings.save_every,
        # Stopped by nobody: torchrun sends SIGTERM to all ranks when the first one has ended.
        preemption=Preemption(grace_s=settings.grace_s),
        options=Options(shard_bytes=int(settings.shard_mib * 2**20)),
    ) as manager:
        restored = manager.restore(state)
        first = 0
        if restored and restored.step is not None:
            first = restored.step + 1
            record.restored(restored.step, restored.url, comparable(state))
        for step, batch in zip(range(first, settings.steps), endless(sampler, loader), strict=False):
            inputs, targets = (part.to(device) for part in batch)
            loss = train_step(model, optimizer, scheduler, inputs, targets)
            record.step(step, loss)
            if manager.should_save(step):
                manager.async_save(step, state, metrics={"loss": loss})
                record.saved(step, comparable(state))
            if manager.preempted:
                manager.wait()
                record.left(step, manager.exit_code)
                return manager.exit_code
    return 0


def shared_data(settings: Settings) -> tuple[ResumableSampler, DataLoader[tuple[Tensor, Tensor]]]:
    """Return this rank's share of the data: the batches of all ranks make up the same global batch for any number."""
    share, rest = divmod(settings.batch_size, dist.get_world_size())
    if rest:
        raise ValueError(f"a batch of {settings.batch_size} cannot be split evenly over {dist.get_world_size()} ranks")
    data = Windows(read_corpus(), context=CONTEXT)
    sampler = ResumableSampler(data, seed=settings.seed)
    # Whole batches alone: only of parts of one size is the mean of the ranks' means the mean.
    return sampler, DataLoader(data, batch_size=share, sampler=sampler, drop_last=True)


def comparable(state: dict[str, object]) -> dict[str, object]:
    """Return the state without the number of ranks, which the sampler names for people."""
    sampler = state["sampler"]
    place = [sampler.data_epoch, sampler.consumed] if isinstance(sampler, ResumableSampler) else sampler
    return {**state, "sampler": place}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, train, and log to standard error; return the status to end with."""
    parser = argparse.ArgumentParser(description="Train a small GPT on several ranks, with its checkpoints under URL.")
    parser.add_argument("--url", required=True)
    for field in fields(Settings)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    settings = Settings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    code = train(settings, join())
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    # Not by way of Python's own end: FSDP keeps gloo's threads alive beyond `destroy_process_group`, and one that is
    # still letting go of a tensor by then would abort a process that has done all its work.
    os._exit(status)
