"""Build the state of a recipe from a seed, and train it.

build(recipe, seed) ──▶ Built      two of one recipe and different seeds are twins
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import Optimizer, lr_scheduler

from tests.any_state.modules import DTYPES, MODULES, WIDTH, clean, clean_names, unwrapped, wrapped
from tests.any_state.objects import STATEFULS, Stateful
from tests.any_state.optimizers import ONE_GROUP, OPTIMIZERS, SCHEDULERS
from tests.any_state.recipes import SAME, Change, OptimizerRecipe, Recipe
from tests.any_state.values import value_of

State = dict[str, Any]


@dataclass
class Built:
    """A state, and what is in it by kind."""

    recipe: Recipe
    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedulers: dict[str, tuple[str, Any]] = field(default_factory=dict)
    statefuls: dict[str, Stateful] = field(default_factory=dict)
    values: State = field(default_factory=dict)
    state: State = field(default_factory=dict)

    def objects(self) -> dict[str, Any]:
        """All that has a state_dict, by name."""
        schedulers = {name: scheduler for name, (_, scheduler) in self.schedulers.items()}
        return {**self.modules, **self.optimizers, **schedulers, **self.statefuls}

    def hold(self, holder: str) -> None:
        """Arrange everything as the caller of a save does."""
        held = self.objects()
        if holder == "flat":
            self.state = {**held, **self.values}
        elif holder == "dict":
            self.state = {"all": held, **self.values}
        else:
            row = list(held.values())
            self.state = {"all": row if holder == "list" else tuple(row), **self.values}

    def value(self, name: str) -> Any:
        """What the state holds now under a value's name."""
        return self.state[name]


def build(recipe: Recipe, seed: int, change: Change = SAME, *, is_twin: bool = False) -> Built:
    """Build a state whose contents depend on the seed; a twin has other plain values, too."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    built = Built(recipe)
    for place, of in enumerate(recipe.modules):
        # The names in a copied state_dict are the caller's, wrappers' included.
        wraps = change.wraps[place] if place < len(change.wraps) and place not in recipe.copies else None
        inside = tuple(wrap for wrap in of.wraps if wrap == "submodule")
        module = MODULES[of.kind]()
        if of.dtype != "float32":
            module = module.to(DTYPES[of.dtype])
        built.modules[f"m{place}"] = wrapped(module, of.wraps if wraps is None else (*inside, *wraps))
    for place, made in enumerate(recipe.optimizers):
        name = f"o{place}"
        # What it keeps is one vector over all parameters in their order, which has no names.
        is_reordered = change.is_reordered and made.kind != "LBFGS"
        optimizer = _optimizer(built, made, is_reordered=is_reordered)
        if optimizer is None:
            continue
        built.optimizers[name] = optimizer
        for number, kind in enumerate(made.schedulers):
            with warnings.catch_warnings(action="ignore"):
                built.schedulers[f"s{place}_{number}"] = (name, SCHEDULERS[kind](optimizer))
    built.statefuls = {f"u{place}": STATEFULS[kind](generator) for place, kind in enumerate(recipe.statefuls)}
    steps = change.steps if is_twin else recipe.steps
    for step in range(steps):
        train(built, seed * 100 + step)
    for place, tree in enumerate(recipe.values):
        is_none = is_twin and change.blank == "none"
        built.values[f"v{place}"] = None if is_none else value_of(tree, generator, is_blank=is_twin)
    for place in recipe.copies:
        kept = dict(built.modules[f"m{place}"].state_dict())
        built.values[f"c{place}"] = kept if is_twin else _moved(kept)
    built.hold(recipe.holder)
    return built


def _moved(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with contents of its own, of tensors that are no module's."""
    copied = copy.deepcopy(
        {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}
    )
    for value in copied.values():
        if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
            value.add_(1)
    return copied


def _optimizer(built: Built, of: OptimizerRecipe, *, is_reordered: bool) -> Optimizer | None:
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for place in of.modules:
        module = built.modules[f"m{place}"]
        for path, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.numel():
                named.setdefault(id(parameter), (f"m{place}.{clean(module, path)}", parameter))
    pairs = list(named.values())
    if not pairs:
        return None
    if of.grouping == "one":
        groups = [pairs]
    elif of.grouping == "each":
        groups = [[pair] for pair in pairs]
    else:
        groups = [[pair for pair in pairs if pair[1].dim() > 1], [pair for pair in pairs if pair[1].dim() <= 1]]
        groups = [group for group in groups if group]
    sorts = [group[0][0] for group in groups]
    if is_reordered:
        groups = [group[::-1] for group in groups[::-1]]
    rates = {name: 0.01 * (place + 1) for place, name in enumerate(sorted(sorts))}
    made = []
    for group in groups:
        params: Any = group if of.is_named else [parameter for _, parameter in group]
        first = min(name for name, _ in group)
        rate = {"lr": rates.get(first, 0.03)} if of.kind not in ("Adam with a tensor for lr", *ONE_GROUP) else {}
        made.append({"params": params, **rate} if of.grouping != "one" else {"params": params})
    if of.grouping == "gap" and not of.is_named:
        made.insert(1, {"params": [], "lr": 0.75})
    with warnings.catch_warnings(action="ignore"):
        return OPTIMIZERS[of.kind](made if of.kind not in ONE_GROUP else made[0]["params"])


def train(built: Built, seed: int) -> None:
    """Take a step with everything, on data and gradients that depend on the seed and on names alone."""
    generator = Generator().manual_seed(seed)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        for name, module in built.modules.items():
            of = built.recipe.modules[int(name[1:])]
            unwrapped(module)(torch.rand(3, WIDTH, generator=generator).to(DTYPES[of.dtype]))
    gradients = {}
    for module in built.modules.values():
        names = clean_names(module)
        for parameter in sorted(module.parameters(), key=lambda each: names[id(each)]):
            gradients[id(parameter)] = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for optimizer in built.optimizers.values():
        _step(optimizer, gradients)
    with warnings.catch_warnings(action="ignore"):
        for _, scheduler in built.schedulers.values():
            is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if is_plateau else scheduler.step()
    for stateful in built.statefuls.values():
        stateful.step()


def _step(optimizer: Optimizer, gradients: Mapping[int, torch.Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def closure() -> torch.Tensor:
        for parameter in parameters:
            given = gradients.get(id(parameter))
            parameter.grad = parameter.detach() / 2 if given is None else given + parameter.detach() / 8
        return torch.stack([parameter.detach().float().square().sum() for parameter in parameters]).sum()

    closure()
    optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)  # type: ignore[arg-type]
    optimizer.zero_grad()
