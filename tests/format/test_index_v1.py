"""An index of version 1 is read as it ever was: whole, unambiguous and consistent in itself, or refused."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import cloudckpt
from cloudckpt.errors import FormatVersionError, ManifestError
from cloudckpt.format.index import FORMAT_VERSION, ChunkEntry, Index
from cloudckpt.format.manifest import IndexRef, Manifest, digest_of
from cloudckpt.options import MAX_BLOCK_BYTES, MIB
from tests.effort import examples

KEY = "step-0000000007-e0001/0123456789abcdef/index.json.zst"

Json = Any

RECORD: dict[str, Json] = {
    "format_version": 1,
    "attempt": "0123456789abcdef",
    "block_bytes": 64,
    "tensors": {
        "model.weight": {
            "dtype": "float32",
            "shape": [4, 4],
            "chunks": [[[0, 0], [2, 4], 0, 64], [[2, 0], [2, 4], 1, 64]],
        },
        "model.scale": {"dtype": "bfloat16", "shape": [], "chunks": [[[], [], 0, 96]]},
        "model.none": {"dtype": "int64", "shape": [0, 3], "chunks": [[[0, 0], [0, 3], 1, 96]]},
    },
    "values": {"data_epoch": 3, "config": {"betas": {"$tuple": [0.9, 0.95]}, "name": "Ω"}},
    "paths": {
        "model.weight": ["model", "weight"],
        "model.scale": ["model", {"key": 5}],
        "data_epoch": ["data_epoch"],
        "config": ["config", 0, {"tuple": 1}],
    },
    "shards": [
        [0, 0, 98, base64.b64encode(bytes(range(16))).decode()],
        [1, 0, 96, base64.b64encode(bytes(range(16))).decode()],
    ],
}


def record() -> dict[str, Json]:
    """Return the index above, to be spoiled."""
    made: dict[str, Json] = json.loads(json.dumps(RECORD))
    return made


def frame(data: Json) -> bytes:
    """Return what stands on a store: JSON, or the given text, in a zstd frame."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return zstandard.ZstdCompressor().compress(text)


def content(index: Index) -> list[object]:
    """Return all that an index says."""
    return [
        index.attempt,
        index.block_bytes,
        index.tensors,
        index.values,
        index.paths,
        index.all_pieces(),
        list(index.shards()),
    ]


def test_version_1_as_it_was_first_written_is_read() -> None:
    """An object from a store, byte for byte: whatever changes in the code, this stays readable."""
    text = (
        b'{"format_version":1,"attempt":"0123456789abcdef","block_bytes":4194304,"tensors":{"w":{"dtype":"float32",'
        b'"shape":[3,2],"chunks":[[[0,0],[2,2],0,128],[[2,0],[1,2],1,128]]}},"values":{"lr":1.0e-3,"b":{"$tuple":[1]}},'
        b'"paths":{"w":["model",{"key":0},"w"]},"shards":[[0,0,144,"AAECAwQFBgc="],[3,7,136,"AQECAwQFBgc="]]}'
    )

    found = Index.decode(frame(text), key=KEY)

    assert found.pieces("w") == [
        ChunkEntry(offsets=(0, 0), sizes=(2, 2), rank=0, number=0, start=128),
        ChunkEntry(offsets=(2, 0), sizes=(1, 2), rank=3, number=7, start=128),
    ]
    assert found.values == {"lr": 0.001, "b": {"$tuple": [1]}}
    assert found.paths == {"w": ["model", {"key": 0}, "w"]}
    assert (found.attempt, found.ranks) == ("0123456789abcdef", (0, 3))
    assert (found.shard(3, 7).attempt, found.shard(3, 7).size_bytes) == ("0123456789abcdef", 136)
    assert found.shard(3, 7).digests == bytes([1, 1, 2, 3, 4, 5, 6, 7])


# -- consistency ---------------------------------------------------------------------------------------------


def spoil(*way: Any) -> Callable[[dict[str, Json]], None]:
    """Return a change that puts the last argument to where the others lead."""

    def change(made: dict[str, Json]) -> None:
        place: Any = made
        for step in way[:-2]:
            place = place[step]
        place[way[-2]] = way[-1]

    return change


