"""Hold what is too large to stand among values: bytes that go into shards, as tensors beside the value.

    encode ──large payload──▶ Parts ──▶ tensors `cloudckpt.value.NNNNN.<name>`, and in the JSON [part, start, stop]

A payload of `ALONE_BYTES` is a part by itself and shares the memory of the value that it belongs to; smaller ones
stand in part 0, one after the other. Pure values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from cloudckpt.options import MIB

__all__ = ["ALONE_BYTES", "Parts", "Raw", "is_part_name", "part_name", "part_names"]

Raw: TypeAlias = NDArray[np.uint8]
"""Bytes, of one dimension and contiguous."""

ALONE_BYTES = MIB
"""From here on a payload is worth a tensor of its own; below, a copy costs less than a tensor."""

_NAME = re.compile(r"cloudckpt\.value\.(\d{5,10})\.(.+)", re.DOTALL)


class Parts:
    """The payloads of one value that do not stand in its JSON."""

    def __init__(self, *, alone_bytes: int | None = ALONE_BYTES) -> None:
        """Begin without any; with `alone_bytes=None` all will stand in part 0."""
        self._alone_bytes = alone_bytes
        self._alone: list[Raw] = []
        self._together: list[Raw] = []
        self.together_bytes = 0

    def add(self, raw: bytes | bytearray | memoryview) -> list[int]:
        """Take a payload, whose memory must stay as it is for as long as the parts are used; return its place."""
        flat = np.frombuffer(raw, np.uint8)
        if self._alone_bytes is not None and flat.size >= self._alone_bytes:
            self._alone.append(flat)
            return [len(self._alone), 0, flat.size]
        start = self.together_bytes
        self._together.append(flat)
        self.together_bytes += flat.size
        return [0, start, self.together_bytes]

    def write(self, target: Raw) -> None:
        """Copy part 0 to the begin of `target`."""
        start = 0
        for flat in self._together:
            target[start : start + flat.size] = flat
            start += flat.size

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the parts of the value `name` by their own names, uint8 of one dimension, on the CPU."""
        parts = dict(enumerate(self._alone, start=1))
        if self.together_bytes:
            parts[0] = np.empty(self.together_bytes, np.uint8)
            self.write(parts[0])
        return {part_name(number, name): _tensor_over(parts[number]) for number in sorted(parts)}

    def digest(self) -> str:
        """Return a digest of all payloads, empty if there are none."""
        hashed = xxhash.xxh3_128()
        for flat in [*self._alone, *self._together]:
            hashed.update(flat.size.to_bytes(8, "little"))
            hashed.update(flat.data)
        return hashed.hexdigest() if self._alone or self._together else ""


def _tensor_over(raw: Raw) -> torch.Tensor:
    """Return a tensor over the memory of `raw`, which it keeps alive."""
    if not raw.flags.writeable:
        # torch takes no memory that may not be written; nobody writes to a part that is to be saved.
        interface: dict[str, Any] = {**raw.__array_interface__, "data": (raw.ctypes.data, False)}
        raw = np.asarray(SimpleNamespace(__array_interface__=interface, owner=raw))
    return torch.from_numpy(raw)


_BEGIN = "cloudckpt.value."


def part_name(number: int, name: str) -> str:
    """Return what a part of the value `name` is called as a tensor."""
    return f"{_BEGIN}{number:05d}.{name}"


def is_part_name(name: str) -> bool:
    """Tell whether a tensor's name says that it is a part of a value."""
    return _NAME.fullmatch(name) is not None


def part_names(tensors: Iterable[str]) -> dict[str, dict[int, str]]:
    """Return which tensors are parts: name of the value → number of the part → name of the tensor."""
    found: dict[str, dict[int, str]] = {}
    for tensor in tensors:
        match = _NAME.fullmatch(tensor) if tensor.startswith(_BEGIN) else None
        if match is not None:
            found.setdefault(match[2], {})[int(match[1])] = tensor
    return found
