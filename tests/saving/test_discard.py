"""A save that failed takes with it what it wrote, if no commit of it can follow; nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, CloudWriter, CommitUnknownError, Options, RetryPolicy
from cloudckpt.format import MANIFEST_NAME
from cloudckpt.options import KIB
from cloudckpt.root import Catalog
from cloudckpt.store import RetryingStore
from cloudckpt.store.disk import Disk
from cloudckpt.store.local import LocalStore
from cloudckpt.store.probe import _proven
from tests.ranks.processes import run
from tests.store.fault_store import Bucket, FaultKind, FaultStore, denied, refused, transient

OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, memory_budget_bytes=64 * KIB)
ROOT = "memory://bucket/root"
DAY_S = 86_400.0


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultStore]:
    made = FaultStore(Bucket())

    def opened(*_: object, **__: object) -> RetryingStore:
        return RetryingStore(made, RetryPolicy(max_attempts=2), sleep=lambda _: None)

    for room in ("manager.manager", "checkpoint", "dcp.address"):
        monkeypatch.setattr(f"cloudckpt.{room}.open_store", opened)
    _proven.clear()
    yield made
    _proven.clear()


def state_of(value: int) -> dict[str, object]:
    return {"w": torch.full((3_000,), float(value)), "n": value}


def objects(client: FaultStore) -> set[str]:
    return {key for key in client.bucket.raw_list() if not key.startswith(("probe", "epochs"))}


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize(("verb", "key"), [("put", "r00000-0002"), ("put", "index.bin"), ("create", MANIFEST_NAME)])
def test_a_failed_save_of_a_manager_leaves_nothing(client: FaultStore, how: str, verb: str, key: str) -> None:
    with CheckpointManager(ROOT, options=OPTIONS, save_rng=False, progress="off") as manager:
        manager.save(1, state_of(1))
        before = objects(client)
        client.inject(verbs=[verb], key=key, error=denied, times=None)
        with pytest.raises(CloudCkptError, match="injected"):
            _saved(manager, how)
        assert objects(client) == before
        client.faults.clear()
        assert manager.save(2, state_of(2)).step == 2


def _saved(manager: CheckpointManager, how: str) -> None:
    getattr(manager, how)(2, state_of(2))
    manager.wait()


def test_a_fenced_save_leaves_nothing(client: FaultStore) -> None:
    with CheckpointManager(ROOT, options=OPTIONS, save_rng=False, progress="off") as old:
        old.save(1, state_of(1))
        Catalog(FaultStore(client.bucket)).claims.claim()
        before = objects(client)
        with pytest.raises(cloudckpt.FencedError):
            old.save(2, state_of(2))
        assert objects(client) == before


@pytest.mark.parametrize("kind", [FaultKind.LOST_ACK, FaultKind.LATE])
def test_a_save_that_may_be_committed_keeps_all_its_objects(client: FaultStore, kind: FaultKind) -> None:
    with CheckpointManager(ROOT, options=OPTIONS, save_rng=False, progress="off") as manager:
        client.inject(verbs=["create"], key=MANIFEST_NAME, kind=kind, error=transient, times=None)
        client.inject(verbs=["read", "head"], key=MANIFEST_NAME, error=denied, times=None)
        with pytest.raises(CommitUnknownError):
            manager.save(1, state_of(1))
        client.faults.clear()
        client.bucket.deliver_late()
        state = state_of(0)
        assert manager.restore(state) is not None
        assert state["n"] == 1


def test_an_error_after_the_commit_deletes_nothing_of_it(client: FaultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt(*_: object, **__: object) -> None:
        raise CloudCkptError("it was committed, and then this")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "adopt", adopt)
        with pytest.raises(CloudCkptError, match="and then this"):
            cloudckpt.save(state_of(1), ROOT, options=OPTIONS, progress="off")
    assert cloudckpt.read(ROOT, "n") == {"n": 1}
    assert torch.equal(cloudckpt.read(ROOT)["w"], state_of(1)["w"])  # type: ignore[arg-type]


@pytest.mark.parametrize("exists", ["raise", "replace"])
def test_a_failed_save_to_a_url_leaves_what_was_there(client: FaultStore, exists: str) -> None:
    if exists == "replace":
        cloudckpt.save(state_of(1), ROOT, options=OPTIONS, progress="off")
    before = objects(client)
    client.inject(verbs=["put"], key="index.bin", error=refused, times=None)
    with pytest.raises(CloudCkptError):
        cloudckpt.save(state_of(2), ROOT, options=OPTIONS, progress="off", exists=exists)  # type: ignore[arg-type]
    assert objects(client) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("key", ["r00000-0002", "index.bin", MANIFEST_NAME])
def test_a_failed_save_through_dcp_leaves_nothing(client: FaultStore, key: str) -> None:
    client.inject(verbs=["put", "create"], key=key, error=denied, times=None)
    with pytest.raises(CheckpointException, match="injected"):
        dcp.save({"w": torch.zeros(3_000)}, storage_writer=CloudWriter(ROOT, options=OPTIONS), no_dist=True)
    assert objects(client) == set()


def test_what_cannot_be_removed_hides_no_error(client: FaultStore, caplog: pytest.LogCaptureFixture) -> None:
    client.inject(verbs=["put"], key="index.bin", error=refused, times=None)
    client.inject(verbs=["delete"], key="index.bin", error=denied, times=None)
    with pytest.raises(CloudCkptError, match="injected into put"):
        cloudckpt.save(state_of(1), ROOT, options=OPTIONS, progress="off")
    assert "stays for a sweep" in caplog.text


def test_a_save_at_a_url_removes_attempts_that_were_cut_off_long_ago(client: FaultStore) -> None:
    cloudckpt.save(state_of(1), ROOT, options=OPTIONS, progress="off")
    client.bucket.raw_put("0" * 16 + "/r00000-0000.safetensors", b"cut off")
    client.bucket.raw_put("0" * 16 + f"/{MANIFEST_NAME}", b"kept aside")
    client.bucket.advance(DAY_S)
    client.bucket.raw_put("1" * 16 + "/r00000-0000.safetensors", b"under way, perhaps")
    client.bucket.raw_put("notes/mine.txt", b"a stranger's")
    cloudckpt.save(state_of(2), ROOT, options=OPTIONS, progress="off", exists="replace")
    assert cloudckpt.read(ROOT, "n") == {"n": 2}
    tops = {key.partition("/")[0] for key in objects(client)}
    assert len(tops) == 4
    assert "0" * 16 not in tops


class _FullDisk(Disk):
    """A disk of so many bytes, told by what is written to it and what is removed."""

    def __init__(self, size_bytes: int, root: Path) -> None:
        super().__init__()
        self.size_bytes = size_bytes
        self.root = root

    def write(self, fd: int, buffers: object, *, offset: int) -> int:
        held = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        taken = sum(memoryview(buffer).nbytes for buffer in buffers)  # type: ignore[attr-defined]
        if held + taken > self.size_bytes:
            raise OSError(errno.ENOSPC, "no space left")
        return super().write(fd, buffers, offset=offset)  # type: ignore[arg-type]


def test_a_full_disk_has_its_space_back_and_no_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    store = LocalStore(root, disk=_FullDisk(100 * KIB, root))
    monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: RetryingStore(store, RetryPolicy()))
    with CheckpointManager(root, options=OPTIONS, save_rng=False, progress="off") as manager:
        for step in range(3):
            with pytest.raises(CloudCkptError, match="no room left"):
                manager.save(step, {"w": torch.zeros(50_000)})
            assert sorted(path.name for path in root.iterdir()) == ["epochs"]
        assert manager.save(4, {"w": torch.zeros(15_000)}).step == 4


def _fail_on_rank_1(url: str) -> None:
    rank = int(os.environ["RANK"])
    put = LocalStore.put

    def refuse(store: LocalStore, key: str, buffers: Sequence[memoryview]) -> None:
        if rank == 1 and "step-0000000002" in key:
            raise OSError(errno.EDQUOT, "no quota left")
        put(store, key, buffers)

    LocalStore.put = refuse  # type: ignore[method-assign]
    state: dict[str, object] = {f"w{number}": torch.full((4_096,), float(number)) for number in range(4)}
    with CheckpointManager(url, options=Options(progress_timeout_s=60), progress="off") as manager:
        manager.save(1, state)
        with pytest.raises(CloudCkptError):
            manager.save(2, state)
        manager.save(3, state)


def test_what_other_ranks_wrote_of_a_failed_save_goes_too(tmp_path: Path) -> None:
    run(2, _fail_on_rank_1, str(tmp_path))
    tops = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step-"))
    assert tops == ["step-0000000001-e0001", "step-0000000003-e0001"]
