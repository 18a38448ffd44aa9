"""The last save before the end has no request that may outlast it, also where it is the job's first."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import cloudckpt.manager.manager as manager_room
from cloudckpt import CheckpointManager, Preemption
from cloudckpt.store.limit import limit_now
from cloudckpt.store.retrying import RetryingStore
from tests.store.fault_store import FaultStore, Op


def test_probe_and_claim_of_a_first_save_have_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left_s: dict[str, float] = {}

    def note(op: Op) -> None:
        limit = limit_now()
        assert limit is not None
        left_s[f"{op.verb} {op.key}"] = limit.left_s()

    store = FaultStore(url="memory://first-save/root", hook=note)
    monkeypatch.setattr(
        manager_room, "open_store", lambda *_, **options: RetryingStore(store, options["options"].retry)
    )
    heard = threading.Event()
    stop_s = time.monotonic() + 20.0

    def check() -> float:
        heard.set()
        return stop_s - time.monotonic()

    preemption = Preemption(signals=(), sources=(), check=check)
    with preemption, CheckpointManager("memory://first-save", preemption=preemption, progress="off") as manager:
        assert heard.wait(10)
        while not preemption.notice:
            time.sleep(0.001)
        assert manager.should_save(1)
        manager.save(1, {"w": torch.zeros(3)})
    assert any(name.startswith("create probe-") for name in left_s)
    assert any(name.startswith("create epochs/") for name in left_s)
    assert max(left_s.values()) <= 10.0, "half of what is left, so that another one fits behind it"
