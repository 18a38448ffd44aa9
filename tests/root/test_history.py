"""The history of a root, whatever people and other jobs did to it: nothing that counts goes, and what is told is true.

Roots are copied without their claims, manifests are removed by hand, jobs forget to restore, go back, and are killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import (
    AccessDeniedError,
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    CloudCkptError,
    FencedError,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    ManifestError,
    Options,
    OptionsError,
    RetryPolicy,
)
from cloudckpt.format import (
    EPOCHS_PREFIX,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    checkpoint_prefix,
    mark_key,
    parse_epoch_key,
)
from cloudckpt.format.codec import registry
from cloudckpt.root import Catalog
from cloudckpt.store import RetryingStore
from cloudckpt.store.probe import _proven
from tests.store.fault_store import Bucket, FaultKind, FaultStore, Op, denied

URL = "memory://bucket/root"
DAY_S = 86_400.0
Open = Callable[..., CheckpointManager]


def state_of(step: int) -> dict[str, object]:
    return {"w": torch.full((100,), float(step))}


def save_steps(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_of(step), metrics={"loss": float(step)})
    manager._saves.homes[0].pruner.settle()


def orders(manager: CheckpointManager) -> list[tuple[int, int]]:
    return [one.order for one in manager.checkpoints()]


def below(bucket: Bucket, step: int, epoch: int) -> list[str]:
    prefix = checkpoint_prefix(step, epoch)
    return [key.removeprefix(prefix) for key in bucket.raw_list() if key.startswith(prefix)]


def remove(bucket: Bucket, start: str) -> None:
    for key in bucket.raw_list():
        if key.startswith(start):
            del bucket.objects[key]


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def job(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Open a manager with a client of its own, `client`, which is pushed before if it is to be a special one."""

    @contextmanager
    def opened(client: FaultStore | None = None, **arguments: object) -> Iterator[CheckpointManager]:
        store = RetryingStore(client or FaultStore(bucket), RetryPolicy(max_attempts=3), sleep=lambda _: None)
        monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: store)
        arguments = {"prune_grace_s": 0, "save_rng": False, "progress": "off", **arguments}
        with CheckpointManager(URL, **arguments) as manager:  # type: ignore[arg-type]
            yield manager

    _proven.clear()
    yield opened  # type: ignore[misc]
    _proven.clear()


# -- claims --------------------------------------------------------------------------------------------------


def test_an_epoch_is_above_every_prefix_also_where_the_claims_are_gone(bucket: Bucket, job: Open) -> None:
    for _ in range(3):
        with job() as manager:
            manager.restore(state_of(0))
            save_steps(manager, 5)
    remove(bucket, EPOCHS_PREFIX)
    with job(retention=[KeepLast(1)]) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 6, 7)
        latest = manager.latest()
        assert latest is not None
        assert latest.order == (4, 7)


def test_a_job_whose_claim_is_gone_is_fenced_and_commits_nothing(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1)
        remove(bucket, EPOCHS_PREFIX)
        with pytest.raises(FencedError, match=r"claim of this job, epochs/0000000001.json, is gone.*start this job"):
            save_steps(manager, 2)
        assert orders(manager) == [(1, 1)]


