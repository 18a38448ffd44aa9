"""What the actors of a simulated world do: jobs, people and programs at one root, each from its own chance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    CloudCkptError,
    KeepLast,
    OptionsError,
    PinnedError,
    Preemption,
    copy,
)
from cloudckpt.keys import MANIFEST_NAME
from cloudckpt.preemption.notices import Notice
from tests.reliability.simulation import COPY, FOREIGN, KEPT, OPTIONS, ROOT, Actor, Book, Lost, Saved, World, state_of

__all__ = ["BLANK", "check_world", "copier", "deleter", "job", "pinner", "reader", "sweeper"]

BLANK = -1
_NAME = "last"


@contextmanager
def _manager(
    actor: Actor, preemption: Preemption | None = None, *, is_job: bool = True, shares: bool = False
) -> Iterator[CheckpointManager]:
    with CheckpointManager(
        ROOT,
        options=OPTIONS,
        retention=[KeepLast(KEPT)] if is_job else (),
        prune_grace_s=0,
        sweep_after_s=0 if is_job else None,
        save_rng=False,
        reuse_unchanged=shares,
        preemption=preemption,
        progress="off",
    ) as manager:
        try:
            yield manager
            _settle(actor, manager)
        finally:
            actor.let_clean()


def _settle(actor: Actor, manager: CheckpointManager) -> None:
    """Wait for what is under way, then for what is removed after it."""
    manager.wait()
    with actor.cleaning():
        for home in manager._saves.homes:
            home.pruner.settle()


def _restore(manager: CheckpointManager, book: Book, step: object = "latest") -> Saved | None:
    """Restore, and hold it against the book; of `latest`, that it is no older than what was there before."""
    newest = book.newest()
    state = state_of(BLANK)
    found = manager.restore(state, step)  # type: ignore[arg-type]
    if found is None:
        if step == "latest" and newest > (-1, -1):
            raise Lost(f"{newest} was acknowledged, and a restore finds nothing")
        return None
    saved = book.check(state, found.step)
    # What was asked to be removed meanwhile may be.
    if step == "latest" and found.order < min(newest, book.newest()):
        raise Lost(f"{newest} was acknowledged, and {found.order} was restored")
    return saved


# -- a job -----------------------------------------------------------------------------------------------------


class _Job:
    """One incarnation: restores, does so many things, and closes."""

    def __init__(self, actor: Actor, manager: CheckpointManager, notices: Preemption) -> None:
        self.actor, self.manager, self.notices = actor, manager, notices
        self.book, self.rng = actor.world.book, actor.rng
        restored = _restore(manager, self.book)
        self.line = () if restored is None else restored.line
        self.own: list[int] = []
        self.step = 0 if restored is None else restored.step + 1

    def live(self, count: int) -> None:
        """Do so many things; the first is a save."""
        things = [*[self.save] * 4, *[self.save_behind] * 2, self.save_parts, self.save_named, self.pin, self.unpin]
        things += [self.delete, self.roll_back, self.prune, self.remove_name]
        for number in range(count):
            thing: Callable[[], None] = self.save if not number else self.rng.choice(things)
            with suppress(PinnedError, CheckpointNotFoundError):
                thing()
            _settle(self.actor, self.manager)
            self.book.ended[thing.__name__.replace("_", " ")] += 1
        if self.rng.random() < 0.25:
            self.be_preempted()

    def save(self) -> None:
        self._save(lambda saved: self.manager.save(saved.step, state_of(saved.serial)))

    def save_behind(self) -> None:
        def save(saved: Saved) -> object:
            state = state_of(saved.serial)
            handle = self.manager.async_save(saved.step, state)
            state["w"].zero_()  # type: ignore[attr-defined]
            return handle.result()

        self._save(save)

    def save_parts(self) -> None:
        self._save(lambda saved: self.manager.save_parts(saved.step, state_of(saved.serial)).commit())

    def save_named(self) -> None:
        self._save(lambda saved: self.manager.save(saved.step, state_of(saved.serial), name=_NAME), name=_NAME)

    def _save(self, call: Callable[[Saved], object], name: str | None = None) -> None:
        saved = self.book.begin(self.step, self.line, name)
        self.step += 1
        with self.book.ending(saved):
            checkpoint = call(saved)
            saved.order = checkpoint.order  # type: ignore[attr-defined]
        self.line = saved.line
        self.own.append(saved.serial)

    def pin(self) -> None:
        pin = self.manager.pin(self._own().step)
        self.book.pinned.add((pin.epoch, pin.step))

    def unpin(self) -> None:
        step = self._own().step
        self.book.pinned = {order for order in self.book.pinned if order[1] != step}
        self.manager.unpin(step)

    def delete(self) -> None:
        step = self._own().step
        self.book.gone |= {saved.serial for saved in self.book.saves if saved.step == step}
        self.manager.delete(step)

    def roll_back(self) -> None:
        if not (seen := self.manager.checkpoints()):
            raise CheckpointNotFoundError("none stands")
        chosen = self.rng.choice(seen)
        restored = _restore(self.manager, self.book, chosen)
        assert restored is not None
        # What this job has saved is its own, also what it goes back from.
        self.line, self.step = tuple(sorted({*restored.line, *self.own})), restored.step + 1

    def prune(self) -> None:
        self.book.gone |= set(self.line[:-1])
        self.manager.prune(KeepLast(1))

    def remove_name(self) -> None:
        self.book.unnamed |= {saved.serial for saved in self.book.saves if saved.name}
        self.book.gone |= {saved.serial for saved in self.book.saves if saved.name}
        self.manager.remove(_NAME)

    def be_preempted(self) -> None:
        now_s = time.monotonic()
        self.notices._take(Notice(source="test", reason="goes", deadline_s=now_s + 3_600, received_s=now_s))
        while not self.manager.preempted:
            if self.manager.should_save(self.step):
                self.save()
            else:
                self.step += 1
        self.book.ended["preempted"] += 1

    def _own(self) -> Saved:
        standing = {one.order for one in self.manager.checkpoints()}
        own = [one for one in (self.book.saves[serial] for serial in self.line) if one.order in standing]
        if not own:
            raise CheckpointNotFoundError("none of its own stands")
        return self.rng.choice(own)


class _Silent:
    """A source of notices that has none: they come when the job's own chance says so."""

    name = "silent"

    def poll(self) -> tuple[()]:
        return ()


