"""Ask Slurm when the time of this job is over.

    SLURM_JOB_END_TIME, else scontrol, bounded and each few minutes ──▶ end ──lead_s before it──▶ notice

`scontrol` is a question to the controller of the whole cluster, so it is asked seldom, and never more often because it
failed. A limit may be moved while the job runs: where `scontrol` is there, it has the last word before a notice.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cloudckpt.preemption.notices import Notice, SourceError

__all__ = ["SlurmSource"]

_TIMEOUT_S = 5.0
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
        try:
            done = subprocess.run(  # noqa: S603 (the command is ours or the user's, its argument Slurm's)
                [*self._command, self._job],
                env={**self._environ, "SLURM_TIME_FORMAT": "standard"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise SourceError(f"Slurm cannot be asked for the end of job {self._job}: {exc}") from exc
        return self._end_in(done.stdout.decode("utf-8", "replace"))

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
