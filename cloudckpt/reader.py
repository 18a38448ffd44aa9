"""Read what a DCP load plan names: the other room that knows `torch.distributed.checkpoint`'s types.

    manifest ──▶ index ──▶ DCP Metadata ──▶ planner (resharding) ──▶ read items
    read items ──layout──▶ spans ──download, verified──▶ landings ──▶ target tensors

Every piece in the index is one chunk to DCP, so its planners reshard over pieces and stay untouched. No pickle is
read: a value is decoded by our codec and, for planners that expect one, made into bytes in memory. Keeps FORMAT
invariants 1 and 12.
"""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cloudckpt import codec
from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.codec import DTYPES
from cloudckpt.download import Fetch, ShardSource, download
from cloudckpt.errors import (
    ChecksumError,
    CloudCkptError,
    ManifestError,
    MissingShardError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
)
from cloudckpt.index import INDEX_LIMIT_BYTES, ChunkEntry, Index
from cloudckpt.keys import index_key, shard_key
from cloudckpt.landing import Landing, Taking, deliver
from cloudckpt.layout import plan_spans
from cloudckpt.manifest import digest_of
from cloudckpt.options import Options
from cloudckpt.store import open_store
from cloudckpt.tree import PathElement
from cloudckpt.upload import Budget
from cloudckpt.writer import portable_state, refuse_lonely_rank

__all__ = ["CloudReader", "read_index"]


def read_index(catalog: Catalog, checkpoint: Checkpoint) -> Index:
    """Read the index that a checkpoint's manifest commits. One request.

    Raises:
        MissingShardError: it is not on the store.
        ChecksumError: it is not byte for byte what was committed.
        ManifestError: it cannot be decoded.
    """
    key = checkpoint.prefix + index_key(checkpoint.attempt)
    committed = checkpoint.manifest.index
    if committed is None or committed.size_bytes > INDEX_LIMIT_BYTES:
        raise ManifestError(f"the manifest of {checkpoint.url} commits no readable index", key=key)
    try:
        data = catalog.store.read(key, limit_bytes=committed.size_bytes + 1)
    except ObjectNotFoundError as exc:
        raise MissingShardError(
            f"index {key}, which the manifest commits, is not on the store; restore an older step", key=key
        ) from exc
    except StorageError as exc:
        size_bytes = catalog.store.head(key).size_bytes
        if size_bytes <= committed.size_bytes:
            raise
        raise ChecksumError(
            f"index {key} has {size_bytes} bytes, and {committed.size_bytes} were committed; restore an older step",
            key=key,
        ) from exc
    if len(data) != committed.size_bytes or digest_of(data) != committed.sha256:
        raise ChecksumError(
            f"index {key} has {len(data)} bytes that differ from the {committed.size_bytes} committed; "
            "restore an older step",
            key=key,
        )
    index = Index.decode(data, key=key)
    if index.attempt != checkpoint.attempt:
        raise ManifestError(f"index {key} is of attempt {index.attempt}; restore an older step", key=key)
    return index


