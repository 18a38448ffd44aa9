"""Draw a spot machine's life from a seed, live it on a clock that nobody waits for, and say which laws were broken.

    plan ──▶ training: steps, windows, saves │ weather │ notices, false ones too │ the end ──▶ what is left on the store

The training is that of a user who goes on after a save that failed, and stops once one is safe. The library's code is
the real one from the manager down to the retry layer; the store below that, the clock and the notices are played.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import cloudckpt.manager.manager as manager_room
from cloudckpt import CheckpointManager, CloudCkptError, KeepLast, Options, OptionsError, Preemption
from cloudckpt.options import KIB
from cloudckpt.preemption.notices import Notice
from cloudckpt.state import AccumulationWindow
from cloudckpt.store.retrying import RetryingStore
from tests.spot_drill.clockwork import Clockwork, Killed
from tests.spot_drill.weather import Log, Outage, Skies, WeatheredStore
from tests.store.fault_store import Bucket, FaultStore

__all__ = ["Life", "Plan", "Word", "draw", "live", "seconds_of_a_save"]

OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=4 * KIB, span_bytes=4 * KIB)
_ELEMENTS = 8 * KIB
_POLL_S = 0.5
# What may pass after the end: the library looks at the clock now and then.
_SLACK_S = 1.5
# A snapshot under way that is younger than this is waited for, and not repeated.
_RECENT_S = 5.0
_runs = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A notice: when it comes, and when it says that the machine goes. It is false if the machine stays."""

    at_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is drawn from a seed.

    Attributes:
        leaves: whether the training ends once it has heard of an end and is safe, in place of going on to the last.
        need_s: what one save takes below a clear sky.
        end: the notice that is true.
        rumours: those that are not.
        repeats: whether all notices say the same, so that one is told from another by its time alone.
        is_blocking: whether the store's client sees the limit of a request when that begins, and never again.
    """

    seed: int
    step_s: float
    every_steps: int
    window_steps: int
    is_async: bool
    leaves: bool
    need_s: float
    skies: Skies
    end: Word
    rumours: tuple[Word, ...] = ()
    repeats: bool = False
    is_blocking: bool = True


@dataclass(slots=True)
class Life:
    """What happened.

    Attributes:
        asked_s: step → when its save was begun.
        called: what the manager was called for, from when to when.
        left_s: when the training ended by itself; inf if it was killed.
        committed_s: step → when its manifest was on the store.
        newest: the step that `latest` says afterwards; -1 for none.
        broken: the laws that were broken.
        story: all of it, line by line.
    """

    asked_s: dict[int, float] = field(default_factory=dict)
    called: list[tuple[str, float, float]] = field(default_factory=list)
    left_s: float = math.inf
    committed_s: dict[int, float] = field(default_factory=dict)
    newest: int = -1
    broken: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


def draw(seed: int) -> Plan:
    """Return the plan of a seed."""
    rng, kinds = random.Random(f"drill {seed}"), random.Random(f"kinds {seed}")
    calm = Skies(latency_s=_between(rng, 0.02, 0.4), shard_s=_between(rng, 0.02, 1.0))
    at_s = rng.uniform(20.0, 150.0)
    end = Word(at_s=at_s, stop_s=at_s + _between(rng, 2.0, 120.0))
    need_s = seconds_of_a_save(calm)
    outages = []
    for _ in range(rng.randrange(4)):
        start_s = rng.uniform(0.0, end.stop_s)
        outages.append(
            Outage(start_s=start_s, stop_s=start_s + _between(rng, 1.0, 90.0), is_silent=rng.random() < 0.25)
        )
    rumours = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        heard_s = rng.uniform(5.0, at_s)
        rumours.append(Word(at_s=heard_s, stop_s=heard_s + _between(rng, 2.0, 60.0)))
    is_bad = rng.random() < 0.85
    # Mostly late, and mostly not too late.
    latest_s = max(at_s - 10.0, end.stop_s - _enough_s(need_s) - 1.0)
    skies = replace(
        calm,
        busy=rng.choice((0.0, 0.1, 0.4)) if is_bad else 0.0,
        stalled=rng.choice((0.0, 0.0, 0.01, 0.05)) if is_bad else 0.0,
        lost=rng.choice((0.0, 0.05, 0.2)) if is_bad else 0.0,
        outages=tuple(outages) if is_bad else (),
        clear_s=rng.uniform(at_s - 10.0, latest_s) if rng.random() < 0.8 else math.inf,
    )
    return Plan(
        seed=seed,
        step_s=_between(rng, 0.2, 4.0),
        every_steps=rng.randrange(4, 40),
        window_steps=rng.choice((1, 1, 4)),
        is_async=rng.random() < 0.7,
        leaves=rng.random() < 0.5,
        need_s=need_s,
        skies=skies,
        end=end,
        rumours=tuple(rumours),
        repeats=kinds.random() < 0.5,
        is_blocking=kinds.random() < 0.7,
    )


def _between(rng: random.Random, least: float, most: float) -> float:
    """Return a number of which each order of magnitude is as likely."""
    return math.exp(rng.uniform(math.log(least), math.log(most)))


def seconds_of_a_save(skies: Skies) -> float:
    """Return what the first save of a job takes below a clear sky, one request at a time, as after much throttling."""
    clock, managed = Clockwork(0), {**_managed(), "options": replace(OPTIONS, concurrency=1)}
    with _world(clock, Bucket(), skies, seed=0), CheckpointManager("memory://drill", **managed) as manager:
        manager.save(0, state_of(0))
    return clock.now_s


def state_of(step: int) -> dict[str, Any]:
    """Return the state after a step, bit for bit."""
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(_ELEMENTS, generator=generator), "step": step}


def live(plan: Plan) -> Life:
    """Live through a plan, and judge what came of it."""
    life, clock, bucket = Life(), Clockwork(plan.seed), Bucket()
    bucket.objects = log = Log(clock)
    with _world(clock, bucket, plan.skies, seed=plan.seed) as store:
        store.is_blocking = plan.is_blocking
        clock.at(plan.end.stop_s + _SLACK_S, clock.kill)
        preemption = Preemption(signals=(), sources=[_Bulletin(clock, plan)], poll_s=_POLL_S)
        try:
            with preemption:
                _Training(plan, life, clock).run(preemption)
        except Killed:
            life.story.append(f"{clock.now_s:9.3f} killed")
    life.story = sorted([*life.story, *store.story, *_written(log)])
    life.committed_s = {_step_of(key): at_s for key, at_s in log.written_s.items() if key.endswith("manifest.json")}
    life.broken = [*([clock.failure] if clock.failure else []), *_judge(plan, life), *_look(life, bucket)]
    return life


def _managed() -> dict[str, Any]:
    return {"options": OPTIONS, "save_rng": False, "progress": "off"}


@contextmanager
def _world(clock: Clockwork, bucket: Bucket, skies: Skies, *, seed: int) -> Iterator[WeatheredStore]:
    """Let the library live by a clock, and every root it opens be a bucket below these skies."""
    store = WeatheredStore(
        bucket, clock, skies, seed=seed, name=next(_runs), request_timeout_s=OPTIONS.retry.request_timeout_s
    )
    usual = manager_room.open_store

    def open_store(*_: Any, **options: Any) -> RetryingStore:
        return RetryingStore(
            store,
            options["options"].retry,
            sleep=clock.sleep,
            clock=clock.monotonic,
            rng=random.Random(f"retry {seed}"),
        )

    with clock.wound_up("cloudckpt"):
        manager_room.open_store = open_store
        try:
            yield store
        finally:
            manager_room.open_store = usual


class _Bulletin:
    """Whoever knows of the end says what holds now, as often as it is asked."""

    name = "bulletin"

    def __init__(self, clock: Clockwork, plan: Plan) -> None:
        self._clock = clock
        self._words = (plan.end, *plan.rumours)
        self._repeats = plan.repeats

    def poll(self) -> Iterable[Notice]:
        now_s = self._clock.now_s
        return [
            Notice(
                source=self.name,
                reason="it goes" if self._repeats else f"no. {number}",
                deadline_s=word.stop_s,
                received_s=word.at_s,
            )
            for number, word in enumerate(self._words)
            if word.at_s <= now_s < word.stop_s
        ]


class _Training:
    """A user's loop, on the thread that it is run in."""

    def __init__(self, plan: Plan, life: Life, clock: Clockwork) -> None:
        self._plan = plan
        self._life = life
        self._clock = clock
        self._handle: Any = None
        self._is_safe = False
        self._window = AccumulationWindow(torch.nn.Linear(2, 2), plan.window_steps)

    def run(self, preemption: Preemption) -> None:
        """Train until an end is announced and the job is safe, or for ever."""
        with self._called("open"):
            manager = CheckpointManager(
                "memory://drill",
                save_every_steps=self._plan.every_steps,
                preemption=preemption,
                retention=[KeepLast(2)],
                prune_grace_s=5.0,
                **_managed(),
            )
        for step in itertools.count():
            self._clock.sleep(self._plan.step_s)
            self._window.advance()
            with self._called(f"should_save({step})"):
                is_due = manager.should_save(step)
            if is_due:
                self._save(manager, step)
            if self._handle is not None:
                self._is_safe = self._handle.done() and _is_good(self._handle)
            if manager.preempted and self._is_safe and self._plan.leaves:
                break
        with self._called("close"):
            manager.close()
        self._life.left_s = self._clock.now_s

    def _save(self, manager: CheckpointManager, step: int) -> None:
        self._is_safe, self._handle = False, None
        state = {**state_of(step), "window": self._window}
        self._life.asked_s[step] = self._clock.now_s
        try:
            with self._called(f"save({step})"):
                if self._plan.is_async:
                    self._handle = manager.async_save(step, state)
                else:
                    manager.save(step, state)
                    self._is_safe = True
        except OptionsError:
            del self._life.asked_s[step]  # the window is open
        except CloudCkptError as exc:
            self._handle = getattr(exc, "handle", None)

    @contextmanager
    def _called(self, what: str) -> Iterator[None]:
        life, began_s, end = self._life, self._clock.now_s, "returned"
        life.called.append((what, began_s, math.inf))
        try:
            yield
        except BaseException as exc:
            end = f"raised {type(exc).__name__}: {str(exc)[:150]}"
            raise
        finally:
            now_s = self._clock.now_s
            life.called[-1] = (what, began_s, now_s)
            if now_s > began_s or end != "returned":
                life.story.append(f"{began_s:9.3f} {now_s - began_s:7.3f} s {what} {end}")


