"""The metadata servers of EC2, GCE and Azure on loopback, as strict as the real ones, and as broken as tests want.

    with metadata_server() as server:
        server.answers["/latest/meta-data/spot/instance-action"] = notice(...)

EC2's paths ask for a token that was fetched by PUT and has not expired; GCE's for the header `Metadata-Flavor`, and
hold a question back that waits for a change; Azure's for the header `Metadata` and a version. A path without a scripted
answer says what an instance says of which nobody wants anything.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

TOKEN = "/latest/api/token"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
LIFECYCLE = "/latest/meta-data/autoscaling/target-lifecycle-state"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
EVENTS = "/metadata/scheduledevents"
MACHINE = "/metadata/instance/compute/name"
VERSIONS = {EVENTS: "2020-07-01", MACHINE: "2021-02-01"}


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
    LIFECYCLE: Answer(b"not found", 404),
    EVENTS: Answer(b'{"DocumentIncarnation": 1, "Events": []}'),
    MACHINE: Answer(b"trainer_7"),
    PREEMPTED: Answer(b"FALSE"),
    MAINTENANCE: Answer(b"NONE"),
}


def utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def etag_of(answer: Answer) -> str:
    return hashlib.md5(answer.body, usedforsecurity=False).hexdigest()[:16]


def event(kind: str, left_s: float | None, *, resources: tuple[str, ...] = ("trainer_7",)) -> Answer:
    """Azure's answer with one event, `left_s` seconds ahead; None for one that has started."""
    not_before = (
        "" if left_s is None else format_datetime(datetime.fromtimestamp(time.time() + left_s, UTC), usegmt=True)
    )
    said = {
        "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(resources),
        "EventStatus": "Started" if left_s is None else "Scheduled",
        "NotBefore": not_before,
    }
    return Answer(json.dumps({"DocumentIncarnation": 2, "Events": [said]}).encode())


def action(what: str = "terminate", *, left_s: float = 120.0) -> Answer:
    return Answer(json.dumps({"action": what, "time": utc(time.time() + left_s)}).encode())


class MetadataServer(ThreadingHTTPServer):
    """A metadata server; `answers` are what is scripted, `requests` what was asked.

    `is_holding` says whether questions are held back until there is news, `refuses_to_hold` whether asking for that is
    an error, `held` how many are at the moment.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: dict[str, float] = {}
        self.ttls: list[int] = []
        self.is_holding = True
        self.refuses_to_hold = False
        self.held = 0
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
        if self.server.refuses_to_hold and "wait_for_change" in self._query():
            refusal = Answer(status=400)
        if refusal is not None:
            self._say(refusal)
            return
        if "wait_for_change" in self._query() and self.server.is_holding:
            self._hold()
        self._say(self._answer())

    def _path(self) -> str:
        return urlsplit(self.path).path

    def _query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query))

    def _answer(self) -> Answer:
        return self.server.answers.get(self._path()) or QUIET.get(self._path()) or Answer(status=404)

    def _hold(self) -> None:
        """Wait until the answer is another one than the asker knows, or for as long as it wants to wait."""
        stop_s = time.monotonic() + int(self._query().get("timeout_sec", "3600"))
        self.server.held += 1
        while etag_of(self._answer()) == self._query().get("last_etag") and time.monotonic() < stop_s:
            if self.server.closing.wait(0.005):
                break
        self.server.held -= 1

    def _note(self) -> None:
        self.server.requests.append((self.command, self._path()))

    def _refusal(self) -> Answer | None:
        if self.path.startswith("/computeMetadata/"):
            return None if self.headers.get("Metadata-Flavor") == "Google" else Answer(status=403)
        if self.path.startswith("/metadata/"):
            is_asked_for = self.headers.get("Metadata") == "true"
            is_version = self._query().get("api-version") == VERSIONS.get(self._path())
            return None if is_asked_for and is_version else Answer(status=400)
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
            self.send_header("ETag", etag_of(answer))
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
