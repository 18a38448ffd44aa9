"""Capture and put back what else makes a run the same run: the random number generators of this process.

Each rank has its own generators, so each saves them as a tensor of its own name, which stays out of the index: bytes
of the codec's JSON, padded so that their number stays the same from save to save. Nothing here touches a store.
NumPy's generator counts only if the program imported NumPy's random module; a device's only if the device is there.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import cast

import torch

from cloudckpt.format import Index
from cloudckpt.state.per_rank import pack, unpack

__all__ = ["Generators", "capture_rng", "restore_rng", "set_generator"]

logger = logging.getLogger(__name__)

_NAME = "cloudckpt.rng"


class Generators:
    """The random number generators of one rank, as a tensor beside the state."""

    def __init__(self, rank: int) -> None:
        """Those of this process, which is `rank`."""
        self.name = f"{_NAME}.r{rank:05d}"
        self._rank = rank
        self._others = 0

    def pack(self) -> torch.Tensor:
        """Return their states as bytes."""
        return pack(capture_rng(), key=_NAME)

    def targets(self, index: Index) -> dict[str, torch.Tensor]:
        """Return the tensor that is to be filled with them, if a checkpoint has them."""
        self._others = sum(name.startswith(f"{_NAME}.r") for name in index.tensors)
        saved = index.tensors.get(self.name)
        return {} if saved is None else {self.name: torch.empty(saved.shape, dtype=torch.uint8, device="cpu")}

    def apply(self, filled: Mapping[str, torch.Tensor]) -> None:
        """Put them back; a checkpoint that has none for this rank leaves them as they are, and the log says so."""
        states = unpack(filled[self.name], key=_NAME) if self.name in filled else None
        if isinstance(states, dict):
            restore_rng(cast("dict[str, object]", states))
        elif self._others:
            logger.warning(
                "rank %d: the checkpoint holds random number generators of %d ranks and none of this one, which keeps "
                "its own; seed it if runs are to be the same",
                self._rank,
                self._others,
            )
        else:
            logger.warning("the checkpoint holds no random number generator state; this process keeps its own")


# torch's own names of the devices that have generators; ROCm's devices are called cuda, too.
_DEVICES = ("cuda", "xpu", "mps")


def capture_rng() -> dict[str, object]:
    """Return the state of python's, NumPy's and torch's generators: the CPU's and every initialised device's."""
    states: dict[str, object] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy.random" in sys.modules:
        import numpy as np

        states["numpy"] = np.random.get_state()  # noqa: NPY002 (the global generator is what programs have used)
    for name in _DEVICES:
        if _is_in_use(name):
            module = torch.get_device_module(name)
            states[name] = [module.get_rng_state()] if name == "mps" else list(module.get_rng_state_all())
    return states


def _is_in_use(name: str) -> bool:
    """Tell whether a kind of device is here and this process uses it; asking for states would initialise it."""
    if name == "mps":
        return torch.backends.mps.is_available()
    module = torch.get_device_module(name)
    return bool(module.is_available() and module.is_initialized())


def restore_rng(states: Mapping[str, object]) -> None:
    """Put the generators back where `capture_rng` saw them.

    A device that is not here any more, or is here for the first time, keeps its own state, and the log says so.
    """
    if "python" in states:
        random.setstate(states["python"])  # type: ignore[arg-type]
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])  # type: ignore[arg-type]  # noqa: NPY002
    if isinstance(states.get("torch"), torch.Tensor):
        torch.set_rng_state(states["torch"])  # type: ignore[arg-type]
    for name in _DEVICES:
        saved = states.get(name)
        if isinstance(saved, list):
            _restore_devices(name, saved)


def _restore_devices(name: str, saved: list[torch.Tensor]) -> None:
    module = torch.get_device_module(name)
    present = module.device_count() if module.is_available() else 0
    for device, state in enumerate(saved[:present]):
        if name == "mps":
            torch.mps.set_rng_state(state)
        else:
            module.set_rng_state(state, device)
    if len(saved) != present:
        logger.warning("the checkpoint has the generators of %d %s devices; %d are here", len(saved), name, present)


def set_generator(live: object, restored: object) -> bool:
    """Have a generator of the state draw on like a restored one, for whoever holds it; tell whether that was done."""
    if isinstance(live, torch.Generator) and isinstance(restored, torch.Generator) and live.device == restored.device:
        live.set_state(restored.get_state())
        return True
    if type(live) is random.Random and type(restored) is random.Random:
        live.setstate(restored.getstate())
        return True
    return "numpy.random" in sys.modules and _set_numpy_generator(live, restored)


def _set_numpy_generator(live: object, restored: object) -> bool:
    import numpy as np

    if isinstance(live, np.random.RandomState) and isinstance(restored, np.random.RandomState):
        if type(live._bit_generator) is not type(restored._bit_generator):  # noqa: SLF001
            live.__init__(restored._bit_generator)  # type: ignore[misc]  # noqa: SLF001
        live.set_state(restored.get_state(legacy=False))
        return True
    if not (isinstance(live, np.random.Generator) and isinstance(restored, np.random.Generator)):
        return False
    here, there = live.bit_generator, restored.bit_generator
    seed: object = getattr(there, "seed_seq", None)
    if type(here) is type(there) and getattr(seed, "n_children_spawned", None) == 0:
        here.state = there.state
    else:
        # What it has spawned belongs to its seed, which no setter changes.
        live.__init__(there)  # type: ignore[misc]
    return True
