"""Roots for the tests of what reads whole checkpoints: on a disk, and the same in a simulated store."""

from __future__ import annotations

from pathlib import Path

import torch

from cloudckpt import CheckpointManager, Options, RetryPolicy
from cloudckpt.copying.places import Place
from cloudckpt.options import KIB
from cloudckpt.root import Catalog, Roots, pin
from cloudckpt.store import RetryingStore
from tests.store.fault_store import Bucket, FaultStore

OPTIONS = Options(
    shard_bytes=16 * KIB, block_bytes=4 * KIB, span_bytes=8 * KIB, concurrency=2, memory_budget_bytes=128 * KIB
)
PATIENCE = RetryPolicy(max_attempts=2, deadline_s=30, request_timeout_s=1)


def state_of(step: int) -> dict[str, object]:
    """Several shards: a tensor that changes in a few elements, one that does not, one of another width."""
    changing = torch.arange(12_000, dtype=torch.float32)
    changing[5_000:5_003] += step
    return {
        "changing": changing,
        "same": torch.linspace(0, 1, 6_000, dtype=torch.float64),
        "half": torch.full((700,), float(step)).to(torch.bfloat16),
        "note": f"step {step}",
    }


def save_steps(root: Path, steps: list[int], **more: object) -> None:
    """Be a job that saves these steps, after a restore of the newest."""
    with CheckpointManager(root, options=OPTIONS, progress="off", save_rng=False, **more) as manager:  # type: ignore[arg-type]
        manager.restore(state_of(0))
        for step in steps:
            manager.save(step, state_of(step), metrics={"loss": 1 / step})


def bucket_of(folder: Path) -> Bucket:
    """Return a simulated store that holds what a folder does."""
    bucket = Bucket()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        bucket.raw_put(path.relative_to(folder).as_posix(), path.read_bytes())
    return bucket


def pinned_bucket(folder: Path, *steps: int) -> Bucket:
    """Return a simulated store that holds what a folder does, these steps of it pinned; else 1 and 2."""
    bucket = bucket_of(folder)
    for step in steps or (1, 2):
        pin(Roots([Catalog(FaultStore(bucket))]), step, f"note {step}")
    return bucket


def place_of(client: FaultStore, prefix: str = "") -> Place:
    """Return the place of a client of a simulated store."""
    return Place(Catalog(RetryingStore(client, PATIENCE, sleep=lambda _: None)), prefix)


def prefix_of(step: int, epoch: int = 1) -> str:
    return f"step-{step:010d}-e{epoch:04d}"


def shards_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.rglob("*.safetensors"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what stands below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