WEIGHT = ("tensors", "model.weight")
CHUNK = (*WEIGHT, "chunks", 1)
SHARD = ("shards", 0)
INCONSISTENT: dict[str, tuple[Callable[[dict[str, Json]], Any], str]] = {
    "hole": (lambda made: made["tensors"]["model.weight"]["chunks"].pop(), "is not tiled"),
    "no piece": (spoil(*WEIGHT, "chunks", []), "is not tiled"),
    "no piece of a scalar": (spoil("tensors", "model.scale", "chunks", []), "is not tiled"),
    "two pieces of a scalar": (
        spoil("tensors", "model.scale", "chunks", [[[], [], 0, 96], [[], [], 1, 64]]),
        "is not tiled|share byte",
    ),
    "piece twice": (
        lambda made: made["tensors"]["model.weight"]["chunks"].append([[2, 0], [2, 4], 0, 64]),
        "is not tiled|share byte",
    ),
    "pieces overlap and leave a hole": (spoil(*CHUNK, 0, [1, 0]), "is not tiled"),
    "piece too short": (spoil(*CHUNK, 1, [1, 4]), "is not tiled"),
    "piece leaves the tensor": (spoil(*CHUNK, 0, [3, 0]), "leaves the tensor"),
    "piece wider than the tensor": (spoil(*CHUNK, 1, [2, 5]), "leaves the tensor"),
    "negative offset": (spoil(*CHUNK, 0, [-2, 0]), "leaves the tensor"),
    "negative size": (spoil(*CHUNK, 1, [-2, -4]), "leaves the tensor"),
    "too few offsets": (spoil(*CHUNK, 0, [2]), "leaves the tensor"),
    "too many sizes": (spoil(*CHUNK, 1, [2, 4, 1]), "leaves the tensor"),
    "no shard of that number": (spoil(*CHUNK, 2, 2), "or its shard"),
    "negative shard": (spoil(*CHUNK, 2, -1), "or its shard"),
    "piece leaves its shard": (spoil(*CHUNK, 3, 65), "or its shard"),
    "piece far beyond its shard": (spoil(*CHUNK, 3, 2**62), "or its shard"),
    "piece beyond 64 bits": (spoil(*CHUNK, 3, 2**70), "or its shard"),
    "piece in the length of the header": (spoil(*CHUNK, 3, 7), "or its shard"),
    "negative start": (spoil(*CHUNK, 3, -64), "or its shard"),
    "empty piece beyond its shard": (spoil("tensors", "model.none", "chunks", 0, 3, 97), "or its shard"),
    "two tensors share bytes": (
        spoil("tensors", "model.scale", "chunks", 0, 3, 94),
        r"share byte 94 of shard \(0, 0\)",
    ),
    "two pieces share bytes": (spoil(*CHUNK, 2, 0), r"share byte 64 of shard \(0, 0\)"),
    "unknown dtype": (spoil(*WEIGHT, "dtype", "float31"), "has dtype 'float31'"),
    "dtype of torch that is no element type": (spoil(*WEIGHT, "dtype", "qint8"), "has dtype 'qint8'"),
    "wider dtype": (spoil(*WEIGHT, "dtype", "float64"), "or its shard"),
    "negative shape": (spoil(*WEIGHT, "shape", [4, -4]), r"has shape \(4, -4\)"),
    "shape beyond any memory": (spoil(*WEIGHT, "shape", [2**30, 2**30]), "has shape"),
    "empty shape beyond any stride": (spoil("tensors", "model.none", "shape", [0, 2**60]), "has shape"),
    "65 dimensions": (spoil(*WEIGHT, "shape", [1] * 65), "has shape"),
    "too few digests": (spoil(*SHARD, 3, base64.b64encode(bytes(8)).decode()), "has 8 bytes of digests for 98"),
    "too many digests": (spoil(*SHARD, 3, base64.b64encode(bytes(24)).decode()), "has 24 bytes of digests for 98"),
    "no digests": (spoil(*SHARD, 3, ""), "has 0 bytes of digests"),
    "digests that are no base64": (spoil(*SHARD, 3, "AAAA*AAA"), "not base64"),
    "digests with a line break": (spoil(*SHARD, 3, base64.encodebytes(bytes(16)).decode()), "not base64"),
    "digests that are no ASCII": (spoil(*SHARD, 3, "é" * 24), "not base64"),
    "shard larger than its digests": (spoil(*SHARD, 2, 129), "has 16 bytes of digests for 129 bytes"),
    "shard without data": (spoil(*SHARD, 2, 8), "has 8 bytes"),
    "negative shard size": (spoil(*SHARD, 2, -98), "has -98 bytes"),
    "shard beyond any store": (spoil(*SHARD, 2, 2**60), f"has {2**60} bytes"),
    "shard twice": (spoil("shards", 1, 0, 0), r"shard \(0, 0\) is listed twice"),
    "negative rank": (spoil(*SHARD, 0, -1), "cannot have that number"),
    "negative number": (spoil(*SHARD, 1, -1), "cannot have that number"),
    "rank without end": (spoil(*SHARD, 0, 10**300), "cannot have that number"),
    "no block size": (spoil("block_bytes", 0), "block_bytes is 0"),
    "negative block size": (spoil("block_bytes", -64), "block_bytes is -64"),
    "block larger than a reader holds": (spoil("block_bytes", MAX_BLOCK_BYTES + 1), "block_bytes is"),
    "smaller blocks": (spoil("block_bytes", 32), "bytes of digests"),
    "name both tensor and value": (spoil("values", "model.weight", 1), "'model.weight' is both a tensor and a value"),
    "no attempt": (spoil("attempt", ""), "attempt '' is no attempt id"),
    "path without steps": (spoil("paths", "model.weight", []), "the path of 'model.weight' has 0 steps"),
    "path without end": (spoil("paths", "model.weight", ["a"] * 66), "the path of 'model.weight' has 66 steps"),
    "unknown field": (spoil("comment", "x"), "cannot be decoded"),
    "unknown field of a tensor": (spoil(*WEIGHT, "strides", [4, 1]), "cannot be decoded"),
    "unknown field of a piece": (
        lambda made: made["tensors"]["model.weight"]["chunks"][1].append(0),
        "cannot be decoded",
    ),
    "missing field": (lambda made: made.pop("paths"), "cannot be decoded"),
    "missing field of a piece": (lambda made: made["tensors"]["model.weight"]["chunks"][1].pop(), "cannot be decoded"),
    "missing field of a shard": (lambda made: made["shards"][0].pop(), "cannot be decoded"),
    "missing version": (lambda made: made.pop("format_version"), "cannot be decoded"),
}
"""What is wrong → (the change that makes it so, what the message says)."""


