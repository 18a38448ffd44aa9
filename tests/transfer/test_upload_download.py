"""The byte pumps: in parallel but within the budget, whole or with an error, and never a byte that was not verified."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import (
    AccessDeniedError,
    CheckpointNotFoundError,
    ChecksumError,
    CloudCkptError,
    MissingShardError,
    Options,
    RetryExhaustedError,
    RetryPolicy,
    StorageError,
)
from cloudckpt.format.layout import Span
from cloudckpt.format.shard import block_digests
from cloudckpt.options import KIB, MIB
from cloudckpt.store import Intake, LeftBehindError, RetryingStore
from cloudckpt.store.base import Store
from cloudckpt.store.limit import note_move
from cloudckpt.store.local import LocalStore
from cloudckpt.transfer.download import Fetch, ShardSource, download
from cloudckpt.transfer.memory import Scratch
from cloudckpt.transfer.pool import Budget, Watch
from cloudckpt.transfer.upload import Puts, ShardJob, upload
from tests.store.fault_store import Bucket, FaultKind, FaultStore, Op, denied, refused, transient

# By name: the package hands out a function of the module's name.
UPLOAD = importlib.import_module("cloudckpt.transfer.upload")

BLOCK_BYTES = 10
LARGE_BYTES = 2 * MIB
# Long enough for any thread of a busy machine; only a broken law waits for it.
PATIENCE_S = 30.0


def job(number: int, size_bytes: int = 100, cost_bytes: int | None = None) -> ShardJob:
    data = bytes([number % 256]) * size_bytes
    return ShardJob(
        key=f"shard-{number}",
        size_bytes=size_bytes,
        cost_bytes=size_bytes if cost_bytes is None else cost_bytes,
        staging_bytes=0,
        open=lambda _: [memoryview(data)],
    )


def put_all(store: Store, jobs: Sequence[ShardJob], *, concurrency: int = 4, limit_bytes: int = 1000) -> list[bytes]:
    return upload(store, jobs, block_bytes=BLOCK_BYTES, concurrency=concurrency, budget=Budget(limit_bytes))


def put_large(store: Store, **changed: Callable[[], None]) -> list[bytes]:
    """Put one shard of zeros that is worth a thread for its digests."""
    one = replace(job(0, size_bytes=LARGE_BYTES), **changed)  # type: ignore[arg-type]
    return upload(store, [one], block_bytes=LARGE_BYTES, concurrency=1, budget=Budget(LARGE_BYTES))


class InFlight:
    """A hook that counts what is under way at once."""

    def __init__(self, size_of: Callable[[Op], int], parties: int) -> None:
        self._size_of = size_of
        self._lock = threading.Lock()
        self._together = threading.Barrier(parties)
        self.now_bytes = 0
        self.most_bytes = 0

    def __call__(self, op: Op) -> None:
        with self._lock:
            self.now_bytes += self._size_of(op)
            self.most_bytes = max(self.most_bytes, self.now_bytes)
        # Breaks, and fails the test, if fewer than `parties` are ever under way together.
        self._together.wait(PATIENCE_S)
        with self._lock:
            self.now_bytes -= self._size_of(op)


# -- upload ------------------------------------------------------------------------------------------------------


def test_every_shard_is_put_whole_and_its_digests_come_back_in_order() -> None:
    bucket = Bucket()
    jobs = [job(number, size_bytes=95 + number) for number in range(20)]

    found = put_all(FaultStore(bucket), jobs)

    contents = [bytes([number]) * (95 + number) for number in range(20)]
    assert [bucket.raw_get(one.key) for one in jobs] == contents
    assert found == [block_digests([memoryview(data)], block_bytes=BLOCK_BYTES) for data in contents]


def test_nothing_to_put_is_nothing() -> None:
    store = FaultStore()
    assert put_all(store, []) == []
    assert store.trace == []


def test_the_budget_is_used_in_full_and_never_exceeded() -> None:
    gauge = InFlight(lambda op: 100, parties=3)
    put_all(FaultStore(hook=gauge), [job(number) for number in range(9)], concurrency=8, limit_bytes=350)
    assert gauge.most_bytes == 300


def test_the_cost_of_a_job_counts_and_not_its_size() -> None:
    gauge = InFlight(lambda op: 100, parties=2)
    put_all(FaultStore(hook=gauge), [job(n, cost_bytes=150) for n in range(8)], concurrency=8, limit_bytes=350)
    assert gauge.most_bytes == 200


def test_no_more_requests_are_under_way_than_the_concurrency_allows() -> None:
    gauge = InFlight(lambda op: 1, parties=4)
    put_all(FaultStore(hook=gauge), [job(number) for number in range(16)], concurrency=4, limit_bytes=10_000)
    assert gauge.most_bytes == 4


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    sizes = {f"shard-{number}": 600 if number == 3 else 100 for number in range(8)}
    together: list[set[str]] = []
    running: set[str] = set()
    lock = threading.Lock()

    class Watching(FaultStore):
        def put(self, key: str, buffers: Sequence[memoryview]) -> None:
            with lock:
                running.add(key)
                together.append(set(running))
            super().put(key, buffers)
            with lock:
                running.discard(key)

    bucket = Bucket()
    jobs = [job(number, size_bytes=sizes[f"shard-{number}"]) for number in range(8)]
    put_all(Watching(bucket), jobs, concurrency=8, limit_bytes=500)

    assert set(bucket.raw_list()) == set(sizes)
    assert [keys for keys in together if "shard-3" in keys] == [{"shard-3"}]
    assert all(sum(sizes[key] for key in keys) <= 500 or keys == {"shard-3"} for keys in together)


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("limit_bytes", [100, 10_000], ids=["tight", "loose"])
def test_the_first_fault_stops_what_has_not_begun_and_surfaces(concurrency: int, limit_bytes: int) -> None:
    store = FaultStore()
    fault = store.inject(verbs=["put"], skip=4, error=refused)

    with pytest.raises(StorageError, match="injected into put"):
        put_all(store, [job(number) for number in range(200)], concurrency=concurrency, limit_bytes=limit_bytes)

    assert fault.fired == 1
    assert store.op_count < 5 + concurrency, "only what was under way beside it"


def test_a_fault_while_the_others_wait_for_the_budget_ends_the_upload() -> None:
    store = FaultStore()
    store.inject(verbs=["put"], error=denied)
    with pytest.raises(PermissionError):
        put_all(store, [job(number) for number in range(50)], concurrency=8, limit_bytes=100)
    assert store.op_count == 1


def test_a_shard_that_cannot_be_opened_is_the_error() -> None:
    def broken(_: memoryview) -> Sequence[memoryview]:
        raise ValueError("a tensor that is gone")

    bad = ShardJob(key="bad", size_bytes=1, cost_bytes=1, staging_bytes=0, open=broken)
    with pytest.raises(ValueError, match="a tensor that is gone"):
        put_all(FaultStore(), [job(1), bad, job(2)])


def test_a_put_does_not_wait_for_the_digests_of_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    is_sent = threading.Event()

    def digests_of(buffers: Sequence[memoryview], *, block_bytes: int) -> bytes:
        assert is_sent.wait(PATIENCE_S)
        return block_digests(buffers, block_bytes=block_bytes)

    monkeypatch.setattr(UPLOAD, "block_digests", digests_of)
    put_large(FaultStore(hook=lambda op: is_sent.set()))


def test_a_failed_put_gives_its_memory_back_when_the_digests_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests_of(buffers: Sequence[memoryview], *, block_bytes: int) -> bytes:
        if is_released.wait(0.05):
            too_early.append(True)
        return b""

    is_released, too_early = threading.Event(), list[bool]()
    monkeypatch.setattr(UPLOAD, "block_digests", digests_of)
    store = FaultStore()
    store.inject(verbs=["put"], error=denied)
    with pytest.raises(AccessDeniedError):
        put_large(store, release=is_released.set)
    assert is_released.is_set()
    assert not too_early


def test_digests_that_cannot_be_made_are_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests_of(buffers: Sequence[memoryview], *, block_bytes: int) -> bytes:
        raise MemoryError("no room for digests")

    monkeypatch.setattr(UPLOAD, "block_digests", digests_of)
    with pytest.raises(MemoryError, match="no room for digests"):
        put_large(FaultStore())


def test_digests_are_made_by_the_putting_threads_where_the_machine_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> threading.Thread:
        raise CloudCkptError("no thread")

    monkeypatch.setattr(UPLOAD, "started", none_left)
    assert put_large(FaultStore()) == [block_digests([memoryview(bytes(LARGE_BYTES))], block_bytes=LARGE_BYTES)]


def test_all_threads_of_an_upload_are_there_before_its_first_put() -> None:
    names: list[set[str]] = []
    hook: Callable[[Op], None] = lambda op: names.append({thread.name for thread in threading.enumerate()})  # noqa: E731
    put_all(FaultStore(hook=hook), [job(number) for number in range(9)], concurrency=4, limit_bytes=10_000)
    assert {f"cloudckpt-transfer-{number}" for number in range(4)} <= names[0]


def test_staging_memory_is_of_the_size_asked_for_and_stays_until_the_put_has_returned() -> None:
    bucket = Bucket()

    def staged(number: int) -> ShardJob:
        def fill(staging: memoryview) -> list[memoryview]:
            assert staging.nbytes == 64
            staging[:] = bytes([number]) * 64
            return [staging[:32], staging[32:]]

        return ShardJob(key=f"shard-{number}", size_bytes=64, cost_bytes=64, staging_bytes=64, open=fill)

    put_all(FaultStore(bucket), [staged(number) for number in range(40)], concurrency=4)
    assert {key: bucket.raw_get(key) for key in bucket.raw_list()} == {
        f"shard-{number}": bytes([number]) * 64 for number in range(40)
    }


def interrupt(_: object = None) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_stops_the_upload_without_a_hang() -> None:
    store = FaultStore(hook=lambda op: interrupt() if op.number == 5 else None)
    with pytest.raises(KeyboardInterrupt):
        put_all(store, [job(number) for number in range(500)], concurrency=2, limit_bytes=200)
    assert store.op_count < 500


class StandStill:
    """Interrupts the main thread at the first request, and lets none end before it is released."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.release = threading.Event()
        self._first = threading.Lock()

    def __call__(self, _: object) -> None:
        if self._first.acquire(blocking=False):
            interrupt()
        self.release.wait(PATIENCE_S)
        self.ended.append(1)


