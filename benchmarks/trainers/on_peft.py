"""A LoRA adapter of PEFT in a loop of one's own; saved is the adapter alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, Task
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import fetched, gpt_sizes, newest, sent
from cloudckpt import CheckpointManager
from cloudckpt.integrations.peft import Adapter

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("peft",)

# Of rank `width`, the adapter of a layer's four matrices has 2 + 4 + 5 + 5 times the width squared: the bytes count
# here, not the quality.
_VALUES_PER_LAYER = 16


def _base(task: Task) -> tuple[Any, LoraConfig]:
    torch.manual_seed(1)
    sizes = gpt_sizes(task.size_bytes, values_per_layer=_VALUES_PER_LAYER)
    rank, targets = sizes["n_embd"], ["c_attn", "c_proj", "c_fc"]
    return GPT2LMHeadModel(GPT2Config(**sizes)), LoraConfig(r=rank, target_modules=targets, fan_in_fan_out=True)


def _tensors(model: Any) -> list[torch.Tensor]:
    return [value for name, value in sorted(model.named_parameters()) if "lora_" in name]


def _steps(model: Any) -> Any:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for step in range(STEPS["train"]):
        tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in SAVES_AFTER:
            yield step + 1


def _stock(task: Task, meter: Meter, *, is_put: bool = False) -> None:
    base, configuration = _base(task)
    folder = "out" if is_put else task.url
    if task.op == "resume":
        meter.loading()
        if is_put:
            Path(folder).mkdir(exist_ok=True)
            fetched(task.url, Path(folder))
        if (found := newest(folder)) is None:
            meter.loaded(0, list)
            return
        model = PeftModel.from_pretrained(base, str(found), is_trainable=True)
        meter.loaded(int(found.name.removeprefix("step-")), partial(_tensors, model))

    model = get_peft_model(base, configuration)

    def call(step: int) -> None:
        model.save_pretrained(f"{folder}/step-{step}")
        if is_put:
            sent(Path(folder, f"step-{step}"), task.url)

    for step in _steps(model):
        meter.save(step, _tensors(model), partial(call, step))


def _ours(task: Task, meter: Meter) -> None:
    base, configuration = _base(task)
    with CheckpointManager(task.url, save_rng=False) as manager:
        if task.op == "resume":
            meter.loading()
            model = get_peft_model(base, configuration)
            restored = manager.restore({"adapter": Adapter(model)})
            meter.loaded(restored.step if restored else 0, partial(_tensors, model))
        model = get_peft_model(base, configuration)
        for step in _steps(model):
            meter.save(step, _tensors(model), partial(manager.save, step, {"adapter": Adapter(model)}))


WAYS = {
    "stock": Way("PEFT", "`model.save_pretrained(f'{url}/step-4')`", _stock),
    "put": Way("– to a disk, then `fs.put`", "`save_pretrained(folder)`, `put`", partial(_stock, is_put=True)),
    "cloudckpt": Way("– with cloudckpt", '`manager.save(step, {"adapter": Adapter(model)})`', _ours),
}
