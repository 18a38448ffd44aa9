"""Turn measurements into the tables that people read, and into the answer whether the goals were met.

Pure values: nothing is measured here.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from benchmarks.one_process.measure import Measurement
from benchmarks.shared.units import format_bytes

__all__ = ["MIB", "STOCK", "Goal", "Results", "Row", "goal_lines", "goals_table", "header", "is_met", "table"]

STOCK = "dcp"
MIB = 1 << 20
_PACKAGES = ("cloudckpt", "torch", "fsspec", "s3fs", "aiobotocore", "obstore", "safetensors", "numpy", "xxhash")
_EFFORT = ("× DCP", "CPU s/GB", "extra MiB", "requests")
_COLUMNS = ("peer", "save GB/s", *_EFFORT, "load GB/s", *_EFFORT)
_MEMORY_LIMIT_BYTES = (512 + 64) * MIB


@dataclass(slots=True, kw_only=True)
class Row:
    """What one peer did on one target."""

    peer: str
    title: str
    is_load_only: bool = False
    runs: dict[str, list[Measurement]] = field(default_factory=lambda: {"save": [], "load": []})
    failure: str = ""

    def median_gb_per_s(self, op: str) -> float | None:
        """The median rate, or None without a measurement."""
        return median(run.gb_per_s for run in self.runs[op]) if self.runs[op] else None


@dataclass(slots=True, kw_only=True)
class Results:
    """All rows of one target, by peer."""

    target: str
    rows: dict[str, Row] = field(default_factory=dict)

    def ratio(self, peer: str, other: str, op: str) -> float | None:
        """How many times faster `peer` is than `other` in this very run."""
        if peer not in self.rows or other not in self.rows:
            return None
        ours, theirs = self.rows[peer].median_gb_per_s(op), self.rows[other].median_gb_per_s(op)
        return ours / theirs if ours and theirs else None

    def peak_bytes(self, peer: str, op: str) -> int | None:
        """The largest extra memory of any run."""
        runs = self.rows[peer].runs[op] if peer in self.rows else []
        return max((run.extra_bytes for run in runs), default=None)

    def as_json(self) -> dict[str, object]:
        """Every single measurement, for a file."""
        return {"target": self.target, "rows": [asdict(row) for row in self.rows.values()]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was promised, and what was found; `digits` of it are shown."""

    what: str
    target: str
    wanted: float
    found: float | None
    is_upper_bound: bool = False
    unit: str = ""
    digits: int = 1

    @property
    def is_met(self) -> bool | None:
        """None: not measured in this run."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.is_upper_bound else self.found >= self.wanted


def header(*, command: Sequence[str], size_bytes: int, tensor_count: int, runs: int, directory: Path) -> str:
    """Say on what, with what and how it was measured."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    machine = f"{_processor()}, {os.cpu_count()} cores, {format_bytes(_memory_bytes())} memory, {platform.platform()}"
    state = f"{format_bytes(size_bytes)} in {tensor_count} fp32 tensors (GPT-like)"
    lines = [
        f"machine: {machine}; `local` on {_filesystem_of(directory)}",
        f"versions: Python {platform.python_version()}, {versions}",
        f"state: {state}; one process; a fresh one per number; median of {runs} (min–max); GB = 10^9 bytes",
        f"command: `{shlex.join(command)}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(results: Results) -> str:
    """Write one target's results as a markdown table."""
    lines = [
        f"### {results.target}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in results.rows.values():
        cells = [row.title, *_cells(results, row, "save"), *_cells(results, row, "load")]
        lines.append(f"| {' | '.join(cells)} |")
    shares = [run.others for row in results.rows.values() for runs in row.runs.values() for run in runs]
    if shares:
        lines += ["", f"Others used {median(shares):.0%} of the machine meanwhile (at most {max(shares):.0%})."]
    failures = [f"- **{row.title} failed**: {row.failure}" for row in results.rows.values() if row.failure]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _cells(results: Results, row: Row, op: str) -> list[str]:
    runs = row.runs[op]
    if not runs or (row.is_load_only and op == "save"):
        return ["–"] * 5
    rates = sorted(run.gb_per_s for run in runs)
    ratio = results.ratio(row.peer, STOCK, op)
    peak = results.peak_bytes(row.peer, op) or 0
    return [
        f"**{median(rates):.2f}** ({rates[0]:.2f}–{rates[-1]:.2f})",
        "–" if ratio is None else f"{ratio:.1f}",
        f"{median(run.cpu_s_per_gb for run in runs):.2f}",
        f"{peak / MIB:.0f}",
        _request_cell(runs),
    ]


def _request_cell(runs: Iterable[Measurement]) -> str:
    totals = {sum(run.requests.values()) for run in runs if run.requests is not None}
    return "–" if not totals else "/".join(str(total) for total in sorted(totals))


def goals_table(all_results: Sequence[Results]) -> str:
    """Hold the results against what the design promises."""
    return goal_lines(_goals(all_results))


def goal_lines(goals: Iterable[Goal]) -> str:
    """Write goals as a markdown table."""
    lines = ["### Goals", "", "| goal | target | wanted | measured | met |", "|---|---|---|---|---|"]
    for goal in goals:
        sign = "≤" if goal.is_upper_bound else "≥"
        found = "–" if goal.found is None else f"{goal.found:.{goal.digits}f}{goal.unit}"
        verdict = {None: "not measured", True: "yes", False: "**no**"}[goal.is_met]
        lines.append(f"| {goal.what} | {goal.target} | {sign} {goal.wanted:g}{goal.unit} | {found} | {verdict} |")
    return "\n".join(lines)


def is_met(all_results: Sequence[Results]) -> bool:
    """Tell whether no goal that was measured is missed."""
    return all(goal.is_met is not False for goal in _goals(all_results))


def _goals(all_results: Sequence[Results]) -> list[Goal]:
    by_target = {results.target: results for results in all_results}
    remote = [_remote_goals(by_target[name]) for name in ("s3sink",) if name in by_target]
    local = [_local_goals(by_target["local"])] if "local" in by_target else []
    memory = [_memory_goals(results) for results in all_results]
    return [goal for goals in (*remote, *local, *memory) for goal in goals]


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
            target=results.target,
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
            target=results.target,
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
            target=results.target,
            wanted=_MEMORY_LIMIT_BYTES / MIB,
            found=None if (peak := results.peak_bytes(peer, op)) is None else peak / MIB,
            is_upper_bound=True,
            unit=" MiB",
        )
        for peer in ours
        for op in ("save", "load")
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(from the source tree)"


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _filesystem_of(directory: Path) -> str:
    mounts = [line.split() for line in _lines("/proc/mounts")]
    path = directory.resolve()
    holding = [mount for mount in mounts if path.is_relative_to(mount[1])]
    return max(holding, key=lambda mount: len(mount[1]))[2] if holding else "an unknown file system"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