def test_a_job_whose_epoch_another_one_claimed_anew_is_fenced(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        catalog = manager._saves.homes[0].catalog
        save_steps(manager, 1)
        remove(bucket, EPOCHS_PREFIX)
        bucket.advance(60)
        assert Catalog(catalog.store).claims.claim() == 1
        with pytest.raises(FencedError, match="is another job's"):
            save_steps(manager, 2)


def test_a_claim_that_a_listing_does_not_show_yet_is_still_ours(bucket: Bucket, job: Open) -> None:
    bucket.listing_lag_s = 1e6
    with job() as manager:
        save_steps(manager, 1, 2)
        assert manager.restore(state_of(0), step=manager._saves.homes[0].epoch.newest) is not None


def test_what_was_copied_here_without_a_claim_fences_nobody_and_is_followed_by_a_newer_epoch(
    bucket: Bucket, job: Open
) -> None:
    with job() as manager:
        save_steps(manager, 1)
        source = Bucket()
        with job(FaultStore(source)) as other:
            save_steps(other, 1)
        with job(FaultStore(source)) as other:
            other.restore(state_of(0))
            save_steps(other, 30)
        bucket.objects.update({key: one for key, one in source.objects.items() if key.startswith("step-0000000030")})
        manager.restore(state_of(0))
        save_steps(manager, 31, 32)
        assert orders(manager) == [(1, 1), (2, 30), (3, 31), (3, 32)]


def test_a_fenced_job_does_not_take_the_root_back_by_a_restore(job: Open) -> None:
    with job() as old:
        save_steps(old, 10, 20)
        with job() as new:
            new.restore(state_of(0))
            save_steps(new, 30)
            old.restore(state_of(0), 10)
            with pytest.raises(FencedError, match="a new manager does, a restore with this one does not"):
                save_steps(old, 11)
            save_steps(new, 40)
            assert orders(new) == [(1, 10), (1, 20), (2, 30), (2, 40)]


# -- what is kept is there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [MANIFEST_NAME, ""], ids=["manifest", "all objects but the manifest"])
def test_a_checkpoint_that_was_removed_by_hand_is_not_counted_as_kept(bucket: Bucket, job: Open, gone: str) -> None:
    with job(retention=[KeepLast(2)]) as manager:
        save_steps(manager, 1, 2)
        for key in below(bucket, 2, 1):
            if (key == MANIFEST_NAME) == bool(gone):
                del bucket.objects[checkpoint_prefix(2, 1) + key]
        bucket.raw_put(checkpoint_prefix(2, 1) + "left/alone", b"")
        save_steps(manager, 3)
        assert {(1, 1), (1, 3)} <= set(orders(manager)), "of two kept ones one is gone, so the one before it stays"
        save_steps(manager, 4)
        assert set(orders(manager)) - {(1, 2)} == {(1, 3), (1, 4)}


def test_what_was_removed_by_hand_is_not_listed(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1, 2, 3)
        del bucket.objects[checkpoint_prefix(2, 1) + MANIFEST_NAME]
        assert orders(manager) == [(1, 1), (1, 3)]
        best = manager.best("loss", "max")
        assert best is not None
        assert best.step == 3


def test_a_step_that_was_removed_by_hand_may_be_saved_again(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1)
        del bucket.objects[checkpoint_prefix(1, 1) + MANIFEST_NAME]
        save_steps(manager, 1)
        assert orders(manager) == [(2, 1)]


def test_nothing_is_read_to_prune_but_what_is_new(bucket: Bucket, job: Open) -> None:
    for step in range(20, 40):
        bucket.raw_put(checkpoint_prefix(step, 1) + "0123456789abcdef/index.bin", b"never committed")
    with job(retention=[KeepLast(2)]) as manager:
        save_steps(manager, 1, 2, 3)
        client = manager._store.inner  # type: ignore[attr-defined]
        before = client.op_count
        save_steps(manager, 4)
    assert [op for op in client.trace[before:] if op.verb == "read"] == []


def test_a_step_that_was_saved_again_by_others_is_read_again_and_what_has_not_changed_is_not(
    bucket: Bucket, job: Open
) -> None:
    with job() as writer:
        save_steps(writer, 10, 20)
        client = FaultStore(bucket)
        with job(client) as reader:
            assert [one.metrics for one in reader.checkpoints()] == [{"loss": 10.0}, {"loss": 20.0}]
            writer.delete(10)
            writer.save(10, state_of(10), metrics={"loss": 99.0})
            # Where its shards stand, they are another place to look at.
            writer._saves.homes[0].pruner.settle()
            assert [one.metrics for one in reader.checkpoints()] == [{"loss": 20.0}, {"loss": 99.0}]
            before = client.op_count
            assert [one.metrics for one in reader.checkpoints()] == [{"loss": 20.0}, {"loss": 99.0}]
            assert [op.verb for op in client.trace[before:]] == ["list"] * 3


@pytest.mark.parametrize("is_left", [True, False], ids=["shards of the deleted one are left", "they are gone"])
def test_a_manifest_is_read_again_where_its_time_or_its_attempt_is_another_one(
    bucket: Bucket, job: Open, is_left: bool
) -> None:
    with job(prune_grace_s=60 if is_left else 0) as writer:
        save_steps(writer, 10)
        with job() as reader:
            reader.checkpoints()
            for loss in (5.0, 6.0, 7.0):
                writer.delete(10)
                writer._saves.homes[0].pruner.clean()
                writer._saves.homes[0].pruner.settle()
                writer.save(10, state_of(10), metrics={"loss": loss})
                assert [one.metrics for one in reader.checkpoints()] == [{"loss": loss}]


@pytest.mark.parametrize("how", ["gone", "cut"])
@pytest.mark.parametrize("name", ["index.bin", "r00000-0000.safetensors"])
def test_what_a_rule_keeps_is_whole_as_far_as_a_listing_tells(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    client = FaultStore(bucket)
    with job(client, retention=[KeepBest("loss")]) as manager:
        manager.save(1, state_of(1), metrics={"loss": 1.0})
        manager.save(4, state_of(4), metrics={"loss": 4.0})
        (key,) = [key for key in bucket.raw_list() if key.startswith(checkpoint_prefix(1, 1)) and key.endswith(name)]
        data = bucket.objects.pop(key).data
        if how == "cut":
            bucket.raw_put(key, data[:-1])
        before = client.op_count
        save_steps(manager, 5, 6)
        assert orders(manager) == [(1, 1), (1, 4), (1, 6)], "4 is the best of those that can be loaded"
        assert [op for op in client.trace[before:] if op.verb in ("read", "get")] == [], "no bytes are read for that"
    assert len([one for one in caplog.messages if "is not whole" in one]) == 1


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_save_that_would_be_skipped_is_made_if_what_was_saved_is_gone(job: Open, how: str) -> None:
    with job() as manager:
        save_steps(manager, 10)
        with job() as other:
            other.delete(10)
        saved = getattr(manager, how)(10, state_of(10), exists="skip")
        assert saved if how == "save" else saved.result()
        assert orders(manager) == [(2, 10)]


def test_a_save_is_skipped_by_one_look_and_also_where_the_store_does_not_answer(bucket: Bucket, job: Open) -> None:
    client = FaultStore(bucket)
    with job(client) as manager:
        save_steps(manager, 10)
        before = client.op_count
        manager.save(10, state_of(10), exists="skip")
        assert [op.verb for op in client.trace[before:]] == ["head"]
        client.inject(verbs=["head"], times=None)
        skipped = manager.save(10, state_of(10), exists="skip")
        assert skipped is not None
        assert skipped.order == (1, 10)


# -- interrupts -----------------------------------------------------------------------------------------------


class SignalError(Exception):
    """What a signal's handler raises."""


Call = Callable[[], object]
MOMENTS: dict[str, Callable[[Call], object]] = {
    "when the manifest stood": lambda create: create(),
    "while the request was under way": lambda _: None,
}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SignalError])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_that_was_interrupted_at_its_commit_is_known_by_the_next_call(
    bucket: Bucket, job: Open, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], moment: str
) -> None:
    under_way: list[Call] = []
    create = FaultStore.create

    def interrupted(store: FaultStore, key: str, data: bytes) -> None:
        if under_way or not key.endswith(MANIFEST_NAME):
            return create(store, key, data)
        under_way.append(lambda: create(store, key, data))
        MOMENTS[moment](under_way[0])
        raise kind

    with job() as manager:
        save_steps(manager, 1)
        monkeypatch.setattr(FaultStore, "create", interrupted)
        with pytest.raises(kind) as caught:
            manager.save(2, state_of(2))
        stands = bool(MANIFEST_NAME in below(bucket, 2, 1))
        assert [note for note in getattr(caught.value, "__notes__", []) if "step 2 is saved" in note][:1] == (
            ["step 2 is saved: this came after the commit"] if stands else []
        )
        if not stands:
            under_way[0]()  # type: ignore[misc]
        saved = manager.save(2, state_of(2), exists="skip")
        assert saved is not None
        assert saved.order == (1, 2)
        with pytest.raises(CheckpointExistsError):
            manager.save(2, state_of(2))
        save_steps(manager, 3)
    with job() as manager:
        assert orders(manager) == [(1, 1), (1, 2), (1, 3)]
        assert manager.restore(state_of(0), 2) is not None


