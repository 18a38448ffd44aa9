"""Ranks that come together begin together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

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
