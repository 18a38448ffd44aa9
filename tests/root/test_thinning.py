"""What a person has removed by hand is what was shown, and no more; whatever comes between the look and the removal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    FormatVersionError,
    ManifestError,
    OptionsError,
    PinnedError,
)
from cloudckpt.format import MANIFEST_NAME, checkpoint_prefix, digest_of, pin_key
from cloudckpt.format.record import encode_record
from cloudckpt.root import Catalog, KeepBest, KeepEvery, KeepLast, Roots, Thinning, pin
from tests.root.test_pins import history_of, manifest_of, roots_of, steps
from tests.store.fault_store import Bucket, Crash, FaultKind, FaultStore, Op, denied


@pytest.fixture
def bucket() -> Bucket:
    """Five steps, of which the second is the best."""
    return history_of(3.0, 1.0, 4.0, 5.0, 2.0)


class Clock:
    """Stands still but for those who sleep by it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def thinning_of(client: FaultStore, grace_s: float = 0.0, clock: Clock | None = None) -> Thinning:
    clock = clock or Clock()
    return Thinning(Catalog(client), grace_s=grace_s, clock=clock, sleep=clock.sleep)


def objects(bucket: Bucket, step: int) -> list[str]:
    return [key for key in bucket.raw_list() if key.startswith(checkpoint_prefix(step, 1))]


def test_a_plan_says_what_goes_what_stays_and_why_and_writes_nothing(bucket: Bucket) -> None:
    pin(roots_of(bucket), 1)
    before = dict(bucket.objects)
    plan = thinning_of(FaultStore(bucket)).by_rules([KeepLast(1), KeepBest("loss")])
    assert [one.step for one in plan.going] == [3, 4]
    assert [(one.step, plan.kept[one.order]) for one in plan.staying] == [
        (1, ("pinned",)),
        (2, ("KeepBest(metric='loss', n=1, mode='min')",)),
        (5, ("newest", "KeepLast(n=1)")),
    ]
    assert plan.total_bytes == 8
    assert bucket.objects == before


def test_manifests_go_at_once_and_objects_after_the_grace_time(bucket: Bucket) -> None:
    clock, told = Clock(), list[float]()
    thinning = thinning_of(FaultStore(bucket), grace_s=2.5, clock=clock)
    assert [one.step for one in thinning.uncommit(thinning.by_rules([KeepLast(3)]))] == [1, 2]
    assert steps(bucket) == [3, 4, 5]
    assert len(objects(bucket, 1)) == 2
    assert thinning.finish(told.append) == 4
    assert objects(bucket, 1) == []
    assert told == [2.5, 1.5, 0.5, 0.0]


def test_what_is_pinned_between_the_look_and_the_removal_stays(bucket: Bucket) -> None:
    thinning = thinning_of(FaultStore(bucket))
    plan = thinning.by_rules([KeepLast(1)])
    pin(roots_of(bucket), 2)
    assert [one.step for one in thinning.uncommit(plan)] == [1, 3, 4]
    thinning.finish()
    assert steps(bucket) == [2, 5]


def test_what_was_not_shown_does_not_go(bucket: Bucket) -> None:
    thinning = thinning_of(FaultStore(bucket))
    plan = thinning.by_rules([KeepLast(2)])
    for step in (6, 7):
        prefix = checkpoint_prefix(step, 1)
        bucket.raw_put(f"{prefix}0123456789abcdef/index.bin", b"abc")
        bucket.raw_put(f"{prefix}0123456789abcdef/r00000-0000.safetensors", b"abcd")
        bucket.raw_put(prefix + MANIFEST_NAME, manifest_of(step, 1, 9.0).encode())
    thinning.uncommit(plan)
    assert steps(bucket) == [4, 5, 6, 7], "by the rules 4 and 5 would go by now, but nobody has seen that"


@pytest.mark.parametrize("rule", [KeepBest("los"), KeepEvery(steps=100)])
def test_a_rule_that_keeps_nothing_is_refused_and_nothing_goes(bucket: Bucket, rule: KeepBest | KeepEvery) -> None:
    with pytest.raises(OptionsError, match=r"keeps none of the 5 checkpoints .*their metrics: loss"):
        thinning_of(FaultStore(bucket)).by_rules([KeepLast(1), rule])


def test_without_rules_nothing_is_planned(bucket: Bucket) -> None:
    with pytest.raises(OptionsError, match="no rule says what is to stay"):
        thinning_of(FaultStore(bucket)).by_rules([])


