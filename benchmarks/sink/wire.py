"""Turn a socket into HTTP requests with readable bodies, and answers into bytes on it.

Just enough of HTTP/1.1 for S3 clients: keep-alive, `Expect: 100-continue`, bodies with a length, chunked bodies,
and the `aws-chunked` framing inside either. Bodies go by whole `recv` and `sendfile` calls, which run without the
interpreter lock. Knows nothing of S3's verbs. One thread per connection.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qsl, unquote

__all__ = [
    "Answer",
    "Connection",
    "Drain",
    "Gate",
    "Link",
    "Reader",
    "Request",
    "Source",
    "TlsConnection",
    "body_reader",
]

_HEAD_LIMIT_BYTES = 64 * 1024
_SLICE_BYTES = 256 * 1024
_SOCKET_BYTES = 256 * 1024
# Of bodies that are drained: so much at once, so that the sink seldom takes a core, and none that is shorter.
_DRAINED_BYTES = 4 << 20
_KEPT_BYTES = 1 << 20
_SERVER = re.compile(r"\Ahttps?://[^/?]*")
_BURST_S = 0.01  # sleeps end late; what was missed for so long may be caught up
_REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    308: "Resume Incomplete",
    400: "Bad Request",
    404: "Not Found",
    411: "Length Required",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    501: "Not Implemented",
    507: "Insufficient Storage",
}


class Gate:
    """One rate that all connections share, in both directions; it sleeps and never spins. Any thread may enter."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at_s = clock()
        self._lock = threading.Lock()

    def take(self, moved_bytes: int) -> None:
        """Sleep until so many more bytes may have passed."""
        with self._lock:
            now_s = self._clock()
            self._free_at_s = max(self._free_at_s, now_s - _BURST_S) + moved_bytes / self._bytes_per_s
            wait_s = self._free_at_s - now_s
        self._sleep(max(0.0, wait_s))


@dataclass(slots=True)
class Drain:
    """Whether large pieces of bodies are taken from the kernel without a copy, and lost.

    That is the least that a server can cost the cores of a client beside it. Behind TLS all is received as ever.
    """

    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What the network between client and store adds; zero means nothing.

    Attributes:
        latency_s: waited once per request.
        bytes_per_s: upper bound per connection and direction.
        gate: upper bound of all connections together.
        drain: where bodies go instead.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    gate: Gate | None = None
    drain: Drain = field(default_factory=Drain)

    def slice_bytes(self, length_bytes: int) -> int:
        """How much to move in one call: all of it, unless the pace must be kept."""
        most_bytes = _DRAINED_BYTES if self.drain.is_open else _SLICE_BYTES
        return min(length_bytes, most_bytes) if self.bytes_per_s or self.gate else length_bytes

    def wait_for(self, begun_s: float, moved_bytes: int) -> None:
        """Sleep until `moved_bytes` may have passed since `begun_s`."""
        if self.bytes_per_s:
            due_s = begun_s + moved_bytes / self.bytes_per_s
            time.sleep(max(0.0, due_s - time.monotonic()))

    def pass_gate(self, moved_bytes: int) -> None:
        """Sleep until the whole link may have moved so many more."""
        if self.gate:
            self.gate.take(moved_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request's head: method, decoded path, query and lower-case headers."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: status and headers, and a body as bytes or as `(offset, length)` pieces of a file.

    Attributes:
        length_bytes: what `Content-Length` says where no body is sent (HEAD).
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: Iterable[tuple[int, int]] = ()
    length_bytes: int | None = None


class Reader(Protocol):
    """Bytes that come in order."""

    def line(self) -> bytes:
        """Read up to and without the next CRLF."""
        ...

    def fill(self, view: memoryview) -> None:
        """Read exactly as many bytes as `view` has room for."""
        ...

    def finish(self) -> None:
        """Read what follows the payload, so that the next request starts at its own head."""
        ...


class Source(Protocol):
    """Memory that a file is, too."""

    fd: int

    @property
    def memory(self) -> memoryview:
        """All of it."""
        ...


class Connection:
    """One client's connection; reads requests and writes answers, in turn."""

    def __init__(self, sock: socket.socket, link: Link) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What is in flight then stays in the processor's cache; the kernel's own choice (megabytes) costs a third.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._sock = sock
        self._link = link
        self._ahead = bytearray()

    def request(self) -> Request | None:
        """Read the next request's head; None when the client has gone."""
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            more = self._sock.recv(_HEAD_LIMIT_BYTES)
            if not more or len(self._ahead) > _HEAD_LIMIT_BYTES:
                return None
            self._ahead += more
        head = bytes(self._ahead[:end]).decode("latin-1")
        del self._ahead[: end + 4]
        return _parse_head(head)

    def invite_body(self) -> None:
        """Tell a client that asked first (`Expect: 100-continue`) to send its body."""
        self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def line(self) -> bytes:
        """Read up to and without the next CRLF."""
        while (end := self._ahead.find(b"\r\n")) < 0:
            more = self._sock.recv(_HEAD_LIMIT_BYTES)
            if not more:
                raise ConnectionError("the client left inside a body")
            self._ahead += more
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def fill(self, view: memoryview) -> None:
        """Read exactly as many bytes as `view` has room for."""
        done = min(len(view), len(self._ahead))
        view[:done] = self._ahead[:done]
        del self._ahead[:done]
        begun_s, step = time.monotonic(), self._link.slice_bytes(len(view))
        while done < len(view):
            got = self._take(view[done : done + step])
            if not got:
                raise ConnectionError("the client left inside a body")
            done += got
            self._link.wait_for(begun_s, done)
            self._link.pass_gate(got)

    def finish(self) -> None:
        """Nothing follows a payload of a known length."""

    def _take(self, into: memoryview) -> int:
        # WAITALL makes it one call per body: the kernel, not Python, waits for the rest.
        flags = socket.MSG_WAITALL
        if self._link.drain.is_open and len(into) > _KEPT_BYTES:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DRAINED_BYTES)
            flags |= socket.MSG_TRUNC
        return self._sock.recv_into(into, 0, flags)

    def _give(self, source: Source, start: int, length_bytes: int) -> int:
        return os.sendfile(self._sock.fileno(), source.fd, start, length_bytes)

    def answer(self, answer: Answer, *, source: Source) -> None:
        """Send one answer; `source` is what its pieces point into."""
        pieces = list(answer.pieces)
        sent_bytes = sum(length for _, length in pieces) + len(answer.body)
        length = sent_bytes if answer.length_bytes is None else answer.length_bytes
        self._sock.sendall(_head_of(answer, length) + answer.body)
        begun_s, sent = time.monotonic(), 0
        for start, length in pieces:
            self._send_piece(source, start, start + length)
            sent += length
            self._link.wait_for(begun_s, sent)

    def _send_piece(self, source: Source, start: int, stop: int) -> None:
        begun_s, at = time.monotonic(), start
        step = self._link.slice_bytes(stop - start)
        while at < stop:
            sent = self._give(source, at, min(step, stop - at))
            at += sent
            self._link.wait_for(begun_s, at - start)
            self._link.pass_gate(sent)


