"""A rank's clock begins with its waiting, and its last word is said; a store and a clock in place of other ranks."""

from __future__ import annotations

import threading

import torch.distributed as dist

from cloudckpt.ranks.meeting import Meeting
from cloudckpt.ranks.pulse import Pulse, make_room

DEADLINE_S = 10.0


class Clock:
    """Seconds of a machine that has been up for a while."""

    now_s = 2418.2

    def __call__(self) -> float:
        return self.now_s


class HeldStore(dist.HashStore):  # type: ignore[misc]
    """A store that holds the first record that is put."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = threading.Event()
        self.go_on = threading.Event()

    def set(self, key: str, value: str) -> None:
        if not self.is_asked.is_set():
            self.is_asked.set()
            self.go_on.wait(timeout=30)
        super().set(key, value)


def pulse_of(store: dist.Store, clock: Clock) -> Pulse:
    return Pulse(store, "room", rank=1, size=2, phase="work", deadline_s=DEADLINE_S, clock=clock)


def test_the_deadline_of_a_meeting_whose_thread_begins_late_counts_from_the_wait_for_it() -> None:
    clock = Clock()
    meeting = Meeting("work", rank=1, size=2, after=0, deadline_s=DEADLINE_S, clock=clock)
    assert meeting.fault() is None
    clock.now_s += DEADLINE_S + 0.5
    fault = meeting.fault()
    assert fault is not None
    assert (fault.ranks, fault.phase) == ((0,), "work")
    assert "the process group's store did not answer for 10.5 s" in str(fault)


def test_the_deadline_of_a_session_whose_thread_begins_late_counts_from_the_begin_of_the_session() -> None:
    clock = Clock()
    pulse = pulse_of(dist.HashStore(), clock)
    assert pulse.fault() is None
    clock.now_s += DEADLINE_S + 0.5
    fault = pulse.fault()
    assert fault is not None
    assert "the process group's store did not answer for 10.5 s" in str(fault)


def test_a_rank_that_gives_up_and_ends_while_it_speaks_is_heard() -> None:
    store = HeldStore()
    make_room(store, "room", size=2)
    pulse = pulse_of(store, Clock()).begin()
    assert store.is_asked.wait(timeout=30)
    pulse.leave("of its own")
    threading.Timer(0.05, store.go_on.set).start()
    pulse.end()
    assert b"of its own" in store.get("room/1")
