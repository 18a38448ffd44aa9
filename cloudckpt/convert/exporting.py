"""Lead one export: open the checkpoint and the folder it goes to, refuse what stands in the way, write, say what went.

    checkpoint ──Job──▶ to_safetensors │ to_torch │ to_dcp ──Layouts──▶ files of the folder, the deciding one last

Until that last file stands, no program takes the folder for a model or a checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cloudckpt.convert.holding import MARK, Hold, held, taken
from cloudckpt.convert.opened import Exported, Job, Kind, by_cores
from cloudckpt.convert.places import folder_and_name, objects_in, refuse_ours, telling_interrupts
from cloudckpt.convert.planned import Plan
from cloudckpt.convert.to_dcp import DCP_FILES, plan_dcp
from cloudckpt.convert.to_safetensors import HF_DECIDING, HF_FILES, NUMBERED, plan_huggingface, plan_safetensors
from cloudckpt.convert.to_torch import plan_torch
from cloudckpt.errors import OptionsError
from cloudckpt.loading import read_index
from cloudckpt.options import MIB, Options, as_count
from cloudckpt.report import Progress, Show
from cloudckpt.root import Catalog, newest_or_the_one, refuse_files
from cloudckpt.store import RetryingStore, local_path, open_store

__all__ = ["export", "refuse_model"]

# A put takes its object whole, from memory or a file's pages: what goes to a bucket is cut where a reader allows it, so
# that one file is filled while another is put. A file of torch.save cannot be cut: it is gathered on a disk here.
_REMOTE_SHARD_BYTES = 64 * MIB
# On a machine of few cores: one waits for a disk while the others work.
_THREADS = 4
_BUDGET_BYTES = 64 * MIB
# Weights are the checkpoint's; a folder of a model has what describes them, which is small.
_CONFIG_BYTES = 64 * MIB
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|distcp|index\.json|cloudckpt-[a-z]+)\Z")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind is written: the plan of it, and whether the target is a file, of which ending."""

    plan: Callable[[Job], Plan]
    is_file: bool
    ending: str = ""


_KINDS: Mapping[Kind, _Kind] = {
    "safetensors": _Kind(plan_safetensors, is_file=True, ending=".safetensors"),
    "huggingface": _Kind(plan_huggingface, is_file=False),
    "torch": _Kind(plan_torch, is_file=True),
    "dcp": _Kind(plan_dcp, is_file=False),
}


def export(  # noqa: PLR0913 (keyword-only, each of its own kind)
    url: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Kind,
    prefix: str = "",
    max_shard_bytes: int | None = None,
    config: str | os.PathLike[str] | None = None,
    leave_out: bool = False,
    overwrite: bool = False,
    storage_options: Mapping[str, object] | None = None,
    target_storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
) -> Exported:
    """Write a checkpoint as files that other programs read. Every byte was verified before it is written.

    While an export is under way, `.cloudckpt-export` stands in its folder, or `NAME.cloudckpt-export` beside its file,
    and another one to the same place is refused. With `overwrite` that one takes the place over, and the first one ends
    with an error before its next file, or after its last one; what is there then is whole, of whichever last file came
    last. A kill leaves that mark. Other programs do not know it: without `overwrite` none of their files is replaced
    that stands when ours is put. A store that cannot refuse a create lets two begin, of which one ends at its next
    file. Of several files all but the last have names that no other export has.

    Args:
        url: a checkpoint, or a root, whose newest one is meant.
        target: a file (`safetensors`, which ends in `.safetensors`, and `torch`) or a folder (`huggingface`, `dcp`), on
            a disk or at any URL.
        to: `safetensors`: tensors by name, in one file, or in several with an index. `huggingface`: the same in a
            folder as `from_pretrained` reads it. `torch`: the nested state, for `torch.load(weights_only=True)`.
            `dcp`: a folder for `torch.distributed.checkpoint.load`.
        prefix: the tensors whose names begin with it go, without it (`model.`); for safetensors and huggingface.
        max_shard_bytes: what one safetensors file may hold, unless one tensor is larger; None: no limit on a disk,
            64 MiB for a bucket, where a file is put whole.
        config: a folder whose small files (`config.json`, a tokenizer's) are copied beside the weights; for
            huggingface.
        leave_out: leave out what the target cannot hold, and say so in the result; without it that is refused. Names of
            one memory are left out of huggingface's in any case, as `save_pretrained` does.
        overwrite: replace an export that is there, or one that was killed; other files of a folder stay. The old one
            is whole until the last file of the new one stands, so that there is to be room for both; the files of
            `config` alone take the place of older ones right before that. A kill leaves the old export or the new one,
            and perhaps files of the other beside it, which the next export with `overwrite` removes; those of one whose
            place it takes over it leaves, and warns of, because that one may be at work still.
        storage_options: fsspec's own options for `url`.
        target_storage_options: those for `target`.
        engine: what moves the bytes, as for `save`.
        options: sizes, parallelism, patience.
        progress: `bar` or `auto` show a bar on a terminal.

    Returns:
        What was written, and what was left out.

    Raises:
        CheckpointNotFoundError: nothing is committed at the URL.
        OptionsError: the target holds an export, or another one is under way there, or it is no such place, or an
            argument is wrong; nothing was written.
        ConflictError: another export has taken over, or another program has written there; a note says what is there.
        UnsupportedValueError: a dtype, name or value that the target cannot hold (`.key`); nothing was written.
        IntegrityError: an object is missing or differs from what was committed.
        StorageError: a store could not be read or written. In both cases a note says what is there: no export, the one
            that was to be replaced, or the new one, if all that could not be done was to remove the old one.
    """
    if to not in get_args(Kind):
        raise OptionsError(f"to is {to!r}; give one of {', '.join(get_args(Kind))}")
    given = Options.of(options)
    chosen = given.lean(_BUDGET_BYTES)
    _check(to, target, prefix=prefix, shard_bytes=max_shard_bytes, config=config)
    folder_url, name = folder_and_name(target) if _KINDS[to].is_file else (os.fspath(target), "")
    with (
        telling_interrupts("nothing was written") as tell,
        open_store(url, storage_options=storage_options, engine=engine, options=chosen) as source,
        open_store(folder_url, storage_options=target_storage_options, options=chosen) as folder,
        Progress(progress).bar("exporting", rank=0) as bar,
    ):
        refuse_ours(folder, name, target_storage_options, chosen)
        catalog = Catalog(source)
        checkpoint = newest_or_the_one(catalog)
        index = read_index(catalog, checkpoint)
        if options is None:
            chosen = by_cores(chosen, source, folder, least=_THREADS)
        if max_shard_bytes is None and folder.engine != "local":
            max_shard_bytes = _REMOTE_SHARD_BYTES
        job = Job(
            checkpoint=checkpoint,
            index=index,
            source=source,
            folder=folder,
            name=name,
            prefix=prefix,
            leaves_out=leave_out,
            shard_bytes=max_shard_bytes,
            config={} if config is None else _config_files(config),
            hold=Hold(folder, name, _mark_for(name), is_replacing=overwrite),
            options=chosen,
            gauge=bar,
        )
        plan = _KINDS[to].plan(job)
        if folder.engine == "local":
            _refuse_no_file(Path(local_path(folder_url)), plan)
        with job.hold.of(plan):
            bar.begin(sum(part.nbytes for saved in plan.taken.tensors.values() for part in job.parts(saved)))
            plan.write()
            written = f"{folder.url}/{name}" if name else folder.url
            tell(f"the export is whole at {written}")
            there = objects_in(folder, plan.beginning)
    return Exported(
        url=written,
        source=checkpoint.url,
        files=plan.files,
        total_bytes=sum(there.get(file, 0) for file in plan.files),
        tensor_count=len(plan.taken.tensors),
        left_out=plan.taken.left_out,
    )


