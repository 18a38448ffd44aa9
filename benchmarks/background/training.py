"""Turn the processors into what a training job makes of them: steps of one length, one after the other.

Forward, backward and optimizer of a small network on all cores, with torch's own threads. Its parameters are not part
of the state that is saved, so that what was saved can be checked value by value. Knows nothing of checkpoints.
"""

from __future__ import annotations

import time

import torch
from torch import nn

__all__ = ["Trainer"]

_LAYERS = 4
_ROWS = 256
_WARM_UP_STEPS = 20
_LARGEST_HEAP_BYTES = 31 << 20


class Trainer:
    """A network, its optimizer and one batch; warmed up when made."""

    def __init__(self, width: int, *, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        layers = [module for _ in range(_LAYERS) for module in (nn.Linear(width, width), nn.GELU())]
        self._model = nn.Sequential(*layers)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(_ROWS, width)
        # glibc gives memory back to the system after each step until something nearly as large as this was freed once.
        # In a job that was long ago; here it would be in the first save, and steps would be shorter from then on.
        torch.empty(_LARGEST_HEAP_BYTES, dtype=torch.uint8)
        self.steps_s(_WARM_UP_STEPS)

    def step_s(self) -> float:
        """Train one step; return the seconds that it took."""
        begin_s = time.perf_counter()
        self._optimizer.zero_grad()
        loss = (self._model(self._batch) - self._batch).square().mean()
        loss.backward()
        self._optimizer.step()
        loss.item()
        return time.perf_counter() - begin_s

    def steps_s(self, count: int) -> list[float]:
        """Train several steps; return the seconds of each."""
        return [self.step_s() for _ in range(count)]
