"""Carry verbs by obstore, whose Rust threads send tensor memory without a copy and without Python's lock.

    buffers ──▶ obstore.put ──▶ socket          socket ──▶ obstore's memory ──▶ a view of it, or the caller's memory

Keeping house goes over fsspec's wire. obstore's listings fail as a whole on one foreign name with an empty segment
(`a//b`), cannot tell a marker of a directory from an empty object, and match whole segments only; its bulk delete
names one of the objects that it left. One request per call; the time limit of a request, its body included, is
obstore's own. Any thread may enter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import obstore

from cloudckpt.options import MIB
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_end, check_length, check_limit, joined, place
from cloudckpt.store.obstore_s3 import ObstoreClient
from cloudckpt.store.proof import check_created, check_generation, check_object, check_stored
from cloudckpt.store.wire import Page, Wire

__all__ = ["ObstoreWire", "is_lost_to_a_fork"]

# A chunk is copied once more, into the caller's memory; 64 KiB to 4 MiB cost the same CPU time on loopback.
_CHUNK_BYTES = MIB

_runtime_pid: int | None = None


def is_lost_to_a_fork() -> bool:
    """Tell whether this process was forked from one that used obstore: its threads did not come along.

    A request would wait for them for ever, also on a client made here.
    """
    return _runtime_pid not in (None, os.getpid())


class ObstoreWire:
    """One bucket behind one client of obstore."""

    def __init__(self, client: ObstoreClient, make_keeper: Callable[[], Wire]) -> None:
        self._client = client
        self._make_keeper = make_keeper
        self._kept: Wire | None = None
        self._lock = threading.Lock()

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        reply = obstore.put(
            self._store(), name, iter(list(joined(buffers))), use_multipart=False, attributes=self._attributes()
        )
        if self._client.has_generations:
            check_generation(reply["version"])
        else:
            size_bytes = sum(buffer.nbytes for buffer in buffers)
            check_stored(reply["e_tag"], size_bytes, lambda: self._described(name))

    def create(self, name: str, data: bytes) -> None:
        reply = obstore.put(
            self._store(), name, data, mode="create", use_multipart=False, attributes=self._attributes()
        )
        if self._client.has_generations:
            check_generation(reply["version"])
        else:
            check_created(reply["e_tag"], data, lambda: self.read(name, len(data)))

    def get(self, name: str, start: int, stop: int, into: memoryview | None) -> memoryview:
        reply = self._asked(name, {"range": (start, stop)})
        check_end(reply.meta["size"], start, stop)
        if into is None:
            data = memoryview(reply.bytes())
            check_length(data.nbytes, stop - start)
            return data
        filled = 0
        for chunk in reply.stream(min_chunk_size=_CHUNK_BYTES):
            filled = place(memoryview(chunk), into, filled)
        check_length(filled, into.nbytes)
        return into

    def read(self, name: str, limit_bytes: int) -> bytes:
        reply = self._asked(name, {})
        check_limit(reply.meta["size"], limit_bytes)
        data = bytes(reply.bytes())
        check_length(len(data), reply.meta["size"])
        return data

    def head(self, name: str) -> ObjectInfo:
        # Not `obstore.head`, which does not show the type of what it found.
        found = self._asked(name, {"head": True}).meta
        return ObjectInfo(key=name, size_bytes=found["size"], modified_s=found["last_modified"].timestamp())

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        return self._keeper().page(prefix, delimiter, mark)

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        return self._keeper().delete(names)

    def close(self) -> None:
        with self._lock:
            keeper, self._kept = self._kept, None
        if keeper is not None:
            keeper.close()

    def _asked(self, name: str, options: obstore.GetOptions) -> obstore.GetResult:
        reply = obstore.get(self._store(), name, options=options)
        proof = reply.meta["version" if self._client.has_generations else "e_tag"]
        check_object(proof, reply.attributes.get("Content-Type"))
        return reply

    def _described(self, name: str) -> tuple[str | None, int]:
        found = self._asked(name, {"head": True}).meta
        return found["e_tag"], found["size"]

    def _keeper(self) -> Wire:
        with self._lock:
            if self._kept is None:
                self._kept = self._make_keeper()
            return self._kept

    def _store(self) -> obstore.store.ObjectStore:
        global _runtime_pid  # noqa: PLW0603 - obstore's threads are one set per process, too
        if self._client.credentials is not None:
            self._client.credentials.ensure()
        _runtime_pid = os.getpid()
        return self._client.store

    def _attributes(self) -> dict[str, str] | None:
        return dict(self._client.attributes) or None
