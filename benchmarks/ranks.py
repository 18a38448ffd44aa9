"""Turn peers and targets into tables of several ranks: who saves and loads one sharded state how fast, on this machine.

    python benchmarks/ranks.py                       2 ranks, 2 GiB in all, dim-0 DTensors as FSDP2 has them, s3sink
    python benchmarks/ranks.py --layout ddp          the whole state in every rank: what does a restore read?
    python benchmarks/ranks.py --target local --ranks 4 --manager
    python benchmarks/ranks.py --overhead            4 ranks, a tiny state: milliseconds of a save beside the transfer
    python benchmarks/ranks.py --quick               smoke test: 64 MiB, 1 run

Peers take turns, at the same number of ranks, and ratios come from the same run; a peer is told apart from the one
before it by fresh processes; one whose package is not installed has a row that says so. The exit status is 1 when a
peer fails or does not restore what it saved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.many_ranks.peers import CONNECTOR, MANAGED, RANK_PEERS
from benchmarks.many_ranks.process import (
    LAYOUTS,
    RankMeasurement,
    RankSpec,
    Saves,
    bytes_of,
    count_saves,
    measure_ranks,
    tiny_shapes,
)
from benchmarks.one_process.measure import MeasurementError
from benchmarks.run import _names_of
from benchmarks.shared.report import MIB, STOCK, Results, Row, header
from benchmarks.shared.states import shapes_of
from benchmarks.shared.targets import Ground, Target, open_target
from benchmarks.shared.units import format_bytes, parse_bytes

__all__ = ["OverheadRow", "main", "overhead_table", "table"]

_QUICK_BYTES = 64 * MIB
_OVERHEAD_SAVES = 10
_EFFORT = ("× DCP", "× s3tc", "CPU s/GB", "extra MiB/rank", "requests", "bytes ×")
_COLUMNS = ("peer", "save GB/s", *_EFFORT, "load GB/s", *_EFFORT)
_DEFAULTS = {
    True: ("cloudckpt", "dcp"),
    False: ("cloudckpt-obstore", "cloudckpt-fsspec", STOCK, CONNECTOR),
}

_Outcome = tuple[str, Mapping[str, object], bool]  # the table, the facts for a file, and whether no peer failed


@dataclass(slots=True, kw_only=True)
class OverheadRow:
    """What one peer's saves of a tiny state took; `turns` are independent, each of fresh processes."""

    peer: str
    title: str
    turns: list[Saves] = field(default_factory=list)
    failure: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = _parse(arguments)
    print(
        _header(options, ["python", *sys.argv] if arguments is None else ["python", "benchmarks/ranks.py", *arguments])
    )
    size_bytes = bytes_of(tiny_shapes()) * options.saves * 4 if options.overhead else options.bytes
    with open_target(options.target, size_bytes=size_bytes, directory=options.directory) as target:
        names = _peers_for(target, options)
        text, facts, is_good = (_overhead_mode if options.overhead else _speed_mode)(target, names, options)
    print(f"\n{text}", flush=True)
    if options.json:
        facts = {"ranks": options.ranks, "layout": options.layout, **facts}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0 if is_good else 1


def _speed_mode(target: Target, names: Sequence[str], options: argparse.Namespace) -> _Outcome:
    results = _measure(target, names, options)
    return table(results), results.as_json(), not any(row.failure for row in results.rows.values())


def _overhead_mode(target: Target, names: Sequence[str], options: argparse.Namespace) -> _Outcome:
    rows = _overhead(target, names, options)
    facts = {"target": options.target, "overhead": [asdict(row) for row in rows]}
    return overhead_table(rows, options.target), facts, not any(row.failure for row in rows)


def _peers_for(target: Target, options: argparse.Namespace) -> list[str]:
    """Return the peers that can write to the target, in the order of `RANK_PEERS`."""
    chosen = set(options.peers or _DEFAULTS[target.is_local])
    if options.manager:
        chosen |= {f"{name}{MANAGED}" for name in chosen if f"{name}{MANAGED}" in RANK_PEERS}
    # What cannot write to this target is left out, so that one list of peers serves all targets.
    fit = [name for name, kind in RANK_PEERS.items() if (kind.is_for_local if target.is_local else kind.is_for_s3)]
    names = [name for name in fit if name in chosen]
    if not names:
        raise SystemExit(
            f"none of {', '.join(sorted(chosen))} writes to {options.target}; choose from {', '.join(fit)}"
        )
    return names


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(target: Target, names: Iterable[str], options: argparse.Namespace) -> Results:
    results = Results(target=options.target)
    for name in names:
        results.rows[name] = Row(peer=name, title=RANK_PEERS[name].row_title)
    for turn in range(options.runs):
        for row in results.rows.values():
            _log(f"{options.target}: run {turn + 1} of {options.runs}: {row.peer}")
            _take_turn(row, target, options)
    return results


