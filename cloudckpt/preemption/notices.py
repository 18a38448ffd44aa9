"""Ask whoever may know that this machine will be taken away, and pass on what they say as notices.

    source ──poll──▶ notices, or an error ──Watcher (a thread per source)──▶ whoever takes notices

A source that is absent, slow, hangs or lies costs a log line and nothing else: its error ends in its watcher, which
asks less and less often. A thread per source, so that one that hangs keeps no other from being heard. What a source
goes on saying is one notice, until it has once not said it, or its end has passed and it names a later one. Knows
nothing of signals, checkpoints or ranks; the sources themselves are in `clouds` and `slurm`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsFloat, SupportsIndex, cast

from cloudckpt.errors import text_of
from cloudckpt.threads import started

__all__ = ["CheckSource", "Notice", "NoticeSource", "PartError", "SourceError", "Watcher"]

logger = logging.getLogger(__name__)

# The shortest warning that a cloud gives is 30 s (GCE), so a source that came back is asked again in time.
_LONGEST_WAIT_S = 20.0
# A source that has not answered for so long hangs, unless it says that it takes longer.
_PATIENCE_S = 60.0
_JOIN_S = 0.1
# A deadline moves a little with each question.
_SAME_S = 1.0


class SourceError(Exception):
    """A source gave no answer, or none that can be believed. It ends in the source's watcher."""


