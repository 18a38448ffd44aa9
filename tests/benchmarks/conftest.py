"""Let benchmarks fork from the server of the tests: each names modules of its own, and a process has one server."""

from __future__ import annotations

import pytest

from tests.ranks.processes import start_server


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    start_server()
