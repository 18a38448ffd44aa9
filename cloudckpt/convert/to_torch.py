"""Write the nested state as `torch.save` does, for `torch.load(weights_only=True)`, without having it in memory.

    paths, values, hollow tensors ──torch.save──▶ skeleton with holes ──each a tensor's──▶ the file's layout

Its sums are right, though PyTorch itself compares none: whoever else opens the archive does.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import torch

from cloudckpt.convert.opened import Job
from cloudckpt.convert.planned import Plan, Taken
from cloudckpt.convert.skeleton import Skeleton, hollow, place_of
from cloudckpt.convert.writing import Layout, Segment, write_files
from cloudckpt.format import DTYPES, unflatten
from cloudckpt.state import with_attributes

__all__ = ["nested", "plan_torch", "tensors_in", "unloadable"]


def plan_torch(job: Job) -> Plan:
    """Plan one file; raises `UnsupportedValueError` for a value that `torch.load` would call code."""
    taken = job.take()
    job.drop(taken, unloadable(job, taken), "a file for torch.load(weights_only=True)")

    def write() -> None:
        write_files(job, taken.tensors.values(), [lambda: _layout(job, taken)])

    return Plan(taken=taken, files=(job.name,), write=write, beginning=job.name)


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


def _layout(job: Job, taken: Taken) -> Layout:
    """Save the state with holes for its tensors, and say which tensor belongs into which."""
    entries = {name: job.entry(name) for name in taken.tensors.values()}
    hollows = hollow([(entry.shape, DTYPES[entry.dtype]) for entry in entries.values()])
    stand_ins = {name: _as_noted(tensor, job.notes.get(name)) for name, tensor in zip(entries, hollows, strict=True)}
    state = nested(job, {**taken.values, **stand_ins})
    skeleton = Skeleton.of(state, job.name)
    # What it is read back as has its tensors in the same places, and says where their bytes are to be.
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    of_places = {
        place_of(there): names[id(tensor)]
        for tensor, there in zip(tensors_in(state), tensors_in(skeleton.read_back), strict=True)
        if tensor.numel()
    }
    return Layout(
        name=job.name,
        size_bytes=skeleton.size_bytes,
        literals=skeleton.literals,
        segments=[Segment(of_places[hole.at], 0, hole.size_bytes, hole.at) for hole in skeleton.holes],
        sums_at=[hole.sums_at for hole in skeleton.holes],
    )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, always in the same order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors_in(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors_in(child)


def _as_noted(tensor: torch.Tensor, note: object) -> torch.Tensor:
    """Return a tensor as its note says that it was."""
    if not isinstance(note, dict) or note.get("requires_grad") is not True:
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return torch.nn.Parameter(tensor) if note.get("parameter") is True else tensor.requires_grad_()
