"""Save and restore an optimizer by the names of its parameters, so that it survives resharding and reordering.

    optimizer.state_dict() ──numbers → full names──▶ saved ──names → numbers──▶ optimizer.load_state_dict()

What is saved is what the optimizer says of itself, and what it is given back passes through its own code; only the
numbers of parameters are renamed. Names come from what stands beside it in the state. Knows PyTorch's optimizers, and
of those that wrap them only that they have groups, state_dict and load_state_dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from cloudckpt.errors import OptionsError
from cloudckpt.format import DTYPES, Flat, JsonValue, PathElement
from cloudckpt.late import DTensor
from cloudckpt.ranks import Group
from cloudckpt.state.beside import Beside, wrapped_in
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of
from cloudckpt.state.groups import GroupFit, Name, group_of, match_groups, names_in, saved_groups
from cloudckpt.state.placement import noted_placements, placement_note, usual_placements
from cloudckpt.state.uncast import saved_types

__all__ = ["NamedEntry", "OptimizerEntry", "groups_of", "parameter_of"]

_OURS = ("state", "param_groups")
_PLAIN = (nn.Parameter, torch.Tensor)
_SCALARS = frozenset((type(None), bool, int, float, str))
_STEPS_LIMIT = 32  # of a path that is surely not too deep
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class NamedEntry(Entry):
    """An optimizer whose parameters have names; what both kinds share.

    DCP's `get_optimizer_state_dict` is not used: to have names for the state of a fresh optimizer it takes a step
    with zero gradients, which counts as a step from then on. Here the checkpoint says which state there is, and each
    part that is as large as its parameter is allocated like that parameter (device and placement included).
    """

    def __init__(self, place: Place, optimizer: Optimizer, beside: Beside, names: Mapping[int, Sequence[Name]]) -> None:
        """Take the `names` of the tensors in each parameter, by its id; a flattened one has many."""
        super().__init__(place)
        self._optimizer = optimizer
        self._beside = beside
        self._names = names
        # Found out by `compare`.
        self._fit = GroupFit()
        self._missing: list[Name] = []
        self._changed: dict[int, torch.dtype] = {}

    @cached_property
    def _groups(self) -> list[list[Name]]:
        return [
            [name for parameter in group["params"] for name in self._names[id(parameter)]]
            for group in groups_of(self._optimizer)
        ]

    @cached_property
    def _own(self) -> dict[Name, None]:
        return dict.fromkeys(chain.from_iterable(self._groups))

    def own_state_dict(self) -> object:
        """Return what the optimizer says of itself.

        Raises:
            OptionsError: it wraps one whose state is not in that, as torch's own code knows nothing of wrapping.
        """
        own, *inner = wrapped_in(self._optimizer)
        if getattr(own.state_dict, "__func__", None) is Optimizer.state_dict:
            for each in inner:
                state = getattr(each, "state", None)
                if state and state is not own.state and not self._beside.holds(each):
                    raise OptionsError(
                        f"the state_dict of {self.name!r} leaves out the state of the {type(each).__name__} that it "
                        "wraps; put that one into the state, too, under a name of its own"
                    )
        return own.state_dict()

    def own_name(self, saved: Name) -> Name:
        """Return what a parameter that was saved under a name is called here."""
        return saved

    def live_shape(self, name: Name) -> tuple[int, ...] | None:
        """Return the full shape of the parameter that was saved under a name, None if it is not here."""
        return None

    def shape_here(
        self,
        below: Sequence[PathElement],
        shape: tuple[int, ...],
        saved_shape_of: Callable[[str], tuple[int, ...] | None],
    ) -> tuple[int, ...]:
        """Return the shape that a saved part of the state must have here, where its parameter has grown or shrunk.

        Args:
            below: the part's path in the entry.
            shape: its saved one.
            saved_shape_of: full name → the shape of the tensor that was saved under it, None if none was.

        Returns:
            The parameter's shape here, of a part that had the parameter's shape when both were saved; else `shape`.
        """
        name = parameter_of(below)
        live = self.live_shape(name)
        if live is None or below[-1] == "step":  # a count, also of a parameter that is a single number
            return shape
        return live if saved_shape_of(str(name)) == shape else shape

    def saved_dtype(
        self, parameter: torch.Tensor, dtypes: Mapping[str, torch.dtype], state: Mapping[object, object]
    ) -> torch.dtype | None:
        """Return which dtype a parameter had when it was saved, None where nobody can tell.

        Args:
            parameter: one of the optimizer's.
            dtypes: name → saved dtype, of all tensors in the checkpoint.
            state: what `restored_state` returns.
        """
        return dtypes.get(str(next(iter(self._names[id(parameter)]))))

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare the parameters and their groups."""
        groups = saved_groups(restored, self.name)
        saved = [[self.own_name(name) for name in group["params"]] for group in groups]
        there = list(dict.fromkeys(chain.from_iterable(saved)))
        known = set(there)
        misfit = Misfit(reasons=self._nameless_misfit(there))
        if misfit.reasons:
            return misfit
        state = self.restored_state(restored)
        for group in groups_of(self._optimizer):
            for parameter in group["params"]:
                dtype = self.saved_dtype(parameter, dtypes, state)
                if dtype is not None and dtype != parameter.dtype:
                    self._changed[id(parameter)] = dtype
        self._missing = [name for name in self._own if name not in known]
        self._fit = fit = match_groups(self._groups, saved)
        misfit.missing += [f"{self.name}.{name}" for name in self._missing]
        misfit.missing += [f"{self.name}.param_groups.{place}" for place in fit.missing]
        misfit.unexpected += [f"{self.name}.{name}" for name in sorted(map(str, known - self._own.keys()))]
        misfit.unexpected += [f"{self.name}.param_groups.{place}" for place in fit.unexpected]
        misfit.reasons += self._tie_misfit(names_in(groups))
        misfit.reasons += self._order_misfits(there, mapping_of(restored, self.name))
        return misfit

    def _nameless_misfit(self, there: Sequence[Name]) -> list[str]:
        """Refuse to take parameters that have names for some that have none; the place of these is all they have."""
        counts = [sum(isinstance(name, int) for name in names) for names in (self._own, there)]
        if counts[0] == counts[1]:
            return []
        advice = "put the modules or tensors that they belong to beside it, as when it was saved"
        if counts[0] < counts[1]:
            advice = "restore it without the modules beside it that were not there when it was saved"
        text = f"{self.name} has {counts[0]} parameters here and {counts[1]} there that nothing in the state names"
        return [f"{text}, and that are known by their place alone ({advice})"]

    def _tie_misfit(self, saved: set[Name]) -> list[str]:
        """Refuse the state of several parameters for what is one here."""
        counts = Counter(map(self.own_name, saved))
        tied = sorted(str(name) for name in saved if counts[self.own_name(name)] > 1)
        return [f"{self.name} has as one parameter here what are several there: {', '.join(tied)}"] if tied else []

    def _order_misfits(self, there: Sequence[Name], restored: Mapping[str, object]) -> list[str]:
        """Say what stands in another order than it was saved in, and could not follow."""
        found = []
        if self._fit.torn:
            found.append(f"{self.name} has the same parameters in other groups ({self._fit.torn[0]} for one)")
        if self._fit.is_moved:
            keepers = self._beside.carry(wrapped_in(self._optimizer), self._fit.sources)
            found += [
                f"{keeper} may keep something for each group of {self.name}, whose groups stand in another order than "
                "they were saved in (give them in that order)"
                for keeper in keepers
            ]
        extra = [repr(key) for key, value in restored.items() if key not in _OURS and _may_hold_numbers(value)]
        if any(isinstance(each, LBFGS) for each in wrapped_in(self._optimizer)):
            extra.append("vectors of all parameters together")
        if extra and there != list(self._own):
            text = f"{self.name} keeps {', '.join(extra)} beside the state of its parameters, which stand in another"
            found.append(f"{text} order than they were saved in (give them in that order)")
        return found

    def restored_state(self, restored: object) -> dict[object, object]:
        """Return the restored state of the parameters here by name, and the state that belongs to no parameter."""
        known = names_in(saved_groups(restored, self.name))
        state = mapping_of(mapping_of(restored, self.name).get("state", {}), f"{self.name}.state")
        named = {self.own_name(name) if name in known else name: value for name, value in state.items()}
        return {name: value for name, value in named.items() if name in self._own or name not in known}

    def restored_groups(self, restored: object) -> list[dict[str, object]]:
        """Return the groups here, with their own parameters by name and the restored options."""
        saved = saved_groups(restored, self.name)
        return [
            group_of(names, live, None if source is None else saved[source], self.own_name)
            for names, live, source in zip(self._groups, groups_of(self._optimizer), self._fit.sources, strict=True)
        ]

    def load_numbered(self, restored: object, state: Mapping[object, object], groups: Sequence[object]) -> None:
        """Give the optimizer a state_dict of its own kind: the restored one, with numbered state and groups."""
        with saved_types(self._optimizer, self._changed):
            self._optimizer.load_state_dict(
                {**mapping_of(restored, self.name), "state": dict(state), "param_groups": list(groups)}
            )


