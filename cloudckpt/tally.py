"""Compare what a save planned with what it wrote, before anything is committed (FORMAT invariant 3).

    each rank:    items + layout + uploads ──▶ StoredItems, which travel to the coordinator
    coordinator:  Metadata + StoredItems ──▶ Totals for the index, or one error that lists every difference

Pure values in DCP's words; no I/O.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.codec import DTYPE_NAMES, DTYPES, JsonValue
from cloudckpt.errors import SaveFailedError
from cloudckpt.index import ChunkEntry, ShardEntry, TensorEntry
from cloudckpt.layout import Chunk, ShardLayout

__all__ = ["StoredItem", "Totals", "check_against_plan", "stored_items"]


@dataclass(frozen=True, slots=True)
class StoredItem:
    """What one write item became, as it travels to the coordinator.

    Attributes:
        offsets, sizes: the planned chunk, empty for a value.
        dtype: torch's name of the tensor's dtype, "" for a value.
        pieces: (offsets, sizes, shard number, start) of each piece.
        value: the encoded value of a BYTE_IO item.
        rank: who wrote it.
        shards: on a rank's first item only: (number, size, digests) of all its shards.
    """

    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    dtype: str = ""
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...], int, int], ...] = ()
    value: JsonValue = None
    rank: int = 0
    shards: tuple[tuple[int, int, bytes], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk, 0 for a value."""
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize if self.dtype else 0


@dataclass(slots=True)
class Totals:
    """What `finish` adds up for the manifest."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    values: dict[str, JsonValue] = field(default_factory=dict)
    shards: list[ShardEntry] = field(default_factory=list)


def stored_items(
    items: Sequence[WriteItem],
    chunks: Sequence[Chunk],
    shards: Sequence[ShardLayout],
    records: tuple[tuple[int, int, bytes], ...],
    rank: int,
) -> dict[int, StoredItem]:
    """Return what each tensor item became, by the item's id; `records` are the shards' numbers, sizes and digests."""
    pieces: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int, int]]] = defaultdict(list)
    for shard in shards:
        for piece in shard.pieces:
            pieces[piece.chunk].append((piece.offsets, piece.sizes, shard.number, piece.start))
    return {
        id(item): StoredItem(
            offsets=chunk.offsets,
            sizes=chunk.sizes,
            dtype=chunk.dtype,
            pieces=tuple(pieces[number]),
            rank=rank,
            shards=records if number == 0 else (),
        )
        for number, (item, chunk) in enumerate(zip(items, chunks, strict=True))
    }


def check_against_plan(metadata: Metadata, results: list[list[WriteResult]]) -> Totals:
    """Add up what was written, if it is what was planned, every chunk exactly once.

    Raises:
        SaveFailedError: it is not; lists the differences.
    """
    written: dict[str, list[StoredItem]] = defaultdict(list)
    for result in (result for of_rank in results for result in of_rank):
        written[result.index.fqn].append(result.storage_data)
    totals = Totals()
    ordinals = _collect_shards(written.values(), totals)
    problems = [
        f"{name!r} was written and never planned" for name in written.keys() - metadata.state_dict_metadata.keys()
    ]
    for name, planned in metadata.state_dict_metadata.items():
        if isinstance(planned, BytesStorageMetadata):
            problems += _take_value(name, written[name], totals)
        else:
            problems += _take_tensor(name, planned, written[name], ordinals, totals)
    if problems:
        raise SaveFailedError(
            f"the plan and what was written differ, so nothing was committed: {'; '.join(problems[:10])}"
        )
    return totals


def _collect_shards(items: Iterable[list[StoredItem]], totals: Totals) -> dict[tuple[int, int], int]:
    found = {}
    for item in (item for of_name in items for item in of_name):
        for number, size_bytes, digests in item.shards:
            found[item.rank, number] = ShardEntry(
                rank=item.rank, number=number, size_bytes=size_bytes, digests=base64.b64encode(digests).decode()
            )
    totals.shards = [found[place] for place in sorted(found)]
    return {place: ordinal for ordinal, place in enumerate(sorted(found))}


def _take_value(name: str, written: list[StoredItem], totals: Totals) -> list[str]:
    if len(written) != 1 or written[0].dtype:
        return [f"value {name!r} was written {len(written)} times"]
    totals.values[name] = written[0].value
    return []


def _take_tensor(
    name: str,
    planned: TensorStorageMetadata,
    written: list[StoredItem],
    ordinals: Mapping[tuple[int, int], int],
    totals: Totals,
) -> list[str]:
    wanted = Counter((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in planned.chunks)
    got = Counter((item.offsets, item.sizes) for item in written)
    if wanted != got or max(wanted.values(), default=1) > 1:
        return [f"tensor {name!r}: planned {dict(wanted)}, written {dict(got)}"]
    dtype = DTYPE_NAMES[planned.properties.dtype]
    if any(item.dtype != dtype for item in written):
        return [f"tensor {name!r}: planned as {dtype}, written as {sorted({item.dtype for item in written})}"]
    for item in written:
        if sum(math.prod(sizes) for _, sizes, _, _ in item.pieces) != math.prod(item.sizes):
            return [f"tensor {name!r}: the chunk at {item.offsets} was written in part"]
    pieces = [(*piece, item.rank) for item in written for piece in item.pieces]
    if any((rank, number) not in ordinals for _, _, number, _, rank in pieces):
        return [f"tensor {name!r}: a shard of it was not reported"]
    totals.tensors[name] = TensorEntry(
        dtype=dtype,
        shape=tuple(planned.size),
        chunks=tuple(
            ChunkEntry(offsets=offsets, sizes=sizes, shard=ordinals[rank, number], start=start)
            for offsets, sizes, number, start, rank in sorted(pieces)
        ),
    )
    return []
