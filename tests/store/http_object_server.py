"""Serve objects over real sockets, in the S3 and the GCS dialects, and break every reply that a test names.

It shows what the engines do when a store or a network misbehaves: statuses with error bodies, resets at every
point of an exchange, stalls, short and flipped bodies, acknowledgements that get lost after the write landed.
It records each request, so that a test can count them. One thread per connection; the dialects know nothing of
sockets, and the sockets nothing of dialects.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from enum import StrEnum, auto
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from tests.store.http_dialects import ObjectSpace, Reply, Request, error_reply, md5_of

__all__ = ["Fault", "FaultKind", "Injection", "ObjectServer"]


class FaultKind(StrEnum):
    """Where an exchange breaks."""

    STATUS = auto()  # an error status, before any effect
    EARLY_STATUS = auto()  # the same, and a close, with the body of the request unread
    STALL_IN_REQUEST = auto()  # no effect and no reply; the body of the request is never read
    RESET_IN_REQUEST = auto()  # reset after the head of the request, its body unread
    RESET_BEFORE_REPLY = auto()  # reset after the whole request, without an effect
    LOST_ACK = auto()  # the effect happens, then the connection is reset
    LOST_ACK_STALL = auto()  # the effect happens, then nothing is ever said
    STALL = auto()  # no effect, and no reply
    RESET_IN_REPLY = auto()  # head and half of the body, then a reset
    STALL_IN_REPLY = auto()  # head and half of the body, then silence
    SHORT_HONEST = auto()  # Content-Length tells the whole, half comes, then a clean close
    SHORT_MATCHING = auto()  # half comes, and Content-Length says half
    LONG_MATCHING = auto()  # one byte more than asked, and Content-Length agrees
    FLIPPED_BYTE = auto()  # the first byte is inverted
    NO_HTTP = auto()  # no effect, and `body` in place of a reply, then a close
    TWICE = auto()  # the reply, and the same once more, as the answer to whatever comes next
    SAME_PAGE = auto()  # where a listing goes on is not heard: its first page comes again
    PARTIAL = auto()  # of a delete of several objects the first one is refused, by `code`, inside a 200


_SLOW_PIECE_BYTES = 16 * 1024
_MARKS = frozenset({"continuation-token", "start-after", "pageToken"})
_BEFORE_BODY = frozenset({FaultKind.EARLY_STATUS, FaultKind.STALL_IN_REQUEST, FaultKind.RESET_IN_REQUEST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to break a reply. `body` replaces the error body made from `status` and `code`."""

    kind: FaultKind = FaultKind.STATUS
    status: int = 503
    code: str = "SlowDown"
    message: str = "as the test asked"
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Injection:
    """A fault that waits for its requests; `fired` counts those that it broke."""

    fault: Fault
    matches: Callable[[Request], bool]
    times: int  # below 0: for ever
    fired: int = 0


