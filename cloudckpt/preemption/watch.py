"""Know that this process will be taken away: by signals, and by whoever else may say so.

    signals ─SignalWatch─┐
    sources ─Watcher─────┴─▶ seen ──▶ notice, for whoever asks each step

Entered by the owner's thread, by a thread per source, and by the signal handler, which may interrupt the owner's
anywhere: what it touches (`seen`) is only ever appended to, without a lock. A notice holds until whoever acts on
notices finds that its time has passed, and dismisses it. What is done about it is the manager's; here nothing is saved
and nobody exits. No thread keeps a `Preemption` alive that everybody has forgotten.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cloudckpt.deadline import Deadline
from cloudckpt.errors import OptionsError
from cloudckpt.preemption.clouds import DMI, AzureSource, Ec2Source, GceSource, is_azure, is_ec2, is_gce
from cloudckpt.preemption.notices import CheckSource, Notice, NoticeSource, Watcher
from cloudckpt.preemption.signals import SignalWatch
from cloudckpt.preemption.slurm import SlurmSource
from cloudckpt.threads import new_lock

__all__ = ["EXIT_PREEMPTED", "Preemption", "auto_sources"]

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 143
"""128 + SIGTERM: what a shell reports of a process that SIGTERM has ended."""

GRACE_VARIABLE = "CLOUDCKPT_GRACE_S"
"""Names the seconds between SIGTERM and the kill, for whoever writes a pod's or a job's description."""

_GRACE_S = 30.0
# What kubelet leaves pods of the 30 s that a GKE Spot VM has; the rest is for the system's own.
_KUBERNETES_GRACE_S = 15.0
_JOIN_S = 3.0
_LOOK_S = 1.0
# Whoever asks at every step has asked by then, or nobody does.
_UNASKED_S = 10.0


def auto_sources(
    *, slurm_lead_s: float = 120.0, dmi: Path = DMI, environ: Mapping[str, str] = os.environ
) -> list[NoticeSource]:
    """Return the sources that this machine and job have; elsewhere none, so that no request leaves the process."""
    sources: list[NoticeSource] = []
    if is_ec2(dmi, environ):
        sources.append(Ec2Source())
    if is_gce(dmi):
        sources += [GceSource("preempted"), GceSource("maintenance-event")]
    if is_azure(dmi):
        sources.append(AzureSource())
    if environ.get("SLURM_JOB_ID"):
        sources.append(SlurmSource(lead_s=slurm_lead_s, environ=environ))
    return sources


def default_grace_s(environ: Mapping[str, str] = os.environ) -> float:
    """Return the seconds from SIGTERM to the kill: what CLOUDCKPT_GRACE_S says, else 15 on Kubernetes and 30 elsewhere.

    Raises:
        OptionsError: the variable holds no number of seconds above 0.
    """
    said = environ.get(GRACE_VARIABLE)
    if said is None:
        return _KUBERNETES_GRACE_S if environ.get("KUBERNETES_SERVICE_HOST") else _GRACE_S
    try:
        grace_s = float(said)
    except ValueError:
        grace_s = math.nan
    _check_seconds(GRACE_VARIABLE, grace_s, said)
    return grace_s


class Preemption:
    """What is known of this process's end, from `start` on.

    ```python
    with Preemption(check=lambda: Path("/run/stop").exists()) as preemption:
        for step in range(total):
            train_step()
            if preemption.notice:
                save(step)
                sys.exit(preemption.exit_code)
    ```

    A signal that is watched does not end the process, so that there is time to save; nor does it a second time, as
    schedulers and operators repeat themselves. When it comes again after the time that it left, `grace_s`, its former
    default is taken, unless the notice was dismissed by then, as a manager does whose job asks on: then it gives notice
    anew. If nobody asks for a notice, the log says so. SIGINT and SIGKILL are nobody's but the user's. SIGUSR1, which
    dumps the stacks for many, gives notice by default under Slurm only. A handler that was there before is called after
    ours, and one that is installed later may call ours. Processes forked from this one, such as the workers of a
    DataLoader, die of the signals as ever. While the main thread is inside of a C function that does not return, such
    as a collective that waits, Python runs no handler: the notice is seen when it is back.

    A process that was preempted should exit with `exit_code`, which tells its end from success (0), from an error of
    Python's (1) and from a kill (137): Slurm requeues it by itself if RequeueExit lists 143, Kubernetes can name it in
    a podFailurePolicy. torchrun passes SIGTERM on to its ranks, kills them 30 s later, and ends with 1 itself whatever
    they end with. SIGUSR1 ends it at once, with 138, and leaves its ranks behind, who hear nothing; where its
    `--signals-to-handle` names SIGUSR1, it does with it as with SIGTERM.

    One that is dropped without `stop` is stopped: nobody could ask it any more.

    Attributes:
        exit_code: what the process should exit with once it has saved.
    """

    def __init__(  # noqa: PLR0913 (keyword-only options, each of its own kind)
        self,
        *,
        signals: Sequence[int] | Literal["auto"] = "auto",
        grace_s: float | Mapping[int, float] | None = None,
        sources: Sequence[NoticeSource] | Literal["auto"] = "auto",
        check: Callable[[], float | bool | None] | None = None,
        poll_s: float = 5.0,
        slurm_lead_s: float = 120.0,
        act_on_rebalance: bool = False,
        exit_code: int = EXIT_PREEMPTED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Choose what to watch; nothing is installed before `start`.

        Args:
            signals: signals that give notice; none to leave them alone. `auto`: those that `grace_s` names, else
                SIGTERM, and SIGUSR1 under Slurm.
            grace_s: seconds from a signal to the kill. None: what CLOUDCKPT_GRACE_S says in the environment (a pod's
                terminationGracePeriodSeconds, say), else 15 on Kubernetes, because that is what pods get of the 30 of a
                GKE Spot VM, and 30 elsewhere, as Slurm (KillWait), torchrun and GCE give. A mapping gives each signal
                its own, such as `{SIGTERM: 30, SIGUSR1: 120}` with `--signal=USR1@120`.
            sources: whom else to ask; `auto` for those that this machine has (EC2, GCE, Azure, Slurm).
            check: a function of yours, called in a thread of its own: false for no notice, True for one without a
                time, or the seconds left; also as numpy or torch say these. Anything else that is true is a notice
                without a time. What it says no longer is over once its save is committed.
            poll_s: seconds between two questions to a source.
            slurm_lead_s: seconds before the end of a Slurm job at which `auto` gives notice.
            act_on_rebalance: take EC2's rebalance recommendation, which is no certainty, for a notice, too. Otherwise
                it is logged, and is in `seen` only.
            exit_code: what to exit with, 1 to 255.
            clock: monotonic seconds.

        Raises:
            OptionsError: an option is wrong, or there is nothing to watch.
        """
        if isinstance(signals, str) and signals == "auto":
            signals = tuple(grace_s) if isinstance(grace_s, Mapping) else _auto_signals()
        self._signals = _checked_signals(signals)
        self._grace_s = _checked_grace(default_grace_s() if grace_s is None else grace_s, self._signals)
        _check_seconds("poll_s", poll_s)
        _check_seconds("slurm_lead_s", slurm_lead_s)
        if type(exit_code) is not int or not 1 <= exit_code <= 255:
            raise OptionsError(f"exit_code is {exit_code!r}; give 1 to 255, because 0 would say that all is done")
        self._sources = _checked_sources(sources)
        if not (self._signals or sources or check):
            raise OptionsError("signals, sources and check are all empty; give at least one of them")
        if check is not None and (not callable(check) or inspect.iscoroutinefunction(check)):
            # The answer of a coroutine function would always be true.
            raise OptionsError(f"check is {check!r}; give a plain function, which has a thread of its own")
        self._check = check
        self._poll_s = poll_s
        self._slurm_lead_s = slurm_lead_s
        self._act_on_advice = act_on_rebalance
        self.exit_code = exit_code
        self._clock = clock
        self._seen: list[Notice] = []
        self._dismissed: list[Notice] = []
        self._withdrawn: set[tuple[str, str, str]] = set()
        self._logged_count = 0
        self._asked_count = 0
        self._complained_count = 0
        self._weighed: tuple[tuple[int, int], tuple[Notice, ...]] = ((0, 0), ())
        self._log_lock = new_lock()
        self._take_lock = new_lock()
        self._signal_watch: SignalWatch | None = None
        self._watchers: list[Watcher] = []
        self._threads: list[Watcher] = []
        self._let_go: weakref.finalize[..., Preemption] | None = None
        self._pid = 0

    # -- asking --------------------------------------------------------------------------------------------

    @property
    def notice(self) -> Notice | None:
        """The notice with the earliest deadline, or None while there is none; of any thread, at no cost."""
        return next(iter(self.pending), None)

    @property
    def pending(self) -> tuple[Notice, ...]:
        """All notices that were not dismissed, the earliest deadline first; not advice, unless that is acted on."""
        # The handler appends without a lock, so news is known by the length alone.
        self._asked_count = len(self._seen)
        found = self._pending()
        if self._logged_count != self._asked_count:
            self._log_news()
        return found

    def _pending(self) -> tuple[Notice, ...]:
        counts = len(self._seen), len(self._dismissed)
        if self._weighed[0] != counts:
            over = set(map(id, self._dismissed))
            heeded = [one for one in self._seen[: counts[0]] if self._is_heeded(one) and id(one) not in over]
            self._weighed = counts, tuple(sorted(heeded, key=lambda one: one.urgency))
        return self._weighed[1]

    def dismiss(self, notice: Notice) -> None:
        """Take a notice as over, for whoever acts on notices: its time has passed, or it has none and was withdrawn.

        The same may be given anew: by a signal when it comes again, by a source once it has stopped saying it.
        """
        self._dismissed.append(notice)
        if self._signal_watch is not None:
            self._signal_watch.forget(notice)

    def next_end(self, now_s: float) -> Deadline | None:
        """Return the earliest end that lies ahead of `now_s` and has a time; this is no asking for notices."""
        for one in self._pending():
            if one.deadline_s is not None and one.deadline_s > now_s:
                return Deadline(stop_s=one.deadline_s, reason=f"preemption ({one.source})")
        return None

    @property
    def seen(self) -> tuple[Notice, ...]:
        """All notices, in the order in which they came; advice, too."""
        return tuple(self._seen)

    def _is_heeded(self, notice: Notice) -> bool:
        return self._act_on_advice or notice.kind == "order"

    def _log_news(self) -> None:
        # Never waits: a handler that somebody chained to ours may ask for the notice in the middle of this.
        if not self._log_lock.acquire(blocking=False):
            return
        try:
            while self._logged_count < len(self._seen):
                self._logged_count += 1
                self._log(self._seen[self._logged_count - 1])
        finally:
            self._log_lock.release()

    def _log(self, notice: Notice) -> None:
        left_s = notice.seconds_left(self._clock())
        when = "at a time that is not known" if left_s is None else f"in {left_s:.0f} s"
        text = "preemption %s: %s (%s)" if self._is_heeded(notice) else "advice, on which nothing is done: %s: %s (%s)"
        logger.warning(text, when, notice.reason, notice.source)

    def _take(self, notice: Notice) -> None:
        """Keep what a source says, unless it has said so before; in the source's thread."""
        with self._take_lock:
            self._withdrawn.discard(notice.what)
            if any(self._is_no_news(known, notice) for known in self._seen):
                return
            self._seen.append(notice)
        self._log_news()

    def _is_no_news(self, known: Notice, notice: Notice) -> bool:
        is_over = known.seconds_left(self._clock()) == 0 or any(known is one for one in self._dismissed)
        has_end_ahead = notice.urgency[0] > notice.received_s
        return known.covers(notice) and not (is_over and has_end_ahead)

    def _withdraw(self, notice: Notice) -> None:
        with self._take_lock:
            self._withdrawn.add(notice.what)

    def is_withdrawn(self, notice: Notice) -> bool:
        """Tell whether the source of a notice has stopped saying it."""
        return notice.what in self._withdrawn

    def _look(self) -> None:
        """Say what goes wrong in silence: a source that hangs, and notices that nobody asks for; in a thread."""
        for watcher in self._watchers:
            watcher.look()
        count, now_s = len(self._seen), self._clock()
        unasked = [
            one for one in self._seen[max(self._asked_count, self._complained_count) : count] if self._is_heeded(one)
        ]
        if not any(now_s - one.received_s > _UNASKED_S for one in unasked):
            return
        self._complained_count = count
        self._log_news()
        logger.warning(
            "%s gave notice %.0f s ago and nobody has asked since, so nothing is saved: ask a manager's should_save or "
            "preempted, or Preemption.notice, after every step",
            unasked[0].source,
            now_s - unasked[0].received_s,
        )

    # -- living --------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Install the handlers and begin to ask the sources. Idempotent. What was noticed before stays noticed.

        Python lets only the main thread install handlers: from another one, the signals are left out with a warning.

        Raises:
            OptionsError: called from another thread, and there is nothing but signals to watch.
        """
        if self._pid == os.getpid():
            return self
        sources = list(auto_sources(slurm_lead_s=self._slurm_lead_s) if self._sources is None else self._sources)
        if self._check is not None:
            sources.append(CheckSource(self._check, clock=self._clock))
        self._start_signals(is_all=not sources)
        self._pid = os.getpid()
        take = _weakly(self._take)
        withdraw = _weakly(self._withdraw)
        watchers = [
            Watcher(source, take, poll_s=self._poll_s, withdraw=withdraw, clock=self._clock) for source in sources
        ]
        lookout = Watcher(_Lookout(_weakly(self._look)), take, poll_s=_LOOK_S)
        self._watchers = watchers
        self._threads = [*watchers, lookout]
        if self._let_go is not None:
            self._let_go.detach()
        self._let_go = weakref.finalize(self, _let_go, self._signal_watch, self._threads)
        self._let_go.atexit = False
        for thread in self._threads:
            thread.start()
        return self

    def _start_signals(self, *, is_all: bool) -> None:
        if self._signals and threading.current_thread() is not threading.main_thread():
            if is_all:
                raise OptionsError("only the main thread can watch signals, and there is no other source: start there")
            logger.warning("signals give no notice, because only the main thread can watch them: start there")
            return
        self._signal_watch = SignalWatch(self._signals, self._grace_s, self._seen, clock=self._clock)

    def stop(self) -> None:
        """Give the signals back and ask no more. Idempotent. Returns within 3 s, whatever a source does.

        A handler that was installed after ours stays, and what it passes on to ours goes to the one before.
        """
        threads, self._threads, self._watchers, self._pid = self._threads, [], [], 0
        if self._let_go is not None:
            self._let_go()
        self._signal_watch = None
        stop_s = time.monotonic() + _JOIN_S
        for thread in threads:
            if not thread.join(max(0.0, stop_s - time.monotonic())):
                logger.warning("%s still hangs in a question; its thread is left to itself", thread.name)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Lookout:
    """Looks after a `Preemption` as a source that never says anything, so that a watcher's thread does it."""

    name = "lookout"

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look

    def poll(self) -> tuple[()]:
        self._look()
        return ()


