"""Find the tensors of what `torch.save` wrote, by PyTorch's own reader of weights, without reading them.

    archive ──directory checked──▶ torch.load(weights_only, meta) ──▶ nested state; each tensor's storage has a place
    place ──whose record──▶ its bytes, where they are dense in row-major order; else gathered from its strides

Lightning's `.ckpt` and Hugging Face's `.bin` are such files. What `weights_only` does not admit is code, and is refused
by name: nothing is run. Older files, which are no archives, tell no places, and are read whole if they are small.
"""

from __future__ import annotations

import io
import math
import struct
import weakref
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from cloudckpt.convert.blob import Blob, damaged
from cloudckpt.convert.origin import Bytes, Origin, of_source, reader_of
from cloudckpt.convert.skeleton import place_of
from cloudckpt.errors import CloudCkptError, SourceError
from cloudckpt.format import DTYPE_NAMES, Box, flatten, shown
from cloudckpt.state import notes_of
from cloudckpt.store import undisturbed
from cloudckpt.threads import new_lock

__all__ = ["Archive", "add_torch", "is_archive", "is_older", "no_bytes"]

_LOCAL = struct.Struct("<4s5H3L2H")
_PICKLE_LIMIT_BYTES = 256 << 20
_OLDER_LIMIT_BYTES = 128 << 20
_RECORDS_LIMIT = 2_000_000
_SHOWN = 200
_FREE_VISITS = 1000
_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


def is_archive(head: bytes) -> bool:
    """Tell whether an object that begins so is an archive, as PyTorch writes them since 1.6."""
    return head.startswith(b"PK\x03\x04")


def is_older(head: bytes) -> bool:
    """Tell whether an object that begins so is of one of PyTorch's formats that are no archive."""
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return is_pickle or head[257:262] == b"ustar"


def no_bytes(name: str, key: str) -> SourceError:
    """Return the error for a tensor that had no memory when it was saved."""
    return SourceError(
        f"tensor {shown(name)} has no bytes in {key!r}: it was on the meta device when it was saved; save it again "
        "with its values, or without it",
        key=name,
    )


