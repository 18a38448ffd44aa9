"""An index that is read is whole, unambiguous and consistent in itself, or it is refused, at a bounded cost.

Damage by chance is found before any of this, by the SHA-256 of the index that stands in the manifest. What is checked
here holds against an index that somebody made on purpose, or that a planner got wrong.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt import index as index_module
from cloudckpt.codec import DTYPES
from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.index import FORMAT_VERSION, ChunkEntry, Index, ShardEntry, TensorEntry
from cloudckpt.options import MAX_BLOCK_BYTES, MIB, Options
from cloudckpt.shard import block_count

KEY = "step-0000000007-e0001/0123456789abcdef/index.json.zst"
BLOCK_BYTES = 64

Box = tuple[tuple[int, ...], tuple[int, ...]]
Json = Any


def shard(rank: int, number: int, size_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> ShardEntry:
    digests = bytes(range(256)) * block_count(size_bytes, block_bytes)
    return ShardEntry(
        rank=rank,
        number=number,
        size_bytes=size_bytes,
        digests=base64.b64encode(digests[: 8 * block_count(size_bytes, block_bytes)]).decode(),
    )


INDEX = Index(
    format_version=FORMAT_VERSION,
    attempt="0123456789abcdef",
    block_bytes=BLOCK_BYTES,
    tensors={
        "model.weight": TensorEntry(
            dtype="float32",
            shape=(4, 4),
            chunks=(
                ChunkEntry(offsets=(0, 0), sizes=(2, 4), shard=0, start=64),
                ChunkEntry(offsets=(2, 0), sizes=(2, 4), shard=1, start=64),
            ),
        ),
        "model.scale": TensorEntry(
            dtype="bfloat16", shape=(), chunks=(ChunkEntry(offsets=(), sizes=(), shard=0, start=96),)
        ),
        "model.none": TensorEntry(
            dtype="int64", shape=(0, 3), chunks=(ChunkEntry(offsets=(0, 0), sizes=(0, 3), shard=1, start=96),)
        ),
    },
    values={"data_epoch": 3, "config": {"betas": {"$tuple": [0.9, 0.95]}, "name": "Ω"}},
    paths={
        "model.weight": ["model", "weight"],
        "model.scale": ["model", {"key": 5}],
        "data_epoch": ["data_epoch"],
        "config": ["config", 0, {"tuple": 1}],
    },
    shards=(shard(0, 0, 98), shard(1, 0, 96)),
)


def record() -> dict[str, Json]:
    """Return the index above as JSON, to be spoiled."""
    made: dict[str, Json] = json.loads(msgspec.json.encode(INDEX))
    return made


def frame(data: Json) -> bytes:
    """Return what stands on a store: JSON, or the given text, in a zstd frame."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return zstandard.ZstdCompressor().compress(text)


def of_tensor(shape: tuple[int, ...], boxes: list[Box], *, dtype: str = "uint8") -> Index:
    """Return an index of one tensor, whose boxes lie one after the other in one shard."""
    chunks, start = [], 8
    for offsets, sizes in boxes:
        chunks.append(ChunkEntry(offsets=offsets, sizes=sizes, shard=0, start=start))
        start += math.prod(sizes) * DTYPES[dtype].itemsize
    tensor = TensorEntry(dtype=dtype, shape=shape, chunks=tuple(chunks))
    return msgspec.structs.replace(
        INDEX, tensors={"w": tensor}, shards=(shard(0, 0, start + 1, block_bytes=MIB),), block_bytes=MIB, paths={}
    )


def is_accepted(index: Index) -> bool:
    try:
        index.check(key=KEY)
    except ManifestError as exc:
        assert "is not tiled by its pieces" in str(exc)  # noqa: PT017  refused, and for no other reason
        return False
    return True


# -- round trip ----------------------------------------------------------------------------------------------


def test_an_index_comes_back_as_it_was() -> None:
    assert Index.decode(INDEX.encode(), key=KEY) == INDEX


