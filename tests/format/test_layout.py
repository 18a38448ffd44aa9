"""Every element has exactly one place, every place can be computed, and a read takes the blocks that it needs."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from cloudckpt.format import layout
from cloudckpt.format.boxes import Box
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.layout import Piece, ShardLayout, Span, lay_out, plan_spans, split_box
from tests.effort import examples

METADATA = {"cloudckpt": "0123456789abcdef"}


def chunk(name: str, *shape: int, dtype: str = "float32", offsets: Any = None, sizes: Any = None) -> Box:
    return Box(name, dtype, shape, offsets or (0,) * len(shape), shape if sizes is None else sizes)


@st.composite
def any_chunk(draw: st.DrawFn) -> Box:
    """A box of a tensor of up to four small dimensions, empty and 0-d ones included."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    sizes = [draw(st.integers(0, extent)) for extent in shape]
    offsets = [draw(st.integers(0, extent - size)) for extent, size in zip(shape, sizes, strict=True)]
    name = draw(st.sampled_from(["w", "v", "__metadata__", "w[0:1]", "Ω", ""]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return chunk(name, *shape, dtype=dtype, offsets=tuple(offsets), sizes=tuple(sizes))


any_chunks = st.lists(any_chunk(), max_size=8)
any_limit = st.integers(1, 300)


def elements(one: Box, piece: Piece) -> list[int]:
    """Return which elements of its chunk a piece holds, numbered in the chunk's row-major order."""
    numbers = np.arange(math.prod(one.sizes)).reshape(one.sizes)
    box = tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(piece.offsets, one.offsets, piece.sizes, strict=True)
    )
    return np.atleast_1d(numbers[box]).reshape(-1).tolist()


def pieces_of(shards: list[ShardLayout], number: int) -> list[Piece]:
    return [piece for shard in shards for piece in shard.pieces if piece.chunk == number]


def content(number: int, nbytes: int) -> bytes:
    """Return bytes that differ from chunk to chunk and from place to place."""
    return b"".join(struct.pack("<HH", number, place) for place in range(-(-nbytes // 4)))[:nbytes]


def build(shard: ShardLayout, contents: list[bytes]) -> bytes:
    return shard.header + b"".join(
        contents[piece.chunk][piece.local_start : piece.local_start + piece.nbytes] for piece in shard.pieces
    )


# -- shards --------------------------------------------------------------------------------------------------


@settings(max_examples=examples(200))
@given(any_chunks, any_limit)
def test_every_element_is_in_exactly_one_piece_and_where_the_piece_says(chunks: list[Box], limit: int) -> None:
    shards = lay_out(chunks, shard_bytes=limit, metadata=METADATA)

    for number, one in enumerate(chunks):
        held = []
        for piece in pieces_of(shards, number):
            first = piece.local_start // one.itemsize_bytes
            numbers = elements(one, piece)
            assert numbers == list(range(first, first + len(numbers))), "not contiguous in the chunk's own order"
            assert piece.local_start == first * one.itemsize_bytes
            assert piece.nbytes == len(numbers) * one.itemsize_bytes
            held += numbers
        assert sorted(held) == list(range(math.prod(one.sizes)))


@settings(max_examples=examples(200))
@given(any_chunks, any_limit)
def test_no_shard_exceeds_its_size_unless_one_element_does(chunks: list[Box], limit: int) -> None:
    for shard in lay_out(chunks, shard_bytes=limit, metadata=METADATA):
        if shard.size_bytes - len(shard.header) > limit:
            (piece,) = (piece for piece in shard.pieces if piece.nbytes)
            assert math.prod(piece.sizes) == 1


@settings(max_examples=examples(200))
@given(any_chunks, any_limit)
def test_pieces_fill_their_shard_without_holes_and_aligned(chunks: list[Box], limit: int) -> None:
    shards = lay_out(chunks, shard_bytes=limit, metadata=METADATA)

    assert [shard.number for shard in shards] == list(range(len(shards)))
    for shard in shards:
        at = len(shard.header)
        for piece in shard.pieces:
            assert piece.start == at
            assert piece.start % chunks[piece.chunk].itemsize_bytes == 0
            at += piece.nbytes
        assert shard.size_bytes == at


@given(any_chunks, any_limit)
def test_every_chunk_has_a_place_even_an_empty_one(chunks: list[Box], limit: int) -> None:
    shards = lay_out(chunks, shard_bytes=limit, metadata=METADATA)

    assert {piece.chunk for shard in shards for piece in shard.pieces} == set(range(len(chunks)))
    assert [shard for shard in shards if not shard.pieces] == []


@given(any_chunks, any_limit)
def test_the_same_chunks_have_the_same_layout(chunks: list[Box], limit: int) -> None:
    assert lay_out(chunks, shard_bytes=limit, metadata=METADATA) == lay_out(
        list(chunks), shard_bytes=limit, metadata=dict(METADATA)
    )


@settings(max_examples=examples(200))
@given(any_chunks, any_limit)
def test_the_safetensors_library_finds_every_piece(chunks: list[Box], limit: int) -> None:
    contents = [content(number, one.nbytes) for number, one in enumerate(chunks)]
    # A bool of another value than 0 and 1 is no value that a tensor may hold.
    contents = [bytes(map((1).__and__, data)) for data in contents]

    for shard in lay_out(chunks, shard_bytes=limit, metadata=METADATA):
        found = load(build(shard, contents))
        assert len(found) == len(shard.pieces)
        for name, piece in zip(names_of(shard), shard.pieces, strict=True):
            one = chunks[piece.chunk]
            tensor = found[name]
            assert tensor.dtype in (DTYPES[one.dtype], torch.uint8)
            assert tuple(tensor.shape) == (piece.sizes if tensor.dtype == DTYPES[one.dtype] else (piece.nbytes,))
            expected = contents[piece.chunk][piece.local_start : piece.local_start + piece.nbytes]
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == expected


def names_of(shard: ShardLayout) -> list[str]:
    (size_bytes,) = struct.unpack("<Q", shard.header[:8])
    header = json.loads(shard.header[8 : 8 + size_bytes])
    return [name for name in header if name != "__metadata__"]


def test_no_chunks_need_no_shard() -> None:
    assert lay_out([], shard_bytes=64, metadata=METADATA) == []


def test_small_neighbours_share_a_shard_in_their_order() -> None:
    chunks = [chunk(name, 4) for name in "abcde"]

    shards = lay_out(chunks, shard_bytes=32, metadata=METADATA)

    assert [[piece.chunk for piece in shard.pieces] for shard in shards] == [[0, 1], [2, 3], [4]]


def test_wider_types_come_first_within_a_shard() -> None:
    chunks = [chunk("a", 3, dtype="uint8"), chunk("b", 1, dtype="complex128"), chunk("c", 3, dtype="float16")]

    (shard,) = lay_out(chunks, shard_bytes=64, metadata=METADATA)

    assert [piece.chunk for piece in shard.pieces] == [1, 2, 0]


def test_a_part_is_named_with_its_slice_and_a_whole_tensor_plainly() -> None:
    chunks = [
        chunk("whole", 2, 3),
        chunk("part", 4, 3, offsets=(2, 0), sizes=(2, 3)),
        chunk("scalar"),
        chunk("nothing", 4, 0, offsets=(4, 0), sizes=(0, 0)),
        chunk("none", 0, 3),
    ]

    (shard,) = lay_out(chunks, shard_bytes=1024, metadata=METADATA)

    assert names_of(shard) == ["whole", "part[2:4,0:3]", "scalar", "nothing[4:4,0:0]", "none"]


def test_names_that_collide_are_numbered() -> None:
    chunks = [
        chunk("w", 2, offsets=(0,), sizes=(1,)),
        chunk("w[0:1]", 1),
        chunk("w[0:1]#2", 1),
        chunk("__metadata__", 1),
        chunk("__metadata__#2", 1),
    ]

    (shard,) = lay_out(chunks, shard_bytes=1024, metadata=METADATA)

    names = names_of(shard)
    assert names == ["w[0:1]", "w[0:1]#2", "w[0:1]#2#2", "__metadata__#2", "__metadata__#2#2"]
    assert sorted(load(build(shard, [content(n, 4) for n in range(5)]))) == sorted(names)


def test_a_chunk_larger_than_a_shard_is_cut_into_whole_rows() -> None:
    shards = lay_out([chunk("w", 10, 4)], shard_bytes=3 * 16 + 15, metadata=METADATA)

    assert [(piece.offsets, piece.sizes) for shard in shards for piece in shard.pieces] == [
        ((0, 0), (3, 4)),
        ((3, 0), (3, 4)),
        ((6, 0), (3, 4)),
        ((9, 0), (1, 4)),
    ]


def test_a_row_larger_than_a_shard_is_cut_along_later_axes() -> None:
    parts = list(split_box((2, 3, 4), limit=5))

    assert parts == [((row, line, 0), (1, 1, 4)) for row in range(2) for line in range(3)]
    assert list(split_box((2, 7), limit=3))[:3] == [((0, 0), (1, 3)), ((0, 3), (1, 3)), ((0, 6), (1, 1))]


def test_offsets_of_a_cut_chunk_count_from_the_whole_tensor() -> None:
    shards = lay_out([chunk("w", 100, 8, offsets=(40, 2), sizes=(4, 4))], shard_bytes=2 * 4 * 4, metadata=METADATA)

    assert [(piece.offsets, piece.sizes) for shard in shards for piece in shard.pieces] == [
        ((40, 2), (2, 4)),
        ((42, 2), (2, 4)),
    ]


def test_an_element_larger_than_a_shard_has_one_of_its_own() -> None:
    shards = lay_out([chunk("w", 2, dtype="complex128"), chunk("v", 1)], shard_bytes=8, metadata=METADATA)

    assert [[piece.nbytes for piece in shard.pieces] for shard in shards] == [[16], [16], [4]]


def test_as_many_boxes_are_cut_as_needed_and_no_more() -> None:
    """One put each: a layout with twice the shards costs twice the requests."""
    assert len(list(split_box((1000, 1000), limit=1000 * 1000))) == 1
    assert len(list(split_box((1000, 1000), limit=250 * 1000))) == 4
    assert len(list(split_box((3, 1 << 40), limit=1 << 38))) == 12


@pytest.mark.parametrize("name", ["layer.weight", "\x01" * 50, "重み" * 40])
def test_a_header_stays_below_its_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers refuse a header over 100 MB, and no `shard_bytes` bounds the names of empty or tiny tensors."""
    monkeypatch.setattr(layout, "_HEADER_LIMIT_BYTES", 20_000)
    chunks = [chunk(f"{name}{number}", 0, 2**40, dtype="float64") for number in range(400)]

    shards = lay_out(chunks, shard_bytes=1 << 30, metadata=METADATA)

    assert [shard.number for shard in shards if len(shard.header) > 20_000] == []
    assert sum(len(shard.pieces) for shard in shards) == 400
    assert min(len(shard.pieces) for shard in shards[:-1]) > 20


# -- spans ---------------------------------------------------------------------------------------------------


@st.composite
def any_reads(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int]:
    size = draw(st.integers(1, 200))
    block = draw(st.integers(1, 20))
    span = block * draw(st.integers(1, 5))
    point = st.integers(0, size)
    ranges = draw(st.lists(st.tuples(point, point).map(lambda pair: (min(pair), max(pair))), max_size=10))
    return ranges, size, block, span


def blocks_of(start: int, stop: int, block: int) -> set[int]:
    return set(range(start // block, -(-stop // block))) if start < stop else set()


@settings(max_examples=examples(300))
@given(any_reads())
def test_spans_read_each_touched_block_once_and_no_other(reads: tuple[list[tuple[int, int]], int, int, int]) -> None:
    ranges, size, block, span = reads

    spans = plan_spans(ranges, size_bytes=size, block_bytes=block, span_bytes=span)

    read = [number for one in spans for number in sorted(blocks_of(one.start, one.stop, block))]
    assert read == sorted(set().union(*(blocks_of(start, stop, block) for start, stop in ranges)))


@settings(max_examples=examples(300))
@given(any_reads())
def test_spans_are_whole_blocks_of_at_most_one_span(reads: tuple[list[tuple[int, int]], int, int, int]) -> None:
    ranges, size, block, span = reads

    spans = plan_spans(ranges, size_bytes=size, block_bytes=block, span_bytes=span)

    assert [one for one in spans if one.start % block or (one.stop % block and one.stop != size)] == []
    assert [one for one in spans if not 0 < one.stop - one.start <= span or one.stop > size] == []


@settings(max_examples=examples(300))
@given(any_reads())
def test_neighbours_are_read_together_up_to_a_span(reads: tuple[list[tuple[int, int]], int, int, int]) -> None:
    ranges, size, block, span = reads

    spans = plan_spans(ranges, size_bytes=size, block_bytes=block, span_bytes=span)

    assert [a for a, b in pairwise(spans) if a.stop == b.start and a.stop - a.start < span] == []


@given(any_reads(), st.randoms())
def test_spans_do_not_depend_on_the_order_of_the_ranges(
    reads: tuple[list[tuple[int, int]], int, int, int], chance: Any
) -> None:
    ranges, size, block, span = reads
    shuffled = [*ranges, *ranges[:2]]
    chance.shuffle(shuffled)

    assert plan_spans(shuffled, size_bytes=size, block_bytes=block, span_bytes=span) == plan_spans(
        ranges, size_bytes=size, block_bytes=block, span_bytes=span
    )


def test_a_byte_costs_its_block_and_a_gap_of_one_block_is_not_read() -> None:
    spans = plan_spans([(25, 26), (45, 46), (5, 6), (12, 12)], size_bytes=48, block_bytes=10, span_bytes=20)

    assert spans == [Span(0, 10), Span(20, 30), Span(40, 48)]


def test_a_whole_object_is_read_in_full_spans() -> None:
    spans = plan_spans([(0, 45)], size_bytes=45, block_bytes=10, span_bytes=20)

    assert spans == [Span(0, 20), Span(20, 40), Span(40, 45)]


def test_nothing_wanted_reads_nothing() -> None:
    assert plan_spans([(7, 7)], size_bytes=45, block_bytes=10, span_bytes=20) == []
