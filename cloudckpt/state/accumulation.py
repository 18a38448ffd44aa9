"""Keep count of the micro-batches between two optimizer steps, and keep or refuse to save their gradients.

    advance() × steps ──▶ True: step, zero_grad          a save here needs no gradients
    a save in between ──▶ refused, or gradients by parameter name beside the position

A distributed gradient is saved as one tensor and reshards. A plain one is each rank's own when there are several
ranks: under DDP's `no_sync` they differ until the last micro-batch. Knows parameters and their `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from cloudckpt.errors import OptionsError, StateMismatchError
from cloudckpt.format import Flat, PathElement
from cloudckpt.late import DTensor, FSDPModule
from cloudckpt.ranks import Group
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of, shape_of
from cloudckpt.state.per_rank import RankName
from cloudckpt.state.wrappers import clean_name, is_fsdp1

__all__ = ["AccumulationWindow", "WindowEntry"]

_GRADIENTS = "gradients"


class AccumulationWindow:
    """The micro-batches whose gradients make one optimizer step; an object of the state.

    ```python
    window = AccumulationWindow(model, steps=4, on_save="keep")
    for batch in batches:
        (loss(batch) / window.steps).backward()
        if window.advance():
            optimizer.step()
            optimizer.zero_grad()
    ```

    Save it with the model: `{"model": model, "optimizer": optimizer, "window": window}`. A restore puts the gradients
    and the position back, and clears the gradients where the checkpoint has none.

    Attributes:
        steps: micro-batches per optimizer step.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[torch.Tensor],
        steps: int,
        *,
        on_save: Literal["refuse", "keep"] = "refuse",
    ) -> None:
        """Begin a window.

        Args:
            model: whose gradients are kept; parameters without a model are known by their place.
            steps: micro-batches per optimizer step.
            on_save: what a save in the middle of a window does: `refuse` raises, `keep` saves the gradients. Where
                they lie in `.grad` as plain tensors, only as many ranks as saved them can restore them.

        Raises:
            OptionsError: fewer steps than 1, another `on_save`, or `keep` for an FSDP1 module.
        """
        if steps < 1 or on_save not in ("refuse", "keep"):
            raise OptionsError(f"steps is {steps} and on_save {on_save!r}; give 1 or more, and 'refuse' or 'keep'")
        self._model = model if isinstance(model, nn.Module) else None
        self._parameters = _named(model)
        if on_save == "keep" and self._model is not None and is_fsdp1(self._model):
            raise OptionsError(
                "on_save='keep' cannot name the gradients of an FSDP1 module, which are flattened; use fully_shard, "
                "or on_save='refuse' and save where a window begins"
            )
        self.steps = steps
        self._on_save = on_save
        self._position = 0

    @property
    def position(self) -> int:
        """Micro-batches since the last optimizer step."""
        return self._position

    def advance(self) -> bool:
        """Count one micro-batch, after its backward pass; return whether it is time for the optimizer step."""
        self._position = (self._position + 1) % self.steps
        return self._position == 0

    def state_dict(self) -> dict[str, object]:
        """Return the position, and in the middle of a window the gradients by parameter name, not copied.

        Raises:
            OptionsError: it is the middle of a window, and gradients are not to be kept or cannot be.
        """
        state: dict[str, object] = {"position": self._position, "steps": self.steps}
        if self._position:
            state[_GRADIENTS] = self._gradients()
        return state

    def _gradients(self) -> dict[str, torch.Tensor]:
        where = f"{self._position} of {self.steps} micro-batches are accumulated"
        if self._on_save == "refuse":
            raise OptionsError(
                f"{where}, and their gradients would be lost; save after the optimizer step (position 0), or give "
                "AccumulationWindow on_save='keep'"
            )
        found = {name: held.grad for name, held in self._parameters.items() if held.grad is not None}
        if not found or (self._model is not None and _has_hidden_gradients(self._model)):
            raise OptionsError(
                f"{where}, and not all of it is in .grad, where it could be kept; with fully_shard leave "
                "set_requires_gradient_sync on, or save after the optimizer step"
            )
        partial = [name for name, gradient in found.items() if _is_partial(gradient)]
        if partial:
            raise OptionsError(
                f"{where}, and the gradient of {partial[0]} is a sum that is not made yet; redistribute it first, or "
                "save after the optimizer step"
            )
        return found

    def state_dict_misfits(self, state_dict: Mapping[str, object]) -> Sequence[str]:
        """Return why a state cannot be taken, in words."""
        position, steps = state_dict.get("position"), state_dict.get("steps")
        if type(position) is not int or type(steps) is not int or not 0 <= position < steps:
            return ["is no state of an AccumulationWindow in the checkpoint"]
        if position and steps != self.steps:
            text = f"was saved after {position} of {steps} micro-batches and has windows of {self.steps} here "
            return [text + f"(restore with steps={steps}, or restore a checkpoint from where a window begins)"]
        return []

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Put the position and the gradients back; a parameter without a saved gradient has none from now on.

        Raises:
            StateMismatchError: the state is of other windows or parameters; nothing was changed.
        """
        gradients = mapping_of(state_dict.get(_GRADIENTS, {}), _GRADIENTS)
        unknown = [name for name in gradients if name not in self._parameters]
        reasons = [f"has a gradient of {name}, unknown here" for name in unknown]
        reasons += self.state_dict_misfits(state_dict)
        if reasons:
            raise StateMismatchError(f"the accumulation window {'; '.join(reasons)}", unexpected=unknown)
        self._position = int(str(state_dict["position"]))
        for parameter in self._parameters.values():
            parameter.grad = None
        self.put(gradients)

    # -- for the adapter ---------------------------------------------------------------------------------------

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return a parameter by name."""
        return self._parameters.get(name)

    def put(self, gradients: Mapping[str, object]) -> None:
        """Put gradients of known parameters in their place, in the dtype that the parameter's must have."""
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            if isinstance(gradient, torch.Tensor):
                dtype = getattr(parameter, "grad_dtype", parameter.dtype)  # None: any
                parameter.grad = gradient if dtype in (None, gradient.dtype) else gradient.to(dtype)


