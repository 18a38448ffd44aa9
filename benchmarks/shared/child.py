"""Turn a specification into the report of a fresh process, or of several that are the ranks of one job.

    parent: reports_of(module, spec, ranks) ──▶ python -m module JSON, once per rank ──▶ `MARK` and JSON on its stdout

A fresh process per number: no peer inherits another's imports, allocator, connections or peak.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MARK", "MeasurementError", "report_of_child", "reports_of_ranks"]

MARK = "MEASUREMENT "

_REPOSITORY = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 900.0
_GRACE_S = 5.0
_POLL_S = 0.05


class MeasurementError(RuntimeError):
    """A child failed; its last words are the message."""


def report_of_child(
    module: str, spec: Mapping[str, Any], what: str, *, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a module on a specification in a fresh process; return the JSON behind the last `MARK` that it prints.

    Raises:
        MeasurementError: it failed or took too long; `what` says in the message what was measured.
    """
    try:
        done = subprocess.run(
            _command(module, spec),
            cwd=_REPOSITORY,
            env=_environment(environment or {}),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise MeasurementError(f"{what} took longer than {_TIMEOUT_S:.0f} s") from exc
    report = _report(done.stdout)
    if done.returncode or report is None:
        raise MeasurementError(f"{what}: {_last_words(done.stderr)}")
    return report


def reports_of_ranks(
    module: str, spec: Mapping[str, Any], what: str, *, ranks: int, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run a module as so many ranks, as `torchrun` starts them; return what each reported, in order.

    They find a store for their process group at `MASTER_ADDR` and `MASTER_PORT`, and have one OpenMP thread each.

    Raises:
        MeasurementError: a rank failed, or not all ended in time.
    """
    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as logs:
        port = listener.getsockname()[1]
        # The store listens on a socket of ours: its own would listen on every interface.
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
        processes = [_start(_command(module, spec), rank, group, Path(logs)) for rank in range(ranks)]
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        del store
        if failed is not None:
            words = _last_words((Path(logs) / f"{failed}.err").read_text())
            raise MeasurementError(f"{what}: rank {failed}: {words}")
        reports = [_report((Path(logs) / f"{rank}.out").read_text()) for rank in range(ranks)]
    if None in reports:
        raise MeasurementError(f"{what}: rank {reports.index(None)} ended without a report")
    return [report for report in reports if report is not None]


def _command(module: str, spec: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", module, json.dumps(spec)]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "AWS_EC2_METADATA_DISABLED": "true", **more}


def _start(command: Sequence[str], rank: int, group: Mapping[str, str], logs: Path) -> subprocess.Popen[bytes]:
    environment = _environment({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    with (logs / f"{rank}.out").open("wb") as out, (logs / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(command, cwd=_REPOSITORY, env=environment, stdout=out, stderr=err)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all ranks; return the first that failed, or that did not end in time."""
    stop_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < stop_s:
        statuses = [process.poll() for process in processes]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None:
            # The others wait for it in a collective; those that failed by themselves may still say why.
            time.sleep(_GRACE_S if None in statuses else 0.0)
            return failed
        if None not in statuses:
            return None
        time.sleep(_POLL_S)
    return next(rank for rank, process in enumerate(processes) if process.poll() is None)


def _report(output: str) -> dict[str, Any] | None:
    found = [line for line in output.splitlines() if line.startswith(MARK)]
    report: dict[str, Any] | None = json.loads(found[-1].removeprefix(MARK)) if found else None
    return report


def _last_words(errors: str) -> str:
    return (errors.strip().splitlines() or [f"no message within {_TIMEOUT_S:.0f} s"])[-1]