class ObjectServer(ObjectSpace):
    """Buckets and objects in memory behind 127.0.0.1; use it as a context manager.

    Attributes:
        requests: every request, in order of arrival.
        link_bytes_per_s: how fast the bodies of all requests together are read; None is as fast as can be.
    """

    def __init__(
        self, *, buckets: tuple[str, ...] = ("bucket",), page_size: int = 1000, link_bytes_per_s: float | None = None
    ) -> None:
        super().__init__(buckets=buckets, page_size=page_size)
        self.link_bytes_per_s = link_bytes_per_s
        self._link_lock = threading.Lock()
        self._link_free_s = 0.0
        self.requests: list[Request] = []
        self._injections: list[Injection] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        if link_bytes_per_s is not None:
            # Else the kernel takes megabytes that nobody has read yet, and no slow link does.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_PIECE_BYTES)
        self.port: int = self._listener.getsockname()[1]

    @property
    def endpoint(self) -> str:
        """The URL to give to a client."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._closing.set()
        _shut(self._listener)  # a close alone does not wake accept()
        self._listener.close()
        with self._lock:
            open_connections = list(self._connections)
        for connection in open_connections:
            _shut(connection)
        for thread in self._threads:
            thread.join(timeout=10)

    def inject(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        times: int = 1,
        when: Callable[[Request], bool] | None = None,
    ) -> Injection:
        """Break the next `times` requests (below 0: all) that have `method` and meet `when`."""

        def matches(request: Request) -> bool:
            return (method is None or request.method == method) and (when is None or when(request))

        injection = Injection(fault, matches, times)
        with self._lock:
            self._injections.append(injection)
        return injection

    def heal(self) -> None:
        """Break nothing any more."""
        with self._lock:
            self._injections.clear()

    def reset(self) -> None:
        """Forget objects, requests and faults; connections stay."""
        self.heal()
        self.objects.clear()
        self.buckets = {"bucket"}
        self.fail_delete_of.clear()
        self.etag_of = md5_of
        self.has_preconditions = True
        self.demands_checksum = self.demands_condition = False
        self.unheard, self.echoes = frozenset(), True
        self.requests.clear()

    def count(self, method: str | None = None) -> int:
        """Tell how many requests (with that method) came."""
        return sum(method is None or request.method == method for request in self.requests)

    # ---- sockets

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="object-server")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)  # a wrapped one is not what was accepted
        try:
            while self._exchange(connection):
                pass
        except OSError:
            pass  # the client hung up, or the server closes
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _exchange(self, connection: socket.socket) -> bool:
        """Serve one request; tell whether the connection may carry another."""
        head = _read_head(connection)
        if head is None:
            return False
        request, early = head
        length_bytes = int(request.headers.get("content-length", 0))
        fault = self._take_fault(request)
        if fault is not None and fault.kind in _BEFORE_BODY:
            self.requests.append(request)
            return self._leave_unread(connection, request, fault)
        if request.headers.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_body(connection, early, length_bytes, None if self.link_bytes_per_s is None else self._pass_link)
        if body is None:
            return False
        request = replace(request, body=body)
        self.requests.append(request)
        if fault is None:
            return _send(connection, request, self.handle(request))
        return self._misbehave(connection, request, fault)

    def _pass_link(self, size_bytes: int) -> None:
        """Wait as long as so many bytes take on a link that all connections share, in turn."""
        assert self.link_bytes_per_s is not None
        with self._link_lock:
            self._link_free_s = max(self._link_free_s, time.monotonic()) + size_bytes / self.link_bytes_per_s
            stop_s = self._link_free_s
        self._closing.wait(timeout=stop_s - time.monotonic())

    def _leave_unread(self, connection: socket.socket, request: Request, fault: Fault) -> bool:
        """Fail without reading the body; closing then resets the connection under whoever still sends."""
        if fault.kind is FaultKind.STALL_IN_REQUEST:
            self._closing.wait(timeout=5)
        if fault.kind is FaultKind.EARLY_STATUS:
            _send(connection, request, _fault_reply(request, fault))
            time.sleep(0.2)
            return False
        return _reset(connection)

    def _take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for injection in self._injections:
                if injection.times != 0 and injection.matches(request):
                    injection.times -= 1
                    injection.fired += 1
                    return injection.fault
        return None

    def _misbehave(self, connection: socket.socket, request: Request, fault: Fault) -> bool:
        if fault.kind is FaultKind.STATUS:
            return _send(connection, request, _fault_reply(request, fault))
        if fault.kind in (FaultKind.RESET_BEFORE_REPLY, FaultKind.NO_HTTP):
            return _reset(connection) if fault.body is None else _babble(connection, fault.body)
        if fault.kind is FaultKind.STALL:
            return self._stall(connection)
        if fault.kind is FaultKind.SAME_PAGE:
            request = replace(request, query={name: request.query[name] for name in request.query.keys() - _MARKS})
        reply = self.handle(request, refused=fault.code if fault.kind is FaultKind.PARTIAL else "")
        if fault.kind is FaultKind.LOST_ACK:
            return _reset(connection)
        if fault.kind is FaultKind.LOST_ACK_STALL:
            return self._stall(connection)
        return self._spoil(connection, request, reply, fault.kind)

    def _spoil(self, connection: socket.socket, request: Request, reply: Reply, kind: FaultKind) -> bool:
        body, half = bytes(reply.body), len(reply.body) // 2
        sent = {
            FaultKind.FLIPPED_BYTE: bytes(byte ^ 0xFF for byte in body[:1]) + body[1:],
            FaultKind.SHORT_MATCHING: body[:half],
            FaultKind.LONG_MATCHING: body + b"\0",
            **dict.fromkeys((FaultKind.TWICE, FaultKind.SAME_PAGE, FaultKind.PARTIAL), body),
        }
        if kind in sent:
            is_open = _send(connection, request, replace(reply, body=sent[kind]))
            return is_open and (kind is not FaultKind.TWICE or _send(connection, request, reply))
        connection.sendall(_head_bytes(reply) + body[:half])
        if kind is FaultKind.RESET_IN_REPLY:
            time.sleep(0.05)  # let the half arrive: a reset discards what the peer has not read yet
            return _reset(connection)
        if kind is FaultKind.STALL_IN_REPLY:
            return self._stall(connection)
        return False

    def _stall(self, connection: socket.socket) -> bool:
        """Say nothing until the client hangs up or the server closes."""
        while not self._closing.is_set():
            readable, _, _ = select.select([connection], [], [], 0.05)
            if readable and not connection.recv(65536):
                break
        return False


def _read_head(connection: socket.socket) -> tuple[Request, bytes] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return None
        data += piece
    head, _, early = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    url = urlsplit(target)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    return Request(method=method, path=url.path, query=query, headers=headers), early


def _read_body(
    connection: socket.socket, early: bytes, length_bytes: int, pace: Callable[[int], None] | None
) -> bytearray | None:
    body = bytearray(length_bytes)
    body[: len(early)] = early
    view, filled = memoryview(body), len(early)
    while filled < length_bytes:
        count = connection.recv_into(
            view[filled:], 0 if pace is None else min(length_bytes - filled, _SLOW_PIECE_BYTES)
        )
        if not count:
            return None
        if pace is not None:
            pace(count)
        filled += count
    return body


def _head_bytes(reply: Reply) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {'OK' if reply.status < 300 else 'Error'}"]
    headers = {"Content-Length": str(len(reply.body)), "Date": formatdate(usegmt=True), **reply.headers}
    lines.extend(f"{name}: {value}" for name, value in headers.items())
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _send(connection: socket.socket, request: Request, reply: Reply) -> bool:
    connection.sendall(_head_bytes(reply))
    if request.method != "HEAD" and reply.body:
        connection.sendall(reply.body)
    return request.headers.get("connection", "").lower() != "close"


def _reset(connection: socket.socket) -> bool:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False  # the caller closes, and a zero linger turns that into a reset


def _babble(connection: socket.socket, data: bytes) -> bool:
    connection.sendall(data)
    return False


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it was closed already
        connection.shutdown(socket.SHUT_RDWR)


def _fault_reply(request: Request, fault: Fault) -> Reply:
    reply = error_reply(request, fault.status, fault.code, fault.message)
    body = reply.body if fault.body is None else fault.body
    return replace(reply, body=body, headers={**reply.headers, **fault.headers})
