"""Run whole jobs against one simulated store, one request at a time, in an order that a seed decides.

    World   the buckets, what was acknowledged (`Book`), and where each actor's stores open
    Actor   a process: a thread whose every request waits for its turn, and which may end at any of them
    Stage   the turns: one actor at a time goes on to its next request; between them clocks jump and the late arrives

Nothing of cloudckpt is replaced but what opens a store, and the chance in its names. An actor makes one request at a
time and waits for what it has begun in the background, so one seed is one run: `Stage.trace` is the same each time.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import pytest
import torch

from cloudckpt import CloudCkptError, CommitUnknownError, Options
from cloudckpt.options import KIB, RetryPolicy
from cloudckpt.store import RetryingStore
from cloudckpt.store.probe import _proven
from cloudckpt.threads import started
from tests.store.fault_store import RACES, Bucket, Crash, Fault, FaultKind, FaultStore, Op

__all__ = ["COPY", "CRASHES", "KEPT", "OPTIONS", "ROOT", "Actor", "Book", "Lost", "Saved", "Stage", "World", "state_of"]

ROOT, COPY = "memory://bucket/root", "memory://bucket/copy"
OPTIONS = Options(shard_bytes=4 * KIB, block_bytes=KIB, span_bytes=2 * KIB, concurrency=1, memory_budget_bytes=64 * KIB)
CRASHES = (FaultKind.CRASH_BEFORE, FaultKind.CRASH_HALFWAY, FaultKind.CRASH_AFTER)
# What other people keep beside checkpoints; nobody may touch it.
FOREIGN = {"notes.txt": b"mine", "step-final/weights.bin": b"mine, too", "step-0000000001-e0001.bak": b"an old one"}
_OPENERS = ("manager.manager", "copying.lead", "copying.places")
KEPT = 2
_STUCK_S = 100.0
_PATIENCE = RetryPolicy(max_attempts=3, deadline_s=600, request_timeout_s=300)


class Lost(AssertionError):  # noqa: N818 (what happened)
    """Something was lost, or given back wrong."""


# -- what was saved, and what must be there --------------------------------------------------------------------


def tensors_of(serial: int) -> dict[str, torch.Tensor]:
    """What the save of that number in a world holds: some of its shards change each time, some now and then."""
    return {"w": torch.arange(900, dtype=torch.float32) + serial, "base": torch.full((1_100,), float(serial // 3))}


def state_of(serial: int) -> dict[str, object]:
    return {**tensors_of(serial), "config": {"serial": serial}}


@dataclass
class Saved:
    """One call of a save.

    Attributes:
        line: the numbers of the saves that led to it, itself the last.
        fate: begun, acked, failed, or unknown.
        order: (epoch, step), once it was acknowledged.
    """

    serial: int
    step: int
    line: tuple[int, ...]
    name: str | None = None
    fate: str = "begun"
    order: tuple[int, int] | None = None


@dataclass
class Book:
    """What the actors were told.

    Attributes:
        gone: numbers of saves that somebody has asked to be removed, or whose name may have been.
        pinned: (epoch, step) of what was acknowledged as pinned, and never asked to be unpinned since.
        ended: how often each thing was done.
    """

    saves: list[Saved] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    pinned: set[tuple[int, int]] = field(default_factory=set)
    unnamed: set[int] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)

    def begin(self, step: int, line: tuple[int, ...], name: str | None = None) -> Saved:
        serial = len(self.saves)
        self.saves.append(Saved(serial, step, (*line, serial), name))
        return self.saves[-1]

    @contextmanager
    def ending(self, saved: Saved) -> Iterator[None]:
        """Note what becomes of a save; the block sets `order` when it is acknowledged."""
        try:
            yield
        except CloudCkptError as exc:
            saved.fate = "unknown" if _is_unknown(exc) else "failed"
            raise
        saved.fate = "acked"

    def kept(self) -> list[Saved]:
        """Return what the rules of the newest job keep, and nobody has asked to be removed."""
        acked = [one for one in self.saves if one.order is not None]
        if not acked:
            return []
        line = max(acked, key=_order).line
        last = sorted((one for one in acked if one.serial in line), key=_order)[-KEPT:]
        return [one for one in last if one.serial not in self.gone]

    def newest(self) -> tuple[int, int]:
        """Return the order of the newest that must be there; (-1, -1) if none must."""
        return max(map(_order, self.kept()), default=(-1, -1))

    def check(self, state: dict[str, object], step: int | None) -> Saved:
        """Compare what was restored with the one save that it is of, bit by bit."""
        config = state["config"]
        serial = config.get("serial") if isinstance(config, dict) else None
        if not isinstance(serial, int) or not 0 <= serial < len(self.saves):
            raise Lost(f"step {step} holds {config!r}, which nobody has saved")
        saved = self.saves[serial]
        wrong = [name for name, tensor in tensors_of(serial).items() if not torch.equal(state[name], tensor)]  # type: ignore[arg-type]
        if wrong or saved.step != step:
            raise Lost(f"save {serial}, of step {saved.step}, came back as step {step}, wrong in {wrong}")
        if saved.fate == "failed":
            raise Lost(f"save {serial}, of step {step}, raised, and was restored")
        return saved


def _held_back(work: Callable[[], object], *, name: str) -> threading.Thread:
    """Start the thread in which a manager removes what is due; it works when its actor lets it."""
    cleaner = work.__self__  # type: ignore[attr-defined]
    actor: Actor = cleaner._catalog.store.inner.hook.func.__self__

    def wait_and_work() -> None:
        actor.wait_to_clean()
        work()

    return started(wait_and_work, name=name)


def _no_thread(*_: object, **__: object) -> NoReturn:
    raise CloudCkptError("one thread is enough")


def _order(saved: Saved) -> tuple[int, int]:
    return saved.order or (-1, -1)


def _is_unknown(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, CommitUnknownError):
            return True
        exc = exc.__cause__
    return False


# -- who does it -----------------------------------------------------------------------------------------------


class Actor:
    """A process. `step` is called by each of its requests, before it is made.

    Attributes:
        doom: how its next request ends it.
        fate: what is to break a request: its number among the actor's → how; a crash is the end.
        count: its requests so far.
        error: what its body raised, if that was not its crash.
    """

    def __init__(self, name: str, body: Callable[[Actor], None], world: World, seed: str = "") -> None:
        self.name, self.world = name, world
        self.rng = random.Random(f"{seed}/{name}")
        self.stage: Stage | None = None
        self.doom: FaultKind | None = None
        self.fate: dict[int, Callable[[FaultStore, Op], object]] = {}
        self.count = 0
        self.is_dead = self.is_done = False
        self.error: BaseException | None = None
        self.tickets: list[object] = []
        self._may_clean = threading.Event()
        self._body = body
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def run(self) -> None:
        _here.actor = self
        try:
            with suppress(Crash):
                self._body(self)
        except BaseException as exc:  # noqa: BLE001 (the end of an actor: looked at by whoever runs it)
            if not self.is_dead:
                self.error = exc
        finally:
            _here.actor = None
            self.is_done = True
            if self.stage is not None:
                self.stage.tell()

    @contextmanager
    def cleaning(self) -> Iterator[None]:
        """Let threads that clean for this actor work in the block."""
        self._may_clean.set()
        yield
        self._may_clean.clear()

    def let_clean(self) -> None:
        """Let them work from now on."""
        self._may_clean.set()

    def wait_to_clean(self) -> None:
        self._may_clean.wait()

    def open(self, url: str) -> RetryingStore:
        client = FaultStore(self.world.bucket(url), url=url)
        client.hook = partial(self.step, client)
        self.world.clients.append(client)
        return RetryingStore(client, _PATIENCE, sleep=lambda _: None)

    def step(self, client: FaultStore, op: Op) -> None:
        if self.stage is not None:
            self.stage.wait(self)
        if self.is_dead:
            raise Crash
        self.count += 1
        if self.stage is not None:
            self.stage.trace.append(f"{self.name} {op.verb} {client.url.rpartition('/')[2]}/{op.key}")
        if self.doom is not None:
            self.die(client, op, self.doom)
        if (breaks := self.fate.get(self.count)) is not None:
            breaks(client, op)

    def die(self, client: FaultStore, op: Op, kind: FaultKind) -> None:
        """Let this request be the last."""
        client.crash_at(op.number, kind)
        self.is_dead = True
        self._may_clean.set()

    def dies_at(self, number: int, kind: FaultKind) -> None:
        """Let its request of that number be its last."""

        self.fate[number] = partial(self.die, kind=kind)

    def breaks_at(self, number: int, **fault: object) -> list[Fault]:
        """Inject a fault from that request on; return the list that it will be in."""
        fired: list[Fault] = []

        def inject(client: FaultStore, _: Op) -> None:
            fired.append(client.inject(**fault))

        self.fate[number] = inject
        return fired


_here = threading.local()


@dataclass
class World:
    """Everything that outlives an actor."""

    book: Book = field(default_factory=Book)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    clients: list[FaultStore] = field(default_factory=list)

    def bucket(self, url: str) -> Bucket:
        if url not in self.buckets:
            self.buckets[url] = Bucket()
            for key, data in FOREIGN.items():
                self.buckets[url].raw_put(key, data)
        return self.buckets[url]

    @contextmanager
    def reality(self, seed: object, *, proven: bool = True) -> Iterator[None]:
        """Let stores open here, by whichever actor's thread asks, and let names be of this seed."""
        chance = random.Random(f"names of {seed}")
        with pytest.MonkeyPatch.context() as patch:
            for module in _OPENERS:
                patch.setattr(f"cloudckpt.{module}.open_store", lambda url, **_: _here.actor.open(str(url)))
            patch.setattr(secrets, "token_hex", lambda size=16: f"{chance.getrandbits(8 * size):0{2 * size}x}")
            patch.setattr(secrets, "randbelow", chance.randrange)
            # What a job removes meanwhile, it removes when it waits for that: it makes one request at a time.
            patch.setattr("cloudckpt.root.cleaning.started", _held_back)
            # `each` does with one thread what it has no others for, so that requests come in one order.
            patch.setattr("cloudckpt.threads.started", _no_thread)
            patch.setattr(RACES, 1)
            _proven.clear()
            if proven:  # eight threads that race are no order that a seed decides
                _proven.update(("memory", "", url) for url in (ROOT, COPY))
            try:
                yield
            finally:
                _proven.clear()

    def deliver_late(self, count: int | None = None) -> int:
        """Let so many of the requests that got lost on the way arrive now; return how many did."""
        arrived = 0
        for bucket in self.buckets.values():
            rest = bucket.late[count:] if count is not None else []
            bucket.late = bucket.late[:count]
            arrived += len(bucket.late)
            bucket.deliver_late()
            bucket.late = rest
        return arrived


