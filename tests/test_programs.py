"""Programs that tests run say how far they came, and leave nothing behind."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

import psutil
import pytest

from tests.programs import run_to_end

# Tells its parent to stop waiting when all that it is to show is written.
_STUCK = """
import os, signal, subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("begun", other.pid, flush=True)
print("in trouble", file=sys.stderr, flush=True)
os.kill(os.getppid(), signal.SIGUSR1)
other.wait()
"""


class TimeIsUpError(Exception):
    pass


def _end(_number: int, _frame: FrameType | None) -> None:
    raise TimeIsUpError


def test_a_program_that_ends_has_its_status_and_its_words() -> None:
    done = run_to_end([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_program_that_outlasts_its_test_shows_what_it_wrote_and_ends_with_all_it_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(signal.SIGUSR1, _end)
    try:
        with pytest.raises(TimeIsUpError):
            run_to_end([sys.executable, "-c", _STUCK])
    finally:
        signal.signal(signal.SIGUSR1, before)
    *_, begun, trouble = capsys.readouterr().out.splitlines()
    assert (begun.split()[0], trouble) == ("begun", "in trouble")
    other = int(begun.split()[1])
    while psutil.pid_exists(other):  # killed, but perhaps not yet reaped by whoever inherited it
        time.sleep(0.01)