def job(count: int, *, fails: bool = True) -> Callable[[Actor], None]:
    """Return one incarnation that does so many things; one that `fails` may be fenced, or have a broken store."""

    def body(actor: Actor) -> None:
        book = actor.world.book
        try:
            with (
                Preemption(signals=(), sources=[_Silent()]) as notices,
                _manager(actor, notices, shares=actor.rng.random() < 0.5) as manager,
            ):
                _Job(actor, manager, notices).live(count)
            book.ended["job ended"] += 1
        except CloudCkptError as exc:
            if not fails and not actor.is_dead:
                raise
            book.ended[f"job: {type(exc).__name__}"] += 1

    return body


# -- everybody else ----------------------------------------------------------------------------------------------


def reader(count: int) -> Callable[[Actor], None]:
    """Return who restores the latest so often, and now and then one that it has seen in the list."""

    def body(actor: Actor) -> None:
        with _manager(actor, is_job=False) as manager:
            for _ in range(count):
                _restore(manager, actor.world.book)
                seen = manager.checkpoints()
                if seen:
                    with suppress(CheckpointNotFoundError):
                        _restore(manager, actor.world.book, actor.rng.choice(seen))
                actor.world.book.ended["read"] += 1

    return body


def sweeper(count: int) -> Callable[[Actor], None]:
    """Return who removes what killed jobs left, however young that is."""

    def body(actor: Actor) -> None:
        with _manager(actor, is_job=False) as manager:
            for _ in range(count):
                swept = manager.sweep(dry_run=False, older_than_s=0)
                actor.world.book.ended["swept something" if swept else "swept nothing"] += 1

    return body


