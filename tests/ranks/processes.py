"""Run one function on several ranks: processes of one gloo process group on loopback, forked from a warm server.

    values = run(4, function, *args)        one value per rank, in order
    values = crew.run(function, *args)      the same on ranks that stay: Crew(4)
    process, pipe = fork(function, *args)   one process without a group: function(its end of the pipe, *args)

The server has imported what ranks need, so that one starts in 0.05 s of processor time. With one that has not, each
rank would import it again, for seconds: that is an error. `function(*args)` runs in every rank after
`init_process_group`; it must be importable (a module-level function of a test module or of `tests`), and what it
returns must pickle. A rank that a test kills or stops has an Outcome without a value.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Most of these are imported by torch or by us only where they are first needed; the last ones by what each rank of a
# test has to import first, the test's own module.
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.utils.data",
    "pytest",
    "numpy.ma",
    "numpy.random",
    "obstore",
    "s3fs",
    "cloudckpt.checkpoint",
    "cloudckpt.dcp",
    "cloudckpt.manager",
    "boto3",
    "requests",
    "tests.effort",
    "tests.ranks.models",
    "tests.ranks.frozen",
]
_CONTEXT = multiprocessing.get_context("forkserver")
# A process has one such server, and whoever names its modules last before the first start wins: see `start_server`.
_CONTEXT.set_forkserver_preload(PRELOADED)


def fork(function: Callable[..., Any], *args: Any, is_daemon: bool = True) -> tuple[BaseProcess, Connection]:
    """Start `function(pipe, *args)` in a process of its own; return it, and the end of the pipe to hear it by.

    A daemon ends with this process, and may have no children.
    """
    start_server()
    return _fork(function, *args, is_daemon=is_daemon)


@functools.cache
def start_server() -> None:
    """Start the server, unless that is done; it serves whatever else in this process forks from one.

    Raises:
        RuntimeError: it lacks a module: its import failed, which the server itself passes over, or somebody else
            started it first, with modules of their own.
    """
    # From where it finds our modules, wherever the test that needs it first has gone.
    with contextlib.chdir(Path(__file__).parents[2]):
        process, pipe = _fork(_tell_lacking)
    with pipe:
        lacking = pipe.recv()
    process.join()
    if lacking:
        raise RuntimeError(
            f"the fork server has not imported {', '.join(lacking)}: either they cannot be imported, or what ran "
            "before named other modules and started it without them, and has to come after `start_server`"
        )


def _tell_lacking(pipe: Connection) -> None:
    pipe.send([name for name in PRELOADED if name not in sys.modules])


def _fork(function: Callable[..., Any], *args: Any, is_daemon: bool = True) -> tuple[BaseProcess, Connection]:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=function, args=(theirs, *args), daemon=is_daemon)
    process.start()
    theirs.close()
    return process, ours


@dataclass
class Outcome:
    """What became of one rank: its value or its error, and when (seconds of the monotonic clock)."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    ended_s: float = 0.0
    has_ended: bool = False


_WORKERS = 16


