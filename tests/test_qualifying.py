"""A store is qualified by what it does: each defect is named, with the options for it, and nothing is left there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cloudckpt import Options, RetryPolicy, qualifying
from cloudckpt.errors import AccessDeniedError, BucketNotFoundError, RetryExhaustedError
from cloudckpt.options import MIB
from cloudckpt.qualifying import Probe, probe
from cloudckpt.store import Listing, RetryingStore
from servers import FreshPrefix
from tests.store.fault_store import Bucket, FaultKind, FaultStore, denied

Asked = Callable[..., Probe]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Probe clients in memory, whose clock is this machine's."""

    def ask(client: Callable[[Options], FaultStore], **arguments: object) -> Probe:
        def opened(url: object, *, options: Options, **_: object) -> RetryingStore:
            return RetryingStore(client(options), RetryPolicy(max_attempts=2), sleep=lambda _: None)

        monkeypatch.setattr(qualifying, "open_store", opened)
        monkeypatch.setattr(qualifying.time, "time", lambda: Bucket().now_s)
        return probe("memory://bucket/root", large_bytes=8 * MIB, rounds=2, **arguments)  # type: ignore[arg-type]

    return ask


def bad(found: Probe) -> set[str]:
    return {one.name for one in found.findings if not one.is_good}


def test_a_good_store_can_hold_a_root_and_nothing_is_left(asked: Asked) -> None:
    bucket = Bucket()
    bucket.raw_put("epochs/0000000001.json", b"of a root that is there")
    found = asked(lambda _: FaultStore(bucket))
    assert found.can_hold_root
    assert found.verdict == "memory://bucket/root can hold a root"
    assert (bad(found), dict(found.needs), found.left) == (set(), {}, ())
    assert min(found.put_bytes_s, found.get_bytes_s) > 0
    assert bucket.raw_list() == ["epochs/0000000001.json"]


def test_a_store_that_overwrites_needs_a_single_writer_and_the_verdict_says_so(asked: Asked) -> None:
    found = asked(lambda _: FaultStore(Bucket(enforces_create=False)))
    assert found.can_hold_root
    assert dict(found.needs) == {"single_writer": True}
    assert bad(found) == {"create-only writes"}
    assert "Options(single_writer=True)" in found.verdict


def test_a_store_that_cannot_create_needs_a_single_writer(asked: Asked) -> None:
    found = asked(lambda _: FaultStore(Bucket(), is_create_atomic=False))
    assert dict(found.needs) == {"single_writer": True}


def test_a_store_whose_listing_lags_cannot_hold_a_root(asked: Asked) -> None:
    found = asked(lambda _: FaultStore(Bucket(listing_lag_s=60.0)))
    assert not found.can_hold_root
    assert "list after write" in bad(found)
    assert "consistent" in found.verdict


def test_a_clock_that_is_off_is_told_and_keeps_no_root_away(asked: Asked) -> None:
    found = asked(lambda _: FaultStore(Bucket(now_s=Bucket().now_s + 3_600)))
    assert found.can_hold_root
    assert bad(found) == {"clock"}
    assert found.skew_s == pytest.approx(3_600, abs=1)


class Flipping(FaultStore):
    """Keeps another byte than it was given of what is large."""

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        super().put(key, [memoryview(data if len(data) < MIB else data[:-1] + bytes([data[-1] ^ 1]))])


def test_a_store_that_changes_bytes_cannot_hold_a_root(asked: Asked) -> None:
    found = asked(lambda _: Flipping(Bucket()))
    assert not found.can_hold_root
    assert bad(found) == {"large object"}


def test_a_store_that_lets_nothing_be_deleted_holds_a_root_that_grows(asked: Asked) -> None:
    bucket = Bucket()

    def client(_: Options) -> FaultStore:
        store = FaultStore(bucket)
        store.inject(verbs=["delete"], error=denied, times=None)
        return store

    found = asked(client)
    assert found.can_hold_root
    assert bad(found) == {"delete"}
    assert sorted(found.left) == bucket.raw_list()
    assert found.left


