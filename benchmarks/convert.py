"""Measure export and import beside a plain save and load: `python -m benchmarks.convert [--gib 2] [--dir DIR]`.

Rates are bytes of tensors, each the best of some rounds, all in one process, whose memory is given beside. A conversion
reads and writes; a load only reads, into memory that is there. Half of its rate is the goal.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import cloudckpt
from cloudckpt.convert import Kind, export, import_

KINDS: dict[Kind, str] = {"safetensors": "x.safetensors", "huggingface": "hf", "torch": "x.pt", "dcp": "dcp"}


def seconds(call: Callable[[], object], rounds: int, made: Path | None = None) -> float:
    """Return the seconds of the fastest of some calls; what they make is removed before each."""
    found = []
    for _ in range(rounds):
        if made is not None and made.exists():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        began_s = time.monotonic()
        call()
        found.append(time.monotonic() - began_s)
    return min(found)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where; on a tmpfs the disk does not count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cloudckpt-convert-", dir=options.dir) as name:
        run(Path(name), int(options.gib * (1 << 30)), options.rounds)


def run(folder: Path, size_bytes: int, rounds: int) -> None:
    count = 32
    state = {"model": {f"layer.{number}": torch.randn(size_bytes // 4 // count) for number in range(count)}}
    blank = {"model": {key: torch.zeros_like(value) for key, value in state["model"].items()}}
    url = folder / "saved"

    def report(what: str, took_s: float) -> None:
        rate = size_bytes / 1e9 / took_s
        print(f"{what:24} {rate:6.2f} GB/s   {rate / load_rate:5.2f} x load   {peak_mib() - base_mib:6.0f} MiB more")

    save_s = seconds(lambda: cloudckpt.save(dict(state), url, progress="off"), rounds, url)
    load_s = seconds(lambda: cloudckpt.load(dict(blank), url, progress="off"), rounds)
    load_rate, base_mib = size_bytes / 1e9 / load_s, peak_mib()
    report("save", save_s)
    report("load", load_s)
    back = folder / "back"
    for kind, target in KINDS.items():
        place = folder / target
        out, into = partial(export, url, place, to=kind, progress="off"), partial(import_, place, back, progress="off")
        report(f"export {kind}", seconds(out, rounds, place))
        report(f"import {kind}", seconds(into, rounds, back))


if __name__ == "__main__":
    main()
