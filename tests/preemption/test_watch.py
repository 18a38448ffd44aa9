"""Preemption with real signals: in this process where it lives on, in processes of their own where it may not."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.utils.data import DataLoader

from cloudckpt import CheckpointManager
from cloudckpt.errors import OptionsError
from cloudckpt.preemption.clouds import AzureSource, Ec2Source, GceSource
from cloudckpt.preemption.notices import Notice
from cloudckpt.preemption.slurm import SlurmSource
from cloudckpt.preemption.watch import EXIT_PREEMPTED, Preemption, auto_sources, default_grace_s
from tests.preemption.metadata_server import ACTION, REBALANCE, Answer, action, metadata_server
from tests.ranks.processes import fork

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """The handlers as they were before a test, and are after it."""
    before = {number: signal.getsignal(number) for number in (*WATCHED, signal.SIGUSR2, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def quiet(**options: Any) -> Preemption:
    """A preemption that asks nobody, whatever machine this is."""
    signals = () if isinstance(options.get("grace_s"), Mapping) else WATCHED
    return Preemption(**{"sources": (), **({"signals": signals} if signals else {}), **options})


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def wait_for(is_so: Callable[[], object]) -> None:
    while not is_so():
        time.sleep(0.002)


class Scripted:
    """A source that says what a test puts in it."""

    name = "scripted"

    def __init__(self, *notices: Notice) -> None:
        self.notices = list(notices)
        self.polls = 0

    def poll(self) -> list[Notice]:
        self.polls += 1
        return list(self.notices)


def notice(reason: str = "r", *, deadline_s: float | None = None, kind: Any = "order") -> Notice:
    return Notice(source="scripted", reason=reason, deadline_s=deadline_s, received_s=0.0, kind=kind)


# -- signals in this process -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_gives_notice_with_the_time_that_it_leaves(number: signal.Signals) -> None:
    with quiet(grace_s=25.0, clock=lambda: 100.0) as preemption:
        assert preemption.notice is None
        send(number)

        found = preemption.notice

    assert found is not None
    assert (found.source, found.received_s, found.deadline_s, found.kind) == (number.name, 100.0, 125.0, "order")
    assert found.reason == f"this process was sent {number.name}, which leaves it 25 s"


def test_each_signal_can_leave_a_time_of_its_own() -> None:
    with quiet(grace_s={signal.SIGTERM: 30.0, signal.SIGUSR1: 120.0}, clock=lambda: 0.0) as preemption:
        send(signal.SIGUSR1)
        assert preemption.notice is not None
        assert preemption.notice.deadline_s == 120.0
        send(signal.SIGTERM)

        assert preemption.notice.deadline_s == 30.0
        assert [one.source for one in preemption.seen] == ["SIGUSR1", "SIGTERM"]


def test_a_signal_sent_twice_is_one_notice_with_the_first_deadline() -> None:
    now_s = [100.0]
    with quiet(clock=lambda: now_s[0]) as preemption:
        send(signal.SIGTERM)
        now_s[0] = 110.0
        send(signal.SIGTERM)

        assert [one.deadline_s for one in preemption.seen] == [130.0]


def test_a_handler_that_was_there_is_called_after_the_signal_was_noted() -> None:
    calls: list[tuple[int, bool, int]] = []

    def previous(number: int, frame: FrameType | None) -> None:
        calls.append((number, frame is not None, len(preemption.seen)))

    signal.signal(signal.SIGTERM, previous)
    with quiet() as preemption:
        send(signal.SIGTERM)
        send(signal.SIGTERM)

    assert calls == [(signal.SIGTERM, True, 1)] * 2
    assert signal.getsignal(signal.SIGTERM) is previous


def test_an_error_of_a_handler_that_was_there_comes_through() -> None:
    def previous(number: int, frame: FrameType | None) -> None:
        raise InterruptedError("enough")

    signal.signal(signal.SIGUSR1, previous)
    with quiet() as preemption:
        with pytest.raises(InterruptedError, match="enough"):
            send(signal.SIGUSR1)

        assert [one.source for one in preemption.seen] == ["SIGUSR1"]


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_every_handler_is_given_back(before: signal.Handlers) -> None:
    for number in WATCHED:
        signal.signal(number, before)

    preemption = quiet().start()
    during = [signal.getsignal(number) for number in WATCHED]
    preemption.stop()

    assert before not in during
    assert [signal.getsignal(number) for number in WATCHED] == [before, before]


def test_an_interrupt_by_the_user_is_left_alone(handlers: Mapping[int, Any]) -> None:
    with quiet():
        assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_an_ignored_signal_stays_without_effect_but_for_the_notice() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    now_s = [0.0]
    with quiet(clock=lambda: now_s[0]) as preemption:
        send(signal.SIGUSR1)
        now_s[0] = 31.0
        send(signal.SIGUSR1)

        assert len(preemption.seen) == 1


def chain_on_top(number: signal.Signals) -> list[int]:
    """Install a handler as a framework does: it counts, and calls what was there."""
    calls: list[int] = []
    below = signal.getsignal(number)

    def handle(number: int, frame: FrameType | None) -> None:
        calls.append(number)
        if callable(below):
            below(number, frame)

    signal.signal(number, handle)
    return calls


def test_a_handler_installed_later_stays_and_ours_is_heard_through_it() -> None:
    with quiet() as preemption:
        calls = chain_on_top(signal.SIGTERM)
        theirs = signal.getsignal(signal.SIGTERM)
        send(signal.SIGTERM)

        assert preemption.notice is not None
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert len(calls) == 1


def test_after_the_stop_a_handler_that_stays_in_a_chain_only_passes_on() -> None:
    first: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: first.append(number))
    preemption = quiet().start()
    calls = chain_on_top(signal.SIGTERM)
    preemption.stop()

    send(signal.SIGTERM)

    assert (len(first), len(calls), preemption.notice) == (1, 1, None)


def test_a_chain_above_a_default_decides_itself_whether_the_process_ends() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    preemption = quiet().start()
    calls = chain_on_top(signal.SIGTERM)
    preemption.stop()

    send(signal.SIGTERM)

    assert len(calls) == 1  # and this process lives


def test_one_that_is_started_again_in_a_chain_notes_a_signal_once() -> None:
    preemption = quiet().start()
    calls = chain_on_top(signal.SIGTERM)
    preemption.stop()

    with preemption:
        send(signal.SIGTERM)

    assert (len(calls), len(preemption.seen)) == (1, 1)


def test_two_at_once_both_hear_a_signal_whichever_ends_first() -> None:
    outer, inner = quiet().start(), quiet().start()
    send(signal.SIGUSR1)
    outer.stop()
    send(signal.SIGTERM)
    inner.stop()

    assert [one.source for one in outer.seen] == ["SIGUSR1"]
    assert [one.source for one in inner.seen] == ["SIGUSR1", "SIGTERM"]


def test_starting_and_stopping_twice_is_the_same_as_once(handlers: Mapping[int, Any]) -> None:
    preemption = quiet()
    preemption.start()
    preemption.start()
    preemption.stop()
    preemption.stop()

    assert [signal.getsignal(number) for number in WATCHED] == [handlers[number] for number in WATCHED]


def test_a_notice_outlives_the_stop() -> None:
    with quiet() as preemption:
        send(signal.SIGTERM)

    assert preemption.notice is not None
    assert preemption.notice is preemption.seen[0]


def test_the_handler_logs_nothing_and_the_next_look_logs_once(caplog: pytest.LogCaptureFixture) -> None:
    with quiet(clock=lambda: 5.0) as preemption:
        send(signal.SIGTERM)
        assert caplog.messages == []

        for _ in range(3):
            assert preemption.notice is not None

    assert caplog.messages == ["preemption in 30 s: this process was sent SIGTERM, which leaves it 30 s (SIGTERM)"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_signal_in_the_middle_of_logging_another_neither_hangs_nor_is_lost() -> None:
    looks: list[Notice | None] = []
    signal.signal(signal.SIGTERM, lambda *_: looks.append(preemption.notice))

    class Sending(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not looks:
                send(signal.SIGTERM)

    log, handler = logging.getLogger("cloudckpt.preemption.watch"), Sending()
    log.addHandler(handler)
    try:
        with quiet(grace_s={signal.SIGTERM: 10.0, signal.SIGUSR1: 60.0}) as preemption:
            send(signal.SIGUSR1)
            assert preemption.notice is not None
            found = preemption.notice
    finally:
        log.removeHandler(handler)

    assert [look.source for look in looks if look is not None] == ["SIGTERM"]
    assert found is not None
    assert found.source == "SIGTERM"


# -- threads -----------------------------------------------------------------------------------------------


def in_a_thread(function: Callable[[], object]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as exc:  # noqa: BLE001 (it is the outcome)
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_started_in_another_thread_it_says_so_and_asks_the_sources(
    caplog: pytest.LogCaptureFixture, handlers: Mapping[int, Any]
) -> None:
    preemption = quiet(check=lambda: True, poll_s=0.01)

    assert in_a_thread(preemption.start) == []
    wait_for(lambda: preemption.notice)
    preemption.stop()

    assert caplog.messages[0] == "signals give no notice, because only the main thread can watch them: start there"
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]


def test_started_in_another_thread_with_nothing_but_signals_it_is_refused() -> None:
    (error,) = in_a_thread(quiet().start)

    assert isinstance(error, OptionsError)
    assert "only the main thread can watch signals" in str(error)


def test_a_source_that_hangs_is_left_behind_by_the_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.preemption.watch._JOIN_S", 0.05)
    release = threading.Event()
    preemption = quiet(check=lambda: release.wait(100) and None).start()

    preemption.stop()
    release.set()

    assert caplog.messages == ["check still hangs in a question; its thread is left to itself"]


# -- sources -----------------------------------------------------------------------------------------------


def test_the_earliest_deadline_is_the_notice_and_one_without_a_time_comes_last() -> None:
    source = Scripted(notice("a"), notice("b", deadline_s=90.0), notice("c", deadline_s=50.0))
    with quiet(sources=[source], poll_s=0.01) as preemption:
        wait_for(lambda: len(preemption.seen) == 3)

        found = preemption.notice

    assert found is not None
    assert found.reason == "c"


def test_the_same_notice_again_and_again_is_one_until_its_deadline_comes_nearer() -> None:
    source = Scripted(notice(deadline_s=90.0))
    with quiet(sources=[source], poll_s=0.001) as preemption:
        for deadline_s in (90.0, 90.9, 89.5, 200.0, None, 60.0):
            source.notices, seen_polls = [notice(deadline_s=deadline_s)], source.polls
            wait_for(lambda polls=seen_polls: source.polls >= polls + 2)

    assert [one.deadline_s for one in preemption.seen] == [90.0, 60.0]


def test_advice_is_seen_and_logged_once_and_nothing_is_done_about_it(caplog: pytest.LogCaptureFixture) -> None:
    with metadata_server() as server:
        server.answers[REBALANCE] = Answer(b'{"noticeTime": "2020-10-27T08:22:00Z"}')
        with quiet(sources=[Ec2Source(endpoint=server.url)], poll_s=0.01) as preemption:
            wait_for(lambda: len(server.requests) > 8)

            assert preemption.notice is None
            assert [one.kind for one in preemption.seen] == ["advice"]
            server.answers[ACTION] = action()
            wait_for(lambda: preemption.notice)

    assert [one.source for one in preemption.seen] == ["ec2 rebalance recommendation", "ec2 spot instance-action"]
    assert [message.split(":")[0] for message in caplog.messages] == [
        "advice, on which nothing is done",
        f"preemption in {caplog.messages[1].split()[2]} s",
    ]


def test_advice_is_a_notice_for_those_who_ask_for_it() -> None:
    source = Scripted(notice(kind="advice"))
    with quiet(sources=[source], act_on_rebalance=True, poll_s=0.01) as preemption:
        wait_for(lambda: preemption.notice)

    assert preemption.notice is not None
    assert preemption.notice.kind == "advice"


def test_a_check_that_fails_warns_and_is_asked_on(caplog: pytest.LogCaptureFixture) -> None:
    said: Iterator[Any] = iter([OSError("gone"), OSError("gone"), None, 40.0])

    def check() -> Any:
        value = next(said, 40.0)
        if isinstance(value, OSError):
            raise value
        return value

    with quiet(check=check, poll_s=0.005, clock=lambda: 100.0) as preemption:
        wait_for(lambda: preemption.notice)

    assert [(one.source, one.deadline_s) for one in preemption.seen] == [("callable", 140.0)]
    warnings = [record.getMessage() for record in caplog.records if record.name == "cloudckpt.preemption.notices"]
    assert [text for text in warnings if "gone" in text] == [warnings[0]]


def test_a_machine_and_job_have_only_the_sources_that_their_signs_show(tmp_path: Path) -> None:
    kinds = {}
    for name, value in {"none": "QEMU", "ec2": "Amazon EC2"}.items():
        (tmp_path / "sys_vendor").write_text(value)
        kinds[name] = [type(source) for source in auto_sources(dmi=tmp_path, environ={})]
    (tmp_path / "sys_vendor").write_text("Google")
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    sources = auto_sources(dmi=tmp_path, environ={"SLURM_JOB_ID": "7"})
    kinds["gce"] = [type(source) for source in sources]
    (tmp_path / "product_name").unlink()
    (tmp_path / "chassis_asset_tag").write_text("7783-7084-3265-9085-8269-3286-77\n")
    kinds["azure"] = [type(source) for source in auto_sources(dmi=tmp_path, environ={})]

    assert kinds == {
        "none": [],
        "ec2": [Ec2Source],
        "gce": [GceSource, GceSource, SlurmSource],
        "azure": [AzureSource],
    }
    assert [source.name for source in sources] == ["gce preempted", "gce maintenance-event", "slurm"]


def test_by_default_the_sources_of_this_machine_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Scripted(notice())
    leads_s: list[float] = []
    monkeypatch.setattr(
        "cloudckpt.preemption.watch.auto_sources", lambda *, slurm_lead_s: leads_s.append(slurm_lead_s) or [source]
    )

    with Preemption(signals=(), poll_s=0.01, slurm_lead_s=77.0) as preemption:
        wait_for(lambda: preemption.notice)

    assert leads_s == [77.0]


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": (signal.SIGKILL,)}, r"^signals is .* none that cannot be handled"),
        ({"signals": (signal.SIGTERM, signal.SIGTERM)}, r"^signals is .* name each once"),
        ({"signals": (0,)}, r"^signals is \(0,\)"),
        ({"signals": signal.SIGTERM}, r"^signals is"),
        ({"grace_s": 0.0}, r"^grace_s is 0\.0"),
        ({"grace_s": "30"}, r"^grace_s is '30'"),
        (
            {"signals": WATCHED, "grace_s": {signal.SIGTERM: 30.0}},
            r"^grace_s is .* each of the signals: SIGTERM, SIGUSR1$",
        ),
        ({"grace_s": {signal.SIGTERM: 30.0, signal.SIGUSR1: -1.0}}, r"^grace_s is -1\.0"),
        ({"signals": "term"}, r"^signals is 'term'"),
        ({"sources": "ec2"}, r"^sources is 'ec2'"),
        ({"sources": [3]}, r"^sources is \[3\]"),
        ({"check": 3}, r"^check is 3"),
        ({"poll_s": 0}, r"^poll_s is 0"),
        ({"poll_s": float("nan")}, r"^poll_s is nan"),
        ({"slurm_lead_s": -1.0}, r"^slurm_lead_s is -1\.0"),
        ({"exit_code": 0}, r"^exit_code is 0"),
        ({"exit_code": 256}, r"^exit_code is 256"),
        ({"signals": (), "sources": ()}, r"^signals, sources and check are all empty"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        Preemption(**options)


def signals_of(preemption: Preemption) -> tuple[int, ...]:
    return preemption._signals


def test_sigusr1_gives_notice_by_default_under_slurm_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert signals_of(Preemption()) == (signal.SIGTERM,)
    assert signals_of(Preemption(grace_s={signal.SIGUSR1: 120.0})) == (signal.SIGUSR1,)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert signals_of(Preemption()) == (signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("environ", "expected_s"),
    [
        ({}, 30.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 15.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CLOUDCKPT_GRACE_S": "120"}, 120.0),
        ({"CLOUDCKPT_GRACE_S": "12.5"}, 12.5),
    ],
)
def test_the_time_that_a_signal_leaves_is_the_environments(environ: dict[str, str], expected_s: float) -> None:
    assert default_grace_s(environ) == expected_s


@pytest.mark.parametrize("said", ["", "soon", "-1", "0", "inf", "nan"])
def test_an_environment_that_names_no_seconds_is_refused(said: str) -> None:
    with pytest.raises(OptionsError, match=f"^CLOUDCKPT_GRACE_S is '{said}'; give a number of seconds above 0"):
        default_grace_s({"CLOUDCKPT_GRACE_S": said})


# -- what is over, forgotten, or asked by nobody ---------------------------------------------------------------


def test_a_notice_that_was_dismissed_is_none_any_more_and_the_signal_gives_another() -> None:
    now_s = [0.0]
    with quiet(clock=lambda: now_s[0]) as preemption:
        send(signal.SIGTERM)
        first = preemption.notice
        assert first is not None
        now_s[0] = 100.0
        preemption.dismiss(first)
        assert preemption.notice is None
        send(signal.SIGTERM)

        assert preemption.notice is not None
        assert preemption.notice.deadline_s == 130.0
        assert len(preemption.seen) == 2


def test_a_source_that_repeats_what_is_over_does_not_revive_it() -> None:
    now_s = [0.0]
    source = Scripted(notice(deadline_s=30.0))
    with quiet(sources=[source], poll_s=0.001, clock=lambda: now_s[0]) as preemption:
        wait_for(lambda: preemption.notice)
        first = preemption.notice
        assert first is not None
        now_s[0] = 30.5
        preemption.dismiss(first)
        for notices in (
            [notice(deadline_s=30.9)],
            [],
            [Notice(source="scripted", reason="r", deadline_s=30.5, received_s=30.5)],
        ):
            source.notices, polls = notices, source.polls
            wait_for(lambda polls=polls: source.polls >= polls + 2)
        assert preemption.notice is None
        source.notices = []
        wait_for(lambda polls=source.polls: source.polls >= polls + 2)
        source.notices = [notice(deadline_s=90.0)]
        wait_for(lambda: preemption.notice)
        assert preemption.seen[-1].deadline_s == 90.0


def test_a_source_that_goes_on_and_names_a_later_end_is_heard_once_the_first_has_passed() -> None:
    now_s = [0.0]
    source = Scripted(notice(deadline_s=30.0))
    with quiet(sources=[source], poll_s=0.001, clock=lambda: now_s[0]) as preemption:
        wait_for(lambda: preemption.notice)
        source.notices = [notice(deadline_s=90.0)]
        now_s[0] = 31.0
        wait_for(lambda: len(preemption.seen) == 2)
        assert [one.deadline_s for one in preemption.seen] == [30.0, 90.0]


def test_what_a_source_stops_saying_is_withdrawn_until_it_says_it_again() -> None:
    source = Scripted(notice())
    with quiet(sources=[source], poll_s=0.001) as preemption:
        wait_for(lambda: preemption.notice)
        found = preemption.seen[0]
        assert not preemption.is_withdrawn(found)
        source.notices = []
        wait_for(lambda: preemption.is_withdrawn(found))
        assert preemption.notice is found
        source.notices = [notice()]
        wait_for(lambda: not preemption.is_withdrawn(found))

    assert preemption.seen == (found,)


def test_a_notice_that_nobody_asks_for_is_told_of_in_the_log_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.preemption.watch._LOOK_S", 0.001)
    now_s = [0.0]
    with quiet(clock=lambda: now_s[0]):
        send(signal.SIGTERM)
        now_s[0] = 11.0
        wait_for(lambda: len(caplog.messages) >= 2)
        time.sleep(0.05)

    assert [message.split(":")[0] for message in caplog.messages] == [
        "preemption in 19 s",
        "SIGTERM gave notice 11 s ago and nobody has asked since, so nothing is saved",
    ]
    assert "should_save or preempted" in caplog.messages[1]


def test_a_notice_that_somebody_has_asked_for_is_not_complained_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.preemption.watch._LOOK_S", 0.001)
    now_s = [0.0]
    with quiet(clock=lambda: now_s[0]) as preemption:
        send(signal.SIGTERM)
        assert preemption.notice is not None
        now_s[0] = 1_000.0
        time.sleep(0.05)

    assert len(caplog.messages) == 1


def test_a_forgotten_one_gives_the_signals_back_and_its_threads_end(handlers: Mapping[int, Any]) -> None:
    before = set(threading.enumerate())
    preemption = quiet(sources=[Scripted()], check=lambda: None, poll_s=0.01).start()
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3

    del preemption
    gc.collect()
    for thread in threads:
        thread.join(30.0)

    assert not any(thread.is_alive() for thread in threads)
    assert [signal.getsignal(number) for number in WATCHED] == [handlers[number] for number in WATCHED]


def test_a_forgotten_manager_leaves_no_thread_that_watches(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    manager = CheckpointManager(tmp_path, preemption=True)
    threads = set(threading.enumerate()) - before
    assert threads

    del manager
    gc.collect()
    for thread in threads:
        thread.join(30.0)

    assert not any(thread.is_alive() for thread in threads)


# -- processes of their own --------------------------------------------------------------------------------


def outcome(function: Callable[[Connection], None]) -> tuple[list[Any], int | None]:
    """Run `function` in a process of its own; return what it sent, and how it ended."""
    process, pipe = fork(function, is_daemon=False)
    said = []
    while True:
        try:
            said.append(pipe.recv())
        except EOFError:
            break
    pipe.close()
    process.join()
    return said, process.exitcode


def _saves_through_a_second_signal(pipe: Connection) -> None:
    preemption = quiet().start()
    for _ in range(5):
        send(signal.SIGTERM)
    pipe.send(preemption.notice.source if preemption.notice else None)
    pipe.send("saved")
    os._exit(preemption.exit_code)


def test_a_second_signal_ends_no_save_and_the_exit_code_says_preempted() -> None:
    assert outcome(_saves_through_a_second_signal) == (["SIGTERM", "saved"], EXIT_PREEMPTED)


def _outstays_its_time(pipe: Connection) -> None:
    now_s = [0.0]
    preemption = quiet(clock=lambda: now_s[0]).start()
    send(signal.SIGTERM)
    now_s[0] = 30.0
    send(signal.SIGTERM)
    pipe.send("alive at the deadline")
    now_s[0] = 30.1
    send(signal.SIGTERM)
    pipe.send("alive after it")
    preemption.stop()


def test_a_signal_after_the_time_that_the_first_one_left_ends_the_process() -> None:
    assert outcome(_outstays_its_time) == (["alive at the deadline"], -signal.SIGTERM)


def _outstays_its_time_twice_watched(pipe: Connection) -> None:
    with quiet():
        _outstays_its_time(pipe)


def _stopped_in_another_thread(pipe: Connection) -> None:
    preemption = quiet().start()
    in_a_thread(preemption.stop)
    pipe.send("stopped")
    send(signal.SIGTERM)
    pipe.send("alive")


def test_stopped_in_another_thread_signals_do_again_what_they_did() -> None:
    assert outcome(_stopped_in_another_thread) == (["stopped"], -signal.SIGTERM)


def _pause(pipe: Connection) -> None:
    pipe.send(os.getpid())
    while True:
        signal.pause()


def _forks_a_worker(pipe: Connection) -> None:
    with quiet() as preemption:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_pause, args=(theirs,))
        worker.start()
        ours.recv()
        worker.terminate()
        worker.join()
        pipe.send((worker.exitcode, preemption.notice))


def test_a_forked_worker_dies_of_the_signal_as_ever() -> None:
    assert outcome(_forks_a_worker) == ([(-signal.SIGTERM, None)], 0)


def _forks_below_a_handler(pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(77))
    with quiet():
        pid = os.fork()
        if pid == 0:
            send(signal.SIGTERM)
            os._exit(1)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_a_forked_worker_obeys_the_handler_that_was_there() -> None:
    assert outcome(_forks_below_a_handler) == ([77], 0)


def _loads_data(pipe: Connection) -> None:
    with quiet() as preemption:
        batches = iter(DataLoader(range(1_000_000), num_workers=1, multiprocessing_context="fork"))  # type: ignore[arg-type]
        next(batches)
        (worker,) = batches._workers  # type: ignore[attr-defined]
        send(signal.SIGTERM)
        pipe.send(int(next(batches)))  # the loader goes on in its time of grace
        os.kill(worker.pid, signal.SIGTERM)
        while worker.exitcode is None:
            time.sleep(0.01)
        pipe.send((worker.exitcode, len(preemption.seen)))
    os._exit(0)


def test_a_worker_of_a_data_loader_dies_of_the_signal_and_its_loader_does_not() -> None:
    # Torch has a worker end with 0 if it is its own loader's process that sends the signal.
    assert outcome(_loads_data) == ([1, (0, 1)], 0)


def _watches_in_a_fork(pipe: Connection) -> None:
    with quiet() as preemption:
        pid = os.fork()
        if pid == 0:
            preemption.start()
            send(signal.SIGTERM)
            os._exit(0 if preemption.notice else 1)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_a_fork_that_starts_it_anew_is_given_notice() -> None:
    assert outcome(_watches_in_a_fork) == ([0], 0)


def test_of_two_that_watch_the_more_patient_one_decides() -> None:
    # The other one's 30 s are real ones, and not over.
    assert outcome(_outstays_its_time_twice_watched) == (["alive at the deadline", "alive after it"], 0)


PROGRAM = """
import sys, threading
from cloudckpt.preemption import Preemption

with Preemption(sources=(), check=threading.Event().wait) as preemption:
    print("ready", flush=True)
    while not preemption.notice:
        threading.Event().wait(0.01)
    print(preemption.notice.source, flush=True)
    sys.exit(preemption.exit_code)
"""


def test_a_program_that_is_preempted_ends_with_its_exit_code_though_a_check_hangs() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()

    assert (rest, process.returncode) == ("SIGTERM\n", 143)
