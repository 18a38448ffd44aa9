"""Write tensors by name as safetensors: one file, several with an index, or a folder as Hugging Face reads it.

    tensors ──names, dtypes, ties──▶ taken ──by size──▶ files ──header, bytes──▶ NAME-TAG-00001-of-00002.safetensors …
                                                                             ──▶ NAME.safetensors.index.json

The header is ours, and not the safetensors package's, which writes from tensors that are all in memory. Its tests read
what comes out.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import msgspec

from cloudckpt.convert.opened import Job
from cloudckpt.convert.planned import Plan, Taken
from cloudckpt.convert.writing import Layout, Segment, write_files
from cloudckpt.errors import UnsupportedValueError
from cloudckpt.format import DTYPES, SAFETENSORS_NAMES, lone_surrogates

__all__ = ["HF_DECIDING", "HF_FILES", "NAMED", "NUMBERED", "plan_huggingface", "plan_safetensors"]

NAMED: Mapping[str, str] = {
    **SAFETENSORS_NAMES,
    "complex64": "C64",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""PyTorch's name of a dtype → safetensors', of those that its package makes a tensor of."""

_METADATA = "__metadata__"
# Readers refuse more.
_HEADER_LIMIT_BYTES = 100_000_000
_ALIGNMENT_BYTES = 8
_NUMBER = r"((-[0-9a-f]{8})?-\d+-of-\d+)?"
NUMBERED = re.compile(rf"{_NUMBER}\.safetensors(\.index\.json)?\Z")
"""How the names end of all files of one safetensors export."""
HF_FILES = re.compile(rf"(model|pytorch_model){_NUMBER}\.(safetensors|bin)(\.index\.json)?")
"""The names of a model's weights, in a folder of Hugging Face's."""
HF_DECIDING = frozenset(
    f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Those of them that make a folder a model."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file: its name, and name → name in the checkpoint, in the order of its bytes."""

    name: str
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Names:
    """How the files of a kind are named: what they begin with, and as `Plan` has it."""

    stem: str
    ours: re.Pattern[str]
    deciding: frozenset[str]
    beginning: str = ""


def plan_safetensors(job: Job) -> Plan:
    """Plan a file, or several beside their index; raises `UnsupportedValueError` for what has no place there."""
    taken = job.take()
    ties = job.tied(taken.tensors)
    problems = _problems(job, taken)
    problems |= {
        taken.tensors[name]: f"it is the same memory as {first!r}, and safetensors knows no ties"
        for name, first in ties.items()
    }
    job.drop(taken, problems, "safetensors")
    stem = job.name.removesuffix(".safetensors")
    ours = re.compile(rf"{re.escape(stem)}{_NUMBER}\.safetensors(\.index\.json)?")
    deciding = frozenset((job.name, f"{job.name}.index.json"))
    return _plan(job, taken, ties, _Names(stem, ours, deciding, beginning=stem))


def plan_huggingface(job: Job) -> Plan:
    """Plan a folder that `from_pretrained` reads; of names of one memory the first alone goes, as it does there."""
    taken = job.take()
    job.drop(taken, _problems(job, taken), "huggingface")
    ties = job.tied(taken.tensors)
    for name, first in ties.items():
        taken.left_out[taken.tensors.pop(name)] = f"it is the same memory as {first!r}, which a model ties again"
    return _plan(job, taken, ties, _Names("model", HF_FILES, HF_DECIDING))


def _problems(job: Job, taken: Taken) -> dict[str, str]:
    found = dict.fromkeys(taken.values, "it is a value, and safetensors holds tensors alone")
    for name, saved in taken.tensors.items():
        dtype = job.entry(saved).dtype
        if dtype not in NAMED:
            found[saved] = f"safetensors has no name for {dtype}"
        elif name == _METADATA:
            found[saved] = "safetensors uses that name itself"
    return found


def _plan(job: Job, taken: Taken, dropped: Mapping[str, str], names: _Names) -> Plan:
    groups = list(_groups(job, taken.tensors))
    stem, index_name = names.stem, f"{names.stem}.safetensors.index.json"
    if len(groups) == 1:
        files = [_File(f"{stem}.safetensors", groups[0])]
    else:
        files = [
            _File(f"{stem}-{job.hold.tag}-{number:05d}-of-{len(groups):05d}.safetensors", group)
            for number, group in enumerate(groups, start=1)
        ]
    # What a reader may want to know of the names that are not here, as safetensors' own `save_model` says it.
    metadata = {"format": "pt", **{name: first for name, first in dropped.items() if name != "format"}}
    heads = [_header(job, file, metadata) for file in files]
    is_one = len(files) == 1

    def put_config() -> None:
        for name, text in job.config.items():
            job.hold.put(name, text)

    def write() -> None:
        # What describes the model goes with the deciding file, and as late: an older model may have its own.
        before = put_config if is_one else lambda: None
        layouts = [partial(_layout, job, file, head, before) for file, head in zip(files, heads, strict=True)]
        write_files(job, taken.tensors.values(), layouts)
        if not is_one:
            put_config()
            job.hold.put(index_name, _index(job, taken, files))

    shards = [file.name for file in files]
    return Plan(
        taken=taken,
        files=(*job.config, *shards) if is_one else (*shards, *job.config, index_name),
        write=write,
        deciding=names.deciding,
        ours=names.ours,
        beginning=names.beginning,
    )


def _index(job: Job, taken: Taken, files: Iterable[_File]) -> bytes:
    weights = {name: file.name for file in files for name in sorted(file.tensors)}
    total_bytes = sum(_nbytes(job, saved) for saved in taken.tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weights.items()))}
    return msgspec.json.format(msgspec.json.encode(index), indent=2)


