"""Carry one verb over the wire: the seam between the remote stores and the libraries below them.

    caller's thread ──▶ OnLoop.run ──▶ fsspec's own event loop ──▶ one request, ended when it stands still too long
    buffers ──▶ GatherBody ──▶ socket          socket ──▶ pass_on() ──▶ Relay ──▶ caller's thread ──▶ Intake
                    ╰──────────── bytes moved ────────────╯

A wire knows names in its bucket and bytes; nothing of roots, keys or our errors: it raises what its library raises
(`classify` judges that). Keeps FORMAT 14: one request per call and page, no retry. Any thread may enter.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import termios
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import fsspec.asyn
from aiohttp import payload

from cloudckpt.errors import OptionsError
from cloudckpt.store.aside import Aside, audible_s, pinned
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_end, check_length, check_limit, pieces
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.facts import BodyLengthError, before_sending
from cloudckpt.store.intake import Flow, Intake
from cloudckpt.store.limit import Limit, LimitNow, limit_now, note_move
from cloudckpt.store.location import ALLOW_HTTP
from cloudckpt.store.relay import Relay

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

__all__ = [
    "GatherBody",
    "OnLoop",
    "Page",
    "Wire",
    "borrowed",
    "check_range",
    "own_options",
    "pass_on",
    "preparing",
    "take",
]

T = TypeVar("T")

# fsspec resets the wrong name after a fork, so a child whose parent held the lock would wait for ever in get_loop().
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

# How much longer than a request the caller waits for the loop, which something else may keep busy.
_GRACE_S = 5.0
# How often, while a request may stand still, to look whether it does; and whether its limit has come nearer.
_LOOKS = 4
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a listing: names as the bucket has them, and the mark of the next page, or ""."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    mark: str


class Wire(Protocol):
    """One bucket (or directory) behind one library. Whatever a method raises is the library's own exception."""

    @property
    def credential_kind(self) -> CredentialKind:
        """What requests are signed with, as far as it is known by now."""

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Write one object in one request."""

    def create(self, name: str, data: bytes) -> None:
        """Write one object in one request, if there is none."""

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        """Hand on the bytes [start, stop), all of them, in one request."""

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read one object whole, but no more than one byte beyond the limit, in one request."""

    def head(self, name: str) -> ObjectInfo:
        """Describe one object in one request."""

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        """List one page in one request, from `mark` on."""

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        """Delete objects; return those that are still there, each with the store's code or with what was raised."""

    def close(self) -> None:
        """Release connections."""


def own_options(options: Mapping[str, object], refused: Sequence[str]) -> dict[str, object]:
    """Return the options of fsspec's that a wire of ours hands on: less what it sets itself, and none that it refuses.

    Refused is what would take the client out of our hands, or make one name mean several objects.
    """
    found = [name for name in refused if options.get(name)]
    if found:
        raise OptionsError(f"storage_options {found} cannot be used with cloudckpt; leave them out")
    left_out = {ALLOW_HTTP, "skip_instance_cache", "use_listings_cache", *refused}
    return {name: value for name, value in options.items() if name not in left_out}


class _Progress:
    """How far the bytes of one request are. Belongs to fsspec's loop.

    Attributes:
        looked_s: when it was last looked at, so that the loop was not busy; who waits for the loop reads it.
        is_preparing: whether what has to come first is still under way, and nothing is sent yet.
    """

    def __init__(self) -> None:
        self.looked_s = time.monotonic()
        self.is_preparing = False
        self._moved_bytes = 0
        self._transport: asyncio.WriteTransport | None = None

    def note(self, size_bytes: int, transport: asyncio.WriteTransport | None = None) -> None:
        """Note that so many bytes more came, or were handed to a connection that sends them."""
        self._moved_bytes += size_bytes
        self._transport = transport or self._transport

    def position(self) -> int:
        """Return a number that stays the same only as long as nothing moves."""
        return self._moved_bytes - (_unsent_bytes(self._transport) if self._transport is not None else 0)


@contextmanager
def preparing() -> Iterator[None]:
    """Mark what is done in the block as done before a request can be sent, also for who ends it from outside."""
    progress = _progress.get() or _Progress()
    progress.is_preparing = True
    try:
        with before_sending():
            yield
    finally:
        progress.is_preparing = False


