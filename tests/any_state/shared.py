"""Describe and build states whose parts lie in one memory: modules, objects and containers with views of a few bases.

shared_recipes() ──▶ SharedRecipe ──build(recipe, seed)──▶ state ──look──▶ plain data by name

Also what has more to it than its bytes: a Parameter beside its detach, conjugated views, generators that have spawned,
factories of defaultdicts.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Generator, nn

from tests.any_state.looking import bits

State = dict[str, Any]


def _complex(base: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(base.view(4, 2))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda base: base,
    "part": lambda base: base[1:5],
    "every other": lambda base: base[::2],
    "square": lambda base: base.view(2, 4),
    "turned": lambda base: base.view(2, 4).t(),
    "integers": lambda base: base.view(torch.int32),
    "complex": _complex,
    "conjugate": lambda base: _complex(base).conj(),
    "negated": lambda base: _complex(base).conj().imag,
    "parameter": nn.Parameter,
    "gradient": lambda base: base.detach().requires_grad_(),
}


class Holding(nn.Module):
    """Has whatever tensors it is given."""

    def __init__(self, held: State) -> None:
        super().__init__()
        for name, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor.detach())


class OwnLoading(Holding):
    """Loads by code of its own."""

    def _load_from_state_dict(self, *args: Any) -> None:
        return super()._load_from_state_dict(*args)


class Keeping:
    """Keeps what it is handed."""

    def __init__(self, held: State) -> None:
        self.held = held

    def state_dict(self) -> State:
        return self.held

    def load_state_dict(self, state: State) -> None:
        self.held = state


class Copying(Keeping):
    """Copies what it is handed to where it has the same."""

    def load_state_dict(self, state: State) -> None:
        with torch.no_grad():
            for name, tensor in self.held.items():
                tensor.copy_(state[name])


HOLDERS: dict[str, Callable[[State], Any]] = {
    "module": Holding,
    "half own": lambda held: nn.ModuleList(
        [Holding(dict([pair])) if n % 2 else OwnLoading(dict([pair])) for n, pair in enumerate(held.items())]
    ),
    "own module": OwnLoading,
    "keeping": Keeping,
    "copying": Copying,
    "dict": dict,
    "list": lambda held: list(held.values()),
    "factory": lambda held: collections.defaultdict(list, held),
}
FACTORIES = {"list": list, "int": int, "none": None}


@dataclass(frozen=True)
class SharedRecipe:
    """A state.

    Attributes:
        held: by holder, what it has: which base, of the saved state and of the twin, and which view of it.
        factories: of a defaultdict with a tensor, of the saved state and of the twin.
        spawned: how often a generator has spawned, and its seed, of each of the two.
    """

    held: tuple[tuple[str, tuple[tuple[int, int, str], ...]], ...]
    factories: tuple[str, str] = ("list", "list")
    spawned: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def is_alike(self) -> bool:
        """Whether the twin shares as the saved state did."""
        return all(there == here for _, views in self.held for there, here, _ in views)


@st.composite
def shared_recipes(draw: st.DrawFn) -> SharedRecipe:
    """Draw a state; in half of them the twin shares memory in the same way."""
    bases, is_alike = st.integers(0, 2), draw(st.booleans())
    held = []
    for holder in draw(st.lists(st.sampled_from(list(HOLDERS)), min_size=1, max_size=3)):
        kinds = draw(st.lists(st.sampled_from(list(VIEWS)), min_size=1, max_size=3))
        views = []
        for kind in kinds:
            there = draw(bases)
            views.append((there, there if is_alike else draw(bases), kind))
        held.append((holder, tuple(views)))
    factories = st.sampled_from(list(FACTORIES))
    spawns = st.tuples(st.integers(0, 2), st.integers(0, 1))
    return SharedRecipe(tuple(held), draw(st.tuples(factories, factories)), draw(st.tuples(spawns, spawns)))


def build(recipe: SharedRecipe, seed: int, *, is_twin: bool = False) -> State:
    """Build a state whose contents depend on the seed."""
    generator = Generator().manual_seed(seed)
    bases = [torch.rand(8, generator=generator) for _ in range(3)]
    state: State = {}
    for place, (holder, views) in enumerate(recipe.held):
        held = {
            f"t{number}": VIEWS[kind](bases[(there, here)[is_twin]]) for number, (there, here, kind) in enumerate(views)
        }
        state[f"s{place}"] = HOLDERS[holder](held)
    factory: Any = FACTORIES[recipe.factories[is_twin]]
    state["factory"] = collections.defaultdict(factory, {"t": torch.rand(2, generator=generator), "n": seed})
    state["plain factory"] = collections.defaultdict(factory, {"n": seed})
    count, number = recipe.spawned[is_twin]
    state["generator"] = np.random.default_rng(number)
    state["generator"].spawn(count)
    return state


def look(state: State) -> State:
    """Return all that is in a state by name, as plain data."""
    found: State = {}
    for name, value in state.items():
        if isinstance(value, np.random.Generator):
            seed: Any = value.bit_generator.seed_seq
            found[name] = repr((value.bit_generator.state, seed.entropy, seed.n_children_spawned))
            continue
        held = value.state_dict() if hasattr(value, "state_dict") else value
        found[name] = bits(held)
        if not isinstance(value, nn.Module):
            tensors = held if isinstance(held, list) else held.values()
            found[f"{name} gradients"] = [each.requires_grad for each in tensors if isinstance(each, torch.Tensor)]
    return found
