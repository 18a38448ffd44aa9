"""Measure saves and loads beside what this machine can do at all: `python -m benchmarks.limits [--load] [--gib 2]`.

    raw-obstore   the same bytes, in bodies of a shard's size, by as many puts at once: the limit of engine obstore
    raw-s3fs      the same by s3fs: the limit of engine fsspec
    dd            one file, written by one thread, fdatasync at its end: the limit of a disk

With `--load` they are read back, 8 MiB at a time, and let go of; `dd` reads into touched memory by all cores.

All ways take turns in one warm process, so that the drift of a machine hits all alike. A way's ratio is the median over
the rounds of its rate through the limit's in the same round; ways are names of `PEERS` or of a limit. With `--timeline`
each save of ours says where its time went. `--tensors N` cuts the state into N alike ones, else it is GPT-like.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.one_process.timeline import watched
from benchmarks.peers import PEERS, Place
from benchmarks.shared.states import STATES, State, build
from benchmarks.shared.targets import Ground, open_target
from benchmarks.sink.process import SinkClient

if TYPE_CHECKING:
    from obstore.store import S3Store

__all__ = ["WAYS", "main"]

_SHARD_BYTES = 64 << 20
_WRITE_BYTES = 8 << 20
_READ_BYTES = 8 << 20
_CONCURRENCY = 8
_BUCKET = "bench"
WAYS = {
    "s3sink": ["raw-obstore", "cloudckpt-obstore"],
    "s3tls": ["raw-obstore", "cloudckpt-obstore"],
    "s3slow": ["raw-obstore", "cloudckpt-obstore"],
    "local": ["dd", "cloudckpt"],
}
_Way: TypeAlias = Callable[[Place], object]


@dataclass(slots=True)
class _Times:
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    requests: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--tensors", type=int, default=0, help="cut it into so many alike tensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", choices=list(WAYS), default="s3sink")
    parser.add_argument("--ways", help=f"{', '.join(_LIMITS)}, {', '.join(PEERS)}; the first is the limit")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where `local` writes")
    parser.add_argument("--load", action="store_true", help="measure loads of what each way has saved")
    parser.add_argument("--timeline", action="store_true", help="say where the time of each save of ours went")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is")
    ways = options.ways.split(",") if options.ways else WAYS[options.target]
    state = _state(int(options.gib * (1 << 30)), options.tensors)
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    times = {way: _Times() for way in ways}
    calls = {way: _LIMITS[way](state) if way in _LIMITS else partial(_saved, way, dict(state)) for way in ways}
    kept_bytes = size_bytes * (len(ways) if options.load else 1)
    with (
        open_target(options.target, size_bytes=kept_bytes, directory=options.directory) as target,
        ExitStack() as stack,
    ):
        ground = stack.enter_context(target.ground()) if options.load else None
        if ground is not None:
            os.environ.update(ground.environment)
            for way in ways:
                calls[way](_place(ground))
            calls = {
                way: _READS[way](size_bytes) if way in _READS else partial(_loaded, way, dict(state)) for way in ways
            }
        for number in range(options.rounds + 1):
            for way in ways:
                with nullcontext(ground) if ground is not None else target.ground() as here:
                    took = _timed(way, calls[way], here, is_told=options.timeline and number > 0)
                # The first round pays for imports, connections, first pages and probes.
                if number:
                    times[way].wall_s.append(took[0])
                    times[way].cpu_s.append(took[1])
                    times[way].requests = took[2]
    for line in _table(times, size_bytes):
        print(line)
    return 0


def _state(size_bytes: int, count: int) -> State:
    if not count:
        return build(STATES["gpt"].shapes(size_bytes))
    return {f"layer.{number}.weight": torch.randn(size_bytes // 4 // count) for number in range(count)}


def _saved(way: str, state: State, place: Place) -> None:
    opened = PEERS[way].open(place)
    opened.save(state, 1)
    opened.close()


def _loaded(way: str, state: State, place: Place) -> None:
    opened = PEERS[way].open(place)
    opened.load(state, 1)
    opened.close()


def _place(ground: Ground) -> Place:
    return Place(url=ground.url, storage_options=ground.storage_options)


def _timed(way: str, call: _Way, ground: Ground, *, is_told: bool) -> tuple[float, float, int]:
    """Save or load once; return wall seconds, processor seconds of this process, and requests."""
    place = _place(ground)
    before = _requests(ground)
    gc.collect()
    os.sync()
    with watched() if way.startswith("cloudckpt") and is_told else nullcontext() as line:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        call(place)
        took = time.perf_counter() - began_s, time.process_time() - cpu_s
    if line is not None:
        print(f"{way}: {took[0] * 1e3:.1f} ms: {line.text()}", flush=True)
    return *took, _requests(ground) - before


def _requests(ground: Ground) -> int:
    return sum(SinkClient(ground.stats_url).stats().requests.values()) if ground.stats_url else 0


def _table(times: Mapping[str, _Times], size_bytes: int) -> list[str]:
    first = next(iter(times.values()))
    lines = [f"{'way':18} {'GB/s':>6} {'best':>6} {'s':>7} {'of limit':>8} {'best':>6} {'CPU s/GB':>8} {'requests':>8}"]
    for way, found in times.items():
        gb, middle_s, best_s = size_bytes / 1e9, median(found.wall_s), min(found.wall_s)
        ratio = median(limit / mine for limit, mine in zip(first.wall_s, found.wall_s, strict=True))
        best = min(first.wall_s) / best_s
        lines.append(
            f"{way:18} {gb / middle_s:6.2f} {gb / best_s:6.2f} {middle_s:7.3f} {ratio:8.2f} {best:6.2f} "
            f"{median(found.cpu_s) / gb:8.3f} {found.requests:8}"
        )
    return lines


def _bodies(state: State) -> list[list[memoryview]]:
    """Cut the bytes of a state, in its own memory, into bodies of a shard's size."""
    bodies, room = [list[memoryview]()], _SHARD_BYTES
    for tensor in state.values():
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while data:
            if not room:
                bodies.append([])
                room = _SHARD_BYTES
            part, data = data[:room], data[room:]
            bodies[-1].append(part)
            room -= len(part)
    return bodies


