"""Run threads of the real library on a clock that nobody waits for: one at a time, in an order that a seed draws.

    a thread waits (lock, event, queue, sleep, join …) ──▶ the next one that may go on goes on
                                                       ╰──▶ none may: the clock jumps to the earliest time-out

What a module of the library knows as `threading`, `time` and so on is replaced while a `Clockwork` is wound up, so the
code runs as it stands, and a run is the same each time that it has the same seed. Threads only change places where one
waits: what two of them do to one variable in between is not tried here.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import itertools
import random
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

__all__ = ["Clockwork", "Killed"]


class Killed(BaseException):
    """The process was killed here."""


@dataclass(eq=False)
class _Actor:
    """One thread: where it waits, and for what."""

    name: str
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_go_on: Callable[[], bool] = lambda: True
    stop_s: float | None = None
    is_over: bool = False


class Clockwork:
    """A clock, and the threads that live by it. The thread that makes it is the first of them.

    Attributes:
        now_s: the time, from 0.
        is_dead: whether the process was killed: whoever waits, or would wait, raises `Killed`.
        failure: what went wrong with the clock itself; "" if nothing did.
        rng: who goes first, where several threads may.
    """

    def __init__(self, seed: int, *, limit_s: float = 100_000.0) -> None:
        self.now_s = 0.0
        self.is_dead = False
        self.failure = ""
        self.rng = random.Random(seed)
        self._limit_s = limit_s
        self._actors = [_Actor("main")]
        self._current = self._actors[0]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []

    def monotonic(self) -> float:
        """Return the time; what takes no time in the world takes none here."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let others go on for so long."""
        self.wait_until(lambda: False, seconds)

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Call something at a time, between two turns of threads; it must not wait."""
        heapq.heappush(self._events, (when_s, next(self._numbers), call))

    def kill(self) -> None:
        """End the process: every thread raises `Killed` where it waits, and where it would."""
        self.is_dead = True

    def wait_until(self, may_go_on: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Let others go on until a condition holds, or for so long; return whether it holds."""
        self._refuse_dead()
        if may_go_on():
            return True
        actor = self._current
        actor.may_go_on = may_go_on
        actor.stop_s = None if timeout_s is None else self.now_s + max(0.0, timeout_s)
        self._pass_on(actor)
        self._refuse_dead()
        return may_go_on()

    def _refuse_dead(self) -> None:
        if self.is_dead:
            raise Killed

    def _pass_on(self, actor: _Actor) -> None:
        """Give the turn to whoever is next, and wait for the own one."""
        chosen = self._next()
        self._current = chosen
        if chosen is not actor:
            chosen.turn.release()
            if not actor.is_over:
                actor.turn.acquire()

    def _next(self) -> _Actor:
        while True:
            living = [actor for actor in self._actors if not actor.is_over]
            ready = [actor for actor in living if self.is_dead or actor.may_go_on() or self._is_late(actor)]
            if ready:
                return self.rng.choice(ready)
            stops = [actor.stop_s for actor in living if actor.stop_s is not None]
            stops += [when_s for when_s, _, _ in self._events[:1]]
            if not stops or min(stops) > self._limit_s:
                self.failure = f"at {self.now_s:.3f} s all wait for ever: {', '.join(actor.name for actor in living)}"
                self.kill()
                continue
            self.now_s = max(self.now_s, min(stops))
            while self._events and self._events[0][0] <= self.now_s:
                heapq.heappop(self._events)[2]()

    def _is_late(self, actor: _Actor) -> bool:
        return actor.stop_s is not None and actor.stop_s <= self.now_s

    # -- threads -------------------------------------------------------------------------------------------

    def begin(self, name: str) -> _Actor:
        """Let a new thread have its turn some time."""
        self._refuse_dead()
        self._actors.append(_Actor(name))
        return self._actors[-1]

    def live(self, actor: _Actor, run: Callable[[], None]) -> None:
        """Be a thread, from its first turn to its end."""
        actor.turn.acquire()
        try:
            if not self.is_dead:
                run()
        except Killed:
            pass
        finally:
            actor.is_over = True
            self._pass_on(actor)

    def end(self) -> None:
        """Kill what is left, and wait for its threads."""
        self.kill()
        main = self._actors[0]
        main.may_go_on = lambda: all(actor.is_over for actor in self._actors[1:])
        while not main.may_go_on():
            # Not by chance: whoever dies may have to be asked several times.
            self._current = next(actor for actor in self._actors[1:] if not actor.is_over)
            self._current.turn.release()
            main.turn.acquire()
        for thread in self._threads:
            threading.Thread.join(thread, 10)

    @contextmanager
    def wound_up(self, package: str) -> Iterator[None]:
        """Let all modules of a package live by this clock while the block runs; what is left then is killed."""
        undo: list[Callable[[], None]] = []
        instead = _replacements(self)
        try:
            for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")]:
                for name, value in list(vars(module).items()):
                    found = next((new for old, new in instead if old is value), None)
                    if found is not None:
                        undo.append(lambda module=module, name=name, value=value: setattr(module, name, value))
                        setattr(module, name, found)
                for function in _functions(module):
                    undo.extend(_redefaulted(function, instead))
            yield
        finally:
            try:
                self.end()
            finally:
                for step in reversed(undo):
                    step()


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if isinstance(plain, types.FunctionType):
                yield plain