def _mark_for(name: str) -> str:
    """Return the mark of a target: of all exports that could write or remove one of each other's files the same.

    Those to a folder have that of the folder, and so have those to a file that such a one may have; several files in
    one folder are exported at once.
    """
    if not name or HF_FILES.fullmatch(name) or DCP_FILES.fullmatch(name):
        return MARK
    return f"{NUMBERED.sub('.safetensors', name)}{MARK}"


def _check(
    to: Kind,
    target: str | os.PathLike[str],
    *,
    prefix: str,
    shard_bytes: int | None,
    config: str | os.PathLike[str] | None,
) -> None:
    """Refuse arguments that do not go together, before anything is opened."""
    ending = _KINDS[to].ending
    if not os.fspath(target).endswith(ending):
        raise OptionsError(f"the target {os.fspath(target)!r} of {to} is a file; let its name end in {ending}")
    if to not in ("safetensors", "huggingface"):
        for name, value in (("prefix", prefix), ("max_shard_bytes", shard_bytes)):
            if value:
                raise OptionsError(f"{name} is for safetensors and huggingface; {to} takes the whole state")
    if config is not None and to != "huggingface":
        raise OptionsError(f"config is for huggingface; {to} has no such files")
    if shard_bytes is not None:
        as_count("max_shard_bytes", shard_bytes, least=1)


def _config_files(config: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the files of a folder that describe a model, by name; its weights stay where they are."""
    with open_store(config) as store:
        sizes = {name: size for name, size in objects_in(store).items() if not _WEIGHTS.match(name)}
        if not sizes:
            raise OptionsError(f"no file is in {store.url} that describes a model; give the folder of its config.json")
        if sum(sizes.values()) > _CONFIG_BYTES:
            raise OptionsError(
                f"the files in {store.url} have {sum(sizes.values())} bytes; give a folder of small ones"
            )
        return {name: store.read(name, limit_bytes=_CONFIG_BYTES) for name in sizes}


def _refuse_no_file(folder: Path, plan: Plan) -> None:
    """Refuse names on a disk that stand for something else than a file, which an export would take the place of."""
    for path in (folder / name for name in plan.files):
        if path.is_symlink():
            raise OptionsError(
                f"{path} is a symbolic link to {path.readlink()}, and nothing was written; give what it points to, or "
                "remove the link"
            )
        if path.exists() and not path.is_file():
            raise OptionsError(
                f"{path} is {'a directory' if path.is_dir() else 'no regular file'}, and nothing was written; give the "
                "name of a file"
            )


def refuse_model(folder: RetryingStore) -> None:
    """Refuse a folder early that holds a model of Hugging Face's, or checkpoints of ours; raises `OptionsError`."""
    refuse_files(Catalog(folder))
    there = objects_in(folder)
    if HF_DECIDING & there.keys():
        raise taken(folder.url, sorted(HF_DECIDING & there.keys()))
    if MARK in there:
        raise held(folder.url, MARK, folder.head(MARK))
