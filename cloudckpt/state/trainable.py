"""Save of a module only what training changes: not its frozen parameters, which are there before a restore.

Names are those of the module, so that an optimizer beside it has the names of its parameters. Knows PyTorch's modules.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from cloudckpt.errors import OptionsError
from cloudckpt.state.attributes import names_above
from cloudckpt.state.beside import named_parameters
from cloudckpt.state.entry import Left, Place
from cloudckpt.state.modules import ModuleEntry
from cloudckpt.state.plain import PlainModules
from cloudckpt.state.wrappers import is_fsdp1

__all__ = ["Trainable", "TrainableEntry"]


class Trainable:
    """A module of the state without its frozen parameters, such as a large model of which adapters are trained.

    ```python
    state = {"model": Trainable(model), "optimizer": optimizer}
    ```

    Parameters that require no gradient are neither saved nor restored, nor is what the module's state_dict has below
    their names (`weight.absmax`); parameters that do, buffers and extra state are, under the names that they have
    without `Trainable`. The frozen ones must be there before a restore, from where they were taken at first: a
    checkpoint does not say what they were. Freeze before saving and before restoring; where other parameters are frozen
    than when it was saved, the names differ, and that is an error that lists them.

    Attributes:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        """Mark `module`.

        Raises:
            OptionsError: it is no module, or FSDP1 has flattened its parameters, of which a part may be frozen.
        """
        if not isinstance(module, nn.Module):
            raise OptionsError(f"Trainable is for a module, not for a {type(module).__name__}")
        if is_fsdp1(module):
            raise OptionsError("Trainable does not know which parameters FSDP1 has flattened; use fully_shard")
        self.module = module


class TrainableEntry(ModuleEntry):
    """A module, some of whose names are as if they were not there."""

    def __init__(self, place: Place, marked: Trainable, plain: PlainModules) -> None:
        super().__init__(place, marked.module, plain)

    def current(self) -> object:
        found, frozen = super().current(), self._frozen()
        return {name: value for name, value in dict(found).items() if _is_kept(name, frozen)}  # type: ignore[call-overload]

    def _tensors(self) -> dict[str, torch.Tensor] | None:
        found = super()._tensors()
        if found is None:
            return None
        frozen = self._frozen()
        return {name: tensor for name, tensor in found.items() if _is_kept(name, frozen)}

    def _frozen(self) -> set[str]:
        return {name for name, parameter in named_parameters(self._module) if not parameter.requires_grad}

    def load(self, restored: object, live: object) -> Left:
        self.is_strict = False  # what is frozen is not handed over
        left, prefix, frozen = super().load(restored, live), f"{self.name}.", self._frozen()
        missing = [name for name in left.missing if _is_kept(name.removeprefix(prefix), frozen)]
        return Left(missing=missing, unexpected=left.unexpected)


def _is_kept(name: str, frozen: Container[str]) -> bool:
    return name not in frozen and not any(above in frozen for above in names_above(name))
