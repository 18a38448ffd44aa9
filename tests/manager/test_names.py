"""A name is that of the newest checkpoint that was given it, at every moment; what it has moved on from goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cloudckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    CloudCkptError,
    FencedError,
    KeepLast,
    OptionsError,
    PinnedError,
)
from servers import FreshPrefix
from tests.effort import portion
from tests.ranks.processes import run
from tests.store.fault_store import Bucket, Crash, FaultKind, FaultStore, opening_the_last

CRASHES = [FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER]


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((10,), float(value))}


def opened(path: Path | str, **options: object) -> CheckpointManager:
    options = {"progress": "off", "save_rng": False, "prune_grace_s": 0.0, **options}
    return CheckpointManager(path, **options)  # type: ignore[arg-type]


def restored(manager: CheckpointManager, what: int | str | Checkpoint) -> float:
    state = state_of(0)
    assert manager.restore(state, what) is not None
    return float(state["w"][0])


def named(manager: CheckpointManager) -> dict[str, int]:
    manager.wait()
    return {name: one.step for name, one in manager.names().items()}


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultStore]]:
    """Let managers open the store that was pushed last."""
    with opening_the_last(monkeypatch, "cloudckpt.manager.manager.open_store") as pushed:
        yield pushed


def test_a_name_moves_with_the_commit_and_what_it_has_moved_on_from_goes(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step), name="last")
        manager.save(4, state_of(4))
        assert (named(manager), manager.all_steps()) == ({"last": 3}, [3, 4])
        assert restored(manager, "last") == 3.0
        assert manager.why_kept(3) == ("named last", "in use", "KeepAll()")
    assert len([path for path in (tmp_path / "pins").rglob("*") if path.is_file()]) == 1


def test_the_same_in_the_background_and_on_a_bucket(s3_url: FreshPrefix) -> None:
    with opened(s3_url.url, storage_options=s3_url.storage_options) as manager:
        for step in (1, 2, 3):
            manager.async_save(step, state_of(step), name="runs/a=1/last.ckpt")
        manager.wait()
        assert (named(manager), manager.all_steps()) == ({"runs/a=1/last.ckpt": 3}, [3])


def test_what_has_a_name_stays_whatever_the_rules_say_and_is_theirs_without(tmp_path: Path) -> None:
    with opened(tmp_path, retention=KeepLast(2)) as manager:
        manager.save(1, state_of(1), name="first")
        for step in (2, 3, 4, 5):
            manager.save(step, state_of(step), name="last")
        assert (named(manager), manager.all_steps()) == ({"first": 1, "last": 5}, [1, 4, 5])
        manager.remove("first")
        manager.save(6, state_of(6))
        manager.wait()
        assert manager.all_steps() == [5, 6]


def test_a_checkpoint_stays_as_long_as_it_has_a_name_or_a_pin(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(1, state_of(1), name="epoch=1")
        assert manager.save(1, state_of(1), name="last", exists="skip") == manager.latest()
        assert named(manager) == {"epoch=1": 1, "last": 1}
        manager.save(2, state_of(2), name="last")
        assert (named(manager), manager.all_steps()) == ({"epoch=1": 1, "last": 2}, [1, 2])
        manager.pin(1)
        manager.remove("epoch=1")
        assert (named(manager), manager.all_steps()) == ({"last": 2}, [1, 2])


def test_removal_of_a_checkpoint_takes_its_names_and_no_other_epochs_of_that_step(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(1, state_of(1), name="a")
        old = manager.latest()
    with opened(tmp_path) as manager:
        manager.save(1, state_of(10), name="b")
        assert old is not None
        manager.remove(old)
        assert (named(manager), restored(manager, 1)) == ({"b": 1}, 10.0)
        with pytest.raises(CheckpointNotFoundError, match="not committed"):
            manager.remove(old)
        manager.pin(1)
        newest = manager.latest()
        assert newest is not None
        with pytest.raises(PinnedError):
            manager.remove(newest)
        manager.unpin(1)
        manager.remove("b")
        assert (named(manager), manager.latest()) == ({}, None)
        manager.save(1, state_of(11), name="b")
        assert restored(manager, "b") == 11.0


def test_a_replaced_step_goes_once_the_new_one_is_committed(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        for value in (1, 2, 3):
            manager.save(7, state_of(value), name="last", exists="replace")
            assert restored(manager, "last") == value
        assert (len(manager.checkpoints()), named(manager)) == (1, {"last": 7})
        manager.save(8, state_of(8), name="epoch=8")
        manager.save(8, state_of(9), name="last", exists="replace")
        assert [one.step for one in manager.checkpoints()] == [8, 8]
        assert (restored(manager, "epoch=8"), restored(manager, "last")) == (8.0, 9.0)


def test_another_line_of_history_loses_its_name_and_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(5, state_of(5), name="last")
    with opened(tmp_path) as manager:  # which restores nothing
        manager.save(1, state_of(1), name="last")
        assert (named(manager), manager.all_steps()) == ({"last": 1}, [1, 5])


@pytest.mark.parametrize("name", ["", "latest", "best", "a b", "../x", "a//b", "x/", ".hidden", "é", "a" * 201, 3])
def test_what_can_be_no_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with opened(tmp_path / "root") as manager, pytest.raises(OptionsError, match="name is"):
        manager.save(1, state_of(1), name=name)
    assert not (tmp_path / "root").exists()


def test_a_name_that_nothing_has_is_a_fresh_start_only_where_nothing_is(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        assert manager.restore(state_of(0), "last") is None
        assert manager.named("last") is None
        manager.save(1, state_of(1), name="last")
        with pytest.raises(CheckpointNotFoundError, match="is named 'lats'; names there: 'last'"):
            manager.restore(state_of(0), "lats")
        with pytest.raises(CheckpointNotFoundError, match="is named 'lats'"):
            manager.remove("lats")


def test_a_fenced_job_gives_no_name(tmp_path: Path) -> None:
    with opened(tmp_path) as old, opened(tmp_path) as new:
        old.save(1, state_of(1), name="last")
        new.restore(state_of(0))
        new.save(2, state_of(2), name="last")
        with pytest.raises(FencedError):
            old.save(9, state_of(9), name="last")
        with pytest.raises(FencedError):
            old.save(1, state_of(1), name="other", exists="skip")
        assert named(new) == {"last": 2}


def life(clients: list[FaultStore], client: FaultStore, done: list[int]) -> None:
    clients.append(client)
    with opened("memory://bucket/run", sweep_after_s=None) as manager:
        manager.restore(state_of(0), "last")
        for step in range(1, 4):
            manager.save(step, state_of(step), name="last")
            done.append(step)


def test_a_sweep_takes_the_names_of_saves_that_were_killed_and_no_others(clients: list[FaultStore]) -> None:
    bucket = Bucket()
    clients.append(FaultStore(bucket))
    with opened("memory://bucket/run") as manager:
        manager.save(1, state_of(1), name="epoch=1")
    client = FaultStore(bucket)
    client.inject(kind=FaultKind.CRASH_BEFORE, verbs=("create",), key="manifest.json")
    clients.append(client)
    with suppress(Crash), opened("memory://bucket/run") as manager:
        manager.save(2, state_of(2), name="epoch=2")
    assert len([key for key in bucket.raw_list() if key.startswith("pins/")]) == 2
    bucket.advance(10)
    clients.append(FaultStore(bucket))
    with opened("memory://bucket/run") as manager:
        manager.save(3, state_of(3))
        manager.sweep(dry_run=False, older_than_s=0.0)
        assert named(manager) == {"epoch=1": 1}
    assert len([key for key in bucket.raw_list() if key.startswith("pins/")]) == 1


@pytest.mark.parametrize("crash", CRASHES)
def test_a_name_is_of_a_whole_checkpoint_no_older_than_acknowledged_at_any_crash_point(
    clients: list[FaultStore], crash: FaultKind
) -> None:
    counting = FaultStore(Bucket())
    life(clients, counting, [])
    # By default each request crashes in one of these ways, in a long run in all of them.
    for number in portion(range(1, counting.op_count + 1), CRASHES.index(crash), of=len(CRASHES)):
        bucket, done = Bucket(), list[int]()
        client = FaultStore(bucket)
        client.crash_at(number, crash)
        with suppress(Crash, CloudCkptError):
            life(clients, client, done)
        clients.append(FaultStore(bucket))
        with opened("memory://bucket/run", sweep_after_s=None) as manager:
            found = manager.named("last")
            if done:
                assert found is not None
                assert found.step >= done[-1]
            if found is not None:
                assert restored(manager, "last") == found.step
            manager.save(9, state_of(9), name="last")
            assert (named(manager), manager.all_steps()) == ({"last": 9}, [9])


def _save_by_name(url: str) -> list[tuple[dict[str, int], list[int]]]:
    found = []
    with opened(url) as manager:
        for step in (1, 2):
            manager.save(step, state_of(step), name="last")
        manager.save(2, state_of(2), name="more", exists="skip")
        torch.distributed.barrier()
        found.append((named(manager), manager.all_steps()))
        torch.distributed.barrier()
        manager.save(2, state_of(2), name="last", exists="replace")
        manager.remove("more")
        torch.distributed.barrier()
        found.append((named(manager), manager.all_steps()))
        torch.distributed.barrier()
    return found


def test_two_ranks_give_and_take_names_together(tmp_path: Path) -> None:
    for found in run(2, _save_by_name, str(tmp_path)):
        assert found == [({"last": 2, "more": 2}, [2]), ({"last": 2}, [2])]