def _named(model: nn.Module | Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(model, nn.Module):
        return {clean_name(model, path): held for path, held in model.named_parameters() if held.requires_grad}
    return {str(place): held for place, held in enumerate(model)}


def _has_hidden_gradients(model: nn.Module) -> bool:
    """Tell whether `fully_shard` holds gradients back that were not reduced yet."""
    for part in model.modules():
        groups = part._get_fsdp_state()._fsdp_param_groups if isinstance(part, FSDPModule) else ()  # noqa: SLF001
        for held in (held for group in groups for held in group.fsdp_params):
            whole = getattr(held, "_unsharded_param", None)
            if held.unsharded_accumulated_grad is not None or getattr(whole, "grad", None) is not None:
                return True
    return False


def _is_partial(gradient: torch.Tensor) -> bool:
    return isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements)


class WindowEntry(Entry):
    """A window: its position is the same on all ranks, plain gradients are each rank's own."""

    other_world = "restore it with as many ranks, or a checkpoint from where a window begins"

    def __init__(self, place: Place, window: AccumulationWindow) -> None:
        super().__init__(place)
        self._window = window
        self._prefix = f"{place.name}.{_GRADIENTS}."

    def current(self) -> object:
        return self._window.state_dict()

    def fillable(self) -> object:
        return {}  # gradients that are here now are not filled: what is restored replaces them

    def flat(self, nested: object) -> Flat:
        state = dict(mapping_of(nested, self.name))
        gradients = mapping_of(state.pop(_GRADIENTS, {}), self.name)
        is_alone = Group.of_world().size == 1
        shared = {name: held for name, held in gradients.items() if is_alone or isinstance(held, DTensor)}
        flat = super().flat({**state, _GRADIENTS: shared} if shared else state)
        for name, held in gradients.items():
            if name not in shared:
                flat.leaves[str(RankName.here(self._prefix + name))] = held
        return flat

    def allocate(self, below: Sequence[PathElement], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        is_gradient = len(below) == 2 and below[0] == _GRADIENTS
        found = self._like_parameter(str(below[1]), shape, dtype) if is_gradient else None
        return super().allocate(below, shape, dtype) if found is None else found

    def _like_parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        parameter = self._window.parameter(name)
        if parameter is None or shape_of(parameter) != shape:
            return None
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Compare the windows, and the parameters that have gradients."""
        state = mapping_of(restored, self.name)
        misfit = Misfit(reasons=[f"{self.name} {reason}" for reason in self._window.state_dict_misfits(state)])
        for name, gradient in mapping_of(state.get(_GRADIENTS, {}), self.name).items():
            parameter = self._window.parameter(name)
            if parameter is None or shape_of(parameter) != shape_of(gradient):
                misfit.reasons.append(f"{self._prefix}{name} belongs to no parameter of that shape here")
        return misfit

    def load(self, restored: object, live: object) -> None:
        self._window.load_state_dict(mapping_of(restored, self.name))

    def holds_own(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def allocate_own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return self._like_parameter(name.removeprefix(self._prefix), shape, dtype)

    def load_own(self, own: Mapping[str, torch.Tensor]) -> None:
        self._window.put({name.removeprefix(self._prefix): held for name, held in own.items()})
