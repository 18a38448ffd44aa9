"""One server of each kind for all processes of a test run: it starts when the first of them asks.

    Host()                        in the process that outlives the others: it owns the servers
    shared_server(address, kind)  in any of them ──▶ the server that runs, as a value

The servers end with the host's process, whatever ended it (see `supervise`). Each question has a thread of its own, so
that a server that takes long to start holds up only those who want it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from servers import Server, ServerStartError, fake_gcs, localstack_s3, seaweedfs

__all__ = ["BUCKETS", "Host", "Kind", "shared_server"]

Kind = Literal["seaweedfs", "localstack", "fake-gcs"]

# Made by the host, since two processes that find a bucket missing would both make it.
BUCKETS = ("tests", "contract")
_STARTS: Mapping[str, Callable[[Path], AbstractContextManager[Server]]] = {
    "seaweedfs": seaweedfs,
    "localstack": localstack_s3,
    "fake-gcs": fake_gcs,
}
_FAMILY = "AF_UNIX"


class Host:
    """The owner of the servers of one run; a context manager."""

    def __init__(self) -> None:
        """Listen for questions; no server runs yet."""
        self._ends = ExitStack()
        directory = TemporaryDirectory(prefix="cloudckpt-servers-", ignore_cleanup_errors=True)
        self._directory = Path(self._ends.enter_context(directory))
        self._locks = {kind: threading.Lock() for kind in _STARTS}
        self._running: dict[str, Server] = {}
        self._listener = Listener(str(self._directory / "host"), _FAMILY, backlog=16)
        self.address = str(self._listener.address)
        threading.Thread(target=self._serve, name="servers-host", daemon=True).start()

    def close(self) -> None:
        """Stop every server that runs."""
        self._listener.close()
        self._ends.close()

    def _serve(self) -> None:
        while True:
            try:
                asking = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(asking,), name="servers-answer", daemon=True).start()

    def _answer(self, asking: Connection) -> None:
        with asking:
            try:
                kind = asking.recv()
                answer: Server | ServerStartError = self._server(kind)
            except EOFError:
                return
            except ServerStartError as exc:
                answer = exc
            asking.send(answer)

    def _server(self, kind: str) -> Server:
        with self._locks[kind]:
            if kind not in self._running:
                server = self._ends.enter_context(_STARTS[kind](self._directory / kind))
                for bucket in BUCKETS:
                    server.make_bucket(bucket)
                self._running[kind] = server
            return replace(self._running[kind])  # without the connections of this process


def shared_server(address: str, kind: Kind) -> Server:
    """Return the host's server of that kind, started if need be.

    Raises:
        ServerStartError: it did not start.
    """
    with Client(address, _FAMILY) as host:
        host.send(kind)
        answer = host.recv()
    if isinstance(answer, ServerStartError):
        raise answer
    server: Server = answer
    return server
