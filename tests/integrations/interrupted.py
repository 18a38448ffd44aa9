"""Run a program of `examples/integrations` on one or more ranks until it ends or is struck, and read its losses.

    Job(name, …)          its processes: where they are struck, what they print, how they ended
    run_program(name, …)  one that prints `step <number> <loss as a hexadecimal float>` after each step, on rank 0

Processes are forked from a server that has imported what the programs need: to import it in each would be most of a
run, seconds of processor time for each rank. Nothing here waits for so many seconds; a test that hangs has its limit.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Self

from bucket import Bucket
from fsspec.core import url_to_fs

from raw_access import FreshPrefix
from tests.integrations.striking import BEFORE_COMMIT, at_call
from tests.ranks.processes import PRELOADED, fork

__all__ = ["Job", "Run", "assert_a_run_goes_on_from_a_bucket", "assert_same_losses", "run_program"]

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = REPOSITORY / "examples" / "integrations"

# Read by some of the frameworks as they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Those whose framework is not here the server passes over. Ray starts its processes itself.
_FORKED = sorted({path.stem for path in PROGRAMS.glob("*.py")} - {"ray_train"})
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [*PRELOADED, *(f"examples.integrations.{name}" for name in _FORKED)]
)

STEP = re.compile(r"\bstep\b\D+(\d+)")
LOSS = re.compile(r"^step (\d+) (\S+)", re.MULTILINE)


class Job:
    """The processes of one job, each with a group of its own; a context manager that kills what is left."""

    def __init__(
        self,
        name: str,
        url: str,
        storage_options: Mapping[str, object] | None,
        *arguments: str,
        ranks: int = 1,
        folder: Path = REPOSITORY,
        halt: int | str | None = None,
    ) -> None:
        """Start a program with `--url` on so many ranks.

        Args:
            name: of the program.
            url: where it saves.
            storage_options: for that.
            arguments: more of them.
            ranks: how many processes; one is told of no others.
            folder: where they run.
            halt: where rank 0 stands still to be struck: when it has printed this step or a later one, or at the n-th
                call of `module:class:method:n`.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            "CLOUDCKPT_STORAGE_OPTIONS": json.dumps(storage_options),
            "PYTHONPATH": str(REPOSITORY),  # for what it starts itself
            "CLOUDCKPT_GRACE_S": "500",  # on a busy machine a step and its save may take long
        }
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [str(PROGRAMS / name), "--url", url, *arguments]
        self._halts, theirs = multiprocessing.Pipe()
        with theirs:
            started = [
                fork(
                    _become,
                    command,
                    environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                    folder,
                    halt if rank == 0 else None,
                    theirs,
                    rank == 0,
                    is_daemon=False,
                )
                for rank in range(ranks)
            ]
        self._processes = [process for process, _ in started]
        self._output, *unheard = (pipe for _, pipe in started)
        for pipe in unheard:
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # By the former it writes down where it is.
        self.strike(signal.SIGABRT if kind else signal.SIGKILL)
        self._end()
        self._output.close()
        self._halts.close()

    def follow(self, when_halted: Callable[[], None]) -> tuple[str, int]:
        """Wait for the end, and call when rank 0 stands still, as it does at most once.

        Returns:
            What rank 0 and the processes that it has started printed, and its exit status.
        """
        printed, heard = [], [self._output, self._halts]
        # Halts have a line of their own: what two threads print may be mixed.
        while self._output in heard:
            for ready in wait(heard):
                assert isinstance(ready, Connection)
                data = os.read(ready.fileno(), 1 << 16)
                if data and ready is self._output:
                    printed.append(data)
                    continue
                heard.remove(ready)
                if data:
                    when_halted()
        self._end()
        output = b"".join(printed).decode(errors="replace")
        sys.stdout.write(output)  # pytest shows it where the test fails
        return output, self._processes[0].exitcode or 0

    def strike(self, which: signal.Signals, *, by_group: bool = True) -> None:
        """Send a signal to all ranks, by group to whatever they have started, too; who stands still goes on by it."""
        for process in self._processes:
            if process.is_alive():
                # One that has only just been forked has no group yet.
                for send in (os.killpg, os.kill) if by_group else (os.kill,):
                    with suppress(ProcessLookupError):
                        send(process.pid, which)
                        break
        with suppress(ConnectionError):
            os.write(self._halts.fileno(), b".")

    def _end(self) -> None:
        for process in self._processes:
            process.join()


