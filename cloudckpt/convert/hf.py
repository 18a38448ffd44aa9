"""Save and load a model in Hugging Face's layout with `torch.distributed.checkpoint`, from and to any number of ranks.

    save   ranks' boxes ──CloudWriter──▶ a checkpoint below the URL ──rank 0: verified, streamed──▶ model-….safetensors,
           its index or single file last; then the checkpoint goes
    load   headers ──▶ DCP Metadata ──▶ planner (resharding) ──▶ ranges of the files ──▶ boxes of this rank

What stands at the URL in the end is what `save_pretrained` writes, and nothing else. Planners stay DCP's.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future

from cloudckpt.convert.exporting import export, refuse_model
from cloudckpt.convert.importing import looked_at
from cloudckpt.convert.opened import Exported
from cloudckpt.convert.origin import Bytes
from cloudckpt.dcp import CloudWriter
from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.format import DTYPES, MANIFEST_NAME, Box
from cloudckpt.options import MIB, Options
from cloudckpt.root import Exists, check_exists
from cloudckpt.store import RetryingStore, open_store
from cloudckpt.threads import each

__all__ = ["CloudHFReader", "CloudHFWriter"]

# Below the URL, while a model is written; what is left there by a killed save goes with the next.
_STAGING = ".cloudckpt-hf"
_PART_BYTES = 16 * MIB
_READERS = 8


@runtime_checkable
class Describing(Protocol):
    """What describes a model in files, as a configuration or a tokenizer of `transformers`."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the files into a directory."""


Config = str | os.PathLike[str] | Describing | Sequence[Describing] | None
"""A folder of files that describe a model, or what writes some."""


class CloudHFWriter(CloudWriter):
    """Save a sharded model with `torch.distributed.checkpoint` as `from_pretrained` reads it, straight to a URL.

    ```python
    writer = CloudHFWriter("s3://bucket/llama-sft")  # config=[model.config, tokenizer]
    dcp.save(model.state_dict(), storage_writer=writer)  # every rank
    ```

    Each rank uploads its part; rank 0 then writes the files from these, streamed and verified, a few tens of MiB in
    memory at a time, so that the bytes pass through it once. The file that makes the folder a model is the last one:
    until then nothing there is a model, and after a crash neither. `exported` says what was written, on the
    coordinator. Of tied names each is written, which `from_pretrained` ties again.

    `HuggingFaceStorageWriter` of torch writes to local disks; its `fqn_to_index_mapping` has no use here: files are
    filled in the order of the names, up to `max_shard_bytes`.
    """

    def __init__(  # noqa: PLR0913 (keyword-only options, each of its own kind)
        self,
        url: str | os.PathLike[str],
        *,
        config: Config = None,
        prefix: str = "",
        max_shard_bytes: int | None = None,
        leave_out: bool = False,
        exists: Exists = "raise",
        storage_options: Mapping[str, object] | None = None,
        engine: str = "auto",
        options: Options | None = None,
    ) -> None:
        """Remember where to save; nothing is opened.

        Args:
            url: the folder of the model: a directory, `s3://…`, `gs://…` or any fsspec URL.
            config: files beside the weights: a folder with `config.json` and a tokenizer's files, or an object with
                `save_pretrained` (a configuration, a tokenizer), or several. On the coordinator.
            prefix: the tensors whose names begin with it go, without it (`model.`).
            max_shard_bytes: what one file may hold, unless one tensor is larger; None: no limit on a disk, 64 MiB for a
                bucket, where a file is put whole.
            leave_out: leave out what safetensors cannot hold, such as plain values; without it that is refused.
            exists: where a model is: `raise`, or `replace` it, which is whole until the new one is.
            storage_options: fsspec's own options for the URL.
            engine: what moves the ranks' bytes, as for `CloudWriter`.
            options: sizes, parallelism, patience.

        Raises:
            OptionsError: an unknown `exists`.
        """
        super().__init__(
            _staging(url), storage_options=storage_options, engine=engine, options=options, exists="replace"
        )
        self._url = os.fspath(url)
        self._storage_options = storage_options
        self._config, self._is_replacing = config, check_exists(exists) == "replace"
        self._prefix, self._max_shard_bytes, self._leaves_out = prefix, max_shard_bytes, leave_out
        self.exported: Exported | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the writer at another URL."""
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
        self.exported = None
        super().reset(None if checkpoint_id is None else _staging(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Begin as `CloudWriter` does; the coordinator refuses a URL where a model is that is not to be replaced."""
        if is_coordinator and not self._is_replacing:
            with open_store(self._url, storage_options=self._storage_options, options=self._options) as folder:
                refuse_model(folder)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the files of the model from what the ranks have written; then let go of that."""
        super().finish(metadata, results)
        try:
            with _folder_of(self._config) as config:
                self.exported = export(
                    _staging(self._url),
                    self._url,
                    to="huggingface",
                    prefix=self._prefix,
                    max_shard_bytes=self._max_shard_bytes,
                    config=config,
                    leave_out=self._leaves_out,
                    overwrite=self._is_replacing,
                    storage_options=self._storage_options,
                    target_storage_options=self._storage_options,
                    progress="off",
                )
        finally:
            self.checkpoint = None
            with open_store(self._url, storage_options=self._storage_options, options=self._options) as folder:
                _remove_staging(folder)


def _remove_staging(folder: RetryingStore) -> None:
    """Delete what ranks have written to be made into files, also what killed saves left: the manifest first."""
    keys = [info.key for info in folder.list(f"{_STAGING}/").objects]
    first = f"{_STAGING}/{MANIFEST_NAME}"
    folder.delete([key for key in keys if key == first])
    folder.delete([key for key in keys if key != first])


def _staging(url: str | os.PathLike[str]) -> str:
    return f"{os.fspath(url).rstrip('/')}/{_STAGING}"


@contextmanager
def _folder_of(config: Config) -> Iterator[str | os.PathLike[str] | None]:
    """Yield the folder of the files that describe a model; of objects one that is there meanwhile."""
    if config is None or isinstance(config, str | os.PathLike):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="cloudckpt-") as folder:
        for one in [config] if isinstance(config, Describing) else config:
            one.save_pretrained(folder)
        yield folder


class CloudHFReader(StorageReader):
    """Load a model in Hugging Face's layout with `torch.distributed.checkpoint`, each rank its part, from a URL.

    ```python
    dcp.save(model.state_dict(), storage_writer=CloudHFWriter("s3://bucket/llama-base"))
    state = model.state_dict()  # sharded as it is, on any number of ranks
    dcp.load(state, storage_reader=CloudHFReader("s3://bucket/llama-base"))
    ```

    It reads what `CloudHFWriter`, `cloudckpt.export` and `save_pretrained` write, and what is on the Hub once it is at
    a URL: one safetensors file, or several with their index. Their headers are believed in nothing that does not fit
    the file; their bytes have no sums, so that damage there is not seen: for training states use `CloudReader`. A tied
    name that is in no file is missing to DCP: give `DefaultLoadPlanner(allow_partial_load=True)`, and tie again.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        prefix: str = "",
        storage_options: Mapping[str, object] | None = None,
        options: Options | None = None,
    ) -> None:
        """Remember what to load; nothing is opened before a load begins.

        Args:
            url: the folder of the model.
            prefix: what the names of the state have before those of the files (`model.`).
            storage_options: fsspec's own options for the URL.
            options: parallelism, patience.
        """
        self._url, self._prefix = os.fspath(url), prefix
        self._storage_options, self._options = storage_options, Options.of(options)
        self._open: ExitStack | None = None
        self._found: dict[str, tuple[Box, Bytes]] | CloudCkptError = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the reader at another URL."""
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
        self._close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL; opening it says more."""
        return bool(os.fspath(checkpoint_id))

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Read the headers of all files, and describe their tensors in DCP's words.

        Raises:
            SourceError: no model is there, or its files are damaged.
            StorageError: the store could not be read.
        """
        # As in `CloudReader`: DCP hides what is raised here, and asks once more, with `rank`.
        if "rank" in kwargs and isinstance(self._found, CloudCkptError):
            return Metadata(state_dict_metadata={})
        self._close()
        try:
            with ExitStack() as stack:
                origin = looked_at(
                    self._url, "huggingface", storage_options=self._storage_options, options=self._options, stack=stack
                )
                self._open = stack.pop_all()
        except CloudCkptError as exc:
            self._found = exc
            raise
        self._found = {f"{self._prefix}{box.name}": (box, read) for box, read in origin.boxes}
        return Metadata(
            state_dict_metadata={name: _described(box) for name, (box, _) in self._found.items()},
            planner_data={name: (name,) for name in self._found},
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:  # noqa: FBT001
        """Raise what `read_metadata` met."""
        if isinstance(self._found, CloudCkptError):
            raise self._found

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan to DCP's planner."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans to DCP's planner."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill every target that the plan names; return when all of them are complete.

        Raises:
            SourceError: a file was cut short. Targets may hold a mixture.
            StorageError: the store could not be read; likewise.
        """
        found = self._found
        if isinstance(found, CloudCkptError) or self._open is None:
            raise OptionsError("a step of a load came before read_metadata; load through torch.distributed.checkpoint")
        try:
            targets = [(item, planner.resolve_tensor(item).detach()) for item in plan.items]
            parts = [part for item, target in targets for part in _parts(item, target, *found[item.storage_index.fqn])]
            each(parts, _Part.fill, threads=min(_READERS, self._options.concurrency), name="cloudckpt-hf")
            for item, target in targets:
                planner.commit_tensor(item, target)
        finally:
            self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _close(self) -> None:
        stack, self._open = self._open, None
        self._found = {}
        if stack is not None:
            stack.close()


