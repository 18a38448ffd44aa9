"""A root that has no room for a save is rid of what no checkpoint needs, and takes the save: it does not stay full."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, KeepLast, Options, Preemption, StorageError
from cloudckpt.options import KIB
from cloudckpt.ranks import Group
from cloudckpt.root.cleaning import Cleaner
from cloudckpt.store import local
from cloudckpt.store.disk import Disk
from tests.ranks.processes import run

# One save of `state_of` takes about 100,000 bytes: there is room for two, and part of a third.
ROOM_BYTES = 220_000
SMALL = Options(shard_bytes=16 * KIB, block_bytes=4 * KIB, span_bytes=16 * KIB)
GRACE_S = 1_000.0


class SmallDisk(Disk):
    """A disk with so much room."""

    def __init__(self, root: Path, room_bytes: int = ROOM_BYTES) -> None:
        self.room_bytes = room_bytes
        self._root = root

    def used_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())

    def write(self, fd: int, buffers: Sequence[memoryview], *, offset: int) -> int:
        if self.used_bytes() + sum(buffer.nbytes for buffer in buffers) > self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, buffers, offset=offset)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallDisk:
    disk = SmallDisk(tmp_path)
    monkeypatch.setattr("cloudckpt.store.local.Disk", lambda: disk)
    return disk


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((20_000,), float(step))}


def manager_of(tmp_path: Path, **options: Any) -> CheckpointManager:
    given = {"retention": [KeepLast(1)], "options": SMALL, "prune_grace_s": GRACE_S, **options}
    return CheckpointManager(tmp_path, **given)


def assert_stands(manager: CheckpointManager, step: int) -> None:
    state = state_of(0)
    restored = manager.restore(state)
    assert restored is not None
    assert restored.step == step
    assert torch.equal(state["w"], state_of(step)["w"])


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_save_without_room_has_it_from_pruned_shards_that_are_due(tmp_path: Path, disk: SmallDisk, how: str) -> None:
    clock = Clock()
    with manager_of(tmp_path, clock=clock) as manager:
        for step in range(1, 6):
            getattr(manager, how)(step, state_of(step))
            manager.wait()
            clock.now_s += GRACE_S
        assert_stands(manager, 5)


def test_a_save_without_room_waits_for_shards_whose_grace_time_is_over_soon(tmp_path: Path, disk: SmallDisk) -> None:
    with manager_of(tmp_path, prune_grace_s=0.3) as manager:
        for step in range(1, 6):
            manager.save(step, state_of(step))
        assert_stands(manager, 5)


def test_the_wait_for_a_grace_time_is_no_standing_still(
    tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick, wait, ticks = Group.tick, Cleaner._wait_for_grace, 0
    got_on: list[int] = []

    def counted(group: Group) -> None:
        nonlocal ticks
        ticks += 1
        tick(group)

    def watched(cleaner: Cleaner, go_on: Callable[[], bool]) -> bool:
        before = ticks
        is_due = wait(cleaner, go_on)
        got_on.append(ticks - before)
        return is_due

    monkeypatch.setattr(Group, "tick", counted)
    monkeypatch.setattr(Cleaner, "_wait_for_grace", watched)
    with manager_of(tmp_path, prune_grace_s=2) as manager:
        for step in range(1, 4):
            manager.save(step, state_of(step))
    assert got_on
    assert min(got_on) > 0


def test_shards_that_readers_may_have_for_long_stay_and_the_error_says_what_helps(
    tmp_path: Path, disk: SmallDisk
) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        shards = set(tmp_path.rglob("*.safetensors"))
        helps = "no room left: free some, raise the quota, let retention keep fewer"
        with pytest.raises(StorageError, match=helps) as caught:
            manager.save(3, state_of(3))
        assert caught.value.is_full
        assert set(tmp_path.rglob("*.safetensors")) == shards
        assert_stands(manager, 2)


def test_the_first_save_of_the_next_job_has_the_room_of_what_the_last_one_left(tmp_path: Path, disk: SmallDisk) -> None:
    killed = manager_of(tmp_path)
    killed.save(1, state_of(1))
    killed.save(2, state_of(2))
    with manager_of(tmp_path, sweep_after_s=0.0) as manager:
        assert_stands(manager, 2)
        manager.save(3, state_of(3))
        assert_stands(manager, 3)


def test_the_first_save_of_the_next_job_prunes_what_the_last_one_had_no_time_to(
    tmp_path: Path, disk: SmallDisk
) -> None:
    killed = manager_of(tmp_path, retention=())
    killed.save(1, state_of(1))
    killed.save(2, state_of(2))
    with manager_of(tmp_path, prune_grace_s=0.0) as manager:
        assert_stands(manager, 2)
        manager.save(3, state_of(3))
        assert manager.all_steps() == [3]
        assert_stands(manager, 3)


def test_a_root_without_room_for_a_claim_is_rid_of_what_killed_writers_did_not_finish(
    tmp_path: Path, disk: SmallDisk
) -> None:
    manager_of(tmp_path).save(1, state_of(1))
    unfinished = next(tmp_path.glob("step-*")) / f".cloudckpt-tmp-{'0' * 32}"
    unfinished.write_bytes(bytes(ROOM_BYTES - disk.used_bytes()))
    with manager_of(tmp_path, sweep_after_s=0.0) as manager:
        assert_stands(manager, 1)
        manager.save(2, state_of(2))
        assert_stands(manager, 2)
    assert not unfinished.exists()


@contextmanager
def noticed(clock: Clock) -> Iterator[Preemption]:
    """Give notice, once, of an end in 100 seconds of the clock, which is heard already."""
    said: list[float | None] = [100.0]
    with Preemption(signals=(), sources=(), check=partial(_next, said), clock=clock) as preemption:
        while not preemption.notice:
            time.sleep(0.001)
        yield preemption


@pytest.mark.parametrize("then", ["save", "should_save", "close"])
def test_what_a_notice_kept_from_being_pruned_goes_when_it_has_passed(
    tmp_path: Path, disk: SmallDisk, then: str
) -> None:
    clock = Clock()
    with noticed(clock) as preemption:
        with manager_of(tmp_path, clock=clock, preemption=preemption, prune_grace_s=0.0) as manager:
            assert manager.should_save(1)
            manager.save(1, state_of(1))
            manager.save(2, state_of(2))
            assert manager.all_steps() == [1, 2]
            clock.now_s += 101.0
            if then == "save":
                manager.save(3, state_of(3))
            elif then == "should_save":
                assert not manager.should_save(3)
                manager.wait()
                assert manager.all_steps() == [2]
        with CheckpointManager(tmp_path) as other:
            assert other.all_steps() == [3 if then == "save" else 2]
        assert disk.used_bytes() < 150_000  # one save


def test_what_was_pruned_before_a_notice_goes_when_it_is_due_and_nothing_is_pruned_for_the_last_save(
    tmp_path: Path, disk: SmallDisk
) -> None:
    clock = Clock()
    said: list[float | None] = []
    check = partial(_next, said)
    with (
        Preemption(signals=(), sources=(), check=check, poll_s=0.01, clock=clock) as preemption,
        manager_of(tmp_path, clock=clock, preemption=preemption) as manager,
    ):
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        clock.now_s += GRACE_S
        said.append(100.0)
        while not preemption.notice:
            time.sleep(0.001)
        assert manager.should_save(3)
        manager.save(3, state_of(3))
        assert manager.all_steps() == [2, 3]


def _next(said: list[float | None]) -> float | None:
    return said.pop() if said else None


ROOM_OF_RANKS = 280_000


def on_a_full_disk(root: str, full_rank: int) -> int | None:
    """Save four steps on all ranks; the disk is small for one of them."""
    if int(os.environ["RANK"]) == full_rank:
        local.Disk = partial(SmallDisk, Path(root), ROOM_OF_RANKS)  # type: ignore[misc, assignment]
    clock = Clock()
    with manager_of(Path(root), clock=clock) as manager:
        for step in range(1, 5):
            manager.save(step, state_of(step))
            clock.now_s += GRACE_S
        newest = manager.latest()
    return None if newest is None else newest.step


@pytest.mark.parametrize("full_rank", [0, 1])
def test_rank_0_makes_room_whichever_rank_has_none(tmp_path: Path, full_rank: int) -> None:
    assert run(2, on_a_full_disk, str(tmp_path), full_rank) == [4, 4]