@dataclass(frozen=True, slots=True)
class _Older:
    """What a file of before PyTorch 1.6 holds: nothing says where in it a tensor is, so that it is read whole."""

    blob: Blob
    content: object

    @classmethod
    def open(cls, blob: Blob) -> _Older:
        """Read a file that is small enough to be in memory.

        Raises:
            SourceError: it is larger, damaged, or holds more than weights.
        """
        if blob.size_bytes > _OLDER_LIMIT_BYTES or not blob.read(0, 1) == b"\x80":
            raise SourceError(
                f"{blob.key!r} is of a format of before PyTorch 1.6, which is read as a pickle of up to "
                f"{_OLDER_LIMIT_BYTES >> 20} MiB; write it anew with torch.save(torch.load(file), other)",
                key=blob.key,
            )
        with blob.file() as file:
            content = _content(blob, file, device="cpu")
        _refuse_repetition(blob, content, blob.size_bytes)
        return cls(blob, content)

    def reader(self, name: str, tensor: torch.Tensor) -> Bytes:
        _check_kind(self.blob, name, tensor)
        if tensor.is_meta:
            raise no_bytes(name, self.blob.key)
        return reader_of(tensor)

    def place(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of an archive: where its own header begins, and the bytes that it says it has."""

    name: str
    head: int
    size_bytes: int


@dataclass(slots=True)
class Archive:
    """What one file of `torch.save` holds.

    Attributes:
        blob: the file.
        content: what was saved, with tensors that have no memory.
    """

    blob: Blob
    content: object
    _records: list[_Record] = field(default_factory=list)
    _heads: list[int] = field(default_factory=list)
    _starts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, blob: Blob) -> Archive:
        """Read the directory and the pickle of a file, and no tensor.

        Raises:
            SourceError: it is damaged, lies about itself, or holds more than weights.
        """
        with blob.file() as file:
            records, pickle_bytes = _directory(blob, file)
            content = _content(blob, file)
            _refuse_repetition(blob, content, pickle_bytes)
        return cls(blob, content, records, [record.head for record in records])

    def reader(self, name: str, tensor: torch.Tensor) -> Bytes:
        """Return what reads the row-major bytes of a tensor of this file.

        Raises:
            SourceError: it is of a kind that has no such bytes, or its bytes are not in its record.
        """
        _check_kind(self.blob, name, tensor)
        if not tensor.numel():
            return lambda _, memory: None
        record = self._record_of(name, tensor)
        itemsize = tensor.itemsize
        first = int(tensor.storage_offset()) * itemsize
        last = int(tensor.storage_offset()) + sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        stop = (last + 1) * itemsize
        if first < 0 or stop > min(record.size_bytes, tensor.untyped_storage().nbytes()):
            raise SourceError(
                f"tensor {shown(name)} in {self.blob.key!r} reaches to byte {stop} of {record.size_bytes}; the "
                "file is damaged, get it anew",
                key=name,
            )
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return lambda at, memory: self.blob.read_into(self._start(record) + first + at, memory)
        return _Gathered(self, record, tensor, first, stop).read

    def place(self, tensor: torch.Tensor) -> int:
        """Return what tells the memory of one tensor from another's."""
        return place_of(tensor)

    def _record_of(self, name: str, tensor: torch.Tensor) -> _Record:
        if getattr(tensor.untyped_storage(), "_checkpoint_offset", None) is None:
            raise no_bytes(name, self.blob.key)
        place = place_of(tensor)
        number = bisect_right(self._heads, place) - 1
        record = self._records[number] if number >= 0 else None
        if record is None or "/data/" not in record.name or place + record.size_bytes > self.blob.size_bytes:
            raise SourceError(
                f"tensor {shown(name)} has no record in {self.blob.key!r}; the file is damaged, get it anew",
                key=name,
            )
        return record

    def _start(self, record: _Record) -> int:
        """Return the first byte of a record's data, by its own header."""
        start = self._starts.get(record.head)
        if start is None:
            name = record.name.encode()
            head = self.blob.read(record.head, _LOCAL.size + len(name))
            mark, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
            start = record.head + _LOCAL.size + name_bytes + extra_bytes
            if mark != b"PK\x03\x04" or name_bytes != len(name) or head[_LOCAL.size :] != name:
                raise damaged(
                    self.blob, f"the record of {shown(record.name)} has another header than its directory says"
                )
            self._starts[record.head] = start
        return start

    def storage(self, record: _Record, first: int, stop: int) -> bytearray:
        """Return the bytes [first, stop) of a record."""
        data = bytearray(stop - first)
        self.blob.read_into(self._start(record) + first, memoryview(data))
        return data


# Of which tensor all bytes are in memory, and a lock around that: there is room for the largest one, once.
_kept: list[weakref.ref[_Gathered]] = []
_keeping = new_lock()
# What is read at once of a tensor that lies in far more bytes than it has, and the hole that it is not worth to read.
_WINDOW_BYTES = 16 << 20
_HOLE_BYTES = 64 << 10
_Ranges = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class _Gathered:
    """A tensor whose bytes lie in another order, or with holes: put in order piece by piece.

    One that lies in as many bytes as it has, such as a transposed one, is read once, as it lies. Of another one windows
    are read, so that a column of a large matrix takes no more memory than a window.
    """

    archive: Archive
    record: _Record
    tensor: torch.Tensor
    first: int
    stop: int
    data: bytearray | None = None
    left_bytes: int = 0

    def _keep(self) -> None:
        """Have all bytes in memory, and those of no other tensor."""
        if self.data is None:
            while _kept:
                if (other := _kept.pop()()) is not None:
                    other.data = None
            self.data = self.archive.storage(self.record, self.first, self.stop)
            self.left_bytes = self.tensor.numel() * self.tensor.itemsize
            _kept.append(weakref.ref(self))

    def read(self, start: int, memory: memoryview) -> None:
        tensor = self.tensor
        into = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
        is_kept = self.stop - self.first <= tensor.numel() * tensor.itemsize
        # One at a time: as much memory as the tensor has, and not that of each thread's.
        with _keeping:
            if is_kept:
                self._keep()
            at = 0
            for box in _boxes(tensor.shape, start // tensor.itemsize, (start + memory.nbytes) // tensor.itemsize):
                sizes = [stop - first for first, stop in box]
                whole = into[at : at + math.prod(sizes)].view(sizes)
                at += whole.numel()
                for part in [box] if is_kept else _windows(box, tensor.stride(), tensor.itemsize):
                    place = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(part, box, strict=True))
                    whole[place].copy_(self._part(part))
            self.left_bytes -= memory.nbytes
            if self.left_bytes <= 0:
                self.data = None

    def _part(self, part: _Ranges) -> torch.Tensor:
        """Return some of the tensor, from bytes that are there, or are read now."""
        tensor, data = self.tensor, self.data
        sizes = [stop - first for first, stop in part]
        skipped = sum(first * step for (first, _), step in zip(part, tensor.stride(), strict=True))
        span = sum((size - 1) * step for size, step in zip(sizes, tensor.stride(), strict=True)) + 1
        if data is None:
            first = self.first + skipped * tensor.itemsize
            data, skipped = self.archive.storage(self.record, first, first + span * tensor.itemsize), 0
        flat = torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype)
        here = flat.as_strided(sizes, tensor.stride(), skipped)
        here = here.conj() if tensor.is_conj() else here
        return torch._neg_view(here) if tensor.is_neg() else here  # noqa: SLF001 (no other makes one)


