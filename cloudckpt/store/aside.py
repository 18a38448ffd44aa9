"""Call on threads of their own what may not come back: neither a signal nor the end of the process waits for it.

    errand ──▶ begun() ──▶ a daemon thread ──▶ a future

What a call raises keeps its causes, wherever it is raised again. Knows nothing of stores. Any thread may enter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import TypeVar

__all__ = ["begun", "pinned"]

T = TypeVar("T")


def begun(call: Callable[[], T], *, name: str) -> Future[T]:
    """Begin to call on a thread of its own, in a copy of this context."""
    future: Future[T] = Future()
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
