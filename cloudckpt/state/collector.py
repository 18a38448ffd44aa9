"""Keep Python's garbage collector from walking, again and again, over what is just being made of a large state.

Tens of thousands of names, paths and boxes are made at once, and none of them is garbage: the passes that their number
sets off took a third of the time of a save. Code of the caller's, which may leave cycles behind, runs as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from cloudckpt.threads import new_lock

__all__ = ["collector_at_rest", "collector_awake"]

_lock = new_lock()
_resting = 0
_is_to_wake = False


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Have no garbage collected meanwhile, in any thread; afterwards as before. May be entered by several threads."""
    global _resting, _is_to_wake  # noqa: PLW0603 (there is one collector)
    with _lock:
        if _resting == 0:
            _is_to_wake = gc.isenabled()
            gc.disable()
        _resting += 1
    try:
        yield
    finally:
        with _lock:
            _resting -= 1
            if _resting == 0 and _is_to_wake:
                gc.enable()


@contextmanager
def collector_awake() -> Iterator[None]:
    """Have garbage collected as ever, for a moment in the middle of a rest."""
    with _lock:
        is_woken = _resting > 0 and _is_to_wake
        if is_woken:
            gc.enable()
    try:
        yield
    finally:
        with _lock:
            if is_woken and _resting:
                gc.disable()
