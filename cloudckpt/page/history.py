"""Put together what a root tells of its run: its saves, the jobs that made them, and what lay between two jobs.

    checkpoints, claims ──▶ Save, Job, Break ──▶ Facts (means, sums, advice)

Pure values. Nothing is made up: a checkpoint that was removed has taken its numbers with it, and what nobody has
written down is None. When a job began is known from its first save that is there: by then it had been at work for
`worked_s`, less what the checkpoint that it went on from had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import fmean, median

from cloudckpt.errors import OptionsError
from cloudckpt.format import EpochClaim, moment_of
from cloudckpt.report import Advice, Costs, advise
from cloudckpt.root import Checkpoint

__all__ = ["Break", "Facts", "Job", "Save", "claimed_at", "facts_of"]

Order = tuple[int, int]
"""(epoch, step)."""
# No save takes so many seconds or requests.
_MOST = 1e12


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint that is there, and the save that made it.

    Attributes:
        checkpoint: itself.
        pin: the note of its pin; None if it is not pinned.
    """

    checkpoint: Checkpoint
    pin: str | None = None

    def number(self, name: str) -> float | None:
        """Return a number of its summary; None where it has none of that name, or one that no save has written."""
        value = self.checkpoint.manifest.summary.get(name)
        return value if value is not None and 0 <= value < _MOST else None

    @property
    def worked_s(self) -> float | None:
        """How long its line of history had been at work."""
        return self.number("worked_s")

    @property
    def seconds(self) -> float | None:
        """From its begin to its manifest."""
        return self.number("seconds")

    @property
    def blocked_s(self) -> float | None:
        """For which it kept training, but for a wait for the save before; None of a version that does not tell."""
        match self.number("in_background"):
            case None:
                return None
            case 0.0:
                return self.seconds
            case _:
                return (self.number("plan_s") or 0.0) + (self.number("stage_s") or 0.0)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of what followed upon each other, with the rest of its seconds; staging is a part of `upload`."""
        known = {name: self.number(f"{name}_s") or 0.0 for name in ("plan", "upload", "gather", "commit")}
        rest_s = (self.seconds or 0.0) - sum(known.values())
        return {**known, "other": max(0.0, rest_s)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What wrote in one epoch.

    Attributes:
        epoch: its number.
        claim: what it has said of itself; None where that cannot be read.
        saves: of its checkpoints those that are there, oldest first.
        began_at: when it went on from a checkpoint or began anew; None if that cannot be told.
    """

    epoch: int
    claim: EpochClaim | None
    saves: Sequence[Save]
    began_at: datetime | None

    @property
    def last_at(self) -> datetime | None:
        """When its last checkpoint that is there was committed."""
        return max((save.checkpoint.created_at for save in self.saves), default=None)

    @property
    def seen(self) -> tuple[datetime, datetime] | None:
        """From when to when it is known to have been at work; None if nothing tells it."""
        told = [save.checkpoint.created_at for save in self.saves]
        claimed = None if self.claim is None else claimed_at(self.claim)
        told += [at for at in (self.began_at, claimed) if at is not None]
        return (min(told), max(told)) if told else None

    @property
    def place(self) -> str:
        """The machine and the process."""
        return "" if self.claim is None else f"{self.claim.host}, process {self.claim.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """What lies between a job and the one that went on from a checkpoint of it.

    Attributes:
        job: the one that went on.
        resumed_from: (epoch, step) of that checkpoint.
        is_there: whether it still is.
        last_at: the last commit before that is there; None if none is.
        until: when the job had begun: then, or where that is not known, at its first save's claim.
        gap_s: seconds between the two: work that was lost, and time in which nothing ran, together.
        redone_s: of that, work that had been committed and was gone back behind.
        is_same_process: the job went back by itself: nothing was interrupted.
    """

    job: Job
    resumed_from: Order
    is_there: bool
    last_at: datetime | None
    until: datetime | None
    gap_s: float | None
    redone_s: float | None
    is_same_process: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that a root tells of its run.

    Attributes:
        saves: oldest first by (epoch, step).
        jobs: by epoch.
        breaks: by epoch of the job that went on.
        gone: (epoch, step) of checkpoints that claims name and that are not there.
        wall_s: seconds from the begin of the newest checkpoint's line of history to that checkpoint.
        worked_s: of these, the work that is in it.
        advice: by what saves have cost; None where nothing tells it.
        mtbf_s: seconds of work per interruption, given or counted.
        is_mtbf_given: whether it was given.
    """

    saves: Sequence[Save]
    jobs: Sequence[Job]
    breaks: Sequence[Break]
    gone: Sequence[Order]
    wall_s: float | None
    worked_s: float | None
    advice: Advice | None
    mtbf_s: float | None
    is_mtbf_given: bool

    @property
    def interruptions(self) -> int:
        """How many jobs went on where another one had ended."""
        return sum(not one.is_same_process for one in self.breaks)

    @property
    def newest(self) -> Save | None:
        """The checkpoint that a restore takes."""
        return self.saves[-1] if self.saves else None


