"""Turn one peer's background saves into numbers, in a process of its own.

    parent: measure_async(spec) ──▶ child: state ─▶ warm up ─▶ idle ─▶ prepare ─▶ saves ─▶ load back ─▶ JSON on stdout

Three parts: `blocked` (how long the caller waits, beside a plain copy in the same process), `lost` (what a training
loop loses meanwhile), `memory` (peaks). In each the last checkpoint is loaded back and compared, bit for bit; in
`blocked` the state is overwritten as soon as the peer allows it, so a peer that allows it too early is no number.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.background.peers import ASYNC_PEERS, AsyncPeer, Pending
from benchmarks.background.training import Trainer
from benchmarks.background.yardstick import opened_yardstick
from benchmarks.peers import Place
from benchmarks.shared.child import MARK, MeasurementError, report_of_child
from benchmarks.shared.clocks import peak_bytes, read_clocks, reset_peak
from benchmarks.shared.states import STATES, Shapes, State, build, bytes_of, differences
from benchmarks.sink.process import SinkClient

__all__ = ["AsyncSpec", "Blocked", "Lost", "Memory", "Outcome", "Save", "measure_async"]

_WARM_UP_BYTES = 1 << 20
_TIMEOUT_S = 600.0
# An ample budget: nothing that a peer holds beside the state reaches it.
_AMPLE = 2
_LEAST_AMPLE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncSpec:
    """What to measure.

    Attributes:
        part: `blocked`, `lost` or `memory`.
        peer: a name in `ASYNC_PEERS`.
        saves: how many in a row, each begun when the one before is done.
        budget_bytes: memory that a save may take, for peers that know such a limit; 0 is ample.
        device: where the state lies.
        ready_s: for `blocked`: the pause between `prepare` and the first save.
        idle_steps: for `lost`: training steps without a save, before each save.
        width: for `lost`: of the network that trains.
        threads: of that network; 0 for torch's own choice.
        stats_url: the sink's endpoint, where the target is one.
        environment: variables by which the process finds the target.
        is_drained: for `lost`: whether the sink takes in the measured saves without a copy, and keeps none of them.
    """

    part: str
    peer: str
    url: str
    size_bytes: int
    saves: int
    budget_bytes: int = 0
    device: str = "cpu"
    ready_s: float = 0.0
    idle_steps: int = 60
    width: int = 1024
    threads: int = 0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_drained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save beside the training loop.

    Attributes:
        blocked_s: until the loop went on.
        total_s: until the save was done.
        steps_s: of each step that began before it was done.
        idle_s: of each step before it, without a save.
        copy_s: for `blocked`: of one plain copy of the state, just before the save.
        sink_s: processor seconds that the sink took for the save, of the same cores.
    """

    blocked_s: float
    total_s: float
    steps_s: Sequence[float] = ()
    idle_s: Sequence[float] = ()
    copy_s: float = 0.0
    sink_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What every part tells.

    Attributes:
        others: share of the processors that neither the client nor the sink used, but somebody did.
    """

    state_bytes: int
    saves: Sequence[Save] = ()
    others: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked(Outcome):
    """How long the caller waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Outcome):
    """What training lost; `prepare_s` are the steps while the peer made ready, if it did, behind `prepare` itself."""

    prepare_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Outcome):
    """Peaks of resident memory above what was resident with the state built, after each save, in bytes."""

    peaks_bytes: Sequence[int]
    budget_bytes: int = 0


def _shapes(size_bytes: int) -> Shapes:
    return STATES["gpt"].shapes(size_bytes)


def measure_async(spec: AsyncSpec) -> Outcome:
    """Run one measurement in a fresh child process.

    Raises:
        MeasurementError: the peer failed, did not save what the state was at the call, or took too long.
    """
    report = report_of_child(
        "benchmarks.background.process",
        asdict(spec),
        f"{spec.peer} {spec.part}",
        environment=spec.environment,
    )
    saves = [Save(**save) for save in report.pop("saves")]
    return _PARTS[spec.part][0](**report, saves=saves)


