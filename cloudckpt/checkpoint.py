"""Save a whole state to one checkpoint and load it back: the way from the caller's objects through DCP and back.

    save_state   bind ─▶ capture ─▶ dcp.save(CloudWriter) ─▶ committed
    load_state   bind ─▶ plan_restore (nothing changed yet) ─▶ dcp.load(CloudReader) ─▶ apply

`save`, `load` and `read` are the free functions for one URL; the manager uses the same two ways with a root.
"""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cloudckpt import codec
from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.codec import DTYPES
from cloudckpt.entry import is_tensor
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, SaveFailedError
from cloudckpt.index import Index
from cloudckpt.options import Options
from cloudckpt.reader import CloudReader, read_index
from cloudckpt.restore import Saved, plan_restore
from cloudckpt.source import check_tensor
from cloudckpt.state import bind, capture
from cloudckpt.store import open_store
from cloudckpt.tree import Flat, PathElement, unflatten
from cloudckpt.writer import CloudWriter, Target, refuse_lonely_rank

__all__ = ["load", "load_state", "read", "save", "save_state"]


def save(
    state: MutableMapping[str, object],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Save `state` as one checkpoint at `url`; return once it is committed.

    Args:
        state: name → nn.Module, Optimizer, object with state_dict/load_state_dict, tensor, container or plain value.
        url: a directory, `s3://…`, `gs://…` or any fsspec URL that holds no checkpoint yet.
        storage_options: fsspec's own options for the URL, the same for both engines.
        engine: `auto`, `obstore` or `fsspec`.
        options: sizes, parallelism, patience.
        metrics: numbers to be kept with the checkpoint.
        metadata: values to be kept with the checkpoint.

    Raises:
        CheckpointExistsError: the URL holds a checkpoint; it was not changed.
        UnsupportedValueError: a value that the format cannot hold; nothing was written.
        StorageError: the store refused or could not be reached; nothing is visible at the URL
            (after `CommitUnknownError`: the whole checkpoint, or nothing).
    """
    refuse_lonely_rank()
    chosen = options or Options()
    flat = capture(bind(state))
    store = open_store(os.fspath(url), storage_options=storage_options, engine=engine, options=chosen)
    try:
        return save_state(flat, Target(catalog=Catalog(store)), options=chosen, metrics=metrics, metadata=metadata)
    finally:
        store.close()


def load(
    state: MutableMapping[str, object],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Restore `state` in place from the checkpoint at `url`.

    Names and shapes are compared first: on a mismatch nothing is read or changed. Every byte was verified before it
    reached a tensor.

    Args:
        state: as for `save`; tensors are filled where they are, plain values are put into the dict.
        url: the checkpoint's prefix, for example `Checkpoint.url`.
        storage_options: fsspec's own options for the URL.
        engine: `auto`, `obstore` or `fsspec`.
        options: sizes, parallelism, patience.
        strict: refuse a checkpoint that has entries which `state` lacks, or lacks some that it has.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        StateMismatchError: names or shapes differ; nothing was changed.
        IntegrityError: an object is missing or differs from what was committed. Tensors may hold a mixture of old
            and restored values: load another checkpoint before going on.
    """
    refuse_lonely_rank()
    bind(state)  # refuses a wrong call before anything is asked of the store
    chosen = options or Options()
    store = open_store(os.fspath(url), storage_options=storage_options, engine=engine, options=chosen)
    try:
        catalog = Catalog(store)
        checkpoint = catalog.open()
        load_state(state, catalog, checkpoint, options=chosen, strict=strict)
        return checkpoint
    finally:
        store.close()


def read(
    url: str | os.PathLike[str],
    keys: str | Sequence[str] | None = None,
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | None = None,
) -> dict[str, object]:
    """Read a checkpoint, or a part of it, without a model: nested dicts of new host tensors and plain values.

    Args:
        url: the checkpoint's prefix.
        keys: names or shell globs of names (`model.*`, `optimizer.state.*.exp_avg`); None reads everything. A name
            also selects all that lies below it.
        storage_options: fsspec's own options for the URL.
        engine: `auto`, `obstore` or `fsspec`.
        options: sizes, parallelism, patience.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL, or a key matches nothing.
        IntegrityError: an object is missing or differs from what was committed.
    """
    chosen = options or Options()
    store = open_store(os.fspath(url), storage_options=storage_options, engine=engine, options=chosen)
    try:
        catalog = Catalog(store)
        checkpoint = catalog.open()
        index = read_index(catalog, checkpoint)
        names = _select(index, keys, checkpoint.url)
        leaves = {name: _empty(index, name) for name in names}
        tensors = {name: leaves[name] for name in names if name in index.tensors}
        _fill(tensors, CloudReader.of(catalog, checkpoint, index, options=chosen), no_dist=True)
        return unflatten(leaves, _paths_of_some(index, names))
    finally:
        store.close()


def _empty(index: Index, name: str) -> object:
    """Return a new host tensor to be filled, or the value of that name."""
    if name in index.values:
        return codec.decode(index.values[name], key=name)
    return torch.empty(index.tensors[name].shape, dtype=DTYPES[index.tensors[name].dtype])


def _paths_of_some(index: Index, names: Sequence[str]) -> dict[str, list[PathElement]]:
    """Return the paths of some names; a list of which only a part was asked for becomes a dict by place."""
    chosen = set(names)
    left_out = [path for name, path in index.paths.items() if name not in chosen]
    torn = {_key(path[:depth]) for path in left_out for depth in range(1, len(path))}
    return {
        name: [_keyed(step) if _key(path[:depth]) in torn else step for depth, step in enumerate(path)]
        for name, path in index.paths.items()
        if name in chosen
    }


def _key(path: Sequence[PathElement]) -> tuple[str, ...]:
    return tuple(map(repr, path))


def _keyed(step: PathElement) -> PathElement:
    """Turn a place in a list or tuple into a dict's key."""
    place = step.get("tuple") if isinstance(step, dict) else step
    return {"key": place} if isinstance(place, int) else step


def _select(index: Index, keys: str | Sequence[str] | None, url: str) -> list[str]:
    names = [*index.tensors, *index.values]
    if keys is None:
        return [name for name in names if not name.startswith("cloudckpt.")]
    wanted = [keys] if isinstance(keys, str) else list(keys)
    chosen: dict[str, None] = {}
    for pattern in wanted:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            raise CheckpointNotFoundError(
                f"nothing in {url} is named {pattern!r}; it holds {', '.join(sorted(names)[:8])}, …"
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def save_state(
    flat: Flat,
    target: Target,
    *,
    options: Options,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Save captured state to a target through DCP; raises as `save` does."""
    for name, leaf in flat.leaves.items():
        if isinstance(leaf, ShardedTensor):
            continue  # its local shards are looked at when they are resolved
        if isinstance(leaf, torch.Tensor):
            check_tensor(name, leaf)
        else:
            # Refused here, before a byte is written, rather than in the middle of the uploads.
            codec.encode(leaf, key=name)
    writer = CloudWriter.to(target, options=options, paths=flat.paths, metrics=metrics, metadata=metadata)
    planner = _LeafPlanner(flatten_state_dict=False)
    with _plain_errors("save"):
        dcp_save(dict(flat.leaves), storage_writer=writer, planner=planner)
    if writer.checkpoint is None:
        return target.catalog.open(target.prefix)
    return writer.checkpoint


class _LeafPlanner(DefaultSavePlanner):
    """Plans values as they are: the stock planner rebuilds containers, with keys made str and empty dicts dropped."""

    def set_up_planner(
        self,
        state_dict: dict[str, object],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002 (DCP's signature)
    ) -> None:
        tensors = {name: leaf for name, leaf in state_dict.items() if is_tensor(leaf)}
        super().set_up_planner(tensors, storage_meta, is_coordinator)
        self.state_dict = {**self.state_dict, **{name: state_dict[name] for name in state_dict.keys() - tensors.keys()}}


def load_state(
    state: MutableMapping[str, object],
    catalog: Catalog,
    checkpoint: Checkpoint,
    *,
    options: Options,
    strict: bool,
) -> Index:
    """Restore `state` from a committed checkpoint through DCP; raises as `load` does. Returns its index."""
    index = read_index(catalog, checkpoint)
    saved = Saved(
        shapes={name: tensor.shape for name, tensor in index.tensors.items()},
        dtypes={name: DTYPES[tensor.dtype] for name, tensor in index.tensors.items()},
        values={name: codec.decode(value, key=name) for name, value in index.values.items()},
        paths=index.paths,
    )
    targets = plan_restore(bind(state), saved, strict=strict)
    _fill(targets.tensors, CloudReader.of(catalog, checkpoint, index, options=options), no_dist=False)
    targets.apply()
    return index


def _fill(tensors: dict[str, object], reader: CloudReader, *, no_dist: bool) -> None:
    """Fill tensors in place, by name."""
    # DCP allocates nothing here, but its planner refuses an empty plan of some versions; nothing is nothing.
    if tensors:
        with _plain_errors("load"), torch.no_grad():
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            dcp_load(tensors, storage_reader=reader, planner=planner, no_dist=no_dist)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Give back the error behind DCP's `CheckpointException`, and hide its remark on single processes.

    `CheckpointException` is a BaseException, and wraps KeyboardInterrupt, SystemExit and their like too.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as exc:
        failures = {rank: failure[0] for rank, failure in exc.failures.items()}
        raise _unwrapped(failures, what) from exc


def _unwrapped(failures: Mapping[int, BaseException], what: str) -> BaseException:
    """Choose what to raise: the one error that all ranks met, or a `SaveFailedError` with each rank's own."""
    for error in failures.values():
        if not isinstance(error, Exception):
            return error
    only = next(iter(failures.values()))
    if what == "load" or (len(failures) == 1 and isinstance(only, CloudCkptError)):
        return only
    text = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(failures.items())[:8])
    return SaveFailedError(f"the save failed and nothing was committed: {text}", failures=failures)