def facts_of(
    checkpoints: Sequence[Checkpoint],
    claims: Mapping[int, EpochClaim],
    *,
    pins: Mapping[Order, str] | None = None,
    unreadable: AbstractSet[Order] = frozenset(),
    mtbf_s: float | None = None,
) -> Facts:
    """Put together what checkpoints and claims (by epoch) tell.

    Args:
        checkpoints: those that are there, in any order.
        claims: those that can be read.
        pins: (epoch, step) → note.
        unreadable: (epoch, step) of those that are there and cannot be read.
        mtbf_s: mean seconds between failures; None: they are counted.

    Raises:
        OptionsError: `mtbf_s` is not a finite number above 0.
    """
    pins = pins or {}
    saves = [Save(one, pins.get(one.order)) for one in sorted(checkpoints, key=lambda one: one.order)]
    by_order = {save.checkpoint.order: save for save in saves}
    by_epoch: dict[int, list[Save]] = {epoch: [] for epoch in claims}
    for save in saves:
        by_epoch.setdefault(save.checkpoint.epoch, []).append(save)
    jobs = {
        epoch: _job(epoch, claims.get(epoch), made, _worked_before(claims.get(epoch), by_order))
        for epoch, made in sorted(by_epoch.items())
    }
    breaks = [one for job in jobs.values() if (one := _break(job, jobs, by_order, unreadable)) is not None]
    named = {(epoch, step) for claim in claims.values() for step, epoch in [*_resumed(claim), *(claim.line or [])]}
    wall_s, worked_s = _of_newest(saves, jobs, claims)
    counted_s = _mtbf_s(jobs.values(), breaks, worked_s) if mtbf_s is None else mtbf_s
    return Facts(
        saves=saves,
        jobs=list(jobs.values()),
        breaks=breaks,
        gone=sorted(named - by_order.keys() - unreadable),
        wall_s=wall_s,
        worked_s=worked_s,
        advice=_advice(saves, counted_s, is_given=mtbf_s is not None),
        mtbf_s=counted_s,
        is_mtbf_given=mtbf_s is not None,
    )


def _resumed(claim: EpochClaim | None) -> list[tuple[int, int]]:
    return [] if claim is None or claim.resumed_from is None else [claim.resumed_from]


def _worked_before(claim: EpochClaim | None, by_order: Mapping[Order, Save]) -> float | None:
    """Return what a job had behind it when it began; None if that is gone."""
    if claim is None:
        return None
    if claim.resumed_from is None:
        return 0.0
    step, epoch = claim.resumed_from
    before = by_order.get((epoch, step))
    return None if before is None else before.worked_s


def _job(epoch: int, claim: EpochClaim | None, saves: Sequence[Save], before_s: float | None) -> Job:
    began_at = None
    if saves and before_s is not None and (worked_s := saves[0].worked_s) is not None:
        began_at = _earlier(saves[0].checkpoint.created_at, worked_s - before_s)
    return Job(epoch=epoch, claim=claim, saves=saves, began_at=began_at)


def claimed_at(claim: EpochClaim) -> datetime | None:
    """Return when a claim was written, by the clock of its job; None where it says nothing that is a time."""
    try:
        return moment_of(claim.created_at)
    except ValueError:
        return None


def _earlier(at: datetime, seconds: float) -> datetime | None:
    try:
        return at - timedelta(seconds=max(0.0, seconds))
    except (OverflowError, ValueError):
        return None  # a number that no job has written