PATIENCE_S = 20.0


def test_an_interrupted_upload_waits_for_no_put_that_stands_still() -> None:
    hook = StandStill()
    with pytest.raises(KeyboardInterrupt):
        put_all(FaultStore(hook=hook), [job(number) for number in range(4)], concurrency=2, limit_bytes=200)
    assert hook.ended == []
    hook.release.set()


def test_an_interrupted_download_waits_for_no_read_and_hands_nothing_on_afterwards() -> None:
    shelf, hook = Shelf(), StandStill()
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        shelf.get_all(FaultStore(shelf.bucket, hook=hook), concurrency=2, limit_bytes=80)
    assert hook.ended == []
    hook.release.set()
    while threading.active_count() > before:
        threading.Event().wait(0.01)
    assert shelf.brought == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_an_interrupted_save_surfaces_as_that_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(LocalStore):
        def put(self, key: str, buffers: Sequence[memoryview]) -> None:
            interrupt()
            super().put(key, buffers)

    monkeypatch.setattr(
        "cloudckpt.checkpoint.open_store", lambda url, **_: RetryingStore(Interrupting(url), RetryPolicy())
    )
    options = Options(shard_bytes=400, block_bytes=100, span_bytes=100, memory_budget_bytes=KIB, concurrency=2)
    with pytest.raises(KeyboardInterrupt):
        cloudckpt.save({"t": torch.ones(4000)}, tmp_path / "c", options=options)
    with pytest.raises(CheckpointNotFoundError):
        cloudckpt.read(tmp_path / "c")


