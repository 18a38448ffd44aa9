"""Say what is in a checkpoint without building a state: its tensors by prefix, and the numbers of one tensor.

A tensor is read in runs of a few MiB, each verified, so that its size does not matter: memory holds one run and what is
in flight for it. Order and shape of the elements do not matter, either: pieces are taken as they lie.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.format import DTYPES, ChunkEntry, Index, plan_spans
from cloudckpt.options import Options
from cloudckpt.root import Checkpoint, ShardPlaces
from cloudckpt.store import Store
from cloudckpt.transfer import Budget, Fetch, Gauge, ShardSource, download, span_bytes_for

__all__ = ["Group", "TensorNumbers", "groups_of", "tensor_numbers"]

_RUN_BYTES = 16 << 20
# As many as torch takes by one thread: the others have the next spans to read.
_PART_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The tensors whose names begin alike.

    Attributes:
        prefix: the first parts of their names.
        tensor_count: how many.
        total_bytes: of their elements.
        share: of the bytes of all tensors, 0 to 1.
    """

    prefix: str
    tensor_count: int
    total_bytes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNumbers:
    """What one tensor holds.

    Attributes:
        name: under which it was saved.
        dtype: torch's name.
        shape: its extent.
        pieces: in how many it lies on the store.
        total_bytes: of its elements.
        minimum: the smallest element that is a number; None if there is none, or where they have no order (complex).
        maximum: the largest one, likewise.
        mean: of those that are finite; of a complex tensor, of their absolute values.
        std: the standard deviation of the same, over all of them.
        nan_count: elements that are no number.
        inf_count: elements that are infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: int
    total_bytes: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nan_count: int
    inf_count: int


def groups_of(index: Index, depth: int) -> list[Group]:
    """Return the tensors of a checkpoint by the first `depth` parts of their names, the largest group first."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in index.tensors.items():
        prefix = ".".join(name.split(".")[:depth])
        counts[prefix] += 1
        sizes[prefix] += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    total_bytes = sum(sizes.values())
    groups = [
        Group(
            prefix=prefix, tensor_count=counts[prefix], total_bytes=size, share=size / total_bytes if total_bytes else 0
        )
        for prefix, size in sizes.items()
    ]
    return sorted(groups, key=lambda group: (-group.total_bytes, group.prefix))


def tensor_numbers(
    store: Store,
    checkpoint: Checkpoint,
    index: Index,
    name: str,
    *,
    options: Options | None = None,
    gauge: Gauge | None = None,
) -> TensorNumbers:
    """Read one tensor and say what it holds.

    Args:
        store: where the checkpoint is.
        checkpoint: whose.
        index: its index.
        name: the tensor's.
        options: parallelism and patience.
        gauge: is told how many bytes were read.

    Raises:
        CheckpointNotFoundError: the checkpoint has no tensor of that name.
        IntegrityError: an object is missing or differs from what was committed.
        StorageError: the store could not be read.
    """
    saved = index.tensors.get(name)
    if saved is None:
        near = [other for other in index.tensors if name in other] or list(index.tensors)
        raise CheckpointNotFoundError(
            f"{checkpoint.url} has no tensor {name!r}; it has {', '.join(sorted(near)[:5])}{', …' * (len(near) > 5)}"
        )
    dtype = DTYPES[saved.dtype]
    pieces = index.covering({name: [((0,) * len(saved.shape), saved.shape)]})[name]
    sums, places = _Sums(), ShardPlaces.of(store, checkpoint)
    if gauge is not None:
        gauge.begin(math.prod(saved.shape) * dtype.itemsize)
    for piece in pieces:
        for run in _runs(places, index, piece, dtype.itemsize, options or Options()):
            # A part at a time: in float64 it takes up to eight times as much, and more than once.
            for part in torch.split(torch.frombuffer(run, dtype=dtype), _PART_ELEMENTS):
                sums.add(part)
            if gauge is not None:
                gauge.move(len(run))
    return TensorNumbers(
        name=name,
        dtype=saved.dtype,
        shape=tuple(saved.shape),
        pieces=len(pieces),
        total_bytes=math.prod(saved.shape) * dtype.itemsize,
        minimum=sums.minimum,
        maximum=sums.maximum,
        mean=sums.mean if sums.count else None,
        std=math.sqrt(sums.squares / sums.count) if sums.count else None,
        nan_count=sums.nan_count,
        inf_count=sums.inf_count,
    )


