"""A save that replaces the checkpoint at its URL: readers find the old or the new whole, or how to have the old back.

The replacing save runs once to count its requests; then once per request and per way of breaking it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    CloudCkptError,
    ManifestError,
    Options,
)
from cloudckpt.errors import CommitUnknownError
from cloudckpt.format import MANIFEST_NAME
from cloudckpt.options import KIB
from tests.effort import diagonal
from tests.store.fault_store import ERRORS, Bucket, Crash, FaultKind, FaultStore, Op, opening_the_last, refused

URL = "memory://bucket/root"
OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=1, memory_budget_bytes=64 * KIB)
CRASHES = [FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultStore]]:
    """Let functions open the store that was pushed last."""
    with opening_the_last(monkeypatch, "cloudckpt.checkpoint.open_store") as pushed:
        yield pushed


def state_of(value: int) -> dict[str, object]:
    return {"w": torch.full((3_000,), float(value)), "n": value}


def save(clients: list[FaultStore], client: FaultStore, value: int, exists: str = "replace") -> None:
    clients.append(client)
    cloudckpt.save(state_of(value), URL, options=OPTIONS, progress="off", exists=exists)  # type: ignore[arg-type]


def value_at(clients: list[FaultStore], bucket: Bucket) -> int:
    """Return which whole checkpoint a reader finds."""
    clients.append(FaultStore(bucket))
    found = cloudckpt.read(URL)
    value = int(found["n"])  # type: ignore[call-overload]
    assert torch.equal(found["w"], state_of(value)["w"])  # type: ignore[arg-type]
    return value


def saved_once(clients: list[FaultStore]) -> Bucket:
    bucket = Bucket()
    save(clients, FaultStore(bucket), 1, exists="raise")
    return bucket


def count_requests(clients: list[FaultStore]) -> int:
    client = FaultStore(saved_once(clients))
    save(clients, client, 2)
    return client.op_count


def have_back(clients: list[FaultStore], bucket: Bucket, value: int) -> None:
    """Do what the error says."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        value_at(clients, bucket)
    (aside,) = [key for key in bucket.raw_list() if key.endswith(f"/{MANIFEST_NAME}")]
    assert f"copy {URL}/{aside} to {URL}/{MANIFEST_NAME} to have the checkpoint back" in str(caught.value)
    bucket.raw_put(MANIFEST_NAME, bucket.raw_get(aside))
    assert value_at(clients, bucket) == value


def check_after(clients: list[FaultStore], bucket: Bucket, possible: set[int]) -> None:
    if MANIFEST_NAME in bucket.objects:
        assert value_at(clients, bucket) in possible
    else:
        have_back(clients, bucket, 1)
    save(clients, FaultStore(bucket), 3)
    assert value_at(clients, bucket) == 3


def test_a_replacing_save_leaves_the_new_checkpoint_and_nothing_of_the_old(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)
    before = set(bucket.raw_list())
    save(clients, FaultStore(bucket), 2)
    assert value_at(clients, bucket) == 2
    assert set(bucket.raw_list()) & before == {MANIFEST_NAME}
    assert len({key.partition("/")[0] for key in bucket.raw_list()}) == 2, "a manifest, and one attempt"


def test_a_replacing_save_writes_over_no_object(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)

    def refuse_to_overwrite(op: Op) -> None:
        assert op.verb not in ("put", "create") or op.key not in bucket.objects or op.key.startswith("probe-"), op

    save(clients, FaultStore(bucket, hook=refuse_to_overwrite), 2)
    assert value_at(clients, bucket) == 2


def test_a_replacing_save_where_nothing_is_committed_saves(clients: list[FaultStore]) -> None:
    bucket = Bucket()
    save(clients, FaultStore(bucket), 2)
    assert value_at(clients, bucket) == 2


def test_without_a_word_a_checkpoint_is_not_replaced_and_the_error_says_the_word(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)
    with pytest.raises(CheckpointExistsError, match='exists="replace"'):
        save(clients, FaultStore(bucket), 2, exists="raise")
    with pytest.raises(cloudckpt.OptionsError, match="exists is 'overwrite'; give 'raise' or 'replace'"):
        save(clients, FaultStore(bucket), 2, exists="overwrite")
    assert value_at(clients, bucket) == 1


