"""Write what a DCP save plan names: one of the two rooms that know `torch.distributed.checkpoint`'s types.

    SavePlan ──▶ chunks ──layout──▶ shards ──upload──▶ WriteResults ──gathered by DCP──▶ plan == results?
             ──▶ index ──put──▶ manifest ──catalog.commit──▶ committed

`StorageWriter` is implemented directly: DCP's own file-system writer loses the errors of its helper threads and
overwrites in place. Planners stay DCP's or the user's. Values never meet pickle: the object behind a BYTE_IO item
is taken from the planner and encoded by our codec. Keeps FORMAT invariants 2, 3 and 4.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from cloudckpt import codec
from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.codec import DTYPE_NAMES, JsonValue
from cloudckpt.environment import environment
from cloudckpt.errors import OptionsError, SaveFailedError, UnsupportedValueError
from cloudckpt.index import FORMAT_VERSION, ChunkEntry, Index, ShardEntry, TensorEntry
from cloudckpt.keys import index_key, new_attempt, shard_key
from cloudckpt.layout import Chunk, Piece, ShardLayout, lay_out
from cloudckpt.manifest import IndexRef, Manifest, digest_of, metadata_to_json, metrics_to_json
from cloudckpt.options import Options
from cloudckpt.store import open_store, probe_create
from cloudckpt.tree import PathElement
from cloudckpt.upload import Budget, ShardJob, upload

__all__ = ["CloudWriter", "Target", "check_tensor"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one checkpoint goes: a catalog, and the step and epoch of a root (or the URL itself)."""

    catalog: Catalog
    prefix: str = ""
    step: int | None = None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class _StoredItem:
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


