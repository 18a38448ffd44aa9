"""Serve the store's verbs over a wire: keys to names, ranges checked, every failure one of our errors.

    verb ──▶ ask (our errors, a limit) ──▶ lease ──▶ wire (fsspec's or obstore's)

The wire is connected at the first verb, replaced by `refresh`, and shared with other stores of the bucket (`kept`).
Knows keys and bytes. Keeps FORMAT 14 and 16. Any thread may enter, and so may a forked child: it gets its own wire.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn, TypeVar

from cloudckpt.errors import OptionsError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Listing, ObjectInfo, check_delimiter
from cloudckpt.store.buffers import check_range, flat
from cloudckpt.store.classify import CredentialKind, ask, deletion_error
from cloudckpt.store.credentials import check_texts
from cloudckpt.store.facts import before_sending
from cloudckpt.store.intake import Intake, RangeGets
from cloudckpt.store.kept import Lease, key_of, leave, left_when_dropped, retire, take, use
from cloudckpt.store.limit import Errand, is_limited, limited
from cloudckpt.store.location import check_endpoint, check_no_numbers, named_endpoint, parse_location
from cloudckpt.store.proof import check_listed
from cloudckpt.store.redact import hide_in_logs, remember_secrets
from cloudckpt.store.terms import PutTerms
from cloudckpt.store.wire import Page, Wire
from cloudckpt.threads import new_lock

__all__ = ["WiredStore"]

T = TypeVar("T")

# Where the options travel in headers and URLs; those of other filesystems may hold keys of several lines.
_SENT_IN_HEADERS = frozenset({"s3", "gs"})

# A forked child must not close, not even by collecting garbage, what its parent still uses.
_inherited: list[object] = []


class WiredStore(RangeGets, ABC):
    """Objects below one root URL, moved over a `Wire` that a subclass connects. See `Store` for the verbs."""

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, object] | None = None,
        retry: RetryPolicy | None = None,
        terms: PutTerms | None = None,
    ) -> None:
        """Check the options, which are fsspec's; nothing is connected before the first verb.

        Everything after the scheme of `url` is taken literally. `retry` gives the time limits of a connection, and of a
        request to which no retry layer gives one; repeating one is not done here.
        """
        self._location = parse_location(url)
        self._options = dict(storage_options or {})
        self._retry = retry or RetryPolicy()
        self._terms = terms or PutTerms()
        self._lock = new_lock()
        self._connecting: Errand[None] = Errand()
        self._lease: Lease | None = None
        self._is_closed = False
        self._pid = os.getpid()
        remember_secrets(self._options)
        check_no_numbers(self._options)
        if self._location.scheme in _SENT_IN_HEADERS:
            check_texts(self._options)
        check_endpoint(self._location.scheme, self._options)
        self._check_options()

    @property
    def url(self) -> str:
        return self._location.url

    @property
    def endpoint(self) -> str:
        return named_endpoint(self._location.scheme, self._options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store holds credentials and connections; open another from its URL")

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        name, full = self._location.path(key), flat(buffers)
        # Told to create only, a put may be refused as creates are.
        op = "create" if self._terms.create_only else "put"
        self._ask(op, key, lambda wire: wire.put(name, full))

    def create(self, key: str, data: bytes) -> None:
        name = self._location.path(key)
        self._ask("create", key, lambda wire: wire.create(name, data))

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        name = self._location.path(key)
        check_range(start, stop)
        if start < stop:
            self._ask("get", key, lambda wire: wire.stream(name, start, stop, into))

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        name = self._location.path(key)
        return self._ask("read", key, lambda wire: wire.read(name, limit_bytes))

    def head(self, key: str) -> ObjectInfo:
        name = self._location.path(key)
        found = self._ask("head", key, lambda wire: wire.head(name))
        return ObjectInfo(key=key, size_bytes=found.size_bytes, modified_s=found.modified_s)

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        check_delimiter(delimiter)
        start = self._location.path_prefix(prefix)

        def asked(wire: Wire) -> Page:
            found = wire.page(start, delimiter, mark)
            check_listed((info.key for info in found.objects), found.prefixes, prefix=start, delimiter=delimiter)
            return found

        page = self._ask("list", prefix, asked)
        return replace(self._location.listing(page.objects, page.prefixes), mark=page.mark)

    def delete(self, keys: Sequence[str]) -> None:
        names = {self._location.path(key): key for key in keys}
        if not names:
            return
        failed = self._ask("delete", keys[0], lambda wire: wire.delete(list(names)))
        if failed:
            raise deletion_error(
                {names.get(name, name): cause for name, cause in failed.items()},
                asked=len(names),
                url=self.url,
                outer=sys.exception(),
            )

    def refresh(self) -> None:
        if (lease := self._let_go()) is not None:
            retire(lease)
            leave(lease)

    def close(self) -> None:
        self._is_closed = True
        if (lease := self._let_go()) is not None:
            leave(lease)

    def _let_go(self) -> Lease | None:
        self._notice_fork()
        with self._lock:
            lease, self._lease = self._lease, None
            if lease is not None:
                self._finalizer.detach()
        return lease

    # ---- connections

    def _ask(self, op: str, key: str, call: Callable[[Wire], T]) -> T:
        def once() -> T:
            with self._leased() as wire:
                return call(wire)

        if is_limited():
            return ask(once, op=op, key=key, url=self.url, credentials=self._credential_kind)
        with limited(still_s=self._retry.request_timeout_s, total_s=self._retry.deadline_s):
            return ask(once, op=op, key=key, url=self.url, credentials=self._credential_kind)

    def _credential_kind(self) -> CredentialKind:
        with self._lock:
            return "temporary" if self._lease is None else self._lease.wire.credential_kind

    @contextmanager
    def _leased(self) -> Iterator[Wire]:
        lease = self._take()
        try:
            yield lease.wire
        finally:
            leave(lease)

    def _take(self) -> Lease:
        while True:
            if self._is_closed:
                raise OptionsError(f"the store of {self.url} is closed; open another")
            self._notice_fork()
            with self._lock:
                if self._lease is not None:
                    return use(self._lease)
            # Not under the lock: some libraries ask for credentials now, and others wait for theirs to end a request.
            with before_sending():
                self._connecting.run(self._settle)
            hide_in_logs()

    def _settle(self) -> None:
        """Connect, or come to what another store has connected."""
        lease = take(self._key(), self._connect)
        with self._lock:
            if self._lease is None and not self._is_closed:
                self._lease, self._finalizer = lease, left_when_dropped(self, lease)
                return
        leave(lease)

    def _key(self) -> Hashable | None:
        """Return what tells this store's wire from others; None for filesystems that are not ours to share."""
        where = self._location
        if where.scheme not in _SENT_IN_HEADERS:
            return None
        return key_of(type(self).__name__, where.scheme, where.bucket, self._options, self._retry, self._terms)

    def _notice_fork(self) -> None:
        """In a forked child, forget the parent's wire; its sockets are not ours, and its lock may have been held."""
        if self._pid != os.getpid():
            _inherited.append(self._lease)
            self._lease, self._lock, self._pid = None, new_lock(), os.getpid()
            self._connecting = Errand()

    @abstractmethod
    def _connect(self) -> Wire:
        """Return a new wire; raise OptionsError, or what the library raises."""

    @abstractmethod
    def _check_options(self) -> None:
        """Refuse options that cannot be honoured; connect to nothing."""
