"""Measure export and import beside a plain save and load: `python -m benchmarks.convert [--gib 2] [--dir DIR]`.

Rates are bytes of tensors. Each of some rounds loads, and then converts once in each way; a ratio is that of a
conversion to the load of its own round, and the median of the rounds is printed. So whoever else uses the machine slows
both. A first round is not counted: in a virtual machine, memory that nobody has used yet costs several times as much.
All in one process; its peak of memory in each call, above that in a load, is given beside; processor time is that of
all its threads.
A conversion reads and writes; a load only reads, into memory that is there. Half of its rate is the goal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

import cloudckpt
from benchmarks.shared.clocks import peak_bytes, reset_peak
from cloudckpt.convert import Kind, export, import_

KINDS: dict[Kind, str] = {"safetensors": "x.safetensors", "huggingface": "hf", "torch": "x.pt", "dcp": "dcp"}


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one call, by the clock and of all processors; and the most that was resident in it."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def took(call: Callable[[], object], made: Path | None = None) -> Took:
    """Call something; what it makes is removed before."""
    if made is not None and made.exists():
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    reset_peak()
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    call()
    return Took(time.monotonic() - began_s, time.process_time() - began_cpu_s, peak_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=32, help="how many, all of one size")
    parser.add_argument("--dir", type=Path, default=None, help="where; on a tmpfs the disk does not count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cloudckpt-convert-", dir=options.dir) as name:
        run(Path(name), int(options.gib * (1 << 30)), options.rounds, options.tensors)


def run(folder: Path, size_bytes: int, rounds: int, count: int) -> None:
    state = {"model": {f"layer.{number}": torch.randn(size_bytes // 4 // count) for number in range(count)}}
    blank = {"model": {key: torch.zeros_like(value) for key, value in state["model"].items()}}
    url, back = folder / "saved", folder / "back"
    calls: dict[str, Callable[[], Took]] = {
        "save": lambda: took(lambda: cloudckpt.save(dict(state), url, progress="off"), url),
        "load": lambda: took(lambda: cloudckpt.load(dict(blank), url, progress="off")),
    }
    for kind, target in KINDS.items():
        place = folder / target
        out, into = partial(export, url, place, to=kind, progress="off"), partial(import_, place, back, progress="off")
        calls[f"export {kind}"] = partial(took, out, place)
        calls[f"import {kind}"] = partial(took, into, back)
    found: dict[str, list[Took]] = defaultdict(list)
    for number in range(rounds + 1):
        for what, call in calls.items():
            one = call()
            if number > 0:
                found[what].append(one)
    load = os.getloadavg()[0]
    print(f"{size_bytes / 1e9:.2f} GB, {rounds} rounds, load average {load:.1f}, {os.cpu_count()} cores\n")
    print("| what | GB/s | x load | processor s | x load's | MiB more |\n|---|---|---|---|---|---|")
    for what, each in found.items():
        pairs = list(zip(found["load"], each, strict=True))
        rate = size_bytes / 1e9 / median(one.wall_s for one in each)
        ratio = median(loaded.wall_s / one.wall_s for loaded, one in pairs)
        spent_s = median(one.cpu_s for one in each)
        spent = median(one.cpu_s / loaded.cpu_s for loaded, one in pairs)
        more_mib = (max(one.peak_bytes for one in each) - max(one.peak_bytes for one in found["load"])) / (1 << 20)
        print(f"| {what} | {rate:.2f} | {ratio:.2f} | {spent_s:.2f} | {spent:.2f} | {max(0.0, more_mib):.0f} |")


if __name__ == "__main__":
    main()