def test_a_save_that_was_interrupted_before_its_commit_is_made_again(
    bucket: Bucket, job: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FaultStore.put

    def interrupted(store: FaultStore, key: str, data: object) -> None:
        monkeypatch.setattr(FaultStore, "put", put)
        raise KeyboardInterrupt

    with job() as manager:
        save_steps(manager, 1)
        monkeypatch.setattr(FaultStore, "put", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            manager.save(2, state_of(2))
        assert not hasattr(caught.value, "__notes__")
        saved = manager.save(2, state_of(2), exists="skip")
        assert saved is not None
        assert orders(manager) == [(1, 1), (1, 2)]


# -- nothing is there ----------------------------------------------------------------------------------------


def take_manifests(bucket: Bucket) -> None:
    for key in bucket.raw_list():
        if key.startswith("step-") and key.endswith(MANIFEST_NAME):
            del bucket.objects[key]


def test_a_root_whose_manifests_were_removed_is_no_fresh_start(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 10, 30)
    with job() as manager:
        manager.restore(state_of(0))
        save_steps(manager, 40)
    take_manifests(bucket)
    with job(retention=[KeepBest("loss")]) as manager:
        for wanted in ("latest", "best"):
            with pytest.raises(ManifestError, match=r"epoch 2 went on from step 30, and 3 attempts .*to start afresh,"):
                manager.restore(state_of(0), wanted)
        save_steps(manager, 1)
        assert orders(manager) == [(3, 1)]


def test_attempts_of_a_first_job_that_never_committed_are_a_fresh_start_that_is_told(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with job() as manager:
        assert manager.restore(state_of(0)) is None
        save_steps(manager, 10)
    assert "without a manifest" not in caplog.text
    take_manifests(bucket)
    remove(bucket, mark_key("committed", 1))
    with job() as manager:
        assert manager.restore(state_of(0)) is None
        assert manager.latest() is None
        assert manager.checkpoints() == []
    assert caplog.text.count("without a manifest") == 1
    assert "but 1 attempts stand there without a manifest (the newest: step-0000000010-e0001/)" in caplog.text


Look = Callable[[CheckpointManager], object]
LOOKS: list[Look] = [
    lambda manager: manager.restore(state_of(0)),
    lambda manager: manager.restore(state_of(0), "best"),
    CheckpointManager.latest,
    CheckpointManager.latest_step,
    CheckpointManager.checkpoints,
    CheckpointManager.all_steps,
    lambda manager: manager.best("loss"),
]


def take_steps(bucket: Bucket) -> None:
    remove(bucket, "step-")


@pytest.mark.parametrize("take", [take_manifests, take_steps])
@pytest.mark.parametrize("jobs", [1, 2])
def test_nobody_says_that_nothing_was_ever_committed_where_something_was(
    bucket: Bucket, job: Open, take: Callable[[Bucket], None], jobs: int
) -> None:
    for number in range(jobs):
        with job() as manager:
            manager.restore(state_of(0))
            save_steps(manager, 10 * number, 10 * number + 1)
    take(bucket)
    with job(retention=[KeepBest("loss")]) as manager:
        for look in LOOKS:
            with pytest.raises(ManifestError, match="the manifests were removed, by hand or by a lifecycle rule"):
                look(manager)


def test_what_a_claim_went_on_from_tells_of_a_loss_also_without_a_mark(bucket: Bucket, job: Open) -> None:
    for step in (1, 2):
        with job() as manager:
            manager.restore(state_of(0))
            save_steps(manager, step)
    remove(bucket, mark_key("committed", 1))
    remove(bucket, "step-")
    with job() as manager, pytest.raises(ManifestError, match="epoch 2 went on from step 1, and no attempt stands"):
        manager.latest()


def test_where_everything_was_deleted_by_delete_it_is_a_fresh_start_and_a_later_loss_is_one(
    bucket: Bucket, job: Open
) -> None:
    for step in (1, 2):
        with job() as manager:
            manager.restore(state_of(0))
            save_steps(manager, step)
    with job(retention=[KeepBest("loss")]) as manager:
        manager.restore(state_of(0))
        for step in manager.all_steps():
            manager.delete(step)
        assert [look(manager) for look in LOOKS] == [None, None, None, None, [], [], None]
        save_steps(manager, 3)
        assert orders(manager) == [(3, 3)]
        manager.sweep(dry_run=False, older_than_s=0)
    remove(bucket, "step-")
    with job() as manager, pytest.raises(ManifestError, match="epoch 3 has committed there"):
        manager.latest()


def test_who_goes_on_in_the_job_in_which_all_was_deleted_does_so_in_a_new_epoch(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1)
        manager.delete(1)
        assert manager.latest() is None
        save_steps(manager, 2)
        assert orders(manager) == [(2, 2)]
    remove(bucket, "step-")
    with job() as manager, pytest.raises(ManifestError, match="no attempt stands"):
        manager.latest()


def test_a_first_commit_while_somebody_looks_is_no_loss(bucket: Bucket, job: Open) -> None:
    with job() as writer:
        roots = writer._saves.roots
        lost = Catalog.lost

        def while_it_commits(catalog: Catalog) -> ManifestError | None:
            if not bucket.objects:
                save_steps(writer, 1)
            return lost(catalog)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Catalog, "lost", while_it_commits)
            newest = roots.newest()
        assert newest is not None
        assert newest.order == (1, 1)


def test_what_is_copied_here_while_a_job_is_at_work_hides_nothing_that_it_saves_afterwards(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture
) -> None:
    source = Bucket()
    for step in (500, 501, 502):
        with job(FaultStore(source)) as other:
            save_steps(other, step)
    with job() as manager:
        save_steps(manager, 10)
        bucket.objects.update({key: one for key, one in source.objects.items() if key.startswith("step-0000000502")})
        bucket.advance(60)
        save_steps(manager, 11, 12, 13)
        assert orders(manager)[-1] == (4, 13)
    assert caplog.text.count("of an epoch above this job's") == 1
    with job() as manager:
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.order == (4, 13)


@pytest.mark.parametrize("key", ["step-0000000001-e9999999999/0123456789abcdef/index.bin", "epochs/9999999999.json"])
def test_a_stray_epoch_above_which_there_is_none_is_named(bucket: Bucket, job: Open, key: str) -> None:
    bucket.raw_put(key, b"{}")
    with job() as manager, pytest.raises(OptionsError, match=r"no epoch is left.*(-e|epochs/)9999999999.*stands at"):
        save_steps(manager, 1)


# -- lines ---------------------------------------------------------------------------------------------------


def test_a_job_that_forgot_to_restore_removes_nothing_of_the_run_before(
    job: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with job(retention=[KeepLast(3)]) as manager:
        save_steps(manager, 90_002, 90_003, 90_004)
    with job(retention=[KeepLast(3)]) as manager:
        save_steps(manager, 0, 1, 2, 3, 4)
        assert orders(manager) == [(1, 90_002), (1, 90_003), (1, 90_004), (2, 2), (2, 3), (2, 4)]
    named = [one for one in caplog.messages if "retention leaves them alone" in one]
    assert len(named) == 1
    assert "3 checkpoints at" in named[0]
    assert "90004 of epoch 1" in named[0]


def test_the_scope_of_retention_may_be_the_whole_root(job: Open) -> None:
    with job() as manager:
        save_steps(manager, 7, 8)
    with job(retention=[KeepLast(2)], retention_scope="root") as manager:
        save_steps(manager, 0, 1)
        assert orders(manager) == [(2, 0), (2, 1)]
    with (
        pytest.raises(OptionsError, match="retention_scope is 'all'; give 'line' or 'root'"),
        job(retention_scope="all"),
    ):
        pass


def test_a_job_prunes_the_whole_line_that_it_resumed(job: Open) -> None:
    for epoch in range(1, 5):
        with job(retention=[KeepLast(3)]) as manager:
            manager.restore(state_of(0))
            save_steps(manager, 2 * epoch, 2 * epoch + 1)
            assert len(orders(manager)) == min(3, 2 * epoch)
    with job() as manager:
        assert orders(manager) == [(3, 7), (4, 8), (4, 9)]


def test_the_line_leads_past_epochs_of_which_nothing_is_left(job: Open) -> None:
    rules = [KeepLast(1), KeepEvery(steps=100)]
    for epoch in range(1, 6):
        with job(retention=rules) as manager:
            manager.restore(state_of(0))
            save_steps(manager, *([100] if epoch == 1 else []), 100 + epoch)
    with job(retention=[KeepLast(1)]) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 200)
        assert orders(manager) == [(6, 200)], "step 100 of epoch 1 is of the line, though 2 to 4 have no prefix left"


def test_a_claim_of_before_lines_leads_on_by_what_it_resumed_from(bucket: Bucket, job: Open) -> None:
    for epoch in range(1, 4):
        with job() as manager:
            manager.restore(state_of(0))
            save_steps(manager, epoch)
    for key in bucket.raw_list():
        if parse_epoch_key(key):
            text = bucket.raw_get(key).decode()
            bucket.raw_put(
                key, (text.partition(',\n "line"')[0].rstrip().removesuffix("}").rstrip() + "\n}\n").encode()
            )
    with job(retention=[KeepLast(1)]) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 4)
        assert orders(manager) == [(4, 4)]


def test_what_diverged_from_the_line_of_another_job_stays(job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1, 2, 3)
    with job(retention=[KeepLast(1)]) as manager:
        manager.restore(state_of(0), step=1)
        save_steps(manager, 2)
        assert orders(manager) == [(1, 2), (1, 3), (2, 2)]


def copied_from_another_root(bucket: Bucket, job: Open, step: int) -> str:
    """Save a step below another root, and copy it to `bucket`; return its prefix."""
    with job(FaultStore(other := Bucket())) as manager:
        save_steps(manager, step)
    prefix = checkpoint_prefix(step, 1)
    bucket.objects |= {key: found for key, found in other.objects.items() if key.startswith(prefix)}
    return prefix


def test_what_was_copied_from_another_root_under_an_epoch_of_the_line_stays(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with job(retention=1) as manager:
        save_steps(manager, 10)
        own = copied_from_another_root(bucket, job, 5)
        save_steps(manager, 20, 30)
        assert orders(manager) == [(1, 5), (1, 30)]
    with caplog.at_level(logging.WARNING), job(retention=1) as manager:
        manager.restore(state_of(0))
        earlier = copied_from_another_root(bucket, job, 6)
        save_steps(manager, 40, 50)
        assert orders(manager) == [(1, 5), (1, 6), (2, 50)]
    assert {own, earlier} <= {key.partition("/")[0] + "/" for key in bucket.raw_list()}
    assert any("2 checkpoints at" in one and "are not of the line of history" in one for one in caplog.messages)


def test_what_no_claim_proves_to_be_of_the_line_stays(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 10)
    with job() as manager:
        manager.restore(state_of(0))
        save_steps(manager, 20)
    del bucket.objects[f"{EPOCHS_PREFIX}{1:010d}.json"]
    with job(retention=1) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 30, 40)
        assert orders(manager) == [(1, 10), (3, 40)]


def test_going_back_in_a_job_begins_a_newer_line_in_which_every_step_is_free(job: Open) -> None:
    with job() as manager:
        save_steps(manager, 4, 9)
        manager.restore(state_of(0), step=4)
        save_steps(manager, 9)
        latest = manager.latest()
        assert latest is not None
        assert latest.order == (2, 9)


def test_a_job_that_restores_after_its_first_save_failed_goes_on_from_what_it_restored(
    bucket: Bucket, job: Open
) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
    client = FaultStore(bucket)
    with job(client, retention=[KeepLast(1)]) as manager:
        client.inject(verbs=["put"], key="step-", error=denied)
        with pytest.raises(Exception, match="injected"):
            save_steps(manager, 0)
        manager.restore(state_of(0))
        save_steps(manager, 3)
        assert orders(manager) == [(3, 3)]


def test_a_job_that_restores_the_newest_of_a_newer_job_stays_fenced(bucket: Bucket, job: Open) -> None:
    with job() as old:
        save_steps(old, 1)
        with job() as new:
            new.restore(state_of(0))
            save_steps(new, 2)
        restored = old.restore(state_of(0))
        assert restored is not None
        assert restored.order == (2, 2)
        with pytest.raises(FencedError):
            save_steps(old, 3)


def test_a_save_below_the_newest_step_is_the_newest_and_stays(job: Open, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), job(retention=2) as manager:
        save_steps(manager, 100, 200, 300)
        for step in (10, 20, 5):
            save_steps(manager, step)
            assert manager.latest_step() == step
        assert orders(manager) == [(2, 20), (3, 5)]
    assert len([one for one in caplog.messages if "step 10 is below step 300, which epoch 1 has saved" in one]) == 1
    assert len([one for one in caplog.messages if "a new epoch begins with it" in one]) == 1
    with job() as manager:
        state = state_of(0)
        assert manager.restore(state) is not None
        assert torch.equal(state["w"], torch.full((100,), 5.0))  # type: ignore[arg-type]


def test_a_step_that_this_epoch_has_saved_is_refused_also_below_its_newest(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
        with pytest.raises(CheckpointExistsError, match="already committed"):
            save_steps(manager, 1)
        save_steps(manager, 3)
        assert orders(manager) == [(1, 1), (1, 2), (1, 3)]


def test_a_fenced_job_takes_no_root_back_by_a_lower_step(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 10, 20)
        Catalog(FaultStore(bucket)).claims.claim()
        with pytest.raises(FencedError, match="epoch 2 has claimed"):
            save_steps(manager, 5)
        assert orders(manager) == [(1, 10), (1, 20)]


def test_an_unknown_step_is_answered_with_the_committed_ones_alone(bucket: Bucket, job: Open) -> None:
    bucket.raw_put(checkpoint_prefix(6, 1) + "0123456789abcdef/index.bin", b"never committed")
    with job() as manager:
        save_steps(manager, *range(1, 5), *range(20, 24))
        with pytest.raises(CheckpointNotFoundError, match=r"the nearest of 8 there: 1, 2, 3, 4, 20$"):
            manager.restore(state_of(0), step=6)


# -- what cannot be read -------------------------------------------------------------------------------------


@contextmanager
def unreadable(bucket: Bucket, how: str, step: int = 1) -> Iterator[FaultStore]:
    key = checkpoint_prefix(step, 1) + MANIFEST_NAME
    client = FaultStore(bucket)
    if how == "denied":
        client.inject(verbs=["read"], key=key, error=denied, times=None)
    else:
        bucket.raw_put(key, {"garbage": b"<html>", "large": b" " * (MANIFEST_LIMIT_BYTES + 1)}[how])
    yield client


@pytest.mark.parametrize("how", ["garbage", "large", "denied"])
def test_one_manifest_that_cannot_be_read_stays_is_told_apart_and_stops_nothing(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
    with unreadable(bucket, how) as client, job(client, retention=[KeepLast(2), KeepBest("loss")]) as manager:
        manager.restore(state_of(0))
        save_steps(manager, 3, 4, 5)
        assert orders(manager) == [(1, 2), (2, 4), (2, 5)]
        (found,) = manager.unreadable()
        assert found.order == (1, 1)
        assert found.url == f"{URL}/{checkpoint_prefix(1, 1)}".rstrip("/")
        best = manager.best("loss")
        assert best is not None
        assert best.step == 2
        assert len(below(bucket, 1, 1)) == 3
    assert len([one for one in caplog.messages if "manifest cannot be read" in one]) == 1


@pytest.mark.parametrize("how", ["garbage", "large"])
def test_a_newest_manifest_that_is_damaged_is_passed_over(bucket: Bucket, job: Open, how: str) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
    with unreadable(bucket, how, step=2) as client, job(client) as manager:
        restored = manager.restore(state_of(0))
    assert restored is not None
    assert restored.step == 1


def test_a_newest_manifest_that_the_store_refuses_is_never_passed_over(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
    with (
        unreadable(bucket, "denied", step=2) as client,
        job(client) as manager,
        pytest.raises(Exception, match="injec"),
    ):
        manager.restore(state_of(0))


def test_where_a_store_lets_nothing_be_deleted_that_is_told_once(bucket: Bucket, job: Open) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["delete"], error=denied, times=None)
    with job(client, retention=[KeepLast(1)]) as manager:
        save_steps(manager, *range(6))
        assert [step for _, step in orders(manager)] == [*range(6)]
        (trouble,) = manager.report().troubles
    assert "step 1 is saved, but pruning failed and is left to the next save: injected into delete" in trouble


def test_a_pause_and_a_wrong_clock_remove_nothing_by_age(job: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]

    def worked(hours: float, wall: str, manager: CheckpointManager, step: int) -> None:
        now_s[0] += 3600 * hours
        monkeypatch.setattr("cloudckpt.root.catalog._now", lambda: wall)
        save_steps(manager, step)

    with job(retention=KeepFor(hours=3), clock=lambda: now_s[0]) as manager:
        for step in range(1, 4):
            worked(1, f"2026-01-01T0{step}:00:00.000+00:00", manager, step)
    now_s[0] += 1e6
    with job(retention=KeepFor(hours=3), clock=lambda: now_s[0]) as manager:
        manager.restore(state_of(0))
        worked(1, "2031-01-01T00:00:00.000+00:00", manager, 4)
        assert [step for _, step in orders(manager)] == [1, 2, 3, 4]
        worked(1, "2026-01-09T00:00:00.000+00:00", manager, 5)
        assert [step for _, step in orders(manager)] == [2, 3, 4, 5]


def test_metadata_of_a_type_that_is_not_known_here_hides_nothing_else(
    job: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Config:
        pass

    with monkeypatch.context() as patched:
        patched.setattr(registry, "_BY_KIND", dict(registry._BY_KIND))
        patched.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
        cloudckpt.register(Config, name="config", encode=lambda _: 1, decode=lambda _: Config())
        with job() as manager:
            save_steps(manager, 1)
            manager.save(2, state_of(2), metadata={"run": 7, "config": Config()})
    with job(retention=[KeepLast(2)]) as manager:
        restored = manager.restore(state_of(0))
        assert restored is not None
        assert restored.step == 2
        assert manager.unreadable() == []
        assert "step=2" in repr(restored)
        with pytest.raises(CloudCkptError, match=r"metadata\.config"):
            _ = restored.metadata
        save_steps(manager, 3, 4)
        assert manager.all_steps() == [3, 4]


def test_a_step_that_was_copied_into_another_epoch_hides_none_that_is_whole(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 10, 20)
    for name in below(bucket, 10, 1):
        bucket.raw_put(checkpoint_prefix(10, 2) + name, bucket.raw_get(checkpoint_prefix(10, 1) + name))
    with job() as manager:
        restored = manager.restore(state_of(0), 10)
        assert restored is not None
        assert restored.order == (1, 10)
        manager.delete(10)
        with pytest.raises(ManifestError, match="it was copied there"):
            manager.restore(state_of(0), 10)
        manager.delete(10)
        assert MANIFEST_NAME not in below(bucket, 10, 2)
        with pytest.raises(CheckpointNotFoundError):
            manager.restore(state_of(0), 10)
    assert below(bucket, 10, 2) == []


@pytest.mark.parametrize("how", ["garbage", "large"])
def test_a_step_that_cannot_be_read_goes_when_it_is_asked_for_by_name_and_may_be_saved_again(
    bucket: Bucket, job: Open, how: str
) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
        with unreadable(bucket, how):
            with pytest.raises(CheckpointExistsError, match="delete it first"):
                save_steps(manager, 1)
            manager.delete(1)
        assert MANIFEST_NAME not in below(bucket, 1, 1)
        save_steps(manager, 1)
        assert orders(manager) == [(1, 2), (2, 1)], "a step below the newest begins a newer line"
        assert manager.unreadable() == []
    assert below(bucket, 1, 1) == []


def test_what_the_store_refuses_to_read_is_not_deleted(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1)
    with unreadable(bucket, "denied") as client, job(client) as manager:
        with pytest.raises(AccessDeniedError):
            manager.delete(1)
        assert len(below(bucket, 1, 1)) == 3


# -- leftovers -----------------------------------------------------------------------------------------------


def leave(bucket: Bucket, step: int, epoch: int = 1) -> None:
    for name in ("r00000-0000.safetensors", "index.bin"):
        bucket.raw_put(f"{checkpoint_prefix(step, epoch)}0123456789abcdef/{name}", b"half a job")


def test_the_next_job_removes_what_the_one_before_left(bucket: Bucket, job: Open) -> None:
    with job(retention=[KeepLast(1)], prune_grace_s=60) as manager:
        save_steps(manager, *range(8))
    leave(bucket, 9)
    bucket.advance(2 * 3_600)
    with job() as manager:
        manager.restore(state_of(0))
        save_steps(manager, 10)
        left = {key.partition("/")[0] + "/" for key in bucket.raw_list() if not key.endswith(MANIFEST_NAME)}
        assert left == {EPOCHS_PREFIX, checkpoint_prefix(7, 1), checkpoint_prefix(10, 2)} | {
            key for key in left if key.startswith("probe")
        }
        assert orders(manager) == [(1, 7), (2, 10)]


def test_a_sweep_grants_what_was_pruned_its_grace_time(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1, 2)
    bucket.advance(DAY_S)
    now_s = [0.0]
    with job(retention=[KeepLast(1)], prune_grace_s=60, clock=lambda: now_s[0]) as manager:
        manager.restore(state_of(0))
        leave(bucket, 9)
        bucket.advance(DAY_S)
        save_steps(manager, 3)
        assert below(bucket, 9, 1) == [MANIFEST_NAME], "nobody has written there for a day"
        now_s[0] = 59.0
        save_steps(manager, 4)
        assert len(below(bucket, 1, 1)) == len(below(bucket, 2, 1)) == 2, "pruned by this job a moment ago"
        now_s[0] = 60.0
        save_steps(manager, 5)
        assert below(bucket, 1, 1) == below(bucket, 2, 1) == []
        assert len(below(bucket, 3, 2)) == 2, "pruned a second ago"


def test_a_step_that_is_saved_again_keeps_its_shards_when_those_of_the_deleted_one_go(
    bucket: Bucket, job: Open
) -> None:
    now_s = [0.0]
    client = FaultStore(bucket)
    with job(client, prune_grace_s=60, clock=lambda: now_s[0]) as manager:
        save_steps(manager, 1, 2)
        deleted = below(bucket, 2, 1)
        manager.delete(2)
        now_s[0] = 61.0
        pruner = manager._saves.homes[0].pruner

        def clean(op: Op) -> None:
            if op.verb == "put" and op.key.endswith("index.bin"):
                pruner.clean()
                pruner.settle()

        client.hook = clean
        save_steps(manager, 2)
        client.hook = None
        state = state_of(0)
        assert manager.restore(state, 2) is not None
        assert torch.equal(state["w"], torch.full((100,), 2.0))  # type: ignore[arg-type]
    assert below(bucket, 2, 1) == []
    assert set(below(bucket, 2, 2)) & set(deleted) == {MANIFEST_NAME}


@pytest.mark.parametrize("is_unreadable", [False, True])
def test_a_delete_that_the_store_carries_out_late_removes_no_newer_commit(
    bucket: Bucket, job: Open, *, is_unreadable: bool
) -> None:
    client = FaultStore(bucket)
    with job(client) as manager:
        save_steps(manager, 1, 2)
        if is_unreadable:
            bucket.raw_put(checkpoint_prefix(2, 1) + MANIFEST_NAME, b"{}")
        late = client.inject(kind=FaultKind.LATE, verbs=["delete"], key=MANIFEST_NAME)
        manager.delete(2)
        save_steps(manager, 2)
        bucket.deliver_late()
        assert late.fired
        assert orders(manager) == [(1, 1), (2, 2)]
        save_steps(manager, 3)
        assert orders(manager)[-1] == (2, 3)


def test_a_store_that_answers_no_delete_holds_up_neither_a_save_nor_the_end_of_its_job(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cloudckpt.manager.saves._PRUNING_S", 0.3)
    client = FaultStore(bucket)
    # It pauses as it likes, and has time for ever.
    policy = RetryPolicy(max_attempts=1_000_000, deadline_s=1e6, backoff_base_s=0.02, backoff_max_s=0.02)
    monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: RetryingStore(client, policy))
    now_s = [0.0]
    options = Options(finish_timeout_s=0.3)
    with CheckpointManager(
        *(URL,), retention=1, prune_grace_s=60, progress="off", options=options, clock=lambda: now_s[0]
    ) as manager:
        save_steps(manager, 1, 2)
        hanging = client.inject(verbs=["delete"], times=None)
        save_steps(manager, 3)
        assert orders(manager)[-1] == (1, 3)
        assert "the end by what is pruned while training waits" in caplog.text
        assert hanging.fired
        now_s[0] = 61.0
    assert "the end by the end of the job" in caplog.text


def test_an_interrupted_job_removes_nothing_at_its_end(bucket: Bucket, job: Open) -> None:
    now_s = [0.0]

    def work() -> None:
        with job(retention=[KeepLast(1)], prune_grace_s=60, clock=lambda: now_s[0]) as manager:
            save_steps(manager, 1, 2)
            now_s[0] = 61.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(below(bucket, 1, 1)) == 2


def test_what_is_young_is_left_until_it_is_old_enough(bucket: Bucket, job: Open) -> None:
    leave(bucket, 1)
    now_s = [0.0]
    with job() as manager:
        save_steps(manager, 2)
    with job(clock=lambda: now_s[0]) as manager:
        save_steps(manager, 3)
        assert below(bucket, 1, 1)[0].startswith("0123")
        bucket.advance(3_601)
        save_steps(manager, 4)
        assert below(bucket, 1, 1)[0].startswith("0123"), "it is not looked for at every save"
        now_s[0] = 3_601
        save_steps(manager, 5)
        assert below(bucket, 1, 1) == [MANIFEST_NAME]


def test_a_void_goes_when_no_zombie_can_be_alive(bucket: Bucket, job: Open) -> None:
    leave(bucket, 1)
    with job() as manager:
        save_steps(manager, 2)
    for day in range(3, 6):
        bucket.advance(DAY_S)
        with job() as manager:
            save_steps(manager, day)
        assert below(bucket, 1, 1) == [MANIFEST_NAME]
    bucket.advance(7 * DAY_S)
    with job() as manager:
        save_steps(manager, 6)
    assert below(bucket, 1, 1) == []


def test_a_sweep_lists_the_root_once_and_only_what_goes_again(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, *range(20))
    with job(sweep_after_s=None) as manager:
        save_steps(manager, 20)
        leave(bucket, 30)
        client = manager._store.inner  # type: ignore[attr-defined]
        before = client.op_count
        assert [one.prefix for one in manager.sweep(older_than_s=0, dry_run=False)] == [checkpoint_prefix(30, 1)]
        assert [op.key for op in client.trace[before:] if op.verb == "list"] == ["", checkpoint_prefix(30, 1)]
        before = client.op_count
        assert manager.sweep(older_than_s=0, dry_run=False) == []
        assert [op.verb for op in client.trace[before:] if op.verb == "read"] == []


def test_nothing_is_removed_while_the_job_is_preempted(bucket: Bucket, job: Open) -> None:
    leave(bucket, 1)
    with job() as manager:
        save_steps(manager, 2)
    bucket.advance(DAY_S)
    client = FaultStore(bucket)
    with job(client) as manager:
        pruner = manager._saves.homes[0].pruner

        def preempt(op: Op) -> None:
            if op.verb == "list" and not op.key:
                pruner._cleaner._is_held = lambda: True

        client.hook = preempt
        save_steps(manager, 3)
    assert below(bucket, 1, 1)[0].startswith("0123")


@pytest.mark.parametrize("saves", [1, 2])
def test_jobs_of_few_saves_leave_no_more_than_the_last_of_them(bucket: Bucket, job: Open, saves: int) -> None:
    counts = []
    for number in range(8):
        bucket.advance(2 * 3_600)
        with job(retention=1, prune_grace_s=60) as manager:
            manager.restore(state_of(0))
            for step in range(saves):
                manager.save(10 * number + step, state_of(step))
        counts.append(len([key for key in bucket.raw_list() if key.endswith(".safetensors")]))
    assert max(counts[2:]) <= 2 * saves + 1, counts


def test_a_manager_that_only_reads_removes_nothing(bucket: Bucket, job: Open) -> None:
    leave(bucket, 1)
    with job() as manager:
        save_steps(manager, 2)
    leave(bucket, 3)
    bucket.advance(DAY_S)
    before = bucket.raw_list()
    with job() as manager:
        manager.restore(state_of(0))
    assert bucket.raw_list() == before


def test_a_dry_run_writes_nothing_and_finds_what_is_old(bucket: Bucket, job: Open) -> None:
    leave(bucket, 1)
    for step in (2, 3):
        with job(sweep_after_s=None) as manager:
            manager.restore(state_of(0))
            save_steps(manager, step)
    client = FaultStore(bucket)
    with job(client) as manager:
        assert [one.prefix for one in manager.sweep(older_than_s=0)] == [checkpoint_prefix(1, 1)]
        assert {op.verb for op in client.trace} <= {"list", "read", "head"}


def test_objects_by_which_the_clock_was_read_go_with_the_next_sweep(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        save_steps(manager, 1)
        bucket.raw_put(old := f"{EPOCHS_PREFIX}clock-{'0' * 16}", b"now")
        bucket.advance(DAY_S)
        bucket.raw_put(young := f"{EPOCHS_PREFIX}clock-{'1' * 16}", b"now")
        manager.sweep()
        assert old in bucket.raw_list()
        manager.sweep(dry_run=False, older_than_s=3_600)
        assert [key for key in bucket.raw_list() if "clock" in key] == [young]


def test_what_a_killed_writer_left_on_a_disk_goes_with_a_sweep_and_a_living_ones_stays(tmp_path: Path) -> None:
    temps = [
        tmp_path / name / f".cloudckpt-tmp-{number:032x}"
        for number, name in enumerate(
            ["step-0000000005-e0001/0123456789abcdef", "step-0000000002-e0001", "epochs", ".", "step-0000000006-e0001"]
        )
    ]
    (tmp_path / "step-0000000007-e0001" / "0123456789abcdef").mkdir(parents=True)
    (tmp_path / "of-the-user").mkdir()
    with CheckpointManager(tmp_path, progress="off", sweep_after_s=None) as manager:
        save_steps(manager, 2)
        for temp in temps:
            temp.parent.mkdir(parents=True, exist_ok=True)
            temp.write_bytes(b"half a shard")
        with temps[-1].open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            manager.sweep(dry_run=False, older_than_s=3_600)
            assert all(temp.exists() for temp in temps), "too young"
            manager.sweep(older_than_s=0)
            assert all(temp.exists() for temp in temps), "a dry run"
            manager.sweep(dry_run=False, older_than_s=0)
            assert [temp for temp in temps if temp.exists()] == temps[-1:]
        assert orders(manager) == [(1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("step-0000000002-e0001", "step-0000000006-e0001", "epochs", "of-the-user")
    }


def test_the_next_job_removes_what_a_killed_writer_left_on_a_disk(tmp_path: Path) -> None:
    temp = tmp_path / "step-0000000005-e0001" / "0123456789abcdef" / f".cloudckpt-tmp-{0:032x}"
    temp.parent.mkdir(parents=True)
    temp.write_bytes(b"half a shard")
    with CheckpointManager(tmp_path, progress="off", sweep_after_s=0) as manager:
        manager.save(9, state_of(9))
    assert not temp.parent.parent.exists()


def test_a_copy_that_keeps_old_times_is_as_young_as_it_is(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    with CheckpointManager(root, progress="off") as manager:
        save_steps(manager, 1)
    orphan = source / "step-0000000005-e0001" / "0123456789abcdef" / "index.bin"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"the manifest comes last")
    os.utime(orphan, (0, 0))
    shutil.copytree(source, root, dirs_exist_ok=True)
    with CheckpointManager(root, progress="off") as manager:
        save_steps(manager, 2)
    assert (root / orphan.relative_to(source)).exists()


def test_a_sweep_that_fails_fails_no_save_and_is_told(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture
) -> None:
    leave(bucket, 1)
    with job() as manager:
        save_steps(manager, 2)
    bucket.advance(DAY_S)
    client = FaultStore(bucket)
    client.inject(verbs=["delete"], key="step-", error=denied, times=None)
    with caplog.at_level(logging.WARNING), job(client) as manager:
        save_steps(manager, 3, 4)
    assert len([one for one in caplog.messages if "could not be removed" in one]) == 1
