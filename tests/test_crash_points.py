"""Break every single request of a job's life, in every way, and look at what the next job finds.

A life: open, restore, save several steps under retention, sweep what others left, close. It runs once to count its
requests; then once per request and per way of breaking it. The next incarnation must find a whole checkpoint, no older
than the newest that was acknowledged, and no fewer than retention keeps, whatever happened (FORMAT invariants 1, 2, 4,
5 and 7 to 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from cloudckpt import (
    CheckpointManager,
    CloudCkptError,
    CommitUnknownError,
    KeepLast,
    Options,
)
from cloudckpt.keys import MANIFEST_NAME
from cloudckpt.options import KIB
from cloudckpt.root import Catalog
from cloudckpt.store.probe import _proven
from tests.effort import diagonal, portion
from tests.store.fault_store import ERRORS, Bucket, Crash, FaultKind, FaultStore, opening_the_last

OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=1, memory_budget_bytes=64 * KIB)
STEPS = 4


def is_void(bucket: Bucket, key: str) -> bool:
    """Tell whether a manifest says that nothing is committed there: a crash may leave it from a removal."""
    return b'"state": "void"' in bucket.raw_get(key)


LEFT = ("step-0000000098-e0001/", "step-0000000099-e0001/")
CRASHES = [FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER]


def tensor_of(step: int) -> torch.Tensor:
    return torch.arange(3_000, dtype=torch.float32) * (step + 1)


def state_of(step: int) -> dict[str, object]:
    return {"w": tensor_of(step), "count": torch.tensor(step), "config": {"step": step}}


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultStore]]:
    """Let managers open the store that was pushed last."""
    with opening_the_last(monkeypatch, "cloudckpt.manager.manager.open_store") as pushed:
        yield pushed


@contextmanager
def manager_on(client: FaultStore, clients: list[FaultStore], *, shares: bool = False) -> Iterator[CheckpointManager]:
    clients.append(client)
    _proven.clear()
    with CheckpointManager(
        "memory://bucket/root",
        options=OPTIONS,
        retention=[KeepLast(2)],
        prune_grace_s=0,
        sweep_after_s=0,
        save_rng=False,
        reuse_unchanged=shares,
    ) as manager:
        yield manager


Save = Callable[[FaultStore, CheckpointManager, int], object]


def at_once(_: FaultStore, manager: CheckpointManager, step: int) -> object:
    return manager.save(step, state_of(step))


def in_two_phases(client: FaultStore, manager: CheckpointManager, step: int) -> object:
    parts = manager.save_parts(step, state_of(step))
    assert f"step-{step:010}" not in str([key for key in client.bucket.raw_list() if key.endswith(MANIFEST_NAME)])
    return parts.commit()


def live(
    client: FaultStore, clients: list[FaultStore], acknowledged: list[int], unknown: list[int], save: Save = at_once
) -> None:
    """Be one incarnation: restore, save a few steps, note which saves were acknowledged or may have happened."""
    with manager_on(client, clients) as manager:
        state = state_of(0)
        restored = manager.restore(state)
        first = 0 if restored is None or restored.step is None else restored.step + 1
        for step in range(first, first + STEPS):
            try:
                save(client, manager, step)
            except CommitUnknownError:
                unknown.append(step)
                raise
            acknowledged.append(step)
            # So that a request has the same number in each life.
            manager._saves.homes[0].pruner.settle()


def check_next(bucket: Bucket, clients: list[FaultStore], acknowledged: list[int], possible: list[int]) -> None:
    """Be the next incarnation: what is restored is whole and new enough, and every listed checkpoint is loadable.

    Steps in `possible` may have been committed without an acknowledgement; no other may.
    """
    with manager_on(FaultStore(bucket), clients) as manager:
        state = state_of(9_999)
        restored = manager.restore(state)
        newest = max(acknowledged, default=-1)
        found = -1 if restored is None or restored.step is None else restored.step
        assert found in {newest, *possible}
        assert found >= newest
        listed = [checkpoint.step for checkpoint in manager.checkpoints()]
        assert len(listed) >= min(2, len(acknowledged)), "retention left fewer than it keeps"
        for step in listed:
            assert step is not None
            state = state_of(9_999)
            manager.restore(state, step=step)
            assert torch.equal(state["w"], tensor_of(step))  # type: ignore[arg-type]
            assert state["config"] == {"step": step}
        manifests = {key for key in bucket.raw_list() if key.endswith(MANIFEST_NAME) and not is_void(bucket, key)}
        assert len({key for key in manifests if not key.startswith(LEFT)}) == len(listed)


def count_requests(clients: list[FaultStore], lives_before: int, save: Save = at_once) -> int:
    client = FaultStore(bucket_after(clients, lives_before))
    live(client, clients, [], [], save)
    return client.op_count


def bucket_after(clients: list[FaultStore], lives: int) -> Bucket:
    bucket = Bucket()
    for _ in range(lives):
        live(FaultStore(bucket), clients, [], [])
    if lives:
        # A void of long ago, and an attempt that was killed.
        Catalog(FaultStore(bucket)).void(LEFT[0])
        bucket.advance(8 * 86_400)
        for name in ("r00000-0000.safetensors", "index.bin"):
            bucket.raw_put(f"{LEFT[1]}0123456789abcdef/{name}", b"never committed")
    return bucket


def kept_after(lives: int) -> list[int]:
    """Return the steps that retention keeps after so many lives."""
    return list(range(lives * STEPS))[-2:]


@diagonal("kind, lives_before", CRASHES, [pytest.param(1, id="second-job"), pytest.param(0, id="first-job")])
def test_a_crash_at_any_request_loses_nothing_that_was_acknowledged(
    clients: list[FaultStore], kind: FaultKind, lives_before: int
) -> None:
    fired = 0
    before = bucket_after(clients, lives_before)
    for number in range(1, count_requests(clients, lives_before) + 1):
        bucket = before.copy()
        acknowledged = kept_after(lives_before)
        client = FaultStore(bucket)
        fault = client.crash_at(number, kind)
        with suppress(Crash):
            live(client, clients, acknowledged, [])
        fired += fault.fired
        # The manifest may have been created in the moment of the crash.
        check_next(bucket, clients, acknowledged, [max(acknowledged, default=-1) + 1])
    assert fired > 30


def test_a_break_at_any_request_of_a_save_in_two_phases_loses_nothing_and_commits_nothing_before_its_time(
    clients: list[FaultStore],
) -> None:
    count = count_requests(clients, 0, in_two_phases)
    assert count == count_requests(clients, 0), "a second phase costs no more"
    ways = [*((kind, None) for kind in CRASHES), *(error.values for error in ERRORS)]
    fired = 0
    tried = portion(range(1, count + 1), 0, of=2)
    for number in tried:
        bucket = Bucket()
        client = FaultStore(bucket)
        kind, error = ways[number % len(ways)]
        if error is None:
            fault = client.crash_at(number, kind)  # type: ignore[arg-type]
        else:
            fault = client.inject(kind=kind, error=error, skip=number - 1, times=None)
        acknowledged: list[int] = []
        unknown: list[int] = []
        with suppress(Crash, CloudCkptError):
            live(client, clients, acknowledged, unknown, in_two_phases)
        fired += fault.fired > 0
        at_the_end = [max(acknowledged, default=-1) + 1] if error is None else unknown
        check_next(bucket, clients, acknowledged, at_the_end)
    assert fired > len(tried) // 2


def live_sharing(client: FaultStore, clients: list[FaultStore], acknowledged: list[int], unknown: list[int]) -> None:
    """Be one incarnation whose saves share what does not change: until the last but one, in which all of it does."""
    with manager_on(client, clients, shares=True) as manager:
        state = sharing_state_of(0, 0)
        restored = manager.restore(state)
        first = 0 if restored is None or restored.step is None else restored.step + 1
        for step in range(first, first + STEPS):
            try:
                manager.save(step, sharing_state_of(step, step >= STEPS * 2 - 2))
            except CommitUnknownError:
                unknown.append(step)
                raise
            acknowledged.append(step)
            manager._saves.homes[0].pruner.settle()


def sharing_state_of(step: int, phase: int) -> dict[str, object]:
    return {"base": torch.arange(2_500, dtype=torch.float32) + phase, "w": torch.full((50,), float(step))}


def check_sharing(bucket: Bucket, clients: list[FaultStore], acknowledged: list[int], possible: list[int]) -> None:
    """Be the next incarnation, which sweeps, too: all that is listed is whole, and nothing acknowledged is lost."""
    bucket.advance(86_400)
    with manager_on(FaultStore(bucket), clients, shares=True) as manager:
        state = sharing_state_of(-1, -1)
        restored = manager.restore(state)
        found = -1 if restored is None else restored.step
        assert found in {max(acknowledged, default=-1), *possible}
        manager.save(found + 1, state)  # with its sweep
        manager._saves.homes[0].pruner.settle()
        listed = [checkpoint.step for checkpoint in manager.checkpoints()]
        assert len(listed) >= min(2, len(acknowledged))
        for step in listed:
            manager.restore(state, step=step)
            if step <= found:
                assert torch.equal(state["w"], torch.full((50,), float(step)))  # type: ignore[arg-type]
                assert torch.equal(state["base"], sharing_state_of(step, step >= STEPS * 2 - 2)["base"])  # type: ignore[arg-type]


def test_a_break_at_any_request_of_saves_that_share_shards_loses_none_that_is_named(clients: list[FaultStore]) -> None:
    before = Bucket()
    live_sharing(FaultStore(before), clients, [], [])
    client = FaultStore(before.copy())
    live_sharing(client, clients, [], [])
    ways = [*((kind, None) for kind in CRASHES), *(error.values for error in ERRORS)]
    fired = 0
    tried = portion(range(1, client.op_count + 1), 0, of=2)
    for number in tried:
        bucket, acknowledged, unknown = before.copy(), list(range(STEPS)), list[int]()
        client = FaultStore(bucket)
        kind, error = ways[number % len(ways)]
        if error is None:
            fault = client.crash_at(number, kind)  # type: ignore[arg-type]
        else:
            fault = client.inject(kind=kind, error=error, skip=number - 1, times=None)
        with suppress(Crash, CloudCkptError):
            live_sharing(client, clients, acknowledged, unknown)
        fired += fault.fired > 0
        check_sharing(bucket, clients, acknowledged, [max(acknowledged) + 1] if error is None else unknown)
    assert fired > len(tried) // 2


def test_a_life_removes_what_others_left(clients: list[FaultStore]) -> None:
    bucket = bucket_after(clients, 1)
    live(FaultStore(bucket), clients, [], [])
    assert [key for key in bucket.raw_list() if key.startswith(LEFT)] == [LEFT[1] + MANIFEST_NAME]


@diagonal("kind, error, times", ERRORS, [pytest.param(1, id="once"), pytest.param(None, id="for-ever")])
def test_an_error_in_any_request_is_survived_or_fails_cleanly(
    clients: list[FaultStore], kind: FaultKind, error: object, times: int | None
) -> None:
    fired = 0
    requests = range(1, count_requests(clients, 0) + 1)
    # By default each request fails in one of these ways, in a long run in all of them.
    way = [error_of.values for error_of in ERRORS].index((kind, error))
    tried = portion(requests, way, of=len(ERRORS))
    for number in tried:
        bucket = Bucket()
        client = FaultStore(bucket)
        fault = client.inject(kind=kind, error=error, skip=number - 1, times=times)
        acknowledged: list[int] = []
        unknown: list[int] = []
        with suppress(CloudCkptError):
            live(client, clients, acknowledged, unknown)
        fired += fault.fired
        check_next(bucket, clients, acknowledged, unknown)
    assert len(requests) > 50
    assert fired > len(tried) // 2


def test_a_late_commit_of_a_zombie_never_becomes_the_latest(clients: list[FaultStore]) -> None:
    bucket = Bucket()
    zombie = FaultStore(bucket)
    with manager_on(zombie, clients) as manager:
        manager.save(0, state_of(0))
        zombie.inject(kind=FaultKind.LATE, verbs=["create"], key=MANIFEST_NAME, times=None)
        with pytest.raises(CommitUnknownError):
            manager.save(1, state_of(1))
    with manager_on(FaultStore(bucket), clients) as manager:
        restored = manager.restore(state_of(9))
        assert restored is not None
        assert restored.step == 0
        manager.save(1, {**state_of(1), "config": {"step": "new"}})
        bucket.deliver_late()
        latest = manager.latest()
        assert latest is not None
        assert (latest.epoch, latest.step) == (2, 1)
        state = state_of(9)
        manager.restore(state)
        assert state["config"] == {"step": "new"}


def test_a_save_of_one_small_shard_costs_four_requests_and_its_restore_four(clients: list[FaultStore]) -> None:
    bucket = Bucket()
    with manager_on(FaultStore(bucket), clients) as manager:
        state = {"w": torch.zeros(10)}
        manager.save(0, state)
        manager._saves.homes[0].pruner.settle()
        client = clients[-1]
        before = client.op_count
        manager.save(1, state)
        saved = [op.verb for op in client.trace[before:]]
    assert saved == ["put", "put", "list", "create", "list"], "shard, index, fence, manifest; then retention's listing"
    client = FaultStore(bucket)
    with manager_on(client, clients) as manager:
        manager.restore(state)
    assert [op.verb for op in client.trace] == ["list", "read", "read", "get"]
