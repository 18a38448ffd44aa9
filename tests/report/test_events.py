"""Programs hear what happens to checkpoints, once, in order, on rank 0; and nothing that they do changes any of it."""

from __future__ import annotations

import ast
import dataclasses
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    Event,
    KeepLast,
    Options,
    OptionsError,
    Preempted,
    Preemption,
    Pruned,
    Restored,
    RetryPolicy,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveStaged,
    ScalarEvents,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.errors import TransientError
from cloudckpt.report.telling import Teller
from tests.ranks.processes import fork, run
from tests.store.gates import before
from tests.store.http_object_server import ObjectServer

HASTY = Options(retry=RetryPolicy(max_attempts=2, backoff_base_s=0.001, deadline_s=5, request_timeout_s=5))


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((1000,), float(step))}


def manager_of(root: Path, told: Any, **options: Any) -> CheckpointManager:
    return CheckpointManager(root, on_event=told, progress="off", save_rng=False, **options)


def kinds(told: list[Event]) -> list[tuple[str, int]]:
    return [(type(event).__name__, event.step) for event in told]


def test_a_job_tells_what_happens_to_its_checkpoints_in_order(tmp_path: Path) -> None:
    told: list[Event] = []
    with manager_of(tmp_path, told.append, retention=KeepLast(1)) as manager:
        assert manager.restore(state_of(0)) is None
        manager.save(1, state_of(1), metrics={"loss": 0.5})
        manager.async_save(2, state_of(2)).result()
        manager.wait()
        manager.restore(state_of(0))
        manager.delete(2)
    assert kinds(told) == [
        ("SaveBegun", 1),
        ("SaveCommitted", 1),
        ("SaveBegun", 2),
        *sorted([("SaveStaged", 2), ("SaveCommitted", 2)], key=lambda one: kinds(told).index(one)),
        ("Pruned", 1),
        ("Restored", 2),
        ("Pruned", 2),
    ]
    begun, saved = told[:2]
    assert isinstance(begun, SaveBegun)
    assert (begun.url, begun.in_background, begun.world_size) == (tmp_path.as_uri(), False, 1)
    assert isinstance(saved, SaveCommitted)
    assert (saved.url, saved.epoch) == (f"{tmp_path.as_uri()}/step-0000000001-e0001", 1)
    assert (saved.metrics, saved.slowest_rank, saved.retries) == ({"loss": 0.5}, 0, 0)
    assert saved.phases.keys() == {"plan", "stage", "upload", "gather", "commit"}
    assert saved.total_bytes >= 4000
    assert saved.requests > 0
    staged = next(one for one in told if isinstance(one, SaveStaged))
    assert staged.staged_bytes >= 4000
    assert [one.why for one in told if isinstance(one, Pruned)] == ["rules", "delete"]


def test_the_functions_for_one_url_tell_the_same_without_a_step(tmp_path: Path) -> None:
    told: list[Event] = []
    cloudckpt.save(state_of(1), tmp_path / "one", on_event=told.append, progress="off")
    cloudckpt.load(state_of(0), tmp_path / "one", on_event=[told.append], progress="off")
    with pytest.raises(cloudckpt.CheckpointExistsError):
        cloudckpt.save(state_of(1), tmp_path / "one", on_event=told.append, progress="off")
    names = ["SaveBegun", "SaveCommitted", "Restored", "SaveBegun", "SaveFailed"]
    assert kinds(told) == [(name, -1) for name in names]


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("is_forgiven", [True, False])
def test_a_save_that_fails_is_told_with_its_error_and_whether_training_goes_on(
    tmp_path: Path, how: str, is_forgiven: bool
) -> None:
    def down(_: str) -> None:
        raise TransientError("503 SlowDown")

    told: list[Event] = []
    on_error: Any = "warn" if is_forgiven else "raise"
    with manager_of(tmp_path, told.append, options=HASTY, on_error=on_error) as manager:
        before(manager, down, verb="put", when=lambda _: True)
        try:
            getattr(manager, how)(1, state_of(1))
            manager.wait()
        except StorageError:
            assert not is_forgiven
    failed = [one for one in told if isinstance(one, SaveFailed)]
    assert [(one.step, one.is_forgiven, one.in_background) for one in failed] == [(1, is_forgiven, how != "save")]
    assert "503" in failed[0].error
    assert failed[0].retries > 0
    assert not [one for one in told if isinstance(one, SaveCommitted)]


def test_a_state_that_is_refused_is_told_as_a_failure(tmp_path: Path) -> None:
    told: list[Event] = []
    with manager_of(tmp_path, told.append) as manager, pytest.raises(UnsupportedValueError):
        manager.save(1, {"f": lambda: None})
    failed = told[-1]
    assert isinstance(failed, SaveFailed)
    assert (failed.kind, failed.is_forgiven) == ("UnsupportedValueError", False)