class PartError(SourceError):
    """A part of what a source says could not be had or read; the rest of it was, and counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Word that this machine, or this process on it, will be taken away.

    Attributes:
        source: who says so: `SIGTERM`, `ec2 spot instance-action`, `gce preempted`, `slurm time limit`, …
        reason: the same in words for a person, with what the source itself said.
        deadline_s: when it will be gone, in seconds of `time.monotonic`; None if that is not known.
        received_s: when the notice was received, on the same clock.
        kind: `order`: it will happen; `advice`: it has become likely.
    """

    source: str
    reason: str
    deadline_s: float | None
    received_s: float
    kind: Literal["order", "advice"] = "order"

    def seconds_left(self, now_s: float) -> float | None:
        """Return the seconds from `now_s` (of `time.monotonic`) to the deadline, 0 after it, None if it is unknown."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    @property
    def urgency(self) -> tuple[float, float]:
        """The earlier its deadline, the less; of equal ones, the earlier it was received."""
        return (math.inf if self.deadline_s is None else self.deadline_s), self.received_s

    @property
    def what(self) -> tuple[str, str, str]:
        """What it says, but for the time."""
        return self.source, self.reason, self.kind

    def covers(self, later: Notice) -> bool:
        """Tell whether `later` says no more than this: the same, and no earlier an end."""
        return self.what == later.what and self.urgency[0] <= later.urgency[0] + _SAME_S


class NoticeSource(Protocol):
    """Somebody who may know. `poll` is called from one thread at a time.

    A source may have besides: `hang_up()`, called in another thread when nobody wants the answer any more; `waits`,
    true while `poll` itself waits for news, so that it may be called again at once; and `patience_s`, the seconds that
    it may take at most.
    """

    @property
    def name(self) -> str:
        """What the source is called in a log."""

    def poll(self) -> Iterable[Notice]:
        """Ask once, in bounded time, and return or yield what holds now; nothing if all is well.

        The same notice may come again and again: it is one, until an answer without it. What was yielded before an
        error counts, and what was said before and is not now is withdrawn only by an answer without an error.

        Raises:
            PartError: a part of the answer could not be had; it is asked for again in the same time.
            Exception: of any other kind; no answer could be had.
        """


class CheckSource:
    """A function of the user's as a source of notices."""

    name = "check"

    def __init__(
        self, check: Callable[[], float | bool | None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask `check`, which returns something false (no notice), True (no time is known) or the seconds left.

        Numbers and truths of numpy and torch mean the same. Anything else that is true is notice, too, without a time,
        and is complained of: a false notice costs a save, one that is not heard the work since the last one.
        """
        self._check = check
        self._clock = clock

    def poll(self) -> Iterator[Notice]:
        said = self._check()
        complaint = f"check returned {text_of(said, repr):.200}; it must return None, False, True or the seconds left"
        try:
            left_s, is_odd = _meaning(said)
        except Exception as exc:
            raise SourceError(complaint) from exc
        if left_s is None:
            return
        if math.isnan(left_s) or left_s == -math.inf:
            raise SourceError(complaint)
        now_s = self._clock()
        deadline_s = now_s + max(0.0, left_s) if math.isfinite(left_s) else None
        yield Notice(source="callable", reason="the check says so", deadline_s=deadline_s, received_s=now_s)
        if is_odd:
            raise PartError(complaint)


def _meaning(said: object) -> tuple[float | None, bool]:
    """Return the seconds left (inf: not known; None: no notice), and whether it is an odd way to say so."""
    item = getattr(said, "item", None)
    plain = item() if callable(item) else said  # of numpy's and torch's scalars
    if not plain:
        return None, False
    if plain is True:
        return math.inf, False
    if not isinstance(plain, SupportsFloat | SupportsIndex):
        return math.inf, True
    try:
        return float(plain), False
    except OverflowError:
        return (math.inf if cast("float", plain) > 0 else -math.inf), False


class Watcher:
    """Poll one source in a thread of its own, until it is stopped."""

    def __init__(
        self,
        source: NoticeSource,
        take: Callable[[Notice], None],
        *,
        poll_s: float,
        withdraw: Callable[[Notice], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hand what is new of what `source` says to `take`, asking every `poll_s` seconds, and less often in vain.

        What it has said and does not say any more goes to `withdraw`.
        """
        self.name = source.name
        self._source = source
        self._take = take
        self._poll_s = poll_s
        self._withdraw = withdraw
        self._clock = clock
        self._said: dict[tuple[str, str, str], Notice] = {}
        self._asked_s: float | None = None
        self._complained_s: float | None = None
        self._failures = 0
        # The kind of trouble that was told last.
        self._trouble: type[SourceError] | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def wait_s(self) -> float:
        """Seconds until the next question: twice as many after each failure, and never many."""
        if not self._failures and getattr(self._source, "waits", False):
            return 0.0
        longest_s = max(self._poll_s, _LONGEST_WAIT_S)
        return min(longest_s, self._poll_s * 2.0 ** min(self._failures, 32))

    def start(self) -> None:
        """Begin to ask, at once."""
        self._thread = started(self._run, name=f"cloudckpt-{self.name}")

    def stop(self) -> None:
        """Ask no more. Returns at once; `join` waits."""
        self._stopping.set()
        self._hang_up()

    def _hang_up(self) -> None:
        hang_up = getattr(self._source, "hang_up", None)
        if callable(hang_up):
            hang_up()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; tell whether it has."""
        if self._thread is None:
            return True
        stop_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left_s := stop_s - time.monotonic()) > 0:
            # A question may have been on its way only when it was to be ended.
            self._hang_up()
            self._thread.join(min(_JOIN_S, left_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.ask()
            self._stopping.wait(self.wait_s)

    def ask(self) -> None:
        """Poll once. Whatever goes wrong is logged: as a warning when it begins, for debugging while it lasts."""
        said = {}
        self._asked_s = self._clock()
        try:
            for notice in self._source.poll():
                said[notice.what] = self._newest(notice)
        except BaseException as exc:  # noqa: BLE001 (it is anybody's code, and training must not end of it)
            if not self._stopping.is_set():
                self._note_failure(exc)
            return
        finally:
            self._asked_s = None
        for what, notice in self._said.items():
            if what not in said:
                self._withdraw(notice)
        self._said = said
        if self._trouble is not None:
            logger.info("%s answers again; its notices are heard", self.name)
        self._failures, self._trouble = 0, None

    def _newest(self, notice: Notice) -> Notice:
        """Hand a notice on if it is new, and return what is known of its kind from now on."""
        known = self._said.get(notice.what)
        if known is not None and known.covers(notice) and not self._is_postponed(known, notice):
            return known
        self._said[notice.what] = notice
        self._take(notice)
        return notice

    def _is_postponed(self, known: Notice, notice: Notice) -> bool:
        """Tell whether the end that is known has passed, and a later one is announced in its place."""
        if known.deadline_s is None or notice.deadline_s is None or notice.deadline_s <= known.deadline_s + _SAME_S:
            return False
        return known.deadline_s <= self._clock() < notice.deadline_s

    def look(self) -> None:
        """Say it once, in whichever thread, if a question of this one's is not answered."""
        asked_s, patience_s = self._asked_s, getattr(self._source, "patience_s", _PATIENCE_S)
        if asked_s is None or self._complained_s == asked_s or self._clock() - asked_s <= patience_s:
            return
        self._complained_s = asked_s
        logger.warning(
            "%s has not answered for %.0f s, so a notice of its is not heard; it must return in bounded time",
            self.name,
            self._clock() - asked_s,
        )

    def _note_failure(self, exc: BaseException) -> None:
        is_part = isinstance(exc, PartError)
        self._failures = 0 if is_part else self._failures + 1
        kind = PartError if is_part else SourceError
        level = logging.WARNING if self._trouble is not kind else logging.DEBUG
        self._trouble = kind
        text = (
            "%s could be heard in part only; it is asked on: %s"
            if is_part
            else "%s gives no answer, so a notice of its would not be heard; it is asked on: %s"
        )
        logger.log(level, text, self.name, text_of(exc, str if isinstance(exc, SourceError) else repr))
