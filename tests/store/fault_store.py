"""Keep objects in memory behind the `Store` verbs, and break any request in any way that a test names.

    Bucket       what is stored, the store's clock, and late requests: it outlives every client
    FaultStore   one client of a bucket: counts and traces its requests, and injects faults into them

A crash (`Crash`, a BaseException) kills the client: every later request of it raises `Crash` again. A fresh
`FaultStore(bucket)` is the process that was started anew. All is deterministic: the clock moves by a millisecond per
request and by `Bucket.advance`, never by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto
from typing import NoReturn, TypeVar

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    TransientError,
)
from cloudckpt.options import RetryPolicy
from cloudckpt.store import RetryingStore
from cloudckpt.store.base import Listing, ObjectInfo, check_key
from cloudckpt.store.buffers import check_range
from cloudckpt.store.intake import Flow, Intake, RangeGets
from cloudckpt.store.probe import _proven

__all__ = [
    "ERRORS",
    "RACES",
    "Bucket",
    "Crash",
    "Fault",
    "FaultKind",
    "FaultStore",
    "Op",
    "denied",
    "expired",
    "opening_the_last",
    "refused",
    "transient",
]

T = TypeVar("T")

# For `monkeypatch`, where requests are counted: with one race a probe makes as many on a slow machine as on any.
RACES = "cloudckpt.store.probe._RACES"

_START_S = 1_700_000_000.0
_TICK_S = 0.001


class Crash(BaseException):
    """The process ended here."""


class FaultKind(StrEnum):
    """Where a request breaks."""

    BEFORE = auto()  # an error, and no effect
    LOST_ACK = auto()  # the effect, then an error
    LATE = auto()  # an error; the effect comes when `Bucket.deliver_late` is called
    SHORT = auto()  # half of the body: an error of `get`, which knows the length, and silent in `read`
    FLIP = auto()  # the first byte that is read is inverted
    CRASH_BEFORE = auto()
    CRASH_HALFWAY = auto()  # half of the keys of a delete; any other verb is whole or not there, so: before
    CRASH_AFTER = auto()  # the effect, then the end


_CRASHES = frozenset({FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER})


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One request: the client's how-manieth (from 1), its verb, and its key, prefix or first key."""

    number: int
    verb: str
    key: str
    keys: tuple[str, ...] = ()


def transient(op: Op) -> StorageError:
    """A fault that the next request may not meet."""
    return TransientError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)


def denied(op: Op) -> StorageError:
    """A refusal by the credentials."""
    return AccessDeniedError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)


def expired(op: Op) -> StorageError:
    """Credentials that were good once."""
    return CredentialsExpiredError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)


def refused(op: Op) -> StorageError:
    """A definite refusal of another kind, such as a full disk."""
    return StorageError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)


# Ways to break a request, and with what error, as parameters. A refusal by the credentials has no effect, so it never
# is a lost acknowledgement.
ERRORS = [
    pytest.param(kind, error, id=f"{kind}-{error.__name__}")
    for kind, errors in (
        (FaultKind.BEFORE, (transient, denied, refused)),
        (FaultKind.LOST_ACK, (transient, refused)),
    )
    for error in errors
]


@dataclass(slots=True, kw_only=True)
class Fault:
    """A rule: which requests break, how, and how often.

    SHORT and FLIP break `get` and `read`; any other verb that they hit fails with the error.

    Attributes:
        kind: where it breaks.
        error: what is raised.
        verbs: the verbs that it hits; all of them, if empty.
        key: what the key must contain.
        number: the request that it hits, by number; any, if 0.
        skip: matching requests that it lets pass first.
        times: how many it hits then; None is for ever.
        until_refresh: whether `refresh` ends it, as with credentials.
        fired: how many it has hit: a fault that never fires tests nothing.
    """

    kind: FaultKind = FaultKind.BEFORE
    error: Callable[[Op], StorageError] = transient
    verbs: Sequence[str] = ()
    key: str = ""
    number: int = 0
    skip: int = 0
    times: int | None = 1
    until_refresh: bool = False
    fired: int = 0

    def hits(self, op: Op) -> bool:
        """Tell whether it breaks this request, and count."""
        if self.times is not None and self.fired >= self.times:
            return False
        if (self.verbs and op.verb not in self.verbs) or self.key not in op.key:
            return False
        if self.number not in (0, op.number):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.fired += 1
        return True


@dataclass(slots=True)
class _Stored:
    data: bytes
    modified_s: float


