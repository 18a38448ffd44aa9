"""torchtitan's manager of checkpoints (DCP) with its optimizers and schedulers, as its trainer calls it."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import batch, network, width_of
from cloudckpt.integrations.torchtitan import CloudCheckpointManager

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("torchtitan",)


class _Progress:
    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def _run(task: Task, meter: Meter, *, kind: Any, mode: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=0, world_size=1)  # noqa: PTH109
    model, progress = network(task.size_bytes), _Progress()
    optimizers = default_adamw(lr=1e-3, fused=False).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=1).build(optimizers=optimizers, training_steps=9)
    checkpointer = kind.Config(
        enable=True, folder=task.url, interval=SAVES_AFTER[0], async_mode=mode, last_save_model_only=False
    ).build(
        dataloader=None, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers,
        states={"train_state": progress}, sd_adapter=None,
    )  # fmt: skip
    inner = next(iter(optimizers))
    if task.op == "resume":
        meter.loading()
        checkpointer.load()
        meter.loaded(progress.step, lambda: tensors_of(model, inner))
    width = width_of(task.size_bytes)
    while progress.step < STEPS["train"]:
        progress.step += 1
        optimizers.zero_grad()
        model(batch(progress.step, width)).square().mean().backward()
        optimizers.step()
        schedulers.step()
        save = partial(checkpointer.save, progress.step)
        if progress.step in SAVES_AFTER:
            meter.save(progress.step, tensors_of(model, inner), save, checkpointer.maybe_wait_for_saving)
        else:
            save()
    checkpointer.close()
    dist.destroy_process_group()


def _way(title: str, line: str, kind: Any, mode: str) -> Way:
    return Way(title, line, partial(_run, kind=kind, mode=mode))


WAYS = {
    "stock": _way("torchtitan (DCP)", "`folder=url`", CheckpointManager, "disabled"),
    "stock-async": _way("torchtitan (DCP), `async`", '`folder=url, async_mode="async"`', CheckpointManager, "async"),
    "cloudckpt": _way("– with cloudckpt", "`CloudCheckpointManager.Config`", CloudCheckpointManager, "disabled"),
    "cloudckpt-async": _way("– with cloudckpt, `async`", "the same", CloudCheckpointManager, "async"),
}
