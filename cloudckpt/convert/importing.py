"""Lead one import: tell what the source is, look at all of it, then write its bytes as a checkpoint and commit that.

    source ──▶ from_safetensors │ from_torch │ from_dcp ──▶ Origin: boxes, values, paths; no tensor was read yet
    Origin ──layout──▶ shards ──each piece read when its shard is put──▶ index ──▶ manifest, last

What is wrong with a source is mostly known before the first byte is written, and all of it before the commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cloudckpt.convert.blob import Blob, refuse_special
from cloudckpt.convert.from_dcp import METADATA, add_dcp
from cloudckpt.convert.from_safetensors import add_safetensors, is_safetensors, names_in_index
from cloudckpt.convert.from_torch import add_torch, is_archive, is_older
from cloudckpt.convert.opened import by_cores
from cloudckpt.convert.origin import Bytes, Origin
from cloudckpt.convert.places import LEAVING_S, folder_and_name, objects_in, telling_interrupts
from cloudckpt.errors import CommitUnknownError, ManifestError, ObjectNotFoundError, OptionsError, SourceError
from cloudckpt.format import (
    Box,
    BoxTable,
    JsonValue,
    PathElement,
    Piece,
    ShardLayout,
    codec,
    lay_out,
    new_attempt,
    record_of_call,
    shown,
    step_number,
    unflatten,
)
from cloudckpt.options import MIB, Options
from cloudckpt.report import Progress, Show
from cloudckpt.root import Catalog, Checkpoint, Destination, Epoch, Exists, Target, check_exists, check_own, own_url
from cloudckpt.saving import (
    RankOutput,
    Record,
    Staging,
    assemble,
    check_against_names,
    commit_index,
    discard,
    stats_of,
)
from cloudckpt.store import RetryingStore, Store, open_store
from cloudckpt.transfer import Gauge, Puts, Watch

__all__ = ["Source", "import_", "looked_at"]

Source = Literal["auto", "safetensors", "huggingface", "torch", "dcp"]
"""What can be imported; Lightning's `.ckpt` is a file of `torch.save`."""

_HEAD_BYTES = 512
# A shard in flight is in memory twice where the transport copies it.
_SHARD_BYTES = 32 * MIB
_BUDGET_BYTES = 192 * MIB
# Each holds a shard, so that more than there are cores cost more than they help.
_THREADS = 2
_WEIGHTS: tuple[tuple[str, str, Callable[[Origin, Blob], None]], ...] = (
    ("model.safetensors.index.json", "model.safetensors", add_safetensors),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", add_torch),
)