def _groups(job: Job, tensors: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Share tensors out between files, in their order, each file with wider dtypes first, as the package does."""
    group: dict[str, str] = {}
    room = 0
    for name, saved in tensors.items():
        if group and job.shard_bytes is not None and _nbytes(job, saved) > room:
            yield _in_order(job, group)
            group = {}
        if not group:
            room = job.shard_bytes or 0
        group[name] = saved
        room -= _nbytes(job, saved)
    yield _in_order(job, group)


def _in_order(job: Job, group: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(group.items(), key=lambda item: (-DTYPES[job.entry(item[1]).dtype].itemsize, item[0])))


def _layout(job: Job, file: _File, head: bytes, before: Callable[[], None]) -> Layout:
    at = len(head)
    segments = []
    for saved in file.tensors.values():
        segments.append(Segment(saved, 0, _nbytes(job, saved), at))
        at += _nbytes(job, saved)
    return Layout(name=file.name, size_bytes=at, literals=[(0, head)], segments=segments, before=before)


def _nbytes(job: Job, saved: str) -> int:
    entry = job.entry(saved)
    return int(math.prod(entry.shape)) * entry.itemsize_bytes


def _header(job: Job, file: _File, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {_METADATA: metadata}
    stop = 0
    for name, saved in file.tensors.items():
        entry = job.entry(saved)
        start, stop = stop, stop + _nbytes(job, saved)
        header[name] = {"dtype": NAMED[entry.dtype], "shape": entry.shape, "data_offsets": (start, stop)}
    try:
        text = msgspec.json.encode(header)
    except UnicodeEncodeError as exc:
        raise lone_surrogates(exc.object) from exc
    if len(text) > _HEADER_LIMIT_BYTES:
        raise UnsupportedValueError(
            f"the header of {file.name} has {len(text)} bytes, and safetensors' readers take {_HEADER_LIMIT_BYTES}; "
            "give max_shard_bytes, so that there are several files",
            key=file.name,
        )
    padding = -(8 + len(text)) % _ALIGNMENT_BYTES
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding
