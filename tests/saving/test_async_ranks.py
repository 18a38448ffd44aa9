"""Async saves of several ranks: all of them save, skip and fail alike, and training's own traffic is left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Options, RankLostError, SaveFailedError
from cloudckpt.errors import EarlierSaveFailedError
from cloudckpt.ranks.group import Group
from cloudckpt.saving.lead import PendingSave
from tests.effort import diagonal
from tests.ranks.processes import World, run
from tests.store.gates import Failure, Gate, before, is_shard, slow, wait_for

DEADLINE_S = 3.0
CALM = Options(progress_timeout_s=60)


def rank_of_this() -> int:
    return int(os.environ["RANK"])


def steps_at(url: str) -> list[int | None]:
    with CheckpointManager(url) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


def sharded(seed: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """An FSDP2 module, and its whole tensors."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5))
    whole = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return fully_shard(module), whole


def replicated(step: int) -> dict[str, Any]:
    return {f"w{number}": torch.full((2000,), float(step + number)) for number in range(6)}


# -- all is saved --------------------------------------------------------------------------------------------


def save_while_training(url: str) -> tuple[list[float], bool]:
    module, whole = sharded(1)
    sums = []
    with CheckpointManager(url, options=CALM) as manager:
        slow(manager, 0.3)
        state: dict[str, Any] = {"module": module, "same": replicated(1), "config": {"step": 1}}
        handle = manager.async_save(1, state)
        was_under_way = not handle.done()
        with torch.no_grad():
            for tensor in [*module.parameters(), *state["same"].values()]:
                tensor.fill_(-1.0)
        for round_ in range(50):
            tensor = torch.tensor([float(dist.get_rank() + round_)])
            dist.all_reduce(tensor)
            sums.append(float(tensor))
        handle.result()
        found = {"module": sharded(2)[0], "same": replicated(0), "config": {}}
        manager.restore(found)
    restored = {name: tensor.full_tensor() for name, tensor in found["module"].state_dict().items()}
    assert [name for name in whole if not torch.equal(restored[name], whole[name])] == []
    assert [name for name, tensor in replicated(1).items() if not torch.equal(found["same"][name], tensor)] == []
    assert found["config"] == {"step": 1}
    return sums, was_under_way


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_save_in_the_background_while_training_reduces(tmp_path: Path, size: int) -> None:
    for sums, was_under_way in run(size, save_while_training, str(tmp_path)):
        assert sums == [float(sum(range(size)) + size * round_) for round_ in range(50)]
        assert was_under_way


def skip_if_one_is_busy(url: str) -> list[bool]:
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, replicated(0))
        held_up = PendingSave.finish
        if rank_of_this() == 1:
            # Rank 0 is done long before.
            PendingSave.finish = lambda self: (held_up(self), time.sleep(1.0))[0]  # type: ignore[method-assign]
        first = manager.async_save(1, replicated(1))
        if rank_of_this() == 0:
            wait_for(first.done)
        second = manager.async_save(2, replicated(2), on_busy="skip")
        manager.wait()
        third = manager.async_save(3, replicated(3), on_busy="skip")
        manager.wait()
        return [first.is_skipped, second.is_skipped, third.is_skipped]


def test_all_ranks_skip_if_only_one_is_busy(tmp_path: Path) -> None:
    assert run(2, skip_if_one_is_busy, str(tmp_path)) == [[False, True, False]] * 2
    assert steps_at(str(tmp_path)) == [0, 1, 3]


def use_two_managers(url: str) -> list[int | None]:
    with CheckpointManager(f"{url}/a", options=CALM) as one, CheckpointManager(f"{url}/b", options=CALM) as other:
        slow(one, 0.2)
        handles = [one.async_save(1, replicated(1)), other.async_save(2, replicated(2))]
        handles += [one.async_save(3, replicated(3)), other.async_save(4, replicated(4))]
        results = [handle.result() for handle in handles]
        return [result.step if result else None for result in results]


