"""Match a state with a checkpoint before anything is read or changed: what is filled in place, what is made anew.

    entries + Saved ──▶ plan_restore ──▶ Restoration, or one error that lists all that differs
    Restoration:  early tensors read ─▶ ask ─▶ tensors filled ─▶ apply    (ask failed: undo, nothing was changed)

What a live object defines (a module, a container of tensors) must find all of its names, with their shapes and dtypes.
What the checkpoint defines (an optimizer, a scheduler, a loader, plain values) takes what was saved. A live tensor is
filled only where nothing else of the state lies in its memory. Knows names, shapes and entries; reads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from cloudckpt.errors import RestoreFailedError, StateMismatchError
from cloudckpt.format import Flat, JsonValue, PathElement, unflatten
from cloudckpt.root import Fit
from cloudckpt.state.entry import Entry, Left, Misfit, dtype_of, is_tensor, shape_of
from cloudckpt.state.overlap import conflict, is_one_memory, overlapping, overlaps_itself
from cloudckpt.state.per_rank import RankName

__all__ = ["Allowed", "Resize", "Restoration", "Saved", "plan_restore"]

logger = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_OURS = "cloudckpt."
_SHOWN = 8

Resize = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""Given a name, the saved tensor and the live one of another shape, return what the live one is to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What a restore may do where a state and a checkpoint differ.

    Attributes:
        strict: refuse names that only one of the two has; else those are left as they are.
        cast: let parameters and buffers of modules be cast from one floating-point dtype to another.
        materialize: the device on which module tensors that are on the meta device get memory; None refuses them.
        resize: makes of a saved tensor what a live one of another shape is to hold; None refuses it.
    """

    strict: bool = True
    cast: bool = False
    materialize: str | torch.device | None = None
    resize: Resize | None = None


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
        found: dict[str, dict[str, JsonValue]] = {}
        for name, note in self.notes.items():
            for prefix in [*_names_above(name), name]:
                found.setdefault(prefix, {})[name] = note
        return found

    def names(self) -> list[str]:
        """All names, in the order in which they were saved."""
        known = [name for name in self.paths if name in self.shapes or name in self.values]
        return known + [name for name in [*self.shapes, *self.values] if name not in self.paths]

    @cached_property
    def owned(self) -> Mapping[str, Mapping[RankName, str]]:
        """What each rank saved for itself: the name in the state → whose it is → the tensor's name."""
        found: dict[str, dict[RankName, str]] = {}
        for name in self.shapes:
            owner = RankName.parse(name)
            if owner is not None:
                found.setdefault(owner.name, {})[owner] = name
        return found

    def tied(self, name: str) -> str:
        """Return the first name of the memory that a tensor was in, which is its own if it had no other."""
        note = self.notes.get(name)
        return str(note.get("tied", name)) if isinstance(note, dict) else name

    def path(self, name: str) -> list[PathElement]:
        """Where a name stood in the nested state; a checkpoint that says nothing has dots in its names for steps.

        What the library itself saves beside the state stands nowhere in it.
        """
        return list(self.paths.get(name) or ([name] if name.startswith(_OURS) else name.split(".")))

    def below(self, path: Sequence[PathElement]) -> list[str]:
        """The names of all that stood at `path` or below it."""
        return self._by_prefix.get(_key(path), [])

    @cached_property
    def _by_prefix(self) -> Mapping[str, list[str]]:
        """Names by every path that leads to them: a state with many entries looks each of them up."""
        found: dict[str, list[str]] = {}
        for name in self.names():
            path = self.path(name)
            for depth in range(1, len(path) + 1):
                found.setdefault(_key(path[:depth]), []).append(name)
        return found


def _key(path: Sequence[PathElement]) -> str:
    return repr(list(path))


def _names_above(name: str) -> Iterator[str]:
    """Yield the names that lead to a name, from the top down."""
    return (name[:at] for at, character in enumerate(name) if character == ".")