def _unsent_bytes(transport: asyncio.WriteTransport) -> int:
    """Return how much of what was handed over has not reached the peer; the kernel alone may hold megabytes of it."""
    waiting = array("i", [0])
    with suppress(OSError, AttributeError, ValueError):  # a socket that is closed by now, or a system that cannot tell
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, waiting)
    return transport.get_write_buffer_size() + waiting[0]


_progress: ContextVar[_Progress | None] = ContextVar("cloudckpt_progress", default=None)


def _note_bytes(size_bytes: int, transport: asyncio.WriteTransport | None = None) -> None:
    progress = _progress.get()
    if progress is not None:
        progress.note(size_bytes, transport)


async def _bounded(
    request: Coroutine[object, object, T], limit_now: LimitNow, progress: _Progress, relay: Relay | None
) -> T:
    """Return the request's result; cancel it, and raise `TimeoutError`, when it stands still too long or has to end."""
    _progress.set(progress)
    task = asyncio.ensure_future(request)  # with a copy of this context, and what it starts itself has one, too
    position, moved_s = 0, time.monotonic()
    try:
        while not task.done():
            limit, progress.looked_s = limit_now(), time.monotonic()
            look_s = _LOOK_S if limit.may_change else limit.still_s
            left_s = min(moved_s + limit.still_s, limit.stop_s) - time.monotonic()
            if left_s <= 0:
                is_still = time.monotonic() < limit.stop_s
                with before_sending() if progress.is_preparing else nullcontext():
                    raise TimeoutError("its bytes stood still" if is_still else "its time was up")
            await asyncio.wait({task}, timeout=min(left_s, limit.still_s / _LOOKS, look_s))
            if relay is not None and relay.is_held:
                moved_s = time.monotonic()
            if progress.position() != position:
                position, moved_s = progress.position(), time.monotonic()
                note_move(position)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_S)
            if task.done() and not task.cancelled():
                task.exception()  # what it says of its cancellation; asyncio would complain that nobody heard it
    if not task.cancelled() and (error := task.exception()) is not None:
        pinned(error)  # the caller's thread raises it once more
        del error
    return task.result()


class OnLoop:
    """Runs coroutines on fsspec's loop from any other thread, each within the limit of the caller's request."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = fsspec.asyn.get_loop()
        if getattr(self.loop, "_default_executor", None) is None:
            # It looks names up, and a resolver that hangs would keep the process from ending.
            self.loop.set_default_executor(Aside())

    def run(self, request: Coroutine[object, object, T]) -> T:
        """Return the request's result; cancel it, and raise, when it is late or the caller is interrupted."""
        # Asked on the loop, in a copy of this context.
        return self._run(request, limit_now)

    def relayed(
        self, request: Callable[[Relay], Coroutine[object, object, None]], into: Intake, size_bytes: int
    ) -> None:
        """Hand on, on this thread, what a request passes to its relay; end it as `run` does, or when `into` raises.

        Raises:
            BodyLengthError: that was more or less than `size_bytes`.
        """
        relay, flow = Relay(self.loop), Flow(into, size_bytes)
        self._run(request(relay), limit_now, relay, flow)
        flow.end()

    def end(self, closing: Coroutine[object, object, None]) -> None:
        """Wait for what closes a connection, which must not be left open because a request had no time."""
        limit = Limit(still_s=_GRACE_S, stop_s=time.monotonic() + _GRACE_S)
        self._run(closing, lambda: limit)

    def _run(
        self,
        request: Coroutine[object, object, T],
        now: LimitNow,
        relay: Relay | None = None,
        flow: Flow | None = None,
    ) -> T:
        try:
            on_loop = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            on_loop = False
        if on_loop:
            request.close()
            raise RuntimeError("called on fsspec's own event loop, where it would wait for itself")
        progress = _Progress()
        future = asyncio.run_coroutine_threadsafe(_bounded(request, now, progress, relay), self.loop)
        try:
            if relay is not None and flow is not None:
                future.add_done_callback(lambda _: relay.end())
                _take_all(relay, flow, now, progress)
            return _awaited(future, now, progress)
        finally:
            future.cancel()  # does nothing to a request that has ended


