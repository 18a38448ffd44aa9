"""An index that is read is whole, unambiguous and consistent in itself, or it is refused, at a bounded cost.

Damage by chance is found before any of this, by the SHA-256 of the index that stands in the manifest. What is checked
here holds against an index that somebody made on purpose, or that a planner got wrong.
"""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.format import record as record_module
from cloudckpt.format.builder import IndexBuilder
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.index import Index, ShardEntry
from cloudckpt.format.record import SHARING_VERSION
from cloudckpt.format.section import ChunkEntry, Section, TensorEntry
from cloudckpt.options import MAX_BLOCK_BYTES, MIB, Options
from tests.effort import examples

KEY = "step-0000000007-e0001/0123456789abcdef/index.bin"
ATTEMPT = "0123456789abcdef"
OTHER_ATTEMPT = "fedcba9876543210"
BLOCK_BYTES = 64
MAGIC = b"cloudckpt index\n"

Box = tuple[tuple[int, ...], tuple[int, ...]]
Piece = tuple[int, tuple[int, ...], tuple[int, ...], int, int]
Json = Any


def int64(values: Any) -> np.ndarray:
    return np.asarray(list(values), dtype=np.int64)


def section(
    rank: int,
    sizes: list[int],
    pieces: list[Piece],
    *,
    attempt: str = ATTEMPT,
    digests: bytes | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Section:
    """Return what a rank wrote; a piece is (number of its tensor, offsets, sizes, number of its shard, start)."""
    blocks = sum(-(-size // block_bytes) for size in sizes) if min(sizes, default=0) >= 0 else 0
    return Section(
        rank=rank,
        attempt=attempt,
        shard_sizes=int64(sizes),
        digests=(bytes(range(256)) * blocks)[: 8 * blocks] if digests is None else digests,
        tensor=int64(piece[0] for piece in pieces),
        shard=int64(piece[3] for piece in pieces),
        start=int64(piece[4] for piece in pieces),
        offsets=int64(chain.from_iterable(piece[1] for piece in pieces)),
        sizes=int64(chain.from_iterable(piece[2] for piece in pieces)),
    )


TENSORS = {
    "model.weight": TensorEntry(dtype="float32", shape=(4, 4)),
    "model.scale": TensorEntry(dtype="bfloat16", shape=()),
    "model.none": TensorEntry(dtype="int64", shape=(0, 3)),
}
SECTIONS: dict[int, tuple[list[int], list[Piece]]] = {
    0: ([98], [(0, (0, 0), (2, 4), 0, 64), (1, (), (), 0, 96)]),
    1: ([96], [(0, (2, 0), (2, 4), 0, 64), (2, (0, 0), (0, 3), 0, 96)]),
}
VALUES: dict[str, Json] = {"data_epoch": 3, "config": {"betas": {"$tuple": [0.9, 0.95]}, "name": "Ω"}}
PATHS: dict[str, Json] = {
    "model.weight": ["model", "weight"],
    "model.scale": ["model", {"key": 5}],
    "data_epoch": ["data_epoch"],
    "config": ["config", 0, {"tuple": 1}],
}


def made_of(
    sections: list[Section],
    *,
    tensors: Mapping[str, TensorEntry] = TENSORS,
    values: Mapping[str, Json] = VALUES,
    paths: Mapping[str, Json] = PATHS,
    block_bytes: int = BLOCK_BYTES,
) -> Index:
    builder = IndexBuilder(attempt=ATTEMPT, block_bytes=block_bytes)
    builder.tensors.update(tensors)
    for written in sections:
        builder.add(written)
    return Index(*builder.finish(values, paths), key=KEY)


INDEX = made_of([section(rank, *content) for rank, content in SECTIONS.items()])


def content_of(index: Index) -> list[object]:
    """Return all that an index says."""
    return [
        index.attempt,
        index.block_bytes,
        index.tensors,
        index.values,
        index.paths,
        index.ranks,
        index.all_pieces(),
        list(index.shards()),
    ]


def parts(data: bytes = b"") -> tuple[dict[str, Json], list[bytes]]:
    """Return the header and the sections, decompressed, of an index, to be spoiled."""
    data = data or INDEX.encode()
    (size,) = struct.unpack("<Q", data[16:24])
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[24 : 24 + size]))
    at, sections = 24 + size, []
    for rank in header["ranks"]:
        sections.append(zstandard.ZstdDecompressor().decompress(data[at : at + rank[5]]))
        at += rank[5]
    return header, sections


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def whole(header: Json, frames: list[bytes], *, is_true: bool = True) -> bytes:
    """Return an index; `is_true` puts the frames' real sizes and digests into the table of the header."""
    if is_true:
        for rank, data in zip(header["ranks"], frames, strict=True):
            rank[5:] = [len(data), zstandard.frame_content_size(data), xxhash.xxh3_64_hexdigest(data)]
    head = frame(header if isinstance(header, bytes) else json.dumps(header).encode())
    return MAGIC + struct.pack("<Q", len(head)) + head + b"".join(frames)


def of_tensor(shape: tuple[int, ...], boxes: list[Box], *, dtype: str = "uint8", block_bytes: int = MIB) -> Index:
    """Return an index of one tensor, whose boxes lie one after the other in one shard."""
    pieces: list[Piece] = []
    start = 8
    for offsets, sizes in boxes:
        pieces.append((0, offsets, sizes, 0, start))
        start += math.prod(sizes) * DTYPES[dtype].itemsize
    written = section(0, [start + 1], pieces, block_bytes=block_bytes)
    return made_of([written], tensors={"w": TensorEntry(dtype, shape)}, paths={}, block_bytes=block_bytes)


def is_accepted(index: Index) -> bool:
    try:
        index.check()
    except ManifestError as exc:
        assert "is not tiled by its pieces" in str(exc)  # noqa: PT017  refused, and for no other reason
        return False
    return True


# -- round trip ----------------------------------------------------------------------------------------------


def test_an_index_comes_back_as_it_was() -> None:
    found = Index.decode(INDEX.encode(), key=KEY)

    assert content_of(found) == content_of(INDEX)
    assert found.encode() == INDEX.encode()


def test_the_order_of_names_is_kept() -> None:
    found = Index.decode(INDEX.encode(), key=KEY)

    assert [list(found.tensors), list(found.values), list(found.paths)] == [
        ["model.weight", "model.scale", "model.none"],
        ["data_epoch", "config"],
        ["model.weight", "model.scale", "data_epoch", "config"],
    ]


def test_an_index_of_nothing_comes_back() -> None:
    empty = made_of([], tensors={}, values={}, paths={})

    found = Index.decode(empty.encode(), key=KEY)

    assert content_of(found) == [ATTEMPT, BLOCK_BYTES, {}, {}, {}, (), {}, []]


def test_pieces_and_shards_are_those_that_were_written() -> None:
    found = Index.decode(INDEX.encode(), key=KEY)

    assert found.all_pieces()["model.weight"] == [
        ChunkEntry(offsets=(0, 0), sizes=(2, 4), rank=0, number=0, start=64),
        ChunkEntry(offsets=(2, 0), sizes=(2, 4), rank=1, number=0, start=64),
    ]
    assert found.all_pieces()["model.scale"] == [ChunkEntry(offsets=(), sizes=(), rank=0, number=0, start=96)]
    assert found.piece_counts() == {"model.weight": 2, "model.scale": 1, "model.none": 1}
    assert (found.piece_count, found.shard_count, found.total_bytes) == (4, 2, 194)
    assert list(found.shards()) == [
        ShardEntry(rank=0, number=0, attempt=ATTEMPT, size_bytes=98, digests=bytes(range(16))),
        ShardEntry(rank=1, number=0, attempt=ATTEMPT, size_bytes=96, digests=bytes(range(16))),
    ]


def test_a_rank_may_write_under_an_attempt_of_its_own_and_shards_without_pieces() -> None:
    other = section(5, [9, 200, 73], [(0, (0, 0), (4, 4), 1, 100)], attempt=OTHER_ATTEMPT)
    made = made_of([other], tensors={"w": TENSORS["model.weight"]}, paths={})

    found = Index.decode(made.encode(), key=KEY)

    assert [(shard.number, shard.size_bytes) for shard in found.shards()] == [(0, 9), (1, 200), (2, 73)]
    assert list(found.shards()) == [found.shard(5, number) for number in range(3)]
    assert {shard.attempt for shard in found.shards()} == {OTHER_ATTEMPT}
    assert found.shard(5, 2).digests == other.digests[-16:]
    assert found.all_pieces()["w"][0].number == 1


def test_version_1_as_it_was_first_written_is_read() -> None:
    """An object from a store, but for its compression: whatever changes in the code, this stays readable."""
    header = {
        "format_version": 1,
        "attempt": ATTEMPT,
        "block_bytes": 4 * MIB,
        "tensors": {"w": ["int8", [1, 8], 3], "s": ["int8", [], 3]},
        "values": {"lr": 1.0e-3, "b": {"$tuple": [1]}},
        "paths": {"w": ["model", {"key": 0}, "w"]},
        "ranks": [[3, OTHER_ATTEMPT, 2, 296, 3, 0, 0, ""]],
    }
    written = (
        b"\x02\x88\x00\xa0\x00"  # the sizes of its shards: 136 and 160
        b"\x00\x01\x02\x03\x04\x05\x06\x07\x01\x01\x02\x03\x04\x05\x06\x07"  # their digests
        b"\x01\x00\x01\xff"  # tensors, each less the one before: 0, 1 and 0
        b"\x01\x00\x00\x01"  # the numbers of their shards, in the same way: 0, 0 and 1
        b"\x02\x80\x00\x02\x00\x88\x00"  # gaps: 128, 2 and 136
        b"\x01\x00\x00\x01\x01\x01"  # along the first axis: offsets 0 and 0, sizes 1 and 1
        b"\x01\x00\x04\x01\x04\x04"  # along the second: offsets 0 and 4, sizes 4 and 4
    )

    found = Index.decode(whole(header, [frame(written)]), key=KEY)

    assert found.tensors == {"w": TensorEntry("int8", (1, 8)), "s": TensorEntry("int8", ())}
    assert found.all_pieces()["w"] == [
        ChunkEntry(offsets=(0, 0), sizes=(1, 4), rank=3, number=0, start=128),
        ChunkEntry(offsets=(0, 4), sizes=(1, 4), rank=3, number=1, start=136),
    ]
    assert found.all_pieces()["s"] == [ChunkEntry(offsets=(), sizes=(), rank=3, number=0, start=134)]
    assert found.shard(3, 1) == ShardEntry(3, 1, OTHER_ATTEMPT, 160, bytes([1, 1, 2, 3, 4, 5, 6, 7]))
    assert found.values == {"lr": 0.001, "b": {"$tuple": [1]}}
    assert found.paths == {"w": ["model", {"key": 0}, "w"]}


# -- consistency of what ranks wrote ---------------------------------------------------------------------------

FAR = 2**62
SPOILED: dict[str, tuple[list[Section], str]] = {
    "hole": ([section(0, *SECTIONS[0]), section(1, [96], [(2, (0, 0), (0, 3), 0, 96)])], "is not tiled"),
    "no piece of a scalar": (
        [section(0, [98], [(0, (0, 0), (2, 4), 0, 64)]), section(1, *SECTIONS[1])],
        "is not tiled",
    ),
    "two pieces of a scalar": (
        [section(0, *SECTIONS[0]), section(1, [99], [*SECTIONS[1][1], (1, (), (), 0, 97)])],
        "is not tiled",
    ),
    "piece twice": (
        [section(0, *SECTIONS[0]), section(1, *SECTIONS[1]), section(2, [96], [(0, (2, 0), (2, 4), 0, 64)])],
        "is not tiled",
    ),
}


def spoiled(piece: Piece) -> list[Section]:
    """Return what the ranks wrote, with another piece of the weight on rank 1."""
    return [section(0, *SECTIONS[0]), section(1, [96], [piece, SECTIONS[1][1][1]])]


SPOILED |= {
    name: (spoiled(piece), reason)
    for name, piece, reason in [
        ("pieces overlap and leave a hole", (0, (1, 0), (2, 4), 0, 64), "is not tiled"),
        ("piece too short", (0, (2, 0), (1, 4), 0, 64), "is not tiled"),
        ("piece leaves the tensor", (0, (3, 0), (2, 4), 0, 64), "leaves the tensor"),
        ("piece wider than the tensor", (0, (2, 0), (2, 5), 0, 64), "leaves the tensor"),
        ("negative offset", (0, (-2, 0), (2, 4), 0, 64), "leaves the tensor"),
        ("negative size", (0, (2, 0), (-2, -4), 0, 64), "leaves the tensor"),
        ("offset beyond 64 bits", (0, (2**63 - 1, 0), (2**63 - 1, 4), 0, 64), "leaves the tensor"),
        ("the lowest size", (0, (0, 0), (-(2**63), 4), 0, 64), "leaves the tensor"),
        ("no shard of that number", (0, (2, 0), (2, 4), 1, 64), "or its shard"),
        ("negative shard", (0, (2, 0), (2, 4), -1, 64), "or its shard"),
        ("shard beyond all", (0, (2, 0), (2, 4), FAR, 64), "or its shard"),
        ("piece leaves its shard", (0, (2, 0), (2, 4), 0, 65), "or its shard"),
        ("piece far beyond its shard", (0, (2, 0), (2, 4), 0, FAR), "or its shard"),
        ("piece beyond 64 bits", (0, (2, 0), (2, 4), 0, 2**63 - 1), "or its shard"),
        ("piece in the length of the header", (0, (2, 0), (2, 4), 0, 7), "or its shard"),
        ("negative start", (0, (2, 0), (2, 4), 0, -64), "or its shard"),
        ("the lowest start", (0, (2, 0), (2, 4), 0, -(2**63)), "or its shard"),
    ]
}
ONE = SECTIONS[1][1]
SPOILED |= {
    name: ([section(0, *SECTIONS[0]), bad], reason)
    for name, bad, reason in [
        ("empty piece beyond its shard", section(1, [96], [ONE[0], (2, (0, 0), (0, 3), 0, 97)]), "or its shard"),
        ("no shard", section(1, [], ONE), "or its shard"),
        (
            "two pieces share bytes",
            section(1, [96], [*ONE, (1, (), (), 0, 94)]),
            r"share byte 94 of shard \(1, 0\)",
        ),
        (
            "a piece in another",
            section(1, [96], [*ONE, (1, (), (), 0, 66)]),
            r"share byte 66 of shard \(1, 0\)",
        ),
        ("too few digests", section(1, [96], ONE, digests=bytes(8)), "cannot be decoded"),
        ("too many digests", section(1, [96], ONE, digests=bytes(24)), "cannot be decoded"),
        ("shard without data", section(1, [8], ONE), "shard without data"),
        ("negative shard size", section(1, [-96], ONE), "shard without data|counts that cannot be"),
        ("shard beyond any store", section(1, [2**60], ONE, digests=b""), "beyond any store|counts that cannot be"),
        ("digests of more than there is", section(1, [2**52], ONE, digests=b""), "cannot hold the digests"),
    ]
}
"""What is wrong → (what the ranks wrote, what the message says)."""


@pytest.mark.parametrize(("sections", "reason"), SPOILED.values(), ids=SPOILED.keys())
def test_an_inconsistent_section_is_refused_by_the_writer_and_by_a_reader(sections: list[Section], reason: str) -> None:
    made = made_of(sections)

    with pytest.raises(ManifestError, match=reason):
        made.check()
    with pytest.raises(ManifestError, match=reason) as caught:
        Index.decode(made.encode(), key=KEY)

    assert caught.value.key == KEY
    assert KEY in str(caught.value)
    assert "restore an older step" in str(caught.value)


def test_pieces_out_of_the_order_of_their_bytes_cannot_hide_that_they_share_some() -> None:
    """Written by hand: the library itself sorts them."""
    header, (first, second) = parts()
    header["tensors"]["model.weight"] = ["float32", [4, 4], 1]
    # Three pieces of one shard: [64, 80), a step back to [64, 128) of the same bytes.
    hand = (
        b"\x02\x80\x00" + bytes(16) + b"\x01\x00\x00" + b"\x01\x00\x00" + b"\x01\x40\xf0"
        b"\x01\x00\x01\x01\x01\x03\x01\x00\x00\x01\x04\x04"
    )
    header["ranks"][1][2:5] = [1, 128, 2]

    with pytest.raises(ManifestError, match=r"share byte 64 of shard \(1, 0\)"):
        Index.decode(whole(header, [frame(first), frame(hand)]), key=KEY)
    assert second != hand


# -- consistency of the header and its table -------------------------------------------------------------------


def spoil(*way: Any) -> Callable[[dict[str, Json]], None]:
    """Return a change that puts the last argument to where the others lead."""

    def change(made: dict[str, Json]) -> None:
        place: Any = made
        for step in way[:-2]:
            place = place[step]
        place[way[-2]] = way[-1]

    return change


WEIGHT = ("tensors", "model.weight")
RANK = ("ranks", 1)
INCONSISTENT: dict[str, tuple[Callable[[dict[str, Json]], Any], str]] = {
    "unknown dtype": (spoil(*WEIGHT, 0, "float31"), "has dtype 'float31'"),
    "dtype of torch that is no element type": (spoil(*WEIGHT, 0, "qint8"), "has dtype 'qint8'"),
    "wider dtype": (spoil(*WEIGHT, 0, "float64"), "or its shard"),
    "negative shape": (spoil(*WEIGHT, 1, [4, -4]), r"has shape \(4, -4\)"),
    "shape beyond any memory": (spoil(*WEIGHT, 1, [2**30, 2**30]), "has shape"),
    "larger shape": (spoil(*WEIGHT, 1, [5, 4]), "is not tiled"),
    "empty shape beyond any stride": (spoil("tensors", "model.none", 1, [0, 2**60]), "has shape"),
    "65 dimensions": (spoil(*WEIGHT, 1, [1] * 65), "has shape"),
    "fewer dimensions": (spoil(*WEIGHT, 1, [4]), "bytes follow its columns"),
    "more dimensions": (spoil(*WEIGHT, 1, [4, 4, 1, 1, 1, 1, 1, 1, 1]), "ends too early"),
    "a tensor less": (lambda made: made["tensors"].pop("model.none"), "of a tensor that is not listed"),
    "a tensor more": (spoil("tensors", "x", ["int8", [1], -1]), "'x' is not tiled"),
    "a writer of its own": (spoil(*WEIGHT, 2, 1), "was not all written by rank 1 alone"),
    "no writer of its own": (spoil("tensors", "model.scale", 2, -1), "was not all written by rank -1"),
    "another writer": (spoil("tensors", "model.scale", 2, 1), "was not all written by rank 1"),
    "a writer that wrote nothing": (spoil(*WEIGHT, 2, 7), "by rank 7, which wrote nothing"),
    "rank twice": (spoil(*RANK, 0, 0), "rank 0 is listed twice|rank 1, which wrote nothing"),
    "rank twice, and no other": (
        lambda made: (made.update(tensors={}), spoil(*RANK, 0, 0)(made)),
        "rank 0 is listed twice",
    ),
    "ranks out of order": (lambda made: made["ranks"].reverse(), "rank 0 is listed twice, or out of order"),
    "negative rank": (spoil("ranks", 0, 0, -1), "wrote nothing|listed twice"),
    "rank without end": (spoil(*RANK, 0, 10**300), "rank 1, which wrote nothing"),
    "no attempt of a rank": (spoil(*RANK, 1, "../x"), "attempt '../x' of rank 1 is no attempt id"),
    "fewer shards": (spoil(*RANK, 2, 0), "cannot be decoded"),
    "more shards": (spoil(*RANK, 2, 2), "cannot be decoded"),
    "negative shards": (spoil(*RANK, 2, -1), "counts that cannot be"),
    "fewer bytes stored": (spoil(*RANK, 3, 95), "have not 95 bytes together"),
    "fewer pieces": (spoil(*RANK, 4, 1), "cannot be decoded"),
    "more pieces": (spoil(*RANK, 4, 3), "cannot be decoded"),
    "pieces without end": (spoil(*RANK, 4, 2**52), "too short"),
    "negative pieces": (spoil(*RANK, 4, -1), "counts that cannot be"),
    "no block size": (spoil("block_bytes", 0), "block_bytes is 0"),
    "negative block size": (spoil("block_bytes", -64), "block_bytes is -64"),
    "block larger than a reader holds": (spoil("block_bytes", MAX_BLOCK_BYTES + 1), "block_bytes is"),
    "smaller blocks": (spoil("block_bytes", 32), "cannot be decoded"),
    "name both tensor and value": (spoil("values", "model.weight", 1), "'model.weight' is both a tensor and a value"),
    "no attempt": (spoil("attempt", ""), "attempt '' is no attempt id"),
    "path without steps": (spoil("paths", "model.weight", []), "the path of 'model.weight' has 0 steps"),
    "path without end": (spoil("paths", "model.weight", ["a"] * 66), "the path of 'model.weight' has 66 steps"),
    "unknown field": (spoil("comment", "x"), "cannot be decoded"),
    "unknown field of a tensor": (lambda made: made["tensors"]["model.weight"].append(0), "cannot be decoded"),
    "missing field": (lambda made: made.pop("paths"), "cannot be decoded"),
    "missing field of a tensor": (lambda made: made["tensors"]["model.weight"].pop(), "cannot be decoded"),
    "missing version": (lambda made: made.pop("format_version"), "cannot be decoded"),
}
"""What is wrong → (the change of the header that makes it so, what the message says)."""


@pytest.mark.parametrize(("change", "reason"), INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_an_inconsistent_header_is_refused_and_says_why(change: Callable[[dict[str, Json]], Any], reason: str) -> None:
    header, sections = parts()
    change(header)

    with pytest.raises(ManifestError, match=reason) as caught:
        Index.decode(whole(header, [frame(data) for data in sections]), key=KEY)

    assert caught.value.key == KEY
    assert KEY in str(caught.value)
    assert "restore an older step" in str(caught.value)


TABLE: dict[str, tuple[Callable[[dict[str, Json]], Any], str]] = {
    "another size of a frame": (
        lambda made: made["ranks"][0].__setitem__(5, made["ranks"][0][5] + 1),
        "have not|its sections have",
    ),
    "sizes that cancel": (
        lambda made: (
            made["ranks"][0].__setitem__(5, made["ranks"][0][5] - 1),
            made["ranks"][1].__setitem__(5, made["ranks"][1][5] + 1),
        ),
        "has not the digest",
    ),
    "a negative size": (spoil(*RANK, 5, -1), "counts that cannot be"),
    "another decoded size": (spoil(*RANK, 6, 35), "has not the size|too short"),
    "more than is read": (spoil(*RANK, 6, 2**40), "more than is read"),
    "another digest": (spoil(*RANK, 7, "0" * 16), "has not the digest"),
    "no digest": (spoil(*RANK, 7, ""), "has not the digest"),
    "a rank less": (lambda made: made["ranks"].pop(), "rank 1, which wrote nothing"),
}
"""What is wrong in the table of the ranks → (the change that makes it so, what the message says)."""


@pytest.mark.parametrize(("change", "reason"), TABLE.values(), ids=TABLE.keys())
def test_a_table_that_is_not_of_these_sections_is_refused(
    change: Callable[[dict[str, Json]], Any], reason: str
) -> None:
    header, sections = parts()
    frames = [frame(data) for data in sections]
    whole(header, frames)
    change(header)

    with pytest.raises(ManifestError, match=reason):
        Index.decode(whole(header, frames, is_true=False), key=KEY)


def test_sections_that_are_swapped_doubled_or_missing_are_refused() -> None:
    header, sections = parts()
    frames = [frame(data) for data in sections]
    whole(header, frames)

    for other in (frames[::-1], frames[:1], frames[1:], [*frames, frames[0]], [frames[0], frames[0]], []):
        with pytest.raises(ManifestError):
            Index.decode(whole(header, other, is_true=False), key=KEY)
    with pytest.raises(ManifestError):
        Index.decode(whole(header, frames[::-1]), key=KEY)


NUMBERS: list[tuple[Any, ...]] = [
    ("format_version",),
    ("block_bytes",),
    (*WEIGHT, 1, 0),
    (*WEIGHT, 2),
    *((*RANK, place) for place in (0, 2, 3, 4, 5, 6)),
    ("paths", "config", 1),
]


@pytest.mark.parametrize("way", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [float, bool, str, lambda number: [number], lambda number: None],
    ids=["float", "bool", "str", "list", "null"],
)
def test_a_number_of_another_type_is_refused(way: tuple[Any, ...], kind: Callable[[int], Any]) -> None:
    header, sections = parts()
    frames = [frame(data) for data in sections]
    whole(header, frames)
    place: Any = header
    for step in way:
        place = place[step]
    changed = kind(place)
    if way[0] == "paths" and isinstance(changed, str):
        changed = [changed]  # a step may be text
    spoil(*way, changed)(header)

    with pytest.raises(ManifestError, match="cannot be decoded"):
        Index.decode(whole(header, frames, is_true=False), key=KEY)


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


lenient = settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])


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
    half = (1 << 19, 1 << 20)

    assert is_accepted(
        of_tensor((1 << 20, 1 << 20), [((0, 0), half), ((1 << 19, 0), half)], block_bytes=MAX_BLOCK_BYTES)
    )


