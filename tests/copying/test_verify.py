"""A checkpoint is called whole if, and only if, every object of it is what was committed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from cloudckpt import CheckpointNotFoundError, StorageError, Verified
from cloudckpt.copying.places import runs_of
from cloudckpt.copying.verifying import _Look
from cloudckpt.format import MANIFEST_NAME, Manifest
from cloudckpt.options import KIB
from tests.copying.roots import OPTIONS, bucket_of, place_of, prefix_of, shards_of
from tests.store.fault_store import FaultStore, Op, denied, refused

BLOCK = 4 * KIB


class _Silent:
    def begin(self, total_bytes: int) -> None: ...
    def move(self, size_bytes: int) -> None: ...


def look_at(client: FaultStore, *, deep: bool = False) -> Verified:
    place = place_of(client, f"{prefix_of(3)}/")
    return _Look(place.catalog, OPTIONS, deep, _Silent()).at(place.newest())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard(checkpoint: Path) -> Path:
    return shards_of(checkpoint)[1]


def index(checkpoint: Path) -> Path:
    (found,) = checkpoint.rglob("index.bin")
    return found


@pytest.mark.parametrize("deep", [False, True])
def test_the_newest_of_a_root_and_a_step_are_whole(made: Path, deep: bool) -> None:
    for url in (made, made / prefix_of(3), f"{made / prefix_of(3)}/"):
        found = cloudckpt.verify(url, deep=deep)
        assert (found.state, found.step, found.epoch, found.damages, found.reason) == ("whole", 3, 1, (), "")
        assert found.is_deep is deep
        assert found.object_count == len(shards_of(made / prefix_of(3))) + 2


def test_a_shallow_look_is_one_listing_and_two_reads(made: Path) -> None:
    client = FaultStore(bucket_of(made))
    assert look_at(client).is_whole
    assert sorted(op.verb for op in client.trace) == ["list", "read", "read"]


def test_a_deep_look_reads_every_byte_once(made: Path) -> None:
    client = FaultStore(bucket_of(made))
    assert look_at(client, deep=True).is_whole
    spans = sum(-(-path.stat().st_size // OPTIONS.span_bytes) for path in shards_of(made / prefix_of(3)))
    assert sum(op.verb == "get" for op in client.trace) == spans


DAMAGES: dict[str, tuple[Callable[[Path], object], Callable[[Path], Path]]] = {
    "a shard is missing": (lambda there: shard(there).unlink(), shard),
    "a shard is short": (lambda there: shard(there).write_bytes(shard(there).read_bytes()[:-1]), shard),
    "a shard is long": (lambda there: shard(there).write_bytes(shard(there).read_bytes() + b"x"), shard),
    "a shard is empty": (lambda there: shard(there).write_bytes(b""), shard),
    "the index is missing": (lambda there: index(there).unlink(), index),
    "the index was changed": (lambda there: flip(index(there), 40), index),
    "the index is short": (lambda there: index(there).write_bytes(index(there).read_bytes()[:-1]), index),
    "the manifest was changed": (lambda there: flip(there / MANIFEST_NAME, 60), lambda there: there / MANIFEST_NAME),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_wrong_is_told_with_its_object(root: Path, what: str, deep: bool) -> None:
    damage, place = DAMAGES[what]
    checkpoint = root / prefix_of(3)
    key = place(checkpoint).relative_to(root).as_posix()
    damage(checkpoint)
    found = cloudckpt.verify(root, deep=deep)
    assert (found.state, [one.key for one in found.damages]) == ("damaged", [key])
    assert found.whole_instead == f"file://{root}/{prefix_of(2)}"
    assert found.step == 3
    if place is shard:
        assert found.damages[0].tensors
        assert found.damages[0].blocks is None


def test_blocks_that_differ_are_told_with_the_tensors_that_lie_there(root: Path) -> None:
    first, second, *_ = shards_of(root / prefix_of(3))
    for path, place in ((first, 0), (second, 2 * BLOCK + 7), (second, 3 * BLOCK)):
        flip(path, place)
    assert cloudckpt.verify(root).is_whole, "a listing tells nothing of bytes"
    found = cloudckpt.verify(root, deep=True)
    assert found.state == "damaged"
    blocks = [(one.key.rpartition("/")[2], one.blocks, one.byte_range) for one in found.damages]
    assert blocks == [
        (first.name, (0, 1), (0, BLOCK)),
        (second.name, (2, 4), (2 * BLOCK, min(4 * BLOCK, second.stat().st_size))),
    ]
    names = {name for one in found.damages for name in one.tensors}
    assert names
    assert names <= {"changing", "same", "half"}


def test_only_a_tensor_that_has_bytes_in_a_bad_block_is_named(root: Path) -> None:
    *_, last = shards_of(root / prefix_of(3))
    flip(last, last.stat().st_size - 1)
    (damage,) = cloudckpt.verify(root, deep=True).damages
    assert damage.tensors == ("half",)


def test_an_older_step_counts_as_whole_only_by_the_same_look(root: Path) -> None:
    flip(shard(root / prefix_of(3)), 9)
    flip(shard(root / prefix_of(2)), 9)
    assert cloudckpt.verify(root, deep=True).whole_instead == f"file://{root}/{prefix_of(1)}"
    shard(root / prefix_of(1)).unlink()
    assert cloudckpt.verify(root, deep=True).whole_instead == ""


def test_all_of_a_root_are_told_of_the_oldest_first(root: Path) -> None:
    shard(root / prefix_of(2)).unlink()
    flip(root / prefix_of(3) / MANIFEST_NAME, 60)
    told: list[Verified] = []
    found = cloudckpt.verify_all(root, on_verified=told.append)
    assert [(one.step, one.state) for one in found] == [(1, "whole"), (2, "damaged"), (3, "damaged")]
    assert [one.whole_instead for one in found] == ["", found[0].url, found[0].url]
    assert told == list(found)


def test_what_a_newer_version_wrote_is_unreadable_and_not_damaged(root: Path) -> None:
    path = root / prefix_of(3) / MANIFEST_NAME
    newer = Manifest.decode(path.read_bytes(), key="x")
    data = newer.encode().replace(b'"format_version": 1', b'"format_version": 3')
    path.write_bytes(_sealed(data))
    (*_, found) = cloudckpt.verify_all(root)
    assert (found.state, found.damages) == ("unreadable", ())
    assert found.reason


def _sealed(data: bytes) -> bytes:
    import hashlib
    import re

    bare = re.sub(rb'"sha256": "[0-9a-f]{64}"\n}\n\Z', b'"sha256": ""\n}\n', data)
    seal = hashlib.sha256(bare).hexdigest().encode()
    return bare.replace(b'"sha256": ""\n}\n', b'"sha256": "' + seal + b'"\n}\n')


def test_a_url_of_its_own_is_looked_at(tmp_path: Path) -> None:
    cloudckpt.save({"w": [1, 2]}, tmp_path / "one", progress="off")
    found = cloudckpt.verify(tmp_path / "one", deep=True)
    assert (found.state, found.step, found.epoch) == ("whole", -1, 0)
    assert [one.state for one in cloudckpt.verify_all(tmp_path / "one")] == ["whole"]
    index(tmp_path / "one").unlink()
    found = cloudckpt.verify(tmp_path / "one")
    assert (found.state, found.whole_instead) == ("damaged", "")


def test_where_nothing_is_committed_is_an_error(tmp_path: Path, made: Path) -> None:
    for url in (tmp_path, tmp_path / "none", made / prefix_of(9)):
        with pytest.raises(CheckpointNotFoundError):
            cloudckpt.verify(url)
        with pytest.raises(CheckpointNotFoundError):
            cloudckpt.verify_all(url)


def test_without_the_right_to_list_each_shard_is_asked_for(made: Path) -> None:
    bucket = bucket_of(made)
    client = FaultStore(bucket)
    client.inject(error=denied, verbs=("list",), times=None)
    assert look_at(client).is_whole
    gone = next(key for key in bucket.raw_list() if key.startswith(prefix_of(3)) and key.endswith("0001.safetensors"))
    del bucket.objects[gone]
    found = look_at(client)
    assert [(one.key, one.problem) for one in found.damages] == [(gone, "it is missing")]


@pytest.mark.parametrize("verb", ["get", "head"])
def test_an_object_that_the_store_refuses_makes_a_checkpoint_unreadable(made: Path, verb: str) -> None:
    client = FaultStore(bucket_of(made))
    client.inject(error=refused, verbs=(verb,), times=None)
    if verb == "head":
        client.inject(error=denied, verbs=("list",), times=None)
    found = look_at(client, deep=True)
    assert (found.state, found.damages) == ("unreadable", ())


def test_a_store_that_cannot_be_reached_is_an_error(made: Path) -> None:
    client = FaultStore(bucket_of(made))
    client.inject(verbs=("get",), times=None)
    with pytest.raises(StorageError, match="injected"):
        look_at(client, deep=True)


def test_one_that_is_removed_meanwhile_is_not_called_damaged(made: Path) -> None:
    bucket = bucket_of(made)

    def remove(op: Op) -> None:
        if op.verb == "list":
            for key in [key for key in bucket.raw_list() if key.startswith(prefix_of(3))]:
                del bucket.objects[key]

    with pytest.raises(CheckpointNotFoundError, match="was removed while it was looked at"):
        look_at(FaultStore(bucket, hook=remove))


def test_what_is_found_can_be_kept_as_json(root: Path) -> None:
    flip(shard(root / prefix_of(3)), 9)
    found = dataclasses.asdict(cloudckpt.verify(root, deep=True))
    assert found["damages"][0]["blocks"] == (0, 1)


@pytest.mark.parametrize(
    ("numbers", "runs"),
    [([], []), ([4], [(4, 5)]), ([0, 1, 2, 5, 7, 8], [(0, 3), (5, 6), (7, 9)])],
)
def test_numbers_that_follow_each_other_are_one_run(numbers: list[int], runs: list[tuple[int, int]]) -> None:
    assert list(runs_of(numbers)) == runs
