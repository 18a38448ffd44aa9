"""Turn what a training program holds into named tensors and values, and put restored ones back.

Everything in the caller's `state` dict is of one of five kinds; each kind has one adapter here:

    nn.Module        its state_dict, without the names of wrappers; tensors restored in place (`modules`); of
                     `Trainable` without what is frozen
    Optimizer        state_dict by parameter names, so that it survives resharding (`optimizers`, `fsdp1`)
    Stateful         state_dict / load_state_dict (`stateful`); those of `PerRank` are each rank's own, those of
                     `RankZero` the first rank's
    Tensor           restored in place
    anything else    containers and plain values, restored into the dict (`values`)

A dict, list or tuple with modules, optimizers or other objects in it is taken apart, and each is an entry of its own.
Knows PyTorch's objects; knows nothing of stores, steps or shards, nor of what a checkpoint holds (`matching` does).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.format import Flat, PathElement, codec
from cloudckpt.ranks import Group
from cloudckpt.state.accumulation import AccumulationWindow, WindowEntry
from cloudckpt.state.attributes import is_foreign, names_above
from cloudckpt.state.beside import Beside
from cloudckpt.state.entry import Entry, Place, in_common_order, is_tensor, named_twice
from cloudckpt.state.files import Files, files_of
from cloudckpt.state.fsdp1 import flat_optimizer_entry
from cloudckpt.state.later import settle
from cloudckpt.state.modules import ModuleEntry
from cloudckpt.state.optimizers import OptimizerEntry
from cloudckpt.state.overlap import tied_names
from cloudckpt.state.per_rank import PerRank, PerRankEntry, is_stateful_loader
from cloudckpt.state.plain import PlainModules
from cloudckpt.state.protocol import Stateful
from cloudckpt.state.rank_zero import RankZero, rank_zero_entry
from cloudckpt.state.rng import RandomState, RandomStateEntry
from cloudckpt.state.stateful import StatefulEntry
from cloudckpt.state.tensors import TensorsEntry, is_plain_tensor
from cloudckpt.state.trainable import Trainable, TrainableEntry
from cloudckpt.state.values import ValueEntry

__all__ = ["bind", "capture", "captured"]

_DEPTH_LIMIT = 64
_VALUES = frozenset((dict, list, tuple, set, str, bytes, int, float, bool, type(None), torch.Tensor, nn.Parameter))
"""The usual types of what is no object with state."""


_OBJECTS = (nn.Module, Optimizer, RandomState, RankZero, Trainable)
_CONTAINERS = (dict, list, tuple)


def bind(state: MutableMapping[str, object], *, generators: bool = False) -> list[Entry]:
    """Choose the adapter of each object in the caller's state.

    Args:
        state: the caller's.
        generators: whether the process's generators go with it, also where it holds no `RandomState`.

    Raises:
        OptionsError: the state is no dict with string keys, is empty, or has a key that is not a plain name; or two
            `RandomState`.
    """
    if not isinstance(state, MutableMapping) or not state:
        raise OptionsError(f"state is a {type(state).__name__}; give a non-empty dict such as {{'model': model}}")
    for name in state:
        if type(name) is not str or not name or name.startswith("cloudckpt."):
            what = f", a {type(name).__name__}," if type(name) is not str else ""
            raise OptionsError(
                f"state key {name!r}{what} is not a usable name; give a str that does not start with 'cloudckpt.'"
            )
    runs = [
        _run(state, keys, is_plain=is_plain)
        for is_plain, keys in groupby(state, lambda key: is_plain_tensor(state[key]))
    ]
    plain = PlainModules()
    held: dict[str, object] = {}
    for run in runs:
        held.update(run if isinstance(run, dict) else {place.name: _inside(place.value) for place in run})
    beside = Beside(held, plain)
    others = [place.value for run in runs if not isinstance(run, dict) for place in run]
    shared = _held_twice(value for value in others if isinstance(value, _CONTAINERS) and not _is_object(value))
    entries: list[Entry] = []
    for run in runs:
        if isinstance(run, dict):
            entries.append(TensorsEntry(run, state))
        else:
            entries += [_entry(place, beside, shared, plain) for place in run]
    drawn = [entry.name for entry in entries if isinstance(entry, RandomStateEntry)]
    if len(drawn) > 1:
        raise OptionsError(
            f"{' and '.join(drawn)} are both a RandomState, and a process has its generators once; give one of them"
        )
    return entries if drawn or not generators else [*entries, RandomStateEntry.beside()]


def _run(
    state: MutableMapping[str, object], keys: Iterable[str], *, is_plain: bool
) -> dict[str, torch.Tensor] | list[Place]:
    """Return the tensors under keys that follow each other, or the places of what else stands there."""
    if is_plain:
        return {key: cast("torch.Tensor", state[key]) for key in keys}
    return [place for key in keys for place in _places(Place([key], key, state[key], state, key))]


def _inside(value: object) -> object:
    """Return what a mark of ours is put around, if it stands for that to others."""
    if isinstance(value, Trainable):
        return value.module
    return value.value if isinstance(value, RankZero) else value


def _places(place: Place) -> Iterator[Place]:
    """Yield the place of a value, or the places in it when it is a container of objects."""
    if not _is_object(place.value) and _holds_object(place.value, depth=0):
        for step in _steps_into(place):
            if _is_object(step.value):
                yield step
            else:
                yield from _places(step)
        return
    is_mutable = isinstance(place.holder, MutableMapping | MutableSequence)
    if not (is_mutable or _is_object(place.value) or is_tensor(place.value)):
        raise OptionsError(
            f"{place.name!r} stands in a {type(place.holder).__name__} beside modules or the like, where it cannot be "
            "restored; put it into a dict or list"
        )
    yield place


def _steps_into(place: Place) -> Iterator[Place]:
    container = place.value
    if type(container) is list:
        path, above = place.path, place.name
        for number, child in enumerate(container):
            yield Place([*path, number], f"{above}.{number}", child, container, number)
        return
    keys = list(container) if isinstance(container, dict) else range(len(cast("Sequence[object]", container)))
    for key in keys:
        if isinstance(container, tuple):
            step: PathElement = {"tuple": key}
        elif isinstance(container, list) or type(key) is str:
            step = key
        else:
            step = {"key": codec.encode(key, key=place.name)}
        child = cast("Mapping[object, object]", container)[key]
        yield Place([*place.path, step], f"{place.name}.{key}", child, container, key)


def _is_object(value: object) -> bool:
    if type(value) in _VALUES:
        return False
    # The protocol last: it looks at every member of an instance.
    return isinstance(value, _OBJECTS) or (isinstance(value, Stateful) and not isinstance(value, type))


def _holds_object(value: object, depth: int) -> bool:
    """Tell whether an object stands somewhere in a container; one that holds itself is refused later, by name."""
    if depth > _DEPTH_LIMIT or not isinstance(value, dict | list | tuple):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_is_object(child) or _holds_object(child, depth + 1) for child in inner)


def _held_twice(values: Iterable[object]) -> set[int]:
    """Return the ids of containers that stand in several places: what is restored in one must not show in another."""
    seen: set[int] = set()
    twice: set[int] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) in seen:
                twice.add(id(value))
            else:
                seen.add(id(value))
                inner = value.values() if isinstance(value, dict) else value
                pending += [child for child in inner if isinstance(child, dict | list | tuple)]
    return twice


def _entry(place: Place, beside: Beside, shared: Collection[int], plain: PlainModules) -> Entry:
    value = place.value
    if isinstance(value, nn.Module):
        return ModuleEntry(place, value, plain)
    if isinstance(value, Optimizer):
        return flat_optimizer_entry(place, value, beside) or OptimizerEntry(place, value, beside)
    if (marked := _marked(place, beside, shared, plain)) is not None:
        return marked
    if _is_object(value):
        return StatefulEntry(place, cast("Stateful", value), beside)
    return ValueEntry(place, shared)


def _marked(place: Place, beside: Beside, shared: Collection[int], plain: PlainModules) -> Entry | None:
    """Return the entry of an object of the library's own, or of a kind that it treats as one of these."""
    value = place.value
    found: Entry | None = None
    if isinstance(value, RandomState):
        found = RandomStateEntry(place, value)
    elif isinstance(value, RankZero):
        found = rank_zero_entry(place, value, beside, shared)
    elif isinstance(value, Trainable):
        found = TrainableEntry(place, value, plain)
    elif isinstance(value, AccumulationWindow):
        found = WindowEntry(place, value)
    elif isinstance(value, PerRank) or is_stateful_loader(value):
        found = PerRankEntry(place, cast("Stateful", value.inner if isinstance(value, PerRank) else value))
    return found


