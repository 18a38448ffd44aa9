"""Place chunks into shards before the first byte is written, and plan which bytes of a shard to read.

Pure arithmetic over boxes and byte ranges; no tensors, no I/O.

    save:  chunks ──split──▶ pieces (contiguous boxes, each at most one shard) ──pack──▶ shard layouts
    load:  wanted byte ranges ──▶ whole blocks ──coalesce──▶ runs ──cut──▶ spans
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from cloudckpt.format.boxes import Box
from cloudckpt.format.shard import HeaderEntry, encode_header

__all__ = ["Piece", "ShardLayout", "Span", "lay_out", "plan_spans", "split_box"]

# safetensors readers refuse a header over 100 MB; this bounds an estimate that never falls below the real size.
_HEADER_LIMIT_BYTES = 64 << 20


class Piece(NamedTuple):
    """A box of one chunk that lies, dense and row-major, in one shard.

    Attributes:
        chunk: the chunk's place in the sequence given to `lay_out`.
        offsets: where the box starts in the whole tensor.
        sizes: the box's extent.
        local_start: the box's first byte within the chunk's row-major bytes.
        start: its first byte within the shard object.
        nbytes: its length.
    """

    chunk: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_start: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """One shard to be written: its header, then its pieces in order without holes."""

    number: int
    header: bytes
    pieces: tuple[Piece, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """One ranged read of an object: the bytes [start, stop)."""

    start: int
    stop: int


def split_box(sizes: Sequence[int], *, limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most `limit` elements, each contiguous in the row-major order of the whole.

    Yields (offsets, sizes) in row-major order. Cuts along the first axis while a row fits the limit; a row that
    does not fit is cut in the same way itself. An empty box is yielded once, whole.
    """
    if math.prod(sizes) <= limit:
        yield (0,) * len(sizes), tuple(sizes)
        return
    row = math.prod(sizes[1:])
    if row <= limit:
        step = limit // row
        for start in range(0, sizes[0], step):
            yield (start,) + (0,) * (len(sizes) - 1), (min(step, sizes[0] - start), *sizes[1:])
        return
    for index in range(sizes[0]):
        for offsets, part in split_box(sizes[1:], limit=limit):
            yield (index, *offsets), (1, *part)


def lay_out(
    chunks: Sequence[Box],
    *,
    shard_bytes: int,
    metadata: dict[str, str],
    group_of: Callable[[str], Hashable] | None = None,
) -> list[ShardLayout]:
    """Place every chunk's bytes into shards of at most `shard_bytes` data bytes each.

    Small chunks share a shard; a chunk larger than a shard is cut into contiguous boxes. Within a shard wider
    dtypes come first, so that every piece is aligned to its own element size. Deterministic.
    With `group_of` no shard has tensors of two groups: what changes does not stand beside what stays.
    """
    pieces = _pieces(chunks, shard_bytes)
    if group_of is None:
        groups = _pack(pieces, chunks, shard_bytes)
    else:
        of_groups: dict[Hashable, list[Piece]] = {}
        for piece in pieces:
            of_groups.setdefault(group_of(chunks[piece.chunk].name), []).append(piece)
        groups = [shard for of_group in of_groups.values() for shard in _pack(of_group, chunks, shard_bytes)]
    return [_place(number, group, chunks, metadata) for number, group in enumerate(groups)]


def _pieces(chunks: Sequence[Box], shard_bytes: int) -> Iterator[Piece]:
    """Yield the pieces of every chunk, before they have a place in a shard."""
    for number, chunk in enumerate(chunks):
        item = chunk.itemsize_bytes
        if (nbytes := math.prod(chunk.sizes) * item) <= shard_bytes:
            yield Piece(number, chunk.offsets, chunk.sizes, 0, 0, nbytes)
            continue
        local_start = 0
        for offsets, sizes in split_box(chunk.sizes, limit=max(1, shard_bytes // item)):
            nbytes = math.prod(sizes) * item
            origin = tuple(base + offset for base, offset in zip(chunk.offsets, offsets, strict=True))
            yield Piece(number, origin, sizes, local_start, 0, nbytes)
            local_start += nbytes


def _pack(pieces: Iterable[Piece], chunks: Sequence[Box], shard_bytes: int) -> list[list[Piece]]:
    """Fill one shard after the other, in order; keeps neighbours together, which makes partial loads cheap."""
    groups: list[list[Piece]] = []
    room = header_room = 0
    for piece in pieces:
        # JSON spends at most 6 bytes on a character and 63 on the numbers of a dimension, the slice included.
        entry_bytes = 160 + 6 * len(chunks[piece.chunk].name) + 64 * len(piece.sizes)
        if not groups or piece.nbytes > room or entry_bytes > header_room:
            groups.append([])
            room, header_room = shard_bytes, _HEADER_LIMIT_BYTES
        groups[-1].append(piece)
        room -= piece.nbytes
        header_room -= entry_bytes
    return groups


def _place(number: int, group: list[Piece], chunks: Sequence[Box], metadata: dict[str, str]) -> ShardLayout:
    group = sorted(group, key=lambda piece: -chunks[piece.chunk].itemsize_bytes)
    entries = [
        HeaderEntry(name, chunks[piece.chunk].dtype, piece.sizes, piece.nbytes)
        for name, piece in zip(_unique_names(group, chunks), group, strict=True)
    ]
    header = encode_header(entries, metadata=metadata)
    starts = list(accumulate((piece.nbytes for piece in group), initial=len(header)))
    pieces = tuple(
        Piece(chunk, offsets, sizes, local_start, start, nbytes)
        for (chunk, offsets, sizes, local_start, _, nbytes), start in zip(group, starts, strict=False)
    )
    return ShardLayout(number=number, header=header, pieces=pieces, size_bytes=starts[-1])


def _unique_names(group: list[Piece], chunks: Sequence[Box]) -> list[str]:
    """Name each piece for safetensors readers: the tensor's name, with its slice when it is only a part."""
    seen: set[str] = {"__metadata__"}
    names = []
    for piece in group:
        name = base = _entry_name(piece, chunks[piece.chunk])
        again = 2
        while name in seen:
            name, again = f"{base}#{again}", again + 1
        seen.add(name)
        names.append(name)
    return names


def _entry_name(piece: Piece, chunk: Box) -> str:
    if piece.sizes == chunk.shape:
        return chunk.name
    slices = ",".join(f"{start}:{start + size}" for start, size in zip(piece.offsets, piece.sizes, strict=True))
    return f"{chunk.name}[{slices}]"


def plan_spans(ranges: Iterable[tuple[int, int]], *, size_bytes: int, block_bytes: int, span_bytes: int) -> list[Span]:
    """Cover the wanted byte ranges of one object with ranged reads of whole blocks.

    Ranges that touch the same or neighbouring blocks are read together; no block is read twice; every span but
    one that ends the object is a multiple of `block_bytes` long and at most `span_bytes`.

    Args:
        ranges: [start, stop) byte ranges within the object; empty ones need no bytes.
        size_bytes: the object's size.
        block_bytes: its checksum blocks.
        span_bytes: the most that one read may fetch, a multiple of `block_bytes`.
    """
    runs: list[list[int]] = []
    for start, stop in sorted(wanted for wanted in ranges if wanted[0] < wanted[1]):
        first, last = start // block_bytes, -(-stop // block_bytes)
        if runs and first <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], last)
        else:
            runs.append([first, last])
    spans = []
    for first, last in runs:
        limit = min(last * block_bytes, size_bytes)
        spans += [Span(at, min(at + span_bytes, limit)) for at in range(first * block_bytes, limit, span_bytes)]
    return spans
