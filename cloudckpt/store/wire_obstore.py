"""Carry verbs by obstore, whose Rust threads send tensor memory without a copy and without Python's lock.

    buffers ──▶ obstore.put ──▶ socket          socket ──▶ `ranged`, or chunks of obstore's ──▶ who takes the bytes

Keeping house goes over fsspec's wire. obstore shows no headers, and a HEAD has no body, so that nothing would tell what
its refusal means; obstore's listings fail as a whole on one foreign name with an empty segment (`a//b`), cannot tell a
marker of a directory from an empty object, and match whole segments only; its bulk delete names one of the objects that
it left. So does a request that has less time than usual, or that took too long before: a client of obstore's has one
time limit for all requests, their bodies included, and does not show how far they are, so that a put which moves slowly
cannot be told from one that stands still. Nor can one be ended that is on its way: when an end is announced meanwhile,
it is left behind. And so do all requests to an endpoint whose certificate OpenSSL trusts and obstore does not: one that
is its own authority. One request per call. Any thread may enter; the main one, which would hear no signal in Rust, has
its requests made on another.
"""

from __future__ import annotations

import logging
import math
import os
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar, runtime_checkable

import obstore
from obstore.exceptions import BaseError

from cloudckpt.options import MIB
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_end, check_length, check_limit, joined
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.facts import HttpStatusError, UnsentError, before_sending, is_bare_redirect, is_certificate_refused
from cloudckpt.store.intake import Flow, Intake
from cloudckpt.store.limit import Errand, led, limit_now
from cloudckpt.store.obstore_s3 import ObstoreClient
from cloudckpt.store.proof import check_created, check_generation, check_object, check_stored
from cloudckpt.store.wire import Page, Wire
from cloudckpt.threads import new_lock

__all__ = ["ObstoreWire", "is_lost_to_a_fork"]

T = TypeVar("T")

# A request that begins a moment after its operation has a little less than the usual time.
_NEARLY = 0.9
# How long a link is taken to be slow that has shown it.
_SLOW_S = 3600.0
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


class _Direct:
    """One bucket behind one client of obstore: what moves bytes."""

    def __init__(self, client: ObstoreClient, *, create_only: bool) -> None:
        self._client = client
        self._put_mode: Literal["create", "overwrite"] = "create" if create_only else "overwrite"

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        reply = obstore.put(
            *(self._store(), name, iter(list(joined(buffers)))),
            mode=self._put_mode,
            use_multipart=False,
            attributes=self._attributes(),
        )
        if self._client.has_generations:
            check_generation(reply["version"])
        else:
            check_stored(reply["e_tag"], buffers, lambda: self._described(name))

    def create(self, name: str, data: bytes) -> None:
        reply = obstore.put(
            self._store(), name, data, mode="create", use_multipart=False, attributes=self._attributes()
        )
        if self._client.has_generations:
            check_generation(reply["version"])
        else:
            check_created(reply["e_tag"], data, lambda: self.read(name, len(data)))

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        reply = led(lambda: self._asked(name, {"range": (start, stop)}))
        check_end(reply.meta["size"], start, stop)
        flow, chunks = Flow(into, stop - start), reply.stream(min_chunk_size=_CHUNK_BYTES)
        # On this thread what is taken: a call that is left behind may bring a chunk yet, which nobody wants.
        while (chunk := led(lambda: next(chunks, None))) is not None:
            flow.take(memoryview(chunk))
        flow.end()

    def read(self, name: str, limit_bytes: int) -> bytes:
        reply = self._asked(name, {})
        check_limit(reply.meta["size"], limit_bytes)
        data = bytes(reply.bytes())
        check_length(len(data), reply.meta["size"])
        return data

    def _asked(self, name: str, options: obstore.GetOptions) -> obstore.GetResult:
        reply = obstore.get(self._store(), name, options=options)
        proof = reply.meta["version" if self._client.has_generations else "e_tag"]
        check_object(proof, reply.attributes.get("Content-Type"))
        return reply

    def _described(self, name: str) -> tuple[str | None, int]:
        found = self._asked(name, {"head": True}).meta
        return found["e_tag"], found["size"]

    def _store(self) -> obstore.store.ObjectStore:
        global _runtime_pid  # noqa: PLW0603 - obstore's threads are one set per process, too
        if self._client.credentials is not None:
            with before_sending():
                self._client.credentials.ensure()
        _runtime_pid = os.getpid()
        return self._client.store

    def _attributes(self) -> dict[str, str] | None:
        return dict(self._client.attributes) or None


class ObstoreWire:
    """One bucket behind obstore, and behind fsspec's wire for what obstore cannot do, or not in time."""

    def __init__(self, client: ObstoreClient, make_keeper: Callable[[], Wire], *, create_only: bool = False) -> None:
        self._direct = _Direct(client, create_only=create_only)
        self._credentials = client.credentials
        self._limit_s = client.limit_s
        self._make_keeper = make_keeper
        self._ranges = client.ranges
        self._making: Errand[Wire] = Errand()
        self._kept: Wire | None = None
        self._slow_until_s = 0.0
        self._lock = new_lock()

    @property
    def credential_kind(self) -> CredentialKind:
        if self._credentials is None:
            return "none"
        with self._lock:
            keeper = self._kept
        return self._credentials.kind or ("temporary" if keeper is None else keeper.credential_kind)

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        self._move(lambda wire: wire.put(name, buffers))

    def create(self, name: str, data: bytes) -> None:
        self._move(lambda wire: wire.create(name, data))

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        if self._ranges is not None:
            try:
                return self._ranges.stream(name, start, stop, into)
            except UnsentError as exc:
                if not isinstance(exc.__cause__, ssl.SSLCertVerificationError):
                    raise
                self._ranges = None  # who trusts it may be obstore
        return self._move(lambda wire: wire.stream(name, start, stop, into), is_led=False)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return self._move(lambda wire: wire.read(name, limit_bytes))

    def head(self, name: str) -> ObjectInfo:
        return self._keeper().head(name)

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        return self._keeper().page(prefix, delimiter, mark)

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        return self._keeper().delete(names)

    def close(self) -> None:
        with self._lock:
            keeper, self._kept = self._kept, None
        if self._ranges is not None:
            self._ranges.close()
        if keeper is not None:
            keeper.close()

    def _move(self, call: Callable[[Wire | _Direct], T], *, is_led: bool = True) -> T:
        limit, began_s = limit_now(), time.monotonic()
        is_usual, is_untrusted = not limit.timeouts and limit.still_s >= _NEARLY * self._limit_s, False
        if is_usual and began_s >= self._slow_until_s:
            try:
                with self._told_region():
                    return led(lambda: call(self._direct)) if is_led else call(self._direct)
            except BaseError as exc:
                if not is_certificate_refused(exc):
                    raise
                is_untrusted = True  # and nothing was sent
        result = call(self._keeper())
        if is_untrusted:
            logger.warning(
                "obstore does not trust the certificate of this endpoint, and OpenSSL does: fsspec carries the bytes, "
                "which is slower; a server's certificate that is no authority's itself (CA:FALSE) serves both"
            )
            self._slow_until_s = math.inf
        elif time.monotonic() - began_s > self._limit_s:
            # It went well, and obstore would have ended it: so would it the next ones on such a link.
            self._slow_until_s = time.monotonic() + _SLOW_S
        return result

    def _keeper(self) -> Wire:
        with self._lock:
            if self._kept is not None:
                return self._kept
        made = self._making.run(self._make_keeper)
        with self._lock:
            self._kept = self._kept or made
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
