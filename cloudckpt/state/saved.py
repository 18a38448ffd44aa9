"""Say what a checkpoint holds by names and paths, for whoever matches a state with it. Pure values; reads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from cloudckpt.format import JsonValue, PathElement
from cloudckpt.state.attributes import names_above, notes_by_prefix, stateless_module
from cloudckpt.state.per_rank import RNG, RankName

__all__ = ["OURS", "Saved"]

_Shape = tuple[int, ...]
OURS = "cloudckpt."
"""What the names begin with that the library saves beside the state."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: shapes and dtypes of its tensors, its values, the paths of both, and notes on names."""

    shapes: Mapping[str, _Shape]
    dtypes: Mapping[str, torch.dtype]
    values: Mapping[str, object]
    paths: Mapping[str, Sequence[PathElement]]
    notes: Mapping[str, JsonValue] = field(default_factory=dict)

    def notes_on(self, name: str) -> dict[str, JsonValue]:
        """Notes on what is called `name`, and on what lies below it."""
        return self._notes_by_prefix.get(name, {})

    @cached_property
    def _notes_by_prefix(self) -> Mapping[str, dict[str, JsonValue]]:
        """Notes by every name that leads to theirs, because each entry asks for those on its own."""
        return notes_by_prefix(self.notes)

    def names(self) -> list[str]:
        """All names, in the order in which they were saved."""
        known = [name for name in self.paths if name in self.shapes or name in self.values]
        return known + [name for name in [*self.shapes, *self.values] if name not in self.paths]

    @cached_property
    def owned(self) -> Mapping[str, Mapping[RankName, str]]:
        """What each rank saved for itself: the name in the state, or `RNG` → whose it is → the tensor's name."""
        found: dict[str, dict[RankName, str]] = {}
        for name in self._own_names:
            owner = RankName.parse(name)
            if owner is not None:
                found.setdefault(owner.name, {})[owner] = name
        drawn = {rank: name for name in self._own_names if (rank := RankName.rank_of_generators(name)) is not None}
        if drawn:
            found[RNG] = {RankName(RNG, rank, len(drawn)): name for rank, name in drawn.items()}
        return found

    @cached_property
    def _own_names(self) -> list[str]:
        return [name for name in self.shapes if name.startswith(OURS)]

    def is_of_module(self, name: str) -> bool:
        """Tell whether a name is one of a module that was saved as such."""
        noted = (self.notes.get(above) for above in names_above(name))
        return any(isinstance(note, dict) and "metadata" in note for note in noted)

    def is_stateless_module(self, name: str) -> bool:
        """Tell whether a module stood below a container of which nothing was saved, because it has no state."""
        return stateless_module(self.values.get(name), self.notes.get(name)) and len(self.path(name)) > 1

    def tied(self, name: str) -> str:
        """Return the first name of the memory that a tensor was in, which is its own if it had no other."""
        note = self.notes.get(name)
        return str(note.get("tied", name)) if isinstance(note, dict) else name

    def path(self, name: str) -> list[PathElement]:
        """Where a name stood in the nested state; a checkpoint that says nothing has dots in its names for steps.

        What the library itself saves beside the state stands nowhere in it.
        """
        return list(self.paths.get(name) or ([name] if name.startswith(OURS) else name.split(".")))

    def below(self, path: Sequence[PathElement]) -> list[str]:
        """The names of all that stood at `path` or below it."""
        depth = len(path)
        if depth not in self._by_depth:
            self._by_depth[depth] = self._below_all(depth)
        return self._by_depth[depth].get(_key(path), [])

    @cached_property
    def _by_depth(self) -> dict[int, Mapping[str, list[str]]]:
        """Names by the path of so many steps that leads to them: a state with many entries looks each of them up."""
        return {}

    def _below_all(self, depth: int) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names():
            path = self.path(name)
            if len(path) >= depth:
                found.setdefault(_key(path[:depth]), []).append(name)
        return found


def _key(path: Sequence[PathElement]) -> str:
    return repr(list(path))
