"""Hold a checkpoint that is exported: what of it goes, and its tensors as a stream of verified bytes.

    names ──▶ Taken: tensors and values that the target takes, what is left out and why
    tensors ──cut──▶ parts (contiguous boxes) ──read ahead, verified──▶ bytes in row-major order, part by part

The stream holds two batches of parts, one that is read and one that is written; so the largest tensor never is in
memory whole (FORMAT invariant 15). Keeps FORMAT invariants 1 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from cloudckpt.convert.holding import Hold
from cloudckpt.convert.planned import Taken
from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.format import DTYPES, NOTES, Index, JsonValue, TensorEntry, codec, shown, split_box
from cloudckpt.loading import RankInput, by_part_name, part_targets
from cloudckpt.options import MIB, Options
from cloudckpt.root import Checkpoint
from cloudckpt.store import RetryingStore, Store
from cloudckpt.transfer import Gauge, copying_threads

__all__ = ["Exported", "Job", "Kind", "Part", "by_cores"]

Kind = Literal["safetensors", "huggingface", "torch", "dcp"]
"""What a checkpoint can be exported to."""

_OURS = "cloudckpt."
# Of one part, and of a batch of small ones. Half of it costs a tenth of the rate on a disk.
PART_BYTES = 32 * MIB
_ALIGNMENT_BYTES = 64
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        url: what to open: a file, or a folder.
        source: the checkpoint.
        files: names of the files below the folder, the one that makes the export complete last.
        total_bytes: bytes of all of them.
        tensor_count: tensors in them.
        left_out: name in the checkpoint → why it is in none of them.
    """

    url: str
    source: str
    files: tuple[str, ...]
    total_bytes: int
    tensor_count: int
    left_out: Mapping[str, str]