# -- download ----------------------------------------------------------------------------------------------------


class Shelf:
    """One stored shard, the fetches of its spans, and what they brought."""

    def __init__(self, size_bytes: int = 95, span_bytes: int = 20) -> None:
        self.data = bytes(number % 251 for number in range(size_bytes))
        self.bucket = Bucket()
        self.bucket.raw_put("shard", self.data)
        digests = block_digests([memoryview(self.data)], block_bytes=BLOCK_BYTES)
        self.source = ShardSource(key="shard", size_bytes=size_bytes, digests=digests, block_bytes=BLOCK_BYTES)
        self.spans = [Span(start, min(start + span_bytes, size_bytes)) for start in range(0, size_bytes, span_bytes)]
        self.brought: dict[int, bytes] = {}

    def fetches(self, buffer_bytes: int = 0) -> list[Fetch]:
        return [self._fetch(span, buffer_bytes) for span in self.spans]

    def _fetch(self, span: Span, buffer_bytes: int) -> Fetch:
        return Fetch(shard=self.source, span=span, consume=self._consume, buffer_bytes=buffer_bytes)

    def _consume(self, at: int, data: memoryview) -> None:
        assert at not in self.brought, "a block is handed on once"
        self.brought[at] = bytes(data)

    def get_all(self, store: Store, *, concurrency: int = 3, limit_bytes: int = 1000) -> None:
        download(store, self.fetches(), concurrency=concurrency, budget=Budget(limit_bytes))

    @property
    def brought_bytes(self) -> bytes:
        return b"".join(self.brought[at] for at in sorted(self.brought))

    def is_right(self, brought: dict[int, bytes]) -> bool:
        return all(data == self.data[start : start + len(data)] for start, data in brought.items())