def import_(  # noqa: PLR0913 (keyword-only, each of its own kind)
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    *,
    kind: Source = "auto",
    step: int | None = None,
    under: str = "",
    exists: Exists = "raise",
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, object] | None = None,
    source_storage_options: Mapping[str, object] | None = None,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
    progress: Show = "auto",
) -> Checkpoint:
    """Make a checkpoint of files that another program wrote, and commit it like any save. Nothing in them is run.

    DCP's and PyTorch's files have sums, the CRC-32 of each record. They are not compared, as PyTorch compares none: a
    tensor may be a part of a record, and it would take a fifth more time. `unzip -t` compares a file's.

    Args:
        source: a file of `torch.save` (Lightning's `.ckpt`), a safetensors file or the index of several, a folder of
            Hugging Face's (safetensors preferred), or one of `torch.distributed.checkpoint`; on a disk or at any URL.
        url: a directory or URL that becomes one checkpoint; with `step` the root that gets it.
        kind: what the source is; `auto` looks.
        step: of the checkpoint in a root. As with the first save of a job, a new epoch begins with it: a job that is at
            work there is fenced.
        under: the key of the state below which all stands, such as `model`; "" for the state itself.
        exists: where the URL holds a checkpoint, or the root that step: `raise`, or `replace` it (a URL of its own).
        metrics: numbers to be kept with the checkpoint.
        metadata: values to be kept with the checkpoint; where it came from is added as `imported_from`.
        source_storage_options: fsspec's own options for `source`.
        storage_options: those for `url`.
        engine: what moves the bytes of `url`, as for `save`.
        options: sizes, parallelism, patience.
        progress: `bar` or `auto` show a bar on a terminal.

    Returns:
        The committed checkpoint.

    Raises:
        SourceError: the source is damaged, contradicts itself, is of a kind that is not read, or changed meanwhile;
            `.key` names the file or the tensor.
        UnsupportedValueError: it holds a value that the format cannot.
        CheckpointExistsError: the URL holds a checkpoint, or the root that step; or the URL is a root, and no step was
            given, or is a checkpoint, and one was. Nothing was changed.
        StorageError: a store could not be read or written. In all these cases nothing was committed
            (after `CommitUnknownError`: the whole checkpoint, or nothing).
    """
    began_s = time.monotonic()
    if kind not in get_args(Source):
        raise OptionsError(f"kind is {kind!r}; give one of {', '.join(get_args(Source))}")
    given = Options.of(options)
    chosen = (given if options is not None else replace(given, shard_bytes=_SHARD_BYTES)).lean(_BUDGET_BYTES)
    # A step's epoch may have been begun.
    with telling_interrupts("nothing was committed") as tell, ExitStack() as stack:
        bar = stack.enter_context(Progress(progress).bar("importing", rank=0))
        opened = _Opening(source, source_storage_options, chosen, stack)
        origin = opened.origin(kind)
        store = stack.enter_context(open_store(url, storage_options=storage_options, engine=engine, options=chosen))
        if options is None:
            chosen = by_cores(chosen, store, *opened.stores, least=_THREADS)
        notes = {"imported_from": opened.url, **(metadata or {})}
        in_json, about = record_of_call(metrics, notes)
        record = Record(metrics=in_json, metadata=about, began_s=began_s, spent_before=stats_of(store))
        prepared = _Prepared.of(origin, under, chosen)
        target = _destination(store, step, chosen, exists).take()
        checkpoint = _write(prepared, target, record, chosen, bar)
        tell(f"{checkpoint.url} is committed")
        return checkpoint


# -- what the source is -------------------------------------------------------------------------------------


def looked_at(
    source: str | os.PathLike[str],
    kind: Source,
    *,
    storage_options: Mapping[str, object] | None,
    options: Options,
    stack: ExitStack,
) -> Origin:
    """Return what a source is, to be read until the stack ends.

    Raises:
        SourceError: it is damaged, or of no kind that is read.
        StorageError: it could not be read.
    """
    return _Opening(source, storage_options, options, stack).origin(kind)