def _is_good(handle: Any) -> bool:
    try:
        return handle.result(0) is not None
    except CloudCkptError:
        return False


# -- judging -----------------------------------------------------------------------------------------------


def _step_of(key: str) -> int:
    return int(key.split("-")[1])


def _written(log: Log) -> list[str]:
    return [f"{at_s:9.3f} COMMITTED {key}" for key, at_s in log.written_s.items() if key.endswith("manifest.json")]


def _judge(plan: Plan, life: Life) -> Iterator[str]:
    end_s = plan.end.stop_s
    for what, began_s, ended_s in life.called:
        if plan.end.at_s + 2 * _POLL_S < began_s <= end_s and ended_s > end_s + _SLACK_S - 1e-6:
            yield f"{what}, begun at {began_s:.1f} s, waited past the end at {end_s:.1f} s"
    in_time = {step for step, at_s in life.committed_s.items() if at_s <= end_s}
    newest = max(in_time, default=-1)
    asked = [step for step, at_s in life.asked_s.items() if at_s <= end_s]
    if asked and _is_enough(plan, life.asked_s[max(asked)]) and newest != max(asked):
        yield f"step {max(asked)} was asked for at {life.asked_s[max(asked)]:.1f} s, and the newest is {newest}"
    # From the first boundary on after the notice there is somebody who asks, unless all is safe by a notice before.
    asks_s = plan.end.at_s + _POLL_S + (plan.window_steps + 2) * plan.step_s
    is_old = life.asked_s.get(newest, -1.0) < plan.end.at_s - _RECENT_S
    since_s = min(word.at_s for word in (plan.end, *plan.rumours) if word.stop_s > plan.end.at_s)
    has_left = life.left_s <= asks_s and life.asked_s.get(newest, -1.0) >= since_s - _RECENT_S
    if life.left_s > plan.end.at_s and _is_enough(plan, asks_s + plan.need_s) and is_old and not has_left:
        yield f"there was time from {asks_s:.1f} s on, and the newest is {newest}"


