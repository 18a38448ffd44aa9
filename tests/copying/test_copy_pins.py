"""What is pinned in the source is pinned in the copy of its root, beside its checkpoint; and a pin is a checkpoint."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import cloudckpt
from cloudckpt import CheckpointExistsError, CheckpointManager, Copied, IntegrityError, OptionsError
from cloudckpt.copying.lead import Selection, copy_places
from cloudckpt.format import MANIFEST_NAME, digest_of, pin_key
from cloudckpt.root import Catalog, Roots, pin
from cloudckpt.store.probe import _proven
from tests.copying.roots import (
    OPTIONS,
    bucket_of,
    files_of,
    pinned_bucket,
    place_of,
    prefix_of,
    save_steps,
    shards_of,
)
from tests.store.fault_store import Bucket, FaultStore, Op

ALL = Selection(is_all=True, takes_pins=True)
TARGET = "memory://other/root"


class Silent:
    """A gauge that nobody looks at."""

    def begin(self, total_bytes: int) -> None: ...
    def move(self, size_bytes: int) -> None: ...


def run(source: Bucket, target: Bucket | FaultStore, selection: Selection = ALL, prefix: str = "") -> list[Copied]:
    _proven.clear()
    client = target if isinstance(target, FaultStore) else FaultStore(target, url=TARGET)
    return list(copy_places([place_of(FaultStore(source), prefix)], place_of(client), selection, OPTIONS, Silent()))


def key_of(step: int) -> str:
    return pin_key(f"{prefix_of(step)}/")


def pins(bucket: Bucket) -> dict[str, bytes]:
    return {key: bucket.raw_get(key) for key in bucket.raw_list() if key.startswith("pins/")}


def without_manifest(bucket: Bucket, step: int) -> Bucket:
    """Be a removal of a pinned checkpoint that was cut off before the manifest was put back."""
    del bucket.objects[f"{prefix_of(step)}/{MANIFEST_NAME}"]
    return bucket


def test_a_copied_pin_is_the_same_byte_for_byte(made: Path) -> None:
    source, target = pinned_bucket(made, 2), Bucket()
    assert [(one.step, one.is_pinned) for one in run(source, target)] == [(1, False), (2, True), (3, False)]
    assert pins(target) == pins(source) != {}


def test_a_repeated_copy_pins_what_is_new_and_leaves_the_pins_that_are_there(made: Path) -> None:
    target = Bucket()
    run(bucket_of(made), target)
    run(pinned_bucket(made, 1), target)
    own, source = pins(target), pinned_bucket(made, 1, 2)
    assert [one.is_pinned for one in run(source, target)] == [False, True, False]
    assert pins(target) == {**own, key_of(2): source.raw_get(key_of(2))}
    assert own[key_of(1)] != source.raw_get(key_of(1))


def test_steps_are_copied_without_pins_unless_these_are_asked_for(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    cloudckpt.copy(made, root, every=True)
    with CheckpointManager(root, progress="off") as manager:
        manager.pin(2, "good")
    for name, is_pinned, more in (("a", False, {}), ("b", True, {"pins": True}), ("c", False, {"pins": False})):
        (copied,) = cloudckpt.copy(root, tmp_path / name, steps=[2], **more)
        assert copied.is_pinned == is_pinned == (tmp_path / name / "pins").exists()
    cloudckpt.copy(root, tmp_path / "all", every=True, pins=False)
    assert not (tmp_path / "all" / "pins").exists()
    with pytest.raises(OptionsError, match="a URL of its own has no pin"):
        cloudckpt.copy(root, tmp_path / "own", steps=[2], pins=True, own_url=True)


def test_of_what_is_not_copied_no_pin_is(made: Path) -> None:
    source, target = pinned_bucket(made, 1, 2), Bucket()
    key = next(key for key in source.raw_list() if key.startswith(prefix_of(1)) and key.endswith("0001.safetensors"))
    source.raw_put(key, bytes(len(source.raw_get(key))))
    with pytest.raises(IntegrityError, match="1 are not"):
        run(source, target)
    assert list(pins(target)) == [key_of(2)]


def test_a_pin_that_nobody_can_read_is_copied_as_it_is(made: Path) -> None:
    source, target = bucket_of(made), Bucket()
    source.raw_put(key_of(2), b"{}")
    run(source, target)
    assert pins(target) == {key_of(2): b"{}"}


@pytest.mark.parametrize("how", ["all", "step", "url"])
def test_what_stands_by_its_pin_alone_is_copied_from_it(made: Path, how: str) -> None:
    whole, target = pinned_bucket(made, 2), Bucket()
    manifest = whole.raw_get(f"{prefix_of(2)}/{MANIFEST_NAME}")
    source = without_manifest(whole, 2)
    selection = {"all": ALL, "step": Selection(steps=(2,)), "url": Selection()}[how]
    found = run(source, target, selection, f"{prefix_of(2)}/" if how == "url" else "")
    assert [one.step for one in found] == ([1, 2, 3] if how == "all" else [2])
    assert target.raw_get(f"{prefix_of(2)}/{MANIFEST_NAME}") == manifest
    assert list(pins(target)) == ([key_of(2)] if how == "all" else [])


def written_otherwise(data: bytes) -> bytes:
    """Return a manifest as another library would write it: no line breaks, and sealed by its own bytes."""
    seal = b'"sha256": "%s"'
    bare = re.sub(rb'"sha256": "[0-9a-f]{64}"\n}', b'"sha256": ""\n}', data).replace(b"\n ", b" ")
    return bare.replace(seal % b"", seal % digest_of(bare).encode())


def test_what_stands_by_its_pin_alone_is_copied_and_pinned_as_another_library_wrote_it(made: Path) -> None:
    source, target = bucket_of(made), Bucket()
    key = f"{prefix_of(2)}/{MANIFEST_NAME}"
    source.raw_put(key, written_otherwise(source.raw_get(key)))
    root = Roots([Catalog(FaultStore(source))])
    made_pin, manifest = pin(root, 2), source.raw_get(key)
    run(without_manifest(source, 2), target)
    assert target.raw_get(key) == manifest
    assert pin(Roots([Catalog(FaultStore(source))]), 2) == made_pin
    assert source.raw_get(key) == manifest


def test_one_that_stands_by_its_pin_alone_and_is_damaged_is_told_as_such(made: Path) -> None:
    source = without_manifest(pinned_bucket(made, 3), 3)
    key = next(key for key in source.raw_list() if key.endswith("0001.safetensors") and key.startswith(prefix_of(3)))
    source.raw_put(key, bytes(len(source.raw_get(key))))
    with pytest.raises(IntegrityError, match="differs from its digest"):
        run(source, Bucket(), Selection(steps=(3,)))


def test_a_pin_of_what_is_gone_keeps_nothing_from_its_copy(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = without_manifest(pinned_bucket(made, 1), 1), Bucket()
    for key in [key for key in source.raw_list() if key.startswith(prefix_of(1))]:
        del source.objects[key]
    with caplog.at_level(logging.WARNING):
        assert [one.step for one in run(source, target)] == [2, 3]
    assert "is pinned by" in caplog.text
    assert not pins(target)


def test_what_is_pinned_in_the_target_gets_its_manifest_back_from_its_copy(made: Path) -> None:
    target = Bucket()
    run(pinned_bucket(made, 2), target)
    without_manifest(target, 2)
    assert [one.is_new for one in run(bucket_of(made), target)] == [False, True, False]
    assert [one.step for one in Catalog(FaultStore(target)).survey().checkpoints] == [1, 2, 3]


def test_another_one_that_stands_in_the_target_by_its_pin_alone_keeps_its_place(made: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "other", [3])
    target = without_manifest(pinned_bucket(tmp_path / "other", 3), 3)
    for key in [key for key in target.raw_list() if key.startswith("epochs/")]:
        del target.objects[key]
    before = dict(target.objects)
    with pytest.raises(CheckpointExistsError, match="another checkpoint is committed"):
        run(bucket_of(made), target, Selection(steps=(3,)))
    assert target.objects.keys() == before.keys()


def test_what_goes_from_the_target_before_its_pin_is_there_is_put_back(made: Path) -> None:
    target = Bucket()

    def remove(op: Op) -> None:
        if op.verb == "create" and op.key == key_of(2):
            without_manifest(target, 2)

    run(pinned_bucket(made, 2), FaultStore(target, url=TARGET, hook=remove))
    assert [one.step for one in Catalog(FaultStore(target)).survey().checkpoints] == [1, 2, 3]


def test_a_copy_of_a_root_on_a_disk_has_its_pins_too(root: Path, tmp_path: Path) -> None:
    with CheckpointManager(root, progress="off") as manager:
        manager.pin(1, "good")
    cloudckpt.copy(root, tmp_path / "to", every=True)
    assert files_of(tmp_path / "to") == files_of(root)
    assert shards_of(tmp_path / "to")
    with CheckpointManager(tmp_path / "to", progress="off") as manager:
        assert [(one.step, one.note) for one in manager.pins()] == [(1, "good")]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_stands_by_its_pin_alone_is_looked_at(root: Path, is_damaged: bool) -> None:
    with CheckpointManager(root, progress="off") as manager:
        manager.pin(2, "good")
    (root / prefix_of(2) / MANIFEST_NAME).unlink()
    if is_damaged:
        path = shards_of(root / prefix_of(2))[1]
        path.write_bytes(bytes(path.stat().st_size))
    state = "damaged" if is_damaged else "whole"
    assert cloudckpt.verify(root / prefix_of(2), deep=True).state == state
    states = [(one.step, one.state) for one in cloudckpt.verify_all(root, deep=True)]
    assert states == [(1, "whole"), (2, state), (3, "whole")]
