"""Save and load Megatron-Core's sharded state dicts as checkpoints of cloudckpt.

```python
save(sharded_state_dict, "s3://bucket/run-7/iter_0001000")  # in the place of megatron.core.dist_checkpointing's own
state_dict = load(sharded_state_dict, "s3://bucket/run-7/iter_0001000")
```

    sharded_state_dict ──Megatron's preprocessing──▶ ShardedTensors │ ShardedObjects │ what is common
                       ──DCP, each rank what it is the main replica of──▶ one checkpoint, one commit

**What is saved**: all that Megatron's `save` takes. Its `common.pt`, `metadata.json` and pickled objects are values of
the same checkpoint, so nothing of it is pickle, and all of it is there, or none.
**What Megatron still does itself**: names, shards, replicas and factories, the checks that all shards are there, and
merging on a load; so a checkpoint is loaded with another tensor, pipeline or data parallelism as ever.
**Limits**: a call of two functions, not a strategy: Megatron's own `save` writes `common.pt` with `open`, whatever the
strategy, and never to a URL. A save returns when it is committed. `newest` finds the newest iteration, in the place of
Megatron's tracker file; removal of old ones is the caller's. What only the checkpoint has is left, as is Megatron's
default.

Run with megatron-core 0.16.1 and torch 2.13, on CPU.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_by_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_by_dcp

from cloudckpt import (
    Checkpoint,
    CheckpointNotFoundError,
    CloudCkptError,
    CloudReader,
    CloudWriter,
    Options,
    OptionsError,
    contents,
    read,
    register,
)
from cloudckpt.integrations.framework import framework
from cloudckpt.store import open_store

with framework("megatron-core", lowest="0.16.1", extra="megatron"):
    from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreLoadPlanner,
        MCoreSavePlanner,
        _replace_sharded_keys_with_state_dict_keys,
        _replace_state_dict_keys_with_sharded_keys,
        _restore_dict_types,
        _unwrap_pyt_sharded_tensor,
        mcore_to_pyt_state_dict,
    )
    from megatron.core.dist_checkpointing.utils import extract_sharded_base
    from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
    from megatron.core.safe_globals import SAFE_GLOBALS

__all__ = ["load", "newest", "save"]

_COMMON = "cloudckpt_megatron_common"
_CONTENT = "content_metadata"


def _keep_its_types() -> None:
    """Let be saved what Megatron's own load takes back: its arguments are full of its enums."""
    for kind in SAFE_GLOBALS:
        how: dict[str, Any] = {}
        if dataclasses.is_dataclass(kind):  # whose constructors set more than their fields
            how = {"encode": lambda value: dict(vars(value)), "decode": partial(_revived, kind)}
        elif not (isinstance(kind, type) and issubclass(kind, Enum)):
            continue
        with suppress(OptionsError):  # the program has given it another name
            register(kind, name=f"{kind.__module__}.{kind.__qualname__}", **how)


def _revived(kind: Any, attributes: Mapping[str, object]) -> Any:
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


_keep_its_types()


class _Planner(MCoreSavePlanner):
    """Megatron's, which lets each rank have objects of its own; they are values here, and not bytes of a pickle."""

    transform_object = DefaultSavePlanner.transform_object


