"""Turn one save or one load by one peer on all ranks into numbers; every rank is a fresh process.

    parent: run_ranks(spec) ─▶ N children in one gloo group, each: state ─▶ warm up ─▶ barrier ─▶ save or load ─▶
                               barrier ─▶ verify ─▶ JSON on stdout ─▶ parent: one RankMeasurement

The wall time runs from the first rank that leaves the barrier before to the last that leaves the one after. Ranks run
as `torchrun` starts them: one OpenMP thread each. Each value of the state is its own number, so that any rank knows
what belongs into its part without a copy of it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.many_ranks.peers import RANK_PEERS, RankPeer
from benchmarks.one_process.measure import Measurement, MeasurementError, _peak_bytes, _read_clocks, _reset_peak
from benchmarks.one_process.peers import Place
from benchmarks.shared.states import State, shapes_of
from benchmarks.sink.process import SinkClient

__all__ = [
    "LAYOUTS",
    "RankMeasurement",
    "RankSpec",
    "Saves",
    "bytes_of",
    "count_saves",
    "measure_ranks",
    "phases_of",
    "tiny_shapes",
]

LAYOUTS = ("fsdp", "ddp")

_REPOSITORY = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 900.0
_GRACE_S = 5.0
_POLL_S = 0.05
_GROUP_TIMEOUT = timedelta(seconds=300)
_WARM_UP_BYTES = 1 << 20
_MARK = "RANK "
_BITS = 1 << 30
_TINY_TENSORS = 300
_TINY_SHAPE = (64, 16)

Shapes = Mapping[str, tuple[int, ...]]
Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What to measure.

    Attributes:
        peer: a name in `RANK_PEERS`.
        op: `save`, `load` (which needs an earlier save to the same URL), or `overhead`: saves of a tiny state.
        layout: `fsdp`: dim-0 DTensors as FSDP2 has them; `ddp`: the whole state in every rank.
        size_bytes: of the whole state, about; without meaning for `overhead`.
        saves: how many in a row, for `overhead`.
        stats_url: the sink's endpoint, where the target is one.
    """

    peer: str
    op: str
    layout: str
    url: str
    ranks: int
    size_bytes: int = 0
    saves: int = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeasurement(Measurement):
    """What one save or load took on all ranks.

    `state_bytes` are those of the checkpoint, `cpu_s` is the sum over all ranks, `extra_bytes` the most of any rank.

    Attributes:
        moved_bytes: what the sink received (save) or sent (load), where the target is one.
    """

    moved_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    """Saves of a tiny state in a row, by the same processes.

    Attributes:
        wall_s: of each save, barrier to barrier.
        phases: what the peer itself told of each save: name → seconds.
        requests: of all saves but the first, per save; None where nobody counts.
    """

    wall_s: Sequence[float]
    phases: Sequence[Mapping[str, float]]
    requests: float | None


def measure_ranks(spec: RankSpec) -> RankMeasurement:
    """Measure one save or load.

    Raises:
        MeasurementError: a rank failed, did not restore what was saved, or took too long.
    """
    reports = _run(spec)
    sink = next((report["sink"] for report in reports if report["sink"]), None)
    wall_s = max(report["end_s"] for report in reports) - min(report["begin_s"] for report in reports)
    cpu_s = sum(report["cpu_s"] for report in reports)
    strangers_s = reports[0]["machine_cpu_s"] - cpu_s - (sink["cpu_s"] if sink else 0.0)
    return RankMeasurement(
        state_bytes=bytes_of(shapes_of(spec.size_bytes)),
        wall_s=wall_s,
        cpu_s=cpu_s,
        extra_bytes=max(report["extra_bytes"] for report in reports),
        others=max(0.0, strangers_s) / wall_s / (os.cpu_count() or 1),
        requests=sink["requests"] if sink else None,
        moved_bytes=sink["moved_bytes"] if sink else None,
    )


def count_saves(spec: RankSpec) -> Saves:
    """Save a tiny state `spec.saves` times; raises as `measure_ranks`."""
    reports = _run(spec)
    begins = [min(of_ranks) for of_ranks in zip(*(report["begins_s"] for report in reports), strict=True)]
    ends = [max(of_ranks) for of_ranks in zip(*(report["ends_s"] for report in reports), strict=True)]
    walls = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return Saves(wall_s=walls, phases=reports[0]["phases"], requests=reports[0]["requests"])