class Stage:
    """The turns of some actors."""

    def __init__(self, seed: object, events: Callable[[Stage], None] = lambda _: None) -> None:
        """Give turns by a seed; `events` is called before each turn."""
        self.rng = random.Random(f"turns of {seed}")
        self.actors: list[Actor] = []
        self.trace: list[str] = []
        self._events = events
        self._changed = threading.Condition()
        self._turns: set[object] = set()

    def enter(self, actor: Actor) -> None:
        """Let an actor begin; it is at its first request, or done, when this returns."""
        actor.stage = self
        self.actors.append(actor)
        actor.thread.start()
        self._settle()

    def ready(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.tickets and not actor.is_done]

    def run(self) -> None:
        """Give turns until all are done."""
        while True:
            self._settle()
            self._events(self)
            ready = self.ready()
            if not ready:
                break
            chosen = self.rng.choice(ready)
            with self._changed:
                self._turns.add(chosen.tickets.pop(0))
                self._changed.notify_all()
        for actor in self.actors:
            actor.thread.join()

    def wait(self, actor: Actor) -> None:
        """Wait for a turn of this actor; called by its threads."""
        ticket = object()
        with self._changed:
            actor.tickets.append(ticket)
            self._changed.notify_all()
            self._changed.wait_for(lambda: ticket in self._turns)
            self._turns.remove(ticket)

    def tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _settle(self) -> None:
        """Wait until each actor is at a request or done."""
        with self._changed:
            if not self._changed.wait_for(lambda: all(one.tickets or one.is_done for one in self.actors), _STUCK_S):
                stuck = [one.name for one in self.actors if not one.tickets and not one.is_done]
                raise Lost(f"{stuck} neither ask for anything nor end")
