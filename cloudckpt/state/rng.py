"""Capture and put back what else makes a run the same run: the random number generators of this process.

Each rank has its own generators, so each saves them as a tensor of its own name, which stays out of the index: bytes
of the codec's JSON, padded so that their number stays the same from save to save. Nothing here touches a store.
NumPy's generator counts only if the program imported NumPy's random module; a device's only if the device is there.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch

from cloudckpt.errors import CloudCkptError
from cloudckpt.format import Index, codec
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
        states["numpy"] = _numpy_state()
    for name in _DEVICES:
        if _is_in_use(name):
            module = torch.get_device_module(name)
            states[name] = [module.get_rng_state()] if name == "mps" else list(module.get_rng_state_all())
    return states


def _numpy_state() -> object:
    import numpy as np

    generators: Any = np.random
    is_usual = type(generators.get_bit_generator()) is np.random.MT19937
    return generators.get_state(legacy=is_usual)  # (the global generator is what programs have used)


def _is_in_use(name: str) -> bool:
    """Tell whether a kind of device is here and this process uses it; asking for states would initialise it."""
    if name == "mps":
        return torch.backends.mps.is_available()
    module = torch.get_device_module(name)
    return bool(module.is_available() and module.is_initialized())


def restore_rng(states: Mapping[str, object]) -> None:
    """Put the generators back where `capture_rng` saw them.

    A device that is not here any more, or is here for the first time, keeps its own state, and the log says so; so does
    a generator that does not take what was saved, which another version of its library may have made.
    """
    setters: dict[str, Callable[[Any], object]] = {
        "python": random.setstate,
        "numpy": _restore_numpy,
        "torch": torch.set_rng_state,
        **{name: partial(_restore_devices, name) for name in _DEVICES},
    }
    for name, restore in setters.items():
        if name in states:
            try:
                restore(states[name])
            except (CloudCkptError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as exc:
                logger.warning(
                    "the generator of %s keeps its own state, which is NOT the saved one (%s: %s); seed it if runs are "
                    "to be the same",
                    name,
                    type(exc).__name__,
                    exc,
                )


def _restore_numpy(saved: object) -> None:
    """Put NumPy's global generator back; a program may have put another bit generator into it, before or since."""
    import numpy as np

    generators: Any = np.random
    if isinstance(saved, dict):
        # By the codec, which looks at the places in buffers that numpy trusts.
        made: Any = codec.decode({"$numpy.RandomState": codec.encode(saved, key=_NAME)}, key=_NAME)
        source = made._bit_generator  # noqa: SLF001 (no other way to it)
    else:
        source = np.random.MT19937(0)
    if type(generators.get_bit_generator()) is not type(source):
        generators.set_bit_generator(source)
    generators.set_state(saved)


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
    if type(here) is type(there):
        # With its seed, to which what it has spawned belongs; whoever else draws from it goes on, too.
        here.__setstate__((there.state, there.seed_seq))  # type: ignore[attr-defined]
    else:
        live.__init__(there)  # type: ignore[misc]
    return True
