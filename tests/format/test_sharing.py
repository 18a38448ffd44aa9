"""Manifest and index of version 2: whose objects the shards are, strictly decoded (FORMAT, "Shared shards")."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from cloudckpt.errors import ManifestError, OptionsError
from cloudckpt.format import Holder, Index, IndexRef, Manifest, Origins, content_kind, content_of, has_blocks, hasher_of
from cloudckpt.format.builder import IndexBuilder
from cloudckpt.format.manifest import Reference
from cloudckpt.format.section import Section, TensorEntry
from cloudckpt.format.shard import block_digests

ATTEMPT, OTHER = "0123456789abcdef", "fedcba9876543210"
HOLDER = Holder(7, 2, OTHER)
CONTENT = hashlib.sha256(b"content").digest()


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def index_of(
    holder: tuple[int, ...] = (0, 1),
    number: tuple[int, ...] = (0, 5),
    contents: tuple[bytes, ...] = (b"", CONTENT),
    holders: tuple[Holder, ...] = (HOLDER,),
) -> Index:
    builder = IndexBuilder(attempt=ATTEMPT, block_bytes=1 << 20, content="sha256", holders=holders)
    builder.tensors["w"] = TensorEntry(dtype="uint8", shape=(20,))
    origins = Origins(holder=ints(*holder), number=ints(*number), contents=contents)
    builder.add(
        Section(
            rank=3,
            attempt=ATTEMPT,
            shard_sizes=ints(74, 74),
            digests=bytes(range(16)),
            tensor=ints(0, 0),
            shard=ints(0, 1),
            start=ints(64, 64),
            offsets=ints(0, 10),
            sizes=ints(10, 10),
            origins=origins,
        )
    )
    return Index(*builder.finish({}, {}), key="index.bin")


def test_an_index_says_which_shards_another_checkpoint_holds_and_under_which_key() -> None:
    found = Index.decode(index_of().encode(), key="index.bin")
    own, held = found.shards()
    assert (own.holder, held.holder, held.stored_number, held.content) == (None, HOLDER, 5, CONTENT)
    assert own.key("step-0000000009-e0002/") == f"step-0000000009-e0002/{ATTEMPT}/r00003-0000.safetensors"
    assert held.key("step-0000000009-e0002/") == f"step-0000000007-e0002/{OTHER}/r00003-0005.safetensors"
    assert held.key("copy/", is_copied=True) == f"copy/{OTHER}/r00003-0005.safetensors"
    assert found.references() == [Reference(step=7, epoch=2, attempt=OTHER, shard_count=1, total_bytes=74)]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"holder": (0, 2)}, "a holder that is not listed"),
        ({"holder": (0, -1)}, "a holder that is not listed"),
        ({"number": (0, -1)}, "a holder that is not listed"),
        ({"number": (1, 5)}, "an own shard with another's number"),
        ({"contents": (b"", CONTENT[:-1])}, "ends too early|follow its columns|width"),
        ({"holders": (Holder(7, 2, ATTEMPT),)}, "a holder of shards that cannot be, or itself"),
        ({"holders": (Holder(7, 0, OTHER),)}, "a holder of shards that cannot be"),
        ({"holders": (Holder(7, 2, "../../root"),)}, "a holder of shards that cannot be"),
        ({"holders": (Holder(10**10, 2, OTHER),)}, "a holder of shards that cannot be"),
    ],
)
def test_an_index_whose_holders_cannot_be_is_refused(changed: dict[str, tuple[object, ...]], problem: str) -> None:
    with pytest.raises(ManifestError, match=problem):
        Index.decode(index_of(**changed).encode(), key="index.bin")  # type: ignore[arg-type]


MANIFEST = Manifest(
    format_version=2,
    state="committed",
    step=9,
    epoch=2,
    attempt=ATTEMPT,
    created_at="2026-01-02T03:04:05+00:00",
    total_bytes=148,
    tensor_count=1,
    shard_count=2,
    index=IndexRef(size_bytes=10, sha256="0" * 64),
    references=[Reference(step=7, epoch=2, attempt=OTHER, shard_count=1, total_bytes=74)],
)


def test_a_manifest_says_who_holds_what_and_what_was_sent() -> None:
    found = Manifest.decode(MANIFEST.encode(), key="manifest.json")
    assert (found.sent_bytes, [one.prefix for one in found.held_elsewhere]) == (74, ["step-0000000007-e0002/"])


def reference(**changed: object) -> Reference:
    return msgspec.structs.replace(MANIFEST.held_elsewhere[0], **changed)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"format_version": 1}, "references do not go with its format version 1"),
        ({"references": msgspec.UNSET}, "references do not go with its format version 2"),
        ({"references": [reference(attempt="../0123456789abc")]}, "a checkpoint that cannot be"),
        ({"references": [reference(shard_count=0)]}, "a checkpoint that cannot be"),
        ({"references": [reference(step=-1)]}, "a checkpoint that cannot be"),
        ({"references": [reference(step=9)]}, "or to itself"),
        ({"references": [reference(), reference()]}, "twice to one"),
        ({"references": [reference(shard_count=3)]}, "more than it has"),
        ({"references": [reference(total_bytes=149)]}, "more than it has"),
    ],
)
def test_a_manifest_whose_references_cannot_be_is_never_written(changed: dict[str, object], problem: str) -> None:
    with pytest.raises(OptionsError, match=problem):
        msgspec.structs.replace(MANIFEST, **changed).encode()


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 200, 255, 256])
def test_blocks_are_compared_across_views_and_none_is_left_out(cut: int) -> None:
    data = memoryview(bytes(range(256)) * 2)
    views = [data[:40], data[40 : 40 + cut], data[40 + cut :]]
    digests = block_digests([data], block_bytes=64)
    assert has_blocks(views, digests, block_bytes=64)
    assert content_of("sha256", views) == hashlib.sha256(data).digest()
    for wrong in (digests[:-8], digests + digests[:8], digests[:-1] + b"\xff", b""):
        assert not has_blocks(views, wrong, block_bytes=64)


def test_a_digest_that_this_process_cannot_make_is_none() -> None:
    assert hasher_of("md5") is None
    assert content_kind() in ("blake3", "sha256")
