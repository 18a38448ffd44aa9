"""Keep a connection for who comes next: stores of one bucket with the same options share one wire in a process.

    verb ──▶ take(key, connect) ──▶ Lease ──▶ its wire          leave() ──▶ nobody on it: kept for a while, or closed

A client is dear: botocore alone reads megabytes of descriptions. So one that its last user has left stays for the next,
who asked in the same words from the same environment and the same files; a few do, the oldest goes first. What was
retired is given to nobody again. Keeps FORMAT 16: what tells connections apart never leaves this room. Any thread may
enter; a forked child begins with none, and closes nothing of its parent's.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

from cloudckpt.store.wire import Wire
from cloudckpt.threads import new_lock

__all__ = ["Lease", "key_of", "leave", "left_when_dropped", "release_idle", "retire", "take", "use"]

logger = logging.getLogger(__name__)

# How many connections wait for their next user, and how long one may have waited: longer than the pause between two
# saves of a script, shorter than people take to wonder why a changed profile has no effect.
_IDLE = 4
_IDLE_S = 600.0
# What the libraries read beside the environment: a key that was written there since is to be found.
_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "",
    "GOOGLE_APPLICATION_CREDENTIALS": "~/.config/gcloud/application_default_credentials.json",
}
# Variables that no store's library reads; torch sets some while it is imported, which a connection may come before.
_OF_TRAINING = (
    *("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "KMP_", "MKL_"),
    *("TOKENIZERS_", "WANDB_", "TF_", "XLA_"),
)


class Lease:
    """A wire, and how many stores and verbs are on it: one that was retired is closed by its last user.

    Attributes:
        wire: what moves the bytes.
        is_retired: whether nobody may come to it any more.
    """

    def __init__(self, wire: Wire, key: Hashable | None) -> None:
        self.wire = wire
        self.is_retired = key is None
        self._key = key
        self._pid = os.getpid()
        self._users = 1
        self._left_s = 0.0


_lock = new_lock()
_shared: dict[Hashable, Lease] = {}
# What stores had that were dropped unclosed. Garbage is collected in the middle of anything, also under the lock.
_dropped: deque[Lease] = deque()
# A forked child must not close, not even by collecting garbage, what its parent still uses.
_inherited: list[object] = []


def key_of(*said: object) -> Hashable | None:
    """Return what two stores must have alike to share a wire; None where something in it cannot be compared.

    What is asked for, and all that a library may read of its own accord: the environment, and the files of keys.
    """
    try:
        words = _frozen(said)
        hash(words)
    except TypeError:
        return None
    said_here = tuple(sorted(pair for pair in os.environ.items() if not pair[0].startswith(_OF_TRAINING)))
    return words, said_here, tuple(map(_stamp, _files()))


def _frozen(value: object) -> Hashable:
    if isinstance(value, Mapping):
        return "mapping", tuple(sorted((str(name), _frozen(inner)) for name, inner in value.items()))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(_frozen, value))
    if value is None or isinstance(value, str | bytes | int | float) or getattr(value, "__hash__", None):
        return type(value).__name__, value  # True is not 1
    raise TypeError(type(value).__name__)


def _files() -> list[str]:
    return [os.environ.get(name) or usual for name, usual in _FILES.items()]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).expanduser().stat()
    except (OSError, RuntimeError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def take(key: Hashable | None, connect: Callable[[], Wire]) -> Lease:
    """Return a lease on the wire of a key, to be left; without a key, or where there is none yet, on a new one."""
    with _lock:
        if (lease := _found(key)) is not None:
            return lease
    # Not under the lock: it may ask for credentials.
    made = Lease(connect(), key)
    with _lock:
        lease = _found(key)
        if lease is None and key is not None:
            _shared[key] = made
    if lease is None:
        return made
    _close(made.wire)  # another thread was faster
    return lease


def _found(key: Hashable | None) -> Lease | None:
    lease = None if key is None else _shared.get(key)
    if lease is not None:
        lease._users += 1  # noqa: SLF001 (its own kind)
    return lease


def use(lease: Lease) -> Lease:
    """Come to a lease that one has once more: a verb does, so that it is not closed under it."""
    with _lock:
        lease._users += 1  # noqa: SLF001
    return lease


def leave(*leases: Lease) -> None:
    """Leave leases; the last one closes what was retired, and what has waited for longest."""
    with _lock:
        closing = [lease for lease in [*leases, *_taken_up()] if _is_of_nobody(lease)] + _taken_out(_overdue())
    for one in closing:
        _close(one.wire)


def left_when_dropped(owner: object, lease: Lease) -> weakref.finalize[..., object]:
    """Leave a lease when `owner` is collected without having done so."""
    finalizer = weakref.finalize(owner, _dropped.append, lease)
    finalizer.atexit = False
    return finalizer


def _taken_up() -> Iterator[Lease]:
    while _dropped:
        yield _dropped.popleft()


def _is_of_nobody(lease: Lease) -> bool:
    """Count one user less; tell whether the lease is to be closed. What a parent has is not for its child to count."""
    if lease._pid != os.getpid():  # noqa: SLF001
        return False
    lease._users -= 1  # noqa: SLF001
    lease._left_s = time.monotonic()  # noqa: SLF001
    return lease.is_retired and not lease._users  # noqa: SLF001


def retire(lease: Lease) -> None:
    """Give a lease to nobody any more: what was connected is of no use, or not to be trusted."""
    with _lock:
        lease.is_retired = True
        if _shared.get(lease._key) is lease:  # noqa: SLF001
            del _shared[lease._key]  # noqa: SLF001


def release_idle() -> None:
    """Close all connections that nobody uses."""
    leave()
    with _lock:
        closing = _taken_out(_idle())
    for one in closing:
        _close(one.wire)


def _idle() -> list[Lease]:
    """Return what nobody is on, the one that was left last first."""
    idle = [lease for lease in _shared.values() if not lease._users]  # noqa: SLF001
    return sorted(idle, key=lambda lease: -lease._left_s)  # noqa: SLF001


def _overdue() -> list[Lease]:
    now_s = time.monotonic()
    idle = _idle()
    return [lease for place, lease in enumerate(idle) if place >= _IDLE or now_s - lease._left_s > _IDLE_S]  # noqa: SLF001


def _taken_out(leases: Sequence[Lease]) -> list[Lease]:
    for lease in leases:
        lease.is_retired = True
        del _shared[lease._key]  # noqa: SLF001
    return list(leases)


def _close(wire: Wire) -> None:
    """Close a wire that nobody uses any more; that it fails must not hide what the last verb brought."""
    try:
        wire.close()
    except Exception as exc:  # noqa: BLE001 - the peer may be gone, and there is nothing left to save
        logger.debug("closing a connection failed: %s", type(exc).__name__)


def _after_fork() -> None:
    _inherited.append(dict(_shared))
    _shared.clear()


os.register_at_fork(after_in_child=_after_fork)
# While fsspec's loop is at work; a client that is left to the end of the interpreter complains there.
atexit.register(release_idle)
