"""PyTorch's torch_checkpointing in a loop of one's own, as its pages say for a machine without CUDA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch_checkpointing import CheckpointManager
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import batch, fetched, network, newest, sent, width_of
from cloudckpt.integrations.torch_checkpointing import CloudPayloads

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("torch_checkpointing",)


class _Loop:
    def __init__(self, task: Task) -> None:
        self.model = network(task.size_bytes)
        self.optimizer, self.step = torch.optim.AdamW(self.model.parameters(), lr=1e-3), 0
        self._width = width_of(task.size_bytes)

    def train(self) -> Any:
        while self.step < STEPS["train"]:
            self.optimizer.zero_grad()
            self.model(batch(self.step, self._width)).square().mean().backward()
            self.optimizer.step()
            self.step += 1
            if self.step in SAVES_AFTER:
                yield self.step

    def payload(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def take(self, found: Any) -> None:
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step = int(found["step"])

    def tensors(self) -> Any:
        return tensors_of(self.model, self.optimizer)


def _stock(task: Task, meter: Meter, *, is_put: bool = False) -> None:
    loop, folder = _Loop(task), Path("out" if is_put else task.url)
    staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
    manager = CheckpointManager.Config(
        save=AsyncCheckpointSaverConfig(staging_config=staging),
        # Its default, O_DIRECT without alignment, is refused by ext4 and xfs (EINVAL), and nothing is saved.
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()
    if task.op == "resume":
        meter.loading()
        if is_put:
            folder.mkdir(exist_ok=True)
            fetched(task.url, folder)
        if found := newest(folder):
            # A fresh optimizer has no moments to load into, and those saved would be left out.
            loop.take(manager.load(str(found), into=dict.fromkeys(loop.payload())))
        meter.loaded(loop.step, loop.tensors)

    saved: list[Any] = []

    def wait(step: int) -> None:
        saved.pop().result()
        if is_put:
            sent(folder / f"step_{step}", task.url)

    for step in loop.train():
        name = f"{'out' if is_put else task.url}/step_{step}"

        def call(name: str = name) -> None:
            saved.append(manager.save(name, loop.payload()))

        meter.save(step, loop.tensors(), call, partial(wait, step))
    manager.close()


def _ours(task: Task, meter: Meter) -> None:
    loop = _Loop(task)
    with CloudPayloads(task.url) as payloads:
        if task.op == "resume":
            meter.loading()
            if (newest_id := payloads.latest()) is not None:
                loop.take(payloads.load(newest_id))
            meter.loaded(loop.step, loop.tensors)
        for step in loop.train():
            call = partial(payloads.save, f"step_{step}", loop.payload())
            meter.save(step, loop.tensors(), call, payloads.manager.wait)


WAYS = {
    "stock": Way("torch_checkpointing", "`save(f'{url}/step_4', …)`, `use_direct_io=False`", _stock),
    "put": Way("– to a disk, then `fs.put`", "`save(…).result()`, `put`", partial(_stock, is_put=True)),
    "cloudckpt": Way("– with cloudckpt", "`CloudPayloads(url)`", _ours),
}
