"""Add up what the ranks of a save wrote, and compare it with the plan, before anything is committed.

    each rank:    layout + uploads ──▶ Written, one message that travels to the coordinator
    coordinator:  Written of all ranks ──assemble──▶ Index ──check_against_plan──▶ it, or one error with the differences

Columns all the way: the coordinator of thousands of ranks makes no object per piece. No I/O (FORMAT invariant 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import zstandard

from cloudckpt.errors import ManifestError, SaveFailedError
from cloudckpt.format import (
    DTYPE_NAMES,
    NOTES,
    BoxTable,
    Column,
    Holder,
    Index,
    IndexBuilder,
    JsonValue,
    Origins,
    PathElement,
    Section,
    ShardLayout,
    TensorEntry,
    codec,
    index_key,
    lone_surrogates,
)
from cloudckpt.late import BytesStorageMetadata

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = ["Written", "assemble", "check_against_names", "check_against_plan"]

_REPORTED = 10


# Holders, numbers, contents and their kind, where there are any.
_Shared = tuple[bytes, bytes, list[bytes], str]
# Rank, attempt, boxes; shard, start and shard_sizes; digests, values and origins.
_Message = tuple[int, str, bytes, bytes, bytes, bytes, bytes, dict[str, JsonValue], _Shared | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """What one rank wrote, complete and durable.

    Attributes:
        rank: the rank.
        attempt: the attempt id in the keys of its shards.
        boxes: its pieces.
        shard: the number of each piece's shard.
        start: each piece's first byte in its shard object.
        shard_sizes: bytes of its shards, which count from 0.
        digests: of their blocks, 8 bytes each, shard after shard.
        values: the values that it encoded.
        origins: whose objects its shards are; None where nobody has looked.
        content: the kind of the strong digests there.
    """

    rank: int
    attempt: str
    boxes: BoxTable
    shard: Column
    start: Column
    shard_sizes: Column
    digests: bytes
    values: dict[str, JsonValue]
    origins: Origins | None = None
    content: str = ""

    @classmethod
    def of(
        cls,
        boxes: BoxTable,
        shards: Sequence[ShardLayout],
        digests: Sequence[bytes],
        values: Mapping[str, JsonValue],
        *,
        rank: int,
        attempt: str,
    ) -> Written:
        """Return what became of boxes that were laid out as `shards`; `digests` are those of each shard's blocks."""
        pieces = [piece for shard in shards for piece in shard.pieces]
        table = boxes.take([piece.chunk for piece in pieces])
        if len(pieces) != len(boxes):  # some were cut
            table = replace(
                table,
                offsets=np.asarray([at for piece in pieces for at in piece.offsets], dtype=np.int64),
                sizes=np.asarray([size for piece in pieces for size in piece.sizes], dtype=np.int64),
            )
        return cls(
            rank=rank,
            attempt=attempt,
            boxes=table,
            shard=np.repeat([shard.number for shard in shards], [len(shard.pieces) for shard in shards]).astype(
                np.int64
            ),
            start=np.asarray([piece.start for piece in pieces], dtype=np.int64),
            shard_sizes=np.asarray([shard.size_bytes for shard in shards], dtype=np.int64),
            digests=b"".join(digests),
            values=dict(values),
        )

    def encode(self) -> bytes:
        """Return the message for the coordinator of the same save; not a format of the store.

        Raises:
            UnsupportedValueError: a name is no Unicode text.
        """
        columns = (column.tobytes() for column in (self.shard, self.start, self.shard_sizes))
        try:
            of = self.origins
            shared = None if of is None else (of.holder.tobytes(), of.number.tobytes(), [*of.contents], self.content)
            message = (self.rank, self.attempt, self.boxes.encode(), *columns, self.digests, self.values, shared)
            return zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(message))
        except UnicodeEncodeError as exc:
            raise lone_surrogates(exc.object) from exc

    @classmethod
    def decode(cls, data: bytes) -> Written:
        """Read back what `encode` gave."""
        message = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(data), type=_Message)
        rank, attempt, boxes, *columns, digests, values, shared = message
        shard, start, shard_sizes = (np.frombuffer(column, dtype=np.int64) for column in columns)
        return cls(
            rank=rank,
            attempt=attempt,
            boxes=BoxTable.decode(boxes),
            shard=shard,
            start=start,
            shard_sizes=shard_sizes,
            digests=digests,
            values=values,
            origins=None
            if shared is None
            else Origins(
                holder=np.frombuffer(shared[0], dtype=np.int64),
                number=np.frombuffer(shared[1], dtype=np.int64),
                contents=shared[2],
            ),
            content="" if shared is None else shared[3],
        )


def assemble(
    written: Iterable[Written],
    *,
    attempt: str,
    block_bytes: int,
    paths: Mapping[str, list[PathElement]],
    notes: Mapping[str, JsonValue] | None = None,
    content: str = "",
    holders: Sequence[Holder] = (),
) -> Index:
    """Return the index of what all ranks wrote; takes them one by one, so that they need not all be in memory.

    With the kind of their strong digests, `content`, it says whose objects the shards are: the ranks' own or those of
    `holders`.

    Raises:
        SaveFailedError: ranks contradict each other.
    """
    assembly = _Assembly(attempt, block_bytes, content, holders)
    for of_rank in written:
        assembly.take(of_rank)
    values = {**assembly.values, **({NOTES: codec.encode_json(dict(notes), key=NOTES)} if notes else {})}
    return Index(*assembly.builder.finish(values, paths), key=index_key(attempt))


