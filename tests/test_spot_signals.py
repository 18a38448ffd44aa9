"""A job that gets a real SIGTERM behind a faulty proxy in front of a real store: its newest step is there when it goes.

The clock is everybody's here, so only what holds with room to spare is asked for; `test_spot_drill.py` asks for more.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Options, Preemption
from cloudckpt.options import KIB
from raw_access import FreshPrefix
from tests.ranks.processes import fork
from tests.spot_drill.proxy import Faults, FaultyProxy

OPTIONS = Options(shard_bytes=64 * KIB, block_bytes=16 * KIB, span_bytes=64 * KIB)
SEEDS = [pytest.param(seed, marks=() if seed < 1 else pytest.mark.slow) for seed in range(20)]


def tensor_of(step: int) -> torch.Tensor:
    return torch.randn(64 * KIB, generator=torch.Generator().manual_seed(step))


def work(told: Connection, url: str, storage_options: dict[str, object], engine: str, grace_s: float) -> None:
    """Be a job: save now and then, and once more when the end is announced; go when that is safe."""
    torch.set_num_threads(1)
    preemption = Preemption(signals=(signal.SIGTERM,), sources=(), check=lambda: None, grace_s=grace_s)
    with (
        preemption,
        CheckpointManager(
            url,
            storage_options=storage_options,
            engine=engine,
            options=OPTIONS,
            save_every_steps=15,
            preemption=preemption,
            progress="off",
        ) as manager,
    ):
        handle = None
        for step in itertools.count():
            time.sleep(0.02)
            if manager.should_save(step):
                with suppress(CloudCkptError):
                    handle = manager.async_save(step, {"w": tensor_of(step), "step": step})
                    told.send(("asked", step, preemption.notice is not None))
            if manager.preempted and handle is not None and handle.done():
                with suppress(CloudCkptError):
                    handle.result(0)
                    break
    told.send(("left", step, True))


@dataclass
class Heard:
    """What the job said."""

    asked: list[int] = field(default_factory=list)
    asked_late: bool = False
    has_left: bool = False

    def listen(self, told: Connection, seconds: float) -> None:
        stop_s = time.monotonic() + seconds
        while not self.has_left and told.poll(max(0.0, stop_s - time.monotonic())):
            try:
                word, step, is_late = told.recv()
            except EOFError:
                return
            if word == "left":
                self.has_left = True
            else:
                self.asked.append(step)
                self.asked_late = is_late


@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_real_signal_the_newest_step_is_safe_behind_a_faulty_proxy(s3_url: FreshPrefix, seed: int) -> None:
    rng = random.Random(seed)
    grace_s = rng.uniform(20.0, 30.0)
    outage_s = rng.choice((0.0, rng.uniform(0.5, 5.0)))
    faults = Faults(busy=0.2, stalled=0.01, lost=0.1, outage_s=outage_s, clear_s=outage_s + rng.uniform(0.0, 4.0))
    engine = rng.choice(("obstore", "fsspec"))
    heard = Heard()
    with FaultyProxy(s3_url.storage_options["endpoint_url"], faults, seed=seed) as proxy:
        options = {**s3_url.storage_options, "endpoint_url": proxy.endpoint_url}
        job, told = fork(work, s3_url.url, options, engine, grace_s)
        try:
            assert told.poll(60), "the job does not begin to save"
            heard.listen(told, rng.uniform(0.0, 2.0))
            proxy.begin()
            assert job.pid is not None
            os.kill(job.pid, signal.SIGTERM)
            heard.listen(told, grace_s + 15.0)
            job.join(15)
        finally:
            job.kill()
            job.join()
    story = "\n".join([f"seed {seed}: {faults}, {grace_s:.1f} s by {engine}, {heard}", *proxy.story])
    assert heard.has_left, f"the job did not go by itself\n{story}"
    assert heard.asked_late, f"nothing was saved after the signal\n{story}"
    with CheckpointManager(s3_url.url, storage_options=s3_url.storage_options) as manager:
        newest = manager.latest()
    assert newest is not None, story
    found = cloudckpt.read(newest.url, storage_options=s3_url.storage_options)
    assert found["step"] == heard.asked[-1], story
    assert torch.equal(found["w"], tensor_of(heard.asked[-1])), story  # type: ignore[arg-type]
