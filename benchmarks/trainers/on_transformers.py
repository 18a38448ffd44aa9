"""Hugging Face's Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import fetched, gpt_sizes, newest, sent
from cloudckpt.integrations.transformers import CloudCheckpoints

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("transformers", "accelerate")


class _CloudTrainer(CloudCheckpoints, Trainer):
    """The line."""


class _Watch(TrainerCallback):
    """Ends a resume before its first step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        inner = known["optimizer"].optimizer
        self._meter.loaded(state.global_step, lambda: tensors_of(known["model"], inner))


def _made(task: Task, output_dir: str, kind: type[Trainer] = Trainer, **more: Any) -> Trainer:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**gpt_sizes(task.size_bytes // 3)))
    tokens = torch.randint(0, 256, (2 * STEPS["resume"], 32), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        output_dir,
        max_steps=STEPS[task.op],
        per_device_train_batch_size=2,
        save_steps=SAVES_AFTER[0],
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return kind(model=model, args=arguments, train_dataset=data, **more)


def _run(task: Task, meter: Meter, *, is_ours: bool = False, is_put: bool = False) -> None:
    if is_ours:
        trainer: Any = _made(task, "out", _CloudTrainer, checkpoints=task.url)
    else:
        trainer = _made(task, "out" if is_put else task.url)
    if task.op == "resume":
        meter.loading()
        if is_put:
            Path("out").mkdir(exist_ok=True)
            fetched(task.url, Path("out"))
        trainer.add_callback(_Watch(meter))
        trainer.train(resume_from_checkpoint=True)
        return
    save = trainer._save_checkpoint  # noqa: SLF001 (where a Trainer saves, it has no public name)

    def timed(*args: Any, **kwargs: Any) -> None:
        def call() -> None:
            save(*args, **kwargs)
            if is_put and (made := newest("out")):
                sent(made, task.url)

        inner = trainer.optimizer.optimizer
        wait = trainer.checkpoints.wait if is_ours else None
        meter.save(trainer.state.global_step, tensors_of(trainer.model, inner), call, wait)

    trainer._save_checkpoint = timed  # noqa: SLF001
    trainer.train()


WAYS = {
    "stock": Way("Hugging Face Trainer", "`output_dir=url`", _run),
    "put": Way("– to a disk, then `fs.put`", "`output_dir=folder`, a callback", partial(_run, is_put=True)),
    "cloudckpt": Way(
        "– with cloudckpt", "`class T(CloudCheckpoints, Trainer)`, `checkpoints=url`", partial(_run, is_ours=True)
    ),
}
