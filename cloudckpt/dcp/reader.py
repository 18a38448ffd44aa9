"""Read what a DCP load plan names: a storage reader for `torch.distributed.checkpoint`'s own `load`.

`StorageReader` is implemented directly, over `input`, which reads. Planners stay DCP's or the user's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cloudckpt.dcp.writer import portable_state
from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.format import Index
from cloudckpt.loading import Pieces, RankInput, describe, read_index
from cloudckpt.options import Options
from cloudckpt.ranks import refuse_lonely_rank
from cloudckpt.root import Catalog, Checkpoint
from cloudckpt.store import open_store

__all__ = ["CloudReader"]


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
        self._begin()

    def _begin(self) -> None:
        self._checkpoint: Checkpoint | None = None
        self._index: Index | None = None
        self._pieces: Pieces | None = None
        self._failure: CloudCkptError | None = None

    # -- the steps of a load, in DCP's order ---------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the reader at another URL."""
        if checkpoint_id is not None:
            self._close()
            self._url = os.fspath(checkpoint_id)
            self._begin()

    def _close(self) -> None:
        """Let go of the store."""
        if self._catalog is not None:
            self._catalog.store.close()
        self._catalog = None

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
            index = self._read_index()
            self._pieces = index.all_pieces() if self._pieces is None else self._pieces
            return describe(index, self._pieces)
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
        index, checkpoint, pieces = self._index, self._checkpoint, self._pieces
        if index is None or checkpoint is None or pieces is None:
            raise OptionsError("read_data was called before read_metadata; load through torch.distributed.checkpoint")
        source = RankInput(self._open().store, checkpoint, index, self._options)
        try:
            source.read(plan.items, planner, pieces)
        finally:
            self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def __getstate__(self) -> dict[str, object]:
        """Pickle without connections; refuses options, because they may hold credentials (FORMAT invariant 16)."""
        return portable_state(self.__dict__, self._storage_options, kept_open="_catalog")
