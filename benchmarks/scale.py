"""Turn numbers of ranks into what a save and a restore cost where all ranks meet: rank 0, the index, the listing.

    python benchmarks/scale.py                      70B and 405B on 256, 1,024 and 4,096 ranks: some minutes
    python benchmarks/scale.py --quick              smoke test: 70B on 8 and 16 ranks
    python benchmarks/scale.py --models 405B --ranks 4096 --json out.json
    python benchmarks/scale.py --requests           requests of each of 2 and 4 real ranks per save and restore

How ranks are played stands in `scale_steps.py`. Every number is of one run; seconds are
processor time, in the tables of stores wall time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.many_ranks.layouts import MODELS
from benchmarks.many_ranks.requests import requests_of_ranks
from benchmarks.many_ranks.scale_steps import (
    Found,
    Size,
    in_a_process,
    measure_index,
    measure_latest,
    measure_plan,
    measure_stores,
)
from benchmarks.shared.targets import open_target
from benchmarks.shared.units import format_bytes

__all__ = ["Row", "growth_table", "main"]

_SINK_BYTES = 1 << 30


@dataclass(slots=True, kw_only=True)
class Row:
    """What was measured at one size: quantity → seconds, bytes or a count, as its name says."""

    size: Size
    found: Found = field(default_factory=dict)


# -- tables ------------------------------------------------------------------------------------------------------

_PLAN = {
    "boxes": "boxes",
    "table_s": "one rank: table",
    "tables_bytes": "gathered",
    "decode_tables_s": "decode",
    "share_out_s": "share out",
    "plan_peak_bytes": "peak",
}
_INDEX = {
    "shards": "shards",
    "results_bytes": "gathered",
    "assemble_s": "assemble",
    "encode_index_s": "encode",
    "assemble_peak_bytes": "peak",
    "index_bytes": "index",
    "check_s": "check all",
    "check_peak_bytes": "peak",
    "own_s": "one rank, same topology",
    "own_peak_bytes": "peak",
    "other_s": "one rank of half as many",
    "other_peak_bytes": "peak",
}
_STORES = {"index_bytes": "index", "put_index_s": "put index", "commit_s": "commit"}
_STORES |= {"read_manifest_s": "read manifest", "read_index_s": "read index"}
_LATEST = {"checkpoints": "checkpoints", "latest_s": "find the newest", "requests": "requests"}


def _table(heading: str, columns: Mapping[str, str], rows: Sequence[tuple[Sequence[str], Found]]) -> str:
    """Write measurements as a markdown table; the first cells of each row are given."""
    firsts = ["state", "ranks"] if len(rows[0][0]) == 2 else ["store"]
    lines = [f"### {heading}", "", f"| {' | '.join([*firsts, *columns.values()])} |"]
    lines.append("|---" * (len(firsts) + len(columns)) + "|")
    lines += [f"| {' | '.join([*cells, *(_cell(name, found) for name in columns)])} |" for cells, found in rows]
    return "\n".join(lines)


def _cell(name: str, found: Found) -> str:
    if name not in found:
        return "–"
    value = found[name]
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_s"):
        return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"
    return f"{value:,.0f}"


def growth_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Say how each quantity grew from one number of ranks to the next; as the boxes do is linear."""
    names = [name for name in columns if name.endswith(("_s", "_bytes")) or name == "boxes"]
    lines = [f"| state | ranks | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    pairs = [(row, later) for row, later in itertools.pairwise(rows) if _is_next(row.size, later.size)]
    for row, later in pairs:
        ratios = [f"× {later.found[name] / row.found[name]:.1f}" if row.found.get(name) else "–" for name in names]
        step = f"{row.size.ranks:,} → {later.size.ranks:,}"
        lines.append(f"| {later.size.title} | {step} | {' | '.join(ratios)} |")
    return "\n".join(["### Growth", "", *lines]) if pairs else ""


def _is_next(size: Size, later: Size) -> bool:
    return size.model == later.model and size.replicas == later.replicas == 1


# -- the command line --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = _parse(arguments)
    if options.requests:
        print(requests_of_ranks(options.ranks or (2, 4)))
        return 0
    words = sys.argv if arguments is None else ["benchmarks/scale.py", *arguments]
    load = f"load average {os.getloadavg()[0]:.1f} before"
    print(f"- command: `{shlex.join(['python', *words])}`\n- machine: {os.cpu_count()} cores, {load}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=options.directory) as directory:
        rows = _measure_sizes(options, Path(directory))
        stores = _measure_each_store(options, Path(directory) / "index")
    cells = [([row.size.title, f"{row.size.ranks:,}"], row.found) for row in rows]
    print(f"\n{_table('Plan, on rank 0', _PLAN, cells)}")
    indexed = [row for row in rows if row.size.replicas == 1]
    print(f"\n{_table('Index', _INDEX, [cell for cell, row in zip(cells, rows, strict=True) if row in indexed])}")
    print(f"\n{growth_table(indexed, _PLAN | _INDEX)}")
    print(f"\n{_table('Stores, the last index above', _STORES, stores)}")
    print(f"\n{_table('Listing', _LATEST, stores)}")
    if options.json:
        found = [asdict(row) for row in rows] + [{"store": name[0], "found": of_store} for name, of_store in stores]
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def _measure_sizes(options: argparse.Namespace, directory: Path) -> list[Row]:
    rows = []
    for size in _sizes(options):
        print(f"… {size.title}, {size.ranks} ranks", file=sys.stderr, flush=True)
        row = Row(size=size, found=measure_plan(size, directory))
        if size.replicas == 1:
            row.found |= measure_index(size, directory)
        rows.append(row)
    return rows


def _sizes(options: argparse.Namespace) -> Iterator[Size]:
    """Yield the sizes; the replicated ones, which only the plan tells apart, at the largest number of ranks."""
    ranks = sorted(options.ranks)
    for replicas in (ranks[-1], 2):
        yield Size(model=options.models[-1], ranks=ranks[-1], replicas=replicas)
    for model in options.models:
        yield from (Size(model=model, ranks=count) for count in ranks)


def _measure_each_store(options: argparse.Namespace, index_path: Path) -> list[tuple[list[str], Found]]:
    rows = []
    for name in ("s3sink", "local"):
        print(f"… {name}", file=sys.stderr, flush=True)
        with open_target(name, size_bytes=_SINK_BYTES, directory=options.directory) as target:
            with target.ground() as ground:
                found = in_a_process(measure_stores, index_path, ground)
            with target.ground() as ground:
                found |= in_a_process(measure_latest, ground, options.checkpoints)
        rows.append(([name], found))
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a save and a restore cost where thousands of ranks meet.")
    parser.add_argument("--quick", action="store_true", help="smoke test: 70B on 8 and 16 ranks, 200 checkpoints")
    parser.add_argument("--models", type=_words, default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--ranks", type=_numbers, help="numbers of ranks (default: 256,1024,4096)")
    parser.add_argument("--checkpoints", type=int, default=10_000, help="among which the newest is looked for")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where files may lie")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--requests", action="store_true", help="requests of each rank, counted with 2 and 4 real ones")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.ranks, options.checkpoints = ["70B"], [8, 16], 200
    if not options.requests:
        options.ranks = options.ranks or [256, 1024, 4096]
    return options


def _words(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(MODELS)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
