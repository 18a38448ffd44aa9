"""Bring a restore that was found to fit to its end, step by step, and take back what can be taken back.

    early tensors read ──▶ ask ──▶ tensors filled ──▶ apply         (ask failed: undo, nothing was changed)

Objects that may refuse their state are asked first, in memory of their own; when one does, those before it get their
old state back. Knows entries and what was matched; reads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError, RestoreFailedError, StateMismatchError, text_of
from cloudckpt.format import Flat, PathElement, unflatten
from cloudckpt.late import DTensor
from cloudckpt.root import Fit
from cloudckpt.state.attributes import as_it_was, with_attributes
from cloudckpt.state.choosing import is_chosen, parted
from cloudckpt.state.entry import Entry, Left, Misfit
from cloudckpt.state.overlap import bits_of, conflict, local_parts

__all__ = ["Allowed", "Part", "Resize", "Resized", "Restoration", "mismatch", "some"]

logger = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_SHOWN = 8
_SHARE = (
    "{} and {} share memory here and differ in the checkpoint; give each its own, or restore a checkpoint of a model "
    "that ties them"
)

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
        only: names of what is restored of the state, all else of which stays as it is; None: all.
    """

    strict: bool = True
    cast: bool = False
    materialize: str | torch.device | None = None
    resize: Resize | None = None
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing, before anything is asked of a store.

        Raises:
            OptionsError: a choice of another type, or a device that is not here.
        """
        for name in ("strict", "cast"):
            if type(getattr(self, name)) is not bool:
                raise OptionsError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.resize is not None and not callable(self.resize):
            raise OptionsError(
                f"resize is {self.resize!r}; give a function of a name, the saved tensor and the live one"
            )
        if self.materialize is not None:
            try:
                torch.empty(0, device=self.materialize)
            except (RuntimeError, AssertionError, TypeError) as exc:  # torch has no common one
                raise OptionsError(f"materialize is {self.materialize!r}, which is no device here: {exc}") from exc
        names = self.chosen
        if names is not None and not (names and all(isinstance(name, str) for name in names)):
            raise OptionsError(f"only is {self.only!r}; give one or more names of what the state holds")

    @property
    def chosen(self) -> Sequence[str] | None:
        """The names in `only`; None: all."""
        return [self.only] if isinstance(self.only, str) else self.only

    def may_hold(self, top: object) -> bool:
        """Tell whether what is restored may stand below a key of the state."""
        return self.chosen is None or any(is_chosen(f"{one}.", [str(top)]) for one in self.chosen)

    def checked(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return the entries of a state, if it has all that is to be restored; raises as `parted` does."""
        parted(entries, self.chosen)
        return entries


_NOTHING = Flat()
_NOTHING_LEFT = Left()


