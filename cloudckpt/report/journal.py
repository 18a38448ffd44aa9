"""Say once what a job's saves and restores did: to the log, a person at a terminal, the meter of costs, and programs.

    begin ──▶ working ──▶ unblocked ──▶ committed │ failed │ restored        one `Entry` a save or restore

Knows checkpoints and the store's counts; decides nothing. The training's thread begins entries; that of a background
save may end one. Events are rank 0's to tell: a job is one thing to who watches it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal, TypedDict

from cloudckpt.errors import CloudCkptError, text_of
from cloudckpt.report.events import (
    Event,
    OnEvent,
    Preempted,
    Pruned,
    Restored,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveStaged,
)
from cloudckpt.report.meter import Meter
from cloudckpt.report.progress import Bar, Progress, as_bytes
from cloudckpt.report.telling import Teller
from cloudckpt.root import Checkpoint
from cloudckpt.store import RetryingStore, Traffic, hide

__all__ = ["Entry", "Journal"]

logger = logging.getLogger(__name__)

_TROUBLES = 8
_PHASES = ("plan", "stage", "upload", "gather", "commit")
# How long the end of a job waits for who is told of events.
_TELLING_S = 5.0


class Journal:
    """The saves and restores of one job on one store; `progress` shows people what the log says.

    Attributes:
        troubles: the last things that went wrong and failed no call, for `report`.
    """

    def __init__(
        self,
        store: RetryingStore,
        progress: Progress,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_event: OnEvent = None,
    ) -> None:
        self.store = store
        self.progress = progress
        self.meter = Meter(clock=clock)
        self.clock = clock
        self.troubles: deque[str] = deque(maxlen=_TROUBLES)
        self.teller = Teller(on_event, self.note)

    def note(self, trouble: str) -> None:
        """Note what went wrong and fails no call: in the log, and for who asks later."""
        self.troubles.append(trouble)
        with suppress(Exception):  # a program's own handler of the log may be what went wrong
            logger.warning("%s", trouble)

    @contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """Let the block fail without consequence but a note that begins with `what`: the checkpoint is committed."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001 (rules, handlers and streams are anybody's code)
            self.note(f"{what}: {text_of(exc, str if isinstance(exc, CloudCkptError) else repr)}")
        except BaseException as exc:
            # Who ends the program, by an interrupt or an exit, is not kept from it, and hears what is safe.
            exc.add_note(f"{what}: {text_of(exc, repr)}")
            self.note(f"{what}: {text_of(exc, repr)}")
            raise

    def begin(self, *, rank: int, world_size: int = 1) -> Entry:
        """Begin the entry of a save or restore, at this moment."""
        return Entry(self, rank, world_size)

    def spent(self) -> dict[str, Traffic]:
        """Return what saves, restores and all else have asked of the store so far."""
        saves, restores = self.meter.spent()
        everything = Traffic.of(self.store.stats())
        return {"saves": saves, "restores": restores, "rest": everything - saves - restores}

    def pruned(self, checkpoint: Checkpoint, why: Literal["rules", "delete"] = "rules") -> None:
        """Tell that a checkpoint exists no more; on rank 0."""
        if self.teller.is_asked:
            total_bytes = checkpoint.total_bytes
            event = Pruned(**_of_checkpoint(checkpoint), epoch=checkpoint.epoch, total_bytes=total_bytes, why=why)
            self.teller.tell(event)

    def preempted(self, step: int, *, reason: str, left_s: float, world_size: int) -> None:
        """Tell that the machine goes, `left_s` from now (inf: that is not known); on rank 0."""
        known_s = None if math.isinf(left_s) else left_s
        about = _About(at=datetime.now(UTC), url=self.store.url, step=step, world_size=world_size)
        self.teller.tell(Preempted(**about, reason=reason, left_s=known_s))

    def end(self, *, is_interrupted: bool = False) -> None:
        """Wait a moment until all events are told; not for who interrupts, who waits for checkpoints alone."""
        self.teller.end(0.0 if is_interrupted else _TELLING_S)


class _About(TypedDict):
    at: datetime
    url: str
    step: int
    world_size: int


def _of_checkpoint(checkpoint: Checkpoint) -> _About:
    """Return what an event says of the checkpoint that it is about, as of now."""
    return _About(at=datetime.now(UTC), url=checkpoint.url, step=checkpoint.step, world_size=checkpoint.world_size)