class CloudReader(StorageReader):
    """Load with `torch.distributed.checkpoint` straight from a URL.

    ```python
    dcp.load(state_dict, storage_reader=CloudReader("s3://bucket/run-7/step-0000012000-e0003"))
    ```

    The URL is one checkpoint: what `CloudWriter` was given, or the `url` of a `Checkpoint`. Every byte that reaches
    a tensor was compared with the digest that the checkpoint's index holds.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, object] | None = None,
        engine: str = "auto",
        options: Options | None = None,
    ) -> None:
        """Remember what to load; the store is opened when a load begins.

        Args:
            url: the checkpoint's prefix.
            storage_options: fsspec's own options, the same for both engines.
            engine: `auto`, `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
        """
        self._url = os.fspath(url)
        self._storage_options = storage_options
        self._engine = engine
        self._options = options or Options()
        self._catalog: Catalog | None = None
        self._is_own_store = True
        self._begin()

    @classmethod
    def of(cls, catalog: Catalog, checkpoint: Checkpoint, index: Index, *, options: Options) -> CloudReader:
        """Return a reader of a checkpoint whose index was read, over a catalog that the caller keeps open."""
        reader = cls(checkpoint.url, options=options)
        reader._catalog, reader._checkpoint, reader._index = catalog, checkpoint, index
        reader._is_own_store = False
        return reader

    def _begin(self) -> None:
        self._checkpoint: Checkpoint | None = None
        self._index: Index | None = None
        self._failure: CloudCkptError | None = None

    # -- the steps of a load, in DCP's order ---------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the reader at another URL."""
        if checkpoint_id is not None:
            self._close()
            self._url = os.fspath(checkpoint_id)
            self._begin()

    def _close(self) -> None:
        """Let go of the store; one that was opened here is closed."""
        if self._catalog is not None and self._is_own_store:
            self._catalog.store.close()
        self._catalog = None
        self._is_own_store = True

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL; opening it says more."""
        return bool(os.fspath(checkpoint_id))

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Read manifest and index, and describe them in DCP's words.

        DCP takes any exception here for "this rank has its own metadata" and hides it; so a failure is kept, and
        raised from `set_up_storage_reader`, where it reaches the caller.
        """
        self._failure = None
        try:
            refuse_lonely_rank()
            return _describe(self._read_index())
        except CloudCkptError as exc:
            self._failure = exc
            return Metadata(state_dict_metadata={})

    def _read_index(self) -> Index:
        if self._index is None:
            catalog = self._open()
            self._checkpoint = catalog.open()
            self._index = read_index(catalog, self._checkpoint)
        return self._index

    def _open(self) -> Catalog:
        if self._catalog is None:
            store = open_store(
                self._url, storage_options=self._storage_options, engine=self._engine, options=self._options
            )
            self._catalog = Catalog(store)
        return self._catalog

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Raise what `read_metadata` met."""
        if self._failure is not None:
            self._close()
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan to DCP's planners."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans to DCP's planners."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill every target that the plan names; return when all of them are complete."""
        index, checkpoint = self._index, self._checkpoint
        if index is None or checkpoint is None:
            raise OptionsError("read_data was called before read_metadata; load through torch.distributed.checkpoint")
        budget = Budget(self._options.memory_budget_bytes)
        landings = self._landings(plan, planner, index, budget)
        fetches = [
            fetch for shard in sorted(landings) for fetch in self._fetches(index, checkpoint, shard, landings[shard])
        ]
        try:
            download(self._open().store, fetches, concurrency=self._options.concurrency, budget=budget)
        finally:
            if self._is_own_store:
                self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _landings(self, plan: LoadPlan, planner: LoadPlanner, index: Index, budget: Budget) -> dict[int, list[Landing]]:
        """Load the values of a plan, and return where its tensors' bytes go, by shard."""
        landings: dict[int, list[Landing]] = defaultdict(list)
        pieces = _pieces_by_offset(index, {item.storage_index.fqn for item in plan.items})
        taking = Taking(planner, budget)
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                _load_value(item, planner, index)
                continue
            piece = pieces[name, tuple(item.storage_index.offset or ())]
            landings[piece.shard].append(Landing(item, taking, index.tensors[name], piece))
        return landings

    def _fetches(self, index: Index, checkpoint: Checkpoint, shard: int, landings: list[Landing]) -> list[Fetch]:
        entry = index.shards[shard]
        source = ShardSource(
            key=checkpoint.prefix + shard_key(index.attempt, entry.rank, entry.number),
            size_bytes=entry.size_bytes,
            digests=entry.digest_bytes(),
            block_bytes=index.block_bytes,
        )
        spans = plan_spans(
            [(landing.start, landing.stop) for landing in landings],
            size_bytes=entry.size_bytes,
            block_bytes=index.block_bytes,
            # The blocks are the writer's choice; a span holds at least one of them.
            span_bytes=max(1, self._options.span_bytes // index.block_bytes) * index.block_bytes,
        )
        starts = [span.start for span in spans]
        takers: list[list[Landing]] = [[] for _ in spans]
        for landing in landings:
            if landing.start == landing.stop:
                landing.finish()
                continue
            number = bisect_right(starts, landing.start) - 1
            while number < len(spans) and spans[number].start < landing.stop:
                takers[number].append(landing)
                number += 1
        return [
            Fetch(
                shard=source,
                span=span,
                consume=partial(deliver, taking, span.start),
                buffer_bytes=sum(landing.buffer_bytes for landing in taking if landing.start >= span.start),
            )
            for span, taking in zip(spans, takers, strict=True)
        ]

    def __getstate__(self) -> dict[str, object]:
        """Pickle without connections; refuses options, because they may hold credentials (FORMAT invariant 16)."""
        return portable_state(self.__dict__, self._storage_options, kept_open="_catalog")


def _describe(index: Index) -> Metadata:
    """Say in DCP's words what an index holds."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, tensor in index.tensors.items():
        described[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=DTYPES[tensor.dtype]),
            size=torch.Size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                for chunk in tensor.chunks
            ],
        )
    for name in index.values:
        described[name] = BytesStorageMetadata()
    paths = {name: tuple(_plain_step(element) for element in index.paths.get(name, [name])) for name in described}
    return Metadata(state_dict_metadata=described, planner_data=paths, storage_meta=StorageMeta())


def _plain_step(element: PathElement) -> str | int:
    """Return the step of a path as DCP writes it, which knows string keys and places only."""
    if not isinstance(element, dict):
        return element
    place = element.get("tuple")
    return place if isinstance(place, int) else str(element.get("key"))


def _pieces_by_offset(index: Index, names: set[str]) -> dict[tuple[str, tuple[int, ...]], ChunkEntry]:
    """Map (name, offsets) to the piece there; where an empty piece shares an offset, the one with bytes wins."""
    pieces: dict[tuple[str, tuple[int, ...]], ChunkEntry] = {}
    for name in names & index.tensors.keys():
        for chunk in sorted(index.tensors[name].chunks, key=lambda chunk: math.prod(chunk.sizes)):
            pieces[name, chunk.offsets] = chunk
    return pieces


def _load_value(item: ReadItem, planner: LoadPlanner, index: Index) -> None:
    name = item.storage_index.fqn
    data = io.BytesIO()
    torch.save(codec.decode(index.values[name], key=name), data)
    data.seek(0)
    planner.load_bytes(item, data)
