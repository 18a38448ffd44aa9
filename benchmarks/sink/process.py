"""Turn the sink into a child process that one `with` owns, and its counters into values."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["SinkClient", "SinkStats", "running_sink"]

_SCRIPT = Path(__file__).with_name("server.py")
_REQUEST_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkStats:
    """What the sink answered since the last reset.

    Attributes:
        cpu_s: its processor time since it started.
    """

    requests: Mapping[str, int]
    received_bytes: int = 0
    sent_bytes: int = 0
    objects: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SinkClient:
    """The sink's own requests, which it does not count.

    Attributes:
        tls_url: the same sink behind TLS, and `authority` the PEM file that vouches for it; or "".
    """

    endpoint_url: str
    tls_url: str = ""
    authority: str = ""

    def stats(self) -> SinkStats:
        """Return the counters."""
        return SinkStats(**json.loads(self._ask("GET", "/_stats")))

    def objects(self) -> Mapping[str, int]:
        """Return `bucket/key` → size in bytes of everything stored."""
        found: dict[str, int] = json.loads(self._ask("GET", "/_objects"))
        return found

    def reset(self) -> None:
        """Zero the counters; objects stay."""
        self._ask("POST", "/_reset")

    def clear(self) -> None:
        """Zero the counters and drop all objects."""
        self._ask("POST", "/_clear")

    @contextmanager
    def drained(self) -> Iterator[None]:
        """While the block runs, take in large bodies without a copy and keep none of their bytes (not behind TLS)."""
        self._ask("POST", "/_drain")
        try:
            yield
        finally:
            self._ask("POST", "/_keep")

    def _ask(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint_url).netloc, timeout=_REQUEST_TIMEOUT_S)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextmanager
def running_sink(
    memory_bytes: int,
    *,
    latency_ms: float = 0.0,
    mb_per_s: float = 0.0,
    total_mb_per_s: float = 0.0,
    nice: int = 0,
    certificate: Path | None = None,
) -> Iterator[SinkClient]:
    """Run a sink until the block ends; it ends by itself when this process dies."""
    options = {"--memory": memory_bytes, "--latency-ms": latency_ms, "--mb-per-s": mb_per_s}
    options |= {"--total-mb-per-s": total_mb_per_s, "--nice": nice}
    options |= {"--certificate": certificate} if certificate else {}
    command = [sys.executable, str(_SCRIPT), "--exit-with-stdin"]
    command += [str(word) for pair in options.items() for word in pair]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint_url = process.stdout.readline().strip() if process.stdout else ""
            if not endpoint_url:
                raise RuntimeError(f"the sink did not start (exit status {process.wait()})")
            tls_url = process.stdout.readline().strip() if process.stdout and certificate else ""
            yield SinkClient(endpoint_url, tls_url, str(certificate) if certificate else "")
        finally:
            process.terminate()
