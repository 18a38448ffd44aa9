"""Turn events into named numbers, for loggers of training runs that take such, as TensorBoard and Weights & Biases.

Imports none of them. Called on the thread of `Teller`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, Self

from cloudckpt.report.events import Event, Preempted, Pruned, Restored, SaveCommitted, SaveFailed, SaveStaged

__all__ = ["ScalarEvents"]


class _Writer(Protocol):
    """What TensorBoard's SummaryWriter is here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write one number."""


class ScalarEvents:
    """Events as numbers, by name and step: `on_event=ScalarEvents(log)`.

    Of a save: `bytes`, `seconds`, `bytes_per_s`, `plan_s`, `stage_s`, `upload_s`, `gather_s`, `blocked_s` (for which
    training was kept), `staged_bytes`, `requests`, `retries`, and `failed`, 0 or 1. Of others: `restore_s`,
    `restored_bytes`, `restore_requests`, `pruned_bytes`, `preempted`. Each with `prefix` before it.

    A save in the background is committed when training is some steps on. A logger that wants steps to grow, as
    `wandb.log` does, gets the step as a number instead: `lambda numbers, step: wandb.log({**numbers,
    "checkpoint/step": step})`.
    """

    def __init__(self, log: Callable[[dict[str, float], int], object], *, prefix: str = "checkpoint/") -> None:
        """Log by `log`, which takes numbers by their names, and the training step (0 for none)."""
        self._log = log
        self._prefix = prefix

    @classmethod
    def to_writer(cls, writer: _Writer, *, prefix: str = "checkpoint/") -> Self:
        """Log to what has TensorBoard's `add_scalar(name, number, step)`."""
        return cls(partial(_add, writer), prefix=prefix)

    def __call__(self, event: Event) -> None:
        """Log what of an event is a number."""
        if numbers := numbers_of(event):
            self._log({f"{self._prefix}{name}": number for name, number in numbers.items()}, max(0, event.step))


def _add(writer: _Writer, numbers: dict[str, float], step: int) -> None:
    for name, number in numbers.items():
        writer.add_scalar(name, number, step)


def numbers_of(event: Event) -> dict[str, float]:
    """Return the numbers of an event; {} of one that has none."""
    numbers: dict[str, float] = {}
    match event:
        case SaveStaged():
            numbers = {"staged_bytes": event.staged_bytes, "blocked_s": event.blocked_s}
        case SaveCommitted():
            numbers = _of_commit(event)
        case SaveFailed():
            numbers = {"failed": 1, "requests": event.requests, "retries": event.retries}
        case Restored():
            numbers = {
                "restore_s": event.seconds,
                "restored_bytes": event.total_bytes,
                "restore_requests": event.requests,
            }
        case Pruned():
            numbers = {"pruned_bytes": event.total_bytes}
        case Preempted():
            numbers = {"preempted": 1}
    return numbers


def _of_commit(event: SaveCommitted) -> dict[str, float]:
    return {
        "bytes": event.total_bytes,
        "seconds": event.seconds,
        "bytes_per_s": event.total_bytes / max(event.seconds, 1e-9),
        **{f"{name}_s": seconds for name, seconds in event.phases.items()},
        # That of one in the background is told when it is staged.
        **({} if event.in_background else {"blocked_s": event.seconds}),
        "requests": event.requests,
        "retries": event.retries,
        "failed": 0,
    }
