"""Stand between a client and a real S3 server on loopback: pass requests on, or answer 503, never, or after the effect.

One thread per connection. The host that a client signed is passed on as it is, so that the server accepts it.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

__all__ = ["Faults", "FaultyProxy"]

_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>as the drill asked</Message></Error>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How many requests get a 503, no answer, or an effect without an answer.

    Attributes:
        busy, stalled, lost: the shares of all requests.
        outage_s: seconds from `FaultyProxy.begin` in which nothing is served.
        clear_s: seconds from there after which everything is.
    """

    busy: float
    stalled: float
    lost: float
    outage_s: float
    clear_s: float


class FaultyProxy:
    """A proxy in front of one server; use it as a context manager."""

    def __init__(self, endpoint_url: str, faults: Faults, *, seed: int) -> None:
        self._target = urlsplit(endpoint_url).netloc
        self._faults = faults
        self._rng = random.Random(f"proxy {seed}")
        self._lock = threading.Lock()
        self._began_s: float | None = None
        self._closing = threading.Event()
        self.story: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def log_message(self, *args: object) -> None:
                """Say nothing."""

            def serve(self) -> None:
                proxy.serve(self)

        for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{verb}", Handler.serve)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hangs up is one of the faults."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def begin(self) -> None:
        """Begin with the outage, as the notice is given."""
        self._began_s = time.monotonic()

    def _fate(self) -> str:
        with self._lock:
            chance = self._rng.random()
        faults, since_s = self._faults, 0.0 if self._began_s is None else time.monotonic() - self._began_s
        if self._began_s is not None and since_s >= faults.clear_s:
            return "served"
        if self._began_s is not None and since_s < faults.outage_s:
            return "busy" if chance < 0.8 else "stalled"
        for fate, share in (("busy", faults.busy), ("stalled", faults.stalled), ("lost", faults.lost)):
            if chance < share:
                return fate
            chance -= share
        return "served"

    def serve(self, client: BaseHTTPRequestHandler) -> None:
        """Let one request meet its fate."""
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        fate = self._fate()
        self.story.append(f"{time.monotonic():.3f} {fate:8}{client.command} {client.path[-90:]}")
        if fate == "stalled":
            self._wait_for_the_client_to_go(client)
            client.close_connection = True
            return
        if fate == "busy":
            self._reply(client, 503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        upstream = http.client.HTTPConnection(self._target, timeout=30)
        try:
            upstream.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
            for name, value in client.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if fate == "lost":
            client.close_connection = True
            with suppress(OSError):
                client.connection.shutdown(socket.SHUT_RDWR)
            return
        dropped = ("connection", "transfer-encoding", "content-length", "keep-alive")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
        length = answer.getheader("Content-Length") if client.command == "HEAD" else None
        self._reply(client, answer.status, headers, data, length)

    def _wait_for_the_client_to_go(self, client: BaseHTTPRequestHandler) -> None:
        client.connection.settimeout(0.1)
        while not self._closing.is_set():
            try:
                if not client.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _reply(
        self,
        client: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        length: str | None = None,
    ) -> None:
        client.send_response_only(status)
        for name, value in headers:
            client.send_header(name, value)
        client.send_header("Content-Length", length or str(len(data)))
        client.end_headers()
        if client.command != "HEAD":
            client.wfile.write(data)
