"""The last save before the end has no request that may outlast it, also where it is the job's first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import cloudckpt.manager.manager as manager_room
from cloudckpt import CheckpointManager, Options, Preemption, RetryPolicy
from cloudckpt.errors import StorageError, TransientError
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


@contextmanager
def preempted_in(seconds: float) -> Iterator[Preemption]:
    """Give notice of an end so many seconds from now, which is heard already."""
    heard = threading.Event()
    stop_s = time.monotonic() + seconds

    def check() -> float:
        heard.set()
        return stop_s - time.monotonic()

    with Preemption(signals=(), sources=(), check=check) as preemption:
        assert heard.wait(10)
        while not preemption.notice:
            time.sleep(0.001)
        yield preemption


def two_roots(monkeypatch: pytest.MonkeyPatch) -> dict[str, FaultStore]:
    """Let managers open stores in memory, whose hooks are to be set."""
    stores = {url: FaultStore(url=f"{url}/root") for url in ("memory://first", "memory://second")}
    monkeypatch.setattr(
        manager_room, "open_store", lambda url, **given: RetryingStore(stores[url], given["options"].retry)
    )
    return stores


@pytest.mark.parametrize("is_first_claim", [True, False])
def test_a_look_at_a_root_that_is_down_has_a_part_of_the_time_that_the_save_has(
    monkeypatch: pytest.MonkeyPatch, is_first_claim: bool
) -> None:
    left_s: list[float] = []

    def fail(op: Op) -> None:
        if op.verb == "list" or (op.key.startswith("probe-") and not is_first_claim):
            left_s.append(limit_now().left_s())
        raise TransientError("503 SlowDown")

    stores = two_roots(monkeypatch)
    options = Options(retry=RetryPolicy(max_attempts=1))
    with (
        preempted_in(8.0) as preemption,
        CheckpointManager(
            "memory://first", fallback="memory://second", options=options, preemption=preemption, progress="off"
        ) as manager,
    ):
        assert manager.should_save(1)
        if not is_first_claim:
            manager.save(1, {"w": torch.zeros(3)})
            manager._saves.homes[0].epoch.is_doubted = True
        stores["memory://first"].hook = fail
        manager.save(2, {"w": torch.zeros(3)})
        stores["memory://first"].hook = None
    assert left_s
    assert max(left_s) <= 1.0, "half of a quarter of what the save has, so that another request fits"


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_the_last_save_is_tried_again_until_the_end_however_often_it_fails(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stores = two_roots(monkeypatch)
    options = Options(retry=RetryPolicy(max_attempts=2, backoff_base_s=0.001, backoff_max_s=0.01))
    with (
        preempted_in(20.0) as preemption,
        CheckpointManager("memory://first", options=options, preemption=preemption, progress="off") as manager,
    ):
        assert manager.should_save(1)
        stores["memory://first"].inject(times=40, verbs=["put"])
        getattr(manager, how)(1, {"w": torch.zeros(3)})
        manager.wait()
        assert manager.latest_step() == 1


def test_a_first_root_that_is_slow_goes_on_while_the_fallback_refuses_and_is_not_begun_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = two_roots(monkeypatch)
    slow, keys = threading.Event(), []

    def hold(op: Op) -> None:
        if op.verb == "put" and op.key.endswith(".safetensors"):
            keys.append(op.key)
            assert slow.wait(60)

    def refuse(op: Op) -> None:
        slow.set()
        raise StorageError("it is full")

    with (
        preempted_in(8.0) as preemption,
        CheckpointManager(
            "memory://first", fallback="memory://second", preemption=preemption, progress="off"
        ) as manager,
    ):
        assert manager.should_save(1)
        stores["memory://first"].hook, stores["memory://second"].hook = hold, refuse
        assert manager.save(1, {"w": torch.zeros(3)}).url.startswith("memory://first")  # type: ignore[union-attr]
        stores["memory://second"].hook = None
    assert len(keys) == 1


def test_two_roots_are_tried_in_turns_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = two_roots(monkeypatch)
    options = Options(retry=RetryPolicy(max_attempts=1))
    with (
        preempted_in(30.0) as preemption,
        CheckpointManager(
            "memory://first", fallback="memory://second", options=options, preemption=preemption, progress="off"
        ) as manager,
    ):
        assert manager.should_save(1)
        for store in stores.values():
            store.inject(times=2, verbs=["put"])
        manager.save(1, {"w": torch.zeros(3)})
        assert manager.latest_step() == 1


def test_the_error_names_what_both_roots_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = two_roots(monkeypatch)
    with CheckpointManager("memory://first", fallback="memory://second", progress="off") as manager:
        for url, store in stores.items():
            store.inject(times=None, verbs=["put"], error=lambda op, url=url: StorageError(f"{url} is full"))
        with pytest.raises(StorageError, match="memory://second is full; before that, the save to memory://first"):
            manager.save(1, {"w": torch.zeros(3)})


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_save_under_way_at_a_root_that_hangs_goes_to_the_fallback_when_notice_is_given(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stores = two_roots(monkeypatch)
    hung, release = threading.Event(), threading.Event()
    end_s = [0.0]

    def hang(op: Op) -> None:
        if op.verb == "put" and op.key.endswith(".safetensors"):
            end_s[0] = time.monotonic() + 8.0
            hung.set()
            assert release.wait(60)

    def check() -> float | None:
        return end_s[0] - time.monotonic() if hung.is_set() else None

    preemption = Preemption(signals=(), sources=(), check=check, poll_s=0.05)
    with (
        preemption,
        CheckpointManager(
            "memory://first", fallback="memory://second", preemption=preemption, progress="off"
        ) as manager,
    ):
        stores["memory://first"].hook = hang
        getattr(manager, how)(1, {"w": torch.zeros(3)})
        manager._saves.background.wait(60)
        assert time.monotonic() < end_s[0]
        release.set()
        stores["memory://first"].hook = None
        assert manager.latest().url.startswith("memory://second")  # type: ignore[union-attr]
