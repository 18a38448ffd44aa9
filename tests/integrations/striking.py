"""Act within a process when it comes to a place, and kill workers of Ray, which Ray itself starts, at two of them.

Imported in those workers: knows of no test.
"""

from __future__ import annotations

import functools
import itertools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["BEFORE_COMMIT", "at_call", "run_struck"]

# Where all shards of a save stand in the bucket, and nothing that makes them a checkpoint.
BEFORE_COMMIT = "cloudckpt.root.catalog:Catalog:commit"


def at_call(place: str, act: Callable[[], object]) -> None:
    """Let this process act before the n-th call of `module:class:method:n`."""
    module, kind, name, count = place.split(":")
    owner, calls = getattr(import_module(module), kind), itertools.count(1)
    whole = getattr(owner, name)

    @functools.wraps(whole)
    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == int(count):
            act()
        return whole(*args, **kwargs)

    setattr(owner, name, called)


def run_struck(folder: str, program: str, *arguments: str) -> None:
    """Run a program of Ray Train whose last worker is killed in its seventh step; the next one in its second save.

    Args:
        folder: empty; what has been done is noted there.
        program: of which the trainer's first argument is what a worker runs.
        arguments: of the program.
    """
    from ray.train.torch import TorchTrainer

    made = TorchTrainer.__init__

    def make(self: Any, train: Callable[..., None], **more: Any) -> None:
        made(self, functools.partial(_train_struck, folder, train), **more)

    TorchTrainer.__init__ = make
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def _train_struck(folder: str, train: Callable[..., None], config: dict[str, Any]) -> None:
    from ray.train import get_context

    rank, last = get_context().get_world_rank(), get_context().get_world_size() - 1
    place = Path(folder)
    (place / f"pid-{rank}").write_text(str(os.getpid()))

    def kill_last(note: str) -> None:
        (place / note).touch()
        os.kill(int((place / f"pid-{last}").read_text()), signal.SIGKILL)

    if not (place / "in a step").exists():
        if rank == last:
            at_call("torch.optim.adamw:AdamW:step:7", lambda: kill_last("in a step"))
    elif not (place / "in a save").exists():
        at_call(f"{BEFORE_COMMIT}:2", lambda: kill_last("in a save"))
    train(config)
