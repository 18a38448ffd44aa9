"""Bring verified bytes of shards into the tensors that a load planner names.

    block's bytes ─deliver──▶ Landing ──▶ target's own memory                  where both sides are dense and alike
                                      └─▶ buffer ──copy, when complete──▶ target    elsewhere

A landing is one read item. Knows DCP's load planners and tensors; knows nothing of stores, and sees no byte that
was not verified. Entered by the download's threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import nn

from cloudckpt.errors import OptionsError
from cloudckpt.format import DTYPES, ChunkEntry, Index, TensorEntry
from cloudckpt.threads import new_lock
from cloudckpt.transfer import COMMON_DTYPES, Budget, Scratch, bytes_of, tensor_over

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

__all__ = ["Landing", "Taker", "Taking", "Whole", "deliver", "take_wholes", "takers_of"]

_PLAIN = frozenset((torch.Tensor, nn.Parameter))
# Larger ones PyTorch would copy with threads of its own, beside those that call it.
_SMALL_BYTES = 32 << 10


class Taker(Protocol):
    """Who takes the bytes [start, stop) of a shard, verified, in parts and from several threads.

    Attributes:
        buffer_bytes: host memory that it holds, taken from the budget, from its first byte on.
    """

    start: int
    stop: int
    buffer_bytes: int

    def accept(self, data: np.ndarray, at: int) -> None:
        """Take what is wanted of bytes that start at byte `at` of the shard; they change once it has returned."""

    def finish(self) -> None:
        """Note that there is nothing to take; called for whom that is so."""


def deliver(takers: Mapping[int, Sequence[Taker]], at: int, data: memoryview) -> None:
    """Hand a block, which starts at byte `at` of its shard, to all that take some of it.

    Args:
        takers: who takes, by where the blocks start.
        at: which block.
        data: its bytes.
    """
    array = np.frombuffer(data, dtype=np.uint8)
    for taker in takers[at]:
        taker.accept(array, at)


class Taking:
    """What the landings of one load share: the planner, whose methods need not be thread-safe, and the budget."""

    def __init__(self, planner: LoadPlanner, budget: Budget) -> None:
        self.planner = planner
        self.budget = budget
        self.scratch = Scratch()
        self.lock = new_lock()
        # A stock planner answers with a view of what it holds, as often as it is asked; another may allocate.
        self.is_stock = _hands_out_its_own(planner)


def _hands_out_its_own(planner: LoadPlanner) -> bool:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    return isinstance(planner, DefaultLoadPlanner) and (
        type(planner).resolve_tensor is DefaultLoadPlanner.resolve_tensor
        and type(planner).lookup_tensor is DefaultLoadPlanner.lookup_tensor
        and type(planner).transform_tensor is DefaultLoadPlanner.transform_tensor
    )


class Landing:
    """Where the bytes of one read item go: [start, stop) of a shard, into a part of one tensor.

    Several pool threads deliver to one landing, each its own bytes; the last one completes it.

    Attributes:
        buffer_bytes: host memory that it holds, taken from the budget, from its first byte to its last; 0 where the
            bytes go straight into the target.
    """

    def __init__(self, item: ReadItem, taking: Taking, tensor: TensorEntry, piece: ChunkEntry) -> None:
        self._item = item
        self._taking = taking
        self._dtype = DTYPES[tensor.dtype]
        self._lengths = tuple(item.lengths)
        self._strides = _dense_strides(piece.sizes)
        self._target: torch.Tensor | None = None
        self._into: np.ndarray | None = None
        self._buffer: memoryview | None = None
        count = math.prod(self._lengths)
        first = sum(at * stride for at, stride in zip(item.storage_offsets, self._strides, strict=True))
        last = first + sum((size - 1) * stride for size, stride in zip(self._lengths, self._strides, strict=True))
        self.start = piece.start + first * tensor.itemsize_bytes
        self.stop = piece.start + (last + 1) * tensor.itemsize_bytes if count else self.start
        self._is_dense = self.stop - self.start == count * tensor.itemsize_bytes
        self._missing_bytes = self.stop - self.start
        is_direct = taking.is_stock and self._is_direct(taking.planner.resolve_tensor(item))
        self.buffer_bytes = 0 if is_direct else self.stop - self.start

    def _is_direct(self, target: torch.Tensor) -> bool:
        return self._is_dense and _is_plain(target, self._dtype)

    def accept(self, data: np.ndarray, at: int) -> None:
        """Take this landing's part of verified bytes that start at byte `at` of the shard."""
        start, stop = max(at, self.start), min(at + len(data), self.stop)
        np.copyto(self._open()[start - self.start : stop - self.start], data[start - at : stop - at])
        with self._taking.lock:
            self._missing_bytes -= stop - start
            is_complete = self._missing_bytes == 0
        if is_complete:
            self.finish()

    def _open(self) -> np.ndarray:
        with self._taking.lock:
            if self._into is None:
                target = self._resolve()
                if self._is_direct(target):
                    self._into = bytes_of(target)
                else:
                    self._buffer = self._taking.scratch.take(self.stop - self.start)
                    self._into = np.frombuffer(self._buffer, dtype=np.uint8)
            return self._into

    def _resolve(self) -> torch.Tensor:
        target = self._taking.planner.resolve_tensor(self._item).detach()
        if tuple(target.shape) != self._lengths:
            raise OptionsError(
                f"the planner asked for {self._lengths} of {self._item.storage_index.fqn!r} and resolved a target of "
                f"{tuple(target.shape)}"
            )
        self._target = target
        return target

    def finish(self) -> None:
        """Copy a buffered item into its target, and tell the planner that the target is complete.

        Called once, when every byte is there (or none is needed).
        """
        with self._taking.lock:
            target = self._target if self._target is not None else self._resolve()
        if self._buffer is not None:
            source = torch.frombuffer(self._buffer, dtype=torch.uint8).view(self._dtype)
            target.copy_(source.as_strided(self._lengths, self._strides))
        with self._taking.lock:
            self._taking.planner.commit_tensor(self._item, target)
        if self._buffer is not None:
            self._taking.scratch.give(self._buffer)
        self._into = self._buffer = self._target = None
        self._taking.budget.free(self.buffer_bytes)


