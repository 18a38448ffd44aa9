"""Carry messages and tensors between ranks: the gloo group of our own, and the one thread that uses it.

    submit(call) ──▶ the link's thread ──▶ gloo sends and receives, one after the other ──▶ a future

A gloo call cannot be given up, so it never runs on a thread that must go on: whoever waits for the future may stop
waiting, and then the link is left to itself as a whole. What gloo raises for a broken connection becomes
`BrokenError`, with the rank at its other end where that is known.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from cloudckpt.errors import OptionsError
from cloudckpt.ranks.packet import Packet, landing_of, packed, slices, unpack
from cloudckpt.ranks.pulse import KeyValueStore, Pulse

__all__ = ["BrokenError", "Link", "new_gloo_group", "store_of_our_own"]

_Result = TypeVar("_Result")

# Only a backstop: the pulse finds who is late long before. A gloo group that times out is lost as a whole.
_GLOO_TIMEOUT = timedelta(hours=24)
# Tags: each pair of ranks exchanges what has the same one in order.
_MESSAGE = 1
_TENSORS = 2
# Sends under way at once; their tensors are the caller's own, so that they take no memory.
_PENDING = 8
# Each rank of thousands would else open a connection to every other one, more than a process may have files.
_LAZY = "TORCH_GLOO_LAZY_INIT"
# How long an idle thread may take to end.
_CLOSING_S = 1.0


def new_gloo_group(timeout: timedelta = _GLOO_TIMEOUT) -> object:
    """Make the group with connections on first use: rank 0 talks to all, and few others to each other."""
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        with _breaking(None):
            return dist.new_group(backend="gloo", timeout=timeout)
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def store_of_our_own() -> KeyValueStore:
    """Return a second connection to the process group's store: a request that waits there blocks no trainer's."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (there is no public way to it)
    clone = getattr(store, "clone", None)
    return cast("KeyValueStore", store if clone is None else clone())


