"""Wait until a checkpoint is committed below a root, by looking again and again: no store tells by itself.

Writes nothing, so that a job that only evaluates needs no more than to read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.root.roots import Roots

__all__ = ["wait_for_next"]

# The first pauses are short for who waits for a save that is just about to end; what a look costs (a listing and a
# manifest) is nothing at the last.
_FIRST_S = 1.0
_LAST_S = 30.0
_GROWTH = 1.5


def wait_for_next(
    catalog: Catalog,
    *,
    after: int | None = None,
    timeout_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Checkpoint:
    """Return the newest checkpoint once its step is above `after`; without one, once it is another than is there now.

    A newest one of a newer epoch that went back in steps is not above, and is waited past.

    Args:
        catalog: the root's; nothing need be there yet.
        after: a step.
        timeout_s: how long it waits; None: without an end.
        clock: seconds.
        sleep: pauses for so many.

    Raises:
        CheckpointNotFoundError: none came in time.
        CloudCkptError: what `Roots.newest` raises.
    """
    roots = Roots([catalog])
    began_s, pause_s = clock(), _FIRST_S
    first = found = roots.newest()
    while found is None or not _is_next(found, first, after):
        left_s = pause_s if timeout_s is None else timeout_s - (clock() - began_s)
        if left_s <= 0:
            raise CheckpointNotFoundError(_too_late(catalog, found, after, clock() - began_s))
        sleep(min(pause_s, left_s))
        pause_s = min(_LAST_S, pause_s * _GROWTH)
        found = roots.newest()
    return found


def _is_next(found: Checkpoint, first: Checkpoint | None, after: int | None) -> bool:
    if after is not None:
        return found.step > after
    return first is None or found.digest != first.digest


def _too_late(catalog: Catalog, found: Checkpoint | None, after: int | None, waited_s: float) -> str:
    wanted = "newer one" if after is None else f"one above step {after}"
    there = "none is there" if found is None else f"the newest is of step {found.step}"
    return f"no {wanted} was committed at {catalog.store.url} in {waited_s:.0f} s; {there}"
