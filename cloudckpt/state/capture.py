"""Turn what a training program holds into named tensors and values, and put restored ones back.

Everything in the caller's `state` dict is of one of five kinds; each kind has one adapter here:

    nn.Module        its state_dict, without the names of wrappers; tensors restored in place (`modules`)
    Optimizer        state_dict by parameter names, so that it survives resharding (`optimizers`, `fsdp1`)
    Stateful         state_dict / load_state_dict; those of `PerRank` are each rank's own
    Tensor           restored in place
    anything else    containers and plain values, restored into the dict

A dict, list or tuple with modules, optimizers or other objects in it is taken apart, and each is an entry of its own.
Knows PyTorch's objects; knows nothing of stores, steps or shards, nor of what a checkpoint holds (`matching` does).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.format import Flat, PathElement, codec
from cloudckpt.state.accumulation import AccumulationWindow, WindowEntry
from cloudckpt.state.attributes import is_foreign
from cloudckpt.state.backup import backup_of
from cloudckpt.state.beside import Beside
from cloudckpt.state.collector import collector_awake
from cloudckpt.state.entry import Choosy, Entry, Misfit, Place, in_common_order, is_tensor, mapping_of, named_twice
from cloudckpt.state.fsdp1 import flat_optimizer_entry
from cloudckpt.state.modules import ModuleEntry
from cloudckpt.state.optimizers import OptimizerEntry
from cloudckpt.state.overlap import tied_names
from cloudckpt.state.per_rank import PerRank, PerRankEntry, is_stateful_loader
from cloudckpt.state.plain import PlainModules
from cloudckpt.state.rng import Generators, set_generator

__all__ = ["bind", "capture", "captured"]

logger = logging.getLogger(__name__)

_DEPTH_LIMIT = 64
_VALUES = frozenset((dict, list, tuple, set, str, bytes, int, float, bool, type(None), torch.Tensor, nn.Parameter))
"""The usual types of what is no object with state."""


_OBJECTS = (nn.Module, Optimizer)
_CONTAINERS = (dict, list, tuple)


class _StatefulEntry(Entry):
    """An object with a state_dict, which is handed memory of its own: it may clear what it has before it copies."""

    fills = False
    is_asked = True
    is_alike = True

    def __init__(self, place: Place, stateful: Stateful, beside: Beside) -> None:
        super().__init__(place)
        self._stateful = stateful
        self._beside = beside

    def current(self) -> object:
        with collector_awake():
            return self._stateful.state_dict()

    def fillable(self) -> object:
        try:
            return self.current()
        except Exception as exc:  # noqa: BLE001 (of an object that has no state before it was given one)
            logger.info("%s has no state yet (%s: %s); it takes what was saved", self.name, type(exc).__name__, exc)
            return {}

    def load(self, restored: object, live: object) -> None:
        state = self._beside.in_group_order(self._stateful, restored) if isinstance(restored, dict) else restored
        self._stateful.load_state_dict(cast("dict[str, object]", state))

    def backup(self) -> Callable[[], None] | None:
        return backup_of(self._stateful)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Ask an object that can tell before anything is changed."""
        if not isinstance(self._stateful, Choosy):
            return Misfit()
        found = self._stateful.state_dict_misfits(mapping_of(restored, self.name))
        return Misfit(reasons=[f"{self.name} {reason}" for reason in found])


class _ValueEntry(Entry):
    """A tensor, a container or a plain value: put back where it stands, in place where it can be."""

    is_itself = True

    def __init__(self, place: Place, shared: Collection[int]) -> None:
        """Restore the value at `place`; `shared` are ids of containers that stand in several places of the state."""
        super().__init__(place)
        self._shared = shared
        self._holder = cast("MutableMapping[object, object]", place.holder)
        self._key = place.key
        self.is_bound = not isinstance(place.holder, MutableMapping | MutableSequence)

    def current(self) -> object:
        return self._holder[self._key]

    def takes(self, name: str) -> bool:
        return False

    def load(self, restored: object, live: object) -> None:
        if not self._put_into(live, restored) and restored is not live:
            self._holder[self._key] = restored

    def _put_into(self, live: object, restored: object) -> bool:
        """Make what is live like what was restored, so that whoever holds it sees it; tell whether that was done."""
        if type(live) is not type(restored) or id(live) in self._shared:
            return False
        if isinstance(live, dict) and isinstance(restored, dict):
            merged = {key: self._merged(live.get(key), value) for key, value in restored.items()}
            live.clear()
            live.update(merged)
            if isinstance(live, defaultdict) and isinstance(restored, defaultdict):
                live.default_factory = restored.default_factory
            vars_of(live).update(vars_of(restored))
            return True
        if isinstance(live, list) and isinstance(restored, list):
            now = [*live, *[None] * len(restored)]
            live[:] = [self._merged(now[place], value) for place, value in enumerate(restored)]
            return True
        return set_generator(live, restored)

    def _merged(self, live: object, restored: object) -> object:
        return live if self._put_into(live, restored) else restored


def vars_of(value: object) -> dict[str, object]:
    """Return the attributes of a container that may have some (`_metadata` of a state_dict)."""
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}


def bind(state: MutableMapping[str, object]) -> list[Entry]:
    """Choose the adapter of each object in the caller's state.

    Raises:
        OptionsError: the state is no dict with string keys, is empty, or has a key that is not a plain name.
    """
    if not isinstance(state, MutableMapping) or not state:
        raise OptionsError(f"state is a {type(state).__name__}; give a non-empty dict such as {{'model': model}}")
    for name in state:
        if type(name) is not str or not name or name.startswith("cloudckpt."):
            what = f", a {type(name).__name__}," if type(name) is not str else ""
            raise OptionsError(
                f"state key {name!r}{what} is not a usable name; give a str that does not start with 'cloudckpt.'"
            )
    places = [place for name, value in state.items() for place in _places(Place([name], name, value, state, name))]
    plain = PlainModules()
    beside = Beside({place.name: place.value for place in places}, plain)
    values = [place.value for place in places if isinstance(place.value, _CONTAINERS)]
    shared = _held_twice(value for value in values if not _is_object(value))
    return [_entry(place, beside, shared, plain) for place in places]


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
    if isinstance(value, AccumulationWindow):
        return WindowEntry(place, value)
    if isinstance(value, PerRank) or is_stateful_loader(value):
        return PerRankEntry(place, cast("Stateful", value.inner if isinstance(value, PerRank) else value))
    if _is_object(value):
        return _StatefulEntry(place, cast("Stateful", value), beside)
    return _ValueEntry(place, shared)


def capture(entries: Sequence[Entry]) -> Flat:
    """Return every tensor and value of the state by name; tensors are the live ones, not copies."""
    flat = Flat()
    talked = {id(entry): entry.flat(entry.current()) for entry in in_common_order(entries) if entry.talks}
    for entry in entries:
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


def captured(state: MutableMapping[str, object], generators: Generators | None = None) -> Flat | Exception:
    """Return the leaves of a state, and the process's generators, or what an object raised when it was asked.

    An error is a value here, so that all ranks can be told of it.
    """
    try:
        flat = capture(bind(state))
        if generators is not None:
            flat.leaves[generators.name] = generators.pack()
    except Exception as exc:  # noqa: BLE001 (raised by whoever leads the ranks, on all of them)
        return exc
    return flat