@pytest.mark.parametrize(("change", "reason"), INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_an_inconsistent_index_is_refused_and_says_why(change: Callable[[dict[str, Json]], Any], reason: str) -> None:
    made = record()
    change(made)

    with pytest.raises(ManifestError, match=reason) as caught:
        Index.decode(frame(made), key=KEY)

    assert caught.value.key == KEY
    assert KEY in str(caught.value)
    assert "restore an older step" in str(caught.value)


NUMBERS: list[tuple[Any, ...]] = [
    ("format_version",),
    ("block_bytes",),
    (*WEIGHT, "shape", 0),
    (*CHUNK, 0, 0),
    (*CHUNK, 1, 0),
    (*CHUNK, 2),
    (*CHUNK, 3),
    (*SHARD, 0),
    (*SHARD, 1),
    (*SHARD, 2),
    ("paths", "config", 1),
]


@pytest.mark.parametrize("way", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [float, bool, str, lambda number: [number], lambda number: None],
    ids=["float", "bool", "str", "list", "null"],
)
def test_a_number_of_another_type_is_refused(way: tuple[Any, ...], kind: Callable[[int], Any]) -> None:
    made = record()
    place: Any = made
    for step in way:
        place = place[step]
    spoiled = kind(place)
    if way[0] == "paths" and isinstance(spoiled, str):
        spoiled = [spoiled]  # a step may be text
    spoil(*way, spoiled)(made)

    with pytest.raises(ManifestError, match="cannot be decoded"):
        Index.decode(frame(made), key=KEY)


# -- text ----------------------------------------------------------------------------------------------------

TEXT = msgspec.json.encode(RECORD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"block_bytes":64', b'"block_bytes":64,"block_bytes":64'),
        (b'"format_version":1', b'"format_version":2,"format_version":1'),
        (b'"model.scale":{"dtype"', b'"model.weight":{"dtype"'),
        (b'"dtype":"int64"', b'"dtype":"int8","dtype":"int64"'),
        (b'"values":{', b'"values":{"data_epoch":4,'),
        (b'{"betas":', b'{"name":"x","betas":'),
        (b'{"key":5}', b'{"key":4,"key":5}'),
        (b'"data_epoch":3', b'"data_epoch":3,"data_\\u0065poch":4'),
    ],
)
def test_a_name_twice_in_one_object_is_refused(old: bytes, new: bytes) -> None:
    """One reader would take the first, another the last."""
    assert TEXT.count(old) == 1

    with pytest.raises(ManifestError, match="has a name twice"):
        Index.decode(frame(TEXT.replace(old, new)), key=KEY)