def save(
    sharded_state_dict: dict[str, Any],
    url: str | os.PathLike[str],
    *,
    validate_access_integrity: bool = True,
    preprocess_common_before_consistancy_check: Callable[[Any], Any] | None = None,
    content_metadata: dict[str, Any] | None = None,
    storage_options: Mapping[str, object] | None = None,
    options: Options | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint | None:
    """Save a sharded state dict as one checkpoint; every rank calls it, and it returns when all is committed.

    Args:
        sharded_state_dict: as for Megatron's `save`, which changes it, too: factories are applied in it.
        url: becomes one checkpoint; nothing is visible there before.
        validate_access_integrity: as for Megatron's.
        preprocess_common_before_consistancy_check: as for Megatron's, which spells it so.
        content_metadata: as for Megatron's.
        storage_options: fsspec's own options for the URL.
        options: sizes, parallelism, patience.
        metrics: numbers to be kept with the checkpoint.

    Returns:
        The checkpoint, on rank 0; None on the others.

    Raises:
        CheckpointExistsError: the URL holds a checkpoint; it was not changed.
        CloudCkptError: as `CloudWriter` raises; nothing was committed.
        CheckpointingException: Megatron's: shards are missing, or there twice.
    """
    if not dist.is_initialized():
        raise OptionsError("Megatron-Core needs a process group, also for one rank: call init_process_group first")
    if content_metadata is not None:
        sharded_state_dict[_CONTENT] = content_metadata
    sharded, common = save_preprocess(
        sharded_state_dict, validate_access_integrity, preprocess_common_before_consistancy_check
    )
    keyed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    objects, tensors = _parted(keyed)
    state: dict[str, Any] = {
        **mcore_to_pyt_state_dict(tensors, is_loading=False),
        **{name: [one.data for one in found] for name, found in objects.items()},
    }
    if dist.get_rank() == 0:
        state[_COMMON] = common
    writer = CloudWriter(url, storage_options=storage_options, options=options, metrics=metrics)
    planner = _Planner(
        dedup_replicated_tensors=False,
        flatten_state_dict=False,
        flatten_sharded_tensors=False,  # else DCP rebuilds each value: keys become text, and empty containers go
    )
    with _plain_errors():
        save_by_dcp(state, storage_writer=writer, planner=planner)
    return writer.checkpoint if dist.get_rank() == 0 else None


def load(
    sharded_state_dict: dict[str, Any],
    url: str | os.PathLike[str],
    *,
    validate_access_integrity: bool = True,
    storage_options: Mapping[str, object] | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into the tensors of a sharded state dict; every rank calls it.

    Args:
        sharded_state_dict: as for Megatron's `load`: what of the checkpoint this rank needs.
        url: the checkpoint's.
        validate_access_integrity: as for Megatron's.
        storage_options: fsspec's own options for the URL.
        options: sizes, parallelism, patience.

    Returns:
        The state dict with tensors and objects in the place of their shards, and all that was common.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        IntegrityError: it is damaged.
        OptionsError: it is a checkpoint, but none of `save`.
        CloudCkptError: as `CloudReader` raises.
        CheckpointException: DCP's: the checkpoint lacks a tensor, or has another shape of it.
    """
    common = _common_of(url, storage_options, options)
    prepared, own, factories = load_preprocess(sharded_state_dict)
    merge(common, own)
    sharded, _ = extract_sharded_base(prepared)
    if validate_access_integrity:
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
    keyed, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded)
    objects, tensors = _parted(keyed)
    state: dict[str, Any] = {**mcore_to_pyt_state_dict(tensors, is_loading=True), **dict.fromkeys(objects)}
    given = [one for one in nested_values(sharded) if isinstance(one, ShardedTensor)]
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[one for one in given if not one.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={one.key: one for one in given if one.allow_shape_mismatch},
        flatten_sharded_tensors=False,  # else what is loaded goes into a copy of the dict
        flatten_state_dict=False,
    )
    reader = CloudReader(url, storage_options=storage_options, options=options)
    with _plain_errors():
        load_by_dcp(state, storage_reader=reader, planner=planner)
    named = {name: _unwrap_pyt_sharded_tensor(value) for name, value in state.items()}
    loaded = _replace_sharded_keys_with_state_dict_keys(named, flat, renamed)
    _restore_dict_types(loaded, sharded)
    merge(common, loaded)
    return dict(apply_factory_merges(common, factories))


def newest(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None = None
) -> tuple[int, str] | None:
    """Return the newest iteration below a URL and the URL of its checkpoint; None if nothing is committed there.

    Iterations are what was saved to a name that ends with a number, such as Megatron's `iter_0001000`. Ask on one rank,
    and tell the others.

    Args:
        url: what the checkpoints stand below.
        storage_options: fsspec's own options for it.

    Raises:
        IntegrityError: the newest one is damaged.
        StorageError: the store could not be listed or read.
    """
    with open_store(url, storage_options=storage_options) as store:
        names = [name.rstrip("/") for name in store.list("", delimiter="/").prefixes]
        root = store.url.rstrip("/")
    numbered = [(int(found[0]), name) for name in names if (found := re.search(r"\d+$", name))]
    for iteration, name in sorted(numbered, reverse=True):
        try:
            contents(f"{root}/{name}", storage_options=storage_options)
        except CheckpointNotFoundError:
            continue  # of a save that was killed
        return iteration, f"{root}/{name}"
    return None


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what DCP has packed up on all ranks, if it is ours."""
    try:
        yield
    except CheckpointException as exc:
        for error, _ in exc.failures.values():
            if isinstance(error, CloudCkptError):
                raise error from exc
        raise


def _parted(keyed: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    objects = {name: found for name, found in keyed.items() if isinstance(found[0], ShardedObject)}
    return objects, {name: found for name, found in keyed.items() if name not in objects}


def _common_of(
    url: str | os.PathLike[str], storage_options: Mapping[str, object] | None, options: Options | None
) -> dict[str, Any]:
    try:
        found = read(url, [_COMMON], storage_options=storage_options, options=options, progress="off")
    except CheckpointNotFoundError as exc:
        contents(url, storage_options=storage_options, options=options)  # raises as it is, where nothing is committed
        raise OptionsError(f"{url} was not saved by cloudckpt.integrations.megatron; load it as it was saved") from exc
    return cast("dict[str, Any]", found[_COMMON])
