"""Find out whether a store honours create-only writes, on which every commit stands (FORMAT invariant 2).

    eight writers ──▶ one barrier ──▶ one key, eight contents ──▶ exactly one wins, and it is the winner's that stands

One after the other is no proof: some stores look first and write later, and let whoever is between them win, too.
A race that faults spoilt is run again, under the same key and with the same bytes: some gateways lose the first answer
to each request, and pass the next. What has been shown once holds for the process. Any thread may enter.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    AccessDeniedError,
    CloudCkptError,
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
    TransientError,
)
from cloudckpt.options import KIB
from cloudckpt.store.aside import ended
from cloudckpt.store.base import Store
from cloudckpt.store.limit import one_deadline
from cloudckpt.store.local import local_below
from cloudckpt.store.retrying import RetryingStore
from cloudckpt.threads import new_lock, started

__all__ = ["probe_create", "probe_write", "race"]

logger = logging.getLogger(__name__)

_WRITERS = 8
# A second race is cheap where the first one was; where writers wait for a lock (SeaweedFS: for seconds), one tells.
_RACES = 3
_RACING_S = 0.25
# Where faults spoil them, they go on as long as the store's patience; without a retry layer, there are so many. Where
# nobody gets an answer, there is no other: each writer has used up its patience.
_RACES_AT_MOST = 5
# Who interrupts waits for the writers, and for the removal of what they wrote, no longer than this each.
_LEAVING_S = 5.0
# Longer than any thread takes to come; all come, or none is waited for.
_BARRIER_S = 60.0
_FAULTS = (TransientError, RetryExhaustedError, CommitUnknownError)

_proven: set[tuple[str, str, str]] = set()
_lock = new_lock()


def probe_create(store: Store, *, single_writer: bool = False) -> None:
    """Make sure that of writers who create one object at the same time exactly one wins.

    Costs up to three races, each of eight creates and the reads after them, and a delete, once per process, engine,
    endpoint and bucket or mounted file system; where faults spoil them, more, until the store's deadline. With
    `single_writer` it costs nothing and proves nothing: the caller promises that nobody else writes there.

    Raises:
        CreateNotEnforcedError: several won, or the store's engine cannot refuse.
        StorageError: it could not be asked. A note tells of what could not be removed then, also of an interrupt.
    """
    if single_writer:
        return
    if not store.is_create_atomic:
        raise _not_enforced(store, f"the {store.engine} engine cannot create an object only if its key is free")
    local = local_below(store)
    place = (store.engine, store.endpoint, (local and local.file_system()) or _bucket_of(store.url))
    with _lock:
        if place in _proven:
            return
    try:
        _ask(store)
    except CommitUnknownError as exc:
        # Nothing hangs on a probe, so that nobody need look whether it landed.
        raise StorageError(
            f"{store.url} could not be asked whether it refuses to overwrite; nothing was saved. See the cause, and "
            f"that the credentials may read what they write ({exc.__cause__ or exc})",
            op="create",
            key=exc.key,
        ) from exc
    with _lock:
        _proven.add(place)


def probe_write(store: Store) -> None:
    """Make sure that `store` takes a write now: a few bytes under a random key, and removes them.

    Raises:
        StorageError: it does not.
    """
    key = f"probe-{secrets.token_hex(16)}"
    store.put(key, [memoryview(b"cloudckpt asks whether the store is there again")])
    _remove(store, [key])


@one_deadline()
def race(store: Store, key: str) -> bool:
    """Let eight writers create one object at the same time; tell whether exactly one won, False if faults spoilt it.

    The object stays, for the caller to remove.

    Raises:
        CreateNotEnforcedError: several won.
        StorageError: it could not be asked.
    """
    writers: list[Future[_End]] = []
    _begin(store, key, writers)
    ended(writers)
    try:
        ends = [writer.result() for writer in writers]
    except threading.BrokenBarrierError as exc:
        raise _not_asked(store, exc) from exc
    return _is_answered(store, key, ends)


@one_deadline()
def _ask(store: Store) -> None:
    written: list[str] = []
    try:
        _race_until_told(store, written)
        _remove(store, written)
    except BaseException as exc:
        hurried = store if isinstance(exc, Exception) else _hurried(store)
        # At the end of the interpreter what refuses a create refuses a delete as well.
        if written and threading.main_thread().is_alive() and (left := _left(hurried, written)) is not None:
            exc.add_note(f"the probe objects {', '.join(written)} may stay on {store.url}: {left}")
        raise


def _race_until_told(store: Store, written: list[str]) -> None:
    """Hold races, each under a key that is added to `written`, until they have told."""
    key, answers, spoilt, began_s = _new_key(), 0, 0, time.monotonic()
    while not answers or (answers < _RACES and time.monotonic() - began_s < _RACING_S):
        writers: list[Future[_End]] = []
        try:
            _begin(store, key, writers)
            ended(writers)
        except BaseException as exc:
            if not isinstance(exc, Exception):
                wait(writers, timeout=_LEAVING_S)
                written.append(key)
            raise
        if key not in written and any(map(_may_have_written, writers)):
            written.append(key)
        try:
            ends = [writer.result() for writer in writers]
        except threading.BrokenBarrierError as exc:
            raise _not_asked(store, exc) from exc
        if _is_answered(store, key, ends):
            answers, key = answers + 1, _new_key()
            continue
        spoilt += 1
        is_mute = not any(end.error is None or end.is_refused for end in ends)
        if not answers and (is_mute or not _may_go_on(store, spoilt)):
            raise _undecided(store, key, ends, spoilt=spoilt, elapsed_s=time.monotonic() - began_s)
        key = _freed(store, key)


def _may_have_written(writer: Future[_End]) -> bool:
    """Tell whether something may stand under the key, by what has become of one create."""
    error = writer.exception() or writer.result().error
    if isinstance(error, ObjectExistsError | CommitUnknownError):
        return True
    if isinstance(error, RetryExhaustedError | OptionsError | threading.BrokenBarrierError):
        return False  # what was doubtful would be unknown
    return error is None or getattr(error, "may_have_landed", True)


def _new_key() -> str:
    return f"probe-{secrets.token_hex(16)}"


def _may_go_on(store: Store, spoilt: int) -> bool:
    """Wait before another race, and tell whether there is time for one."""
    return store.pause(spoilt) if isinstance(store, RetryingStore) else spoilt < _RACES_AT_MOST


def _freed(store: Store, key: str) -> str:
    """Let the next race have the key again; another one, where it cannot be deleted."""
    try:
        store.delete([key])
    except StorageError:
        return _new_key()
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How one writer's create ended: it won, or why it did not."""

    content: bytes
    error: StorageError | None

    @property
    def is_refused(self) -> bool:
        """Whether the store itself said that the key is taken."""
        # After a fault a retrying store reads back, and finds another's object: its own finding, not an answer.
        if isinstance(self.error, CommitUnknownError):
            return self.error.is_taken  # who may write and not read cannot see whose object it is
        return isinstance(self.error, ObjectExistsError) and not isinstance(self.error.__cause__, TransientError)

    @property
    def fault(self) -> BaseException | None:
        """What kept the store's own answer away from a writer that has none."""
        if self.error is None or self.is_refused:
            return None
        return self.error if isinstance(self.error, _FAULTS) else self.error.__cause__


