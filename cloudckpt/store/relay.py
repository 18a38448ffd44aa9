"""Fill memory of a waiting thread's on the event loop that reads a reply, and tell the thread when it is full.

    thread ──lend──▶ room ──send fills it──▶ next: so many bytes ──▶ the thread takes them, and lends the next room

The loop of fsspec is one thread for all requests, and each hand-over waits for Python's lock: with one for each 512 KiB
loads came at two thirds of the rate that they have with one for each room. Knows memory, and nothing of requests. One
loop fills, one thread lends.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from queue import Empty, SimpleQueue

from cloudckpt.store.facts import BodyLengthError

__all__ = ["Relay"]


class Relay:
    """The body of one reply, on its way.

    Attributes:
        is_held: whether the loop waits for room, and not for the network.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_held = False
        self._loop = loop
        self._filled: SimpleQueue[int | None] = SimpleQueue()
        self._room: memoryview | None = None
        self._at = self._came_bytes = 0
        self._is_lent = asyncio.Event()

    async def send(self, chunk: bytes) -> None:
        """Put a chunk where it belongs; wait for room. On the loop.

        Raises:
            BodyLengthError: the thread wants no more.
            ValueError: the thread has gone, and released the room.
        """
        view = memoryview(chunk)
        self._came_bytes += view.nbytes
        while view:
            room = await self._next_room()
            if not room.nbytes:
                raise BodyLengthError(self._came_bytes, self._came_bytes - view.nbytes)
            count = min(view.nbytes, room.nbytes - self._at)
            room[self._at : self._at + count] = view[:count]
            self._at += count
            view = view[count:]
            if self._at == room.nbytes:
                self.flush()

    async def _next_room(self) -> memoryview:
        while self._room is None:
            self.is_held = True
            self._is_lent.clear()
            await self._is_lent.wait()
        self.is_held = False
        return self._room

    def flush(self) -> None:
        """Give the room back, as far as it is full. On the loop."""
        if self._room is not None and self._at:
            self._room = None
            self._filled.put(self._at)

    def end(self) -> None:
        """Say that nothing more comes. On the loop."""
        self._filled.put(None)

    def lend(self, room: memoryview) -> None:
        """Lend memory for what comes next, none where no more is wanted; released, it is written to no more."""
        with suppress(RuntimeError):  # the loop is closed, and so is the request
            self._loop.call_soon_threadsafe(self._take, room)

    def _take(self, room: memoryview) -> None:
        self._room, self._at = room, 0
        self._is_lent.set()

    def next(self, timeout_s: float) -> int | None:
        """Return how many bytes have come into the room, None if no more come. On the thread.

        Raises:
            TimeoutError: it is not full yet.
        """
        try:
            return self._filled.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