def _described(box: Box) -> TensorStorageMetadata:
    shape = torch.Size(box.shape)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=DTYPES[box.dtype]),
        size=shape,
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)],
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Whole rows of a saved tensor, and where what is wanted of them goes.

    Attributes:
        target: takes it.
        offsets: where in the rows it begins, along the axes behind the first.
        shape: of the rows.
        dtype: of them.
        first: their first byte in the tensor.
        read: reads the tensor.
    """

    target: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    read: Bytes

    def fill(self) -> None:
        """Read the rows, and copy."""
        memory = bytearray(math.prod(self.shape) * self.dtype.itemsize)
        self.read(self.first, memoryview(memory))
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype).view(self.shape)
        for axis, start in enumerate(self.offsets, start=1):
            rows = rows.narrow(axis, start, self.target.shape[axis])
        with torch.no_grad():
            self.target.copy_(rows.view(self.target.shape))


def _parts(item: ReadItem, target: torch.Tensor, box: Box, read: Bytes) -> Iterator[_Part]:
    """Cut the rows that an item wants a part of into some that fit into little memory."""
    if 0 in item.lengths:
        return
    dtype = DTYPES[box.dtype]
    if not box.shape:
        yield _Part(target, (), (), dtype, 0, read)
        return
    row_bytes = math.prod(box.shape[1:]) * dtype.itemsize
    count = max(1, _PART_BYTES // max(1, row_bytes))
    first, wanted = item.storage_offsets[0], item.lengths[0]
    for start in range(0, wanted, count):
        size = min(count, wanted - start)
        yield _Part(
            target.narrow(0, start, size),
            tuple(item.storage_offsets[1:]),
            (size, *box.shape[1:]),
            dtype,
            (first + start) * row_bytes,
            read,
        )
