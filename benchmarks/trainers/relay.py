"""Forward a client's connections to a store, count the bytes that go there, and call somebody at a chosen one.

    client ──▶ relay ──counted──▶ store        the byte is reached: call, and forward nothing more on any connection
    client ◀───────────────────── store

So a save is struck in its middle, whatever the client and however fast the store. Loopback only. Two threads per
connection; the count is under one lock, which is held while somebody is called.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

__all__ = ["Relay", "running_relay"]

_CHUNK_BYTES = 64 << 10


class Relay:
    """A listening socket before one store; any thread may arm it."""

    def __init__(self, store_url: str, server: socket.socket) -> None:
        target = urlsplit(store_url)
        self._store = str(target.hostname), int(target.port or 80)
        self._server = server
        self._lock = threading.Lock()
        self._left_bytes = 0
        self._strike: Callable[[], None] | None = None
        self._generation = 0

    @property
    def endpoint_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def arm(self, after_bytes: int, strike: Callable[[], None] | None) -> None:
        """Call `strike` once so many more bytes have come for the store; None disarms."""
        with self._lock:
            self._left_bytes, self._strike = after_bytes, strike

    def serve(self) -> None:
        """Accept until the socket is closed."""
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(self._store) as store:
            for one in (client, store):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(store, client), daemon=True)
            back.start()
            generation = self._generation
            while data := client.recv(_CHUNK_BYTES):
                if self._count(len(data)) != generation:
                    return  # who sends on this connection is dead
                store.sendall(data)
            with suppress(OSError):
                store.shutdown(socket.SHUT_WR)
            back.join()

    def _count(self, moved_bytes: int) -> int:
        """Return a number that changes with each strike."""
        with self._lock:
            if self._strike is not None:
                self._left_bytes -= moved_bytes
                if self._left_bytes <= 0:
                    strike, self._strike = self._strike, None
                    strike()
                    self._generation += 1
            return self._generation


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def running_relay(store_url: str) -> Iterator[Relay]:
    """Run a relay before a store until the block ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        relay = Relay(store_url, server)
        threading.Thread(target=relay.serve, daemon=True).start()
        yield relay
