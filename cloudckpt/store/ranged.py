"""Read ranges of objects by HTTP of our own: the kernel copies what comes straight into memory of who takes it.

    stream ──▶ a signed head ──▶ an idle connection, or a new one ──▶ the reply's head, checked ──▶ its body, taken

An engine's client gathers a body in memory of its own, which is touched and copied once more: most of what a restore
costs. One request per call, nothing is followed and nothing repeated; bytes are seen to move. What it raises are the
exceptions that `classify` knows. Keeps FORMAT 14 and 16. Any thread may enter, a signal's handler, too.
"""

from __future__ import annotations

import http.client
import io
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from cloudckpt.options import KIB, MIB
from cloudckpt.store.connection import PIECE_BYTES, Clock, Connection, Endpoint
from cloudckpt.store.facts import GarbledReplyError, before_sending, refusal
from cloudckpt.store.intake import Flow, Intake
from cloudckpt.store.proof import check_object
from cloudckpt.store.wire import check_range

if TYPE_CHECKING:
    import socket

    from _typeshed import WriteableBuffer

__all__ = ["RangeReader"]

# Stores hang up after 20 s and more; what is older may be gone without a word.
_IDLE_S = 10.0
# What is read of a refusal: more than its code and its message.
_REFUSAL_BYTES = 64 * KIB
# More than the head of an object's reply: what comes of the body with it is copied once more.
_HEAD_BYTES = 4 * KIB
_BLANK_LINE = b"\r\n\r\n"
_ANSWERS = ("HTTP/1.1 206", "HTTP/1.1 200")

Signer = Callable[[str, Mapping[str, str]], Mapping[str, str]]
"""URL and headers of a get → the headers that prove who asks, those given among them."""


