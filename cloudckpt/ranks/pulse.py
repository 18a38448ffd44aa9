"""Tell who of the ranks is alive, gets on, or has gone, while they work on one save or restore together: a session.

    every rank, each period     own record ──set──▶ store          (session, beat, ticks, phase, is it waiting)
    rank 0, each period         all records ──▶ who is late ──▶ verdict ──set──▶ store
    other ranks, each period    verdict ──get──▶ raise what it says; a verdict that stands still: rank 0 is late

Records go through the key-value store that the process group was made with, over a connection of its own, from a
thread that lives as long as a session: so a rank that waits in a collective, or is stopped in one, is seen all the
same, and nothing is sent while nobody saves. Two requests per rank and period, sooner until all have come. A rank is
late when its record, or its progress while it is not waiting itself, stands still for the deadline (FORMAT
invariant 13).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec

from cloudckpt.errors import RankLostError
from cloudckpt.ranks.outcome import rank_lost
from cloudckpt.ranks.world import KeyValueStore
from cloudckpt.threads import new_lock, started

__all__ = ["Pulse", "make_room"]

_SHORTEST_PERIOD_S = 0.05
_LONGEST_PERIOD_S = 1.0
_PERIODS_PER_DEADLINE = 20
_LINGER_S = 2.0


class _Record(msgspec.Struct, array_like=True):
    """What a rank says of itself."""

    session: int = 0
    beat: int = 0
    ticks: int = 0
    phase: str = "before its first save or restore"
    is_waiting: bool = False
    left: str = ""
    lost: list[int] = []
    has_read: bool = False


class _Verdict(msgspec.Struct, array_like=True):
    """What rank 0 says of all."""

    session: int = 0
    beat: int = 0
    is_complete: bool = False
    ranks: list[int] = []
    phase: str = ""
    reason: str = ""


class _Seen:
    """When a rank's record last changed, and its progress."""

    def __init__(self, now_s: float) -> None:
        self.record = _Record()
        self.beat_s = self.ticks_s = now_s

    def note(self, record: _Record, now_s: float) -> None:
        before, self.record = self.record, record
        if record != before:
            self.beat_s = now_s
        # What a rank waits for is others' progress; what it was before it came is no lack of its own.
        if record.is_waiting or (record.session, record.ticks, record.phase) != (
            before.session,
            before.ticks,
            before.phase,
        ):
            self.ticks_s = now_s

    def still_s(self, now_s: float) -> float:
        """Return for how long nothing was heard from the rank, or nothing got on there."""
        return now_s - min(self.beat_s, self.ticks_s)