class _Opening:
    """A source's URL, and the stores that are open for it until the import ends."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None,
        options: Options,
        stack: ExitStack,
    ) -> None:
        self._text = os.fspath(source)
        self._storage_options = storage_options
        self._options = options
        self._stack = stack
        self.stores: list[RetryingStore] = []
        self.url = self._text

    def _store(self, url: str) -> RetryingStore:
        opened = open_store(url, storage_options=self._storage_options, options=self._options)
        self.stores.append(self._stack.enter_context(opened))
        return self.stores[-1]

    def origin(self, kind: Source) -> Origin:
        """Look at the source.

        Raises:
            SourceError: it is damaged, or of no kind that is read.
        """
        origin = Origin()
        blob = self._file()
        if blob is None:
            self._add_folder(origin, kind)
        else:
            self.url = f"{blob.store.url}/{blob.key}"
            _add_file(origin, blob, kind)
        if not origin.paths:
            raise SourceError(f"{self.url} holds nothing; give another one", key=self._text)
        origin.check_growth()
        return origin

    def _file(self) -> Blob | None:
        """Return the file that the source is, None for a folder."""
        try:
            folder, name = folder_and_name(self._text)
        except OptionsError:
            return None
        try:
            store = self._store(folder)
            refuse_special(store, name)
            info = store.head(name)
        except ObjectNotFoundError:
            return None
        return Blob(store=store, key=name, size_bytes=info.size_bytes, modified_s=info.modified_s)

    def _add_folder(self, origin: Origin, kind: Source) -> None:
        store = self._store(self._text)
        self.url = store.url
        there = objects_in(store)
        if METADATA in there and kind in ("auto", "dcp"):
            add_dcp(origin, store)
            return
        for index, single, add in _WEIGHTS if kind in ("auto", "huggingface") else ():
            if index in there:
                _add_indexed(origin, Blob.of(store, index), add)
                return
            if single in there:
                add(origin, Blob.of(store, single))
                return
        for name in (METADATA, *(name for index, single, _ in _WEIGHTS for name in (index, single))):
            refuse_special(store, name)
        names = ", ".join(sorted(there)[:8]) or "nothing"
        raise SourceError(
            f"{store.url} is no file, and as a folder it holds {names}: neither .metadata, nor model.safetensors or "
            "pytorch_model.bin or their index; give a file or folder that cloudckpt reads",
            key=self._text,
        )


def _add_file(origin: Origin, blob: Blob, kind: Source) -> None:
    head = blob.read(0, min(_HEAD_BYTES, blob.size_bytes))
    if blob.key.endswith(".index.json") and kind in ("auto", "safetensors", "huggingface"):
        _add_indexed(origin, blob, add_torch if ".bin." in blob.key else add_safetensors)
    # A header may be as long as the bytes are with which a pickle begins, and no pickle has a header behind those.
    elif is_safetensors(head) and kind in ("auto", "safetensors"):
        add_safetensors(origin, blob)
    elif (is_archive(head) or is_older(head)) and kind in ("auto", "torch"):
        add_torch(origin, blob)
    else:
        what = "a file that cloudckpt reads" if kind == "auto" else f"a file of {kind}"
        raise SourceError(
            f"{blob.key!r} ({blob.size_bytes} bytes) is not {what}; give one of torch.save or safetensors, or a folder "
            "of Hugging Face or torch.distributed.checkpoint",
            key=blob.key,
        )


def _add_indexed(origin: Origin, index: Blob, add: Callable[[Origin, Blob], None]) -> None:
    """Add the files that an index names, and refuse them where they hold other names than it says."""
    names = names_in_index(index)
    origin.blobs.append(index)
    for file in dict.fromkeys(names.values()):
        before = set(origin.paths)
        add(origin, Blob.of(index.store, file))
        wanted = {name for name, of in names.items() if of == file}
        for name in sorted(wanted ^ (set(origin.paths) - before)):
            where = "not in" if name in wanted else "in, and not named for,"
            raise SourceError(f"{shown(name)} is {where} {shown(file)}, against {index.key!r}; get both anew", key=name)


# -- what is written ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What the checkpoint will hold, laid out."""

    origin: Origin
    pieces: _Pieces
    attempt: str
    values: dict[str, JsonValue]
    paths: dict[str, list[PathElement]]
    notes: dict[str, JsonValue]

    @classmethod
    def of(cls, origin: Origin, under: str, options: Options) -> _Prepared:
        if under:
            _put_under(origin, under)
        _check_names(origin)
        origin.check_tiles()
        values: dict[str, JsonValue] = {}
        for name, value in origin.values.items():
            parts = codec.Parts()
            values[name] = codec.encode(value, key=name, parts=parts)
            origin.add_value_parts(parts.tensors(name))
        attempt = new_attempt()
        return cls(
            origin=origin,
            pieces=_Pieces(origin.boxes, attempt, options.shard_bytes),
            attempt=attempt,
            values=values,
            paths=origin.paths,
            notes=origin.notes,
        )


def _put_under(origin: Origin, under: str) -> None:
    def named(name: str) -> str:
        return f"{under}.{name}"

    origin.boxes = [(box._replace(name=named(box.name)), read) for box, read in origin.boxes]
    origin.values = {named(name): value for name, value in origin.values.items()}
    origin.paths = {named(name): [under, *path] for name, path in origin.paths.items()}
    origin.notes = {
        named(name): {**note, "tied": named(str(note["tied"]))} if isinstance(note, dict) and "tied" in note else note
        for name, note in origin.notes.items()
    }


def _check_names(origin: Origin) -> None:
    """Refuse, before a byte is written, names that no checkpoint may have, and paths that nothing can be built by."""
    for name in origin.paths:
        if not name or name.startswith("cloudckpt."):
            raise SourceError(
                f"{shown(name)} is no name that a state may have; give under='model' (--under), which stands before it",
                key=name,
            )
    try:
        unflatten(dict.fromkeys(origin.paths), origin.paths)
    except ManifestError as exc:
        # What follows is for who has an index, and no source.
        reason = str(exc).partition(": the index is damaged")[0]
        raise SourceError(
            f"the names in the source contradict each other: {reason}; save it anew with other names, or get it anew",
            key=str(exc.key),
        ) from exc