def _break(
    job: Job, jobs: Mapping[int, Job], by_order: Mapping[Order, Save], unreadable: AbstractSet[Order]
) -> Break | None:
    if job.claim is None or job.claim.resumed_from is None:
        return None
    step, epoch = job.claim.resumed_from
    before = jobs.get(epoch)
    last_at = None if before is None else before.last_at
    until = job.began_at or claimed_at(job.claim)
    gap_s = None if last_at is None or until is None else (until - last_at).total_seconds()
    resumed = by_order.get((epoch, step))
    redone_s = None
    if before is not None and resumed is not None and before.saves:
        there, then = before.saves[-1].worked_s, resumed.worked_s
        redone_s = None if there is None or then is None else max(0.0, there - then)
    old = None if before is None else before.claim
    return Break(
        job=job,
        resumed_from=(epoch, step),
        is_there=resumed is not None or (epoch, step) in unreadable,
        last_at=last_at,
        until=until,
        gap_s=None if gap_s is None else max(0.0, gap_s),
        redone_s=redone_s,
        is_same_process=old is not None and (old.host, old.pid) == (job.claim.host, job.claim.pid),
    )


def _of_newest(
    saves: Sequence[Save], jobs: Mapping[int, Job], claims: Mapping[int, EpochClaim]
) -> tuple[float | None, float | None]:
    """Return the seconds since the newest checkpoint's line of history began, and the work that is in it."""
    if not saves or (worked_s := saves[-1].worked_s) is None:
        return None, None
    newest = saves[-1].checkpoint
    epoch, seen = newest.epoch, set[int]()
    while (links := _resumed(claims.get(epoch))) and epoch not in seen:
        seen.add(epoch)
        epoch = links[0][1]
    first = jobs.get(epoch)
    if first is None or first.began_at is None:
        return None, worked_s
    wall_s = (newest.created_at - first.began_at).total_seconds()
    # Clocks of two machines may differ by more than a short run takes.
    return (wall_s, worked_s) if wall_s > 0 else (None, worked_s)


def _mtbf_s(jobs: Iterable[Job], breaks: Sequence[Break], in_newest_s: float | None) -> float | None:
    """Return the seconds of work per interruption, as far as checkpoints tell: in the newest, or job by job."""
    count = sum(not one.is_same_process for one in breaks)
    spans = [(job.began_at, job.last_at) for job in jobs]
    by_jobs_s = sum((last - began).total_seconds() for began, last in spans if began is not None and last is not None)
    worked_s = max(by_jobs_s, in_newest_s or 0.0)
    return worked_s / count if count and worked_s > 0 else None


def _advice(saves: Sequence[Save], mtbf_s: float | None, *, is_given: bool) -> Advice | None:
    blocked = [save.blocked_s for save in saves if save.blocked_s is not None]
    if not blocked:
        if is_given:
            advise(Costs(), mtbf_s)  # raises what is wrong with it
        return None
    blocked_s = fmean(blocked)
    seconds = [save.seconds for save in saves if save.blocked_s is not None and save.seconds is not None]
    intervals, steps = _intervals(saves)
    interval_s = median(intervals) - blocked_s if intervals else 0.0
    step_s = median(steps) if steps else 0.0
    try:
        costs = Costs(
            saves=len(blocked),
            blocked_s=blocked_s,
            commit_s=max(fmean(seconds), blocked_s) if seconds else None,
            interval_s=interval_s if interval_s > 0 else None,
            step_s=step_s if step_s > 0 else None,
        )
    except OptionsError:
        return None  # numbers that no save has written
    return advise(costs, mtbf_s)


def _intervals(saves: Sequence[Save]) -> tuple[list[float], list[float]]:
    """Return the work between neighbours of one job, and the same by step."""
    intervals, steps = [], []
    for one, other in pairwise(saves):
        before, after = one.checkpoint, other.checkpoint
        if before.epoch == after.epoch and one.worked_s is not None and other.worked_s is not None:
            intervals.append(other.worked_s - one.worked_s)
            steps.append((other.worked_s - one.worked_s) / max(1, after.step - before.step))
    return intervals, steps