def _take_turn(row: Row, target: Target, options: argparse.Namespace) -> None:
    """Save and load once with one peer, on a ground of its own."""
    if row.failure or not RANK_PEERS[row.peer].is_installed:
        return
    with target.ground() as ground:
        for op in ("save", "load"):
            try:
                row.runs[op].append(measure_ranks(_spec(row.peer, op, ground, options)))
            except MeasurementError as error:
                row.failure = str(error)
                return


def _overhead(target: Target, names: Iterable[str], options: argparse.Namespace) -> list[OverheadRow]:
    rows = [OverheadRow(peer=name, title=RANK_PEERS[name].row_title) for name in names]
    for turn in range(options.runs):
        for row in rows:
            _log(f"{options.target}: overhead {turn + 1} of {options.runs}: {row.peer}")
            _take_overhead_turn(row, target, options)
    return rows


def _take_overhead_turn(row: OverheadRow, target: Target, options: argparse.Namespace) -> None:
    if row.failure or not RANK_PEERS[row.peer].is_installed:
        return
    with target.ground() as ground:
        try:
            row.turns.append(count_saves(_spec(row.peer, "overhead", ground, options)))
        except MeasurementError as error:
            row.failure = str(error)


def _spec(peer: str, op: str, ground: Ground, options: argparse.Namespace) -> RankSpec:
    return RankSpec(
        peer=peer,
        op=op,
        layout=options.layout,
        url=ground.url,
        ranks=options.ranks,
        size_bytes=options.bytes,
        saves=options.saves,
        storage_options=ground.storage_options,
        stats_url=ground.stats_url,
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


def _header(options: argparse.Namespace, command: Sequence[str]) -> str:
    shapes = tiny_shapes() if options.overhead else shapes_of(options.bytes)
    text = header(
        command=command,
        size_bytes=bytes_of(shapes),
        tensor_count=len(shapes),
        runs=options.runs,
        directory=options.directory,
    )
    # That line is of one process.
    lines = [line for line in text.splitlines() if not line.startswith("- state:")]
    layout = {"fsdp": "dim-0 DTensors, a part in each rank", "ddp": "the whole state in every rank"}[options.layout]
    lines.append(
        f"- ranks: {options.ranks} processes of one gloo group, 1 OpenMP thread each, fresh ones per number; "
        f"{CONNECTOR} {_version(CONNECTOR)}"
    )
    lines.append(
        f"- state: {format_bytes(bytes_of(shapes))} in {len(shapes)} fp32 tensors, {layout}; median of "
        f"{options.runs} (min–max); GB = 10^9 bytes of the checkpoint; time from barrier to barrier"
    )
    return "\n".join(lines)


def table(results: Results) -> str:
    """Write one target's results as a markdown table."""
    lines = [f"### {results.target}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [
        f"| {' | '.join([row.title, *_cells(results, row, 'save'), *_cells(results, row, 'load')])} |"
        for row in results.rows.values()
    ]
    lines += [
        "",
        f"× s3tc: against the fastest {CONNECTOR} row. bytes ×: what the store received or sent, in checkpoints.",
    ]
    shares = [run.others for row in results.rows.values() for runs in row.runs.values() for run in runs]
    if shares:
        lines.append(f"Others used {median(shares):.0%} of the machine meanwhile (at most {max(shares):.0%}).")
    return "\n".join([*lines, *_failures(results.rows.values())])


def _cells(results: Results, row: Row, op: str) -> list[str]:
    runs = [run for run in row.runs[op] if isinstance(run, RankMeasurement)]
    if not runs:
        return ["–"] * (1 + len(_EFFORT))
    rates = [run.gb_per_s for run in runs]
    moved = {run.moved_bytes / run.state_bytes for run in runs if run.moved_bytes is not None}
    requests = sorted({sum(run.requests.values()) for run in runs if run.requests is not None})
    return [
        f"**{median(rates):.2f}** ({min(rates):.2f}–{max(rates):.2f})",
        _ratio(results.ratio(row.peer, STOCK, op)),
        _ratio(_against_connector(results, row.peer, op)),
        f"{median(run.cpu_s_per_gb for run in runs):.2f}",
        f"{max(run.extra_bytes for run in runs) / MIB:.0f}",
        "/".join(map(str, requests)) or "–",
        f"{max(moved):.2f}" if moved else "–",
    ]


def _against_connector(results: Results, peer: str, op: str) -> float | None:
    """How many times faster than the best setting of s3torchconnector that was measured beside."""
    ratios = [results.ratio(peer, other, op) for other in results.rows if other.startswith(CONNECTOR)]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}"


