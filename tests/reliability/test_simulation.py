"""Whole lives at one simulated store, broken at any request, and many actors at one root in any order of requests.

A trial that loses something says how to run it again, alone, with its trace:

    CLOUDCKPT_TRIAL='crash 12 57 crash_after' .venv/bin/python -m pytest tests/reliability/test_simulation.py -k again
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from cloudckpt import CheckpointManager, CloudCkptError
from tests.reliability.lives import BLANK, check_world, copier, deleter, job, pinner, reader, sweeper
from tests.reliability.records import Section, Trials, dose
from tests.reliability.simulation import CRASHES, OPTIONS, ROOT, Actor, Lost, Stage, World, state_of
from tests.store.fault_store import Fault, FaultKind, transient

SECTION = Section(
    number=10,
    title="Simulation",
    about=(
        "Whole jobs, people and programs at one simulated store, deterministic from a seed: saves at once, in the "
        "background and in two phases, with shards that are shared and names that move; pins, deletes, rules, sweeps, "
        "copies of the root, jobs that go back, and preemptions. Lost is a trial after which a checkpoint that was "
        "acknowledged is not there although rules, pins or names keep it; one is listed and not whole, or not bit by "
        "bit what was saved; a save that raised is restored; a restore finds nothing, or something older than was "
        "acknowledged; or a file of somebody else's was touched."
    ),
)
# A process that crashes ends its threads in the middle, whatever they raise here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

# Broken how; a late request arrives at some request of the next job.
KINDS = (*CRASHES, FaultKind.LOST_ACK, FaultKind.LATE)
POINTS = dose(2_500, short=30)
ORDERS = dose(10_000, short=8)
STALE = dose(400, short=3)
_AGAIN = "CLOUDCKPT_TRIAL"
_SHOWN = 30


def _run(actor: Actor) -> Actor:
    actor.run()
    if actor.error is not None:
        raise actor.error
    return actor


# -- broken at any request ---------------------------------------------------------------------------------------


def requests_of(seed: int) -> int:
    """Count the requests of the life of that seed."""
    world = World()
    with world.reality(seed):
        return _run(Actor("victim", job(8, fails=False), world, str(seed))).count


def break_at(seed: int, number: int, kind: FaultKind) -> str:
    """Break a life at one request; let another job go on, copy the root, and look. Say what the broken one came to."""
    world = World()
    with world.reality(seed):
        victim = Actor("victim", job(8), world, str(seed))
        fired: list[Fault] = []
        if kind in CRASHES:
            victim.dies_at(number, kind)
        else:
            # A reply is lost once; of a network that is gone, each request may arrive much later.
            times = None if kind is FaultKind.LATE else 1
            fired = victim.breaks_at(number, kind=kind, error=transient, times=times)
        _run(victim)
        assert victim.is_dead or fired[0].fired, "the fault never fired"
        heir = Actor("heir", job(4, fails=False), world, str(seed))
        heir.fate[heir.rng.randrange(1, 30)] = lambda *_: world.deliver_late()
        _run(heir)
        _run(Actor("copier", copier, world, str(seed)))
        world.deliver_late()
        check_world(world)
    return next((name for name in world.book.ended if name.startswith("job: ")), "the job ended, and the next went on")


def points(count: int) -> Iterator[tuple[int, int, FaultKind]]:
    """Yield so many points: each request of one life after the other, each in the next way."""
    seed = 0
    while count > 0:
        numbers = range(1, requests_of(seed) + 1)
        stride = max(1, len(numbers) * 2 // count)  # of a short run, over two lives
        for number in numbers[seed % stride :: stride][:count]:
            count -= 1
            yield seed, number, KINDS[(number // stride + seed) % len(KINDS)]
        seed += 1


@pytest.mark.timeout(7_200)
def test_a_life_broken_at_any_request_loses_nothing_that_was_acknowledged() -> None:
    with Trials(SECTION, "a job broken at one of its requests, then another job", seed="from 0") as trials:
        for seed, number, kind in points(POINTS):
            _try(trials, f"crash {seed} {number} {kind}", lambda at=(seed, number, kind): f"{at[2]}: {break_at(*at)}")


# -- in any order ------------------------------------------------------------------------------------------------


class _Weather:
    """What happens between requests: processes die, clocks jump, and the late arrives."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng, self.seed = world, random.Random(f"weather of {seed}"), seed
        self.kills = self.rng.randrange(3)

    def __call__(self, stage: Stage) -> None:
        chance = self.rng.random()
        if chance < 0.01:
            self.world.bucket(ROOT).advance(self.rng.choice([-7_200, 30, 7_200, 86_400]))
            stage.trace.append("the store's clock jumps")
        elif chance < 0.05:
            if self.world.deliver_late(1):
                stage.trace.append("a late request arrives")
        elif chance < 0.06 and self.kills:
            self._kill(stage)

    def _kill(self, stage: Stage) -> None:
        jobs = [actor for actor in stage.ready() if actor.name.startswith("job") and actor.doom is None]
        if not jobs:
            return
        self.kills -= 1
        victim = self.rng.choice(jobs)
        victim.doom = self.rng.choice(CRASHES)
        stage.trace.append(f"{victim.name} is to die: {victim.doom}")
        stage.enter(Actor(f"job-{len(stage.actors)}", job(3), self.world, str(self.seed)))


