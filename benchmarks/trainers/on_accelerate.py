"""A loop of one's own with accelerate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import batch, fetched, network, newest, sent, width_of
from cloudckpt import CheckpointManager
from cloudckpt.integrations.accelerate import load_state, save_state

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("accelerate",)


class _Counter:
    """The step, as accelerate keeps what is registered."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class _Loop:
    def __init__(self, task: Task, project_dir: str) -> None:
        named = ProjectConfiguration(project_dir=project_dir, automatic_checkpoint_naming=True)
        self.accelerator, self.counter = Accelerator(cpu=True, project_config=named), _Counter()
        model = network(task.size_bytes)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        self.accelerator.register_for_checkpointing(self.counter)
        self._width = width_of(task.size_bytes)

    def train(self) -> Any:
        while self.counter.step < STEPS["train"]:
            self.accelerator.backward(self.model(batch(self.counter.step, self._width)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.counter.step += 1
            if self.counter.step in SAVES_AFTER:
                yield self.counter.step

    def tensors(self) -> Any:
        return tensors_of(self.model, self.optimizer.optimizer)


def _stock(task: Task, meter: Meter, *, is_put: bool = False) -> None:
    project = "out" if is_put else task.url
    loop = _Loop(task, project)
    folder = Path(project, "checkpoints")
    if task.op == "resume":
        meter.loading()
        if is_put:
            folder.mkdir(parents=True, exist_ok=True)
            fetched(task.url, folder)
        if newest(folder):  # it asks for a folder, and cannot begin anew by itself
            loop.accelerator.load_state()
        meter.loaded(loop.counter.step, loop.tensors)

    def call() -> None:
        loop.accelerator.save_state()
        if is_put and (made := newest(folder)):
            sent(made, task.url)

    for step in loop.train():
        meter.save(step, loop.tensors(), call)


def _ours(task: Task, meter: Meter) -> None:
    loop = _Loop(task, "out")
    with CheckpointManager(task.url) as manager:
        if task.op == "resume":
            meter.loading()
            meter.loaded(load_state(loop.accelerator, manager).step, loop.tensors)
        for step in loop.train():
            meter.save(step, loop.tensors(), partial(save_state, loop.accelerator, manager, step))


WAYS = {
    "stock": Way("accelerate", "`ProjectConfiguration(project_dir=url)`, `save_state()`", _stock),
    "put": Way("– to a disk, then `fs.put`", "`save_state()`, `put`", partial(_stock, is_put=True)),
    "cloudckpt": Way("– with cloudckpt", "`save_state(accelerator, manager, step)`", _ours),
}
