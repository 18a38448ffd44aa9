"""Turn the name of a large language model and a number of ranks into what each rank plans and writes, without a tensor.

FSDP2's layout: every tensor is cut along its first axis in equal parts, of which the last may be short or empty;
parameters in bfloat16, Adam's two averages in float32, a step counter per parameter, which every rank has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cloudckpt.format.boxes import Box, BoxTable, Column, ragged_places
from cloudckpt.format.layout import lay_out
from cloudckpt.format.shard import DIGEST_BYTES, block_counts
from cloudckpt.options import Options
from cloudckpt.saving.tally import Written

__all__ = ["MODELS", "Fsdp", "Model", "Tensor"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A whole tensor of the state."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sizes that make a Llama-like model."""

    layers: int
    hidden: int
    ffn: int
    kv: int
    vocab: int

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield "tok_embeddings.weight", (self.vocab, self.hidden)
        square, narrow = (self.hidden, self.hidden), (self.kv, self.hidden)
        of_layer: dict[str, Shape] = {"attention.wq": square, "attention.wk": narrow, "attention.wv": narrow}
        of_layer |= {"attention.wo": square, "attention_norm": (self.hidden,), "ffn_norm": (self.hidden,)}
        of_layer |= {f"feed_forward.w{part}": (self.ffn, self.hidden) for part in (1, 3)}
        of_layer |= {"feed_forward.w2": (self.hidden, self.ffn)}
        for layer in range(self.layers):
            for name, shape in of_layer.items():
                yield f"layers.{layer}.{name}.weight", shape
        yield "norm.weight", (self.hidden,)
        yield "output.weight", (self.vocab, self.hidden)

    def state(self) -> list[Tensor]:
        """Return the parameters, then Adam's state."""
        parameters = list(self.parameters())
        state = [Tensor(name=f"model.{name}", dtype="bfloat16", shape=shape) for name, shape in parameters]
        for name, shape in parameters:
            of_parameter = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
            state += [
                Tensor(name=f"optim.state.{name}.{part}", dtype="float32", shape=of_part)
                for part, of_part in of_parameter.items()
            ]
        return state


MODELS = {
    "70B": Model(layers=80, hidden=8192, ffn=28672, kv=1024, vocab=128256),
    "405B": Model(layers=126, hidden=16384, ffn=53248, kv=1024, vocab=128256),
}


@dataclass(frozen=True)
class _Laid:
    """The pieces of a rank, apart from where its boxes start."""

    tensors: tuple[tuple[str, ...], tuple[str, ...], tuple[Shape, ...]]
    tensor: Column
    chunk: Column
    inner: Column  # where the pieces start in their chunks
    sizes: Column
    shard: Column
    start: Column
    shard_sizes: Column


class Fsdp:
    """A state cut over a number of ranks; equal to what real ranks would send, but for the bytes of digests."""

    def __init__(self, state: Sequence[Tensor], world_size: int, *, attempt: str = "0" * 16) -> None:
        self.world_size = world_size
        self.attempt = attempt
        self._state = list(state)
        self._laid: dict[bytes, _Laid] = {}
        self._rng = np.random.default_rng(0)
        self._names = tuple(tensor.name for tensor in state)
        self._dtypes = tuple(tensor.dtype for tensor in state)
        self._shapes = tuple(tensor.shape for tensor in state)

    def boxes(self, rank: int) -> list[Box]:
        """Return what a rank lists, one object per box."""
        return [Box(tensor.name, tensor.dtype, tensor.shape, *self._part(tensor, rank)) for tensor in self._state]

    def _part(self, tensor: Tensor, rank: int) -> tuple[Shape, Shape]:
        if not tensor.shape:
            return (), ()
        rows, *rest = tensor.shape
        step = -(-rows // self.world_size)
        start, stop = min(rank * step, rows), min((rank + 1) * step, rows)
        return (start, *(0 for _ in rest)), (stop - start, *rest)

    @cached_property
    def _whole(self) -> tuple[Column, Column, Column]:
        """Extents of all tensors in a row, the places of their first axes, and the rows that a rank has of each."""
        extents = np.asarray([extent for shape in self._shapes for extent in shape], dtype=np.int64)
        firsts = np.cumsum([0, *map(len, self._shapes)], dtype=np.int64)[:-1]
        places = firsts[[bool(shape) for shape in self._shapes]]
        return extents, places, -(-extents[places] // self.world_size)

    def table(self, rank: int) -> BoxTable:
        """Return `BoxTable.of(boxes(rank))`, faster."""
        extents, places, step = self._whole
        offsets, sizes = np.zeros_like(extents), extents.copy()
        offsets[places] = np.minimum(rank * step, extents[places])
        sizes[places] = np.minimum((rank + 1) * step, extents[places]) - offsets[places]
        return BoxTable(
            names=self._names,
            dtypes=self._dtypes,
            shapes=self._shapes,
            tensor=np.arange(len(self._state)),
            offsets=offsets,
            sizes=sizes,
        )

    def written(self, rank: int, rows: Column) -> Written:
        """Return what the rank would report after it wrote these rows of its table."""
        table = self.table(rank).take(rows)
        signature = table.tensor.tobytes() + table.sizes.tobytes()
        if signature not in self._laid:
            self._laid[signature] = _lay(table)
        laid = self._laid[signature]
        origin = table.offsets[ragged_places(table.firsts(), laid.chunk)]
        names, dtypes, shapes = laid.tensors
        block_bytes = Options().block_bytes
        blocks = int(block_counts(laid.shard_sizes, block_bytes).sum())
        return Written(
            rank=rank,
            attempt=self.attempt,
            boxes=BoxTable(
                names=names,
                dtypes=dtypes,
                shapes=shapes,
                tensor=laid.tensor,
                offsets=origin + laid.inner,
                sizes=laid.sizes,
            ),
            shard=laid.shard,
            start=laid.start,
            shard_sizes=laid.shard_sizes,
            digests=self._rng.bytes(DIGEST_BYTES * blocks),
            values={"train.step": 1, "train.seed": 0} if rank == 0 else {},
        )


def _lay(table: BoxTable) -> _Laid:
    """Lay boxes out in shards. Ranks whose boxes are as large share this; their headers differ by a few digits."""
    boxes = list(table)
    shards = lay_out(boxes, shard_bytes=Options().shard_bytes, metadata={})
    pieces = [(shard, piece) for shard in shards for piece in shard.pieces]
    named = BoxTable.of(boxes[piece.chunk]._replace(offsets=piece.offsets, sizes=piece.sizes) for _, piece in pieces)
    chunk = np.asarray([piece.chunk for _, piece in pieces], dtype=np.int64)
    return _Laid(
        tensors=(named.names, named.dtypes, named.shapes),
        tensor=named.tensor,
        chunk=chunk,
        inner=named.offsets - table.offsets[ragged_places(table.firsts(), chunk)],
        sizes=named.sizes,
        shard=np.asarray([shard.number for shard, _ in pieces], dtype=np.int64),
        start=np.asarray([piece.start for _, piece in pieces], dtype=np.int64),
        shard_sizes=np.asarray([shard.size_bytes for shard in shards], dtype=np.int64),
    )
