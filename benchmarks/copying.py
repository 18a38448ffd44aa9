"""Measure copies and looks beside a plain save and load: `python benchmarks/copying.py [--gib 2] [--target s3sink]`.

    cp local → target      beside a plain save to the target      the goal: at least 0.8 of its rate
    verify --deep there    beside a plain load from there         the goal: at least its rate
    diff of two steps      which lie alike, and of which a tenth has changed

Rates are bytes of tensors, each the best of some rounds that take turns, all in one process. The source of the copy is
in the page cache, as what was just saved is; a copy reads what a save has in memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import cloudckpt
from benchmarks.shared.targets import TARGETS, Ground, open_target

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
    options = parser.parse_args(arguments)
    size_bytes = 16 << 20 if options.quick else int(options.gib * (1 << 30))
    with tempfile.TemporaryDirectory(prefix="cloudckpt-copying-", dir=options.directory) as name:
        found = measure(Path(name), options.target, size_bytes, 1 if options.quick else options.rounds)
    for what, (took_s, cpu_s) in found.items():
        print(f"{what:14} {size_bytes / 1e9 / took_s:8.2f} GB/s {took_s:8.3f} s, of processor {cpu_s:6.3f} s")
    for what, beside, goal in (("cp", "save", _CP_GOAL), ("verify --deep", "load", _VERIFY_GOAL)):
        ratio = found[beside][0] / found[what][0]
        print(f"{what} is {ratio:.2f} of the rate of a {beside}; the goal is {goal}: {'ok' if ratio >= goal else 'NO'}")
    return 0


def measure(folder: Path, target: str, size_bytes: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of each call and of this process's processor time, each the least of some rounds."""
    state = {f"layer.{number}": torch.randn(size_bytes // 4 // _COUNT) for number in range(_COUNT)}
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    changed = {f"layer.{number}": state[f"layer.{number}"] + 1 for number in range(_COUNT // 10)}
    source, older = folder / "source", folder / "older"
    cloudckpt.save({**state, **changed}, older, progress="off")
    cloudckpt.save(dict(state), source, progress="off")
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(what: str, call: Callable[[], object]) -> None:
        began_s, cpu_s = time.monotonic(), time.process_time()
        call()
        times.setdefault(what, []).append((time.monotonic() - began_s, time.process_time() - cpu_s))

    def saved_and_looked_at(ground: Ground) -> None:
        to = {"storage_options": ground.storage_options or None, "progress": "off"}
        timed("save", lambda: cloudckpt.save(dict(state), ground.url, **to))
        timed("load", lambda: cloudckpt.load(dict(blank), ground.url, **to))
        timed("verify --deep", lambda: cloudckpt.verify(ground.url, deep=True, **to))
        timed("verify", lambda: cloudckpt.verify(ground.url, **to))

    def copied(ground: Ground) -> None:
        to = ground.storage_options or None
        timed("cp", lambda: cloudckpt.copy(source, ground.url, target_storage_options=to, progress="off"))

    with open_target(target, size_bytes=size_bytes, directory=folder) as there:
        # Connections and first pages are paid for by nobody.
        for _ in range(rounds + 1):
            with there.ground() as ground:
                saved_and_looked_at(ground)
            with there.ground() as ground:
                copied(ground)
            timed("diff", lambda: cloudckpt.diff(older, source, progress="off"))
    return {what: tuple(map(min, zip(*found[1:], strict=True))) for what, found in times.items()}


if __name__ == "__main__":
    raise SystemExit(main())