def pinner(count: int) -> Callable[[Actor], None]:
    """Return a person who pins what stands in the list."""

    def body(actor: Actor) -> None:
        book = actor.world.book
        with _manager(actor, is_job=False) as manager:
            for _ in range(count):
                if not (seen := manager.checkpoints()):
                    continue
                try:
                    pin = manager.pin(actor.rng.choice(seen).step or 0)
                except CheckpointNotFoundError:
                    book.ended["pinned too late"] += 1
                else:
                    book.pinned.add((pin.epoch, pin.step))
                    book.ended["pinned"] += 1

    return body


def deleter(count: int) -> Callable[[Actor], None]:
    """Return a person who deletes what stands in the list, but for the newest."""

    def body(actor: Actor) -> None:
        book = actor.world.book
        with _manager(actor, is_job=False) as manager:
            for _ in range(count):
                if len(seen := manager.checkpoints()) < 2:
                    continue
                step = actor.rng.choice(seen[:-1]).step or 0
                book.gone |= {saved.serial for saved in book.saves if saved.step == step}
                try:
                    manager.delete(step)
                except (PinnedError, CheckpointNotFoundError) as exc:
                    book.ended[f"delete: {type(exc).__name__}"] += 1
                else:
                    _settle(actor, manager)
                    book.ended["deleted"] += 1

    return body


def copier(actor: Actor) -> None:
    """Copy the whole root to another one."""
    try:
        copy(ROOT, COPY, every=True, options=OPTIONS, progress="off")
    except (CheckpointNotFoundError, OptionsError) as exc:  # the latter of a root of which all was removed
        actor.world.book.ended[f"copy: {type(exc).__name__}"] += 1
    else:
        actor.world.book.ended["copied"] += 1


# -- what must hold afterwards -------------------------------------------------------------------------------------


def check_world(world: World) -> None:
    """Be who comes last: all that is listed is whole, all that must be there is, and nothing else was touched.

    Raises:
        Lost: something was lost, or is wrong.
    """
    last = Actor("last", _check, world)
    last.run()
    if last.error is not None:
        raise last.error


def _check(actor: Actor) -> None:
    world, book = actor.world, actor.world.book
    standing: dict[tuple[int, int], int] = {}
    with _manager(actor, is_job=False) as manager:
        for checkpoint in manager.checkpoints():
            saved = _restore(manager, book, checkpoint)
            assert saved is not None
            standing[checkpoint.order] = saved.serial
        _restore(manager, book)
        if unreadable := manager.unreadable():
            raise Lost(f"nobody can read {unreadable}")
        named = manager.named(_NAME)
    _check_kept(book, standing)
    _check_named(book, None if named is None else named.order)
    for url, bucket in world.buckets.items():
        touched = [key for key, data in FOREIGN.items() if key not in bucket.objects or bucket.raw_get(key) != data]
        if touched:
            raise Lost(f"{touched} at {url} are others', and not as they were")
    _check_copies(world)


def _check_kept(book: Book, standing: dict[tuple[int, int], int]) -> None:
    if lost := book.pinned - standing.keys():
        raise Lost(f"{sorted(lost)} were pinned and are gone; {sorted(standing)} stand")
    if lost_ones := {saved.serial for saved in book.kept()} - set(standing.values()):
        raise Lost(f"saves {sorted(lost_ones)} are of the {KEPT} that are kept, and gone; {standing} stand")


def _check_named(book: Book, found: tuple[int, int] | None) -> None:
    named = [one.order for one in book.saves if one.name == _NAME and one.serial not in book.unnamed | book.gone]
    wanted = max((order for order in named if order), default=None)
    if wanted is not None and (found is None or found < wanted):
        raise Lost(f"{wanted} was given the name {_NAME!r}, and {found} has it")


def _check_copies(world: World) -> None:
    """Hold what was committed at the other root against the book; half of a copy is not there."""
    if COPY not in world.buckets or not any(key.endswith(MANIFEST_NAME) for key in world.buckets[COPY].raw_list()):
        return
    with CheckpointManager(COPY, options=OPTIONS, save_rng=False, progress="off") as manager:
        for checkpoint in manager.checkpoints():
            state = state_of(BLANK)
            manager.restore(state, checkpoint)
            world.book.check(state, checkpoint.step)
