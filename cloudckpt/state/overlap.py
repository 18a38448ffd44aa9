"""Find which tensors lie in the same memory, and whether contents that are to go there agree.

    tensors by name ──ranges of bytes, sorted──▶ groups that overlap
    a group and what each of it is to hold ──written into a copy of its memory──▶ who does not find its own there

A distributed tensor counts with what this rank has of it. Reads no tensor but those it is to compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, cast

import numpy as np
import torch

from cloudckpt.late import DTensor, ShardedTensor
from cloudckpt.transfer import bytes_of

__all__ = [
    "bits_of",
    "conflict",
    "identity",
    "is_one_memory",
    "local_parts",
    "overlapping",
    "overlaps_itself",
    "tied_names",
    "without_memory",
]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Range(NamedTuple):
    """The bytes of memory that a tensor reaches, from its first to its last."""

    device: str
    start: int
    stop: int
    name: str


def local_parts(tensor: object) -> list[torch.Tensor]:
    """Return the tensors with memory that this rank has of a (distributed) tensor; none of one without memory."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return [tensor] if isinstance(tensor, torch.Tensor) and _has_memory(tensor) else []


def _has_memory(tensor: torch.Tensor) -> bool:
    if (
        isinstance(tensor, torch.nn.parameter.UninitializedParameter | torch.nn.parameter.UninitializedBuffer)
        or type(tensor).__name__ == "FakeTensor"
    ):
        return False
    return not tensor.is_meta and tensor.layout is torch.strided and not tensor.is_nested and tensor.numel() > 0


def _reach(tensor: torch.Tensor) -> int:
    """Return how many elements lie between the first and the last one in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0


def _start(tensor: torch.Tensor) -> int:
    """Return where this rank's elements of a tensor begin, the first of its parts'; 0 if it has no memory."""
    parts = local_parts(tensor)
    return _address(parts[0]) if parts else 0


def overlapping(tensors: Iterable[tuple[str, object]]) -> list[list[str]]:
    """Return the names of tensors whose memory others of them have, too; each group by its first bytes."""
    ranges: list[_Range] = []
    for name, tensor in tensors:
        if (plain := _plainly_dense(tensor)) is not None:
            start = plain.data_ptr()
            ranges.append(_Range("cpu", start, start + plain.nbytes, name))
            continue
        ranges += [
            _Range(str(part.device), start, start + _reach(part) * part.element_size(), name)
            for part in local_parts(tensor)
            if (start := _address(part))
        ]
    ranges.sort(key=_place_of)
    groups: list[dict[str, None]] = []
    device, stop = "", 0
    for one in ranges:
        if one.device != device or one.start >= stop:
            groups.append({})
            device, stop = one.device, 0
        groups[-1][one.name] = None
        stop = max(stop, one.stop)
    return [list(group) for group in groups if len(group) > 1]


_place_of = itemgetter(0, 1)


def _plainly_dense(tensor: object) -> torch.Tensor | None:
    """Return a tensor of which nothing but its address is to be asked, as nearly all are; None of another."""
    if type(tensor) in _PLAIN:
        plain = cast("torch.Tensor", tensor)
        if plain.is_cpu and plain.layout is torch.strided and plain.is_contiguous() and plain.data_ptr():
            return plain
    return None


def overlaps_itself(tensor: object) -> bool:
    """Tell whether two elements of a tensor may be one in memory, so that it cannot be filled."""
    if _plainly_dense(tensor) is not None:
        return False
    for part in local_parts(tensor):
        reach = 1
        for stride, size in sorted(zip(part.stride(), part.size(), strict=True)):
            if size > 1 and stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def is_one_memory(tensors: Sequence[object]) -> bool:
    """Tell whether tensors are the same elements, each by its own name."""
    return len({identity(tensor) for tensor in tensors}) == 1


def identity(tensor: object) -> tuple[object, ...]:
    """Return what tensors have in common that are the same elements; () if this rank has no memory of it."""
    return tuple(
        (str(part.device), _address(part), part.dtype, tuple(part.size()), tuple(part.stride()), *_reading(part))
        for part in local_parts(tensor)
    )


def _reading(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Return how elements are read from memory: conjugated, negated."""
    return tensor.is_conj(), tensor.is_neg()


