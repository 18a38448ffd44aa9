"""Turn tasks into runs of a framework in processes of their own, and end those that are to be struck.

    Host ──task──▶ host.py ──fork──▶ the run, which leads its own session ──▶ found.json

A strike kills the run and all that it has begun (helpers, workers, daemons), as the end of a machine does.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.trainers.family import end_family, is_alive
from benchmarks.trainers.meter import Found, Task

__all__ = ["Host", "HostError", "Run"]

_REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORT_LIMIT_S = 180.0
_RUN_LIMIT_S = 240.0
_POLL_S = 0.002
_LOG_CHARACTERS = 3000
# Processors may be busy when it is to end.
_END_LIMIT_S = 30.0


class HostError(RuntimeError):
    """A framework cannot be imported, or a run told nothing; the message says what stands in its row."""


class Host:
    """The process that has imported a framework; one `with` owns it. Runs come one after the other."""

    def __init__(self, framework: str, folder: Path) -> None:
        self._folder = folder
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.trainers.host", framework],
            cwd=_REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            told = self.hear(_IMPORT_LIMIT_S)
        except BaseException:
            self.close()
            raise
        if "error" in told:
            self.close()
            raise HostError(told["error"])
        self.ways: Mapping[str, Mapping[str, Any]] = told["ways"]
        self.packages: tuple[str, ...] = tuple(told["packages"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and what it has begun."""
        if self._process.returncode is None:
            end_family(self._process.pid)
        with self._process:  # waits, and closes its pipes
            pass

    def start(self, task: Mapping[str, Any], environment: Mapping[str, str], scratch: Path | None = None) -> Run:
        """Begin a run in a scratch folder: of an earlier run, or a new one as on another machine.

        Args:
            task: all of a `Task` but its folder.
            environment: on top of this process's.
            scratch: where relative paths are.
        """
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self._folder))
        if scratch is None:
            scratch = folder / "scratch"
            scratch.mkdir()
        # Short: a socket below it has a path of 107 bytes at most.
        temporary = Path(tempfile.mkdtemp(prefix="t", dir=self._folder))
        full = Task(**task, folder=str(folder))
        line = {"task": asdict(full), "environment": {**environment, "TMPDIR": str(temporary)}, "scratch": str(scratch)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        self._process.stdin.flush()
        return Run(self, folder, scratch, temporary, self.hear(_IMPORT_LIMIT_S)["pid"])

    def hear(self, limit_s: float) -> dict[str, Any]:
        """Return what it says next.

        Raises:
            HostError: nothing in time, or it has ended.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise HostError(f"said nothing for {limit_s:.0f} s" if not ready else "ended without a word")
        told: dict[str, Any] = json.loads(line)
        return told


class Run:
    """One run under way.

    Attributes:
        scratch: where its relative paths are.
    """

    def __init__(self, host: Host, folder: Path, scratch: Path, temporary: Path, pid: int) -> None:
        self.scratch = scratch
        self._host, self._folder, self._temporary, self._pid = host, folder, temporary, pid
        self.was_struck = False

    def result(self) -> Found:
        """Wait for its end; return what it told, with its error if it failed."""
        try:
            status = self._host.hear(_RUN_LIMIT_S)["status"]
        except HostError as error:
            self.strike()
            self._host.hear(_END_LIMIT_S)
            return Found(error=f"it {error}")
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
        told = self._folder / "found.json"
        if told.exists():
            return Found(**json.loads(told.read_bytes()))
        return Found(error="" if self.was_struck else f"ended with status {status} and no word")

    def log(self) -> str:
        """Return the end of what it has printed."""
        with suppress(OSError):
            return (self._folder / "log").read_text(errors="replace").strip()[-_LOG_CHARACTERS:]
        return ""

    def await_gate(self) -> bool:
        """Wait until it would begin its second save; False if it ended before."""
        return self._wait_for((self._folder / "waits").exists)

    def open_gate(self) -> None:
        """Let it begin."""
        (self._folder / "go").touch()

    def strike_on_disk(self, folder: Path, more_bytes: int) -> None:
        """Strike once a folder has grown by so many bytes, unless that never happens."""
        before = held_bytes(folder)
        if self._wait_for(lambda: held_bytes(folder) >= before + more_bytes):
            self.strike()

    def strike(self) -> None:
        """Kill it and all of its processes."""
        self.was_struck = True
        end_family(self._pid)

    def _wait_for(self, is_so: Callable[[], bool]) -> bool:
        end_s = time.monotonic() + _RUN_LIMIT_S
        while time.monotonic() < end_s:
            if is_so():
                return True
            if not is_alive(self._pid):
                return False
            time.sleep(_POLL_S)
        return False


def held_bytes(folder: Path) -> int:
    """Return how many bytes the files below a folder have."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(directory, name)).st_size  # noqa: PTH116, PTH118 (thousands a second)
    return total