def interleave(seed: int) -> tuple[World, Stage]:
    """Let two jobs, a zombie, and some of a reader, a sweeper, a pinner, a deleter and a copier work at one root."""
    chance = random.Random(f"cast of {seed}")
    world = World()
    with world.reality(seed):
        _run(Actor("before", job(3, fails=False), world, str(seed)))
        stage = Stage(seed, _Weather(world, seed))
        zombie = Actor("job-zombie", job(4), world, str(seed))
        # From some request on all that it asks for gets lost on the way, and may arrive when others are at work.
        zombie.breaks_at(
            chance.randrange(3, 40), kind=FaultKind.LATE, error=transient, verbs=["put", "create", "delete"], times=None
        )
        others = [
            Actor("reader", reader(3), world, str(seed)),
            Actor("sweeper", sweeper(2), world, str(seed)),
            Actor("pinner", pinner(2), world, str(seed)),
            Actor("deleter", deleter(2), world, str(seed)),
            Actor("copier", copier, world, str(seed)),
        ]
        cast = [Actor("job-a", job(4), world, str(seed)), Actor("job-b", job(4), world, str(seed)), zombie]
        try:
            for actor in [*cast, *chance.sample(others, 3)]:
                stage.enter(actor)
            stage.run()
            _raise_errors(stage)
            if chance.random() < 0.5:
                world.deliver_late()
            check_world(world)
            _run(Actor("after", job(2, fails=False), world, str(seed)))
            world.deliver_late()
            check_world(world)
        except BaseException as exc:
            exc.add_note("\n".join(stage.trace[-_SHOWN:]))
            raise
    return world, stage


def _raise_errors(stage: Stage) -> None:
    for actor in stage.actors:
        if actor.error is not None:
            raise Lost(f"{actor.name} met {type(actor.error).__name__}: {actor.error}") from actor.error


@pytest.mark.timeout(14_400)
def test_actors_at_one_root_lose_nothing_in_any_order_of_their_requests() -> None:
    with Trials(SECTION, "two jobs, a zombie and three of five others, interleaved", seed="from 0") as trials:
        for seed in range(ORDERS):
            _try(trials, f"order {seed}", lambda at=seed: _met(interleave(at)[0]))


def _met(world: World) -> str:
    """Say whether jobs were in each other's way."""
    return "with a job fenced" if world.book.ended["job: FencedError"] else "with no job fenced"


def test_a_seed_is_one_run() -> None:
    traces = [interleave(7)[1].trace for _ in range(2)]
    assert traces[0] == traces[1]
    assert len({line.split()[0] for line in traces[0]}) > 5


# -- stores that promise less --------------------------------------------------------------------------------------


def be_stale(seed: int) -> str:
    """Let listings show nothing for a while: what is restored is whole, whatever it is, and nothing is half there."""
    world = World()
    with world.reality(seed):
        _run(Actor("before", job(3, fails=False), world, str(seed)))
        bucket = world.bucket(ROOT)
        bucket.advance(60)
        bucket.listing_lag_s = 0.02  # as long as some twenty requests take
        stage = Stage(seed)
        for actor in (Actor("job-a", job(4), world, str(seed)), Actor("reader", _reads_whole, world, str(seed))):
            stage.enter(actor)
        stage.run()
        _raise_errors(stage)
        bucket.listing_lag_s = 0.0
        _run(Actor("after", _reads_whole, world, str(seed)))
    return next((name for name in world.book.ended if name.startswith("job: ")), "the job ended")


def _reads_whole(actor: Actor) -> None:
    with CheckpointManager(ROOT, options=OPTIONS, save_rng=False, progress="off") as manager:
        for checkpoint in manager.checkpoints():
            state = state_of(BLANK)
            try:
                manager.restore(state, checkpoint)
            except CloudCkptError as exc:
                actor.world.book.ended[type(exc).__name__] += 1
            else:
                actor.world.book.check(state, checkpoint.step)


@pytest.mark.timeout(1_800)
def test_what_a_store_with_stale_listings_gives_back_is_whole() -> None:
    with Trials(SECTION, "a job and a reader on a store whose listings are stale", seed="from 0") as trials:
        for seed in range(STALE):
            _try(trials, f"stale {seed}", lambda at=seed: be_stale(at))


def ignore_create(seed: int) -> str:
    """Refuse to save to a store that overwrites what it is told to create; what is there stays."""
    world = World()
    with world.reality(seed):
        _run(Actor("before", job(3, fails=False), world, str(seed)))
    bucket = world.bucket(ROOT)
    bucket.enforces_create = False
    before = dict(bucket.objects)
    with world.reality(seed, proven=False):
        _run(Actor("job", job(3), world, str(seed)))
        assert world.book.ended["job: CreateNotEnforcedError"] == 1, "it was not refused"
        if bucket.objects != before:
            raise Lost("what was there is not as it was")
        check_world(world)
    return "refused"


def test_a_store_that_ignores_the_precondition_of_a_create_is_refused_and_loses_nothing() -> None:
    with Trials(SECTION, "a job on a store that ignores preconditions", seed="from 0") as trials:
        for seed in range(dose(200, short=3)):
            _try(trials, f"ignored {seed}", lambda at=seed: ignore_create(at))


# -- one of them again ---------------------------------------------------------------------------------------------


def _try(trials: Trials, name: str, trial: Callable[[], str]) -> None:
    try:
        trials.count(trial())
    except Exception as exc:  # noqa: BLE001 (whatever it is, it is a loss, and the others are to be tried, too)
        trials.lose(f"{_AGAIN}='{name}': {type(exc).__name__}: {exc}\n" + "\n".join(getattr(exc, "__notes__", ())))


@pytest.mark.skipif(_AGAIN not in os.environ, reason=f"{_AGAIN} names none")
def test_one_trial_again() -> None:
    kind, *numbers = os.environ[_AGAIN].split()
    if kind == "crash":
        seed, number, how = numbers
        break_at(int(seed), int(number), FaultKind(how))
    else:
        {"order": interleave, "stale": be_stale, "ignored": ignore_create}[kind](int(numbers[0]))
