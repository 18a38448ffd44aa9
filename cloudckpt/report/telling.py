"""Tell events to callables of anybody's, which may be slow, raise, or never return, without a save noticing it.

    tell ──▶ a queue ──▶ one thread, which is there while there is something to tell ──▶ each callable, in order

No lock is held while a callable runs. Any thread may tell; also one of a forked child, which has its own thread then.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from cloudckpt.errors import CloudCkptError, OptionsError, text_of
from cloudckpt.report.events import Event, OnEvent
from cloudckpt.threads import new_lock, started

__all__ = ["Teller"]

# Some hundred bytes each; a job has that many in weeks, or a callable that hangs.
_QUEUE = 10_000


_PLAIN = "give a plain function, which hands work to a loop of yours by asyncio.run_coroutine_threadsafe"


class Teller:
    """The callables of one job, and what they have not been told yet."""

    def __init__(self, on_event: OnEvent, note: Callable[[str], None], *, limit: int = _QUEUE) -> None:
        """Tell `on_event`.

        Args:
            on_event: whom.
            note: is told, once each, what they raise and what they are not told.
            limit: how many events wait; then the oldest is dropped.

        Raises:
            OptionsError: it is not callable, or a call would only make a coroutine or a generator.
        """
        self._callables = _callables(on_event)
        self._note = note
        self._queue: deque[Event] = deque()
        self._limit = limit
        self._lock = new_lock()
        self._thread: threading.Thread | None = None
        self._noted: set[str] = set()
        self._pid = os.getpid()

    @property
    def is_asked(self) -> bool:
        """Whether there is anybody to be told."""
        return bool(self._callables)

    def tell(self, event: Event) -> None:
        """Have an event told soon; returns at once, and raises nothing."""
        if not self._callables:
            return
        with self._lock:
            if self._pid != os.getpid():
                # What waited when this process was forked is the parent's to tell.
                self._pid, self._thread = os.getpid(), None
                self._queue.clear()
            self._queue.append(event)
            is_full = len(self._queue) > self._limit
            if is_full:
                self._queue.popleft()
            why = "" if self._thread is not None and self._thread.is_alive() else self._start()
        if is_full:
            self._note_once("on_event is too slow: the oldest events that wait for it are dropped")
        if why:
            self._note_once(f"on_event is told later: {why}")

    def _start(self) -> str:
        try:
            self._thread = started(self._run, name="cloudckpt-events")
        except CloudCkptError as exc:
            return str(exc)  # the next event tries again
        return ""

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is told; whether it is. Called by a callable itself, it waits for nothing."""
        if self._pid != os.getpid():
            return True
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return not self._queue
        thread.join(timeout_s)
        return not thread.is_alive() and not self._queue

    def end(self, timeout_s: float) -> None:
        """Wait until all is told, and say what could not be in time; the thread goes on with it."""
        if not self.wait(timeout_s):
            self._note_once(f"on_event has not taken all events within {timeout_s:g} s: {len(self._queue)} wait")

    def _run(self) -> None:
        while (event := self._next()) is not None:
            for call in self._callables:
                try:
                    self._note_if_unrun(call, call(event))
                except BaseException as exc:  # noqa: BLE001 (anybody's code; an exit of this thread would end the telling)
                    self._note_once(f"on_event {_name(call)} failed at {type(event).__name__}: {text_of(exc, repr)}")

    def _note_if_unrun(self, call: Callable[[Event], object], result: object) -> None:
        """Note a result that stands for work which nobody does: who wrote the callable takes it for told."""
        if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            if inspect.iscoroutine(result):
                result.close()  # else Python warns, from wherever it is collected
            self._note_once(f"on_event {_name(call)} returns a {type(result).__name__}, which nobody runs; {_PLAIN}")

    def _next(self) -> Event | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            # Under the lock, so that who tells the next one knows that nobody is there for it.
            self._thread = None
            return None

    def _note_once(self, trouble: str) -> None:
        """Note a trouble; the same one at each save would push all others out of what is kept of them."""
        if trouble not in self._noted:
            self._noted.add(trouble)
            self._note(trouble)


# What only makes an object that somebody else has to run.
_MAKING = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


def _callables(on_event: object) -> tuple[Callable[[Event], object], ...]:
    if on_event is None:
        return ()
    given = on_event if isinstance(on_event, Sequence) and not isinstance(on_event, str) else (on_event,)
    for one in given:
        if not callable(one) or isinstance(one, type):
            raise OptionsError(
                f"on_event is {text_of(one, repr)}; give a callable that takes an event, or a list of them"
            )
        if any(does(one) or does(getattr(one, "__call__", None)) for does in _MAKING):  # noqa: B004 (it is looked into)
            raise OptionsError(f"on_event is {text_of(one, repr)}, and a call of it runs nothing; {_PLAIN}")
    return tuple(given)


def _name(call: Callable[[Event], object]) -> str:
    return getattr(call, "__qualname__", None) or type(call).__qualname__
