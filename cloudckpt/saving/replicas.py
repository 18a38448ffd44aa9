"""Find out whether tensors that several ranks hold are the same on all of them, before one of these ranks writes them.

    replicas ──a digest per set of holders──▶ rank 0: alike? ──if not──▶ a digest per box ──▶ names and ranks

A checkpoint has one of them only, so what differs would be lost without a word. The first digests are of every byte, up
to some GiB, when ranks save something for the first time. When they save it again they must cost little: small boxes
count whole, and of large ones other blocks at each save, until all had their turn. The second ones are of every byte.
Knows tensors and their boxes; rank 0's part (`doubtful_sets`, `refuse_replicas`) sees digests and names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import xxhash

from cloudckpt.errors import SaveFailedError
from cloudckpt.format import Box, BoxTable
from cloudckpt.ranks import named_ranks
from cloudckpt.saving.dedup import Replicas
from cloudckpt.transfer import bytes_of

__all__ = ["Details", "details_of", "digests_of_sets", "doubtful_sets", "refuse_replicas"]

_SHOWN = 8
_BLOCK_BYTES = 256 << 10
# Of one set of replicas. 256 MiB of host memory took 12 ms of a core, half of what an async save of them by two ranks
# keeps training waiting; 64 MiB took 3 ms.
_FIRST_BYTES = 4 << 30
_AGAIN_BYTES = 64 << 20
# What is copied from a device at once: 10,000 small tensors one by one would take longer than all of their bytes.
_BATCH_BYTES = 16 << 20
_DIGEST_BYTES = 16

Resolve = Callable[[int], torch.Tensor]
"""Returns this rank's tensor of a row of its table: the box, on any device, in any strides."""


class Details(NamedTuple):
    """What a rank tells of one set of replicas: its boxes, if it is the first holder, and a digest of each."""

    boxes: bytes
    digests: bytes


def digests_of_sets(replicas: Sequence[Replicas], resolve: Resolve, *, turn: int, is_first: bool) -> dict[int, bytes]:
    """Return a digest of each set by its number; equal bytes on two ranks and an equal `turn` give equal digests.

    Args:
        replicas: of this rank.
        resolve: row → tensor.
        turn: which blocks of large boxes count; each turn of consecutive ones has others.
        is_first: whether the ranks have not compared these boxes before.
    """
    limit_bytes = _FIRST_BYTES if is_first else _AGAIN_BYTES
    return {
        alike.number: _digest(map(resolve, alike.rows.tolist()), turn=turn, limit_bytes=limit_bytes)
        for alike in replicas
    }


def doubtful_sets(found: Sequence[Mapping[int, bytes]]) -> frozenset[int]:
    """Return the sets of which ranks have different digests."""
    of_set: dict[int, set[bytes]] = {}
    for digests in found:
        for number, digest in digests.items():
            of_set.setdefault(number, set()).add(digest)
    return frozenset(number for number, digests in of_set.items() if len(digests) > 1)


def details_of(
    replicas: Sequence[Replicas], resolve: Resolve, boxes: BoxTable, *, sets: frozenset[int], rank: int
) -> dict[int, Details]:
    """Return digests of every box in some sets, of all of its bytes."""
    return {
        alike.number: Details(
            boxes.take(alike.rows).encode() if rank == alike.first_rank else b"",
            b"".join(_digest([resolve(row)]) for row in alike.rows.tolist()),
        )
        for alike in replicas
        if alike.number in sets
    }


def refuse_replicas(found: Sequence[Mapping[int, Details]]) -> None:
    """Raise if a box is not the same on all ranks that hold it, with its name and these ranks.

    No box may differ although the first digests did: ranks that hold it on different devices sample other blocks.
    """
    problems: list[str] = []
    for number in sorted({number for of_rank in found for number in of_rank}):
        of_set = {rank: of_rank[number] for rank, of_rank in enumerate(found) if number in of_rank}
        boxes = next(details.boxes for details in of_set.values() if details.boxes)
        problems += _differences(BoxTable.decode(boxes), {rank: details.digests for rank, details in of_set.items()})
    if problems:
        left = len(problems) - _SHOWN
        shown = "; ".join([*problems[:_SHOWN], *([f"and {left} more"] if left > 0 else [])])
        raise SaveFailedError(
            f"the ranks hold different tensors where a checkpoint has one for all of them, and nothing was written: "
            f"{shown}. Make what should be the same so, and save again: of a module in DistributedDataParallel give "
            "the wrapper itself, whose buffers are those of rank 0; broadcast others (torch.distributed.broadcast). "
            "Hold an object whose state is each rank's own in cloudckpt.PerRank, or keep it out of the state"
        )