def capture(entries: Sequence[Entry]) -> Flat:
    """Return every tensor and value of the state by name; tensors are the live ones, not copies."""
    settle(entry.subject for entry in entries)
    flat = Flat()
    talked = {id(entry): entry.flat(entry.current()) for entry in in_common_order(entries) if entry.talks}
    is_first = Group.of_world().rank == 0
    for entry in sorted(entries, key=lambda entry: entry.is_last):
        if entry.is_of_first_rank and not is_first:
            continue
        if entry.put_into(flat):
            continue
        own = talked.get(id(entry)) or entry.flat(entry.current())
        if not flat.leaves.keys().isdisjoint(own.leaves):
            raise named_twice(next(name for name in own.leaves if name in flat.leaves))
        if entry.is_asked:
            _refuse_subclasses(own)
        flat.leaves.update(own.leaves)
        flat.paths.update(own.paths)
        flat.notes.update(own.notes)
        if own.of_others:
            flat.of_others.update(own.of_others)
        if entry.is_of_first_rank:
            flat.of_first_rank.update(own.leaves)
        if entry.is_alike:
            flat.alike[entry.name] = sorted(own.leaves)
    for name, first in tied_names(flat.leaves).items():
        note = flat.notes.get(name)
        flat.notes[name] = {**(note if isinstance(note, dict) else {}), "tied": first}
    return flat