def _is_enough(plan: Plan, from_s: float) -> bool:
    """Tell whether a save that begins then, or must wait for a clear sky, has to be committed in time.

    A request that got no answer may have used up half of the time that was left when it began, or, of a save before,
    when the end was announced; before that nobody knew that there was need for haste.
    """
    return plan.end.stop_s - max(from_s, plan.skies.clear_s, plan.end.at_s) >= _enough_s(plan.need_s)


def _enough_s(need_s: float) -> float:
    return 2 * (need_s + 1.0)


def _look(life: Life, bucket: Bucket) -> Iterator[str]:
    """Look with the eyes of the next job, below a clear sky."""
    store, usual = FaultStore(bucket), manager_room.open_store
    manager_room.open_store = lambda *_, **options: RetryingStore(store, options["options"].retry)
    try:
        with CheckpointManager("memory://drill", **_managed()) as manager:
            newest = manager.latest()
            life.newest = -1 if newest is None else newest.step
            state = {"w": torch.zeros(_ELEMENTS), "step": -1}
            restored = manager.restore(state, strict=False)
    except CloudCkptError as exc:
        yield f"what is there cannot be restored: {type(exc).__name__}: {exc}"
        return
    finally:
        manager_room.open_store = usual
    if life.newest != max(life.committed_s, default=-1):
        yield f"step {max(life.committed_s)} was committed, and latest says {life.newest}"
    if restored is not None:
        expected = state_of(restored.step)
        if not torch.equal(state["w"], expected["w"]) or state["step"] != expected["step"]:  # type: ignore[arg-type]
            yield f"step {restored.step} came back wrong"