# ---- the measured process -------------------------------------------------------------------------------------------


def _measure_here(spec: AsyncSpec) -> dict[str, Any]:
    _warm_up(spec)
    state = _state(spec)
    found = _PARTS[spec.part][1](spec, state)
    return {**found, "state_bytes": bytes_of(_shapes(spec.size_bytes))}


def _state(spec: AsyncSpec) -> State:
    return {name: tensor.to(spec.device) for name, tensor in build(_shapes(spec.size_bytes)).items()}


def _warm_up(spec: AsyncSpec) -> None:
    """Pay for imports and first connections, at a place and with a peer that are not used again."""
    with _opened(spec, "-warm-up") as peer:
        peer.save(0, build(_shapes(_WARM_UP_BYTES))).result(_TIMEOUT_S)


@contextmanager
def _opened(spec: AsyncSpec, suffix: str = "") -> Iterator[AsyncPeer]:
    place = Place(url=f"{spec.url}{suffix}", storage_options=spec.storage_options)
    budget_bytes = spec.budget_bytes or max(_AMPLE * bytes_of(_shapes(spec.size_bytes)), _LEAST_AMPLE_BYTES)
    with closing(ASYNC_PEERS[spec.peer].open(place, budget_bytes)) as peer:
        yield peer


def _blocked(spec: AsyncSpec, state: State) -> dict[str, Any]:
    with opened_yardstick(state) as copy_s, _opened(spec) as peer:
        others = _watch(spec)
        if ASYNC_PEERS[spec.peer].does_prepare:
            peer.prepare(state)
            time.sleep(spec.ready_s)
        saves = []
        for step in range(1, spec.saves + 1):
            # A full collection takes 0.2 s with torch and botocore loaded; what a peer opened brings one about, once.
            gc.collect()
            now_s = copy_s()
            then = _overwrite if step == spec.saves else _keep
            saves.append({**_save_blocked(peer, step, state, then=then), "copy_s": now_s})
        others.stop()
        _check(peer, spec, state)
    return {"saves": saves, "others": others.share}


def _save_blocked(peer: AsyncPeer, step: int, state: State, *, then: Callable[[State], None]) -> dict[str, float]:
    begin_s = time.perf_counter()
    pending = peer.save(step, state)
    blocked_s = time.perf_counter() - begin_s
    then(state)
    pending.result(_TIMEOUT_S)
    return {"blocked_s": blocked_s, "total_s": time.perf_counter() - begin_s}


def _lost(spec: AsyncSpec, state: State) -> dict[str, Any]:
    trainer = Trainer(spec.width, threads=spec.threads)
    with _opened(spec) as peer:
        others = _watch(spec)
        prepare_s = _prepare_beside(trainer, peer, spec, state)
        with SinkClient(spec.stats_url).drained() if spec.is_drained else nullcontext():
            saves = [_save_beside(trainer, peer, step, spec, state) for step in range(1, spec.saves + 1)]
        others.stop()
        if not spec.is_drained:
            _check(peer, spec, state)
    if spec.is_drained:
        _check_another(spec, state)
    return {"saves": saves, "prepare_s": prepare_s, "others": others.share}


def _check_another(spec: AsyncSpec, state: State) -> None:
    """Save once more, where all is kept, and check that."""
    SinkClient(spec.stats_url).clear()
    with _opened(spec, "-kept") as peer:
        peer.save(spec.saves, state).result(_TIMEOUT_S)
        _check(peer, spec, state)


def _prepare_beside(trainer: Trainer, peer: AsyncPeer, spec: AsyncSpec, state: State) -> list[float]:
    if not ASYNC_PEERS[spec.peer].does_prepare:
        return []
    begin_s = time.perf_counter()
    peer.prepare(state)
    call_s = time.perf_counter() - begin_s
    steps_s = trainer.steps_s(spec.idle_steps)
    # The call itself delays the step after it.
    return [call_s + steps_s[0], *steps_s[1:]]


