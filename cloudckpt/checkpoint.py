"""Save a whole state to one checkpoint, load it back, or read it without a model: the functions for one URL.

With several ranks, every rank calls `save` and `load`; `saving` and `loading` lead the ranks. The manager goes the same
two ways with a root.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

import torch

from cloudckpt.errors import CheckpointNotFoundError, OptionsError
from cloudckpt.loading import Contents, load_state, read_contents, read_files, read_state
from cloudckpt.options import Options
from cloudckpt.ranks import Group, ProcessGroup, Ranks, check_part, refuse_lonely_rank, taking_part
from cloudckpt.report import Journal, OnEvent, Progress, Show
from cloudckpt.root import Catalog, Checkpoint, Exists, Roots, check_exists, own_url
from cloudckpt.saving import Session, begin_save
from cloudckpt.state import Allowed, Files, Resize, captured, collector_at_rest
from cloudckpt.store import open_store

__all__ = ["contents", "load", "read", "restore_files", "save"]


def _refuse_swapped(call: str, state: object, url: object) -> None:
    """Refuse a URL where the state belongs, before anything is opened."""
    if isinstance(url, Mapping) and not isinstance(state, Mapping):
        raise OptionsError(f"the URL stands where the state belongs; call {call}(state, url)")


def save(  # noqa: PLR0913 (keyword-only, each of its own kind)
    state: MutableMapping[str, object],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
    files: Files | None = None,
    exists: Exists = "raise",
    ranks: Ranks = "all",
    process_group: ProcessGroup | None = None,
    progress: Show = "auto",
    on_event: OnEvent = None,
) -> Checkpoint:
    """Save `state` as one checkpoint at `url`; return once it is committed. With several ranks, every rank calls it.

    Args:
        state: name → nn.Module, Optimizer, object with state_dict/load_state_dict, tensor, container or plain value.
        url: a directory, `s3://…`, `gs://…` or any fsspec URL; it becomes one checkpoint.
        storage_options: fsspec's own options for the URL, the same for every engine.
        engine: what moves the bytes: `local`, `obstore` or `fsspec`, where it serves the URL, or `auto`: our own code
            for a disk, obstore for s3, fsspec for the rest.
        options: sizes, parallelism, patience.
        metrics: numbers to be kept with the checkpoint.
        metadata: values to be kept with the checkpoint.
        files: whole files to go with the state, streamed, verified and committed with it: path in the checkpoint → a
            file here, or its bytes; a path that ends in a slash → a directory, with all that is below it:
            `{"tokenizer/": "out/tokenizer", "config.json": "out/config.json"}`. `cloudckpt.restore_files` writes them
            back. Rank 0's are taken. What they hold goes, and neither their modes nor empty directories. One of
            more than 64 MiB is not read at once: do not cut it short before this returns.
        exists: where the URL holds a checkpoint: `raise`, or `replace` it as soon as the new one is complete. Between
            two requests at the end there is none; if the process dies just there, an error at the URL says how to have
            the old one back.
        ranks: `all`: every rank of the process group calls it; or `self`: this process saves what it holds by itself,
            and waits for nobody, such as rank 0 for all of a DDP job. A tensor of which it holds a part is refused.
        process_group: the ranks of this group call it, by themselves; None: those of the default one. See
            `CheckpointManager`.
        progress: what is shown on stderr, as for `CheckpointManager`.
        on_event: is told what happens, as for `CheckpointManager`.

    Returns:
        The committed checkpoint.

    Raises:
        CheckpointExistsError: the URL holds a checkpoint; it was not changed.
        UnsupportedValueError: a value that the format cannot hold; nothing was written.
        SaveFailedError: ranks failed, were lost, or hold different states (`.failures`); nothing was committed.
        StorageError: the store refused or could not be reached; nothing is visible at the URL
            (after `CommitUnknownError`: the whole checkpoint, or nothing).
    """
    _refuse_swapped("save", state, url)
    chosen = Options.of(options)
    destined = check_exists(exists)
    with (
        taking_part(check_part(ranks, process_group)),
        open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store,
    ):
        refuse_lonely_rank()
        group = Group.of_world()
        journal = Journal(store, Progress(progress), on_event=on_event)
        entry = journal.begin(rank=group.rank, world_size=group.size)
        entry.working(-1, in_background=False)
        try:
            with Session.of(group, "save", chosen) as session, collector_at_rest():
                pending = begin_save(
                    session,
                    captured(state, files=files),
                    own_url(Catalog(store), is_single_writer=chosen.single_writer, exists=destined),
                    metrics=metrics,
                    metadata=metadata,
                )
            with entry.bar("saving") as bar:
                checkpoint = pending.finish(bar)
        except BaseException as exc:
            entry.failed(-1, exc)
            raise
        else:
            entry.committed(checkpoint)
            return checkpoint
        finally:
            journal.end()


def load(  # noqa: PLR0913 (keyword-only, each of its own kind)
    state: MutableMapping[str, object],
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    strict: bool = True,
    cast: bool = False,
    materialize: str | torch.device | None = None,
    resize: Resize | None = None,
    only: str | Sequence[str] | None = None,
    ranks: Ranks = "all",
    process_group: ProcessGroup | None = None,
    progress: Show = "auto",
    on_event: OnEvent = None,
) -> Checkpoint:
    """Restore `state` in place from the checkpoint at `url`. With several ranks, every rank calls it.

    Processes without a process group load each for itself, also where a launcher has started several.

    Names, shapes and dtypes are compared first, and objects that may refuse a state are asked: on a mismatch nothing is
    changed. Every byte was verified before it reached a tensor.

    Args:
        state: as for `save`; tensors of modules and containers are filled where they are, objects get memory of their
            own, plain values are put into the dict. An empty dict or list, or None, takes what was saved.
        url: the checkpoint's prefix, for example `Checkpoint.url`.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        options: sizes, parallelism, patience.
        strict: refuse a checkpoint that has names which `state` lacks, or lacks some that it has; else those stay as
            they are, and `Checkpoint.fit` of what is returned names them. Nothing in common is an error all the same.
        cast: let parameters and buffers of modules be cast from one floating-point dtype to another. Without it only
            a dtype that holds every number of the saved one is filled (float16 into float32).
        materialize: the device on which module tensors that are on the meta device get memory, before they are filled.
        resize: for a tensor of another shape than was saved: called with its name, the saved tensor and the live one,
            both on the live one's device (a copy of it; DTensors where it is one, of the same mesh and placements),
            returns a tensor of the live one's shape and dtype, which is copied into it.
        only: names of what of `state` is restored, its keys or those of objects in its containers (`model`,
            `optimizers.0`); all else of it stays as it is, and so does what else the checkpoint holds.
        ranks: `all`: every rank of the process group calls it; or `self`: this process restores by itself.
        process_group: the ranks of this group call it, by themselves; None: those of the default one.
        progress: what is shown on stderr, as for `CheckpointManager`.
        on_event: is told what happens, as for `CheckpointManager`.

    Returns:
        The checkpoint that was loaded; its `fit` says what of it and of `state` went together.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        StateMismatchError: names, shapes or dtypes differ, or an object refuses its state; nothing was changed.
        RestoreFailedError: an object did not take its state after others had; says what was changed.
        IntegrityError: an object is missing or differs from what was committed. Tensors may hold a mixture of old
            and restored values: load another checkpoint before going on.
        RankLostError: another rank died, hangs or never came. Tensors may hold a mixture.
        StorageError: the store could not be read.
    """
    _refuse_swapped("load", state, url)
    chosen = Options.of(options)
    with (
        taking_part(check_part(ranks, process_group)),
        open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store,
    ):
        catalog, journal = Catalog(store), Journal(store, Progress(progress), on_event=on_event)
        found = load_state(
            state,
            map(catalog.open, [""]),
            roots=Roots([catalog]),
            journal=journal,
            options=chosen,
            allowed=Allowed(strict=strict, cast=cast, materialize=materialize, resize=resize, only=only),
            what="load",
            shown="loading",
        )
        journal.end()
    if found is None:
        raise CheckpointNotFoundError(f"no committed checkpoint at {store.url}")
    return found


def read(
    url: str | os.PathLike[str],
    keys: str | Sequence[str] | None = None,
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
) -> dict[str, object]:
    """Read a checkpoint, or a part of it, without a model: nested dicts of new host tensors and plain values.

    Args:
        url: the checkpoint's prefix.
        keys: names or shell globs of names (`model.*`, `optimizer.state.*.exp_avg`); None reads everything. A name
            also selects all that lies below it. What the library keeps beside the state, whose names begin with
            `cloudckpt.`, is selected by what begins so alone.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        options: sizes, parallelism, patience.
        progress: `bar` or `auto` show a bar on a terminal; there is no line.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL, or a key matches nothing; says what is near it.
        IntegrityError: an object is missing or differs from what was committed.
        StorageError: the store could not be read.
    """
    chosen = Options.of(options)
    with open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store:
        catalog = Catalog(store)
        with Journal(store, Progress(progress)).begin(rank=0).bar("reading") as bar:
            return read_state(map(catalog.open, [""]), keys, roots=Roots([catalog]), options=chosen, gauge=bar)


def restore_files(
    url: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    names: str | Sequence[str] | None = None,
    *,
    storage_options: Mapping[str, object] | None = None,
    directory_storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
) -> list[str]:
    """Write the files that were saved with a checkpoint into a directory. Each process for itself.

    Every byte is verified before it is written. A file there of the same path is replaced as a whole; others stay.

    Args:
        url: the checkpoint's prefix.
        directory: where they go, on a disk or at any URL; it need not exist.
        names: paths in the checkpoint, `config.json`, or `tokenizer/` for all that is below; None: all.
        storage_options: fsspec's own options for `url`.
        directory_storage_options: those for `directory`.
        engine: what moves the bytes, as for `save`.
        options: sizes, parallelism, patience.
        progress: `bar` or `auto` show a bar on a terminal.

    Returns:
        Their paths below the directory.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL; or it holds no files, or none of a name.
        IntegrityError: an object is missing or differs from what was committed. Each file is whole, or not changed.
        StorageError: a store could not be read or written; likewise.
    """
    chosen = Options.of(options)
    with (
        open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store,
        open_store(directory, storage_options=directory_storage_options, options=chosen) as folder,
    ):
        catalog = Catalog(store)
        with Journal(store, Progress(progress)).begin(rank=0).bar("reading files") as bar:
            candidates = map(catalog.open, [""])
            return read_files(candidates, folder, names, roots=Roots([catalog]), options=chosen, gauge=bar)


def contents(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
) -> Contents:
    """Return the names, shapes, dtypes and sizes of all that a checkpoint holds; reads its manifest and index alone.

    Args:
        url: the checkpoint's prefix.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        options: patience.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        IntegrityError: the manifest or the index is missing or differs from what was committed.
        StorageError: the store could not be read.
    """
    chosen = Options.of(options)
    with open_store(url, storage_options=storage_options, engine=engine, options=chosen) as store:
        catalog = Catalog(store)
        return read_contents(map(catalog.open, [""]), Roots([catalog]))
