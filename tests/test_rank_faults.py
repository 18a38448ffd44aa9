"""Ranks that raise, die or stop in any phase of a save or restore: nobody waits for ever, nothing half is committed.

Each case is a world of three ranks whose victim suffers at one seam. Cases mostly wait for their deadline, so that
several of them run at the same time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from cloudckpt import (
    CheckpointManager,
    CommitUnknownError,
    Options,
    RankLostError,
    SaveFailedError,
    StalledError,
)
from cloudckpt.keys import MANIFEST_NAME
from cloudckpt.loading.lead import _Loading
from cloudckpt.ranks.group import Group
from cloudckpt.saving.coordinator import Coordinator
from cloudckpt.saving.source import Source
from cloudckpt.saving.tally import Written
from cloudckpt.state.restoration import Restoration
from tests.effort import portion
from tests.programs import run_forked
from tests.ranks.processes import Outcome, World

SIZE = 3
SHORT_S = 2.0
LONG_S = 5.0
# Of what is not to be watched; processes that have just been started keep each other waiting.
CALM = Options(progress_timeout_s=60)
GRACE_S = 10.0
TOGETHER = 6
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Case:
    """Who suffers what, and where."""

    phase: str
    how: str
    victim: int
    deadline_s: float = SHORT_S
    is_warm: bool = True
    read_once: str = "auto"

    @property
    def is_lost(self) -> bool:
        return self.how != "raise"

    @property
    def live(self) -> list[int]:
        return [rank for rank in range(SIZE) if not (self.is_lost and rank == self.victim)]


@dataclass
class Seen:
    """What one rank saw: the error of its call, how long that took, and what came after it."""

    error: BaseException | None = None
    step: int | None = None
    elapsed_s: float = 0.0
    listed: list[int] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


# -- what happens in a rank ----------------------------------------------------------------------------------


class Part:
    """An object of the user's own, whose methods may suffer."""

    def __init__(self, value: float) -> None:
        self.value = torch.full((5,), value)
        self.before: dict[str, Callable[[], None]] = {}

    def state_dict(self) -> dict[str, object]:
        self.before.get("state_dict", _nothing)()
        return {"value": self.value}

    def load_state_dict(self, given: Mapping[str, Any]) -> None:
        self.before.get("load_state_dict", _nothing)()
        self.value = given["value"]


def _nothing() -> None:
    pass


def _state(step: int) -> dict[str, Any]:
    """What step `step` holds; each step has a tensor of its own name, so that it needs a plan of its own."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"w{number}": torch.randn(31, 7, generator=generator) for number in range(6)}
    return {"tensors": tensors | {f"only{step}": torch.ones(3)}, "part": Part(step), "config": {"step": step}}


def _differences(url: str, step: int) -> list[str]:
    """Restore a step in this process, alone, and name what differs from what was saved."""
    found, wanted = _state(step), _state(step)
    for tensor in found["tensors"].values():
        tensor.fill_(-1)
    found["part"] = Part(-1.0)
    with CheckpointManager(url, save_rng=False) as manager:
        restored = manager.restore(found, step, strict=False)
    assert restored is not None
    different = [name for name, value in wanted["tensors"].items() if not torch.equal(found["tensors"][name], value)]
    return different + ([] if torch.equal(found["part"].value, wanted["part"].value) else ["part"])


class Trap:
    """Let this rank suffer, once."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.is_set = True
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            is_sprung, self.is_set = self.is_set, False
        if not is_sprung:
            return
        if self.how == "raise":
            raise ValueError("of its own")
        if self.how == "hang":
            threading.Event().wait()
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.how])


