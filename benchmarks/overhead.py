"""Turn peers into a table of what a save costs beside the transfer: a tiny state, saved again and again by some ranks.

    python benchmarks/overhead.py                                 4 ranks, 300 tensors of 4 KiB, 10 saves, s3sink
    python benchmarks/overhead.py --target local --ranks 1 --peers cloudckpt,cloudckpt-manager,dcp

Nothing is warmed up, so the first save pays for imports and first connections, as a job's first does. Peers take turns,
each in fresh processes. The exit status is 1 when a peer fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.peers import CONNECTOR, MANAGED, PEERS, STOCK
from benchmarks.run import log, names_of
from benchmarks.shared.report import header
from benchmarks.shared.states import LAYOUTS, bytes_of
from benchmarks.shared.targets import TARGETS, Ground, Target, open_target
from benchmarks.shared.units import format_bytes
from benchmarks.speed.process import MeasurementError, Saves, Spec, count_saves, tiny_shapes

__all__ = ["OverheadRow", "main", "overhead_table"]

_USUAL = ("cloudckpt-obstore", f"cloudckpt-obstore{MANAGED}", "cloudckpt-fsspec", "cloudckpt", STOCK, CONNECTOR)


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
    command = ["python", *sys.argv] if arguments is None else ["python", "benchmarks/overhead.py", *arguments]
    shapes = tiny_shapes()
    state = f"{format_bytes(bytes_of(shapes))} in {len(shapes)} fp32 tensors; {options.ranks} ranks ({options.layout})"
    print(header(command=command, runs=options.runs, directory=options.directory, state=state))
    room_bytes = bytes_of(shapes) * options.saves * options.ranks
    with open_target(options.target, size_bytes=room_bytes, directory=options.directory) as target:
        rows = _measure(target, _peers_for(options), options)
    print(f"\n{overhead_table(rows, options.target)}", flush=True)
    if options.json:
        facts = {"target": options.target, "ranks": options.ranks, "layout": options.layout}
        options.json.write_text(json.dumps({**facts, "overhead": [asdict(row) for row in rows]}, indent=1))
    return 1 if any(row.failure for row in rows) else 0


def _peers_for(options: argparse.Namespace) -> list[str]:
    """Return the peers that can write to the target, in the order of `PEERS`."""
    scheme = TARGETS[options.target].scheme
    fit = [name for name, peer in PEERS.items() if peer.fits(scheme, options.ranks)]
    names = [name for name in fit if name in options.peers]
    if not names:
        raise SystemExit(f"none of {', '.join(options.peers)} can save so; choose from {', '.join(fit)}")
    return names


def _measure(target: Target, names: Iterable[str], options: argparse.Namespace) -> list[OverheadRow]:
    rows = [OverheadRow(peer=name, title=PEERS[name].row_title) for name in names]
    for turn in range(options.runs):
        for row in rows:
            log(f"{options.target}: overhead {turn + 1} of {options.runs}: {row.peer}")
            _take_turn(row, target, options)
    return rows


def _take_turn(row: OverheadRow, target: Target, options: argparse.Namespace) -> None:
    if row.failure or not PEERS[row.peer].is_installed:
        return
    with target.ground() as ground:
        try:
            row.turns.append(count_saves(_spec(row.peer, ground, options)))
        except MeasurementError as error:
            row.failure = str(error)


def _spec(peer: str, ground: Ground, options: argparse.Namespace) -> Spec:
    return Spec(
        peer=peer,
        op="overhead",
        url=ground.url,
        ranks=options.ranks,
        layout=options.layout,
        saves=options.saves,
        storage_options=ground.storage_options,
        stats_url=ground.stats_url,
        environment=ground.environment,
    )


# ---- the table ------------------------------------------------------------------------------------------------------


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


def _failures(rows: Iterable[OverheadRow]) -> list[str]:
    failures = [f"- **{row.title} failed**: {row.failure}" for row in rows if row.failure]
    return ["", *failures] if failures else []


# ---- the command line -----------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a save costs beside the transfer, beside other ways.")
    parser.add_argument("--ranks", type=int, default=4, help="processes")
    parser.add_argument("--target", choices=TARGETS, default="s3sink", help="where to save")
    parser.add_argument("--peers", type=names_of(PEERS), default=list(_USUAL), help=", ".join(PEERS))
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp", help="who of several ranks holds what")
    parser.add_argument("--saves", type=int, default=10, help="in a row")
    parser.add_argument("--runs", type=int, default=5, help="turns of each peer")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    options = parser.parse_args(arguments)
    if options.ranks < 1 or options.runs < 1 or options.saves < 2:
        parser.error("give 1 rank and 1 run or more, and 2 saves or more")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
