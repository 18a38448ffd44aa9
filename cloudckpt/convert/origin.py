"""What is imported, as every kind of source says it: boxes of tensors and who reads them, values, and their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cloudckpt.convert.blob import Blob
from cloudckpt.errors import OptionsError, SourceError
from cloudckpt.format import Box, JsonValue, PathElement, shown
from cloudckpt.transfer import bytes_of

__all__ = ["Bytes", "Origin", "of_source", "reader_of"]

Bytes = Callable[[int, memoryview], None]
"""Fills memory with the row-major bytes of a box, from a byte on; threads call it."""

# An import of which most is not in its source would fill a disk.
_GROWTH_LIMIT = 16
# No number of bytes in an index reaches it, not even of what has none.
_BYTES_LIMIT = 2**53
_GROWTH_FREE_BYTES = 64 << 20


@dataclass(slots=True, kw_only=True)
class Origin:
    """A source that was looked at, and of which no tensor was read yet.

    Attributes:
        blobs: the objects that it is made of.
        boxes: boxes of its tensors, which tile them, and their bytes.
        values: name → value.
        paths: name of a tensor or value → its path in the nested state.
        notes: what is kept about names beside their bytes.
    """

    blobs: list[Blob] = field(default_factory=list)
    boxes: list[tuple[Box, Bytes]] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    notes: dict[str, JsonValue] = field(default_factory=dict)

    def add_value_parts(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Add what of values is too large to stand among them."""
        for name, part in parts.items():
            shape = tuple(part.shape)
            self.boxes.append((Box(name, "uint8", shape, (0,) * len(shape), shape), reader_of(part)))

    def check_tiles(self) -> None:
        """Refuse tensors that no index may name, or of which boxes lack or stand twice, before a byte is written."""
        parts: dict[str, list[Box]] = {}
        for box, _ in self.boxes:
            parts.setdefault(box.name, []).append(box)
        for name, boxes in parts.items():
            shape = boxes[0].shape
            if math.prod(max(1, extent) for extent in shape) * boxes[0].itemsize_bytes >= _BYTES_LIMIT:
                raise SourceError(
                    f"{shown(name)} has the shape {list(shape)}, beyond what a checkpoint names; reshape it",
                    key=name,
                )
            stored = sum(math.prod(box.sizes) for box in boxes)
            starts = {box.offsets for box in boxes if math.prod(box.sizes)}
            if stored != math.prod(shape) or len(starts) != sum(1 for box in boxes if math.prod(box.sizes)):
                raise SourceError(
                    f"the parts of {shown(name)} have {stored} elements of {math.prod(shape)}, or stand twice: the "
                    "source is damaged, or lacks files; save it again",
                    key=name,
                )

    def check_growth(self) -> None:
        """Refuse a small source that would become a large checkpoint: views of one memory, over and over."""
        source_bytes = sum({(blob.key, blob.store.url): blob.size_bytes for blob in self.blobs}.values())
        grown_bytes = sum(box.nbytes for box, _ in self.boxes)
        if grown_bytes > _GROWTH_LIMIT * source_bytes + _GROWTH_FREE_BYTES:
            key = self.blobs[0].key if self.blobs else ""
            raise SourceError(
                f"{key!r} has {source_bytes} bytes, and its tensors would have {grown_bytes}: it repeats itself; load "
                "it where you trust it, and save the state with cloudckpt",
                key=key,
            )


@contextmanager
def of_source(key: str) -> Iterator[None]:
    """Say that names clash in a source and not in an argument; raises `SourceError`."""
    try:
        yield
    except OptionsError as exc:
        raise SourceError(f"{shown(key)} cannot be a checkpoint: {exc}, and save it anew", key=key) from exc


def reader_of(tensor: torch.Tensor) -> Bytes:
    """Return what reads the row-major bytes of a tensor that is in memory."""
    data = bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous()).data

    def read(start: int, memory: memoryview) -> None:
        memory[:] = data[start : start + memory.nbytes]

    return read
