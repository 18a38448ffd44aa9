"""Match a state with a checkpoint before anything is read or changed: what is filled in place, what is made anew.

    entries + Saved ──▶ plan_restore ──▶ Restoration, or one error that lists all that differs

What a live object defines (a module, a container of tensors) must find all of its names, with their shapes and dtypes.
What the checkpoint defines (an optimizer, a scheduler, a loader, plain values) takes what was saved. A live tensor is
filled only where nothing else of the state lies in its memory. Knows names, shapes and entries; reads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import nn

from cloudckpt.errors import CloudCkptError
from cloudckpt.format import Flat, PathElement, codec
from cloudckpt.late import DTensor, ShardedTensor
from cloudckpt.root import Fit
from cloudckpt.state.attributes import names_above
from cloudckpt.state.choosing import is_chosen, parted, shared_with
from cloudckpt.state.entry import Entry, Misfit, dtype_of, in_common_order, is_tensor, shape_of
from cloudckpt.state.overlap import identity, is_one_memory, overlapping, overlaps_itself, without_memory
from cloudckpt.state.per_rank import RankName
from cloudckpt.state.restoration import Allowed, Part, Resized, Restoration, mismatch
from cloudckpt.state.saved import OURS, Saved
from cloudckpt.state.tensors import TensorsEntry

__all__ = ["plan_restore"]

logger = logging.getLogger(__name__)

_Shape = tuple[int, ...]


def plan_restore(entries: Sequence[Entry], saved: Saved, allowed: Allowed) -> Restoration:
    """Match the state with a checkpoint; a module on the meta device has memory afterwards, if that is allowed.

    Args:
        entries: the bound state.
        saved: what the checkpoint holds.
        allowed: what may be done where they differ.

    Raises:
        OptionsError: `only` names what the state has not.
        StateMismatchError: names are missing or unexpected, shapes or dtypes differ, or memory is shared by tensors
            that cannot all be filled; lists all of them. Nothing was changed.
    """
    chosen, staying = parted(entries, allowed.chosen)
    matching = _Matching(saved, allowed, staying)
    for entry in in_common_order(chosen):
        matching.match(entry)
    return matching.settle()


@dataclass(slots=True, eq=False)  # not frozen: that makes each of tens of thousands take three times as long
class _Held:
    """A live tensor that is to be filled where it is."""

    part: Part
    name: str
    tensor: object


class _Matching:
    """Collects, entry by entry, what is restored from where, and everything that does not fit."""

    def __init__(self, saved: Saved, allowed: Allowed, staying: Sequence[Entry]) -> None:
        self._saved = saved
        self._allowed = allowed
        self._staying = staying
        self._misfit = Misfit()
        self._mismatched: dict[str, tuple[_Shape, _Shape]] = {}
        self._claimed: set[str] = set()
        self._tops: set[str] = set()
        self._parts: list[Part] = []
        self._held: dict[str, _Held] = {}
        self._on_meta: list[_Held] = []
        self._cast: list[str] = []
        self._lacking: list[str] = []
        self._stateless: list[str] = []
        self._early: dict[str, object] = {}
        self._tensors: dict[str, object] = {}
        self._shared: list[list[_Held]] = []
        self._free: list[list[_Held]] = []  # nobody but objects that are asked has the memory
        self._resized: list[Resized] = []
        self._moved: dict[str, list[str]] = {}
        self._part_of: dict[str, Part] = {}

    def match(self, entry: Entry) -> None:
        """Decide where each name of one entry comes from."""
        if self._match_whole(entry):
            return
        if isinstance(entry, TensorsEntry):
            for one in entry.singly():
                self.match(one)
            return
        in_checkpoint = self._saved.below(entry.path)
        owned = {name: found for name, found in self._saved.owned.items() if entry.holds_own(name)}
        self._claimed.update(in_checkpoint)
        self._claimed.update(owned)
        if not (in_checkpoint or owned or entry.is_beside):
            self._misfit.missing.append(entry.name)
            return
        sizes = {owner.size for found in owned.values() for owner in found}
        if sizes and not entry.is_elastic and sizes != {RankName.here(entry.name).size}:
            self._refuse_other_world(entry, sizes)
            return
        part = self._begin(Part(entry))
        if in_checkpoint:
            self._match_shared(part, in_checkpoint)
        if owned or entry.is_beside:
            self._match_own(part, owned)

    def _begin(self, part: Part) -> Part:
        entry = part.entry
        self._tops.update(entry.tops)
        if entry.name:
            entry.notes = self._saved.notes_on(entry.name)
        elif self._saved.notes:
            entry.notes = {name: note for top in entry.tops for name, note in self._saved.notes_on(top).items()}
        entry.is_strict = self._allowed.strict
        self._parts.append(part)
        return part

    def _match_whole(self, entry: Entry) -> bool:
        """Plan to fill all of an entry where it is, if it is tensors alone and these were saved; else do nothing.

        A state may have many thousands of small modules, and of most there is nothing else to say. What was saved
        beside the tensors stays unclaimed.
        """
        nested = entry.plain_tensors()
        if not nested:
            return False
        live = entry.flat(nested)
        shapes, dtypes, paths = self._saved.shapes, self._saved.dtypes, self._saved.paths
        for name, tensor in cast("Mapping[str, torch.Tensor]", live.leaves).items():
            if (
                tensor.size() != shapes.get(name)
                or tensor.dtype is not dtypes[name]
                or tensor.is_meta
                or live.paths[name] != paths.get(name)
            ):
                return False
        part = self._begin(Part(entry, nested, live, live.leaves, live.paths, is_shared=True))
        self._claimed.update(live.leaves)
        self._held.update({name: _Held(part, name, tensor) for name, tensor in live.leaves.items()})
        return True

    def _match_shared(self, part: Part, in_checkpoint: Sequence[str]) -> None:
        """Plan what all ranks share of an entry."""
        entry = part.entry
        part.is_shared = True
        part.nested = entry.fillable()
        part.live = live = entry.flat(part.nested)
        replaced: set[str] = set()
        for name in in_checkpoint:
            above = None if name in live.leaves else self._value_above(live, name)
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
                self._part_of[name] = part
                part.leaves[name], part.paths[name] = current, live.paths[name]
        if not entry.pins and all(map(self._is_of_container, part.paths)):
            # The types of containers, and of keys, are the saved ones.
            part.paths = {name: self._saved.path(name) for name in part.paths}

    def _is_of_container(self, name: str) -> bool:
        return name in self._saved.paths and not self._saved.is_of_module(name)

    def _value_above(self, live: Flat, name: str) -> str | None:
        """Return which value of the live state stands where a container was that held what was saved as `name`."""
        return next((one for one in names_above(name) if one in live.leaves and not is_tensor(live.leaves[one])), None)

    def _take(self, part: Part, name: str) -> None:
        """Have a saved value or tensor taken as it is; the tensor into live memory only if that fits exactly."""
        if name in self._saved.values:
            part.leaves[name] = self._saved.values[name]
            if part.entry.is_itself and not part.entry.pins and self._saved.is_stateless_module(name):
                self._stateless.append(name)
            return
        current = part.live.leaves.get(name)
        shape = self._saved.shapes[name]
        if part.entry.pins and is_tensor(current) and _has_form(current) and not part.entry.hands_over(name):
            if shape_of(current) == shape:
                self._fits_dtype(part, name, current)  # what loads by itself ends in a copy that casts, mostly
            if _is_on_meta(current):
                self._wait_for_memory(part, name)
        below = self._saved.path(name)[len(part.entry.path) :]
        if (here := part.entry.shape_here(below, shape, self._saved.shapes.get)) != shape:
            self._resize(part, name, self._like(part, name, below, here), is_live=False)
            return
        if part.entry.fills and self._is_alike(current, name) and not part.entry.pins:
            part.leaves[name] = current
            self._held[name] = _Held(part, name, current)
        else:
            self._give_own(part, name)

    def _like(self, part: Part, name: str, below: Sequence[PathElement], shape: _Shape) -> object:
        """Return what is resized for an object that takes it as it is: what it has, else zeros."""
        current, dtype = part.live.leaves.get(name), self._saved.dtypes[name]
        if is_tensor(current) and _has_form(current) and (shape_of(current), dtype_of(current)) == (shape, dtype):
            return current
        made = part.entry.allocate(below, shape, dtype)
        return made if isinstance(made, ShardedTensor) else made.zero_()

    def _is_alike(self, current: object, name: str) -> bool:
        if not is_tensor(current) or not _has_form(current) or _is_on_meta(current):
            return False
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        return shape_of(current) == shape and dtype_of(current) == dtype

    def _give_own(self, part: Part, name: str) -> None:
        note = self._saved.notes.get(name)
        if isinstance(note, dict) and "subclass" in note and not part.entry.pins:
            self._misfit.reasons.append(f"{name} was a {note['subclass']}; put one there, which is filled")
        # What was one memory is one again, as it is after torch.load: an lr that two groups share, say.
        tied = self._saved.tied(name), self._saved.shapes[name], self._saved.dtypes[name]
        if tied in part.tied:
            part.leaves[name] = part.tied[tied]
            return
        target = part.leaves[name] = part.tied[tied] = self._own(part, name)
        (self._early if part.entry.is_asked else self._tensors)[name] = target

    def _own(self, part: Part, name: str) -> object:
        """Return new memory for a saved tensor: on the device, and cut over the ranks, as the live one of that name."""
        current = part.live.leaves.get(name)
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        if is_tensor(current) and _has_form(current) and shape_of(current) == shape and not _is_on_meta(current):
            new = _empty_like(current, dtype)
            if new is not None:
                return new
        return part.entry.allocate(self._saved.path(name)[len(part.entry.path) :], shape, dtype)

    def _fill(self, part: Part, name: str) -> None:
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
            is_fake = type(current).__name__ == "FakeTensor"
            what = "is a fake tensor, which has no memory" if is_fake else "has no shape yet"
            self._misfit.reasons.append(f"{name} {what} (make it a real one first)")
        elif shape_of(current) != self._saved.shapes[name]:
            self._resize(part, name, current, is_live=True)
        elif self._fits_dtype(part, name, current):
            if _is_on_meta(current):
                self._wait_for_memory(part, name)
            else:
                self._held[name] = _Held(part, name, current)

    def _wait_for_memory(self, part: Part, name: str) -> None:
        """Have a tensor on the meta device filled once it has memory, if it may get some."""
        if part.entry.pins and self._allowed.materialize is not None:
            self._on_meta.append(_Held(part, name, part.live.leaves[name]))
        else:
            self._misfit.reasons.append(
                f"{name} is on the meta device and has no memory (pass materialize='cpu' or another device, or call "
                "to_empty on the module first)"
            )

    def _resize(self, part: Part, name: str, current: object, *, is_live: bool) -> None:
        shape, dtype = self._saved.shapes[name], self._saved.dtypes[name]
        if self._allowed.resize is None or isinstance(current, ShardedTensor) or _is_on_meta(current):
            self._mismatched[name] = (shape_of(current), shape)
            return
        live = cast("torch.Tensor", current)
        if isinstance(live, DTensor):
            from torch.distributed.tensor import empty as empty_dtensor

            saved: torch.Tensor = empty_dtensor(
                shape, dtype=dtype, device_mesh=live.device_mesh, placements=live.placements
            )
        else:
            saved = torch.empty(shape, dtype=dtype, device=live.device)
        self._resized.append(Resized(part, name, live, saved, is_live=is_live))
        part.leaves[name] = live

    def _fits_dtype(self, part: Part, name: str, current: object) -> bool:
        """Tell whether a live tensor can hold a saved one: exactly, or cast where the caller says so."""
        here, there = dtype_of(current), self._saved.dtypes[name]
        if here == there:
            return True
        is_float = here.is_floating_point and there.is_floating_point
        if _holds_all_of(here, there) or (is_float and self._allowed.cast and part.entry.may_be_cast):
            self._cast.append(name)
            return True
        advice = " (cast=True converts it)" if is_float and part.entry.may_be_cast else ""
        self._misfit.reasons.append(f"{name} is {here} here and {there} there{advice}")
        return False

    def _match_own(self, part: Part, owned: Mapping[str, Mapping[RankName, str]]) -> None:
        """Plan what this rank has saved for itself."""
        part.is_own = True
        for name, found in owned.items():
            mine = RankName.here(name)
            if part.entry.is_elastic:
                part.entry.others = len(found)
                mine = replace(mine, size=max(owner.size for owner in found))
            full = found.get(mine)
            if full is None and part.entry.is_elastic:
                self._lacking += [] if part.entry.is_beside else [part.entry.name]
                continue  # who has nothing to take is told so when the rest is applied
            if full is None:
                if name == part.entry.name:  # all that it has, and not one parameter's of many
                    self._misfit.missing.append(name)
                    part.is_own = False
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
        self._refuse_doubles()
        for part in self._parts:
            if part.is_shared:
                self._add(part.misfit(self._saved.dtypes))
        self._refuse_mismatch()
        self._tensors.update({name: held.tensor for name, held in self._held.items()})
        fit = Fit(missing=tuple(dict.fromkeys([*self._misfit.missing, *self._lacking])), cast=tuple(self._cast))
        restoration = Restoration(self._parts, self._allowed, fit)
        restoration.unexpected = {name: self._shown(name) for name in self._misfit.unexpected}
        restoration.of_modules = {name for name in restoration.unexpected if self._saved.is_of_module(name)}
        restoration.moved, restoration.stateless = self._moved, self._stateless
        restoration.early.update(self._early)
        restoration.tensors.update(self._tensors)
        for group in self._shared:
            members = [(held.name, held.tensor, self._compared(held, restoration)) for held in group]
            restoration.compare_early(members)
        for group in self._free:
            restoration.watch([(held.name, held.tensor, held.part.leaves[held.name]) for held in group])
        for resized in self._resized:
            restoration.resize_early(resized)
        for held in self._on_meta:
            restoration.materialize_later(held.part.entry, held.name)
        self._check_filled(restoration)
        return restoration

    def _compared(self, held: _Held, restoration: Restoration) -> object:
        """Return what a tensor is to hold, read early: what its object is handed, or memory for this alone."""
        given = held.part.leaves.get(held.name)
        if held.part.entry.is_asked and given is not held.tensor:
            return given
        # One of several parts may share memory with others in more than one place.
        if held.name not in restoration.early:
            restoration.early[held.name] = self._own(held.part, held.name)
        return restoration.early[held.name]

    def _check_filled(self, restoration: Restoration) -> None:
        """See to it that nobody is handed memory that was made here and is not read.

        Raises:
            CloudCkptError: somebody would be, by an error of ours.
        """
        early = set(map(id, restoration.early.values()))
        read = early.union(map(id, restoration.tensors.values()))
        resized = {one.name for one in self._resized}  # made when they are asked
        for part in self._parts:
            given = {} if part.is_filled() else part.leaves
            live = part.live.leaves
            made = {
                name: leaf
                for name, leaf in (*given.items(), *part.own.items())
                if leaf is not live.get(name) and name not in self._saved.values and name not in resized
            }
            for name, leaf in made.items():
                if id(leaf) not in (early if part.entry.is_asked else read):
                    raise CloudCkptError(
                        f"{name} would be memory that nothing fills, by an error in cloudckpt; nothing was restored. "
                        "Report it, and restore the state without it meanwhile"
                    )

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
            name: self._held.get(name) or _Held(part, name, leaf)
            for part in self._parts
            for name, leaf in part.live.leaves.items()
            if name in self._saved.shapes and is_tensor(leaf)
        }
        if self._staying:
            self._misfit.reasons += shared_with(self._staying, {name: held.tensor for name, held in live.items()})
        for names in overlapping((name, held.tensor) for name, held in live.items()):
            self._part_group([live[name] for name in names])
        for names in without_memory((held.name, held.tensor) for held in self._on_meta):
            self._share([live[name] for name in names], 0)

    def _part_group(self, group: Sequence[_Held]) -> None:
        """Leave the memory to those whose tensors are meant themselves: a module's first, then a container's."""
        self._refuse_resized(group)
        filled = [held for held in group if held.name in self._held]
        if not filled:
            self._share(self._written(group), 0)
            return
        claim = min(map(_claim, filled))
        writing = [held for held in group if held not in filled and held.part is not filled[0].part]
        if claim == _LAST_CLAIM or (claim and writing):
            staying = []
        else:
            staying = [held for held in filled if _claim(held) == claim]
        owner = min(group, key=_claim)
        for held in filled:
            if held in staying:
                continue
            if claim < _claim(held) < _LAST_CLAIM and self._is_tied(held, staying[0]):
                del self._held[held.name]  # it is filled by the other name, and stays one with it
            else:
                self._move(held, (owner if owner is not held else group[-1]).name)
        self._share([*staying, *self._written(group)], len(staying))

    def _written(self, group: Sequence[_Held]) -> list[_Held]:
        """Return those of a group that their objects may write into when they load, from memory of their own."""
        return [
            held
            for held in group
            if held.part.entry.may_write and held.part.leaves.get(held.name, held.tensor) is not held.tensor
        ]

    def _share(self, group: Sequence[_Held], filled: int) -> None:
        """Have several names go to one memory, if they are to hold the same; the first of them are `filled`."""
        if len(group) < 2:
            return
        is_one = is_one_memory([held.tensor for held in group])
        if not is_one or len({self._saved.tied(held.name) for held in group}) > 1:
            is_free = filled == 0 and not any(held.part.entry.pins for held in group)
            (self._free if is_free else self._shared).append(list(group))
        if is_one:
            for held in group[1:filled]:
                del self._held[held.name]

    def _is_tied(self, one: _Held, other: _Held) -> bool:
        """Tell whether two names are one memory here and were one when they were saved."""
        is_one = is_one_memory([one.tensor, other.tensor])
        return is_one and self._saved.tied(one.name) == self._saved.tied(other.name)

    def _refuse_doubles(self) -> None:
        """Refuse to hand one object two states: the last one would stay."""
        seen: dict[int, Part] = {}
        for part in [part for part in self._parts if part.entry.is_asked]:
            first = seen.setdefault(id(part.entry.subject), part)
            if first is not part and self._contents(first) != self._contents(part):
                self._misfit.reasons.append(
                    f"{first.entry.name} and {part.entry.name} are one object here and differ in the checkpoint"
                )

    def _contents(self, part: Part) -> dict[str, object]:
        """Return what an entry is to hold, so far as that can be told before it is read."""
        top = len(part.entry.name)
        return {
            name[top:]: codec.encode(self._saved.values[name], key=name)
            if name in self._saved.values
            else self._saved.tied(name)
            for name in part.leaves
        }

    def _refuse_resized(self, group: Sequence[_Held]) -> None:
        """Refuse what is resized and shares memory, but for one tensor that has several names."""
        resized = [one for one in self._resized if one.is_live and any(held.name == one.name for held in group)]
        if not resized:
            return
        if len(resized) == len(group) and all(self._is_tied(group[0], held) for held in group):
            self._resized = [one for one in self._resized if one not in resized[1:]]
        else:
            names = ", ".join(held.name for held in group)
            self._misfit.reasons.append(f"{names} share memory, and not all of it has the shape that was saved")

    def _move(self, held: _Held, other: str) -> None:
        """Give a tensor that is to be filled memory of its own."""
        if not held.part.entry.takes(held.name):
            if held.part.entry.is_bound:
                self._misfit.reasons.append(f"{held.name} shares memory with {other} and stands in a tuple; clone it")
            self._moved.setdefault(held.part.entry.name or held.name, []).append(f"{held.name} with {other}")
        del self._held[held.name]
        if held.part.leaves is held.part.live.leaves:  # all of them were to be filled where they are
            held.part.leaves = dict(held.part.leaves)
        self._give_own(held.part, held.name)

    def _add(self, misfit: Misfit) -> None:
        self._misfit.missing += misfit.missing
        self._misfit.unexpected += misfit.unexpected
        self._misfit.reasons += misfit.reasons

    def _refuse_mismatch(self) -> None:
        """Raise once, with everything that does not fit."""
        misfit = self._misfit
        misfit.unexpected += self._unclaimed()
        misfit.missing = [name for name in misfit.missing if not self._is_filled_by_another_name(name)]
        if not any(
            (part.is_own and not part.entry.is_beside) or _is_restored(part, self._saved) for part in self._parts
        ):
            misfit.reasons.append("nothing of the checkpoint belongs to anything in the state")
        missing = list(dict.fromkeys(misfit.missing if self._allowed.strict else ()))
        if not (missing or self._mismatched or misfit.reasons):
            return
        unexpected = list(dict.fromkeys(map(self._shown, misfit.unexpected if self._allowed.strict else ())))
        raise mismatch(missing, unexpected, self._mismatched, misfit.reasons)

    def _is_filled_by_another_name(self, name: str) -> bool:
        """Tell whether a module's tensor that the checkpoint lacks is one that it has under another name."""
        part = self._part_of.get(name)
        return part is not None and part.entry.pins and identity(part.live.leaves[name]) in self._filled

    @cached_property
    def _filled(self) -> set[tuple[object, ...]]:
        return {identity(held.tensor) for held in [*self._held.values(), *self._on_meta]} - {()}

    def _unclaimed(self) -> list[str]:
        """Return what is in the checkpoint and belongs to no entry."""
        found = [
            name
            for name in self._saved.names()
            if name not in self._claimed and not str(self._saved.path(name)[0]).startswith(OURS)
        ]
        for name in self._saved.owned:
            if name not in self._claimed and not name.startswith(OURS):
                found.append(name)
                if name in self._misfit.missing and self._allowed.strict:
                    self._misfit.reasons.append(
                        f"{name} is each rank's own there (give PerRank or a StatefulDataLoader)"
                    )
        return [name for name in found if is_chosen(name, self._allowed.chosen)]

    def _shown(self, name: str) -> str:
        """Return what is told of a name: an entry that is in the checkpoint alone counts as one."""
        top = str(self._saved.path(name)[0])
        return name if top in self._tops or top.startswith(OURS) else top


def _is_restored(part: Part, saved: Saved) -> bool:
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
