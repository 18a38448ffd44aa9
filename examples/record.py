"""Turn the outcome of the demo into a record: what ran where, what was checked, and what came out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from bucket import Attempt, Bucket
from events import End, Saved, Start
from runs import EXIT_PREEMPTED, NOTICE_S, Segment
from trajectory import Comparison, Row, digests_of

__all__ = ["Outcome", "record_of", "safe_step"]

_SAFE = re.compile(r"step (?P<step>\d+) is safe, (?P<left_s>-?\d+\.\d+) s before the end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Both runs, the verdict on them, and what stood under B's root at the end."""

    run_a: Sequence[Segment]
    run_b: Sequence[Segment]
    comparison: Comparison
    attempts: Sequence[Attempt]

    def checks(self) -> dict[str, bool]:
        """Say what the demo claims, and whether each claim held."""
        verdict = self.comparison
        everyone = [*self.run_a, *self.run_b]
        told = [pair for pair in pairwise(self.run_b) if pair[0].took_to_end_s is not None]
        return {
            "every loss of B has the bits of A's, also where a step was trained again": not verdict.differing_steps,
            "B trained every step that A trained": bool(verdict.rows) and not verdict.missing,
            "A and B end in the same state, bit for bit": not verdict.differing_parts,
            "every interruption hit the middle of a data epoch": all(
                _is_amid_data_epoch(one) for one in self.run_b if one.interruption
            ),
            "every new process went on from the newest committed save": _resumes_are_newest(self.run_b),
            f"after SIGTERM the process ended by itself with {EXIT_PREEMPTED}, within its {NOTICE_S:g} s": all(
                one.code == EXIT_PREEMPTED for one, _ in told
            ),
            "and logged which step is safe, and how many seconds were left": all(
                safe_step(one) == one.last_step.step for one, _ in told
            ),
            "the SIGTERM cost no step: the next process trained the very next one": all(
                later.of(Start)[0].first == one.last_step.step + 1 for one, later in told
            ),
            "no half-written attempt became a checkpoint later": not self._late_commits(),
            "no process left a file in its working directory": not any(one.left_behind for one in everyone),
        }

    def _late_commits(self) -> list[Attempt]:
        half_written = {one.half_written.name for one in self.run_b if one.half_written}
        return [one for one in self.attempts if one.is_committed and one.name in half_written]


def safe_step(segment: Segment) -> int | None:
    """Return the step that a process called safe in its log, with time to spare; None if it has not."""
    found = filter(None, map(_SAFE.search, segment.warnings))
    return next((int(one["step"]) for one in found if float(one["left_s"]) > 0), None)


def _is_amid_data_epoch(segment: Segment) -> bool:
    return 0 < segment.last_step.position < segment.of(Start)[0].samples


def _resumes_are_newest(run_b: Sequence[Segment]) -> bool:
    committed: int | None = None
    for segment in run_b:
        if segment.of(Start)[0].first != (0 if committed is None else committed + 1):
            return False
        committed = segment.newest_step
    return True


def record_of(outcome: Outcome, bucket: Bucket, facts: Mapping[str, object]) -> dict[str, object]:
    """Put together all that is worth keeping; `facts` are those that only the caller knows.

    The environment is the one that cloudckpt wrote into the newest manifest.
    """
    committed = [attempt for attempt in outcome.attempts if attempt.is_committed]
    return {
        **facts,
        "processors": os.cpu_count(),
        "environment": bucket.environment(committed[-1]) if committed else {},
        "observed": _observed(outcome),
        "checks": outcome.checks(),
    }


def _observed(outcome: Outcome) -> dict[str, object]:
    run_a, run_b, verdict = outcome.run_a, outcome.run_b, outcome.comparison
    return {
        "parameters": run_a[-1].of(End)[0].parameters,
        "checkpoint_bytes": run_a[-1].of(Saved)[-1].bytes,
        "steps_compared": len(verdict.rows),
        "differing_steps": verdict.differing_steps,
        "missing_steps": list(verdict.missing),
        "differing_parts": list(verdict.differing_parts),
        "run_a": [_segment(segment) for segment in run_a],
        "run_b": [_segment(segment) for segment in run_b],
        "digests_a": digests_of(run_a),
        "digests_b": digests_of(run_b),
        "attempts_on_the_bucket": [asdict(attempt) for attempt in outcome.attempts],
        "losses": [_loss(row) for row in verdict.rows],
    }


def _segment(segment: Segment) -> dict[str, object]:
    start, last, half_written = segment.of(Start)[0], segment.last_step, segment.half_written
    return {
        "restored": start.restored,
        "first_step": start.first,
        "last_step": last.step,
        "last_data_epoch": last.data_epoch,
        "last_sample": last.position,
        "samples_per_data_epoch": start.samples,
        "saved_steps": [saved.step for saved in segment.of(Saved)],
        "newest_step": segment.newest_step,
        "interrupted_by": segment.interruption.name if segment.interruption else None,
        "code": segment.code,
        "took_to_end_s": None if segment.took_to_end_s is None else round(segment.took_to_end_s, 2),
        "warnings": list(segment.warnings),
        "half_written": half_written.name if half_written else None,
        "half_written_objects": half_written.object_count if half_written else 0,
        "left_behind": list(segment.left_behind),
        "wall_s": round(segment.wall_s, 2),
    }


def _loss(row: Row) -> dict[str, object]:
    loss_a = None if row.loss_a is None else row.loss_a.hex()
    return {"step": row.step, "process": row.process, "a": loss_a, "b": row.loss_b.hex()}
