"""Count what a store is asked: requests, retries, bytes and seconds per verb, as values that subtract.

A snapshot before and one after make the cost of what lay between. `Recorder` is shared by all threads of a store.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from cloudckpt.threads import new_lock

__all__ = ["OpStats", "Recorder", "StoreStats", "Traffic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpStats:
    """What one verb cost.

    Attributes:
        requests: calls of the engine's verb, failed ones and the read-backs of a create included.
        retries: those among them that an earlier failure made necessary.
        bytes: payload of the successful ones.
        seconds: time inside them, summed over threads; waits between them are not in it.
    """

    requests: int = 0
    retries: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: OpStats) -> OpStats:
        return self._with(other, 1)

    def __sub__(self, other: OpStats) -> OpStats:
        return self._with(other, -1)

    def _with(self, other: OpStats, sign: int) -> OpStats:
        return OpStats(
            requests=self.requests + sign * other.requests,
            retries=self.retries + sign * other.retries,
            bytes=self.bytes + sign * other.bytes,
            seconds=self.seconds + sign * other.seconds,
        )


class StoreStats(dict[str, OpStats]):
    """A snapshot: verb → its costs. A verb that was never used costs nothing, and is not in it."""

    def __missing__(self, op: str) -> OpStats:
        return OpStats()

    def __sub__(self, earlier: StoreStats) -> StoreStats:
        return StoreStats({op: self[op] - earlier[op] for op in self if self[op] != earlier[op]})

    @property
    def total(self) -> OpStats:
        """All verbs together."""
        return sum(self.values(), OpStats())

    @property
    def requests(self) -> int:
        """Requests of all verbs."""
        return self.total.requests

    @property
    def retries(self) -> int:
        """Retries of all verbs."""
        return self.total.retries


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests by the classes that stores ask prices for, failed ones and retries included, and bytes that arrived.

    Attributes:
        puts: that write an object; also those that create one, and read back what became of that.
        gets: that read one, or a part of one.
        lists: pages of listings.
        heads: that look at one.
        deletes: of up to 1,000 each, where the store takes so many.
        sent_bytes: payload of the puts.
        received_bytes: payload of the gets.
    """

    puts: int = 0
    gets: int = 0
    lists: int = 0
    heads: int = 0
    deletes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    @classmethod
    def of(cls, stats: StoreStats) -> Self:
        """Add up what a snapshot says."""
        writes, reads = stats["put"] + stats["create"], stats["get"] + stats["read"]
        return cls(
            puts=writes.requests,
            gets=reads.requests,
            lists=stats["list"].requests,
            heads=stats["head"].requests,
            deletes=stats["delete"].requests,
            sent_bytes=writes.bytes,
            received_bytes=reads.bytes,
        )

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(**{one.name: getattr(self, one.name) - getattr(other, one.name) for one in fields(self)})

    @property
    def by_class(self) -> dict[str, int]:
        """The requests, by the name of their class."""
        return {name: getattr(self, name) for name in ("puts", "gets", "lists", "heads", "deletes")}

    @property
    def requests(self) -> int:
        """All requests."""
        return sum(self.by_class.values())


class Recorder:
    """The running count behind the snapshots. Any thread may add."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._ops = StoreStats()

    def add(self, op: str, stats: OpStats) -> None:
        """Add what a request cost."""
        with self._lock:
            self._ops[op] += stats

    def snapshot(self) -> StoreStats:
        """Return the count so far."""
        with self._lock:
            return StoreStats(self._ops)
