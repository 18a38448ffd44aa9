"""Match an optimizer's groups of parameters with the saved ones, by the names in them and in whatever order.

Knows names and options only; one pass over them, since one group for each parameter is common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import torch

from cloudckpt.errors import OptionsError

__all__ = ["GroupFit", "Name", "group_of", "match_groups", "names_in", "saved_groups"]

Name = str | int
"""A parameter's full name; for one that has none, its place among those that have none."""


@dataclass(slots=True)
class GroupFit:
    """Which saved group each group here is.

    Attributes:
        sources: of each group here, the place of the saved one; None for one that was not saved.
        torn: parameters that stand together here and not there, or the other way.
        missing: places of empty groups here that were not saved.
        unexpected: places of empty groups there that are not here.
        is_moved: whether a group stands at another place than it was saved at.
    """

    sources: list[int | None] = field(default_factory=list)
    torn: list[Name] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    unexpected: list[int] = field(default_factory=list)
    is_moved: bool = False


def match_groups(own: Sequence[Sequence[Name]], saved: Sequence[Sequence[Name]]) -> GroupFit:
    """Match groups one to one by the parameters that both sides have, and empty ones by their order."""
    fit = GroupFit()
    homes = {name: place for place, names in enumerate(saved) for name in names}
    empty_there = [place for place, names in enumerate(saved) if not names]
    empty_here = [place for place, names in enumerate(own) if not names]
    pairs = dict(zip(empty_here, empty_there, strict=False))
    taken: set[int] = set()
    for place, names in enumerate(own):
        found = {homes[name]: name for name in reversed(names) if name in homes}
        source = min(found, default=pairs.get(place))
        if len(found) > 1 or source in taken:
            fit.torn += found.values()
        if source is not None:
            taken.add(source)
        fit.sources.append(source)
    fit.missing = empty_here[len(pairs) :]
    fit.unexpected = empty_there[len(pairs) :]
    fit.is_moved = fit.sources != list(range(len(saved)))
    return fit


def names_in(groups: Sequence[Mapping[str, Sequence[Name]]]) -> set[Name]:
    """Return all parameters in saved groups."""
    return set(chain.from_iterable(group["params"] for group in groups))


def saved_groups(restored: object, name: str) -> list[dict[str, list[Name]]]:
    """Return the groups in the restored state of an optimizer.

    Raises:
        OptionsError: it is the state of something else.
    """
    groups = restored.get("param_groups") if isinstance(restored, dict) else None
    if not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise OptionsError(f"the checkpoint holds no optimizer under {name!r}; give the object that was saved there")
    return groups


def _is_group(group: object) -> bool:
    names = group.get("params") if isinstance(group, dict) else None
    return isinstance(names, list) and all(isinstance(name, str | int) for name in names)


def group_of(
    names: Sequence[Name],
    live: Mapping[str, object],
    saved: Mapping[str, object] | None,
    own_name: Callable[[Name], Name],
) -> dict[str, object]:
    """Return the options of a saved group for a live one, its own where none was saved."""
    if saved is None:
        return {**live, "params": names}
    options = {key: value for key, value in saved.items() if key != "param_names"}
    given = saved.get("param_names")
    if isinstance(given, list) and "param_names" not in live:
        # Names are in the saved order; the optimizer has its own.
        by_name = dict(zip(map(own_name, cast("list[Name]", saved["params"])), given, strict=False))
        options["param_names"] = [by_name.get(name, str(name)) for name in names]
    return {key: _at(live.get(key), value) for key, value in options.items()} | {"params": names}


def _at(live: object, saved: object) -> object:
    """Return a saved option with its tensors on the device of the live ones."""
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        return saved.to(live.device)
    if isinstance(live, list | tuple) and type(live) is type(saved) and len(live) == len(cast("list[object]", saved)):
        return type(live)(map(_at, live, cast("list[object]", saved)))
    return saved
