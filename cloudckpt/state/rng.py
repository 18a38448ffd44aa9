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
from typing import Any, Self

import torch

from cloudckpt.errors import CloudCkptError, OptionsError
from cloudckpt.format import Flat, codec
from cloudckpt.state.entry import Entry, Misfit, Place, mapping_of
from cloudckpt.state.per_rank import RNG, RankName, pack, unpack

__all__ = ["RandomState", "RandomStateEntry", "capture_rng", "restore_rng", "set_generator"]

logger = logging.getLogger(__name__)


class RandomState:
    """The random number generators of this process as one object of a state: python's, NumPy's, torch's, all devices'.

    ```python
    state = {"model": model, "rng": RandomState()}
    ```

    Each rank has its own. A restore gives the generators the saved states when all else is restored, and keeps these
    for `apply`: what a framework does after it has loaded, as skipping batches, moves the generators again. A manager
    with `save_rng` saves and restores the same, under the same names, also without this object in the state. On
    another number of ranks each takes the generators of the rank of its number; one beyond those that saved keeps its
    own, which the log and `Checkpoint.fit` say.
    """

    def __init__(self) -> None:
        """Stand for the generators as they are when a save or a restore comes."""
        self._kept: dict[str, object] | None = None

    def state_dict(self) -> dict[str, object]:
        """Return the states of all generators now; of a device, only if this process uses it."""
        return capture_rng()

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Give the generators what `state_dict` returned, and keep it for one `apply`."""
        self._kept = dict(state_dict)
        restore_rng(self._kept)

    def apply(self) -> bool:
        """Give the generators what the last restore brought once more, and forget it; call it where training goes on.

        Returns:
            Whether there was something; False after a fresh start, and when it was applied before.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            restore_rng(kept)
        return kept is not None


class RandomStateEntry(Entry):
    """The generators of this rank, one tensor of a name that only this rank has."""

    is_last = True  # what other objects do may draw numbers
    is_elastic = True

    def __init__(self, place: Place, generators: RandomState) -> None:
        super().__init__(place)
        self._generators = generators

    @classmethod
    def beside(cls) -> Self:
        """Return that of a state which has no such object."""
        made = cls(Place([RNG], RNG, None, {}, ""), RandomState())
        made.is_beside = True
        return made

    def current(self) -> object:
        return pack(self._generators.state_dict(), key=self.name)

    def flat(self, nested: object) -> Flat:
        return Flat({str(RankName.here(RNG)): nested}) if isinstance(nested, torch.Tensor) else super().flat(nested)

    def fillable(self) -> object:
        return {}

    def holds_own(self, name: str) -> bool:
        return name == RNG

    def allocate_own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device="cpu") if dtype == torch.uint8 and len(shape) == 1 else None

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        return Misfit(reasons=[f"{self.name} is a RandomState here and something else there"])

    def load(self, restored: object, live: object) -> None:
        raise OptionsError(f"{self.name!r} is no RandomState in the checkpoint")

    def load_own(self, own: Mapping[str, torch.Tensor]) -> None:
        """Give the generators their states; a checkpoint that has none here leaves them, and the log says so."""
        if RNG in own:
            self._generators.load_state_dict(mapping_of(unpack(own[RNG], key=self.name), self.name))
        elif self.others:
            logger.warning(
                "rank %d: the checkpoint holds random number generators of %d ranks and none of this one, which keeps "
                "its own; seed it if runs are to be the same",
                RankName.here(RNG).rank,
                self.others,
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
        made: Any = codec.decode({"$numpy.RandomState": codec.encode(saved, key=RNG)}, key=RNG)
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
