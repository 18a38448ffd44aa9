"""Ask Slurm when the time of this job is over.

    SLURM_JOB_END_TIME, else scontrol, bounded and each few minutes ──▶ end ──lead_s before it──▶ notice

`scontrol` is a question to the controller of the whole cluster, so it is asked seldom, and never more often because it
failed. A limit may be moved while the job runs: where `scontrol` is there, it has the last word before a notice.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cloudckpt.preemption.notices import Notice, SourceError

__all__ = ["SlurmSource"]

_TIMEOUT_S = 5.0
_LOOK_S = 0.01
_MOST_BYTES = 1 << 20
_REFRESH_S = 300.0
# An end so long ago is that of another job, whose environment this process has inherited.
_MOST_PAST_S = 300.0


class SlurmSource:
    """The time limit of a Slurm job.

    Documented by SchedMD: srun(1) and sbatch(1), "Output environment variables" (SLURM_JOB_ID; SLURM_JOB_END_TIME in
    Unix seconds), scontrol(1) (`show job`, `EndTime`, SLURM_TIME_FORMAT) and slurm.conf(5) (KillWait: at the end each
    process gets SIGTERM, and SIGKILL after 30 s by default). The deadline is the end itself.
    """

    name = "slurm"

    def __init__(
        self,
        *,
        lead_s: float = 120.0,
        command: Sequence[str] = ("scontrol", "--oneliner", "show", "job"),
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Give notice `lead_s` seconds before the end of the job; `command` is run with the job's number after it."""
        self._lead_s = lead_s
        self._command = tuple(command)
        self._environ = environ
        self._clock = clock
        self._wall_clock = wall_clock
        self._job = environ.get("SLURM_JOB_ID", "")
        end = environ.get("SLURM_JOB_END_TIME", "")
        self._end_s = float(end) if end.isascii() and end.isdigit() and int(end) > 0 else None
        self._is_stated = self._end_s is not None
        self._next_s = float("-inf")
        self._failure = ""

    def poll(self) -> Iterable[Notice]:
        if not self._is_stated or self._is_near():
            self._refresh()
        if self._end_s is None or not self._is_near():
            return ()
        left_s = self._end_s - self._wall_clock()
        if left_s < -_MOST_PAST_S:
            raise SourceError(f"the time limit of Slurm job {self._job} is said to be over for {-left_s:.0f} s")
        now_s = self._clock()
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._end_s))
        return (
            Notice(
                source="slurm time limit",
                reason=f"the time of Slurm job {self._job} is over at {end}",
                deadline_s=now_s + max(0.0, left_s),
                received_s=now_s,
            ),
        )

    def _is_near(self) -> bool:
        return self._end_s is not None and self._end_s - self._wall_clock() <= self._lead_s

    def _refresh(self) -> None:
        """Ask the controller if it is time to; an end that is known outlives a failure."""
        if self._clock() >= self._next_s:
            self._next_s = self._clock() + _REFRESH_S
            try:
                self._end_s, self._failure = self._asked_end_s(), ""
            except SourceError as exc:
                self._failure = str(exc)
        if self._failure and self._end_s is None:
            raise SourceError(self._failure)

    def _asked_end_s(self) -> float | None:
        """Return the Unix second of the end by `scontrol`, None for a job without one."""
        return self._end_in(self._answer())

    def _answer(self) -> str:
        """Return what the command writes.

        Raises:
            SourceError: it cannot be started, fails, or takes too long.
        """
        command = [*self._command, self._job]
        environ = {**self._environ, "SLURM_TIME_FORMAT": "standard"}
        # Neither a pipe nor `subprocess`, which has one inside: a worker of a DataLoader that the main thread forks at
        # this moment would hold its other end, and whoever reads it would wait for that worker's end.
        with tempfile.TemporaryFile() as output:
            ends = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ]
            try:
                pid = os.posix_spawnp(command[0], command, environ, file_actions=ends)
            except OSError as exc:
                raise self._refusal(exc) from exc
            status = _status_of(pid)
            output.seek(0)
            said = output.read(_MOST_BYTES).decode("utf-8", "replace")
        if status != 0:
            raise self._refusal(f"{command[0]} ended with {status}: {said[-200:]!r}")
        return said

    def _refusal(self, why: object) -> SourceError:
        return SourceError(f"Slurm cannot be asked for the end of job {self._job}: {why}")

    def _end_in(self, text: str) -> float | None:
        # Under the number of an array's first job, all of its jobs are listed.
        mine = [line for line in text.splitlines() if line.startswith(f"JobId={self._job} ")] or [text]
        found = re.search(r"\bEndTime=(\S+)", mine[0])
        if found is None:
            raise SourceError(f"Slurm named no EndTime for job {self._job}: {text[:80]!r}")
        if found[1] in ("Unknown", "None", "NONE"):
            return None
        try:
            return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
        except (ValueError, OverflowError) as exc:
            raise SourceError(f"Slurm named {found[1]!r} as the EndTime of job {self._job}") from exc


def _status_of(pid: int) -> int | str:
    """Wait for a process to end, and kill it when its time is over; return its exit code, or what was done to it."""
    stop_s = time.monotonic() + _TIMEOUT_S
    is_killed = False
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0  # a handler of SIGCHLD was quicker: what was written decides
        if found:
            return f"a kill after {_TIMEOUT_S:g} s" if is_killed else os.waitstatus_to_exitcode(status)
        if not is_killed and time.monotonic() > stop_s:
            is_killed = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
