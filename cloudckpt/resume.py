"""Capture and put back what else makes a run the same run: the random number generators of this process.

Plain values for the codec: nothing here touches a store. NumPy's generator counts only if the program imported
NumPy's random module; a device's only if the device is there.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping

import torch

__all__ = ["capture_rng", "restore_rng"]

logger = logging.getLogger(__name__)


def capture_rng() -> dict[str, object]:
    """Return the state of python's, NumPy's and torch's generators (CPU and every initialised accelerator)."""
    states: dict[str, object] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy.random" in sys.modules:
        import numpy as np

        states["numpy"] = np.random.get_state()  # noqa: NPY002 (the global generator is what programs have used)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


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
    _restore_cuda(states.get("cuda"))


def _restore_cuda(saved: object) -> None:
    if not isinstance(saved, list):
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(saved[:present]):
        torch.cuda.set_rng_state(state, device)
    if len(saved) != present:
        logger.warning("the checkpoint has the generators of %d CUDA devices and %d are here", len(saved), present)
