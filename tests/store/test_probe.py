"""The probe refuses every store that would let two jobs commit over each other, and asks each bucket once."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    CreateNotEnforcedError,
    ObjectExistsError,
    RetryExhaustedError,
    StorageError,
    TransientError,
)
from cloudckpt.options import RetryPolicy
from cloudckpt.store import probe
from cloudckpt.store.base import Store
from cloudckpt.store.disk import Disk
from cloudckpt.store.local import LocalStore
from cloudckpt.store.location import named_endpoint
from cloudckpt.store.probe import _proven, probe_create
from cloudckpt.store.retrying import RetryingStore
from tests.store.fault_store import RACES, Bucket, FaultKind, FaultStore, Op, denied


@pytest.fixture(autouse=True)
def _nothing_is_known_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(RACES, 3)
    _proven.clear()
    yield
    _proven.clear()


@pytest.fixture(params=["raw", "retrying"])
def layer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def over(inner: FaultStore, layer: str) -> Store:
    if layer == "raw":
        return inner
    time = Time()
    return RetryingStore(inner, RetryPolicy(), sleep=time.sleep, clock=time.clock, rng=random.Random(0))


class Time:
    """A clock that moves only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_store_that_refuses_to_overwrite_passes_and_keeps_nothing(layer: str) -> None:
    inner = FaultStore()
    probe_create(over(inner, layer))
    assert inner.bucket.raw_list() == []
    assert {op.verb for op in inner.trace} - {"read"} == {"create", "delete"}


def test_a_store_that_overwrites_is_refused_and_cleaned(layer: str) -> None:
    inner = FaultStore(Bucket(enforces_create=False))
    with pytest.raises(CreateNotEnforcedError, match=r"memory://bucket/root.*single_writer=True"):
        probe_create(over(inner, layer))
    assert inner.bucket.raw_list() == []


def test_a_mounted_file_system_is_asked_once_for_all_roots_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Store] = []
    monkeypatch.setattr("cloudckpt.store.probe._ask", asked.append)
    roots = [LocalStore(tmp_path / "one"), LocalStore(tmp_path / "not" / "yet" / "there")]
    for root in roots:
        probe_create(RetryingStore(root, RetryPolicy()))
    assert [store.url for store in asked] == [roots[0].url]


def test_another_file_system_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Store] = []
    monkeypatch.setattr("cloudckpt.store.probe._ask", asked.append)
    roots = [LocalStore(tmp_path / "one"), LocalStore("/proc/self")]
    for root in roots:
        probe_create(root)
    assert asked == roots


def test_a_disk_whose_calls_are_not_the_kernel_s_is_asked_for_each_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Store] = []
    monkeypatch.setattr("cloudckpt.store.probe._ask", asked.append)
    roots = [LocalStore(tmp_path / name, disk=type("Other", (Disk,), {})()) for name in ("one", "two")]
    for root in roots:
        probe_create(root)
    assert asked == roots


def test_an_engine_that_cannot_refuse_is_refused_without_a_request(layer: str) -> None:
    inner = FaultStore(is_create_atomic=False)
    with pytest.raises(CreateNotEnforcedError, match="memory engine cannot"):
        probe_create(over(inner, layer))
    assert inner.op_count == 0


@pytest.mark.parametrize("bucket", [Bucket(enforces_create=False), Bucket()])
def test_a_single_writer_needs_no_proof(bucket: Bucket) -> None:
    inner = FaultStore(bucket, is_create_atomic=bucket.enforces_create)
    probe_create(inner, single_writer=True)
    assert inner.op_count == 0