def test_what_a_job_went_on_from_stays_until_it_has_saved(bucket: Bucket) -> None:
    Catalog(FaultStore(bucket)).claims.claim(resumed_from=(2, 1))
    plan = thinning_of(FaultStore(bucket)).by_rules([KeepLast(1)])
    assert [one.step for one in plan.going] == [1, 3, 4]
    assert plan.kept[1, 2] == ("in use",)
    (words,) = thinning_of(FaultStore(bucket)).by_steps([2]).warnings
    assert "went on from step 2, and has saved nothing since" in words


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([5], "step 5 is the newest: the next restore goes back to step 4"),
        ([4, 5], "step 5 is the newest: the next restore goes back to step 3"),
        ([5, 3, 1, 4, 2], "nothing is left after that"),
        ([5, 3, 3], "goes back to step 4"),
        ([2, 3], ""),
    ],
)
def test_what_it_means_that_the_newest_goes_is_said(bucket: Bucket, asked: list[int], words: str) -> None:
    warnings = thinning_of(FaultStore(bucket)).by_steps(asked).warnings
    assert words in (warnings[0] if warnings else "")
    assert bool(warnings) == bool(words)


def test_what_is_asked_for_by_name_goes(bucket: Bucket) -> None:
    thinning = thinning_of(FaultStore(bucket))
    bucket.raw_put(checkpoint_prefix(3, 1) + MANIFEST_NAME, b"damaged")
    plan = thinning.by_steps([4, 3])
    assert ([one.step for one in plan.going], len(plan.unreadable)) == ([4], 1)
    thinning.uncommit(plan)
    thinning.finish()
    assert steps(bucket) == [1, 2, 5]
    assert objects(bucket, 3) + objects(bucket, 4) == []


def test_where_all_goes_the_next_job_begins_afresh(bucket: Bucket) -> None:
    Catalog(FaultStore(bucket)).claims.mark_committed(1)
    thinning = thinning_of(FaultStore(bucket))
    thinning.uncommit(thinning.by_steps([1, 2, 3, 4, 5]))
    assert Roots([Catalog(FaultStore(bucket))]).newest() is None


def newer_format(bucket: Bucket) -> None:
    bare = encode_record(msgspec.structs.replace(manifest_of(3, 1, 0.0), format_version=3))
    sealed = bare.replace(b'"sha256": ""', b'"sha256": "%s"' % digest_of(bare).encode())
    bucket.raw_put(checkpoint_prefix(3, 1) + MANIFEST_NAME, sealed)


def pinned(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3, "the paper")


def missing(bucket: Bucket) -> None:
    del bucket.objects[checkpoint_prefix(3, 1) + MANIFEST_NAME]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(newer_format, FormatVersionError), (pinned, PinnedError), (missing, CheckpointNotFoundError)],
)
def test_of_several_steps_of_which_one_may_not_go_none_does(
    bucket: Bucket, spoil: Callable[[Bucket], None], kind: type[Exception]
) -> None:
    spoil(bucket)
    before = dict(bucket.objects)
    with pytest.raises(kind):
        thinning_of(FaultStore(bucket)).by_steps([1, 3])
    assert bucket.objects == before


@pytest.mark.parametrize("by_name", [False, True])
def test_without_the_right_to_delete_it_is_said_that_nothing_went(bucket: Bucket, *, by_name: bool) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["delete"], error=denied, times=None)
    thinning = thinning_of(client)
    plan = thinning.by_steps([1, 2]) if by_name else thinning.by_rules([KeepLast(3)])
    with pytest.raises(AccessDeniedError) as caught:
        thinning.uncommit(plan)
    assert caught.value.__notes__ == ["nothing was removed"]
    assert steps(bucket) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("by_name", [False, True])
def test_what_went_before_the_store_refused_is_said(bucket: Bucket, *, by_name: bool) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["delete"], key=checkpoint_prefix(2, 1), error=denied, times=None)
    thinning = thinning_of(client)
    plan = thinning.by_steps([1, 2]) if by_name else thinning.by_rules([KeepLast(3)])
    with pytest.raises(AccessDeniedError) as caught:
        thinning.uncommit(plan)
    (note,) = caught.value.__notes__
    assert note.startswith("1 checkpoints are removed (steps 1); objects of theirs may be left, which `cloudckpt sweep")
    assert steps(bucket) == [2, 3, 4, 5]


def test_who_interrupts_the_wait_hears_what_was_done(bucket: Bucket) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    thinning = thinning_of(FaultStore(bucket), grace_s=60)
    thinning.uncommit(thinning.by_rules([KeepLast(3)]))
    with pytest.raises(KeyboardInterrupt) as caught:
        thinning.finish(interrupted)
    assert caught.value.__notes__[0].startswith("2 checkpoints are removed; objects of theirs may be left")
    assert steps(bucket) == [3, 4, 5]
    assert len(objects(bucket, 1)) == 2


