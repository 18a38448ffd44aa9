"""Find out whether a store honours create-only writes, on which every commit stands (FORMAT invariant 2).

Creates one random key twice, with different bytes, and expects to be refused the second time. What has been shown
once holds for the process. Any thread may enter.
"""

from __future__ import annotations

import logging
import secrets
import threading

from cloudckpt.errors import (
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    StorageError,
    is_transient,
)
from cloudckpt.store.base import Store
from cloudckpt.store.limit import one_deadline

__all__ = ["probe_create", "probe_write"]

logger = logging.getLogger(__name__)

_QUESTIONS = 5

_proven: set[tuple[str, str]] = set()
_lock = threading.Lock()


def probe_create(store: Store, *, single_writer: bool = False) -> None:
    """Make sure that `store` refuses to create an object that is there.

    Costs two creates (with a retrying store also a read) and a delete, once per process, engine and bucket. With
    `single_writer` it costs nothing and proves nothing: the caller promises that nobody else writes there.

    Raises:
        CreateNotEnforcedError: it overwrote the object, or its engine cannot refuse.
        StorageError: it could not be asked.
    """
    if single_writer:
        return
    if not store.is_create_atomic:
        raise _not_enforced(store, f"the {store.engine} engine cannot create an object only if its key is free")
    place = (store.engine, _bucket_of(store.url))
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
    _remove(store, key)


@one_deadline()
def _ask(store: Store) -> None:
    key = f"probe-{secrets.token_hex(16)}"
    try:
        # Different bytes, because a retrying store takes an object with the same bytes for its own.
        store.create(key, b"first: cloudckpt asks whether the store refuses to overwrite")
    except CommitUnknownError:
        _remove(store, key)
        raise
    try:
        is_refused = any(_is_refused(store, key) for _ in range(_QUESTIONS))
    finally:
        _remove(store, key)
    if not is_refused:
        raise StorageError(
            f"create of {key!r} on {store.url} met a fault each time, so nobody knows whether the store refuses to "
            "overwrite; try again when it is well",
            op="create",
            key=key,
        )


def _is_refused(store: Store, key: str) -> bool:
    """Tell whether the store itself said that the key is taken; False if a fault kept it from answering."""
    try:
        store.create(key, b"second: it does not")
    except ObjectExistsError as exc:
        # After a fault a retrying store reads back, and finds the first object: its own finding, not an answer.
        return not is_transient(exc.__cause__) if exc.__cause__ is not None else True
    except CommitUnknownError as exc:
        if exc.is_taken:  # the store has answered; who may write and not read cannot see whose object it is
            return True
        raise
    raise _not_enforced(store, "it was told to create an object only if the key is free, and overwrote one")


def _remove(store: Store, key: str) -> None:
    try:
        store.delete([key])
    except StorageError as exc:
        # A training job may well have no right to delete; a few bytes are left, and no reader looks at them.
        logger.warning("the probe object %r stays on %s: %s", key, store.url, exc)


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
