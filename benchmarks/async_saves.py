"""Turn peers and parts into tables of saves that go on in the background: what they take from the training loop.

    python benchmarks/async_saves.py                           all parts, 2 GiB, 3 runs: about half an hour
    python benchmarks/async_saves.py --parts blocked,lost      how long the loop waits; what training loses in all
    python benchmarks/async_saves.py --parts limited           the same where the network carries 300 MB/s
    python benchmarks/async_saves.py --parts limited-tls       and behind TLS
    python benchmarks/async_saves.py --parts memory            peaks: ample budget, small budget, many saves
    python benchmarks/async_saves.py --parts gpu               blocked time beside a copy into pinned memory
    python benchmarks/async_saves.py --quick                   smoke test: tiny sizes, one run

Peers of one table take turns, each number in a fresh process. The sink plays a server elsewhere, yet runs on the cores
that train: beside training it takes in what the measured saves send without a copy, and keeps one more save, for the
check; with `--sink-keeps` it keeps all of them, as it does behind TLS. `--sink-nice 19` has it take what the training
leaves, for all peers alike, 0 has it compete. The exit status is 1
when a peer fails or saved something else than the state at the call, 3 when `--check-goals` is given and one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.background.peers import ASYNC_PEERS
from benchmarks.background.process import AsyncSpec, measure_async
from benchmarks.background.report import AsyncResults, AsyncRow, goals_of, table
from benchmarks.run import log, names_of
from benchmarks.shared.child import MeasurementError
from benchmarks.shared.report import MIB, STOCK, goal_lines, header
from benchmarks.shared.states import STATES, bytes_of
from benchmarks.shared.targets import LIMIT_MB_PER_S, Target, open_target
from benchmarks.shared.units import format_bytes, parse_bytes

__all__ = ["PARTS", "main"]

PARTS = ("blocked", "lost", "limited", "limited-tls", "memory", "gpu")

# Behind TLS there is no taking in without a copy.
_DRAINED = frozenset({"s3sink", "s3slow", "s3limited"})
_QUICK_BYTES = 16 * MIB
_GOALS_FROM_BYTES = 1 << 30
_MANAGED = ("cloudckpt-obstore", "cloudckpt")
_BESIDE_TRAINING = (*_MANAGED, STOCK)
_STAGED = (*_MANAGED, "cloudckpt-obstore-unprepared", "cloudckpt-unprepared", STOCK, "dcp-kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One table: what is measured, with whom, how often. `spec` lacks the peer and the place."""

    kind: str
    title: str
    target: str
    peers: Sequence[str]
    runs: int
    spec: AsyncSpec

    @property
    def room_bytes(self) -> int:
        """What all saves of one process leave in the store."""
        return self.spec.saves * bytes_of(STATES["gpt"].shapes(self.spec.size_bytes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = _parse(arguments)
    print(
        _header(options, ["python", *sys.argv] if arguments is None else ["python", __file__, *arguments]), flush=True
    )
    all_results = []
    for wanted in _tables(options):
        results = _measure(wanted, options)
        all_results.append(results)
        print(f"\n{table(results)}", flush=True)
    goals = goals_of(all_results)
    if not goals:
        print("\nNothing that has a goal was measured.")
    elif options.check_goals or options.size >= _GOALS_FROM_BYTES:
        print(f"\n{goal_lines(goals)}")
    else:
        print("\nGoals are for states of 1 GiB and more: below, the fixed cost of a call rules.")
    if options.json:
        options.json.write_text(json.dumps([results.as_json() for results in all_results], indent=1))
    if any(row.failure for results in all_results for row in results.rows):
        return 1
    return 3 if options.check_goals and any(goal.is_met is False for goal in goals) else 0


def _header(options: argparse.Namespace, command: Sequence[str]) -> str:
    shapes = STATES["gpt"].shapes(options.size)
    lines = header(
        command=command,
        runs=options.runs,
        directory=options.directory,
        state=f"{format_bytes(bytes_of(shapes))} in {len(shapes)} fp32 tensors (GPT-like)",
    )
    threads = options.threads or torch.get_num_threads()
    return (
        f"{lines}\n- training: steps of a network of width {options.width}, {threads} threads; "
        f"{options.saves} saves per process; the sink at nice {options.sink_nice}"
    )


# ---- what is measured -----------------------------------------------------------------------------------------------


def _tables(options: argparse.Namespace) -> list[_Table]:
    makers = {
        "blocked": lambda: [_blocked(options)],
        "lost": lambda: [_beside_training(options, "lost", options.target)],
        "limited": lambda: [_beside_training(options, "limited", "s3limited")],
        "limited-tls": lambda: [_beside_training(options, "limited", "s3limitedtls")],
        "memory": lambda: _memory(options),
        "gpu": lambda: [_gpu(options)],
    }
    return [wanted for part in PARTS if part in options.parts for wanted in makers[part]()]


def _blocked(options: argparse.Namespace) -> _Table:
    return _Table(
        kind="blocked",
        title=f"Blocked by a save of {format_bytes(options.size)} in host memory, to {options.target}",
        target=options.target,
        peers=_STAGED,
        runs=options.runs,
        spec=_spec("blocked", options),
    )


def _gpu(options: argparse.Namespace) -> _Table:
    return replace(
        _blocked(options),
        kind="gpu",
        title=f"Blocked by a save of {format_bytes(options.size)} on a GPU, to {options.target}",
        peers=(*_STAGED, "dcp-pinned"),
        spec=_spec("blocked", options, device="cuda"),
    )


def _beside_training(options: argparse.Namespace, kind: str, target: str) -> _Table:
    limit = f", at {LIMIT_MB_PER_S:.0f} MB/s" if kind == "limited" else ""
    return _Table(
        kind=kind,
        title=f"Training time lost per save of {format_bytes(options.size)}, to {target}{limit}",
        target=target,
        peers=_BESIDE_TRAINING,
        runs=options.runs,
        spec=_spec("lost", options, is_drained=target in _DRAINED and not options.sink_keeps),
    )


def _memory(options: argparse.Namespace) -> list[_Table]:
    """One process per number: memory does not drift as time does."""
    shared = {"target": options.target, "runs": 1}
    ours = tuple(name for name in _MANAGED if ASYNC_PEERS[name].has_budget)
    small = format_bytes(options.flat_size)
    return [
        _Table(
            kind="memory",
            title=f"Memory beside a state of {format_bytes(options.size)}, ample budget",
            peers=_BESIDE_TRAINING,
            spec=_spec("memory", options, saves=2),
            **shared,
        ),
        _Table(
            kind="memory",
            title=f"Memory beside a state of {format_bytes(options.size)}, budget {format_bytes(options.budget)}",
            peers=ours,
            spec=_spec("memory", options, saves=2, budget_bytes=options.budget),
            **shared,
        ),
        _Table(
            kind="flat",
            title=f"Memory over {options.flat_saves} saves of {small}",
            peers=_BESIDE_TRAINING,
            spec=_spec("memory", options, saves=options.flat_saves, size_bytes=options.flat_size),
            **shared,
        ),
    ]


def _spec(part: str, options: argparse.Namespace, **how: object) -> AsyncSpec:
    spec = AsyncSpec(
        part=part,
        peer="",
        url="",
        size_bytes=options.size,
        saves=options.saves,
        ready_s=options.ready_s,
        idle_steps=options.idle_steps,
        width=options.width,
        threads=options.threads,
    )
    return replace(spec, **how)


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(wanted: _Table, options: argparse.Namespace) -> AsyncResults:
    results = AsyncResults(kind=wanted.kind, title=wanted.title, target=wanted.target)
    if wanted.spec.device == "cuda" and not torch.cuda.is_available():
        results.skipped = "torch finds no CUDA device here"
        return results
    place = open_target(
        wanted.target, size_bytes=wanted.room_bytes, directory=options.directory, sink_nice=options.sink_nice
    )
    with place as target:
        results.rows = [AsyncRow(peer=peer, title=ASYNC_PEERS[peer].title) for peer in _peers(wanted, target, options)]
        if not results.rows:
            results.skipped = "none of the chosen peers fits"
        for turn in range(wanted.runs):
            for row in results.rows:
                log(f"{wanted.kind}: run {turn + 1} of {wanted.runs}: {row.peer}")
                _take_turn(row, target, wanted.spec)
    return results


def _peers(wanted: _Table, target: Target, options: argparse.Namespace) -> list[str]:
    """Return who can write to the target, in the order of `ASYNC_PEERS`; whom a person names need not be a default."""
    is_cuda = wanted.spec.device == "cuda"
    return [
        name
        for name, kind in ASYNC_PEERS.items()
        if name in (options.peers or wanted.peers)
        and (kind.is_for_local if target.is_local else kind.is_for_s3)
        and (is_cuda or not kind.needs_cuda)
        and (kind.has_budget or not wanted.spec.budget_bytes)
    ]


def _take_turn(row: AsyncRow, target: Target, spec: AsyncSpec) -> None:
    """Measure one peer once, on a ground of its own."""
    if row.failure:
        return
    with target.ground() as ground:
        here = replace(
            spec,
            peer=row.peer,
            url=ground.url,
            storage_options=ground.storage_options,
            stats_url=ground.stats_url,
            environment=ground.environment,
        )
        try:
            row.runs.append(measure_async(here))
        except MeasurementError as error:
            row.failure = str(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure saves in the background beside other ways.")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("2GiB"), help="bytes of the state, about")
    parser.add_argument("--parts", type=names_of(PARTS), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--peers", type=names_of(ASYNC_PEERS), default=[], help=", ".join(ASYNC_PEERS))
    parser.add_argument("--target", choices=("s3sink", "s3tls", "s3slow", "local"), default="s3sink")
    parser.add_argument("--runs", type=int, default=3, help="processes per peer and table (memory: one)")
    parser.add_argument("--saves", type=int, default=3, help="saves in a row per process")
    parser.add_argument("--budget", type=parse_bytes, default=parse_bytes("256MiB"), help="the small one, for memory")
    parser.add_argument("--flat-size", type=parse_bytes, default=parse_bytes("128MiB"), help="of the many saves")
    parser.add_argument("--flat-saves", type=int, default=50, help="how many they are")
    parser.add_argument("--width", type=int, default=1024, help="of the network that trains")
    parser.add_argument("--threads", type=int, default=0, help="of the network that trains; 0: torch's own choice")
    parser.add_argument("--idle-steps", type=int, default=60, help="training steps without a save, before each save")
    parser.add_argument("--ready-s", type=float, default=15.0, help="from `prepare` to the first save, for blocked")
    parser.add_argument("--sink-nice", type=int, default=0, help="0: the sink competes for the cores; 19: it yields")
    parser.add_argument("--sink-keeps", action="store_true", help="it stores all saves, on the cores that train")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one run: a smoke test, no measurement")
    parser.add_argument("--check-goals", action="store_true", help="exit with status 3 when a goal is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        _shrink(options)
    if min(options.runs, options.saves, options.flat_saves, options.idle_steps) < 1:
        parser.error("give 1 run, save and idle step or more")
    return options


def _shrink(options: argparse.Namespace) -> None:
    options.size, options.flat_size = min(options.size, _QUICK_BYTES), min(options.flat_size, _QUICK_BYTES)
    options.runs, options.saves, options.flat_saves = 1, min(options.saves, 2), min(options.flat_saves, 6)
    options.width, options.idle_steps, options.ready_s = min(options.width, 64), min(options.idle_steps, 5), 0.1


if __name__ == "__main__":
    raise SystemExit(main())
