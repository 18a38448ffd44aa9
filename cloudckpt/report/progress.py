"""Show a person at a terminal how far a save or restore is, and what became of it; to a program, one line.

    bar     while bytes move, on a terminal     ──▶ gone when they have moved
    line    once it is done                     ──▶ stays
    lines   now and then, of a command that no terminal shows, so that its log tells that it goes on

All goes to stderr, from rank 0 alone. Who has the log of cloudckpt shown at INFO reads the same there, and is not told
twice. `rich` draws the bar, and is imported when there is one.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from cloudckpt.errors import OptionsError
from cloudckpt.threads import new_lock

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bar", "Progress", "Show", "as_bytes", "plain"]

Show = Literal["auto", "bar", "line", "off"]
"""What is shown: a bar on a terminal and then a line, a bar in any case, a line alone, nothing."""

logger = logging.getLogger(__name__)
_PACKAGE_LOGGER = logging.getLogger("cloudckpt")


class Bar:
    """How many bytes have moved. Any thread may tell it; without a terminal it is nothing."""

    def __init__(self, drawn: RichProgress | None = None, task: TaskID | None = None) -> None:
        self._drawn = drawn
        self._task = task

    def begin(self, total_bytes: int) -> None:
        """Begin at 0 of so many bytes."""
        if self._drawn is not None and self._task is not None:
            with _harmless():
                self._drawn.reset(self._task, total=total_bytes)

    def move(self, size_bytes: int) -> None:
        """Note that so many bytes more have moved."""
        if self._drawn is not None and self._task is not None:
            with _harmless():
                self._drawn.advance(self._task, size_bytes)


class _Lines(Bar):
    """The same where there is no terminal: a line now and then."""

    def __init__(self, what: str, say: Callable[[str], None], every_s: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self._what = what
        self._say = say
        self._every_s = every_s
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._total_bytes = self._moved_bytes = 0
        self._lock = new_lock()

    def begin(self, total_bytes: int) -> None:
        with self._lock:
            self._began_s = self._told_s = self._clock()
            self._total_bytes, self._moved_bytes = total_bytes, 0

    def move(self, size_bytes: int) -> None:
        with self._lock:
            self._moved_bytes += size_bytes
            now_s = self._clock()
            if now_s - self._told_s < self._every_s:
                return
            self._told_s = now_s
            moved_bytes, total_bytes = self._moved_bytes, self._total_bytes
            rate = moved_bytes / (now_s - self._began_s)
        left = f", {max(0, total_bytes - moved_bytes) / rate:.0f} s left" if rate else ""
        self._say(f"{self._what}: {as_bytes(moved_bytes)} of {as_bytes(total_bytes)}, {as_bytes(rate)}/s{left}")


@contextmanager
def _harmless() -> Iterator[None]:
    """Let nothing that is wrong with stderr decide about a save: a full disk, a reader that is gone, a stand-in."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001 (whatever stands there is anybody's code)
        with suppress(Exception):  # what stands behind the log, too
            logger.debug("progress could not be shown: %r", exc)


class Progress:
    """What is shown of saves and restores."""

    def __init__(self, show: str = "auto") -> None:
        """Show by choice.

        Raises:
            OptionsError: no such choice.
        """
        if show not in get_args(Show):
            raise OptionsError(f"progress is {show!r}; give one of {', '.join(map(repr, get_args(Show)))}")
        self._show = show

    def say(self, line: str, *, rank: int) -> None:
        """Show one line, unless the log shows it."""
        is_logged = _PACKAGE_LOGGER.isEnabledFor(logging.INFO) and _PACKAGE_LOGGER.hasHandlers()
        if rank == 0 and self._show != "off" and not is_logged and sys.stderr is not None:
            with _harmless():
                sys.stderr.write(f"cloudckpt: {line}\n")
                sys.stderr.flush()

    @contextmanager
    def bar(
        self, what: str, *, rank: int, every_s: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[Bar]:
        """Show a bar until the end of the block, if there is a terminal; else a line every so many seconds."""
        drawn, bar = None, Bar()
        if every_s < math.inf:
            bar = _Lines(what, partial(self.say, rank=rank), every_s, clock)
        if rank == 0 and self._is_bar_wanted():
            with _harmless():
                drawn = _drawn()
                bar = Bar(drawn, drawn.add_task(what, total=None))
                drawn.start()
        try:
            yield bar
        finally:
            if drawn is not None:
                with _harmless():
                    drawn.stop()

    def _is_bar_wanted(self) -> bool:
        is_terminal = False
        if self._show == "auto" and sys.stderr is not None:
            with _harmless():
                is_terminal = sys.stderr.isatty()
        return self._show == "bar" or is_terminal


def _drawn() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=Console(stderr=True), transient=True)


def as_bytes(size_bytes: float) -> str:
    """Return bytes as people read them, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def plain(text: str) -> str:
    """Return a text with everything that nobody sees, or a terminal obeys, as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() and unicodedata.category(char) != "Cf"
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