def test_the_order_of_names_is_kept() -> None:
    found = Index.decode(INDEX.encode(), key=KEY)

    assert [list(found.tensors), list(found.values), list(found.paths)] == [
        ["model.weight", "model.scale", "model.none"],
        ["data_epoch", "config"],
        ["model.weight", "model.scale", "data_epoch", "config"],
    ]


def test_an_index_of_nothing_comes_back() -> None:
    empty = msgspec.structs.replace(INDEX, tensors={}, values={}, paths={}, shards=())

    assert Index.decode(empty.encode(), key=KEY) == empty


def test_the_frame_states_its_size_and_holds_compact_json() -> None:
    data = INDEX.encode()

    text = zstandard.ZstdDecompressor().decompress(data)
    assert zstandard.frame_content_size(data) == len(text)
    assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode()
    assert list(json.loads(text)) == [
        "format_version",
        "attempt",
        "block_bytes",
        "tensors",
        "values",
        "paths",
        "shards",
    ]


def test_version_1_as_it_was_first_written_is_read() -> None:
    """An object from a store, byte for byte: whatever changes in the code, this stays readable."""
    text = (
        b'{"format_version":1,"attempt":"0123456789abcdef","block_bytes":4194304,"tensors":{"w":{"dtype":"float32",'
        b'"shape":[3,2],"chunks":[[[0,0],[2,2],0,128],[[2,0],[1,2],1,128]]}},"values":{"lr":1.0e-3,"b":{"$tuple":[1]}},'
        b'"paths":{"w":["model",{"key":0},"w"]},"shards":[[0,0,144,"AAECAwQFBgc="],[3,7,136,"AQECAwQFBgc="]]}'
    )

    found = Index.decode(frame(text), key=KEY)

    assert found.tensors["w"].chunks[1] == ChunkEntry(offsets=(2, 0), sizes=(1, 2), shard=1, start=128)
    assert found.values == {"lr": 0.001, "b": {"$tuple": [1]}}
    assert found.paths == {"w": ["model", {"key": 0}, "w"]}
    assert (found.shards[1].rank, found.shards[1].number, found.shards[1].size_bytes) == (3, 7, 136)
    assert found.shards[1].digest_bytes() == bytes([1, 1, 2, 3, 4, 5, 6, 7])


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
        "is not tiled",
    ),
    "piece twice": (
        lambda made: made["tensors"]["model.weight"]["chunks"].append([[2, 0], [2, 4], 0, 64]),
        "is not tiled",
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
@pytest.mark.parametrize("kind", [float, bool, str, lambda number: [number], lambda number: None], ids=repr)
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


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Cut a tensor again and again, each box along an axis of its own."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1)) if shape else None
        if axis is None or sizes[axis] < 2:
            boxes.append((offsets, sizes))
            continue
        cut = draw(st.integers(1, sizes[axis] - 1))
        for start, size in ((0, cut), (cut, sizes[axis] - cut)):
            boxes.append(
                (
                    (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :]),
                    (*sizes[:axis], size, *sizes[axis + 1 :]),
                )
            )
    return shape, draw(st.permutations(boxes))


