"""Turn what background saves cost into the tables that people read, and into the answer whether the goals were met.

Pure values: nothing is measured here. All ratios are of one run: a blocked time against a copy just before it, a
lost time against stock DCP in the same round of turns, a step against the idle steps just before the save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median, quantiles
from typing import Any

from benchmarks.background.process import Outcome, Save
from benchmarks.shared.report import MIB, STOCK, Goal

__all__ = ["AsyncResults", "AsyncRow", "goals_of", "lost_s", "step_ratio", "table"]

_SLACK_BYTES = 64 * MIB
_FLAT_BYTES = 16 * MIB
_FLAT_FROM = 5
_OURS = "cloudckpt"


@dataclass(slots=True, kw_only=True)
class AsyncRow:
    """What one peer did in one part, in turns."""

    peer: str
    title: str
    runs: list[Any] = field(default_factory=list)
    failure: str = ""


@dataclass(slots=True, kw_only=True)
class AsyncResults:
    """All rows of one table.

    Attributes:
        kind: which columns and goals: `blocked`, `lost`, `limited`, `memory`, `flat` or `gpu`.
        skipped: why nothing was measured.
    """

    kind: str
    title: str
    target: str
    rows: list[AsyncRow] = field(default_factory=list)
    skipped: str = ""

    def row(self, peer: str) -> AsyncRow | None:
        """The row of a peer, if it was measured."""
        return next((row for row in self.rows if row.peer == peer and row.runs), None)

    def as_json(self) -> dict[str, object]:
        """Every single measurement, for a file."""
        return asdict(self)


# ---- numbers --------------------------------------------------------------------------------------------------------


def lost_s(save: Save) -> float:
    """Return the training time that a save cost: blocked, and what its steps took above the idle median."""
    usual_s = median(save.idle_s)
    return save.blocked_s + sum(step_s - usual_s for step_s in save.steps_s)


def _noise_s(save: Save) -> float:
    """Return what the same sum finds in idle steps, for as many steps as there were beside the save."""
    return (mean(save.idle_s) - median(save.idle_s)) * len(save.steps_s)


def step_ratio(save: Save) -> float | None:
    """Return how much longer a step takes while the save goes on, mean against mean; None if no step began."""
    return mean(save.steps_s) / mean(save.idle_s) if save.steps_s else None


def _p95_ratio(save: Save) -> float | None:
    if len(save.steps_s) < 2:
        return None
    return quantiles(save.steps_s, n=20)[-1] / median(save.idle_s)


def _first(runs: Sequence[Outcome], of: Callable[[Save], float | None]) -> list[float]:
    return _known(of(run.saves[0]) for run in runs)


def _later(runs: Sequence[Outcome], of: Callable[[Save], float | None]) -> list[float]:
    return _known(of(save) for run in runs for save in run.saves[1:])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _copies(runs: Sequence[Any], saves: slice) -> list[float]:
    """Blocked times in copies of the state, each by the copy just before it."""
    return [save.blocked_s / save.copy_s for run in runs for save in run.saves[saves]]


def _prepare_lost_s(row: AsyncRow) -> list[float]:
    return [sum(run.prepare_s) - len(run.prepare_s) * median(run.saves[0].idle_s) for run in row.runs if run.prepare_s]


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(results: AsyncResults) -> str:
    """Write one part's results as a markdown table."""
    if results.skipped:
        return f"### {results.title}\n\nSkipped: {results.skipped}."
    columns, cells = _TABLES[results.kind]
    lines = [f"### {results.title}", "", f"| peer | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in results.rows:
        found = cells(results, row) if row.runs else ["–"] * len(columns)
        lines.append(f"| {row.title} | {' | '.join(found)} |")
    shares = [run.others for row in results.rows for run in row.runs]
    if shares:
        lines += ["", f"Others used {median(shares):.0%} of the machine meanwhile (at most {max(shares):.0%})."]
    failures = [f"- **{row.title} failed**: {row.failure}" for row in results.rows if row.failure]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _blocked_cells(_: AsyncResults, row: AsyncRow) -> list[str]:
    return [
        _cell([save.copy_s for run in row.runs for save in run.saves], "{:.3f}"),
        _cell(_first(row.runs, lambda save: save.blocked_s), "{:.3f}"),
        _cell(_copies(row.runs, slice(1)), "{:.2f}"),
        _cell(_later(row.runs, lambda save: save.blocked_s), "{:.3f}"),
        _cell(_copies(row.runs, slice(1, None)), "{:.2f}"),
        _cell(_later(row.runs, lambda save: save.total_s), "{:.2f}"),
    ]


def _lost_cells(results: AsyncResults, row: AsyncRow) -> list[str]:
    runs = row.runs
    return [
        _cell([median(save.idle_s) * 1e3 for run in runs for save in run.saves], "{:.1f}"),
        _cell(_prepare_lost_s(row), "{:.2f}"),
        _cell(_first(runs, lambda save: save.blocked_s), "{:.2f}"),
        _cell(_first(runs, lost_s), "{:.2f}"),
        _cell(_later(runs, lambda save: save.blocked_s), "{:.2f}"),
        _cell(_later(runs, lost_s), "{:.2f}"),
        _one(_against_stock(results, row.peer, _later), "{:.2f}"),
        _cell(_later(runs, _noise_s), "{:.2f}"),
        _cell(_later(runs, step_ratio), "{:.2f}"),
        _cell(_later(runs, _p95_ratio), "{:.2f}"),
        _cell(_later(runs, lambda save: save.total_s), "{:.2f}"),
        _cell([run.state_bytes / 1e6 / save.total_s for run in runs for save in run.saves[1:]], "{:.0f}"),
        _cell(_later(runs, lambda save: save.sink_s), "{:.2f}"),
    ]


def _memory_cells(_: AsyncResults, row: AsyncRow) -> list[str]:
    budgets = {run.budget_bytes for run in row.runs}
    return [
        f"{row.runs[0].state_bytes / MIB:.0f}",
        "/".join(f"{budget / MIB:.0f}" if budget else "–" for budget in sorted(budgets)),
        f"{max(max(run.peaks_bytes) for run in row.runs) / MIB:.0f}",
        _cell([save.blocked_s for run in row.runs for save in run.saves], "{:.2f}"),
        _cell([save.total_s for run in row.runs for save in run.saves], "{:.2f}"),
    ]


def _flat_cells(_: AsyncResults, row: AsyncRow) -> list[str]:
    return [
        f"{row.runs[0].state_bytes / MIB:.0f}",
        f"{row.runs[0].peaks_bytes[0] / MIB:.0f}",
        f"{_early_peak(row.runs[0]) / MIB:.0f}",
        f"{row.runs[0].peaks_bytes[-1] / MIB:.0f}",
        str(len(row.runs[0].peaks_bytes)),
        _cell(_later(row.runs, lambda save: save.blocked_s), "{:.3f}"),
        _cell(_later(row.runs, lambda save: save.total_s), "{:.2f}"),
    ]


def _early_peak(run: Any) -> int:
    peak: int = run.peaks_bytes[min(_FLAT_FROM, len(run.peaks_bytes)) - 1]
    return peak


def _against_stock(
    results: AsyncResults, peer: str, which: Callable[[Sequence[Outcome], Callable[[Save], float | None]], list[float]]
) -> float | None:
    ours, theirs = results.row(peer), results.row(STOCK)
    if ours is None or theirs is None:
        return None
    lost = which(ours.runs, lost_s), which(theirs.runs, lost_s)
    return median(lost[0]) / median(lost[1]) if all(lost) and median(lost[1]) > 0 else None


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"**{form.format(values[0])}**"
    return f"**{form.format(median(values))}** ({form.format(min(values))}–{form.format(max(values))})"


def _one(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


_BLOCKED = ("copy s", "first save: blocked s", "× copy", "later: blocked s", "× copy", "later: until done s")
_LOST = (
    "idle step ms",
    "lost by prepare s",
    "first save: blocked s",
    "lost s",
    "later: blocked s",
    "lost s",
    "× DCP",
    "(idle noise s)",
    "step × idle",
    "p95 × idle",
    "until done s",
    "MB/s",
    "(sink CPU s)",
)
_MEMORY = ("state MiB", "budget MiB", "extra MiB", "blocked s", "until done s")
_FLAT = ("state MiB", "after 1", f"after {_FLAT_FROM}", "extra MiB after all", "saves", "blocked s", "until done s")
_TABLES: Mapping[str, tuple[Sequence[str], Callable[[AsyncResults, AsyncRow], list[str]]]] = {
    "blocked": (_BLOCKED, _blocked_cells),
    "gpu": (_BLOCKED, _blocked_cells),
    "lost": (_LOST, _lost_cells),
    "limited": (_LOST, _lost_cells),
    "memory": (_MEMORY, _memory_cells),
    "flat": (_FLAT, _flat_cells),
}


# ---- goals ----------------------------------------------------------------------------------------------------------


def goals_of(all_results: Sequence[AsyncResults]) -> list[Goal]:
    """Hold the results against what the design promises of cloudckpt."""
    return [
        goal
        for results in all_results
        if results.kind in _GOALS
        for row in results.rows
        if row.runs and row.peer.startswith(_OURS)
        for goal in _GOALS[results.kind](results, row)
    ]


def _limit(results: AsyncResults, what: str, wanted: float, found: float | None, unit: str = "") -> Goal:
    return Goal(
        what=what,
        target=results.target,
        wanted=wanted,
        found=found,
        is_upper_bound=True,
        unit=unit,
        digits=0 if unit else 2,
    )


def _blocked_goals(results: AsyncResults, row: AsyncRow) -> list[Goal]:
    if row.peer.endswith("-unprepared"):
        return []
    first, later = _copies(row.runs, slice(1)), _copies(row.runs, slice(1, None))
    return [
        _limit(results, f"{row.peer}: blocked by a later save, in copies", 1.25, median(later) if later else None),
        _limit(results, f"{row.peer}: blocked by the first save, in copies", 2.5, median(first)),
    ]


def _lost_goals(results: AsyncResults, row: AsyncRow) -> list[Goal]:
    return [
        _limit(
            results,
            f"{row.peer}: lost by a later save, of stock DCP's",
            0.15,
            _against_stock(results, row.peer, _later),
        ),
        _limit(
            results,
            f"{row.peer}: lost by the first save, of stock DCP's",
            0.15,
            _against_stock(results, row.peer, _first),
        ),
    ]


def _limited_goals(results: AsyncResults, row: AsyncRow) -> list[Goal]:
    if results.target.endswith("tls"):  # whose sink decrypts on the cores that train
        return []
    ratios = _later(row.runs, step_ratio)
    return [_limit(results, f"{row.peer}: step meanwhile, of an idle one", 1.05, median(ratios) if ratios else None)]


def _memory_goals(results: AsyncResults, row: AsyncRow) -> list[Goal]:
    return [_memory_goal(results, row, run) for run in row.runs[:1]]


def _memory_goal(results: AsyncResults, row: AsyncRow, run: Any) -> Goal:
    allowed = (run.budget_bytes or run.state_bytes) + _SLACK_BYTES
    kind = f"budget of {run.budget_bytes / MIB:.0f} MiB" if run.budget_bytes else "ample budget"
    peak = max(max(each.peaks_bytes) for each in row.runs)
    return _limit(results, f"{row.peer}: extra memory, {kind}", round(allowed / MIB), peak / MIB, " MiB")


def _flat_goals(results: AsyncResults, row: AsyncRow) -> list[Goal]:
    growth = max(run.peaks_bytes[-1] - _early_peak(run) for run in row.runs)
    saves = f"from save {_FLAT_FROM} to {len(row.runs[0].peaks_bytes)}"
    return [_limit(results, f"{row.peer}: memory grows {saves}", _FLAT_BYTES / MIB, growth / MIB, " MiB")]


_GOALS: Mapping[str, Callable[[AsyncResults, AsyncRow], list[Goal]]] = {
    "blocked": _blocked_goals,
    "lost": _lost_goals,
    "limited": _limited_goals,
    "memory": _memory_goals,
    "flat": _flat_goals,
}