def plan_restore(entries: Sequence[Entry], saved: Saved, allowed: Allowed) -> Restoration:
    """Match the state with a checkpoint; a module on the meta device has memory afterwards, if that is allowed.

    Args:
        entries: the bound state.
        saved: what the checkpoint holds.
        allowed: what may be done where they differ.

    Raises:
        StateMismatchError: names are missing or unexpected, shapes or dtypes differ, or memory is shared by tensors
            that cannot all be filled; lists all of them. Nothing was changed.
    """
    matching = _Matching(saved, allowed)
    for entry in entries:
        matching.match(entry)
    return matching.settle()


@dataclass(slots=True)
class _Part:
    """What of one entry is restored from where: a saved value, a tensor that is to be filled, or what is here."""

    entry: Entry
    nested: object = None
    live: Flat = field(default_factory=Flat)
    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[tuple[str, _Shape, torch.dtype], object] = field(default_factory=dict)
    is_shared: bool = False
    is_own: bool = False

    def restored(self) -> object:
        """Return the nested state of the entry, without the path that leads to it."""
        top = len(self.entry.path)
        below: dict[str, list[PathElement]] = {name: ["", *self.paths[name][top:]] for name in self.leaves}
        return unflatten(self.leaves, below).get("", {})

    def load(self) -> Left:
        left = self.entry.load(self.restored(), self.nested) if self.is_shared else None
        if self.is_own:
            self.entry.load_own(self.own)
        return left or Left()


@dataclass(frozen=True, slots=True)
class _Held:
    """A live tensor that is to be filled where it is."""

    part: _Part
    name: str
    tensor: object


@dataclass(frozen=True, slots=True)
class _Resized:
    """A live tensor that is to hold what is made of a saved one of another shape."""

    name: str
    live: torch.Tensor
    saved: torch.Tensor


