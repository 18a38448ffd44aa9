"""Say what one object of the state must be able to do to be saved and restored; its kinds are elsewhere.

capture      objects with state_dict, tensors, values
modules      modules
optimizers   optimizers; of FSDP1 modules: fsdp1
per_rank     objects that each rank has for itself
accumulation gradients between two steps
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch

from cloudckpt.errors import OptionsError
from cloudckpt.format import Flat, JsonValue, PathElement, flatten_at
from cloudckpt.late import ShardedTensor
from cloudckpt.state.attributes import notes_of

__all__ = [
    "Choosy",
    "Entry",
    "Left",
    "Misfit",
    "Place",
    "dtype_of",
    "in_common_order",
    "is_tensor",
    "mapping_of",
    "named_twice",
    "shape_of",
]


def is_tensor(value: object) -> bool:
    """Tell whether a value is stored as a tensor (dense, distributed or sharded)."""
    return isinstance(value, torch.Tensor)  # which ShardedTensors are, too


def shape_of(tensor: object) -> tuple[int, ...]:
    """Return the full shape of what `is_tensor` says is one."""
    if isinstance(tensor, ShardedTensor):
        return tuple(tensor.metadata().size)  # its `size` warns that its kind is deprecated
    return tuple(cast("torch.Tensor", tensor).size())


def dtype_of(tensor: object) -> torch.dtype:
    """Return the dtype of what `is_tensor` says is one."""
    if isinstance(tensor, ShardedTensor):
        return tensor.metadata().tensor_properties.dtype
    return cast("torch.Tensor", tensor).dtype


@dataclass(slots=True)
class Misfit:
    """What of an entry and of a checkpoint does not fit together.

    Attributes:
        missing: names that the entry has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the entry lacks.
        reasons: what else, in words.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Left:
    """What an object has left out of a state that it took.

    Attributes:
        missing: names that it has and did not find.
        unexpected: names that it found and has no use for.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()


class Place(NamedTuple):
    """Where a value of the state stands: its path and name, and the container that holds it under `key`."""

    path: list[PathElement]
    name: str
    value: object
    holder: object
    key: object


@runtime_checkable
class Choosy(Protocol):
    """An object that can tell that it will not take a state, before anything is changed."""

    def state_dict_misfits(self, state_dict: Mapping[str, object]) -> Sequence[str]:
        """Return why the state does not fit, in words; empty if it does."""


class Entry(ABC):
    """One object of the state: how it becomes plain nested state, and takes restored state back.

    Attributes:
        fills: whether live tensors may be filled where they are, if nothing else in the state has their memory.
        is_itself: whether its live tensors are state of the caller's own, and not what an object makes of its state.
        pins: whether the live tensors are what is restored, and none may be put in the place of one.
        is_bound: whether it stands where nothing can be put in its place.
        is_alike: whether it must have the same names on all ranks: parts of several would be one that nobody had.
        is_of_first_rank: whether the first rank alone has something to say, and all ranks take that.
        is_last: whether it is asked after all others, and given its state after them.
        is_elastic: whether what ranks have for themselves is each rank's by its number, whatever their number was.
        is_beside: whether it is the library's own, beside the caller's state: a checkpoint may lack it.
        talks: whether its ranks talk to each other when it is asked for its state, or given one.
        may_be_cast: whether tensors may get another dtype than they were saved in, if the caller says so.
        is_asked: whether the object may refuse a state, and is therefore handed all of it before anything is changed.
        other_world: what to do when another number of ranks saved for itself what is to be restored.
        subject: the object.
        others: of an elastic one, how many ranks saved one for themselves.
        is_strict: whether the caller wants all names that both have.
        notes: what the checkpoint keeps about names at or below this entry's. They may come from anyone: what makes no
            sense is to be refused or left alone.
    """

    fills = True
    is_itself = False
    pins = False
    is_bound = False
    talks = False
    is_of_first_rank = False
    is_last = False
    is_elastic = False
    is_beside = False
    others = 0
    is_alike = False
    may_be_cast = False
    is_asked = False
    is_plain = False
    is_strict = True
    notes: Mapping[str, JsonValue] = MappingProxyType({})
    other_world = "restore it with as many ranks"

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self.name = place.name
        self.subject = place.value

    @property
    def tops(self) -> Sequence[str]:
        """The keys of the state below which it stands."""
        return [str(self.path[0])]

    def singly(self) -> Sequence[Entry]:
        """Return entries of what it consists of, each of which may be restored without the others."""
        return [self]

    @property
    def may_write(self) -> bool:
        """Tell whether the object may write into its own tensors when it loads."""
        return self.pins or self.is_asked

    @abstractmethod
    def current(self) -> object:
        """Return the nested state now; its tensors are the live ones wherever the object shares them."""

    @abstractmethod
    def load(self, restored: object, live: object) -> Left | None:
        """Take restored nested state; `live` is what `fillable` returned, whose tensors were filled in place.

        Returns:
            What the object says that it left out, if it does say so.
        """

    def is_done(self, live: object) -> bool:
        """Tell whether nothing is left to do for `load` when all tensors of `live` were filled, and nothing else."""
        return False

    def fillable(self) -> object:
        """Return the nested state whose tensors a restore may fill: `current`, unless nothing there is live."""
        return self.current()

    def plain_tensors(self) -> Mapping[str, torch.Tensor] | None:
        """Return what `fillable` does, of an object that is tensors alone and takes nothing else; None of another."""
        return None

    def flat(self, nested: object) -> Flat:
        """Return the names of all that is in `current` or `fillable`, and notes about them."""
        flat = flatten_at(nested, self.name, self.path, is_tensor=is_tensor)
        flat.notes.update(notes_of(nested, self.name))
        return flat

    def put_into(self, flat: Flat) -> bool:
        """Add what `flat` says of `current`, if that can be done at once; return False, with nothing done, if not."""
        return False

    def takes(self, name: str) -> bool:
        """Tell whether what is saved under a name is taken as it is, whatever the live state has there.

        Else the live state must have that name; a tensor then fits in shape and dtype, and is filled in place.
        """
        return True

    def hands_over(self, name: str) -> bool:
        """Tell whether code of the object's own gets what is saved under a name, and judges its dtype."""
        return False

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a target for a saved tensor that the live state has no place for; `below` is its path in the entry."""
        return torch.empty(shape, dtype=dtype, device="cpu")

    def shape_here(
        self,
        below: Sequence[PathElement],
        shape: tuple[int, ...],
        saved_shape_of: Callable[[str], tuple[int, ...] | None],
    ) -> tuple[int, ...]:
        """Return the shape that a saved part must have here; `saved_shape_of` tells that of other tensors by name."""
        return shape

    def materialize(self, device: str | torch.device, names: Sequence[str]) -> list[str]:
        """Give the named tensors, which are on the meta device, memory; return the names of what is left there."""
        return list(names)

    def backup(self) -> Callable[[], None] | None:
        """Return what puts the object back to how it is now; None if that cannot be done, or takes much memory."""
        return None

    def late(self, leaves: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]]) -> list[str]:
        """Return which tensors `load` puts in their place without a look at what they hold: that may come later.

        Args:
            leaves: what `load` will be given, by name.
            paths: their paths in the state.
        """
        return []

    def copied(
        self, late: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return of which of those there are copies in their places by now: (the copy, what it is of).

        None: it cannot be told.
        """
        return None

    # -- what each rank has for itself -------------------------------------------------------------------------

    def holds_own(self, name: str) -> bool:
        """Tell whether state that each rank saved for itself under `name` belongs to this entry."""
        return False

    def allocate_own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a target for this rank's own tensor, None if it has no place here."""
        return None

    def load_own(self, own: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's own tensors by name, filled; after `load`, if there is something for both."""
        raise OptionsError(f"{self.name!r} has nothing that is each rank's own")

    # -- what fits ---------------------------------------------------------------------------------------------

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare with the nested state to be restored, whose tensors are not filled yet; change nothing.

        Args:
            restored: what `load` will be given.
            dtypes: name → saved dtype, of all tensors in the checkpoint.
        """
        return Misfit()


def in_common_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries in an order that is the same on all ranks where ranks talk: those first, by name."""
    talking = sorted((entry for entry in entries if entry.talks), key=lambda entry: entry.name)
    return talking + [entry for entry in entries if not entry.talks]


def named_twice(name: str) -> OptionsError:
    """Return what is raised where two leaves have one name."""
    return OptionsError(f"two entries of the state are both named {name!r}; rename one of the keys")


def mapping_of(value: object, name: str) -> dict[str, object]:
    """Return restored state that must be a dict."""
    if not isinstance(value, dict):
        raise OptionsError(
            f"the checkpoint holds a {type(value).__name__} under {name!r}, where a state_dict is expected"
        )
    return value
