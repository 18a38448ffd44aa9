"""Bring the ranks together for their first session: each finds the room that rank 0 has opened, and waits for all.

    rank 0    a new number ──▶ a room: the records of all ranks ──announced──▶ store
    others    store ──▶ the newest room, until every rank is in it

A store may remember rooms of processes that are gone. `meet` runs on a thread that may hang in a request to rank 0's
store; the rank asks `fault` meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist

from cloudckpt.errors import RankLostError
from cloudckpt.ranks.outcome import rank_lost
from cloudckpt.ranks.pulse import Pulse, make_room
from cloudckpt.ranks.world import KeyValueStore, store_of_our_own

__all__ = ["Meeting"]

_ROOMS = "cloudckpt/ranks"
_LOOK_S = 0.005


class Meeting:
    """One rank's way to its first session with the others.

    Attributes:
        number: of the room, 0 before one was found.
        pulse: of this rank in that room, None before.
        period_s: seconds between two looks at `fault`.
    """

    period_s = 0.05

    def __init__(  # noqa: PLR0913 (keyword-only, each of its own kind)
        self,
        phase: str,
        *,
        rank: int,
        size: int,
        after: int,
        deadline_s: float,
        connect: Callable[[], KeyValueStore] = store_of_our_own,
        clock: Callable[[], float] = time.monotonic,
        of: str = "",
        home: Sequence[int] = (0,),
    ) -> None:
        """Begin to count `deadline_s`; the meeting before was number `after`, or 0.

        `of` tells the rooms of these ranks from those of other ranks in the same store, which `home` of them keep.
        """
        self._home = home
        self._rooms = f"{_ROOMS}/{of}" if of else _ROOMS
        self.number = 0
        self.pulse: Pulse | None = None
        self._phase = phase
        self._rank = rank
        self._size = size
        self._speak = partial(Pulse, rank=rank, size=size, phase=phase, deadline_s=deadline_s, clock=clock, home=home)
        self._after = after
        self._deadline_s = deadline_s
        self._connect = connect
        self._clock = clock
        # Not when `meet` begins: its thread may get a core late, and is waited for from now on.
        self._began_s = self._answered_s = clock()

    @property
    def room(self) -> str:
        """The place in the store of the meeting that this is."""
        return f"{self._rooms}/{self.number}"

    def meet(self) -> Pulse:
        """Return the pulse of the first session, in which all ranks are.

        Raises:
            RankLostError: a rank did not come, or the store is gone.
        """
        try:
            store = self._connect()
            if self._rank == 0:
                self._enter(store, self._open_room(store))
            while self.pulse is None or not self.pulse.is_complete():
                if self._rank != 0 and (newest := self._announced(store)) > max(self._after, self.number):
                    self._enter(store, newest)
                self._refuse_late()
                time.sleep(_LOOK_S)
        except dist.DistError as exc:
            why = f"the process group's store is gone ({exc}), which rank 0 of the job keeps"
            raise rank_lost(why, self._home) from exc
        return self.pulse

    def _enter(self, store: KeyValueStore, number: int) -> None:
        if self.pulse is not None:
            self.pulse.end()
        self.number = number
        self.pulse = self._speak(store, self.room).begin()
        self.pulse.enter(self._phase, is_waiting=True)

    def _open_room(self, store: KeyValueStore) -> int:
        number = int(store.add(f"{self._rooms}/count", 1))
        make_room(store, f"{self._rooms}/{number}", size=self._size)
        store.set(f"{self._rooms}/announced", str(number))
        return number

    def _announced(self, store: KeyValueStore) -> int:
        key = f"{self._rooms}/announced"
        number = int(store.get(key)) if store.check([key]) else 0
        self._answered_s = self._clock()
        return number

    def _refuse_late(self) -> None:
        if self.pulse is None and self._clock() - self._began_s > self._deadline_s:
            raise self._lost(f"rank 0 has not come within {self._deadline_s:.1f} s", [0])
        if (fault := self._fault_of_room()) is not None:
            raise fault

    def _fault_of_room(self) -> RankLostError | None:
        """Return why to leave the room that this rank is in.

        One in which the others have given this very rank up is left in time for the next one that rank 0 may open.
        """
        fault = None if self.pulse is None else self.pulse.fault()
        if fault is None or self._rank == 0 or self._rank not in fault.ranks:
            return fault
        return fault if self._clock() - self._began_s > self._deadline_s else None

    def fault(self) -> RankLostError | None:
        """Return why to stop waiting, or None to go on."""
        if self.pulse is not None:
            return self._fault_of_room()
        silent_s = self._clock() - self._answered_s
        if silent_s <= self._deadline_s:
            return None
        return self._lost(f"the process group's store did not answer for {silent_s:.1f} s", self._home)

    def _lost(self, why: str, ranks: Sequence[int]) -> RankLostError:
        return rank_lost(f"{why}, while rank {self._rank} was at {self._phase!r}", ranks, phase=self._phase)
