"""Lightning's Trainer with its ModelCheckpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import batch, network, width_of
from cloudckpt.integrations.lightning import CloudCheckpointIO

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("lightning",)


class _Model(lightning.LightningModule):
    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.net, self._width = network(size_bytes), width_of(size_bytes)

    def training_step(self, given: list[torch.Tensor]) -> torch.Tensor:
        return self.net(given[0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.cat([batch(step, self._width) for step in range(STEPS["resume"])])
        return DataLoader(TensorDataset(rows), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class _Watch(lightning.Callback):
    """Ends a resume before its first step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._meter.loaded(trainer.global_step, lambda: tensors_of(pl_module, trainer.optimizers[0]))


def _run(task: Task, meter: Meter, *, is_ours: bool = False, background: bool = False, by_path: bool = False) -> None:
    io = CloudCheckpointIO(task.url, background=background) if is_ours else None
    saver = ModelCheckpoint(
        dirpath="checkpoints" if is_ours else task.url,
        every_n_train_steps=SAVES_AFTER[0],
        save_top_k=-1,
        save_last=True,
    )
    trainer = lightning.Trainer(
        plugins=[io] if io else [],
        callbacks=[saver, *([_Watch(meter)] if task.op == "resume" else [])],
        max_steps=STEPS[task.op],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = _Model(task.size_bytes)
    if task.op == "resume":
        meter.loading()
        trainer.fit(model, ckpt_path=f"{task.url}/last.ckpt" if by_path else "last")
        return
    save, seen = trainer.save_checkpoint, set[int]()
    wait = (lambda: io.manager().wait()) if io and background else None

    def timed(path: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning saves each step under its own name, then as the last: the first one is measured."""
        step = trainer.global_step
        call = partial(save, path, *args, **kwargs)
        if step in seen:
            call()
            return
        seen.add(step)
        meter.save(step, tensors_of(model, trainer.optimizers[0]), call, wait)

    trainer.save_checkpoint = timed
    trainer.fit(model)


WAYS = {
    # For "last" Lightning 2.6.6 looks on the local disk for what it has listed in a bucket.
    "stock": Way("Lightning Trainer", '`ModelCheckpoint(dirpath=url)`, `ckpt_path="last"`', _run),
    "stock-path": Way("– resumed by a path", "the same, `ckpt_path=f'{url}/last.ckpt'`", partial(_run, by_path=True)),
    "cloudckpt": Way("– with cloudckpt", "`plugins=[CloudCheckpointIO(url)]`", partial(_run, is_ours=True)),
    "cloudckpt-background": Way(
        "– with cloudckpt, in the background",
        "`CloudCheckpointIO(url, background=True)`",
        partial(_run, is_ours=True, background=True),
    ),
}