def by_cores(options: Options, *stores: RetryingStore, least: int) -> Options:
    """Return options with as many threads as there are cores, or `least`, where all that is moved stays on disks.

    More of them wait for each other there, each with a buffer that the others drive out of the caches.
    """
    if any(store.engine != "local" for store in stores):
        return options
    return replace(options, concurrency=min(options.concurrency, max(least, copying_threads())))


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that is contiguous in its row-major bytes, of which `first` is its first one."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One export under way.

    Attributes:
        checkpoint, index: what is exported.
        source: the store that it is on.
        folder: the store of the folder that the export goes to.
        name: of the file there that the target names; "" where the target is the folder.
        prefix: what the names of the tensors begin with that are wanted; it is taken off.
        leaves_out: whether what the target cannot hold is left out; else it is refused.
        shard_bytes: of one file, at most; None: no limit.
        config: files that go beside the weights, by name.
        options: sizes, parallelism, patience.
        hold: whose turn it is there; what writes a file asks it.
        gauge: is told how many bytes have moved.
    """

    checkpoint: Checkpoint
    index: Index
    source: Store
    folder: RetryingStore
    name: str
    prefix: str
    leaves_out: bool
    shard_bytes: int | None
    config: Mapping[str, bytes]
    hold: Hold
    options: Options
    gauge: Gauge | None

    # -- what goes ----------------------------------------------------------------------------------------------

    def take(self) -> Taken:
        """Return all that was saved of the state below the prefix; what the library saved beside it is left out.

        Raises:
            OptionsError: nothing begins with the prefix.
            UnsupportedValueError: a value cannot be decoded here.
        """
        taken = Taken()
        stored = {}
        for name in [*self.index.tensors, *self.index.values]:
            if name == NOTES or codec.is_part_name(name):
                continue
            if name.startswith(_OURS):
                taken.left_out[name] = "it is what cloudckpt keeps beside a state: generators, files, state of one rank"
            elif not name.startswith(self.prefix) or name == self.prefix:
                why = "is not below" if name != self.prefix else "would have no name without"
                taken.left_out[name] = f"it {why} the prefix {self.prefix!r}"
            elif name in self.index.tensors:
                taken.tensors[name[len(self.prefix) :]] = name
            else:
                stored[name] = self.index.values[name]
        if not taken.tensors and not stored and self.prefix in taken.left_out:
            raise OptionsError(
                f"in {self.checkpoint.url} only {shown(self.prefix)} itself begins with that prefix, and would have no "
                "name without it; give a shorter one"
            )
        if not taken.tensors and not stored:
            names = [name for name in [*self.index.tensors, *self.index.values] if not name.startswith(_OURS)]
            raise OptionsError(
                f"nothing in {self.checkpoint.url} begins with {self.prefix!r}; it holds {', '.join(names[:_SHOWN])}, …"
            )
        parts = part_targets(self.index, stored)
        if parts:
            RankInput(self.source, self.checkpoint, self.index, self.options).fill(by_part_name(parts))
        for name, value in stored.items():
            taken.values[name] = codec.decode(value, key=name, parts=parts.get(name))
        return taken

    @property
    def notes(self) -> Mapping[str, JsonValue]:
        """What is kept about names beside their bytes."""
        found = codec.decode_json(self.index.values.get(NOTES, {}), key=NOTES)
        return cast("dict[str, JsonValue]", found) if isinstance(found, dict) else {}

    def tied(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return name → the first name of the same memory, of names in the export."""
        notes, firsts, found = self.notes, dict[str, str](), {}
        for name, saved in names.items():
            note = notes.get(saved)
            root = note.get("tied", saved) if isinstance(note, dict) else saved
            first = firsts.setdefault(str(root), name)
            if first != name and self.index.tensors[names[first]] == self.index.tensors[saved]:
                found[name] = first
        return found

    def drop(self, taken: Taken, problems: Mapping[str, str], what: str) -> None:
        """Leave out what has a problem (name in the checkpoint → what), if the caller asked for that.

        Raises:
            UnsupportedValueError: there are some, and the caller did not; names them.
        """
        if problems and not self.leaves_out:
            first, *_ = problems
            told = "; ".join(f"{shown(name)}: {why}" for name, why in list(problems.items())[:_SHOWN])
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise UnsupportedValueError(
                f"{what} cannot hold {told}{more}. Choose a part by its prefix, let what it cannot hold be left out "
                "(leave_out=True, --leave-out), or export to torch or dcp",
                key=first,
                type_name=type(taken.values.get(first)).__name__,
            )
        taken.left_out.update(problems)
        for name in problems:
            taken.values.pop(name, None)
        for name in [name for name, saved in taken.tensors.items() if saved in problems]:
            del taken.tensors[name]

    # -- bytes --------------------------------------------------------------------------------------------------

    def parts(self, name: str) -> list[Part]:
        """Cut a tensor of the checkpoint into parts, in the order of its bytes; an empty one has none."""
        entry = self.index.tensors[name]
        if 0 in entry.shape:
            return []
        itemsize = DTYPES[entry.dtype].itemsize
        boxes = split_box(entry.shape, limit=max(1, PART_BYTES // itemsize))
        parts, first = [], 0
        for offsets, sizes in boxes:
            parts.append(Part(name, entry.dtype, offsets, sizes, first, math.prod(sizes) * itemsize))
            first += parts[-1].nbytes
        return parts

    def stream(self, parts: Sequence[Part]) -> Iterator[tuple[Part, memoryview]]:
        """Yield the verified bytes of each part, in order, valid until the next one is asked for.

        Raises:
            IntegrityError: an object is missing or differs from what was committed.
            StorageError: the store could not be read.
        """
        batches = list(_batches(parts))
        size_bytes = max((sum(map(_room, batch)) for batch in batches), default=0)
        memories = [memoryview(bytearray(size_bytes)) for _ in batches[:2]]
        reader = RankInput(self.source, self.checkpoint, self.index, self.options)
        with ThreadPoolExecutor(1, "cloudckpt-export") as ahead:
            fills: list[Callable[[], list[tuple[Part, memoryview]]]] = []
            for number, batch in enumerate(batches[:2]):
                fills.append(ahead.submit(_fill, reader, batch, memories[number]).result)
            for number in range(len(batches)):
                yield from fills[number]()
                if number + 2 < len(batches):
                    fills.append(ahead.submit(_fill, reader, batches[number + 2], memories[number % 2]).result)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the checkpoint, whole."""
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        RankInput(self.source, self.checkpoint, self.index, self.options).fill({name: tensor})
        return tensor

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of a tensor of the checkpoint."""
        return self.index.tensors[name]


def _batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    for part in parts:
        if batch and sum(map(_room, batch)) + part.nbytes > PART_BYTES:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _room(part: Part) -> int:
    return -(-part.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _fill(reader: RankInput, batch: Sequence[Part], memory: memoryview) -> list[tuple[Part, memoryview]]:
    views, at = [], 0
    for part in batch:
        views.append(memory[at : at + part.nbytes])
        at += _room(part)
    reader.fill_boxes(
        [
            (
                part.name,
                part.offsets,
                torch.frombuffer(view, dtype=torch.uint8).view(DTYPES[part.dtype]).view(part.sizes),
            )
            for part, view in zip(batch, views, strict=True)
        ]
    )
    return list(zip(batch, views, strict=True))