class BrokenError(Exception):
    """A connection of the gloo group broke.

    Attributes:
        rank: to which rank, None if gloo does not say.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


class Link:
    """The gloo group and the one thread that uses it; given up as a whole when a rank is lost."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self.gloo: dist.ProcessGroup | None = None
        self.has_asked = False
        self.untold: list[int] = []
        self._is_retracted = False
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="cloudckpt-ranks", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], _Result]) -> Future[_Result]:
        """Have the link's thread call something."""
        future: Future[_Result] = Future()
        self._calls.put((cast("Future[object]", future), call))
        return future

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            _call(*item)
            del item  # it may hold the group

    def close(self) -> None:
        """End the thread, and let go of the gloo group in the thread that calls.

        The last one to hold a destroyed group ends its threads. Where that is a daemon thread of an interpreter that
        is about to go, the process aborts.
        """
        self._calls.put(None)
        self._thread.join(timeout=_CLOSING_S)
        self.gloo = None

    def gather(self, size: int) -> list[bytes]:
        """Receive one message from every other rank."""
        return [self._receive(rank) for rank in range(1, size)]

    def scatter(self, messages: Sequence[bytes], *, is_patient: bool = False) -> list[int]:
        """Send each other rank its message; return those that are gone, if that is no reason to stop."""
        # All at once: a rank that stands still keeps those after it waiting for nothing.
        unreached = []
        sends: list[tuple[int, list[tuple[dist.Work, torch.Tensor]]]] = []
        self.untold = list(range(1, len(messages) + 1))
        for rank, message in enumerate(messages, 1):
            try:
                sends.append((rank, self._begin_send(message, rank)))
            except BrokenError:
                if not is_patient:
                    raise
                unreached.append(rank)
        for rank, works in sends:
            try:
                with _breaking(rank):
                    for work, _ in works:
                        work.wait()
            except BrokenError:
                if not is_patient:
                    raise
                unreached.append(rank)
            else:
                self.untold.remove(rank)
        return unreached

    def retract(self) -> bool:
        """Hand nothing over to rank 0 any more; return whether that was done already."""
        with self._lock:
            self._is_retracted = True
            return self.has_asked

    def ask(self, message: bytes, *, is_same: bool) -> bytes:
        """Send rank 0 a message, and return its answer."""
        gloo = self._group()
        with _breaking(0):
            # Taken when rank 0 gets to it, which may be long after this rank gave up.
            gloo.send([torch.tensor([len(message)])], 0, _MESSAGE).wait()
            with self._lock:
                if self._is_retracted:
                    raise BrokenError("this rank has given up", None)
                self.has_asked = True
            gloo.send([_tensor_of(message)], 0, _MESSAGE).wait()
        return self.broadcast(None) if is_same else self._receive(0)

    def broadcast(self, message: bytes | None) -> bytes:
        """Pass a message from rank 0 down gloo's tree, so that no rank sends it to all."""
        gloo = self._group()
        size = torch.tensor([len(message or b"")])
        with _breaking(None if message is not None else 0):
            gloo.broadcast(size, 0).wait()
            data = _tensor_of(message) if message is not None else torch.empty(int(size), dtype=torch.uint8)
            if int(size):
                gloo.broadcast(data, 0).wait()
        return message if message is not None else data.numpy().tobytes()

    def _begin_send(self, message: bytes, rank: int) -> list[tuple[dist.Work, torch.Tensor]]:
        gloo = self._group()
        tensors = (torch.tensor([len(message)]), _tensor_of(message))
        with _breaking(rank):
            return [(gloo.send([tensor], rank, _MESSAGE), tensor) for tensor in tensors]

    def _receive(self, rank: int) -> bytes:
        gloo = self._group()
        size = torch.zeros(1, dtype=torch.int64)
        with _breaking(rank):
            gloo.recv([size], rank, _MESSAGE).wait()
            data = torch.empty(int(size), dtype=torch.uint8)
            gloo.recv([data], rank, _MESSAGE).wait()
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
        gloo = self._group()
        is_ready = packet.is_ready is None or packet.is_ready.wait()
        head = torch.tensor([int(is_ready)])
        bodies = list(slices(packed(packet.tensors))) if is_ready else []
        for taker in packet.takers:
            with _breaking(taker):
                for body in (head, *bodies):
                    pending.append((gloo.send([body], taker, _TENSORS), body))
        self._drain(pending, _PENDING)

    def _drain(self, pending: deque[tuple[dist.Work, object]], count: int) -> None:
        """Wait for the oldest sends; their memory is held until then."""
        while len(pending) > count:
            work, _ = pending.popleft()
            with _breaking(None):
                work.wait()

    def _receive_packet(self, packet: Packet) -> bool:
        gloo = self._group()
        head = torch.zeros(1, dtype=torch.int64)
        with _breaking(packet.reader):
            gloo.recv([head], packet.reader, _TENSORS).wait()
            if not int(head):
                return False
            body = landing_of(packet.tensors)
            for part in slices(body):
                gloo.recv([part], packet.reader, _TENSORS).wait()
        unpack(body, packet.tensors)
        return True

    def _group(self) -> dist.ProcessGroup:
        if self.gloo is None:
            raise OptionsError("the gloo group was not made")
        return self.gloo


def _call(future: Future[object], call: Callable[[], object]) -> None:
    try:
        future.set_result(call())
    except BaseException as exc:  # noqa: BLE001 (the end of a thread's work: it is raised where the future is awaited)
        future.set_exception(exc)


def _tensor_of(message: bytes) -> torch.Tensor:
    # A message of one session lives until it was sent; nobody writes to it.
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


@contextmanager
def _breaking(rank: int | None) -> Iterator[None]:
    """Tell a broken connection from other errors; gloo raises all as RuntimeError."""
    try:
        yield
    except RuntimeError as exc:
        raise BrokenError(f"a connection broke ({exc})", rank) from exc
