"""Ranks that come together begin together."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch.distributed as dist

from cloudckpt import RankLostError
from cloudckpt.ranks import pulse
from cloudckpt.ranks.meeting import Meeting


def test_ranks_that_are_there_meet_without_waiting_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_LONGEST_PERIOD_S", 3600.0)
    store = dist.HashStore()
    meetings = [
        Meeting("work", rank=rank, size=3, after=0, deadline_s=100_000.0, connect=lambda: store) for rank in range(3)
    ]
    with ThreadPoolExecutor(3) as pool:
        met = [pool.submit(meeting.meet) for meeting in meetings]
        try:
            assert all(future.result(timeout=60).is_complete() for future in met)
        finally:
            for meeting in meetings:
                if meeting.pulse is not None:
                    meeting.pulse.end()


def test_a_rank_that_was_given_up_meets_the_others_in_their_next_room() -> None:
    store = dist.HashStore()
    of = partial(Meeting, "work", size=2, connect=lambda: store)
    first, late = of(rank=0, after=0, deadline_s=0.2), of(rank=1, after=0, deadline_s=60.0)
    with pytest.raises(RankLostError, match="rank 1 has not come"):
        first.meet()
    assert first.pulse is not None
    first.pulse.end()
    with ThreadPoolExecutor(2) as pool:
        coming = pool.submit(late.meet)
        while late.pulse is None or late.pulse.fault() is None:
            assert not coming.done()
            time.sleep(0.005)
        again = of(rank=0, after=first.number, deadline_s=60.0)
        met = pool.submit(again.meet)
        try:
            assert met.result(timeout=60).is_complete()
            assert coming.result(timeout=60).is_complete()
        finally:
            for meeting in (late, again):
                if meeting.pulse is not None:
                    meeting.pulse.end()
