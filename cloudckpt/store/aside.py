"""Call on threads of their own what may not come back: neither a signal nor the end of the process waits for it.

    errand, probe, the main thread's request ──▶ begun() ──▶ a daemon thread ──▶ a future
    resolver of fsspec's loop                ──▶ Aside.submit() ──╯

Python runs signal handlers in its main thread alone, and there only between two steps of Python's own: who waits for a
future hears them, if a step at a time (`audible_s`), and who is in a library's machine code does not. What a call
raises keeps its causes, wherever it is raised again. Knows nothing of stores. Any thread may enter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

__all__ = ["Aside", "audible_s", "begun", "ended", "in_main", "pinned", "undisturbed", "waitable_s"]

T = TypeVar("T")

# How long a signal may go unheard. The kernel may give it to another thread, or to the main one in the moment before
# its wait begins, and neither ends the wait.
_DEAF_S = 0.1


def begun(call: Callable[[], T], *, name: str) -> Future[T]:
    """Begin to call on a thread of its own, in a copy of this context."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # who does not wait any more cannot take it away: there is a thread at it
    work = partial(copy_context().run, _settle, future, call)
    threading.Thread(target=work, name=f"cloudckpt-{name}", daemon=True).start()
    return future


def _settle(future: Future[T], call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - the end of a thread's work: raised by each who waits
        future.set_exception(pinned(exc))
    finally:
        # The stack of what was raised holds this frame, and that the caller's memory.
        del future, call


def pinned(exc: BaseException) -> BaseException:
    """Return an exception that keeps what it came from: Python takes that away where another thread raises it again.

    There it becomes the context what the thread was handling, such as an error of the caller's own.
    """
    if exc.__cause__ is None:
        exc.__cause__ = exc.__context__
    return exc


def in_main() -> bool:
    """Tell whether this is the main thread, which alone runs signal handlers."""
    return threading.current_thread() is threading.main_thread()


def waitable_s(seconds: float) -> float:
    """Return a time that a lock can wait for: no more than it can count."""
    return min(seconds, threading.TIMEOUT_MAX)


def audible_s(seconds: float) -> float:
    """Return for how long to wait before the next look, so that the main thread hears a signal meanwhile."""
    return waitable_s(min(seconds, _DEAF_S) if in_main() else seconds)


def ended(futures: Collection[Future[T]]) -> None:
    """Wait until all have ended, whatever came of them."""
    while wait(futures, timeout=audible_s(threading.TIMEOUT_MAX)).not_done:
        pass


def undisturbed(call: Callable[[], T], *, name: str) -> T:
    """Return what a call returns, on a thread of its own if this is the main one: no signal's handler runs in it.

    Library code that calls back what a handler interrupts may tell that as an error of its own. Who is interrupted
    while it waits leaves the call behind.
    """
    if not in_main():
        return call()
    future = begun(call, name=name)
    ended([future])
    return future.result()


class Aside(ThreadPoolExecutor):
    """An executor for event loops whose threads nobody joins: `asyncio` asks for one of this class."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:  # noqa: ANN401 - the base's own
        """Begin a call on a thread of its own."""
        return begun(partial(fn, *args, **kwargs), name="loop")
