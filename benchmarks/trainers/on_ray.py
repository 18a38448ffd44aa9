"""Ray Train with one worker."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.trainers.meter import SAVES_AFTER, STEPS, Meter, ResumedError, Task, tensors_of
from benchmarks.trainers.ways import Way
from benchmarks.trainers.work import batch, network, width_of
from cloudckpt.integrations.ray import RayCheckpoints

__all__ = ["PACKAGES", "WAYS"]

PACKAGES = ("ray", "pyarrow")


def _train(config: dict[str, Any]) -> None:
    """Be the worker."""
    task = Task(**config["task"])
    meter = Meter(task)
    model = network(task.size_bytes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    try:
        (_ours if config["is_ours"] else _stock)(task, meter, state)
    except ResumedError:
        return  # its own word for an end


def _steps(task: Task, state: dict[str, Any]) -> Any:
    for step in range(STEPS["train"]):
        state["optimizer"].zero_grad()
        state["model"](batch(step, width_of(task.size_bytes))).square().mean().backward()
        state["optimizer"].step()
        if step + 1 in SAVES_AFTER:
            yield step + 1


def _stock(task: Task, meter: Meter, state: dict[str, Any]) -> None:
    def report(step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"step": step, **{name: one.state_dict() for name, one in state.items()}}, f"{folder}/state.pt")
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    if task.op == "resume":
        meter.loading()
        step = 0
        if (found := ray.train.get_checkpoint()) is not None:
            with found.as_directory() as folder:
                loaded = torch.load(Path(folder, "state.pt"))
            step = loaded["step"]
            for name, one in state.items():
                one.load_state_dict(loaded[name])
        meter.loaded(step, lambda: tensors_of(**state))
    for step in _steps(task, state):
        meter.save(step, tensors_of(**state), partial(report, step))


def _ours(task: Task, meter: Meter, state: dict[str, Any]) -> None:
    with RayCheckpoints(f"{task.url}/cloudckpt") as checkpoints:
        if task.op == "resume":
            meter.loading()
            restored = checkpoints.restore(state)
            meter.loaded(restored.step if restored else 0, lambda: tensors_of(**state))
        for step in _steps(task, state):
            meter.save(step, tensors_of(**state), partial(checkpoints.report, step, state, {"step": step}))


def _run(task: Task, meter: Meter, *, is_ours: bool = False) -> None:
    del meter  # the worker makes its own
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    # Arrow's client takes the endpoint from the URL, not from the environment.
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    storage = f"{task.url}?scheme=http&endpoint_override={host}&region=us-east-1&allow_bucket_creation=false"
    TorchTrainer(
        _train,
        train_loop_config={"task": asdict(task), "is_ours": is_ours},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="run", storage_path=storage),
    ).fit()
    ray.shutdown()


# Its controller asks the workers every 2 s what they have reported, and writes down then which checkpoints there are.
_REST_S = 6.0

WAYS = {
    "stock": Way("Ray Train", "`RunConfig(storage_path=url)`, `report(checkpoint=…)`", _run, _REST_S),
    "cloudckpt": Way("– with cloudckpt", "`RayCheckpoints(url).report(…)`", partial(_run, is_ours=True)),
}
