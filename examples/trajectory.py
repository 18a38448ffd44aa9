"""Turn what two runs printed into a verdict: equal in every bit, or where they part.

Losses travel as the hexadecimal form of the float, so that no rounding can hide or make a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from events import End, Event, Saved, Start, Step
from runs import NOTICE_S, DemoError, Segment

__all__ = ["Comparison", "Row", "compare", "digests_of", "losses_of", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step of the interrupted run beside the same step of the other.

    Attributes:
        process: the number of the process that trained this step, from 1; a step that a kill cost is trained again.
        loss_a: of the run without interruptions; None if it has no such step.
    """

    step: int
    process: int
    data_epoch: int
    position: int
    loss_a: float | None
    loss_b: float

    @property
    def is_equal(self) -> bool:
        """Whether both losses are the same bits."""
        return self.loss_a is not None and self.loss_a.hex() == self.loss_b.hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The verdict on two runs.

    Attributes:
        rows: every step that the interrupted run trained, in the order in which it did.
        missing: steps of the run without interruptions that the other never trained.
        differing_parts: parts of the final state whose digests differ.
    """

    rows: Sequence[Row]
    missing: Sequence[int]
    differing_parts: Sequence[str]

    @property
    def differing_steps(self) -> list[int]:
        """Steps whose losses differ, in the order in which they were trained."""
        return [row.step for row in self.rows if not row.is_equal]

    @property
    def is_identical(self) -> bool:
        """Whether no bit of any loss and of the final state differs, and no step is missing."""
        return bool(self.rows) and not (self.missing or self.differing_parts or self.differing_steps)


def compare(run_a: Sequence[Segment], run_b: Sequence[Segment]) -> Comparison:
    """Hold every step that `run_b` trained, repeated ones included, against the same step of `run_a`."""
    losses_a = losses_of(run_a)
    rows = list(_rows(run_b, losses_a))
    digests_a, digests_b = digests_of(run_a), digests_of(run_b)
    names = sorted(digests_a.keys() | digests_b.keys())
    return Comparison(
        rows=rows,
        missing=sorted(losses_a.keys() - {row.step for row in rows}),
        differing_parts=[name for name in names if digests_a.get(name) != digests_b.get(name)],
    )


def losses_of(run: Sequence[Segment]) -> dict[int, float]:
    """Return step → loss, the last time the step was trained."""
    return {event.step: event.loss_value for segment in run for event in segment.of(Step)}


def digests_of(run: Sequence[Segment]) -> dict[str, str]:
    """Return part → digest of the state in which the run ended.

    Raises:
        DemoError: the run did not get to its end.
    """
    ends = run[-1].of(End)
    if not ends:
        raise DemoError("the run printed no digests of its final state")
    return ends[0].digests


def table(comparison: Comparison, run_b: Sequence[Segment]) -> Iterator[str]:
    """Write the comparison as lines, a step each, with starts, saves and interruptions where they happened."""
    rows = iter(comparison.rows)
    yield f"{'step':>5} {'epoch:sample':>12} {'loss, left alone':>24} {'loss, interrupted':>24} {'':>8}  equal"
    for number, segment in enumerate(run_b, start=1):
        for event in segment.events:
            yield from _lines(event, number, rows)
        if segment.interruption:
            yield f"----- process {number}: {segment.interruption.name}{_struck(segment)}"
        yield from (f"      log: {line}" for line in segment.warnings)


def _lines(event: Event, process: int, rows: Iterator[Row]) -> Iterator[str]:
    if isinstance(event, Start):
        origin = event.restored or "nothing: a fresh start"
        yield f"----- process {process}: restored from {origin}; first step {event.first}"
    elif isinstance(event, Saved):
        yield f"      saved step {event.step} ({event.bytes} bytes)"
    elif isinstance(event, Step):
        yield _line(next(rows))


def _line(row: Row) -> str:
    place = f"{row.data_epoch}:{row.position}"
    loss_a = "-" if row.loss_a is None else row.loss_a.hex()
    verdict = "yes" if row.is_equal else "NO  <-----"
    return f"{row.step:>5} {place:>12} {loss_a:>24} {row.loss_b.hex():>24} {row.loss_b:>8.4f}  {verdict}"


def _struck(segment: Segment) -> str:
    if segment.took_to_end_s is not None:
        return f"; it ended with {segment.code} after {segment.took_to_end_s:.1f} s of the {NOTICE_S:g} s that it had"
    if segment.half_written is None:
        return ""
    attempt = segment.half_written
    return f"; on the bucket: {attempt.name} with {attempt.object_count} objects and no manifest"


def _rows(run: Sequence[Segment], losses_a: dict[int, float]) -> Iterator[Row]:
    for number, segment in enumerate(run, start=1):
        for event in segment.of(Step):
            yield Row(
                step=event.step,
                process=number,
                data_epoch=event.data_epoch,
                position=event.position,
                loss_a=losses_a.get(event.step),
                loss_b=event.loss_value,
            )