def covers_once(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Count how often each element is covered."""
    counts = np.zeros(shape, dtype=int)
    for offsets, sizes in boxes:
        counts[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] += 1
    return bool((counts == 1).all())


lenient = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@lenient
@given(tilings(), st.lists(st.just(0), max_size=2))
def test_boxes_that_tile_a_tensor_are_accepted(tiling: tuple[tuple[int, ...], list[Box]], empty: list[int]) -> None:
    shape, boxes = tiling
    # An empty rank of a sharded tensor has a box without elements, anywhere.
    boxes = boxes + [((0,) * len(shape), (0,) * len(shape)) for _ in empty if shape]

    assert is_accepted(of_tensor(shape, boxes))


@st.composite
def near_tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Tilings with one box moved, resized, doubled or lost; now and then they still tile."""
    shape, boxes = draw(tilings())
    kind = draw(st.sampled_from(["lose", "double", "other"]))
    offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
    if kind == "double":
        boxes += [(offsets, sizes)] * 2
    if kind == "other":
        starts = tuple(draw(st.integers(0, extent)) for extent in shape)
        boxes.append((starts, tuple(draw(st.integers(0, e - s)) for s, e in zip(starts, shape, strict=True))))
    return shape, boxes


@lenient
@given(near_tilings())
def test_exactly_the_boxes_that_cover_every_element_once_are_accepted(
    boxes_of: tuple[tuple[int, ...], list[Box]],
) -> None:
    shape, boxes = boxes_of

    assert is_accepted(of_tensor(shape, boxes)) == covers_once(shape, boxes)


@lenient
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), st.data())
def test_random_boxes_are_accepted_only_if_they_cover_every_element_once(
    shape: tuple[int, ...], draw: st.DataObject
) -> None:
    boxes = []
    for _ in range(draw.draw(st.integers(0, 4))):
        starts = tuple(draw.draw(st.integers(0, extent - 1)) for extent in shape)
        boxes.append((starts, tuple(draw.draw(st.integers(1, e - s)) for s, e in zip(starts, shape, strict=True))))

    assert is_accepted(of_tensor(shape, boxes)) == covers_once(shape, boxes)


PINWHEEL: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


def test_boxes_that_no_straight_cut_separates_may_tile() -> None:
    assert is_accepted(of_tensor((3, 3), PINWHEEL))
    assert not is_accepted(of_tensor((3, 3), PINWHEEL[:-1]))
    assert not is_accepted(of_tensor((3, 3), [*PINWHEEL[:-1], ((0, 0), (1, 1))]))


def test_equal_volume_is_not_enough() -> None:
    assert not is_accepted(of_tensor((2, 4), [((0, 0), (2, 2)), ((0, 1), (2, 2))]))
    assert not is_accepted(of_tensor((4,), [((0,), (2,)), ((0,), (2,))]))


def test_a_tensor_of_64_dimensions_may_be_cut() -> None:
    shape = (2,) * 5 + (1,) * 58 + (2,)
    halves = [((0,) * 63 + (start,), (*shape[:63], 1)) for start in (0, 1)]

    assert is_accepted(of_tensor(shape, halves))
    assert not is_accepted(of_tensor(shape, [halves[0], halves[0]]))


def test_no_save_is_configured_that_no_reader_would_take() -> None:
    with pytest.raises(OptionsError, match="block_bytes is 268435457"):
        Options(block_bytes=MAX_BLOCK_BYTES + 1, span_bytes=MAX_BLOCK_BYTES + 1)


def test_a_large_tensor_is_checked_without_memory_for_its_elements() -> None:
    shape = (1 << 20, 1 << 20)
    index = msgspec.structs.replace(
        of_tensor(shape, [((0, 0), (1 << 19, 1 << 20)), ((1 << 19, 0), (1 << 19, 1 << 20))]),
        block_bytes=MAX_BLOCK_BYTES,
        shards=(shard(0, 0, (1 << 40) + 8, block_bytes=MAX_BLOCK_BYTES),),
    )

    assert is_accepted(index)


def test_the_check_leaves_the_random_numbers_of_the_training_alone() -> None:
    import random

    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)

    INDEX.check(key=KEY)

    assert [random.random() for _ in range(3)] == expected


def grid(rows: int, columns: int) -> list[Box]:
    return [((row, column), (1, 1)) for row in range(rows) for column in range(columns)]


