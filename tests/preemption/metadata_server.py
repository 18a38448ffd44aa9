"""The metadata servers of EC2 and GCE on loopback, as strict as the real ones, and as broken as a test wants them.

    with metadata_server() as server:
        server.answers["/latest/meta-data/spot/instance-action"] = notice(...)

EC2's paths ask for a token that was fetched by PUT and has not expired; GCE's for the header `Metadata-Flavor`. A path
without a scripted answer says what an instance says of which nobody wants anything.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "/latest/api/token"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


@dataclass(frozen=True)
class Answer:
    """What is said, and how: `first_wait_s` before the status line, `byte_wait_s` before each byte of the body."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    first_wait_s: float = 0.0
    byte_wait_s: float = 0.0
    is_google: bool = True
    raw: bytes | None = None


QUIET = {
    ACTION: Answer(b"not found", 404),
    REBALANCE: Answer(b"not found", 404),
    PREEMPTED: Answer(b"FALSE"),
    MAINTENANCE: Answer(b"NONE"),
}


def utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def action(what: str = "terminate", *, left_s: float = 120.0) -> Answer:
    return Answer(json.dumps({"action": what, "time": utc(time.time() + left_s)}).encode())


class MetadataServer(ThreadingHTTPServer):
    """A metadata server; `answers` are what is scripted, `requests` what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: dict[str, float] = {}
        self.ttls: list[int] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def expire_tokens(self) -> None:
        self.tokens.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that has hung up on a slow answer."""


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def log_message(self, *args: object) -> None:
        """Keep the tests' output quiet."""

    def do_PUT(self) -> None:
        self._note()
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != TOKEN or not ttl.isdigit() or not 1 <= int(ttl) <= 21_600:
            self._say(Answer(status=400))
            return
        if TOKEN in self.server.answers:
            self._say(self.server.answers[TOKEN])
            return
        token = secrets.token_urlsafe(32)
        self.server.ttls.append(int(ttl))
        self.server.tokens[token] = time.monotonic() + int(ttl)
        self._say(Answer(token.encode(), headers={"X-aws-ec2-metadata-token-ttl-seconds": ttl}))

    def do_GET(self) -> None:
        self._note()
        refusal = self._refusal()
        if refusal is not None:
            self._say(refusal)
        else:
            self._say(self.server.answers.get(self.path) or QUIET.get(self.path) or Answer(status=404))

    def _note(self) -> None:
        self.server.requests.append((self.command, self.path))

    def _refusal(self) -> Answer | None:
        if self.path.startswith("/computeMetadata/"):
            return None if self.headers.get("Metadata-Flavor") == "Google" else Answer(status=403)
        until_s = self.server.tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0.0)
        return None if time.monotonic() < until_s else Answer(status=401)

    def _say(self, answer: Answer) -> None:
        self.server.closing.wait(answer.first_wait_s)
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if self.path.startswith("/computeMetadata/") and answer.is_google:
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not answer.byte_wait_s:
            self.wfile.write(answer.body)
        for byte in answer.body if answer.byte_wait_s else b"":
            self.server.closing.wait(answer.byte_wait_s)
            self.wfile.write(bytes([byte]))


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A server of this block's, on a port of its own."""
    server = MetadataServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
