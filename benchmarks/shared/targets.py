"""Turn the name of a target into empty places to write to, and clean up behind each.

`s3sink` in-memory S3 on loopback: the client is the bottleneck. `s3slow` the same with 20 ms per request and 90 MB/s
per connection: nearer to a store in another building. `s3limited` the same with 300 MB/s for all connections together:
the network is the bottleneck. `local` a directory. `seaweedfs` a real S3 server: it is the
bottleneck, so it shows that things work, not how fast the client is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.sink.process import SinkClient, running_sink

__all__ = ["TARGETS", "Ground", "Target", "open_target"]

SLOW_LATENCY_MS = 20.0
SLOW_MB_PER_S = 90.0
LIMIT_MB_PER_S = 300.0
TARGETS = ("s3sink", "s3slow", "s3limited", "local", "seaweedfs")

_SERVERS = Path(__file__).resolve().parents[2] / "localstack"
_HEADROOM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """An empty place for one peer's save and load.

    Attributes:
        stats_url: where requests are counted, or "".
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""


class Target(Protocol):
    """A running store that hands out places."""

    @property
    def is_local(self) -> bool:
        """Whether it is a directory, and not S3."""
        ...

    def ground(self) -> AbstractContextManager[Ground]:
        """Give an empty place, and remove what was written there afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class _Sink:
    client: SinkClient
    is_local: bool = False

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        endpoint_url = self.client.endpoint_url
        options = {
            "key": "bench",
            "secret": "bench",
            "endpoint_url": endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }
        try:
            yield Ground(url="s3://bench/place", storage_options=options, stats_url=endpoint_url)
        finally:
            self.client.clear()


@dataclass(frozen=True, slots=True)
class _Local:
    root: Path
    is_local: bool = True

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        directory = Path(tempfile.mkdtemp(prefix="place-", dir=self.root))
        try:
            yield Ground(url=str(directory / "checkpoint"))
        finally:
            shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class _SeaweedFS:
    root: Path
    is_local: bool = False

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        # A server per place: SeaweedFS gives the space of deleted objects back only after a vacuum.
        if str(_SERVERS) not in sys.path:
            sys.path.append(str(_SERVERS))
        from servers import seaweedfs

        directory = Path(tempfile.mkdtemp(prefix="seaweedfs-", dir=self.root))
        try:
            with seaweedfs(directory) as server:
                url = server.make_bucket("bench")
                yield Ground(url=f"{url}/place", storage_options=dict(server.storage_options))
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def open_target(name: str, *, size_bytes: int, directory: Path, sink_nice: int = 0) -> Iterator[Target]:
    """Run a target until the block ends; `directory` holds what `local` and `seaweedfs` write."""
    if name in ("s3sink", "s3slow", "s3limited"):
        is_slow = name == "s3slow"
        with running_sink(
            size_bytes + size_bytes // 4 + _HEADROOM_BYTES,
            latency_ms=SLOW_LATENCY_MS if is_slow else 0.0,
            mb_per_s=SLOW_MB_PER_S if is_slow else 0.0,
            total_mb_per_s=LIMIT_MB_PER_S if name == "s3limited" else 0.0,
            nice=sink_nice,
        ) as client:
            yield _Sink(client)
        return
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-", dir=directory) as root:
        yield _Local(Path(root)) if name == "local" else _SeaweedFS(Path(root))
