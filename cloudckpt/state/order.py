"""Put the samples of each data epoch into one order, which depends on a seed and not on how many ranks there are.

    (seed, data epoch) ──▶ all samples in that order, and a digest by which the order of some other torch is told

Knows no ranks, and nothing of where training stands. One order is kept, of the data epoch that was last asked for.
"""

from __future__ import annotations

import torch
import xxhash

__all__ = ["Order", "mixed"]


class Order:
    """The orders of the samples 0 to `length` - 1, one for each data epoch.

    Attributes:
        length: how many samples there are.
        seed: of the orders.
        is_shuffled: whether they differ; else each is that of the data set.
    """

    def __init__(self, length: int, *, seed: int, is_shuffled: bool) -> None:
        self.length = length
        self.seed = seed
        self.is_shuffled = is_shuffled
        self._numbers: tuple[int, torch.Tensor] | None = None
        self._fingerprint: tuple[int, str] | None = None

    def samples(self, data_epoch: int, places: torch.Tensor) -> torch.Tensor:
        """Return the samples at some places of a data epoch's order."""
        return self._of(data_epoch)[places] if self.is_shuffled else places

    def _of(self, data_epoch: int) -> torch.Tensor:
        if self._numbers is None or self._numbers[0] != data_epoch:
            generator = torch.Generator("cpu").manual_seed(mixed(self.seed, data_epoch))
            self._numbers = data_epoch, torch.randperm(self.length, generator=generator, device="cpu")
        return self._numbers[1]

    def fingerprint(self, data_epoch: int) -> str:
        """Return a digest of an order, so that another one that some other torch makes of the seed is noticed."""
        if not self.is_shuffled:
            return ""
        if self._fingerprint is None or self._fingerprint[0] != data_epoch:
            self._fingerprint = data_epoch, xxhash.xxh3_64_hexdigest(self._of(data_epoch).numpy().data)
        return self._fingerprint[1]


def mixed(*numbers: int) -> int:
    """Return one seed from several numbers, so that close ones have nothing in common."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, numbers)).encode()) >> 1