def test_a_notice_is_told_once(tmp_path: Path) -> None:
    told: list[Event] = []
    left_s: list[float | bool] = [False]
    with (
        Preemption(sources=(), signals=(), check=lambda: left_s[0], poll_s=0.01) as preemption,
        manager_of(tmp_path, told.append, preemption=preemption) as manager,
    ):
        assert not manager.should_save(6)
        left_s[0] = 100.0
        while not manager.should_save(7):
            pass
        manager.save(7, state_of(7))
        manager.should_save(8)
    notices = [one for one in told if isinstance(one, Preempted)]
    assert [one.step for one in notices] == [7]
    assert notices[0].left_s is not None
    assert 90 < notices[0].left_s <= 100
    assert "preemption" in notices[0].reason


def test_a_pinned_checkpoint_is_not_told_as_pruned(tmp_path: Path) -> None:
    told: list[Event] = []
    with manager_of(tmp_path, told.append, retention=KeepLast(1)) as manager:
        manager.save(1, state_of(1))
        manager.pin(1, "stays")
        for step in (2, 3):
            manager.save(step, state_of(step))
        with pytest.raises(cloudckpt.PinnedError):
            manager.delete(1)
    assert [event.step for event in told if isinstance(event, Pruned)] == [2]


def test_what_a_callable_raises_is_noted_once_and_fails_neither_a_save_nor_the_other_callables(tmp_path: Path) -> None:
    def broken(event: Event) -> None:
        raise SystemExit("canary")

    told: list[Event] = []
    with manager_of(tmp_path, [broken, told.append]) as manager:
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        assert manager._journal.teller.wait(30)
        troubles = manager.report().troubles
    assert kinds(told) == [(name, step) for step in (1, 2) for name in ("SaveBegun", "SaveCommitted")]
    assert len(troubles) == 2, "one for each kind of event"
    assert all("broken failed at Save" in trouble and "canary" in trouble for trouble in troubles)


class _MuteError(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def test_what_is_raised_without_a_text_is_noted_and_the_others_are_told(tmp_path: Path) -> None:
    def mute(_: object) -> list[Any]:
        raise _MuteError

    told: list[Event] = []
    rule = type("Rule", (), {"keep": lambda _, given: mute(given)})()
    with manager_of(tmp_path, [mute, told.append], retention=[rule]) as manager:
        manager.save(1, state_of(1))
        assert manager._journal.teller.wait(30)
        troubles = manager.report().troubles
    assert kinds(told) == [("SaveBegun", 1), ("SaveCommitted", 1)]
    assert len([one for one in troubles if "_MuteError, whose text fails with RuntimeError" in one]) == 3


def test_a_callable_that_hangs_delays_no_save_and_what_is_dropped_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.report.journal._TELLING_S", 0.01)
    gate, threads = threading.Event(), set[str]()

    def slow(event: Event) -> None:
        threads.add(threading.current_thread().name)
        gate.wait()

    try:
        manager = manager_of(tmp_path, slow)
        for step in range(3):
            manager.save(step, state_of(step))
        manager.close()
        assert [trouble for trouble in manager.report().troubles if "has not taken all events" in trouble]
    finally:
        gate.set()
    assert threads == {"cloudckpt-events"}


def test_the_oldest_events_go_when_too_many_wait() -> None:
    told: list[object] = []
    noted: list[str] = []
    gate = threading.Event()

    def take(event: Event) -> None:
        gate.wait()
        told.append(event)

    teller, events = Teller(take, noted.append, limit=3), [_event(number) for number in range(6)]
    teller.tell(events[0])
    while teller._queue:  # until it is being told
        pass
    for event in events[1:]:
        teller.tell(event)
    gate.set()
    assert teller.wait(30)
    assert told == [events[0], *events[3:]]
    assert len(noted) == 1


def _event(step: int) -> Event:
    from datetime import UTC, datetime

    return Event(at=datetime.now(UTC), url="u", step=step, world_size=1)


def test_a_callable_may_wait_for_its_own_thread_without_hanging() -> None:
    waited: list[bool] = []
    teller = Teller(lambda _: waited.append(teller.wait(30)), print)
    teller.tell(_event(1))
    assert teller.wait(30)
    assert waited == [True]


def saving_in_a_child(pipe: Any, root: str) -> None:
    pipe.send(saving_and_forking(root))


def saving_and_forking(root: str) -> list[tuple[str, int]]:
    """Fork while events wait to be told; return what the child has told of a load of its own."""
    gate, told = threading.Event(), list[Event]()
    teller = Teller(lambda event: (gate.wait(), told.append(event)), print)
    for step in range(3):
        teller.tell(_event(step))
    reading, writing = os.pipe()
    if not os.fork():
        gate.set()
        teller.tell(_event(9))
        is_told = teller.wait(30)
        os.write(writing, repr((is_told, kinds(told))).encode())
        os._exit(0)
    gate.set()
    assert teller.wait(30)
    os.wait()
    assert kinds(told) == [("Event", 0), ("Event", 1), ("Event", 2)]
    is_told, found = ast.literal_eval(os.read(reading, 1 << 16).decode())
    assert is_told
    return list(found)


def test_a_forked_child_tells_its_own_events_and_not_those_that_waited_in_its_parent(tmp_path: Path) -> None:
    process, pipe = fork(saving_in_a_child, str(tmp_path), is_daemon=False)
    assert pipe.recv() == [("Event", 9)]
    process.join(30)


@pytest.mark.parametrize("given", [3, "print", [None], SaveBegun], ids=repr)
def test_what_cannot_be_told_anything_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(OptionsError, match="on_event is"):
        CheckpointManager(tmp_path, on_event=given)


async def coroutine(_: Event) -> None: ...


def generator(_: Event) -> Iterator[None]:
    yield


async def stream(_: Event) -> AsyncIterator[None]:
    yield


class AsyncCall:
    async def __call__(self, _: Event) -> None: ...


@pytest.mark.parametrize(
    "given",
    [coroutine, generator, stream, AsyncCall(), partial(coroutine), [print, coroutine]],
    ids=["coroutine", "generator", "stream", "call", "partial", "list"],
)
def test_a_callable_whose_call_runs_nothing_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(OptionsError, match="runs nothing; give a plain function"):
        CheckpointManager(tmp_path, on_event=given)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("call", "what"), [(coroutine, "coroutine"), (generator, "generator")])
