"""The index: where every piece of every tensor lies, the digests of every shard, and the small values inline.

A pure value with strict decoding: canonical JSON in one zstd frame. Limits are enforced before memory is taken,
and a decoded index is consistent in itself (FORMAT, "Index"). Names in it are compared, never used as keys.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import random
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import zstandard

from cloudckpt.codec import DTYPES, JsonValue
from cloudckpt.errors import FormatVersionError, ManifestError, OptionsError, UnsupportedValueError
from cloudckpt.keys import is_attempt
from cloudckpt.options import MAX_BLOCK_BYTES
from cloudckpt.shard import DIGEST_BYTES, block_count
from cloudckpt.tree import PATH_LIMIT, PathElement

__all__ = [
    "FORMAT_VERSION",
    "INDEX_LIMIT_BYTES",
    "ChunkEntry",
    "Index",
    "ShardEntry",
    "TensorEntry",
    "decode_record",
]

FORMAT_VERSION = 1

# 405 billion parameters with Adam on 4,096 ranks stay below a tenth of this; an index that claims more is hostile.
INDEX_LIMIT_BYTES = 1 << 30
_DECODED_LIMIT_BYTES = 4 << 30
# Python objects take up to 24 times the memory of their JSON. Real indexes shrink to a tenth (names that count up: to
# a thirtieth), so a small object that claims to be a large index is refused before any of it is decoded.
_SHRINK_LIMIT = 256
_SHRINK_FREE_BYTES = 16 << 20
_DIMENSIONS_LIMIT = 64
_NUMBER_LIMIT = 1 << 53
_SHOWN = 200

_Record = TypeVar("_Record", bound=msgspec.Struct)


# gc=False: entries hold no cycles, and a collector that visits 400,000 of them makes decoding five times slower.
class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One piece: a dense row-major box of a tensor in one shard.

    Attributes:
        offsets: where the box starts in the tensor.
        sizes: the box's extent.
        shard: the shard's place in `Index.shards`.
        start: the box's first byte in the shard object.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    start: int


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One tensor: torch's dtype name, its shape, and the pieces that tile it exactly."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]

    @property
    def itemsize_bytes(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize


class ShardEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One shard: the rank and number that its key is derived from, its size, and its block digests in base64."""

    rank: int
    number: int
    size_bytes: int
    digests: str

    def digest_bytes(self) -> bytes:
        """Return the digests, 8 bytes per block."""
        return base64.b64decode(self.digests, validate=True)


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one attempt wrote.

    Attributes:
        format_version: of this schema.
        attempt: the attempt that wrote it.
        block_bytes: bytes per digest, in all its shards.
        tensors: name → where its pieces lie.
        values: name → value in the codec's JSON.
        paths: name → path in the nested state that it came from.
        shards: all shards, in the order that chunks refer to.
    """

    format_version: int
    attempt: str
    block_bytes: int
    tensors: dict[str, TensorEntry]
    values: dict[str, JsonValue]
    paths: dict[str, list[PathElement]]
    shards: tuple[ShardEntry, ...]

    def encode(self) -> bytes:
        """Return the object's bytes: canonical JSON in one zstd frame that states its size.

        Raises:
            OptionsError: it would be larger than a reader accepts.
            UnsupportedValueError: a name is no Unicode text.
        """
        try:
            text = msgspec.json.encode(self)
        except UnicodeEncodeError as exc:
            raise UnsupportedValueError(
                f"{_shown(exc.object)} has lone surrogates, which JSON cannot hold; rename that entry of the state",
                key=exc.object,
                type_name="str",
            ) from exc
        data = zstandard.ZstdCompressor(level=3).compress(text)
        if not _may_decode(len(data), len(text)):
            raise OptionsError(
                f"the index has {len(text)} bytes ({len(data)} compressed), more than a reader accepts; save long "
                "lists of numbers as tensors, or lay the state out in fewer, larger pieces"
            )
        return data

    @classmethod
    def decode(cls, data: bytes, *, key: str) -> Index:
        """Read an index back; `key` names it in errors.

        Raises:
            ManifestError: not an index of this version, larger than the limits, or inconsistent in itself.
        """
        index = decode_record(_decompress(data, key), cls, key=key)
        index.check(key=key)
        return index

    def check(self, *, key: str) -> None:
        """Raise `ManifestError` unless every piece lies inside its shard and the pieces tile their tensors.

        Takes time in proportion to the pieces, however they lie.
        """
        for problem in self._problems():
            raise ManifestError(f"index {key} is inconsistent: {problem}; restore an older step", key=key)

    def _problems(self) -> Iterator[str]:
        if not is_attempt(self.attempt):
            yield f"attempt {_shown(self.attempt)} is no attempt id"
        if not 0 < self.block_bytes <= MAX_BLOCK_BYTES:
            yield f"block_bytes is {self.block_bytes}"
            return
        places: set[tuple[int, int]] = set()
        for shard in self.shards:
            yield from _shard_problems(shard, self.block_bytes, places)
        check = _TensorCheck(self.shards)
        for name, tensor in self.tensors.items():
            yield from check.problems(name, tensor)
        yield from check.overlaps()
        for name in self.tensors.keys() & self.values.keys():
            yield f"{_shown(name)} is both a tensor and a value"
        for name, path in self.paths.items():
            if not 0 < len(path) <= PATH_LIMIT:
                yield f"the path of {_shown(name)} has {len(path)} steps"


class _Version(msgspec.Struct):
    """The only field that every version of every record has."""

    format_version: int


def decode_record(data: bytes, schema: type[_Record], *, key: str) -> _Record:
    """Decode the JSON of an index, a manifest or a claim, if this library knows its version.

    Raises:
        FormatVersionError: a newer library wrote it.
        ManifestError: it is no JSON of that schema, or says something twice.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{key} has format version {version}, and this cloudckpt reads versions up to {FORMAT_VERSION}; "
                "upgrade cloudckpt to read it",
                key=key,
            )
        record = msgspec.json.decode(data, type=schema)
        _refuse_double_names(data, msgspec.json.encode(record), key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ManifestError(f"{key} cannot be decoded ({_shown(exc)}); restore an older step", key=key) from exc
    if version < 1:
        raise ManifestError(f"{key} has format version {version}; restore an older step", key=key)
    return record


def _refuse_double_names(data: bytes, canonical: bytes, key: str) -> None:
    """Refuse an object with a name twice, of which one reader takes the first and another the last.

    What encodes to the same bytes again has none; only other text, such as an indented manifest, is searched.
    """

    def refuse(pairs: list[tuple[str, object]]) -> None:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ManifestError(f"{key} has a name twice in one object; restore an older step", key=key)

    if data != canonical:
        json.loads(data, object_pairs_hook=refuse)


def _shown(value: object) -> str:
    """Return `repr(value)` for a message, where foreign text has neither control characters nor megabytes."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _may_decode(size_bytes: int, decoded_bytes: int) -> bool:
    """Tell whether a reader takes an index of this size that decodes to that size."""
    limit_bytes = min(_DECODED_LIMIT_BYTES, max(_SHRINK_FREE_BYTES, _SHRINK_LIMIT * size_bytes))
    return size_bytes <= INDEX_LIMIT_BYTES and 0 <= decoded_bytes <= limit_bytes


def _decompress(data: bytes, key: str) -> bytes:
    try:
        size = zstandard.frame_content_size(data)
        if not _may_decode(len(data), size):
            raise ManifestError(
                f"index {key} has {len(data)} bytes and states {size} decoded bytes, more than is read; "
                "restore an older step",
                key=key,
            )
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise ManifestError(f"index {key} is no zstd frame ({exc}); restore an older step", key=key) from exc


def _shard_problems(shard: ShardEntry, block_bytes: int, places: set[tuple[int, int]]) -> Iterator[str]:
    place = (shard.rank, shard.number)
    if place in places or not 0 <= min(place) <= max(place) < _NUMBER_LIMIT:
        yield f"shard {place} is listed twice or cannot have that number"
    places.add(place)
    if not 8 < shard.size_bytes < _NUMBER_LIMIT:
        yield f"shard {place} has {shard.size_bytes} bytes"
        return
    try:
        digests = shard.digest_bytes()
    except (binascii.Error, ValueError):
        yield f"shard {place} has digests that are not base64"
        return
    if len(digests) != DIGEST_BYTES * block_count(shard.size_bytes, block_bytes):
        yield f"shard {place} has {len(digests)} bytes of digests for {shard.size_bytes} bytes"


class _TensorCheck:
    """Look at one tensor after the other; remember what their pieces take of the shards."""

    def __init__(self, shards: Sequence[ShardEntry]) -> None:
        self._shards = shards
        self._extents = array("q")  # shard, start and stop of each piece
        chance = random.Random()  # a generator of its own: the global one belongs to the training
        self._weights = [defaultdict[int, int](lambda: chance.getrandbits(64)) for _ in range(_DIMENSIONS_LIMIT)]

    def problems(self, name: str, tensor: TensorEntry) -> Iterator[str]:
        """Yield what is wrong with a tensor by itself."""
        if tensor.dtype not in DTYPES:
            yield f"tensor {_shown(name)} has dtype {_shown(tensor.dtype)}, which this PyTorch does not know"
            return
        item_bytes = tensor.itemsize_bytes
        if not _is_shape(tensor.shape, item_bytes):
            yield f"tensor {_shown(name)} has shape {_shown(tensor.shape)}"
            return
        for chunk in tensor.chunks:
            if not (_is_inside(chunk, tensor.shape) and self._is_stored(chunk, item_bytes)):
                yield f"tensor {_shown(name)} has a piece {_shown(chunk)} that leaves the tensor or its shard"
                return
        if not self._tiles(tensor):
            yield f"tensor {_shown(name)} is not tiled by its pieces"

    def overlaps(self) -> Iterator[str]:
        """Yield where two pieces, of all tensors together, claim the same byte of a shard."""
        table = np.asarray(self._extents, dtype=np.int64).reshape(-1, 3)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        before, after = table[:-1], table[1:]
        is_twice = (before[:, 0] == after[:, 0]) & (after[:, 1] < before[:, 2])
        if is_twice.any():
            place, start, _ = after[np.argmax(is_twice)].tolist()
            shard = self._shards[place]
            yield f"two pieces share byte {start} of shard {(shard.rank, shard.number)}"

    def _is_stored(self, chunk: ChunkEntry, item_bytes: int) -> bool:
        if not 0 <= chunk.shard < len(self._shards) or chunk.start < 8:
            return False
        stop = chunk.start + math.prod(chunk.sizes) * item_bytes
        if stop > self._shards[chunk.shard].size_bytes:
            return False
        if stop > chunk.start:
            self._extents.extend((chunk.shard, chunk.start, stop))
        return True

    def _tiles(self, tensor: TensorEntry) -> bool:
        """Tell whether the pieces cover every element exactly once.

        Each coordinate of each axis has a random weight, and a box the product over its axes of (weight of its stop
        - weight of its start). Where boxes meet the weights cancel: boxes that tile the tensor always add up to the
        product of the whole. Any others differ from it as polynomials in the weights, so they add up to it by chance
        only, once in 2**58 tries; and whoever wrote the index could not know the weights. Comparing boxes with each
        other instead takes hours for a tensor of many columns.
        """
        covered = sum(self._measure(chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
        return covered == self._measure((0,) * len(tensor.shape), tensor.shape)

    def _measure(self, offsets: Sequence[int], sizes: Sequence[int]) -> int:
        product = 1
        for weights, start, size in zip(self._weights, offsets, sizes, strict=False):
            product *= weights[start + size] - weights[start]
        return product


def _is_shape(shape: Sequence[int], item_bytes: int) -> bool:
    """Tell whether a tensor can have this shape; an empty one also has strides, which must fit 64 bits."""
    if len(shape) > _DIMENSIONS_LIMIT or any(size < 0 for size in shape):
        return False
    return math.prod(max(size, 1) for size in shape) * item_bytes < _NUMBER_LIMIT


def _is_inside(chunk: ChunkEntry, shape: Sequence[int]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    for offset, size, extent in zip(chunk.offsets, chunk.sizes, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > extent:
            return False
    return True