def test_the_check_leaves_the_random_numbers_of_the_training_alone() -> None:
    import random

    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)

    INDEX.check()

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
    index = of_tensor(shape, boxes, block_bytes=MAX_BLOCK_BYTES)

    assert is_accepted(Index.decode(index.encode(), key=KEY))
    assert not is_accepted(of_tensor(shape, boxes[1:], block_bytes=MAX_BLOCK_BYTES))


# -- text ----------------------------------------------------------------------------------------------------

DATA = INDEX.encode()
HEAD_BYTES = struct.unpack("<Q", DATA[16:24])[0]
TEXT = zstandard.ZstdDecompressor().decompress(DATA[24 : 24 + HEAD_BYTES])
SECTION_FRAMES = DATA[24 + HEAD_BYTES :]


def with_header(text: bytes) -> bytes:
    """Return the index with another text, or any other frame's content, for its header."""
    return with_head(frame(text))


def with_head(head: bytes) -> bytes:
    return MAGIC + struct.pack("<Q", len(head)) + head + SECTION_FRAMES


def test_the_header_is_compact_json_with_its_fields_in_order() -> None:
    assert json.dumps(json.loads(TEXT), separators=(",", ":"), ensure_ascii=False).encode() == TEXT
    assert list(json.loads(TEXT)) == [
        "format_version",
        "attempt",
        "block_bytes",
        "tensors",
        "values",
        "paths",
        "ranks",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"block_bytes":64', b'"block_bytes":64,"block_bytes":64'),
        (b'"format_version":1', b'"format_version":2,"format_version":1'),
        (b'"model.scale":["bfloat16"', b'"model.weight":["bfloat16"'),
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
        Index.decode(with_header(TEXT.replace(old, new)), key=KEY)


def test_another_spelling_of_the_same_record_is_read() -> None:
    """What a later release, or another library, would write for the same numbers and texts."""
    spelled = TEXT.replace(b"0.95", b"95e-2").replace("Ω".encode(), b"\\u03a9").replace(b",", b", ")

    assert content_of(Index.decode(with_header(spelled), key=KEY)) == content_of(INDEX)


@pytest.mark.parametrize("version", [SHARING_VERSION + 1, 99, 10**30])
def test_a_newer_index_says_to_upgrade_whatever_else_it_holds(version: int) -> None:
    text = json.dumps({"format_version": version, "pieces": [], "attempt": None}).encode()

    with pytest.raises(FormatVersionError, match="upgrade cloudckpt to read it") as caught:
        Index.decode(with_header(text), key=KEY)

    assert caught.value.key == KEY


def test_what_does_not_begin_as_an_index_is_none() -> None:
    for data in (frame(TEXT), TEXT, b"", MAGIC[:-1], MAGIC.upper() + DATA[16:], b"safetensors"):
        with pytest.raises(ManifestError, match="is no index of a checkpoint"):
            Index.decode(data, key=KEY)


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_not_newer(version: int) -> None:
    made = json.dumps({**json.loads(TEXT), "format_version": version}).encode()

    with pytest.raises(ManifestError, match=f"has format version {version}; restore") as caught:
        Index.decode(with_header(made), key=KEY)

    assert not isinstance(caught.value, FormatVersionError)


def test_a_name_that_is_no_text_is_refused_at_the_save() -> None:
    with pytest.raises(UnsupportedValueError, match=r"'a\\udc80' has lone surrogates") as caught:
        made_of([], tensors={}, values={"a\udc80": 1}, paths={}).encode()

    assert caught.value.key == "a\udc80"


def test_a_message_about_foreign_text_is_short_and_printable() -> None:
    name = "\x1b[31m\n" + "x" * 100_000
    both = {**json.loads(TEXT), "values": {name: 1}}
    both["tensors"][name] = both["tensors"]["model.scale"]

    for made in (both, {**json.loads(TEXT), name: 1}):
        with pytest.raises(ManifestError, match=r"both a tensor and a value|cannot be decoded") as caught:
            Index.decode(with_header(json.dumps(made).encode()), key=KEY)
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()


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
    head = DATA[24 : 24 + HEAD_BYTES]

    assert content_of(Index.decode(with_head(stating(head, len(TEXT))), key=KEY)) == content_of(INDEX)
    for size in (0, 1, len(TEXT) - 1, len(TEXT) + 1, 16 * MIB):
        with pytest.raises(ManifestError):
            Index.decode(with_head(stating(head, size)), key=KEY)


HUGE = [2**24 + 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.mark.parametrize("size", HUGE)
def test_a_size_that_such_a_frame_cannot_have_is_refused_before_memory_is_taken(size: int) -> None:
    header, (first, second) = parts()
    frames = [frame(first), frame(second)]
    whole(header, frames)
    frames[1] = stating(frames[1], size)
    header["ranks"][1][5:] = [len(frames[1]), len(second), xxhash.xxh3_64_hexdigest(frames[1])]
    data = whole(header, frames, is_true=False)

    assert peak_of(lambda: Index.decode(with_head(stating(DATA[24 : 24 + HEAD_BYTES], size)), key=KEY)) < MIB
    assert peak_of(lambda: Index.decode(data, key=KEY)) < MIB


@pytest.mark.parametrize("size", [2**20, 2**32, 2**53, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_object_is_refused(size: int) -> None:
    assert peak_of(lambda: Index.decode(MAGIC + struct.pack("<Q", size) + DATA[24:], key=KEY)) < MIB


@pytest.mark.parametrize("text", [b"[", b" ", b"0,", b'{"a":', b"\0"])
def test_a_small_frame_of_much_text_is_refused_before_memory_is_taken(text: bytes) -> None:
    bomb = frame(text * (64 * MIB // len(text)))
    assert len(bomb) < 64 * 1024

    assert peak_of(lambda: Index.decode(with_head(bomb), key=KEY)) < MIB


def test_sections_that_are_small_each_and_large_together_are_refused_before_memory_is_taken() -> None:
    header, _ = parts()
    bomb = frame(bytes(15 * MIB))
    header["ranks"] = [[rank, "", 0, 0, 1, 0, 0, ""] for rank in range(1000)]
    data = whole(header, [bomb] * 1000)

    assert peak_of(lambda: Index.decode(data, key=KEY)) < 2 * MIB


def test_a_frame_that_hides_its_size_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)

    with pytest.raises(ManifestError, match="states -1 decoded bytes"):
        Index.decode(with_head(hidden), key=KEY)


def test_columns_that_claim_more_than_their_section_holds_are_refused_before_memory_is_taken() -> None:
    """2 million rows of 64 dimensions would take 2 GiB; the section has 6 MB for them."""
    shape, rows = [1] * 64, 2_000_000
    header = {**json.loads(TEXT), "tensors": {"w": ["int8", shape, 0]}, "values": {}, "paths": {}}
    header["ranks"] = [[0, "", 0, 0, rows, 0, 0, ""]]
    columns = b"\x01" + b"".join(b"\x01" + bytes(rows) for _ in range(3))
    data = whole(header, [frame(columns)])

    assert peak_of(lambda: Index.decode(data, key=KEY).check()) < 128 * MIB


def test_an_index_that_a_reader_would_refuse_is_refused_at_the_save() -> None:
    sections = [section(0, *SECTIONS[0]), section(1, *SECTIONS[1])]
    data = made_of(sections, values={"log": ""}).encode()
    text = zstandard.ZstdDecompressor().decompress(data[24:])
    room = 16 * MIB - len(text) - sum(map(len, parts(data)[1]))

    fits = made_of(sections, values={"log": "x" * room})
    assert Index.decode(fits.encode(), key=KEY).values == fits.values
    with pytest.raises(OptionsError, match="save long lists of numbers as tensors"):
        made_of(sections, values={"log": "x" * (room + 1)}).encode()


def test_an_object_over_the_limit_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "INDEX_LIMIT_BYTES", len(DATA) - 1)

    with pytest.raises(ManifestError, match="more than is read"):
        Index.decode(DATA, key=KEY)
    with pytest.raises(OptionsError, match="more than a reader accepts"):
        INDEX.encode()


def test_what_follows_the_sections_or_the_header_is_refused() -> None:
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"

    for spoiled_data in (DATA + b"\0", DATA + DATA, DATA + skippable, b"\0" + DATA, DATA[1:], skippable, b"", MAGIC):
        with pytest.raises(ManifestError):
            Index.decode(spoiled_data, key=KEY)
    for behind in (b"\0", skippable, frame(b"")):
        with pytest.raises(ManifestError):
            Index.decode(with_head(DATA[24 : 24 + HEAD_BYTES] + behind), key=KEY)


def test_every_truncation_is_refused() -> None:
    for size in range(len(DATA)):
        with pytest.raises(ManifestError):
            Index.decode(DATA[:size], key=KEY)


def test_every_flipped_bit_is_refused_or_leaves_an_index_that_is_consistent() -> None:
    """Whether the bytes are those that were committed, the manifest's digest says; here nothing else may escape."""
    data = bytearray(DATA)

    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            Index.decode(bytes(data), key=KEY).check()
        except ManifestError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8

    assert refused > 4 * len(data)


def test_every_flipped_bit_of_a_section_with_a_right_digest_is_refused_or_consistent() -> None:
    header, sections = parts()
    refused = 0
    for place, data in enumerate(sections):
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            frames = [frame(bytes(changed)) if at == place else frame(other) for at, other in enumerate(sections)]
            try:
                Index.decode(whole(header, frames), key=KEY).check()
            except ManifestError:
                refused += 1

    assert refused > 2 * sum(map(len, sections))


@settings(max_examples=examples(1000))
@given(st.integers(0, 1), st.integers(0, 60), st.integers(0, 12), st.binary(max_size=12))
def test_other_bytes_in_a_section_are_refused_or_leave_an_index_that_is_consistent(
    place: int, start: int, length: int, other: bytes
) -> None:
    header, sections = parts()
    data = sections[place]
    sections[place] = data[:start] + other + data[start + length :]
    try:
        found = Index.decode(whole(header, [frame(data) for data in sections]), key=KEY)
    except ManifestError:
        return

    found.check()
    assert content_of(Index.decode(found.encode(), key=KEY)) == content_of(found)


@settings(max_examples=examples(1000))
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 30), st.binary(max_size=30) | st.text('[]{},:"0123456789-.eE'))
def test_other_text_in_a_right_frame_is_refused_or_leaves_an_index_that_is_consistent(
    start: int, length: int, other: bytes | str
) -> None:
    spliced = other.encode() if isinstance(other, str) else other
    try:
        found = Index.decode(with_header(TEXT[:start] + spliced + TEXT[start + length :]), key=KEY)
    except ManifestError:
        return

    found.check()
    assert content_of(Index.decode(found.encode(), key=KEY)) == content_of(found)