class Restoration:
    """A restore of a state that fits, step by step.

    Attributes:
        early: name → tensor of memory of its own, to be filled before `ask`.
        unexpected: names that the checkpoint has and this rank's state lacks, and how each is told.
        tensors: name → tensor to be filled between `ask` and `apply`; many are live.
        fit: what of the state and of the checkpoint went together.
    """

    def __init__(self, parts: Sequence[_Part], allowed: Allowed, fit: Fit) -> None:
        self.early: dict[str, object] = {}
        self.tensors: dict[str, object] = {}
        self.unexpected: dict[str, str] = {}
        self.fit = fit
        self._parts = parts
        self._allowed = allowed
        self._shared: list[list[tuple[str, object, object]]] = []
        self._resized: list[_Resized] = []
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._undos: list[tuple[str, Callable[[], None] | None]] = []

    def compare_early(self, members: list[tuple[str, object, object]]) -> None:
        """Have `ask` compare tensors that share memory: (name, the live one, what it is to hold)."""
        self._shared.append(members)
        self.early.update({name: content for name, _, content in members})

    def resize_early(self, resized: _Resized) -> None:
        """Have `ask` make of a saved tensor what a live one is to hold."""
        self._resized.append(resized)
        self.early[resized.name] = resized.saved

    def leave(self, names: Collection[str]) -> None:
        """Leave out what the checkpoint has and no rank's state; changes nothing.

        Raises:
            StateMismatchError: the caller wants it restored.
        """
        unexpected = list(dict.fromkeys(told for name, told in self.unexpected.items() if name in names))
        if unexpected and self._allowed.strict:
            raise StateMismatchError(_mismatch_message([], unexpected, {}, []), unexpected=unexpected)
        self.fit = replace(self.fit, unexpected=tuple(unexpected))

    def ask(self) -> None:
        """Hand the state over to all objects that may refuse it.

        Raises:
            StateMismatchError: one does, or contents differ that are to go to the same memory. Nothing was changed,
                except what the message names.
        """
        for members in self._shared:
            if (pair := conflict(members)) is not None:
                raise StateMismatchError(
                    f"{pair[0]} and {pair[1]} share memory here and differ in the checkpoint; give each its own, or "
                    "restore a checkpoint of a model that ties them; nothing was restored"
                )
        self._new = [(one.live, self._made(one)) for one in self._resized]
        asked = [(part, part.entry.backup()) for part in self._parts if part.entry.is_asked]
        # Those that cannot be put back come last.
        for part, undo in sorted(asked, key=lambda pair: pair[1] is None):
            self._undos.append((part.entry.name, undo))
            try:
                part.load()
            except Exception as exc:
                changed = self.undo()
                but = f" but in {', '.join(changed)}, which cannot take its old state back" if changed else ""
                raise StateMismatchError(
                    f"{part.entry.name} refuses the state that was saved: {type(exc).__name__}: {exc}; nothing was "
                    f"changed{but}"
                ) from exc

    def _made(self, one: _Resized) -> torch.Tensor:
        if self._allowed.resize is None:
            raise StateMismatchError(f"{one.name} has another shape here than there")
        new = self._allowed.resize(one.name, one.saved, one.live.detach())
        if not isinstance(new, torch.Tensor) or new.shape != one.live.shape or new.dtype != one.live.dtype:
            what = f"{new.dtype} of {tuple(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise StateMismatchError(
                f"resize returned {what} for {one.name}, which is {one.live.dtype} of {tuple(one.live.shape)} here; "
                "nothing was restored"
            )
        return new

    def undo(self) -> list[str]:
        """Give the objects that `ask` has changed their old state back, last one first; return who keeps the new."""
        changed = []
        while self._undos:
            name, undo = self._undos.pop()
            try:
                if undo is None:
                    changed.append(name)
                else:
                    undo()
            except Exception:  # noqa: BLE001 (of a user's object; whatever it is, the others are to get theirs)
                changed.append(name)
        if changed:
            logger.warning("of a restore that failed, these keep what they were given: %s", _some(changed))
        return changed

    def apply(self) -> None:
        """Give all other objects their state, whose tensors are filled.

        Raises:
            RestoreFailedError: an object does not take it; says what was changed.
        """
        done = [part.entry.name for part in self._parts if part.entry.is_asked]
        with torch.no_grad():
            for live, new in self._new:
                live.copy_(new)
        for part in self._parts:
            if part.entry.is_asked:
                continue
            try:
                self._take(part.load(), part.entry.name)
            except Exception as exc:
                raise RestoreFailedError(
                    f"{part.entry.name} did not take the state that was saved: {exc}. It may be half restored, "
                    f"{', '.join(done) or 'nothing else'} is restored, and so are tensors that are filled in place; "
                    "load a checkpoint that fits before going on",
                    name=part.entry.name,
                    changed=done,
                ) from exc
            done.append(part.entry.name)
        _log(self.fit)

    def _take(self, left: Left, name: str) -> None:
        """Note what an object has left out by itself, or refuse that."""
        if not self._allowed.strict:
            fit = self.fit
            self.fit = replace(
                fit,
                missing=tuple(dict.fromkeys([*fit.missing, *left.missing])),
                unexpected=tuple(dict.fromkeys([*fit.unexpected, *left.unexpected])),
            )
        elif left.missing or left.unexpected:
            reasons = [f"it found no {_some(left.missing)}"] if left.missing else []
            reasons += [f"it has no use for {_some(left.unexpected)}"] if left.unexpected else []
            raise StateMismatchError(
                f"by its own loading {' and '.join(reasons)} (strict=False lets it)",
                missing=left.missing,
                unexpected=left.unexpected,
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _log(fit: Fit) -> None:
    if fit.missing:
        logger.warning("NOT in the checkpoint, and left as it is: %s", _some(fit.missing))
    if fit.unexpected:
        logger.warning("in the checkpoint and NOT restored: %s", _some(fit.unexpected))
    if fit.cast:
        logger.warning("restored into another dtype: %d tensors (%s)", len(fit.cast), _some(fit.cast))


class _Matching:
    """Collects, entry by entry, what is restored from where, and everything that does not fit."""

    def __init__(self, saved: Saved, allowed: Allowed) -> None:
        self._saved = saved
        self._allowed = allowed
        self._misfit = Misfit()
        self._mismatched: dict[str, tuple[_Shape, _Shape]] = {}
        self._claimed: set[str] = set()
        self._tops: set[str] = set()
        self._parts: list[_Part] = []
        self._held: dict[str, _Held] = {}
        self._on_meta: list[_Held] = []
        self._cast: list[str] = []
        self._early: dict[str, object] = {}
        self._tensors: dict[str, object] = {}
        self._shared: list[list[_Held]] = []
        self._resized: list[_Resized] = []
        self._moved: dict[str, list[str]] = {}

    def match(self, entry: Entry) -> None:
        """Decide where each name of one entry comes from."""
        in_checkpoint = self._saved.below(entry.path)
        owned = {name: found for name, found in self._saved.owned.items() if entry.holds_own(name)}
        self._claimed.update(in_checkpoint)
        self._claimed.update(owned)
        if not in_checkpoint and not owned:
            self._misfit.missing.append(entry.name)
            return
        sizes = {owner.size for found in owned.values() for owner in found}
        if sizes - {RankName.here(entry.name).size}:
            self._refuse_other_world(entry, sizes)
            return
        self._tops.add(str(entry.path[0]))
        entry.notes = self._saved.notes_on(entry.name)
        part = _Part(entry)
        self._parts.append(part)
        if in_checkpoint:
            self._match_shared(part, in_checkpoint)
        if owned:
            self._match_own(part, owned)

    def _match_shared(self, part: _Part, in_checkpoint: Sequence[str]) -> None:
        """Plan what all ranks share of an entry."""
        entry = part.entry
        part.is_shared = True
        part.nested = entry.fillable()
        part.live = live = entry.flat(part.nested)
        replaced: set[str] = set()
        for name in in_checkpoint:
            above = self._value_above(live, name)
            replaced.update([above] if above else [])
            if entry.takes(name):
                part.paths[name] = self._saved.path(name)
                self._take(part, name)
            elif name in live.leaves:
                part.paths[name] = live.paths[name]
                self._fill(part, name)
            elif above is not None and not entry.pins:
                rest = self._saved.path(name)[len(live.paths[above]) :]
                part.paths[name] = [*live.paths[above], *rest]
                self._take(part, name)
            else:
                self._misfit.unexpected.append(name)
        for name, current in live.leaves.items():
            if name not in part.leaves and name not in replaced and not entry.takes(name):
                self._misfit.missing.append(name)
                part.leaves[name], part.paths[name] = current, live.paths[name]

    def _value_above(self, live: Flat, name: str) -> str | None:
        """Return which value of the live state stands where a container was that held what was saved as `name`."""
        return next((one for one in _names_above(name) if one in live.leaves and not is_tensor(live.leaves[one])), None)

    def _take(self, part: _Part, name: str) -> None:
        """Have a saved value or tensor taken as it is; the tensor into live memory only if that fits exactly."""
        if name in self._saved.values:
            part.leaves[name] = self._saved.values[name]
            return
        current = part.live.leaves.get(name)
        if (
            part.entry.pins
            and is_tensor(current)
            and _has_form(current)
            and shape_of(current) == self._saved.shapes[name]
        ):
            self._fits_dtype(part, name, current)  # what loads by itself ends in a copy that casts, mostly
        if part.entry.fills and self._is_alike(current, name) and not part.entry.pins:
            part.leaves[name] = current
            self._held[name] = _Held(part, name, current)
        else:
            self._give_own(part, name)

    def _is_alike(self, current: object, name: str) -> bool:
        if not is_tensor(current) or not _has_form(current) or _is_on_meta(current):
            return False
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        return shape_of(current) == shape and dtype_of(current) == dtype

    def _give_own(self, part: _Part, name: str) -> None:
        # What was one memory is one again, as it is after torch.load: an lr that two groups share, say.
        tied = self._saved.tied(name), self._saved.shapes[name], self._saved.dtypes[name]
        if tied in part.tied:
            part.leaves[name] = part.tied[tied]
            return
        target = part.leaves[name] = part.tied[tied] = self._own(part, name)
        (self._early if part.entry.is_asked else self._tensors)[name] = target

    def _own(self, part: _Part, name: str) -> object:
        """Return new memory for a saved tensor: on the device, and cut over the ranks, as the live one of that name."""
        current = part.live.leaves.get(name)
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        if is_tensor(current) and _has_form(current) and shape_of(current) == shape and not _is_on_meta(current):
            new = _empty_like(current, dtype)
            if new is not None:
                return new
        return part.entry.allocate(self._saved.path(name)[len(part.entry.path) :], shape, dtype)

    def _fill(self, part: _Part, name: str) -> None:
        """Have what was saved under a name go to the live tensor of that name, or to the place of a live value."""
        current = part.live.leaves[name]
        if not is_tensor(current):
            if part.entry.pins and name not in self._saved.values:
                self._misfit.reasons.append(f"{name} is a value here and a tensor there")
            self._take(part, name)
            return
        part.leaves[name] = current
        if name in self._saved.values:
            self._misfit.reasons.append(f"{name} is a tensor here and a value there")
        elif not _has_form(current):
            self._misfit.reasons.append(f"{name} has no shape yet (run a batch through the module first)")
        elif shape_of(current) != self._saved.shapes[name]:
            self._resize(part, name, current)
        elif self._fits_dtype(part, name, current):
            held = _Held(part, name, current)
            if not _is_on_meta(current):
                self._held[name] = held
            elif part.entry.pins and self._allowed.materialize is not None:
                self._on_meta.append(held)
            else:
                self._misfit.reasons.append(
                    f"{name} is on the meta device and has no memory (pass materialize='cpu' or another device, or "
                    "call to_empty on the module first)"
                )

    def _resize(self, part: _Part, name: str, current: object) -> None:
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        if self._allowed.resize is None or isinstance(current, ShardedTensor) or _is_on_meta(current):
            self._mismatched[name] = (shape_of(current), shape)
            return
        live = cast("torch.Tensor", current)
        if isinstance(live, DTensor):
            saved: torch.Tensor = empty_dtensor(
                shape, dtype=dtype, device_mesh=live.device_mesh, placements=live.placements
            )
        else:
            saved = torch.empty(shape, dtype=dtype, device=live.device)
        self._resized.append(_Resized(name, live, saved))

    def _fits_dtype(self, part: _Part, name: str, current: object) -> bool:
        """Tell whether a live tensor can hold a saved one: exactly, or cast where the caller says so."""
        here, there = dtype_of(current), self._saved.dtypes[name]
        if here == there:
            return True
        is_float = (here.is_floating_point and there.is_floating_point) or part.entry.takes(name)
        if _holds_all_of(here, there) or (is_float and self._allowed.cast and part.entry.may_be_cast):
            self._cast.append(name)
            return True
        advice = " (cast=True converts it)" if is_float and part.entry.may_be_cast else ""
        self._misfit.reasons.append(f"{name} is {here} here and {there} there{advice}")
        return False

    def _match_own(self, part: _Part, owned: Mapping[str, Mapping[RankName, str]]) -> None:
        """Plan what this rank has saved for itself."""
        part.is_own = True
        for name, found in owned.items():
            full = found.get(RankName.here(name))
            if full is None:
                continue
            target = part.entry.allocate_own(name, self._saved.shapes[full], self._saved.dtypes[full])
            if target is None:
                self._misfit.reasons.append(f"{name}, each rank's own, has no place here as it was saved")
            else:
                part.own[name] = target
                (self._early if part.entry.is_asked else self._tensors)[full] = target

    def _refuse_other_world(self, entry: Entry, sizes: set[int]) -> None:
        """Refuse what only the ranks of the saving world can take; without `strict` the entry stays as it is."""
        here = RankName.here(entry.name).size
        there, is_are = max(sizes - {here}), "are" if here > 1 else "is"
        text = f"{entry.name} was saved by {_ranks(there)}, each for itself, and here {is_are} {_ranks(here)}"
        if self._allowed.strict:
            self._misfit.reasons.append(
                f"{text} ({entry.other_world}; or pass strict=False, and it stays as it is while the rest is restored)"
            )
        else:
            logger.warning("%s: it is NOT restored and stays as it is", text)
            self._misfit.missing.append(entry.name)

    # -- all entries together ----------------------------------------------------------------------------------

    def settle(self) -> Restoration:
        """Find what shares memory, refuse what does not fit, and say how the restore goes."""
        self._part_memory()
        for part in self._parts:
            if part.is_shared:
                self._add(part.entry.compare(part.restored(), self._saved.dtypes))
        self._refuse_mismatch()
        for name, pairs in self._moved.items():
            logger.warning("%s shares memory and gets memory of its own: %s", name, _some(pairs))
        self._materialize()
        self._tensors.update({name: held.tensor for name, held in self._held.items()})
        fit = Fit(missing=tuple(dict.fromkeys(self._misfit.missing)), cast=tuple(self._cast))
        restoration = Restoration(self._parts, self._allowed, fit)
        restoration.unexpected = {name: self._shown(name) for name in self._misfit.unexpected}
        restoration.early.update(self._early)
        restoration.tensors.update(self._tensors)
        for group in self._shared:
            restoration.compare_early([(held.name, held.tensor, self._own(held.part, held.name)) for held in group])
        for resized in self._resized:
            restoration.resize_early(resized)
        return restoration

    def _part_memory(self) -> None:
        """See to it that what is filled in place is filled by one name only."""
        for held in [held for held in self._held.values() if overlaps_itself(held.tensor)]:
            if held.part.entry.pins:
                self._misfit.reasons.append(
                    f"{held.name} has elements that share memory (an expanded tensor), clone it first"
                )
            else:
                self._move(held, "itself")
        # Also what is not filled in place: an object writes there when it loads.
        live = {
            name: _Held(part, name, leaf)
            for part in self._parts
            for name, leaf in part.live.leaves.items()
            if name in self._saved.shapes and is_tensor(leaf)
        }
        for names in overlapping((name, held.tensor) for name, held in live.items()):
            self._part_group([live[name] for name in names])

    def _part_group(self, group: Sequence[_Held]) -> None:
        """Leave the memory to those whose tensors are meant themselves: a module's first, then a container's."""
        filled = [held for held in group if held.name in self._held]
        if not filled:
            return
        claim = min(map(_claim, filled))
        writing = [held for held in group if held not in filled and held.part is not filled[0].part]
        if claim == _LAST_CLAIM or (claim and writing):
            staying = []
        else:
            staying = [held for held in filled if _claim(held) == claim]
        owner = min(group, key=_claim)
        for held in filled:
            if held not in staying:
                self._move(held, (owner if owner is not held else group[-1]).name)
        self._share([*staying, *(held for held in writing if staying and held.part.entry.may_write)], len(staying))

    def _share(self, group: Sequence[_Held], filled: int) -> None:
        """Have several names go to one memory, if they are to hold the same; the first of them are `filled`."""
        if len(group) < 2:
            return
        is_one = is_one_memory([held.tensor for held in group])
        if not is_one or len({self._saved.tied(held.name) for held in group}) > 1:
            self._shared.append(list(group))
        if is_one:
            for held in group[1:filled]:
                del self._held[held.name]

    def _move(self, held: _Held, other: str) -> None:
        """Give a tensor that is to be filled memory of its own."""
        if not held.part.entry.takes(held.name):
            if held.part.entry.is_bound:
                self._misfit.reasons.append(f"{held.name} shares memory with {other} and stands in a tuple; clone it")
            self._moved.setdefault(held.part.entry.name, []).append(f"{held.name} with {other}")
        del self._held[held.name]
        self._give_own(held.part, held.name)

    def _materialize(self) -> None:
        device = self._allowed.materialize
        if device is None:
            return
        wanted: dict[int, list[_Held]] = {}
        for held in self._on_meta:
            wanted.setdefault(id(held.part), []).append(held)
        for part in [part for part in self._parts if part.is_shared and part.entry.pins]:
            of_part = wanted.get(id(part), [])
            left = part.entry.materialize(device, [held.name for held in of_part])
            if left:
                logger.warning("NOT in the checkpoint, and left on the meta device: %s", _some(left))
            if not of_part:
                continue
            part.nested = part.entry.fillable()
            part.live = part.entry.flat(part.nested)
            for held in of_part:
                part.leaves[held.name] = tensor = part.live.leaves[held.name]
                self._held[held.name] = _Held(part, held.name, tensor)
        self._on_meta = []

    def _add(self, misfit: Misfit) -> None:
        self._misfit.missing += misfit.missing
        self._misfit.unexpected += misfit.unexpected
        self._misfit.reasons += misfit.reasons

    def _refuse_mismatch(self) -> None:
        """Raise once, with everything that does not fit."""
        misfit = self._misfit
        misfit.unexpected += self._unclaimed()
        if not any(part.is_own or _is_restored(part, self._saved) for part in self._parts):
            misfit.reasons.append("nothing of the checkpoint belongs to anything in the state")
        missing = list(dict.fromkeys(misfit.missing if self._allowed.strict else ()))
        if not (missing or self._mismatched or misfit.reasons):
            return
        unexpected = list(dict.fromkeys(map(self._shown, misfit.unexpected if self._allowed.strict else ())))
        raise StateMismatchError(
            _mismatch_message(missing, unexpected, self._mismatched, misfit.reasons),
            missing=missing,
            unexpected=unexpected,
            mismatched=self._mismatched,
        )

    def _unclaimed(self) -> list[str]:
        """Return what is in the checkpoint and belongs to no entry."""
        found = [
            name
            for name in self._saved.names()
            if name not in self._claimed and not str(self._saved.path(name)[0]).startswith(_OURS)
        ]
        for name in self._saved.owned:
            if name not in self._claimed:
                found.append(name)
                if name in self._misfit.missing and self._allowed.strict:
                    self._misfit.reasons.append(
                        f"{name} is each rank's own there (give PerRank or a StatefulDataLoader)"
                    )
        return found

    def _shown(self, name: str) -> str:
        """Return what is told of a name: an entry that is in the checkpoint alone counts as one."""
        top = str(self._saved.path(name)[0])
        return name if top in self._tops or top.startswith(_OURS) else top


def _is_restored(part: _Part, saved: Saved) -> bool:
    return any(name in saved.shapes or name in saved.values for name in part.leaves if name in part.paths)


_LAST_CLAIM = 2


def _claim(held: _Held) -> int:
    """Return whose memory it rather is: 0 a module's, 1 a container's, 2 of an object that takes any."""
    if held.part.entry.pins:
        return 0
    return _LAST_CLAIM if held.part.entry.takes(held.name) else 1


def _has_form(tensor: object) -> bool:
    """Tell whether a tensor has a shape, and memory of some kind or none at all."""
    is_lazy = isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer)
    return not is_lazy and type(tensor).__name__ != "FakeTensor"