class _Assembly:
    """Give the tensors of all ranks common numbers, and notice where ranks contradict each other."""

    def __init__(self, attempt: str, block_bytes: int, content: str, holders: Sequence[Holder]) -> None:
        self.builder = IndexBuilder(attempt=attempt, block_bytes=block_bytes, content=content, holders=holders)
        self._content = content
        self.values: dict[str, JsonValue] = {}
        self._numbers: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        self._seen: set[int] = set()
        self._last: tuple[BoxTable, Column] | None = None

    def take(self, written: Written) -> None:
        if written.rank in self._seen:
            raise SaveFailedError(f"rank {written.rank} reported twice what it wrote, so nothing was committed")
        self._seen.add(written.rank)
        for name, value in written.values.items():
            self._take_value(name, value, written.rank)
        self.builder.add(
            Section(
                rank=written.rank,
                attempt=written.attempt,
                shard_sizes=written.shard_sizes,
                digests=written.digests,
                tensor=self._common_numbers(written)[written.boxes.tensor],
                shard=written.shard,
                start=written.start,
                offsets=written.boxes.offsets,
                sizes=written.boxes.sizes,
                origins=self._origins(written) if self._content else None,
            )
        )

    def _origins(self, written: Written) -> Origins:
        """Return whose objects a rank's shards are; digests of another kind than the index's are of no use."""
        count, found = len(written.shard_sizes), written.origins
        if found is None:
            return Origins(holder=np.zeros(count, np.int64), number=np.zeros(count, np.int64), contents=[b""] * count)
        return found if written.content == self._content else replace(found, contents=[b""] * count)

    def _take_value(self, name: str, value: JsonValue, rank: int) -> None:
        if name in self.values:
            raise SaveFailedError(
                f"value {name!r} was written by rank {self._ranks[name]} and by rank {rank}, so nothing was committed"
            )
        self.values[name] = value
        self._ranks[name] = rank

    def _common_numbers(self, written: Written) -> Column:
        boxes = written.boxes
        # Ranks mostly name the same tensors, and then their tables share the names.
        if self._last is not None and boxes.has_same_tensors(self._last[0]):
            return self._last[1]
        if not self._numbers:  # of the first rank there is nothing to compare
            self.builder.tensors.update(zip(boxes.names, map(TensorEntry, boxes.dtypes, boxes.shapes), strict=True))
            self._numbers = {name: number for number, name in enumerate(boxes.names)}
            self._ranks = self._ranks | dict.fromkeys(boxes.names, written.rank)
            self._last = boxes, np.arange(len(boxes.names), dtype=np.int64)
            return self._last[1]
        for name, dtype, shape in zip(boxes.names, boxes.dtypes, boxes.shapes, strict=True):
            entry = TensorEntry(dtype, shape)
            known = self.builder.tensors.setdefault(name, entry)
            if known != entry:
                raise SaveFailedError(
                    f"tensor {name!r} is {known.dtype} of {known.shape} on rank {self._ranks[name]} and {dtype} of "
                    f"{shape} on rank {written.rank}, so nothing was committed"
                )
            self._numbers.setdefault(name, len(self._numbers))
            self._ranks.setdefault(name, written.rank)
        common = np.asarray([self._numbers[name] for name in boxes.names], dtype=np.int64)
        self._last = boxes, common
        return common


def check_against_names(planned: AbstractSet[str], index: Index) -> None:
    """Check an index as a reader would, and that it has the tensors that were planned and no others.

    What it says of shapes and dtypes comes from those who planned it.

    Raises:
        SaveFailedError: it is not so; lists the differences.
    """
    _refuse(chain(_name_differences(planned, index), _problems(index)))


def _name_differences(planned: AbstractSet[str], index: Index) -> Iterator[str]:
    if planned != index.tensors.keys():
        yield from (f"{name!r} was written and never planned" for name in index.tensors if name not in planned)
        yield from (f"tensor {name!r} was not written" for name in planned if name not in index.tensors)


def check_against_plan(metadata: Metadata, index: Index) -> None:
    """Compare what was written with what was planned, and check it as a reader would.

    Raises:
        SaveFailedError: they differ, or the pieces do not cover every tensor exactly once; lists the differences.
    """
    _refuse(chain(_differences(metadata, index), _problems(index)))


def _problems(index: Index) -> Iterator[str]:
    try:
        yield from index.problems()
    except ManifestError as exc:
        yield str(exc)


def _refuse(found: Iterator[str]) -> None:
    problems = list(islice(found, _REPORTED))
    if problems:
        raise SaveFailedError(f"the plan and what was written differ, so nothing was committed: {'; '.join(problems)}")


def _differences(metadata: Metadata, index: Index) -> Iterator[str]:
    planned = metadata.state_dict_metadata
    # Nobody plans the parts of a value but the rank that writes it.
    parts = {
        part
        for name, of_name in codec.part_names(index.tensors).items()
        if name in planned
        for part in of_name.values()
    }
    for name in [*index.tensors, *index.values]:
        if name not in planned and name not in parts:
            yield f"{name!r} was written and never planned"
    for name, entry in planned.items():
        if isinstance(entry, BytesStorageMetadata):
            if name not in index.values or name in index.tensors:
                yield f"value {name!r} was not written as one"
        else:
            yield from _tensor_differences(name, entry, index)


def _tensor_differences(name: str, planned: TensorStorageMetadata, index: Index) -> Iterator[str]:
    dtype, shape = DTYPE_NAMES[planned.properties.dtype], tuple(planned.size)
    found = index.tensors.get(name)
    if found is None or name in index.values:
        yield f"tensor {name!r} was not written as one"
    elif (found.dtype, found.shape) != (dtype, shape):
        yield f"tensor {name!r}: planned as {dtype} of {shape}, written as {found.dtype} of {found.shape}"