def _raw_obstore(state: State) -> _Way:
    import obstore

    # In one piece each: what is put together of many views is more work, which the limit does not have.
    bodies = [b"".join(body) for body in _bodies(state)]

    def puts(place: Place) -> None:
        store = _store_at(place.storage_options["endpoint_url"])

        def put(number: int) -> None:
            obstore.put(store, f"raw/{number}", bodies[number], use_multipart=False)

        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            list(pool.map(put, range(len(bodies))))

    return puts


@cache
def _store_at(endpoint_url: str) -> S3Store:
    from obstore.store import S3Store

    trusted = os.environ.get("AWS_CA_BUNDLE")
    return S3Store(
        _BUCKET,
        endpoint=endpoint_url,
        access_key_id="bench",
        secret_access_key="bench",
        region="us-east-1",
        unsigned_payload=True,
        client_options={
            "allow_http": True,
            **({"root_certificate": Path(trusted).read_bytes()} if trusted else {}),
        },
    )


def _ranges(size_bytes: int) -> list[tuple[int, int, int]]:
    """Return number, start and stop of all ranges of the bodies of a state."""
    return [
        (number, start, min(start + _READ_BYTES, stop))
        for number, first in enumerate(range(0, size_bytes, _SHARD_BYTES))
        for stop in [min(_SHARD_BYTES, size_bytes - first)]
        for start in range(0, stop, _READ_BYTES)
    ]


def _obstore_reads(size_bytes: int) -> _Way:
    import obstore

    def gets(place: Place) -> None:
        store = _store_at(place.storage_options["endpoint_url"])

        def get(one: tuple[int, int, int]) -> int:
            return len(obstore.get_range(store, f"raw/{one[0]}", start=one[1], end=one[2]))

        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            assert sum(pool.map(get, _ranges(size_bytes))) == size_bytes

    return gets


def _s3fs_reads(size_bytes: int) -> _Way:
    import fsspec
    import s3fs

    def gets(place: Place) -> None:
        files = s3fs.S3FileSystem(**place.storage_options)

        async def all_of_them() -> None:
            turn = asyncio.Semaphore(_CONCURRENCY)

            async def get(number: int, start: int, stop: int) -> None:
                async with turn:
                    await files._cat_file(f"{_BUCKET}/raw/{number}", start=start, end=stop)  # noqa: SLF001

            await asyncio.gather(*(get(*one) for one in _ranges(size_bytes)))

        fsspec.asyn.sync(files.loop, all_of_them)

    return gets


def _disk_reads(size_bytes: int) -> _Way:
    cores = len(os.sched_getaffinity(0))
    memory = memoryview(bytearray(size_bytes))
    for at in range(0, size_bytes, 4096):
        memory[at] = 1

    def reads(place: Place) -> None:
        descriptor = os.open(f"{place.url}.dd", os.O_RDONLY)

        def read(start: int) -> None:
            stop = min(start + _READ_BYTES, size_bytes)
            while start < stop:
                start += os.preadv(descriptor, [memory[start:stop]], start)

        try:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(read, range(0, size_bytes, _READ_BYTES)))
        finally:
            os.close(descriptor)

    return reads


def _raw_s3fs(state: State) -> _Way:
    import fsspec
    import s3fs

    bodies = [b"".join(body) for body in _bodies(state)]
    unsigned = {"s3": {"payload_signing_enabled": False}, "request_checksum_calculation": "when_required"}

    def puts(place: Place) -> None:
        files = s3fs.S3FileSystem(**place.storage_options, config_kwargs=unsigned)

        async def all_of_them() -> None:
            turn = asyncio.Semaphore(_CONCURRENCY)

            async def put(number: int) -> None:
                async with turn:
                    await files._call_s3(  # noqa: SLF001 (its public calls cut a body into parts)
                        "put_object", Bucket=_BUCKET, Key=f"raw/{number}", Body=bodies[number]
                    )

            await asyncio.gather(*map(put, range(len(bodies))))

        fsspec.asyn.sync(files.loop, all_of_them)

    return puts


def _dd(state: State) -> _Way:
    bodies = _bodies(state)

    def written(place: Place) -> None:
        descriptor = os.open(f"{place.url}.dd", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for view in itertools.chain.from_iterable(bodies):
                for start in range(0, len(view), _WRITE_BYTES):
                    os.write(descriptor, view[start : start + _WRITE_BYTES])
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    return written


_READS: Mapping[str, Callable[[int], _Way]] = {
    "raw-obstore": _obstore_reads,
    "raw-s3fs": _s3fs_reads,
    "dd": _disk_reads,
}
_LIMITS: Mapping[str, Callable[[State], _Way]] = {"raw-obstore": _raw_obstore, "raw-s3fs": _raw_s3fs, "dd": _dd}


if __name__ == "__main__":
    raise SystemExit(main())
