"""Bring the rest of a restore to its end in a thread of its own, while training has begun.

    load_state ──▶ all but the contents of some optimizers' state is whole ──▶ training goes on
      ╰─ thread: the rest read, verified, filled ──▶ whole, or failed: logged at once, and raised where it is needed

The ranks' session goes along (`Group.hand_over`), so that nothing of theirs meets a trainer's traffic, and what begins
the next one waits. The thread is a daemon; the end of the interpreter, or of the manager, gives up what is left.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context

from torch.optim import Optimizer

from cloudckpt.errors import CloudCkptError, OptionsError, RestoreFailedError
from cloudckpt.state import hold
from cloudckpt.threads import begin, revoke, worker
from cloudckpt.transfer import AbandonedError

__all__ = ["Rest"]

logger = logging.getLogger(__name__)

# How long one that was given up may take to notice.
_NOTICING_S = 2.0
# How often one who waits for it looks how much time there still is.
_LOOK_S = 0.1


class Rest:
    """What of one restore may come after its return, and what became of that.

    Attributes:
        wait_for: names of what of the state is whole at the return.
    """

    def __init__(self, wait_for: str | Sequence[str]) -> None:
        """Nothing is under way yet.

        Raises:
            OptionsError: no names.
        """
        self.wait_for = [wait_for] if isinstance(wait_for, str) else list(wait_for)
        if not (self.wait_for and all(isinstance(name, str) for name in self.wait_for)):
            raise OptionsError(f"wait is {wait_for!r}; give one or more names of what the state holds")
        self._what = ""
        self._names: Sequence[str] = ()
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._ended.set()

    def begin(self, what: str, optimizers: Mapping[str, Optimizer], work: Callable[[], None]) -> None:
        """Do the work in a thread; where the machine has none left, here.

        Args:
            what: is restored, for people.
            optimizers: whose state comes, by name; they are held from here on.
            work: reads the rest.
        """
        self._what, self._names = what, list(optimizers)
        self._ended.clear()
        _UNDER_WAY.add(self)
        context = copy_context()
        thread = worker(lambda: context.run(self._run, work), name="cloudckpt-restore")
        # An interrupt may come anywhere below: what is not read must not be used, and what the ranks are in must end.
        try:
            hold(list(optimizers.values()), self)
            begin(thread)
        except BaseException as exc:
            if revoke(thread):
                self._is_abandoned = not isinstance(exc, CloudCkptError)
                self._run(work)
            if not isinstance(exc, CloudCkptError):
                raise

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 (the end of a thread: kept, and raised where somebody waits)
            self._error = exc
            with suppress(Exception):  # a program's own handler of the log
                logger.error("%s", self._failure())  # noqa: TRY400
        finally:
            self._ended.set()

    @property
    def _is_elsewhere(self) -> bool:
        """Whether this is a fork of the process in which it is under way."""
        return self._pid != os.getpid() and not self._ended.is_set()

    def check(self) -> None:
        """Raise if nobody wants it any more."""
        if self._is_abandoned:
            raise AbandonedError("it was given up")

    def wait(self, timeout: float | None = None) -> None:
        """Return when all is whole.

        Raises:
            RestoreFailedError: it never will be; each call says so.
            TimeoutError: it is not yet.
        """
        if self._is_elsewhere:
            raise RestoreFailedError(
                f"{', '.join(self._names)}: the rest of {self._what} comes in the process that this one was forked "
                "from; restore it here, too",
                name=", ".join(self._names),
            )
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self._what} goes on after {timeout} s")
        if self._error is not None:
            raise self._failure() from self._error

    def join(self) -> bool:
        """Wait for the end, whatever it is; tell whether all is whole."""
        if self._is_elsewhere:
            return False
        self._ended.wait()
        return self._error is None

    def ended(self, left_s: Callable[[], float]) -> bool:
        """Wait for the end, whatever it is, as long as there is time; tell whether it has come.

        Args:
            left_s: seconds that there still are, asked again and again: an end may be announced meanwhile. Below 0 is
                none.
        """
        while not self._ended.wait(max(0.0, min(_LOOK_S, left := left_s()))):
            if left <= 0:
                return False
        return True

    def give_up(self, left_s: Callable[[], float]) -> None:
        """Wait for the end as `ended` does; then read nothing more, and wait a moment for that to be noticed."""
        if self._pid == os.getpid() and (self._is_abandoned or not self.ended(left_s)):
            self._is_abandoned = True
            self._ended.wait(_NOTICING_S)

    def __str__(self) -> str:
        return f"the state of {', '.join(self._names)}, which {self._what} left for later"

    def _failure(self) -> RestoreFailedError:
        names = ", ".join(self._names)
        return RestoreFailedError(
            f"the state of {names} did not come whole, after {self._what} had returned with all else: {self._error}. "
            f"All else is of that checkpoint and {names} may hold a mixture, so that training cannot go on; restore "
            "again without wait=, which takes an older step if this one is damaged",
            name=names,
        )


_UNDER_WAY: weakref.WeakSet[Rest] = weakref.WeakSet()


def _at_exit() -> None:
    for rest in list(_UNDER_WAY):
        rest.give_up(lambda: 0.0)


# Before the pools of concurrent.futures refuse work, as for saves.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
