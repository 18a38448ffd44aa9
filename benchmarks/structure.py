"""Turn the shapes that states have into what their structure costs: thousands of parameters, a byte or two in each.

    python benchmarks/structure.py                             1k, 2k, 4k and 10k parameters, four shapes
    python benchmarks/structure.py --quick                     smoke test: 50 and 100 parameters
    python benchmarks/structure.py --shapes 'one module' --counts 1000,10000 --check-goals

The structure's cost is what a save (or load) takes beyond that of the same contents in one flat dict: the median over
the runs, in processor time, of one right after the other, because a busy machine has both take longer. The goals: at
most twice what torch's own `state_dict` (or `load_state_dict`) takes; and what we add to torch's own grows linearly
from the least to the largest count (torch's own does not, with many groups). The exit status is 3 when one is missed
and `--check-goals` is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.one_process.structures import SHAPES, Found, added_s, exponent, measure_structure, ratio

__all__ = ["main", "misses", "table"]

RATIO_GOAL = 2.0
EXPONENT_GOAL = 1.2  # what is linear but for caches that get too small

Results = dict[str, dict[int, Found]]
"""Shape → count → seconds; without the counts that took too long."""


def table(results: Mapping[str, Mapping[int, Found]], counts: Sequence[int]) -> str:
    """Write seconds, ratios and growth as a markdown table."""
    heads = ["state", "parameters"]
    for what in ("save", "load"):
        heads += [f"{what}: torch", "ours", "flat", "structure × torch", "growth"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for shape, found in results.items():
        lines += [f"| {shape} | {count:,} | {' | '.join(_cells(found, count))} |" for count in counts]
    return "\n".join(lines)


def _cells(found: Mapping[int, Found], count: int) -> list[str]:
    if count not in found:
        return ["took too long", *["–"] * 9]
    cells = []
    least = min(found)
    for what in ("save", "load"):
        here = found[count]
        cells += [f"{here[name]:.3f} s" for name in (f"torch_{what}_s", f"{what}_s", f"flat_{what}_s")]
        power = exponent((least, count), (added_s(found[least], what), added_s(here, what))) if count > least else None
        cells += [f"{ratio(here, what):.1f}", "–" if power is None else f"n^{power:.2f}"]
    return cells


def misses(results: Mapping[str, Mapping[int, Found]], counts: Sequence[int]) -> list[str]:
    """Name each goal that is missed, by its shape."""
    missed = []
    for (shape, found), what in itertools.product(results.items(), ("save", "load")):
        least, most = min(counts), max(counts)
        if least not in found or most not in found:
            missed.append(f"{shape}: took too long")
            continue
        if (times := ratio(found[most], what)) > RATIO_GOAL:
            missed.append(f"{shape}: {what} of {most:,} takes {times:.1f} × torch's own")
        power = exponent((least, most), (added_s(found[least], what), added_s(found[most], what)))
        if power > EXPONENT_GOAL:
            missed.append(f"{shape}: {what} grows as n^{power:.2f} from {least:,} to {most:,}")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = _parse(arguments)
    words = sys.argv if arguments is None else ["benchmarks/structure.py", *arguments]
    load = f"load average {os.getloadavg()[0]:.1f} before"
    print(f"- command: `{shlex.join(['python', *words])}`\n- machine: {os.cpu_count()} cores, {load}\n", flush=True)
    results: Results = {shape: _measure_shape(shape, options) for shape in options.shapes}
    print(table(results, options.counts))
    missed = misses(results, options.counts)
    print("\n" + "\n".join(f"- goal missed: {each}" for each in missed) if missed else "\nAll goals are met.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 3 if missed and options.check_goals else 0


def _measure_shape(shape: str, options: argparse.Namespace) -> dict[int, Found]:
    found: dict[int, Found] = {}
    for count in options.counts:
        print(f"… {shape}, {count:,}", file=sys.stderr, flush=True)
        measured = _measured(shape, count, options)
        if measured is None:
            break  # the larger ones would take longer still
        found[count] = measured
    return found


def _measured(shape: str, count: int, options: argparse.Namespace) -> Found | None:
    """Measure in a fresh process; return None if it was ended because one run alone took too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint"])
    limited = partial(ProcessPoolExecutor, 1, mp_context=context, initializer=_limit, initargs=(options.limit_s,))
    with tempfile.TemporaryDirectory(prefix="bench-structure-", dir=options.directory) as directory, limited() as pool:
        future = pool.submit(measure_structure, shape, count, Path(directory), options.runs, options.limit_s / 4)
        (process,) = pool._processes.values()  # noqa: SLF001 (there is no public way to learn how one ended)
        try:
            return future.result()
        except BrokenProcessPool:
            process.join()
            if process.exitcode != -signal.SIGXCPU:
                raise
            return None


def _limit(processor_s: float) -> None:
    """Have this process ended after so much processor time, which others on the machine do not use up."""

    def watch() -> None:
        while time.process_time() < processor_s:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGXCPU)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not by RLIMIT_CPU: with it Linux counts the processor time of all threads by ticks, 4 ms each.
    threading.Thread(target=watch, daemon=True).start()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the structure of a state costs, whatever its bytes.")
    parser.add_argument("--quick", action="store_true", help="smoke test: 50 and 100 parameters, 1 run")
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--counts", type=_numbers, default=[1_000, 2_000, 4_000, 10_000], help="numbers of parameters")
    parser.add_argument("--runs", type=int, default=5, help="of which the fastest counts, or the median")
    what = "processor seconds that one shape and count may take; after a quarter no other run is begun"
    parser.add_argument("--limit-s", type=float, default=300, help=what)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints may lie")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--check-goals", action="store_true", help="exit with status 3 when a goal is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.counts, options.runs = [50, 100], 1
    return options


def _shapes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in SHAPES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(SHAPES)}")
    return names


def _numbers(text: str) -> list[int]:
    return sorted(int(word) for word in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
