"""With `reuse_unchanged` only what changed is sent, and what is shared lives as long as a checkpoint needs it.

FORMAT invariants 1, 5, 7, 12 and 17: whoever removes while a job saves, in whatever order their requests come, what was
acknowledged comes back whole.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, KeepLast, Options
from cloudckpt.errors import FormatVersionError, MissingShardError, ObjectNotFoundError, StorageError
from cloudckpt.format import MANIFEST_NAME, SHARD_SUFFIX, checkpoint_prefix
from cloudckpt.options import KIB, RetryPolicy
from cloudckpt.root import Catalog, Thinning, sweep
from cloudckpt.store import RetryingStore
from cloudckpt.store.probe import _proven
from tests.effort import portion
from tests.ranks.processes import run
from tests.store.fault_store import Bucket, FaultKind, FaultStore, Op

OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=1, memory_budget_bytes=64 * KIB)
BASE = torch.arange(5_000, dtype=torch.float32)
Open = Callable[..., AbstractContextManager[CheckpointManager]]
State = dict[str, object]


def state_of(step: int, base: torch.Tensor = BASE) -> State:
    return {"base": base.clone(), "head": torch.full((300,), float(step)), "step": step}


def is_state_of(state: State, step: int, base: torch.Tensor = BASE) -> bool:
    return torch.equal(state["base"], base) and torch.equal(state["head"], torch.full((300,), float(step)))  # type: ignore[arg-type]


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def job(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    @contextmanager
    def opened(client: FaultStore | None = None, **arguments: object) -> Iterator[CheckpointManager]:
        store = RetryingStore(client or FaultStore(bucket), RetryPolicy(max_attempts=3), sleep=lambda _: None)
        monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: store)
        given = {"prune_grace_s": 0, "save_rng": False, "progress": "off", "options": OPTIONS, "sweep_after_s": None}
        with CheckpointManager("memory://bucket/root", **{"reuse_unchanged": True, **given, **arguments}) as manager:  # type: ignore[arg-type]
            yield manager

    _proven.clear()
    yield opened
    _proven.clear()


def saved(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_of(step))
        manager._saves.homes[0].pruner.settle()


def shards(bucket: Bucket, step: int, epoch: int = 1) -> list[str]:
    prefix = checkpoint_prefix(step, epoch)
    return [key for key in bucket.raw_list() if key.startswith(prefix) and key.endswith(SHARD_SUFFIX)]


def whole(manager: CheckpointManager) -> list[int]:
    """Restore every checkpoint that is listed; return their steps."""
    steps = [one.step for one in manager.checkpoints()]
    for step in steps:
        state = state_of(-1)
        manager.restore(state, step=step)
        assert is_state_of(state, step), step
    return steps


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_what_did_not_change_is_sent_once_and_comes_back_with_each_step(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1, 2, 3)
        assert (len(shards(bucket, 1)), len(shards(bucket, 2)), len(shards(bucket, 3))) == (6, 1, 1)
        newest = manager.latest()
        assert newest is not None
        held = newest.manifest.held_elsewhere
        assert [(one.step, one.epoch, one.shard_count) for one in held] == [(1, 1, 5)], "who holds it, no reference"
        assert newest.manifest.sent_bytes == newest.manifest.summary["sent_bytes"] < newest.total_bytes / 5
        assert whole(manager) == [1, 2, 3]


def test_a_job_that_resumes_goes_on_to_refer_to_what_it_has_restored(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1, 2)
    with job() as manager:
        manager.restore(state_of(0))
        saved(manager, 3)
        assert len(shards(bucket, 3, epoch=2)) == 1
        assert whole(manager) == [1, 2, 3]


def test_no_reference_leaves_its_line_of_history(bucket: Bucket, job: Open) -> None:
    other = BASE + 1
    with job() as manager:
        saved(manager, 1)
        manager.save(2, state_of(2, other))
        manager.restore(state_of(0), step=1)
        manager.save(3, state_of(3, other))
        assert len(shards(bucket, 3, epoch=2)) == 6, "step 2 has the same bytes, and is of the line that was left"
        manager.save(4, state_of(4, other))
        assert len(shards(bucket, 4, epoch=2)) == 6, "it has changed once, so that nobody made a strong digest"
        manager.save(5, state_of(5, other))
        assert len(shards(bucket, 5, epoch=2)) == 1


def test_a_shard_that_goes_back_to_older_bytes_is_not_taken_for_the_newer_ones(job: Open) -> None:
    bases = [BASE, BASE + 1, BASE, BASE, BASE, BASE + 1]
    with job() as manager:
        for step, base in enumerate(bases):
            manager.save(step, state_of(step, base))
        for step, base in enumerate(bases):
            state = state_of(-1)
            manager.restore(state, step=step)
            assert is_state_of(state, step, base)


def test_equal_blocks_without_an_equal_content_are_sent(
    bucket: Bucket, job: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weak(buffers: Iterable[memoryview], block_bytes: int) -> Iterator[bytes]:
        return iter([bytes(8)] * -(-sum(map(len, buffers)) // block_bytes))

    monkeypatch.setattr("cloudckpt.format.shard._each_digest", weak)
    monkeypatch.setattr("cloudckpt.format.shard.xxhash.xxh3_64_intdigest", lambda _: 0)
    bases = [BASE, BASE + 1, BASE + 2, BASE + 2, BASE + 2]
    with job() as manager:
        for step, base in enumerate(bases):
            manager.save(step, state_of(step, base))
        for step, base in enumerate(bases):
            state = state_of(-1)
            manager.restore(state, step=step)
            assert is_state_of(state, step, base), "all blocks have the same digest, and are not the same"
    assert [len(shards(bucket, step)) for step in range(5)] == [6, 6, 6, 1, 1]


def test_the_copy_of_an_async_save_is_compared_and_sent_alike(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        for step in (1, 2, 3):
            state = state_of(step)
            handle = manager.async_save(step, state)
            state["head"].fill_(-1)  # type: ignore[attr-defined]
            handle.result()
        assert (len(shards(bucket, 1)), len(shards(bucket, 3))) == (6, 1)
        assert whole(manager) == [1, 2, 3]


def test_a_save_in_two_phases_sends_all(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1)
        manager.save_parts(2, state_of(2)).commit()
        assert len(shards(bucket, 2)) == 6
        assert whole(manager) == [1, 2]


def test_without_the_option_nothing_is_shared_and_the_format_is_that_of_before(bucket: Bucket, job: Open) -> None:
    with job(reuse_unchanged=False) as manager:
        saved(manager, 1, 2)
        assert [one.manifest.format_version for one in manager.checkpoints()] == [1, 1]
    assert len(shards(bucket, 2)) == 6
    with job() as manager:
        manager.restore(state_of(0))
        saved(manager, 3, 4)
        assert (len(shards(bucket, 3, epoch=2)), len(shards(bucket, 4, epoch=2))) == (6, 1)
        assert whole(manager) == [1, 2, 3, 4]


def test_what_shares_shards_asks_an_older_release_for_an_upgrade(
    bucket: Bucket, job: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job() as manager:
        saved(manager, 1, 2)
        monkeypatch.setattr("cloudckpt.format.manifest.SHARING_VERSION", 1)
        with pytest.raises(FormatVersionError, match=r"has format version 2.*upgrade cloudckpt"):
            Catalog(FaultStore(bucket)).open(checkpoint_prefix(2, 1))


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(2, 40))


def test_frozen_parameters_share_no_shard_with_what_is_trained(bucket: Bucket, job: Open) -> None:
    model = nn.Sequential(*(Adapted() for _ in range(4)))
    with job() as manager:
        for step in (1, 2):
            with torch.no_grad():
                for layer in model:
                    layer.adapter += 1
            manager.save(step, {"model": model})
        newest = manager.latest()
        assert newest is not None
        assert newest.manifest.sent_bytes < 0.1 * newest.total_bytes
        saved_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        manager.restore({"model": model})
        assert all(torch.equal(tensor, saved_state[name]) for name, tensor in model.state_dict().items())
    assert shards(bucket, 2)


# -- how long it lives -----------------------------------------------------------------------------------------------


def test_what_is_shared_outlives_its_holder_and_goes_with_the_last_that_names_it(bucket: Bucket, job: Open) -> None:
    with job(retention=[KeepLast(2)]) as manager:
        saved(manager, 1, 2, 3, 4)
        assert len(shards(bucket, 1)) == 5, "its own shard is gone, with its manifest and index"
        assert whole(manager) == [3, 4]
        manager.save(5, state_of(5, BASE + 1))
        manager.save(6, state_of(6, BASE + 1))
        manager._saves.homes[0].pruner.settle()
        assert not any(key.startswith(checkpoint_prefix(1, 1)) for key in bucket.raw_list()), "nor the void manifest"


def test_a_holder_that_is_deleted_by_name_leaves_what_others_share_and_a_sweep_takes_it_in_the_end(
    bucket: Bucket, job: Open
) -> None:
    with job() as manager:
        saved(manager, 1, 2)
        manager.delete(1)
        assert whole(manager) == [2]
    assert len(shards(bucket, 1)) == 5
    bucket.advance(86_400)
    with job() as manager:
        manager.restore(state_of(0))
        manager.save(3, state_of(3, BASE + 1))
        assert manager.sweep(older_than_s=60, dry_run=True) == []
        assert manager.sweep(older_than_s=60, dry_run=False) == []
        assert whole_of(manager, 2)
        manager.delete(2)
        bucket.advance(86_400)
        assert checkpoint_prefix(1, 1) in [one.prefix for one in manager.sweep(older_than_s=60, dry_run=False)]
    assert shards(bucket, 1) == []


def whole_of(manager: CheckpointManager, step: int) -> bool:
    state = state_of(-1)
    manager.restore(state, step=step)
    return is_state_of(state, step)


def test_an_older_release_takes_what_is_left_of_a_holder_for_no_orphan(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1, 2)
        manager.delete(1)
        manager._saves.homes[0].pruner.clean()
        manager._saves.homes[0].pruner.settle()
    void = bucket.raw_get(checkpoint_prefix(1, 1) + MANIFEST_NAME)
    assert b'"format_version": 2' in void, "a manifest that it cannot read counts as a commit"
    assert b'"state": "void"' in void


def test_a_pin_holds_what_its_checkpoint_shares(bucket: Bucket, job: Open) -> None:
    with job(retention=[KeepLast(1)]) as manager:
        saved(manager, 1, 2)
        manager.pin(2)
        for step in (3, 4, 5):
            manager.save(step, state_of(step, BASE + 1))
        manager._saves.homes[0].pruner.settle()
        assert whole_of(manager, 2)
        # Its manifest gets lost; until somebody puts it back, the one in the pin counts.
        del bucket.objects[checkpoint_prefix(2, 1) + MANIFEST_NAME]
        for step in (6, 7):
            manager.save(step, state_of(step, BASE + 1))
        manager._saves.homes[0].pruner.settle()
        assert whole_of(manager, 2)


@pytest.mark.parametrize("is_pinned_first", [True, False], ids=["pin-first", "removal-first"])
def test_a_lost_manifest_is_put_back_if_the_pin_was_seen_by_whoever_removes_its_holder(
    bucket: Bucket, job: Open, *, is_pinned_first: bool
) -> None:
    with job() as manager:
        saved(manager, 1, 2)
        for step in (1, 2):
            bucket.advance(5)
            if is_pinned_first == (step == 1):
                manager.pin(2)
            else:
                manager.delete(1)
                manager._saves.homes[0].pruner.clean()
                manager._saves.homes[0].pruner.settle()
    del bucket.objects[checkpoint_prefix(2, 1) + MANIFEST_NAME]
    with job() as manager:
        manager.sweep(dry_run=False)
        assert ((checkpoint_prefix(2, 1) + MANIFEST_NAME) in bucket.objects) is is_pinned_first
        assert whole_of(manager, 2), "by its pin"


def missing(op: Op) -> StorageError:
    return ObjectNotFoundError(f"there is no {op.key!r}", op=op.verb, key=op.key)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": FaultKind.FLIP, "verbs": ["read"]}, "nobody can tell what"),
        ({"error": missing, "verbs": ["read"]}, "which a read does not find"),
        ({"error": missing, "verbs": ["head"]}, "which a read does not find"),
    ],
    ids=["spoilt", "not-read", "not-seen"],
)
def test_a_removal_takes_nothing_that_manifests_may_name_which_it_cannot_read(
    bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture, fault: dict[str, object], said: str
) -> None:
    with job() as manager:
        saved(manager, 1, 2, 3)
    client = FaultStore(bucket)
    for step in (2, 3):
        client.inject(key=checkpoint_prefix(step, 1) + MANIFEST_NAME, times=None, **fault)
    with job(client) as manager:
        manager.delete(1)
        manager.sweep(dry_run=False, older_than_s=0)
    assert said in caplog.text
    with job() as manager:
        assert whole(manager) == [2, 3]


def test_a_save_whose_base_was_deleted_meanwhile_sends_all(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1, 2)
        thin(bucket, 1, 2)
        saved(manager, 3)
        assert len(shards(bucket, 3)) == 6
        assert whole(manager) == [3]


def thin(bucket: Bucket, *steps: int) -> None:
    """Remove checkpoints from another machine, with all that is left of them, at once."""
    thinning = Thinning(Catalog(FaultStore(bucket)), grace_s=0, sleep=lambda _: None)
    thinning.uncommit(thinning.by_steps(list(steps)))
    thinning.finish()


class Race:
    """A save and a removal of all that it may refer to, at the same time: each waits at a request for the other."""

    def __init__(self, bucket: Bucket, job: Open) -> None:
        self.bucket, self._job = bucket, job

    def run(  # noqa: C901 (two threads, each with a hook)
        self, save_at: int, remove_at: int, *, is_save_first: bool
    ) -> str:
        """Let one go as far as its request, the other one as far as its own, the first to its end, then the other."""
        halted, go_on, ended = threading.Event(), threading.Event(), threading.Event()

        def halt(op: Op) -> None:
            if op.number == remove_at:
                halted.set()
                go_on.wait(60)

        def remove() -> None:
            thinning = Thinning(Catalog(FaultStore(self.bucket, hook=halt)), grace_s=0, sleep=lambda _: None)
            with suppress(CloudCkptError):
                thinning.uncommit(thinning.by_steps([1, 2]))
                thinning.finish()
            halted.set()
            ended.set()

        remover = threading.Thread(target=remove)

        def begin() -> None:
            remover.start()
            assert halted.wait(60)

        def finish() -> None:
            go_on.set()
            assert ended.wait(60)

        client, begun, has_met = FaultStore(self.bucket), 0, False

        def meet(op: Op) -> None:
            nonlocal has_met
            if op.number == begun + save_at:
                has_met = True
                (begin if is_save_first else finish)()

        with self._job(client) as manager:
            manager.restore(state_of(0))
            begun, client.hook = client.op_count, meet
            if not is_save_first:
                begin()
            end = self._saved(manager)
            if not has_met and is_save_first:
                begin()
            finish()
            remover.join()
            client.hook = None
            if end == "acknowledged":
                assert whole_of(manager, 3), (save_at, remove_at)
                return f"{end}, {len(shards(self.bucket, 3, epoch=2))} sent"
        assert checkpoint_prefix(3, 2) + MANIFEST_NAME not in self.bucket.raw_list()
        return end

    def _saved(self, manager: CheckpointManager) -> str:
        try:
            manager.save(3, state_of(3))
        except CloudCkptError as exc:
            return type(exc).__name__
        return "acknowledged"


@pytest.mark.parametrize("is_save_first", [True, False], ids=["save-first", "removal-first"])
def test_a_save_and_a_removal_that_meet_anywhere_leave_whole_what_is_acknowledged(
    bucket: Bucket, job: Open, *, is_save_first: bool
) -> None:
    with job() as manager:
        saved(manager, 1, 2)
    before, ends = bucket.copy(), set[str]()
    meetings = [(save_at, remove_at) for save_at in range(1, 16) for remove_at in range(1, 23)]
    for save_at, remove_at in portion(meetings, int(is_save_first), of=9):
        bucket.objects = dict(before.objects)
        ends.add(Race(bucket, job).run(save_at, remove_at, is_save_first=is_save_first))
    assert {"acknowledged, 1 sent", "acknowledged, 6 sent"} <= ends


def test_a_removal_that_is_cut_off_anywhere_takes_nothing_that_a_checkpoint_names(bucket: Bucket, job: Open) -> None:
    with job() as manager:
        saved(manager, 1, 2)
    before, number = bucket.copy(), 0
    while True:
        number += 1
        bucket.objects = dict(before.objects)
        client = FaultStore(bucket)
        fault = client.crash_at(number, FaultKind.CRASH_HALFWAY if number % 2 else FaultKind.CRASH_AFTER)
        with suppress(BaseException):
            thinning = Thinning(Catalog(client), grace_s=0, sleep=lambda _: None)
            thinning.uncommit(thinning.by_steps([1]))
            thinning.finish()
        bucket.advance(86_400)
        Catalog(FaultStore(bucket)).claims.claim()
        sweep(Catalog(FaultStore(bucket)), older_than_s=60, dry_run=False)
        with job() as manager:
            assert whole_of(manager, 2)
        if not fault.fired:
            break
    assert number > 10


# -- elsewhere -------------------------------------------------------------------------------------------------------


def on_disk(root: Path, *steps: int, **arguments: object) -> list[str]:
    with CheckpointManager(
        root, options=OPTIONS, reuse_unchanged=True, progress="off", save_rng=False, **arguments
    ) as manager:  # type: ignore[arg-type]
        return [manager.save(step, state_of(step)).url for step in steps]


def test_a_step_is_read_by_its_url_alone_within_its_root(tmp_path: Path) -> None:
    _, url = on_disk(tmp_path / "root", 1, 2)
    state = state_of(-1)
    cloudckpt.load(state, url)
    assert is_state_of(state, 2)
    assert torch.equal(cloudckpt.read(url)["base"], BASE)  # type: ignore[arg-type]
    shutil.copytree(tmp_path / "root" / checkpoint_prefix(2, 1), tmp_path / "elsewhere")
    with pytest.raises(MissingShardError, match=r"shares shards with step 1 of epoch 1.*cloudckpt cp"):
        cloudckpt.load(state_of(-1), tmp_path / "elsewhere")


@pytest.mark.parametrize("own_url", [True, False], ids=["own-url", "root"])
def test_a_copy_holds_itself_what_others_hold_and_is_the_same_checkpoint(tmp_path: Path, *, own_url: bool) -> None:
    _, url = on_disk(tmp_path / "root", 1, 2)
    (copied,) = cloudckpt.copy(url, tmp_path / "copy", own_url=own_url)
    assert copied.sent_bytes > copied.total_bytes
    shutil.rmtree(tmp_path / "root")
    state = state_of(-1)
    cloudckpt.load(state, copied.url)
    assert is_state_of(state, 2)
    assert cloudckpt.verify(copied.url, deep=True).is_whole
    (again,) = cloudckpt.copy(copied.url, tmp_path / "second", own_url=own_url)
    assert cloudckpt.verify(again.url, deep=True).is_whole


@pytest.mark.parametrize(("kept", "left"), [((), [2, 3, 4, 5]), (KeepLast(1), [5])], ids=["all", "newest"])
def test_a_job_that_goes_on_from_a_copy_refers_to_nothing_that_is_not_there(
    tmp_path: Path, kept: object, left: list[int]
) -> None:
    _, url = on_disk(tmp_path / "root", 1, 2)
    copy = tmp_path / "copy"
    cloudckpt.copy(url, copy)
    shutil.rmtree(tmp_path / "root")
    given = {"save_rng": False, "progress": "off", "options": OPTIONS, "prune_grace_s": 0, "retention_scope": "root"}
    with CheckpointManager(copy, reuse_unchanged=True, retention=kept, **given) as manager:  # type: ignore[arg-type]
        manager.restore(state_of(0))
        sent = [manager.save(step, state_of(step)).manifest.sent_bytes for step in (3, 4, 5)]
        manager._saves.homes[0].pruner.settle()
        assert whole(manager) == left
    assert sent[0] > BASE.nbytes > 5 * sent[2], "what only the copy holds is sent once, and shared from then on"
    assert all(one.is_whole for one in cloudckpt.verify_all(copy, deep=True))


def test_what_a_copy_that_was_ended_has_left_below_a_checkpoint_hides_nothing(tmp_path: Path) -> None:
    on_disk(tmp_path / "root", 1, 2)
    cloudckpt.copy(tmp_path / "root", tmp_path / "whole")
    own, copied = (tmp_path / root / checkpoint_prefix(2, 1) for root in ("root", "whole"))
    lone = next(one for one in copied.rglob(f"*{SHARD_SUFFIX}") if not (own / one.relative_to(copied)).exists())
    (own / lone.relative_to(copied)).parent.mkdir()
    shutil.copy(lone, own / lone.relative_to(copied))
    state = state_of(-1)
    cloudckpt.load(state, own)
    assert is_state_of(state, 2)
    assert cloudckpt.verify(own, deep=True).is_whole
    with CheckpointManager(tmp_path / "root", progress="off", prune_grace_s=0) as manager:
        manager.delete(1)
    cloudckpt.load(state_of(-1), own)
    lone.unlink()
    with pytest.raises(MissingShardError, match=lone.name):
        cloudckpt.load(state_of(-1), copied)


def test_what_is_wrong_with_a_shared_shard_is_told_of_each_that_shares_it(tmp_path: Path) -> None:
    on_disk(tmp_path / "root", 1, 2)
    shard = min((tmp_path / "root" / checkpoint_prefix(1, 1)).rglob(f"*{SHARD_SUFFIX}"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    found = cloudckpt.verify(tmp_path / "root" / checkpoint_prefix(2, 1), deep=True)
    assert [damage.key for damage in found.damages] == [str(shard.relative_to(tmp_path / "root"))]
    shard.unlink()
    found = cloudckpt.verify(tmp_path / "root" / checkpoint_prefix(2, 1))
    assert [(damage.problem, damage.tensors) for damage in found.damages] == [("it is missing", ("base",))]


def test_the_other_root_gets_all_of_it_and_so_does_the_first_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = [Bucket(), Bucket()]
    clients = [FaultStore(one, url=f"memory://bucket/{name}") for name, one in zip("ab", buckets, strict=True)]
    stores = iter([RetryingStore(one, RetryPolicy(max_attempts=2), sleep=lambda _: None) for one in clients])
    monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: next(stores))
    _proven.clear()
    with CheckpointManager(
        "memory://bucket/a", fallback="memory://bucket/b", options=OPTIONS, reuse_unchanged=True, save_rng=False
    ) as manager:
        manager.save(1, state_of(1))
        fault = clients[0].inject(kind=FaultKind.BEFORE, times=None)
        manager.save(2, state_of(2))
        manager.save(3, state_of(3))
        fault.times = fault.fired
        manager.save(4, state_of(4))
        assert whole(manager) == [1, 2, 3, 4]
    sent = [(one.raw_list(), step) for one in buckets for step in (1, 2, 3, 4)]
    counts = [sum(f"step-{step:010}" in key and key.endswith(SHARD_SUFFIX) for key in keys) for keys, step in sent]
    assert counts == [6, 0, 0, 6, 0, 6, 1, 0]


def _two_ranks(url: str) -> list[tuple[int, int, float]]:
    told = []
    state: State = {"a": torch.ones(2_000), "b": torch.ones(2_000), "head": torch.zeros(100)}
    with CheckpointManager(url, options=OPTIONS, reuse_unchanged=True, progress="off", save_rng=False) as manager:
        for step in (1, 2):
            state["head"].fill_(step)  # type: ignore[attr-defined]
            made = manager.save(step, state)
            assert made is not None
            held = made.manifest.held_elsewhere
            told.append((made.manifest.shard_count, sum(one.shard_count for one in held), made.manifest.sent_bytes))
        state["b"].zero_()  # type: ignore[attr-defined]
        manager.restore(state)
        assert torch.equal(state["b"], torch.ones(2_000))  # type: ignore[arg-type]
    return told


def test_each_rank_refers_to_its_own_shards(tmp_path: Path) -> None:
    for first, second in run(2, _two_ranks, str(tmp_path / "root")):
        assert first[1] == 0
        assert second[1] == 4, "two shards of each rank"
        assert second[2] < first[2] / 2


def test_another_number_of_ranks_sends_all(bucket: Bucket, job: Open, caplog: pytest.LogCaptureFixture) -> None:
    with job() as manager:
        saved(manager, 1)
        base = manager._saves.homes[0].epoch.newest
        assert base is not None
        manager._saves.homes[0].epoch.newest = replace(base, world_size=2)
        with caplog.at_level("INFO", logger="cloudckpt"):
            saved(manager, 2)
    assert len(shards(bucket, 2)) == 6
    assert "was saved by 2 ranks, and now by 1: all of it is sent" in caplog.text