def _boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[_Ranges]:
    """Yield the boxes that the row-major elements [start, stop) of a shape are, in their order."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        if within or stop - start < row:
            here = min(stop, (index + 1) * row)
            for box in _boxes(shape[1:], within, within + here - start):
                yield ((index, index + 1), *box)
        else:
            here = stop // row * row
            yield ((index, here // row), *((0, size) for size in shape[1:]))
        start = here


def _windows(box: _Ranges, strides: Sequence[int], itemsize: int) -> Iterator[_Ranges]:
    """Cut a box until each part lies in few bytes, of which little is not its own."""
    order = sorted(range(len(box)), key=lambda dimension: -strides[dimension])
    widest = next((dimension for dimension in order if box[dimension][1] - box[dimension][0] > 1), None)
    if widest is None:
        yield box
        return
    low, high = box[widest]
    step = strides[widest] * itemsize
    inner = itemsize * (
        1
        + sum(
            (stop - first - 1) * strides[dimension]
            for dimension, (first, stop) in enumerate(box)
            if dimension != widest
        )
    )
    is_worth = step - inner <= _HOLE_BYTES
    if is_worth and (high - low - 1) * step + inner <= _WINDOW_BYTES:
        yield box
        return
    count = max(1, (_WINDOW_BYTES - inner) // step + 1) if is_worth else 1
    for first in range(low, high, count):
        part = (*box[:widest], (first, min(high, first + count)), *box[widest + 1 :])
        if count > 1:
            yield part
        else:
            yield from _windows(part, strides, itemsize)


def _directory(blob: Blob, file: io.BufferedReader) -> tuple[list[_Record], int]:
    """Check an archive's directory before PyTorch reads it; return its records in order, and the pickle's size."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
            _refuse_directory(blob, found)
            order = next((archive.read(one) for one in found if one.filename.endswith("/byteorder")), b"little")
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, RuntimeError, EOFError) as exc:
        if isinstance(exc, CloudCkptError):
            raise
        raise damaged(blob, f"its archive cannot be read ({str(exc)[:_SHOWN]})") from exc
    if order != b"little":
        raise SourceError(
            f"{blob.key!r} was written on a big-endian machine, and is not read; write it anew here", key=blob.key
        )
    records = [_Record(one.filename, one.header_offset, one.file_size) for one in found]
    pickled = next(one.file_size for one in found if one.filename.endswith("/data.pkl"))
    return sorted(records, key=lambda record: record.head), pickled


