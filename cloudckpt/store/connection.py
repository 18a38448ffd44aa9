"""Turn an endpoint into connections that keep the limits of the request that they carry, whatever the network does.

    socket ──recv──▶ the caller's memory                                            plain: the kernel's copy alone
    socket ──recv──▶ some records, in the cache ──OpenSSL──▶ the caller's memory    TLS

Waits are short, and `limit_now` is asked after each: an end that is announced meanwhile counts at once, and the main
thread hears signals. Knows bytes; nothing of HTTP. A connection has one user at a time, on any thread.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

from cloudckpt.options import KIB, MIB
from cloudckpt.store.limit import Errand, limit_now

__all__ = ["PIECE_BYTES", "Clock", "Connection", "Endpoint"]

T = TypeVar("T")

# How long the kernel waits before limits and signals are looked at.
_LOOK_S = 0.1
# What one call of the kernel's may bring. It takes what is there: to have it wait for a MiB made both ends slower, as
# what has come by then is in no cache any more.
PIECE_BYTES = 4 * MIB
# Whoever asks for less reads a head, whose end nobody knows.
_HEAD_BYTES = 16 * KIB
# Many records of TLS for one call of the kernel's, still in the cache when they are decrypted.
_RECORDS_BYTES = 256 * KIB

_Address = tuple[int, int, int, str, Any]


class Clock:
    """When the bytes of one request moved last, and whether it may go on."""

    def __init__(self) -> None:
        self._moved_s = time.monotonic()

    def note_move(self) -> None:
        """Note that bytes have moved."""
        self._moved_s = time.monotonic()

    def check(self) -> None:
        """Raise `TimeoutError` if they stand still too long, or the time of the request is up."""
        limit, now_s = limit_now(), time.monotonic()
        if now_s >= limit.stop_s:
            raise TimeoutError("its time was up")
        if now_s >= self._moved_s + limit.still_s:
            raise TimeoutError("its bytes stood still")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where connections lead to.

    Attributes:
        connect_s: seconds that the attempt to make one may take.
        make_context: says whose certificates are trusted, when it is needed; None: without TLS.
    """

    host: str
    port: int
    connect_s: float
    make_context: Callable[[], ssl.SSLContext] | None = None
    _resolving: Errand[Sequence[_Address]] = field(default_factory=Errand, repr=False)

    def connect(self, clock: Clock) -> Connection:
        """Return a new connection.

        Raises:
            OSError: there is none; `ssl.SSLCertVerificationError` if the certificate is not trusted.
        """
        failed: OSError = ConnectionError(f"{self.host} has no address")
        # On another thread: a resolver that hangs is left to itself.
        for address in self._resolving.run(self._addresses):
            try:
                sock = self._connected(address, clock)
            except OSError as exc:
                failed = exc
                continue
            try:
                if self.make_context is None:
                    return Connection(sock, clock)
                return _TlsConnection(sock, clock, self.make_context(), self.host)
            except BaseException:
                sock.close()
                raise
        raise failed

    def _addresses(self) -> Sequence[_Address]:
        return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)

    def _connected(self, address: _Address, clock: Clock) -> socket.socket:
        family, kind, protocol, _, where = address
        sock = socket.socket(family, kind, protocol)
        try:
            self._await_peer(sock, where, clock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _await_peer(self, sock: socket.socket, where: Any, clock: Clock) -> None:  # noqa: ANN401 (the resolver's own)
        sock.settimeout(0)
        code, stop_s = sock.connect_ex(where), time.monotonic() + self.connect_s
        look = select.poll()
        look.register(sock, select.POLLOUT)
        if code == errno.EINPROGRESS:
            while not look.poll(_LOOK_S * 1e3):
                clock.check()
                if time.monotonic() >= stop_s:
                    raise TimeoutError(f"nobody answered in {self.connect_s} s")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))


class Connection:
    """A socket whose reads and writes end by the limits of the request under way.

    Attributes:
        clock: of that request; who makes it sets it.
    """

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self.clock = clock
        self._socket = sock
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel waits itself: a timeout of Python's is one more call for each that reads.
        wait = struct.pack("@ll", 0, int(_LOOK_S * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)

    def read(self, memory: memoryview) -> int:
        """Read into memory, one byte or more; return how many, 0 at the end."""
        return self._receive(memory[:PIECE_BYTES])

    def send(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                self.clock.check()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come, not even the end: then it may carry another request."""
        look = select.poll()
        look.register(self._socket, select.POLLIN)
        return not look.poll(0)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def _receive(self, view: memoryview) -> int:
        while True:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                self.clock.check()
            else:
                self.clock.note_move()
                return count


class _TlsConnection(Connection):
    """The same under TLS."""

    def __init__(self, sock: socket.socket, clock: Clock, context: ssl.SSLContext, host: str) -> None:
        super().__init__(sock, clock)
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._records = memoryview(bytearray(_RECORDS_BYTES))
        self._tls = context.wrap_bio(self._came, self._goes, server_hostname=host)
        self._done(self._tls.do_handshake)

    def read(self, memory: memoryview) -> int:
        view = memory[:PIECE_BYTES]
        is_body, filled = view.nbytes > _HEAD_BYTES, 0
        while filled < view.nbytes:
            count = self._done(partial(self._decrypted, view[filled:]))
            filled += count
            if not (count and is_body):
                break
        return filled

    def send(self, data: bytes) -> None:
        self._done(lambda: self._tls.write(data))

    def _decrypted(self, view: memoryview) -> int:
        # With memory to read into it returns a number, which its types do not know.
        return cast("int", self._tls.read(view.nbytes, view))

    def _done(self, step: Callable[[], T]) -> T:
        """Return what a step of TLS returns, once it has all that it needs of the network."""
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._flush()
            else:
                self._flush()
                return done
            if not (count := self._receive(self._records)):
                raise ConnectionResetError("the connection ended in the middle of it")
            self._came.write(self._records[:count])

    def _flush(self) -> None:
        if self._goes.pending:
            super().send(self._goes.read())
