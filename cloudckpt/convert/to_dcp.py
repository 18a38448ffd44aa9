"""Write a folder that `torch.distributed.checkpoint.load` reads: tensors as `.distcp` files, `.metadata` last.

    nested state, tensors without memory ──DCP's own planner──▶ names, values, Metadata
    parts of tensors, values ──as torch.save writes each──▶ __0_0-TAG.distcp, __0_1-TAG.distcp, … ──places──▶ .metadata

DCP's reader opens each stored part with `torch.load`, so that a part is what it costs in memory.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from cloudckpt.convert.dcp_metadata import Place, encode_metadata
from cloudckpt.convert.opened import Job, Part
from cloudckpt.convert.planned import Plan, Taken
from cloudckpt.convert.skeleton import Skeleton, hollow
from cloudckpt.convert.to_torch import nested, unloadable
from cloudckpt.convert.writing import Layout, Segment, write_files
from cloudckpt.format import DTYPES
from cloudckpt.options import MIB

__all__ = ["DCP_FILES", "plan_dcp"]

# A bucket takes a file whole; a reader opens one file after the other, whatever their size.
_FILE_BYTES = 64 * MIB
DCP_FILES = re.compile(r"__\d+_\d+(-[0-9a-f]{8})?\.distcp|\.metadata")
"""The names of the files of a folder."""
_METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one stored part is: a part of a tensor under DCP's name of it, or what returns a value."""

    fqn: str
    part: Part | None
    value: Callable[[], object] = lambda: None


def plan_dcp(job: Job) -> Plan:
    """Plan a folder; raises `UnsupportedValueError` for a value that `torch.load` would call code."""
    taken = job.take()
    # DCP's reader would run code to read it, and nobody should be made to.
    job.drop(taken, unloadable(job, taken), "a folder for torch.distributed.checkpoint")
    fakes = {
        name: torch.empty(job.entry(name).shape, dtype=DTYPES[job.entry(name).dtype], device="meta")
        for name in taken.tensors.values()
    }
    state = nested(job, {**fakes, **taken.values})
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, is_coordinator=True)
    _, metadata = planner.create_global_plan([planner.create_local_plan()])
    names = {id(fake): name for name, fake in fakes.items()}
    pieces: list[_Piece] = []
    for fqn, leaf in planner.state_dict.items():
        name = names.get(id(leaf))
        if name is None:
            pieces.append(_Piece(fqn, None, partial(_filled, leaf, job, names)))
        else:
            pieces += [_Piece(fqn, part) for part in _parts(job, name)]
    skeletons = _skeletons(piece.part for piece in pieces if piece.part is not None)

    files = {f"__0_{number}-{job.hold.tag}.distcp": group for number, group in enumerate(_groups(pieces))}
    return _plan(job, taken, files, skeletons, partial(_described, metadata, pieces))


def _plan(
    job: Job,
    taken: Taken,
    files: Mapping[str, list[_Piece]],
    skeletons: Mapping[tuple[str, tuple[int, ...]], Skeleton],
    describe: Callable[[], Metadata],
) -> Plan:
    files_places: dict[MetadataIndex, Place] = {}

    def layout(file: str) -> Layout:
        made, places = _laid_out(file, files[file], skeletons)
        files_places.update(places)
        return made

    def write() -> None:
        write_files(job, taken.tensors.values(), [partial(layout, file) for file in files])
        job.hold.put(_METADATA, encode_metadata(describe(), files_places))

    return Plan(
        taken=taken,
        files=(*files, _METADATA),
        write=write,
        deciding=frozenset((_METADATA,)),
        ours=DCP_FILES,
    )


def _filled(value: object, job: Job, names: Mapping[int, str]) -> object:
    """Return a value that DCP keeps as one, such as a tuple, with the tensors in it read."""
    if isinstance(value, torch.Tensor) and id(value) in names:
        return job.read(names[id(value)])
    if isinstance(value, dict):
        return type(value)({key: _filled(child, job, names) for key, child in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_filled(child, job, names) for child in value)
    return value


def _parts(job: Job, name: str) -> list[Part]:
    """Return the parts of a tensor; DCP stores an empty one, too."""
    entry = job.entry(name)
    return job.parts(name) or [Part(name, entry.dtype, (0,) * len(entry.shape), entry.shape, 0, 0)]


def _groups(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    size_bytes = 0
    for piece in pieces:
        nbytes = 0 if piece.part is None else piece.part.nbytes
        if group and size_bytes + nbytes > _FILE_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(piece)
        size_bytes += nbytes
    if group:
        yield group


def _skeletons(parts: Iterable[Part]) -> dict[tuple[str, tuple[int, ...]], Skeleton]:
    """Return what torch.save writes around the bytes of each kind of part, by dtype and sizes."""
    kinds = list(dict.fromkeys((part.dtype, part.sizes) for part in parts))
    tensors = hollow([(sizes, DTYPES[dtype]) for dtype, sizes in kinds])
    return {kind: Skeleton.of(tensor, "archive") for kind, tensor in zip(kinds, tensors, strict=True)}


def _laid_out(
    file: str, group: Iterable[_Piece], skeletons: Mapping[tuple[str, tuple[int, ...]], Skeleton]
) -> tuple[Layout, dict[MetadataIndex, Place]]:
    places = {}
    literals: list[tuple[int, bytes]] = []
    segments, sums_at = [], []
    at = 0
    for piece in group:
        part = piece.part
        if part is None:
            data = io.BytesIO()
            torch.save(piece.value(), data)
            literals.append((at, data.getvalue()))
            size_bytes = len(data.getvalue())
        else:
            skeleton = skeletons[part.dtype, part.sizes]
            literals += [(at + start, text) for start, text in skeleton.literals]
            segments += [Segment(part.name, part.first, part.first + part.nbytes, at + h.at) for h in skeleton.holes]
            sums_at += [[at + place for place in hole.sums_at] for hole in skeleton.holes]
            size_bytes = skeleton.size_bytes
        places[MetadataIndex(piece.fqn, None if part is None else part.offsets)] = Place(file, at, size_bytes)
        at += size_bytes
    return Layout(name=file, size_bytes=at, literals=literals, segments=segments, sums_at=sums_at), places


def _described(metadata: Metadata, pieces: Iterable[_Piece]) -> Metadata:
    """Return DCP's metadata with the tensors in the parts in which they are stored."""
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    for piece in pieces:
        if piece.part is not None:
            chunks[piece.fqn].append(ChunkStorageMetadata(torch.Size(piece.part.offsets), torch.Size(piece.part.sizes)))
    described = {
        fqn: replace(entry, chunks=chunks[fqn]) if isinstance(entry, TensorStorageMetadata) else entry
        for fqn, entry in metadata.state_dict_metadata.items()
    }
    return replace(metadata, state_dict_metadata=described)
