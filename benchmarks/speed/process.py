"""Turn one save or one load by one peer into numbers, on one rank or several, each in a fresh process.

    parent: measure(spec) ──▶ processes, of one gloo group if there are several, each: state ─▶ warm up ─▶ baseline ─▶
                              save or load ─▶ verify ─▶ JSON on stdout ─▶ parent: one Measurement

What a first call costs for good (imports, lookup of credentials) is paid in the warm-up, by all peers alike. On several
ranks the wall time runs from the first that leaves a barrier before to the last that leaves one after. A load whose
state is not bit for bit the saved one raises: a peer that does not restore is no number.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.shared.child import MARK, MeasurementError, report_of_child, reports_of_ranks
from benchmarks.shared.clocks import peak_bytes, read_clocks, reset_peak
from benchmarks.sink.process import SinkClient

__all__ = ["Measurement", "MeasurementError", "Saves", "Spec", "count_saves", "measure", "phases_of", "tiny_shapes"]

T = TypeVar("T")

_MODULE = "benchmarks.speed.process"
_GROUP_TIMEOUT = timedelta(seconds=300)
_WARM_UP_BYTES = 1 << 20
_TINY_TENSORS = 300
_TINY_SHAPE = (64, 16)

Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to measure.

    Attributes:
        peer: a name in `PEERS`.
        op: `save`, `load` (which needs an earlier save to the same URL), or `overhead`: saves of a tiny state.
        state: a name in `STATES`.
        size_bytes: of the whole state, about; without meaning for `overhead`.
        ranks: that save or load together.
        layout: of several ranks, a name in `LAYOUTS`.
        saves: how many in a row, for `overhead`.
        stats_url: the sink's endpoint, where the target is one; its requests and bytes are counted then.
        environment: variables of the processes.
        is_cold: drop a local checkpoint from the page cache before it is loaded.
    """

    peer: str
    op: str
    url: str
    state: str = "adamw"
    size_bytes: int = 0
    ranks: int = 1
    layout: str = "fsdp"
    saves: int = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one save or load took, of the clients alone.

    Attributes:
        state_bytes: of the tensors saved or restored, each counted once, whatever each rank holds.
        cpu_s: user and system time of all ranks.
        extra_bytes: peak resident memory above what was resident with the state built; the most of any rank.
        others: share of the machine's processors that neither the clients nor the sink used, but somebody did.
        requests: operation → count, where the target tells.
        received_bytes: what the target was sent, where it tells.
        sent_bytes: what the target sent, where it tells.
    """

    state_bytes: int
    wall_s: float
    cpu_s: float
    extra_bytes: int
    others: float = 0.0
    requests: Mapping[str, int] | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""
        return self.state_bytes / 1e9 / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds per 10^9 bytes."""
        return self.cpu_s / (self.state_bytes / 1e9)

    @property
    def moved_bytes(self) -> int | None:
        """What went over the wire, both ways, where the target tells."""
        if self.received_bytes is None or self.sent_bytes is None:
            return None
        return self.received_bytes + self.sent_bytes


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


def measure(spec: Spec) -> Measurement:
    """Measure one save or load.

    Raises:
        MeasurementError: the peer failed, did not restore what was saved, or took too long.
    """
    reports = _reports(spec)
    told = next((report["sink"] for report in reports if report["sink"]), None)
    wall_s = max(report["end_s"] for report in reports) - min(report["begin_s"] for report in reports)
    cpu_s = sum(report["cpu_s"] for report in reports)
    strangers_s = reports[0]["machine_cpu_s"] - cpu_s - (told["cpu_s"] if told else 0.0)
    return Measurement(
        state_bytes=reports[0]["state_bytes"],
        wall_s=wall_s,
        cpu_s=cpu_s,
        extra_bytes=max(report["extra_bytes"] for report in reports),
        others=max(0.0, strangers_s) / wall_s / (os.cpu_count() or 1),
        requests=told["requests"] if told else None,
        received_bytes=told["received_bytes"] if told else None,
        sent_bytes=told["sent_bytes"] if told else None,
    )


