"""Turn saves and restores into the requests that a store sees, by operation, and hold them against their limits.

Counted by the sink, so retries and probes show. The state of the first part fits one shard: what is counted there is
the fixed cost of a checkpoint. The second part has several shards, to show what a restore costs beside its spans.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from benchmarks.peers import PEERS, STOCK, Place
from benchmarks.shared.report import MIB
from benchmarks.shared.states import STATES, Shapes, State, blank, build, differences
from benchmarks.shared.units import format_bytes
from benchmarks.sink.process import SinkClient, running_sink

__all__ = ["Count", "counts", "main", "requests_table"]

SAVE_LIMIT = 4
RESTORE_LIMIT_WITHOUT_SPANS = 4
ENGINES = ("obstore", "fsspec")

_SMALL_BYTES = MIB
_LARGE_BYTES = 192 * MIB
# So long are spans where there are not many of them.
_SPAN_BYTES = 8 * MIB
_SINK_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """The requests of one operation.

    Attributes:
        limit: what the design promises; None for a peer.
    """

    who: str
    what: str
    requests: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    @property
    def is_met(self) -> bool:
        """Whether the limit holds; without one, yes."""
        return self.limit is None or self.total <= self.limit


@dataclass(frozen=True, slots=True)
class _Bench:
    sink: SinkClient

    @property
    def storage_options(self) -> dict[str, Any]:
        return {
            "key": "bench",
            "secret": "bench",
            "endpoint_url": self.sink.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def count(self, action: Callable[[], object]) -> Mapping[str, int]:
        """Do `action` and return its requests; no file system keeps a listing from before."""
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        self.sink.reset()
        action()
        return self.sink.stats().requests

    def spans(self) -> int:
        """How many ranged reads it takes at least to read every shard that is stored now."""
        sizes = [size for key, size in self.sink.objects().items() if key.endswith(".safetensors")]
        return sum(-(-size // _SPAN_BYTES) for size in sizes)


def counts(*, large_bytes: int = _LARGE_BYTES) -> Iterator[Count]:
    """Yield all counts; each restore is checked, bit for bit.

    Raises:
        ValueError: a restore gave back something else than was saved.
    """
    with running_sink(_SINK_BYTES) as sink, _quiet_dcp():
        bench = _Bench(sink)
        for engine in ENGINES:
            yield from _manager_counts(bench, engine)
            yield from _single_counts(bench, engine, large_bytes)
        yield from _stock_counts(bench)


def _manager_counts(bench: _Bench, engine: str) -> Iterator[Count]:
    from cloudckpt import CheckpointManager

    bench.sink.clear()
    who = f"CheckpointManager, {engine}"
    state: dict[str, object] = dict(build(_shapes(_SMALL_BYTES)))

    def open_manager() -> CheckpointManager:
        return CheckpointManager("s3://bench/root", storage_options=bench.storage_options, engine=engine)

    with open_manager() as manager:
        yield Count(who=who, what="first save of one shard", requests=bench.count(lambda: manager.save(1, state)))
        second = bench.count(lambda: manager.save(2, state))
        yield Count(who=who, what="save of one shard", requests=second, limit=SAVE_LIMIT)
    restored = blank(_shapes(_SMALL_BYTES))
    with open_manager() as manager:
        requests = bench.count(lambda: manager.restore(dict(restored)))
    _check(restored, _SMALL_BYTES)
    limit = RESTORE_LIMIT_WITHOUT_SPANS + 1
    yield Count(who=who, what="restore of the latest, one span", requests=requests, limit=limit)


def _single_counts(bench: _Bench, engine: str, large_bytes: int) -> Iterator[Count]:
    import cloudckpt

    for size_bytes in (_SMALL_BYTES, large_bytes):
        bench.sink.clear()
        url, options = "s3://bench/one", bench.storage_options
        who, size = f"save and load, {engine}", format_bytes(size_bytes)
        state: dict[str, object] = dict(build(_shapes(size_bytes)))
        saved = bench.count(lambda: cloudckpt.save(state, url, storage_options=options, engine=engine))  # noqa: B023
        yield Count(who=who, what=f"save of {size}", requests=saved)
        restored = blank(_shapes(size_bytes))
        target: dict[str, object] = dict(restored)
        spans = bench.spans()
        requests = bench.count(lambda: cloudckpt.load(target, url, storage_options=options, engine=engine))  # noqa: B023
        _check(restored, size_bytes)
        what = f"load of {size}, {spans} span{'s' if spans > 1 else ''}"
        yield Count(who=who, what=what, requests=requests, limit=RESTORE_LIMIT_WITHOUT_SPANS + spans)


def _stock_counts(bench: _Bench) -> Iterator[Count]:
    bench.sink.clear()
    place = Place(url="s3://bench/stock", storage_options=bench.storage_options)
    state, restored = build(_shapes(_SMALL_BYTES)), blank(_shapes(_SMALL_BYTES))
    peer = PEERS[STOCK].open(place)
    saved = bench.count(lambda: peer.save(state, 0))
    yield Count(who="stock DCP, s3fs", what=f"save of {format_bytes(_SMALL_BYTES)}", requests=saved)
    loaded = bench.count(lambda: peer.load(restored, 0))
    _check(restored, _SMALL_BYTES)
    yield Count(who="stock DCP, s3fs", what=f"load of {format_bytes(_SMALL_BYTES)}", requests=loaded)


def _shapes(size_bytes: int) -> Shapes:
    return STATES["gpt"].shapes(size_bytes)


def _check(state: State, size_bytes: int) -> None:
    wrong = differences(state, _shapes(size_bytes))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors were not restored, for example {wrong[0]}")


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Hide DCP's remark on single processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def requests_table(found: list[Count]) -> str:
    """Write counts as a markdown table."""
    lines = ["| who | what | requests | limit | by operation |", "|---|---|---|---|---|"]
    for count in found:
        limit = "–" if count.limit is None else f"{count.limit}{'' if count.is_met else ' **missed**'}"
        operations = ", ".join(f"{number} {name}" for name, number in sorted(count.requests.items()))
        lines.append(f"| {count.who} | {count.what} | {count.total} | {limit} | {operations} |")
    return "\n".join(lines)


def main(json_path: Path | None = None) -> int:
    """Count, print, and return 0 if every limit holds, else 3."""
    found = list(counts())
    print(requests_table(found))
    if json_path:
        json_path.write_text(json.dumps([asdict(count) for count in found], indent=1))
    return 0 if all(count.is_met for count in found) else 3
