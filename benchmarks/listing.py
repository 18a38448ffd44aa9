"""Turn a root of thousands of checkpoints into what `latest`, `ls` and a retention pass with nothing to do cost there.

    python benchmarks/listing.py                    10,000 checkpoints on the in-memory sink: a minute or two
    python benchmarks/listing.py --quick            smoke test: 300
    python benchmarks/listing.py --target s3slow    20 ms per request

A checkpoint is a manifest, an index and a shard, as a save of one rank leaves them; the latter two are a few bytes.
The commands run in this process, as the shell's do without the start of Python; their answers go nowhere. Requests are
those that the store counts. Every number is of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.shared.targets import TARGETS, Ground, open_target
from benchmarks.sink.process import SinkClient
from cloudckpt import CheckpointManager, KeepEvery
from cloudckpt.cli import app
from cloudckpt.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    IndexRef,
    Manifest,
    checkpoint_prefix,
    digest_of,
    index_key,
    new_attempt,
    shard_key,
)
from cloudckpt.root import Catalog, Cleaner, Pruner, Roots
from cloudckpt.root.claims import Line
from cloudckpt.store import Store, open_store
from cloudckpt.threads import each

__all__ = ["Cost", "main", "measure"]

_SINK_BYTES = 256 << 20
_WRITERS = 16
_INDEX = b"an index, as far as a listing tells"
_SHARD = b"a shard, as far as a listing tells"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one command cost; `cpu_s` is the processor time of this process, which waits for the sink's."""

    what: str
    requests: int
    seconds: float
    cpu_s: float


def measure(ground: Ground, count: int) -> Iterator[Cost]:
    """Fill a place with checkpoints, and look at it in each way."""
    options = dict(ground.storage_options)
    with CheckpointManager(ground.url, storage_options=options, progress="off") as manager:
        manager.save(0, {"step": 0})
    with open_store(ground.url, storage_options=options) as store:
        nonce = Roots([Catalog(store)]).all()[0].manifest.claim
        each(range(1, count), lambda step: _put(store, step, nonce), threads=_WRITERS, name="bench-listing")
    words = ["--storage-options", json.dumps(options)]
    commands = {
        "latest": ["latest", ground.url],
        "ls, nothing cached": ["ls", ground.url],
        "ls again": ["ls", ground.url],
        "ls again, --json": ["ls", ground.url, "--json"],
        "ls again, --check": ["ls", ground.url, "--check"],
    }
    for what, command in commands.items():
        yield _cost(what, ground, lambda command=command: _run([*command, *words]))
    with open_store(ground.url, storage_options=options) as store:
        catalog = Catalog(store)
        yield _cost("one listing", ground, catalog.places)
        newest = Roots([catalog]).all()[-1]
        pruner = Pruner(
            catalog, [KeepEvery(steps=1)], Cleaner(catalog, grace_s=60.0, sweep_after_s=None, clock=time.monotonic)
        )
        line = Line({1: newest.step})
        catalog.claims.fence(1)  # as before each commit
        yield _cost("a retention pass with nothing to do", ground, lambda: pruner.prune_after(newest, line))


def _put(store: Store, step: int, claim: str) -> None:
    prefix, attempt = checkpoint_prefix(step, 1), new_attempt()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=1,
        attempt=attempt,
        claim=claim,
        created_at=f"2026-01-01T00:00:{step % 60:02d}.000+00:00",
        total_bytes=len(_SHARD),
        tensor_count=1,
        shard_count=1,
        index=IndexRef(size_bytes=len(_INDEX), sha256=digest_of(_INDEX)),
        metrics={"loss": 1 / (1 + step), "accuracy": step / (1 + step)},
        environment={
            "package.torch": "2.13.0",
            "platform": "Linux-6.1-x86_64",
            "device": "cuda:0",
            "engine": "obstore",
        },
        summary={"total_s": 1.25, "upload_s": 1.0, "stage_s": 0.125, "requests": 4.0, "retries": 0.0, "worked_s": 60.0},
    )
    store.put(prefix + shard_key(attempt, 0, 0), [memoryview(_SHARD)])
    store.put(prefix + index_key(attempt), [memoryview(_INDEX)])
    store.put(prefix + MANIFEST_NAME, [memoryview(manifest.encode())])


def _run(arguments: Sequence[str]) -> None:
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            app(list(arguments))
    except SystemExit as exc:
        if exc.code:
            raise RuntimeError(f"cloudckpt {arguments[0]} ended with {exc.code}") from exc


def _cost(what: str, ground: Ground, call: Callable[[], object]) -> Cost:
    sink = SinkClient(ground.stats_url) if ground.stats_url else None
    before = sum(sink.stats().requests.values()) if sink else 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    call()
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    requests = sum(sink.stats().requests.values()) - before if sink else -1
    return Cost(what=what, requests=requests, seconds=seconds, cpu_s=cpu_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description="What listing thousands of checkpoints costs.")
    parser.add_argument("--quick", action="store_true", help="300 checkpoints")
    parser.add_argument("--count", type=int, default=10_000, help="checkpoints")
    parser.add_argument("--target", choices=[name for name in TARGETS if name != "seaweedfs"], default="s3sink")
    given = parser.parse_args(arguments)
    count = 300 if given.quick else given.count
    print(f"{count:,} checkpoints on {given.target}\n\n| what | requests | seconds | processor s |\n|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as cache,
        open_target(given.target, size_bytes=_SINK_BYTES, directory=Path(cache)) as target,
        target.ground() as ground,
    ):
        os.environ["XDG_CACHE_HOME"] = cache
        for cost in measure(ground, count):
            requests = "–" if cost.requests < 0 else f"{cost.requests:,}"
            print(f"| {cost.what} | {requests} | {cost.seconds:.2f} | {cost.cpu_s:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