def _spring(
    owner: Any, name: str, trap: Callable[[], None], *, when: Callable[..., bool] = lambda *_, **__: True
) -> None:
    """Put a trap before a method of a class or an object of this process."""
    real = getattr(owner, name)

    def suffering(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            trap()
        return real(*args, **kwargs)

    setattr(owner, name, suffering)


def _spring_in_plan(trap: Callable[[], None]) -> None:
    """Put a trap where this rank says what boxes it holds."""
    real: Any = Group.deal

    def suffering(self: Group, what: str, give: Callable[[], Any], *args: Any) -> Any:
        def give_or_suffer() -> Any:
            trap()
            return give()

        return real(self, what, give_or_suffer, *args)

    Group.deal = suffering  # type: ignore[method-assign]


def _arm(case: Case, manager: CheckpointManager, state: dict[str, Any]) -> None:
    trap = Trap(case.how)
    inner: Any = manager._store.inner  # type: ignore[attr-defined]
    springs: dict[str, Callable[[], None]] = {
        "opening": lambda: state["part"].before.update(state_dict=trap),
        "plan": lambda: _spring_in_plan(trap),
        "share": lambda: _spring(Coordinator, "share_out", trap),
        "stage": lambda: _spring(Source, "views", trap),
        "upload": lambda: _spring(inner, "put", trap, when=lambda key, _: key.endswith(".safetensors")),
        "gather": lambda: _spring(Written, "encode", trap),
        "index": lambda: _spring(inner, "put", trap, when=lambda key, _: key.endswith("index.bin")),
        "manifest": lambda: _spring(inner, "create", trap, when=lambda key, _: key.endswith(MANIFEST_NAME)),
        "finding": lambda: _spring(inner, "list", trap),
        "fitting": lambda: _spring(_Loading, "_match", trap),
        "asking": lambda: state["part"].before.update(load_state_dict=trap),
        "plan of a restore": lambda: _spring(_Loading, "_shareable", trap),
        "read": lambda: _spring(inner, "stream", trap),
        "apply": lambda: _spring(Restoration, "apply", trap),
    }
    springs[case.phase]()


def _be_strict(manager: CheckpointManager, case: Case) -> None:
    """Let the manager wait for no rank longer than the case's deadline, from when all ranks are here."""
    manager._saves.options = Options(progress_timeout_s=case.deadline_s, read_once=case.read_once)  # type: ignore[arg-type]
    dist.barrier()


def _timed(call: Callable[[], Any]) -> Seen:
    began_s = time.monotonic()
    seen = Seen()
    try:
        checkpoint = call()
        seen.step = None if checkpoint is None else checkpoint.step
    except Exception as exc:  # noqa: BLE001 (it is what was seen)
        seen.error = exc
    seen.elapsed_s = time.monotonic() - began_s
    return seen


def _save(url: str, case: Case) -> Seen:
    rank = int(os.environ["RANK"])
    with CheckpointManager(url, options=CALM) as manager:
        if case.is_warm:
            manager.save(0, _state(0))
        state = _state(1)
        if rank == case.victim:
            _arm(case, manager, state)
        _be_strict(manager, case)
        seen = _timed(lambda: manager.save(1, state))
        manager._saves.options = CALM
        if rank == 0:
            seen.listed = [checkpoint.step for checkpoint in manager.checkpoints()]
        if not case.is_lost:
            seen.after = [str(manager.save(2, _state(2)).step)]
    return seen


def _restore(url: str, case: Case) -> Seen:
    rank = int(os.environ["RANK"])
    with CheckpointManager(url, options=CALM) as manager:
        state = _state(0)
        manager.restore(state)
        if rank == case.victim:
            _arm(case, manager, state)
        _be_strict(manager, case)
        seen = _timed(lambda: manager.restore(state))
        manager._saves.options = CALM
        if not case.is_lost:
            restored = manager.restore(state)
            seen.after = [str(restored.step if restored else None)]
    return seen


# -- what the parent sees ------------------------------------------------------------------------------------


def _watched(
    call: Callable[[str, Case], Seen], cases: Sequence[Case], url_of: Callable[[int], str]
) -> Iterator[tuple[Case, str, list[Seen]]]:
    """Run the cases, some at a time; yield what the live ranks saw."""
    for first in range(0, len(cases), TOGETHER):
        batch = list(enumerate(cases))[first : first + TOGETHER]
        worlds = [World(SIZE, call, url_of(number), case) for number, case in batch]
        collected = []
        try:
            for (_, case), world in zip(batch, worlds, strict=True):
                lost = [case.victim] if case.is_lost else []
                collected.append(world.outcomes(timeout_s=3 * case.deadline_s + PATIENCE_S, but=lost))
        finally:
            for world in worlds[len(collected) :]:
                world.end()
        for (number, case), outcomes in zip(batch, collected, strict=True):
            yield case, url_of(number), _values(case, outcomes)


def _values(case: Case, outcomes: Sequence[Outcome]) -> list[Seen]:
    live = [outcomes[rank] for rank in case.live]
    for outcome in live:
        assert outcome.has_ended, f"{case}: rank {outcome.rank} waits for ever"
        assert outcome.error is None, f"{case}: rank {outcome.rank}\n{outcome.trace}"
    return [outcome.value for outcome in live]


def _steps(url: str) -> list[int]:
    """List what is committed, in a process without a group."""
    with CheckpointManager(url) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


# -- saves ---------------------------------------------------------------------------------------------------

T = TypeVar("T")

LOSSES = ("kill", "stop")
HOWS = ("raise", *LOSSES)
EVERYWHERE = ("opening", "plan", "stage", "upload", "gather")
# Phases in which rank 0 alone works, on the parts of all.
OF_RANK_0 = ("share", "index", "manifest")
# What rank 0 does when it has all parts: nobody else can tell how far it came.
DECIDING = ("index", "manifest")


def _table(how: str, *, deadline_s: float) -> list[Case]:
    cases = [Case(phase, how, victim, deadline_s) for phase, victim in product(EVERYWHERE, (0, 2))]
    return [*cases, *(Case(phase, how, 0, deadline_s) for phase in OF_RANK_0)]


def _some(how: str) -> list[Case]:
    chosen = [("opening", 2), ("plan", 0), ("upload", 2), ("gather", 0), ("index", 0), ("manifest", 0)]
    return [Case(phase, how, victim) for phase, victim in _share(chosen, how)]


def _share(places: Sequence[T], how: str) -> Sequence[T]:
    """Return all places where a rank raises; where it is lost, by default in one way of both in each."""
    return portion(places, LOSSES.index(how), of=len(LOSSES)) if how in LOSSES else places


def _first_saves(how: str, *, deadline_s: float) -> list[Case]:
    cold = Case("opening", how, 0, deadline_s, is_warm=False)
    return list(
        portion([cold, replace(cold, phase="upload", victim=2), replace(cold, phase="manifest")], HOWS.index(how), of=3)
    )


def _check_save(case: Case, url: str, seen: Sequence[Seen]) -> None:
    earlier = [0] if case.is_warm else []
    for one in seen:
        assert one.elapsed_s < case.deadline_s + GRACE_S, case
        if case.is_lost:
            _check_lost(case, one.error)
        else:
            _check_raised(case, one.error)
    if not case.is_lost:
        assert seen[0].listed == earlier, case
        assert [one.after for one in seen] == [["2"]] * SIZE, case
        earlier = [*earlier, 2]
    assert _steps(url) == earlier, case
    assert [_differences(url, step) for step in earlier] == [[]] * len(earlier), case


def _check_lost(case: Case, error: BaseException | None) -> None:
    if case.phase in DECIDING:
        assert isinstance(error, CommitUnknownError), (case, error)
        assert "rank 0 was lost" in str(error), case
        return
    assert isinstance(error, SaveFailedError), (case, error)
    assert error.failures.keys() == {case.victim}, (case, error)
    lost = error.failures[case.victim]
    assert isinstance(lost, RankLostError), (case, error)
    assert lost.ranks == (case.victim,), (case, error)


def _check_raised(case: Case, error: BaseException | None) -> None:
    if case.phase not in OF_RANK_0:
        assert isinstance(error, SaveFailedError), (case, error)
        assert error.failures.keys() == {case.victim}, (case, error)
        error = error.failures[case.victim]
    assert isinstance(error, ValueError), (case, error)
    assert str(error) == "of its own", case


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_is_lost_or_raises_in_a_save_is_named_in_time_and_nothing_is_committed(
    tmp_path: Path, how: str
) -> None:
    for case, url, seen in _watched(_save, _some(how), lambda number: str(tmp_path / str(number))):
        _check_save(case, url, seen)


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_is_lost_or_raises_in_the_very_first_save_is_named_in_time(tmp_path: Path, how: str) -> None:
    # Longer: in a first save the ranks meet and make their group, too, which takes seconds on a busy machine.
    cases = _first_saves(how, deadline_s=3 * SHORT_S)
    for case, url, seen in _watched(_save, cases, lambda number: str(tmp_path / str(number))):
        _check_save(case, url, seen)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_is_lost_or_raises_in_any_phase_of_a_save_is_named_in_time(tmp_path: Path, how: str) -> None:
    cases = [*_table(how, deadline_s=LONG_S), *_first_saves(how, deadline_s=LONG_S)]
    for case, url, seen in _watched(_save, cases, lambda number: str(tmp_path / str(number))):
        _check_save(case, url, seen)


# -- restores ------------------------------------------------------------------------------------------------


def _restores(how: str, *, deadline_s: float) -> list[Case]:
    alone = [("finding", 0), ("fitting", 2), ("asking", 2), ("plan of a restore", 2), ("read", 2), ("apply", 2)]
    passing = [Case("read", how, victim, deadline_s, read_once="always") for victim in (0, 2)]
    return list(_share([*(Case(phase, how, victim, deadline_s) for phase, victim in alone), *passing], how))


def _check_restores(cases: Sequence[Case], url: str) -> None:
    with CheckpointManager(url) as manager:
        manager.save(0, _state(0))
    for case, _, seen in _watched(_restore, cases, lambda _: url):
        for one in seen:
            assert one.elapsed_s < case.deadline_s + GRACE_S, case
            if case.is_lost:
                assert isinstance(one.error, RankLostError), (case, one.error)
                assert one.error.ranks == (case.victim,), (case, one.error)
            else:
                assert isinstance(one.error, ValueError), (case, one.error)
                noted = [] if case.victim == 0 else [f"on rank {case.victim}"]
                assert getattr(one.error, "__notes__", []) == noted, case
        if not case.is_lost:
            assert [one.after for one in seen] == [["0"]] * SIZE, case


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_is_lost_or_raises_in_a_restore_is_named_in_time(tmp_path: Path, how: str) -> None:
    _check_restores(_restores(how, deadline_s=SHORT_S), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_is_lost_or_raises_in_a_restore_is_named_within_a_longer_deadline(tmp_path: Path, how: str) -> None:
    _check_restores(_restores(how, deadline_s=LONG_S), str(tmp_path))


# -- laws of the last moment ---------------------------------------------------------------------------------


def _save_while_another_is_struck(url: str, case: Case) -> Seen:
    """Let rank 0 strike the victim when it has all parts, and commit a moment later."""
    rank = int(os.environ["RANK"])
    pid_path = Path(f"{url}.pid")
    if rank == case.victim:
        pid_path.write_text(str(os.getpid()))
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, _state(0))
        if rank == 0:
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[case.how]

            def strike() -> None:
                os.kill(int(pid_path.read_text()), number)
                time.sleep(case.deadline_s / 2)

            _spring(
                manager._store.inner,  # type: ignore[attr-defined]
                "put",
                strike,
                when=lambda key, _: key.endswith("index.bin"),
            )
        _be_strict(manager, case)
        return _timed(lambda: manager.save(1, _state(1)))


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_commit_stands_on_every_live_rank_when_one_is_lost_after_it_handed_its_part_over(
    tmp_path: Path, how: str
) -> None:
    cases = [Case("index", how, victim) for victim in (1, 2)]
    url_of: Callable[[int], str] = lambda number: str(tmp_path / str(number))  # noqa: E731
    for case, url, seen in _watched(_save_while_another_is_struck, cases, url_of):
        assert [(one.step, one.error) for one in seen] == [(1, None)] * 2, case
        assert all(one.elapsed_s < case.deadline_s + GRACE_S for one in seen), case
        assert _steps(url) == [0, 1], case
        assert _differences(url, 1) == [], case


def _save_and_die_after_the_create(url: str, case: Case) -> Seen:
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, _state(0))
        if int(os.environ["RANK"]) == 0:
            inner: Any = manager._store.inner  # type: ignore[attr-defined]
            real = inner.create

            def create(key: str, data: bytes) -> None:
                real(key, data)
                Trap(case.how)()

            inner.create = create
        _be_strict(manager, case)
        return _timed(lambda: manager.save(1, _state(1)))


