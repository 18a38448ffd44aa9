"""A disk that hangs in a system call ends by the same limits as a store that does not answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloudckpt import CheckpointManager, Options, Preemption, RetryExhaustedError, RetryPolicy, StalledError
from cloudckpt.errors import CommitUnknownError
from cloudckpt.store import hands
from cloudckpt.store.hands import lent
from cloudckpt.store.local import LocalStore
from cloudckpt.store.retrying import RetryingStore
from tests.store.engines import VERBS
from tests.store.fault_disk import FaultDisk

# The saves before the disk hangs are to end in it, also on a machine that is busy.
HASTY = RetryPolicy(max_attempts=2, deadline_s=1.5, backoff_base_s=0.001)
PATIENCE_S = 30.0


class HungDisk(FaultDisk):
    """A disk one of whose calls does not come back before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.hangs = ""
        self.entered = threading.Event()
        self.before = self._hang

    def _hang(self, name: str) -> None:
        if name == self.hangs:
            self.entered.set()
            self.released.wait(PATIENCE_S)


@pytest.fixture
def disk() -> Iterator[HungDisk]:
    disk = HungDisk()
    yield disk
    disk.released.set()


def store_on(disk: HungDisk, root: Path, policy: RetryPolicy = HASTY) -> RetryingStore:
    store = RetryingStore(LocalStore(root, disk=disk), policy)
    store.put("there", [memoryview(bytes(100))])
    return store


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_by_its_deadline(tmp_path: Path, disk: HungDisk, verb: str) -> None:
    store = store_on(disk, tmp_path)
    disk.hangs = "open_path"
    with pytest.raises((RetryExhaustedError, CommitUnknownError), match="the disk does not answer"):
        VERBS[verb](store)


def test_a_create_that_hangs_in_its_link_may_have_landed(tmp_path: Path, disk: HungDisk) -> None:
    store = store_on(disk, tmp_path)
    disk.hangs = "link"
    with pytest.raises(CommitUnknownError):
        store.create("k", b"mine")


@pytest.mark.parametrize(("verb", "call"), [("put", "sync"), ("create", "sync"), ("delete", "open_path")])
def test_what_was_left_behind_changes_nothing_when_it_comes_back(
    tmp_path: Path, disk: HungDisk, verb: str, call: str
) -> None:
    store = store_on(disk, tmp_path)
    hands._idle.clear()
    disk.hangs = call
    acts = {
        "put": lambda: store.put("k", [memoryview(b"late")]),
        "create": lambda: store.create("k", b"late"),
        "delete": lambda: store.delete(["there"]),
    }
    with pytest.raises((RetryExhaustedError, CommitUnknownError)):
        acts[verb]()
    disk.hangs = ""
    disk.released.set()
    # All that hung have come back when nothing is unfinished and as many threads are idle as had hung.
    stop_s = time.monotonic() + PATIENCE_S
    while len(hands._idle) < 2 and time.monotonic() < stop_s:
        time.sleep(0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupt_ends_the_main_threads_wait(tmp_path: Path, disk: HungDisk) -> None:
    store = store_on(disk, tmp_path, RetryPolicy())
    disk.hangs = "entries"

    def interrupt() -> None:
        disk.entered.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        store.list("")
    assert not disk.released.is_set()


def test_a_thread_is_kept_for_the_next_call() -> None:
    first, second = (_result(threading.get_ident) for _ in range(2))
    assert first == second != threading.get_ident()


def _result(call: object) -> object:
    made = lent(call)  # type: ignore[arg-type]
    assert made.wait(PATIENCE_S)
    return made.result()


def test_a_forked_child_has_threads_of_its_own(tmp_path: Path, disk: HungDisk) -> None:
    store = store_on(disk, tmp_path)
    child = os.fork()
    if not child:
        os._exit(int(store.read("there", limit_bytes=1000) != bytes(100)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- a manager -----------------------------------------------------------------------------------------------


def manager_on(disk: HungDisk, root: Path, monkeypatch: pytest.MonkeyPatch, **given: object) -> CheckpointManager:
    """Return a manager whose first root is on that disk."""
    with monkeypatch.context() as patch:
        patch.setattr("cloudckpt.store.local.Disk", lambda: disk)
        manager = CheckpointManager(root / "a")
    other = CheckpointManager(root / "a", **{"options": Options(retry=HASTY), **given})  # type: ignore[arg-type]
    other._store.inner = manager._store.inner
    other._store._means.store = manager._store.inner
    return other


@pytest.mark.parametrize("call", ["open_path", "sync", "link"])
def test_a_first_save_at_a_root_that_hangs_goes_to_the_fallback(
    tmp_path: Path, disk: HungDisk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with manager_on(disk, tmp_path, monkeypatch, fallback=tmp_path / "b") as manager:
        disk.hangs = call
        saved = manager.save(1, {"w": torch.ones(10)})
        assert saved is not None
        assert saved.url.startswith(f"file://{tmp_path}/b/")
        disk.released.set()


def test_a_restore_from_a_root_that_hangs_ends(tmp_path: Path, disk: HungDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_on(disk, tmp_path, monkeypatch) as manager:
        state = {"w": torch.ones(10)}
        manager.save(1, state)
        disk.hangs = "entries"
        with pytest.raises(
            RetryExhaustedError, match=r"RetryPolicy\.(deadline_s|max_attempts); .* the disk does not answer"
        ):
            manager.restore(state)
        disk.released.set()


def test_a_shard_that_hangs_is_given_up_by_the_deadline_and_the_error_says_what_to_look_at(
    tmp_path: Path, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_on(disk, tmp_path, monkeypatch) as manager:
        state = {"w": torch.ones(10)}
        manager.save(1, state)
        disk.hangs = "write"
        with pytest.raises(StalledError, match=rf"\(file://{tmp_path}/a\) .* RetryPolicy\.deadline_s, .* the disk, or"):
            manager.save(2, state)
        disk.released.set()


def test_a_shard_that_hangs_is_given_up_before_an_end_that_was_announced(
    tmp_path: Path, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    preemption = Preemption(signals=(), sources=(), check=lambda: 2.0)
    options = Options(retry=RetryPolicy(deadline_s=PATIENCE_S))
    with preemption, manager_on(disk, tmp_path, monkeypatch, options=options, preemption=preemption) as manager:
        state = {"w": torch.ones(10)}
        manager.save(1, state)
        while not preemption.notice:
            time.sleep(0.001)
        disk.hangs = "write"
        with pytest.raises(StalledError, match="did not end before the end of preemption"):
            manager.save(2, state)
        disk.released.set()