def test_one_that_is_gone_when_it_is_removed_is_no_error(bucket: Bucket) -> None:
    thinning = thinning_of(FaultStore(bucket))
    plan = thinning.by_rules([KeepLast(3)])
    missing_key = checkpoint_prefix(1, 1) + MANIFEST_NAME
    del bucket.objects[missing_key]
    assert [one.step for one in thinning.uncommit(plan)] == [2]


# -- what tells a root that was emptied from one that has lost its history ---------------------------------------


def is_lost(bucket: Bucket) -> bool:
    try:
        assert Roots([Catalog(FaultStore(bucket))]).newest() is None
    except ManifestError:
        return True
    return False


@pytest.mark.parametrize("kind", [FaultKind.CRASH_BEFORE, FaultKind.CRASH_AFTER])
@pytest.mark.parametrize("number", range(1, 14))
def test_wherever_the_removal_of_the_last_is_cut_off_a_later_loss_is_no_fresh_start(
    kind: FaultKind, number: int
) -> None:
    bucket = history_of(1.0)
    Catalog(FaultStore(bucket)).claims.mark_committed(1)
    client = FaultStore(bucket)
    thinning = thinning_of(client)
    plan = thinning.by_steps([1])
    client.crash_at(client.op_count + number, kind)
    with suppress(Crash):
        thinning.uncommit(plan)
    manifest_key = checkpoint_prefix(1, 1) + MANIFEST_NAME
    is_removed = manifest_key not in bucket.objects
    bucket.objects.pop(manifest_key, None)  # a lifecycle rule
    is_marked = any(key.endswith(".emptied") for key in bucket.objects)
    assert is_marked <= is_removed
    assert is_lost(bucket) != is_marked


def test_a_removal_of_the_last_that_the_store_refuses_leaves_no_mark(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["delete"], error=denied, times=None)
    thinning = thinning_of(client)
    with pytest.raises(AccessDeniedError):
        thinning.uncommit(thinning.by_steps([1, 2, 3, 4, 5]))
    assert [key for key in bucket.objects if key.endswith(".emptied")] == []


# -- what nobody can read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damaged", "asked", "words"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "nothing is left after that"),
        ([1, 2, 3, 4, 5], [5], "nothing that can be read is left after that"),
        ([4], [1, 2, 3, 5], "nothing that can be read is left after that"),
        ([5], [5], "step 5 is the newest, and its objects may be whole"),
        ([5], [4], "step 4 is the newest: the next restore goes back to step 3"),
        ([3], [3], ""),
    ],
)
def test_what_cannot_be_read_counts_for_what_it_means_that_some_go(
    bucket: Bucket, damaged: list[int], asked: list[int], words: str
) -> None:
    for step in damaged:
        bucket.raw_put(checkpoint_prefix(step, 1) + MANIFEST_NAME, b"damaged")
    plan = thinning_of(FaultStore(bucket)).by_steps(asked)
    assert words in (plan.warnings[0] if plan.warnings else "")
    assert bool(plan.warnings) == bool(words)
    assert [one.step for one in plan.unreadable] == [step for step in asked if step in damaged]


def test_objects_of_what_cannot_be_read_go_after_the_grace_time(bucket: Bucket) -> None:
    bucket.raw_put(checkpoint_prefix(3, 1) + MANIFEST_NAME, b"damaged")
    clock = Clock()
    thinning = thinning_of(FaultStore(bucket), grace_s=2.5, clock=clock)
    assert [one.step for one in thinning.uncommit(thinning.by_steps([3]))] == [3]
    assert len(objects(bucket, 3)) == 2
    assert thinning.finish() == 2
    assert (objects(bucket, 3), clock.now_s) == ([], 2.5)


def test_what_cannot_be_read_and_is_pinned_meanwhile_is_put_back_whole(bucket: Bucket) -> None:
    prefix = checkpoint_prefix(3, 1)
    pin(roots_of(bucket), 3)
    record = bucket.objects.pop(pin_key(prefix))
    bucket.raw_put(prefix + MANIFEST_NAME, b"damaged")

    def hook(op: Op) -> None:
        if op.verb == "delete":
            bucket.objects[pin_key(prefix)] = record

    thinning = thinning_of(FaultStore(bucket, hook=hook))
    with pytest.raises(PinnedError, match="was pinned while it was being deleted, and stands"):
        thinning.uncommit(thinning.by_steps([3]))
    assert steps(bucket) == [1, 2, 3, 4, 5]