def nested(count: int) -> tuple[tuple[int, ...], list[Box]]:
    """Strips cut off the top and the left in turn: no cut separates more than one of them from the rest."""
    boxes: list[Box] = []
    for at in range(count):
        boxes += [((at, at), (1, count - at)), ((at + 1, at), (count - at - 1, 1))]
    return (count, count), boxes


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("shape", "boxes"),
    [((1, 100_000), grid(1, 100_000)), ((100_000, 1), grid(100_000, 1)), ((300, 300), grid(300, 300)), nested(40_000)],
    ids=["columns", "rows", "grid", "nested"],
)
def test_the_check_costs_no_more_for_one_arrangement_than_for_another(shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Comparing every two of so many boxes takes an hour, and the limit of this test is far below."""
    tensor = TensorEntry(dtype="uint8", shape=shape, chunks=_packed(boxes))
    size_bytes = 8 + math.prod(shape)
    index = msgspec.structs.replace(
        INDEX,
        tensors={"w": tensor},
        paths={},
        block_bytes=MAX_BLOCK_BYTES,
        shards=(shard(0, 0, size_bytes, block_bytes=MAX_BLOCK_BYTES),),
    )

    assert is_accepted(Index.decode(index.encode(), key=KEY))
    spoiled = msgspec.structs.replace(tensor, chunks=tensor.chunks[1:])
    assert not is_accepted(msgspec.structs.replace(index, tensors={"w": spoiled}))


def _packed(boxes: list[Box]) -> tuple[ChunkEntry, ...]:
    chunks, start = [], 8
    for offsets, sizes in boxes:
        chunks.append(ChunkEntry(offsets=offsets, sizes=sizes, shard=0, start=start))
        start += math.prod(sizes)
    return tuple(chunks)


# -- text ----------------------------------------------------------------------------------------------------

TEXT = msgspec.json.encode(INDEX)


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

    assert Index.decode(frame(spelled), key=KEY) == INDEX


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


def test_a_name_that_is_no_text_is_refused_at_the_save() -> None:
    with pytest.raises(UnsupportedValueError, match=r"'a\\udc80' has lone surrogates") as caught:
        msgspec.structs.replace(INDEX, values={"a\udc80": 1}).encode()

    assert caught.value.key == "a\udc80"


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
    data = INDEX.encode()

    assert Index.decode(stating(data, len(TEXT)), key=KEY) == INDEX
    for size in (0, 1, len(TEXT) - 1, len(TEXT) + 1, 16 * MIB):
        with pytest.raises(ManifestError):
            Index.decode(stating(data, size), key=KEY)


@pytest.mark.parametrize("size", [2**24 + 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1])
def test_a_size_that_such_a_frame_cannot_have_is_refused_before_memory_is_taken(size: int) -> None:
    data = stating(INDEX.encode(), size)

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


def test_an_index_that_a_reader_would_refuse_is_refused_at_the_save() -> None:
    room = 16 * MIB - len(msgspec.json.encode(msgspec.structs.replace(INDEX, values={"log": ""})))
    fits = msgspec.structs.replace(INDEX, values={"log": "x" * room})
    too_large = msgspec.structs.replace(INDEX, values={"log": "x" * (room + 1)})

    assert Index.decode(fits.encode(), key=KEY) == fits
    with pytest.raises(OptionsError, match="save long lists of numbers as tensors"):
        too_large.encode()


def test_an_object_over_the_limit_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    data = INDEX.encode()
    monkeypatch.setattr(index_module, "INDEX_LIMIT_BYTES", len(data) - 1)

    with pytest.raises(ManifestError, match="more than is read"):
        Index.decode(data, key=KEY)
    with pytest.raises(OptionsError, match="more than a reader accepts"):
        INDEX.encode()


def test_what_follows_the_frame_is_refused() -> None:
    data = INDEX.encode()
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"

    for spoiled in (data + b"\0", data + data, data + frame(b""), data + skippable, skippable + data, skippable):
        with pytest.raises(ManifestError):
            Index.decode(spoiled, key=KEY)


def test_every_truncation_is_refused() -> None:
    data = INDEX.encode()

    for size in range(len(data)):
        with pytest.raises(ManifestError):
            Index.decode(data[:size], key=KEY)


def test_every_flipped_bit_is_refused_or_leaves_an_index_that_is_consistent() -> None:
    """Whether the bytes are those that were committed, the manifest's digest says; here nothing else may escape."""
    data = bytearray(INDEX.encode())

    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            Index.decode(bytes(data), key=KEY).check(key=KEY)
        except ManifestError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8

    assert refused > 4 * len(data)


@settings(deadline=None, max_examples=1000)
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
    assert Index.decode(found.encode(), key=KEY) == found