def test_every_block_is_brought_once_and_right_by_one_request_per_span() -> None:
    shelf = Shelf(size_bytes=1005)
    store = FaultStore(shelf.bucket)
    shelf.get_all(store)
    assert shelf.brought_bytes == shelf.data
    assert store.op_count == len(shelf.spans)


def patient(store: Store, max_attempts: int = 3) -> RetryingStore:
    return RetryingStore(store, RetryPolicy(max_attempts=max_attempts), sleep=lambda _: None)


@pytest.mark.parametrize("times", [1, 2])
def test_after_a_fault_in_the_middle_of_a_span_only_blocks_that_were_not_handed_on_are_asked_for(times: int) -> None:
    shelf = Shelf(size_bytes=95, span_bytes=200)
    asked: list[tuple[int, int]] = []

    class Cut(FaultStore):
        def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
            asked.append((start, stop))
            super().stream(key, start=start, stop=stop, into=into)

    store = Cut(shelf.bucket)
    store.inject(kind=FaultKind.SHORT, verbs=["get"], times=times)
    shelf.get_all(patient(store))
    assert asked == [(0, 95), (40, 95), (60, 95)][: times + 1], "half of what was asked for came, up to no block's end"
    assert shelf.brought_bytes == shelf.data


def test_a_span_that_gets_on_with_each_request_may_take_more_of_them_than_one_that_does_not() -> None:
    shelf = Shelf(size_bytes=640, span_bytes=640)
    store = FaultStore(shelf.bucket)
    store.inject(kind=FaultKind.SHORT, verbs=["get"], times=4)
    shelf.get_all(patient(store, max_attempts=2))
    assert (shelf.brought_bytes, store.op_count) == (shelf.data, 5)

    stuck = FaultStore(shelf.bucket)
    stuck.inject(kind=FaultKind.BEFORE, verbs=["get"], times=4)
    with pytest.raises(RetryExhaustedError):
        shelf.get_all(patient(stuck, max_attempts=2))
    assert [op.verb for op in stuck.trace].count("get") == 2


