"""Run a program of `examples/integrations` on one or more ranks until it ends or is struck, and read its losses.

A program prints `step <number> <loss as a hexadecimal float>` after each step, on rank 0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from bucket import Bucket

from raw_access import FreshPrefix

__all__ = ["Run", "assert_a_run_goes_on_from_a_bucket", "assert_same_losses", "run_program"]

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run came to.

    Attributes:
        losses: step → the bits of its loss.
        code: exit status of rank 0.
        took_to_end_s: from the signal to the end of all ranks.
        newest_step: the newest that is committed.
    """

    losses: dict[int, str]
    code: int
    took_to_end_s: float
    newest_step: int | None


def run_program(
    name: str,
    root: FreshPrefix,
    *arguments: str,
    ranks: int = 1,
    strike: signal.Signals | None = None,
    when: Literal["between saves", "during a save"] = "between saves",
    after: int = 0,
) -> Run:
    """Start `name` with `--url root`, and send `strike` to all its ranks after step `after`."""
    bucket = Bucket(root.url, root.storage_options)
    earlier = {attempt.name for attempt in bucket.attempts()}
    with _Ranks(
        [sys.executable, str(REPOSITORY / "examples/integrations" / name), "--url", root.url, *arguments], root, ranks
    ) as job:
        losses: dict[int, str] = {}
        struck_s = None
        for line in job.output:
            word, *rest = line.split()[:3] or [""]
            if word == "step":
                losses[int(rest[0])] = rest[1]
            if strike is not None and struck_s is None and losses and max(losses) >= after:
                if when == "during a save":
                    job.stop_in_save(bucket, earlier)
                struck_s = time.monotonic()
                job.signal(strike)
        code = job.wait()
    took_s = 0.0 if struck_s is None else time.monotonic() - struck_s
    committed = [attempt.step for attempt in bucket.attempts() if attempt.is_committed]
    return Run(losses=losses, code=code, took_to_end_s=took_s, newest_step=committed[-1] if committed else None)


def assert_same_losses(interrupted: list[Run], alone: Run) -> None:
    """Hold that runs trained each step of one left alone, and that every loss has its bits."""
    assert {step for run in interrupted for step in run.losses} == set(alone.losses)
    for run in interrupted:
        assert run.losses == {step: alone.losses[step] for step in run.losses}


class _Ranks:
    """The processes of one job."""

    def __init__(self, command: Sequence[str], root: FreshPrefix, count: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
        self._processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                text=True,
                env={
                    **os.environ,
                    **together,
                    **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
                    "PYTHONPATH": str(REPOSITORY),
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "CLOUDCKPT_STORAGE_OPTIONS": json.dumps(root.storage_options),
                    "CLOUDCKPT_GRACE_S": "30",
                },
                start_new_session=True,
            )
            for rank in range(count)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait()
        self.output.close()

    @property
    def output(self) -> IO[str]:
        found = self._processes[0].stdout
        assert found is not None
        return found

    def signal(self, which: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, which)

    def stop_in_save(self, bucket: Bucket, earlier: set[str]) -> None:
        """Stop all ranks at a moment when the bucket shows shards of a save, and no manifest of it."""
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s and all(process.poll() is None for process in self._processes):
            self.signal(signal.SIGSTOP)
            time.sleep(0.02)  # what the server has taken stands in its listing by then
            if any(not one.is_committed and one.name not in earlier for one in bucket.attempts()):
                return
            self.signal(signal.SIGCONT)
            time.sleep(0.01)
        raise AssertionError("the job ended before a save could be struck")

    def wait(self) -> int:
        codes = [process.wait(LIMIT_S) for process in self._processes]
        return codes[0]


def assert_a_run_goes_on_from_a_bucket(program: str, s3_url: FreshPrefix, *, ranks: int) -> None:
    """Kill a run between two saves and during one, tell it to end, and compare each loss with those of one left alone.

    The programs save every four steps.
    """

    def one(name: str, **how: Any) -> Run:
        root = FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)
        return run_program(program, root, "--width", "4000", ranks=ranks, **how)

    alone = one("a")
    between = one("b", strike=signal.SIGKILL, after=6)
    during = one("b", strike=signal.SIGKILL, when="during a save", after=7)
    told = one("b", strike=signal.SIGTERM, after=17)
    last = one("b")

    assert (alone.code, between.code, during.code, told.code, last.code) == (0, -9, -9, 143, 0)
    # What it was told in a save that is under way, that save answers.
    assert told.newest_step is not None
    assert max(told.losses) - told.newest_step < 4
    assert min(last.losses) == told.newest_step + 1
    assert told.took_to_end_s < 30
    assert_same_losses([between, during, told, last], alone)
