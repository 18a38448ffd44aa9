"""Read an index of format version 1: one zstd frame of JSON with an object per piece.

Only `Index.decode` comes here; what it gets is the same columns that version 2 has, still to be checked (FORMAT,
"Version 1").
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain

import msgspec
import numpy as np

from cloudckpt.errors import ManifestError
from cloudckpt.format.boxes import Column
from cloudckpt.format.codec import JsonValue
from cloudckpt.format.record import NUMBER_LIMIT, decode_record, decompress, shown
from cloudckpt.format.section import Section, TensorEntry
from cloudckpt.format.shard import DIGEST_BYTES, block_count
from cloudckpt.format.tree import PathElement

__all__ = ["IndexV1", "decode_v1"]


class _Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    start: int


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class _Shard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    rank: int
    number: int
    size_bytes: int
    digests: str


class IndexV1(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An index as version 1 wrote it."""

    format_version: int
    attempt: str
    block_bytes: int
    tensors: dict[str, _Tensor]
    values: dict[str, JsonValue]
    paths: dict[str, list[PathElement]]
    shards: tuple[_Shard, ...]

    def entries(self) -> dict[str, TensorEntry]:
        """Return the tensors without their pieces."""
        return {name: TensorEntry(tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def problems(self) -> Iterator[str]:
        """Yield what keeps the pieces from being columns."""
        places = Counter((shard.rank, shard.number) for shard in self.shards)
        for shard in self.shards:
            yield from _shard_problems(shard, self.block_bytes)
        if len(places) < len(self.shards):
            yield f"shard {places.most_common(1)[0][0]} is listed twice or cannot have that number"
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                has_axes = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape)
                numbers = (*chunk.offsets, *chunk.sizes, chunk.start)
                is_small = all(-NUMBER_LIMIT < number < NUMBER_LIMIT for number in numbers)
                if not has_axes or not is_small or not 0 <= chunk.shard < len(self.shards):
                    yield f"tensor {shown(name)} has a piece {shown(chunk)} that leaves the tensor or its shard"

    def sections(self) -> Iterator[Section]:
        """Yield what each rank wrote; only for an index without `problems`."""
        ranked: dict[int, list[int]] = defaultdict(list)
        for ordinal in sorted(range(len(self.shards)), key=lambda ordinal: self.shards[ordinal].number):
            ranked[self.shards[ordinal].rank].append(ordinal)
        pieces: dict[int, list[tuple[int, _Chunk]]] = defaultdict(list)
        for number, tensor in enumerate(self.tensors.values()):
            for chunk in tensor.chunks:
                pieces[self.shards[chunk.shard].rank].append((number, chunk))
        for rank, ordinals in sorted(ranked.items()):
            yield self._section(rank, ordinals, pieces[rank])

    def _section(self, rank: int, ordinals: list[int], pieces: list[tuple[int, _Chunk]]) -> Section:
        shards = [self.shards[ordinal] for ordinal in ordinals]
        places = {ordinal: place for place, ordinal in enumerate(ordinals)}
        return Section(
            rank=rank,
            attempt=self.attempt,
            numbers=_column(shard.number for shard in shards),
            shard_sizes=_column(shard.size_bytes for shard in shards),
            digests=b"".join(base64.b64decode(shard.digests) for shard in shards),
            tensor=_column(number for number, _ in pieces),
            shard=_column(places[chunk.shard] for _, chunk in pieces),
            start=_column(chunk.start for _, chunk in pieces),
            offsets=_column(chain.from_iterable(chunk.offsets for _, chunk in pieces)),
            sizes=_column(chain.from_iterable(chunk.sizes for _, chunk in pieces)),
        )


def decode_v1(data: bytes, *, key: str) -> IndexV1:
    """Read an index of version 1; `key` names it in errors.

    Raises:
        ManifestError: not an index of that version, or larger than the limits.
    """
    index = decode_record(decompress(data, key=key), IndexV1, key=key)
    if index.format_version != 1:
        raise ManifestError(f"{key} has not the form of version {index.format_version}; restore an older step", key=key)
    return index


def _shard_problems(shard: _Shard, block_bytes: int) -> Iterator[str]:
    place = (shard.rank, shard.number)
    if not 0 <= min(place) <= max(place) < NUMBER_LIMIT:
        yield f"shard {place} is listed twice or cannot have that number"
    if not 8 < shard.size_bytes < NUMBER_LIMIT:
        yield f"shard {place} has {shard.size_bytes} bytes"
        return
    try:
        digests = base64.b64decode(shard.digests, validate=True)
    except (binascii.Error, ValueError):
        yield f"shard {place} has digests that are not base64"
        return
    if len(digests) != DIGEST_BYTES * block_count(shard.size_bytes, block_bytes):
        yield f"shard {place} has {len(digests)} bytes of digests for {shard.size_bytes} bytes"


def _column(values: Iterator[int]) -> Column:
    return np.fromiter(values, dtype=np.int64)