def test_nobody_calls_a_save_failed_whose_commit_may_stand(tmp_path: Path) -> None:
    cases = [Case("manifest", how, 0) for how in ("kill", "stop")]
    url_of: Callable[[int], str] = lambda number: str(tmp_path / str(number))  # noqa: E731
    for case, url, seen in _watched(_save_and_die_after_the_create, cases, url_of):
        assert [type(one.error) for one in seen] == [CommitUnknownError] * 2, case
        assert _steps(url) == [0, 1], case
        assert _differences(url, 1) == [], case


# -- ranks that come back ------------------------------------------------------------------------------------


def _save_and_meet_again(url: str, case: Case) -> Seen:
    rank = int(os.environ["RANK"])
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, _state(0))
        state = _state(1)
        if rank == case.victim:
            _arm(case, manager, state)
        _be_strict(manager, case)
        seen = _timed(lambda: manager.save(1, state))
        if rank != case.victim:
            Path(f"{url}.raised-{rank}").touch()
            _await(Path(f"{url}.woken"))
        while "2" not in seen.after and len(seen.after) < 6:
            again = _timed(lambda: manager.save(2, _state(2)))
            seen.after.append(
                str(again.step) if again.error is None else f"{type(again.error).__name__}: {again.error}"
            )
    return seen


