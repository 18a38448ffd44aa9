"""Turn peers and targets into tables: who saves and loads how fast, with what effort, on this machine.

    python benchmarks/run.py                                      all peers on s3sink and local, 2 GiB, 3 runs
    python benchmarks/run.py --quick                              smoke test: 256 MiB, 1 run
    python benchmarks/run.py --targets s3slow --peers dcp,cloudckpt-obstore
    python benchmarks/run.py --requests                           requests per save and restore, by operation

Peers of one target take turns, so that the machine's drift hits all alike, and ratios come from the same run. A peer
whose package is not installed has a row that says so. The exit status is 1 when a peer fails or does not restore what
it saved, 3 when a goal is missed and `--check-goals` is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.one_process import request_count
from benchmarks.one_process.measure import MeasurementError, Spec, measure
from benchmarks.one_process.peers import PEERS, Peer
from benchmarks.shared.report import Results, Row, goals_table, header, is_met, table
from benchmarks.shared.states import shapes_of, size_of
from benchmarks.shared.targets import TARGETS, Target, open_target
from benchmarks.shared.units import parse_bytes

__all__ = ["main"]

_QUICK_BYTES = 256 << 20
_GOALS_FROM_BYTES = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = _parse(arguments)
    if options.requests:
        return request_count.main(options.json)
    print(
        header(
            command=["python", *sys.argv] if arguments is None else ["python", "benchmarks/run.py", *arguments],
            size_bytes=size_of(options.size),
            tensor_count=len(shapes_of(options.size)),
            runs=options.runs,
            directory=options.directory,
        )
    )
    all_results = []
    for target in options.targets:
        results = _run_target(target, options)
        all_results.append(results)
        print(f"\n{table(results)}", flush=True)
    if options.check_goals or options.size >= _GOALS_FROM_BYTES:
        print(f"\n{goals_table(all_results)}")
    else:
        print("\nGoals are for states of 1 GiB and more: below, the fixed cost of a call rules.")
    if options.json:
        options.json.write_text(json.dumps([results.as_json() for results in all_results], indent=1))
    return _status(all_results, must_meet_goals=options.check_goals)


def _run_target(name: str, options: argparse.Namespace) -> Results:
    with open_target(name, size_bytes=options.size, directory=options.directory) as target:
        chosen = _peers_for(target, options.peers)
        results = Results(target=name)
        for peer, description in chosen.items():
            results.rows[peer] = Row(peer=peer, title=description.row_title, is_load_only=description.is_load_only)
        for turn in range(options.runs):
            for row in results.rows.values():
                _log(f"{name}: run {turn + 1} of {options.runs}: {row.peer}")
                _take_turn(row, target, options)
    return results


def _peers_for(target: Target, wanted: Sequence[str]) -> Mapping[str, Peer]:
    return {
        name: peer
        for name, peer in PEERS.items()
        if (peer.is_for_local if target.is_local else peer.is_for_s3) and (not wanted or name in wanted)
    }


def _take_turn(row: Row, target: Target, options: argparse.Namespace) -> None:
    """Save and load once with one peer, on a ground of its own."""
    if row.failure or not PEERS[row.peer].is_installed:
        return
    with target.ground() as ground:
        for op in ("save", "load"):
            spec = Spec(
                peer=row.peer,
                op=op,
                url=ground.url,
                size_bytes=options.size,
                storage_options=ground.storage_options,
                stats_url=ground.stats_url,
                is_cold=options.cold,
            )
            try:
                row.runs[op].append(measure(spec))
            except MeasurementError as error:
                row.failure = str(error)
                return


def _status(all_results: Sequence[Results], *, must_meet_goals: bool) -> int:
    if any(row.failure for results in all_results for row in results.rows.values()):
        return 1
    return 3 if must_meet_goals and not is_met(all_results) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure cloudckpt beside its peers.")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("2GiB"), help="bytes of the state, about")
    parser.add_argument("--targets", type=_names_of(TARGETS), default=["s3sink", "local"], help=", ".join(TARGETS))
    parser.add_argument("--peers", type=_names_of(PEERS), default=[], help=", ".join(PEERS))
    parser.add_argument("--runs", type=int, default=3, help="numbers per peer and operation")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    parser.add_argument("--cold", action="store_true", help="drop local checkpoints from the page cache before a load")
    parser.add_argument("--quick", action="store_true", help="256 MiB and one run: a smoke test, no measurement")
    parser.add_argument("--requests", action="store_true", help="count requests instead of measuring speed")
    parser.add_argument("--check-goals", action="store_true", help="exit with status 3 when a goal is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.runs = min(options.size, _QUICK_BYTES), 1
    return options


def _names_of(known: Mapping[str, object] | Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return names

    return parse


def _log(line: str) -> None:
    print(f"… {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