def _awaited(future: Future[T], now: LimitNow, progress: _Progress) -> T:
    """Wait for a request on the loop, which ends it in time, unless something else keeps the loop busy."""
    while True:
        try:
            return future.result(audible_s(_patience_s(now, progress)))
        except TimeoutError:
            if future.done():  # it may be the request's own error, too
                return future.result()
            if not _patience_s(now, progress):
                raise


def _take_all(relay: Relay, flow: Flow, now: LimitNow, progress: _Progress) -> None:
    """Take what a request on the loop brings, until it has ended, whatever came of it."""
    while True:
        # Released in the end: a request that was given up must not write over what the memory holds by then.
        with flow.room(flow.left_bytes) if flow.left_bytes else memoryview(b"") as room:
            relay.lend(room)
            count = _filled(relay, now, progress)
        if count is None:
            return
        flow.took(count)


def _filled(relay: Relay, now: LimitNow, progress: _Progress) -> int | None:
    while True:
        try:
            return relay.next(audible_s(_patience_s(now, progress)))
        except TimeoutError:
            if not _patience_s(now, progress):
                raise


def _patience_s(now: LimitNow, progress: _Progress) -> float:
    """Return how long to wait for the loop from now on."""
    limit = now()
    return max(0.0, min(limit.stop_s, progress.looked_s + limit.still_s) + _GRACE_S - time.monotonic())


class GatherBody(payload.Payload):
    """A request body that is the concatenation of buffers, sent straight from their memory.

    aiohttp calls `write`; botocore sees a file that it may measure, hash and rewind.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        super().__init__(None, content_type="application/octet-stream")
        self._buffers = buffers
        self._size = self._length_bytes = sum(buffer.nbytes for buffer in buffers)
        self._position = 0

    def __len__(self) -> int:
        return self._length_bytes

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in pieces(self._buffers):
            _note_bytes(piece.nbytes, getattr(writer, "transport", None))
            await writer.write(piece)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a body of tensor bytes is no text")

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes: only payload signing reads, and only piece by piece."""
        stop = self._length_bytes if size < 0 else min(self._position + size, self._length_bytes)
        found = b"".join(_between(self._buffers, self._position, stop))
        self._position += len(found)
        return found


def _between(buffers: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    for buffer in buffers:
        if start < buffer.nbytes and stop > 0:
            yield buffer[max(start, 0) : max(stop, 0)]
        start, stop = start - buffer.nbytes, stop - buffer.nbytes


@contextmanager
def borrowed(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Lend buffers, as views that end with the block: a request that was given up must not send what comes after."""
    lent = [buffer[:] for buffer in buffers]
    try:
        yield lent
    finally:
        for view in lent:
            view.release()


async def pass_on(chunks: AsyncIterator[bytes], relay: Relay) -> None:
    """Pass a reply's chunks on to the thread that waits for them."""
    async for chunk in chunks:
        _note_bytes(len(chunk))
        await relay.send(chunk)
    relay.flush()


async def take(chunks: AsyncIterator[bytes], length_bytes: int | None, limit_bytes: int) -> bytes:
    """Return a small reply whole; hold no more than `limit_bytes` of it."""
    check_limit(length_bytes or 0, limit_bytes)
    data = bytearray()
    async for chunk in chunks:
        check_limit(len(data) + len(chunk), limit_bytes)
        data += chunk
        _note_bytes(len(chunk))
    if length_bytes is not None:
        check_length(len(data), length_bytes)
    return bytes(data)


_CONTENT_RANGE = re.compile(r"\Abytes (\d+)-(\d+)/(\d+|\*)\Z")


def check_range(content_range: str, length_bytes: int, start: int, stop: int) -> None:
    """Compare what a reply's headers promise with the range that was asked for."""
    match = _CONTENT_RANGE.match(content_range)
    if match and match.group(3) != "*":
        check_end(int(match.group(3)), start, stop)
    # A reply without the header is the whole object: the range was ignored, which is fine if it was the whole.
    first = int(match.group(1)) if match else 0
    if first != start or length_bytes != stop - start:
        raise BodyLengthError(length_bytes, stop - start)
