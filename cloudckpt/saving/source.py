"""Take the bytes and values behind planned items out of a DCP planner, and refuse what has none.

    WriteItem ──▶ Box          the planned box, for the layout
    Piece     ──▶ memoryview   the tensor's own memory where it is dense on the host, else a copy of that piece alone
    BYTE_IO   ──▶ object       never the bytes that the planner pickled

Knows DCP's planners and tensors; knows nothing of stores or commits. `Source` is entered by the upload's threads.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeGuard

import torch
from torch import nn

from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.format import DTYPE_NAMES, Box, BoxTable, Piece, ShardLayout, lay_out
from cloudckpt.late import AsyncCollectiveTensor, DefaultSavePlanner, DTensor
from cloudckpt.threads import new_lock
from cloudckpt.transfer import COMMON_DTYPES, bytes_of, has_memory, inner_names

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

__all__ = [
    "PieceSource",
    "Source",
    "Staging",
    "check_tensor",
    "chunk_of",
    "is_elsewhere",
    "is_plainly_dense",
    "object_of",
    "tensor_of",
    "whole_box",
]


# By these newer releases of torch know a plain tensor that is one rank's part of another.
_PART_OF_ANOTHER = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
_PLAIN = frozenset((torch.Tensor, nn.Parameter))
# What is smaller goes joined with its neighbours, until they are so many bytes: a view of each costs more than a copy.
_SMALL_BYTES = 32 << 10  # (PyTorch copies larger ones with threads of its own)
_RUN_BYTES = 1 << 20


def _check_layout(name: str, layout: torch.layout, dtype: torch.dtype) -> None:
    """Raise `UnsupportedValueError` for a tensor that has no dense bytes."""
    if layout is not torch.strided:
        raise UnsupportedValueError(
            f"tensor {name!r} has layout {layout}; save it dense (tensor.to_dense()) or as its parts",
            key=name,
            type_name=str(layout),
        )
    if dtype not in DTYPE_NAMES:
        raise UnsupportedValueError(
            f"tensor {name!r} has dtype {dtype}, which the format cannot hold; save its dequantized values or parts",
            key=name,
            type_name=str(dtype),
        )


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise `UnsupportedValueError` for a quantized, sparse, nested, meta or lazy tensor, or one without own memory."""
    if not is_plainly_dense(tensor):
        _check_closely(name, tensor)


def is_plainly_dense(tensor: torch.Tensor) -> bool:
    """Tell of what nearly all tensors are, at a fifth of the cost of a close look, that nothing is wrong with it."""
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in DTYPE_NAMES
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
        and not hasattr(tensor, _PART_OF_ANOTHER[0])
    )


