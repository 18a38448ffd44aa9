"""Let all ranks see the largest of their numbers, so cheaply that it can be done at every training step.

One all-reduce of a few integers over a gloo group of our own, in the training's thread; no message of a save or
restore under way meets it. A rank that waits for long looks now and then whether another one has raised an alarm and
answers it, so that those who do not answer can be named (FORMAT invariant 13).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from cloudckpt.errors import RankLostError
from cloudckpt.ranks.calling import begun
from cloudckpt.ranks.outcome import named_ranks, rank_lost
from cloudckpt.ranks.world import BrokenError, KeyValueStore, new_gloo_group, store_of_our_own

__all__ = ["Vote"]

_ROOM = "cloudckpt/votes"
# Ranks that train together come within this; a pause would outlast the answer, which is there after half of it.
_YIELDING_S = 5e-4
# Whoever waits for longer looks less and less often.
_SHORTEST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 2e-3
_ALARM_PERIOD_S = 0.25
_ANSWERING_S = 1.5
# How long the store may take besides.
_STORE_S = 2.0


def _yield_core() -> None:
    """Let whoever waits for this core go first, and come back at once if nobody does."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


class Vote:
    """The votes of this process with other ranks. One thread."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        check: Callable[[], None] | None = None,
        place: Callable[[str], str] = lambda room: room,
        home: Sequence[int] = (0,),
    ) -> None:
        """Wait `timeout_s` for a rank; the group is made at the first vote, together with all other ranks.

        `check` is called now and then while others are waited for, and may raise why they will not come. `place`
        returns the same new place in the process group's store on each of them, as `Group.place` does; `home`
        of them keep that.
        """
        self._home = home
        self._find_place, self._place = place, ""
        self._check = check if check is not None else lambda: None
        self._rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._gloo: dist.ProcessGroup | None = None
        self._store: KeyValueStore | None = None
        self._count = 0
        self._asking: Future[bool] | None = None

    def largest(self, values: Sequence[int], *, what: str) -> list[int]:
        """Return, on every rank, the largest of all ranks' values at each place.

        Raises:
            RankLostError: a rank did not come within the timeout, or died. The job has to be started again.
            Exception: what `check` raised. The job has to be started again.
        """
        if self.size == 1:
            return list(values)
        self._count += 1
        tensor = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        try:
            work = self._open(what).allreduce([tensor], dist.ReduceOp.MAX)
            self._wait(work, what)
        except (BrokenError, RuntimeError) as exc:
            raise self._lost(what) from exc
        finally:
            self._asking = None  # it was about this vote
        return [int(value) for value in tensor.tolist()]

    def _open(self, what: str) -> dist.ProcessGroup:
        if self._gloo is not None:
            return self._gloo
        self._place = self._place or self._find_place(_ROOM)
        timeout = timedelta(seconds=self._timeout_s)
        make = partial(new_gloo_group, self._place, rank=self._rank, size=self.size, timeout=timeout)
        # In a thread: it asks rank 0's store, which may not answer, and Python runs handlers meanwhile.
        opening = begun(lambda: (make(), store_of_our_own()))
        stop_s = time.monotonic() + self._timeout_s
        while self._gloo is None:
            try:
                self._gloo, self._store = opening.result(timeout=min(_ALARM_PERIOD_S, self._timeout_s))
            except FutureTimeoutError:
                self._check()
                if time.monotonic() >= stop_s:
                    raise self._lost(what) from None
        return self._gloo

    def _wait(self, work: dist.Work, what: str) -> None:
        began_s = looked_s = time.monotonic()
        pause_s = _SHORTEST_PAUSE_S
        # Not `work.wait()`: it would keep Python from running signal handlers.
        while not work.is_completed():
            now_s = time.monotonic()
            if now_s - began_s > self._timeout_s or (now_s - looked_s > _ALARM_PERIOD_S and self._is_alarmed()):
                raise self._lost(what)
            if now_s - began_s < _YIELDING_S:
                _yield_core()
                continue
            if now_s - looked_s > _ALARM_PERIOD_S:
                looked_s = now_s
                self._check()
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)
        work.wait()  # raises what went wrong

    def _is_alarmed(self) -> bool:
        """Return the last answer of the store, and ask it again; it is rank 0's, and may not answer any more."""
        asking, store = self._asking, self._store
        if store is None or (asking is not None and not asking.done()):
            return False
        self._asking = begun(partial(store.check, [self._alarm]))
        return asking is not None and asking.exception() is None and asking.result()

    @property
    def _alarm(self) -> str:
        return f"{self._place}/{self._count}/alarm"

    def _lost(self, what: str) -> RankLostError:
        """Raise the alarm, and name the ranks that do not answer it."""
        try:
            store = self._store or begun(store_of_our_own).result(timeout=_STORE_S)
            begun(partial(self._alarm_all, store)).result(timeout=_STORE_S)
            time.sleep(_ANSWERING_S)
            late = begun(partial(self._not_answering, store)).result(timeout=_STORE_S)
        except (FutureTimeoutError, RuntimeError):  # torch's DistError: the store lives in a process of the job
            late = list(self._home)
        names = named_ranks(late) if late else "other ranks"
        return rank_lost(f"{names} did not come to {what}, or died, while rank {self._rank} waited", late, phase=what)

    def _alarm_all(self, store: KeyValueStore) -> None:
        store.set(self._answer_of(self._rank), "here")
        store.set(self._alarm, "raised")

    def _not_answering(self, store: KeyValueStore) -> list[int]:
        return [rank for rank in range(self.size) if not store.check([self._answer_of(rank)])]

    def _answer_of(self, rank: int) -> str:
        return f"{self._place}/{self._count}/{rank}"
