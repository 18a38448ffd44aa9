"""Describe random states as plain data, so that another process builds the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.any_state.modules import DTYPES, FLOAT32_ALONE, MODULES
from tests.any_state.objects import MAY_REFUSE, STATEFULS
from tests.any_state.optimizers import ONE_GROUP, OPTIMIZERS, SCHEDULERS
from tests.any_state.values import is_rich, values


@dataclass(frozen=True)
class ModuleRecipe:
    """A module, and what is wrapped around it from inside out."""

    kind: str
    dtype: str = "float32"
    wraps: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer over some modules.

    Attributes:
        grouping: `one` group, one by `dims`, one for `each` parameter; or `gap`: as `dims`, with an empty one between.
        is_named: whether it is given names, too.
        schedulers: stacked on it.
    """

    kind: str
    modules: tuple[int, ...]
    grouping: str = "one"
    is_named: bool = False
    schedulers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A state.

    Attributes:
        copies: modules of which the state also holds the state_dict as a value, with contents of its own.
        steps: taken before it is saved.
        holder: where its objects stand: `flat` at the top, or below a `dict`, `list` or `tuple`.
    """

    modules: tuple[ModuleRecipe, ...] = ()
    optimizers: tuple[OptimizerRecipe, ...] = ()
    statefuls: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    copies: tuple[int, ...] = ()
    steps: int = 0
    holder: str = "flat"

    @property
    def may_not_be_saved(self) -> bool:
        """Whether it holds a value of a kind that the format need not hold."""
        return any(map(is_rich, self.values))

    @property
    def may_be_refused(self) -> bool:
        """Whether something in it refuses."""
        return not MAY_REFUSE.isdisjoint(self.statefuls)


@dataclass(frozen=True)
class Change:
    """How the twin differs that a checkpoint is restored into, beside its contents.

    Attributes:
        steps: that it took.
        wraps: other wrappers for the modules, by place; None for the same ones.
        is_reordered: whether groups and parameters stand the other way around.
        blank: `same` values in other contents, or `none` for each of them.
        is_elsewhere: restored in another process.
    """

    steps: int = 0
    wraps: tuple[tuple[str, ...] | None, ...] = ()
    is_reordered: bool = False
    blank: str = "same"
    is_elsewhere: bool = False


SAME = Change()

_wraps = st.lists(st.sampled_from(["compile", "checkpoint"]), max_size=2, unique=True).map(tuple)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a state."""
    modules = []
    for kind in draw(st.lists(st.sampled_from(list(MODULES)), min_size=1, max_size=3)):
        dtype = "float32" if kind in FLOAT32_ALONE else draw(st.sampled_from(list(DTYPES)))
        wraps = draw(_wraps) if draw(st.booleans()) else ()
        inside = ("submodule",) if draw(st.integers(0, 3)) == 0 else ()
        modules.append(ModuleRecipe(kind, dtype, (*inside, *wraps)))
    optimizers = []
    free = draw(st.permutations(range(len(modules))))
    while free and draw(st.integers(0, 3)):
        kind = draw(st.sampled_from(list(OPTIMIZERS)))
        # It keeps one vector over all of its parameters, so they have one dtype.
        count = 1 if kind in ONE_GROUP else draw(st.integers(1, len(free)))
        grouping = "one" if kind in ONE_GROUP else draw(st.sampled_from(["one", "dims", "gap", "each"]))
        schedulers = draw(st.lists(st.sampled_from(list(SCHEDULERS)), max_size=1))
        optimizers.append(
            OptimizerRecipe(kind, tuple(sorted(free[:count])), grouping, draw(st.booleans()), tuple(schedulers))
        )
        free = free[count:]
    # A copy is a plain dict, and is not restored into one of other names or shapes.
    steady = [place for place, of in enumerate(modules) if of.kind not in ("extra state", "growing buffer")]
    copied = draw(st.lists(st.sampled_from(steady), max_size=1)) if steady else []
    refused = draw(st.integers(0, 5)) == 0
    kinds = list(STATEFULS) if refused else [kind for kind in STATEFULS if kind not in MAY_REFUSE]
    return Recipe(
        modules=tuple(modules),
        optimizers=tuple(optimizers),
        statefuls=tuple(draw(st.lists(st.sampled_from(kinds), max_size=2))),
        values=tuple(draw(st.lists(values, max_size=2))),
        copies=tuple(copied),
        steps=draw(st.integers(0, 2)),
        holder=draw(st.sampled_from(["flat", "dict", "list", "tuple"])),
    )


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Draw how the twin differs."""
    return Change(
        steps=draw(st.integers(0, 2)),
        wraps=tuple(draw(st.lists(st.none() | _wraps, max_size=3))),
        is_reordered=draw(st.integers(0, 3)) == 0,
        blank=draw(st.sampled_from(["same", "same", "none"])),
        is_elsewhere=draw(st.integers(0, 3)) == 0,
    )