class TlsConnection(Connection):
    """The same behind TLS, whose bytes pass through the library's own memory."""

    def _take(self, into: memoryview) -> int:
        return self._sock.recv_into(into)

    def _give(self, source: Source, start: int, length_bytes: int) -> int:
        self._sock.sendall(source.memory[start : start + length_bytes])
        return length_bytes


class _Chunks:
    """The content of `size[;extension] CRLF data CRLF … 0 CRLF trailers CRLF`: HTTP's chunks and S3's alike."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._left = 0

    def line(self) -> bytes:
        line, byte = bytearray(), bytearray(1)
        while not line.endswith(b"\r\n"):
            self.fill(memoryview(byte))
            line += byte
        return bytes(line[:-2])

    def fill(self, view: memoryview) -> None:
        while len(view):
            if not self._left:
                self._next_chunk()
            step = min(len(view), self._left)
            self._source.fill(view[:step])
            view, self._left = view[step:], self._left - step
            if not self._left:
                self._source.line()

    def finish(self) -> None:
        if self._left or self._next_size():
            raise ConnectionError("a chunked body is longer than announced")
        while self._source.line():
            pass
        self._source.finish()

    def _next_chunk(self) -> None:
        self._left = self._next_size()
        if not self._left:
            raise ConnectionError("a chunked body ended early")

    def _next_size(self) -> int:
        return int(self._source.line().split(b";")[0], 16)


def body_reader(request: Request, connection: Connection) -> tuple[Reader, int]:
    """Return what reads the request's payload, and the payload's length.

    Raises:
        ConnectionError: the head does not tell the length; what follows cannot be read.
    """
    reader: Reader = connection
    is_chunked = "chunked" in request.headers.get("transfer-encoding", "")
    if is_chunked:
        reader = _Chunks(reader)
    if _is_aws_chunked(request.headers):
        reader = _Chunks(reader)
    default = None if is_chunked else "0"
    length = request.headers.get("x-amz-decoded-content-length") or request.headers.get("content-length", default)
    if length is None:
        raise ConnectionError("a body of unknown length")
    return reader, int(length)


def _is_aws_chunked(headers: Mapping[str, str]) -> bool:
    streaming = headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
    return streaming or "aws-chunked" in headers.get("content-encoding", "")


def _parse_head(head: str) -> Request:
    start, *lines = head.split("\r\n")
    method, target, _ = start.split(" ", 2)
    # Some clients name the server here as well, as they may.
    path, _, query = _SERVER.sub("", target).partition("?")
    headers = (line.partition(":") for line in lines)
    return Request(
        method=method,
        path=unquote(path),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        headers={name.strip().lower(): value.strip() for name, _, value in headers},
    )


def _head_of(answer: Answer, length_bytes: int) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Unknown')}", f"Content-Length: {length_bytes}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