def test_a_body_that_ends_with_an_error_after_its_last_byte_is_not_asked_for_again() -> None:
    shelf = Shelf(size_bytes=40, span_bytes=40)

    class Endless(FaultStore):
        def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
            super().stream(key, start=start, stop=stop, into=into)
            raise transient(Op(number=1, verb="get", key=key))

    store = Endless(shelf.bucket)
    shelf.get_all(patient(store))
    assert (shelf.brought_bytes, store.op_count) == (shelf.data, 1)


@pytest.mark.parametrize("error", [TimeoutError("disk"), ConnectionResetError("peer"), OSError(28, "full"), denied])
def test_what_who_takes_the_bytes_raises_is_no_fault_of_the_store(error: object) -> None:
    shelf = Shelf(size_bytes=20)
    raised = error(Op(number=1, verb="put", key="k")) if callable(error) else error
    assert isinstance(raised, Exception)

    def refuse(_: int, __: memoryview) -> None:
        raise raised

    fetch = Fetch(shard=shelf.source, span=shelf.spans[0], consume=refuse)
    store = FaultStore(shelf.bucket)
    with pytest.raises(type(raised)) as caught:
        download(patient(store), [fetch], concurrency=1, budget=Budget(100))
    assert caught.value is raised
    assert store.op_count == 1


def test_of_a_damaged_span_all_that_is_right_is_handed_on_to_who_wants_to_hear_of_the_damage() -> None:
    shelf, told, gauge = Shelf(size_bytes=95, span_bytes=50), [], Noting()
    damaged = bytearray(shelf.data)
    damaged[12] ^= 1
    damaged[33] ^= 1
    damaged[94] ^= 1
    shelf.bucket.raw_put("shard", bytes(damaged))

    def note(job: Fetch, error: Exception) -> None:
        assert isinstance(error, ChecksumError)
        told.append((job.span.start, error.blocks))

    download(
        FaultStore(shelf.bucket),
        shelf.fetches(),
        concurrency=2,
        budget=Budget(1000),
        watch=Watch(gauge=gauge),
        on_damage=note,
    )
    assert sorted(told) == [(0, (1, 3)), (50, (9,))]
    assert sorted(shelf.brought) == [0, 20, 40, 50, 60, 70, 80]
    assert shelf.is_right(shelf.brought)
    assert gauge.totals == [sum(gauge.moved)] == [95]


def test_a_gauge_is_told_of_each_block_that_was_handed_on() -> None:
    shelf, gauge = Shelf(size_bytes=95, span_bytes=50), Noting()
    download(FaultStore(shelf.bucket), shelf.fetches(), concurrency=2, budget=Budget(1000), watch=Watch(gauge=gauge))
    assert gauge.totals == [95]
    assert sorted(gauge.moved) == [5, *[10] * 9]


