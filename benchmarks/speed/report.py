"""Turn measurements into the tables that people read, and into the answer whether the goals were met.

Pure values: nothing is measured here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmarks.peers import PEERS, STOCK
from benchmarks.shared.report import MIB, Goal, goal_lines
from benchmarks.speed.cost import cost_of
from benchmarks.speed.plan import CURVES, Case
from benchmarks.speed.process import Measurement
from cloudckpt.report import Prices

__all__ = ["Results", "Row", "curve_table", "goals_of", "goals_table", "is_met", "table"]

_OPS = ("save", "load")
_MEMORY_LIMIT_BYTES = (512 + 64) * MIB


@dataclass(slots=True, kw_only=True)
class Row:
    """What one peer did in one case."""

    peer: str
    title: str
    is_load_only: bool = False
    runs: dict[str, list[Measurement]] = field(default_factory=lambda: {"save": [], "load": []})
    failure: str = ""

    def shown(self, op: str) -> list[Measurement]:
        """The runs that are a result of this peer's own."""
        return [] if self.is_load_only and op == "save" else self.runs[op]

    def rates(self, op: str) -> list[float]:
        """GB/s, sorted."""
        return sorted(run.gb_per_s for run in self.shown(op))

    def median_gb_per_s(self, op: str) -> float | None:
        """The median rate, or None without a measurement."""
        return median(rates) if (rates := self.rates(op)) else None


@dataclass(slots=True, kw_only=True)
class Results:
    """All rows of one case, by peer."""

    case: Case
    rows: dict[str, Row] = field(default_factory=dict)

    def ratio(self, peer: str, other: str, op: str) -> float | None:
        """How many times faster `peer` is than `other` in this very run."""
        if peer not in self.rows or other not in self.rows:
            return None
        ours, theirs = self.rows[peer].median_gb_per_s(op), self.rows[other].median_gb_per_s(op)
        return ours / theirs if ours and theirs else None

    def of_limit(self, peer: str, op: str) -> float | None:
        """Which part it reaches of the fastest bare client that was measured beside."""
        shares = [self.ratio(peer, name, op) for name in self.rows if name in PEERS and PEERS[name].is_limit]
        return min((share for share in shares if share is not None), default=None)

    def peak_bytes(self, peer: str, op: str) -> int | None:
        """The largest extra memory of any run."""
        runs = self.rows[peer].runs[op] if peer in self.rows else []
        return max((run.extra_bytes for run in runs), default=None)

    def as_json(self) -> dict[str, object]:
        """Every single measurement, for a file."""
        command = shlex.join(["python", "benchmarks/run.py", *self.case.words])
        return {"case": asdict(self.case), "command": command, "rows": [asdict(row) for row in self.rows.values()]}


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(results: Results, prices: Prices | None = None) -> str:
    """Write one case's results as markdown: a table of saves, one of loads, and what is to be known about them."""
    lines = [f"### {results.case.title}"]
    money = [f"{prices.currency} per 1,000"] if prices else []
    for op in _OPS:
        columns = [op, "GB/s", "× DCP", "of limit", "CPU s/GB", "extra MiB", "requests", "bytes ×", *money]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {' | '.join([row.title, *(_cells(results, row, op, prices) or ['–'] * (len(columns) - 1))])} |"
            for row in results.rows.values()
            if op == "load" or not row.is_load_only
        ]
    shares = [run.others for row in results.rows.values() for runs in row.runs.values() for run in runs]
    if shares:
        lines += ["", f"Others used {median(shares):.0%} of the machine meanwhile (at most {max(shares):.0%})."]
    failures = [f"- **{row.title} failed**: {row.failure}" for row in results.rows.values() if row.failure]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _cells(results: Results, row: Row, op: str, prices: Prices | None) -> list[str]:
    """Return the cells behind the title, none without a run."""
    runs = row.shown(op)
    if not runs:
        return []
    return [
        _rate_cell(row.rates(op)),
        _number(results.ratio(row.peer, STOCK, op), "{:.1f}"),
        _number(results.of_limit(row.peer, op), "{:.0%}"),
        f"{median(run.cpu_s_per_gb for run in runs):.2f}",
        f"{(results.peak_bytes(row.peer, op) or 0) / MIB:.0f}",
        "/".join(map(str, sorted({sum(run.requests.values()) for run in runs if run.requests is not None}))) or "–",
        _number(max((run.moved_bytes / run.state_bytes for run in runs if run.moved_bytes is not None), default=None)),
        *([_cost_cell(runs, prices)] if prices else []),
    ]