def _refuse_directory(blob: Blob, found: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse what torch.save never writes, and what would take more memory than the file has bytes."""
    names = [one.filename for one in found]
    pickles = [one.file_size for one in found if one.filename.endswith("/data.pkl")]
    folders = {name.partition("/")[0] for name in names}
    if len(folders) > 1 or any(_is_outside(name) for name in names):
        raise damaged(blob, "its archive has records outside of one folder of its own")
    if any(name.partition("/")[2].startswith(("code/", "constants.pkl")) for name in names):
        raise SourceError(
            f"{blob.key!r} is a TorchScript program, and is not read; save its state_dict()", key=blob.key
        )
    if len(pickles) != 1:
        raise SourceError(
            f"{blob.key!r} is an archive that torch.save did not write; give one that it did", key=blob.key
        )
    problems = {
        "has a record twice, or too many": len(found) > _RECORDS_LIMIT or len(set(names)) < len(names),
        "is compressed or encrypted, as torch.save makes none": not all(map(_is_plain, found)),
        "has records with more bytes than the file": sum(one.file_size for one in found) > blob.size_bytes,
        f"has a pickle of {pickles[0]} bytes": pickles[0] > _PICKLE_LIMIT_BYTES,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise damaged(blob, f"its archive {problem}")


def _is_plain(record: zipfile.ZipInfo) -> bool:
    is_stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    return is_stored and not record.flag_bits & 1


def _is_outside(name: str) -> bool:
    return "/" not in name or name.startswith("/") or "\\" in name or ".." in name.split("/")


def _content(blob: Blob, file: io.BufferedReader, *, device: str = "meta") -> object:
    file.seek(0)
    try:
        load = partial(torch.load, file, map_location=device, weights_only=True)
        content: object = undisturbed(load, name="import")
    except CloudCkptError:
        raise
    except Exception as exc:  # pickle's errors, and whatever the operations in it run into
        raise SourceError(_why_not(blob, exc), key=blob.key) from exc
    return content


def _why_not(blob: Blob, error: Exception) -> str:
    """Say what in a file is more than weights, or that it is damaged."""
    try:
        with blob.file() as file:
            list_names = partial(torch.serialization.get_unsafe_globals_in_checkpoint, file)
            names = undisturbed(list_names, name="import")
    except Exception:  # noqa: BLE001 (a damaged file has none to be told)
        names = []
    if names:
        return (
            f"{blob.key!r} holds {', '.join(sorted(names))[:_SHOWN]}, which torch.load(weights_only=True) does not "
            "admit, because reading it could run code; where you trust the file, load it with weights_only=False and "
            "save its tensors and plain values with cloudckpt, or allow the types before "
            "(torch.serialization.add_safe_globals)"
        )
    # What torch raises begins with advice; what it met is said by the error before that.
    error = error.__context__ if isinstance(error.__context__, Exception) else error
    first = (str(error).splitlines() or [type(error).__name__])[0]
    text = f"{blob.key!r} cannot be read by torch.load(weights_only=True): {first[:_SHOWN]}; "
    if _is_intact(blob):
        return (
            text + "its pickle is whole and holds what that does not read, such as a number of many digits; where you "
            "trust the file, load it with weights_only=False and save its tensors and plain values with cloudckpt"
        )
    return text + "it is damaged, get it anew"


def _is_intact(blob: Blob) -> bool:
    """Tell whether the pickle of an archive is the one that was written, by its sum."""
    try:
        with blob.file() as file, zipfile.ZipFile(file) as archive:
            (name,) = (one.filename for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            # A pickle of zeros has a sum of zeros, too.
            return archive.read(name).endswith(b".")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, RuntimeError, EOFError, OSError):
        return False


def _refuse_repetition(blob: Blob, content: object, pickle_bytes: int) -> None:
    """Refuse a pickle that means far more than it has bytes: containers held over and over, or by themselves."""
    left = pickle_bytes + _FREE_VISITS
    pending: list[object] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            children: Sequence[object] = list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            children = list(value)
        else:
            continue
        left -= len(children)
        if left < 0:
            raise damaged(blob, "its pickle repeats itself without end, or nearly so")
        pending += children


def _check_kind(blob: Blob, name: str, tensor: torch.Tensor) -> None:
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if type(tensor) not in _TYPES or tensor.layout is not torch.strided or dtype is None:
        raise SourceError(
            f"tensor {shown(name)} in {blob.key!r} is a {type(tensor).__name__} of {tensor.dtype}, "
            f"{tensor.layout}, which has no dense bytes; save it dense, or as its parts",
            key=name,
        )


def add_torch(origin: Origin, blob: Blob) -> None:
    """Add all that one file of `torch.save` holds, which is to be a dict.

    Raises:
        SourceError: it is damaged, holds more than weights, or names what is there already.
        UnsupportedValueError: it holds a value that the format cannot.
    """
    archive = Archive.open(blob) if is_archive(blob.read(0, 4)) else _Older.open(blob)
    state = archive.content
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        kind = f"a {type(state).__name__}" if not isinstance(state, dict) else "a dict with keys that are no text"
        raise SourceError(
            f"{blob.key!r} holds {kind}; a checkpoint is a dict by name: save {{'name': value}}", key=blob.key
        )
    with of_source(blob.key):
        flat = flatten(state, is_tensor=lambda value: isinstance(value, torch.Tensor))
    origin.blobs.append(blob)
    firsts: dict[tuple[object, ...], str] = {}
    for name, leaf in flat.leaves.items():
        if name in origin.paths:
            raise SourceError(f"{shown(name)} stands in several files, and nothing says which one is meant", key=name)
        origin.paths[name] = flat.paths[name]
        if not isinstance(leaf, torch.Tensor):
            origin.values[name] = leaf
            continue
        shape = tuple(leaf.shape)
        reader = archive.reader(name, leaf)
        origin.boxes.append((Box(name, DTYPE_NAMES[leaf.dtype], shape, (0,) * len(shape), shape), reader))
        if leaf.numel():
            memory = (
                archive.place(leaf),
                leaf.storage_offset(),
                leaf.dtype,
                shape,
                leaf.stride(),
                leaf.is_conj(),
                leaf.is_neg(),
            )
            first = firsts.setdefault(memory, name)
            if first != name:
                origin.notes[name] = {"tied": first}
    for key, value in state.items():
        for name, note in notes_of(value, key).items():
            known = origin.notes.get(name)
            origin.notes[name] = {
                **(known if isinstance(known, dict) else {}),
                **(note if isinstance(note, dict) else {}),
            }
