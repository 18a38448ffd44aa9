"""Turn peers and targets into tables and plots: who saves and loads how fast, with what effort, on this machine.

    python benchmarks/run.py --out results                        the whole suite: hours
    python benchmarks/run.py --quick                              every kind of case, small, one run: minutes
    python benchmarks/run.py --sections peers,latency             some of its sections
    python benchmarks/run.py --targets s3slow --peers dcp,cloudckpt-obstore --size 512MiB
    python benchmarks/run.py --targets s3sink --ranks 2 --layout ddp
    python benchmarks/run.py --requests                           requests per save and restore, by operation

Any of --targets, --states, --size, --ranks, --layout and --latency-ms measures what they say in place of the suite.
Peers of one case take turns, so that the machine's drift hits all alike, and ratios come from the same run. A peer
whose package is not installed has a row that says so. Results are written after each case: one that is cut short has
what was measured. The exit status is 1 when a peer fails or does not restore what it saved, 3 when a goal is missed and
`--check-goals` is given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec

from benchmarks.one_process import request_count
from benchmarks.peers import PEERS
from benchmarks.shared.report import about_machine, header, versions
from benchmarks.shared.states import LAYOUTS, STATES, bytes_of
from benchmarks.shared.targets import TARGETS, Target, open_target
from benchmarks.shared.units import parse_bytes
from benchmarks.speed import plan
from benchmarks.speed.plan import CURVES, SECTIONS, Case
from benchmarks.speed.plots import draw_bars, draw_curve
from benchmarks.speed.process import MeasurementError, Spec, measure
from benchmarks.speed.report import Results, Row, curve_table, goals_table, is_met, table
from cloudckpt.report import Prices, prices_from

__all__ = ["log", "main", "names_of"]

_GOALS_FROM_BYTES = 1 << 30
_RUNS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write, and return the exit status."""
    options = _parse(arguments)
    if options.requests:
        return request_count.main(options.out / "requests.json" if options.out else None)
    command = ["python", *sys.argv] if arguments is None else ["python", "benchmarks/run.py", *arguments]
    told = header(command=command, runs=options.runs, directory=options.directory)
    print(told)
    all_results: list[Results] = []
    for case in _cases(options):
        results = _run_case(case, options)
        all_results.append(results)
        print(f"\n{table(results, _prices(case, options))}", flush=True)
        if options.out:
            _write(all_results, told, command, options)
    for section, target, points in _curves(all_results):
        print(f"\n{curve_table(section, target, points)}")
    goals = _with_goals(all_results, options)
    print(f"\n{goals_table(goals)}" if goals else "\nGoals are for states of 1 GiB and more on one rank, not measured.")
    if any(row.failure for results in all_results for row in results.rows.values()):
        return 1
    return 3 if options.check_goals and not is_met(goals) else 0


def _cases(options: argparse.Namespace) -> list[Case]:
    """Return what is to be measured: what was asked for by name, or the suite."""
    asked = (options.targets, options.states, options.ranks, options.layout, options.latency_ms)
    if any(one is not None for one in asked) or (options.size is not None and not options.quick):
        cases = [
            Case(
                section="asked",
                target=target,
                state=state,
                size_bytes=options.size or (plan.QUICK_BYTES if options.quick else STATES[state].usual_bytes),
                ranks=int(ranks),
                layout=options.layout or "fsdp",
                latency_ms=options.latency_ms,
            )
            for target, state, ranks in product(
                options.targets or ["s3sink", "local"], options.states or ["adamw"], options.ranks or ["1"]
            )
        ]
    else:
        cases = list(plan.quick(options.size) if options.quick and options.size else _suite(options))
    wanted = options.sections or {case.section for case in cases}
    cases = [replace(case, peers=options.peers or case.peers) for case in cases if case.section in wanted]
    empty = [case for case in cases if not case.chosen()]
    # What cannot write to one target is left out there, so that one list of peers serves all targets.
    if len(empty) == len(cases):
        raise SystemExit(
            f"none of {', '.join(options.peers)} can save so; choose from "
            f"{', '.join(replace(cases[0], peers=()).chosen()) if cases else 'other sections'}"
        )
    return [case for case in cases if case not in empty]


def _suite(options: argparse.Namespace) -> Sequence[Case]:
    return list(plan.quick() if options.quick else plan.whole())


# ---- measuring ------------------------------------------------------------------------------------------------------


def _run_case(case: Case, options: argparse.Namespace) -> Results:
    size_bytes = bytes_of(STATES[case.state].shapes(case.size_bytes))
    results = Results(case=case)
    for name in case.chosen():
        peer = PEERS[name]
        results.rows[name] = Row(peer=name, title=peer.row_title, is_load_only=peer.is_load_only)
    with open_target(
        case.target, size_bytes=size_bytes, directory=options.directory, latency_ms=case.latency_ms
    ) as target:
        for turn in range(options.runs):
            for row in results.rows.values():
                log(f"{case.section}, {case.title}: run {turn + 1} of {options.runs}: {row.peer}")
                _take_turn(row, case, target, is_cold=options.cold)
    return results