def test_a_block_that_was_wrong_once_is_read_again(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    store = FaultStore(shelf.bucket)
    fault = store.inject(kind=FaultKind.FLIP, verbs=["get"], skip=1, times=2)
    with caplog.at_level(logging.WARNING, logger="cloudckpt"):
        shelf.get_all(store, concurrency=1)
    assert fault.fired == 2
    assert store.op_count == len(shelf.spans) + 2
    assert shelf.brought_bytes == shelf.data
    assert caplog.text.count("block 2 of shard differs from its digest; reading it again") == 2


def test_a_block_that_stays_wrong_is_named_and_not_handed_on() -> None:
    shelf = Shelf()
    damaged = bytearray(shelf.data)
    damaged[47] ^= 1
    shelf.bucket.raw_put("shard", bytes(damaged))
    store = FaultStore(shelf.bucket)

    with pytest.raises(ChecksumError, match=r"block 4 of shard shard \(bytes from 40\)") as caught:
        shelf.get_all(store)

    assert caught.value.key == "shard"
    assert 40 not in shelf.brought
    assert shelf.is_right(shelf.brought)


def test_a_missing_shard_is_named() -> None:
    shelf = Shelf()
    shelf.bucket.objects.clear()
    with pytest.raises(MissingShardError, match="shard, which the index names, is not on the store") as caught:
        shelf.get_all(FaultStore(shelf.bucket))
    assert caught.value.key == "shard"
    assert shelf.brought == {}


@pytest.mark.parametrize("size_bytes", [0, 1, 39, 94])
def test_a_shorter_shard_is_told_from_a_store_that_cannot_be_read(size_bytes: int) -> None:
    shelf = Shelf()
    shelf.bucket.raw_put("shard", shelf.data[:size_bytes])
    with pytest.raises(ChecksumError, match=f"has {size_bytes} bytes on the store, and 95 were committed"):
        shelf.get_all(FaultStore(shelf.bucket))
    assert shelf.is_right(shelf.brought)


@pytest.mark.parametrize("error", [transient, denied])
def test_a_store_that_cannot_be_read_is_that_error(error: Callable[[Op], StorageError]) -> None:
    shelf = Shelf()
    store = FaultStore(shelf.bucket)
    store.inject(verbs=["get"], error=error, times=None)
    with pytest.raises(type(error(Op(number=1, verb="get", key="shard")))):
        shelf.get_all(store)
    assert shelf.brought == {}


def test_a_fault_is_raised_also_where_another_transfer_stands_still_after_it() -> None:
    release = threading.Event()

    def request(op: Op) -> None:
        if op.key == "shard-1":
            release.wait(PATIENCE_S)

    store = FaultStore(hook=request)
    store.inject(key="shard-0", error=denied)
    watch = Watch(deadline_s=0.3)
    try:
        with pytest.raises(AccessDeniedError):
            upload(store, [job(0), job(1)], block_bytes=BLOCK_BYTES, concurrency=2, budget=Budget(1000), watch=watch)
    finally:
        release.set()


def test_a_transfer_whose_bytes_move_does_not_stand_still_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, looked, ticks = [0.0], threading.Event(), []
    monkeypatch.setattr("cloudckpt.transfer.pool.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    watch = Watch(deadline_s=10.0, check=looked.set, tick=lambda: ticks.append(now_s[0]))

    def slow(_: Op) -> None:
        for number in range(2):
            now_s[0] += 9.0
            note_move(number)
            looked.clear()
            looked.wait(PATIENCE_S)

    store = FaultStore(hook=slow)
    upload(store, [job(0)], block_bytes=BLOCK_BYTES, concurrency=1, budget=Budget(1000), watch=watch)
    assert ticks == [9.0, 18.0, 18.0], "the other ranks hear of it meanwhile, and of its end"


@pytest.mark.parametrize("kind", [FaultKind.BEFORE, FaultKind.FLIP])
def test_all_that_is_asked_for_one_span_ends_by_one_deadline(kind: FaultKind) -> None:
    """A look at the size after a failed read, and reading once more after wrong bytes, do not begin anew."""
    now_s = [0.0]

    def request(op: Op) -> None:
        now_s[0] += 9.0

    shelf = Shelf(size_bytes=BLOCK_BYTES)
    store = FaultStore(shelf.bucket, hook=request)
    store.inject(kind=FaultKind.FLIP, verbs=["get"], times=1 if kind is FaultKind.FLIP else 0)
    store.inject(times=None)
    policy = RetryPolicy(max_attempts=100, deadline_s=50.0)
    patient = RetryingStore(store, policy, sleep=lambda _: None, clock=lambda: now_s[0])
    with pytest.raises(RetryExhaustedError, match="get of 'shard'"):
        shelf.get_all(patient, concurrency=1)
    assert now_s[0] <= 60.0


@pytest.mark.parametrize("limit_bytes", [20, 10_000], ids=["tight", "loose"])
def test_the_first_fault_stops_the_spans_that_have_not_begun(limit_bytes: int) -> None:
    shelf = Shelf(size_bytes=5000)
    store = FaultStore(shelf.bucket)
    store.inject(verbs=["get"], skip=4, error=denied)
    with pytest.raises(PermissionError):
        shelf.get_all(store, concurrency=2, limit_bytes=limit_bytes)
    assert store.op_count <= 5 + 1 + 1, "one span was under way beside it, and its error asks for the object's size"


def test_an_error_of_who_takes_the_bytes_surfaces() -> None:
    shelf = Shelf()

    def refuse(_: int, __: memoryview) -> None:
        raise ValueError("no room for these")

    fetch = Fetch(shard=shelf.source, span=shelf.spans[0], consume=refuse)
    with pytest.raises(ValueError, match="no room for these"):
        download(FaultStore(shelf.bucket), [fetch], concurrency=1, budget=Budget(100))


def test_spans_in_flight_stay_within_the_budget() -> None:
    shelf = Shelf(size_bytes=240)
    gauge = InFlight(lambda op: 30, parties=3)
    shelf.get_all(FaultStore(shelf.bucket, hook=gauge), concurrency=8, limit_bytes=110)
    assert gauge.most_bytes == 90, "each holds a block, and an engine as much as is on its way"


def test_a_disk_is_read_by_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDisk(FaultStore):
        engine = "local"

    monkeypatch.setattr("cloudckpt.transfer.share.os.sched_getaffinity", lambda _: range(3))
    shelf = Shelf(size_bytes=240)
    gauge = InFlight(lambda op: 1, parties=3)
    shelf.get_all(OnDisk(shelf.bucket, hook=gauge), concurrency=8)
    assert gauge.most_bytes == 3


def test_buffers_that_outlive_their_span_are_waited_for() -> None:
    """Two spans fill one buffer: the budget of its first is given back when its second is done."""
    shelf = Shelf(size_bytes=160)
    budget = Budget(120)
    open_buffers: set[int] = set()
    most = 0
    lock = threading.Lock()

    def fetch(number: int, span: Span) -> Fetch:
        def consume(at: int, _: memoryview) -> None:
            nonlocal most
            with lock:
                open_buffers.add(number // 2)
                most = max(most, len(open_buffers))
            if number % 2 and at > span.start:
                with lock:
                    open_buffers.discard(number // 2)
                budget.free(40)

        return Fetch(shard=shelf.source, span=span, consume=consume, buffer_bytes=0 if number % 2 else 40)

    fetches = [fetch(number, span) for number, span in enumerate(shelf.spans)]
    download(FaultStore(shelf.bucket), fetches, concurrency=8, budget=budget)
    assert most in (1, 2), "40 bytes of a third buffer would not fit beside two buffers and a span"
    assert open_buffers == set()


def test_a_buffer_larger_than_the_budget_is_filled_all_the_same() -> None:
    shelf = Shelf(size_bytes=160)
    budget = Budget(30)
    rest = 160 // BLOCK_BYTES
    lock = threading.Lock()

    def consume(_: int, __: memoryview) -> None:
        nonlocal rest
        with lock:
            rest -= 1
            is_last = rest == 0
        if is_last:
            budget.free(160)

    fetches = [
        Fetch(shard=shelf.source, span=span, consume=consume, buffer_bytes=0 if number else 160)
        for number, span in enumerate(shelf.spans)
    ]
    download(FaultStore(shelf.bucket), fetches, concurrency=8, budget=budget)
    assert rest == 0


def test_an_interrupt_stops_the_download_without_a_hang() -> None:
    shelf = Shelf(size_bytes=10_000)
    store = FaultStore(shelf.bucket, hook=lambda op: interrupt() if op.number == 5 else None)
    with pytest.raises(KeyboardInterrupt):
        shelf.get_all(store, concurrency=2, limit_bytes=40)
    assert store.op_count < len(shelf.spans)


# -- scratch memory ----------------------------------------------------------------------------------------------


def test_memory_given_back_is_lent_again() -> None:
    scratch = Scratch()
    first = scratch.take(5000)
    first[:3] = b"abc"
    scratch.give(first)
    assert bytes(scratch.take(4000)[:3]) == b"abc"


def test_memory_that_is_lent_out_is_nobody_else_s() -> None:
    scratch = Scratch()
    one, other = scratch.take(100), scratch.take(100)
    one[:], other[:] = b"1" * 100, b"2" * 100
    assert (bytes(one), bytes(other)) == (b"1" * 100, b"2" * 100)


@given(st.lists(st.integers(0, 20_000), max_size=30))
def test_memory_is_of_the_size_asked_for_and_no_more_is_held_than_was_lent_at_once(sizes_bytes: list[int]) -> None:
    scratch = Scratch()
    for size_bytes in sizes_bytes:
        with scratch.lend(size_bytes) as memory:
            assert memory.nbytes == size_bytes
    assert len(scratch._idle) <= 1
    assert sum(map(len, scratch._idle)) == max(sizes_bytes, default=0)


class Noting:
    """A gauge that remembers."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.moved: list[int] = []

    def begin(self, total_bytes: int) -> None:
        self.totals.append(total_bytes)

    def move(self, size_bytes: int) -> None:
        self.moved.append(size_bytes)


def test_a_gauge_is_told_of_all_bytes_at_the_begin_and_of_each_transfer_that_has_ended() -> None:
    gauge = Noting()
    upload(
        FaultStore(),
        [job(number) for number in range(5)],
        block_bytes=4096,
        concurrency=2,
        budget=Budget(10_000),
        watch=Watch(gauge=gauge),
    )
    assert gauge.totals == [sum(gauge.moved)]
    assert len(gauge.moved) == 5


def test_a_put_that_goes_on_or_has_ended_is_not_made_twice() -> None:
    puts, began, go_on = Puts(), threading.Event(), threading.Event()
    calls: list[bytes] = []

    def put() -> bytes:
        calls.append(b"digests")
        began.set()
        assert go_on.wait(30)
        return b"digests"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(puts.once, ("root", "key"), put)
        assert began.wait(30)
        second = pool.submit(puts.once, ("root", "key"), put)
        go_on.set()
        assert [first.result(30), second.result(30), puts.once(("root", "key"), put)] == [b"digests"] * 3
    assert len(calls) == 1
    assert puts.once(("other root", "key"), put) == b"digests"
    assert len(calls) == 2


@pytest.mark.parametrize(("error", "count"), [(StorageError("no"), 2), (LeftBehindError("it blocks"), 1)])
def test_a_failed_put_is_made_again_unless_it_may_still_land(error: StorageError, count: int) -> None:
    puts, calls = Puts(), []

    def put() -> bytes:
        calls.append(1)
        raise error

    for _ in range(2):
        with pytest.raises(StorageError):
            puts.once(("root", "key"), put)
    assert len(calls) == count


def test_whether_a_shard_is_unchanged_is_asked_of_the_views_that_it_was_opened_as() -> None:
    views = [memoryview(b"head"), memoryview(b"one"), memoryview(b"two")]
    asked: list[Sequence[memoryview]] = []
    one = replace(job(0), open=lambda _: views, unchanged=lambda given: asked.append(given))  # noqa: PLW0108 (None)
    bucket = Bucket()
    put_all(FaultStore(bucket), [one])
    assert asked == [views]
    assert bucket.raw_get(one.key) == b"headonetwo"
