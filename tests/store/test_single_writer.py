"""A root's only writer needs no create-only writes: its creates are plain puts, looked at before and after."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt.deadline import Deadline
from cloudckpt.errors import (
    AccessDeniedError,
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    RetryExhaustedError,
    SaveFailedError,
)
from cloudckpt.options import KIB, Options, RetryPolicy
from cloudckpt.root import Catalog
from cloudckpt.store import RetryingStore
from cloudckpt.store.local import LocalStore
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.fault_disk import FaultDisk
from tests.store.fault_store import FaultKind, FaultStore, Op, denied
from tests.store.http_object_server import ObjectServer

ENGINES = [
    *(pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore-s3")),
    *(pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore-gcs")),
]
POLICY = RetryPolicy(max_attempts=4, backoff_base_s=0.01)


def alone(inner: FaultStore | LocalStore) -> RetryingStore:
    return RetryingStore(inner, POLICY, single_writer=True, sleep=lambda _: None, rng=random.Random(0))


def test_a_create_is_a_look_a_put_and_a_look() -> None:
    inner = FaultStore()
    alone(inner).create("k", b"ours")
    assert [op.verb for op in inner.trace] == ["read", "put", "read"]
    assert inner.bucket.raw_get("k") == b"ours"


def test_another_patience_keeps_the_promise() -> None:
    inner = FaultStore()
    alone(inner).within(Deadline.after(60.0, "test")).create("k", b"ours")
    assert "create" not in {op.verb for op in inner.trace}


@pytest.mark.parametrize("there", [b"theirs", b"", b"x" * 200 * KIB])
def test_what_is_there_is_left_as_it_is(there: bytes) -> None:
    inner = FaultStore()
    inner.bucket.raw_put("k", there)
    with pytest.raises(ObjectExistsError):
        alone(inner).create("k", b"ours")
    assert inner.bucket.raw_get("k") == there
    assert "put" not in {op.verb for op in inner.trace}


@pytest.mark.parametrize("kind", [FaultKind.BEFORE, FaultKind.LOST_ACK])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_fault_on_the_way_is_made_good(kind: FaultKind, skip: int) -> None:
    inner = FaultStore()
    inner.inject(kind=kind, skip=skip)
    alone(inner).create("k", b"ours")
    assert inner.bucket.raw_get("k") == b"ours"
    assert [op.verb for op in inner.trace].count("put") <= 1 + (kind is FaultKind.BEFORE)


def test_a_put_that_may_have_landed_and_cannot_be_looked_at_is_unknown() -> None:
    inner = FaultStore()
    inner.inject(verbs=["read"], skip=1, times=None)
    with pytest.raises(CommitUnknownError):
        alone(inner).create("k", b"ours")


def test_a_put_that_was_refused_is_no_unknown_commit() -> None:
    inner = FaultStore()
    inner.inject(verbs=["put"], error=denied, times=None)
    with pytest.raises(AccessDeniedError):
        alone(inner).create("k", b"ours")


def test_a_store_that_cannot_be_looked_at_was_not_written_to() -> None:
    inner = FaultStore()
    inner.inject(verbs=["read"], times=None)
    with pytest.raises(RetryExhaustedError):
        alone(inner).create("k", b"ours")
    assert inner.bucket.raw_list() == []


def denying_absent(inner: FaultStore) -> FaultStore:
    """Deny what S3 denies without s3:ListBucket."""

    def deny(op: Op) -> None:
        if op.verb in ("read", "head") and op.key not in inner.bucket.objects:
            raise denied(op)

    inner.hook = deny
    return inner


def test_who_may_not_list_is_denied_what_is_absent_and_creates_it() -> None:
    inner = denying_absent(FaultStore())
    alone(inner).create("a/k", b"ours")
    assert inner.bucket.raw_list() == ["a/k"]
    with pytest.raises(ObjectExistsError):
        alone(inner).create("a/k", b"theirs")
    assert inner.bucket.raw_get("a/k") == b"ours"


def test_who_may_not_list_creates_also_where_a_reply_is_lost() -> None:
    inner = denying_absent(FaultStore())
    inner.inject(kind=FaultKind.LOST_ACK, verbs=["put"], key="k", times=1)
    inner.inject(kind=FaultKind.BEFORE, verbs=["read"], key="a/k", times=1)
    alone(inner).create("a/k", b"ours")
    assert inner.bucket.raw_list() == ["a/k"]


def test_who_may_not_read_overwrites_nothing() -> None:
    inner = FaultStore()
    inner.bucket.raw_put("k", b"a checkpoint's")
    inner.inject(verbs=["read", "head"], error=denied, times=None)
    with pytest.raises(AccessDeniedError):
        alone(inner).create("k", b"ours")
    assert inner.bucket.raw_get("k") == b"a checkpoint's"
    assert inner.bucket.raw_list() == ["k"]


def test_a_put_that_came_to_nothing_is_tried_again() -> None:
    class Forgetful(FaultStore):
        def put(self, key: str, buffers: object) -> None:
            if sum(op.verb == "read" for op in self.trace) > 2:
                super().put(key, buffers)  # type: ignore[arg-type]

    inner = Forgetful()
    alone(inner).create("k", b"ours")
    assert inner.bucket.raw_get("k") == b"ours"


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        server.has_preconditions = False
        yield server


def manager(server: ObjectServer, engine: Engine, *, single_writer: bool) -> cloudckpt.CheckpointManager:
    return cloudckpt.CheckpointManager(
        f"{engine.scheme}://bucket/run",
        storage_options=engine.options(server),
        engine=engine.kind.engine,
        options=Options(single_writer=single_writer, retry=POLICY),
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_answers_501_to_conditions_serves_a_single_writer(server: ObjectServer, engine: Engine) -> None:
    with manager(server, engine, single_writer=True) as first:
        for step in range(3):
            first.save(step, {"t": torch.full((3,), step)})
    with manager(server, engine, single_writer=True) as second:
        state = {"t": torch.zeros(3, dtype=torch.int64)}
        restored = second.restore(state)
        assert restored is not None
        assert (restored.step, state["t"].tolist()) == (2, [2, 2, 2])
        second.save(3, state)
        assert [checkpoint.epoch for checkpoint in second.checkpoints()] == [1, 1, 1, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_answers_501_to_conditions_is_refused_with_what_it_would_take(
    server: ObjectServer, engine: Engine
) -> None:
    with (
        manager(server, engine, single_writer=False) as several,
        pytest.raises((CreateNotEnforcedError, SaveFailedError), match=r"single_writer=True.*neither would notice"),
    ):
        several.save(0, {"t": torch.zeros(3)})
    assert server.keys() == []


def without_links() -> FaultDisk:
    disk = FaultDisk()
    disk.fail("link", errno.EPERM, times=1000)
    disk.fail("rename_new", errno.ENOSYS, times=1000)
    return disk


def test_a_disk_without_links_serves_a_single_writer(tmp_path: Path) -> None:
    catalog = Catalog(alone(LocalStore(tmp_path, disk=without_links())))
    assert catalog.claims.claim() == 1
    assert catalog.claims.claim() == 2
    assert catalog.void("step-0000000001-e0001/")
    with pytest.raises(ObjectExistsError):
        catalog.store.create("step-0000000001-e0001/manifest.json", b"{}")


def test_a_disk_without_links_is_refused_with_what_it_would_take(tmp_path: Path) -> None:
    with pytest.raises(CreateNotEnforcedError, match="single_writer=True"):
        LocalStore(tmp_path, disk=without_links()).create("k", b"x")


def test_a_put_that_may_yet_land_is_unknown() -> None:
    inner = FaultStore()
    inner.inject(verbs=["put"], times=None)
    with pytest.raises(CommitUnknownError):
        alone(inner).create("k", b"ours")