def _check_closely(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        raise UnsupportedValueError(
            f"tensor {name!r} has no shape yet; run a batch through its lazy module first",
            key=name,
            type_name=type(tensor).__name__,
        )
    if tensor.is_nested:
        raise UnsupportedValueError(
            f"tensor {name!r} is nested; save tensor.unbind() as a list", key=name, type_name="nested tensor"
        )
    _check_layout(name, tensor.layout, tensor.dtype)
    if tensor.is_meta:
        raise UnsupportedValueError(
            f"tensor {name!r} is on the meta device and has no data; materialize it first", key=name, type_name="meta"
        )
    _check_subclass(name, _settled(tensor.to_local() if isinstance(tensor, DTensor) else tensor))


def _check_subclass(name: str, tensor: torch.Tensor) -> None:
    kind = type(tensor).__name__
    if all(hasattr(tensor, attribute) for attribute in _PART_OF_ANOTHER):
        raise UnsupportedValueError(
            f"tensor {name!r} is a CheckpointableTensor, a part of a larger one; save a DTensor in its place",
            key=name,
            type_name="CheckpointableTensor",
        )
    # One that tells DCP's planner of its parts (torchrec's shards) is saved part by part.
    if has_memory(tensor) or hasattr(tensor, "__create_write_items__"):
        return
    if inner := inner_names(tensor):
        raise UnsupportedValueError(
            f"tensor {name!r} is a {kind}, which has no bytes of its own; save what it consists of "
            f"({', '.join(inner)}), or the tensor that it was made of, and make it again after the restore",
            key=name,
            type_name=kind,
        )
    raise UnsupportedValueError(
        f"tensor {name!r} ({kind}) has no memory: it is a fake one, or its storage was freed; save one that has",
        key=name,
        type_name=kind,
    )


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a collective that may be under way results in, once it is there (for the current stream)."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def chunk_of(item: WriteItem) -> Box:
    """Return the box that an item plans to write.

    Raises:
        UnsupportedValueError: it has no dense bytes.
    """
    data = item.tensor_data
    if data is None:
        raise OptionsError(f"the planner planned tensor {item.index.fqn!r} without its sizes")
    _check_layout(item.index.fqn, data.properties.layout, data.properties.dtype)
    return Box(
        item.index.fqn,
        DTYPE_NAMES[data.properties.dtype],
        tuple(data.size),
        tuple(data.chunk.offsets),
        tuple(data.chunk.sizes),
    )


def is_elsewhere(item: WriteItem) -> bool:
    """Tell whether an item stands for nothing: a DTensor's rank outside of the mesh plans a box without dimensions."""
    data = item.tensor_data
    return data is not None and not len(data.chunk.offsets) == len(data.chunk.sizes) == len(data.size)


class Staging:
    """Memory for pieces that must be copied before they are sent, one after the other; `used_bytes` of it are taken."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.used_bytes = 0

    def take(self, size_bytes: int) -> memoryview:
        """Return the next `size_bytes`, aligned for any dtype."""
        start = self.used_bytes
        self.used_bytes += _aligned(size_bytes)
        return self._memory[start : start + size_bytes]

    @staticmethod
    def room_for(sizes_bytes: Iterable[int]) -> int:
        """Return the bytes that pieces of these sizes take."""
        return sum(map(_aligned, sizes_bytes))


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // 64) * 64


class PieceSource(Protocol):
    """Boxes that were laid out as shards, and their bytes, which threads ask for piece by piece.

    Attributes:
        chunks: the boxes.
        table: the same as columns.
        shards: where the bytes of these go.
    """

    chunks: Sequence[Box]
    table: BoxTable
    shards: Sequence[ShardLayout]

    def staging_bytes(self, pieces: Sequence[Piece]) -> int:
        """Return the bytes of the room that `views` is to be given for these pieces."""

    def views(self, pieces: Sequence[Piece], room: Staging) -> list[memoryview]:
        """Return the bytes of pieces, one after the other, which stay unchanged as long as the room."""


class Source:
    """One rank's planned tensors, resolved when their first piece is needed, and let go of after the last.

    Attributes:
        chunks: their boxes.
        table: the same as columns.
        shards: where the bytes of these go.
    """

    def __init__(
        self,
        chunks: Sequence[Box],
        resolve: Callable[[int], torch.Tensor],
        *,
        attempt: str,
        shard_bytes: int,
        table: BoxTable | None = None,
        is_stock: bool = True,
        group_of: Callable[[str], Hashable] | None = None,
    ) -> None:
        """Place boxes into shards; nothing is resolved yet.

        Args:
            chunks: the boxes.
            resolve: returns the tensor of a box, by its place, as `tensor_of` does.
            attempt: the attempt that the shards' headers name.
            shard_bytes: the most that one holds.
            table: the boxes as columns, if somebody has them.
            is_stock: whether `resolve` hands out what there is, and makes nothing anew.
            group_of: as for `lay_out`.
        """
        self.chunks = chunks
        self.table = BoxTable.of(chunks) if table is None else table
        self.shards: Sequence[ShardLayout] = lay_out(
            chunks, shard_bytes=shard_bytes, metadata={"cloudckpt": attempt}, group_of=group_of
        )
        self._resolve: Callable[[int], torch.Tensor] = resolve
        self._uses = Counter(piece.chunk for shard in self.shards for piece in shard.pieces)
        self._tensors: dict[int, torch.Tensor] = {}
        self._lock = new_lock()
        self._is_stock = is_stock

    @classmethod
    def planned(
        cls,
        items: Sequence[WriteItem],
        planner: SavePlanner,
        *,
        attempt: str,
        shard_bytes: int,
        parts: Mapping[str, torch.Tensor] | None = None,
    ) -> Self:
        """Place the tensors behind planned items into shards, and parts of values."""
        of_values = list((parts or {}).items())
        chunks = [*map(chunk_of, items), *(whole_box(name, part) for name, part in of_values)]

        def resolve(number: int) -> torch.Tensor:
            return tensor_of(items[number], planner) if number < len(items) else of_values[number - len(items)][1]

        return cls(chunks, resolve, attempt=attempt, shard_bytes=shard_bytes, is_stock=_hands_out_its_own(planner))

    def staging_bytes(self, pieces: Sequence[Piece]) -> int:
        """Return the bytes of those of these pieces that will be copied to the host, or together, before they go."""
        held, is_stock = self._held, self._is_stock
        return Staging.room_for(
            piece.nbytes for piece in pieces if not is_stock or not _has_host_bytes(held(piece.chunk))
        )

    def views(self, pieces: Sequence[Piece], room: Staging) -> list[memoryview]:
        """Return the bytes of pieces, one after the other; small neighbours of one dtype joined, and none empty."""
        found: list[memoryview] = []
        run: list[torch.Tensor] = []
        run_bytes = 0
        for piece in pieces:
            tensor = self._taken(piece)
            size_bytes = piece.nbytes
            if size_bytes > _SMALL_BYTES or size_bytes != tensor.nbytes or not _has_host_bytes(tensor):
                found += _joined(run)
                found.append(_piece_view(tensor, self.chunks[piece.chunk], piece, room, is_lazy=False))
                run, run_bytes = [], 0
            elif size_bytes:
                if run and (run[0].dtype != tensor.dtype or run_bytes >= _RUN_BYTES):
                    found += _joined(run)
                    run, run_bytes = [], 0
                run.append(tensor)
                run_bytes += size_bytes
        found += _joined(run)
        return [view for view in found if view.nbytes]

    def view(self, piece: Piece, room: Staging, *, is_lazy: bool = False) -> memoryview:
        """Return the piece's bytes: the tensor's own memory where it is dense on the host, else some of `room`.

        Where `is_lazy`, a copy from a CUDA device may go on, in that device's current stream, after it was begun;
        whoever has the room waits for it.
        """
        return _piece_view(self._taken(piece), self.chunks[piece.chunk], piece, room, is_lazy=is_lazy)

    def _taken(self, piece: Piece) -> torch.Tensor:
        """Return the tensor of a piece, which is let go of after its last one."""
        with self._lock:
            tensor = self._held(piece.chunk)
            self._uses[piece.chunk] -= 1
            if self._uses[piece.chunk] == 0:
                del self._tensors[piece.chunk]
        return tensor

    def forget(self) -> None:
        """Let go of the caller's tensors, all of which were copied."""
        self._resolve = _forgotten
        self._tensors.clear()

    def cuda_devices(self) -> tuple[torch.device, ...]:
        """Return the CUDA devices in whose memory some of the tensors lie."""
        devices = {self._resolve(chunk).device for chunk in self._uses}
        return tuple(sorted((device for device in devices if device.type == "cuda"), key=str))

    def _held(self, number: int) -> torch.Tensor:
        tensor = self._tensors.get(number)
        if tensor is None:
            tensor = self._tensors[number] = self._resolve(number)
        return tensor


def _forgotten(number: int) -> torch.Tensor:
    raise OptionsError(f"tensor {number} of a state was copied, and is asked for again")


def whole_box(name: str, tensor: torch.Tensor) -> Box:
    """Return the box that is all of a tensor."""
    shape = tuple(tensor.shape)
    return Box(name, DTYPE_NAMES[tensor.dtype], shape, (0,) * len(shape), shape)


def tensor_of(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    """Return the tensor behind an item: this rank's box of it, on its device, in its strides.

    Raises:
        OptionsError: it is not what was planned.
        UnsupportedValueError: it has no dense bytes.
    """
    tensor = planner.resolve_data(item)
    data = item.tensor_data
    if not isinstance(tensor, torch.Tensor) or data is None:
        raise OptionsError(f"the planner resolved {item.index.fqn!r} to a {type(tensor).__name__}, not a tensor")
    tensor = _settled(tensor)
    check_tensor(item.index.fqn, tensor)
    tensor = tensor.detach()
    if tensor.dtype != data.properties.dtype or tensor.numel() != math.prod(data.chunk.sizes):
        raise OptionsError(
            f"the planner planned {item.index.fqn!r} as {data.properties.dtype} {tuple(data.chunk.sizes)} and "
            f"resolved it to {tensor.dtype} {tuple(tensor.shape)}; a plan must describe what is written"
        )
    return tensor


def _has_host_bytes(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _piece_view(tensor: torch.Tensor, chunk: Box, piece: Piece, room: Staging, *, is_lazy: bool) -> memoryview:
    if piece.nbytes == 0:
        return memoryview(b"")
    if _has_host_bytes(tensor):
        return bytes_of(tensor).data[piece.local_start : piece.local_start + piece.nbytes]
    tensor = tensor.detach()
    box = tensor.reshape(chunk.sizes) if tensor.shape != chunk.sizes else tensor
    for axis, (start, base, size) in enumerate(zip(piece.offsets, chunk.offsets, piece.sizes, strict=True)):
        box = box.narrow(axis, start - base, size)
    memory = room.take(piece.nbytes)
    target = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).reshape(piece.sizes)
    if is_lazy and box.device.type == "cuda":
        # Else torch would flip signs on the host as soon as the copy was begun, in bytes that have not arrived.
        target.copy_(box.resolve_conj().resolve_neg(), non_blocking=True)
    else:
        target.copy_(box)
    return memory


def _joined(tensors: list[torch.Tensor]) -> list[memoryview]:
    """Return the bytes of dense host tensors of one dtype, joined by a single call; nothing for none."""
    if len(tensors) < 2 or tensors[0].dtype not in COMMON_DTYPES:
        return [bytes_of(tensor).data for tensor in tensors]
    with torch.no_grad():
        return [bytes_of(torch._C._nn.flatten_dense_tensors(tensors)).data]  # noqa: SLF001 (there is no other that joins many)


def object_of(item: WriteItem, planner: SavePlanner) -> object:
    """Return the object behind a BYTE_IO item, so that no pickle reaches the store.

    A planner of the user's own may change values, and answers with bytes that it has made with torch.save, in this
    process, just now. Where they are those of the object that it holds, that object is meant; else they are read
    back here, in memory.
    """
    if _hands_out_its_own(planner):
        found: object = planner.lookup_object(item.index)
        return found
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        raise OptionsError(f"the planner resolved {item.index.fqn!r} to a {type(data).__name__}, not to bytes")
    if isinstance(planner, DefaultSavePlanner):
        found = planner.lookup_object(item.index)
        if data.getvalue() == _stock_bytes(found):
            return found
    data.seek(0)
    try:
        loaded: object = torch.load(data, weights_only=True)
    except Exception as exc:  # the class of what torch.load refuses with is pickle's, which is not imported here
        raise UnsupportedValueError(
            f"{item.index.fqn!r}, as the planner gives it, holds more than plain values and tensors ({exc}); let "
            "resolve_data leave BYTE_IO items as they are",
            key=item.index.fqn,
            type_name="bytes",
        ) from exc
    return loaded


def _hands_out_its_own(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Tell whether a planner hands out what it holds; others may make a new object each time they are asked."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    return isinstance(planner, DefaultSavePlanner) and (
        type(planner).resolve_data is DefaultSavePlanner.resolve_data
        and type(planner).transform_object is DefaultSavePlanner.transform_object
    )


def _stock_bytes(value: object) -> bytes:
    """Return what the stock planner makes of a value; torch writes equal values as equal bytes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()
