"""Train a small GPT on Python's own standard library, and carry on from the bucket wherever the last process ended.

Start it as often as you like with the same URL: it restores the newest checkpoint, or begins at step 0 where there
is none. Saves go on in the background while it trains. Told to end (SIGTERM), it saves the step that it is at, and ends
with status 143. What it has to say it prints as one JSON object a line, so that a program (`demo.py`) can follow it.

    python train_gpt.py s3://bucket/run-7

What fsspec needs to know beyond the URL stands in CLOUDCKPT_STORAGE_OPTIONS, as JSON, as for the `cloudckpt` command.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from corpus import Windows, endless, read_corpus
from digest import digests
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from cloudckpt import (
    CheckpointManager,
    KeepBest,
    KeepLast,
    Options,
    Preemption,
    ResumableSampler,
    SaveHandle,
)

CONTEXT = 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training job; every field is an option of the command line.

    Attributes:
        url: the root that holds the checkpoints.
        steps: training steps in all, over all processes.
        threads: of PyTorch. Float sums depend on how work is split, so it stays the same in every process.
        workers: processes that read the data.
        grace_s: seconds from SIGTERM to the kill that follows it.
    """

    url: str
    steps: int = 200
    save_every: int = 20
    shard_mib: float = 64.0
    layers: int = 4
    width: int = 256
    batch_size: int = 8
    seed: int = 20
    threads: int = 1
    workers: int = 1
    grace_s: float = 20.0


def train(settings: Settings) -> None:
    """Train to the last step, saving on the way; picks up the newest checkpoint under `settings.url` first."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(mode=True)

    model = GPT(GPTConfig(context=CONTEXT, layers=settings.layers, width=settings.width))
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total=settings.steps))
    data = Windows(read_corpus(), context=CONTEXT)
    sampler = ResumableSampler(data, seed=settings.seed)
    loader = DataLoader(data, batch_size=settings.batch_size, sampler=sampler, num_workers=settings.workers)
    state: dict[str, object] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "sampler": sampler,
        "config": {"layers": settings.layers, "width": settings.width, "lr": LEARNING_RATE},
    }

    with CheckpointManager(
        settings.url,
        storage_options=json.loads(os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "{}")),
        retention=[KeepLast(3), KeepBest("loss", n=1, mode="min")],
        save_every_steps=settings.save_every,
        preemption=Preemption(grace_s=settings.grace_s),
        options=Options(shard_bytes=int(settings.shard_mib * 2**20)),
    ) as manager:
        restored = manager.restore(state)
        first = restored.step + 1 if restored else 0
        say("start", first=first, restored=restored.url if restored else None, samples=len(data))
        saves: list[SaveHandle] = []
        for step, (inputs, targets) in zip(range(first, settings.steps), endless(sampler, loader), strict=False):
            loss = train_step(model, optimizer, scheduler, inputs, targets)
            say("step", step=step, loss=loss.hex(), data_epoch=sampler.data_epoch, position=sampler.consumed)
            if manager.should_save(step):
                say("saving", step=step)
                saves.append(manager.async_save(step, state, metrics={"loss": loss}))
            if manager.preempted:
                manager.wait()
                say_saved(saves)
                sys.exit(manager.exit_code)
            say_saved(saves)
        manager.wait()
        say_saved(saves)
    say("end", parameters=sum(p.numel() for p in model.parameters()), digests=digests(state))


def train_step(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, inputs: Tensor, targets: Tensor
) -> float:
    """Take one optimizer step and return its loss (a float32, exactly)."""
    loss = model(inputs, targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return float(loss.item())


def warm_up_then_cosine(step: int, *, total: int) -> float:
    """Return the share of the full learning rate at `step`: up in a tenth of the run, then down to a tenth."""
    warm_up = max(1, total // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def say_saved(saves: list[SaveHandle]) -> None:
    """Print which saves have ended since, and forget them; raises what a failed one failed with."""
    while saves and saves[0].done():
        handle = saves.pop(0)
        if saved := handle.result():
            say("saved", step=handle.step, bytes=saved.total_bytes, url=saved.url)


def say(event: str, **facts: object) -> None:
    """Print one event as a line of JSON, at once."""
    print(json.dumps({"event": event, **facts}), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and log to standard error."""
    parser = argparse.ArgumentParser(description="Train a small GPT, with its checkpoints under URL.")
    parser.add_argument("url", metavar="URL")
    for field in fields(Settings)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    train(Settings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