class RangeReader:
    """The ranged gets of one bucket."""

    def __init__(
        self, base_url: str, sign: Signer, *, proof: str, connect_s: float, context: Callable[[], ssl.SSLContext]
    ) -> None:
        """Take where the bucket is.

        Args:
            base_url: what the names in the bucket follow, after a slash.
            sign: proves who asks; may ask for credentials.
            proof: the header, in lower case, that only an object's reply has.
            connect_s: seconds that a connection attempt may take.
            context: makes what says whose certificates are trusted, once, if the URL is https.
        """
        url = urlsplit(base_url)
        is_tls = url.scheme == "https"
        self._base_url = base_url
        self._sign = sign
        self._proof = proof
        # As it is signed.
        self._host = url.netloc.lower().removesuffix(":443" if is_tls else ":80")
        self._endpoint = Endpoint(
            host=str(url.hostname),
            port=url.port or (443 if is_tls else 80),
            connect_s=connect_s,
            make_context=cache(context) if is_tls else None,
        )
        # A list alone: a signal's handler may come at any moment, and a lock be held then.
        self._idle: list[tuple[float, Connection]] = []
        weakref.finalize(self, _close_all, self._idle)

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        """Read the bytes [start, stop), one or more, in one request; see `Wire.stream`.

        Raises:
            UnsentError: nothing was sent; of an `ssl.SSLCertVerificationError`, if the certificate is not trusted.
        """
        head, clock = self._head(name, start, stop), Clock()
        with _network_errors():
            connection = self._connection(clock)
            try:
                connection.send(head)
                is_reusable = self._receive(connection, start, stop, into)
            except BaseException:
                connection.close()
                raise
        if is_reusable:
            self._idle.append((time.monotonic(), connection))
        else:
            connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use is closed by its user, or with this object."""
        _close_all(self._idle)

    def _head(self, name: str, start: int, stop: int) -> bytes:
        url = f"{self._base_url}/{quote(name, safe='/~')}"
        with before_sending():
            signed = self._sign(url, {"Range": f"bytes={start}-{stop - 1}"})
        # What a gateway may change is not signed.
        headers = {"Host": self._host, **signed, "Accept-Encoding": "identity", "User-Agent": "cloudckpt"}
        target = "/" + url.split("/", 3)[3]
        lines = [f"GET {target} HTTP/1.1", *(f"{key}: {text}" for key, text in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def _connection(self, clock: Clock) -> Connection:
        while self._idle:
            try:
                since_s, connection = self._idle.pop()
            except IndexError:  # another thread has it
                break
            if time.monotonic() - since_s < _IDLE_S and connection.is_quiet:
                connection.clock = clock
                return connection
            connection.close()
        with before_sending(), _network_errors():
            return self._endpoint.connect(clock)

    def _receive(self, connection: Connection, start: int, stop: int, into: Intake) -> bool:
        """Hand on what was asked for; tell whether the connection may carry another request."""
        came = _until_blank_line(connection)
        head, _, ahead = came.partition(_BLANK_LINE)
        headers = _plain_headers(head)
        if headers is None:
            return self._receive_other(_Coming(came, connection), start, stop, into)
        self._check(headers.get, int(headers["content-length"]), start, stop)
        flow = Flow(into, stop - start)
        flow.take(ahead)
        while flow.left_bytes:
            if not (count := connection.read(flow.room(PIECE_BYTES))):
                flow.end()
            flow.took(count)
            # Who takes it may be slow, which the store is not to blame for.
            connection.clock.note_move()
        return headers.get("connection", "").lower() != "close"

    def _receive_other(self, coming: _Coming, start: int, stop: int, into: Intake) -> bool:
        """The same of what is no plain reply: a refusal, one in chunks or without a length, one that others precede."""
        reply = http.client.HTTPResponse(cast("socket.socket", coming), method="GET")
        reply.begin()
        if reply.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise refusal(reply.status, reply.getheader, _refusal_of(reply))
        self._check(reply.getheader, stop - start if reply.length is None else reply.length, start, stop)
        flow = Flow(into, stop - start)
        while flow.left_bytes and (count := reply.readinto(flow.room(MIB))):
            flow.took(count)
            coming.connection.clock.note_move()
        flow.end()
        # One in chunks is over once one more read has found its end.
        if not reply.isclosed():
            flow.take(reply.read(1))
        return not reply.will_close

    def _check(self, header: Callable[[str], str | None], length_bytes: int, start: int, stop: int) -> None:
        check_object(header(self._proof), header("content-type"))
        check_range(header("content-range") or "", length_bytes, start, stop)


def _until_blank_line(connection: Connection) -> bytes:
    """Return what has come once the head of a reply is whole, and perhaps the begin of its body."""
    piece = memoryview(bytearray(_HEAD_BYTES))
    came = b""
    while _BLANK_LINE not in came:
        if not (count := connection.read(piece)):
            raise ConnectionResetError("the connection ended before a reply")
        came += piece[:count]
        if len(came) > _REFUSAL_BYTES or not came.startswith(b"HTTP/"[: len(came)]):
            raise GarbledReplyError("the reply is no HTTP")
    return came


def _plain_headers(head: bytes) -> dict[str, str] | None:
    """Return the headers, by lower-case names, of a reply with a body of a known length that refuses nothing."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    is_plain = first.startswith(_ANSWERS) and "transfer-encoding" not in headers
    return headers if is_plain and headers.get("content-length", "").isdecimal() else None


class _Coming(io.RawIOBase):
    """What has come, and then what a connection brings, as `http.client` wants to be given it."""

    def __init__(self, came: bytes, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self._came = came

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, memory: WriteableBuffer) -> int:
        view = memoryview(memory)
        if not self._came:
            return self.connection.read(view)
        count = min(len(self._came), view.nbytes)
        view[:count], self._came = self._came[:count], self._came[count:]
        return count


@contextmanager
def _network_errors() -> Iterator[None]:
    """Raise what the network, or a reply that is none, brings as what `classify` knows."""
    try:
        yield
    except (TimeoutError, ConnectionError, ssl.SSLCertVerificationError):
        raise
    except (OSError, http.client.IncompleteRead) as exc:
        raise ConnectionError(type(exc).__name__) from exc
    except http.client.HTTPException as exc:
        raise GarbledReplyError("the reply is no HTTP") from exc


def _refusal_of(reply: http.client.HTTPResponse) -> bytes:
    try:
        return reply.read(_REFUSAL_BYTES)
    except (OSError, http.client.HTTPException):  # its status says enough
        return b""


def _close_all(idle: list[tuple[float, Connection]]) -> None:
    while idle:
        with suppress(IndexError):  # another thread has it
            idle.pop()[1].close()