def _take_turn(row: Row, case: Case, target: Target, *, is_cold: bool) -> None:
    """Save and load once with one peer, on a ground of its own."""
    if row.failure or not PEERS[row.peer].is_installed:
        return
    with target.ground() as ground:
        for op in ("save", "load"):
            spec = Spec(
                peer=row.peer,
                op=op,
                url=ground.url,
                state=case.state,
                size_bytes=case.size_bytes,
                ranks=case.ranks,
                layout=case.layout,
                storage_options=ground.storage_options,
                stats_url=ground.stats_url,
                environment=ground.environment,
                is_cold=is_cold,
            )
            try:
                row.runs[op].append(measure(spec))
            except MeasurementError as error:
                row.failure = str(error)
                return


# ---- what is written ------------------------------------------------------------------------------------------------


def _write(all_results: Sequence[Results], told: str, command: Sequence[str], options: argparse.Namespace) -> None:
    """Write all that was measured so far as JSON and Markdown, and plots of the newest case and its curve."""
    options.out.mkdir(parents=True, exist_ok=True)
    prices = {scheme: _prices_of(scheme, options) for scheme in ("s3", "gs")}
    document = {
        "command": shlex.join(command),
        "machine": about_machine(),
        "versions": versions(),
        "runs": options.runs,
        "prices": {scheme: msgspec.to_builtins(one) for scheme, one in prices.items()},
        "cases": [results.as_json() for results in all_results],
    }
    (options.out / "results.json").write_text(json.dumps(document, indent=1))
    parts = ["# Measurements", told]
    parts += [f"- prices of {scheme}: {one.source or 'given'}" for scheme, one in prices.items()]
    for results in all_results:
        name = f"{results.case.name}.svg"
        if results is all_results[-1]:
            draw_bars(results, options.out / name)
        command_line = shlex.join(["python", "benchmarks/run.py", *results.case.words])
        parts += [table(results, _prices(results.case, options)), f"![]({name})", f"`{command_line}`"]
    for section, target, points in _curves(all_results):
        name = f"curve-{section}-{target}.svg"
        if all_results[-1] in points:
            draw_curve(section, points, options.out / name)
        parts += [curve_table(section, target, points), f"![]({name})"]
    goals = _with_goals(all_results, options)
    parts += [goals_table(goals)] if goals else []
    (options.out / "results.md").write_text("\n\n".join(parts) + "\n")


def _curves(all_results: Sequence[Results]) -> list[tuple[str, str, list[Results]]]:
    """Return section, target and points of each curve that has two points or more."""

    def of(results: Results) -> tuple[str, str]:
        return results.case.section, results.case.target

    along = sorted((results for results in all_results if results.case.section in CURVES), key=of)
    found = [(*key, list(points)) for key, points in groupby(along, key=of)]
    return [(section, target, points) for section, target, points in found if len(points) > 1]


def _with_goals(all_results: Sequence[Results], options: argparse.Namespace) -> list[Results]:
    """Return the results that goals are for: below 1 GiB, the fixed cost of a call rules."""
    least = 0 if options.check_goals else _GOALS_FROM_BYTES
    alone = [results for results in all_results if results.case.ranks == 1 and results.case.size_bytes >= least]
    return [results for results in alone if results.case.section in ("peers", "asked")]


def _prices(case: Case, options: argparse.Namespace) -> Prices | None:
    scheme = TARGETS[case.target].scheme
    return _prices_of(scheme, options) if scheme else None


def _prices_of(scheme: str, options: argparse.Namespace) -> Prices:
    return prices_from(options.prices) if options.prices else Prices.usual(scheme)


# ---- the command line -----------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure cloudckpt beside its peers.")
    parser.add_argument("--quick", action="store_true", help="small states and one run: a smoke test")
    parser.add_argument("--sections", type=names_of(SECTIONS), help=f"of the suite: {', '.join(SECTIONS)}")
    parser.add_argument("--targets", type=names_of(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--states", type=names_of(STATES), help=", ".join(STATES))
    parser.add_argument("--size", type=parse_bytes, help="bytes of the state, about")
    parser.add_argument("--ranks", type=names_of([str(n) for n in range(1, 65)]), help="processes, such as 1,2,4")
    parser.add_argument("--layout", choices=LAYOUTS, help="who of several ranks holds what (default: fsdp)")
    parser.add_argument("--latency-ms", type=float, help="of each request to a sink, in place of the target's own")
    parser.add_argument("--peers", type=names_of(PEERS), default=[], help=", ".join(PEERS))
    parser.add_argument("--runs", type=int, default=_RUNS, help="numbers per peer and operation")
    parser.add_argument("--out", type=Path, help="a directory for results.json, results.md and plots")
    parser.add_argument(
        "--prices", type=Path, help='{"storage_gib_month": 0.023, "writes_1000": 0.005, …}, a JSON file'
    )
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    parser.add_argument("--cold", action="store_true", help="drop local checkpoints from the page cache before a load")
    parser.add_argument("--requests", action="store_true", help="count requests instead of measuring speed")
    parser.add_argument("--check-goals", action="store_true", help="exit with status 3 when a goal is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs = 1
    if options.runs < 1:
        parser.error("give 1 run or more")
    return options


def names_of(known: Mapping[str, object] | Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads names with commas between them, and refuses those that are not known."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return names

    return parse


def log(line: str) -> None:
    """Tell who waits how far it is."""
    print(f"… {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
