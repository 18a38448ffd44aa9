"""Write the nested state as `torch.save` does, for `torch.load(weights_only=True)`, without having it in memory.

    paths, values, tensors without memory ──torch.save, which leaves holes──▶ a skeleton: pickle, names, places
    skeleton + the stream of tensors ──sums of the records filled in──▶ the file, from its first byte to its last

PyTorch's own writer makes everything but the tensors' bytes, so that no dtype or detail of its format is known twice.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cloudckpt.convert.opened import Job, Part, Plan, Taken
from cloudckpt.errors import CloudCkptError
from cloudckpt.format import DTYPES, unflatten
from cloudckpt.state import with_attributes
from cloudckpt.store import Append, appended

__all__ = ["nested", "place_of", "plan_torch", "tensors_in", "unloadable"]

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_CENTRAL_SUM_AT, _DESCRIPTOR_SUM_AT = 16, 4
_HAS_DESCRIPTOR = 0x08


def plan_torch(job: Job) -> Plan:
    """Plan one file; raises `UnsupportedValueError` for a value that `torch.load` would call code."""
    taken = job.take()
    job.drop(taken, unloadable(job, taken), "a file for torch.load(weights_only=True)")

    def write() -> None:
        with tempfile.TemporaryDirectory(prefix="cloudckpt-") as folder:
            skeleton = Path(folder) / job.name
            places = _save_skeleton(job, taken, skeleton)
            with appended(job.folder, job.name) as append:
                _write(job, skeleton, places, append)

    return Plan(taken=taken, files=(job.name,), write=write)


def unloadable(job: Job, taken: Taken) -> dict[str, str]:
    """Return name → why, of what `torch.load(weights_only=True)` does not read: values, and containers of others."""
    found = {name: why for name, value in taken.values.items() if (why := _refusal(value))}
    known: dict[str, str] = {}
    for name in [*taken.tensors.values(), *taken.values]:
        for step in job.index.paths.get(name, ()):
            if isinstance(step, dict) and "tuple" not in step and name not in found:
                text = repr(step)
                if text not in known:
                    known[text] = _refusal(unflatten({"s.k": 0}, {"s.k": ["s", step]}))
                if known[text]:
                    found[name] = f"it lies in a container of which {known[text]}"
    return found


def _refusal(value: object) -> str:
    """Say why `torch.load` does not read a value; "" if it does."""
    data = io.BytesIO()
    try:
        torch.save(value, data)
        data.seek(0)
        if any(True for _ in tensors_in(torch.load(data, weights_only=True))):
            return "it holds tensors in what was saved as one value"
    except Exception:  # noqa: BLE001 (pickle's errors, and those of whatever the value's type does)
        return f"torch.load(weights_only=True) does not read its {_kind(value)}, or what is in that"
    return ""


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def nested(job: Job, leaves: Mapping[str, object]) -> dict[str, object]:
    """Return the nested state of some leaves, as `cloudckpt.read` would."""
    paths = {name: path for name, path in job.index.paths.items() if name in leaves}
    state = unflatten(leaves, paths)
    with_attributes(state, "", job.notes, is_new=True)
    return state


def _save_skeleton(job: Job, taken: Taken, path: Path) -> dict[int, str]:
    """Save the state with holes for its tensors; return where each one's hole begins → the tensor's name."""
    notes, fakes, leaves = job.notes, dict[str, torch.Tensor](), dict[str, object](taken.values)
    with FakeTensorMode():
        for name in taken.tensors.values():
            entry = job.entry(name)
            fakes[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            leaves[name] = _as_noted(fakes[name], notes.get(name))
    state = nested(job, leaves)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    # What it is read back as has its tensors in the same places, and says where their bytes are to be.
    read_back = tensors_in(torch.load(path, map_location="meta", weights_only=True))
    names = {id(fake): name for name, fake in fakes.items()}
    return {
        place_of(there): names[id(fake)]
        for fake, there in zip(tensors_in(state), read_back, strict=True)
        if fake.numel()
    }


def place_of(tensor: torch.Tensor) -> int:
    """Return the first byte, in its file, of the storage of a tensor that was loaded without its bytes."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if type(place) is not int:
        raise CloudCkptError(f"torch {torch.__version__} does not say where in a file a tensor is; upgrade it")
    return place


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, always in the same order."""
    if isinstance(value, _Parameter):
        yield value.data
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors_in(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors_in(child)


class _Parameter:
    """Is saved as a Parameter: a tensor without memory is one in name only."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_parameter, (self.data, True, OrderedDict())  # noqa: SLF001 (what torch.save names)


def _as_noted(tensor: torch.Tensor, note: object) -> torch.Tensor | _Parameter:
    """Return a tensor as its note says that it was."""
    if not isinstance(note, dict) or note.get("requires_grad") is not True:
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return _Parameter(tensor) if note.get("parameter") is True else tensor.requires_grad_()


def _write(job: Job, skeleton: Path, places: Mapping[int, str], append: Append) -> None:
    with zipfile.ZipFile(skeleton) as archive, skeleton.open("rb") as file:
        sums = dict[str, int]()
        at = 0
        stream = job.stream([part for place in sorted(places) for part in job.parts(places[place])])
        for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
            start = _data_start(file, record)
            if start not in places:
                continue
            append(_read(file, at, start))
            sums[record.filename] = _pass_on(stream, record.file_size, append)
            at = start + record.file_size
            if record.flag_bits & _HAS_DESCRIPTOR:
                # A signature, the sum, and sizes, which are right already.
                append(_read(file, at, at + _DESCRIPTOR_SUM_AT))
                append(memoryview(struct.pack("<L", sums[record.filename])))
                at += _DESCRIPTOR_SUM_AT + 4
        append(_read(file, at, archive.start_dir))
        append(_with_sums(_read(file, archive.start_dir, skeleton.stat().st_size), sums))


def _data_start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    head = _read(file, record.header_offset, record.header_offset + _LOCAL.size)
    *_, name_bytes, extra_bytes = _LOCAL.unpack(head)
    return record.header_offset + _LOCAL.size + int(name_bytes) + int(extra_bytes)


def _pass_on(stream: Iterator[tuple[Part, memoryview]], size_bytes: int, append: Append) -> int:
    """Append the next bytes of the stream; return their CRC-32."""
    total = moved = 0
    while moved < size_bytes:
        _, data = next(stream)
        append(data)
        total = zlib.crc32(data, total)
        moved += data.nbytes
    return total


def _with_sums(directory: memoryview, sums: Mapping[str, int]) -> memoryview:
    """Return an archive's directory with the sums of some records."""
    data = bytearray(directory)
    at = 0
    while data[at : at + 4] == b"PK\x01\x02":
        _, *_, name_bytes, extra_bytes, comment_bytes, _, _, _, _ = _CENTRAL.unpack_from(data, at)
        name = data[at + _CENTRAL.size : at + _CENTRAL.size + name_bytes].decode()
        if name in sums:
            struct.pack_into("<L", data, at + _CENTRAL_SUM_AT, sums[name])
        at += _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
    return memoryview(data)


def _read(file: BinaryIO, start: int, stop: int) -> memoryview:
    return memoryview(os.pread(file.fileno(), stop - start, start))