def _become(
    pipe: Connection,
    command: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    halt: int | str | None,
    halts: Connection,
    is_heard: bool,
) -> None:
    os.setsid()
    os.dup2(pipe.fileno() if is_heard else os.open(os.devnull, os.O_WRONLY), 1)
    pipe.close()
    os.environ.update(environment)
    os.chdir(folder)
    faulthandler.enable()
    sys.argv = list(command)
    if isinstance(halt, int):
        sys.stdout = _Halting(sys.stdout, halt, halts)
    elif halt is not None:
        at_call(halt, lambda: _halt(halts))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        # As the interpreter does it at its end, which a fork of a server does not come to.
        threading._shutdown()
        atexit._run_exitfuncs()


def _halt(halts: Connection) -> None:
    os.write(halts.fileno(), b".")
    os.read(halts.fileno(), 1)


class _Halting:
    """Standard output of a process that halts once it has told of a step."""

    def __init__(self, whole: IO[str], step: int, halts: Connection) -> None:
        self._whole, self._step, self._halts = whole, step, halts
        self._written, self._has_halted = "", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def write(self, text: str) -> int:
        self._written += text
        return self._whole.write(text)

    def flush(self) -> None:
        self._whole.flush()
        if not self._has_halted and any(int(step) >= self._step for step in STEP.findall(self._written)):
            self._has_halted = True
            _halt(self._halts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run came to.

    Attributes:
        losses: step → the bits of its loss.
        output: what rank 0 printed.
        code: exit status of rank 0.
        newest_step: the newest of a root that is committed.
    """

    losses: dict[int, str]
    output: str
    code: int
    newest_step: int | None


def run_program(
    name: str,
    root: FreshPrefix,
    *arguments: str,
    ranks: int = 1,
    after: int | None = None,
    in_save: int | None = None,
    strike: signal.Signals = signal.SIGKILL,
) -> Run:
    """Start `name` with `--url root`, and strike all its ranks at most once.

    Args:
        name: of the program.
        root: where it saves.
        arguments: more of them.
        ranks: how many.
        after: the step after which to strike.
        in_save: the how manieth save of this run before whose commit to strike.
        strike: with which signal.
    """
    earlier, _ = _saves(root)

    def strike_it() -> None:
        begun, committed = _saves(root)
        assert begun - earlier - committed or not in_save, "its shards are there, and no manifest"
        job.strike(strike)

    with Job(
        name,
        root.url,
        root.storage_options,
        *arguments,
        ranks=ranks,
        halt=f"{BEFORE_COMMIT}:{in_save}" if in_save else after,
    ) as job:
        output, code = job.follow(strike_it)
    losses = {int(number): loss for number, loss in LOSS.findall(output)}
    attempts = Bucket(root.url, root.storage_options).attempts()
    newest_step = next((attempt.step for attempt in reversed(attempts) if attempt.is_committed), None)
    return Run(losses=losses, output=output, code=code, newest_step=newest_step)


def _saves(root: FreshPrefix) -> tuple[set[str], set[str]]:
    """Return below which prefixes there are shards, and below which a manifest."""
    objects = url_to_fs(root.url, **root.storage_options, use_listings_cache=False, skip_instance_cache=True)
    keys = objects[0].find(objects[1])
    begun = {key.rsplit("/", 2)[0] for key in keys if key.endswith(".safetensors")}
    return begun, {key.rsplit("/", 1)[0] for key in keys if key.endswith("/manifest.json")}


def assert_same_losses(interrupted: list[Run], alone: Run) -> None:
    """Hold that runs trained each step of one left alone, and that every loss has its bits."""
    assert {step for run in interrupted for step in run.losses} == set(alone.losses)
    for run in interrupted:
        assert run.losses == {step: alone.losses[step] for step in run.losses}


def assert_a_run_goes_on_from_a_bucket(program: str, s3_url: FreshPrefix, *arguments: str, ranks: int = 1) -> None:
    """Kill a run between two saves and during one, tell it to end, and compare each loss with those of one left alone.

    The programs save every three or four steps, and train at least thirty.
    """

    def one(name: str, **how: Any) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program(program, root, *arguments, ranks=ranks, **how)

    alone = one("a")
    between = one("b", after=6)
    during = one("b", in_save=2)
    told = one("b", strike=signal.SIGTERM, after=17)
    last = one("b")

    assert (alone.code, between.code, during.code, told.code, last.code) == (0, -9, -9, 143, 0)
    assert during.newest_step is not None
    assert min(told.losses) == during.newest_step + 1
    # What it was told in a save that is under way, that save answers.
    assert told.newest_step is not None
    assert max(told.losses) - told.newest_step < 4
    assert min(last.losses) == told.newest_step + 1
    assert_same_losses([between, during, told, last], alone)