def free_port() -> int:
    """Return a port below those that the kernel lends to whoever connects, so that nobody takes it meanwhile.

    Workers have ports of their own: until ranks listen, which takes seconds, another one would find theirs free.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    while True:
        port = random.randrange(20_000 + worker, 32_000, _WORKERS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _main(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    listener: socket.socket | None,
    path: list[str],
    call: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipe.send_bytes(_pickled(_outcome_of(rank, _run_in_group, rank, size, port, listener, *call)))
    pipe.close()
    # Not by way of destroy_process_group: it would wait for ranks that a test has stopped.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run_in_group(
    rank: int, size: int, port: int, listener: socket.socket | None, function: Callable[..., Any], *args: Any
) -> Any:
    import torch.distributed as dist

    timeout = timedelta(seconds=120)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=listener is not None,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return function(*args)


def _outcome_of(rank: int, function: Callable[..., Any], *args: Any) -> Outcome:
    outcome = Outcome(rank, has_ended=True)
    try:
        outcome.value = function(*args)
    except BaseException as exc:  # noqa: BLE001 (it is the outcome)
        outcome.error, outcome.trace = exc, traceback.format_exc()
    outcome.ended_s = time.monotonic()
    return outcome


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as exc:  # noqa: BLE001 (a value or error that does not pickle is an outcome, too)
        outcome.value, outcome.error = None, RuntimeError(f"{outcome.error or 'the value'!r} does not pickle: {exc}")
        return pickle.dumps(outcome)


class World:
    """Ranks that are running."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any) -> None:
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        # Listens from here on, so that no other process is given the port before rank 0 has started.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            port = listener.getsockname()[1]
            for rank in range(size):
                theirs = None if rank else listener
                process, pipe = fork(_main, rank, size, port, theirs, sys.path, (function, *args))
                self._pipes.append(pipe)
                self.processes.append(process)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def outcomes(self, *, timeout_s: float = 90.0, but: Sequence[int] = ()) -> list[Outcome]:
        """Wait for every rank except `but`, end what is left, and return what became of each."""
        try:
            return _heard(self._pipes, timeout_s=timeout_s, but=but)
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


class Crew:
    """Ranks that stay, and run one function after the other: what the first one costs alone is paid once.

    What a function leaves behind in its process, the next one finds. A crew of which a rank failed is over.
    """

    def __init__(self, size: int) -> None:
        lines = [_CONTEXT.Pipe() for _ in range(size)]
        self._lines = [ours for ours, _ in lines]
        self._world = World(size, _serve, [theirs for _, theirs in lines])
        for _, theirs in lines:
            theirs.close()
        self.is_over = False

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> list[Any]:
        """Run on every rank; return the values, or raise the error that came first, with its trace."""
        assert not self.is_over
        for line in self._lines:
            line.send((function, *args))
        outcomes = _heard(self._lines, timeout_s=timeout_s)
        if not all(outcome.has_ended and outcome.error is None for outcome in outcomes):
            self.end()
        return _values(outcomes, timeout_s)

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._world.end()
            for line in self._lines:
                line.close()


def _serve(lines: list[Connection]) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    ours = lines.pop(rank)
    for line in lines:
        line.close()  # else nobody would hear that another rank is gone
    while True:
        call = ours.recv()
        ours.send_bytes(_pickled(_outcome_of(rank, *call)))


def _heard(pipes: Sequence[Connection], *, timeout_s: float, but: Sequence[int] = ()) -> list[Outcome]:
    """Return what became of each rank; of `but`, and of one that says nothing in time, that it has not ended."""
    found = [Outcome(rank) for rank in range(len(pipes))]
    stop_s = time.monotonic() + timeout_s
    pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in but}
    while pending and time.monotonic() < stop_s:
        for pipe in wait(list(pending), timeout=max(0.0, stop_s - time.monotonic())):
            rank = pending.pop(pipe)  # type: ignore[arg-type]
            try:
                # Not `recv`: it would share a tensor's memory with a process that is gone.
                found[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                found[rank].ended_s = time.monotonic()
    return found


def _values(outcomes: Sequence[Outcome], timeout_s: float) -> list[Any]:
    for outcome in sorted(outcomes, key=lambda outcome: (not outcome.has_ended, outcome.ended_s)):
        if outcome.error is not None:
            raise AssertionError(f"rank {outcome.rank} failed:\n{outcome.trace}") from outcome.error
        assert outcome.has_ended, f"rank {outcome.rank} did not end within {timeout_s} s"
    return [outcome.value for outcome in outcomes]


def _run_together(function: Callable[..., Any], *args: Any) -> Any:
    import torch.distributed as dist

    value = function(*args)
    if dist.is_initialized():
        dist.barrier()  # rank 0 hosts the store, which others may still need
    return value


def run(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 90.0, together: bool = True
) -> list[Any]:
    """Run on every rank; return the values, or raise the error that came first, with its trace.

    They end together, unless the function makes and destroys process groups itself.
    """
    call = (_run_together, function, *args) if together else (function, *args)
    return _values(World(size, *call).outcomes(timeout_s=timeout_s), timeout_s)
