"""Break the exchanges of one operation on a store, over real sockets, and tell what became of it.

    a verb of RetryingStore ──▶ an engine ──▶ ObjectServer, which breaks the first requests, or all
                 ╰──▶ Outcome: survived, or which error, after how many requests ◀── the server's own objects

Pauses are skipped, and count: the clock of the retry layer is the machine's and what was slept. So an operation that is
throttled for ever uses up its minute at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cloudckpt.errors import (
    AccessDeniedError,
    CloudCkptError,
    CommitUnknownError,
    CredentialsExpiredError,
    ObjectExistsError,
    RetryExhaustedError,
    StorageError,
)
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Store
from cloudckpt.store.retrying import RetryingStore
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

__all__ = ["FAULTS", "TIMES", "VERBS", "Breach", "Outcome", "Verb", "broken", "cells"]

THERE = random.Random(1).randbytes(100_000)
FRESH = random.Random(2).randbytes(70_000)
CLAIM = b'{"nonce": "0123456789abcdef"}'
LISTED = [f"l/{number:02d}" for number in range(12)]
DOOMED = ["d/0", "d/1", "d/2"]

TIMES: Mapping[str, int] = {"once": 1, "three times": 3, "for ever": -1}
"""How often a fault strikes; below 0, whenever it can."""

DEADLINE_S = 60.0
PATIENT = RetryPolicy(max_attempts=8, deadline_s=DEADLINE_S, request_timeout_s=20.0)
# Silence costs real time: three requests where it never ends, more where the fourth is to be heard on a busy machine.
_SILENT_S = 0.3
SHORT = RetryPolicy(max_attempts=3, deadline_s=DEADLINE_S, request_timeout_s=_SILENT_S)
LONGER = RetryPolicy(max_attempts=12, deadline_s=DEADLINE_S, request_timeout_s=_SILENT_S)


# ---- verbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """An operation, what it must return, and what it may leave.

    Attributes:
        run: does it.
        returns: what it then returns.
        is_hit: whether a request is one of those that faults are for.
        writes: key → bytes: each is whole afterwards, or, if the operation failed, absent.
        deletes: keys that are gone afterwards, or, if the operation failed, may be.
        requests: how many it takes where nothing fails, at most.
        is_moving: whether it has bytes of any number to move.
    """

    run: Callable[[Store], object]
    returns: object = None
    is_hit: Callable[[Request], bool] = lambda _: True
    writes: Mapping[str, bytes] = field(default_factory=dict)
    deletes: Sequence[str] = ()
    requests: int = 1
    is_moving: bool = False


def _is_write(request: Request) -> bool:
    return request.method in ("PUT", "POST")


def _put(store: Store) -> None:
    store.put("fresh", [memoryview(FRESH)[:9], memoryview(FRESH)[9:]])


def _get(store: Store) -> bytes:
    into = memoryview(bytearray(70_000))
    return bytes(store.get("there", start=17, stop=70_017, into=into))


VERBS: Mapping[str, Verb] = {
    "put": Verb(run=_put, writes={"fresh": FRESH}, is_moving=True),
    "create": Verb(run=lambda store: store.create("claim", CLAIM), is_hit=_is_write, writes={"claim": CLAIM}),
    "create, and the look after it": Verb(run=lambda store: store.create("claim", CLAIM), writes={"claim": CLAIM}),
    "ranged get": Verb(run=_get, returns=THERE[17:70_017], is_moving=True),
    "read": Verb(run=lambda store: store.read("there", limit_bytes=len(THERE)), returns=THERE, is_moving=True),
    "head": Verb(run=lambda store: store.head("there").size_bytes, returns=len(THERE)),
    "list": Verb(run=lambda store: [info.key for info in store.list("l/").objects], returns=LISTED, requests=3),
    "delete": Verb(run=lambda store: store.delete(DOOMED), deletes=DOOMED, requests=3),
}
_ALL = frozenset(VERBS)
_WITH_BODY = _ALL - {"head"}
_CREATES = frozenset({"create", "create, and the look after it"})
_WRITES = _CREATES | {"put", "delete"}


# ---- faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """One way to break an exchange.

    Attributes:
        ends: what the operation ends with where that goes on; `passes` if it does not, and three times are survived.
        verbs: where it can happen.
        is_silent: whether each time costs the limit of a request.
        spoils: verbs whose answer it may spoil unseen: what they bring is compared with its digest one layer up, and
            what comes twice is believed.
        look: how the reading back after a create breaks, as often as the create.
        stands: what stands under the key of a create before it.
    """

    fault: Fault
    ends: tuple[type[CloudCkptError], ...] = (RetryExhaustedError,)
    passes: bool = True
    verbs: frozenset[str] = _ALL
    is_silent: bool = False
    spoils: frozenset[str] = frozenset()
    look: FaultKind | None = None
    stands: bytes | None = None
    schemes: frozenset[str] = frozenset({"s3", "gs"})

    @property
    def is_throttled(self) -> bool:
        """Whether the store asks for fewer requests: those do not count, so that only the deadline ends it."""
        return self.fault.status in (429, 503) or self.fault.code == "ThrottlingException"


def _status(status: int, code: str = "", **headers: str) -> Fault:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Fault(status=status, code=code, headers=named)


def _kind(kind: FaultKind) -> Fault:
    return Fault(kind=kind)


_PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
_WEB = {"Content-Type": "text/html", "ETag": '"65a1f3c2-5f3c"'}
_PROXY = b"<html><body>Bad Gateway</body></html>"
_LOOK = "create, and the look after it"
_WHOLE = frozenset({"read", _LOOK})
_UNSEEN = _WHOLE | {"ranged get"}
_ELSEWHERE = "http://localhost:9/elsewhere"
_DENIED = (AccessDeniedError,)
_EXPIRED = (CredentialsExpiredError,)

FAULTS: Mapping[str, Breach] = {
    "503 SlowDown": Breach(fault=_status(503, "SlowDown")),
    "503 of a proxy": Breach(fault=Fault(status=503, body=_PROXY)),
    "500 InternalError": Breach(fault=_status(500, "InternalError")),
    "502 of a proxy": Breach(fault=Fault(status=502, body=_PROXY)),
    "504 of a proxy": Breach(fault=Fault(status=504, body=_PROXY)),
    "429, Retry-After: 7": Breach(fault=_status(429, "TooManyRequests", Retry_After="7")),
    "408": Breach(fault=_status(408, "RequestTimeout")),
    "400 RequestTimeout": Breach(fault=_status(400, "RequestTimeout"), verbs=_WITH_BODY),
    "400 ThrottlingException (KMS)": Breach(fault=_status(400, "ThrottlingException"), verbs=_WITH_BODY),
    "409 of a conflict": Breach(fault=_status(409, "ConditionalRequestConflict")),
    "301 to elsewhere": Breach(fault=_status(301, "", Location=_ELSEWHERE)),
    "307 to elsewhere": Breach(fault=_status(307, "", Location=_ELSEWHERE)),
    "a web page, 200": Breach(fault=Fault(status=200, body=_PAGE, headers=_WEB)),
    "no HTTP": Breach(fault=Fault(kind=FaultKind.NO_HTTP, body=b"SSH-2.0-OpenSSH_9.6\r\n")),
    "reset in the request": Breach(fault=_kind(FaultKind.RESET_IN_REQUEST)),
    "reset before the reply": Breach(fault=_kind(FaultKind.RESET_BEFORE_REPLY)),
    "reset in the reply": Breach(fault=_kind(FaultKind.RESET_IN_REPLY), verbs=_WITH_BODY),
    "silence in the request": Breach(fault=_kind(FaultKind.STALL_IN_REQUEST), is_silent=True),
    "silence before the reply": Breach(fault=_kind(FaultKind.STALL), is_silent=True),
    "silence in the reply": Breach(fault=_kind(FaultKind.STALL_IN_REPLY), verbs=_WITH_BODY, is_silent=True),
    "reply cut, by its length": Breach(fault=_kind(FaultKind.SHORT_HONEST), verbs=_WITH_BODY),
    "reply cut, its length a lie": Breach(fault=_kind(FaultKind.SHORT_MATCHING), verbs=_WITH_BODY, spoils=_WHOLE),
    "reply a byte too long": Breach(fault=_kind(FaultKind.LONG_MATCHING), verbs=_WITH_BODY, spoils=_WHOLE),
    "first byte of the reply flipped": Breach(fault=_kind(FaultKind.FLIPPED_BYTE), verbs=_WITH_BODY, spoils=_UNSEEN),
    "reply twice": Breach(fault=_kind(FaultKind.TWICE), spoils=_UNSEEN),
    "done, and the reply lost": Breach(fault=_kind(FaultKind.LOST_ACK), verbs=_WRITES),
    "done, and silence": Breach(fault=_kind(FaultKind.LOST_ACK_STALL), verbs=_WRITES, is_silent=True),
    "done, the reply lost, and the look flipped": Breach(
        fault=_kind(FaultKind.LOST_ACK),
        verbs=frozenset({"create"}),
        spoils=frozenset({"create"}),
        look=FaultKind.FLIPPED_BYTE,
    ),
    "412, and nothing stands there": Breach(fault=_status(412, "PreconditionFailed"), verbs=frozenset({"create"})),
    "412, and our own stands there": Breach(
        fault=_status(412, "PreconditionFailed"), verbs=frozenset({"create"}), stands=CLAIM
    ),
    "412, and another's stands there": Breach(
        fault=_status(412, "PreconditionFailed"),
        verbs=_CREATES,
        stands=b"another's",
        ends=(ObjectExistsError,),
        passes=False,
    ),
    "412 to what is no create": Breach(
        fault=_status(412, "PreconditionFailed"), verbs=_ALL - _CREATES, ends=(StorageError,), passes=False
    ),
    "403 AccessDenied": Breach(fault=_status(403, "AccessDenied"), ends=_DENIED, passes=False),
    "403 RequestTimeTooSkewed": Breach(
        fault=_status(403, "RequestTimeTooSkewed"), ends=_DENIED, passes=False, verbs=_WITH_BODY
    ),
    "400 RequestTimeTooSkewed": Breach(
        fault=_status(400, "RequestTimeTooSkewed"), ends=_DENIED, passes=False, verbs=_WITH_BODY
    ),
    "400 InvalidRequest": Breach(
        fault=_status(400, "InvalidRequest"), ends=(StorageError,), passes=False, verbs=_WITH_BODY
    ),
    "501 NotImplemented": Breach(fault=_status(501, "NotImplemented"), ends=(StorageError,), passes=False),
    "507 of a full store": Breach(fault=_status(507, "InsufficientStorage"), ends=(StorageError,), passes=False),
    "400 ExpiredToken": Breach(fault=_status(400, "ExpiredToken"), ends=_EXPIRED, verbs=_WITH_BODY),
    "401": Breach(fault=_status(401, "Unauthorized"), ends=_EXPIRED),
    "a page of the listing again": Breach(fault=_kind(FaultKind.SAME_PAGE), verbs=frozenset({"list"})),
    "part of a delete refused for now": Breach(
        fault=Fault(kind=FaultKind.PARTIAL, code="InternalError"),
        verbs=frozenset({"delete"}),
        schemes=frozenset({"s3"}),
    ),
    "part of a delete denied": Breach(
        fault=Fault(kind=FaultKind.PARTIAL, code="AccessDenied"),
        verbs=frozenset({"delete"}),
        ends=_DENIED,
        passes=False,
        schemes=frozenset({"s3"}),
    ),
}


def cells(scheme: str) -> list[tuple[str, str, str]]:
    """Return (fault, verb, times) of the whole matrix of one dialect."""
    return [
        (name, verb, times)
        for name, breach in FAULTS.items()
        if scheme in breach.schemes
        for verb in VERBS
        if verb in breach.verbs
        for times in TIMES
    ]


# ---- one trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one operation.

    Attributes:
        error: what it ended with; None if it survived.
        is_unseen: whether it brought other bytes, which a digest must tell.
        requests: that came to the server.
        seconds: as the retry layer counts them.
        wrong: what speaks against it; "" if nothing does.
    """

    error: CloudCkptError | None
    is_unseen: bool
    requests: int
    seconds: float
    wrong: str

    @property
    def text(self) -> str:
        """What became of it, in a word."""
        if self.is_unseen:
            return "left to the digest"
        return "survived" if self.error is None else type(self.error).__name__