def _hurried(store: Store) -> Store:
    if not isinstance(store, RetryingStore):
        return store
    return store.within(Deadline.after(_LEAVING_S, "the removal of what an interrupted probe has written"))


def _begin(store: Store, key: str, ends: list[Future[_End]]) -> None:
    """Let all writers loose on one key; raises, and nothing is written, if there are not as many threads.

    Their ends are added to `ends`.
    """
    start = threading.Barrier(_WRITERS, timeout=_BARRIER_S)

    def write(number: int) -> _End:
        # Different bytes, because a retrying store takes an object with the same bytes for its own.
        content = b"writer %d of %d: cloudckpt asks whether exactly one wins" % (number, _WRITERS)
        start.wait()
        try:
            store.create(key, content)
        except (ObjectExistsError, *_FAULTS) as exc:
            return _End(content=content, error=exc)
        return _End(content=content, error=None)

    def settle(end: Future[_End], number: int) -> None:
        if not end.set_running_or_notify_cancel():
            return
        try:
            end.set_result(write(number))
        except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: raised by the one that waits)
            end.set_exception(exc)

    try:
        for number in range(_WRITERS):
            ends.append(end := Future[_End]())
            # Each in a copy of this context, which says by when all of it must have ended.
            started(partial(copy_context().run, settle, end, number), name="cloudckpt-probe")
    except BaseException as exc:
        start.abort()  # those that have come would wait for those that never do
        if ends and ends[-1].cancel():  # whoever has begun writes, though its start was interrupted
            ends.pop()
        if isinstance(exc, CloudCkptError):
            raise _not_asked(store, exc) from exc
        raise


