"""Turn one save or one load by one peer into numbers, in a process of its own.

    parent: measure(spec) ──▶ child: build state ─▶ warm up ─▶ baseline ─▶ save or load ─▶ verify ─▶ JSON on stdout

A fresh process per number: no peer inherits another's imports, allocator, connections or peak. What a first call
costs for good (imports, lookup of credentials) is paid in the warm-up, by all peers alike. A load whose state is not
bit for bit the saved one raises: a peer that does not restore is no number.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.sink.process import SinkClient

__all__ = ["MARK", "Measurement", "MeasurementError", "Spec", "measure", "report_of_child"]

T = TypeVar("T")

_REPOSITORY = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 900.0
_WARM_UP_BYTES = 1 << 20
MARK = "MEASUREMENT "
_HIGH_WATER = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB", re.MULTILINE)


class MeasurementError(RuntimeError):
    """The child failed; its last words are the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to measure.

    Attributes:
        peer: a name in `PEERS`.
        op: `save` or `load`; a load needs an earlier save to the same URL.
        stats_url: the sink's endpoint, where the target is one; its requests are counted then.
        is_cold: drop a local checkpoint from the page cache before it is loaded.
    """

    peer: str
    op: str
    url: str
    size_bytes: int
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""
    is_cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one save or load took, of the client alone.

    Attributes:
        state_bytes: bytes of tensors saved or restored.
        cpu_s: user and system time of the whole process.
        extra_bytes: peak resident memory above what was resident with the state built.
        others: share of the machine's processors that neither the client nor the sink used, but somebody did.
        requests: operation → count, where the target tells.
    """

    state_bytes: int
    wall_s: float
    cpu_s: float
    extra_bytes: int
    others: float = 0.0
    requests: Mapping[str, int] | None = None

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""
        return self.state_bytes / 1e9 / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds per 10^9 bytes."""
        return self.cpu_s / (self.state_bytes / 1e9)


def measure(spec: Spec) -> Measurement:
    """Run one measurement in a fresh child process.

    Raises:
        MeasurementError: the peer failed, did not restore what was saved, or took too long.
    """
    return Measurement(**report_of_child("benchmarks.one_process.measure", asdict(spec), f"{spec.peer} {spec.op}"))


def report_of_child(module: str, spec: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Run a module on a specification in a fresh process; return the JSON behind the last `MARK` that it prints.

    Raises:
        MeasurementError: it failed or took too long; `what` says in the message what was measured.
    """
    command = [sys.executable, "-m", module, json.dumps(spec)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        done = subprocess.run(
            command, cwd=_REPOSITORY, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise MeasurementError(f"{what} took longer than {_TIMEOUT_S:.0f} s") from exc
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        last_words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"{what}: {last_words}")
    report: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    return report


def _measure_here(spec: Spec) -> Measurement:
    from benchmarks.one_process.peers import PEERS, Place
    from benchmarks.shared.states import blank, differences, gpt, size_of

    peer = PEERS[spec.peer]
    place = Place(url=spec.url, storage_options=spec.storage_options)
    small = replace(place, url=f"{spec.url}-warm-up-{spec.op}")
    peer.save(gpt(_WARM_UP_BYTES), small)
    if spec.op == "save":
        state = gpt(spec.size_bytes)
        found, _ = _timed(spec, lambda: peer.save(state, place))
    else:
        peer.load(blank(_WARM_UP_BYTES), small)
        state = blank(spec.size_bytes)
        found, restored = _timed(spec, lambda: peer.load(state, place))
        wrong = differences(restored, spec.size_bytes)
        if wrong:
            raise MeasurementError(f"{len(wrong)} tensors were not restored, for example {wrong[0]}")
    return replace(found, state_bytes=size_of(spec.size_bytes))


def _timed(spec: Spec, action: Callable[[], T]) -> tuple[Measurement, T]:
    """Do `action` once, between two readings of everything."""
    sink = SinkClient(spec.stats_url) if spec.stats_url else None
    _settle(spec)
    if sink:
        sink.reset()
    idle = sink.stats() if sink else None
    baseline = _reset_peak()
    before = _read_clocks()
    result = action()
    after = _read_clocks()
    peak = _peak_bytes()
    stats = sink.stats() if sink else None
    sink_cpu_s = stats.cpu_s - idle.cpu_s if stats and idle else 0.0
    wall_s, cpu_s, machine_cpu_s = (late - early for early, late in zip(before, after, strict=True))
    found = Measurement(
        state_bytes=0,
        wall_s=wall_s,
        cpu_s=cpu_s,
        extra_bytes=max(0, peak - baseline),
        others=max(0.0, machine_cpu_s - cpu_s - sink_cpu_s) / wall_s / (os.cpu_count() or 1),
        requests=stats.requests if stats else None,
    )
    return found, result


def _read_clocks() -> tuple[float, float, float]:
    """Wall time, this process's processor time, and the whole machine's, in seconds."""
    return time.perf_counter(), _cpu_s(), _machine_cpu_s()


def _machine_cpu_s() -> float:
    """Processor seconds that the whole machine has worked; 0 where it does not tell."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _settle(spec: Spec) -> None:
    """Leave nothing half done that the measured call would pay for: garbage, or dirty pages of others."""
    gc.collect()
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


def _reset_peak() -> int:
    """Make the kernel forget the peak so far; return what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()  # without it, only growth above the old peak shows
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(name: str) -> int:
    try:
        fields = dict(_HIGH_WATER.findall(Path("/proc/self/status").read_text()))
    except OSError:
        return 0
    return int(fields.get(name, 0)) * 1024


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    # DCP remarks on every single-process save.
    warnings.filterwarnings("ignore", message="torch.distributed is")
    print(MARK + json.dumps(asdict(_measure_here(Spec(**json.loads(sys.argv[1]))))))
