"""Say what happens to a job's checkpoints as values, for programs: the words between a job and who watches it.

    SaveBegun ─▶ (SaveStaged) ─▶ SaveCommitted │ SaveFailed      Restored      Pruned      Preempted

Pure values. A save that the state or a wrong call refuses may fail without having begun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cloudckpt.store import Traffic

__all__ = [
    "Event",
    "OnEvent",
    "Preempted",
    "Pruned",
    "Restored",
    "SaveBegun",
    "SaveCommitted",
    "SaveFailed",
    "SaveStaged",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all of them tell.

    Attributes:
        at: when it was, in UTC, by this machine's clock.
        url: the checkpoint, or where none is known yet the root; without credentials.
        step: the training step; -1 for a checkpoint outside a root.
        world_size: the ranks of the job, or those that saved the checkpoint that it tells of.
    """

    at: datetime
    url: str
    step: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBegun(Event):
    """A save has begun; has `at`, `url`, `step` and `world_size` of `Event`.

    Attributes:
        in_background: whether training goes on once the state is copied.
        waited_s: seconds for which the save before it was waited for.
    """

    in_background: bool
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStaged(Event):
    """The state is copied and training goes on; has `at`, `url`, `step` and `world_size` of `Event`.

    Attributes:
        staged_bytes: bytes that rank 0 has copied.
        blocked_s: seconds for which training was kept, with the wait for the save before.
    """

    staged_bytes: int
    blocked_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCommitted(Event):
    """A checkpoint exists; has `at`, `url`, `step` and `world_size` of `Event`.

    Attributes:
        epoch: incarnation of the job, 0 outside a root.
        total_bytes: bytes of all its shards, of all ranks.
        sent_bytes: those among them that were sent; an older checkpoint holds the rest (`reuse_unchanged`).
        in_background: whether training went on meanwhile.
        seconds: from its begin (after the wait for the save before) to the commit; else training was kept for them.
        phases: seconds of `plan`, `stage` (of the rank that took longest), `upload` (likewise), `gather` and
            `commit`; staging and uploading overlap.
        slowest_rank: whose upload took longest; None where that is not known.
        requests: that rank 0 has made, up to the manifest's own; not what a replaced checkpoint and retention cost.
        retries: those among them that an earlier failure made necessary.
        metrics: what was measured at the save.
        traffic: the same requests by class, and their bytes.
    """

    epoch: int
    total_bytes: int
    sent_bytes: int
    in_background: bool
    seconds: float
    phases: Mapping[str, float]
    slowest_rank: int | None
    requests: int
    retries: int
    metrics: Mapping[str, float]
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """A save has ended without a checkpoint; has `at`, `url`, `step` and `world_size` of `Event`.

    Attributes:
        in_background: whether training went on meanwhile.
        seconds: since its begin.
        requests: that rank 0 has made.
        retries: those among them that an earlier failure made necessary.
        kind: the name of the error's type; after `CommitUnknownError` there may be a checkpoint all the same.
        error: what it says, without credentials.
        is_forgiven: whether training goes on (`on_error="warn"`).
        traffic: the same requests by class, and their bytes.
    """

    in_background: bool
    seconds: float
    requests: int
    retries: int
    kind: str
    error: str
    is_forgiven: bool
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """A state was restored; has `at`, `url`, `step` and `world_size` of `Event`. A fresh start tells nothing.

    Attributes:
        epoch: incarnation of the job that saved the checkpoint.
        total_bytes: bytes of all its shards.
        seconds: that it took.
        requests: that rank 0 has made.
        retries: those among them that an earlier failure made necessary.
        traffic: the same requests by class, and their bytes.
    """

    epoch: int
    total_bytes: int
    seconds: float
    requests: int
    retries: int
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned(Event):
    """A checkpoint exists no more; has `at`, `url`, `step` and `world_size` of `Event`.

    Attributes:
        epoch: incarnation of the job that saved it.
        total_bytes: bytes of all its shards, which go later.
        why: no rule kept it, or `delete` was called.
    """

    epoch: int
    total_bytes: int
    why: Literal["rules", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """Notice was given that the machine goes; has `at`, `url`, `step` and `world_size` of `Event`.

    `step` is the one after which it was heard, -1 before the first.

    Attributes:
        reason: who says so.
        left_s: seconds until then, None if that is not known.
    """

    reason: str
    left_s: float | None


OnEvent = Callable[[Event], object] | Sequence[Callable[[Event], object]] | None
"""Who is told of events: one callable, several, or nobody."""