def _differences(boxes: BoxTable, digests: Mapping[int, bytes]) -> list[str]:
    if len(set(digests.values())) == 1:
        return []
    found = []
    for number, box in enumerate(boxes):
        ranks_of: dict[bytes, list[int]] = {}
        for rank, of_rank in digests.items():
            start = number * _DIGEST_BYTES
            ranks_of.setdefault(of_rank[start : start + _DIGEST_BYTES], []).append(rank)
        if len(ranks_of) > 1:
            found.append(f"{_named(box)} differs between {' and '.join(map(named_ranks, ranks_of.values()))}")
    return found


def _named(box: Box) -> str:
    what = f"{box.dtype} {box.shape}"
    if box.sizes == box.shape:
        return f"{box.name!r} ({what})"
    return f"the box of {box.sizes} at {box.offsets} of {box.name!r} ({what})"


# -- digests ------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Some elements of a tensor in row-major order."""

    tensor: torch.Tensor
    start: int
    stop: int

    def dense(self) -> torch.Tensor:
        """Return them side by side in memory, without a copy where they lie so."""
        flat = _dense(self.tensor, self.start, self.stop).resolve_conj().resolve_neg().contiguous()
        return flat.as_strided((len(flat),), (1,))  # a single element may have kept another stride


def _digest(tensors: Iterable[torch.Tensor], *, turn: int = 0, limit_bytes: int | None = None) -> bytes:
    """Return a digest of tensors' bytes, row-major: of all, or of those whose turn it is."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    digest = xxhash.xxh3_128()
    for device, there in by_device.items():
        parts = _parts(there, turn=turn, limit_bytes=limit_bytes)
        for memory in map(_host_bytes, parts) if device.type == "cpu" else _device_bytes(parts):
            digest.update(memory)
    return digest.digest()


def _parts(tensors: Sequence[torch.Tensor], *, turn: int, limit_bytes: int | None) -> Iterator[_Part]:
    """Yield tensors that are one block as they are, and others block by block, as many as the limit and turn allow."""
    large_bytes = sum(size for tensor in tensors if (size := tensor.nbytes) > _BLOCK_BYTES)
    stride = 1 if limit_bytes is None else max(1, -(-large_bytes // limit_bytes))
    skipped = turn % stride  # blocks to be passed over before the next one that counts
    for tensor in tensors:
        count = tensor.numel()
        if tensor.nbytes <= _BLOCK_BYTES:
            yield _Part(tensor, 0, count)
            continue
        size = _BLOCK_BYTES // tensor.itemsize
        blocks = -(-count // size)
        for block in range(skipped, blocks, stride):
            yield _Part(tensor, block * size, min(count, block * size + size))
        skipped = (skipped - blocks) % stride


def _host_bytes(part: _Part) -> memoryview:
    tensor = part.tensor
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return bytes_of(tensor).data[part.start * tensor.itemsize : part.stop * tensor.itemsize]
    return bytes_of(part.dense()).data


def _device_bytes(parts: Iterator[_Part]) -> Iterator[memoryview]:
    batch: list[torch.Tensor] = []
    size_bytes = 0
    for part in parts:
        batch.append(part.dense().view(torch.uint8))
        size_bytes += batch[-1].numel()
        if size_bytes >= _BATCH_BYTES:
            yield bytes_of(torch.cat(batch).cpu()).data
            batch, size_bytes = [], 0
    if batch:
        yield bytes_of(torch.cat(batch).cpu()).data


def _dense(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return elements of a tensor as one dimension; of a strided one, hardly more than these are copied."""
    if tensor.is_contiguous() or stop - start == tensor.numel():
        return tensor.reshape(-1)[start:stop]
    row = tensor[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _dense(tensor[first], start - first * row, stop - first * row)
    return tensor[first : last + 1].reshape(-1)[start - first * row : stop - first * row]
