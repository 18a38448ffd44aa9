"""Keep what tensors and containers of a state are beside their contents, as notes, and give it back.

    requires_grad, Parameter      of a tensor in a container or an object's state
    _metadata                     of a module's state_dict (an OrderedDict): which version of each part made it

Notes may come from anyone: what makes no sense is left alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from cloudckpt.format import JsonValue, codec

__all__ = ["as_it_was", "is_foreign", "notes_of", "with_attributes"]


def notes_of(nested: object, name: str) -> dict[str, JsonValue]:
    """Return the notes of nested state that is called `name`, and of all that is in it."""
    return dict(_notes(nested, name))


def _notes(nested: object, name: str) -> Iterator[tuple[str, JsonValue]]:
    if isinstance(nested, torch.Tensor):
        if nested.requires_grad:
            yield name, {"requires_grad": True, "parameter": isinstance(nested, nn.Parameter)}
        if is_foreign(nested):
            yield name, {"subclass": type(nested).__name__}
        return
    metadata = getattr(nested, "_metadata", None)
    if type(nested) is OrderedDict and metadata is not None:
        yield name, {"metadata": codec.encode(metadata, key=f"{name}._metadata")}
    if isinstance(nested, dict | list | tuple):
        for key, child in nested.items() if isinstance(nested, dict) else enumerate(nested):
            yield from _notes(child, f"{name}.{key}")


def is_foreign(leaf: object) -> bool:
    """Tell whether a leaf is a tensor of a type that is not PyTorch's, and of which only the bytes are kept."""
    return isinstance(leaf, torch.Tensor) and type(leaf).__module__.partition(".")[0] != "torch"


def as_it_was(leaf: object, note: JsonValue) -> object:
    """Return a restored tensor as its note says that it was."""
    if type(leaf) is not torch.Tensor or not isinstance(note, dict) or note.get("requires_grad") is not True:
        return leaf
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return nn.Parameter(leaf) if note.get("parameter") is True else leaf.requires_grad_()


def with_attributes(nested: object, name: str, notes: Mapping[str, JsonValue]) -> object:
    """Give containers in nested state what notes say of them; return the state."""
    if any(isinstance(note, dict) and "metadata" in note for note in notes.values()):
        _give(nested, name, notes)
    return nested


def _give(nested: object, name: str, notes: Mapping[str, JsonValue]) -> None:
    note = notes.get(name)
    if type(nested) is OrderedDict and isinstance(note, dict) and "metadata" in note:
        metadata = codec.decode(note["metadata"], key=f"{name}._metadata")
        if isinstance(metadata, dict):
            nested._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001 (where torch has it)
    if isinstance(nested, dict | list | tuple):
        for key, child in nested.items() if isinstance(nested, dict) else enumerate(nested):
            _give(child, f"{name}.{key}", notes)