def test_a_result_that_nobody_runs_is_noted_once(call: Callable[[Any], Any], what: str) -> None:
    noted: list[str] = []
    teller = Teller(lambda event, /: call(event), noted.append)
    for _ in range(2):
        teller.tell(Event(at=datetime.now(UTC), url="", step=1, world_size=1))
    teller.end(30)
    (note,) = noted
    assert f"returns a {what}, which nobody runs" in note


@pytest.mark.parametrize("numbers", [4, 1 << 19], ids=["small", "large"])
def test_event_manifest_and_page_count_the_requests_that_a_store_has_seen(numbers: int) -> None:
    told: list[Event] = []
    with ObjectServer() as server:
        options = {"key": "k", "secret": "s", "endpoint_url": server.endpoint}
        with CheckpointManager(
            "s3://bucket/root", storage_options=options, on_event=told.append, progress="off", save_rng=False
        ) as manager:
            for step in (1, 2):  # the first ones look at the root
                manager.save(step, {"w": torch.zeros(numbers)})
            before = len(server.requests)
            checkpoint = manager.save(3, {"w": torch.ones(numbers)})
            asked = [request for request in server.requests[before:] if request.method in ("PUT", "GET")]
            paths = [request.path for request in asked]
        seen = 1 + next(at for at, path in enumerate(paths) if path.endswith("/manifest.json"))
        assert seen == (4 if numbers == 4 else 5)
        saved = [event.requests for event in told if isinstance(event, SaveCommitted)]
        page = cloudckpt.report_page("s3://bucket/root", storage_options=options)
    assert checkpoint is not None
    assert (saved[2], checkpoint.manifest.summary["requests"]) == (seen, seen)
    (traffic,) = [event.traffic for event in told if isinstance(event, SaveCommitted) and event.step == 3]
    assert {name: count for name, count in traffic.by_class.items() if count} == Counter(map(_class_of, asked[:seen]))
    assert {name: checkpoint.manifest.summary[name] for name in traffic.by_class} == traffic.by_class
    assert traffic.sent_bytes > 4 * numbers
    assert f"{sum(saved)}, 0 of them retries" in page


def _class_of(request: Any) -> str:
    if request.method == "GET":
        return "lists" if "list-type" in request.query else "gets"
    return {"PUT": "puts", "POST": "deletes", "DELETE": "deletes", "HEAD": "heads"}[request.method]


