"""Keep what tensors and containers of a state are beside their contents, as notes, and give it back.

    requires_grad, Parameter      of a tensor in a container or an object's state
    _metadata                     of a module's state_dict (an OrderedDict): which version of each part made it

Notes may come from anyone: what makes no sense is left alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import nn

from cloudckpt.format import JsonValue, codec
from cloudckpt.late import DTensor

__all__ = [
    "as_it_was",
    "is_foreign",
    "metadata_of",
    "names_above",
    "notes_by_prefix",
    "notes_of",
    "stateless_module",
    "with_attributes",
]

_CONTAINERS = (dict, list, tuple)
_NOTED = (torch.Tensor, *_CONTAINERS)


def notes_of(nested: object, name: str) -> dict[str, JsonValue]:
    """Return the notes of nested state that is called `name`, and of all that is in it."""
    found: dict[str, JsonValue] = {}
    _note(nested, name, found)
    return found


def _note(nested: object, name: str, found: dict[str, JsonValue]) -> None:
    if isinstance(nested, torch.Tensor):
        if nested.requires_grad:
            found[name] = {"requires_grad": True, "parameter": isinstance(nested, nn.Parameter)}
        if is_foreign(nested):
            found[name] = {"subclass": type(nested).__name__}
        return
    if type(nested) is OrderedDict and (metadata := getattr(nested, "_metadata", None)) is not None:
        found[name] = {"state_metadata": codec.encode(metadata, key=f"{name}._metadata")}
    if isinstance(nested, _CONTAINERS):
        for key, child in nested.items() if isinstance(nested, dict) else enumerate(nested):
            # A history may have millions of numbers; and of most tensors there is nothing to note.
            if type(child) is torch.Tensor and not child.requires_grad:
                continue
            if isinstance(child, _NOTED):
                _note(child, f"{name}.{key}", found)


def is_foreign(leaf: object) -> bool:
    """Tell whether a leaf is a tensor of a type that is not PyTorch's, and of which only the bytes are kept."""
    if type(leaf) in (torch.Tensor, nn.Parameter):
        return False
    return isinstance(leaf, torch.Tensor) and type(leaf).__module__.partition(".")[0] != "torch"


def stateless_module(value: object, note: object) -> bool:
    """Tell whether a saved value stands for a module that has no state, of which nothing is saved."""
    return isinstance(value, dict) and not value and isinstance(note, dict) and "metadata" in note


def as_it_was(leaf: object, note: JsonValue) -> object:
    """Return a restored tensor as its note says that it was; `leaf` stays as it is, and has the same memory."""
    is_known = type(leaf) is torch.Tensor or isinstance(leaf, DTensor)
    if not is_known or not isinstance(note, dict) or note.get("requires_grad") is not True:
        return leaf
    plain = cast("torch.Tensor", leaf)
    if not (plain.is_floating_point() or plain.is_complex()):
        return leaf
    return nn.Parameter(plain) if note.get("parameter") is True else plain.detach().requires_grad_()


def with_attributes(nested: object, name: str, notes: Mapping[str, JsonValue], *, is_new: bool = False) -> object:
    """Give state_dicts in nested state the versions that notes say of them; return the state.

    Args:
        nested: the state.
        name: what it is called.
        notes: those on it, and on what is in it.
        is_new: whether a dict may be made an `OrderedDict` for that, as `state_dict` returns one.
    """
    if not any(isinstance(note, dict) and note.keys() & {"metadata", "state_metadata"} for note in notes.values()):
        return nested
    return _given(nested, name, notes_by_prefix(notes), is_new=is_new)


def notes_by_prefix(notes: Mapping[str, JsonValue]) -> dict[str, dict[str, JsonValue]]:
    """Return notes by every name that leads to theirs."""
    found: dict[str, dict[str, JsonValue]] = {}
    for name, note in notes.items():
        for prefix in [*names_above(name), name]:
            found.setdefault(prefix, {})[name] = note
    return found


def _given(nested: object, name: str, below: Mapping[str, Mapping[str, JsonValue]], *, is_new: bool) -> object:
    metadata = metadata_of(name, below.get(name, {}), nested)
    if metadata is not None and isinstance(nested, dict):
        if is_new and type(nested) is dict:
            nested = OrderedDict(nested)
        if type(nested) is OrderedDict:
            nested._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001 (where torch has it)
        return nested
    if isinstance(nested, dict):
        for key, child in nested.items():
            inner = f"{name}.{key}" if name else str(key)
            nested[key] = _given(child, inner, below, is_new=is_new)
    elif isinstance(nested, list):
        nested[:] = [_given(child, f"{name}.{n}", below, is_new=is_new) for n, child in enumerate(nested)]
    return nested


def metadata_of(name: str, notes: Mapping[str, JsonValue], keys: object) -> OrderedDict[str, object] | None:
    """Return the `_metadata` of the state_dict that is called `name`: of a module's, or of a container that was one.

    Args:
        name: the module's or the container's.
        notes: those on it, and on its parts.
        keys: of the state_dict, which say what parts it has.
    """
    note = notes.get(name)
    if not isinstance(note, dict):
        return None
    if "state_metadata" in note:
        found = codec.decode(note["state_metadata"], key=f"{name}._metadata")
        return OrderedDict(found) if isinstance(found, dict) else None
    if "metadata" not in note:
        return None
    above = (
        {part for key in keys if isinstance(key, str) for part in names_above(key)} if isinstance(keys, dict) else set()
    )
    of_parts = {of[len(name) + 1 :]: _decoded(part, of) for of, part in notes.items() if of.startswith(f"{name}.")}
    usual: dict[str, object] = {part: {"version": 1} for part in sorted(above)}
    noted = {part: found for part, found in of_parts.items() if found is not None}
    return OrderedDict({"": _decoded(note, name), **usual, **noted})


def names_above(name: str) -> Iterator[str]:
    """Yield the names that lead to a name, from the top down."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _decoded(note: JsonValue, name: str) -> object:
    if not isinstance(note, dict) or "metadata" not in note:
        return None
    return codec.decode(note["metadata"], key=f"{name}._metadata")
