"""A shard is a plain safetensors object, and no bit of it changes without its block's digest telling."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

from cloudckpt.errors import UnsupportedValueError
from cloudckpt.format.boxes import Box
from cloudckpt.format.codec import DTYPES
from cloudckpt.format.shard import DIGEST_BYTES, HeaderEntry, block_digests, encode_header, verify_blocks

SAFETENSORS_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""What safetensors 0.5 knows already; a reader refuses a whole object for one type that it does not know."""


def digests_of(data: bytes, block_bytes: int) -> bytes:
    """Digest each block by itself, by the words of the format."""
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    return b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(block)) for block in blocks)


def views(data: bytes, cuts: list[int]) -> list[memoryview]:
    """Cut `data` into buffers; two equal cuts make an empty one."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [memoryview(data)[start:stop] for start, stop in pairwise(edges)]


def entry(dtype: str, *, name: str = "w", shape: tuple[int, ...] = (3,)) -> HeaderEntry:
    return HeaderEntry(name, dtype, shape, Box(name, dtype, shape, (0,) * len(shape), shape).nbytes)


def header_of(data: bytes) -> dict[str, object]:
    (size_bytes,) = struct.unpack("<Q", data[:8])
    header: dict[str, object] = json.loads(data[8 : 8 + size_bytes])
    return header


# -- digests -------------------------------------------------------------------------------------------------


def test_the_digest_is_the_published_one() -> None:
    """Published test vectors of XXH3-64: a checkpoint must verify in ten years, and by other programs."""
    assert block_digests([memoryview(b"abc")], block_bytes=8) == bytes.fromhex("50392f89945faf78")
    assert block_digests([memoryview(b"")], block_bytes=8) == b""


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=12), st.integers(1, 64))
def test_digests_do_not_depend_on_how_the_bytes_are_cut(data: bytes, cuts: list[int], block_bytes: int) -> None:
    digests = block_digests(views(data, cuts), block_bytes=block_bytes)

    assert digests == digests_of(data, block_bytes)
    assert len(digests) == DIGEST_BYTES * -(-len(data) // block_bytes)


@given(st.binary(max_size=300), st.integers(1, 64), st.data())
def test_unchanged_blocks_pass_wherever_a_span_starts(data: bytes, block_bytes: int, draw: st.DataObject) -> None:
    digests = digests_of(data, block_bytes)
    blocks = -(-len(data) // block_bytes)
    first = draw.draw(st.integers(0, blocks))
    stop = draw.draw(st.integers(first, blocks))

    span = memoryview(data)[first * block_bytes : stop * block_bytes]

    assert verify_blocks(span, digests, first_block=first, block_bytes=block_bytes) is None


@pytest.mark.parametrize("first_block", [0, 3])
def test_every_flipped_bit_is_found_in_its_block(first_block: int) -> None:
    block_bytes = 16
    before = bytes(range(first_block * block_bytes))
    data = bytearray(bytes(range(100, 170)))  # four whole blocks and a short one
    digests = digests_of(before + data, block_bytes)

    missed = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found = verify_blocks(memoryview(data), digests, first_block=first_block, block_bytes=block_bytes)
        if found != first_block + bit // 8 // block_bytes:
            missed.append((bit, found))
        data[bit // 8] ^= 1 << bit % 8

    assert missed == []


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda data: data[16:32] + data[:16] + data[32:], 0),  # two blocks swapped
        (lambda data: data[:16] + data[:16] + data[32:], 1),  # a block doubled
        (lambda data: data[:-1], 2),  # cut inside the last block
        (lambda data: data + b"\0", 2),  # extended within the last block
        (lambda data: data + bytes(16), 2),  # extended by a block
        (lambda data: bytes(40), 0),  # lost pages read as zeros
    ],
    ids=["swapped", "doubled", "cut", "extended", "longer", "zeros"],
)
def test_blocks_that_are_moved_cut_or_extended_are_found(change: Callable[[bytes], bytes], bad: int) -> None:
    data = bytes(range(40))
    changed = change(data)

    found = verify_blocks(memoryview(changed), digests_of(data, 16), first_block=0, block_bytes=16)

    assert found == bad


def test_a_block_without_a_digest_is_bad() -> None:
    data = bytes(range(40))

    assert verify_blocks(memoryview(data), digests_of(data, 16)[:-8], first_block=0, block_bytes=16) == 2
    assert verify_blocks(memoryview(data), digests_of(data, 16), first_block=1, block_bytes=16) == 1


# -- header --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(max_size=30), st.sampled_from(sorted(DTYPES)), st.integers(0, 5)), max_size=8))
def test_the_data_starts_aligned_and_follows_the_entries_without_holes(parts: list[tuple[str, str, int]]) -> None:
    entries = [entry(dtype, name=f"{place}{name}", shape=(size,)) for place, (name, dtype, size) in enumerate(parts)]

    head = encode_header(entries, metadata={"cloudckpt": "x"})

    header = header_of(head)
    assert len(head) % 64 == 0
    assert struct.unpack("<Q", head[:8])[0] == len(head) - 8
    assert header.pop("__metadata__") == {"cloudckpt": "x"}
    assert list(header) == [one.name for one in entries]
    start = 0
    for one in entries:
        assert header[one.name]["data_offsets"] == [start, start + one.nbytes]  # type: ignore[index]
        start += one.nbytes


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_stored_under_a_name_that_all_readers_know_or_as_bytes(dtype: str) -> None:
    described = header_of(encode_header([entry(dtype)], metadata={}))["w"]

    named = {"dtype": SAFETENSORS_NAMES.get(dtype), "shape": [3], "data_offsets": [0, 3 * DTYPES[dtype].itemsize]}
    as_bytes = {**named, "dtype": "U8", "shape": [3 * DTYPES[dtype].itemsize]}
    assert described == (named if dtype in SAFETENSORS_NAMES else as_bytes)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_safetensors_library_reads_every_dtype(dtype: str) -> None:
    data = bytes([1, 0, 1] * DTYPES[dtype].itemsize)

    found = load(encode_header([entry(dtype)], metadata={}) + data)["w"]

    assert found.dtype == (DTYPES[dtype] if dtype in SAFETENSORS_NAMES else torch.uint8)
    assert bytes(found.reshape(-1).view(torch.uint8).tolist()) == data


def test_a_shard_without_entries_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.write_bytes(encode_header([], metadata={"cloudckpt": "0123456789abcdef"}))

    with safe_open(path, "pt") as shard:
        assert list(shard.keys()) == []
        assert shard.metadata() == {"cloudckpt": "0123456789abcdef"}


@pytest.mark.parametrize("name", ["", "a b", 'a"b\\c', "\n\x00\x7f", "Ω/重み/🙂", "a" * 5000])
def test_the_safetensors_library_reads_every_name(name: str) -> None:
    data = struct.pack("<3f", 1.0, 2.0, 3.0)

    tensors = load(encode_header([entry("float32", name=name)], metadata={}) + data)

    assert {key: value.tolist() for key, value in tensors.items()} == {name: [1.0, 2.0, 3.0]}


def test_a_name_that_is_no_text_is_refused_with_the_name() -> None:
    with pytest.raises(UnsupportedValueError, match=r"'w\\udc80'") as caught:
        encode_header([entry("float32"), entry("float32", name="w\udc80")], metadata={})

    assert caught.value.key == "w\udc80"
