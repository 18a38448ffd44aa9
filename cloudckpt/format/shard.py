"""Turn named tensor pieces into the head of one safetensors object, and its bytes into block digests.

Pure values over bytes: knows the safetensors format (8-byte little-endian length, JSON header, then the data
without holes; https://github.com/huggingface/safetensors#format) and the digest of the format (xxh3-64 of each
block, blocks counted from the object's first byte, so that the header is covered too).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import xxhash

from cloudckpt.format.boxes import Column
from cloudckpt.format.record import lone_surrogates

__all__ = [
    "DIGEST_BYTES",
    "SAFETENSORS_NAMES",
    "HeaderEntry",
    "block_counts",
    "block_digests",
    "encode_header",
    "has_blocks",
    "verify_blocks",
]

DIGEST_BYTES = 8

# The data part starts at a multiple of this, so that a reader may map any dtype in place; the format lets a
# header end in spaces.
_ALIGNMENT_BYTES = 64

# What every release of safetensors can name: one entry of a type that a reader does not know hides the whole object
# from it (so 0.6 treats complex64). A piece of any other dtype is stored as U8 and its dtype stands in the index only.
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


class HeaderEntry(NamedTuple):
    """What a header says of one box: its name there, torch's name of its dtype, its extent, and its bytes."""

    name: str
    dtype: str
    sizes: tuple[int, ...]
    nbytes: int


def encode_header(entries: Iterable[HeaderEntry], *, metadata: dict[str, str]) -> bytes:
    """Return the head of a safetensors object whose data is the boxes' bytes, in order, without holes.

    Raises:
        UnsupportedValueError: a name is no Unicode text.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    stop = 0
    for name, dtype, sizes, nbytes in entries:
        start, stop = stop, stop + nbytes
        known = SAFETENSORS_NAMES.get(dtype)
        header[name] = {
            "dtype": known or "U8",
            "shape": sizes if known else (nbytes,),
            "data_offsets": (start, stop),
        }
    try:
        text = msgspec.json.encode(header)
    except UnicodeEncodeError as exc:
        raise lone_surrogates(exc.object) from exc
    padding = -(8 + len(text)) % _ALIGNMENT_BYTES
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def block_counts(sizes_bytes: Column, block_bytes: int) -> Column:
    """Return how many blocks objects of these sizes have; the last of each may be short."""
    return -(-sizes_bytes // block_bytes)


def block_digests(buffers: Iterable[memoryview], *, block_bytes: int) -> bytes:
    """Return the digests, 8 little-endian bytes per block, of the concatenation of `buffers` (bytes views)."""
    return b"".join(_each_digest(buffers, block_bytes))


def has_blocks(buffers: Iterable[memoryview], digests: bytes, *, block_bytes: int) -> bool:
    """Tell whether the concatenation of `buffers` has these digests; ends at the first block that has another one."""
    at = 0
    for digest in _each_digest(buffers, block_bytes):
        if digest != digests[at : at + DIGEST_BYTES]:
            return False
        at += DIGEST_BYTES
    return at == len(digests)


def _each_digest(buffers: Iterable[memoryview], block_bytes: int) -> Iterator[bytes]:
    block, room = xxhash.xxh3_64(), block_bytes
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            part = buffer[start : start + room]
            block.update(part)
            start += len(part)
            room -= len(part)
            if room == 0:
                yield struct.pack("<Q", block.intdigest())
                block, room = xxhash.xxh3_64(), block_bytes
    if room < block_bytes:
        yield struct.pack("<Q", block.intdigest())


def verify_blocks(data: memoryview, digests: bytes, *, first_block: int, block_bytes: int) -> int | None:
    """Check whole blocks against their digests.

    Args:
        data: the bytes of consecutive blocks, starting at a block's first byte.
        digests: the digests of the whole object.
        first_block: which block `data` starts with.
        block_bytes: the block size of the object.

    Returns:
        The number of the first block that differs, or None if all are right.
    """
    for number, start in enumerate(range(0, len(data), block_bytes), first_block):
        expected = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        if struct.pack("<Q", xxhash.xxh3_64_intdigest(data[start : start + block_bytes])) != expected:
            return number
    return None