def tiny_shapes() -> Shapes:
    """Return names and shapes of a model whose bytes cost nothing: what is left is the price of a save."""
    return {f"layer.{n}.weight": _TINY_SHAPE for n in range(_TINY_TENSORS)}


def bytes_of(shapes: Shapes) -> int:
    """Return the bytes of all tensors, fp32."""
    return sum(math.prod(shape) for shape in shapes.values()) * 4


# ---- the parent -----------------------------------------------------------------------------------------------------


def _run(spec: RankSpec) -> list[Report]:
    """Run the ranks; return what each reported, in order."""
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as logs:
        port = listener.getsockname()[1]
        # The store listens on a socket of ours: its own would listen on every interface.
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        processes = [_start(spec, rank, port, Path(logs)) for rank in range(spec.ranks)]
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        del store
        if failed is not None:
            raise MeasurementError(f"{spec.peer} {spec.op}: {_last_words(Path(logs), failed)}")
        return [_report(Path(logs), rank) for rank in range(spec.ranks)]


def _start(spec: RankSpec, rank: int, port: int, logs: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(spec.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "benchmarks.many_ranks.process", json.dumps(asdict(spec))]
    with (logs / f"{rank}.out").open("wb") as out, (logs / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(command, cwd=_REPOSITORY, env=environment, stdout=out, stderr=err)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all ranks; return the first that failed, or that did not end in time."""
    stop_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < stop_s:
        statuses = [process.poll() for process in processes]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None:
            # The others wait for it in a collective; those that failed by themselves may still say why.
            time.sleep(_GRACE_S if None in statuses else 0.0)
            return failed
        if None not in statuses:
            return None
        time.sleep(_POLL_S)
    return next(rank for rank, process in enumerate(processes) if process.poll() is None)


def _last_words(logs: Path, rank: int) -> str:
    lines = (logs / f"{rank}.err").read_text().strip().splitlines()
    return f"rank {rank}: {lines[-1] if lines else f'no message within {_TIMEOUT_S:.0f} s'}"


def _report(logs: Path, rank: int) -> Report:
    lines = [line for line in (logs / f"{rank}.out").read_text().splitlines() if line.startswith(_MARK)]
    if not lines:
        raise MeasurementError(f"rank {rank} ended without a report")
    found: Report = json.loads(lines[-1].removeprefix(_MARK))
    return found


# ---- one rank -------------------------------------------------------------------------------------------------------


def _rank_main(spec: RankSpec) -> Report:
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=_GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=spec.ranks, timeout=_GROUP_TIMEOUT)
    try:
        return _save_often(spec) if spec.op == "overhead" else _measure_here(spec)
    finally:
        dist.destroy_process_group()


def _measure_here(spec: RankSpec) -> Report:
    small, shapes = shapes_of(_WARM_UP_BYTES), shapes_of(spec.size_bytes)
    with _opened(spec, f"-warm-up-{spec.op}") as warm, _opened(spec) as peer:
        warm.save(_state(small, spec.layout), 0)
        if spec.op == "save":
            state = _state(shapes, spec.layout)
            return _timed(spec, lambda: peer.save(state, 0))
        warm.load(_state(small, spec.layout, is_blank=True), 0)
        state = _state(shapes, spec.layout, is_blank=True)
        report = _timed(spec, lambda: peer.load(state, 0))
    wrong = _differences(state, shapes, spec.layout)
    if wrong:
        raise MeasurementError(f"{len(wrong)} tensors were not restored, for example {wrong[0]}")
    return report


@contextmanager
def _opened(spec: RankSpec, suffix: str = "") -> Iterator[RankPeer]:
    place = Place(url=f"{spec.url}{suffix}", storage_options=spec.storage_options)
    with closing(RANK_PEERS[spec.peer].open(place)) as peer:
        yield peer


def _timed(spec: RankSpec, action: Callable[[], object]) -> Report:
    """Do `action` on all ranks at once, between two readings of everything."""
    sink = SinkClient(spec.stats_url) if spec.stats_url and dist.get_rank() == 0 else None
    gc.collect()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()  # the warm-up of every rank is over
    if sink:
        sink.reset()
    idle = sink.stats() if sink else None
    baseline = _reset_peak()
    dist.barrier()
    before = _read_clocks()
    action()
    dist.barrier()
    after = _read_clocks()
    peak = _peak_bytes()
    found = sink.stats() if sink else None
    told = None
    if found and idle:
        moved = found.received_bytes if spec.op == "save" else found.sent_bytes
        told = {"requests": found.requests, "moved_bytes": moved, "cpu_s": found.cpu_s - idle.cpu_s}
    return {
        "begin_s": before[0],
        "end_s": after[0],
        "cpu_s": after[1] - before[1],
        "machine_cpu_s": after[2] - before[2],
        "extra_bytes": max(0, peak - baseline),
        "sink": told,
    }


def _save_often(spec: RankSpec) -> Report:
    """Save a tiny state again and again; nothing is warmed up, so that the first save is a job's first."""
    state = _state(tiny_shapes(), spec.layout)
    sink = SinkClient(spec.stats_url) if spec.stats_url and dist.get_rank() == 0 else None
    report: Report = {"begins_s": [], "ends_s": [], "phases": [], "requests": None}
    with _opened(spec) as peer:
        for step in range(spec.saves):
            if sink and step == 1:
                sink.reset()
            dist.barrier()
            report["begins_s"].append(time.perf_counter())
            summary = peer.save(state, step)
            dist.barrier()
            report["ends_s"].append(time.perf_counter())
            report["phases"].append(phases_of(summary))
        if sink:
            report["requests"] = sum(sink.stats().requests.values()) / (spec.saves - 1)
    return report


def phases_of(summary: Mapping[str, float]) -> dict[str, float]:
    """Return what is in seconds, and no rate."""
    return {name: value for name, value in summary.items() if name.endswith("_s") and not name.endswith("_per_s")}


# ---- the state ------------------------------------------------------------------------------------------------------


def _state(shapes: Shapes, layout: str, *, is_blank: bool = False) -> State:
    """Build this rank's part of the state, every page touched; a blank one has every value wrong."""
    state: State = {}
    at = 0
    for name, shape in shapes.items():
        rows = _rows(shape[0], layout)
        local = torch.empty((len(rows), *shape[1:]))
        local.view(torch.int32).view(-1).copy_(_bits(at, shape, rows))
        if is_blank:
            local.view(torch.int32).bitwise_not_()
        state[name] = local if layout == "ddp" else _sharded(local, shape)
        at += math.prod(shape)
    return state


def _differences(state: State, shapes: Shapes, layout: str) -> list[str]:
    """Name the tensors whose part in this rank is not, bit for bit, what `_state` builds."""
    wrong, at = [], 0
    for name, shape in shapes.items():
        tensor: Any = state[name]
        local = tensor if layout == "ddp" else tensor.to_local()
        if not torch.equal(local.view(torch.int32).view(-1), _bits(at, shape, _rows(shape[0], layout))):
            wrong.append(name)
        at += math.prod(shape)
    return wrong


def _rows(count: int, layout: str) -> range:
    """Return the rows that this rank holds; FSDP2 cuts as `torch.chunk` does, so the last part may be shorter."""
    if layout == "ddp":
        return range(count)
    step = -(-count // dist.get_world_size())
    return range(count)[dist.get_rank() * step : (dist.get_rank() + 1) * step]


def _bits(at: int, shape: tuple[int, ...], rows: range) -> torch.Tensor:
    """Return the values of some rows as int32: each is its place in the whole state."""
    row_values = math.prod(shape[1:])
    first = at % _BITS + rows.start * row_values
    return torch.arange(first, first + len(rows) * row_values, dtype=torch.int32)


def _sharded(local: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, _mesh(), [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


@cache
def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


if __name__ == "__main__":
    # DCP's storage classes and DTensor remark on their own internals.
    warnings.filterwarnings("ignore")
    print(_MARK + json.dumps(_rank_main(RankSpec(**json.loads(sys.argv[1])))), flush=True)