class Lying(FaultStore):
    """Says that it has deleted, and keeps all."""

    def delete(self, keys: Sequence[str]) -> None:
        pass


class Hiding(Lying):
    """Does not list what it says that it has deleted, either."""

    _is_hidden = False

    def delete(self, keys: Sequence[str]) -> None:
        self._is_hidden = True

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        return Listing() if self._is_hidden else super().list(prefix, delimiter=delimiter, mark=mark)


@pytest.mark.parametrize("client", [Lying, Hiding])
def test_what_a_store_keeps_that_says_it_has_deleted_is_named(asked: Asked, client: Callable[..., FaultStore]) -> None:
    bucket = Bucket()
    found = asked(lambda _: client(bucket))
    assert bad(found) == {"delete"}
    assert sorted(found.left) == bucket.raw_list() != []


def test_of_a_put_whose_end_nobody_knows_the_error_names_the_key(asked: Asked) -> None:
    bucket = Bucket()

    def client(_: Options) -> FaultStore:
        store = FaultStore(bucket)
        store.inject(verbs=["put"], kind=FaultKind.LOST_ACK, times=None)
        return store

    with pytest.raises(RetryExhaustedError) as caught:
        asked(client)
    (key,) = bucket.raw_list()
    assert caught.value.__notes__ == [f"{key} may stay there"]


def test_a_directory_that_was_not_there_is_not_there_afterwards(tmp_path: Path) -> None:
    assert probe(tmp_path / "a" / "b", large_bytes=8 * MIB, rounds=1).left == ()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").mkdir()
    probe(tmp_path / "own", large_bytes=8 * MIB, rounds=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "own"]


@pytest.mark.parametrize(
    ("is_taken", "needs"),
    [
        (lambda options: options.checksum == "sha256", {"checksum": "sha256"}),
        (lambda options: options.create_only, {"create_only": True}),
    ],
    ids=["checksum", "create_only"],
)
def test_what_a_policy_demands_of_each_put_is_found_out(
    asked: Asked, is_taken: Callable[[Options], bool], needs: dict[str, object]
) -> None:
    bucket = Bucket()

    def client(options: Options) -> FaultStore:
        store = FaultStore(bucket)
        if not is_taken(options):
            store.inject(verbs=["put"], error=denied, times=None)
        return store

    found = asked(client)
    assert found.can_hold_root
    assert dict(found.needs) == needs
    assert bucket.raw_list() == []


def test_where_nothing_can_be_written_the_first_refusal_is_raised(asked: Asked) -> None:
    def client(_: Options) -> FaultStore:
        store = FaultStore(Bucket())
        store.inject(verbs=["put"], error=denied, times=None)
        return store

    with pytest.raises(AccessDeniedError):
        asked(client)


def test_an_interrupt_removes_what_was_written_and_says_so(asked: Asked) -> None:
    bucket = Bucket()

    def stop(what: str) -> None:
        if what == "large object":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        asked(lambda _: FaultStore(bucket), progress=stop)
    assert raised.value.__notes__ == ["what was written there was removed"]
    assert bucket.raw_list() == []


def test_a_real_server_can_hold_a_root(s3_url: FreshPrefix) -> None:
    found = probe(s3_url.url, storage_options=s3_url.storage_options, large_bytes=8 * MIB, rounds=1)
    assert found.can_hold_root, found.verdict
    assert found.left == ()


def test_a_bucket_that_is_not_there_is_asked_once(asked: Asked) -> None:
    clients: list[FaultStore] = []

    def client(_: Options) -> FaultStore:
        clients.append(FaultStore(Bucket()))
        clients[-1].inject(error=lambda op: BucketNotFoundError("no such bucket", op=op.verb), times=None)
        return clients[-1]

    with pytest.raises(BucketNotFoundError):
        asked(client)
    assert sum(one.op_count for one in clients) == 1
