"""A copy is the same checkpoint elsewhere, or it is not there; and what stands in its way is named and not changed."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import (
    AccessDeniedError,
    CheckpointExistsError,
    CheckpointManager,
    CheckpointNotFoundError,
    CloudWriter,
    Copied,
    FencedError,
    IntegrityError,
    KeepLast,
    ManifestError,
    OptionsError,
    StorageError,
)
from cloudckpt.copying import copier, lead
from cloudckpt.copying.copier import Copier
from cloudckpt.copying.lead import Selection, copy_places
from cloudckpt.copying.places import Place
from cloudckpt.format import MANIFEST_NAME, parse_pin_key
from cloudckpt.root import Catalog, Checkpoint, sweep
from cloudckpt.store import Intake, RetryingStore, open_store, told_of_moves
from cloudckpt.store.local import LocalStore
from cloudckpt.store.probe import _proven
from cloudckpt.transfer import Slab, Slabs
from servers import FreshPrefix
from tests.copying.roots import (
    OPTIONS,
    bucket_of,
    files_of,
    pinned_bucket,
    place_of,
    prefix_of,
    save_steps,
    shards_of,
    state_of,
)
from tests.ranks.processes import run as run_ranks
from tests.store.fault_store import RACES, Bucket, Crash, FaultKind, FaultStore, Op, denied

ALL = Selection(is_all=True, takes_pins=True)
TARGET = "memory://other/root"


def target_of(bucket: Bucket) -> FaultStore:
    return FaultStore(bucket, url=TARGET)


class Silent:
    """A gauge that nobody looks at."""

    def begin(self, total_bytes: int) -> None: ...
    def move(self, size_bytes: int) -> None: ...


def run(source: FaultStore, target: FaultStore, selection: Selection = ALL) -> Sequence[Copied]:
    _proven.clear()
    return copy_places([place_of(source)], place_of(target), selection, OPTIONS, Silent())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def puts(client: FaultStore) -> list[str]:
    return [op.key for op in client.trace if op.verb == "put" and not op.key.startswith("probe")]


# -- what a copy is ------------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_bytes_under_the_same_keys(made: Path, tmp_path: Path) -> None:
    (copied,) = cloudckpt.copy(made, tmp_path / "to", options=OPTIONS)
    there = {name: data for name, data in files_of(made).items() if name.startswith(prefix_of(3))}
    assert files_of(tmp_path / "to") == there
    assert (copied.step, copied.epoch, copied.is_new, copied.kept_count) == (3, 1, True, 0)
    assert copied.url == f"file://{tmp_path}/to/{prefix_of(3)}"
    assert (copied.sent_count, copied.sent_bytes) == (len(there) - 1, sum(map(len, there.values())) - _manifest(there))


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_copy_takes_memory_for_as_many_shards_as_its_target_keeps_waiting(
    is_fast: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = [0]

    class Counted(Slabs):
        def take(self, size_bytes: int, **how: Any) -> Slab:
            slab = super().take(size_bytes, **how)
            lent.append(self.lent_count)
            return slab

    monkeypatch.setattr(lead, "Slabs", Counted)
    monkeypatch.setattr(copier, "_PATIENCE_S", 30.0 if is_fast else 0.001)
    count = len(shards_of(made / prefix_of(3)))
    all_are_there = threading.Barrier(count, timeout=30.0)
    put = LocalStore.put

    def put_slowly(self: LocalStore, key: str, buffers: Sequence[memoryview]) -> None:
        if key.endswith(".safetensors"):
            all_are_there.wait()
        put(self, key, buffers)

    if not is_fast:
        monkeypatch.setattr(LocalStore, "put", put_slowly)
    cloudckpt.copy(made, tmp_path / "to", options=replace(OPTIONS, concurrency=count), progress="off")
    assert max(lent) <= 2 if is_fast else max(lent) == count


def _manifest(there: dict[str, bytes]) -> int:
    return len(there[f"{prefix_of(3)}/{MANIFEST_NAME}"])


def test_some_steps_are_copied_the_oldest_first(made: Path, tmp_path: Path) -> None:
    found = cloudckpt.copy(made, tmp_path / "to", steps=[3, 1])
    assert [one.step for one in found] == [1, 3]
    with CheckpointManager(tmp_path / "to", progress="off") as manager:
        state = state_of(9)
        manager.restore(state, step=1)
        assert torch.equal(state["changing"], state_of(1)["changing"])  # type: ignore[arg-type]
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 7"):
        cloudckpt.copy(made, tmp_path / "to", steps=[7])


def test_several_sources_go_to_one_root(made: Path, tmp_path: Path) -> None:
    found = cloudckpt.copy([made / prefix_of(2), made], tmp_path / "to")
    assert [one.step for one in found] == [2, 3]


def test_of_a_whole_root_the_line_of_history_holds(root: Path, tmp_path: Path) -> None:
    save_steps(root, [4])
    target = tmp_path / "to"
    found = cloudckpt.copy(root, target, every=True)
    assert [(one.epoch, one.step) for one in found] == [(1, 1), (1, 2), (1, 3), (2, 4)]
    assert files_of(target) == files_of(root)
    with open_store(target) as store:
        catalog = Catalog(store)
        checkpoints = catalog.survey().checkpoints
        assert catalog.native(checkpoints) == list(checkpoints)
    with CheckpointManager(target, retention=[KeepLast(2)], prune_grace_s=0, progress="off", save_rng=False) as manager:
        manager.restore(state_of(0))
        assert manager.save(5, state_of(5)).epoch == 3
    with CheckpointManager(target, progress="off") as manager:
        assert [one.step for one in manager.checkpoints()] == [4, 5], "rules count what was copied as the job's own"


def test_without_its_claims_a_copy_is_of_no_line(made: Path, tmp_path: Path) -> None:
    cloudckpt.copy(made, tmp_path / "to", steps=[1, 2, 3])
    with CheckpointManager(
        tmp_path / "to", retention=[KeepLast(1)], prune_grace_s=0, progress="off", save_rng=False
    ) as manager:
        manager.restore(state_of(0))
        manager.save(4, state_of(4))
    with CheckpointManager(tmp_path / "to", progress="off") as manager:
        assert [one.step for one in manager.checkpoints()] == [1, 2, 3, 4], "no rule of the target's removes it"


def test_a_step_at_a_url_of_its_own_keeps_step_and_epoch(made: Path, tmp_path: Path) -> None:
    (copied,) = cloudckpt.copy(made, tmp_path / "own", own_url=True)
    assert (copied.step, copied.epoch, copied.url) == (3, 1, f"file://{tmp_path}/own")
    state = state_of(0)
    loaded = cloudckpt.load(state, tmp_path / "own", progress="off")
    assert (loaded.step, loaded.epoch, state["note"]) == (3, 1, "step 3")
    assert cloudckpt.diff(made, tmp_path / "own").is_equal


def test_what_has_no_step_goes_to_a_url_of_its_own(tmp_path: Path) -> None:
    cloudckpt.save({"w": torch.ones(3)}, tmp_path / "one", progress="off")
    (copied,) = cloudckpt.copy(tmp_path / "one", tmp_path / "other")
    assert (copied.step, copied.url) == (-1, f"file://{tmp_path}/other")
    assert files_of(tmp_path / "other") == files_of(tmp_path / "one")


def test_a_step_that_is_named_as_the_target_goes_there(made: Path, tmp_path: Path) -> None:
    (copied,) = cloudckpt.copy(made, tmp_path / "to" / prefix_of(3))
    assert copied.url == f"file://{tmp_path}/to/{prefix_of(3)}"


# -- repeated ------------------------------------------------------------------------------------------------------


def test_a_repeated_copy_sends_nothing(made: Path) -> None:
    source, target = bucket_of(made), Bucket()
    run(FaultStore(source), target_of(target))
    again = target_of(target)
    found = run(FaultStore(source), again)
    assert [one.is_new for one in found] == [False] * 3
    assert {op.verb for op in again.trace} <= {"list", "read", "head"}


def test_names_go_with_a_whole_root(tmp_path: Path) -> None:
    for step in (1, 2):
        with CheckpointManager(tmp_path / "root", progress="off") as manager:
            manager.restore({"w": torch.zeros(2)}) if step > 1 else None
            manager.save(step, {"w": torch.ones(2) * step}, name="last")
            manager.save(step + 10, {"w": torch.ones(2)}, name=f"epoch={step}")
    cloudckpt.copy(tmp_path / "root", tmp_path / "there", every=True, progress="off")
    with CheckpointManager(tmp_path / "there", progress="off") as manager:
        assert {name: one.step for name, one in manager.names().items()} == {"last": 2, "epoch=1": 11, "epoch=2": 12}


def test_a_repeated_copy_of_a_root_brings_what_is_new(root: Path, tmp_path: Path) -> None:
    cloudckpt.copy(root, tmp_path / "to", every=True)
    save_steps(root, [4])
    found = cloudckpt.copy(root, tmp_path / "to", every=True)
    assert [(one.step, one.is_new) for one in found] == [(1, False), (2, False), (3, False), (4, True)]
    assert files_of(tmp_path / "to") == files_of(root)


@pytest.mark.parametrize("name", ["r00000-0001.safetensors", "index.bin"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_check_mends_what_is_not_what_was_sent(made: Path, tmp_path: Path, name: str, is_gone: bool) -> None:
    cloudckpt.copy(made, tmp_path / "to")
    (damaged,) = (tmp_path / "to").rglob(name)
    damaged.unlink() if is_gone else flip(damaged, 20)
    (copied,) = cloudckpt.copy(made, tmp_path / "to")
    assert copied.sent_count == 0, "what is committed is not looked at"
    (copied,) = cloudckpt.copy(made, tmp_path / "to", check=True)
    assert (copied.is_new, copied.sent_count) == (False, 1)
    assert cloudckpt.verify(tmp_path / "to", deep=True).is_whole


def test_what_stands_there_in_another_size_is_sent_again(made: Path) -> None:
    target = Bucket()
    client = target_of(target)
    client.inject(kind=FaultKind.CRASH_BEFORE, verbs=("create",), key=MANIFEST_NAME)
    with pytest.raises(Crash):
        run(FaultStore(bucket_of(made)), client, Selection())
    key = next(key for key in target.raw_list() if key.endswith("0001.safetensors"))
    target.raw_put(key, b"short")
    again = target_of(target)
    run(FaultStore(bucket_of(made)), again, Selection())
    assert puts(again) == [key]


CRASHES = [FaultKind.CRASH_BEFORE, FaultKind.CRASH_AFTER]


def _count(source: Bucket) -> int:
    client = target_of(Bucket())
    run(FaultStore(source), client)
    return client.op_count


@pytest.mark.parametrize("kind", CRASHES)
def test_at_every_request_of_a_copy_that_ends_there_the_target_has_no_broken_checkpoint(
    made: Path, kind: FaultKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RACES, 1)
    source = pinned_bucket(made)
    whole = {key for key in source.raw_list() if not key.startswith("epochs/")}
    for number in range(1, _count(source) + 1):
        target = Bucket()
        client = target_of(target)
        client.crash_at(number, kind)
        with pytest.raises(Crash):
            run(FaultStore(source), client)
        there = {key for key in target.raw_list() if key in whole}
        for prefix in {key.partition("/")[0] for key in there if key.endswith(MANIFEST_NAME)}:
            assert {key for key in whole if key.startswith(prefix)} <= there, "a manifest stands before its objects"
        pinned = {key for key in there if key.startswith("pins/")}
        assert {f"{parse_pin_key(key)}{MANIFEST_NAME}" for key in pinned} <= there, "a pin is without its checkpoint"
        claims = [key for key in target.raw_list() if key.startswith("epochs/")]
        assert not claims or whole <= there, "a claim tells of checkpoints that are not there"
        again = target_of(target)
        run(FaultStore(source), again)
        assert {key: target.raw_get(key) for key in whole} == {key: source.raw_get(key) for key in whole}
        lacking = {key for key in whole - there if key.startswith("step-") and not key.endswith(MANIFEST_NAME)}
        assert sorted(puts(again)) == sorted(lacking), "what stood there was sent again"


# -- what stands in the way ----------------------------------------------------------------------------------------


def _refused(made: Path, target: Path, kind: type[Exception], words: str, **more: Any) -> None:
    """Try a copy; nothing at the target has changed."""
    before = files_of(target)
    with pytest.raises(kind, match=words):
        cloudckpt.copy(made, target, **more)
    assert files_of(target) == before


def test_another_checkpoint_in_the_same_place_is_named_and_not_changed(made: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "to", [3])
    _refused(made, tmp_path / "to", CheckpointExistsError, "another checkpoint is committed at .*e0001 .attempt")
    _refused(made, tmp_path / "to", CheckpointExistsError, "another checkpoint is committed", every=True)


def test_an_epoch_of_another_job_is_refused(made: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "to", [7])
    _refused(made, tmp_path / "to", FencedError, "epoch 1 of .* is another job's")
    _refused(made, tmp_path / "to", FencedError, "epoch 1 of .* is another job's", every=True)


def test_two_jobs_that_went_on_from_one_root_are_not_mixed(root: Path, tmp_path: Path) -> None:
    cloudckpt.copy(root, tmp_path / "to", every=True)
    save_steps(root, [4])
    save_steps(tmp_path / "to", [5])
    _refused(root, tmp_path / "to", FencedError, "epoch 2 of .* is another job's", every=True)


def test_a_root_is_no_url_of_its_own_and_the_other_way_round(made: Path, tmp_path: Path) -> None:
    cloudckpt.save({"w": 1}, tmp_path / "one", progress="off")
    cloudckpt.copy(made, tmp_path / "root")
    _refused(made, tmp_path / "one", CheckpointExistsError, "is a checkpoint itself, and no root")
    _refused(made, tmp_path / "root", CheckpointExistsError, "is a root with steps", own_url=True)
    _refused(made, tmp_path / "one", CheckpointExistsError, "another checkpoint is committed at", own_url=True)
    _refused(tmp_path / "one", tmp_path / "root", CheckpointExistsError, "is a root with steps")
    shutil.copytree(tmp_path / "one", tmp_path / "root", dirs_exist_ok=True)
    for own_url in (False, True):
        words = "a checkpoint itself, and a root with steps as well"
        _refused(made, tmp_path / "root", CheckpointExistsError, words, own_url=own_url)


def test_another_step_than_its_own_is_refused(made: Path, tmp_path: Path) -> None:
    _refused(made, tmp_path / prefix_of(2), OptionsError, "every reader would refuse it")
    cloudckpt.save({"w": 1}, tmp_path / "one", progress="off")
    _refused(tmp_path / "one", tmp_path / prefix_of(2), OptionsError, "of no step, and at .* every reader")


def test_a_copy_to_itself_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    for target in (root, tmp_path / "link"):
        for source in (root, root / prefix_of(2)):
            with pytest.raises(OptionsError, match="would be copied to itself"):
                cloudckpt.copy(source, target)
    with pytest.raises(OptionsError, match=r"is below .*, a step of a CheckpointManager"):
        cloudckpt.copy(root, root / prefix_of(2) / "deeper")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"steps": [1], "every": True}, "steps and every"),
        ({"every": True, "own_url": True}, "several checkpoints cannot become one URL"),
        ({"steps": [True]}, "step is True"),
    ],
)
def test_what_contradicts_itself_is_refused(made: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    _refused(made, tmp_path / "to", OptionsError, words, **more)
    with pytest.raises(OptionsError, match="no source"):
        cloudckpt.copy([], tmp_path / "to")


def test_a_step_is_no_whole_root_and_has_no_steps(made: Path, tmp_path: Path) -> None:
    _refused(made / prefix_of(2), tmp_path / "to", OptionsError, "is no root with checkpoints", every=True)
    _refused(made / prefix_of(2), tmp_path / "to", OptionsError, "give the URL of the root", steps=[1])


def test_what_a_sweep_has_decided_is_named(made: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "to", [9])
    (tmp_path / "to" / "epochs" / "0000000001.json").unlink()
    with open_store(tmp_path / "to") as store:
        assert Catalog(store).void(f"{prefix_of(3)}/")
    _refused(made, tmp_path / "to", CheckpointExistsError, "a sweep of .* has decided")


def test_an_unreadable_checkpoint_in_its_place_is_not_changed(made: Path, tmp_path: Path) -> None:
    cloudckpt.copy(made, tmp_path / "to")
    flip(tmp_path / "to" / prefix_of(3) / MANIFEST_NAME, 60)
    told = f"what stands at file://{tmp_path}/to/{prefix_of(3)}, in the target, .*`cloudckpt rm file://{tmp_path}/to 3`"
    _refused(made, tmp_path / "to", ManifestError, told)
    cloudckpt.copy(made, tmp_path / "own", own_url=True)
    flip(tmp_path / "own" / MANIFEST_NAME, 60)
    _refused(made, tmp_path / "own", ManifestError, "at file://.*own, in the target, .* give another URL", own_url=True)


def _damage(target: Path) -> type[Exception]:
    flip(target / prefix_of(2) / MANIFEST_NAME, 60)
    return IntegrityError


def _decide(target: Path) -> type[Exception]:
    (target / prefix_of(2) / MANIFEST_NAME).unlink()
    with open_store(target) as store:
        assert Catalog(store).void(f"{prefix_of(2)}/")
    return CheckpointExistsError


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("change", [_damage, _decide])
def test_what_stands_in_the_way_of_one_keeps_no_other_one_from_its_copy(
    root: Path, tmp_path: Path, change: Callable[[Path], type[Exception]], check: bool
) -> None:
    target = tmp_path / "to"
    cloudckpt.copy(root, target, steps=[1, 2])
    kind = change(target)
    before = files_of(target)
    told: list[Copied] = []
    with pytest.raises(kind, match=r"2 checkpoints are in the target; 1 are not, because of .*remove "):
        cloudckpt.copy(root, target, every=True, check=check, on_copied=told.append)
    assert [(one.step, one.is_new) for one in told] == [(1, False), (3, True)]
    there = files_of(target)
    assert {name: there[name] for name in before} == before
    for path in (target / prefix_of(2)).rglob("*.json"):
        path.unlink()
    assert [one.is_new for one in cloudckpt.copy(root, target, every=True)] == [False, True, False]


# -- a source that is not whole, or goes ---------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_not_copied(root: Path, tmp_path: Path) -> None:
    flip(shards_of(root / prefix_of(3))[1], 9)
    with pytest.raises(IntegrityError, match="differs from its digest"):
        cloudckpt.copy(root, tmp_path / "to")
    assert not list((tmp_path / "to").rglob(MANIFEST_NAME))


def test_one_that_is_damaged_keeps_no_other_one_from_its_copy(root: Path, tmp_path: Path) -> None:
    flip(shards_of(root / prefix_of(1))[1], 9)
    flip(root / prefix_of(2) / MANIFEST_NAME, 60)
    told: list[Copied] = []
    with pytest.raises(IntegrityError, match="1 checkpoints are in the target; 2 are not"):
        cloudckpt.copy(root, tmp_path / "to", every=True, on_copied=told.append)
    assert [one.step for one in told] == [3]
    with CheckpointManager(tmp_path / "to", progress="off") as manager:
        assert [one.step for one in manager.checkpoints()] == [3]


@pytest.mark.parametrize("verb", ["get", "read"])
def test_one_that_is_pruned_while_it_is_copied_is_told_by_name(made: Path, verb: str) -> None:
    bucket = bucket_of(made)
    prefix = prefix_of(3)

    def prune(op: Op) -> None:
        if op.verb == verb and op.key.startswith(prefix) and not op.key.endswith(MANIFEST_NAME):
            for key in [key for key in bucket.raw_list() if key.startswith(prefix)]:
                del bucket.objects[key]

    target = target_of(Bucket())
    with pytest.raises(CheckpointNotFoundError, match=f"{prefix} was removed while it was copied"):
        run(FaultStore(bucket, hook=prune), target, Selection())
    assert not [key for key in target.bucket.raw_list() if key.endswith(MANIFEST_NAME)]
    found = run(FaultStore(bucket_of(made), hook=None), target_of(Bucket()))
    assert len(found) == 3


def test_a_target_that_fails_half_way_is_told_and_gone_on_from(made: Path) -> None:
    target = Bucket()
    client = target_of(target)
    client.inject(verbs=("put",), skip=5, times=None)
    with pytest.raises(StorageError, match="injected") as caught:
        run(FaultStore(bucket_of(made)), client)
    assert "the same command goes on from it" in "".join(caught.value.__notes__)
    assert len(run(FaultStore(bucket_of(made)), target_of(target))) == 3


class Forgetful(FaultStore):
    """Acknowledges puts of keys that end so, and keeps nothing of them."""

    forgotten = ""

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        if not key.endswith(self.forgotten):
            super().put(key, buffers)


@pytest.mark.parametrize("may_list", [True, False])
@pytest.mark.parametrize("name", ["0001.safetensors", "index.bin", ""])
def test_what_the_target_loses_is_not_committed(made: Path, name: str, may_list: bool) -> None:
    target = Forgetful(Bucket(), url=TARGET)
    target.forgotten = name
    if not may_list:
        target.inject(verbs=("list",), key=prefix_of(3), error=denied, times=None)
    with pytest.raises(StorageError, match=rf"{name} on .* nothing was committed"):
        run(FaultStore(bucket_of(made)), target, Selection())
    assert not [key for key in target.bucket.raw_list() if key.endswith(MANIFEST_NAME)]


def test_an_interrupt_says_what_was_done(made: Path) -> None:
    def interrupt(op: Op) -> None:
        if op.verb == "put" and op.key.startswith(prefix_of(2)):
            raise KeyboardInterrupt

    target = FaultStore(Bucket(), url=TARGET, hook=interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(FaultStore(bucket_of(made)), target)
    assert "1 of 3 checkpoints are in the target" in "".join(caught.value.__notes__)


def test_an_interrupt_right_after_a_commit_counts_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = Copier.copy

    def interrupted(copier: Copier, checkpoint: Checkpoint, prefix: str, *, is_there: bool) -> Copied:
        made = copied(copier, checkpoint, prefix, is_there=is_there)
        if prefix.startswith(prefix_of(2)):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Copier, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(FaultStore(bucket_of(made)), FaultStore(Bucket(), url=TARGET))
    assert "2 of 3 checkpoints are in the target" in "".join(caught.value.__notes__)


def test_half_a_copy_goes_with_the_usual_sweep_of_the_target(made: Path) -> None:
    target = Bucket()
    target.raw_put("epochs/0000000005.json", b"{}")
    client = target_of(target)
    client.inject(kind=FaultKind.CRASH_BEFORE, verbs=("create",), key=MANIFEST_NAME)
    with pytest.raises(Crash):
        run(FaultStore(bucket_of(made)), client, Selection())
    assert [key for key in target.raw_list() if key.startswith(prefix_of(3))]
    target.advance(7_200)
    (gone,) = sweep(place_of(target_of(target)).catalog, older_than_s=3_600, dry_run=False)
    assert gone.prefix == f"{prefix_of(3)}/"
    assert [key for key in target.raw_list() if key.startswith(prefix_of(3))] == [f"{prefix_of(3)}/{MANIFEST_NAME}"]
    with pytest.raises(CheckpointExistsError, match=r"a sweep of .* has decided"):
        run(FaultStore(bucket_of(made)), target_of(target), Selection())


# -- memory and order ----------------------------------------------------------------------------------------------


class Told(RetryingStore):
    """A disk that tells which shard it is asked for."""

    def __init__(self, root: Path, told: Callable[[str], object]) -> None:
        super().__init__(LocalStore(root), OPTIONS.retry)
        self._told = told

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        self._told(key)
        super().stream(key, start=start, stop=stop, into=into)


def test_a_disk_is_read_shard_by_shard_so_that_the_first_one_is_on_its_way_early(made: Path) -> None:
    asked: list[str] = []
    is_another = threading.Event()

    def told(key: str) -> None:
        asked.append(key)
        if key != asked[0]:
            is_another.set()
        elif len(asked) == 1:
            is_another.wait(0.2)  # who reads another shard meanwhile has the time to come

    options = replace(OPTIONS, concurrency=4)
    source = Place(Catalog(Told(made, told)), "")
    copy_places([source], place_of(target_of(Bucket())), Selection(), options, Silent())
    assert len(set(asked)) > 2
    assert [key for key, _ in itertools.groupby(asked)] == list(dict.fromkeys(asked))


def test_who_waits_for_its_turn_at_a_slow_disk_is_not_what_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "_LOOK_S", 0.01)
    turn, got_on = threading.Lock(), threading.Semaphore(0)

    def wait() -> None:
        with told_of_moves(lambda _: got_on.release()), copier._in(turn):
            pass

    with turn:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert all(got_on.acquire(timeout=60) for _ in range(3)), "a pool would have given it up"
    waiting.join(60)
    assert not turn.locked()


def test_memory_of_a_put_that_failed_is_not_used_again(made: Path) -> None:
    sent: list[tuple[str, memoryview]] = []

    class LeavingBehind(FaultStore):
        def put(self, key: str, buffers: Sequence[memoryview]) -> None:
            sent.append((key, buffers[0]))
            raise AccessDeniedError("denied, while a request goes on", key=key)

    options = replace(OPTIONS, concurrency=4)
    source = Place(Catalog(Told(made, lambda _: None)), "")
    with pytest.raises(AccessDeniedError):
        copy_places([source], place_of(LeavingBehind(Bucket(), url=TARGET)), Selection(), options, Silent())
    assert sent
    assert all(bytes(memory) == (made / key).read_bytes() for key, memory in sent)


def test_memory_of_one_checkpoint_serves_the_next(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    send = copier.Copier._send

    def sent(one: copier.Copier, *rest: Any) -> None:
        before = one.slabs.held_bytes
        send(one, *rest)
        held.append(one.slabs.held_bytes - before)

    monkeypatch.setattr(copier.Copier, "_send", sent)
    one_by_one = replace(OPTIONS, concurrency=1)  # how many shards are in flight at once is else a matter of time
    copy_places([place_of(FaultStore(bucket_of(made)))], place_of(target_of(Bucket())), ALL, one_by_one, Silent())
    assert held[0] > 0
    assert held[1:] == [0, 0]


# -- real stores ---------------------------------------------------------------------------------------------------


def test_a_root_goes_to_a_bucket_and_back(made: Path, s3_url: FreshPrefix, tmp_path: Path) -> None:
    options = s3_url.storage_options
    cloudckpt.copy(made, s3_url.url, every=True, target_storage_options=options)
    assert all(one.is_whole for one in cloudckpt.verify_all(s3_url.url, deep=True, storage_options=options))
    (same,) = cloudckpt.copy(made, s3_url.url, check=True, target_storage_options=options)
    assert (same.is_new, same.sent_count) == (False, 0)
    cloudckpt.copy(s3_url.url, tmp_path / "back", every=True, storage_options=options)
    assert files_of(tmp_path / "back") == files_of(made)


def _save_by_dcp(url: str) -> None:
    dcp.save({f"w{dist.get_rank()}": torch.ones(5)}, storage_writer=CloudWriter(url))


def test_shards_of_ranks_with_attempts_of_their_own_are_copied(tmp_path: Path) -> None:
    run_ranks(2, _save_by_dcp, str(tmp_path / "one"))
    assert len({path.parent for path in shards_of(tmp_path / "one")}) == 2
    cloudckpt.copy(tmp_path / "one", tmp_path / "other")
    assert files_of(tmp_path / "other") == files_of(tmp_path / "one")
    assert cloudckpt.verify(tmp_path / "other", deep=True).is_whole