def _runs(places: ShardPlaces, index: Index, piece: ChunkEntry, itemsize: int, options: Options) -> Iterator[bytearray]:
    """Yield the bytes of one piece, whole elements at a time; what is yielded is overwritten by the next."""
    entry = index.shard(piece.rank, piece.number)
    source = ShardSource(
        key=places.key(entry),
        size_bytes=entry.size_bytes,
        digests=entry.digests,
        block_bytes=index.block_bytes,
    )
    end = piece.start + math.prod(piece.sizes) * itemsize
    span_bytes = span_bytes_for(_RUN_BYTES, block_bytes=index.block_bytes, options=options)
    for start in range(piece.start, end, _RUN_BYTES):
        stop = min(end, start + _RUN_BYTES)
        spans = plan_spans(
            [(start, stop)], size_bytes=entry.size_bytes, block_bytes=index.block_bytes, span_bytes=span_bytes
        )
        run = bytearray(stop - start)
        take = partial(_take, run, start)
        fetches = [Fetch(shard=source, span=span, consume=take) for span in spans]
        budget = Budget(options.transfer_budget_bytes)
        download(places.store, fetches, concurrency=options.concurrency, budget=budget)
        yield run


def _take(run: bytearray, run_start: int, at: int, data: memoryview) -> None:
    """Copy into a run what a block has of it."""
    start, stop = max(run_start, at), min(run_start + len(run), at + len(data))
    run[start - run_start : stop - run_start] = data[start - at : stop - at]


class _Sums:
    """The running numbers, in float64: mean and squares of deviations by Chan's way of joining two parts."""

    def __init__(self) -> None:
        self.count = self.nan_count = self.inf_count = 0
        self.mean = self.squares = 0.0
        self.minimum: float | None = None
        self.maximum: float | None = None

    def add(self, run: torch.Tensor) -> None:
        """Add a part, a flat one."""
        if run.numel() == 0:
            return
        is_ordered = not run.is_complex()
        if run.is_floating_point() and self._add_finite(run):
            return
        wide = run.to(torch.complex128).abs() if not is_ordered else run.to(torch.float64)
        is_nan = wide.isnan()
        self.nan_count += int(is_nan.sum())
        there = wide[~is_nan]
        if there.numel() and is_ordered:
            # Of whole numbers as they are: float64 does not hold all of 64 bits.
            exact = run if not (run.is_floating_point() or run.dtype == torch.bool) else there
            low, high = exact.min().item(), exact.max().item()
            self.minimum = low if self.minimum is None else min(self.minimum, low)
            self.maximum = high if self.maximum is None else max(self.maximum, high)
        finite = there[there.isfinite()]
        self.inf_count += there.numel() - finite.numel()
        if finite.numel():
            self._join(finite.numel(), float(finite.mean()), float(finite.var(correction=0)))

    def _add_finite(self, run: torch.Tensor) -> bool:
        """Add a part in few passes; False, and nothing is added, if an element is none that can be counted so."""
        wide = run.to(torch.float64)
        variance, mean = torch.var_mean(wide, correction=0)
        if not bool(variance.isfinite()):
            return False
        low, high = (float(end) for end in torch.aminmax(wide))
        self.minimum = low if self.minimum is None else min(self.minimum, low)
        self.maximum = high if self.maximum is None else max(self.maximum, high)
        self._join(run.numel(), float(mean), float(variance))
        return True

    def _join(self, count: int, mean: float, variance: float) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.squares += variance * count + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
