"""A pin that was acknowledged holds, whatever rules, other jobs and crashes do; and nothing else of retention changes.

The pruner and who pins are clients of one bucket; who pins goes on by a request whenever the test lets it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, count, cycle, product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    CloudCkptError,
    ManifestError,
    OptionsError,
    PinnedError,
    RetryExhaustedError,
    StorageError,
    TransientError,
)
from cloudckpt.format import FORMAT_VERSION, MANIFEST_NAME, IndexRef, Manifest, checkpoint_prefix, pin_key
from cloudckpt.root import (
    Catalog,
    Checkpoint,
    Cleaner,
    KeepBest,
    KeepEvery,
    KeepLast,
    Pin,
    Pruner,
    RetentionRule,
    Roots,
    overview,
    pin,
    pins_of,
    sweep,
    unpin,
)
from cloudckpt.root.claims import Line
from cloudckpt.root.retention import removable
from tests.effort import examples
from tests.store.fault_store import Bucket, Crash, FaultKind, FaultStore, Op, denied


def away(op: Op) -> StorageError:
    """What is raised where no answer has come for as long as anybody waits."""
    return RetryExhaustedError(
        f"injected: {op.verb} of {op.key} was tried for as long as it may", op=op.verb, key=op.key
    )


Order = tuple[int, int]
ATTEMPT = "0123456789abcdef"
DIGEST = "0" * 64


def manifest_of(step: int, epoch: int, loss: float) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=epoch,
        attempt=ATTEMPT,
        created_at="2026-01-01T00:00:00+00:00",
        total_bytes=4,
        shard_count=1,
        index=IndexRef(size_bytes=3, sha256=DIGEST),
        metrics={"loss": loss},
    )


def history_of(*losses: float, epoch_of: Callable[[int], int] = lambda _: 1) -> Bucket:
    """Steps 1, 2, 3… with these losses, and the claims of all epochs."""
    bucket = Bucket()
    catalog = Catalog(FaultStore(bucket))
    for step, loss in enumerate(losses, start=1):
        epoch = epoch_of(step)
        while catalog.claims.highest() < epoch:
            catalog.claims.claim()
        prefix = checkpoint_prefix(step, epoch)
        bucket.raw_put(f"{prefix}{ATTEMPT}/index.bin", b"abc")
        bucket.raw_put(f"{prefix}{ATTEMPT}/r00000-0000.safetensors", b"abcd")
        bucket.raw_put(prefix + MANIFEST_NAME, manifest_of(step, epoch, loss).encode())
    bucket.advance(10)
    return bucket


def roots_of(bucket: Bucket) -> Roots:
    return Roots([Catalog(FaultStore(bucket))])


def full(op: Op) -> StorageError:
    error = StorageError(f"injected into {op.verb} of {op.key!r}", op=op.verb, key=op.key)
    error.is_full = True
    return error


def pruner_of(catalog: Catalog, rules: Sequence[RetentionRule], grace_s: float = 0.0) -> Pruner:
    cleaner = Cleaner(catalog, grace_s=grace_s, sweep_after_s=0.0, clock=count().__next__)
    return Pruner(catalog, rules, cleaner, scope="root")


def prune(client: FaultStore, rules: Sequence[RetentionRule]) -> None:
    """One pass by the job of the newest epoch, and the removal of what is due and of what others left."""
    catalog = Catalog(client)
    newest = Roots([catalog]).newest()
    assert newest is not None
    pruner = pruner_of(catalog, rules)
    with suppress(CloudCkptError):
        pruner.prune_after(newest, Line())
    pruner.make_room(go_on=lambda: True)


def standing(bucket: Bucket) -> list[Checkpoint]:
    return list(Catalog(FaultStore(bucket)).survey().checkpoints)


def steps(bucket: Bucket) -> list[int]:
    return [one.step for one in standing(bucket)]


def committed(bucket: Bucket) -> list[int]:
    """Return the steps of which a manifest stands, whatever is pinned."""
    return [one.step for one in standing(bucket) if one.prefix + MANIFEST_NAME in bucket.objects]


def is_whole(bucket: Bucket, found: Checkpoint) -> bool:
    return {
        f"{found.prefix}{ATTEMPT}/index.bin",
        f"{found.prefix}{ATTEMPT}/r00000-0000.safetensors",
    } <= bucket.objects.keys()


@pytest.fixture
def bucket() -> Bucket:
    """Five steps, of which the second is the best."""
    return history_of(3.0, 1.0, 4.0, 5.0, 2.0)


# -- pin, unpin ----------------------------------------------------------------------------------------------


def test_what_is_pinned_stays_whatever_the_rules_say_until_it_is_unpinned(bucket: Bucket) -> None:
    made = pin(roots_of(bucket), 3, "for the paper")
    prune(FaultStore(bucket), [KeepLast(1)])
    assert steps(bucket) == [3, 5]
    assert (made.step, made.epoch, made.note) == (3, 1, "for the paper")
    assert made.url == standing(bucket)[0].url
    assert pins_of(roots_of(bucket)) == [made]

    assert unpin(roots_of(bucket), 3) == made
    prune(FaultStore(bucket), [KeepLast(1)])
    assert steps(bucket) == [5]
    assert pins_of(roots_of(bucket)) == []


def test_a_second_pin_keeps_the_first_ones_note(bucket: Bucket) -> None:
    first = pin(roots_of(bucket), 3, "first")
    assert pin(roots_of(bucket), 3, "second") == first


def test_a_pin_of_an_attempt_that_is_no_more_is_replaced(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3, "old")
    prefix = checkpoint_prefix(3, 1)
    other = msgspec.structs.replace(manifest_of(3, 1, 4.0), attempt="f" * 16)
    bucket.raw_put(prefix + MANIFEST_NAME, other.encode())
    assert pin(roots_of(bucket), 3, "new").note == "new"
    assert json.loads(bucket.raw_get(pin_key(prefix)))["attempt"] == "f" * 16


@pytest.mark.parametrize("note", ["x" * 1001, "\udc80", 3, None])
def test_a_note_that_is_none_is_refused_and_nothing_is_pinned(bucket: Bucket, note: str) -> None:
    with pytest.raises(OptionsError, match="give a text of 1000 characters"):
        pin(roots_of(bucket), 3, note)
    assert pins_of(roots_of(bucket)) == []


def test_a_step_that_is_not_there_is_not_pinned_and_not_unpinned(bucket: Bucket) -> None:
    pin(roots_of(bucket), 2)
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 9"):
        pin(roots_of(bucket), 9)
    with pytest.raises(CheckpointNotFoundError, match=r"step 9 is not pinned at .*; pinned are: 2"):
        unpin(roots_of(bucket), 9)


def test_a_pin_is_the_manifest_byte_for_byte(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3, 'a "note"\n\\ and é')
    prefix = checkpoint_prefix(3, 1)
    text = bucket.raw_get(prefix + MANIFEST_NAME)
    assert json.loads(bucket.raw_get(pin_key(prefix)))["manifest"].encode() == text
    del bucket.objects[prefix + MANIFEST_NAME]
    assert Catalog(FaultStore(bucket)).put_back(prefix) is not None
    assert bucket.raw_get(prefix + MANIFEST_NAME) == text


def test_of_two_roots_the_one_that_holds_the_step_holds_its_pin(bucket: Bucket) -> None:
    other = history_of(1.0)
    roots = Roots([Catalog(FaultStore(other)), Catalog(FaultStore(bucket, url="memory://bucket/other"))])
    pin(roots, 4)
    assert pin_key(checkpoint_prefix(4, 1)) in bucket.objects
    assert [one.step for one in pins_of(roots)] == [4]
    unpin(roots, 4)
    assert pins_of(roots) == []


def spoilt(data: bytes) -> Iterator[bytes]:
    facts = json.loads(data)
    yield b""
    yield data.replace(b'"format_version": 1', b'"format_version": 9')
    for change in ({"step": 4}, {"attempt": "f" * 16}, {"created_at": "now"}, {"manifest": "{}"}, {"more": 1}):
        yield json.dumps({**facts, **change}).encode()
    yield json.dumps({**facts, "manifest": facts["manifest"].replace("4.0", "0.4")}).encode()


@pytest.mark.parametrize("number", range(8))
def test_a_pin_that_cannot_be_read_pins_all_the_same(bucket: Bucket, number: int) -> None:
    pin(roots_of(bucket), 3)
    key = pin_key(checkpoint_prefix(3, 1))
    bucket.raw_put(key, list(spoilt(bucket.raw_get(key)))[number])
    with pytest.raises(ManifestError, match=key):
        Catalog(FaultStore(bucket)).pins.read(checkpoint_prefix(3, 1))
    prune(FaultStore(bucket), [KeepLast(1)])
    assert steps(bucket) == [3, 5]
    assert [(one.step, key in one.note) for one in pins_of(roots_of(bucket))] == [(3, True)]
    assert unpin(roots_of(bucket), 3).step == 3


# -- who removes -----------------------------------------------------------------------------------------------


def test_a_pass_with_nothing_to_remove_asks_for_no_pins(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    pruner_of(Catalog(client), [KeepLast(9)]).prune_after(standing(bucket)[-1], Line())
    assert [op for op in client.trace if "pins/" in op.key] == []


def test_a_pass_that_removes_lists_the_pins_twice(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    pruner_of(Catalog(client), [KeepLast(1)]).prune_after(standing(bucket)[-1], Line())
    assert [(op.verb, op.key) for op in client.trace if "pins/" in op.key] == [("list", "pins/")] * 2


def test_what_a_pass_could_not_put_back_is_put_back_instead_of_its_shards_going(bucket: Bucket) -> None:
    def hook(op: Op) -> None:
        if op.verb == "delete" and checkpoint_prefix(3, 1) in op.key:
            pin(roots_of(bucket), 3)

    client = FaultStore(bucket, hook=hook)
    client.inject(verbs=["list"], key="pins/", skip=1)
    pruner = pruner_of(Catalog(client), [KeepLast(1)])
    with pytest.raises(TransientError):
        pruner.prune_after(standing(bucket)[-1], Line())
    assert committed(bucket) == [5]
    pruner.make_room(go_on=lambda: True)
    assert committed(bucket) == [3, 5]
    assert [one for one in standing(bucket) if not is_whole(bucket, one)] == []
    assert len([key for key in bucket.objects if key.startswith("step-")]) == 6


@pytest.mark.parametrize(("verb", "key"), [("delete", checkpoint_prefix(2, 1)), ("list", "pins/")])
def test_what_went_before_the_store_went_away_is_told(bucket: Bucket, verb: str, key: str) -> None:
    gone: list[Checkpoint] = []
    client = FaultStore(bucket)
    newest = standing(bucket)[-1]
    catalog = Catalog(client)
    cleaner = Cleaner(catalog, grace_s=0.0, sweep_after_s=0.0, clock=count().__next__)
    pruner = Pruner(catalog, [KeepLast(3)], cleaner, scope="root", on_pruned=gone.append)
    # The pins are listed once before anything goes.
    client.inject(verbs=[verb], key=key, error=away, times=None, skip=int(verb == "list"))
    with pytest.raises(RetryExhaustedError):
        pruner.prune_after(newest, Line())
    assert [one.step for one in gone] == ([1] if verb == "delete" else [1, 2])
    assert steps(bucket) == [step for step in (1, 2, 3, 4, 5) if step not in {one.step for one in gone}]


def test_what_is_deleted_is_told_though_nobody_can_say_then_what_is_pinned(bucket: Bucket) -> None:
    gone: list[Checkpoint] = []
    client = FaultStore(bucket)
    client.inject(verbs=["list"], key="pins/", error=denied, times=None)
    with pytest.raises(AccessDeniedError):
        pruner_of(Catalog(client), []).delete(standing(bucket)[2], gone.append)
    assert ([one.step for one in gone], steps(bucket)) == ([3], [1, 2, 4, 5])


def test_delete_of_a_pinned_one_is_refused_with_its_note(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3, "for the paper")
    with pytest.raises(PinnedError, match=r"step 3 of epoch 1 .* is pinned: for the paper.*unpin it first") as caught:
        pruner_of(Catalog(FaultStore(bucket)), []).delete(standing(bucket)[2], pytest.fail)
    assert caught.value.note == "for the paper"
    assert steps(bucket) == [1, 2, 3, 4, 5]


def test_one_that_is_pinned_while_it_is_deleted_stands(bucket: Bucket) -> None:
    def hook(op: Op) -> None:
        if op.verb == "delete":
            pin(roots_of(bucket), 3)

    client = FaultStore(bucket, hook=hook)
    with pytest.raises(PinnedError, match="was pinned while it was being deleted, and stands"):
        pruner_of(Catalog(client), []).delete(standing(bucket)[2], pytest.fail)
    assert steps(bucket) == [1, 2, 3, 4, 5]


def test_a_sweep_puts_a_pinned_one_back_whose_manifest_is_gone(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    pin(roots_of(bucket), 3)
    catalog = Catalog(FaultStore(bucket))
    catalog.claims.claim()
    for step in (3, 4):
        del bucket.objects[checkpoint_prefix(step, 1) + MANIFEST_NAME]
    bucket.advance(1e6)
    before = dict(bucket.objects)
    assert [one.prefix for one in sweep(catalog, older_than_s=60, dry_run=True)] == [checkpoint_prefix(4, 1)]
    assert bucket.objects == before
    with caplog.at_level(logging.WARNING):
        assert [one.prefix for one in sweep(catalog, older_than_s=60, dry_run=False)] == [checkpoint_prefix(4, 1)]
    assert committed(bucket) == [1, 2, 3, 5]
    assert "which is pinned: it is put back" in caplog.text


def test_one_that_is_pinned_while_a_sweep_is_at_it_is_not_voided(bucket: Bucket) -> None:
    catalog = Catalog(FaultStore(bucket))
    prefix = checkpoint_prefix(3, 1)
    catalog.claims.claim()
    text = bucket.objects.pop(prefix + MANIFEST_NAME)

    def hook(op: Op) -> None:
        if op.verb == "head" and pin_key(prefix) == op.key:
            bucket.objects[prefix + MANIFEST_NAME] = text
            pin(roots_of(bucket), 3)
            del bucket.objects[prefix + MANIFEST_NAME]

    bucket.advance(1e6)
    assert sweep(Catalog(FaultStore(bucket, hook=hook)), older_than_s=60, dry_run=False) == []
    assert steps(bucket) == [1, 2, 3, 4, 5]


def test_a_sweep_asks_for_pins_again_once_it_has_made_void_what_it_removes(bucket: Bucket) -> None:
    prefix = checkpoint_prefix(3, 1)
    pin(roots_of(bucket), 3)
    pinned = bucket.objects.pop(pin_key(prefix))
    Catalog(FaultStore(bucket)).claims.claim()
    del bucket.objects[prefix + MANIFEST_NAME]
    left = {key for key in bucket.objects if key.startswith(prefix)}
    bucket.advance(1e6)

    def pin_late(op: Op) -> None:
        if op.verb == "create" and op.key == prefix + MANIFEST_NAME:
            bucket.objects[pin_key(prefix)] = pinned

    assert sweep(Catalog(FaultStore(bucket, hook=pin_late)), older_than_s=60, dry_run=False) == []
    assert pin_key(prefix) in bucket.objects, "the hook was called"
    assert left < set(bucket.objects)


def test_a_pinned_one_of_which_objects_are_gone_is_not_committed_again_and_told_once(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    pin(roots_of(bucket), 3)
    prefix = checkpoint_prefix(3, 1)
    del bucket.objects[prefix + MANIFEST_NAME]
    del bucket.objects[f"{prefix}{ATTEMPT}/r00000-0000.safetensors"]
    catalog = Catalog(FaultStore(bucket))
    with caplog.at_level(logging.WARNING):
        assert catalog.put_back(prefix) is None
        assert catalog.put_back(prefix) is None
    assert caplog.text.count("is not committed, and cannot be put back") == 1
    assert prefix + MANIFEST_NAME not in bucket.objects
    with pytest.raises(CheckpointNotFoundError):
        catalog.find(3)


def test_a_pinned_one_without_its_manifest_is_found_and_nothing_is_written(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3)
    expected = standing(bucket)[2]
    del bucket.objects[expected.prefix + MANIFEST_NAME]
    before = dict(bucket.objects)
    assert Catalog(FaultStore(bucket)).find(3) == expected
    assert bucket.objects == before


def test_a_pinned_one_without_its_manifest_is_there_for_every_reader(bucket: Bucket) -> None:
    pin(roots_of(bucket), 5)
    expected = standing(bucket)
    del bucket.objects[checkpoint_prefix(5, 1) + MANIFEST_NAME]
    before = dict(bucket.objects)
    roots = roots_of(bucket)
    assert roots.newest() == expected[-1]
    assert roots.all() == expected
    assert roots.stands(expected[-1])
    assert overview(roots.catalogs[0]).checkpoints == tuple(expected)
    assert [one.step for one in roots.newest_first() if isinstance(one, Checkpoint)] == [5, 4, 3, 2, 1]
    assert bucket.objects == before


def test_where_only_a_pinned_one_is_left_without_its_manifest_nothing_is_lost() -> None:
    bucket = history_of(1.0)
    pin(roots_of(bucket), 1)
    Catalog(FaultStore(bucket)).claims.mark_committed(1)
    (expected,) = standing(bucket)
    del bucket.objects[expected.prefix + MANIFEST_NAME]
    assert roots_of(bucket).newest() == expected


def test_a_root_without_pins_is_asked_for_none(bucket: Bucket) -> None:
    del bucket.objects[checkpoint_prefix(5, 1) + MANIFEST_NAME]
    client = FaultStore(bucket)
    Roots([Catalog(client)]).all()
    assert [op for op in client.trace if "pins/" in op.key] == []


def test_a_pinned_one_without_its_manifest_is_put_back_before_it_is_let_go(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3)
    del bucket.objects[checkpoint_prefix(3, 1) + MANIFEST_NAME]
    unpin(roots_of(bucket), 3)
    assert committed(bucket) == [1, 2, 3, 4, 5]


def test_without_the_right_to_list_pins_nothing_is_removed(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["list"], key="pins/", error=denied, times=None)
    with pytest.raises(AccessDeniedError):
        pruner_of(Catalog(client), [KeepLast(1)]).prune_after(standing(bucket)[-1], Line())
    assert steps(bucket) == [1, 2, 3, 4, 5]


# -- at once ---------------------------------------------------------------------------------------------------


class Pinner:
    """Calls that go on by one request whenever they are let, in a thread of their own.

    Attributes:
        acknowledged: the steps of which it was told that they are pinned, and that it has not asked to unpin since.
    """

    def __init__(self, bucket: Bucket, calls: Sequence[tuple[str, int]]) -> None:
        self.acknowledged: set[int] = set()
        self._calls = calls
        self._client = FaultStore(bucket, hook=self._ask)
        self._turn = threading.Condition()
        self._permits, self._waiting, self._is_over = 0, 0, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _is_still(self) -> bool:
        # A catalog looks at several prefixes at once: then each of its threads may wait here.
        return self._is_over or (self._waiting > 0 and not self._permits)

    def _ask(self, _: Op) -> None:
        with self._turn:
            self._waiting += 1
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: self._permits, timeout=60)
            self._permits, self._waiting = self._permits - 1, self._waiting - 1
            self._turn.notify_all()

    def _run(self) -> None:
        try:
            for what, step in self._calls:
                self._call(what, step)
        except BaseException as exc:  # noqa: BLE001 (raised again by `end`)
            self._error = exc
        finally:
            with self._turn:
                self._is_over = True
                self._turn.notify_all()

    def _call(self, what: str, step: int) -> None:
        roots = Roots([Catalog(self._client)])
        if what == "unpin":
            # From when it is asked for, nobody can rely on the pin.
            self.acknowledged.discard(step)
        # Who is told that it came too late asks again.
        for _ in range(2 if what == "insist" else 1):
            with suppress(CheckpointNotFoundError):
                if what == "unpin":
                    unpin(roots, step)
                else:
                    pin(roots, step)
                    self.acknowledged.add(step)
                return

    def go_on(self) -> None:
        """Make the next request, up to before the one that follows."""
        with self._turn:
            assert self._turn.wait_for(self._is_still, timeout=60)
            if not self._is_over:
                self._permits = 1
                self._turn.notify_all()
                assert self._turn.wait_for(self._is_still, timeout=60)

    def end(self) -> None:
        while not self._is_over:
            self.go_on()
        self._thread.join()
        if self._error is not None:
            raise self._error


rules = st.one_of(
    st.integers(1, 3).map(KeepLast),
    st.integers(1, 2).map(lambda n: KeepBest("loss", n)),
    st.integers(2, 4).map(lambda n: KeepEvery(steps=n)),
)
crashes = st.sampled_from([FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER])
# What is asked, of which of the steps that go (0: of any), between which requests of the pass it begins, and how many
# requests of the pass are between two of its own.
askers = st.tuples(
    st.sampled_from(["pin", "pin", "insist", "unpin"]),
    st.integers(0, 6),
    st.integers(0, 30),
    st.lists(st.integers(0, 3), max_size=5),
)


@settings(max_examples=examples(1200, short=120))
@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=7),
    change_at=st.integers(1, 8),
    chosen=st.lists(rules, min_size=1, max_size=2),
    before=st.sets(st.integers(1, 7), max_size=1),
    asked=st.lists(askers, min_size=1, max_size=2),
    crash=st.one_of(st.none(), st.tuples(st.integers(0, 30), crashes)),
)
def test_at_every_crash_point_the_newest_the_best_and_the_pinned_ones_restore(
    losses: list[float],
    change_at: int,
    chosen: list[RetentionRule],
    before: set[int],
    asked: list[tuple[str, int, int, list[int]]],
    crash: tuple[int, FaultKind] | None,
) -> None:
    bucket = history_of(*losses, epoch_of=lambda step: 1 + (step >= change_at))
    history = standing(bucket)
    pinned_before = {step for step in before if step <= len(losses)}
    for step in pinned_before:
        pin(roots_of(bucket), step)
    going = [one.step for one in removable(history, chosen, protected=set()) if one.step not in pinned_before]
    if not going:
        return
    kept = {one.order for one in history if one.step not in going}
    held = pruned_while_asked(bucket, chosen, going, asked, crash) | pinned_before
    held -= {going[which % len(going)] for what, which, _, _ in asked if what == "unpin"}

    def check() -> None:
        there = {one.order: one for one in standing(bucket)}
        assert [one for one in there.values() if not is_whole(bucket, one)] == []
        assert kept <= there.keys()
        for step in held:
            found = Catalog(FaultStore(bucket)).find(step)
            assert (found.step, found.digest) == (step, history[step - 1].digest)
            assert is_whole(bucket, found)

    check()
    # The next job of that root: its pass, and in a newer epoch its sweep.
    prune(FaultStore(bucket), [KeepLast(1)])
    kept = {history[-1].order}
    check()
    Catalog(FaultStore(bucket)).claims.claim()
    bucket.advance(1e6)
    sweep(Catalog(FaultStore(bucket)), older_than_s=60, dry_run=False)
    check()
    assert held <= set(committed(bucket)), "what was cut off is put back"


def pruned_while_asked(
    bucket: Bucket,
    chosen: Sequence[RetentionRule],
    going: Sequence[int],
    asked: Sequence[tuple[str, int, int, list[int]]],
    crash: tuple[int, FaultKind] | None,
) -> set[int]:
    """Prune while others ask for pins; return the steps that are pinned, as far as those were told."""
    first, end = asking(bucket, chosen)

    def place_of(drawn: int) -> int:
        return first + drawn % (end - first + 1)

    pinners, due = [], dict[int, list[Pinner]]()
    for what, which, begin, gaps in asked:
        pinner = Pinner(bucket, [(what, going[which % len(going)])])
        # It knows of the checkpoint when the pass begins.
        pinner.go_on()
        pinner.go_on()
        pinners.append(pinner)
        for place in accumulate([place_of(begin), *gaps]):
            due.setdefault(place, []).append(pinner)

    def hook(op: Op) -> None:
        for pinner in due.get(op.number, ()):
            pinner.go_on()

    client = FaultStore(bucket, hook=hook)
    if crash is not None:
        client.crash_at(place_of(crash[0]), crash[1])
    with suppress(Crash):
        prune(client, chosen)
    for pinner in pinners:
        pinner.end()
    return set.union(*(pinner.acknowledged for pinner in pinners))


def asking(bucket: Bucket, chosen: Sequence[RetentionRule]) -> tuple[int, int]:
    """Return the number of the request by which a pass asks for pins, and of its last one."""
    client = FaultStore(bucket.copy())
    prune(client, chosen)
    return next(op.number for op in client.trace if op.key == "pins/"), client.op_count


def test_a_pin_that_is_set_within_a_pass_holds_wherever_that_is_cut_off(bucket: Bucket) -> None:
    first, end = asking(bucket, [KeepLast(2)])
    kinds = cycle([FaultKind.CRASH_BEFORE, FaultKind.CRASH_AFTER])
    held_count = 0
    for moment, number in product(range(first, end + 1), range(first, end + 1)):
        own = bucket.copy()
        pinner = Pinner(own, [("pin", 3)])
        client = FaultStore(own, hook=lambda op, at=moment, who=pinner: who.end() if op.number == at else None)
        client.crash_at(number, next(kinds))
        with suppress(Crash):
            prune(client, [KeepLast(2)])
        pinner.end()
        if pinner.acknowledged:
            held_count += 1
            assert is_whole(own, Catalog(FaultStore(own)).find(3))
            # What the next job does first is to sweep.
            Catalog(FaultStore(own)).claims.claim()
            own.advance(1e6)
            sweep(Catalog(FaultStore(own)), older_than_s=60, dry_run=False)
            assert 3 in committed(own)
    assert held_count > (end - first) * 2


def test_a_pin_that_came_too_late_and_is_asked_for_again_holds_or_is_refused(bucket: Bucket) -> None:
    first, end = asking(bucket, [KeepLast(2)])
    told = list[bool]()
    for moment in range(first, end + 1):
        own = bucket.copy()
        pinner = Pinner(own, [("insist", 3)])
        for _ in range(2):
            pinner.go_on()  # it has read the manifest
        prune(
            FaultStore(own, hook=lambda op, at=moment, who=pinner: who.end() if op.number == at else None),
            [KeepLast(2)],
        )
        assert [one for one in standing(own) if not is_whole(own, one)] == []
        assert (3 in steps(own)) >= (3 in pinner.acknowledged), f"request {moment}"
        told.append(3 in pinner.acknowledged)
    assert True in told
    assert False in told


def test_who_removes_shards_has_made_their_manifest_void_and_asked_for_pins_after_that(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    prune(client, [KeepLast(4)])
    prefix = checkpoint_prefix(1, 1)
    asked = [(op.verb, op.key) for op in client.trace if op.key == "pins/" or op.key.startswith(prefix)]
    after = asked[asked.index(("create", prefix + MANIFEST_NAME)) :]
    assert [verb for verb, _ in after] == ["create", "list", "list", "delete", "delete"]
    assert after[1] == ("list", "pins/")
    assert [key for key in bucket.objects if key.startswith(prefix)] == []


def test_one_that_is_put_back_while_it_is_removed_is_never_committed_without_its_shards(bucket: Bucket) -> None:
    pin(roots_of(bucket), 3)
    prefix = checkpoint_prefix(3, 1)
    del bucket.objects[prefix + MANIFEST_NAME]

    def hook(op: Op) -> None:
        if op.verb == "create":
            # All of a removal passes by while this create is on its way.
            for key in [key for key in bucket.objects if key.startswith(prefix)]:
                del bucket.objects[key]

    assert Catalog(FaultStore(bucket, hook=hook)).put_back(prefix) is None
    assert prefix + MANIFEST_NAME not in bucket.objects


def test_where_there_is_no_room_for_a_void_manifest_shards_go_all_the_same(bucket: Bucket) -> None:
    client = FaultStore(bucket)
    client.inject(verbs=["create"], key=checkpoint_prefix(1, 1), error=full, times=None)
    prune(client, [KeepLast(4)])
    assert [key for key in bucket.objects if key.startswith(checkpoint_prefix(1, 1))] == []


def test_a_pin_that_came_too_late_is_not_taken_away_from_who_was_told_that_it_holds(bucket: Bucket) -> None:
    first, second = Pinner(bucket, [("pin", 3)]), Pinner(bucket, [("pin", 3)])
    for _ in range(3):
        first.go_on()  # it has made the pin, and has not looked again
    second.end()

    def hook(op: Op) -> None:
        # The manifest is gone, and nothing is put back yet.
        if op.verb == "list" and op.key == "pins/" and checkpoint_prefix(3, 1) + MANIFEST_NAME not in bucket.objects:
            first.end()

    del bucket.objects[checkpoint_prefix(3, 1) + MANIFEST_NAME]
    prune(FaultStore(bucket, hook=hook), [KeepLast(1)])
    assert (first.acknowledged, second.acknowledged) == (set(), {3})
    assert steps(bucket) == [3, 5]


def test_while_one_manager_pins_and_another_prunes_each_pin_is_refused_or_holds() -> None:
    for pace in range(12):
        bucket = history_of(3.0, 1.0, 4.0, 5.0, 2.0)
        pinner = Pinner(bucket, [("pin", 3)])
        asked = count()

        def hook(_: Op, pace: int = pace, pinner: Pinner = pinner, asked: Iterator[int] = asked) -> None:
            if next(asked) >= pace:
                pinner.go_on()

        prune(FaultStore(bucket, hook=hook), [KeepLast(1)])
        pinner.end()
        assert (3 in steps(bucket)) >= (3 in pinner.acknowledged)


def test_a_pin_is_described_as_it_was_made(bucket: Bucket) -> None:
    made = pin(roots_of(bucket), 3, "n")
    assert isinstance(made, Pin)
    assert made.created_at.utcoffset() is not None
    assert made.order == (1, 3)
