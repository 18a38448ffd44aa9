"""What a restore leaves for later is whole before it is used, or training hears that it is not; all else is exact."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import cloudckpt
import cloudckpt.loading.lead as lead_room
import cloudckpt.manager.manager as manager_room
from cloudckpt import (
    CheckpointManager,
    CloudCkptError,
    Options,
    OptionsError,
    Preemption,
    RestoreFailedError,
    SaveFailedError,
)
from cloudckpt.options import KIB
from cloudckpt.state.optimizers import OptimizerEntry
from cloudckpt.store import RetryingStore
from tests.ranks.processes import run
from tests.store.fault_store import Bucket, FaultStore, Op

URL = "memory://bucket/root"
SMALL = Options(shard_bytes=8 * KIB, block_bytes=KIB, span_bytes=2 * KIB, memory_budget_bytes=64 * KIB)
WAIT_S = 60.0

KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "own": lambda parameters: Own(parameters, lr=0.1),
}


class Own(torch.optim.AdamW):
    """An optimizer that is nobody's but the program's."""


def _is_rest(data: bytes) -> bool:
    """Tell whether only moments are in a shard, by its header."""
    header = data[:8192]
    return b'"optimizer.' in header and b'"model.' not in header and b'"cloudckpt.' not in header


class Store:
    """A bucket; what is read of optimizers there may be held up, or spoilt."""

    def __init__(self) -> None:
        self.bucket = Bucket()
        self.asked, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def opened(self, *_: Any, options: Options, **__: Any) -> RetryingStore:
        client = FaultStore(self.bucket)
        client.hook = self._hold_up
        return RetryingStore(client, options.retry)

    def rest(self, step: int) -> list[str]:
        """Return the shards of a step in which only optimizers are."""
        return [
            key
            for key, one in self.bucket.objects.items()
            if key.startswith(f"step-{step:010d}") and _is_rest(one.data)
        ]

    def _hold_up(self, op: Op) -> None:
        if op.verb == "get" and op.key in self.rest(int(op.key[5:15])):
            self.asked.set()
            assert self.may_go_on.wait(WAIT_S)

    def spoil_rest(self, step: int) -> None:
        for key in self.rest(step):
            data = bytearray(self.bucket.objects[key].data)
            data[-1] ^= 1
            self.bucket.objects[key].data = bytes(data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store()
    monkeypatch.setattr(manager_room, "open_store", made.opened)
    yield made
    made.may_go_on.set()


def new_state(seed: int, kind: str = "adamw", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 32)).to(dtype)
    return {"model": model, "optimizer": KINDS[kind](model.parameters()), "step": seed}


def train(state: dict[str, Any]) -> None:
    dtype = next(state["model"].parameters()).dtype
    state["model"](torch.ones(4, 32, dtype=dtype)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def bits(state: dict[str, Any]) -> list[Any]:
    held = state["optimizer"].state
    moments = [held[one][key] for one in state["model"].parameters() for key in sorted(held.get(one, {}))]
    groups = [{**group, "params": len(group["params"])} for group in state["optimizer"].param_groups]
    return [
        *(tensor.detach().clone() for tensor in [*state["model"].parameters(), *moments]),
        *(repr(sorted(group.items())) for group in groups),
        state["step"],
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1]
        for pair in zip(one, other, strict=True)
    )


def saved(step: int = 1, kind: str = "adamw", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Train a little, save, and return the state at the save; generators go along."""
    state = new_state(step, kind, dtype)
    train(state)
    with CheckpointManager(URL, options=SMALL) as manager:
        manager.save(step, state)
    return state


