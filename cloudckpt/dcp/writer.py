"""Write what a DCP save plan names: a storage writer for `torch.distributed.checkpoint`'s own `save`.

    SavePlan ──saving──▶ shards, and one WriteResult ──gathered by DCP──▶ plan == results? ──▶ index, manifest

`StorageWriter` is implemented directly: DCP's own file-system writer loses the errors of its helper threads and
overwrites in place. Planners stay DCP's or the user's; `saving` takes the bytes out of them, and compares plan and
results. Keeps FORMAT invariants 2, 3 and 4.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from cloudckpt.dcp.address import Address
from cloudckpt.errors import CommitUnknownError, OptionsError
from cloudckpt.format import JsonValue, PathElement, codec, new_attempt, record_of_call
from cloudckpt.options import Options
from cloudckpt.ranks import refuse_lonely_rank
from cloudckpt.root import Checkpoint, Exists, Target, check_exists, check_place
from cloudckpt.saving import (
    RankOutput,
    Record,
    Source,
    Written,
    assemble,
    check_against_plan,
    chunk_of,
    commit_index,
    discard,
    is_elsewhere,
    object_of,
    stats_of,
)
from cloudckpt.store import StoreStats, probe_create

__all__ = ["CloudWriter"]

logger = logging.getLogger(__name__)


class CloudWriter(StorageWriter):
    """Save with `torch.distributed.checkpoint` straight to a URL.

    ```python
    dcp.save(state_dict, storage_writer=CloudWriter("s3://bucket/run-7/final"))
    ```

    One writer writes one checkpoint; `dcp.save(..., checkpoint_id=url)` points it at another URL. Nothing is
    visible at the URL until the last request, the create of `manifest.json`, has succeeded; then `checkpoint` holds
    what was committed: on the coordinator, and in the process that saved. With `AsyncCheckpointerType.PROCESS` that is
    another one than the caller's, where `checkpoint` stays None; the future says when the URL can be read.
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
        exists: Exists = "raise",
    ) -> None:
        """Remember where to save; the store is opened when a save begins.

        Args:
            url: a directory, `s3://…`, `gs://…` or any fsspec URL; it becomes one checkpoint.
            storage_options: fsspec's own options, the same for every engine.
            engine: what moves the bytes: `auto` (the best that serves the URL), `local`, `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
            metrics: numbers to be kept with the checkpoint.
            metadata: values to be kept with the checkpoint.
            exists: where the URL holds a checkpoint: `raise`, or `replace` it as soon as the new one is complete.
                Between two requests at the end there is none; if the process dies just there, an error at the URL says
                how to have the old one back.

        Raises:
            OptionsError: metrics that are no numbers, or an unknown `exists`.
            UnsupportedValueError: metadata that the codec refuses.
        """
        self._address = Address(url, storage_options=storage_options, engine=engine, options=options)
        self._options = self._address.options
        self._metrics, self._metadata = record_of_call(metrics, metadata)
        self._exists = check_exists(exists)
        self._begin()

    def _begin(self) -> None:
        self._attempt = ""
        self._rank: int | None = None
        self._is_coordinator = False
        self._began_s = time.monotonic()
        self._stats_before = StoreStats()
        self.checkpoint: Checkpoint | None = None

    # -- the steps of a save, in DCP's order ---------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the writer at another URL."""
        if checkpoint_id is not None:
            self._address.move(checkpoint_id)
        self._begin()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL; opening it says more."""
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: the manifest says all there is."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Open the store, choose an attempt id, and refuse early what could only fail late."""
        if kwargs.get("use_collectives") is False:
            raise OptionsError("CloudWriter needs use_collectives=True: one manifest commits all ranks' shards")
        if not self._options.single_writer:
            refuse_lonely_rank(
                ". Where this process alone saves to that URL (DCP does not tell a writer of no_dist=True), give "
                "options=Options(single_writer=True)"
            )
        self._begin()
        rank = kwargs.get("rank")
        self._rank = rank if isinstance(rank, int) else None
        self._is_coordinator = is_coordinator
        with self._closing_after_a_fault():
            catalog = self._address.catalog()
            self._stats_before = stats_of(catalog.store)
            if is_coordinator:
                probe_create(catalog.store, single_writer=self._options.single_writer)
                check_place(catalog, self._exists)
        # Each rank draws its own. A broadcast would need a process group, which DCP does not hand to a writer, or the
        # default one, where a trainer's own collectives may be under way in another thread; a plan would carry an old
        # one, because DCP's plan caching uses the plan of an earlier save again. The index says who wrote under which.
        self._attempt = new_attempt()

    def _target(self) -> Target:
        return Target(catalog=self._address.catalog(), exists=self._exists)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what the format cannot hold, before a byte is written."""
        with self._closing_after_a_fault():
            for item in plan.items:
                if codec.is_part_name(item.index.fqn):
                    raise OptionsError(f"{item.index.fqn!r} is a name of the library's own; rename that entry")
                if item.tensor_data is not None:
                    chunk_of(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans to DCP's planners, and write into each whose it is."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload this rank's chunks as shards, encode its values; return when all of it is durable."""
        with self._closing_after_a_fault():
            try:
                results = self._write(plan, planner)
            except Exception:
                discard(self._target(), {self._attempt}, self._options)
                raise
        if not self._is_coordinator:
            self._address.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        tensors = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO and not is_elsewhere(item)]
        values, parts = _values_of([item for item in plan.items if item.type is WriteItemType.BYTE_IO], planner)
        # An older torch tells a writer its rank by nothing but the place of its plan. A newer one says it beforehand,
        # which holds also where a cached plan is one of another group.
        rank = plan.storage_data if self._rank is None else self._rank
        output = RankOutput(target=self._target(), attempt=self._attempt, rank=rank or 0, options=self._options)
        source = Source.planned(
            tensors, planner, attempt=self._attempt, shard_bytes=self._options.shard_bytes, parts=parts
        )
        message = output.write(source, values).encode()
        # One message per rank: an object per item would take minutes where thousands of ranks meet.
        return [
            WriteResult(
                index=item.index,
                size_in_bytes=0 if item.tensor_data is None or is_elsewhere(item) else chunk_of(item).nbytes,
                storage_data=None if place else message,
            )
            for place, item in enumerate(plan.items)
        ]

    @contextmanager
    def _closing_after_a_fault(self) -> Iterator[None]:
        """Close a store of our own when this rank fails: nothing more will be called."""
        try:
            yield
        except BaseException:
            self._address.close()
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every planned chunk was written exactly once, write the index, and commit."""
        try:
            self.checkpoint = self._commit(metadata, results)
        finally:
            self._address.close()

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> Checkpoint:
        attempts = {self._attempt}

        def written() -> Iterator[Written]:
            for message in (result.storage_data for of_rank in results for result in of_rank):
                if message is not None:
                    one = Written.decode(message)
                    attempts.add(one.attempt)
                    yield one

        try:
            return self._commit_written(metadata, written(), len(results))
        except CommitUnknownError:
            raise
        except Exception:
            discard(self._target(), attempts, self._options)
            raise

    def _commit_written(self, metadata: Metadata, written: Iterator[Written], world_size: int) -> Checkpoint:
        paths = _paths_of(metadata)
        index = assemble(written, attempt=self._attempt, block_bytes=self._options.block_bytes, paths=paths)
        # What a reader would refuse (chunks of a planner's that overlap, say) must not be committed.
        check_against_plan(metadata, index)
        record = Record(
            metrics=self._metrics,
            metadata=self._metadata,
            world_size=world_size,
            began_s=self._began_s,
            spent_before=self._stats_before,
        )
        return commit_index(self._target(), index, record)


def _values_of(
    items: Sequence[WriteItem], planner: SavePlanner
) -> tuple[dict[str, JsonValue], dict[str, torch.Tensor]]:
    """Return the values of a plan, and tensors of what is too large to stand among them."""
    values: dict[str, JsonValue] = {}
    tensors: dict[str, torch.Tensor] = {}
    for item in items:
        name = item.index.fqn
        if name in values:
            raise OptionsError(f"the plan names value {name!r} twice; a plan must describe what is written")
        parts = codec.Parts()
        values[name] = codec.encode(object_of(item, planner), key=name, parts=parts)
        tensors |= parts.tensors(name)
    return values, tensors


def _paths_of(metadata: Metadata) -> dict[str, list[PathElement]]:
    """Return DCP's own record of nesting, when a stock planner flattened the state."""
    data = metadata.planner_data
    if not isinstance(data, Mapping):
        return {}
    return {name: list(path) for name, path in data.items() if isinstance(path, tuple)}