def _weakly(method: Callable[..., object]) -> Callable[..., None]:
    """Return a call of `method` that does not keep its object alive, and does nothing once that is gone."""
    weak = weakref.WeakMethod(method)

    def call(*args: object) -> None:
        if (found := weak()) is not None:
            found(*args)

    return call


def _let_go(watch: SignalWatch | None, threads: Sequence[Watcher]) -> None:
    """Give the signals back and let the threads end."""
    if watch is not None:
        watch.close()
    for thread in threads:
        thread.stop()


def _auto_signals(environ: Mapping[str, str] = os.environ) -> tuple[signal.Signals, ...]:
    return (signal.SIGTERM, signal.SIGUSR1) if environ.get("SLURM_JOB_ID") else (signal.SIGTERM,)


def _checked_signals(signals: Sequence[int] | str) -> tuple[signal.Signals, ...]:
    try:
        checked = tuple(signal.Signals(number) for number in signals)  # type: ignore[arg-type]
    except (TypeError, ValueError) as exc:
        raise OptionsError(f"signals is {signals!r}; give signals such as (signal.SIGTERM,)") from exc
    if len(set(checked)) != len(checked) or {signal.SIGKILL, signal.SIGSTOP} & set(checked):
        raise OptionsError(f"signals is {signals!r}; name each once, and none that cannot be handled")
    return checked


def _checked_sources(sources: Sequence[NoticeSource] | Literal["auto"]) -> tuple[NoticeSource, ...] | None:
    """Return the sources; None for those of the machine."""
    if isinstance(sources, str) and sources == "auto":
        return None
    if not all(callable(getattr(source, "poll", None)) for source in sources):
        raise OptionsError(f"sources is {sources!r}; give 'auto' or a list of sources")
    return tuple(sources)


def _checked_grace(grace_s: float | Mapping[int, float], signals: Sequence[int]) -> dict[int, float]:
    if not isinstance(grace_s, Mapping):
        _check_seconds("grace_s", grace_s)
        return dict.fromkeys(signals, grace_s)
    if set(grace_s) != set(signals):
        names = ", ".join(signal.Signals(number).name for number in signals)
        raise OptionsError(f"grace_s is {dict(grace_s)!r}; give seconds for each of the signals: {names}")
    for value in grace_s.values():
        _check_seconds("grace_s", value)
    return dict(grace_s)


def _check_seconds(name: str, value: float, said: object = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionsError(f"{name} is {(value if said is None else said)!r}; give a number of seconds above 0")
