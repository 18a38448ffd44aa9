"""Put tensors that one rank has and others take into bytes that can be sent, and back.

    Countdown   are the tensors complete?        Packet   which tensors, from whom, for whom

One dense host tensor is sent from, and received into, its own memory; several small ones travel in one buffer. Knows
tensors; sends nothing itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Countdown", "Packet", "landing_of", "packed", "slices", "unpack"]

_SLICE_BYTES = 64 << 20


class Countdown:
    """Something that is ready when all of its parts are, or never will be."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._is_given_up = False
        self._changed = threading.Condition()

    def count_down(self) -> None:
        """Note that a part is there."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def give_up(self) -> None:
        """Note that what is missing now will never come."""
        with self._changed:
            self._is_given_up = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Wait until it is decided; return whether it is ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._count <= 0 or self._is_given_up)
            return self._count <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """Tensors that one rank has, or will have, and others take.

    Attributes:
        reader: who has them.
        takers: who takes them.
        tensors: this rank's own, of the same dtypes and sizes everywhere; filled on the takers.
        is_ready: on the reader: whether they are complete.
    """

    reader: int
    takers: tuple[int, ...]
    tensors: tuple[torch.Tensor, ...]
    is_ready: Countdown | None = None

    def give_up(self) -> None:
        """Send no tensors any more that are not complete."""
        if self.is_ready is not None:
            self.is_ready.give_up()


def _is_direct(tensors: Sequence[torch.Tensor]) -> bool:
    """Tell whether a packet's bytes can be sent from, or received into, the tensor itself."""
    only = tensors[0]
    return len(tensors) == 1 and only.device.type == "cpu" and only.is_contiguous() and type(only) is torch.Tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Not reshape(-1): one element of a wider tensor is contiguous, whatever its stride is.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes to be sent: the tensor's own memory where that is dense on the host."""
    if _is_direct(tensors):
        return _as_bytes(tensors[0])
    return torch.cat([_as_bytes(tensor.to("cpu").contiguous()) for tensor in tensors])


def landing_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the memory to receive into."""
    if _is_direct(tensors):
        return _as_bytes(tensors[0])
    return torch.empty(sum(tensor.numel() * tensor.itemsize for tensor in tensors), dtype=torch.uint8, device="cpu")


def unpack(body: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Put received bytes into the tensors, where they are not there already."""
    if _is_direct(tensors):
        return
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            stop = start + tensor.numel() * tensor.itemsize
            # A clone starts at an aligned address, which the view as another dtype needs.
            tensor.copy_(body[start:stop].clone().view(tensor.dtype).reshape(tensor.shape))
            start = stop


def slices(body: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut bytes into messages of bounded size."""
    for start in range(0, body.numel(), _SLICE_BYTES):
        yield body[start : start + _SLICE_BYTES]
