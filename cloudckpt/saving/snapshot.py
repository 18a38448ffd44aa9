"""Copy the tensors of one rank's shards into staging memory, so that training may change them.

    Source ──host tensors──▶ copies by all cores ╮
           ──strided ones──▶ torch's own copy    ├──▶ slabs that hold a shard's bytes in their order
           ──CUDA tensors──▶ a side stream each  ╯      (of their device)

Knows tensors and where a shard's pieces lie; memory and threads are `transfer`'s. Called by the training's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch

from cloudckpt.format import DTYPE_NAMES, Box, ShardLayout, lay_out
from cloudckpt.options import Options
from cloudckpt.saving.source import Source, Staging
from cloudckpt.transfer import Copy, Slabs, Stage, copying_threads, free_bytes, ranks_here, slab_bytes

__all__ = ["Staged", "expected_shards", "staging_limits", "take_snapshot"]

logger = logging.getLogger(__name__)

# obstore, and our own files, take buffers as they are: 2 GiB through either kept 1 to 9 MiB (benchmarks/run.py).
_SENDS_IN_PLACE = frozenset({"local", "obstore"})


@dataclass(frozen=True, slots=True)
class Staged:
    """Where the copies are, and what their transfers may take besides.

    Attributes:
        stage: the copies.
        transfer_bytes: host memory that transports may take for what is in flight.
        is_sent_in_place: whether the transport sends the copies as they lie, without one of its own.
        devices: the CUDA devices that copies come from.
    """

    stage: Stage
    transfer_bytes: int
    is_sent_in_place: bool
    devices: tuple[torch.device, ...] = ()

    @classmethod
    def of(
        cls,
        slabs: Slabs,
        source: Source,
        options: Options,
        *,
        engines: Collection[str],
        rank: int,
        is_kept: bool = False,
    ) -> Staged:
        """Prepare to stage the shards of a source; nothing is copied yet.

        With several engines one may send what another has failed to, so that copies are kept, if all have room; also
        with `is_kept`.
        """
        sizes = [shard.size_bytes - len(shard.header) for shard in source.shards]
        whole_bytes = sum(map(slab_bytes, sizes))
        is_sent_in_place = _SENDS_IN_PLACE.issuperset(engines)
        staging_bytes, transfer_bytes = staging_limits(
            whole_bytes, options, is_sent_in_place=is_sent_in_place, held_bytes=slabs.held_bytes
        )
        if staging_bytes < whole_bytes and not slabs.is_short:
            slabs.is_short = True  # told once: the saves that follow will do the same
            logger.warning(
                "rank %d: %d MiB are to be saved and there is room for copies of %d MiB, so async_save waits for "
                "uploads to free some; %s",
                rank,
                sum(sizes) >> 20,
                staging_bytes >> 20,
                f"half of the free memory is shared by {ranks_here()} ranks of this machine"
                if options.memory_budget_bytes is None
                else "raise memory_budget_bytes if the host has more",
            )
        devices = source.cuda_devices() if torch.cuda.is_available() else ()
        is_kept = is_kept or len(engines) > 1
        stage = Stage(slabs, sizes, limit_bytes=staging_bytes, is_pinned=bool(devices), is_kept=is_kept)
        return cls(stage, transfer_bytes, is_sent_in_place, devices)


def staging_limits(
    size_bytes: int, options: Options, *, is_sent_in_place: bool, held_bytes: int = 0
) -> tuple[int, int]:
    """Return the bytes that copies of a state of `size_bytes` may take, and those for their transfers.

    A budget is for the copies where they are sent as they lie; else it is shared out: what the copies leave is for
    transfers, up to a quarter of it, because a transport may copy what is in flight. Without a budget the copies may
    take half of the free memory (what is held for them already counts as free), shared by the ranks of this machine.
    """
    budget = options.memory_budget_bytes
    if budget is not None:
        left = 0 if is_sent_in_place else min(budget // 4, options.concurrency * options.shard_bytes)
        copies = min(size_bytes, budget - left)
        return copies, budget - copies
    transfer_bytes = options.transfer_budget_bytes
    free = free_bytes()
    if free is None:
        return size_bytes, transfer_bytes
    return min(size_bytes, max(transfer_bytes, held_bytes + free // 2 // ranks_here())), transfer_bytes


def expected_shards(
    leaves: Mapping[str, object], options: Options, *, rank: int, size: int, engine: str
) -> tuple[list[int], bool]:
    """Return the bytes of the shards that a rank will have to stage, about, and whether a device's tensors are in it.

    What only the ranks' plan can tell, which of them writes a tensor that all have, is taken to be shared evenly.
    """
    tensors = [leaf for leaf in leaves.values() if isinstance(leaf, torch.Tensor)]
    local = [_local(tensor) for tensor in tensors]
    own = [
        part
        for number, (part, tensor) in enumerate(zip(local, tensors, strict=True))
        if part is not tensor or number % size == rank
    ]
    chunks = [
        Box(str(number), DTYPE_NAMES[tensor.dtype], (*tensor.shape,), (0,) * tensor.dim(), (*tensor.shape,))
        for number, tensor in enumerate(own)
        if tensor.dtype in DTYPE_NAMES
    ]
    shards = lay_out(chunks, shard_bytes=options.shard_bytes, metadata={})
    sizes = [slab_bytes(shard.size_bytes - len(shard.header)) for shard in shards]
    limit_bytes, _ = staging_limits(sum(sizes), options, is_sent_in_place=engine in _SENDS_IN_PLACE)
    is_pinned = torch.cuda.is_available() and any(tensor.device.type == "cuda" for tensor in own)
    return _within(sizes, limit_bytes), is_pinned


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a distributed tensor, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _within(sizes: Sequence[int], limit_bytes: int) -> list[int]:
    """Return the first sizes, as far as they go; one at least."""
    totals = accumulate(sizes)
    return [size for size, total in zip(sizes, totals, strict=True) if total <= limit_bytes] or list(sizes[:1])


def take_snapshot(staged: Staged, source: Source) -> None:
    """Copy every shard's bytes; return when the tensors may change.

    Raises:
        StageClosedError: the upload that was to take the copies has ended.
    """
    streams = [_side_stream(device) for device in staged.devices]

    def plan(number: int, memory: memoryview) -> list[Copy]:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            return _copies(source.shards[number], source, memory, is_lazy=bool(streams))

    def settle() -> None:
        for stream in streams:
            stream.synchronize()

    staged.stage.run(plan, settle=settle, threads=copying_threads())


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a device that begins when what this thread has given the device is done.

    A copy to the host runs in the current stream of the device that it comes from, whichever device is current. So
    there is one for each: a stream of another device neither orders that copy nor waits for it, and bytes that have not
    arrived would get a digest that blesses them.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _copies(shard: ShardLayout, source: Source, memory: memoryview, *, is_lazy: bool) -> list[Copy]:
    """Copy what has no bytes of its own on the host; return the copies that are left."""
    copies = []
    for piece in shard.pieces:
        start = piece.start - len(shard.header)
        place = memory[start : start + piece.nbytes]
        room = Staging(place)
        view = source.view(piece, room, is_lazy=is_lazy)
        if piece.nbytes and not room.used_bytes:
            copies.append(Copy(place, view))
    return copies
