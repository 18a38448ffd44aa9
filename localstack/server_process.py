"""Start a server's process, wait until it answers, and end exactly that process and its group.

Knows processes, ports and logs; knows nothing of S3 or GCS. A server dies with its owner (see `supervise`)
unless it is started detached.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

__all__ = [
    "ServerEndedError",
    "ServerStartError",
    "await_ready",
    "birth_s",
    "clean_environment",
    "end_group",
    "end_group_of",
    "free_ports",
    "launch",
    "log_tail",
]

_POLL_S = 0.05


class ServerStartError(RuntimeError):
    """A server did not come up; the message ends with the tail of its log."""


class ServerEndedError(ServerStartError):
    """A server ended before it was ready, for example since its port was taken meanwhile."""


def free_ports(count: int) -> list[int]:
    """Return `count` different loopback ports that nobody listens on now (somebody may, a moment later)."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def clean_environment(**extra: str) -> dict[str, str]:
    """Return an environment for a server: no credentials, proxies or Python settings of the caller's."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, **extra}


def launch(
    command: Sequence[str], *, environment: Mapping[str, str], directory: Path, log_path: Path, detached: bool
) -> subprocess.Popen[bytes]:
    """Start `command` in `directory` as the leader of a process group of its own.

    Unless `detached`, the group is killed as soon as this process ends, whatever ended it.
    """
    supervisor = [] if detached else [sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py"))]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*supervisor, *command],
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def await_ready(
    process: subprocess.Popen[bytes], is_ready: Callable[[], bool], *, name: str, timeout_s: float, log_path: Path
) -> None:
    """Return once `is_ready()` says so.

    Raises:
        ServerEndedError: the process ended.
        ServerStartError: the time is up; the process still runs.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            reason = f"{name} ended with status {process.returncode} before it was ready"
            raise ServerEndedError(f"{reason}\n{log_tail(log_path)}")
        # The process must still live after the answer: else another server answered on that port.
        if is_ready() and process.poll() is None:
            return
        time.sleep(_POLL_S)
    raise ServerStartError(f"{name} was not ready within {timeout_s:.0f} s\n{log_tail(log_path)}")


def log_tail(log_path: Path, *, lines_count: int = 30) -> str:
    """Return the log's last lines under its path, for an error message."""
    try:
        lines = log_path.read_text(errors="replace").splitlines()[-lines_count:]
    except FileNotFoundError:
        lines = []
    return "\n".join([f"--- the end of {log_path}:", *lines])


def end_group(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Terminate the process, wait `grace_s`, then kill what is left of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def birth_s(pid: int) -> float | None:
    """Return when a live process began, in seconds since 1970, which tells it from a later one of the same id."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def end_group_of(pid: int, *, grace_s: float) -> None:
    """Do what `end_group` does to a detached server that another process started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    # Not by waiting for the id to go: where the process that inherits orphans buries none, it never does.
    deadline_s = time.monotonic() + grace_s
    while birth_s(pid) is not None and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    while birth_s(pid) is not None:
        time.sleep(_POLL_S)
