"""Turn what a training on several ranks does into lines of JSON in a file, and read them back typed.

`train_fsdp.py` writes and `fsdp_demo.py` reads. Losses travel as hexadecimal floats and states as digests of the
*whole* tensors, put together from the pieces of all ranks, so that a record of four ranks and one of two can be
compared bit by bit. Knows nothing of cloudckpt, so it vouches for it from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from digest import digests
from torch.distributed.tensor import DTensor

__all__ = ["Event", "Left", "Record", "Restored", "Saved", "Step", "read_record"]


class _Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="event", tag=str.lower):
    step: int
    world_size: int


class Restored(_Event, frozen=True):
    """The checkpoint of a step was restored.

    Attributes:
        digests: part of the state → SHA-256, taken right after the restore.
    """

    url: str
    digests: dict[str, str]


class Step(_Event, frozen=True):
    """One step was trained.

    Attributes:
        loss: of the global batch; hexadecimal form of the float, which no rounding touches.
    """

    loss: str

    @property
    def loss_value(self) -> float:
        """The loss as a number, bit for bit."""
        return float.fromhex(self.loss)


class Saved(_Event, frozen=True):
    """The state after a step was copied, and is saved in the background; the bucket tells whether it was committed.

    Attributes:
        digests: part of the state → SHA-256, taken right after the copy.
    """

    digests: dict[str, str]


class Left(_Event, frozen=True):
    """A rank ends because of a preemption notice, after the step that is saved.

    Attributes:
        code: what it ends with.
    """

    rank: int
    code: int


Event = Restored | Step | Saved | Left


class Record:
    """The record of one process group: every rank calls it, rank 0 writes. Without a path it does nothing.

    Only its end each rank notes by itself.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def restored(self, step: int, url: str, state: Mapping[str, object]) -> None:
        """Note a restore; a collective."""
        if self._path:
            self._write(Restored(step=step, world_size=dist.get_world_size(), url=url, digests=_digests(state)))

    def step(self, step: int, loss: float) -> None:
        """Note a trained step."""
        if self._path:
            self._write(Step(step=step, world_size=dist.get_world_size(), loss=loss.hex()))

    def saved(self, step: int, state: Mapping[str, object]) -> None:
        """Note what a save has just copied; a collective."""
        if self._path:
            self._write(Saved(step=step, world_size=dist.get_world_size(), digests=_digests(state)))

    def left(self, step: int, code: int) -> None:
        """Note that this rank ends."""
        self._append(Left(step=step, world_size=dist.get_world_size(), rank=dist.get_rank(), code=code))

    def _write(self, event: Event) -> None:
        if dist.get_rank() == 0:
            self._append(event)

    def _append(self, event: Event) -> None:
        if self._path:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(event) + b"\n")


def read_record(path: Path) -> list[Event]:
    """Read what was written so far; a last line that is not complete yet is left out.

    Raises:
        msgspec.ValidationError: a line is not one of the events.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [msgspec.json.decode(line, type=Event) for line in lines]


def _digests(state: Mapping[str, object]) -> dict[str, str]:
    """Digest the parts of a state as they are when the pieces of all ranks are put together."""
    whole = {name: _whole(part.state_dict() if hasattr(part, "state_dict") else part) for name, part in state.items()}
    found = digests(whole)
    # Without the generator of rank 0, which `digests` adds: nothing is drawn from it in this training.
    return {name: found[name] for name in state}


def _whole(value: object) -> object:
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: _whole(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(below) for below in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value
