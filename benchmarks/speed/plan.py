"""Say what the suite measures: sections of cases, each one state on one target by peers that take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.peers import CONNECTOR, PEERS, STOCK
from benchmarks.shared.states import STATES
from benchmarks.shared.targets import TARGETS
from benchmarks.shared.units import format_bytes

__all__ = ["CURVES", "QUICK_BYTES", "SECTIONS", "Axis", "Case", "quick", "whole"]

Axis = Literal["size_bytes", "tensors", "ranks", "latency_ms"]

MIB = 1 << 20
# Sections that are a curve, by what grows along it.
CURVES: dict[str, Axis] = {
    "size": "size_bytes",
    "tensors": "tensors",
    "ranks": "ranks",
    "latency": "latency_ms",
}
SECTIONS = ("peers", "states", "replicas", *CURVES)

_REMOTE = ("s3sink", "s3tls", "s3slow", "gcssink", "seaweedfs", "fakegcs")
# Real servers here carry a tenth of what the sinks do.
_SERVED_BYTES = 512 * MIB
_CURVE_BYTES = 256 * MIB
# Variants that other sections or options are for.
_LEFT_OUT = ("cloudckpt-obstore-manager", "cloudckpt-fsspec-manager", "cloudckpt-manager")
_BEST = {
    "s3": ("cloudckpt-obstore", STOCK, "dcp-threads", f"{CONNECTOR}-t4", "raw-obstore"),
    "gs": ("cloudckpt-fsspec", STOCK, "dcp-threads", "raw-fsspec"),
    "": ("cloudckpt", STOCK, "dcp-threads", "torch-fsync", "raw-disk"),
}
# A process costs three seconds of imports and warm-up, a pair of them a peer: so many fit into three minutes.
_QUICK = {
    "s3sink": ("cloudckpt-obstore", "cloudckpt-fsspec", STOCK, CONNECTOR, "raw-obstore"),
    "local": ("cloudckpt", STOCK, "torch", "safetensors"),
    "s3tls": ("cloudckpt-obstore", STOCK),
    "gcssink": ("cloudckpt-fsspec",),
}
QUICK_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One state on one target, and who saves it there.

    Attributes:
        latency_ms: of each request, in place of the target's own.
        peers: names, or none for all that can write there.
    """

    section: str
    target: str
    state: str = "adamw"
    size_bytes: int = 2 << 30
    ranks: int = 1
    layout: str = "fsdp"
    latency_ms: float | None = None
    peers: Sequence[str] = ()

    @property
    def title(self) -> str:
        """What it is, for people; its parts are in its results as well."""
        ranks = "" if self.ranks == 1 else f", {self.ranks} ranks ({self.layout})"
        latency = "" if self.latency_ms is None else f", {self.latency_ms:g} ms a request"
        state = f"{STATES[self.state].title}, {format_bytes(self.size_bytes)}"
        return f"{self.target}: {state}{ranks}{latency}"

    @property
    def name(self) -> str:
        """What files of it are called."""
        parts = [self.section, self.target, self.state, format_bytes(self.size_bytes).replace(" ", "")]
        parts += [f"{self.ranks}ranks-{self.layout}"] if self.ranks > 1 else []
        parts += [f"{self.latency_ms:g}ms"] if self.latency_ms is not None else []
        return "-".join(parts)

    @property
    def words(self) -> list[str]:
        """What `run.py` is called with to measure this alone."""
        words = ["--targets", self.target, "--states", self.state, "--size", str(self.size_bytes)]
        words += ["--ranks", str(self.ranks), "--layout", self.layout]
        words += ["--latency-ms", f"{self.latency_ms:g}"] if self.latency_ms is not None else []
        return [*words, *(["--peers", ",".join(self.peers)] if self.peers else [])]

    @property
    def x(self) -> float:
        """Its place on the curve of its section."""
        axis = CURVES[self.section]
        if axis == "tensors":
            return float(len(STATES[self.state].shapes(self.size_bytes)))
        return float(getattr(self, axis) or 0)

    def chosen(self) -> list[str]:
        """Return the peers that can write there, in the order of `PEERS`."""
        scheme = TARGETS[self.target].scheme
        fitting = [name for name, peer in PEERS.items() if peer.fits(scheme, self.ranks)]
        return [name for name in fitting if (name in self.peers if self.peers else name not in _LEFT_OUT)]


def whole() -> Iterator[Case]:
    """Yield all cases of the suite."""
    for target in (*_REMOTE, "local"):
        is_served = not TARGETS[target].is_sink and target != "local"
        yield Case(section="peers", target=target, size_bytes=_SERVED_BYTES if is_served else 2 << 30)
    for target in ("s3sink", "local"):
        for state in ("tensors-10000", "tensors-1", "lora"):
            yield Case(section="states", target=target, state=state, size_bytes=STATES[state].usual_bytes)
        yield from (Case(section="ranks", target=target, ranks=ranks, peers=_ranked(target)) for ranks in (1, 2, 4))
        yield Case(section="replicas", target=target, ranks=2, layout="ddp", peers=_ranked(target))
        for size_bytes in (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB):
            yield Case(section="size", target=target, size_bytes=size_bytes, peers=_best(target))
        for state in ("tensors-1", "tensors-100", "tensors-1000", "tensors-10000"):
            yield Case(section="tensors", target=target, state=state, size_bytes=_CURVE_BYTES, peers=_best(target))
    for latency_ms in (0.0, 5.0, 20.0, 50.0):
        peers = _best("s3sink")
        yield Case(section="latency", target="s3sink", size_bytes=_CURVE_BYTES, latency_ms=latency_ms, peers=peers)


def quick(size_bytes: int = QUICK_BYTES) -> Iterator[Case]:
    """Yield a few cases of each kind, small: does everything run, and where about are the numbers?"""
    for target, peers in _QUICK.items():
        yield Case(section="peers", target=target, size_bytes=size_bytes, peers=peers)
    ours = ("cloudckpt-obstore",)
    yield Case(section="ranks", target="s3sink", size_bytes=size_bytes, ranks=2, peers=(*ours, STOCK))
    for state in ("tensors-100", "tensors-1000"):
        yield Case(section="tensors", target="s3sink", state=state, size_bytes=size_bytes, peers=ours)
    yield Case(section="latency", target="s3sink", size_bytes=size_bytes, latency_ms=20.0, peers=ours)


def _best(target: str) -> tuple[str, ...]:
    return _BEST[TARGETS[target].scheme]


def _ranked(target: str) -> tuple[str, ...]:
    return tuple(name for name in _best(target) if PEERS[name].has_ranks)