@dataclass(slots=True)
class Bucket:
    """What outlives the clients. `objects` may be looked at and tampered with.

    Attributes:
        now_s: the store's clock.
        enforces_create: whether `create` refuses to overwrite, as every decent store does.
        listing_lag_s: how long an object stays out of listings, on a store that is not consistent.
    """

    objects: dict[str, _Stored] = field(default_factory=dict)
    now_s: float = _START_S
    enforces_create: bool = True
    listing_lag_s: float = 0.0
    late: list[Callable[[], object]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def copy(self) -> Bucket:
        """Return another bucket with the same objects at the same time; nothing is late there."""
        with self.lock:
            return replace(self, objects=dict(self.objects), late=[], lock=threading.RLock())

    def advance(self, seconds: float) -> None:
        """Move the store's clock."""
        with self.lock:
            self.now_s += seconds

    def raw_put(self, key: str, data: bytes) -> None:
        """Write around every client."""
        with self.lock:
            self.objects[key] = _Stored(data, self.now_s)

    def raw_get(self, key: str) -> bytes:
        """Read around every client."""
        return self.objects[key].data

    def raw_list(self) -> list[str]:
        """List around every client."""
        return sorted(self.objects)

    def deliver_late(self) -> None:
        """Let the requests that got lost on the way arrive now, in order; a refused create changes nothing."""
        late, self.late = self.late, []
        for effect in late:
            with suppress(StorageError):
                effect()


class FaultStore(RangeGets):
    """One client of a `Bucket`. Its faults are tried in order, and the first that hits decides.

    Attributes:
        bucket: what it writes to.
        faults: the rules; append to it.
        trace: every request so far.
        hook: called before each request, outside all locks: to sleep in, or to wait for another thread.
        refresh_count: how often credentials were resolved anew.
        is_closed: whether `close` was called.
    """

    def __init__(
        self,
        bucket: Bucket | None = None,
        *,
        url: str = "memory://bucket/root",
        endpoint: str = "",
        is_create_atomic: bool = True,
        hook: Callable[[Op], None] | None = None,
        page_size: int = 1000,
    ) -> None:
        self.bucket = bucket or Bucket()
        self.faults: list[Fault] = []
        self.trace: list[Op] = []
        self.hook = hook
        self.refresh_count = 0
        self.is_closed = False
        self._url = url
        self.endpoint = endpoint
        self._is_create_atomic = is_create_atomic
        self._page_size = page_size
        self._is_dead = False

    @property
    def url(self) -> str:
        return self._url

    @property
    def engine(self) -> str:
        return "memory"

    @property
    def is_create_atomic(self) -> bool:
        return self._is_create_atomic

    @property
    def op_count(self) -> int:
        """Requests so far."""
        return len(self.trace)

    def inject(self, **fault: object) -> Fault:
        """Add a fault, given by its attributes, and return it."""
        self.faults.append(Fault(**fault))  # type: ignore[arg-type]
        return self.faults[-1]

    def crash_at(self, number: int, kind: FaultKind = FaultKind.CRASH_BEFORE) -> Fault:
        """Let the process end at its request of that number."""
        return self.inject(kind=kind, number=number)

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        self._request("put", (check_key(key),), lambda: self.bucket.raw_put(key, data))

    def create(self, key: str, data: bytes) -> None:
        self._request("create", (check_key(key),), lambda: self._create(key, bytes(data)))

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        check_range(start, stop)
        data = self._request("get", (check_key(key),), lambda: self._stored(key).data[start:stop])
        Flow(into, stop - start).take(data)
        if len(data) != stop - start:
            raise TransientError(f"{len(data)} bytes came for [{start}, {stop}) of {key!r}", op="get", key=key)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        data = self._request("read", (check_key(key),), lambda: self._stored(key).data)
        if len(data) > limit_bytes:
            raise StorageError(f"{key!r} is larger than {limit_bytes} bytes", op="read", key=key)
        return data

    def head(self, key: str) -> ObjectInfo:
        return self._request("head", (check_key(key),), lambda: self._describe(key))

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        return self._request("list", (prefix,), lambda: self._page(self._list(prefix, delimiter), mark))

    def delete(self, keys: Sequence[str]) -> None:
        names = tuple(check_key(key) for key in keys)
        self._request("delete", names, lambda: self._delete(names), halfway=lambda: self._delete(names[::2]))

    def refresh(self) -> None:
        self.refresh_count += 1
        self.faults = [fault for fault in self.faults if not fault.until_refresh]

    def close(self) -> None:
        self.is_closed = True

    # -- effects -------------------------------------------------------------------------------------------

    def _create(self, key: str, data: bytes) -> None:
        if key in self.bucket.objects and self.bucket.enforces_create:
            raise ObjectExistsError(f"{key!r} is taken", op="create", key=key)
        self.bucket.raw_put(key, data)

    def _stored(self, key: str) -> _Stored:
        try:
            return self.bucket.objects[key]
        except KeyError as exc:
            raise ObjectNotFoundError(f"there is no {key!r}", key=key) from exc

    def _describe(self, key: str) -> ObjectInfo:
        stored = self._stored(key)
        return ObjectInfo(key=key, size_bytes=len(stored.data), modified_s=stored.modified_s)

    def _list(self, prefix: str, delimiter: str) -> Listing:
        # Without a lag all is seen, also what was written before the store's clock was set back.
        lag_s = self.bucket.listing_lag_s
        seen_s = self.bucket.now_s - lag_s
        stored = sorted(self.bucket.objects.items())
        visible = [key for key, one in stored if not lag_s or one.modified_s <= seen_s]
        objects, prefixes = [], set()
        for key in visible:
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if not key.startswith(prefix):
                continue
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                objects.append(self._describe(key))
        return Listing(objects=tuple(objects), prefixes=tuple(sorted(prefixes)))

    def _page(self, whole: Listing, mark: str) -> Listing:
        """Cut one page out of a listing; a mark is the last name of the page before it."""
        names = sorted([*(info.key for info in whole.objects), *whole.prefixes])
        rest = [name for name in names if name > mark]
        shown = set(rest[: self._page_size])
        return Listing(
            objects=tuple(info for info in whole.objects if info.key in shown),
            prefixes=tuple(prefix for prefix in whole.prefixes if prefix in shown),
            mark=max(shown) if len(rest) > self._page_size else "",
        )

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.bucket.objects.pop(key, None)

    # -- faults --------------------------------------------------------------------------------------------

    def _request(
        self, verb: str, keys: tuple[str, ...], effect: Callable[[], T], halfway: Callable[[], None] | None = None
    ) -> T:
        op = self._begin(verb, keys)
        if self.hook is not None:
            self.hook(op)
        with self.bucket.lock:
            self.bucket.now_s += _TICK_S
            fault = next((fault for fault in self.faults if fault.hits(op)), None)
            if fault is None:
                return effect()
            if fault.kind in _CRASHES:
                self._crash(fault, effect, halfway)
            return self._broken(fault, op, effect)

    def _begin(self, verb: str, keys: tuple[str, ...]) -> Op:
        with self.bucket.lock:
            if self._is_dead:
                raise Crash
            op = Op(number=len(self.trace) + 1, verb=verb, key=keys[0] if keys else "", keys=keys)
            self.trace.append(op)
            return op

    def _crash(self, fault: Fault, effect: Callable[[], object], halfway: Callable[[], None] | None) -> NoReturn:
        self._is_dead = True
        if fault.kind is FaultKind.CRASH_HALFWAY and halfway is not None:
            halfway()
        if fault.kind is FaultKind.CRASH_AFTER:
            with suppress(StorageError):
                effect()
        raise Crash

    def _broken(self, fault: Fault, op: Op, effect: Callable[[], T]) -> T:
        if fault.kind in (FaultKind.SHORT, FaultKind.FLIP) and op.verb in ("get", "read"):
            data = effect()
            return _shortened(data) if fault.kind is FaultKind.SHORT else _flipped(data)
        if fault.kind is FaultKind.LOST_ACK:
            with suppress(StorageError):
                effect()
        if fault.kind is FaultKind.LATE:
            self.bucket.late.append(effect)
        raise fault.error(op)


def _shortened(data: T) -> T:
    return data[: len(data) // 2]  # type: ignore[index, arg-type]


def _flipped(data: T) -> T:
    return bytes([data[0] ^ 0xFF]) + data[1:] if data else data  # type: ignore[index]


@contextmanager
def opening_the_last(patch: pytest.MonkeyPatch, opener: str) -> Iterator[list[FaultStore]]:
    """Let an `open_store`, named by its whole path, open the store that was pushed last; nothing is proven of it."""
    pushed: list[FaultStore] = []
    patience = RetryPolicy(max_attempts=3, deadline_s=60, request_timeout_s=1)

    def open_last(*_: object, **__: object) -> RetryingStore:
        return RetryingStore(pushed[-1], patience, sleep=lambda _: None)

    patch.setattr(opener, open_last)
    patch.setattr(RACES, 1)
    _proven.clear()
    yield pushed
    _proven.clear()
