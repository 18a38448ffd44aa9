"""The tunable numbers, in one place: sizes, parallelism, patience.

Pure values, validated when they are made; no I/O. Every default that was tuned names its benchmark.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Literal, TypeVar, get_args

from cloudckpt.errors import OptionsError

__all__ = [
    "KIB",
    "MAX_BLOCK_BYTES",
    "MIB",
    "READERS",
    "Checksum",
    "Options",
    "RetryPolicy",
    "as_clock",
    "as_count",
    "as_flag",
    "as_seconds",
]

Checksum = Literal["crc64nvme", "sha256", "crc32c", "crc32"]
"""What a store can compare the bytes of a put with, before it takes them."""

KIB = 1024
MIB = 1024 * KIB
# A reader holds whole blocks in memory, and an index that it was told to read says how large they are.
MAX_BLOCK_BYTES = 256 * MIB
# How many small objects (manifests, claims, pins) are asked for at the same time.
READERS = 16
_TRANSFER_BYTES = 512 * MIB
# 31 years: all that waits can count so far, and what is longer was meant for "no limit", which nothing here has.
_MOST_S = 1e9
# Of the time that is left, what one request may take, so that another one fits behind it; a connection needs the least.
_REQUEST_SHARE = 0.5
_LEAST_S = 0.1
# Of the patience with what stands still: a rank names its own transfer before the others can only name the rank.
_OWN_SHARE = 0.8
# How much later than the store's last error a transfer counts as standing still, where time is short.
_GRACE_S = 4.0


def as_count(name: str, value: object, *, least: int | None = 0) -> int:
    """Return a whole number as an `int`; numpy's and torch's are ones, True and 1.0 are none.

    Args:
        name: of what it counts, for the error.
        value: as the caller gave it.
        least: the smallest that may be given; None if any may.

    Raises:
        OptionsError: it is no whole number, or smaller.
    """
    number = _whole(value)
    if number is None or (least is not None and number < least):
        raise OptionsError(f"{name} is {value!r}; give a whole number{'' if least is None else f' from {least}'}")
    return number


def _whole(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def as_seconds(name: str, value: object, *, is_zero_allowed: bool = True) -> float:
    """Return a finite number of seconds as a `float`; numpy's and torch's are some, True and text are none.

    Raises:
        OptionsError: it is none, or negative, or 0 where that makes no sense, or more than 1e9.
    """
    number = _real(value)
    if number is None or not 0 <= number <= _MOST_S or not (number or is_zero_allowed):
        least = "from 0" if is_zero_allowed else "above 0"
        raise OptionsError(f"{name} is {value!r}; give a number of seconds {least}, and at most {_MOST_S:.0e}")
    return number


def as_clock(clock: object) -> Callable[[], float]:
    """Return a clock that raises where it gives no finite number: a save would write what nobody can read.

    Raises:
        OptionsError: it is no function.
    """
    if not callable(clock):
        raise OptionsError(f"clock is {clock!r}; give a function that returns seconds, such as time.monotonic")
    ask = clock

    def checked() -> float:
        number = _real(told := ask())
        if number is None or not math.isfinite(number):
            raise OptionsError(f"the clock {ask!r} has returned {told!r}; give one that returns seconds")
        return number

    return checked


def _real(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    number = value if isinstance(value, Real) else _whole(value)
    try:
        return None if number is None else float(number)
    except OverflowError:
        return math.inf


def as_flag(name: str, value: object) -> bool:
    """Return True or False; what merely counts as one of them is refused, with `OptionsError`."""
    if not isinstance(value, bool):
        raise OptionsError(f"{name} is {value!r}; give True or False")
    return value


# Annotation → what makes a value one of that kind, or None of one that is none, and what to say then.
_KINDS: dict[str, tuple[Callable[[object], object], str]] = {
    "int": (_whole, "a whole number"),
    "float": (lambda value: value if type(value) in (int, float) else _real(value), "a number"),
    "bool": (lambda value: value if isinstance(value, bool) else None, "True or False"),
}


def _check_types(options: RetryPolicy | Options) -> None:
    """Refuse a value of another type when it is written down, not in the middle of a save; numpy's become Python's."""
    for one in fields(options):
        kind, *optional = str(one.type).split(" | ")
        value = getattr(options, one.name)
        if kind not in _KINDS or (optional and value is None):
            continue
        take, words = _KINDS[kind]
        if (taken := take(value)) is None:
            raise OptionsError(f"{one.name} is {value!r}; give {' or '.join([words, *optional])}")
        object.__setattr__(options, one.name, taken)


_Chosen = TypeVar("_Chosen", "RetryPolicy", "Options")


def _made(kind: type[_Chosen], given: Mapping[str, object]) -> _Chosen:
    """Return options of a kind that were written down as a mapping."""
    known = [one.name for one in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise OptionsError(f"options have no {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return kind(**given)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How patient one operation on the store is.

    Attributes:
        max_attempts: requests per operation, at most; those that the store answers with "slower" do not count, nor
            those before another block of a shard was read. While the end of a preemption rules, none does: what it is
            tried for cannot be done later.
        deadline_s: seconds per operation, waits included. Those of a put or a read count from when its bytes have got
            further than ever, and end no request whose bytes move. A request may stand still for at most half of what
            is left, so that another one fits behind it.
        request_timeout_s: seconds that one request may stand still, none of its bytes moving. obstore does not show
            the bytes of a put, so that there it is what one may take in all; one that took longer is sent again by
            fsspec's client, which does show them.
        connect_timeout_s: seconds that one connection attempt may take.
        backoff_base_s: upper bound of the first wait; it doubles per attempt (full jitter below the bound).
        backoff_max_s: the bound's own cap.
    """

    max_attempts: int = 8
    deadline_s: float = 300.0
    request_timeout_s: float = 15.0
    connect_timeout_s: float = 5.0
    backoff_base_s: float = 0.2
    backoff_max_s: float = 15.0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.max_attempts < 1:
            raise OptionsError(f"max_attempts is {self.max_attempts}; give 1 or more")
        for name in ("deadline_s", "request_timeout_s", "connect_timeout_s", "backoff_base_s", "backoff_max_s"):
            as_seconds(name, getattr(self, name), is_zero_allowed=False)

    def limit_s(self, left_s: float, *, timeouts: int = 0) -> float:
        """Return how long a request may stand still where `left_s` are left, after `timeouts` that stood too long."""
        share_s = max(_REQUEST_SHARE * left_s, min(left_s, _LEAST_S))
        return min(self.request_timeout_s * 2.0 ** min(timeouts, 64), share_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a save or a load may use.

    Attributes:
        shard_bytes: upper bound of one shard object's tensor bytes.
        block_bytes: bytes per checksum, counted from a shard's first byte; at most 256 MiB.
        span_bytes: upper bound of one ranged read, which holds no more than a block of it in memory; a multiple of
            `block_bytes`. Reads are shorter where all `concurrency` of them would not have work to the end.
        concurrency: requests in flight.
        memory_budget_bytes: extra host memory that a save or a load may hold at once, the copy included that an async
            save makes of the state; where that does not fit, it waits for uploads to free memory. None: 512 MiB for
            what is in flight, and the copy besides, as far as half of the free memory has room for it.
        signed_payload: sign request bodies (S3). Off, because the digests of the format protect the bytes
            end to end and hashing every body with SHA-256 costs more than sending it.
        single_writer: the caller promises that no other process writes to the same root. Every create is a plain put
            then, and looked at before and after: it works on stores without create-only writes, and on disks without
            hard links. Two jobs that break the promise may overwrite each other's commits unnoticed. A `CloudWriter`
            in one process of several that have no process group asks for it, too.
        checksum: sent with every put, so that the store itself refuses bytes that were spoilt on the way; buckets with
            Object Lock and a default retention take no put without one. By obstore on S3 "crc64nvme" or "sha256"; by
            s3fs "sha256", "crc32c", "crc32", and "crc64nvme" with awscrt; by gcsfs "crc32c"; elsewhere refused.
        create_only: send `If-None-Match: *` with every put, not with claims and manifests alone, for buckets whose
            policy demands it (S3, GCS).
        progress_timeout_s: patience with what stands still: a transfer that does not end, a rank that does not come,
            died or hangs. Longer than `retry.deadline_s`, so that a store in trouble is not taken for a lost rank.
        read_once: on restore, read what several ranks need from the store once and pass it on between them: `always`,
            `never`, or `auto`, which does so where the store is remote.
        finish_timeout_s: how long closing a manager, or the end of the interpreter, waits for an async save that is
            under way before it abandons that.
        retry: patience of one operation.
    """

    shard_bytes: int = 64 * MIB
    block_bytes: int = 4 * MIB
    span_bytes: int = 64 * MIB
    concurrency: int = 8
    memory_budget_bytes: int | None = None
    signed_payload: bool = False
    single_writer: bool = False
    checksum: Checksum | None = None
    create_only: bool = False
    progress_timeout_s: float = 600.0
    read_once: Literal["auto", "always", "never"] = "auto"
    finish_timeout_s: float = 300.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        _check_types(self)
        if not isinstance(self.retry, RetryPolicy):
            raise OptionsError(f"retry is {self.retry!r}; give a RetryPolicy")
        for name in ("shard_bytes", "block_bytes", "span_bytes", "concurrency", "memory_budget_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionsError(f"{name} is {value}; give 1 or more")
        for name in ("progress_timeout_s", "finish_timeout_s"):
            as_seconds(name, getattr(self, name), is_zero_allowed=False)
        self._check_puts()
        if self.read_once not in ("auto", "always", "never"):
            raise OptionsError(f"read_once is {self.read_once!r}; give 'auto', 'always' or 'never'")
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise OptionsError(f"block_bytes is {self.block_bytes}; give {MAX_BLOCK_BYTES} or less")
        if self.span_bytes % self.block_bytes:
            raise OptionsError(
                f"span_bytes ({self.span_bytes}) is not a multiple of block_bytes ({self.block_bytes}); "
                "a ranged read covers whole blocks"
            )
        least = max(self.shard_bytes, self.block_bytes)
        if self.transfer_budget_bytes < least:
            raise OptionsError(
                f"memory_budget_bytes ({self.transfer_budget_bytes}) is smaller than one shard or block ({least}); "
                "raise the budget or lower shard_bytes"
            )

    def _check_puts(self) -> None:
        if self.checksum not in (None, *get_args(Checksum)):
            raise OptionsError(f"checksum is {self.checksum!r}; give one of {', '.join(get_args(Checksum))}, or None")
        if self.create_only and self.single_writer:
            raise OptionsError(
                "create_only sends a condition with every put, and single_writer with none; give one of them"
            )

    @classmethod
    def of(cls, options: Options | Mapping[str, object] | None) -> Options:
        """Return the options that a caller gave, perhaps as a mapping, or the defaults.

        Raises:
            OptionsError: they are none.
        """
        if isinstance(options, Mapping):
            retry = options.get("retry")
            given = {**options, "retry": _made(RetryPolicy, retry)} if isinstance(retry, Mapping) else options
            return _made(cls, given)
        if options is not None and not isinstance(options, Options):
            raise OptionsError(f"options is {options!r}; give cloudckpt.Options(...)")
        return options or cls()

    def lean(self, budget_bytes: int) -> Options:
        """Return the same options for transfers that stay small, unless the caller has said how much they may take."""
        if self.memory_budget_bytes is not None:
            return self
        return replace(self, memory_budget_bytes=max(budget_bytes, self.shard_bytes, self.block_bytes))

    def within(self, seconds: float) -> Options:
        """Return the same options for what must have ended in `seconds`: the store's own errors come first even so."""
        retry = replace(self.retry, deadline_s=min(self.retry.deadline_s, seconds))
        return replace(self, retry=retry, progress_timeout_s=min(self.progress_timeout_s, seconds + _GRACE_S))

    @property
    def transfer_timeout_s(self) -> float:
        """Seconds that one transfer of this rank's own may stand still.

        Between the time of the store's own error, which tells the cause, and that when other ranks can only say that
        this one stands still.
        """
        share_s = _OWN_SHARE * self.progress_timeout_s
        if self.retry.deadline_s >= self.progress_timeout_s:
            return share_s
        return max(share_s, (self.retry.deadline_s + self.progress_timeout_s) / 2)

    def transfer_limit(self, engine: str) -> tuple[float, str]:
        """Return the seconds that one transfer may stand still by an engine, and the option that says so.

        A disk that hangs never lets go of a request, so that its own deadline is kept by who watches over it.
        """
        if engine == "local" and self.retry.deadline_s < self.transfer_timeout_s:
            return self.retry.deadline_s, "RetryPolicy.deadline_s"
        return self.transfer_timeout_s, "Options.progress_timeout_s"

    @property
    def transfer_budget_bytes(self) -> int:
        """Host memory that what is in flight may take."""
        return _TRANSFER_BYTES if self.memory_budget_bytes is None else self.memory_budget_bytes
