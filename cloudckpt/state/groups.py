"""Match an optimizer's groups of parameters with the saved ones, by the names in them and in whatever order.

Knows names only; one pass over them, since one group for each parameter is common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["GroupFit", "Name", "match_groups"]

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
