"""What is read before a restore asks for it saves time, and changes nothing else: what is restored is the same."""

from __future__ import annotations

import logging
import os
import random
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cloudckpt
import cloudckpt.ahead as ahead_room
import cloudckpt.manager.manager as manager_room
from cloudckpt import CheckpointManager, Options, OptionsError, Prefetch
from cloudckpt.ahead import Ahead
from cloudckpt.options import KIB
from cloudckpt.store import RetryingStore
from raw_access import FreshPrefix
from tests.ranks.processes import run
from tests.store.fault_store import Bucket, FaultKind, FaultStore, Op, denied
from tests.test_import import modules_after

SMALL = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=2, memory_budget_bytes=64 * KIB)
WAIT_S = 60.0


@dataclass
class Clients:
    """All clients of one bucket, and what is done before their requests."""

    bucket: Bucket = field(default_factory=Bucket)
    ahead: FaultStore = field(init=False)
    managers: list[FaultStore] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ahead = FaultStore(self.bucket)

    def opened(self, *_: Any, options: Options, **__: Any) -> RetryingStore:
        self.managers.append(FaultStore(self.bucket))
        return RetryingStore(self.managers[-1], options.retry)

    def opened_ahead(self, *_: Any, options: Options, **__: Any) -> RetryingStore:
        return RetryingStore(self.ahead, options.retry)

    def read_by_manager(self, verb: str = "get") -> list[str]:
        return [op.key for op in self.managers[-1].trace if op.verb == verb]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Clients:
    made = Clients()
    monkeypatch.setattr(manager_room, "open_store", made.opened)
    monkeypatch.setattr(ahead_room, "open_store", made.opened_ahead)
    return made


def new_state(seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1500, generator=draw) for name in ("w", "m", "v")}


def save(step: int, seed: int) -> None:
    with CheckpointManager("memory://bucket/root", options=SMALL) as manager:
        manager.save(step, new_state(seed))


def restored(options: Options = SMALL) -> tuple[int, dict[str, Any]]:
    state = new_state(0)
    with CheckpointManager("memory://bucket/root", options=options) as manager:
        checkpoint = manager.restore(state)
        assert checkpoint is not None
        return checkpoint.step, state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def begun(options: Options = SMALL) -> Prefetch:
    return cloudckpt.prefetch("memory://bucket/root", options=options)


def test_what_was_read_ahead_is_not_read_again_and_restores_the_same(clients: Clients) -> None:
    save(1, seed=1)
    held = begun()
    assert held.wait(WAIT_S)
    assert held.held_bytes > 3 * 1500 * 4
    step, state = restored()
    assert (step, same(state, new_state(1))) == (1, True)
    assert clients.read_by_manager() == []
    assert not any(key.endswith("index.bin") for key in clients.read_by_manager("read"))
    assert held.held_bytes == 0


def test_a_commit_that_came_after_it_was_read_is_what_is_restored(clients: Clients) -> None:
    save(1, seed=1)
    assert begun().wait(WAIT_S)
    save(2, seed=2)
    step, state = restored()
    assert (step, same(state, new_state(2))) == (2, True)


def test_a_checkpoint_that_went_after_it_was_read_is_not_restored(clients: Clients) -> None:
    save(1, seed=1)
    save(2, seed=2)
    assert begun().wait(WAIT_S)
    with CheckpointManager("memory://bucket/root", options=SMALL) as manager:
        manager.restore(new_state(0), 1)  # the bytes of another step are of no use to it
        manager.delete(2)
    assert begun().wait(WAIT_S)
    assert restored()[0] == 1


def test_bytes_that_were_spoilt_on_the_way_are_read_again_from_the_store(clients: Clients) -> None:
    save(1, seed=1)
    fault = clients.ahead.inject(kind=FaultKind.FLIP, verbs=["get"], key=".safetensors", times=None)
    assert begun().wait(WAIT_S)
    assert same(restored()[1], new_state(1))
    assert fault.fired > 1
    assert len(clients.read_by_manager()) == fault.fired