class OptimizerEntry(NamedEntry):
    """An optimizer each of whose parameters is a tensor of its own."""

    is_alike = True
    _is_plain = False

    def __init__(self, place: Place, optimizer: Optimizer, beside: Beside) -> None:
        """Name the parameters by what stands `beside` the optimizer, else by themselves, else by place."""
        self._parameters: dict[Name, torch.Tensor] = {}
        self._aliases: dict[Name, Name] = {}
        self._nameless: list[torch.Tensor] = []
        names: dict[int, Sequence[Name]] = {}
        given: Mapping[int, str] | None = None
        for group in groups_of(optimizer):
            for parameter in group["params"]:
                if id(parameter) in names:
                    continue
                found = beside.names_of(parameter)
                if not found:
                    given = _names_given(optimizer) if given is None else given
                    own_name = given.get(id(parameter))
                    found = [own_name] if own_name is not None and not beside.has_name(own_name) else ()
                name: Name = found[0] if found else len(self._nameless)
                if not found:
                    self._nameless.append(parameter)
                names[id(parameter)] = [name]
                self._parameters[name] = parameter
                for alias in found:
                    self._aliases[alias] = name
        self._refused: list[str] = []
        super().__init__(place, optimizer, beside, names)

    def own_name(self, saved: Name) -> Name:
        """Return the name here of a parameter, which may have several that are tied."""
        return self._aliases.get(saved, saved)

    def live_shape(self, name: Name) -> tuple[int, ...] | None:
        parameter = self._parameters.get(self.own_name(name))
        return None if parameter is None else tuple(parameter.size())

    def saved_dtype(
        self, parameter: torch.Tensor, dtypes: Mapping[str, torch.dtype], state: Mapping[object, object]
    ) -> torch.dtype | None:
        """Return what was saved under one of a parameter's names, or noted of it, or what its state tells.

        State says it of a parameter which is saved under another name, as hooks call it: state of its shape that had
        another dtype was noted.
        """
        name = self._names[id(parameter)][0]
        if isinstance(name, int):
            return (self._noted(name) or [None])[0]
        names = [str(name), *self._beside.names_of(parameter)]
        notes = [note for alias in names if isinstance(note := self.notes.get(self._of(alias)), dict)]
        known = [dtypes[alias] for alias in names if alias in dtypes]
        known += [
            DTYPES[dtype] for note in notes if isinstance(dtype := note.get("parameter"), str) and dtype in DTYPES
        ]
        if not known:
            parts = state.get(name)
            alike = [part for part in parts.values() if _is_alike(part, parameter)] if isinstance(parts, dict) else []
            known = list({part.dtype for part in alike})
            known = [] if len(known) > 1 else known
        return next(iter(known), None)

    def _of(self, parameter: str) -> str:
        """Return what the state of a parameter is called."""
        return f"{self.name}.state.{parameter}"

    # -- saving ------------------------------------------------------------------------------------------------

    def _numbers(self, state: object) -> dict[Name, object] | None:
        """Return by what the optimizer's own state_dict calls each parameter; None for one that is no such dict."""
        groups = state.get("param_groups") if isinstance(state, dict) else None
        live = groups_of(self._optimizer)
        if not isinstance(groups, list) or len(groups) != len(live):
            return None
        numbers: dict[Name, object] = {}
        for group, own in zip(groups, live, strict=True):
            found = group.get("params") if isinstance(group, dict) else None
            if not isinstance(found, list) or len(found) != len(own["params"]):
                return None
            for number, parameter in zip(found, own["params"], strict=True):
                numbers.setdefault(self._names[id(parameter)][0], number)
        return numbers

    def current(self) -> object:
        plain = self._plain_state()
        self._is_plain = plain is not None
        return self._renamed() if plain is None else plain

    def _plain_state(self) -> dict[str, object] | None:
        """Return what `_renamed` does, of an optimizer of PyTorch's own whose parameters all have names that differ."""
        optimizer, names = self._optimizer, self._names
        if not self._beside.plain.holds(optimizer) or len(self._parameters) != len(names):
            return None
        state: dict[Name, object] = {}
        for parameter, parts in optimizer.state.items():
            if not isinstance(parameter, torch.Tensor) or id(parameter) not in names:
                return None
            state[names[id(parameter)][0]] = parts
        groups = []
        for group in optimizer.param_groups:
            if type(group) is not dict:
                return None
            packed = group.copy()
            packed["params"] = [names[id(parameter)][0] for parameter in packed.pop("params")]  # last, as torch does
            groups.append(packed)
        return {"state": state, "param_groups": groups}

    def _renamed(self) -> object:
        """Return what the optimizer says of itself, with the names of its parameters for their numbers."""
        state = self.own_state_dict()
        numbers = self._numbers(state)
        if numbers is None or not isinstance(state, dict):
            return state
        names = {number: name for name, number in numbers.items()}
        renamed: dict[str, object] = dict(state)
        if isinstance(state.get("state"), dict):
            # State that belongs to no parameter has keys of its own.
            renamed["state"] = {names.get(key, key): value for key, value in state["state"].items()}
        renamed["param_groups"] = [
            {**group, "params": [names.get(number, number) for number in group["params"]]}
            for group in state["param_groups"]
        ]
        return renamed

    def fillable(self) -> object:
        nested = self.current()
        self.fills = _is_loaded_by_torch(self._optimizer)
        if not isinstance(nested, dict) or not (self._is_plain or self._numbers(nested) is not None):
            return nested
        # Not the options: groups may share one tensor, and the checkpoint has two.
        return {"state": nested["state"]} if nested.get("state") else {}

    def flat(self, nested: object) -> Flat:
        """Note also what the names cannot tell: of nameless parameters, of an order, of dtypes, and of placements."""
        flat = self._plain_flat(nested) if self._is_plain else None
        if flat is not None:
            return flat
        flat = super().flat(nested)
        if self._nameless:
            shapes: list[JsonValue] = [
                [_DTYPE_NAMES.get(parameter.dtype, ""), list(parameter.size())] for parameter in self._nameless
            ]
            flat.notes[self.name] = {"nameless": shapes}
        if self._own and not self._is_plain and self._numbers(nested) is None:
            flat.notes[self.name] = {"order": list(self._own)}
        is_distributed = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        for name, leaf in flat.leaves.items():
            below = flat.paths[name][len(self.path) :]
            owner = parameter_of(below)
            parameter = self._parameters.get(owner)
            if parameter is None or not isinstance(leaf, torch.Tensor):
                continue
            if is_distributed or isinstance(leaf, DTensor):
                note = placement_note(parameter, leaf, below)
                flat.notes.update({} if note is None else {name: note})
            is_of_other_dtype = leaf.dtype != parameter.dtype and _is_alike(leaf, parameter)
            if is_of_other_dtype and isinstance(owner, str) and parameter.dtype in _DTYPE_NAMES:
                flat.notes[self._of(owner)] = {"parameter": _DTYPE_NAMES[parameter.dtype]}
        return flat

    def _plain_flat(self, nested: object) -> Flat | None:
        """Return what `flat` does, where all state is plain tensors of named parameters; None where it is not."""
        flat, steps, groups = Flat(), self.path, cast("dict[str, object]", nested).get("param_groups")
        state = cast("dict[str, dict[Name, object]]", nested).get("state")
        if not state or self._nameless or len(steps) > _STEPS_LIMIT:
            return None
        leaves, paths, count = flat.leaves, flat.paths, 0
        for owner, parts in state.items():
            parameter = self._parameters[owner]
            if type(parts) is not dict or not parts or type(parameter) not in _PLAIN or not str(owner).isascii():
                return None
            above, top = f"{self.name}.state.{owner}.", [*steps, "state", owner]
            for key, part in parts.items():
                if type(part) is not torch.Tensor or part.requires_grad or type(key) is not str or not key.isascii():
                    return None
                leaves[above + key] = part
                paths[above + key] = [*top, key]
                if part.dtype != parameter.dtype and _is_alike(part, parameter) and parameter.dtype in _DTYPE_NAMES:
                    flat.notes[self._of(str(owner))] = {"parameter": _DTYPE_NAMES[parameter.dtype]}
            count += len(parts)
        if groups is not None:
            if not _is_bare(groups):
                return None
            leaves[f"{self.name}.param_groups"] = groups
            paths[f"{self.name}.param_groups"] = [*steps, "param_groups"]
            count += 1
        return flat if len(leaves) == count else None

    # -- restoring ---------------------------------------------------------------------------------------------

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        parameter = self._parameters.get(self.own_name(parameter_of(below)))
        if parameter is None:
            return super().allocate(below, shape, dtype)
        name = ".".join([self.name, *map(_segment, below)])
        note = self.notes.get(name)
        has_note = isinstance(note, dict) and "placements" in note
        if isinstance(parameter, DTensor):
            placements = usual_placements(parameter, shape, below)
            if isinstance(note, dict) and has_note:
                placements = noted_placements(note, parameter, shape)
            if placements is None:
                return super().allocate(below, shape, dtype)
            from torch.distributed.tensor import empty as empty_distributed

            made: torch.Tensor = empty_distributed(
                *shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements
            )
            return made
        if has_note and Group.of_world().size > 1:
            self._refused.append(
                f"{name} was a DTensor, and its parameter is none here (shard the module first, as when it was saved)"
            )
        if tuple(parameter.size()) == shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return super().allocate(below, shape, dtype)

    def _noted(self, place: int) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Return which dtype and shape a nameless parameter had when it was saved."""
        note = self.notes.get(self.name)
        found = note.get("nameless") if isinstance(note, dict) else None
        try:
            dtype, shape = cast("list[tuple[str, list[int]]]", found)[place]
            return DTYPES[dtype], tuple(shape)
        except (TypeError, ValueError, LookupError):
            return None

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare also the dtypes and shapes of nameless parameters."""
        if not self._is_plain and self._numbers(now := self._optimizer.state_dict()) is None:
            return self._compare_unread(mapping_of(restored, self.name), now)
        misfit = super().compare(restored, dtypes)
        for place, parameter in enumerate(self._nameless):
            there = self._noted(place)
            if there is not None and not _holds(parameter, *there):
                here = f"{parameter.dtype} of {tuple(parameter.size())}"
                misfit.reasons.append(
                    f"parameter {place} of {self.name} is {here} here and {there[0]} of {there[1]} there, and has no "
                    "name but its place (put what it belongs to into the state, beside the optimizer)"
                )
        misfit.reasons += self._refused
        return misfit

    def _compare_unread(self, restored: Mapping[str, object], now: object) -> Misfit:
        """Compare what can be of an optimizer whose state_dict is of a kind of its own."""
        here, there = _named_flat(now), _named_flat(restored)
        if here is not None and there is not None:
            return Misfit(
                missing=[f"{self.name}.{name}" for name in here if name not in there],
                unexpected=[f"{self.name}.{name}" for name in there if name not in here],
            )
        groups = restored.get("param_groups")
        is_named = isinstance(groups, list) and any(
            isinstance(name, str) for group in groups if isinstance(group, dict) for name in group.get("params", ())
        )
        if is_named:
            return Misfit(reasons=[f"{self.name} has a state_dict of its own kind here and one of torch's there"])
        note = self.notes.get(self.name)
        order: object = note.get("order") if isinstance(note, dict) else None
        order = order if isinstance(order, list) else []
        known = [self.own_name(name) for name in order if isinstance(name, str | int)]
        if known and known != list(self._own):
            text = f"{self.name} has a state_dict of its own kind, and its parameters stand in another order than"
            return Misfit(reasons=[f"{text} they were saved in (give them in that order)"])
        return Misfit()

    def late(self, leaves: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]]) -> list[str]:
        # Of PyTorch's own code it is known that it puts what has a parameter's dtype and device there as it is.
        if not (self._beside.plain.holds(self._optimizer) and _is_loaded_by_torch(self._optimizer)):
            return []
        return [name for name, leaf in leaves.items() if self._is_kept(leaf, paths[name])]

    def _is_kept(self, leaf: object, path: Sequence[PathElement]) -> bool:
        place = self._place(path)
        if place is None or not isinstance(leaf, torch.Tensor):
            return False
        parameter, key = place
        return key == "step" or (leaf.size(), leaf.dtype, leaf.device) == (
            *(parameter.size(), parameter.dtype, parameter.device),
        )

    def _place(self, path: Sequence[PathElement]) -> tuple[torch.Tensor, str] | None:
        """Return the parameter of a part of the state, and what the part is called there."""
        below = path[len(self.path) :]
        parameter = self._parameters.get(self.own_name(parameter_of(below)))
        if parameter is None or len(below) != 3 or not isinstance(key := below[2], str):
            return None
        return parameter, key

    def copied(
        self, late: Mapping[str, object], paths: Mapping[str, Sequence[PathElement]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        found = []
        for name, tensor in late.items():
            place = self._place(paths[name])
            here = None if place is None else self._optimizer.state.get(place[0], {}).get(place[1])
            if here is tensor:
                continue
            if not (isinstance(here, torch.Tensor) and isinstance(tensor, torch.Tensor)) or here.shape != tensor.shape:
                return None
            found.append((here, tensor))
        return found

    def load(self, restored: object, live: object) -> None:
        now = self._optimizer.state_dict()
        numbers = self._numbers(now)
        if numbers is None:
            with saved_types(self._optimizer, {}):
                self._optimizer.load_state_dict(mapping_of(restored, self.name))
            return
        kept: Mapping[object, object] = now.get("state", {})
        state = {numbers.get(cast("Name", name), name): value for name, value in self.restored_state(restored).items()}
        state |= {numbers[name]: kept[numbers[name]] for name in self._missing if numbers[name] in kept}
        groups = self.restored_groups(restored)
        for group, names in zip(groups, self._groups, strict=True):
            group["params"] = [numbers[name] for name in names]
        self.load_numbered(restored, state, groups)


def _named_flat(state: object) -> dict[str, None] | None:
    """Return the names of parameters in a state_dict of the flat kind that DCP makes; None of another kind.

    Its keys are `state.<name>.<key>` and `param_groups.<name>.<key>`, so that no order counts.
    """
    if not isinstance(state, Mapping) or not state:
        return None
    names: dict[str, None] = {}
    for key in state:
        top, _, below = key.partition(".") if isinstance(key, str) else ("", "", "")
        if top not in _OURS or not below:
            return None
        names[below.rpartition(".")[0]] = None
    return names


def _is_loaded_by_torch(optimizer: Optimizer) -> bool:
    """Tell whether only torch's own code takes a state back; other code may clear what it has before it copies."""
    is_own = getattr(optimizer.load_state_dict, "__func__", None) is not Optimizer.load_state_dict
    return not is_own and not optimizer._optimizer_load_state_dict_pre_hooks  # noqa: SLF001 (no other way to ask)


def parameter_of(below: Sequence[PathElement]) -> Name:
    """Return which parameter a part of the state belongs to, by its path; "" if to none."""
    if len(below) < 3 or below[0] != "state":  # state, parameter, key
        return ""
    name = below[1]["key"] if isinstance(below[1], dict) and "key" in below[1] else below[1]
    return name if isinstance(name, str | int) else ""


def _is_alike(part: object, parameter: torch.Tensor) -> bool:
    """Tell whether a part of a parameter's state has its shape and holds numbers of its kind."""
    if not isinstance(part, torch.Tensor) or part.dim() == 0 or part.size() != parameter.size():
        return False
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (part, parameter)]
    return kinds[0] == kinds[1]


def _holds(parameter: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter can be one of a saved dtype and shape, without loss."""
    here = parameter.dtype
    is_wider = here.is_floating_point and dtype.is_floating_point and here.itemsize > dtype.itemsize
    return shape == tuple(parameter.size()) and (here == dtype or is_wider)


def _segment(element: PathElement) -> str:
    return str(next(iter(element.values()))) if isinstance(element, dict) else str(element)


def groups_of(optimizer: Optimizer) -> list[dict[str, list[torch.Tensor]]]:
    """Return the groups of an optimizer's parameters, of which only these are looked at; none if it has none."""
    # A wrapper that never was initialized as an optimizer may leave them to the one that it wraps.
    own: object = getattr(optimizer, "param_groups", None)
    if not isinstance(own, list):
        inner = (getattr(each, "param_groups", None) for each in wrapped_in(optimizer))
        own = next((groups for groups in inner if isinstance(groups, list)), [])
    return own


def _names_given(optimizer: Optimizer) -> dict[int, str]:
    """Return the names that an optimizer was given with its parameters, by their ids; none where they are ambiguous."""
    groups = groups_of(optimizer)
    given = [str(name) for group in groups for name in group.get("param_names", ())]
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    if not len(set(given)) == len(parameters) == len(given):
        return {}
    return dict(zip(reversed(parameters), reversed(given), strict=True))  # the first of one that stands twice


def _is_bare(value: object, depth: int = 4) -> bool:
    """Tell whether a value is made of scalars, in lists, tuples and dicts of a few levels, and of nothing else."""
    kind = type(value)
    if kind is dict:
        value = cast("dict[object, object]", value).values()
    elif kind is not list and kind is not tuple:
        return kind in _SCALARS
    for child in value:  # type: ignore[attr-defined]  # noqa: SIM110 (a generator takes twice as long)
        if type(child) not in _SCALARS and not (depth and _is_bare(child, depth - 1)):
            return False
    return True


def _may_hold_numbers(extra: object) -> bool:
    return isinstance(extra, dict | list | tuple | set | torch.Tensor)