def test_what_saves_and_restores_asked_of_the_store_is_told_by_class_and_priced_by_a_table(tmp_path: Path) -> None:
    told: list[Event] = []
    prices = tmp_path / "prices.json"
    prices.write_text('{"storage_gib_month": 1, "writes_1000": 1000, "reads_1000": 10, "source": "ours"}')
    with ObjectServer() as server:
        options = {"key": "k", "secret": "s", "endpoint_url": server.endpoint}
        with CheckpointManager(
            "s3://bucket/root", storage_options=options, on_event=told.append, progress="off", save_rng=False
        ) as manager:
            manager.save(1, {"w": torch.zeros(1 << 16)})
            before = len(server.requests)
            manager.restore({"w": torch.ones(1 << 16)})
            seen = Counter(_class_of(request) for request in server.requests[before:])
            report = manager.report(prices=prices)
            free = manager.report()
    (restored,) = [event.traffic for event in told if isinstance(event, Restored)]
    assert {name: count for name, count in restored.by_class.items() if count} == seen
    assert restored.received_bytes > 4 << 16
    assert report.spent["restores"] == restored
    assert report.prices is not None
    cost = report.prices.cost_of(restored)
    assert cost == pytest.approx(seen["puts"] + seen["lists"] + (seen["gets"] + seen["heads"]) / 100)
    lines = [line for line in str(report).splitlines() if line.startswith("requests")]
    assert any(line.endswith(f"; {cost:.2f} USD") and "of restores: " in line for line in lines)
    assert any("of saves: " in line and "puts" in line for line in lines)
    assert (free.prices, "USD" in str(free)) == (None, False)


def test_an_event_is_a_value_that_holds_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[Event] = []
    url = "http://user:canary-secret@127.0.0.1:9/x"
    with pytest.raises(cloudckpt.CloudCkptError):
        cloudckpt.save(state_of(1), url, on_event=told.append, options=HASTY, progress="off")
    for event in told:
        assert "canary" not in repr(event)
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.step = 3  # type: ignore[misc]


def telling(root: str) -> list[tuple[str, int, int]]:
    told: list[Event] = []
    with manager_of(Path(root), told.append) as manager:
        manager.save(1, state_of(1))
        manager.restore(state_of(0))
    return [(*kinds([event])[0], event.world_size) for event in told]


def test_of_several_ranks_the_first_alone_is_told(tmp_path: Path) -> None:
    first, second = run(2, telling, str(tmp_path))
    assert first == [("SaveBegun", 1, 2), ("SaveCommitted", 1, 2), ("Restored", 1, 2)]
    assert second == []


def test_the_documentation_names_every_event_and_what_it_holds() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z]\w+)` \|.*\|(.*)\|$", page, re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}
    common = {field.name for field in dataclasses.fields(Event)}
    held = {one.__name__: {field.name for field in dataclasses.fields(one)} - common for one in Event.__subclasses__()}
    assert told == held


class Logged(list[tuple[dict[str, float], int]]):
    def __call__(self, numbers: dict[str, float], step: int) -> None:
        self.append((numbers, step))

    def add_scalar(self, name: str, number: float, step: int) -> None:
        self.append(({name: number}, step))


@pytest.mark.parametrize("adapt", [ScalarEvents, ScalarEvents.to_writer], ids=["log", "add_scalar"])
def test_loggers_get_numbers_by_name_and_step(tmp_path: Path, adapt: Callable[[Any], ScalarEvents]) -> None:
    logged = Logged()
    with manager_of(tmp_path, adapt(logged), retention=KeepLast(1)) as manager:
        manager.async_save(1, state_of(1)).result()
        manager.save(2, state_of(2))
        manager.restore(state_of(0))
    by_step: dict[int, dict[str, float]] = {}
    for numbers, step in logged:
        by_step.setdefault(step, {}).update(numbers)
        assert all(isinstance(number, int | float) for number in numbers.values())
    of_save = {
        "bytes",
        "seconds",
        "bytes_per_s",
        "plan_s",
        "stage_s",
        "upload_s",
        "gather_s",
        "commit_s",
        "blocked_s",
    } | {
        "requests",
        "retries",
        "failed",
    }
    assert by_step[1].keys() == {f"checkpoint/{name}" for name in of_save | {"staged_bytes", "pruned_bytes"}}
    assert by_step[2].keys() == {
        f"checkpoint/{name}" for name in of_save | {"restore_s", "restored_bytes", "restore_requests"}
    }


def test_restores_are_told_to_loggers_of_a_fresh_manager_without_a_step_below_zero(tmp_path: Path) -> None:
    logged = Logged()
    cloudckpt.save(state_of(1), tmp_path / "one", on_event=ScalarEvents(logged, prefix=""), progress="off")
    assert [step for _, step in logged] == [0]
    assert isinstance(logged[0][0]["bytes"], int)


def test_events_of_a_restore_say_where_from(tmp_path: Path) -> None:
    told: list[Event] = []
    with manager_of(tmp_path, None) as manager:
        manager.save(5, state_of(5))
    with manager_of(tmp_path, told.append) as manager:
        manager.restore(state_of(0))
    assert [(one.step, one.epoch, one.retries) for one in told if isinstance(one, Restored)] == [(5, 1, 0)]