class Pulse:
    """The presence of one rank in one session, and what it knows of the others.

    Entered by the rank's own threads (`tick`, `enter`, `fault`) and by a thread of its own.
    """

    def __init__(  # noqa: PLR0913 (keyword-only, each of its own kind)
        self,
        store: KeyValueStore,
        room: str,
        *,
        rank: int,
        size: int,
        phase: str,
        deadline_s: float,
        session: int = 1,
        clock: Callable[[], float] = time.monotonic,
        home: Sequence[int] = (0,),
    ) -> None:
        """Speak for `rank` of `size` below `room`, and listen, from `begin` on; `deadline_s` counts from now on.

        The store is kept by `home` of these ranks, if it is one of them.
        """
        self._home = home
        self.deadline_s = deadline_s
        self._store = store
        self._room = room
        self._rank = rank
        self._session = session
        self._clock = clock
        self._next = partial(Pulse, store, room, rank=rank, size=size, session=session + 1, clock=clock, home=home)
        self._mine = _Record(session=session, ticks=1, phase=phase)
        self._verdict = _Verdict()
        self._answered_s = self._verdict_s = now_s = clock()
        self._seen = [_Seen(now_s) for _ in range(size)]
        self._fault: RankLostError | None = None
        self._is_deciding = False
        self._lock = new_lock()
        self._wake = threading.Event()
        self._wake.set()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> Pulse:
        """Begin to speak and to listen."""
        self._thread = started(self._run, name="cloudckpt-pulse")
        return self

    def end(self) -> None:
        """Say the last, and fall silent. A thread that hangs in a request to the store is left to itself."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.period_s)

    def next(self, phase: str, *, deadline_s: float) -> Pulse:
        """Begin the next session in the same room."""
        return self._next(phase=phase, deadline_s=deadline_s).begin()

    @property
    def period_s(self) -> float:
        """Seconds between two records."""
        return min(_LONGEST_PERIOD_S, max(_SHORTEST_PERIOD_S, self.deadline_s / _PERIODS_PER_DEADLINE))

    def tick(self) -> None:
        """Note that this rank got on."""
        self._mine.ticks += 1

    def enter(self, phase: str, *, is_waiting: bool) -> None:
        """Say what this rank does now, or what it waits for."""
        with self._lock:
            self._mine.phase, self._mine.is_waiting = phase, is_waiting
            self._mine.ticks += 1

    def decide(self) -> RankLostError | None:
        """Find nobody late any more, as rank 0: what it does from now on stands without them; unless one is late."""
        self.fault()
        with self._lock:  # no verdict comes in between
            self._is_deciding = self._fault is None
            return self._fault

    def go_on(self) -> None:
        """Take lost ranks for lost again: what was to stand was not decided."""
        with self._lock:
            self._is_deciding = False

    def leave(self, reason: str) -> None:
        """Tell the others that this rank gives up, and why; at once, because the process may be about to end."""
        with self._lock:
            self._mine.left = reason
        self._wake.set()

    def fault(self) -> RankLostError | None:
        """Return why to stop waiting, or None to go on."""
        if self._fault is None:
            silent_s = self._clock() - self._answered_s
            if silent_s > self.deadline_s:
                self._fault = self._lost(self._home, f"the process group's store did not answer for {silent_s:.1f} s")
        return self._fault

    def catch_up(self) -> RankLostError | None:
        """Hear what was said while this process stood still, if it did; return why to stop, or None to go on."""
        while self._clock() - self._answered_s > 2 * self.period_s and self.fault() is None:
            self._wake.set()
            time.sleep(_SHORTEST_PERIOD_S / 5)
        return self.fault()

    def is_complete(self) -> bool:
        """Tell whether every rank has come to this session."""
        return self._verdict.is_complete

    def blame(self, rank: int | None) -> RankLostError:
        """Return whom to blame for a broken connection; to `rank`, if that is known.

        Whoever closed it may have left because of another rank, and rank 0 knows which, so its word is waited for: a
        moment, or until the deadline where there is nobody else to blame.
        """
        stop_s = self._clock() + 2 * self.period_s + (0.2 if rank is not None else self.deadline_s)
        while self._fault is None and self._clock() < stop_s:
            time.sleep(_SHORTEST_PERIOD_S / 5)
        if self._fault is None and rank is not None:
            self._fault = self._lost([rank], f"rank {rank} has closed its connection")
            with self._lock:
                self._mine.lost = [rank]
        elif self._fault is None:
            self._fault = self._lost([], "a connection between ranks broke")
            self.leave(str(self._fault))
        self._wake.set()
        return self._fault

    def linger(self) -> None:
        """Stay, as rank 0, until the others have read why it ends: its process may be the store's home."""
        self._wake.set()
        stop_s = self._clock() + min(_LINGER_S, 4 * self.period_s)
        while self._rank == 0 and self._clock() < stop_s and not self._is_known_to_all():
            time.sleep(_SHORTEST_PERIOD_S / 5)

    def _is_known_to_all(self) -> bool:
        lost = self._fault.ranks if self._fault is not None else ()
        return all(seen.record.has_read or rank in (0, *lost) for rank, seen in enumerate(self._seen))

    # -- the session's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        # Ranks come within moments of each other: who waits a whole period for the last of them waits for nothing.
        pause_s = _SHORTEST_PERIOD_S / 10
        is_last = False
        while not is_last:
            self._wake.wait(pause_s)
            self._wake.clear()
            pause_s = self.period_s if self.is_complete() else min(2 * pause_s, self.period_s)
            is_last = self._ending.is_set()  # asked before the beat, which then tells what was said before the end
            try:
                self._beat()
            except Exception as exc:  # noqa: BLE001 (the end of a thread: what it met is kept for the rank)
                self._fault = self._fault or self._lost(self._home, f"the process group's store is gone ({exc})")
                return

    def _beat(self) -> None:
        with self._lock:
            self._mine.beat += 1
            record = _text(self._mine)
        self._store.set(f"{self._room}/{self._rank}", record)
        if self._rank == 0:
            self._judge()
        else:
            self._listen()
        self.fault()  # of this very rank, if it was stopped: the others have not waited
        self._answered_s = self._clock()

    def _judge(self) -> None:
        data = self._store.multi_get([f"{self._room}/{rank}" for rank in range(len(self._seen))])
        records = [msgspec.json.decode(record, type=_Record) for record in data]
        now_s = self._clock()
        for seen, record in zip(self._seen, records, strict=True):
            seen.note(record, now_s)
        is_complete = all(record.session >= self._session for record in records)
        verdict = _Verdict(session=self._session, beat=self._mine.beat, is_complete=is_complete)
        with self._lock:
            late = self._late(now_s)
            if self._fault is None and late:
                self._fault = self._lost(late, self._why(late, now_s), self._seen[late[0]].record.phase)
            if self._fault is not None:
                verdict.ranks, verdict.phase = list(self._fault.ranks), self._fault.phase
                verdict.reason = str(self._fault)
        self._store.set(f"{self._room}/verdict", _text(verdict))
        self._verdict = verdict

    def _late(self, now_s: float) -> list[int]:
        gone = [
            rank for rank, seen in enumerate(self._seen) if seen.record.left and seen.record.session >= self._session
        ]
        accused = {lost for seen in self._seen if seen.record.session >= self._session for lost in seen.record.lost}
        late = [rank for rank, seen in enumerate(self._seen) if seen.still_s(now_s) > self.deadline_s]
        if self._is_deciding:
            return [rank for rank in (0,) if rank in (*gone, *late)]
        return sorted(accused) or gone or late

    def _why(self, late: Iterable[int], now_s: float) -> str:
        reasons = []
        for rank in list(late)[:8]:
            seen = self._seen[rank]
            record, still_s = seen.record, seen.still_s(now_s)
            if any(rank in other.record.lost for other in self._seen):
                reasons.append(f"rank {rank} has closed its connection")
            elif record.left:
                reasons.append(f"rank {rank} gave up ({record.left})")
            elif record.session < self._session:
                reasons.append(f"rank {rank} has not come within {still_s:.1f} s")
            else:
                reasons.append(f"rank {rank} stands still at {record.phase!r} for {still_s:.1f} s")
        return "; ".join(reasons)

    def _listen(self) -> None:
        verdict = msgspec.json.decode(self._store.get(f"{self._room}/verdict"), type=_Verdict)
        now_s = self._clock()
        if (verdict.session, verdict.beat) != (self._verdict.session, self._verdict.beat):
            self._verdict_s = now_s
        self._verdict = verdict
        if self._fault is not None:
            return
        silent_s = now_s - self._verdict_s
        if verdict.reason and verdict.session == self._session:
            self._fault = RankLostError(verdict.reason, ranks=verdict.ranks, phase=verdict.phase)
            self._mine.has_read = True
            self._wake.set()
        elif silent_s > self.deadline_s:
            said = "has not come within" if verdict.session < self._session else "is silent for"
            self._fault = self._lost([0], f"rank 0 {said} {silent_s:.1f} s")

    def _lost(self, ranks: Iterable[int], why: str, phase: str = "") -> RankLostError:
        mine = self._mine.phase
        return rank_lost(f"{why}, while rank {self._rank} was at {mine!r}", ranks, phase=phase or mine)


def make_room(store: KeyValueStore, room: str, *, size: int) -> None:
    """Make the records of all ranks, so that nobody waits for a key."""
    empty = _text(_Record())
    keys = [f"{room}/{rank}" for rank in range(size)]
    values = [empty] * size + [_text(_Verdict())]
    store.multi_set([*keys, f"{room}/verdict"], values)  # type: ignore[attr-defined,unused-ignore] # not in each stub


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