def opened() -> CheckpointManager:
    return CheckpointManager(URL, options=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_training_comes_to_is_what_it_comes_to_after_a_plain_restore(
    store: Store, kind: str, dtype: torch.dtype
) -> None:
    went_on = saved(kind=kind, dtype=dtype)
    ends = []
    for wait in (None, ["model"]):
        state = new_state(9, kind, dtype)
        with opened() as manager:
            assert manager.restore(state, wait=wait) is not None
            train(state)
            train(state)
        ends.append(bits(state))
    assert same(*ends)
    assert ends[0][-1] == went_on["step"]


def test_it_returns_while_moments_are_still_to_come_and_all_else_is_restored(store: Store) -> None:
    was = saved()
    drawn = torch.rand(3)
    store.may_go_on.clear()
    state = new_state(9)
    with opened() as manager:
        assert manager.restore(state, wait=["model"]) is not None
        assert store.asked.wait(WAIT_S)
        assert same([*state["model"].parameters()], [*was["model"].parameters()])
        assert state["optimizer"].param_groups[0]["lr"] == 0.1
        assert torch.equal(torch.rand(3), drawn)
        with pytest.raises(TimeoutError):
            manager.wait(0.01)
        store.may_go_on.set()
        manager.wait()
        assert same(bits(state), bits(was))


FIRST_USES: dict[str, Callable[[CheckpointManager, dict[str, Any]], object]] = {
    "step": lambda _, state: train(state),
    "state_dict": lambda _, state: state["optimizer"].state_dict(),
    "load_state_dict": lambda _, state: state["optimizer"].load_state_dict({"state": {}, "param_groups": []}),
    "deepcopy": lambda _, state: copy.deepcopy(state),
    "pickle": lambda _, state: pickle.dumps(state["optimizer"]),
    "save": lambda manager, state: manager.save(2, state),
    "async_save": lambda manager, state: manager.async_save(2, state).result(),
    "save by a function": lambda _, state: cloudckpt.save(state, "memory:///elsewhere", exists="replace"),
    "wait": lambda manager, _: manager.wait(),
    "restore": lambda manager, state: manager.restore(state),
    "close": lambda manager, _: manager.close(),
}


@contextmanager
def half_restored(store: Store) -> Iterator[tuple[CheckpointManager, dict[str, Any]]]:
    """Restore what was saved; the moments come a moment later."""
    store.may_go_on.clear()
    state = new_state(9)
    with opened() as manager:
        manager.restore(state, wait=["model"])
        assert store.asked.wait(WAIT_S)
        threading.Timer(0.02, store.may_go_on.set).start()
        yield manager, state


@pytest.mark.parametrize("use", [name for name in FIRST_USES if name != "load_state_dict"])
def test_the_first_use_waits_until_all_is_there(store: Store, use: str) -> None:
    was = saved()
    with half_restored(store) as (manager, state):
        FIRST_USES[use](manager, state)
        assert store.may_go_on.is_set()
        if use != "step":
            assert same(bits(state), bits(was))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["copy", "pickle"]
)
def test_a_copy_that_is_made_before_all_is_there_is_one_of_the_whole(
    store: Store, copied: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    was = saved()
    with half_restored(store) as (manager, state):
        made = copied(state)
        assert same(bits(made), bits(was))
        manager.wait()
    assert "__getstate__" not in vars(made["optimizer"])


@pytest.mark.parametrize("use", [name for name in FIRST_USES if name not in ("restore", "close")])
def test_damage_of_what_was_left_is_raised_at_each_use_and_an_older_step_is_not_taken_silently(
    store: Store, use: str
) -> None:
    older = saved(1)
    saved(2)
    store.spoil_rest(2)
    state = new_state(9)
    with opened() as manager:
        restored = manager.restore(state, wait=["model"])
        assert restored is not None
        assert restored.step == 2
        before = [parameter.detach().clone() for parameter in state["model"].parameters()]
        for _ in range(2):
            with pytest.raises((RestoreFailedError, SaveFailedError), match=r"optimizer.*restore again without wait="):
                FIRST_USES[use](manager, state)
        assert same(before, [*state["model"].parameters()])
        assert manager.all_steps() == [1, 2]
        again = manager.restore(state)
        assert again is not None
        assert again.step == 1
        assert same(bits(state), bits(older))
        train(state)
        manager.save(3, state)


def test_a_restore_of_a_part_leaves_what_is_not_whole_as_unusable_as_it_was(store: Store) -> None:
    saved(1)
    saved(2)
    store.spoil_rest(2)
    state = new_state(9)
    with opened() as manager:
        manager.restore(state, wait=["model"])
        manager.restore(state, 1, only=["model"])
        with pytest.raises(RestoreFailedError):
            state["optimizer"].step()
        with pytest.raises(cloudckpt.CheckpointNotFoundError):
            manager.restore(state, 7)
        with pytest.raises(RestoreFailedError):
            state["optimizer"].step()
        manager.restore(state, 1)
        train(state)


def test_what_is_set_after_the_return_stays(store: Store) -> None:
    saved()
    store.may_go_on.clear()
    state = new_state(9)
    with opened() as manager:
        manager.restore(state, wait=["model"])
        state["optimizer"].param_groups[0]["lr"] = 0.5
        store.may_go_on.set()
        train(state)
        assert state["optimizer"].param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_is_named_is_whole_at_the_return(store: Store) -> None:
    was, state = saved(), new_state(9)
    with opened() as manager:
        manager.restore(state, wait=["model", "optimizer"])
        assert same(bits(state), bits(was))
        manager.restore(new_state(8), wait="model")


@pytest.mark.parametrize(("wait", "why"), [([], "one or more names"), ([1], "one or more names"), ("modle", "'modle'")])
def test_names_that_mean_nothing_are_refused_and_nothing_is_changed(store: Store, wait: Any, why: str) -> None:
    saved()
    state = new_state(9)
    before = bits(state)
    with opened() as manager, pytest.raises(OptionsError, match=why):
        manager.restore(state, wait=wait)
    assert same(bits(state), before)


def test_no_hook_is_left_behind(store: Store) -> None:
    saved()
    state = new_state(9)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_state_dict_pre_hooks", "_optimizer_load_state_dict_pre_hooks")
    with opened() as manager:
        manager.restore(state, wait=["model"])
        assert all(getattr(state["optimizer"], name) for name in hooks)
        manager.save(2, state)
        assert not any(getattr(state["optimizer"], name) for name in hooks)


class Notice:
    """Gives notice of an end that stays as far ahead as it was, until it has passed."""

    def __init__(self, seconds: float) -> None:
        self._left_s, self._now_s, self._heard = seconds, 0.0, threading.Event()

    def clock(self) -> float:
        return self._now_s

    def _check(self) -> float:
        self._heard.set()
        return self._left_s - self._now_s

    @contextmanager
    def given(self, url: str = URL, options: Options = SMALL) -> Iterator[CheckpointManager]:
        """Open a manager that has heard it."""
        with Preemption(signals=(), sources=(), check=self._check, clock=self.clock) as preemption:
            assert self._heard.wait(WAIT_S)
            while not preemption.notice:
                time.sleep(0.001)
            with CheckpointManager(url, options=options, preemption=preemption, clock=self.clock) as manager:
                yield manager

    def passes(self) -> None:
        self._now_s = self._left_s + 1.0


SAVES: dict[str, Callable[[CheckpointManager, dict[str, Any]], object]] = {
    "save": lambda manager, state: manager.save(2, state),
    "async_save": lambda manager, state: manager.async_save(2, state).result(),
    "save_parts": lambda manager, state: manager.save_parts(2, state).commit(),
    "save of what is here": lambda manager, state: manager.save(2, {"model": state["model"]}),
}


@pytest.mark.parametrize("how", SAVES)
def test_a_save_at_a_notice_gives_up_before_the_end_what_is_still_to_come_and_commits_no_mixture(
    store: Store, how: str
) -> None:
    was, state, notice = saved(), new_state(9), Notice(0.5)
    store.may_go_on.clear()
    with notice.given() as manager:
        manager.restore(state, wait=["model"])
        with pytest.raises(SaveFailedError, match=r"the state of optimizer, which restore.*made no step"):
            SAVES[how](manager, state)
        assert manager.all_steps() == [1]
        notice.passes()
        store.may_go_on.set()
        manager.wait()
        assert same(bits(state), bits(was)), "the notice was false, and all goes on"
        manager.save(2, state)
        assert manager.all_steps() == [1, 2]


def test_a_save_at_a_notice_takes_what_is_still_to_come_if_that_comes_in_time(store: Store) -> None:
    was, state, found = saved(), new_state(9), new_state(8)
    store.may_go_on.clear()
    with Notice(WAIT_S).given() as manager:
        manager.restore(state, wait=["model"])
        assert manager.should_save(2)
        threading.Timer(0.02, store.may_go_on.set).start()
        manager.save(2, state)
        assert manager.preempted
        manager.restore(found, 2)
    assert same(bits(found), bits(was))


def test_the_end_of_a_job_that_is_to_go_waits_no_longer_than_its_machine_is_there(store: Store) -> None:
    saved()
    store.may_go_on.clear()
    state = new_state(9)
    with Notice(0.5).given() as manager:
        manager.restore(state, wait=["model"])
        assert store.asked.wait(WAIT_S)
    assert not store.may_go_on.is_set()
    store.may_go_on.set()
    with pytest.raises(RestoreFailedError, match="given up"):
        state["optimizer"].step()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_a_manager_that_is_left_by_an_error_reads_nothing_more(store: Store, kind: type[BaseException]) -> None:
    saved()
    store.may_go_on.clear()
    state = new_state(9)
    manager = opened()
    manager.restore(state, wait=["model"])
    assert store.asked.wait(WAIT_S)
    manager.__exit__(kind, kind(), None)
    store.may_go_on.set()
    with pytest.raises(RestoreFailedError, match="given up"):
        state["optimizer"].step()


def test_an_interrupt_while_the_rest_begins_leaves_nothing_half_filled_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved()

    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    state = new_state(9)
    with opened() as manager:
        monkeypatch.setattr("cloudckpt.loading.rest.begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.restore(state, wait=["model"])
        with pytest.raises(RestoreFailedError, match="given up"):
            state["optimizer"].step()
        monkeypatch.undo()


def test_where_there_is_no_thread_left_all_is_whole_at_the_return(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    was, state = saved(), new_state(9)

    def refused(_: threading.Thread) -> None:
        raise CloudCkptError("a thread could not be started")

    with opened() as manager:
        monkeypatch.setattr("cloudckpt.loading.rest.begin", refused)
        manager.restore(state, wait=["model"])
        monkeypatch.undo()
        assert same(bits(state), bits(was))


def test_a_fork_of_the_process_is_told_to_restore_by_itself(store: Store) -> None:
    was, state = saved(), new_state(9)
    store.may_go_on.clear()
    with opened() as manager:
        manager.restore(state, wait=["model"])
        assert store.asked.wait(WAIT_S)
        child = os.fork()
        if not child:
            code = 1
            try:
                state["optimizer"].step()
            except RestoreFailedError as exc:
                code = 0 if "restore it here, too" in str(exc) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        store.may_go_on.set()
        manager.wait()
        assert same(bits(state), bits(was))


def test_copies_that_an_optimizer_makes_are_filled_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    was, state = saved(), new_state(9)
    load = torch.optim.AdamW.load_state_dict

    def copied(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for parts in self.state.values():
            parts.update({key: part.clone() for key, part in parts.items()})

    monkeypatch.setattr("cloudckpt.state.optimizers.NamedEntry.load_numbered", _numbered(copied))
    with opened() as manager:
        manager.restore(state, wait=["model"])
        manager.wait()
        assert same(bits(state), bits(was))


def _numbered(load: Callable[[Any, Any], None]) -> Callable[..., None]:
    def load_numbered(self: OptimizerEntry, restored: Any, state: Any, groups: Any) -> None:
        load(self.subject, {**restored, "state": dict(state), "param_groups": list(groups)})

    return load_numbered


# -- ranks --------------------------------------------------------------------------------------------------

ONCE = Options(
    shard_bytes=8 * KIB, block_bytes=KIB, span_bytes=2 * KIB, read_once="always", memory_budget_bytes=64 * KIB
)


def _state_of_rank(kind: str, seed: int) -> dict[str, Any]:
    state = new_state(seed)
    if kind == "sharded":
        fully_shard(state["model"], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        state["optimizer"] = torch.optim.AdamW(state["model"].parameters(), lr=0.1)
    return state


def _train_here(state: dict[str, Any]) -> None:
    state["model"](torch.ones(4, 32)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def _local_bits(state: dict[str, Any]) -> list[Any]:
    return [one.to_local() if isinstance(one, DTensor) else one for one in bits(state)]


def _resume(url: str, kind: str) -> None:
    state = _state_of_rank(kind, 1)
    _train_here(state)
    with CheckpointManager(url, options=ONCE) as manager:
        manager.save(1, state)
    ends = []
    for step, wait in ((2, None), (3, ["model"])):
        state = _state_of_rank(kind, 9)
        with CheckpointManager(url, options=ONCE) as manager:
            assert manager.restore(state, 1, wait=wait) is not None
            for _ in range(3):
                dist.barrier()  # a trainer's own traffic, meanwhile
            torch.manual_seed(3)
            _train_here(state)
            manager.save(step, state)
            _train_here(state)
        ends.append(_local_bits(state))
    assert same(*ends)


@pytest.mark.parametrize("kind", ["alike", "sharded"])
def test_ranks_come_to_the_same_as_after_a_plain_restore(tmp_path: Path, kind: str) -> None:
    run(2, _resume, str(tmp_path), kind)


def _damaged(url: str) -> list[str]:
    for step in (1, 2):
        state = _state_of_rank("alike", step)
        _train_here(state)
        with CheckpointManager(url, options=ONCE) as manager:
            manager.save(step, state)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in Path(url).glob("step-0000000002*/*/*.safetensors"):
            data = bytearray(path.read_bytes())
            if _is_rest(data):
                data[-1] ^= 1
                path.write_bytes(data)
    dist.barrier()
    state, told = _state_of_rank("alike", 9), []
    with CheckpointManager(url, options=ONCE) as manager:
        manager.restore(state, wait=["model"])
        for use in (lambda: _train_here(state), lambda: manager.save(3, state)):
            try:
                use()
            except CloudCkptError as exc:
                told.append(f"{type(exc).__name__}: {exc}")
        restored = manager.restore(state)
        assert restored is not None
        told.append(str(restored.step))
        _train_here(state)
        manager.save(4, state)
    return told


def test_damage_of_what_was_left_is_raised_on_every_rank(tmp_path: Path) -> None:
    for first, second, step in run(2, _damaged, str(tmp_path)):
        assert first.startswith("RestoreFailedError")
        assert "restore again without wait=" in second
        assert step == "1"


def _preempted(url: str) -> list[str]:
    state = _state_of_rank("alike", 1)
    _train_here(state)
    with CheckpointManager(url, options=ONCE) as manager:
        manager.save(1, state)
    may_go_on, read = threading.Event(), lead_room._Filling.read

    def held_up(self: Any, source: Any) -> None:
        if threading.current_thread().name == "cloudckpt-restore":
            assert may_go_on.wait(WAIT_S)
        read(self, source)

    lead_room._Filling.read = held_up  # type: ignore[method-assign]
    found, told, notice = _state_of_rank("alike", 9), [], Notice(0.5)
    with notice.given(url, ONCE) as manager:
        manager.restore(found, wait=["model"])
        try:
            manager.save(2, found)
        except SaveFailedError as exc:
            told.append(str(exc))
        told.append(str(manager.all_steps()))
        notice.passes()
        may_go_on.set()
        manager.wait()
        manager.save(2, found)
        told.append(str(manager.all_steps()))
    assert same(_local_bits(state), _local_bits({**found, "step": 1}))
    return told


def test_a_save_at_a_notice_gives_up_on_every_rank_what_is_still_to_come(tmp_path: Path) -> None:
    for why, before, after in run(2, _preempted, str(tmp_path)):
        assert "made no step since" in why
        assert (before, after) == ("[1]", "[1, 2]")


def _other_names(url: str) -> str:
    state = _state_of_rank("alike", 1)
    with CheckpointManager(url, options=ONCE) as manager:
        manager.save(1, state)
        try:
            manager.restore(state, wait=["model"] if dist.get_rank() else None)
        except CloudCkptError as exc:
            return str(exc)
    return ""


def test_ranks_that_wait_for_other_names_are_told_so(tmp_path: Path) -> None:
    for error in run(2, _other_names, str(tmp_path)):
        assert "model first" in error
