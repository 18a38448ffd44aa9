"""Run a program to its end, so that a test whose time is up says how far the program came.

    run_to_end([sys.executable, "-c", program])   a process that begins with nothing: with torch, two processor seconds
    run_forked("-c", program)                     one forked from a server that has imported torch and us: a tenth of it

`subprocess.run` throws away what was written when a signal, as that of pytest-timeout, interrupts it, and waits for
whatever else holds the pipes.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import process as processes
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import IO, NoReturn

from tests.ranks.processes import fork

__all__ = ["fork_program", "run_forked", "run_to_end"]

# In a process that is being forked, what its server is to `multiprocessing`; the process itself is to be the same.
_MAIN = processes.current_process()


def run_to_end(
    command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run a program; return its status and what it and its children wrote.

    It has the time of the test. If that is over, or anything else interrupts the test, the program is killed with all
    that it has started, and what it wrote is printed, so that pytest shows it.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        status = None
        try:
            status = process.wait()
        finally:
            _kill_session(process.pid)
            process.wait()
            if status is None:
                sys.stdout.write(f"not ended: {command}\n{_text(out)}{_text(err)}")
        return CompletedProcess(command, status, _text(out), _text(err))


def run_forked(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run `-c PROGRAM` or `-m MODULE` and its arguments as `run_to_end` does with Python, by `fork_program`."""
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        process = fork_program(*command, streams=(os.devnull, out.name, err.name), cwd=cwd, env=env)
        status = None
        try:
            process.join()
            status = process.exitcode
        finally:
            _end(process)
            if status is None:
                sys.stdout.write(f"not ended: {command}\n{_text(out)}{_text(err)}")
        assert status is not None
        return CompletedProcess([str(part) for part in command], status, _text(out), _text(err))


def fork_program(
    *command: str | Path, streams: tuple[str, str, str], cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start `-c PROGRAM` or `-m MODULE` and its arguments as Python does, in a process that has imported torch and us.

    It leads a session, has opened the files that `streams` names when this returns, and ends as any interpreter does,
    with its threads, `atexit` and all.
    """
    given = dict(os.environ if env is None else env)
    process, pipe = fork(
        _become, streams, str(cwd or Path.cwd()), given, [str(part) for part in command], is_daemon=False
    )
    with pipe:
        pipe.recv()
    return process


def _become(
    pipe: Connection, streams: tuple[str, str, str], cwd: str, env: Mapping[str, str], command: Sequence[str]
) -> None:
    """Let the interpreter run the program when `multiprocessing` is done with this process, and end by itself then."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, (name, mode) in enumerate(zip(streams, "rww", strict=True)):
        opened = os.open(name, os.O_RDONLY if mode == "r" else os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    with pipe:
        pipe.send("the streams are open")
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1 if number == 2 or os.isatty(number) else -1, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    kept = threading._shutdown, os._exit  # type: ignore[attr-defined]

    def end(_: int) -> NoReturn:
        threading._shutdown, os._exit = kept  # type: ignore[attr-defined]
        processes._current_process, processes._parent_process = _MAIN, None  # type: ignore[attr-defined]
        util._exiting = False  # type: ignore[attr-defined]
        _run(*command)
        sys.exit()

    # What it does at the end of a process of its own; what comes after it are the last lines of the server.
    threading._shutdown, os._exit = _nothing, end  # type: ignore[attr-defined]


def _nothing() -> None:
    pass


def _run(flag: str, what: str, *arguments: str) -> None:
    sys.argv = [flag, *arguments]
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


def _end(process: BaseProcess) -> None:
    assert process.pid is not None
    process.kill()
    _kill_session(process.pid)
    process.join()


def _kill_session(pid: int) -> None:
    # The latter on macOS, for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
