"""What checkpoints share in a root they share in its copy, or each holds it itself: they come back whole either way.

FORMAT invariants 2, 5, 7, 12, 15 and 17: also after a kill anywhere, and while the target is tidied up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, KeepLast, Options, StorageError
from cloudckpt.copying.copier import Copied
from cloudckpt.copying.lead import Selection, copy_places
from cloudckpt.format import SHARD_SUFFIX
from cloudckpt.options import KIB
from cloudckpt.root import Catalog, Thinning, sweep
from cloudckpt.store.probe import _proven
from servers import FreshPrefix
from tests.copying.roots import bucket_of, place_of, prefix_of
from tests.store.fault_store import Bucket, FaultKind, FaultStore, Op

OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=1, memory_budget_bytes=64 * KIB)
BASE = torch.arange(5_000, dtype=torch.float32)
TARGET = "memory://bucket/copy"
ALL = Selection(is_all=True, takes_pins=True)


def state_of(step: int) -> dict[str, object]:
    return {"base": BASE.clone(), "head": torch.full((300,), float(step)), "step": step}


def save(root: Path, *steps: int, **more: object) -> None:
    given = {"options": OPTIONS, "reuse_unchanged": True, "progress": "off", "save_rng": False, "prune_grace_s": 0}
    with CheckpointManager(root, **{**given, **more}) as manager:  # type: ignore[arg-type]
        manager.restore(state_of(0))
        for step in steps:
            manager.save(step, state_of(step))


def whole(root: Path) -> list[int]:
    """Restore and verify every checkpoint below a root; return their steps."""
    with CheckpointManager(root, options=OPTIONS, progress="off", save_rng=False) as manager:
        steps = manager.all_steps()
        for step in steps:
            state = state_of(0)
            manager.restore(state, step)
            assert torch.equal(state["base"], BASE)  # type: ignore[arg-type]
            assert torch.equal(state["head"], torch.full((300,), float(step)))  # type: ignore[arg-type]
    assert all(one.is_whole for one in cloudckpt.verify_all(root, deep=True))
    return steps


def shards(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob(f"*{SHARD_SUFFIX}"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 3, of which the first holds what all share."""
    save(tmp_path / "root", 1, 2, 3)
    return tmp_path / "root"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Steps 3 and 4; of step 1 there is what they share, and no checkpoint."""
    save(tmp_path / "pruned", 1, 2, 3, 4, retention=KeepLast(2))
    assert [len([name for name in shards(tmp_path / "pruned") if prefix_of(step) in name]) for step in (1, 2)] == [5, 0]
    return tmp_path / "pruned"


def copied(source: Path, target: Path, **more: object) -> Sequence[Copied]:
    return cloudckpt.copy(source, target, options=OPTIONS, progress="off", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["root", "pruned"])
def test_a_whole_root_shares_in_the_copy_what_it_shares_and_nothing_is_sent_twice(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, target = request.getfixturevalue(which), tmp_path / "to"
    told = copied(source, target, every=True)
    assert shards(target) == shards(source)
    assert sum(one.sent_bytes for one in told) < 2 * max(one.total_bytes for one in told)
    assert whole(target) == whole(source)
    assert cloudckpt.diff(target / prefix_of(3), source / prefix_of(3)).is_equal
    assert [one.is_new for one in copied(source, target, every=True)] == [False] * len(told)
    assert shards(target) == shards(source)


def test_what_is_new_in_the_source_is_brought_and_refers_to_what_stands_in_the_target(
    root: Path, tmp_path: Path
) -> None:
    copied(root, tmp_path / "to", every=True)
    save(root, 4)
    new = copied(root, tmp_path / "to", every=True)[-1]
    assert (new.is_new, new.sent_bytes < new.total_bytes / 5) == (True, True)
    assert whole(tmp_path / "to") == [1, 2, 3, 4]


@pytest.mark.parametrize(("steps", "count"), [((2, 3), 7), ((3,), 6)], ids=["several", "a-lone-one"])
def test_of_steps_without_their_holder_several_share_and_a_lone_one_is_whole(
    root: Path, tmp_path: Path, steps: tuple[int, ...], count: int
) -> None:
    copied(root, tmp_path / "to", steps=steps)
    assert len(shards(tmp_path / "to")) == count
    assert whole(tmp_path / "to") == list(steps)


@pytest.mark.parametrize("which", ["root", "pruned"])
@pytest.mark.parametrize("tidied", ["rm", "prune", "sweep"])
def test_what_tidies_the_copy_up_takes_nothing_that_a_checkpoint_there_needs(
    which: str, tidied: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = tmp_path / "to"
    copied(request.getfixturevalue(which), target, every=True)
    before = whole(target)
    if tidied == "rm":
        with cloudckpt.store.open_store(target) as store:
            thinning = Thinning(Catalog(store), grace_s=0, sleep=lambda _: None)
            thinning.uncommit(thinning.by_steps(before[:1]))
            thinning.finish()
        assert whole(target) == before[1:]
    elif tidied == "prune":
        save(target, 9, retention=KeepLast(2))
        assert whole(target) == [before[-1], 9]
    else:
        with cloudckpt.store.open_store(target) as store:
            Catalog(store).claims.claim()
            sweep(Catalog(store), older_than_s=0, dry_run=False)
        assert whole(target) == before
    held = [name for name in shards(target) if prefix_of(1) in name]
    assert len(held) >= 5


def target_of(bucket: Bucket) -> FaultStore:
    return FaultStore(bucket, url=TARGET)


def test_a_root_on_a_real_server_shares_as_on_a_disk(pruned: Path, s3_url: FreshPrefix) -> None:
    there = s3_url.storage_options
    for _ in range(2):
        cloudckpt.copy(
            pruned,
            s3_url.url,
            every=True,
            options=OPTIONS,
            progress="off",
            target_storage_options=s3_url.storage_options,
        )
    given = {"options": OPTIONS, "progress": "off", "save_rng": False, "prune_grace_s": 0, "storage_options": there}
    with CheckpointManager(s3_url.url, retention=KeepLast(2), reuse_unchanged=True, **given) as manager:  # type: ignore[arg-type]
        manager.restore(state_of(0))
        made = manager.save(5, state_of(5))
        manager.wait()
        assert made is not None
        assert made.manifest.sent_bytes < made.total_bytes / 5
        assert manager.all_steps() == [4, 5]
        for step in (4, 5):
            state = state_of(0)
            manager.restore(state, step)
            assert torch.equal(state["base"], BASE)  # type: ignore[arg-type]
    found = cloudckpt.verify_all(s3_url.url, deep=True, storage_options=there)
    assert [one.is_whole for one in found] == [True, True]


def run(source: Bucket, target: FaultStore, selection: Selection = ALL) -> Sequence[Copied]:
    class Silent:
        def begin(self, total_bytes: int) -> None: ...
        def move(self, size_bytes: int) -> None: ...

    _proven.clear()
    return copy_places([place_of(FaultStore(source))], place_of(target), selection, OPTIONS, Silent())


@pytest.fixture
def buckets(pruned: Path) -> Iterator[tuple[Bucket, Bucket]]:
    yield bucket_of(pruned), Bucket()
    _proven.clear()


def objects(bucket: Bucket) -> list[str]:
    return sorted(key for key in bucket.raw_list() if not key.startswith("probe-"))


def is_whole(bucket: Bucket) -> list[int]:
    catalog = Catalog(FaultStore(bucket))
    found = catalog.survey().checkpoints
    assert catalog.standing(found) == list(found)
    return [one.step for one in found]


def test_a_copy_that_is_cut_off_anywhere_goes_on_to_the_same_objects(buckets: tuple[Bucket, Bucket]) -> None:
    source, target = buckets
    run(source, target_of(target))
    wanted, number = objects(target), 0
    while True:
        number += 1
        target.objects.clear()
        client = target_of(target)
        fault = client.crash_at(number, FaultKind.CRASH_HALFWAY if number % 2 else FaultKind.CRASH_AFTER)
        with suppress(BaseException):
            run(source, client)
        is_whole(target)
        run(source, target_of(target))
        assert objects(target) == wanted
        assert is_whole(target) == [3, 4]
        if not fault.fired:
            break
    assert number > 20


def test_a_copy_that_began_to_hold_all_itself_goes_on_so(buckets: tuple[Bucket, Bucket]) -> None:
    source, target = buckets
    alone = target_of(target)
    alone.inject(kind=FaultKind.CRASH_BEFORE, verbs=["put"], key="r00000", skip=3)
    with suppress(BaseException):
        run(source, alone, Selection(steps=(4,)))
    assert len([key for key in target.raw_list() if key.startswith(prefix_of(4))]) == 3
    run(source, target_of(target))
    assert is_whole(target) == [3, 4]
    assert len([key for key in target.raw_list() if key.startswith(prefix_of(4)) and key.endswith(SHARD_SUFFIX)]) == 6


def test_what_is_removed_while_the_copy_commits_is_not_referred_to(buckets: tuple[Bucket, Bucket]) -> None:
    source, target = buckets

    def removed(op: Op) -> None:
        if op.verb == "create" and op.key.startswith(f"{prefix_of(3)}/"):
            client.hook = None
            assert Catalog(FaultStore(target)).void(f"{prefix_of(1)}/")

    client = FaultStore(target, url=TARGET, hook=removed)
    with pytest.raises(StorageError, match=r"is being removed, in the target; copy again"):
        run(source, client)
    assert is_whole(target) == []
    run(source, target_of(target))
    assert is_whole(target) == [3, 4]
    for key in [key for key in target.raw_list() if key.startswith(prefix_of(1))]:
        del target.objects[key]
    assert is_whole(target) == [3, 4], "nothing there is needed"


def test_a_check_mends_what_others_hold_in_its_place(root: Path, tmp_path: Path) -> None:
    copied(root, tmp_path / "to", every=True)
    before = shards(tmp_path / "to")
    held = next(path for path in sorted((tmp_path / "to").rglob(f"*{SHARD_SUFFIX}")) if prefix_of(1) in str(path))
    held.write_bytes(held.read_bytes()[:-1] + b"\xff")
    assert sum(one.sent_count for one in copied(root, tmp_path / "to", every=True, check=True)) == 1
    assert shards(tmp_path / "to") == before
    assert whole(tmp_path / "to") == [1, 2, 3]


def test_who_removed_a_whole_copy_before_spares_what_its_successor_shares(buckets: tuple[Bucket, Bucket]) -> None:
    source, target = buckets
    run(source, target_of(target), Selection(steps=(4,)))
    job = Catalog(FaultStore(target))
    manifest = job.open(f"{prefix_of(4)}/").manifest
    assert job.once(manifest.sha256, frozenset) == frozenset()
    assert job.once(manifest.sha256, lambda: frozenset({"held"})) == {"held"}