def _is_on_meta(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, ShardedTensor) and tensor.is_meta


def _holds_all_of(here: torch.dtype, there: torch.dtype) -> bool:
    """Tell whether a dtype has every number of another one of its kind (not of bool: that is no number)."""
    kinds = [(dtype.is_floating_point, dtype.is_complex, dtype == torch.bool) for dtype in (here, there)]
    if kinds[0] != kinds[1]:
        return False
    try:
        return torch.promote_types(here, there) == here
    except RuntimeError:  # 8-bit floats promote to nothing
        return False


def _empty_like(tensor: object, dtype: torch.dtype) -> torch.Tensor | None:
    """Return new memory like a tensor of PyTorch's own kinds; None for another one."""
    if isinstance(tensor, DTensor):
        return torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer):
        plain = cast("torch.Tensor", tensor)
        return torch.empty(plain.shape, dtype=dtype, device=plain.device)
    return None


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _mismatch_message(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[_Shape, _Shape]],
    reasons: Sequence[str],
) -> str:
    parts = ["the state and the checkpoint do not fit, and nothing was restored"]
    advice = []
    if mismatched:
        shapes = ", ".join(f"{name} is {here} here and {there} there" for name, (here, there) in mismatched.items())
        parts.append(f"shapes that differ: {shapes}")
        advice.append("pass resize=, which makes a tensor of the shape here out of the saved one")
    parts += reasons
    if missing:
        parts.append(f"in the state and not in the checkpoint: {', '.join(missing)}")
    if unexpected:
        parts.append(f"in the checkpoint and not in the state: {', '.join(unexpected)}")
    if missing or unexpected:
        advice.append("pass strict=False to restore what both have")
    parts.append(", or ".join(["restore into the same model", *advice]))
    return "; ".join(parts)
