"""Make checkpoints and claims as a run of several jobs leaves them, without a save: what a page is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cloudckpt.format import FORMAT_VERSION, EpochClaim, IndexRef, Manifest
from cloudckpt.root import Checkpoint

BEGAN = datetime(2026, 11, 1, 12, tzinfo=UTC)


def checkpoint_of(step: int, epoch: int, *, at_s: float, worked_s: float | None = None, **changed: Any) -> Checkpoint:
    """Return a checkpoint that was committed so many seconds after the run began."""
    summary = {"seconds": 8.0, "requests": 70.0, "retries": 1.0, "plan_s": 0.5, "stage_s": 1.5, "upload_s": 5.0}
    summary |= {"gather_s": 0.25, "commit_s": 0.25, "slowest_rank": 3.0, "in_background": 1.0}
    if worked_s is not None:
        summary["worked_s"] = worked_s
    at = BEGAN + timedelta(seconds=at_s)
    metrics = changed.pop("metrics", {"loss": 3 * math.exp(-step / 400)})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=epoch,
        attempt="0123456789abcdef",
        created_at=at.isoformat(timespec="milliseconds"),
        world_size=8,
        total_bytes=3 << 30,
        tensor_count=10,
        shard_count=48,
        index=IndexRef(size_bytes=1000, sha256="0" * 64),
        metrics=metrics,
        environment={"python": "3.11.7", "torch": "2.13.0"},
        summary={**summary, **changed.pop("summary", {})},
    )
    prefix = f"step-{step:010}-e{epoch:04}/"
    return Checkpoint(
        step=step,
        epoch=epoch,
        attempt=manifest.attempt,
        url=f"s3://bucket/run/{prefix}",
        metrics=metrics,
        created_at=at,
        total_bytes=manifest.total_bytes,
        world_size=8,
        digest=f"{epoch:032x}{step:032x}",
        manifest=manifest,
        prefix=prefix,
    )


def claim_of(
    epoch: int, *, at_s: float, resumed_from: tuple[int, int] | None = None, host: str = "node-1"
) -> EpochClaim:
    """Return the claim of an epoch; `resumed_from` is (step, epoch), as a claim has it."""
    at = BEGAN + timedelta(seconds=at_s)
    created_at = at.isoformat(timespec="milliseconds")
    return EpochClaim(
        format_version=FORMAT_VERSION,
        epoch=epoch,
        nonce=f"{epoch:016x}",
        created_at=created_at,
        host=host,
        pid=100 + epoch,
        resumed_from=resumed_from,
    )


def a_run() -> tuple[Sequence[Checkpoint], dict[int, EpochClaim]]:
    """Return a run of three jobs, 100 s of work between two saves of 100 steps.

    The second went on 500 s after the last commit of the first; the third from one before the newest of the second; and
    of what it went on from nothing is left.
    """
    first = [checkpoint_of(step, 1, at_s=step, worked_s=float(step)) for step in (100, 200, 300)]
    second = [checkpoint_of(step, 2, at_s=500 + step, worked_s=float(step)) for step in (400, 500, 600)]
    third = [checkpoint_of(step, 3, at_s=1500 + step, worked_s=float(step)) for step in (600, 700)]
    claims = {
        1: claim_of(1, at_s=95),
        2: claim_of(2, at_s=895, resumed_from=(300, 1)),
        3: claim_of(3, at_s=2095, resumed_from=(500, 2), host="node-2"),
    }
    return [*first, *second, *third], claims