def test_another_spelling_of_the_same_record_is_read() -> None:
    """What a later release, or another library, would write for the same numbers and texts."""
    spelled = TEXT.replace(b"0.95", b"95e-2").replace("Ω".encode(), b"\\u03a9").replace(b",", b", ")

    assert content(Index.decode(frame(spelled), key=KEY)) == content(Index.decode(frame(TEXT), key=KEY))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 10**30])
def test_a_newer_index_says_to_upgrade_whatever_else_it_holds(version: int) -> None:
    made = {"format_version": version, "pieces": [], "attempt": None}

    with pytest.raises(FormatVersionError, match="upgrade cloudckpt to read it") as caught:
        Index.decode(frame(made), key=KEY)

    assert caught.value.key == KEY


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_not_newer(version: int) -> None:
    made = {**record(), "format_version": version}

    with pytest.raises(ManifestError, match=f"has format version {version}; restore") as caught:
        Index.decode(frame(made), key=KEY)

    assert not isinstance(caught.value, FormatVersionError)


def test_a_message_about_foreign_text_is_short_and_printable() -> None:
    made = record()
    made["values"]["\x1b[31m\n" + "x" * 100_000] = 1
    made["tensors"]["\x1b[31m\n" + "x" * 100_000] = made["tensors"]["model.scale"]

    with pytest.raises(ManifestError, match=r"share byte|both a tensor and a value") as caught:
        Index.decode(frame(made), key=KEY)
    with pytest.raises(ManifestError, match="cannot be decoded") as unknown:
        Index.decode(frame({**record(), "\x1b[31m\n" + "x" * 100_000: 1}), key=KEY)

    for message in (str(caught.value), str(unknown.value)):
        assert len(message) < 600
        assert message.isprintable()


# -- frame ---------------------------------------------------------------------------------------------------


def stating(data: bytes, size: int) -> bytes:
    """Return a zstd frame that states another size for the same blocks."""
    single_segment_with_8_bytes_of_size = bytes([0b1110_0000])
    blocks = data[zstandard.frame_header_size(data) :]
    return data[:4] + single_segment_with_8_bytes_of_size + struct.pack("<Q", size) + blocks


def peak_of(act: Callable[[], object]) -> int:
    """Return the most bytes that Python held for `act`, and that it raised `ManifestError`."""
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError):
            act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_size_that_a_frame_states_is_the_size_it_has() -> None:
    data = frame(TEXT)

    assert Index.decode(stating(data, len(TEXT)), key=KEY).attempt == RECORD["attempt"]
    for size in (0, 1, len(TEXT) - 1, len(TEXT) + 1, 16 * MIB):
        with pytest.raises(ManifestError):
            Index.decode(stating(data, size), key=KEY)


@pytest.mark.parametrize("size", [2**24 + 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1])
def test_a_size_that_such_a_frame_cannot_have_is_refused_before_memory_is_taken(size: int) -> None:
    data = stating(frame(TEXT), size)

    assert peak_of(lambda: Index.decode(data, key=KEY)) < MIB


