"""Let benchmarks fork from the server of the tests: each names modules of its own, and a process has one server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shared import child
from tests.programs import run_forked
from tests.ranks.processes import start_server


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    start_server()


@pytest.fixture
def forked_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a measurement, whose numbers do not matter, begin in a process that has imported torch."""

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-m"]
        return run_forked(*command[1:], cwd=cwd, env=env)

    monkeypatch.setattr(child.subprocess, "run", run)