def test_a_store_that_refuses_is_told_to_the_log_and_the_restore_reads_by_itself(
    clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    save(1, seed=1)
    clients.ahead.inject(error=denied, times=None, verbs=["get"], key=".safetensors")
    with caplog.at_level(logging.WARNING):
        assert begun().wait(WAIT_S)
    assert "is not read ahead of a restore, which will read by itself: injected" in caplog.text
    assert same(restored()[1], new_state(1))


def test_an_empty_root_and_a_save_that_never_committed_hold_nothing(clients: Clients) -> None:
    held = begun()
    assert held.wait(WAIT_S)
    clients.bucket.raw_put("step-0000000007-e0001/0123456789abcdef/index.bin", b"x")
    again = begun()
    assert again.wait(WAIT_S)
    assert (held.held_bytes, again.held_bytes) == (0, 0)


def test_no_more_is_held_than_the_budget_and_the_restore_reads_the_rest(clients: Clients) -> None:
    save(1, seed=1)
    tight = Options(
        shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=2, memory_budget_bytes=10 * KIB
    )
    held = begun(tight)
    assert held.wait(WAIT_S)
    assert 0 < held.held_bytes <= 10 * KIB
    assert same(restored()[1], new_state(1))
    assert clients.read_by_manager() != []


def test_a_restore_waits_only_for_what_is_on_its_way(clients: Clients) -> None:
    save(1, seed=1)
    asked, may_go_on = threading.Event(), threading.Event()

    def hook(op: Op) -> None:
        if op.verb == "get" and op.key.endswith(".safetensors"):
            asked.set()
            assert may_go_on.wait(WAIT_S)

    clients.ahead.hook = hook
    held = begun()
    assert asked.wait(WAIT_S)
    threading.Timer(0.05, may_go_on.set).start()
    assert same(restored()[1], new_state(1))
    assert held.wait(WAIT_S)
    shards = [op.key for op in clients.ahead.trace if op.verb == "get" and op.key.endswith(".safetensors")]
    assert len(shards) <= SMALL.concurrency, "after the restore has begun, nothing more is begun here"


def test_one_that_begins_while_the_root_is_still_listed_reads_by_itself(clients: Clients) -> None:
    save(1, seed=1)
    may_go_on = threading.Event()
    clients.ahead.hook = lambda _: may_go_on.wait(WAIT_S)
    held = begun()
    assert same(restored()[1], new_state(1))
    may_go_on.set()
    assert held.wait(WAIT_S)
    assert "get" not in [op.verb for op in clients.ahead.trace]


def test_who_closes_it_frees_what_it_holds_and_its_store(clients: Clients) -> None:
    save(1, seed=1)
    with begun() as held:
        assert held.wait(WAIT_S)
    assert held.held_bytes == 0
    assert clients.ahead.is_closed
    assert same(restored()[1], new_state(1))
    assert len(clients.read_by_manager()) > 0


def test_a_second_one_of_a_root_takes_the_place_of_the_first(clients: Clients) -> None:
    save(1, seed=1)
    first = begun()
    assert first.wait(WAIT_S)
    second = begun()
    assert second.wait(WAIT_S)
    assert (first.held_bytes, second.held_bytes > 0) == (0, True)
    second.close()


def _of_ranks(clients: Clients, count: int) -> None:
    """Let each rank have three shards, as a save of so many would."""
    attempt = "step-0000000001-e0001/0123456789abcdef"
    clients.bucket.raw_put("step-0000000001-e0001/manifest.json", b"{}")
    clients.bucket.raw_put(f"{attempt}/index.bin", b"index")
    for rank in range(count):
        for number in range(3):
            clients.bucket.raw_put(f"{attempt}/r{rank:05d}-{number:04d}.safetensors", bytes(3 * KIB))


@pytest.mark.parametrize(
    ("rank", "saved_by", "read"),
    [
        ("0", 2, ["index.bin", "r00000-0000", "r00000-0001", "r00000-0002"]),
        ("1", 2, ["r00001-0000", "r00001-0001", "r00001-0002"]),
        ("1", 3, []),
        ("1", 1, []),
        ("", 2, []),
        ("7", 2, []),
    ],
)
def test_a_rank_of_several_reads_its_own_shards_if_as_many_saved_them_and_else_says_that_it_reads_none(
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str,
    saved_by: int,
    read: list[str],
) -> None:
    _of_ranks(clients, saved_by)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "cloudckpt"), begun() as held:
        assert held.wait(WAIT_S)
    asked = [op.key.rpartition("/")[2].removesuffix(".safetensors") for op in clients.ahead.trace if op.verb == "get"]
    assert sorted(set(asked)) == read
    assert ("only the connection and the listing are ahead" in caplog.text) is (read == [])