def _save_beside(trainer: Trainer, peer: AsyncPeer, step: int, spec: AsyncSpec, state: State) -> dict[str, Any]:
    idle_s = trainer.steps_s(spec.idle_steps)
    sink_s = _sink_cpu_s(spec)
    begin_s = time.perf_counter()
    pending = peer.save(step, state)
    blocked_s = time.perf_counter() - begin_s
    steps_s = list(_steps_until_done(trainer, pending, begin_s))
    total_s = time.perf_counter() - begin_s
    pending.result(_TIMEOUT_S)
    sink_s = _sink_cpu_s(spec) - sink_s
    return {"blocked_s": blocked_s, "total_s": total_s, "steps_s": steps_s, "idle_s": idle_s, "sink_s": sink_s}


def _steps_until_done(trainer: Trainer, pending: Pending, begin_s: float) -> Iterator[float]:
    while not pending.done():
        if time.perf_counter() - begin_s > _TIMEOUT_S:
            raise MeasurementError(f"the save was not done after {_TIMEOUT_S:.0f} s")
        yield trainer.step_s()


def _memory(spec: AsyncSpec, state: State) -> dict[str, Any]:
    others = _watch(spec)
    baseline = reset_peak()
    saves, peaks = [], []
    with _opened(spec) as peer:
        peer.prepare(state)
        for step in range(1, spec.saves + 1):
            saves.append(_save_blocked(peer, step, state, then=_keep))
            peaks.append(max(0, peak_bytes() - baseline))
        others.stop()
        _check(peer, spec, state)
    return {"saves": saves, "peaks_bytes": peaks, "budget_bytes": spec.budget_bytes, "others": others.share}


_PARTS: Mapping[str, tuple[type[Outcome], Callable[[AsyncSpec, State], dict[str, Any]]]] = {
    "blocked": (Blocked, _blocked),
    "lost": (Lost, _lost),
    "memory": (Memory, _memory),
}


# ---- what all parts share -------------------------------------------------------------------------------------------


def _keep(state: State) -> None:
    """Change nothing."""


def _overwrite(state: State) -> None:
    """Make every value wrong, as a step that trains the whole state would."""
    for tensor in state.values():
        tensor.fill_(-1.0)


def _check(peer: AsyncPeer, spec: AsyncSpec, state: State) -> None:
    """Load the last checkpoint over the state, and compare it with what was saved."""
    _overwrite(state)
    peer.load(spec.saves, state)
    wrong = differences({name: tensor.cpu() for name, tensor in state.items()}, _shapes(spec.size_bytes))
    if wrong:
        raise MeasurementError(f"{len(wrong)} tensors were not restored, for example {wrong[0]}")


class _Others:
    """Who else used the machine, between making it and `stop`."""

    def __init__(self, spec: AsyncSpec) -> None:
        self._spec = spec
        self._before = (*read_clocks(), _sink_cpu_s(spec))
        self.share = 0.0

    def stop(self) -> None:
        after = (*read_clocks(), _sink_cpu_s(self._spec))
        wall_s, own_s, machine_s, sink_s = (late - early for early, late in zip(self._before, after, strict=True))
        self.share = max(0.0, machine_s - own_s - sink_s) / wall_s / (os.cpu_count() or 1)


def _sink_cpu_s(spec: AsyncSpec) -> float:
    return SinkClient(spec.stats_url).stats().cpu_s if spec.stats_url else 0.0


def _watch(spec: AsyncSpec) -> _Others:
    """Leave nothing half done that the saves would pay for, and begin to watch the machine."""
    gc.collect()
    os.sync()
    return _Others(spec)


if __name__ == "__main__":
    # DCP remarks on every single-process save, and on its own storage classes.
    warnings.filterwarnings("ignore")
    print(MARK + json.dumps(_measure_here(AsyncSpec(**json.loads(sys.argv[1])))), flush=True)
