"""Turn a few source files of Python's own standard library into shuffled batches, with a place to come back to.

The text is there wherever Python is, so the example downloads nothing. Tokens are plain bytes. `Loader` is
`Stateful` in PyTorch's sense (`state_dict`, `load_state_dict`), which is all that cloudckpt needs to bring a
shuffled data set back to the middle of an epoch.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MODULES", "Loader", "read_corpus"]

MODULES = ("bisect", "heapq", "queue", "textwrap")


def read_corpus(modules: tuple[str, ...] = MODULES) -> Tensor:
    """Return the sources of standard library modules, joined in the order given, as one int64 tensor of bytes.

    Raises:
        FileNotFoundError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join((library / f"{name}.py").read_bytes() for name in modules)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Loader:
    """Endless batches of (inputs, targets), shuffled anew in every data epoch by a generator of its own.

    The saved state is the place in the data, not the data: the epoch, the batches already handed out, and the
    generator as it was before this epoch's shuffle, from which the same order is drawn again.

    Attributes:
        data_epoch: passes over the data that are complete.
        position: batches of this data epoch already handed out.
    """

    def __init__(self, tokens: Tensor, *, context: int, batch_size: int, seed: int) -> None:
        window = context + 1
        self._windows = tokens[: len(tokens) // window * window].view(-1, window)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self.data_epoch = 0
        self._shuffle()

    def __len__(self) -> int:
        """Count the whole batches of one data epoch."""
        return len(self._windows) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == len(self):
            self.data_epoch += 1
            self._shuffle()
        start = self.position * self._batch_size
        batch = self._windows[self._order[start : start + self._batch_size]]
        self.position += 1
        return batch[:, :-1], batch[:, 1:]

    def state_dict(self) -> dict[str, object]:
        return {"data_epoch": self.data_epoch, "position": self.position, "generator": self._generator_before}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        generator, data_epoch, position = state["generator"], state["data_epoch"], state["position"]
        if not (isinstance(generator, Tensor) and isinstance(data_epoch, int) and isinstance(position, int)):
            raise TypeError(f"not the state of a Loader: {state!r}")
        self._generator.set_state(generator)
        self._shuffle()
        self.data_epoch = data_epoch
        self.position = position

    def _shuffle(self) -> None:
        self._generator_before = self._generator.get_state()
        self._order = torch.randperm(len(self._windows), generator=self._generator)
        self.position = 0
