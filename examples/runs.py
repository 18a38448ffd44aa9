"""Turn one command line into a training run of several processes, each but the last ended by SIGKILL on purpose.

    command ──► fresh process, empty directory ──► events on its standard output ──► Segment
                        ▲                                     │
                        └── SIGKILL ◄── _Hunt: stop it, look at its last event and at the bucket, kill or let go

The process is stopped before it is killed, so that what is decided on cannot change before the kill: a kill "during
a save" hits a save whose shards are under way and whose manifest is not there, and one "between saves" hits none.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from bucket import Attempt, Bucket
from events import Event, Saving, Step, read_event

__all__ = ["DemoError", "Job", "Kill", "Segment", "run", "run_segment"]

Kind = TypeVar("Kind", bound=Event)

_READ_BYTES = 1 << 20
_SETTLE_S = 0.25
_SETTLE_DEADLINE_S = 30.0


class DemoError(Exception):
    """The demo could not show what it is there to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When to send SIGKILL: after step `step` or later was trained, or during the save of step `step` or later."""

    when: Literal["between saves", "during a save"]
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one process did, from its start to its end.

    Attributes:
        events: what it printed, in order.
        kill: how it was ended; None if it ended by itself.
        half_written: after a kill during a save, the attempt as the bucket showed it afterwards.
        left_behind: names of files that the process left in its working directory, which was empty at first.
        wall_s: seconds from its start to its end.
    """

    events: Sequence[Event]
    kill: Kill | None
    half_written: Attempt | None
    left_behind: Sequence[str]
    wall_s: float

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def last_step(self) -> Step:
        """The last step that was trained.

        Raises:
            DemoError: there is none.
        """
        steps = self.of(Step)
        if not steps:
            raise DemoError("a process ended before it had trained a step")
        return steps[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run: what to start, and where to look at it.

    Attributes:
        environment: added to this process's own.
        log: takes the standard error of every process.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    bucket: Bucket
    log: Path


def run(job: Job, kills: Sequence[Kill]) -> list[Segment]:
    """Run the job's command once per kill and once more to its end, each time in a new process and an empty directory.

    Raises:
        DemoError: a kill found no moment to strike, or a process failed by itself.
    """
    plan: list[Kill | None] = [*kills, None]
    return [run_segment(job, kill) for kill in plan]


def run_segment(job: Job, kill: Kill | None) -> Segment:
    """Run the job's command in an empty directory until it ends or `kill` hits.

    Raises:
        DemoError: the kill found no moment to strike, or the process failed by itself.
    """
    start_s = time.monotonic()
    earlier_epoch = max((attempt.epoch for attempt in job.bucket.attempts()), default=-1)
    with tempfile.TemporaryDirectory(prefix="cloudckpt-demo-") as directory:
        with _process(job, directory) as process:
            hunt = _Hunt(kill, _Output(process), process, job.bucket, earlier_epoch)
            events = hunt.follow()
            code = process.wait()
        left_behind = sorted(path.name for path in Path(directory).iterdir())
    _check_end(code, kill, job.log)
    return Segment(
        events=events,
        kill=kill,
        half_written=hunt.half_written,
        left_behind=left_behind,
        wall_s=time.monotonic() - start_s,
    )


@contextmanager
def _process(job: Job, directory: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **job.environment}
    with job.log.open("ab") as errors:
        process = subprocess.Popen(job.command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=errors)
    with process:
        try:
            yield process
        finally:
            process.kill()


class _Output:
    """The events in a process's pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            raise DemoError("the training process has no standard output")
        self._fd = process.stdout.fileno()
        self._rest = b""

    def read(self) -> list[Event]:
        """Wait for at least one event; none means that the process has ended."""
        while data := os.read(self._fd, _READ_BYTES):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                return [read_event(line) for line in lines]
        return []

    def read_ready(self) -> list[Event]:
        """Return what is there already."""
        events: list[Event] = []
        while select.select([self._fd], [], [], 0)[0] and (more := self.read()):
            events += more
        return events


class _Hunt:
    """Follows one process and strikes once, when both its events and the bucket say that the moment is right.

    Attributes:
        half_written: see `Segment`.
    """

    def __init__(
        self,
        kill: Kill | None,
        output: _Output,
        process: subprocess.Popen[bytes],
        bucket: Bucket,
        earlier_epoch: int,
    ) -> None:
        self._kill = kill
        self._output = output
        self._process = process
        self._bucket = bucket
        self._earlier_epoch = earlier_epoch
        self._events: list[Event] = []
        self.half_written: Attempt | None = None

    def follow(self) -> list[Event]:
        """Return every event until the process ends."""
        while more := self._output.read():
            self._events += more
            if self._is_moment():
                self._strike()
        return self._events

    def _is_moment(self) -> bool:
        kill, event = self._kill, self._events[-1]
        if kill is None:
            return False
        if kill.when == "between saves":
            return isinstance(event, Step) and event.step >= kill.step
        return isinstance(event, Saving) and event.step >= kill.step and self._shards_arrive(event.step)

    def _strike(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        self._events += self._output.read_ready()
        self._settle()
        newest = self._newest()
        is_saving = isinstance(self._events[-1], Saving)
        is_half_written = newest is not None and not newest.is_committed
        should_save = self._kill is not None and self._kill.when == "during a save"
        if is_saving == is_half_written == should_save:
            self._process.kill()
            self._process.wait()
            self.half_written = self._confirmed() if should_save else None
        else:
            os.kill(self._process.pid, signal.SIGCONT)

    def _shards_arrive(self, step: int) -> bool:
        """Wait for the first object of this step's attempt."""
        while (newest := self._newest()) is None or newest.step < step:
            if self._process.poll() is not None:
                return False
        return not newest.is_committed

    def _settle(self) -> None:
        """Wait until requests that were on their way when the process stopped have landed."""
        deadline_s = time.monotonic() + _SETTLE_DEADLINE_S
        before, now = None, self._newest()
        while before != now and time.monotonic() < deadline_s:
            time.sleep(_SETTLE_S)
            before, now = now, self._newest()

    def _newest(self) -> Attempt | None:
        """Look at the newest step that this process has brought to the bucket.

        Older ones without a manifest are pruned, not half-written: their shards go in a later pass.
        """
        ours = [attempt for attempt in self._bucket.attempts() if attempt.epoch > self._earlier_epoch]
        return max(ours, key=lambda attempt: attempt.step, default=None)

    def _confirmed(self) -> Attempt:
        newest = self._newest()
        if newest is None or newest.is_committed:
            raise DemoError(f"the kill during a save left {newest}, which is not half-written")
        return newest


def _check_end(code: int, kill: Kill | None, log: Path) -> None:
    if code == (-signal.SIGKILL if kill else 0):
        return
    if kill and code == 0:
        raise DemoError(f"the run ended before it could be killed {kill.when}, at step {kill.step} or later")
    raise DemoError(f"the training process ended with {code}; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
