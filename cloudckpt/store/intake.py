"""Take the bytes of a range as they come: the seam between who reads and who wants them, piece by piece and in order.

    engine ──room()──▶ memory for what comes next ──filled by the kernel, or from a chunk──▶ took(count) ──▶ …

So nobody has to hold a range whole to take what is in it, and what has been taken need not be read again after a fault.
Knows bytes alone. An intake is called by the thread that reads, within the call, and by no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cloudckpt.errors import CloudCkptError
from cloudckpt.store.buffers import check_destination, check_length
from cloudckpt.store.facts import BodyLengthError
from cloudckpt.store.limit import note_move

__all__ = ["Flow", "Intake", "IntakeError", "RangeGets", "Whole"]


class IntakeError(CloudCkptError):
    """Who takes the bytes has raised `__cause__`; no store's fault, so that stores let it pass as it is."""


class Intake(Protocol):
    """Who takes the bytes of a range."""

    def room(self) -> memoryview:
        """Return writable memory for the bytes that come next, one or more; its owner may use it again after `took`."""

    def took(self, count: int) -> None:
        """Note that the first `count` bytes of the room have come.

        Raises:
            IntakeError: nobody wants the rest.
        """

    def restart(self) -> int:
        """Begin anew after a fault: return the first byte of the object that has to come, perhaps once more."""


class Whole:
    """An intake that fills memory of the caller's from its first byte on, and from there again after a fault."""

    def __init__(self, memory: memoryview, start: int) -> None:
        self._memory = memory
        self._start = start
        self._filled = 0

    def room(self) -> memoryview:
        """Return what is not filled yet."""
        return self._memory[self._filled :]

    def took(self, count: int) -> None:
        """Go on behind what has come."""
        self._filled += count

    def restart(self) -> int:
        """Return the first byte: what was read by two requests might be of two objects."""
        self._filled = 0
        return self._start


class Flow:
    """One reply on its way into an intake: exactly so many bytes, and seen to move."""

    def __init__(self, intake: Intake, size_bytes: int, *, noted: Callable[[int], None] = note_move) -> None:
        """Take where `size_bytes` go, and who is told how many of them have come by now."""
        self._intake = intake
        self._size_bytes = size_bytes
        self._noted = noted
        self._came_bytes = 0

    @property
    def left_bytes(self) -> int:
        """How many bytes have not come."""
        return self._size_bytes - self._came_bytes

    def room(self, most_bytes: int) -> memoryview:
        """Return memory for bytes that come next, `most_bytes` or less; not to be asked for when none are left."""
        return self._intake.room()[: min(most_bytes, self.left_bytes)]

    def took(self, count: int) -> None:
        """Note that the first `count` bytes of the room have come."""
        self._came_bytes += count
        self._intake.took(count)
        self._noted(self._came_bytes)

    def take(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take bytes that lie in memory of an engine's.

        Raises:
            BodyLengthError: more have come than were asked for.
        """
        view = memoryview(chunk)
        if view.nbytes > self.left_bytes:
            raise BodyLengthError(self._came_bytes + view.nbytes, self._size_bytes)
        while view:
            room = self.room(view.nbytes)
            room[:] = view[: room.nbytes]
            self.took(room.nbytes)
            view = view[room.nbytes :]

    def end(self) -> None:
        """Refuse a reply that has ended too early."""
        check_length(self._came_bytes, self._size_bytes)


class RangeGets:
    """The verb `get` of a store that has `stream`."""

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        raise NotImplementedError

    def get(self, key: str, *, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        memory = check_destination(start, stop, into)
        self.stream(key, start=start, stop=stop, into=Whole(memory, start))
        return memory
