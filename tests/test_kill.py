"""SIGKILL at random moments of a save loop: what was acknowledged stays, and what is there is whole.

Each round a child process restores, checks every byte of every checkpoint against what its step must hold, and then
saves as fast as it can, until it is killed. Children are forked from a server that has imported everything, so that
a round costs a fraction of a second and the moments of the kills spread over the saves themselves.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from tests.effort import examples
from tests.ranks.processes import fork

KILLS = examples(30, short=12)
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


def work(told: Connection, url: str, storage_options: dict[str, object], engine: str, how: str = "save") -> None:
    """Be one incarnation of a job: restore, verify everything, save until killed; in the background if so told."""
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
            told.send(("saving", step))
            if how == "save":
                manager.save(step, state)
            else:
                manager.async_save(step, state).result()
            told.send(("saved", step))


@dataclass
class Record:
    """What the rounds showed."""

    acknowledged: int = -1
    restored: list[int] = field(default_factory=list)
    saved_count: int = 0
    hit_count: int = 0


@dataclass(frozen=True)
class Job:
    """Where the incarnations work."""

    url: str
    storage_options: dict[str, object]
    engine: str
    how: str = "save"

    @contextmanager
    def start(self, record: Record) -> Iterator[Connection]:
        """Run one incarnation until it has restored; kill it at the end of the block."""
        child, ours = fork(work, self.url, self.storage_options, self.engine, self.how)
        try:
            said, step = receive(ours)
            assert said == "restored"
            assert step >= record.acknowledged, f"step {record.acknowledged} was acknowledged, {step} was restored"
            record.restored.append(step)
            yield ours
        finally:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join(30)
        assert child.exitcode == -signal.SIGKILL


def receive(told: Connection) -> tuple[str, int]:
    """Wait for the child's next word."""
    assert told.poll(60), "the child neither went on nor failed"
    said: tuple[str, int] = told.recv()
    return said


def receive_saved(told: Connection, record: Record) -> None:
    """Wait for the child's next acknowledgement."""
    said = ""
    while said != "saved":
        said, step = receive(told)
    record.acknowledged = step
    record.saved_count += 1


def seconds_per_save(job: Job, record: Record) -> float:
    """Let one incarnation save three times; return the seconds that the last of them took."""
    with job.start(record) as told:
        for _ in range(2):
            receive_saved(told, record)
        began_s = time.monotonic()
        receive_saved(told, record)
        return time.monotonic() - began_s


def kill_after(job: Job, saves: int, delay_s: float, record: Record) -> None:
    """Kill an incarnation `delay_s` after its `saves`-th save (or its restore); note what it said until then."""
    said = ""
    with job.start(record) as told:
        for _ in range(saves):
            receive_saved(told, record)
        time.sleep(delay_s)
    with suppress(EOFError):
        while True:
            said, step = told.recv()
            if said == "saved":
                record.acknowledged = step
                record.saved_count += 1
    record.hit_count += said == "saving"


def orphans(url: str, storage_options: dict[str, object]) -> int:
    """Count attempts that hold objects and no manifest."""
    store = open_store(url, storage_options=storage_options)
    try:
        listed = [store.list(prefix).objects for prefix in store.list("", delimiter="/").prefixes if "step-" in prefix]
        return sum(1 for objects in listed if objects and not any(o.key.endswith(MANIFEST_NAME) for o in objects))
    finally:
        store.close()


def kill_often(job: Job) -> None:
    """Kill a save loop `KILLS` times at random moments, and check after each what the next one finds."""
    moments = random.Random(20_231)
    record = Record()
    save_s = seconds_per_save(job, record)
    for _ in range(KILLS):
        kill_after(job, moments.randrange(3), moments.uniform(0.0, save_s), record)
    for _ in range(2 * KILLS):  # on a busy machine few moments are where they were measured to be
        if orphans(job.url, job.storage_options):
            break
        kill_after(job, moments.randrange(3), moments.uniform(0.0, save_s), record)
    kill_after(job, 0, 0.0, record)
    assert record.saved_count >= KILLS // 3
    assert record.hit_count >= KILLS // 3, "hardly any kill hit a save"
    assert orphans(job.url, job.storage_options) > 0, "no kill came between a shard and its manifest"


@pytest.mark.timeout(300)
def test_a_job_killed_at_random_moments_finds_whole_checkpoints_on_local_disk(tmp_path: Path) -> None:
    kill_often(Job(str(tmp_path / "root"), {}, "auto"))


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_a_job_killed_at_random_moments_finds_whole_checkpoints_on_s3(s3_url: FreshPrefix, engine: str) -> None:
    kill_often(Job(s3_url.url, s3_url.storage_options, engine))