@pytest.mark.parametrize("kind", [FaultKind.BEFORE, FaultKind.LOST_ACK])
@pytest.mark.parametrize("enforces_create", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_faults_on_the_way_do_not_change_the_answer(kind: FaultKind, enforces_create: bool, skip: int) -> None:
    inner = FaultStore(Bucket(enforces_create=enforces_create))
    inner.inject(kind=kind, skip=skip)
    store = over(inner, "retrying")
    if enforces_create:
        probe_create(store)
    else:
        with pytest.raises(CreateNotEnforcedError):
            probe_create(store)


@pytest.mark.parametrize("enforces_create", [True, False])
def test_a_store_that_never_answers_the_question_is_not_passed(enforces_create: bool) -> None:
    inner = FaultStore(Bucket(enforces_create=enforces_create))
    inner.inject(verbs=["create"], skip=1, times=None)
    with pytest.raises(StorageError, match="nobody knows"):
        probe_create(over(inner, "retrying"))


class Losing(FaultStore):
    """A gateway that loses the answer to the first create of each object by each writer, `times` times."""

    def __init__(self, bucket: Bucket, times: int) -> None:
        super().__init__(bucket)
        self.seen: Counter[tuple[str, bytes]] = Counter()
        self.times = times

    def create(self, key: str, data: bytes) -> None:
        with self.bucket.lock:
            self.seen[key, data] += 1
            is_lost = self.seen[key, data] <= self.times
        with suppress(ObjectExistsError):
            super().create(key, data)
            if not is_lost:
                return
        if is_lost:
            raise TransientError("502", op="create", key=key)
        raise ObjectExistsError(f"{key!r} is taken", op="create", key=key)


@pytest.mark.parametrize("times", [1, 3])
def test_a_gateway_that_loses_first_answers_passes_in_a_later_race(times: int) -> None:
    inner = Losing(Bucket(), times)
    probe_create(over(inner, "retrying"))
    assert inner.bucket.raw_list() == []


def test_a_store_that_overwrites_behind_such_a_gateway_is_refused() -> None:
    with pytest.raises(CreateNotEnforcedError):
        probe_create(over(Losing(Bucket(enforces_create=False), 1), "retrying"))


def test_races_that_stay_undecided_go_on_until_the_deadline_and_are_told_as_they_were() -> None:
    time = Time()
    store = RetryingStore(
        Losing(Bucket(), 10**6), RetryPolicy(deadline_s=60.0), sleep=time.sleep, clock=time.clock, rng=random.Random(0)
    )
    with pytest.raises(StorageError, match=r"1 found their own bytes there, the store itself refused 0, and 7 .*502"):
        probe_create(store)
    assert 1040.0 < time.now_s <= 1060.0


def test_a_bucket_is_asked_once_whatever_the_root() -> None:
    for root in ("a", "b", "a/b"):
        inner = FaultStore(url=f"s3://bucket/{root}")
        probe_create(inner)
        assert bool(inner.op_count) == (root == "a")


def test_another_endpoint_is_asked_for_itself() -> None:
    for endpoint in ("", "http://one:9000", "http://two:9000", "http://one:9000/other"):
        inner = FaultStore(url="s3://bucket/a", endpoint=endpoint)
        probe_create(inner)
        assert inner.op_count > 0
    again = FaultStore(url="s3://bucket/b", endpoint="http://one:9000")
    probe_create(over(again, "retrying"))
    assert again.op_count == 0


@pytest.mark.parametrize(
    ("options", "environment", "endpoint"),
    [
        ({}, {}, ""),
        ({"endpoint_url": "http://one:9000/"}, {"AWS_ENDPOINT_URL": "http://two"}, "http://one:9000"),
        ({"client_kwargs": {"endpoint_url": "https://one"}}, {}, "https://one"),
        ({"endpoint_url": "http://user:secret@one:9000"}, {}, "http://one:9000"),
        ({"endpoint_url": "http://user:secret@one:9000/good/"}, {}, "http://one:9000/good"),
        ({}, {"AWS_ENDPOINT_URL": "http://two/a/b"}, "http://two/a/b"),
        ({}, {"AWS_ENDPOINT_URL": "http://two"}, "http://two"),
        ({}, {"AWS_ENDPOINT_URL_S3": "http://three", "AWS_ENDPOINT_URL": "http://two"}, "http://three"),
        ({"profile": "minio"}, {}, "profile minio"),
    ],
)
def test_the_endpoint_is_what_options_and_environment_name_without_credentials(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], environment: dict[str, str], endpoint: str
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert named_endpoint("s3", options) == endpoint


class Racy(FaultStore):
    """Looks whether the key is free, and writes a little later."""

    def create(self, key: str, data: bytes) -> None:
        if key in self.bucket.objects:
            raise ObjectExistsError(f"{key!r} is taken")
        time.sleep(0.02)
        self.bucket.raw_put(key, data)


class Swapping(FaultStore):
    """Tells one writer that it won, and keeps what the last one sent."""

    def create(self, key: str, data: bytes) -> None:
        with self.bucket.lock:
            is_taken = key in self.bucket.objects
            self.bucket.raw_put(key, data)
        if is_taken:
            raise ObjectExistsError(f"{key!r} is taken")


def test_a_store_that_refuses_in_turn_but_not_in_a_race_is_refused(layer: str) -> None:
    inner = Racy()
    inner.create("k", b"one")
    with pytest.raises(ObjectExistsError):
        inner.create("k", b"two")
    with pytest.raises(CreateNotEnforcedError, match=r"of 8 writers created the same object"):
        probe_create(over(Racy(), layer))


def test_a_store_that_keeps_a_losers_bytes_is_refused() -> None:
    with pytest.raises(CreateNotEnforcedError):
        probe_create(Swapping())


def test_a_store_that_takes_one_write_a_second_of_a_key_passes() -> None:
    class Slow(FaultStore):
        def create(self, key: str, data: bytes) -> None:
            with self.bucket.lock:
                written_s = self.bucket.objects[key].modified_s if key in self.bucket.objects else 0.0
                writes = sum(op.verb == "create" and op.key == key for op in self.trace)
                # Half of those who come too early hear that, and half that the key is taken.
                if self.bucket.now_s - written_s < 1.0 and writes % 2:
                    self.trace.append(Op(number=0, verb="create", key=key))
                    raise TransientError("429: one write a second of a key")
            super().create(key, data)

    probe_create(over(Slow(), "retrying"))


@pytest.mark.parametrize("url", ["s3://other/a", "gs://bucket/a", "file:///bucket", "memory://bucket/b"])
def test_another_bucket_is_asked_for_itself(url: str) -> None:
    for known in ("s3://bucket/a", "file:///bucket/a", "memory://bucket/a"):
        probe_create(FaultStore(url=known))
    inner = FaultStore(url=url)
    probe_create(inner)
    assert inner.op_count > 0


@pytest.mark.parametrize("started", [0, 3, 7])
def test_writers_that_have_come_wait_for_none_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    start, left = threading.Thread.start, iter(range(started))

    def start_some(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    monkeypatch.setattr(probe, "_BARRIER_S", 10_000.0)
    inner = FaultStore()
    with pytest.raises(StorageError, match=r"could not be asked.*can't start new thread.*nothing was saved"):
        probe_create(inner)
    assert inner.trace == [], "nothing was written, so that nothing need be removed"


def test_a_writer_that_comes_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_BARRIER_S", 0.0)
    with pytest.raises(StorageError, match="could not be asked"):
        probe_create(FaultStore())


def test_a_refusal_is_not_remembered() -> None:
    bucket = Bucket(enforces_create=False)
    with pytest.raises(CreateNotEnforcedError):
        probe_create(FaultStore(bucket))
    bucket.enforces_create = True
    probe_create(FaultStore(bucket))


def test_a_store_that_cannot_be_asked_is_an_error_and_is_asked_again() -> None:
    inner = FaultStore()
    inner.inject(verbs=["create"], error=denied)
    with pytest.raises(AccessDeniedError):
        probe_create(inner)
    probe_create(inner)


def test_an_unreachable_store_is_an_error() -> None:
    inner = FaultStore()
    inner.inject(times=None)
    with pytest.raises(StorageError) as caught:
        probe_create(over(inner, "retrying"))
    assert not isinstance(caught.value, CreateNotEnforcedError | RetryExhaustedError)


def test_who_may_write_and_not_read_passes() -> None:
    inner = FaultStore()
    inner.inject(verbs=["read", "head"], error=denied, times=None)
    probe_create(over(inner, "retrying"))
    assert inner.bucket.raw_list() == []


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("may_delete", [True, False])
def test_a_probe_that_may_have_landed_is_a_plain_error_and_removed_or_named(
    skip: int, may_delete: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inner = FaultStore(Bucket(enforces_create=False))
    inner.inject(kind=FaultKind.LOST_ACK, verbs=["create"], skip=skip, times=None)
    inner.inject(verbs=["read", "head"], error=denied, times=None)
    inner.inject(verbs=["delete"], error=denied, times=0 if may_delete else None)
    with pytest.raises(StorageError) as caught:
        probe_create(over(inner, "retrying"))
    assert type(caught.value) is StorageError
    left = inner.bucket.raw_list()
    assert bool(left) is not may_delete
    told = "".join(traceback.format_exception(caught.value))
    assert all(name in told for name in left)
    assert "stay on" not in caplog.text, "the first error is told, and the second one as a note of it"


@pytest.mark.parametrize("may_delete", [True, False])
def test_an_interrupted_probe_is_removed_or_named(may_delete: bool, layer: str) -> None:
    inner = FaultStore()
    inner.inject(verbs=["delete"], error=denied, times=0 if may_delete else None)
    create, first = inner.create, threading.Lock()

    def interrupting(key: str, data: bytes) -> None:
        if first.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # the interrupt is heard meanwhile
        create(key, data)

    inner.create = interrupting  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as caught:
        probe_create(over(inner, layer))
    left = inner.bucket.raw_list()
    assert bool(left) is not may_delete
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == len(left)
    assert all(name in notes[0] for name in left)


def test_a_writer_whose_start_is_interrupted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, begun = FaultStore(), threading.Event()
    create, real = inner.create, probe.started

    def lagging(key: str, data: bytes) -> None:
        if data.startswith(b"writer 7"):
            begun.set()
            time.sleep(0.2)  # the others have ended, and what they wrote is removed
        create(key, data)

    def started(work: Callable[[], object], *, name: str) -> threading.Thread:
        threads.append(real(work, name=name))
        if len(threads) == 8:
            begun.wait()
            raise KeyboardInterrupt
        return threads[-1]

    threads: list[threading.Thread] = []
    inner.create = lagging  # type: ignore[method-assign]
    monkeypatch.setattr(probe, "started", started)
    with pytest.raises(KeyboardInterrupt):
        probe_create(inner)
    for thread in threads:
        thread.join()
    assert inner.bucket.raw_list() == []


def _unsent(op: Op) -> StorageError:
    error = TransientError("connection refused", op=op.verb, key=op.key)
    error.may_have_landed = False
    return error


@pytest.mark.parametrize("error", [denied, _unsent])
def test_where_nothing_was_written_nothing_is_removed_or_said_to_stay(
    error: Callable[[Op], StorageError], layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    inner = FaultStore()
    inner.inject(error=error, times=None)
    with pytest.raises(StorageError) as caught:
        probe_create(over(inner, layer))
    assert "delete" not in {op.verb for op in inner.trace}
    assert (getattr(caught.value, "__notes__", []), "stay on" in caplog.text) == ([], False)


def test_a_job_without_the_right_to_delete_passes_and_is_told(layer: str, caplog: pytest.LogCaptureFixture) -> None:
    inner = FaultStore()
    inner.inject(verbs=["delete"], error=denied, times=None)
    with caplog.at_level(logging.WARNING, "cloudckpt.store.probe"):
        probe_create(over(inner, layer))
    left = inner.bucket.raw_list()
    assert {key.partition("-")[0] for key in left} == {"probe"}
    assert [key for key in left if key not in caplog.records[-1].getMessage()] == []


def test_a_disk_passes(tmp_path: Path) -> None:
    probe_create(LocalStore(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