def _is_answered(store: Store, key: str, ends: Sequence[_End]) -> bool:
    """Tell whether a race shows that creates are exclusive; False if faults spoilt it. Raises if they are not."""
    winners = [end.content for end in ends if end.error is None]
    if len(winners) > 1:
        raise _not_enforced(store, f"{len(winners)} of {len(ends)} writers created the same object")
    if not winners or not any(end.is_refused for end in ends):
        return False
    try:
        is_winners = store.read(key, limit_bytes=KIB) == winners[0]
    except AccessDeniedError:
        return True  # who may write and not read has seen one win, and the others refused
    if not is_winners:
        raise _not_enforced(store, "one writer created an object, and another one's bytes stand there")
    return True


def _not_asked(store: Store, cause: Exception) -> StorageError:
    return StorageError(
        f"{store.url} could not be asked whether it refuses to overwrite, because {_WRITERS} threads did not come "
        f"({str(cause) or type(cause).__name__}); nothing was saved. Let this process have more threads, or pass "
        "single_writer=True if no other job ever writes to this root",
        op="create",
    )


def _undecided(store: Store, key: str, ends: Sequence[_End], *, spoilt: int, elapsed_s: float) -> StorageError:
    fault = next((end.fault for end in ends if end.fault is not None), None)
    won, refused = sum(end.error is None for end in ends), sum(end.is_refused for end in ends)
    error = StorageError(
        f"nobody knows whether {store.url} refuses to overwrite, so nothing was saved: {spoilt} times in "
        f"{elapsed_s:.1f} s {len(ends)} writers raced to create {key!r}, and faults spoilt it. The last time {won} "
        f"found their own bytes there, the store itself refused {refused}, and {len(ends) - won - refused} had no "
        f"answer to their create{'' if fault is None else f' ({fault})'}; try again when it is well",
        op="create",
        key=key,
    )
    error.__cause__ = fault
    return error


def _remove(store: Store, keys: Sequence[str]) -> None:
    if (left := _left(store, keys)) is not None:
        # A training job may well have no right to delete; a few bytes are left, and no reader looks at them.
        logger.warning("the probe objects %s stay on %s: %s", ", ".join(keys), store.url, left)


def _left(store: Store, keys: Sequence[str]) -> CloudCkptError | None:
    """Remove objects; return why some are left."""
    try:
        store.delete(keys)
    except CloudCkptError as exc:
        return exc
    return None


def _not_enforced(store: Store, reason: str) -> CreateNotEnforcedError:
    return CreateNotEnforcedError(
        f"{store.url} does not enforce create-only writes: {reason}. Two jobs could commit the same step there, one "
        "over the other, and neither would notice; use another store, or pass single_writer=True if no other job "
        "ever writes to this root",
        op="create",
    )


def _bucket_of(url: str) -> str:
    """Return what the answer holds for: the bucket, or the whole root where a URL has none."""
    scheme, separator, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    return scheme + separator + bucket if bucket and scheme != "memory" else url
