"""Turn one command line into a training run of several processes, each but the last interrupted on purpose.

    command ──► fresh process, empty directory ──► events on its standard output ──► Segment
                        ▲                                     │
                        └── SIGKILL ◄── _Hunt: stop it, look at its last event and at the bucket, strike or let go
                            SIGTERM, and SIGKILL if it is still there when its time is over

The process is stopped before it is struck, so that what is decided on cannot change before: a kill "during a save"
hits a save whose shards are under way and whose manifest is not there, and a signal "between saves" meets none. All
of them hit the middle of a data epoch. The workers that read the data are stopped and killed with their process; the
SIGTERM is for the process alone.
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
from events import Event, Saved, Saving, Start, Step, read_event

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PREEMPTED",
    "NOTICE_S",
    "QUIET_S",
    "DemoError",
    "Interruption",
    "Job",
    "Segment",
    "run",
    "run_segment",
]

Kind = TypeVar("Kind", bound=Event)

_READ_BYTES = 1 << 20
_SETTLE_S = 0.25
_SETTLE_DEADLINE_S = 30.0

NOTICE_S = 20.0
"""From SIGTERM to the SIGKILL that follows it, if the process has not ended by then."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT: what a shell reports of a program that Ctrl-C has ended."""
EXIT_PREEMPTED = 143
"""128 + SIGTERM."""

QUIET_S = 5.5
"""From the newest save to SIGTERM: cloudckpt takes a snapshot of the last 5 seconds for as good as a new one."""


class DemoError(Exception):
    """The demo could not show what it is there to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """What to send and when: after step `step` or later was trained, or during the save of step `step` or later."""

    signal: Literal[signal.Signals.SIGKILL, signal.Signals.SIGTERM] = signal.SIGKILL
    when: Literal["between saves", "during a save"]
    step: int

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.signal.name} {self.when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one process did, from its start to its end.

    Attributes:
        events: what it printed, in order.
        interruption: what it was interrupted by; None if it ended by itself.
        code: its exit status; the negative number of the signal that ended it.
        took_to_end_s: seconds from SIGTERM to its end; None without a SIGTERM.
        newest_step: the newest step that was committed in the bucket when it had ended.
        half_written: after a kill during a save, the attempt as the bucket showed it afterwards.
        warnings: what it wrote to its log about the interruption.
        left_behind: names of files that the process left in its working directory, which was empty at first.
        wall_s: seconds from its start to its end.
    """

    events: Sequence[Event]
    interruption: Interruption | None = None
    code: int = 0
    took_to_end_s: float | None = None
    newest_step: int | None = None
    half_written: Attempt | None = None
    warnings: Sequence[str] = ()
    left_behind: Sequence[str] = ()
    wall_s: float = 0.0

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


def run(job: Job, interruptions: Sequence[Interruption]) -> list[Segment]:
    """Run the job's command once per interruption and once more to its end, each in a new process and empty directory.

    Raises:
        DemoError: an interruption found no moment to strike, or a process failed by itself.
    """
    plan: list[Interruption | None] = [*interruptions, None]
    return [run_segment(job, interruption) for interruption in plan]


def run_segment(job: Job, interruption: Interruption | None) -> Segment:
    """Run the job's command in an empty directory until it ends, by itself or because of `interruption`.

    Raises:
        DemoError: the interruption found no moment to strike, or the process failed by itself.
    """
    start_s = time.monotonic()
    earlier_epoch = max((attempt.epoch for attempt in job.bucket.attempts()), default=-1)
    logged_bytes = job.log.stat().st_size if job.log.exists() else 0
    with tempfile.TemporaryDirectory(prefix="cloudckpt-demo-") as directory:
        with _process(job, directory) as process:
            hunt = _Hunt(interruption, _Output(process), process, job.bucket, earlier_epoch)
            events = hunt.follow()
            code = process.wait()
        left_behind = sorted(path.name for path in Path(directory).iterdir())
    _check_end(code, interruption, job.log, was_struck=hunt.was_struck)
    committed = [attempt for attempt in job.bucket.attempts() if attempt.is_committed]
    return Segment(
        events=events,
        interruption=interruption,
        code=code,
        took_to_end_s=hunt.took_to_end_s,
        newest_step=committed[-1].step if committed else None,
        half_written=hunt.half_written,
        warnings=[line for line in _log_from(job.log, logged_bytes) if " WARNING " in line],
        left_behind=left_behind,
        wall_s=time.monotonic() - start_s,
    )


@contextmanager
def _process(job: Job, directory: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **job.environment}
    with job.log.open("ab") as errors:
        process = subprocess.Popen(
            job.command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            # A process group of its own, to which its workers belong.
            start_new_session=True,
        )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