def without_memory(tensors: Iterable[tuple[str, object]]) -> list[list[str]]:
    """Return the names of tensors on the meta device that will be one memory, when they have some."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else cast("torch.Tensor", tensor)
        storage = local.untyped_storage()._cdata  # noqa: SLF001 (there is no other name for memory that is not there)
        place = storage, local.storage_offset(), tuple(local.size()), tuple(local.stride()), _reading(local)
        groups.setdefault(place, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tied_names(leaves: Mapping[str, object]) -> dict[str, str]:
    """Return name → the first name of the same memory, of all tensors that have several names."""
    # Few tensors begin where another one does, and only those are looked at closely.
    starts = {
        name: leaf.data_ptr() if type(leaf) in _PLAIN and leaf.layout is torch.strided else _start(leaf)
        for name, leaf in leaves.items()
        if isinstance(leaf, torch.Tensor)
    }
    if len(set(starts.values())) == len(starts):
        return {}
    counts = Counter(starts.values())
    firsts: dict[tuple[object, ...], str] = {}
    found = {}
    for name in [name for name, start in starts.items() if counts[start] > 1]:
        place = identity(leaves[name])
        first = firsts.setdefault(place, name) if place else name
        if first != name:
            found[name] = first
    return found


def conflict(members: Sequence[tuple[str, object, object]]) -> tuple[str, str] | None:
    """Return two names whose contents cannot both be in their shared memory; None if all of them can.

    Args:
        members: (name, the live tensor, what it is to hold) of tensors that overlap.
    """
    if not all(local_parts(live) for _, live, _ in members):
        # On the meta device, where only what is wholly one memory is looked for.
        first, *rest = members
        return next(((first[0], name) for name, _, content in rest if not _is_alike(first[2], content)), None)
    parts = [
        (name, part, new)
        for name, live, content in members
        for part, new in zip(local_parts(live), local_parts(content), strict=True)
    ]
    base = min(_address(part) for _, part, _ in parts) // 16 * 16
    stop = max(_address(part) + _reach(part) * part.element_size() for _, part, _ in parts)
    memory = torch.empty(stop - base, dtype=torch.uint8, device="cpu")
    views = [(name, _view(memory, part, _address(part) - base), new) for name, part, new in parts]
    for _, view, new in views:
        view.copy_(new)
    for name, view, new in views:
        # What was written later is as it was written: some other member has the bytes that differ.
        if not _is_same(view, new.to(device="cpu", dtype=view.dtype)):
            return name, next(other for other, _, _ in reversed(views) if other != name)
    return None


def _view(memory: torch.Tensor, like: torch.Tensor, start_bytes: int) -> torch.Tensor:
    room = (len(memory) - start_bytes) // like.element_size() * like.element_size()
    typed = memory[start_bytes : start_bytes + room].view(like.dtype).as_strided(like.size(), like.stride())
    is_conjugated, is_negated = _reading(like)
    typed = typed.conj() if is_conjugated else typed
    return torch._neg_view(typed) if is_negated else typed  # noqa: SLF001 (there is no other way to make one)


def _is_alike(one: object, other: object) -> bool:
    return all(_is_same(*pair) for pair in zip(local_parts(one), local_parts(other), strict=True))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits: a NaN is like itself, and no zero like the other."""
    return np.array_equal(_bytes(one), _bytes(other))


def bits_of(tensor: torch.Tensor) -> bytes:
    """Return a copy of the elements of a tensor with memory, on whatever device."""
    return _bytes(tensor.to("cpu")).tobytes()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous())