def _await(path: Path) -> None:
    stop_s = time.monotonic() + PATIENCE_S
    while not path.exists() and time.monotonic() < stop_s:
        time.sleep(0.01)
    assert path.exists(), path


def _stopped_for_a_while(cases: Sequence[Case], tmp_path: Path) -> Iterator[tuple[Case, str, list[Seen]]]:
    """Stop each case's victim until the others have raised; yield what all ranks saw."""
    urls = [str(tmp_path / str(number)) for number in range(len(cases))]
    worlds = [World(SIZE, _save_and_meet_again, url, case) for url, case in zip(urls, cases, strict=True)]
    try:
        for url, case, world in zip(urls, cases, worlds, strict=True):
            for rank in case.live:
                _await(Path(f"{url}.raised-{rank}"))
            world.send(case.victim, signal.SIGCONT)
            Path(f"{url}.woken").touch()
        for url, case, world in zip(urls, cases, worlds, strict=True):
            outcomes = world.outcomes(timeout_s=60)
            yield case, url, _values(replace(case, how="raise"), outcomes)
    finally:
        for world in worlds:
            world.end()


@pytest.mark.parametrize("victim", [0, 2])
def test_ranks_save_together_again_when_a_stopped_one_is_back(tmp_path: Path, victim: int) -> None:
    cases = [Case(phase, "stop", victim) for phase in ("opening", "upload", "gather")]
    for case, url, seen in _stopped_for_a_while(cases, tmp_path):
        assert [one.after[-1] for one in seen] == ["2"] * SIZE, (case, seen)
        live = [seen[rank].error for rank in case.live]
        assert [type(error) for error in live] == [SaveFailedError] * 2, (case, live)
        assert isinstance(seen[victim].error, SaveFailedError), (case, seen[victim])
        # Whoever was told that nothing was committed was told the truth, whatever the stopped rank did afterwards.
        assert _steps(url) == [0, 2], case