@dataclass(slots=True, eq=False)
class Part:
    """What of one entry is restored from where: a saved value, a tensor that is to be filled, or what is here."""

    entry: Entry
    nested: object = None
    live: Flat = _NOTHING
    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, list[PathElement]] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[tuple[str, _Shape, torch.dtype], object] = field(default_factory=dict)
    is_shared: bool = False
    is_own: bool = False

    def is_filled(self) -> bool:
        """Tell whether all that is restored is filled where it is, or is here already."""
        here = self.live.leaves
        if self.leaves is here:
            return True
        return len(self.leaves) == len(here) and all(here.get(name) is leaf for name, leaf in self.leaves.items())

    def misfit(self, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Have the entry compare itself with what is to be restored."""
        # Of a plain module only names and tensors count, which are compared by now.
        restored = None if self.entry.is_plain and self.is_filled() else self.restored()
        return self.entry.compare(restored, dtypes)

    def restored(self) -> object:
        """Return the nested state of the entry, without the path that leads to it."""
        top = len(self.entry.path)
        below: dict[str, list[PathElement]] = {name: ["", *self.paths[name][top:]] for name in self.leaves}
        # What has several names is one object under all of them, but for a Parameter and what was detached from it.
        made: dict[tuple[int, bool, bool], object] = {}
        leaves = {}
        for name, leaf in self.leaves.items():
            was = self._as_it_was(name, leaf)
            is_grown = isinstance(was, torch.Tensor) and was.requires_grad
            leaves[name] = made.setdefault((id(leaf), is_grown, isinstance(was, nn.Parameter)), was)
        nested = unflatten(leaves, below).get("", {})
        # A module is told its versions where it is handed its state.
        return nested if self.entry.pins else with_attributes(nested, self.entry.name, self.entry.notes)

    def _as_it_was(self, name: str, leaf: object) -> object:
        """Return a tensor with what it was beside its bytes; a live one is what it is."""
        if leaf is self.live.leaves.get(name):
            return leaf
        return as_it_was(leaf, self.entry.notes.get(name))

    def load(self) -> Left:
        """Have the entry take what was restored, and then what is this rank's own."""
        left = None
        if self.is_shared and not (self.is_filled() and self.entry.is_done(self.nested)):
            left = self.entry.load(self.restored(), self.nested)
        if self.is_own:
            self.entry.load_own(self.own)
        return left or _NOTHING_LEFT


@dataclass(frozen=True, slots=True, eq=False)
class Resized:
    """What is made of a saved tensor of another shape.

    Attributes:
        live: what stands there, or what it is to be like.
        is_live: whether `live` is to hold it; else it is handed over as it is.
    """

    part: Part
    name: str
    live: torch.Tensor
    saved: torch.Tensor
    is_live: bool = True


class Restoration:
    """A restore of a state that fits, step by step.

    Attributes:
        early: name → tensor of memory of its own, to be filled before `ask`.
        unexpected: names that the checkpoint has and this rank's state lacks, and how each is told.
        of_modules: those of them that are names of a module's.
        tensors: name → tensor to be filled between `ask` and `apply`; many are live.
        fit: what of the state and of the checkpoint went together.
    """

    def __init__(self, parts: Sequence[Part], allowed: Allowed, fit: Fit) -> None:
        self.early: dict[str, object] = {}
        self.tensors: dict[str, object] = {}
        self.unexpected: dict[str, str] = {}
        self.of_modules: set[str] = set()
        self.fit = fit
        self._parts = parts
        self._allowed = allowed
        self._shared: list[list[tuple[str, object, object]]] = []
        self._watched: list[list[tuple[str, object, object]]] = []
        self._resized: list[Resized] = []
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._undos: list[tuple[str, Callable[[], None] | None]] = []
        self._on_meta: dict[Entry, list[str]] = {}
        self.moved: dict[str, list[str]] = {}
        self._late: list[tuple[Part, dict[str, object]]] = []
        self.stateless: list[str] = []

    @property
    def needs_memory(self) -> bool:
        """Tell whether modules are to get memory before they are filled."""
        return bool(self._on_meta)

    def materialize_later(self, entry: Entry, name: str) -> None:
        """Have `materialize` give a tensor of an entry memory."""
        self._on_meta.setdefault(entry, []).append(name)

    def materialize(self) -> None:
        """Give modules memory; nothing is filled yet.

        Raises:
            RestoreFailedError: a tensor cannot be given memory; others have it by then.
        """
        device = self._allowed.materialize
        for entry, names in self._on_meta.items() if device is not None else ():
            try:
                left = entry.materialize(device, names)  # type: ignore[arg-type]
            except RuntimeError as exc:
                raise RestoreFailedError(
                    f"{entry.name} cannot be given memory where it is ({exc}); some of its tensors have some by now. "
                    "Call to_empty on the module before anything refers to its tensors, and restore again",
                    name=entry.name,
                ) from exc
            if left:
                logger.warning("NOT in the checkpoint, and left on the meta device: %s", some(left))

    def go_on_from(self, before: Restoration) -> None:
        """Take over from what was matched before modules had memory, whose objects were asked."""
        self.fit, self._new, self._undos = before.fit, before._new, before._undos
        made = {one.name: one.part.leaves[one.name] for one in before._resized if not one.is_live}
        for one in self._resized:
            one.part.leaves[one.name] = made.get(one.name, one.live)

    def compare_early(self, members: list[tuple[str, object, object]]) -> None:
        """Have `ask` compare tensors that share memory: (name, the live one, what it is to hold, read early)."""
        self._shared.append(members)

    def watch(self, members: list[tuple[str, object, object]]) -> None:
        """Have `ask` see that objects leave memory alone that they share and that cannot hold what all are handed."""
        self._watched.append(members)

    def resize_early(self, resized: Resized) -> None:
        """Have `ask` make of a saved tensor what a live one is to hold."""
        self._resized.append(resized)
        self.early[resized.name] = resized.saved

    def put_off(self, wait_for: Sequence[str]) -> dict[str, object]:
        """Take out of `tensors`, and return, what of optimizers may be filled after `apply`.

        Args:
            wait_for: names of what may not.

        Raises:
            OptionsError: a name means nothing that is restored of the state.
        """
        parted([part.entry for part in self._parts], wait_for, "wait")
        late: dict[str, object] = {}
        for part in self._parts:
            if part.is_shared and not part.entry.is_asked and not is_chosen(part.entry.name, wait_for):
                names = [name for name in part.entry.late(part.leaves, part.paths) if name in self.tensors]
                if names:
                    self._late.append((part, {name: self.tensors.pop(name) for name in names}))
                    late.update(self._late[-1][1])
        return late

    @property
    def late(self) -> dict[str, Optimizer]:
        """The optimizers of which something may be filled after `apply`, by name."""
        found = {part.entry.name: part.entry.subject for part, _ in self._late}
        return {name: subject for name, subject in found.items() if isinstance(subject, Optimizer)}

    @property
    def subjects(self) -> list[object]:
        """The objects that are restored."""
        return [part.entry.subject for part in self._parts]

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return of what is filled after `apply` objects have made copies: (the copy, what it is of).

        None: it cannot be told, so that `load_late` has to hand it over once more.
        """
        found = []
        for part, tensors in self._late:
            copies = part.entry.copied(tensors, part.paths)
            if copies is None:
                return None
            found += copies
        return found

    def load_late(self) -> None:
        """Hand their state once more to those of which a part came after `apply`."""
        for part, _ in self._late:
            part.load()

    def leave(self, names: Collection[str]) -> None:
        """Leave out what the checkpoint has and this rank's state has not; changes nothing.

        Args:
            names: those that no rank has a use for. Of others, this rank may lack a module's: of another stage, say.

        Raises:
            StateMismatchError: the caller wants it restored.
        """
        told = {name: told for name, told in self.unexpected.items() if name in names or name not in self.of_modules}
        if told and self._allowed.strict:
            raise mismatch([], list(dict.fromkeys(told.values())), {}, [])
        self.fit = replace(self.fit, unexpected=tuple(dict.fromkeys(self.unexpected.values())))

    def ask(self) -> None:
        """Hand the state over to all objects that may refuse it.

        Raises:
            StateMismatchError: one does, or contents differ that are to go to the same memory. Nothing was changed,
                except what the message names.
        """
        for members in self._shared:
            if (pair := conflict(members)) is not None:
                raise StateMismatchError(f"{_SHARE.format(*pair)}; nothing was restored")
        # Objects may write there, so that the last one wins, or keep what they are handed, which is right.
        watched = [(pair, members, _bits(members)) for members in self._watched if (pair := conflict(members))]
        for one in self._resized:
            one.part.leaves[one.name] = self._made(one)
        asked = [(part, part.entry.backup()) for part in self._parts if part.entry.is_asked]
        # Those that cannot be put back come last.
        for part, undo in sorted(asked, key=lambda pair: pair[1] is None):
            self._undos.append((part.entry.name, undo))
            try:
                part.load()
            except Exception as exc:
                why = f"{part.entry.name} refuses the state that was saved: {type(exc).__name__}: {text_of(exc)}"
                raise self._taken_back(why) from exc
        for pair, members, before in watched:
            if _bits(members) != before:
                raise self._taken_back(_SHARE.format(*pair))

    def _taken_back(self, why: str) -> StateMismatchError:
        """Give all objects their old state back, and return what is raised then."""
        changed = self.undo()
        but = f" but in {', '.join(changed)}, which cannot take its old state back" if changed else ""
        return StateMismatchError(f"{why}; nothing was changed{but}")

    def _made(self, one: Resized) -> torch.Tensor:
        if self._allowed.resize is None:
            raise StateMismatchError(f"{one.name} has another shape here than there")
        try:
            # A copy: who writes into it has changed nothing yet.
            new = self._allowed.resize(one.name, one.saved, one.live.detach().clone())
        except Exception as exc:
            raise StateMismatchError(
                f"resize raised {type(exc).__name__} for {one.name}: {text_of(exc)}; nothing was restored"
            ) from exc
        if isinstance(one.live, DTensor) and not isinstance(new, DTensor):
            raise StateMismatchError(
                f"resize returned a {type(new).__name__} for {one.name}, which is distributed here; return a DTensor "
                "of the live one's mesh and placements (distribute_tensor makes one); nothing was restored"
            )
        if not isinstance(new, torch.Tensor) or new.shape != one.live.shape or new.dtype != one.live.dtype:
            what = f"{new.dtype} of {tuple(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise StateMismatchError(
                f"resize returned {what} for {one.name}, which is {one.live.dtype} of {tuple(one.live.shape)} here; "
                "nothing was restored"
            )
        if one.is_live:
            self._new.append((one.live, new))
            return one.live
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
            except BaseException:  # noqa: BLE001 (of a user's object; whatever it is, the others are to get theirs)
                changed.append(name)
        if changed:
            logger.warning("of a restore that failed, these keep what they were given: %s", some(changed))
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
        for part in sorted(self._parts, key=lambda part: part.entry.is_last):
            if part.entry.is_asked:
                continue
            try:
                self._take(part.load(), part.entry.name)
            except Exception as exc:
                raise RestoreFailedError(
                    f"{part.entry.name} did not take the state that was saved: {text_of(exc)}. It may be half "
                    f"restored, {', '.join(done) or 'nothing else'} is restored, and so are tensors that are filled in "
                    "place; load a checkpoint that fits before going on",
                    name=part.entry.name,
                    changed=done,
                ) from exc
            done.append(part.entry.name)
        for tensor in self.tensors.values():
            _tell_autograd(tensor)
        self._log()

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
            reasons = [f"it found no {some(left.missing)}"] if left.missing else []
            reasons += [f"it has no use for {some(left.unexpected)}"] if left.unexpected else []
            raise StateMismatchError(
                f"by its own loading {' and '.join(reasons)} (strict=False lets it)",
                missing=left.missing,
                unexpected=left.unexpected,
            )

    def _log(self) -> None:
        fit = self.fit
        for name, pairs in self.moved.items():
            logger.warning("%s shares memory and gets memory of its own: %s", name, some(pairs))
        if self.stateless:
            logger.warning(
                "a module without any state was saved at %s; what is restored there is an empty dict, and NOT the "
                "module: put one there before the restore, or keep it out of the values that you save",
                some(self.stateless),
            )
        if fit.missing:
            logger.warning("NOT in the checkpoint, and left as it is: %s", some(fit.missing))
        if fit.unexpected:
            logger.warning("in the checkpoint and NOT restored: %s", some(fit.unexpected))
        if fit.cast:
            logger.warning("restored into another dtype: %d tensors (%s)", len(fit.cast), some(fit.cast))


def _bits(members: Sequence[tuple[str, object, object]]) -> list[bytes]:
    return [bits_of(part) for _, live, _ in members for part in local_parts(live)]


def some(names: Sequence[str]) -> str:
    """Name the first few, and count the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _tell_autograd(tensor: object) -> None:
    """Have a backward that still needs what a tensor held before it was filled say so."""
    for part in [tensor] if type(tensor) is torch.Tensor else local_parts(tensor):
        if not (part.is_inference() or part.is_meta):
            torch.autograd.graph.increment_version(part)


def mismatch(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[_Shape, _Shape]],
    reasons: Sequence[str],
) -> StateMismatchError:
    """Return the error that says all that does not fit."""
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
    return StateMismatchError("; ".join(parts), missing=missing, unexpected=unexpected, mismatched=mismatched)