def _refuse_subclasses(flat: Flat) -> None:
    """Refuse tensors of a type that an object would get back as another one."""
    for name, leaf in flat.leaves.items():
        if is_foreign(leaf):
            raise UnsupportedValueError(
                f"{name!r} is a {type(leaf).__name__}, which would come back as a plain tensor; save "
                "value.as_subclass(torch.Tensor), and what it knows beside",
                key=name,
                type_name=type(leaf).__name__,
            )


def _frozen(entries: Sequence[Entry], flat: Flat) -> Iterator[str]:
    """Yield the names of modules' parameters that need no gradient, and of what is kept below these."""
    found = {name for entry in entries if isinstance(entry, ModuleEntry) for name in entry.frozen()}
    return (name for name in flat.leaves if name in found or any(above in found for above in names_above(name)))


def captured(
    state: MutableMapping[str, object],
    *,
    generators: bool = False,
    files: Files | None = None,
    marks_frozen: bool = False,
) -> Flat | Exception:
    """Return the leaves of a state, with the process's generators or without, or what an object raised at that.

    With them go files, on the first rank; and which of them are frozen parameters, if that is asked for.

    An error is a value here, so that all ranks can be told of it.
    """
    try:
        flat = capture(entries := bind(state, generators=generators))
        if marks_frozen:
            flat.frozen.update(_frozen(entries, flat))
        if files is not None and Group.of_world().rank == 0:
            flat.leaves.update(found := files_of(files))
            flat.of_first_rank.update(found)
    except Exception as exc:  # noqa: BLE001 (raised by whoever leads the ranks, on all of them)
        return exc
    else:
        return flat
