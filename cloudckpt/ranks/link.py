"""Carry messages and tensors between ranks: the gloo group of our own, and the one thread that uses it.

    submit(call) ──▶ the link's thread ──▶ gloo sends and receives, one after the other ──▶ a future

A gloo call cannot be given up, so it never runs on a thread that must go on: whoever waits for the future may stop
waiting, and then the link is left to itself as a whole. What gloo raises for a broken connection becomes
`BrokenError`, with the rank at its other end where that is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial

import torch
import torch.distributed as dist

from cloudckpt.ranks.calling import Caller
from cloudckpt.ranks.packet import Packet, landing_of, packed, slices, unpack
from cloudckpt.ranks.pulse import Pulse
from cloudckpt.ranks.world import BrokenError, breaking
from cloudckpt.threads import new_lock

__all__ = ["Link"]

# Tags: each pair of ranks exchanges what has the same one in order.
_MESSAGE = 1
_TENSORS = 2
# Sends under way at once; their tensors are the caller's own, so that they take no memory.
_PENDING = 8


class Link:
    """The gloo group and the one thread that uses it; given up as a whole when a rank is lost.

    Attributes:
        pulse: of this rank in the present session.
    """

    def __init__(self, caller: Caller, gloo: dist.ProcessGroup, pulse: Pulse) -> None:
        self.pulse = pulse
        self.submit = caller.submit
        self._caller = caller
        self._held: dist.ProcessGroup | None = gloo
        self._has_asked = self._is_retracted = False
        self._lock = new_lock()

    @property
    def _gloo(self) -> dist.ProcessGroup:
        if self._held is None:
            raise BrokenError("this rank has given up", None)
        return self._held

    def give_up(self) -> None:
        """Let the thread end, and its last act be to let the group go.

        Then the connections close, and threads of other ranks that wait for this one come back. Else they would when
        this process ends; and one that comes back from C++ when Python has gone aborts its process.
        """
        gloo, self._held = self._held, None
        if gloo is not None:
            self.submit(partial(_let_go, gloo))
        self._caller.stop()

    def close(self) -> None:
        """End the thread, so that the gloo group is let go in the thread that calls.

        The last one to hold a group ends its threads. Where that is a daemon thread of an interpreter that
        is about to go, the process aborts.
        """
        self._caller.stop()
        self._caller.join()

    def gather(self, size: int) -> list[bytes]:
        """Receive one message from every other rank."""
        return [self._receive(rank) for rank in range(1, size)]

    def scatter(self, messages: Sequence[bytes], *, untold: list[int] | None = None) -> None:
        """Send each other rank its message; given `untold`, the ranks that are gone are no reason to stop, and stay."""
        # All at once: a rank that stands still keeps those after it waiting for nothing.
        sends: list[tuple[int, list[tuple[dist.Work, torch.Tensor]]]] = []
        bearing = nullcontext() if untold is None else suppress(BrokenError)
        for rank, message in enumerate(messages, 1):
            with bearing:
                sends.append((rank, self._begin_send(message, rank)))
        for rank, works in sends:
            with bearing, breaking(rank):
                for work, _ in works:
                    work.wait()
                if untold is not None:
                    untold.remove(rank)

    def offer(self) -> None:
        """Forget whether an earlier exchange was given up; called before `ask` is handed to the thread."""
        self._has_asked = self._is_retracted = False

    def retract(self) -> bool:
        """Hand nothing over to rank 0 any more; return whether that was done already."""
        with self._lock:
            self._is_retracted = True
            return self._has_asked

    def ask(self, message: bytes, *, is_same: bool) -> bytes:
        """Send rank 0 a message, and return its answer."""
        with breaking(0):
            # Taken when rank 0 gets to it, which may be long after this rank gave up.
            self._gloo.send([torch.tensor([len(message)], device="cpu")], 0, _MESSAGE).wait()
            with self._lock:
                if self._is_retracted:
                    raise BrokenError("this rank has given up", None)
                self._has_asked = True
            self._gloo.send([_tensor_of(message)], 0, _MESSAGE).wait()
        return self.broadcast(None) if is_same else self._receive(0)

    def broadcast(self, message: bytes | None) -> bytes:
        """Pass a message from rank 0 down gloo's tree, so that no rank sends it to all."""
        size = torch.tensor([len(message or b"")], device="cpu")
        with breaking(None if message is not None else 0):
            self._gloo.broadcast(size, 0).wait()
            data = (
                _tensor_of(message) if message is not None else torch.empty(int(size), dtype=torch.uint8, device="cpu")
            )
            if int(size):
                self._gloo.broadcast(data, 0).wait()
        return message if message is not None else data.numpy().tobytes()

    def _begin_send(self, message: bytes, rank: int) -> list[tuple[dist.Work, torch.Tensor]]:
        tensors = (torch.tensor([len(message)], device="cpu"), _tensor_of(message))
        with breaking(rank):
            return [(self._gloo.send([tensor], rank, _MESSAGE), tensor) for tensor in tensors]

    def _receive(self, rank: int) -> bytes:
        size = torch.zeros(1, dtype=torch.int64, device="cpu")
        with breaking(rank):
            self._gloo.recv([size], rank, _MESSAGE).wait()
            data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
            self._gloo.recv([data], rank, _MESSAGE).wait()
        return data.numpy().tobytes()

    def pass_on(self, packets: Sequence[Packet], rank: int, tick: Callable[[], None]) -> list[int]:
        """Send and receive packets in their order; return the readers that gave up."""
        gave_up = []
        pending: deque[tuple[dist.Work, object]] = deque()
        for packet in packets:
            tick()
            if packet.reader == rank:
                self._send_packet(packet, pending)
            elif not self._receive_packet(packet):
                gave_up.append(packet.reader)
        self._drain(pending, 0)
        return gave_up

    def _send_packet(self, packet: Packet, pending: deque[tuple[dist.Work, object]]) -> None:
        is_ready = packet.is_ready is None or packet.is_ready.wait()
        head = torch.tensor([int(is_ready)], device="cpu")
        bodies = list(slices(packed(packet.tensors))) if is_ready else []
        for taker in packet.takers:
            with breaking(taker):
                for body in (head, *bodies):
                    pending.append((self._gloo.send([body], taker, _TENSORS), body))
        self._drain(pending, _PENDING)

    def _drain(self, pending: deque[tuple[dist.Work, object]], count: int) -> None:
        """Wait for the oldest sends; their memory is held until then."""
        while len(pending) > count:
            work, _ = pending.popleft()
            with breaking(None):
                work.wait()

    def _receive_packet(self, packet: Packet) -> bool:
        head = torch.zeros(1, dtype=torch.int64, device="cpu")
        with breaking(packet.reader):
            self._gloo.recv([head], packet.reader, _TENSORS).wait()
            if not int(head):
                return False
            body = landing_of(packet.tensors)
            for part in slices(body):
                self._gloo.recv([part], packet.reader, _TENSORS).wait()
        unpack(body, packet.tensors)
        return True


def _let_go(gloo: dist.ProcessGroup) -> None:
    """Hold the group no longer than this call."""


def _tensor_of(message: bytes) -> torch.Tensor:
    # A message of one session lives until it was sent; nobody writes to it.
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