class _Clock:
    """The machine's clock, and what was slept, which takes no time."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def now(self) -> float:
        return time.monotonic() + self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def broken(inner: Store, server: ObjectServer, fault: str, verb: str, times: str) -> Outcome:
    """Run one operation while its exchanges are broken, and judge what it returns, costs and leaves."""
    breach, operation = FAULTS[fault], VERBS[verb]
    before = _fill(server, breach)
    policy = PATIENT if not breach.is_silent else SHORT if TIMES[times] < 0 else LONGER
    clock = _Clock()
    store = RetryingStore(inner, policy, sleep=clock.sleep, clock=clock.now, rng=random.Random(fault + verb + times))
    injection = server.inject(breach.fault, times=TIMES[times], when=operation.is_hit)
    if breach.look is not None:
        server.inject(Fault(kind=breach.look), method="GET", times=TIMES[times])
    began_s = clock.now()
    error, returned = None, None
    try:
        returned = operation.run(store)
    except CloudCkptError as exc:
        error = exc
    seconds, requests = clock.now() - began_s, server.count()
    server.heal()
    is_other = error is None and returned != operation.returns
    is_unseen = is_other and verb in breach.spoils
    wrong = [
        *(["the fault never fired"] if not injection.fired else []),
        *_wrong_end(breach, verb, times, error),
        *([f"it returned {str(returned)[:80]}"] if is_other and not is_unseen else []),
        *_wrong_cost(policy, breach, operation, requests, seconds),
        *_wrong_state(server, before, operation, is_done=error is None),
        *_wrong_later(inner, breach),
    ]
    return Outcome(error=error, is_unseen=is_unseen, requests=requests, seconds=seconds, wrong="; ".join(wrong))


def _fill(server: ObjectServer, breach: Breach) -> dict[str, bytes]:
    server.reset()
    objects = {"there": THERE, **{key: key.encode() for key in (*LISTED, *DOOMED)}}
    if breach.stands is not None:
        objects["claim"] = breach.stands
    for key, data in objects.items():
        server.put_object(f"root/{key}", data)
    return objects


def _wrong_end(breach: Breach, verb: str, times: str, error: CloudCkptError | None) -> list[str]:
    """Say what is wrong with how it ended; an answer that a digest judges may be an end, too."""
    # Credentials are renewed once.
    often = ("once",) if breach.ends == _EXPIRED or verb in breach.spoils else ("once", "three times")
    if verb in breach.spoils and times != "once" and isinstance(error, StorageError):
        return []
    if error is None or (breach.passes and times in often):
        return [] if error is None else [f"it ended with {error!r}"]
    if isinstance(error, (*breach.ends, CommitUnknownError)):
        return []
    return [f"it ended with {error!r}, not with {' or '.join(kind.__name__ for kind in breach.ends)}"]


def _wrong_cost(policy: RetryPolicy, breach: Breach, operation: Verb, requests: int, seconds: float) -> list[str]:
    # Some answers are looked into by a second request, and each of the keys of a delete may be one.
    cap = policy.max_attempts * max(2, operation.requests)
    # The deadline of what moves bytes begins once more when they have moved; the last request may be late by its limit.
    limit_s = DEADLINE_S * (2 if operation.is_moving else 1) + policy.request_timeout_s
    over = [f"{requests} requests, more than {cap}"] if requests > cap and not breach.is_throttled else []
    return over + ([f"{seconds:.0f} s, more than {limit_s:.0f}"] if seconds > limit_s else [])


def _wrong_state(server: ObjectServer, before: Mapping[str, bytes], operation: Verb, *, is_done: bool) -> list[str]:
    keys = server.keys()
    now = {key.removeprefix("root/"): server.data(key) for key in keys}
    wrong = []
    for key, data in operation.writes.items():
        found = now.pop(key, None)
        if not (found == data or (not is_done and found == before.get(key))):
            wrong.append(f"{key} is {'absent' if found is None else 'other bytes'}")
    left = {key for key in operation.deletes if now.pop(key, None) is not None}
    if left and is_done:
        wrong.append(f"{sorted(left)} are still there")
    stays = {key: data for key, data in before.items() if key not in operation.writes and key not in operation.deletes}
    if now != stays:
        wrong.append(f"objects that nobody meant have changed: {sorted(now.items() ^ stays.items())}"[:200])
    return wrong


def _wrong_later(inner: Store, breach: Breach) -> list[str]:
    """Look whether what comes after a broken exchange is answered for itself, but where a second reply lies in wait."""
    if breach.fault.kind is FaultKind.TWICE:
        inner.refresh()
    store = RetryingStore(inner, PATIENT, sleep=lambda _: None)
    for key in LISTED[:2]:
        size = len(key)
        if store.read(key, limit_bytes=size) != key.encode() or store.get(key, start=0, stop=size) != key.encode():
            return [f"{key} was read as something else afterwards"]
    return []
