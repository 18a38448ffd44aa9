"""What goes is what was meant, whatever a listing says; and no manifest goes with other objects."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, KeepLast, Options, OptionsError, RetryPolicy, StorageError
from cloudckpt.format import MANIFEST_NAME
from cloudckpt.root import Catalog, Roots
from cloudckpt.root.removal import delete_below
from cloudckpt.store import Listing, RetryingStore
from cloudckpt.store.probe import _proven
from tests.store.fault_store import Bucket, FaultStore

URL = "memory://bucket/root"
KEPT = "step-0000000001-e0001/"
ORPHAN = "step-0000000002-e0001/0123456789abcdef/r00000-0000.safetensors"


class Liar(FaultStore):
    """Answers every listing below something with all that the bucket holds, once it lies."""

    is_lying = False

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        lies = self.is_lying and not delimiter
        return super().list("" if lies else prefix, delimiter=delimiter, mark=mark)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Liar:
    liar = Liar(Bucket())

    def open_liar(*_: object, **__: object) -> RetryingStore:
        return RetryingStore(liar, RetryPolicy(max_attempts=2), sleep=lambda _: None)

    monkeypatch.setattr("cloudckpt.manager.manager.open_store", open_liar)
    monkeypatch.setattr("cloudckpt.checkpoint.open_store", open_liar)
    _proven.clear()
    return liar


def state_of(step: int) -> dict[str, object]:
    return {"w": torch.full((100,), float(step))}


def manager_of(**more: object) -> CheckpointManager:
    return CheckpointManager(URL, progress="off", save_rng=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stray",
    [
        *("manifest.json", KEPT + "manifest.json", "other/x", "step-0000000002-e00010/x", "a"),
        *("step-0000000002-e0001/manifest.json", "step-0000000002-e0001"),
        "step-0000000002-e0001/ema/manifest.json",
        "step-0000000002-e0001/ema/step-0000000002-e0001/manifest.json",
        "step-0000000002-e0001/ema/0123456789abcdef/manifest.json",
    ],
)
def test_a_key_that_was_not_meant_keeps_all_from_going(stray: str) -> None:
    store = FaultStore()
    for key in (stray, ORPHAN):
        store.bucket.raw_put(key, b"x")
    with pytest.raises(StorageError, match="nothing was"):
        delete_below(store, [ORPHAN, stray], below=["step-0000000002-e0001/"])
    assert set(store.bucket.objects) == {stray, ORPHAN}


def test_what_was_meant_goes_and_a_copy_of_a_manifest_with_it() -> None:
    store = FaultStore()
    aside = "0123456789abcdef/manifest.json"
    for key in (aside, "0123456789abcdef/index.bin", "fedcba9876543210/x"):
        store.bucket.raw_put(key, b"x")
    assert delete_below(store, [aside, "0123456789abcdef/index.bin"], below=["0123456789abcdef/"])
    assert list(store.bucket.objects) == ["fedcba9876543210/x"]


@pytest.mark.parametrize("below", ["", "step-0000000002-e0001"])
def test_everything_is_never_meant(below: str) -> None:
    with pytest.raises(ValueError, match="no prefixes"):
        delete_below(FaultStore(), [ORPHAN], below=[below])


def sweeping(liar: Liar) -> None:
    with manager_of() as manager:
        manager.save(3, state_of(3))
        liar.is_lying = True
        with suppress(StorageError):
            manager.sweep(older_than_s=0, dry_run=False)


def pruning(liar: Liar) -> None:
    with manager_of(retention=KeepLast(2), prune_grace_s=0) as manager:
        liar.is_lying = True
        for step in (3, 4, 5):
            manager.save(step, state_of(step))


def discarding(liar: Liar) -> None:
    liar.is_lying = True
    with manager_of(options=Options(retry=RetryPolicy(max_attempts=1))) as manager:
        liar.inject(verbs=["put"], key="index.bin")
        with suppress(StorageError):
            manager.save(3, state_of(3))


@pytest.mark.parametrize("work", [sweeping, pruning, discarding], ids=lambda work: work.__name__)
def test_a_listing_that_lies_costs_no_other_checkpoint(liar: Liar, work: Callable[[Liar], None]) -> None:
    with manager_of() as manager:
        manager.save(1, state_of(1))
    kept = {key for key in liar.bucket.objects if key.startswith(KEPT)}
    liar.bucket.raw_put(ORPHAN, b"a killed job's")
    for key in ("other/run", "run"):
        liar.bucket.raw_put(key, b"x")

    work(liar)

    liar.is_lying = False
    assert kept | {"other/run", "run"} <= set(liar.bucket.objects)
    assert 1 in [one.step for one in Roots([Catalog(liar)]).all()]


def test_a_replacing_save_to_whom_a_listing_lies_removes_attempts_alone(liar: Liar) -> None:
    cloudckpt.save(state_of(1), URL, progress="off")
    liar.bucket.raw_put("other/run", b"x")
    liar.is_lying = True
    cloudckpt.save(state_of(2), URL, progress="off", exists="replace")
    assert {"other/run", MANIFEST_NAME} <= set(liar.bucket.objects)
    assert torch.equal(cloudckpt.read(URL)["w"], torch.full((100,), 2.0))  # type: ignore[arg-type]


def test_nothing_is_saved_below_a_step_of_a_root(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    below = f"{URL}/{KEPT}ema"
    monkeypatch.setattr(Liar, "url", property(lambda _: below))
    with pytest.raises(OptionsError, match=r"is below .*step-0000000001-e0001, a step of a CheckpointManager"):
        cloudckpt.save(state_of(1), below, progress="off")
    with manager_of() as manager, pytest.raises(OptionsError, match="a step of a CheckpointManager"):
        manager.save(1, state_of(1))
    assert not liar.bucket.objects


@pytest.mark.parametrize("work", [CheckpointManager.sweep, CheckpointManager.delete], ids=["swept", "deleted"])
def test_a_checkpoint_that_stands_below_a_step_stays_when_that_goes(liar: Liar, work: Any) -> None:
    nested = {f"{KEPT}ema/manifest.json": b"x", f"{KEPT}ema/0123456789abcdef/index.bin": b"x"}
    for key, data in nested.items():
        liar.bucket.raw_put(key, data)
    with manager_of() as manager:
        manager.save(2, state_of(2))
        if work is CheckpointManager.sweep:
            work(manager, older_than_s=0, dry_run=False)
        else:
            liar.bucket.raw_put(KEPT + MANIFEST_NAME, b"damaged")
            work(manager, 1)
    assert nested.keys() <= set(liar.bucket.objects)
    assert KEPT + MANIFEST_NAME not in liar.bucket.objects