def _cost_cell(runs: Iterable[Measurement], prices: Prices) -> str:
    costs = [cost for run in runs if (cost := cost_of(run, prices)) is not None]
    return f"{median(costs) * 1000:.3g}" if costs else "–"


def _rate_cell(rates: Sequence[float]) -> str:
    return f"**{median(rates):.2f}** ({rates[0]:.2f}–{rates[-1]:.2f})" if rates else "–"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def curve_table(section: str, target: str, points: Sequence[Results]) -> str:
    """Write GB/s along a curve as markdown, a row for each peer."""
    points = sorted(points, key=lambda results: results.case.x)
    columns = [f"{CURVES[section]}", *(f"{results.case.x:g}" for results in points)]
    lines = [f"### {section} on {target}, GB/s", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    titles = {row.peer: row.title for results in points for row in results.rows.values()}
    for peer, title in titles.items():
        for op in _OPS:
            cells = [_rate_cell(results.rows[peer].rates(op)) if peer in results.rows else "–" for results in points]
            lines.append(f"| {title}, {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- goals ----------------------------------------------------------------------------------------------------------


def goals_table(all_results: Sequence[Results]) -> str:
    """Hold the results against what the design promises."""
    return goal_lines(goals_of(all_results))


def is_met(all_results: Sequence[Results]) -> bool:
    """Tell whether no goal that was measured is missed."""
    return all(goal.is_met is not False for goal in goals_of(all_results))


def goals_of(all_results: Sequence[Results]) -> list[Goal]:
    """Return the goals that these results have something to say about."""
    alone = [results for results in all_results if results.case.ranks == 1]
    remote = [goal for results in alone if results.case.target == "s3sink" for goal in _remote_goals(results)]
    local = [goal for results in alone if results.case.target == "local" for goal in _local_goals(results)]
    return [*remote, *local, *(goal for results in alone for goal in _memory_goals(results))]


def _remote_goals(results: Results) -> list[Goal]:
    wanted = {
        ("cloudckpt-obstore", "save"): 8,
        ("cloudckpt-obstore", "load"): 6,
        ("cloudckpt-fsspec", "save"): 4,
        ("cloudckpt-fsspec", "load"): 4,
    }
    return [
        Goal(
            what=f"{peer}: {op}, times stock DCP",
            target=results.case.title,
            wanted=times,
            found=results.ratio(peer, STOCK, op),
        )
        for (peer, op), times in wanted.items()
    ]


def _local_goals(results: Results) -> list[Goal]:
    pairs = [("torch-fsync", "save"), ("torch", "save"), ("torch", "load"), ("torch-new", "load")]
    return [
        Goal(
            what=f"cloudckpt: {op}, times {other}",
            target=results.case.title,
            wanted=1,
            found=results.ratio("cloudckpt", other, op),
        )
        for other, op in pairs
    ]


def _memory_goals(results: Results) -> list[Goal]:
    ours = [peer for peer in results.rows if peer.startswith("cloudckpt")]
    return [
        Goal(
            what=f"{peer}: extra memory of a {op}",
            target=results.case.title,
            wanted=_MEMORY_LIMIT_BYTES / MIB,
            found=None if (peak := results.peak_bytes(peer, op)) is None else peak / MIB,
            is_upper_bound=True,
            unit=" MiB",
        )
        for peer in ours
        for op in _OPS
    ]