def _redefaulted(
    function: types.FunctionType, instead: Iterable[tuple[object, object]]
) -> Iterator[Callable[[], None]]:
    """Replace a function's default arguments: `clock=time.monotonic` was looked up when it was defined."""
    table = {id(old): new for old, new in instead}
    if any(id(value) in table for value in (function.__kwdefaults__ or {}).values()):
        before = function.__kwdefaults__
        function.__kwdefaults__ = {name: table.get(id(value), value) for name, value in before.items()}  # type: ignore[union-attr]
        yield lambda: setattr(function, "__kwdefaults__", before)
    if any(id(value) in table for value in function.__defaults__ or ()):
        defaults = function.__defaults__
        function.__defaults__ = tuple(table.get(id(value), value) for value in defaults or ())
        yield lambda: setattr(function, "__defaults__", defaults)


def _replacements(clock: Clockwork) -> list[tuple[object, object]]:
    """Return what modules may know, and what they know instead."""

    class Lock(_Lock):
        _clock = clock

    class RLock(_RLock):
        _clock = clock

    class Condition(_Condition):
        _clock = clock

    class Event(_Event):
        _clock = clock

    class Semaphore(_Semaphore):
        _clock = clock

    class Thread(_Thread):
        _clock = clock

    class Barrier(_Barrier):
        _clock = clock

    class Queue(_Queue):
        _clock = clock

    class Result(_Future):
        _clock = clock

    class Pool(_Pool):
        _clock, _thread, _future = clock, Thread, Result

    def wait(futures: Any, timeout: float | None = None, return_when: str = "ALL_COMPLETED") -> Any:
        return _wait(clock, list(futures), timeout, return_when)

    fake_threading = _Module(
        threading,
        Lock=Lock,
        RLock=RLock,
        Condition=Condition,
        Event=Event,
        Semaphore=Semaphore,
        Barrier=Barrier,
        Thread=Thread,
    )
    fake_time = _Module(
        time, monotonic=clock.monotonic, sleep=clock.sleep, time=clock.monotonic, perf_counter=clock.monotonic
    )
    return [
        (threading, fake_threading),
        (time, fake_time),
        (time.monotonic, clock.monotonic),
        (time.sleep, clock.sleep),
        (SimpleQueue, Queue),
        (concurrent.futures.wait, wait),
        (concurrent.futures.ThreadPoolExecutor, Pool),
    ]


class _Module:
    """A module of which some names mean something else."""

    def __init__(self, real: types.ModuleType, **names: object) -> None:
        self.__dict__.update(names)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


# -- what threads wait for: as Python's own, in a world where only one of them runs -------------------------------


class _Waiting:
    _clock: Clockwork


