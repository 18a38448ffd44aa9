"""Read what a DCP load plan names: a storage reader for `torch.distributed.checkpoint`'s own `load`.

`StorageReader` is implemented directly, over `loading`, which reads. Planners stay DCP's or the user's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cloudckpt.dcp.address import Address
from cloudckpt.errors import CloudCkptError, IntegrityError, OptionsError
from cloudckpt.format import Index, codec
from cloudckpt.loading import Pieces, RankInput, describe, read_index
from cloudckpt.options import Options
from cloudckpt.ranks import named_ranks
from cloudckpt.root import Checkpoint

__all__ = ["CloudReader"]


@dataclass(frozen=True, slots=True)
class _Found:
    """What is at the URL."""

    checkpoint: Checkpoint
    index: Index
    pieces: Pieces


class CloudReader(StorageReader):
    """Load with `torch.distributed.checkpoint` straight from a URL.

    ```python
    dcp.load(state_dict, storage_reader=CloudReader("s3://bucket/run-7/step-0000012000-e0003"))
    ```

    The URL is one checkpoint: what `CloudWriter` was given, or the `url` of a `Checkpoint`. Every byte that reaches
    a tensor was compared with the digest that the checkpoint's index holds. A reader may be kept: each load reads the
    manifest anew, and all ranks of one load have read the same. One process of several may load for itself.
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
            storage_options: fsspec's own options, the same for every engine.
            engine: what moves the bytes: `auto` (the best that serves the URL), `local`, `obstore` or `fsspec`.
            options: sizes, parallelism, patience.
        """
        self._address = Address(url, storage_options=storage_options, engine=engine, options=options)
        self._found: _Found | CloudCkptError | None = None

    def __getstate__(self) -> dict[str, object]:
        """Pickle what to load, and nothing of what was loaded."""
        return {**self.__dict__, "_found": None}

    # -- the steps of a load, in DCP's order ---------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the reader at another URL."""
        if checkpoint_id is not None:
            self._address.move(checkpoint_id)
        self._found = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL; opening it says more."""
        return bool(os.fspath(checkpoint_id))

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Read manifest and index, and describe them in DCP's words.

        Raises:
            CheckpointNotFoundError: nothing is committed at the URL.
            IntegrityError: manifest or index cannot be trusted.
            StorageError: the store could not be read.
        """
        # DCP hides whatever is raised here, and asks once more, with `rank`, for metadata of this rank alone. It gets
        # none, and then `set_up_storage_reader` raises what happened, whence it reaches the caller on all ranks. To
        # read again instead could succeed on this rank only, which would leave the others waiting.
        if "rank" in kwargs and isinstance(self._found, CloudCkptError):
            return Metadata(state_dict_metadata={})
        try:
            found = self._found = self._find()
        except CloudCkptError as exc:
            self._found = exc
            self._address.close()
            raise
        return describe(found.index, found.pieces)

    def _find(self) -> _Found:
        catalog = self._address.catalog()
        checkpoint = catalog.open()
        index = read_index(catalog, checkpoint)
        # A part of a value is read with the value, and stands in no state of DCP's.
        pieces = {name: found for name, found in index.all_pieces().items() if not codec.is_part_name(name)}
        return _Found(checkpoint, index, pieces)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Raise what `read_metadata` met."""
        if isinstance(self._found, CloudCkptError):
            raise self._found

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say in the plan which checkpoint this rank has found."""
        return replace(plan, storage_data=self._here().checkpoint.digest)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse ranks that have found different checkpoints: the URL was saved to again between their requests."""
        mine = self._here().checkpoint
        # A planner of the user's own may have made plans that say nothing.
        others = [rank for rank, plan in enumerate(plans) if plan.storage_data not in (None, mine.digest)]
        if others:
            raise IntegrityError(
                f"{named_ranks(others)} found another checkpoint than the coordinator at {mine.url}, which was "
                "replaced at that moment; nothing was read, load again"
            )
        return plans

    def _here(self) -> _Found:
        if not isinstance(self._found, _Found):
            raise OptionsError("a step of a load came before read_metadata; load through torch.distributed.checkpoint")
        return self._found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill every target that the plan names; return when all of them are complete."""
        found = self._here()
        store = self._address.catalog().store
        try:
            RankInput(store, found.checkpoint, found.index, self._address.options).read(
                plan.items, planner, found.pieces
            )
        finally:
            self._found = None
            self._address.close()
        future: Future[None] = Future()
        future.set_result(None)
        return future