def test_two_managers_of_the_same_ranks_take_turns(tmp_path: Path) -> None:
    assert run(2, use_two_managers, str(tmp_path)) == [[1, 2, 3, 4]] * 2
    assert (steps_at(f"{tmp_path}/a"), steps_at(f"{tmp_path}/b")) == ([1, 3], [2, 4])


def save_plainly_beside(url: str) -> bool:
    take_over = Group.take_over
    Group.take_over = lambda self: (time.sleep(0.3), take_over(self))[1]  # type: ignore[method-assign]
    with CheckpointManager(f"{url}/a", options=CALM) as manager:
        slow(manager, 0.2)
        handle = manager.async_save(1, replicated(1))
        cloudckpt.save(replicated(5), f"{url}/b", options=CALM)
        was_done = handle.done()
        state = replicated(0)
        handle = manager.async_save(2, replicated(2))
        restored = manager.restore(state)
        assert restored is not None
        assert (restored.step, handle.done()) == (2, True)
        assert torch.equal(state["w3"], torch.full((2000,), 5.0))
        return was_done


def test_a_plain_save_and_a_restore_wait_for_the_save_under_way(tmp_path: Path) -> None:
    # Also if the thread of the save has not come to anything yet.
    assert run(2, save_plainly_beside, str(tmp_path)) == [True, True]


# -- what is refused -----------------------------------------------------------------------------------------


class Nesting:
    def __init__(self, manager: CheckpointManager, how: str) -> None:
        self.manager = manager
        self.how = how

    def state_dict(self) -> dict[str, Any]:
        getattr(self.manager, self.how)(9, replicated(9))
        return {"x": torch.ones(3)}

    def load_state_dict(self, given: Any) -> None:
        pass


def refuse(url: str) -> list[str]:
    told = []
    with CheckpointManager(url, options=CALM) as manager:
        acts = [
            *[
                lambda how=how: manager.async_save(1, {"nesting": Nesting(manager, how)})
                for how in ("save", "async_save")
            ],
            lambda: manager.async_save(1 + rank_of_this(), replicated(1)),
            lambda: manager.async_save(1, {"config": rank_of_this(), **replicated(1)}),
            lambda: manager.async_save(1, replicated(1), on_busy="never"),  # type: ignore[arg-type]
        ]
        for act in acts:
            with pytest.raises(CloudCkptError) as caught:
                act()
            told.append(str(caught.value))
        manager.wait()
        assert manager.async_save(2, replicated(2)).result() is not None
    return told


def test_what_ranks_must_not_do_is_refused_on_each_of_them_and_the_next_save_works(tmp_path: Path) -> None:
    for told in run(2, refuse, str(tmp_path), timeout_s=60):
        parts = [
            "in the middle of another save",
            "in the middle of another save",
            "call the same save",
            "'config' differs",
        ]
        for text, part in zip(told, [*parts, "give 'wait' or 'skip'"], strict=True):
            assert part in text
    assert steps_at(str(tmp_path)) == [2]


# -- failures ------------------------------------------------------------------------------------------------


def fail_late_on_one(url: str, on_busy: str) -> tuple[str, int | None]:
    rank = rank_of_this()
    with CheckpointManager(url, options=Options(progress_timeout_s=10)) as manager:
        manager.save(0, replicated(0))
        failure = Failure(manager, RuntimeError("of rank 0")) if rank == 0 else None
        finish = PendingSave.finish

        def finish_late(self: PendingSave, gauge: Any = None) -> Any:
            try:
                return finish(self)
            finally:
                time.sleep(1.0)

        if rank == 1:
            PendingSave.finish = finish_late  # type: ignore[method-assign]
        handle = manager.async_save(1, replicated(1))
        if rank == 0:
            wait_for(handle.done)
        if failure is not None:
            failure.is_on = False
        with pytest.raises(EarlierSaveFailedError) as caught:
            manager.async_save(2, replicated(2), on_busy=on_busy)  # type: ignore[arg-type]
        checkpoint = manager.async_save(3, replicated(3)).result()
        return str(caught.value), checkpoint.step if checkpoint else None


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_the_next_save_is_made_and_tells_of_a_failure_on_every_rank_whichever_knew_of_it_first(
    tmp_path: Path, on_busy: str
) -> None:
    for text, step in run(2, fail_late_on_one, str(tmp_path), on_busy):
        assert "rank 0" in text
        assert step == 3
    assert steps_at(str(tmp_path)) == [0, 2, 3]