def _ahead_of_ranks(url: str) -> tuple[int, int, list[str]]:
    rank = dist.get_rank()
    shape = (64, 64)

    def state(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {"sharded": distribute_tensor(torch.randn(shape), mesh, [Shard(0)]), "alike": torch.randn(shape)}

    options = replace(SMALL, read_once="always")
    with CheckpointManager(url, options=options) as manager:
        manager.save(1, state(1))
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(dist.get_world_size())
    asked: list[str] = []
    stream = RetryingStore.stream

    def noted(self: RetryingStore, key: str, **given: Any) -> None:
        asked.append(key)
        stream(self, key, **given)

    with cloudckpt.prefetch(url, options=options) as held, CheckpointManager(url, options=options) as manager:
        assert held.wait(WAIT_S)
        ahead_bytes = held.held_bytes
        found = state(2)
        RetryingStore.stream = noted  # type: ignore[method-assign]
        manager.restore(found)
        RetryingStore.stream = stream  # type: ignore[method-assign]
        assert torch.equal(found["sharded"].to_local(), state(1)["sharded"].to_local())
        assert torch.equal(found["alike"], state(1)["alike"])
        return ahead_bytes, held.held_bytes, [key for key in asked if key.endswith(".safetensors")]


def test_ranks_restore_sharded_and_replicated_tensors_from_what_each_has_read_ahead(tmp_path: Path) -> None:
    for ahead_bytes, left_bytes, asked in run(2, _ahead_of_ranks, str(tmp_path)):
        assert ahead_bytes > 64 * 64 * 4
        assert (left_bytes, asked) == (0, [])


@pytest.mark.parametrize("only", ["m", ["m", "v"], ["w"]])
def test_only_what_is_named_is_read_ahead_just_as_the_restore_of_it_reads_it(clients: Clients, only: Any) -> None:
    save(1, seed=1)
    held = cloudckpt.prefetch("memory://bucket/root", options=SMALL, only=only)
    assert held.wait(WAIT_S)
    names = [only] if isinstance(only, str) else only
    assert len(names) * 6000 < held.held_bytes < len(names) * 6000 + 4 * KIB + 2 * KIB * len(names)
    state, whole = new_state(0), new_state(1)
    with CheckpointManager("memory://bucket/root", options=SMALL) as manager:
        manager.restore(state, only=only)
    assert clients.read_by_manager() == []
    assert all(torch.equal(state[name], whole[name]) is (name in names) for name in state)
    assert held.held_bytes == 0


def test_of_shards_that_others_hold_what_is_named_is_read_ahead(tmp_path: Path) -> None:
    state = new_state(1)
    with CheckpointManager(tmp_path, options=SMALL, reuse_unchanged=True) as manager:
        manager.save(1, state)
        state["w"].add_(1)
        manager.save(2, state)
    with cloudckpt.prefetch(tmp_path, options=SMALL, only=["m"]) as held:
        assert held.wait(WAIT_S)
        assert held.held_bytes > 6000
        found = new_state(0)
        with CheckpointManager(tmp_path, options=SMALL) as manager:
            manager.restore(found, only="m")
        assert (held.held_bytes, torch.equal(found["m"], state["m"])) == (0, True)


@pytest.mark.parametrize("only", [[], "", [1]])
def test_names_that_mean_nothing_are_refused(tmp_path: Path, only: Any) -> None:
    with pytest.raises(OptionsError, match="one or more names"):
        cloudckpt.prefetch(tmp_path, only=only)


def test_a_load_of_one_checkpoint_has_its_bytes_from_there(tmp_path: Path) -> None:
    cloudckpt.save(new_state(1), tmp_path / "c", options=SMALL)
    with cloudckpt.prefetch(tmp_path / "c", options=SMALL) as held:
        assert held.wait(WAIT_S)
        before = held.held_bytes
        state = new_state(0)
        cloudckpt.load(state, tmp_path / "c")
        assert (before > 3 * 1500 * 4, held.held_bytes, same(state, new_state(1))) == (True, 0, True)


def test_it_reads_from_a_real_server_over_a_connection_that_the_restore_shares(s3_url: FreshPrefix) -> None:
    options = s3_url.storage_options
    with CheckpointManager(s3_url.url, storage_options=options, options=SMALL) as manager:
        manager.save(1, new_state(1))
    with cloudckpt.prefetch(s3_url.url, storage_options=options, options=SMALL) as held:
        assert held.wait(WAIT_S)
        before, found = held.held_bytes, new_state(0)
        with CheckpointManager(s3_url.url, storage_options=options, options=SMALL) as manager:
            manager.restore(found, wait=["w"])
        assert (before > 3 * 1500 * 4, held.held_bytes, same(found, new_state(1))) == (True, 0, True)


def test_a_checkpoint_whose_shards_others_hold_is_found_as_without(tmp_path: Path) -> None:
    state = new_state(1)
    with CheckpointManager(tmp_path, options=SMALL, reuse_unchanged=True) as manager:
        manager.save(1, state)
        state["w"].add_(1)
        sharing = manager.save(2, state)
    assert sharing is not None
    assert sharing.manifest.held_elsewhere
    for url in (tmp_path, sharing.url):
        with cloudckpt.prefetch(url, options=SMALL) as held:
            assert held.wait(WAIT_S)
            found = new_state(0)
            if url == tmp_path:
                with CheckpointManager(url, options=SMALL) as manager:
                    manager.restore(found)
            else:
                cloudckpt.load(found, url, options=SMALL)
            assert same(found, state)


def test_a_wrong_url_is_refused_at_once() -> None:
    with pytest.raises(OptionsError, match="nosuch"):
        cloudckpt.prefetch("nosuch://bucket/root")


def test_it_needs_nothing_of_torch(tmp_path: Path) -> None:
    cloudckpt.save(new_state(1), tmp_path / "c")
    loaded = modules_after(
        f"import cloudckpt\nheld = cloudckpt.prefetch({str(tmp_path / 'c')!r})\n"
        f"assert held.wait({WAIT_S}) and held.held_bytes > 0"
    )
    assert not [name for name in loaded if name.partition(".")[0] == "torch"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_asked_for_in_whatever_order_is_what_the_store_has(seed: int, clients: Clients) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(3000)
    attempt = "step-0000000001-e0001/0123456789abcdef"
    key = f"{attempt}/r00000-0000.safetensors"
    for name, text in {
        key: data,
        f"{attempt}/index.bin": b"index",
        "step-0000000001-e0001/manifest.json": b"{}",
    }.items():
        clients.bucket.raw_put(name, text)
    clients.ahead.inject(error=denied, verbs=["get"], key=key, skip=draw.randrange(4))
    options = Options(shard_bytes=KIB, block_bytes=100, span_bytes=500, memory_budget_bytes=64 * KIB, concurrency=1)
    with begun(options) as held, RetryingStore(FaultStore(clients.bucket), SMALL.retry) as store:
        assert held.wait(WAIT_S)
        fronted = Ahead([store]).over(store)
        for _ in range(12):
            start = draw.randrange(3000)
            stop = draw.randrange(start, 3001)
            into = memoryview(bytearray(stop - start)) if draw.random() < 0.5 else None
            assert bytes(fronted.get(key, start=start, stop=stop, into=into)) == data[start:stop]