class _Pieces:
    """Boxes of a source, laid out as shards; a piece's bytes are read when its shard is put."""

    def __init__(self, boxes: list[tuple[Box, Bytes]], attempt: str, shard_bytes: int) -> None:
        self.chunks: Sequence[Box] = [box for box, _ in boxes]
        self.table = BoxTable.of(self.chunks)
        self._readers = [read for _, read in boxes]
        self.shards: Sequence[ShardLayout] = lay_out(
            self.chunks, shard_bytes=shard_bytes, metadata={"cloudckpt": attempt}
        )

    def staging_bytes(self, pieces: Sequence[Piece]) -> int:
        return Staging.room_for(piece.nbytes for piece in pieces)

    def views(self, pieces: Sequence[Piece], room: Staging) -> list[memoryview]:
        return [self._view(piece, room) for piece in pieces if piece.nbytes]

    def _view(self, piece: Piece, room: Staging) -> memoryview:
        memory = room.take(piece.nbytes)
        self._readers[piece.chunk](piece.local_start, memory)
        return memory


def _destination(store: RetryingStore, step: int | None, options: Options, exists: Exists) -> Destination:
    catalog, destined = Catalog(store), check_exists(exists)
    if step is None:
        check_own(catalog)
        return own_url(catalog, is_single_writer=options.single_writer, exists=destined)
    number = step_number(step)
    if exists != "raise":
        raise OptionsError("exists='replace' is for a URL of its own; delete the step from its root first")
    for prefix, (_, found) in catalog.places().items():
        if found == number and catalog.is_taken(prefix):
            raise catalog.exists_error(prefix)
    return Epoch(catalog, is_single_writer=options.single_writer).step(number)


def _write(prepared: _Prepared, target: Target, record: Record, options: Options, gauge: Gauge) -> Checkpoint:
    puts = Puts()
    output = RankOutput(
        target=target,
        attempt=prepared.attempt,
        rank=0,
        options=options,
        watch=Watch(deadline_s=options.transfer_timeout_s, gauge=gauge),
        puts=puts,
    )
    is_committing = False
    try:
        written = output.write(prepared.pieces, prepared.values)
        index = assemble(
            [written],
            attempt=prepared.attempt,
            block_bytes=options.block_bytes,
            paths=prepared.paths,
            notes=prepared.notes,
        )
        check_against_names({box.name for box in prepared.pieces.chunks}, index)
        _refuse_changed(prepared.origin)
        seconds = {"upload_s": time.monotonic() - record.began_s}
        is_committing = True
        return commit_index(target, index, replace(record, seconds=seconds))
    except CommitUnknownError:
        raise
    except Exception:
        discard(target, [prepared.attempt], options)
        raise
    except BaseException as exc:
        place = f"{target.catalog.store.url}/{target.prefix}".rstrip("/")
        if is_committing:
            # A store may still carry out what it was asked for last.
            exc.add_note(f"{place} has the whole checkpoint, or none; `cloudckpt verify {place}` tells")
        else:
            # A put goes on in its thread, and would land after what was written was removed.
            is_removed = puts.close(LEAVING_S) & discard(target, [prepared.attempt], options)
            left = f"; shards may stay below {place}/{prepared.attempt}: {_sweep(target)}"
            told = ", and what was written is removed" if is_removed else left
            exc.add_note(f"nothing was committed at {place}{told}")
        raise


def _sweep(target: Target) -> str:
    """Say how what an import has left goes away."""
    if target.prefix:
        return f"`cloudckpt sweep {target.catalog.store.url}` removes them once they are old enough"
    return "remove that folder, in which nothing else stands"


def _refuse_changed(origin: Origin) -> None:
    """Refuse to commit what was read from objects that somebody wrote meanwhile."""
    seen: set[tuple[Store, str]] = set()
    for blob in origin.blobs:
        if (blob.store, blob.key) not in seen and not blob.is_unchanged():
            raise SourceError(
                f"{blob.key!r} was written while it was read, so nothing was committed; try again", key=blob.key
            )
        seen.add((blob.store, blob.key))
