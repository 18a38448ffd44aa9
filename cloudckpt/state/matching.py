"""Match a state with a checkpoint before anything is read or changed: what is filled in place, what is made anew.

    entries + Saved ──▶ plan_restore ──▶ Targets(tensors to fill, apply) or one error that lists all that differs

An entry that a live object defines (a module) must find all of its names, with their shapes. An entry that the
checkpoint defines (an optimizer, a scheduler, a loader, plain values) takes what was saved. Knows names, shapes and
entries; reads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import torch
from torch import nn

from cloudckpt.errors import StateMismatchError
from cloudckpt.format import Flat, JsonValue, PathElement, unflatten
from cloudckpt.state.entry import Entry, Misfit, is_tensor, shape_of
from cloudckpt.state.per_rank import RankName

__all__ = ["Saved", "Targets", "plan_restore"]

logger = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_OURS = "cloudckpt."


@dataclass(frozen=True, slots=True)
class Targets:
    """What a restore fills, and how it ends.

    Attributes:
        tensors: name → the tensor to be filled in place.
        apply: puts everything back into the objects, once the tensors are filled.
    """

    tensors: dict[str, object]
    apply: Callable[[], None]


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
        return {of: note for of, note in self.notes.items() if of == name or of.startswith(f"{name}.")}

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

    def path(self, name: str) -> list[PathElement]:
        """Where a name stood in the nested state; a checkpoint that says nothing has dots in its names for steps.

        What the library itself saves beside the state stands nowhere in it.
        """
        return list(self.paths.get(name) or ([name] if name.startswith(_OURS) else name.split(".")))

    def below(self, path: Sequence[PathElement]) -> list[str]:
        """The names of all that stood at `path` or below it."""
        wanted = list(path)
        return [name for name, found in self._by_top.get(repr(wanted[0]), []) if found[: len(wanted)] == wanted]

    @cached_property
    def _by_top(self) -> Mapping[str, list[tuple[str, list[PathElement]]]]:
        """Names and paths by the first step of the path: a state with many entries looks each of them up."""
        tops: dict[str, list[tuple[str, list[PathElement]]]] = {}
        for name in self.names():
            path = self.path(name)
            tops.setdefault(repr(path[0]), []).append((name, path))
        return tops


def plan_restore(entries: Sequence[Entry], saved: Saved, *, strict: bool) -> Targets:
    """Match the state with a checkpoint.

    Tensors are filled in place where the live ones have the same shape. Where a checkpoint-defined entry has none,
    its adapter allocates one.

    Args:
        entries: the bound state.
        saved: what the checkpoint holds.
        strict: also refuse names that only one of the two has; without it those are left as they are.

    Raises:
        StateMismatchError: names are missing or unexpected, or shapes differ; lists all of them.
    """
    matching = _Matching(saved, strict=strict)
    for entry in entries:
        matching.match(entry)
    matching.refuse_mismatch()

    def apply() -> None:
        for load in matching.loads:
            load()

    return Targets(tensors=matching.tensors, apply=apply)


class _Matching:
    """Collects, entry by entry, what is restored from where, and everything that does not fit."""

    def __init__(self, saved: Saved, *, strict: bool) -> None:
        self._saved = saved
        self._strict = strict
        self._misfit = Misfit()
        self._mismatched: dict[str, tuple[_Shape, _Shape]] = {}
        self._claimed: set[str] = set()
        self._tops: set[str] = set()
        self.tensors: dict[str, object] = {}
        self.loads: list[Callable[[], None]] = []

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
        entry.take_notes(self._saved.notes_on(entry.name))
        if in_checkpoint:
            self._match_shared(entry, in_checkpoint)
        if owned:
            self.loads.append(partial(entry.load_own, self._own_targets(entry, owned)))

    def _match_shared(self, entry: Entry, in_checkpoint: Sequence[str]) -> None:
        """Plan what all ranks share of an entry."""
        nested = entry.fillable()
        live = entry.flat(nested)
        leaves: dict[str, object] = {}
        paths: dict[str, list[PathElement]] = {}
        for name in in_checkpoint:
            if entry.follows_checkpoint or name in live.leaves:
                paths[name] = self._saved.path(name) if entry.follows_checkpoint else live.paths[name]
                leaves[name] = self._source(entry, name, live)
            else:
                self._misfit.unexpected.append(name)
        if not entry.follows_checkpoint:
            self._keep_rest(live, leaves, paths)
        restored = _nested(leaves, paths, entry.path)
        self._add(entry.compare(restored, self._saved.dtypes))
        self.loads.append(partial(entry.load, restored, nested))

    def _own_targets(self, entry: Entry, owned: Mapping[str, Mapping[RankName, str]]) -> dict[str, torch.Tensor]:
        """Return targets for what this rank saved for itself."""
        targets: dict[str, torch.Tensor] = {}
        for name, found in owned.items():
            full = found.get(RankName.here(name))
            if full is None:
                continue
            target = entry.allocate_own(name, self._saved.shapes[full], self._saved.dtypes[full])
            if target is None:
                self._misfit.reasons.append(f"{name}, each rank's own, has no place here as it was saved")
            else:
                targets[name] = self.tensors[full] = target
        return targets

    def _refuse_other_world(self, entry: Entry, sizes: set[int]) -> None:
        """Refuse what only the ranks of the saving world can take; without `strict` the entry stays as it is."""
        here = RankName.here(entry.name).size
        there, is_are = max(sizes - {here}), "are" if here > 1 else "is"
        text = f"{entry.name} was saved by {_ranks(there)}, each for itself, and here {is_are} {_ranks(here)}"
        if self._strict:
            self._misfit.reasons.append(
                f"{text} ({entry.other_world}; or pass strict=False, and it stays as it is while the rest is restored)"
            )
        else:
            logger.warning("%s: it is NOT restored and stays as it is", text)

    def _source(self, entry: Entry, name: str, live: Flat) -> object:
        """Return what a name is restored from: a saved value, or a tensor that is to be filled."""
        current = live.leaves.get(name)
        if name in self._saved.values:
            if not entry.follows_checkpoint and is_tensor(current):
                self._misfit.reasons.append(f"{name} is a tensor here and a value there")
            return self._saved.values[name]
        if not entry.follows_checkpoint and not is_tensor(current):
            self._misfit.reasons.append(f"{name} is a value here and a tensor there")
        target = self.tensors[name] = self._target(entry, name, current)
        return target

    def _target(self, entry: Entry, name: str, current: object) -> object:
        shape = self._saved.shapes[name]
        if is_tensor(current):
            if isinstance(current, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
                self._misfit.reasons.append(f"{name} has no shape yet (run a batch through the module first)")
                return current
            live_shape = shape_of(current)
            if live_shape == shape and not _overlaps_itself(current):
                return current
            if live_shape == shape and entry.keeps_shapes and not entry.follows_checkpoint:
                self._misfit.reasons.append(
                    f"{name} has elements that share memory (an expanded tensor), clone it first"
                )
            elif live_shape != shape and entry.keeps_shapes:
                self._mismatched[name] = (live_shape, shape)
        return entry.allocate(self._saved.path(name)[len(entry.path) :], shape, self._saved.dtypes[name])

    def _keep_rest(self, live: Flat, leaves: dict[str, object], paths: dict[str, list[PathElement]]) -> None:
        for name, current in live.leaves.items():
            if name not in leaves:
                self._misfit.missing.append(name)
                leaves[name], paths[name] = current, live.paths[name]

    def _add(self, misfit: Misfit) -> None:
        self._misfit.missing += misfit.missing
        self._misfit.unexpected += misfit.unexpected
        self._misfit.reasons += misfit.reasons

    def refuse_mismatch(self) -> None:
        """Raise once, with everything that does not fit."""
        misfit = self._misfit
        misfit.unexpected += self._unclaimed()
        missing = list(dict.fromkeys(misfit.missing if self._strict else ()))
        unexpected = list(dict.fromkeys(misfit.unexpected if self._strict else ()))
        if not (missing or unexpected or self._mismatched or misfit.reasons):
            return
        raise StateMismatchError(
            _mismatch_message(missing, unexpected, self._mismatched, misfit.reasons),
            missing=missing,
            unexpected=unexpected,
            mismatched=self._mismatched,
        )

    def _unclaimed(self) -> list[str]:
        """Return what is in the checkpoint and belongs to no entry."""
        found = []
        for name in self._saved.names():
            top = str(self._saved.path(name)[0])
            if name not in self._claimed and not top.startswith(_OURS):
                found.append(name if top in self._tops else top)
        for name in self._saved.owned:
            if name not in self._claimed:
                found.append(name)
                if name in self._misfit.missing and self._strict:
                    self._misfit.reasons.append(
                        f"{name} is each rank's own there (give PerRank or a StatefulDataLoader)"
                    )
        return found


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _nested(
    leaves: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]], top: Sequence[PathElement]
) -> object:
    """Build the nested state of one entry, without the path that leads to it."""
    below: dict[str, list[PathElement]] = {name: ["", *paths[name][len(top) :]] for name in leaves}
    return unflatten(leaves, below).get("", {})


def _overlaps_itself(tensor: object) -> bool:
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        return False
    dense = cast("torch.Tensor", tensor)
    return any(stride == 0 and size > 1 for stride, size in zip(dense.stride(), dense.size(), strict=True))


def _mismatch_message(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[_Shape, _Shape]],
    reasons: Sequence[str],
) -> str:
    parts = ["the state and the checkpoint do not fit, and nothing was restored"]
    if mismatched:
        shapes = ", ".join(f"{name} is {here} here and {there} there" for name, (here, there) in mismatched.items())
        parts.append(f"shapes that differ: {shapes}")
    parts += reasons
    if missing:
        parts.append(f"in the state and not in the checkpoint: {', '.join(missing)}")
    if unexpected:
        parts.append(f"in the checkpoint and not in the state: {', '.join(unexpected)}")
    parts.append("restore into the same model, or pass strict=False to restore what both have")
    return "; ".join(parts)
