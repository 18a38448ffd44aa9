"""Begin threads on a machine that may have none left, and never wait for one that does not come.

    worker, begin      ──▶ a thread at work, or our error; `started` is both, `revoke` undoes it in time
    each(items, call)  ──▶ results in order: this thread calls, and as many others help as there are
    new_lock           ──▶ a lock that a forked child finds open, whoever held it in the parent

A limit of memory or processes ends a training no sooner than it has to: who can work with fewer threads, does. Any
thread may enter.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar, cast

from cloudckpt.errors import CloudCkptError

__all__ = ["begin", "each", "new_lock", "revoke", "started", "worker"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# How long a thread may take to come. In turns of this thread: where processors are so busy that one waits long for its
# turn, the other does, too.
_TURNS = 100
_TURN_S = 0.05


# Of this process; a thread that holds one of them when the process forks is not there in the child. References without
# callbacks: in one of Python's own, as a WeakSet has them, an interrupt would be lost.
_LOCKS: list[weakref.ref[threading.Lock]] = []
_registering = threading.Lock()
_FEW = 256


def new_lock() -> threading.Lock:
    """Return a lock that is open in a forked child; what it guards has to bear that it was held at the fork."""
    made = threading.Lock()
    with _registering:
        if len(_LOCKS) >= _FEW and not len(_LOCKS) & (len(_LOCKS) - 1):  # at each power of two
            _LOCKS[:] = [one for one in _LOCKS if one() is not None]
        _LOCKS.append(weakref.ref(made))
    return made


def _open_all() -> None:
    for one in [_registering, *filter(None, (ref() for ref in _LOCKS))]:
        one._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001 (as the standard library does)


os.register_at_fork(after_in_child=_open_all)


class _Coming(threading.Event):
    """What `Thread.start` waits for: a thread that runs out of memory before it can say that it is there never does."""

    def __init__(self) -> None:
        super().__init__()
        self.is_awaited = True
        self.has_begun = False
        self.lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            return super().wait(timeout)
        return any(super(_Coming, self).wait(_TURN_S) for _ in range(_TURNS))


def worker(work: Callable[[], object], *, name: str) -> threading.Thread:
    """Return a thread for `begin`: a daemon, so that nothing that hangs in it keeps the process from its end."""
    coming = _Coming()

    def run() -> None:
        with coming.lock:
            if not coming.is_awaited:
                return
            coming.has_begun = True
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread._started = coming  # type: ignore[attr-defined]  # noqa: SLF001 (nothing else bounds the wait)
    return thread


def begin(thread: threading.Thread) -> None:
    """Start a `worker`.

    Raises:
        CloudCkptError: it could not be started, and never works.
        BaseException: what a signal's handler has raised meanwhile; it works if it had begun by then, else never.
    """
    try:
        thread.start()
    except KeyError as exc:
        is_interrupted = exc.args == (thread,) and exc.__context__ is not None
        revoke(thread)
        if not is_interrupted:
            raise
        # A start that is interrupted takes off a list what the thread itself has taken off by then.
        raise cast("BaseException", exc.__context__) from None
    except (RuntimeError, MemoryError) as exc:
        revoke(thread)
        raise _no_thread(str(exc) or type(exc).__name__) from exc
    except BaseException:
        revoke(thread)
        raise
    coming: _Coming = thread._started  # type: ignore[attr-defined]  # noqa: SLF001
    if not coming.is_set() and revoke(thread):
        raise _no_thread("it did not begin")


def revoke(thread: threading.Thread) -> bool:
    """Let a `worker` that has not begun its work never begin it; tell whether that is so."""
    coming: _Coming = thread._started  # type: ignore[attr-defined]  # noqa: SLF001
    with coming.lock:
        coming.is_awaited = coming.has_begun
    return not coming.has_begun


def started(work: Callable[[], object], *, name: str) -> threading.Thread:
    """Return a thread that works; raises what `begin` does."""
    thread = worker(work, name=name)
    begin(thread)
    return thread


def _no_thread(why: str) -> CloudCkptError:
    if not threading.main_thread().is_alive():
        return CloudCkptError(
            "the interpreter is shutting down, and starts no thread any more; save before it does, not in atexit"
        )
    return CloudCkptError(
        f"a thread could not be started: {why}; let this process have more memory or threads (ulimit -v, ulimit -u, "
        "the limits of its container)"
    )


def each(items: Sequence[_Item], call: Callable[[_Item], _Result], *, threads: int, name: str) -> list[_Result]:
    """Call something for each item, this thread and helpers together, in its context; return the results in order.

    Raises the first fault by order once nothing is under way any more; what had not begun by then is left out.
    """
    crew = _Crew(items, call)
    with suppress(CloudCkptError):  # those that are there do the work of those that are not
        for _ in range(min(threads, len(items)) - 1):
            started(partial(copy_context().run, crew.work), name=name)
    crew.work()
    return crew.results()


class _Crew(Generic[_Item, _Result]):
    """The items that are left, and what became of the others."""

    def __init__(self, items: Sequence[_Item], call: Callable[[_Item], _Result]) -> None:
        self._items = items
        self._call = call
        self._next = 0
        self._done: dict[int, _Result] = {}
        self._faults: dict[int, BaseException] = {}
        self._changed = threading.Condition()

    def work(self) -> None:
        """Take one item after the other, until there is none or a call has failed."""
        while (number := self._take()) is not None:
            self._do(number)

    def _take(self) -> int | None:
        with self._changed:
            if self._faults or self._next == len(self._items):
                return None
            self._next += 1
            return self._next - 1

    def _do(self, number: int) -> None:
        try:
            result = self._call(self._items[number])
        except BaseException as exc:  # noqa: BLE001 (raised by the thread that waits)
            with self._changed:
                self._faults[number] = exc
                self._changed.notify_all()
        else:
            with self._changed:
                self._done[number] = result
                self._changed.notify_all()

    def results(self) -> list[_Result]:
        """Wait for what helpers are at; return all, or raise the first fault."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._done) + len(self._faults) == self._next)
        if self._faults:
            raise self._faults[min(self._faults)]
        return [self._done[number] for number in range(len(self._items))]