def overhead_table(rows: Sequence[OverheadRow], target: str) -> str:
    """Write what saves of a tiny state cost, the first of a process and the later ones, with the peer's own phases."""
    phases = list(dict.fromkeys(name for row in rows for turn in row.turns for told in turn.phases for name in told))
    columns = ["peer", "first ms", "later ms", "requests per later save", *(_phase_title(name) for name in phases)]
    lines = [f"### Overhead on {target}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join([row.title, *_overhead_cells(row, phases)])} |" for row in rows]
    lines += [
        "",
        "Phases are rank 0's own: first save / median of the later ones. The first save of a process pays for",
    ]
    lines += ["imports and first connections; the outside times are of all ranks, barrier to barrier."]
    return "\n".join([*lines, *_failures(rows)])


def _overhead_cells(row: OverheadRow, phases: Sequence[str]) -> list[str]:
    if not row.turns:
        return ["–"] * (3 + len(phases))
    first = [turn.wall_s[0] for turn in row.turns]
    later = [wall_s for turn in row.turns for wall_s in turn.wall_s[1:]]
    requests = sorted({turn.requests for turn in row.turns if turn.requests is not None})
    return [
        _ms_with_range(first),
        _ms_with_range(later),
        "/".join(f"{count:.1f}" for count in requests) or "–",
        *(_phase_cell(row, name) for name in phases),
    ]


def _phase_cell(row: OverheadRow, name: str) -> str:
    told = [[phases.get(name) for phases in turn.phases] for turn in row.turns]
    first = [values[0] for values in told if values[0] is not None]
    later = [value for values in told for value in values[1:] if value is not None]
    return f"{_ms(first)} / {_ms(later)}" if first or later else "–"


def _ms_with_range(seconds: Sequence[float]) -> str:
    return f"**{_ms(seconds)}** ({min(seconds) * 1e3:.0f}–{max(seconds) * 1e3:.0f})" if seconds else "–"


def _ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.1f}" if seconds else "–"


def _phase_title(name: str) -> str:
    return f"{name.removesuffix('_s')} ms"


def _failures(rows: Iterable[Row | OverheadRow]) -> list[str]:
    failures = [f"- **{row.title} failed**: {row.failure}" for row in rows if row.failure]
    return ["", *failures] if failures else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


# ---- the command line -----------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure saves and loads of several ranks beside other ways.")
    parser.add_argument("--ranks", type=int, help="processes (default: 2; 4 with --overhead)")
    parser.add_argument("--bytes", type=parse_bytes, default=parse_bytes("2GiB"), help="of the whole state, about")
    parser.add_argument("--target", choices=("s3sink", "s3slow", "local"), default="s3sink")
    parser.add_argument("--peers", type=_names_of(RANK_PEERS), default=[], help=", ".join(RANK_PEERS))
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp", help="who holds what")
    parser.add_argument("--manager", action="store_true", help="measure cloudckpt's manager, too")
    parser.add_argument("--overhead", action="store_true", help="the fixed cost of a save, with a tiny state")
    parser.add_argument("--saves", type=int, default=_OVERHEAD_SAVES, help="saves in a row, with --overhead")
    parser.add_argument("--runs", type=int, default=3, help="numbers per peer and operation")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    parser.add_argument("--quick", action="store_true", help="64 MiB and one run: a smoke test, no measurement")
    options = parser.parse_args(arguments)
    if options.ranks is None:
        options.ranks = 4 if options.overhead else 2
    if options.quick:
        options.bytes, options.runs = min(options.bytes, _QUICK_BYTES), 1
    if options.ranks < 1 or options.runs < 1 or options.saves < 2:
        parser.error("give 1 rank and 1 run or more, and 2 saves or more")
    return options


def _log(line: str) -> None:
    print(f"… {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