def suffer(url: str, how: str, victim: int) -> tuple[BaseException | None, float, str]:
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, replicated(0))
        if rank_of_this() == victim:
            acts = {
                "kill": lambda key: os.kill(os.getpid(), signal.SIGKILL),
                "stop": lambda key: os.kill(os.getpid(), signal.SIGSTOP),
            }
            before(manager, acts[how], when=is_shard)
        manager._saves.options = Options(progress_timeout_s=DEADLINE_S)
        dist.barrier()
        began_s = time.monotonic()
        handle = manager.async_save(1, replicated(1))
        wait_for(handle.done)
        elapsed_s = time.monotonic() - began_s
        with pytest.raises(SaveFailedError) as caught:
            manager.async_save(2, replicated(2))
        return handle._error, elapsed_s, caught.value.__notes__[0]


@diagonal("how, victim", ["kill", "stop"], [0, 2])
def test_a_rank_lost_in_the_background_fails_the_save_on_all_others_in_time(
    tmp_path: Path, how: str, victim: int
) -> None:
    outcomes = World(3, suffer, str(tmp_path), how, victim).outcomes(timeout_s=60, but=[victim])
    for rank in {0, 1, 2} - {victim}:
        assert outcomes[rank].error is None, outcomes[rank].trace
        assert outcomes[rank].has_ended
        error, elapsed_s, told = outcomes[rank].value
        assert isinstance(error, SaveFailedError)
        assert isinstance(error.failures[victim], RankLostError)
        assert elapsed_s < DEADLINE_S + 10
        assert told == f"before that, the save of step 1 failed in the background: {error}"
    assert steps_at(str(tmp_path)) == [0]


def save_without_a_thread(url: str) -> tuple[str, int]:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "cloudckpt-save":
            raise RuntimeError("can't start new thread")
        start(thread)

    with CheckpointManager(url, options=CALM) as manager:
        if rank_of_this() == 1:
            threading.Thread.start = refuse  # type: ignore[method-assign]
        with pytest.raises(SaveFailedError) as caught:
            manager.async_save(1, replicated(1)).result()
        threading.Thread.start = start  # type: ignore[method-assign]
        saved = manager.async_save(2, replicated(2)).result()
    assert saved is not None
    return str(caught.value), saved.step


def test_a_rank_whose_thread_cannot_start_fails_the_save_on_all_ranks_and_the_next_one_works(tmp_path: Path) -> None:
    for told, step in run(2, save_without_a_thread, str(tmp_path)):
        assert "rank 1: the save was abandoned: a thread could not be started" in told
        assert step == 2
    assert steps_at(str(tmp_path)) == [2]


def close_with_a_hanging_rank(url: str) -> str:
    options = Options(progress_timeout_s=60, finish_timeout_s=1.0)
    manager = CheckpointManager(url, options=options)
    manager.save(0, replicated(0))
    gate = Gate(manager) if rank_of_this() == 1 else None
    manager.async_save(1, replicated(1))
    if gate is not None:
        gate.await_request()
    with pytest.raises(CloudCkptError) as caught:
        manager.close()
    if gate is not None:
        gate.open()
    return type(caught.value).__name__


def test_ranks_that_give_up_a_save_commit_nothing(tmp_path: Path) -> None:
    told = run(2, close_with_a_hanging_rank, str(tmp_path))
    assert set(told) <= {"SaveFailedError", "CommitUnknownError"}
    assert steps_at(str(tmp_path)) == [0]
