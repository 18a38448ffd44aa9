"""Take note of signals that announce the end of this process, in between the handlers of others.

    signal ──▶ handlers installed later ──▶ ours: note it ──▶ the one before, or the default once the time is over

A handler runs in the main thread between any two of its instructions: ours takes no lock, logs nothing and only
appends. In any other process it is as if it were not there, because a fork inherits handlers.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TypeAlias

from cloudckpt.preemption.notices import Notice

__all__ = ["SignalWatch"]

logger = logging.getLogger(__name__)

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
"""What `signal.getsignal` returns."""


class SignalWatch:
    """Handlers of this process, from when it is made until it is closed; then it only passes signals on.

    Whoever starts anew makes a new one: one that stays in somebody's chain is never its own predecessor.
    """

    def __init__(
        self, signals: Sequence[int], grace_s: Mapping[int, float], seen: list[Notice], *, clock: Callable[[], float]
    ) -> None:
        """Install the handlers, in the main thread; each of `signals` is appended to `seen` when it comes.

        It is so once, until it is forgotten.

        A signal that is handled by code outside of Python is left alone, with a warning.
        """
        self._grace_s = grace_s
        self._seen = seen
        self._clock = clock
        self._pid = os.getpid()
        self._is_open = True
        self._noted: dict[int, Notice] = {}
        self.previous: dict[int, _Handler] = {}
        for number in signals:
            self._install(number)

    def _install(self, number: int) -> None:
        previous = signal.getsignal(number)
        if previous is None:
            logger.warning("%s gives no notice: code outside of Python handles it", signal.Signals(number).name)
            return
        self.previous[number] = previous
        signal.signal(number, self._handle)

    def close(self) -> None:
        """Give back each signal of which our handler is still the one installed."""
        self._is_open = False
        if threading.current_thread() is not threading.main_thread():
            return  # the handlers stay, and do from now on what those before them did
        for number, previous in self.previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_listening():
            self._note(number)
        previous = self.previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL and self._is_end_allowed(number):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_listening(self) -> bool:
        # A forked child has inherited this handler, but neither the threads nor the loop that would heed the notice.
        return self._is_open and os.getpid() == self._pid

    def _note(self, number: int) -> None:
        """Note a signal when it comes first."""
        if number in self._noted:
            return
        now_s, grace_s, name = self._clock(), self._grace_s[number], signal.Signals(number).name
        reason = f"this process was sent {name}, which leaves it {grace_s:g} s"
        notice = Notice(source=name, reason=reason, deadline_s=now_s + grace_s, received_s=now_s)
        self._noted[number] = notice
        self._seen.append(notice)

    def forget(self, notice: Notice) -> None:
        """Let the signal that gave a notice give one again: somebody knows that its time has passed."""
        for number, noted in self._noted.copy().items():
            if noted is notice:
                del self._noted[number]

    def _is_end_allowed(self, number: int) -> bool:
        """Tell whether all watches from the installed handler down to this one let the process end."""
        # If Python calls somebody else's handler first, what the end of the process is, is theirs to decide.
        handler: _Handler = signal.getsignal(number)
        while isinstance(watch := getattr(handler, "__self__", None), SignalWatch) and watch.is_over(number):
            if watch is self:
                return True
            handler = watch.previous.get(number)
        return False

    def is_over(self, number: int) -> bool:
        """Tell whether the time that a signal left is over, or nobody listens."""
        noted = self._noted.get(number)
        return not self._is_listening() or (noted is not None and self._clock() > noted.urgency[0])
