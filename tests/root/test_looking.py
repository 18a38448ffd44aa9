"""What a reader finds of a root where a job is at work: never less than what was committed before it looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from cloudckpt import CheckpointManager, KeepBest, KeepEvery, KeepLast, OptionsError, RetryPolicy, StorageError
from cloudckpt.errors import MissingShardError
from cloudckpt.format import MANIFEST_NAME, checkpoint_prefix
from cloudckpt.store import RetryingStore
from tests.store.fault_store import Bucket, FaultStore, Op

Open = Callable[..., CheckpointManager]


def state_of(step: int) -> dict[str, object]:
    return {"w": torch.full((100,), float(step))}


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_of(step), metrics={"loss": 1 / (step + 1)})


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def opened(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Open managers, each with a client of its own, and close them."""
    with ExitStack() as stack:

        def opening(client: FaultStore | None = None, **arguments: object) -> CheckpointManager:
            store = RetryingStore(client or FaultStore(bucket), RetryPolicy(max_attempts=3), sleep=lambda _: None)
            monkeypatch.setattr("cloudckpt.manager.manager.open_store", lambda *_, **__: store)
            arguments = {"save_rng": False, "progress": "off", "sweep_after_s": None, **arguments}
            return stack.enter_context(CheckpointManager("memory://bucket/root", **arguments))  # type: ignore[arg-type]

        yield opening


class Reader:
    """A reader of a root, whose requests a job at work comes between."""

    def __init__(self, opened: Open, bucket: Bucket, **arguments: object) -> None:
        self.client = FaultStore(bucket)
        self.manager = opened(self.client, **arguments)

    def between(self, work: Callable[[], None], *, verb: str, key: str = "", times: int = 1) -> None:
        """Do `work` before the next requests of that verb, as often as `times`."""
        left = [times]

        def hook(op: Op) -> None:
            if left[0] and op.verb == verb and key in op.key:
                left[0] -= 1
                work()

        self.client.hook = hook