class Entry:
    """One save or restore.

    Attributes:
        rank: this process's.
        began_s: when it began, on the journal's clock.
        work_began_s: when its own work began, after the wait for the save before; until `working` the same.
    """

    def __init__(self, journal: Journal, rank: int, world_size: int) -> None:
        self.rank = rank
        self.began_s = self.work_began_s = journal.clock()
        self._rested_s = self.began_s
        self._world_size = world_size
        self._in_background = False
        self._journal = journal
        self._before = journal.store.stats()

    def bar(self, what: str) -> AbstractContextManager[Bar]:
        """Show how far it is while the block runs."""
        return self._journal.progress.bar(what, rank=self.rank)

    def working(self, step: int, *, in_background: bool) -> None:
        """Note that nothing else is waited for any more: what a save of `step` costs is counted from here on."""
        self.work_began_s = self._journal.clock()
        self._before = self._journal.store.stats()
        self._in_background = in_background
        waited_s = self.work_began_s - self.began_s
        self._tell(lambda: SaveBegun(**self._about(step), in_background=in_background, waited_s=waited_s))

    def rest(self) -> None:
        """Note that it goes on when somebody says so, by `resume`."""
        self._rested_s = self._journal.clock()

    def resume(self) -> None:
        """Note that it goes on: what it waited in between is no cost of it."""
        waited_s = self._journal.clock() - self._rested_s
        self._rested_s += waited_s
        self.began_s += waited_s
        self.work_began_s += waited_s

    def _tell(self, event: Callable[[], Event]) -> None:
        if self.rank == 0 and self._journal.teller.is_asked:
            with self._journal.harmless("an event could not be told"):
                self._journal.teller.tell(event())

    def _about(self, step: int) -> _About:
        return _About(at=datetime.now(UTC), url=self._journal.store.url, step=step, world_size=self._world_size)

    def unblocked(self, step: int, staged_bytes: int | None = None) -> None:
        """Note that training goes on; with the bytes that were copied, if the rest goes on in the background."""
        blocked_s = self._journal.clock() - self.began_s
        self._journal.meter.note_blocked(blocked_s)
        if staged_bytes is not None:
            self._tell(lambda: SaveStaged(**self._about(step), staged_bytes=staged_bytes, blocked_s=blocked_s))
            with self._journal.harmless(f"step {step} is staged, but that could not be told"):
                logger.info(
                    "rank %d: staged step %d: %d bytes, training was blocked for %.3f s",
                    self.rank,
                    step,
                    staged_bytes,
                    blocked_s,
                )

    def committed(self, checkpoint: Checkpoint, *, left_s: float | None = None) -> None:
        """Note a commit; with the seconds before the end (below 0: after it), if the job is about to be preempted."""
        elapsed_s = self._elapsed_s()
        self._journal.meter.note_commit(elapsed_s)
        self._journal.meter.note_saving(self._traffic(checkpoint))
        self._tell(lambda: self._committed(checkpoint, elapsed_s))
        with self._journal.harmless(f"step {checkpoint.step} is saved, but that could not be told"):
            spent = self._spent_on(checkpoint)
            self._say("saved", checkpoint, elapsed_s, spent, phases=_phases(checkpoint))
            if left_s is not None:
                logger.warning("rank %d: step %s is safe, %s", self.rank, checkpoint.step, _beside_the_end(left_s))

    def _committed(self, checkpoint: Checkpoint, elapsed_s: float) -> SaveCommitted:
        summary, (requests, retries) = checkpoint.manifest.summary, self._spent_on(checkpoint)
        traffic = self._traffic(checkpoint)
        slowest = summary.get("slowest_rank")
        return SaveCommitted(
            **_of_checkpoint(checkpoint),
            epoch=checkpoint.epoch,
            total_bytes=checkpoint.total_bytes,
            sent_bytes=checkpoint.manifest.sent_bytes,
            in_background=self._in_background,
            seconds=elapsed_s,
            phases=_phases_of(checkpoint),
            slowest_rank=None if slowest is None else int(slowest),
            requests=requests,
            retries=retries,
            metrics=dict(checkpoint.metrics),
            traffic=traffic,
        )

    def _spent_on(self, checkpoint: Checkpoint | None = None) -> tuple[int, int]:
        """Return requests and retries of this rank; those of rank 0's commit are its manifest's."""
        summary = checkpoint.manifest.summary if checkpoint is not None and self.rank == 0 else {}
        spent = self._journal.store.stats() - self._before
        return int(summary.get("requests", spent.requests)), int(summary.get("retries", spent.retries))

    def _traffic(self, checkpoint: Checkpoint | None = None) -> Traffic:
        """Return the same by class; what a commit counts by class is its manifest's, as the sum is."""
        spent = Traffic.of(self._journal.store.stats() - self._before)
        summary = checkpoint.manifest.summary if checkpoint is not None and self.rank == 0 else {}
        told = {name: int(summary[name]) for name in spent.by_class if name in summary}
        return replace(spent, **told) if told else spent

    def failed(self, step: int, error: BaseException, *, is_forgiven: bool = False) -> None:
        """Note that a save has ended without a checkpoint; who raises the error says so to a person."""
        (requests, retries), traffic = self._spent_on(), self._traffic()
        self._journal.meter.note_saving(traffic)
        self._tell(
            lambda: SaveFailed(
                **self._about(step),
                in_background=self._in_background,
                seconds=self._elapsed_s(),
                requests=requests,
                retries=retries,
                kind=type(error).__name__,
                error=hide(text_of(error)),
                is_forgiven=is_forgiven,
                traffic=traffic,
            )
        )

    def restored(self, checkpoint: Checkpoint | None) -> None:
        """Note a restore, or that there was nothing to restore."""
        if checkpoint is None:
            line = f"nothing is committed at {self._journal.store.url}: a fresh start"
            logger.info("rank %d: %s", self.rank, line)
            self._journal.progress.say(line, rank=self.rank)
            return
        elapsed_s = self._elapsed_s()
        (requests, retries), traffic = self._spent_on(), self._traffic()
        self._journal.meter.note_restore(elapsed_s, traffic)
        self._tell(
            lambda: Restored(
                **_of_checkpoint(checkpoint),
                epoch=checkpoint.epoch,
                total_bytes=checkpoint.total_bytes,
                seconds=elapsed_s,
                requests=requests,
                retries=retries,
                traffic=traffic,
            )
        )
        self._say("restored", checkpoint, elapsed_s, (requests, retries))

    def _elapsed_s(self) -> float:
        return self._journal.clock() - self.work_began_s

    def _say(
        self, did: str, checkpoint: Checkpoint, elapsed_s: float, spent: tuple[int, int], *, phases: str = ""
    ) -> None:
        requests, retries = spent
        # What is read is all of it.
        moved_bytes = checkpoint.manifest.sent_bytes if did == "saved" else checkpoint.total_bytes
        shared = f" ({moved_bytes} of them sent)" if moved_bytes < checkpoint.total_bytes else ""
        logger.info(
            "rank %d: %s step %s of epoch %d: %d bytes%s in %.3f s%s, %d requests, %d retries",
            self.rank,
            did,
            checkpoint.step,
            checkpoint.epoch,
            checkpoint.total_bytes,
            shared,
            elapsed_s,
            phases,
            requests,
            retries,
        )
        step = f" step {checkpoint.step}" if checkpoint.step >= 0 else ""
        way = "to" if did == "saved" else "from"
        after = f", after {retries} retries" if retries else ""
        self._journal.progress.say(
            f"{did}{step} {way} {checkpoint.url}: {as_bytes(checkpoint.total_bytes)}"
            f"{f', {as_bytes(moved_bytes)} of it sent,' if shared else ''} in {elapsed_s:.2f} s "
            f"({as_bytes(moved_bytes / max(elapsed_s, 1e-9))}/s){after}",
            rank=self.rank,
        )


def _beside_the_end(left_s: float) -> str:
    """Say how long before the end it is, or after it."""
    if math.isinf(left_s):
        return "before an end whose time is not known"
    return f"{abs(left_s):.1f} s {'before' if left_s >= 0 else 'after'} the end"


def _phases(checkpoint: Checkpoint) -> str:
    """Say how long each phase of a save took."""
    phases = [f"{name} {seconds:.3f}" for name, seconds in _phases_of(checkpoint).items()]
    return f" ({', '.join(phases)})" if phases else ""


def _phases_of(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the seconds of each phase of a save that its manifest tells."""
    summary = checkpoint.manifest.summary
    return {name: summary[f"{name}_s"] for name in _PHASES if f"{name}_s" in summary}
