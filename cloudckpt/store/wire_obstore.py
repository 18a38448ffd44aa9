"""Carry verbs by obstore, whose Rust threads send tensor memory without a copy and without Python's lock.

    buffers ──▶ obstore.put ──▶ socket          socket ──▶ obstore's memory ──▶ a view of it, or the caller's memory

Keeping house goes over fsspec's wire. obstore shows no headers, and a HEAD has no body, so that nothing would tell what
its refusal means; obstore's listings fail as a whole on one foreign name with an empty segment
(`a//b`), cannot tell a marker of a directory from an empty object, and match whole segments only; its bulk delete
names one of the objects that it left. One request per call; the time limit of a request, its body included, is
obstore's own. Any thread may enter.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import obstore
from obstore.exceptions import BaseError

from cloudckpt.options import MIB
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_end, check_length, check_limit, joined, place
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.facts import HttpStatusError, before_sending, is_bare_redirect
from cloudckpt.store.obstore_s3 import ObstoreClient
from cloudckpt.store.wire import Page, Wire

__all__ = ["ObstoreWire", "is_lost_to_a_fork"]

# A chunk is copied once more, into the caller's memory; 64 KiB to 4 MiB cost the same CPU time on loopback.
_CHUNK_BYTES = MIB

logger = logging.getLogger(__name__)

_runtime_pid: int | None = None


def is_lost_to_a_fork() -> bool:
    """Tell whether this process was forked from one that used obstore: its threads did not come along.

    A request would wait for them for ever, also on a client made here.
    """
    return _runtime_pid not in (None, os.getpid())


@runtime_checkable
class HasRegion(Protocol):
    """A wire that can say where its bucket is."""

    def region(self) -> str:
        """Return the region, or ""."""


class ObstoreWire:
    """One bucket behind one client of obstore."""

    def __init__(self, client: ObstoreClient, make_keeper: Callable[[], Wire]) -> None:
        self._client = client
        self._make_keeper = make_keeper
        self._kept: Wire | None = None
        self._lock = threading.Lock()

    @property
    def credential_kind(self) -> CredentialKind:
        if self._client.credentials is None:
            return "none"
        with self._lock:
            keeper = self._kept
        known = self._client.credentials.kind
        return known or ("temporary" if keeper is None else keeper.credential_kind)

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        with self._told_region():
            obstore.put(
                self._store(), name, iter(list(joined(buffers))), use_multipart=False, attributes=self._attributes()
            )

    def create(self, name: str, data: bytes) -> None:
        with self._told_region():
            obstore.put(self._store(), name, data, mode="create", use_multipart=False, attributes=self._attributes())

    def get(self, name: str, start: int, stop: int, into: memoryview | None) -> memoryview:
        with self._told_region():
            reply = obstore.get(self._store(), name, options={"range": (start, stop)})
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
        with self._told_region():
            reply = obstore.get(self._store(), name)
        check_limit(reply.meta["size"], limit_bytes)
        data = bytes(reply.bytes())
        check_length(len(data), reply.meta["size"])
        return data

    def head(self, name: str) -> ObjectInfo:
        return self._keeper().head(name)

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        return self._keeper().page(prefix, delimiter, mark)

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        return self._keeper().delete(names)

    def close(self) -> None:
        with self._lock:
            keeper, self._kept = self._kept, None
        if keeper is not None:
            keeper.close()

    def _keeper(self) -> Wire:
        with self._lock:
            if self._kept is None:
                self._kept = self._make_keeper()
            return self._kept

    @contextmanager
    def _told_region(self) -> Iterator[None]:
        """Have the region looked up where the store says no more than "elsewhere": obstore shows no headers."""
        try:
            yield
        except BaseError as exc:
            region = self._keeper_region() if is_bare_redirect(exc) else None
            if region is None:
                raise
            raise HttpStatusError(301, "PermanentRedirect", region=region) from exc

    def _keeper_region(self) -> str | None:
        keeper = self._keeper()
        if not isinstance(keeper, HasRegion):
            return None
        try:
            return keeper.region()
        except Exception as exc:  # noqa: BLE001 - it was only to say more of the first failure
            logger.debug("the bucket's region cannot be asked for: %s", type(exc).__name__)
            return None

    def _store(self) -> obstore.store.ObjectStore:
        global _runtime_pid  # noqa: PLW0603 - obstore's threads are one set per process, too
        if self._client.credentials is not None:
            with before_sending():
                self._client.credentials.ensure()
        _runtime_pid = os.getpid()
        return self._client.store

    def _attributes(self) -> dict[str, str] | None:
        return dict(self._client.attributes) or None