WAYS: dict[str, Callable[[CheckpointManager], int | None]] = {
    "latest": CheckpointManager.latest_step,
    "checkpoints": lambda manager: max(manager.all_steps(), default=None),
    "restore": lambda manager: getattr(manager.restore(state_of(-1)), "step", None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grace_s", [0, 60], ids=["shards are gone", "shards are left"])
@pytest.mark.parametrize("kept", [[KeepLast(1)], [KeepLast(1), KeepEvery(steps=100)]], ids=["none", "an older one"])
def test_what_was_pruned_between_listing_and_reading_leads_to_the_newer_one(
    opened: Open, bucket: Bucket, way: str, grace_s: float, kept: list[object]
) -> None:
    writer = opened(retention=kept, prune_grace_s=grace_s)
    save(writer, 0, 1)
    reader = Reader(opened, bucket)
    reader.between(lambda: save(writer, 2, 3), verb="read", key=checkpoint_prefix(1, 1) + MANIFEST_NAME)
    assert WAYS[way](reader.manager) == 3


@pytest.mark.parametrize("way", WAYS)
def test_what_was_not_committed_when_it_was_looked_at_and_is_by_now_is_found(
    opened: Open, bucket: Bucket, way: str
) -> None:
    save(opened(), 1, 2)
    reader = Reader(opened, bucket)
    old, new = (checkpoint_prefix(step, 1) + MANIFEST_NAME for step in (1, 2))
    manifest = bucket.objects.pop(new)

    def go_on() -> None:
        bucket.objects[new] = manifest
        bucket.objects.pop(old)

    reader.between(go_on, verb="read", key=old)
    assert WAYS[way](reader.manager) == 2


@pytest.mark.parametrize("kept", [[KeepLast(1)], [KeepLast(1), KeepEvery(steps=100)]], ids=["none", "an older one"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_restore_whose_checkpoint_is_pruned_while_it_reads_goes_on_with_the_newer_one(
    opened: Open, bucket: Bucket, kept: list[object], times: int
) -> None:
    writer = opened(retention=kept, prune_grace_s=0)
    save(writer, 0, 1)
    reader = Reader(opened, bucket)
    steps = iter(range(2, 100))

    def go_on() -> None:
        save(writer, next(steps), next(steps))
        writer._saves.homes[0].pruner.settle()

    reader.between(go_on, verb="read", key="index.bin", times=times)
    state = state_of(-1)
    restored = reader.manager.restore(state)
    assert restored is not None
    assert restored.step == 1 + 2 * times
    assert torch.equal(state["w"], state_of(restored.step)["w"])  # type: ignore[arg-type]


def test_the_best_that_is_pruned_while_it_is_read_gives_way_to_the_best_of_now(opened: Open, bucket: Bucket) -> None:
    rules = [KeepBest("loss")]
    writer = opened(retention=rules, prune_grace_s=0)
    save(writer, 1, 2)
    reader = Reader(opened, bucket, retention=rules)

    def go_on() -> None:
        save(writer, 3, 4)
        writer._saves.homes[0].pruner.settle()

    reader.between(go_on, verb="read", key="index.bin")
    restored = reader.manager.restore(state_of(-1), "best")
    assert restored is not None
    assert restored.step == 4


def test_a_step_that_is_pruned_while_it_is_read_is_said_to_be(opened: Open, bucket: Bucket) -> None:
    writer = opened(retention=[KeepLast(1)], prune_grace_s=0)
    save(writer, 1)
    reader = Reader(opened, bucket)

    def go_on() -> None:
        save(writer, 2)
        writer._saves.homes[0].pruner.settle()

    reader.between(go_on, verb="read", key="index.bin")
    with pytest.raises(MissingShardError, match="was pruned while it was read"):
        reader.manager.restore(state_of(-1), 1)


def test_a_root_whose_checkpoints_go_as_fast_as_they_are_read_is_no_fresh_start(opened: Open, bucket: Bucket) -> None:
    writer = opened(retention=[KeepLast(1)], prune_grace_s=60)
    save(writer, 1)
    reader = Reader(opened, bucket)
    steps, verbs = iter(range(2, 1_000)), [""]

    def hook(op: Op) -> None:
        if (verbs[-1], op.verb) == ("list", "read"):
            save(writer, next(steps))
        verbs.append(op.verb)

    reader.client.hook = hook
    with pytest.raises(StorageError, match=r"a job removes the checkpoints at memory:.* before they are read"):
        reader.manager.latest()


def test_an_attempt_that_never_commits_costs_one_more_look_and_one_more_listing(opened: Open, bucket: Bucket) -> None:
    save(opened(), 1)
    bucket.raw_put(checkpoint_prefix(2, 1) + "0123456789abcdef/index.bin", b"never committed")
    reader = Reader(opened, bucket)
    assert reader.manager.latest_step() == 1
    manifests = [checkpoint_prefix(step, 1) + MANIFEST_NAME for step in (2, 1, 2)]
    assert [op.key for op in reader.client.trace] == ["", *manifests, ""]


# -- the best ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("val_loss", "no checkpoint has 'val_loss'; they have 'loss'"),
        ("loss", "'loss' is nan wherever a checkpoint has it"),
    ],
)
def test_a_best_that_none_is_where_checkpoints_are_is_no_fresh_start(opened: Open, metric: str, message: str) -> None:
    manager = opened(retention=[KeepBest(metric)])
    assert manager.restore(state_of(0), "best") is None
    manager.save(1, state_of(1), metrics={"loss": float("nan")})
    with pytest.raises(OptionsError, match=message):
        manager.restore(state_of(0), "best")


def test_a_checkpoint_of_another_root_is_named_as_one(opened: Open) -> None:
    other = opened(FaultStore(Bucket(), url="memory://bucket/other"))
    save(other, 1)
    manager = opened()
    save(manager, 1)
    with pytest.raises(OptionsError, match=r"memory://bucket/other/step-0000000001-e0001 is no checkpoint of memory:"):
        manager.restore(state_of(0), other.latest())  # type: ignore[arg-type]
