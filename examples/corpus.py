"""Turn a few source files of Python's own standard library into a data set of short sequences.

The text is there wherever Python is, so the example downloads nothing. Tokens are plain bytes. In which order the
sequences come, and where in that order training stands, is not known here: that is the sampler's.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cloudckpt import ResumableSampler

__all__ = ["MODULES", "Windows", "endless", "read_corpus"]

# So few that a short run sees all of it several times, and is interrupted in the middle of the third or the fourth.
MODULES = ("bisect", "textwrap")

Pair = tuple[Tensor, Tensor]


def read_corpus(modules: tuple[str, ...] = MODULES) -> Tensor:
    """Return the sources of standard library modules, joined in the order given, as one int64 tensor of bytes.

    Raises:
        FileNotFoundError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join((library / f"{name}.py").read_bytes() for name in modules)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Windows(Dataset[Pair]):
    """The text in pieces of one length: (inputs, targets), int64, the targets one token ahead."""

    def __init__(self, tokens: Tensor, *, context: int) -> None:
        window = context + 1
        self._windows = tokens[: len(tokens) // window * window].view(-1, window)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, place: int) -> Pair:
        window = self._windows[place]
        return window[:-1], window[1:]


def endless(sampler: ResumableSampler, loader: DataLoader[Pair]) -> Iterator[Pair]:
    """Yield what is left of the data epoch in which the sampler stands, then data epoch after data epoch."""
    while True:
        yield from sampler.batches(loader)
