"""A store whose requests take time and meet 503, stalls, lost replies and outages; it is clear from some time on.

    request ──▶ outage? bad luck? ──▶ wait (latency and bytes, or until its limit) ──▶ effect ──▶ reply, or none

All on a `Clockwork`. What the weather is at a time is drawn from the seed before the run.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cloudckpt.errors import ThrottledError, TransientError
from cloudckpt.store.limit import led, limit_now
from tests.spot_drill.clockwork import Clockwork
from tests.store.fault_store import Bucket, Fault, FaultKind, FaultStore, Op

# How often a client that watches its bytes looks at its limit.
_LOOK_S = 0.5

__all__ = ["Outage", "Skies", "WeatheredStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A time in which no request is served: each gets a 503 at once, or no answer at all."""

    start_s: float
    stop_s: float
    is_silent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Skies:
    """What a store is like in one run.

    Attributes:
        latency_s: of every request.
        shard_s: that a shard's bytes take besides.
        busy, stalled, lost: how many of all requests get a 503, no answer, or an effect without an answer.
        outages: when nothing is served.
        clear_s: from when on nothing goes wrong any more, whatever stands above.
    """

    latency_s: float
    shard_s: float
    busy: float = 0.0
    stalled: float = 0.0
    lost: float = 0.0
    outages: Sequence[Outage] = ()
    clear_s: float = 0.0


class Log(dict):  # type: ignore[type-arg]
    """The objects of a bucket, and when each was written first."""

    def __init__(self, clock: Clockwork) -> None:
        super().__init__()
        self._clock = clock
        self.written_s: dict[str, float] = {}

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        self.written_s.setdefault(key, self._clock.now_s)


class WeatheredStore(FaultStore):
    """One client of a bucket below these skies.

    Attributes:
        is_blocking: whether it sees its limit when a request begins, and never again.
    """

    is_blocking = True

    def _request(self, *args: Any, **options: Any) -> Any:
        request = partial(super()._request, *args, **options)
        return led(request) if self.is_blocking else request()

    def __init__(
        self, bucket: Bucket, clock: Clockwork, skies: Skies, *, seed: int, name: int, request_timeout_s: float
    ) -> None:
        """Connect; `name` tells this bucket from all others, because what a bucket can do is remembered."""
        super().__init__(bucket, url=f"memory://drill-{name}/root", hook=self._go_through)
        self._clock = clock
        self._skies = skies
        self._rng = random.Random(f"weather {seed}")
        self._request_timeout_s = request_timeout_s
        self.story: list[str] = []

    def _limit_s(self) -> float:
        return min(self._request_timeout_s, limit_now().left_s())

    def _go_through(self, op: Op) -> None:
        chance = self._rng.random()
        began_s, limit_s = self._clock.now_s, self._limit_s()
        skies = self._skies
        takes_s = skies.latency_s + (skies.shard_s if op.key.endswith(".safetensors") else 0.0)
        outage = next((one for one in skies.outages if one.start_s <= began_s < one.stop_s), None)
        if began_s >= skies.clear_s:
            fate = "served"
        elif outage is not None:
            fate = "stalled" if outage.is_silent else "busy"
        else:
            luck = (("busy", skies.busy), ("stalled", skies.stalled), ("lost", skies.lost), ("served", 1.0))
            bounds = itertools.accumulate(share for _, share in luck)
            fate = next(name for (name, _), bound in zip(luck, bounds, strict=True) if chance < bound)
        if fate == "served" and takes_s > limit_s:
            fate = "stalled"
        self.story.append(f"{began_s:9.3f} {op.verb:7}{op.key[-40:]:41}{fate}, limit {limit_s:.2f} s")
        if fate == "stalled":
            self._stand_still(limit_s)
        else:
            self._clock.sleep(skies.latency_s if fate == "busy" else takes_s)
        if fate in ("busy", "stalled"):
            # A 503 has no effect; that of a request without an answer may come, or not.
            if fate == "stalled" and chance * 1000 % 1 < 0.3:
                self.faults.append(Fault(kind=FaultKind.LOST_ACK, number=op.number))
                return
            raise _busy(op) if fate == "busy" else TransientError(f"{op.verb} of {op.key!r}: no answer", op=op.verb)
        if fate == "lost":
            self.faults.append(Fault(kind=FaultKind.LOST_ACK, number=op.number))

    def _stand_still(self, limit_s: float) -> None:
        stop_s = self._clock.now_s + limit_s
        while (left_s := stop_s - self._clock.now_s) > 0:
            self._clock.sleep(left_s if self.is_blocking else min(left_s, _LOOK_S))
            if not self.is_blocking:
                stop_s = min(stop_s, self._clock.now_s + self._limit_s())


def _busy(op: Op) -> Exception:
    return ThrottledError(f"{op.verb} of {op.key!r}: 503 SlowDown", op=op.verb, key=op.key)
