"""Train once in peace and once with three interruptions, and show that the bucket made both the same run, bit for bit.

    run A   ├───────────────────────────────────────────────────────────────┤   one process

    run B   ├──────────────┤ SIGKILL between two saves                          each process starts in an
                      ├────────────────┤ SIGKILL during a save                  empty directory, and has
                                   ├───────────┤ SIGTERM, 20 s to go            nothing but the bucket
                                                ├───────────────────────────┤

All three hit the middle of a data epoch. The SIGKILLs cost the steps since the newest save, which are trained again;
the SIGTERM, between two saves, costs none: the step is saved in the time that is left.

Prints every step of both, what `cloudckpt ls` sees, and a record; writes the record (JSON), the logs and a picture
to `--out`. Ends with status 1 if a single bit differs, and if an interruption finds no moment to strike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from record import Outcome, record_of
from runs import EXIT_INTERRUPTED, NOTICE_S, DemoError, Interruption, Job, Segment, run
from target import Target, seaweedfs_target, target_at
from trajectory import compare, table

__all__ = ["SCRIPT", "Size", "interruptions_for", "job_for", "main", "show"]

SCRIPT = Path(__file__).resolve().with_name("train_gpt.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much to train.

    Attributes:
        shard_mib: smaller than cloudckpt's default, so that a save of this small model is many requests long, as
            that of a large model is, and the kill finds it under way.
    """

    steps: int = 200
    save_every: int = 20
    layers: int = 4
    width: int = 256
    batch_size: int = 8
    shard_mib: float = 1.0


def job_for(script: Path, target: Target, run_name: str, size: Size, out: Path) -> Job:
    """Describe one training run; its log starts empty."""
    log = out / f"run-{run_name}.log"
    log.unlink(missing_ok=True)
    flags = [part for name, value in asdict(size).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return Job(
        command=[sys.executable, str(script), target.root(run_name), *flags, "--grace-s", str(NOTICE_S)],
        environment=target.environment,
        bucket=target.bucket(run_name),
        log=log,
    )


def interruptions_for(size: Size) -> list[Interruption]:
    """Plan three: after the third save, in the first save of the second half, and after three quarters of the run."""
    half_an_interval = size.save_every // 2
    three_quarters = size.steps * 3 // 4 // size.save_every * size.save_every
    return [
        Interruption(when="between saves", step=3 * size.save_every + half_an_interval),
        Interruption(when="during a save", step=size.steps // 2),
        Interruption(signal=signal.SIGTERM, when="between saves", step=three_quarters + half_an_interval),
    ]


def show(target: Target, size: Size, out: Path, *, script: Path = SCRIPT) -> bool:
    """Run the demo, print it, write its files to `out`, and say whether every check held."""
    start_s = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    run_a = _train(job_for(script, target, "a", size, out), [])
    run_b = _train(job_for(script, target, "b", size, out), interruptions_for(size))
    outcome = Outcome(
        run_a=run_a, run_b=run_b, comparison=compare(run_a, run_b), attempts=target.bucket("b").attempts()
    )
    print("", *table(outcome.comparison, run_b), sep="\n")
    listing = _list_checkpoints(target, "b")
    print(f"\n$ cloudckpt ls {target.root('b')}\n{listing}")
    facts = {
        "target": target.description,
        "url": target.url,
        "size": asdict(size),
        "took_s": round(time.monotonic() - start_s, 1),
        "cloudckpt_ls": listing.splitlines(),
    }
    record = record_of(outcome, target.bucket("b"), facts)
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    _print_record(record)
    print(f"\nrecord   {out / 'record.json'}\npicture  {_draw(outcome, out / 'trajectories.png')}\n")
    return _print_checks(outcome.checks())


def _train(job: Job, interruptions: Sequence[Interruption]) -> list[Segment]:
    names = ", ".join(one.name for one in interruptions) or "no interruption"
    print(f"$ {' '.join(job.command[:3])} …  ({names})", flush=True)
    segments = run(job, interruptions)
    print(f"  {sum(one.wall_s for one in segments):.0f} s in {len(segments)} processes", flush=True)
    return segments


def _list_checkpoints(target: Target, run_name: str) -> str:
    command = [sys.executable, "-m", "cloudckpt", "ls", target.root(run_name)]
    environment = {**os.environ, **target.environment, "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"cloudckpt ls ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def _draw(outcome: Outcome, path: Path) -> str:
    try:
        from picture import draw
    except ImportError:
        return "none, for lack of matplotlib: pip install 'cloudckpt[demo]'"
    draw(outcome, path)
    return str(path)


def _print_record(record: Mapping[str, object]) -> None:
    for name in ("target", "url", "processors", "took_s"):
        print(f"{name:<20} {record[name]}")
    environment, observed = record["environment"], record["observed"]
    if isinstance(environment, dict):
        print(*(f"{name:<20} {value}" for name, value in environment.items()), sep="\n")
    if isinstance(observed, dict):
        print(
            *(f"{name:<20} {observed[name]}" for name in ("parameters", "checkpoint_bytes", "steps_compared")), sep="\n"
        )


def _print_checks(checks: Mapping[str, bool]) -> bool:
    for claim, is_true in checks.items():
        print(f"{'held  ' if is_true else 'FAILED'}  {claim}")
    return all(checks.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Interrupt a training three times, resume it from the bucket, compare every bit."
    )
    parser.add_argument("--url", help="where to write instead of SeaweedFS on loopback: s3://…, gs://… or a directory")
    options = os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "{}")
    parser.add_argument("--storage-options", default=options, help="fsspec's options for --url, as JSON")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where record, logs and picture go")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the training script, train_gpt.py or one like it")
    for field in fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the status to exit with."""
    given = _parser().parse_args(arguments)
    size = Size(**{field.name: getattr(given, field.name) for field in fields(Size)})
    target = nullcontext(target_at(given.url, json.loads(given.storage_options))) if given.url else seaweedfs_target()
    try:
        with target as place:
            return 0 if show(place, size, given.out, script=given.script.resolve()) else 1
    except DemoError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # What it had started has ended on the way here.
        print("The demo was interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
