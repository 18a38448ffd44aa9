"""The servers of a test run are shared by its processes, and end with the one that hosts them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from servers import ServerStartError
from sharing import BUCKETS, Host, shared_server
from tests.programs import run_to_end

LOCALSTACK = Path(__file__).resolve().parents[2] / "localstack"
ASK = "import sys, sharing; print(sharing.shared_server(sys.argv[1], 'fake-gcs').pid)"


def test_all_processes_have_the_same_server_with_its_buckets_until_the_host_ends() -> None:
    with closing(Host()) as host, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(shared_server, host.address, "fake-gcs") for _ in range(4)]
        servers = [future.result() for future in asked]
        command = [sys.executable, "-c", ASK, host.address]
        elsewhere = run_to_end(command, cwd=LOCALSTACK)
        with closing(servers[0]) as server:
            assert sorted(server.buckets()) == sorted(BUCKETS)
    assert {server.pid for server in servers} == {int(elsewhere.stdout)}, elsewhere.stderr
    assert not psutil.pid_exists(servers[0].pid)


def test_every_process_that_asks_is_told_why_a_server_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_LOCALSTACK_VENV", "/nowhere")
    with closing(Host()) as host:
        for _ in range(2):
            with pytest.raises(ServerStartError, match="make setup-localstack"):
                shared_server(host.address, "localstack")