def test_a_checkpoint_that_cannot_be_read_is_not_replaced(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)
    bucket.raw_put(MANIFEST_NAME, b"{}")
    before = bucket.raw_list()
    with pytest.raises(ManifestError):
        save(clients, FaultStore(bucket), 2)
    assert [key for key in bucket.raw_list() if not key.startswith("probe-")] == before


def test_a_step_of_a_manager_s_root_is_not_replaced(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        step = manager.save(3, state_of(1))
        with pytest.raises(CheckpointExistsError, match="is step 3 of a CheckpointManager"):
            cloudckpt.save(state_of(2), step.url, exists="replace")
        assert manager.latest() == step
    assert cloudckpt.read(step.url)["n"] == 1


@pytest.mark.parametrize("kind", CRASHES)
def test_a_crash_at_any_request_of_a_replacing_save_loses_neither_checkpoint(
    clients: list[FaultStore], kind: FaultKind
) -> None:
    fired = 0
    for number in range(1, count_requests(clients) + 1):
        bucket = saved_once(clients)
        client = FaultStore(bucket)
        fault = client.crash_at(number, kind)
        with suppress(Crash, CloudCkptError):
            save(clients, client, 2)
        fired += fault.fired
        check_after(clients, bucket, {1, 2})
    assert fired > 10


@diagonal("kind, error, times", ERRORS, [pytest.param(1, id="once"), pytest.param(None, id="for-ever")])
def test_an_error_in_any_request_of_a_replacing_save_leaves_the_old_the_new_or_the_way_back(
    clients: list[FaultStore], kind: FaultKind, error: object, times: int | None
) -> None:
    fired = 0
    for number in range(1, count_requests(clients) + 1):
        bucket = saved_once(clients)
        client = FaultStore(bucket)
        fault = client.inject(kind=kind, error=error, skip=number - 1, times=times)
        possible = {2}
        try:
            save(clients, client, 2)
        except CommitUnknownError:
            possible = {1, 2}
        except CloudCkptError:
            possible = {1}
        fired += fault.fired
        check_after(clients, bucket, possible)
    assert fired > 10


def test_a_delete_that_the_store_carries_out_late_leaves_the_way_back_to_the_new_checkpoint(
    clients: list[FaultStore],
) -> None:
    bucket = saved_once(clients)
    client = FaultStore(bucket)
    late = client.inject(kind=FaultKind.LATE, verbs=["delete"], key=MANIFEST_NAME)
    save(clients, client, 2)
    assert late.fired
    save(clients, FaultStore(bucket), 3)
    assert value_at(clients, bucket) == 3
    bucket.deliver_late()
    have_back(clients, bucket, 3)


def test_a_commit_that_is_refused_puts_the_old_checkpoint_back(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)
    old = bucket.raw_get(MANIFEST_NAME)
    client = FaultStore(bucket)

    def refuse_the_new(op: Op) -> None:
        if op.verb == "delete" and op.key == MANIFEST_NAME:
            client.inject(verbs=["create"], key=MANIFEST_NAME, error=refused)

    client.hook = refuse_the_new
    with pytest.raises(CloudCkptError, match="injected"):
        save(clients, client, 2)
    assert bucket.raw_get(MANIFEST_NAME) == old
    assert value_at(clients, bucket) == 1


def test_one_of_two_saves_that_replace_at_once_says_that_the_other_was_first(clients: list[FaultStore]) -> None:
    bucket = saved_once(clients)
    client = FaultStore(bucket)
    has_met = False

    def let_another_in(op: Op) -> None:
        nonlocal has_met
        if op.verb == "create" and op.key == MANIFEST_NAME and not has_met:
            has_met = True
            save(clients, FaultStore(bucket), 3)

    client.hook = let_another_in
    with pytest.raises(CheckpointExistsError):
        save(clients, client, 2)
    assert value_at(clients, bucket) == 3