def count_saves(spec: Spec) -> Saves:
    """Save a tiny state `spec.saves` times; raises as `measure`."""
    reports = _reports(spec)
    begins = [min(of_ranks) for of_ranks in zip(*(report["begins_s"] for report in reports), strict=True)]
    ends = [max(of_ranks) for of_ranks in zip(*(report["ends_s"] for report in reports), strict=True)]
    walls = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return Saves(wall_s=walls, phases=reports[0]["phases"], requests=reports[0]["requests"])


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model whose bytes cost nothing: what is left is the price of a save."""
    return {f"layer.{n}.weight": _TINY_SHAPE for n in range(_TINY_TENSORS)}


def _reports(spec: Spec) -> list[Report]:
    what = f"{spec.peer} {spec.op}"
    if spec.ranks == 1:
        return [report_of_child(_MODULE, asdict(spec), what, environment=spec.environment)]
    return reports_of_ranks(_MODULE, asdict(spec), what, ranks=spec.ranks, environment=spec.environment)


# ---- one rank -------------------------------------------------------------------------------------------------------


def _run_rank(spec: Spec) -> Report:
    if spec.ranks == 1:
        return _save_often(spec) if spec.op == "overhead" else _measure_here(spec)
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=_GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=spec.ranks, timeout=_GROUP_TIMEOUT)
    try:
        return _save_often(spec) if spec.op == "overhead" else _measure_here(spec)
    finally:
        dist.destroy_process_group()


def _measure_here(spec: Spec) -> Report:
    from benchmarks.shared.states import STATES, blank, build, bytes_of, differences

    kind, layout = STATES[spec.state], _layout(spec)
    small, shapes = STATES["gpt"].shapes(_WARM_UP_BYTES), kind.shapes(spec.size_bytes)
    with _opened(spec, f"-warm-up-{spec.op}") as warm, _opened(spec) as peer:
        warm.save(build(small, layout), 0)
        if spec.op == "save":
            state = build(shapes, layout)
            report, _ = _timed(spec, lambda: peer.save(state, 0))
        else:
            warm.load(blank(small, layout), 0)
            state = blank(shapes, layout)
            report, restored = _timed(spec, lambda: peer.load(state, 0))
            wrong = differences(restored, shapes, layout)
            if wrong:
                raise MeasurementError(f"{len(wrong)} tensors were not restored, for example {wrong[0]}")
    return {**report, "state_bytes": bytes_of(shapes)}


def _layout(spec: Spec) -> Any:
    return spec.layout if spec.ranks > 1 else "ddp"


@contextmanager
def _opened(spec: Spec, suffix: str = "") -> Iterator[Any]:
    from benchmarks.peers import PEERS, Place

    place = Place(url=f"{spec.url}{suffix}", storage_options=spec.storage_options)
    with closing(PEERS[spec.peer].open(place)) as peer:
        yield peer


def _timed(spec: Spec, action: Callable[[], T]) -> tuple[Report, T]:
    """Do `action` on all ranks at once, between two readings of everything."""
    sink = _sink(spec)
    _settle(spec)
    _barrier(spec)  # the warm-up of every rank is over
    if sink:
        sink.reset()
    idle = sink.stats() if sink else None
    baseline = reset_peak()
    _barrier(spec)
    before = read_clocks()
    result = action()
    _barrier(spec)
    after = read_clocks()
    peak = peak_bytes()
    found = sink.stats() if sink else None
    told = None
    if found and idle:
        told = {**asdict(found), "cpu_s": found.cpu_s - idle.cpu_s}
    report = {
        "begin_s": before[0],
        "end_s": after[0],
        "cpu_s": after[1] - before[1],
        "machine_cpu_s": after[2] - before[2],
        "extra_bytes": max(0, peak - baseline),
        "sink": told,
    }
    return report, result


def _sink(spec: Spec) -> SinkClient | None:
    """Return the counters for rank 0, which asks for all."""
    return SinkClient(spec.stats_url) if spec.stats_url and os.environ.get("RANK", "0") == "0" else None


def _barrier(spec: Spec) -> None:
    if spec.ranks > 1:
        import torch.distributed as dist

        dist.barrier()


def _settle(spec: Spec) -> None:
    """Leave nothing half done that the measured call would pay for: garbage, or dirty pages of others."""
    gc.collect()
    if os.environ.get("RANK", "0") == "0":
        os.sync()
    if spec.is_cold and "://" not in spec.url:
        for path in Path(spec.url).rglob("*"):
            if path.is_file():
                _forget_pages(path)


def _forget_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _save_often(spec: Spec) -> Report:
    """Save a tiny state again and again; nothing is warmed up, so that the first save is a job's first."""
    from benchmarks.shared.states import build

    state = build(tiny_shapes(), _layout(spec))
    sink = _sink(spec)
    report: Report = {"begins_s": [], "ends_s": [], "phases": [], "requests": None}
    with _opened(spec) as peer:
        for step in range(spec.saves):
            if sink and step == 1:
                sink.reset()
            _barrier(spec)
            report["begins_s"].append(time.perf_counter())
            summary = peer.save(state, step)
            _barrier(spec)
            report["ends_s"].append(time.perf_counter())
            report["phases"].append(phases_of(summary))
        if sink:
            report["requests"] = sum(sink.stats().requests.values()) / max(1, spec.saves - 1)
    return report


def phases_of(summary: Mapping[str, float]) -> dict[str, float]:
    """Return what is in seconds, and no rate."""
    return {name: value for name, value in summary.items() if name.endswith("_s") and not name.endswith("_per_s")}


if __name__ == "__main__":
    # DCP's storage classes and DTensor remark on their own internals.
    warnings.filterwarnings("ignore")
    print(MARK + json.dumps(_run_rank(Spec(**json.loads(sys.argv[1])))), flush=True)