@dataclass(slots=True)
class _Totals:
    """What `finish` adds up for the manifest."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    values: dict[str, JsonValue] = field(default_factory=dict)
    shards: list[ShardEntry] = field(default_factory=list)


class CloudWriter(StorageWriter):
    """Save with `torch.distributed.checkpoint` straight to a URL.

    ```python
    dcp.save(state_dict, storage_writer=CloudWriter("s3://bucket/run-7/final"))
    ```

    One writer writes one checkpoint; `dcp.save(..., checkpoint_id=url)` points it at another URL. Nothing is
    visible at the URL until the last request, the create of `manifest.json`, has succeeded; then `checkpoint` holds
    what was committed (on the coordinator).
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, object] | None = None,
        engine: str = "auto",
        options: Options | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Remember where to save; the store is opened when a save begins.

        Args:
            url: a directory, `s3://…`, `gs://…` or any fsspec URL; it becomes one checkpoint.
            storage_options: fsspec's own options, the same for both engines.
            engine: `auto`, `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
            metrics: numbers to be kept with the checkpoint.
            metadata: values to be kept with the checkpoint.

        Raises:
            OptionsError: metrics that are no numbers.
            UnsupportedValueError: metadata that the codec refuses.
        """
        self._url = os.fspath(url)
        self._storage_options = storage_options
        self._engine = engine
        self._options = options or Options()
        self._metrics = metrics_to_json(metrics)
        self._metadata = metadata_to_json(metadata)
        self._target: Target | None = None
        self._is_own_store = True
        self._paths: dict[str, list[PathElement]] = {}
        self._begin()

    @classmethod
    def to(
        cls,
        target: Target,
        *,
        options: Options,
        paths: dict[str, list[PathElement]],
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> CloudWriter:
        """Return a writer for a place whose catalog the caller keeps open."""
        writer = cls(target.catalog.store.url, options=options, metrics=metrics, metadata=metadata)
        writer._target = target
        writer._is_own_store = False
        writer._paths = paths
        return writer

    def _begin(self) -> None:
        self._attempt = ""
        self._rank = 0
        self._is_coordinator = False
        self._began_s = 0.0
        self._world_size = 1
        self.checkpoint: Checkpoint | None = None

    # -- the steps of a save, in DCP's order ---------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the writer at another URL."""
        if checkpoint_id is not None:
            self._close()
            self._url = os.fspath(checkpoint_id)
        self._begin()

    def _close(self) -> None:
        """Let go of the store; one that was opened here is closed."""
        if self._target is not None and self._is_own_store:
            self._target.catalog.store.close()
        self._target = None
        self._is_own_store = True

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL; opening it says more."""
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: the manifest says all there is."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Open the store, agree on an attempt id, and refuse early what could only fail late."""
        if kwargs.get("use_collectives") is False:
            raise OptionsError("CloudWriter needs use_collectives=True: one manifest commits all ranks' shards")
        refuse_lonely_rank()
        self._begin()
        self._began_s = time.monotonic()
        self._rank = int(str(kwargs.get("rank") or 0))
        self._is_coordinator = is_coordinator
        target = self._open()
        if is_coordinator and target.step is None:
            probe_create(target.catalog.store, single_writer=self._options.single_writer)
            if target.catalog.is_taken(target.prefix):
                raise target.catalog.exists_error(target.prefix)
        self._attempt = self._agree_on_attempt()

    def _open(self) -> Target:
        if self._target is None:
            store = open_store(
                self._url, storage_options=self._storage_options, engine=self._engine, options=self._options
            )
            self._target = Target(catalog=Catalog(store))
        return self._target

    def _agree_on_attempt(self) -> str:
        """Draw an attempt id; every rank of a process group gets rank 0's.

        Not carried in a plan: with DCP's plan caching a rank reuses its old plan, and with it the old id.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return new_attempt()
        self._world_size = dist.get_world_size()
        agreed = [new_attempt()]
        dist.broadcast_object_list(agreed, src=0)
        return agreed[0]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what the format cannot hold, before a byte is written."""
        for item in plan.items:
            if item.tensor_data is not None:
                check_layout(item.index.fqn, item.tensor_data.properties.layout, item.tensor_data.properties.dtype)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans to DCP's planners."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload this rank's chunks as shards, encode its values; return when all of it is durable."""
        try:
            results = self._write(plan, planner)
        except BaseException:
            self._close_own()
            raise
        if not self._is_coordinator:
            self._close_own()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        tensor_items = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        values = [item for item in plan.items if item.type is WriteItemType.BYTE_IO]
        stored = {id(item): _value_item(item, planner, self._rank) for item in values}
        stored |= self._write_tensors(tensor_items, planner)
        return [
            WriteResult(index=item.index, size_in_bytes=_nbytes(stored[id(item)]), storage_data=stored[id(item)])
            for item in plan.items
        ]

    def _close_own(self) -> None:
        if self._is_own_store:
            self._close()

    def _write_tensors(self, items: Sequence[WriteItem], planner: SavePlanner) -> dict[int, _StoredItem]:
        chunks = [_chunk(item) for item in items]
        shards = lay_out(chunks, shard_bytes=self._options.shard_bytes, metadata={"cloudckpt": self._attempt})
        source = _Source(items, planner, shards)
        target = self._open()
        jobs = [self._job(shard, chunks, source, target.prefix) for shard in shards]
        uploaded = upload(
            target.catalog.store,
            jobs,
            block_bytes=self._options.block_bytes,
            concurrency=self._options.concurrency,
            budget=Budget(self._options.memory_budget_bytes),
        )
        records = tuple(
            (shard.number, done.size_bytes, done.digests) for shard, done in zip(shards, uploaded, strict=True)
        )
        return _stored_items(items, chunks, shards, records, self._rank)

    def _job(self, shard: ShardLayout, chunks: Sequence[Chunk], source: _Source, prefix: str) -> ShardJob:
        def open_shard() -> list[memoryview]:
            views = [source.view(chunks[piece.chunk], piece) for piece in shard.pieces]
            return [memoryview(shard.header), *(view for view in views if view.nbytes)]

        return ShardJob(
            key=prefix + shard_key(self._attempt, self._rank, shard.number),
            size_bytes=shard.size_bytes,
            # A transport may copy a body once; staged pieces (device memory, non-contiguous) are one more copy.
            cost_bytes=shard.size_bytes + sum(piece.nbytes for piece in shard.pieces if source.is_staged(piece)),
            open=open_shard,
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every planned chunk was written exactly once, write the index, and commit."""
        try:
            self.checkpoint = self._commit(metadata, results)
        finally:
            self._close_own()

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> Checkpoint:
        target = self._open()
        paths = _paths_of(metadata) or self._paths
        totals = _check_against_plan(metadata, results)
        index = Index(
            format_version=FORMAT_VERSION,
            attempt=self._attempt,
            block_bytes=self._options.block_bytes,
            tensors=totals.tensors,
            values=totals.values,
            paths=paths,
            shards=tuple(totals.shards),
        )
        data = index.encode()
        target.catalog.store.put(target.prefix + index_key(self._attempt), [memoryview(data)])
        return target.catalog.commit(self._manifest(target, index, data), prefix=target.prefix)

    def _manifest(self, target: Target, index: Index, data: bytes) -> Manifest:
        store = target.catalog.store
        total_bytes = sum(shard.size_bytes for shard in index.shards)
        elapsed_s = time.monotonic() - self._began_s
        return Manifest(
            format_version=FORMAT_VERSION,
            state="committed",
            step=target.step,
            epoch=target.epoch,
            attempt=self._attempt,
            created_at="",
            world_size=self._world_size,
            total_bytes=total_bytes,
            tensor_count=len(index.tensors),
            shard_count=len(index.shards),
            index=IndexRef(size_bytes=len(data), sha256=digest_of(data)),
            metrics=self._metrics,
            metadata=self._metadata,
            environment=environment(store.url, store.engine),
            summary={"seconds": round(elapsed_s, 4), "bytes_per_s": round(total_bytes / max(elapsed_s, 1e-9), 1)},
        )

    def __getstate__(self) -> dict[str, object]:
        """Pickle without connections; refuses options, because they may hold credentials (FORMAT invariant 16)."""
        return portable_state(self.__dict__, self._storage_options, kept_open="_target")


def portable_state(
    state: Mapping[str, object], storage_options: Mapping[str, object] | None, *, kept_open: str
) -> dict[str, object]:
    """Return what a writer or reader may carry to another process: everything but its open store."""
    if storage_options:
        raise OptionsError(
            "a writer or reader with storage_options cannot be pickled, because they may hold credentials; let the "
            "environment or a profile supply them, and pass no storage_options"
        )
    return {**state, kept_open: None}


def refuse_lonely_rank() -> None:
    """Refuse to act as the only rank when the launcher started several and no process group exists.

    DCP would silently treat each process as the coordinator of a save of its own.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size.isdigit() and int(world_size) > 1 and not (dist.is_available() and dist.is_initialized()):
        raise OptionsError(
            f"WORLD_SIZE is {world_size} and no process group exists; call torch.distributed.init_process_group() "
            "before saving or restoring"
        )


def check_layout(name: str, layout: torch.layout, dtype: torch.dtype) -> None:
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
    """Raise `UnsupportedValueError` for a quantized, sparse, nested or meta tensor."""
    if tensor.is_nested:
        raise UnsupportedValueError(
            f"tensor {name!r} is nested; save tensor.unbind() as a list", key=name, type_name="nested tensor"
        )
    check_layout(name, tensor.layout, tensor.dtype)
    if tensor.is_meta:
        raise UnsupportedValueError(
            f"tensor {name!r} is on the meta device and has no data; materialize it first", key=name, type_name="meta"
        )


def _chunk(item: WriteItem) -> Chunk:
    data = item.tensor_data
    if data is None:
        raise OptionsError(f"the planner planned tensor {item.index.fqn!r} without its sizes")
    dtype = data.properties.dtype
    return Chunk(
        name=item.index.fqn,
        dtype=DTYPE_NAMES[dtype],
        itemsize_bytes=dtype.itemsize,
        shape=tuple(data.size),
        offsets=tuple(data.chunk.offsets),
        sizes=tuple(data.chunk.sizes),
    )


class _Source:
    """Resolve planned tensors when their first piece is needed, and let go of them after the last."""

    def __init__(self, items: Sequence[WriteItem], planner: SavePlanner, shards: Sequence[ShardLayout]) -> None:
        self._items = items
        self._planner = planner
        self._uses = Counter(piece.chunk for shard in shards for piece in shard.pieces)
        self._tensors: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._is_stock = _hands_out_its_own(planner)

    def is_staged(self, piece: Piece) -> bool:
        """Tell whether the piece's bytes will be copied to the host, or together, before they are sent."""
        return not self._is_stock or not _has_host_bytes(self._resolve(piece.chunk))

    def view(self, chunk: Chunk, piece: Piece) -> memoryview:
        """Return the piece's bytes: the tensor's own memory where it is dense on the host."""
        with self._lock:
            tensor = self._tensors.get(piece.chunk)
            if tensor is None:
                tensor = self._tensors[piece.chunk] = self._resolve(piece.chunk)
            self._uses[piece.chunk] -= 1
            if self._uses[piece.chunk] == 0:
                del self._tensors[piece.chunk]
        return _piece_view(tensor, chunk, piece)

    def _resolve(self, number: int) -> torch.Tensor:
        item = self._items[number]
        tensor = self._planner.resolve_data(item)
        data = item.tensor_data
        if not isinstance(tensor, torch.Tensor) or data is None:
            raise OptionsError(f"the planner resolved {item.index.fqn!r} to a {type(tensor).__name__}, not a tensor")
        tensor = tensor.detach()
        check_tensor(item.index.fqn, tensor)
        if tensor.dtype != data.properties.dtype or tensor.numel() != math.prod(data.chunk.sizes):
            raise OptionsError(
                f"the planner planned {item.index.fqn!r} as {data.properties.dtype} {tuple(data.chunk.sizes)} and "
                f"resolved it to {tensor.dtype} {tuple(tensor.shape)}; a plan must describe what is written"
            )
        return tensor


def _has_host_bytes(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _piece_view(tensor: torch.Tensor, chunk: Chunk, piece: Piece) -> memoryview:
    if piece.nbytes == 0:
        return memoryview(b"")
    if _has_host_bytes(tensor):
        return _bytes_view(tensor)[piece.local_start : piece.local_start + piece.nbytes]
    box = tensor.reshape(chunk.sizes) if tensor.shape != chunk.sizes else tensor
    for axis, (start, base, size) in enumerate(zip(piece.offsets, chunk.offsets, piece.sizes, strict=True)):
        box = box.narrow(axis, start - base, size)
    return _bytes_view(box.resolve_conj().resolve_neg().to("cpu").contiguous())


def _bytes_view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a dense host tensor as bytes; the view keeps the tensor alive."""
    array: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data


def _value_item(item: WriteItem, planner: SavePlanner, rank: int) -> _StoredItem:
    return _StoredItem(value=codec.encode(_object_of(item, planner), key=item.index.fqn), rank=rank)


def _object_of(item: WriteItem, planner: SavePlanner) -> object:
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
    return isinstance(planner, DefaultSavePlanner) and (
        type(planner).resolve_data is DefaultSavePlanner.resolve_data
        and type(planner).transform_object is DefaultSavePlanner.transform_object
    )


def _stock_bytes(value: object) -> bytes:
    """Return what the stock planner makes of a value; torch writes equal values as equal bytes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def _stored_items(
    items: Sequence[WriteItem],
    chunks: Sequence[Chunk],
    shards: Sequence[ShardLayout],
    records: tuple[tuple[int, int, bytes], ...],
    rank: int,
) -> dict[int, _StoredItem]:
    pieces: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int, int]]] = defaultdict(list)
    for shard in shards:
        for piece in shard.pieces:
            pieces[piece.chunk].append((piece.offsets, piece.sizes, shard.number, piece.start))
    return {
        id(item): _StoredItem(
            offsets=chunk.offsets,
            sizes=chunk.sizes,
            dtype=chunk.dtype,
            pieces=tuple(pieces[number]),
            rank=rank,
            shards=records if number == 0 else (),
        )
        for number, (item, chunk) in enumerate(zip(items, chunks, strict=True))
    }


def _nbytes(stored: _StoredItem) -> int:
    if not stored.dtype:
        return 0
    return math.prod(stored.sizes) * codec.DTYPES[stored.dtype].itemsize


def _paths_of(metadata: Metadata) -> dict[str, list[PathElement]]:
    """Return DCP's own record of nesting, when a stock planner flattened the state."""
    data = metadata.planner_data
    if not isinstance(data, Mapping):
        return {}
    return {name: list(path) for name, path in data.items() if isinstance(path, tuple)}


def _check_against_plan(metadata: Metadata, results: list[list[WriteResult]]) -> _Totals:
    """Compare what was planned with what was written; FORMAT invariant 3."""
    written: dict[str, list[_StoredItem]] = defaultdict(list)
    for result in (result for of_rank in results for result in of_rank):
        written[result.index.fqn].append(result.storage_data)
    totals = _Totals()
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


def _collect_shards(items: Iterable[list[_StoredItem]], totals: _Totals) -> dict[tuple[int, int], int]:
    found = {}
    for item in (item for of_name in items for item in of_name):
        for number, size_bytes, digests in item.shards:
            found[item.rank, number] = ShardEntry(
                rank=item.rank, number=number, size_bytes=size_bytes, digests=base64.b64encode(digests).decode()
            )
    totals.shards = [found[place] for place in sorted(found)]
    return {place: ordinal for ordinal, place in enumerate(sorted(found))}


def _take_value(name: str, written: list[_StoredItem], totals: _Totals) -> list[str]:
    if len(written) != 1 or written[0].dtype:
        return [f"value {name!r} was written {len(written)} times"]
    totals.values[name] = written[0].value
    return []


def _take_tensor(
    name: str,
    planned: TensorStorageMetadata,
    written: list[_StoredItem],
    ordinals: Mapping[tuple[int, int], int],
    totals: _Totals,
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
