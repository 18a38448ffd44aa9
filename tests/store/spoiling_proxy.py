"""Pass bytes on between a client and a server on loopback, and flip one on its way up when a test asks for it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

__all__ = ["SpoilingProxy"]

_PIECE_BYTES = 1 << 16


class SpoilingProxy:
    """Flips the byte behind the first `after` in a stream to the server: in the next one, and on demand in others.

    Attributes:
        spoilt: how many bytes were flipped.
    """

    def __init__(self, endpoint: str, *, after: bytes) -> None:
        url = urlsplit(endpoint)
        self._server = (str(url.hostname), int(url.port or 80))
        self._after = after
        self._is_armed = threading.Event()
        self._is_armed.set()
        self.spoilt = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = [self._listener]

    @property
    def endpoint(self) -> str:
        """The URL to give to a client."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def spoil_next(self) -> None:
        """Flip a byte once more."""
        self._is_armed.set()

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exc: object) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="spoiling-proxy")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                self._spawn(self._pass_on, client, server, self._after)
                self._spawn(self._pass_on, server, client, b"")

    def _pass_on(self, source: socket.socket, target: socket.socket, after: bytes) -> None:
        with suppress(OSError):
            seen = b""
            while piece := bytearray(source.recv(_PIECE_BYTES)):
                if after:
                    seen = self._spoil(seen, piece, after)
                target.sendall(piece)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _spoil(self, seen: bytes, piece: bytearray, after: bytes) -> bytes:
        """Flip the byte behind the mark, if it is in this piece; return the end of the stream so far."""
        place = (seen + piece).find(after)
        at = place + len(after) - len(seen)
        if place >= 0 and 0 <= at < len(piece) and self._is_armed.is_set():
            self._is_armed.clear()
            piece[at] ^= 0xFF
            self.spoilt += 1
        return (seen + piece)[-len(after) :]