# -- tensors that lie in one piece, and are filled where they are ----------------------------------------------


class Whole(NamedTuple):
    """A tensor that is dense on the host, and the bytes [start, stop) of a shard that are all of it."""

    start: int
    stop: int
    tensor: torch.Tensor


def _is_dense_here(tensor: object) -> TypeGuard[torch.Tensor]:
    """Tell whether a tensor's memory is on the host, row-major and dense, and may be written to where it is."""
    return (
        type(tensor) in _PLAIN
        and (plain := cast("torch.Tensor", tensor)).is_cpu
        and plain.layout is torch.strided
        and plain.is_contiguous()
        and not (plain.is_conj() or plain.is_neg() or plain.is_inference())
        and plain.data_ptr() != 0
    )


def take_wholes(tensors: dict[str, object], index: Index) -> dict[tuple[int, int], list[Whole]]:
    """Take out the tensors, by name, that lie in one piece and are dense on the host: there is nothing to plan of them.

    They are nearly all, and DCP's planner would make some objects of each.

    Returns:
        What is to be filled, by rank and number of the shard, in the order of its bytes; without empty ones.
    """
    single = index.single_pieces()
    found: dict[tuple[int, int], list[Whole]] = {}
    for name in list(tensors):
        tensor, place = tensors[name], single.get(name)
        if place is None or not _is_dense_here(tensor):
            continue
        saved = index.tensors[name]
        if DTYPES[saved.dtype] is tensor.dtype and tensor.size() == saved.shape:
            rank, number, start = place
            if size_bytes := tensor.nbytes:
                found.setdefault((rank, number), []).append(Whole(start, start + size_bytes, tensor))
            del tensors[name]
    for of_shard in found.values():
        of_shard.sort(key=lambda whole: whole.start)
    return found


def takers_of(wholes: Sequence[Whole], start: int, stop: int) -> list[Taker]:
    """Return who takes tensors, in the order of their bytes, that have some in [start, stop) of a shard.

    Small ones that lie side by side there are taken together.
    """
    takers: list[Taker] = []
    run: list[Whole] = []
    for one in wholes:
        is_small = one.stop - one.start <= _SMALL_BYTES and one.tensor.dtype in COMMON_DTYPES
        is_small = is_small and start <= one.start and one.stop <= stop
        if run and not (is_small and one.start == run[-1].stop and one.tensor.dtype == run[-1].tensor.dtype):
            takers.append(_Run(run))
            run = []
        if is_small:
            run.append(one)
        else:
            takers.append(_Straight(one))
    return [*takers, _Run(run)] if run else takers


class _Straight:
    """Takes the bytes of one tensor, in parts, straight into its memory."""

    buffer_bytes = 0

    def __init__(self, whole: Whole) -> None:
        self.start, self.stop, tensor = whole
        self._into = bytes_of(tensor)

    def accept(self, data: np.ndarray, at: int) -> None:
        start, stop = max(at, self.start), min(at + len(data), self.stop)
        np.copyto(self._into[start - self.start : stop - self.start], data[start - at : stop - at])

    def finish(self) -> None:
        """Nothing is left to do."""


class _Run:
    """Takes the bytes of small tensors of one dtype, side by side in one span, by two calls for all of them."""

    buffer_bytes = 0

    def __init__(self, wholes: Sequence[Whole]) -> None:
        self.start, self.stop = wholes[0].start, wholes[-1].stop
        self._tensors = [whole.tensor for whole in wholes]

    def accept(self, data: np.ndarray, at: int) -> None:
        flat = tensor_over(data[self.start - at : self.stop - at], self._tensors[0].dtype)
        with torch.no_grad():
            parts = torch._C._nn.unflatten_dense_tensors(flat, self._tensors)  # noqa: SLF001 (there is no other)
            torch._foreach_copy_(self._tensors, parts)

    def finish(self) -> None:
        """Nothing is left to do."""


def _dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if sizes else ()


def _is_plain(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the target's memory is on the host and has the bytes of the format."""
    is_dense = target.layout is torch.strided and target.is_contiguous()
    is_same = target.dtype == dtype and not target.is_conj() and not target.is_neg()
    return target.device.type == "cpu" and type(target) is torch.Tensor and is_dense and is_same
