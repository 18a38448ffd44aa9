"""What code that waits looks like, for the tests of the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["begin", "nap", "wait_for_ever"]


def begin(call: Callable[[], object]) -> threading.Thread:
    """Call something in a thread."""
    thread = threading.Thread(target=call, name="sleeper")
    thread.start()
    return thread


def nap(seconds: float) -> None:
    """Sleep."""
    time.sleep(seconds)


def wait_for_ever() -> None:
    """Wait for what nobody does."""
    threading.Event().wait()
