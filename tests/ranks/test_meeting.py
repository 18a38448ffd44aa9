"""Ranks that come together begin together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch.distributed as dist

from cloudckpt.ranks import pulse
from cloudckpt.ranks.pulse import Pulse


def test_ranks_that_are_there_meet_without_waiting_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_LONGEST_PERIOD_S", 3600.0)
    store = dist.HashStore()
    ranks = [Pulse(store, rank=rank, size=3) for rank in range(3)]
    meetings = [partial(one.meet, "work", after=0, deadline_s=100_000.0) for one in ranks]
    with ThreadPoolExecutor(3) as pool:
        met = [pool.submit(meeting) for meeting in meetings]
        try:
            assert [future.result(timeout=60) for future in met] == [1, 1, 1]
        finally:
            for one in ranks:
                one._wake.set()
                one.end()
