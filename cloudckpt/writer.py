"""Write what a DCP save plan names: the writing one of the rooms that know `torch.distributed.checkpoint`'s types.

    SavePlan ──▶ chunks ──layout──▶ shards ──upload──▶ WriteResults ──gathered by DCP──▶ plan == results?
             ──▶ index ──put──▶ manifest ──catalog.commit──▶ committed

`StorageWriter` is implemented directly: DCP's own file-system writer loses the errors of its helper threads and
overwrites in place. Planners stay DCP's or the user's; `source` takes the bytes out of them, and `tally` compares
plan and results. Keeps FORMAT invariants 2, 3 and 4.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from cloudckpt import codec
from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.environment import environment
from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.index import FORMAT_VERSION, Index
from cloudckpt.keys import index_key, new_attempt, shard_key
from cloudckpt.layout import Chunk, ShardLayout, lay_out
from cloudckpt.manifest import IndexRef, Manifest, digest_of, metadata_to_json, metrics_to_json
from cloudckpt.options import Options
from cloudckpt.source import Source, Staging, check_layout, chunk_of, object_of
from cloudckpt.store import RetryingStore, Store, StoreStats, open_store, probe_create
from cloudckpt.tally import StoredItem, check_against_plan, stored_items
from cloudckpt.tree import PathElement
from cloudckpt.upload import Budget, ShardJob, upload

__all__ = ["CloudWriter", "Target", "portable_state", "refuse_lonely_rank"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one checkpoint goes: a catalog, and the step and epoch of a root (or the URL itself)."""

    catalog: Catalog
    prefix: str = ""
    step: int | None = None
    epoch: int = 0


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
        self._stats_before = StoreStats()
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
        self._stats_before = _stats(target.catalog.store)
        self._attempt = self._agree_on_attempt(target)

    def _open(self) -> Target:
        if self._target is None:
            store = open_store(
                self._url, storage_options=self._storage_options, engine=self._engine, options=self._options
            )
            self._target = Target(catalog=Catalog(store))
        return self._target

    def _agree_on_attempt(self, target: Target) -> str:
        """Draw an attempt id; every rank of a process group gets the first rank's, or the error that it met.

        Not carried in a plan: with DCP's plan caching a rank reuses its old plan, and with it the old id. The error
        travels in place of the id, because a rank that only raised would leave the others waiting.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self._draw_attempt(target)
        self._world_size = dist.get_world_size()
        agreed: list[str | CloudCkptError] = [""]
        if dist.get_rank() == 0:
            try:
                agreed = [self._draw_attempt(target)]
            except CloudCkptError as exc:
                agreed = [exc]
        dist.broadcast_object_list(agreed, src=0)
        if isinstance(agreed[0], CloudCkptError):
            raise agreed[0]
        return agreed[0]

    def _draw_attempt(self, target: Target) -> str:
        """Return a fresh id, once the place was found to be free and its store to be safe."""
        if target.step is None:
            probe_create(target.catalog.store, single_writer=self._options.single_writer)
            if target.catalog.is_taken(target.prefix):
                raise target.catalog.exists_error(target.prefix)
        return new_attempt()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what the format cannot hold, before a byte is written."""
        with self._closing_after_a_fault():
            for item in plan.items:
                if item.tensor_data is not None:
                    check_layout(item.index.fqn, item.tensor_data.properties.layout, item.tensor_data.properties.dtype)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans to DCP's planners."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload this rank's chunks as shards, encode its values; return when all of it is durable."""
        with self._closing_after_a_fault():
            results = self._write(plan, planner)
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
            WriteResult(index=item.index, size_in_bytes=stored[id(item)].nbytes, storage_data=stored[id(item)])
            for item in plan.items
        ]

    def _close_own(self) -> None:
        if self._is_own_store:
            self._close()

    @contextmanager
    def _closing_after_a_fault(self) -> Iterator[None]:
        """Close a store of our own when this rank fails: nothing more will be called."""
        try:
            yield
        except BaseException:
            self._close_own()
            raise

    def _write_tensors(self, items: Sequence[WriteItem], planner: SavePlanner) -> dict[int, StoredItem]:
        chunks = [chunk_of(item) for item in items]
        shards = lay_out(chunks, shard_bytes=self._options.shard_bytes, metadata={"cloudckpt": self._attempt})
        source = Source(items, planner, shards)
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
        return stored_items(items, chunks, shards, records, self._rank)

    def _job(self, shard: ShardLayout, chunks: Sequence[Chunk], source: Source, prefix: str) -> ShardJob:
        def open_shard(staging: memoryview) -> list[memoryview]:
            room = Staging(staging)
            views = [source.view(chunks[piece.chunk], piece, room) for piece in shard.pieces]
            return [memoryview(shard.header), *(view for view in views if view.nbytes)]

        staging_bytes = Staging.room_for(piece.nbytes for piece in shard.pieces if source.is_staged(piece))
        return ShardJob(
            key=prefix + shard_key(self._attempt, self._rank, shard.number),
            size_bytes=shard.size_bytes,
            # A transport may copy a body once.
            cost_bytes=shard.size_bytes + staging_bytes,
            staging_bytes=staging_bytes,
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
        totals = check_against_plan(metadata, results)
        index = Index(
            format_version=FORMAT_VERSION,
            attempt=self._attempt,
            block_bytes=self._options.block_bytes,
            tensors=totals.tensors,
            values=totals.values,
            paths=paths,
            shards=tuple(totals.shards),
        )
        key = target.prefix + index_key(self._attempt)
        # What a reader would refuse (chunks of a planner's that overlap, say) must not be committed.
        index.check(key=key)
        data = index.encode()
        target.catalog.store.put(key, [memoryview(data)])
        return target.catalog.commit(self._manifest(target, index, data), prefix=target.prefix)

    def _manifest(self, target: Target, index: Index, data: bytes) -> Manifest:
        store = target.catalog.store
        total_bytes = sum(shard.size_bytes for shard in index.shards)
        elapsed_s = time.monotonic() - self._began_s
        spent = _stats(store) - self._stats_before
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
            summary={
                "seconds": round(elapsed_s, 4),
                "bytes_per_s": round(total_bytes / max(elapsed_s, 1e-9), 1),
                "requests": float(spent.requests),
                "retries": float(spent.retries),
            },
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


def _stats(store: Store) -> StoreStats:
    return store.stats() if isinstance(store, RetryingStore) else StoreStats()


def _value_item(item: WriteItem, planner: SavePlanner, rank: int) -> StoredItem:
    return StoredItem(value=codec.encode(object_of(item, planner), key=item.index.fqn), rank=rank)


def _paths_of(metadata: Metadata) -> dict[str, list[PathElement]]:
    """Return DCP's own record of nesting, when a stock planner flattened the state."""
    data = metadata.planner_data
    if not isinstance(data, Mapping):
        return {}
    return {name: list(path) for name, path in data.items() if isinstance(path, tuple)}
