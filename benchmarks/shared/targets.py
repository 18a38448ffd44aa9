"""Turn the name of a target into empty places to write to, and clean up behind each.

The sinks hold objects in memory on loopback, so that the client is the bottleneck. Real servers here are the
bottleneck themselves: they show that things work, not how fast the client is.
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

__all__ = ["LIMIT_MB_PER_S", "TARGETS", "Ground", "Target", "TargetKind", "open_target"]

REGION_LATENCY_MS = 20.0
REGION_MB_PER_S = 80.0
LIMIT_MB_PER_S = 300.0

_SERVERS = Path(__file__).resolve().parents[2] / "localstack"
_HEADROOM_BYTES = 256 << 20
_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """An empty place for one peer's save and load.

    Attributes:
        stats_url: where requests are counted, or "".
        environment: variables by which a client finds the server that takes no options.
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    stats_url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Target(Protocol):
    """A running store that hands out places."""

    @property
    def is_local(self) -> bool:
        """Whether it is a directory."""
        ...

    def ground(self) -> AbstractContextManager[Ground]:
        """Give an empty place, and remove what was written there afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetKind:
    """What a target is.

    Attributes:
        scheme: of its URLs; "" is a directory.
        link: what the network in front of a sink is, in the words of `running_sink`.
    """

    title: str
    scheme: str
    link: Mapping[str, float] = field(default_factory=dict)
    is_sink: bool = True
    is_behind_tls: bool = False


TARGETS: Mapping[str, TargetKind] = {
    "s3sink": TargetKind(title="in-memory S3", scheme="s3"),
    "s3tls": TargetKind(title="in-memory S3 behind TLS", scheme="s3", is_behind_tls=True),
    "s3slow": TargetKind(
        title=f"in-memory S3 as in a region: {REGION_LATENCY_MS:.0f} ms, {REGION_MB_PER_S:.0f} MB/s a connection",
        scheme="s3",
        link={"latency_ms": REGION_LATENCY_MS, "mb_per_s": REGION_MB_PER_S},
    ),
    "s3limited": TargetKind(
        title=f"in-memory S3, {LIMIT_MB_PER_S:.0f} MB/s for all connections together",
        scheme="s3",
        link={"total_mb_per_s": LIMIT_MB_PER_S},
    ),
    "s3limitedtls": TargetKind(
        title=f"in-memory S3 behind TLS, {LIMIT_MB_PER_S:.0f} MB/s for all connections together",
        scheme="s3",
        link={"total_mb_per_s": LIMIT_MB_PER_S},
        is_behind_tls=True,
    ),
    "gcssink": TargetKind(title="in-memory GCS (JSON)", scheme="gs"),
    "local": TargetKind(title="a directory", scheme="", is_sink=False),
    "seaweedfs": TargetKind(title="SeaweedFS", scheme="s3", is_sink=False),
    "fakegcs": TargetKind(title="fake-gcs-server", scheme="gs", is_sink=False),
}


@dataclass(frozen=True, slots=True)
class _Sink:
    client: SinkClient
    scheme: str
    is_local: bool = False

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        url, stats_url = self.client.tls_url or self.client.endpoint_url, self.client.endpoint_url
        on_s3 = self.scheme == "s3"
        try:
            yield _on_s3(url, "bench", "bench", stats_url, self.client.authority) if on_s3 else _on_gcs(url, stats_url)
        finally:
            self.client.clear()


def _on_s3(endpoint_url: str, key: str, secret: str, stats_url: str = "", authority: str = "") -> Ground:
    environment = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_REGION": _REGION,
        "AWS_ENDPOINT_URL": endpoint_url,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }
    # To each client the way that it knows; they would trust no certificate of ours else.
    environment |= dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), authority) if authority else {}
    options = {"key": key, "secret": secret, "endpoint_url": endpoint_url, "client_kwargs": {"region_name": _REGION}}
    return Ground(url="s3://bench/place", storage_options=options, stats_url=stats_url, environment=environment)


def _on_gcs(endpoint_url: str, stats_url: str) -> Ground:
    options = {"token": "anon", "endpoint_url": endpoint_url, "project": "bench"}
    environment = _gcs_environment(options)
    return Ground(url="gs://bench/place", storage_options=options, stats_url=stats_url, environment=environment)


def _gcs_environment(options: Mapping[str, Any]) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": options["endpoint_url"],
        "FSSPEC_GS_TOKEN": options["token"],
        # Else gcsfs asks by gRPC of which kind a bucket is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


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
class _Server:
    root: Path
    name: str
    is_local: bool = False

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        # A server per place: SeaweedFS gives the space of deleted objects back only after a vacuum.
        if str(_SERVERS) not in sys.path:
            sys.path.append(str(_SERVERS))
        import servers

        directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.root))
        start = {"seaweedfs": servers.seaweedfs, "fakegcs": servers.fake_gcs}[self.name]
        try:
            with start(directory) as server:
                url, options = server.make_bucket("bench"), dict(server.storage_options)
                if self.name == "fakegcs":
                    environment = _gcs_environment(options)
                else:
                    environment = dict(_on_s3(options["endpoint_url"], options["key"], options["secret"]).environment)
                yield Ground(url=f"{url}/place", storage_options=options, environment=environment)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def open_target(
    name: str, *, size_bytes: int, directory: Path, sink_nice: int = 0, latency_ms: float | None = None
) -> Iterator[Target]:
    """Run a target until the block ends; `directory` holds what `local` and the real servers write.

    `latency_ms` is a sink's for each request, in place of the target's own.
    """
    kind = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-", dir=directory) as root:
        if not kind.is_sink:
            yield _Local(Path(root)) if name == "local" else _Server(Path(root), name)
            return
        link = {**kind.link, **({} if latency_ms is None else {"latency_ms": latency_ms})}
        room_bytes = size_bytes + size_bytes // 4 + _HEADROOM_BYTES
        certificate = Path(root) / "certificate.pem" if kind.is_behind_tls else None
        if certificate:
            from benchmarks.sink.certificate import write_certificate

            write_certificate(certificate)
        with running_sink(room_bytes, nice=sink_nice, certificate=certificate, **link) as client:
            yield _Sink(client, kind.scheme)
