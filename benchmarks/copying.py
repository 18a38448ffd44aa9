"""Measure copies and looks beside a plain save and load: `python benchmarks/copying.py [--gib 2] [--target s3sink]`.

    cp local → target      beside a plain save to the target      the goal: at least 0.8 of its rate
    verify --deep there    beside a plain load from there         the goal: at least its rate
    diff of two steps      which lie alike, and of which a tenth has changed

Rates are bytes of tensors, each the best of some rounds that take turns, all in one process. The source of the copy is
in the page cache, as what was just saved is; a copy reads what a save has in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import cloudckpt
from benchmarks.shared.targets import TARGETS, open_target

__all__ = ["main", "measure"]

_COUNT = 32
_CP_GOAL, _VERIFY_GOAL = 0.8, 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", choices=TARGETS, default="s3sink")
    parser.add_argument("--directory", type=Path, default=None, help="where the source is")
    parser.add_argument("--quick", action="store_true", help="smoke test: 16 MiB, 1 round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    size_bytes = 16 << 20 if options.quick else int(options.gib * (1 << 30))
    with tempfile.TemporaryDirectory(prefix="cloudckpt-copying-", dir=options.directory) as name:
        found = measure(Path(name), options.target, size_bytes, 1 if options.quick else options.rounds)
    if options.json:
        print(json.dumps(found))
        return 0
    for what in ("save", "load", "cp", "verify --deep", "verify", "diff"):
        print(f"{what:14} {size_bytes / 1e9 / found[what]:8.2f} GB/s {found[what]:8.3f} s")
    for what, beside, goal in (("cp", "save", _CP_GOAL), ("verify --deep", "load", _VERIFY_GOAL)):
        ratio = found[beside] / found[what]
        print(f"{what} is {ratio:.2f} of the rate of a {beside}; the goal is {goal}: {'ok' if ratio >= goal else 'NO'}")
    print(f"peak memory of the process beside the state: {found['extra_mib']:.0f} MiB")
    return 0


def measure(folder: Path, target: str, size_bytes: int, rounds: int) -> dict[str, float]:
    """Return the seconds of each call, the fastest of some rounds, and the memory that they took in MiB."""
    state = {f"layer.{number}": torch.randn(size_bytes // 4 // _COUNT) for number in range(_COUNT)}
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    source, older = folder / "source", folder / "older"
    for number in range(_COUNT // 10):
        state[f"layer.{number}"] += 1
    cloudckpt.save(dict(state), older, progress="off")
    for number in range(_COUNT // 10):
        state[f"layer.{number}"] -= 1
    cloudckpt.save(dict(state), source, progress="off")
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], object]) -> None:
        began_s = time.monotonic()
        call()
        times.setdefault(what, []).append(time.monotonic() - began_s)

    with open_target(target, size_bytes=size_bytes, directory=folder) as there:
        # Connections and first pages are paid for by nobody.
        for _ in range(rounds + 1):
            with there.ground() as ground:
                to = ground.storage_options or None
                timed("save", lambda: cloudckpt.save(dict(state), ground.url, storage_options=to, progress="off"))
                timed("load", lambda: cloudckpt.load(dict(blank), ground.url, storage_options=to, progress="off"))
                timed("verify --deep", lambda: cloudckpt.verify(ground.url, deep=True, storage_options=to))
                timed("verify", lambda: cloudckpt.verify(ground.url, storage_options=to))
            with there.ground() as ground:
                timed("cp", lambda: cloudckpt.copy(source, ground.url, target_storage_options=to))
            timed("diff", lambda: cloudckpt.diff(older, source))
    extra_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base_kib) / 1024
    return {**{what: min(found[1:]) for what, found in times.items()}, "extra_mib": extra_mib}


if __name__ == "__main__":
    raise SystemExit(main())
