"""Run a program to its end, so that a test whose time is up says how far the program came.

`subprocess.run` throws away what was written when a signal, as that of pytest-timeout, interrupts it, and waits for
whatever else holds the pipes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

__all__ = ["run_to_end"]


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
            with contextlib.suppress(
                ProcessLookupError, PermissionError
            ):  # the latter on macOS, for a group of zombies
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if status is None:
                sys.stdout.write(f"not ended: {command}\n{_text(out)}{_text(err)}")
        return CompletedProcess(command, status, _text(out), _text(err))


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