class _Lock(_Waiting):
    def __init__(self) -> None:
        self._is_held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._is_held and not blocking:
            return False
        if self._is_held and not self._clock.wait_until(lambda: not self._is_held, None if timeout < 0 else timeout):
            return False
        self._is_held = True
        return True

    def release(self) -> None:
        if not self._is_held:
            raise RuntimeError("release unlocked lock")
        self._is_held = False

    def locked(self) -> bool:
        return self._is_held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _RLock(_Waiting):
    def __init__(self) -> None:
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()
        if self._owner not in (None, me):
            if not blocking:
                return False
            if not self._clock.wait_until(lambda: self._owner is None, None if timeout < 0 else timeout):
                return False
        self._owner, self._depth = me, self._depth + 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None

    def give_up(self) -> tuple[int | None, int]:
        state, self._owner, self._depth = (self._owner, self._depth), None, 0
        return state

    def take_back(self, state: tuple[int | None, int]) -> None:
        # Whoever is killed while it waits holds the lock all the same, as its `with` is about to give it back.
        if not self._clock.is_dead:
            self._clock.wait_until(lambda: self._owner is None)
        self._owner, self._depth = state

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Condition(_Waiting):
    def __init__(self, lock: Any = None) -> None:
        lock_type = type("RLock", (_RLock,), {"_clock": self._clock})
        self._lock = lock if lock is not None else lock_type()
        self._waiters: deque[list[bool]] = deque()

    def __enter__(self) -> bool:
        return bool(self._lock.__enter__())

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(*exc)

    def wait(self, timeout: float | None = None) -> bool:
        told = [False]
        self._waiters.append(told)
        state = self._lock.give_up()
        try:
            return self._clock.wait_until(lambda: told[0], timeout)
        finally:
            self._lock.take_back(state)
            if told in self._waiters:
                self._waiters.remove(told)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        stop_s = None if timeout is None else self._clock.now_s + timeout
        while not (found := predicate()):
            left_s = None if stop_s is None else stop_s - self._clock.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return found

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiters))):
            self._waiters.popleft()[0] = True

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class _Event(_Waiting):
    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._clock.wait_until(lambda: self._is_set, timeout)


class _Semaphore(_Waiting):
    def __init__(self, value: int = 1) -> None:
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if not self._value and (not blocking or not self._clock.wait_until(lambda: self._value > 0, timeout)):
            return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Thread(_Waiting, threading.Thread):
    def start(self) -> None:
        self._actor = self._clock.begin(self.name)
        self._clock._threads.append(self)
        self._body, self.run = self.run, lambda: self._clock.live(self._actor, self._body)  # type: ignore[method-assign]
        super().start()

    def join(self, timeout: float | None = None) -> None:
        self._clock.wait_until(lambda: self._actor.is_over, timeout)

    def is_alive(self) -> bool:
        return self.ident is not None and not self._actor.is_over


class _Queue(_Waiting):
    def __init__(self) -> None:
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self) -> Any:
        self._clock.wait_until(lambda: bool(self._items))
        return self._items.popleft()


class _Barrier(_Waiting):
    def __init__(self, parties: int, action: Callable[[], None] | None = None, timeout: float | None = None) -> None:
        self._parties = parties
        self._timeout = timeout
        self._come = 0

    def wait(self, timeout: float | None = None) -> int:
        place, self._come = self._come, self._come + 1
        goal = (place // self._parties + 1) * self._parties
        if not self._clock.wait_until(lambda: self._come >= goal, self._timeout if timeout is None else timeout):
            raise threading.BrokenBarrierError
        return place % self._parties


class _Pool(_Waiting, concurrent.futures.Executor):
    _thread: type[_Thread]
    _future: type[_Future]

    def __init__(self, max_workers: int, thread_name_prefix: str = "", **_: Any) -> None:
        self._size = max_workers
        self._name = thread_name_prefix
        self._calls: deque[Callable[[], None]] = deque()
        self._workers: list[_Thread] = []
        self._is_shut = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as exc:  # noqa: BLE001 (as a pool does)
                future.set_exception(exc)

        self._calls.append(call)
        if len(self._workers) < self._size:
            self._workers.append(self._thread(target=self._serve, name=f"{self._name}-{len(self._workers)}"))
            self._workers[-1].start()
        return future

    def _serve(self) -> None:
        while self._clock.wait_until(lambda: bool(self._calls) or self._is_shut) and self._calls:
            self._calls.popleft()()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_shut = True
        if cancel_futures:
            self._calls.clear()
        for worker in self._workers:
            worker.join()


class _Future(_Waiting, Future):  # type: ignore[type-arg]
    def result(self, timeout: float | None = None) -> Any:
        self._clock.wait_until(self.done, timeout)
        return super().result(0)


def _wait(clock: Clockwork, futures: list[Future[Any]], timeout: float | None, return_when: str) -> Any:
    def is_enough() -> bool:
        done = [future for future in futures if future.done()]
        if return_when == FIRST_EXCEPTION and any(
            not future.cancelled() and future.exception() is not None for future in done
        ):
            return True
        return len(done) == len(futures)

    clock.wait_until(is_enough, timeout)
    done = {future for future in futures if future.done()}
    return types.SimpleNamespace(done=done, not_done=set(futures) - done)
