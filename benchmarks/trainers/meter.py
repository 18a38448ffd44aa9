"""Turn the saves and the resume of a training into numbers, in the process that trains.

    train:   … step 2 ──saves──▶ … step 4 ──saves──▶ end          numbers are those of the second save
    resume:  made anew ──loads──▶ before its first step           and the state is compared with what was saved

A first save pays for imports and connections, in a training as here. A training that is to be struck waits before its
second save until it may begin (`gate`), so that what is there before is known. What is told stands in files of the
task's folder, since some frameworks train in processes of their own. Knows no framework.
"""

from __future__ import annotations

import gc
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.shared.clocks import peak_bytes, reset_peak

__all__ = ["LAST", "SAVES_AFTER", "STEPS", "Found", "Meter", "ResumedError", "Task", "tensors_of"]

T = TypeVar("T")

SAVES_AFTER = (2, 4)
LAST = SAVES_AFTER[-1]
_GATE_LIMIT_S = 120.0
STEPS = {"train": LAST, "resume": LAST + 2}
"""What is done → the steps that the framework is told to train; a resume is ended before its first one."""


class ResumedError(BaseException):
    """The end of a resume: what was to be known is written. No framework catches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run of a training.

    Attributes:
        way: how it saves: a name in the `WAYS` of its framework.
        op: `train` or `resume`.
        url: the root that it saves to, or what stands for that to the framework.
        size_bytes: of the state, about.
        folder: where it tells what it found, and its log is; absolute.
        is_gated: wait before the second save.
    """

    way: str
    op: str
    url: str
    size_bytes: int
    folder: str
    is_gated: bool = False


@dataclass(slots=True, kw_only=True)
class Found:
    """What a run told.

    Attributes:
        blocked_s: until training could go on.
        save_s: until the save was done.
        extra_bytes: peak resident memory above what was resident before.
        step: that a resume found; 0 is a fresh start.
        sums: step → CRC-32 of the tensors saved or found there.
        error: what it failed with.
    """

    blocked_s: float = 0.0
    save_s: float = 0.0
    load_s: float = 0.0
    extra_bytes: int = 0
    step: int = 0
    sums: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


class Meter:
    """What a training calls around its saves and at its resume."""

    def __init__(self, task: Task) -> None:
        self._task, self._folder = task, Path(task.folder)
        self._found, self._sums = Found(), dict[str, int]()
        self._before_bytes: int | None = None
        self._began_s = 0.0

    def save(self, step: int, tensors: Iterable[torch.Tensor], call: Callable[[], T], wait: Any = None) -> T:
        """Save by `call`, and wait for what it left to do by `wait`; return what `call` returns."""
        self._sums[str(step)] = _sum_of(tensors)
        gc.collect()  # what was left before is not this call's
        if self._before_bytes is None:
            self._before_bytes = reset_peak()
        if step == LAST and self._task.is_gated:
            self._pass_gate()
        began_s = time.perf_counter()
        result = call()
        self._found.blocked_s = time.perf_counter() - began_s
        if wait is not None:
            wait()
        self._found.save_s = time.perf_counter() - began_s
        self._found.extra_bytes = peak_bytes() - self._before_bytes
        self._write()
        return result

    def loading(self) -> None:
        """Begin to load."""
        gc.collect()
        self._before_bytes = reset_peak()
        self._began_s = time.perf_counter()

    def loaded(self, step: int, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Tell what was found, and end the run.

        Raises:
            ResumedError: always.
        """
        self._found.load_s = time.perf_counter() - self._began_s
        self._found.extra_bytes = peak_bytes() - (self._before_bytes or 0)
        self._found.step = step
        if step:
            self._sums[str(step)] = _sum_of(tensors())
        self._write()
        raise ResumedError

    def failed(self, error: BaseException) -> None:
        """Tell what a run failed with, unless it has told more."""
        lines = str(error).strip().splitlines() or [""]
        self._found.error = f"{type(error).__name__}: {lines[0]}"
        self._write()

    def _pass_gate(self) -> None:
        (self._folder / "waits").touch()
        end_s = time.monotonic() + _GATE_LIMIT_S
        while not (self._folder / "go").exists():
            if time.monotonic() > end_s:
                raise TimeoutError("nobody has opened the gate")
            time.sleep(0.005)

    def _write(self) -> None:
        self._found.sums = self._sums
        told = self._folder / "found.new"
        told.write_text(json.dumps(asdict(self._found)))
        told.replace(self._folder / "found.json")


def _sum_of(tensors: Iterable[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Return a model's parameters, and what the optimizer has for each of them, in one order."""
    for _, parameter in sorted(model.named_parameters()):
        yield parameter
        state = optimizer.state.get(parameter, {})
        yield from (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)
