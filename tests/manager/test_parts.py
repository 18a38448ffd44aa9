"""Parts now, the commit later: nothing is there before it, and it is as good as a save's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CommitUnknownError,
    FencedError,
    KeepLast,
    Options,
    OptionsError,
    RetryPolicy,
    SavedParts,
    SaveFailedError,
    StorageError,
)
from cloudckpt.keys import MANIFEST_NAME
from tests.ranks.processes import World, run
from tests.store.fault_store import Bucket, FaultKind, FaultStore, opening_the_last, transient

SOON = Options(progress_timeout_s=20)
HASTY = Options(retry=RetryPolicy(max_attempts=1, deadline_s=5))


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((10,), float(step)), "step": step}


def restored(manager: CheckpointManager, step: Any = "latest") -> object:
    state = state_of(-1)
    found = manager.restore(state, step)
    assert found is None or torch.equal(state["w"], torch.full((10,), float(state["step"])))
    return None if found is None else state["step"]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultStore]]:
    """Let managers open the store that was pushed last."""
    with opening_the_last(monkeypatch, "cloudckpt.manager.manager.open_store") as pushed:
        yield pushed


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_there_from_its_commit_on_and_not_before(tmp_path: Path, background: bool) -> None:
    with CheckpointManager(tmp_path) as manager:
        state = state_of(1)
        parts = manager.save_parts(1, state, {"loss": 0.5}, {"by": "me"}, background=background, name="last")
        state["w"].fill_(9.0)
        parts.wait()

        assert parts.done()
        assert manager.latest() is None
        assert manager.names() == {}
        assert restored(manager) is None

        checkpoint = parts.commit()

        assert checkpoint is not None
        assert manager.names()["last"].order == checkpoint.order == (1, 1)
        assert (checkpoint.metrics["loss"], checkpoint.metadata["by"]) == (0.5, "me")
        assert restored(manager) == 1
        assert parts.commit() is checkpoint
        parts.abandon()
        assert manager.latest_step() == 1
        assert manager.async_save(2, state_of(2)).result() is not None
        assert manager.all_steps() == [1, 2]


def test_rules_and_names_wait_for_the_commit(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=[KeepLast(1)], prune_grace_s=0) as manager:
        manager.save(1, state_of(1), name="last")
        parts = manager.save_parts(2, state_of(2), name="last")
        again = manager.save_parts(1, state_of(10), exists="replace")
        assert manager.all_steps() == [1]
        assert manager.names()["last"].step == 1
        again.abandon()

        with pytest.raises(OptionsError, match="which has committed or begun another epoch since"):
            parts.commit()

        parts = manager.save_parts(2, state_of(2), name="last")
        parts.commit()
        manager.wait()
        assert manager.all_steps() == [2]
        assert manager.names()["last"].step == 2


def test_a_step_is_replaced_by_the_commit_of_the_new_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state_of(1))
        parts = manager.save_parts(1, {**state_of(2), "step": 2}, exists="replace")
        assert restored(manager) == 1
        parts = manager.save_parts(1, {**state_of(2), "step": 2}, exists="replace")
        parts.commit()
        assert restored(manager) == 2
        assert [found.order for found in manager.checkpoints()] == [(2, 1)]
        skipped = manager.save_parts(1, state_of(3), exists="skip").commit()
        assert skipped is not None
        assert skipped.epoch == 2


def test_a_step_is_committed_once_and_in_the_order_of_the_steps(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        first, second = manager.save_parts(1, state_of(1)), manager.save_parts(1, state_of(1))
        late, newer = manager.save_parts(2, state_of(2)), manager.save_parts(3, state_of(3))
        first.commit()
        with pytest.raises(CheckpointExistsError):
            second.commit()
        newer.commit()
        with pytest.raises(OptionsError, match=r"step 2 was written in epoch 1 .* committed or begun step 3 since"):
            late.commit()
        assert manager.all_steps() == [1, 3]


def test_what_is_abandoned_or_never_committed_is_removed_and_stays_uncommitted(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, state_of(1))
    parts = manager.save_parts(2, state_of(2), background=True)
    parts.abandon()
    parts.abandon()
    with pytest.raises(OptionsError, match="abandoned, and cannot be committed; save it again"):
        parts.commit()
    assert not list(tmp_path.glob("step-0000000002-*"))
    left = manager.save_parts(2, state_of(2))
    assert list(tmp_path.glob("step-0000000002-*"))
    manager.close()
    left.abandon()
    with pytest.raises(OptionsError, match="is closed"):
        left.commit()
    assert not list(tmp_path.glob("step-0000000002-*"))
    with CheckpointManager(tmp_path) as again:
        assert again.all_steps() == [1]


def test_a_newer_job_fences_the_commit(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, CheckpointManager(tmp_path) as newer:
        parts = manager.save_parts(1, state_of(1))
        newer.save(1, state_of(5))
        with pytest.raises(FencedError):
            parts.commit()
        assert restored(newer) == 5
        assert newer.all_steps() == [1]


def test_a_commit_of_which_nobody_knows_is_told_by_the_next_one(clients: list[FaultStore]) -> None:
    bucket = Bucket()
    client = FaultStore(bucket)
    clients.append(client)
    with CheckpointManager("memory://bucket/root", options=HASTY, save_rng=False) as manager:
        parts = manager.save_parts(1, state_of(1), name="last")
        late = client.inject(kind=FaultKind.LATE, verbs=["create"], key=MANIFEST_NAME, times=None)
        with pytest.raises(CommitUnknownError):
            parts.commit()
        assert late.fired
        client.faults.clear()
        bucket.deliver_late()

        checkpoint = parts.commit()

        assert checkpoint is not None
        assert [found.order for found in manager.checkpoints()] == [checkpoint.order]
        assert manager.names() == {"last": checkpoint}


def test_a_store_that_is_down_at_the_commit_takes_it_later(clients: list[FaultStore]) -> None:
    client = FaultStore(Bucket())
    clients.append(client)
    with CheckpointManager(
        "memory://bucket/root", options=HASTY, save_rng=False, on_error="warn", max_failures=2
    ) as manager:
        client.inject(kind=FaultKind.BEFORE, error=transient, verbs=["put"], times=None)
        assert manager.save_parts(1, state_of(1)).commit() is None
        client.faults.clear()
        parts = manager.save_parts(1, state_of(1))
        client.inject(kind=FaultKind.BEFORE, error=transient, verbs=["list"], times=None)
        with pytest.raises(StorageError):
            parts.commit()
        client.faults.clear()
        assert manager.latest() is None
        assert parts.commit() is not None
        assert manager.latest_step() == 1


def two_phases_of_ranks(root: str) -> list[Any]:
    rank = dist.get_rank()
    found: list[Any] = []
    with CheckpointManager(root, options=SOON) as manager:
        one = manager.save_parts(1, state_of(1))
        two = manager.save_parts(2, state_of(2), background=True)
        two.wait()
        dist.barrier()
        found.append(manager.latest_step())
        dist.barrier()
        found += [getattr(parts.commit(), "order", None) for parts in (one, two)]
        found.append(getattr(two.commit(), "order", None))
        three = manager.save_parts(3, state_of(3))
        if rank == 1:
            with pytest.raises(OptionsError) as caught:
                manager.save(4, state_of(4))
        else:
            with pytest.raises(OptionsError) as caught:
                manager.save_parts(4, state_of(4))
        found.append("call the same save or restore on every rank" in str(caught.value))
        found.append(getattr(three.commit(), "order", None))
        four = manager.save_parts(4, {"w": torch.full((3,), 1.0)})
        dist.barrier()
        if rank == 0:
            four.abandon()
    dist.barrier()
    return found


def test_ranks_write_together_and_commit_together(tmp_path: Path) -> None:
    wanted = [None, (1, 1), (1, 2), (1, 2), True, (1, 3)]
    assert run(2, two_phases_of_ranks, str(tmp_path)) == [wanted] * 2
    with CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1, 2, 3]
        assert not list(tmp_path.glob("step-0000000004-*"))


def one_dies_before_the_commit(root: str, victim: int) -> str:
    options = Options(progress_timeout_s=1.5)
    manager = CheckpointManager(root, options=options)
    parts: SavedParts = manager.save_parts(1, state_of(1))
    dist.barrier()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SaveFailedError) as caught:
        parts.commit()
    return str(caught.value)


def test_a_rank_that_is_lost_before_the_commit_leaves_nothing_committed(tmp_path: Path) -> None:
    outcome = World(2, one_dies_before_the_commit, str(tmp_path), 1).outcomes(timeout_s=60, but=[1])[0]
    assert outcome.error is None, outcome.trace
    assert "rank 1" in outcome.value
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest() is None
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        cloudckpt.read(tmp_path / "step-0000000001-e0001")
