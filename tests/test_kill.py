"""SIGKILL at random moments of a save loop: what was acknowledged stays, and what is there is whole.

Each round a child process restores, checks every byte of every checkpoint against what its step must hold, and then
saves as fast as it can, until it is killed. Children are forked from a server that has imported everything, so that
a round costs a fraction of a second and the moments of the kills spread over the saves themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, KeepLast, Options
from cloudckpt.keys import MANIFEST_NAME
from cloudckpt.options import KIB
from cloudckpt.store import open_store
from raw_access import FreshPrefix

KILLS = 30
OPTIONS = Options(shard_bytes=256 * KIB, block_bytes=64 * KIB, span_bytes=128 * KIB, memory_budget_bytes=4096 * KIB)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of `step` holds: a megabyte and a half in tensors that are split and tensors that share."""
    generator = torch.Generator().manual_seed(step)
    return {
        "split": torch.randn(512, 512, generator=generator),
        "half": torch.randn(333, 77, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(step),
        **{f"small.{number}": torch.randn(17, generator=generator) for number in range(20)},
    }


def check_whole(found: Mapping[str, object], step: int) -> None:
    """Compare a restored state with what its step must hold, bit by bit."""
    expected = tensors_of(step)
    assert found["config"] == {"step": step, "odd": (1, None, float("inf"))}
    tensors = found["tensors"]
    assert isinstance(tensors, dict)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), f"{name} of step {step}"


def work(url: str, storage_options: dict[str, object], engine: str, told: Connection) -> None:
    """Be one incarnation of a job: restore, verify everything, save until killed."""
    torch.set_num_threads(1)
    with CheckpointManager(
        url, storage_options=storage_options, engine=engine, options=OPTIONS, retention=[KeepLast(3)], prune_grace_s=0
    ) as manager:
        state: dict[str, object] = {"tensors": tensors_of(0), "config": {}}
        restored = manager.restore(state)
        step = -1
        if restored is not None:
            assert restored.step is not None
            step = restored.step
            check_whole(state, step)
        for checkpoint in manager.checkpoints():
            found = cloudckpt.read(checkpoint.url, storage_options=storage_options, engine=engine)
            assert checkpoint.step is not None
            check_whole(found, checkpoint.step)
        told.send(("restored", step))
        while True:
            step += 1
            state = {"tensors": tensors_of(step), "config": {"step": step, "odd": (1, None, float("inf"))}}
            manager.save(step, state)
            told.send(("saved", step))


@dataclass
class Record:
    """What the rounds showed."""

    acknowledged: int = -1
    restored: list[int] = field(default_factory=list)
    saved_count: int = 0


def run_round(url: str, storage_options: dict[str, object], engine: str, delay_s: float, record: Record) -> None:
    """Start an incarnation, kill it `delay_s` after it has restored, and note what it acknowledged."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cloudckpt", "s3fs", "obstore"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(url, storage_options, engine, theirs), daemon=True)
    child.start()
    theirs.close()
    assert ours.poll(60), "the child neither restored nor failed"
    said, step = ours.recv()
    assert said == "restored"
    record.restored.append(step)
    assert step >= record.acknowledged, f"step {record.acknowledged} was acknowledged and step {step} was restored"
    time.sleep(delay_s)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    try:
        while True:
            _, record.acknowledged = ours.recv()
            record.saved_count += 1
    except EOFError:
        ours.close()


def orphans(url: str, storage_options: dict[str, object]) -> int:
    """Count attempts that hold objects and no manifest."""
    store = open_store(url, storage_options=storage_options)
    try:
        listed = [store.list(prefix).objects for prefix in store.list("", delimiter="/").prefixes if "step-" in prefix]
        return sum(1 for objects in listed if objects and not any(o.key.endswith(MANIFEST_NAME) for o in objects))
    finally:
        store.close()


def kill_often(url: str, storage_options: dict[str, object], engine: str) -> None:
    """Kill a save loop `KILLS` times at random moments, and check after each what the next one finds."""
    moments = random.Random(20_231)
    record = Record()
    for _ in range(KILLS):
        run_round(url, storage_options, engine, moments.uniform(0.0, 0.25), record)
    run_round(url, storage_options, engine, 0.0, record)
    assert record.saved_count >= KILLS // 3, "the loop hardly saved anything, so the kills tested nothing"
    assert orphans(url, storage_options) >= KILLS // 6, "hardly any kill hit a save"


def test_a_job_killed_at_random_moments_finds_whole_checkpoints_on_local_disk(tmp_path: Path) -> None:
    kill_often(str(tmp_path / "root"), {}, "auto")


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_a_job_killed_at_random_moments_finds_whole_checkpoints_on_s3(s3_url: FreshPrefix, engine: str) -> None:
    kill_often(s3_url.url, s3_url.storage_options, engine)