# -- transfers that stand still ------------------------------------------------------------------------------


def _save_with_a_hanging_put(url: str, case: Case) -> Seen:
    with CheckpointManager(url, options=CALM) as manager:
        manager.save(0, _state(0))
        if int(os.environ["RANK"]) == case.victim:
            _arm(replace(case, how="hang"), manager, {})
        _be_strict(manager, case)
        return _timed(lambda: manager.save(1, _state(1)))


def test_a_put_that_never_returns_fails_the_save_in_time_and_names_rank_key_and_seconds(tmp_path: Path) -> None:
    # No multiple of how often a rank looks at its own transfers: it must not be the others that find it late first.
    cases = [Case("upload", "raise", victim, 2.3) for victim in (0, 2)]
    url_of: Callable[[int], str] = lambda number: str(tmp_path / str(number))  # noqa: E731
    for case, url, seen in _watched(_save_with_a_hanging_put, cases, url_of):
        for one in seen:
            assert isinstance(one.error, SaveFailedError), (case, one.error)
            assert one.elapsed_s < case.deadline_s + GRACE_S, case
            assert one.error.failures.keys() == {case.victim}, (case, one.error)
            stalled = one.error.failures[case.victim]
            assert isinstance(stalled, StalledError), (case, stalled)
            assert f"/r{case.victim:05d}-" in stalled.key
            assert 0 < stalled.still_s < case.deadline_s + GRACE_S
            assert f"rank {case.victim}" in str(one.error)
        assert _steps(url) == [0], case


_HANGING = """
import sys, threading, torch
from cloudckpt import CheckpointManager, CloudCkptError, Options
manager = CheckpointManager(sys.argv[1], options=Options(progress_timeout_s=0.5))
manager._store.inner.put = lambda key, buffers: threading.Event().wait()
try:
    manager.save(0, {"w": torch.ones(3)})
except CloudCkptError as exc:
    print(type(exc).__name__)
"""


def test_a_process_ends_although_a_put_of_it_never_returns(tmp_path: Path) -> None:
    done = run_forked("-c", _HANGING, tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["StalledError"]), done.stderr