class _Output:
    """The events in a process's pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            raise DemoError("the training process has no standard output")
        self._fd = process.stdout.fileno()
        self._rest = b""

    def read(self, timeout_s: float | None = None) -> list[Event]:
        """Wait for at least one event; none means that the process has ended.

        Raises:
            TimeoutError: no word within `timeout_s`.
        """
        if not select.select([self._fd], [], [], timeout_s)[0]:
            raise TimeoutError(f"no event for {timeout_s} s")
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
        was_struck: whether there was such a moment.
        half_written: see `Segment`.
        took_to_end_s: see `Segment`.
    """

    def __init__(
        self,
        interruption: Interruption | None,
        output: _Output,
        process: subprocess.Popen[bytes],
        bucket: Bucket,
        earlier_epoch: int,
    ) -> None:
        self._interruption = interruption
        self._output = output
        self._process = process
        self._bucket = bucket
        self._earlier_epoch = earlier_epoch
        self._events: list[Event] = []
        self._heard_s = time.monotonic()
        self.was_struck = False
        self.half_written: Attempt | None = None
        self.took_to_end_s: float | None = None

    def follow(self) -> list[Event]:
        """Return every event until the process ends."""
        while not self.was_struck and (more := self._output.read()):
            self._hear(more)
            if self._is_moment() and self._is_in_bucket():
                self._strike()
        while more := self._output.read():
            self._hear(more)
        return self._events

    def _hear(self, events: Sequence[Event]) -> None:
        self._events += events
        if any(isinstance(event, Saved) for event in events):
            self._heard_s = time.monotonic()

    def _last(self, kind: type[Kind]) -> Kind | None:
        return next((event for event in reversed(self._events) if isinstance(event, kind)), None)

    def _saving(self) -> Saving | None:
        """Return the save that is under way, by what the process says."""
        saving, saved = self._last(Saving), self._last(Saved)
        return saving if saved is None or (saving and saving.step > saved.step) else None

    def _is_moment(self) -> bool:
        """Tell whether it is the moment, by what the process says."""
        interruption, last = self._interruption, self._last(Step)
        if interruption is None or last is None or not self._is_amid_data_epoch(last):
            return False
        saving = self._saving()
        if interruption.when == "between saves":
            return saving is None and last.step >= interruption.step and self._is_unsaved(last)
        return saving is not None and saving.step >= interruption.step

    def _is_amid_data_epoch(self, last: Step) -> bool:
        start = self._last(Start)
        return start is not None and 0 < last.position < start.samples

    def _is_unsaved(self, last: Step) -> bool:
        """Tell whether a step was trained since the newest save."""
        saved = self._last(Saved)
        return saved is None or last.step > saved.step

    def _strike(self) -> None:
        interruption = self._interruption
        os.killpg(self._process.pid, signal.SIGSTOP)
        self._hear(self._output.read_ready())
        self._settle()
        if interruption is None or not self._is_confirmed(interruption):
            os.killpg(self._process.pid, signal.SIGCONT)
        elif interruption.signal == signal.SIGKILL:
            self.was_struck = True
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.half_written = self._confirmed() if interruption.when == "during a save" else None
        else:
            self.was_struck = True
            self._terminate()

    def _is_confirmed(self, interruption: Interruption) -> bool:
        """Tell whether it is the moment, now that the process stands still."""
        newest = self._newest()
        is_half_written = newest is not None and not newest.is_committed
        return self._is_moment() and is_half_written == (interruption.when == "during a save")

    def _terminate(self) -> None:
        """Send SIGTERM, and SIGKILL if the process has not ended when its time is over."""
        time.sleep(max(0.0, self._heard_s + QUIET_S - time.monotonic()))
        start_s = time.monotonic()
        os.kill(self._process.pid, signal.SIGTERM)
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            self._process.wait(NOTICE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.took_to_end_s = time.monotonic() - start_s

    def _is_in_bucket(self) -> bool:
        """Wait for the first object of the save that is under way; tell whether it is without a manifest then."""
        saving = self._saving()
        if saving is None:
            return True
        while (newest := self._newest()) is None or newest.step < saving.step:
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


def _check_end(code: int, interruption: Interruption | None, log: Path, *, was_struck: bool) -> None:
    # Whatever a process does after SIGTERM is for the verdict.
    is_expected = code == 0 if interruption is None else was_struck
    if is_expected:
        return
    if interruption and code == 0:
        raise DemoError(f"the run ended before {interruption.name}, at step {interruption.step} or later")
    raise DemoError(f"the training process ended with {code}; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(_log_from(log, 0)[-30:])


def _log_from(log: Path, start_bytes: int) -> list[str]:
    return log.read_bytes()[start_bytes:].decode(errors="replace").splitlines()
