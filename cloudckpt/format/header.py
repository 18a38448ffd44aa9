"""The header of an index: names, shapes, values, and a table of the ranks' sections.

JSON records with strict types, and what in them contradicts itself or the object that they stand in (FORMAT, "Index").
Pure values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from cloudckpt.format.codec import DTYPES, JsonValue
from cloudckpt.format.content import CONTENT_KINDS
from cloudckpt.format.record import NUMBER_LIMIT, SHARING_VERSION, may_decode
from cloudckpt.format.tree import PATH_LIMIT, PathElement
from cloudckpt.keys import EPOCH_LIMIT, STEP_LIMIT, checkpoint_prefix, is_attempt, shown
from cloudckpt.options import MAX_BLOCK_BYTES

__all__ = ["Header", "Holder", "RankRecord", "TensorRecord", "header_problems", "table_problems"]

_DIMENSIONS_LIMIT = 64


class TensorRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor, and the one rank that wrote all of it, or -1."""

    dtype: str
    shape: tuple[int, ...]
    writer: int


class RankRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One rank: its own attempt ("" when it is the index's), what it wrote, and its section's frame."""

    rank: int
    attempt: str
    shard_count: int
    stored_bytes: int
    piece_count: int
    size_bytes: int
    decoded_bytes: int
    digest: str


class Holder(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A checkpoint of the same root that holds shards of another one itself: its place, and the attempt in its keys."""

    step: int
    epoch: int
    attempt: str

    @property
    def prefix(self) -> str:
        """Where it stands, or stood, below the root, with its slash."""
        return checkpoint_prefix(self.step, self.epoch)

    def is_possible(self) -> bool:
        """Tell whether there can be such a checkpoint."""
        return 0 <= self.step < STEP_LIMIT and 0 < self.epoch < EPOCH_LIMIT and is_attempt(self.attempt)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The header's fields, in their order; the last two of version 2 alone."""

    format_version: int
    attempt: str
    block_bytes: int
    tensors: dict[str, TensorRecord]
    values: dict[str, JsonValue]
    paths: dict[str, list[PathElement]]
    ranks: list[RankRecord]
    content: str | msgspec.UnsetType = msgspec.UNSET
    holders: list[Holder] | msgspec.UnsetType = msgspec.UNSET


def header_problems(header: Header) -> Iterator[str]:
    """Yield what in a header contradicts itself or cannot be."""
    if not is_attempt(header.attempt):
        yield f"attempt {shown(header.attempt)} is no attempt id"
    if not 0 < header.block_bytes <= MAX_BLOCK_BYTES:
        yield f"block_bytes is {header.block_bytes}"
    yield from _tensor_problems(header)
    for name in header.tensors.keys() & header.values.keys():
        yield f"{shown(name)} is both a tensor and a value"
    for name, path in header.paths.items():
        if not 0 < len(path) <= PATH_LIMIT:
            yield f"the path of {shown(name)} has {len(path)} steps"
    yield from _sharing_problems(header)


def _tensor_problems(header: Header) -> Iterator[str]:
    ranks = {record.rank for record in header.ranks} | {-1}
    good: set[TensorRecord] = set()  # of thousands of tensors most are alike
    for name, tensor in header.tensors.items():
        if tensor in good:
            continue
        if tensor.dtype not in DTYPES:
            yield f"tensor {shown(name)} has dtype {shown(tensor.dtype)}, which this PyTorch does not know"
        elif not _is_shape(tensor.shape, DTYPES[tensor.dtype].itemsize):
            yield f"tensor {shown(name)} has shape {shown(tensor.shape)}"
        elif tensor.writer in ranks:
            good.add(tensor)
        if tensor.writer not in ranks:
            yield f"tensor {shown(name)} was written by rank {tensor.writer}, which wrote nothing"


def _sharing_problems(header: Header) -> Iterator[str]:
    is_shared = header.format_version >= SHARING_VERSION
    if (header.content is not msgspec.UNSET, header.holders is not msgspec.UNSET) != (is_shared, is_shared):
        yield f"content and holders do not go with its format version {header.format_version}"
    if header.content is not msgspec.UNSET and header.content not in CONTENT_KINDS:
        yield f"content is {shown(header.content)}"
    holders = [] if header.holders is msgspec.UNSET else header.holders
    if not all(one.is_possible() and one.attempt != header.attempt for one in holders):
        yield "it names a holder of shards that cannot be, or itself"


def table_problems(
    ranks: Sequence[RankRecord], sections_bytes: int, size_bytes: int, header_bytes: int
) -> Iterator[str]:
    """Yield what the table of the ranks says that the object contradicts, or that no reader takes."""
    before = -1
    for record in ranks:
        counts = (record.shard_count, record.stored_bytes, record.piece_count, record.size_bytes, record.decoded_bytes)
        if not before < record.rank < NUMBER_LIMIT or not all(0 <= count < NUMBER_LIMIT for count in counts):
            yield f"rank {shown(record.rank)} is listed twice, or out of order, or with counts that cannot be"
            return
        if record.attempt and not is_attempt(record.attempt):
            yield f"attempt {shown(record.attempt)} of rank {record.rank} is no attempt id"
        if record.shard_count + record.piece_count > record.decoded_bytes:
            yield f"the section of rank {record.rank} is too short for {record.piece_count} pieces"
        before = record.rank
    if sum(record.size_bytes for record in ranks) != sections_bytes:
        yield f"its sections have {sections_bytes} bytes, and not those that the header says"
    decoded_bytes = header_bytes + sum(record.decoded_bytes for record in ranks)
    if not may_decode(size_bytes, decoded_bytes):
        yield f"it has {size_bytes} bytes and states {decoded_bytes} decoded bytes, more than is read"


def _is_shape(shape: Sequence[int], item_bytes: int) -> bool:
    """Tell whether a tensor can have this shape; an empty one also has strides, which must fit 64 bits."""
    if len(shape) > _DIMENSIONS_LIMIT or any(size < 0 for size in shape):
        return False
    return math.prod(max(size, 1) for size in shape) * item_bytes < NUMBER_LIMIT
