"""Let the ranks of a job agree on one save or restore, without waiting for ever for one that does not come.

    agree   each rank's value ──▶ rank 0 decides ──▶ the same answer, or the same error, on every rank
    deal    each rank's value ──▶ rank 0 decides ──▶ each rank its own part
    pass    tensors from the rank that has them to those that need them

The messages go over a gloo group of our own, made once for those who take part, so that nothing of a trainer's traffic
is met, whatever its backend is. `Link`'s thread sends and receives them; the rank waits for that thread and watches
`Pulse` meanwhile, because a gloo receive cannot be given up and, once it has timed out, has taken the whole group with
it. What raises on one rank travels as a value. After a lost rank the group is left to itself, and the next session
makes another. Keeps FORMAT invariants 11 and 13. One session at a time, which one thread may begin and another end.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar, cast

import torch.distributed as dist

from cloudckpt.errors import OptionsError, RankLostError, text_of
from cloudckpt.ranks.accord import Accord
from cloudckpt.ranks.calling import Caller
from cloudckpt.ranks.link import Link
from cloudckpt.ranks.meeting import Meeting
from cloudckpt.ranks.outcome import (
    MissingPartsError,
    Sent,
    UndecidedError,
    answers,
    done,
    named_ranks,
    pickled,
    unpickled,
)
from cloudckpt.ranks.packet import Packet
from cloudckpt.ranks.pulse import Pulse
from cloudckpt.ranks.world import BrokenError, new_gloo_group, those_taking_part
from cloudckpt.threads import new_lock
from cloudckpt.transfer import Watch

__all__ = ["Group"]

logger = logging.getLogger(__name__)

_Mine = TypeVar("_Mine")
_Result = TypeVar("_Result")


class Group:
    """The ranks that save and restore together: those of a process group, or this process alone.

    Attributes:
        rank: of this process among them, from 0; which need not be its rank in the job.
        size: how many they are.
        home: who of them keeps the store of the job's process group, if anybody does.
        about: what to say beside an error that names ranks; "" where they are those of the job.
    """

    def __init__(self, *, rank: int = 0, size: int = 1) -> None:
        """Make the group of one process; `of_world` makes the others."""
        self.rank = rank
        self.size = size
        self.world: dist.ProcessGroup | None = None
        self.about = ""
        self.home: Sequence[int] = (0,)
        self._name = ""
        self._link: Link | None = None
        self._generation = 0
        self._is_open = False
        self._turn = new_lock()
        self._holder: int | None = None
        self._settled: BaseException | None = None
        self._places: Counter[str] = Counter()
        self._check: Callable[[], None] | None = None

    @classmethod
    def of_world(cls) -> Group:
        """Return the group of those with whom this thread takes part, the same one as long as the job's group exists.

        Those are all ranks of the default process group unless `taking_part` says so; a lone one without that.

        Raises:
            OptionsError: the process group that `taking_part` named was destroyed.
        """
        members = those_taking_part()
        if members is None or len(members.ranks) == 1:
            return cls()
        with _LOCK:
            if any(group.world is not members.world for group in _GROUPS.values()):
                _forget()  # those of a default process group that was destroyed
            group = _GROUPS.get(members.name)
            if group is None:
                group = cls(rank=members.rank, size=len(members.ranks))
                group.world, group._name, group.home = members.world, members.name, members.home
                if members.name:
                    group.about = f"ranks are counted in the process group of {named_ranks(members.ranks)} of the job"
                _GROUPS[members.name] = group
        return group

    def close(self) -> None:
        """End the thread that waits for messages; the next session makes another one."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def place(self, room: str) -> str:
        """Return a new place in the store, which is these ranks' own; each of them asks in the same order."""
        self._places[room] += 1
        return "/".join(filter(None, [room, self._name, str(self._places[room])]))

    def accord(self, name: str) -> Accord:
        """Return a new comparison of what the ranks are asked for, with those that others have made by that name."""
        return Accord(self.place(name), rank=self.rank)

    # -- sessions ------------------------------------------------------------------------------------------

    @contextmanager
    def session(self, what: str, *, deadline_s: float, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the ranks together for one save or restore; every rank must come. Waits for a session under way.

        `check` is called now and then until the first exchange, and may raise why others will not come.

        Raises:
            OptionsError: this thread is in the middle of a session.
            RankLostError: a rank did not come, died, gave up, or stands still for `deadline_s`. Also out of every
                exchange. The next session begins anew, with whoever comes.
        """
        if self.size == 1:
            yield
            return
        if self._holder == threading.get_ident():
            raise OptionsError(f"{what} began in the middle of another save or restore; let that one end first")
        # One that another thread leads is waited for: every rank began it first, so every rank waits.
        self._turn.acquire()
        self._holder = threading.get_ident()
        self._is_open, self._settled, self._check = True, None, check
        try:
            link = self._begin(what, deadline_s)
            try:
                yield
            except BaseException as exc:
                self._give_up(link.pulse, exc)
                raise
            finally:
                link.pulse.end()
        finally:
            self._is_open, self._holder, self._check = False, None, None
            self._turn.release()

    def hand_over(self) -> None:
        """Leave the session to whichever thread takes it over; until then nobody counts as being in it."""
        self._holder = None

    def take_over(self) -> None:
        """Go on, in the calling thread, with a session that another thread has begun and left."""
        self._holder = threading.get_ident()

    def _begin(self, what: str, deadline_s: float) -> Link:
        if self._link is None:
            self._link = self._join(what, deadline_s)
        else:
            self._link.pulse = self._link.pulse.next(what, deadline_s=deadline_s)
        return self._link

    def _give_up(self, pulse: Pulse, error: BaseException) -> None:
        """Leave a session by an error: the others have it too, or are told now."""
        if self._settled is not None and (error is self._settled or error.__cause__ is self._settled):
            return
        if not isinstance(error, RankLostError | UndecidedError):
            pulse.leave(f"{type(error).__name__}: {text_of(error)}")
        pulse.linger()
        self._leave_link()

    def _leave_link(self) -> None:
        """Leave the link to itself; the next session is for whoever is there then."""
        link, self._link = self._link, None
        if link is not None:
            link.give_up()

    def _join(self, what: str, deadline_s: float) -> Link:
        """Make a gloo group of our own, once every rank has come to do so."""
        name = f"{what}, making a group"
        meeting = Meeting(
            name,
            of=self._name,
            rank=self.rank,
            size=self.size,
            after=self._generation,
            deadline_s=deadline_s,
            home=self.home,
        )
        caller = Caller("cloudckpt-ranks")
        try:
            pulse = _outlast(meeting, caller.submit(meeting.meet), self._check)
            self._generation = meeting.number
            make = partial(new_gloo_group, meeting.room, rank=self.rank, size=self.size)
            gloo = _wait(pulse, name, caller.submit(make), self._check)
            pulse.enter(what, is_waiting=False)
        except BaseException as exc:
            caller.stop()
            if meeting.pulse is not None:
                self._give_up(meeting.pulse, exc)
                meeting.pulse.end()
            raise
        logger.debug("rank %d: made a gloo group of %d ranks for checkpoints", self.rank, self.size)
        return Link(caller, gloo, pulse)

    # -- exchanges -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Note that this rank gets on with its own work."""
        if self._link is not None:
            self._link.pulse.tick()

    def enter(self, phase: str) -> None:
        """Say what this rank works at by itself."""
        if self._link is not None:
            self._link.pulse.enter(phase, is_waiting=False)

    def agree(self, phase: str, mine: Callable[[], _Mine], decide: Callable[[list[_Mine]], _Result]) -> _Result:
        """Let each rank do its part, rank 0 decide on all parts, and every rank have the decision.

        Raises:
            RanksFailedError: some ranks' own parts raised; on every rank.
            Exception: what `decide` raised; on every rank.
            RankLostError: a rank is late.
        """
        return self._exchange(phase, mine, lambda values: [decide(values)], is_same=True)

    def deal(
        self, phase: str, mine: Callable[[], _Mine], decide: Callable[[list[_Mine]], Sequence[_Result]]
    ) -> _Result:
        """Let each rank do its part, rank 0 decide on all, and each rank have its own answer; raises as `agree`."""
        return self._exchange(phase, mine, decide, is_same=False)

    def conclude(self, phase: str, mine: Callable[[], _Mine], decide: Callable[[list[_Mine]], _Result]) -> _Result:
        """Do as `agree` does, for a decision that cannot be taken back.

        A rank that is lost before rank 0 has begun to decide ends it; one that is lost afterwards changes nothing:
        those that can be told are told.

        Raises:
            UndecidedError: rank 0 was lost after it had this rank's part.
        """
        try:
            return self._exchange(phase, mine, lambda values: [decide(values)], is_same=False, is_final=True)
        except RankLostError as exc:
            # From here on the part is not handed over any more, should rank 0 be there again.
            has_asked = self._link is not None and self._link.retract()
            # Without the store, rank 0 cannot be heard of any more, whoever of the job was lost.
            is_unheard = 0 in exc.ranks or not exc.ranks
            if is_unheard and self.rank != 0 and has_asked:
                raise UndecidedError(str(exc)) from exc
            raise

    def watch(self, deadline_s: float) -> Watch:
        """Return how this rank's own transfers are watched over, each of which may stand still for `deadline_s`."""
        return Watch(deadline_s=deadline_s, tick=self.tick, check=self.check)

    def check(self) -> None:
        """Raise if a rank is known to be lost."""
        fault = self._link.pulse.fault() if self._link is not None else None
        if fault is not None:
            raise fault

    def begin_passing(self, packets: Sequence[Packet]) -> Future[list[int]] | None:
        """Begin to pass tensors between ranks, in the background; every rank has its packets in one common order.

        What follows in this session waits until it has ended, so `end_passing` must be called.
        """
        if self.size == 1:
            return None
        link = self._open_link()
        return link.submit(partial(link.pass_on, packets, self.rank, self.tick))

    def end_passing(self, passing: Future[list[int]] | None) -> None:
        """Wait until all tensors are passed on.

        Raises:
            MissingPartsError: a rank could not read what it was to pass on; that rank raises why.
        """
        if passing is None:
            return
        failed = _wait(self._open_link().pulse, "passing tensors on", passing)
        if failed:
            raise MissingPartsError(f"{named_ranks(failed)} could not read what they were to pass on")

    def _exchange(
        self,
        phase: str,
        mine: Callable[[], _Mine],
        decide: Callable[[list[_Mine]], Sequence[_Result]],
        *,
        is_same: bool,
        is_final: bool = False,
    ) -> _Result:
        self.enter(phase)
        sent = done(phase, mine)
        if self.size == 1:
            answer = answers([sent], decide)[0]
        elif self.rank == 0:
            answer = self._lead(phase, sent, decide, is_same=is_same, is_final=is_final)
        else:
            answer = self._follow(phase, sent, is_same=is_same)
        self._check = None
        if answer.error is not None:
            self._settled = answer.error
            raise answer.error
        return cast("_Result", answer.value)

    def _lead(
        self,
        phase: str,
        sent: Sent,
        decide: Callable[[list[_Mine]], Sequence[_Result]],
        *,
        is_same: bool,
        is_final: bool,
    ) -> Sent:
        link = self._open_link()
        parts = _wait(link.pulse, phase, link.submit(partial(link.gather, self.size)), self._check)
        if is_final and (fault := link.pulse.decide()) is not None:
            raise fault
        told = answers([sent, *map(unpickled, parts)], decide)
        if is_final and told[0].error is not None:
            link.pulse.go_on()
        if is_same:
            _wait(link.pulse, phase, link.submit(partial(link.broadcast, pickled(told[0]))))
            return told[0]
        messages = [pickled(told[min(rank, len(told) - 1)]) for rank in range(1, self.size)]
        if is_final:
            self._tell_what_stands(link, phase, messages)
        else:
            _wait(link.pulse, phase, link.submit(partial(link.scatter, messages)))
        return told[0]

    def _tell_what_stands(self, link: Link, phase: str, messages: Sequence[bytes]) -> None:
        """Send each other rank its answer to a decision that stands, also if some are not there any more."""
        # No verdict is passed on a rank that does not take it: the others would take that for the end of this session.
        untold = list(range(1, self.size))
        link.pulse.enter(phase, is_waiting=True)
        telling = link.submit(partial(link.scatter, messages, untold=untold))
        with suppress(FutureTimeoutError):
            telling.result(timeout=link.pulse.deadline_s)
        link.pulse.enter(phase, is_waiting=False)
        if untold:
            self._leave_link()
            logger.warning("rank 0: %s could not be told of %r, which stands", named_ranks(untold), phase)

    def _follow(self, phase: str, sent: Sent, *, is_same: bool) -> Sent:
        link = self._open_link()
        link.offer()
        # A rank that was stopped knows that it was given up before it hands its part over, not afterwards.
        if (fault := link.pulse.catch_up()) is not None:
            raise fault
        asking = link.submit(partial(link.ask, pickled(sent), is_same=is_same))
        return unpickled(_wait(link.pulse, phase, asking, self._check))

    def _open_link(self) -> Link:
        if self._link is None or not self._is_open:
            raise OptionsError("ranks can only exchange within a session")
        return self._link


_LOCK = new_lock()
_GROUPS: dict[str, Group] = {}


@atexit.register
def _forget() -> None:
    """Let go of the gloo groups and their threads; at the end, while the interpreter is whole."""
    for group in _GROUPS.values():
        group.close()
    _GROUPS.clear()


def _wait(pulse: Pulse, phase: str, future: Future[_Result], check: Callable[[], None] | None = None) -> _Result:
    """Wait for the link's thread, but for no rank that is late."""
    pulse.enter(phase, is_waiting=True)
    try:
        found = _outlast(pulse, future, check)
    except BrokenError as exc:
        raise pulse.blame(exc.rank) from exc
    pulse.enter(phase, is_waiting=False)
    return found


def _outlast(watch: Meeting | Pulse, future: Future[_Result], check: Callable[[], None] | None = None) -> _Result:
    while True:
        try:
            return future.result(timeout=watch.period_s)
        except FutureTimeoutError:
            if (fault := watch.fault()) is not None:
                raise fault from None
            if check is not None:
                check()
