"""The fault store breaks what it is told to, and nothing else: a dead knob would test nothing.

That it is a store is shown by the contract, in `test_contract_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    CredentialsExpiredError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from tests.store.fault_store import Bucket, Crash, FaultKind, FaultStore, denied, expired


@pytest.fixture
def store() -> FaultStore:
    store = FaultStore()
    store.bucket.raw_put("there", b"12345")
    return store


def put(store: FaultStore, key: str = "new") -> None:
    store.put(key, [memoryview(b"ab"), memoryview(b"c")])


@pytest.mark.parametrize("verb", [put, lambda store: store.create("new", b"abc")], ids=["put", "create"])
@pytest.mark.parametrize(
    ("kind", "raised", "at_once", "later"),
    [
        (FaultKind.BEFORE, TransientError, False, False),
        (FaultKind.LOST_ACK, TransientError, True, True),
        (FaultKind.LATE, TransientError, False, True),
        (FaultKind.CRASH_BEFORE, Crash, False, False),
        (FaultKind.CRASH_HALFWAY, Crash, False, False),
        (FaultKind.CRASH_AFTER, Crash, True, True),
    ],
)
def test_each_kind_breaks_a_write_at_its_place(
    store: FaultStore,
    verb: Callable[[FaultStore], None],
    kind: FaultKind,
    raised: type[BaseException],
    at_once: bool,
    later: bool,
) -> None:
    fault = store.inject(kind=kind)
    with pytest.raises(raised):
        verb(store)
    assert ("new" in store.bucket.objects) == at_once
    store.bucket.deliver_late()
    assert ("new" in store.bucket.objects) == later
    assert fault.fired == 1


def test_a_late_create_does_not_overwrite(store: FaultStore) -> None:
    store.inject(kind=FaultKind.LATE)
    with pytest.raises(TransientError):
        store.create("new", b"late")
    store.create("new", b"first")
    store.bucket.deliver_late()
    assert store.bucket.raw_get("new") == b"first"


def test_a_short_body_fails_a_get_and_goes_unnoticed_in_a_read(store: FaultStore) -> None:
    store.inject(kind=FaultKind.SHORT, times=2)
    with pytest.raises(TransientError):
        store.get("there", start=0, stop=4)
    assert store.read("there", limit_bytes=9) == b"12"


def test_a_flipped_byte_goes_unnoticed(store: FaultStore) -> None:
    store.inject(kind=FaultKind.FLIP, times=2)
    assert store.get("there", start=1, stop=3) == bytes([ord("2") ^ 0xFF]) + b"3"
    assert store.read("there", limit_bytes=9) == bytes([ord("1") ^ 0xFF]) + b"2345"
    assert store.bucket.raw_get("there") == b"12345"


def test_half_of_a_delete_is_done_by_a_crash_halfway(store: FaultStore) -> None:
    for key in "abcd":
        put(store, key)
    store.inject(kind=FaultKind.CRASH_HALFWAY)
    with pytest.raises(Crash):
        store.delete(["a", "b", "c", "d"])
    assert store.bucket.raw_list() == ["b", "d", "there"]


def test_a_crashed_client_is_dead_and_another_finds_what_is_there(store: FaultStore) -> None:
    store.crash_at(2, FaultKind.CRASH_AFTER)
    put(store, "a")
    with pytest.raises(Crash):
        put(store, "b")
    with pytest.raises(Crash):
        store.list()
    assert store.op_count == 2
    again = FaultStore(store.bucket)
    assert [info.key for info in again.list().objects] == ["a", "b", "there"]


@pytest.mark.parametrize(("error", "raised"), [(denied, AccessDeniedError), (expired, CredentialsExpiredError)])
def test_the_error_is_the_one_that_was_asked_for(
    store: FaultStore, error: Callable[..., StorageError], raised: type[StorageError]
) -> None:
    store.inject(error=error)
    with pytest.raises(raised) as caught:
        store.head("there")
    assert (type(caught.value), caught.value.op, caught.value.key) == (raised, "head", "there")


def test_a_refresh_ends_the_faults_that_wait_for_it_and_no_others(store: FaultStore) -> None:
    store.inject(verbs=["head"], error=expired, times=None, until_refresh=True)
    store.inject(verbs=["list"], times=None)
    store.refresh()
    assert store.head("there").size_bytes == 5
    with pytest.raises(TransientError):
        store.list()


def test_a_fault_hits_only_the_requests_that_it_names(store: FaultStore) -> None:
    fault = store.inject(verbs=["put"], key="shard", skip=1, times=2)
    outcomes = []
    for key in ("shard-1", "manifest", "shard-2", "shard-3", "shard-4"):
        try:
            put(store, key)
            outcomes.append(True)
        except TransientError:
            outcomes.append(False)
    store.head("shard-1")
    assert outcomes == [True, True, False, False, True]
    assert fault.fired == 2


def test_a_store_may_ignore_the_precondition_of_a_create() -> None:
    for enforces in (True, False):
        store = FaultStore(Bucket(enforces_create=enforces))
        store.create("a", b"first")
        if enforces:
            with pytest.raises(ObjectExistsError):
                store.create("a", b"second")
        else:
            store.create("a", b"second")
        assert store.bucket.raw_get("a") == (b"first" if enforces else b"second")


def test_the_stores_clock_moves_by_requests_and_by_hand_alone(store: FaultStore) -> None:
    put(store, "a")
    put(store, "b")
    first, second = store.head("a").modified_s, store.head("b").modified_s
    assert 0 < second - first < 1
    store.bucket.advance(3600)
    put(store, "a")
    assert 3600 < store.head("a").modified_s - first < 3601


def test_a_listing_may_lag_behind(store: FaultStore) -> None:
    store.bucket.advance(60)
    store.bucket.listing_lag_s = 10
    put(store, "new")
    assert [info.key for info in store.list().objects] == ["there"]
    assert store.head("new").size_bytes == 3
    store.bucket.advance(10)
    assert [info.key for info in store.list().objects] == ["new", "there"]


def test_the_trace_tells_every_request_in_order(store: FaultStore) -> None:
    seen = []
    store.hook = lambda op: seen.append(op.verb)
    put(store)
    store.delete(["a", "b"])
    assert [(op.number, op.verb, op.key, op.keys) for op in store.trace] == [
        (1, "put", "new", ("new",)),
        (2, "delete", "a", ("a", "b")),
    ]
    assert seen == ["put", "delete"]