@pytest.mark.parametrize("text", [b"[", b" ", b"0,", b'{"a":', b"\0"])
def test_a_small_frame_of_much_text_is_refused_before_memory_is_taken(text: bytes) -> None:
    bomb = frame(text * (64 * MIB // len(text)))
    assert len(bomb) < 64 * 1024

    assert peak_of(lambda: Index.decode(bomb, key=KEY)) < MIB


def test_a_frame_that_hides_its_size_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)

    with pytest.raises(ManifestError, match="states -1 decoded bytes"):
        Index.decode(hidden, key=KEY)


def test_what_follows_the_frame_is_refused() -> None:
    data = frame(TEXT)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"

    for spoiled in (data + b"\0", data + data, data + frame(b""), data + skippable, skippable + data, skippable):
        with pytest.raises(ManifestError):
            Index.decode(spoiled, key=KEY)


def test_every_truncation_is_refused() -> None:
    data = frame(TEXT)

    for size in range(len(data)):
        with pytest.raises(ManifestError):
            Index.decode(data[:size], key=KEY)


def test_every_flipped_bit_is_refused_or_leaves_an_index_that_is_consistent() -> None:
    """Whether the bytes are those that were committed, the manifest's digest says; here nothing else may escape."""
    data = bytearray(frame(TEXT))

    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            Index.decode(bytes(data), key=KEY).check(key=KEY)
        except ManifestError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8

    assert refused > 4 * len(data)


@settings(max_examples=examples(1000))
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 30), st.binary(max_size=30) | st.text('[]{},:"0123456789-.eE'))
def test_other_text_in_a_right_frame_is_refused_or_leaves_an_index_that_is_consistent(
    start: int, length: int, other: bytes | str
) -> None:
    spliced = other.encode() if isinstance(other, str) else other
    try:
        found = Index.decode(frame(TEXT[:start] + spliced + TEXT[start + length :]), key=KEY)
    except ManifestError:
        return

    found.check(key=KEY)
    assert content(Index.decode(found.encode(), key=KEY)) == content(found)


# -- a checkpoint ----------------------------------------------------------------------------------------------


def as_version_1(url: Path) -> None:
    """Turn a checkpoint of today into what version 1 would have written for the same shards."""
    manifest = Manifest.decode((url / "manifest.json").read_bytes(), key="manifest.json")
    folder = url / manifest.attempt
    index = Index.decode((folder / "index.bin").read_bytes(), key="index.bin")
    shards = list(index.shards())
    places = {(shard.rank, shard.number): place for place, shard in enumerate(shards)}
    tensors = {
        name: {
            "dtype": index.tensors[name].dtype,
            "shape": index.tensors[name].shape,
            "chunks": [[chunk.offsets, chunk.sizes, places[chunk.rank, chunk.number], chunk.start] for chunk in chunks],
        }
        for name, chunks in index.all_pieces().items()
    }
    made = {
        "format_version": 1,
        "attempt": index.attempt,
        "block_bytes": index.block_bytes,
        "tensors": tensors,
        "values": index.values,
        "paths": index.paths,
        "shards": [
            [shard.rank, shard.number, shard.size_bytes, base64.b64encode(shard.digests).decode()] for shard in shards
        ],
    }
    data = frame(msgspec.json.encode(made))
    (folder / "index.bin").unlink()
    (folder / "index.json.zst").write_bytes(data)
    ref = IndexRef(size_bytes=len(data), sha256=digest_of(data))
    old = msgspec.structs.replace(manifest, format_version=1, index=ref)
    (url / "manifest.json").write_bytes(old.encode())


def test_a_checkpoint_of_version_1_is_loaded(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3), "lr": 0.5}
    options = cloudckpt.Options(shard_bytes=1024, block_bytes=256, span_bytes=512)
    cloudckpt.save(state, tmp_path / "c", options=options)
    as_version_1(tmp_path / "c")

    target: dict[str, object] = {"w": torch.zeros(10, 100), "b": torch.zeros(3), "lr": 0.0}
    cloudckpt.load(target, tmp_path / "c")

    assert torch.equal(target["w"], state["w"])  # type: ignore[arg-type]
    assert torch.equal(target["b"], state["b"])  # type: ignore[arg-type]
    assert target["lr"] == 0.5
