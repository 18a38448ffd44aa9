"""Sources of notices against servers and programs that speak as the real ones do, or lie, hang or are not there."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from cloudckpt.errors import OptionsError
from cloudckpt.preemption.clouds import AzureSource, Ec2Source, GceSource, is_azure, is_ec2, is_gce
from cloudckpt.preemption.notices import CheckSource, Notice, NoticeSource, SourceError, Watcher
from cloudckpt.preemption.slurm import SlurmSource
from tests.preemption.metadata_server import (
    ACTION,
    EVENTS,
    LIFECYCLE,
    MACHINE,
    MAINTENANCE,
    PREEMPTED,
    REBALANCE,
    TOKEN,
    Answer,
    MetadataServer,
    action,
    event,
    metadata_server,
    utc,
)


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server() as running:
        yield running


def fixed_clock() -> float:
    return 1_000.0


def ec2(server: MetadataServer, timeout_s: float = 2.0) -> Ec2Source:
    return Ec2Source(endpoint=server.url, timeout_s=timeout_s, clock=fixed_clock)


def gce(
    server: MetadataServer,
    key: Literal["preempted", "maintenance-event"] = "preempted",
    *,
    timeout_s: float = 2.0,
    held_s: float = 20.0,
    clock: Callable[[], float] = fixed_clock,
) -> GceSource:
    return GceSource(key, endpoint=server.url, timeout_s=timeout_s, held_s=held_s, clock=clock)


def azure(server: MetadataServer) -> AzureSource:
    return AzureSource(endpoint=server.url, clock=fixed_clock)


# -- EC2 ---------------------------------------------------------------------------------------------------


def test_an_ec2_instance_that_nobody_wants_gives_no_notice(server: MetadataServer) -> None:
    assert list(ec2(server).poll()) == []
    assert server.requests == [("PUT", TOKEN), ("GET", ACTION), ("GET", LIFECYCLE), ("GET", REBALANCE)]


def test_a_token_is_fetched_for_six_hours_and_used_again(server: MetadataServer) -> None:
    source = ec2(server)
    for _ in range(3):
        list(source.poll())

    assert server.ttls == [21_600]


def test_a_token_that_has_expired_is_replaced_and_the_notice_still_heard(server: MetadataServer) -> None:
    source = ec2(server)
    list(source.poll())
    server.expire_tokens()
    server.answers[ACTION] = action("stop")

    assert [notice.source for notice in source.poll()] == ["ec2 spot instance-action"]
    assert len(server.ttls) == 2


@pytest.mark.parametrize("what", ["terminate", "stop", "hibernate"])
def test_an_interruption_of_ec2_has_its_own_deadline(server: MetadataServer, what: str) -> None:
    server.answers[ACTION] = action(what, left_s=120.0)

    (notice,) = ec2(server).poll()

    assert (notice.source, notice.kind, notice.received_s) == ("ec2 spot instance-action", "order", 1_000.0)
    assert notice.deadline_s == pytest.approx(1_120.0, abs=2.0)
    assert f"EC2 will {what} this Spot Instance at 20" in notice.reason


def test_a_wrong_clock_of_this_machine_does_not_move_the_deadline(server: MetadataServer) -> None:
    server.answers[ACTION] = action(left_s=120.0)
    source = Ec2Source(endpoint=server.url, clock=fixed_clock, wall_clock=lambda: 0.0)

    assert [notice.deadline_s for notice in source.poll()] == [pytest.approx(1_120.0, abs=2.0)]


def test_a_hibernation_that_has_begun_leaves_no_time(server: MetadataServer) -> None:
    server.answers[ACTION] = action("hibernate", left_s=-5.0)

    assert [notice.deadline_s for notice in ec2(server).poll()] == [1_000.0]


def test_a_rebalance_recommendation_is_advice_without_a_deadline(server: MetadataServer) -> None:
    server.answers[REBALANCE] = Answer(b'{"noticeTime": "2020-10-27T08:22:00Z"}')

    (notice,) = ec2(server).poll()

    assert (notice.source, notice.kind, notice.deadline_s) == ("ec2 rebalance recommendation", "advice", None)
    assert "2020-10-27T08:22:00Z" in notice.reason


@pytest.mark.parametrize("state", ["Terminated", "Warmed:Terminated", "Warmed:Stopped", "Warmed:Hibernated"])
def test_an_instance_that_its_group_ends_gets_notice_without_a_time(server: MetadataServer, state: str) -> None:
    server.answers[LIFECYCLE] = Answer(state.encode())

    (notice,) = ec2(server).poll()

    assert (notice.source, notice.kind, notice.deadline_s) == ("ec2 auto scaling", "order", None)
    assert f"on its way to {state}" in notice.reason


@pytest.mark.parametrize("state", ["InService", "Standby", "Detached", "Warmed:Running"])
def test_an_instance_that_its_group_lets_live_gets_no_notice(server: MetadataServer, state: str) -> None:
    server.answers[LIFECYCLE] = Answer(state.encode())

    assert list(ec2(server).poll()) == []


@pytest.mark.parametrize("lie", ["html", "empty", "not utf-8", "huge", "a redirect", "an error", "no http", "cut off"])
def test_a_state_that_is_none_is_no_notice_of_a_group(server: MetadataServer, lie: str) -> None:
    server.answers[LIFECYCLE] = LIES[lie]

    with pytest.raises(SourceError):
        list(ec2(server).poll())


def test_an_interruption_is_heard_though_the_recommendation_is_broken(server: MetadataServer) -> None:
    server.answers[ACTION] = action()
    server.answers[REBALANCE] = Answer(status=500)
    heard: list[Notice] = []

    Watcher(ec2(server), heard.append, poll_s=5.0).ask()

    assert [notice.source for notice in heard] == ["ec2 spot instance-action"]


@pytest.mark.parametrize("broken", [(ACTION,), (REBALANCE,), (ACTION, REBALANCE)])
@pytest.mark.parametrize("lie", ["an error", "a refusal", "html", "cut off", "no http"])
def test_a_question_without_an_answer_keeps_no_other_from_being_asked(
    server: MetadataServer, broken: tuple[str, ...], lie: str
) -> None:
    server.answers |= dict.fromkeys(broken, LIES[lie])
    server.answers[LIFECYCLE] = Answer(b"Terminated")
    heard: list[Notice] = []

    Watcher(ec2(server), heard.append, poll_s=5.0).ask()

    assert [notice.source for notice in heard] == ["ec2 auto scaling"]


def test_what_is_heard_in_part_is_told_once_and_asked_on_in_the_same_time(
    server: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers[ACTION] = Answer(b"oops", 500)
    watcher = Watcher(ec2(server), print, poll_s=5.0)

    with caplog.at_level(logging.INFO, "cloudckpt.preemption.notices"):
        waits_s = []
        for _ in range(3):
            watcher.ask()
            waits_s.append(watcher.wait_s)
        del server.answers[ACTION]
        watcher.ask()

    assert waits_s == [5.0, 5.0, 5.0]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert f"in part only; it is asked on: {server.url}{ACTION} answered with status 500" in caplog.messages[0]


LIES = {
    "html": Answer(b"<html><body>login</body></html>"),
    "empty": Answer(b""),
    "not an object": Answer(b'["terminate"]'),
    "wrong types": Answer(b'{"action": 3, "time": {}}'),
    "no time": Answer(b'{"action": "terminate"}'),
    "an unknown action": Answer(b'{"action": "none", "time": "2017-09-18T08:22:00Z"}'),
    "not utf-8": Answer(b"\xff\xfe\x00"),
    "deep": Answer(b"[" * 60_000),
    "a time long past": action(left_s=-3_600.0),
    "a time a year ahead": action(left_s=365 * 86_400.0),
    "an impossible time": Answer(b'{"action": "stop", "time": "2017-13-40T99:99:99Z"}'),
    "huge": Answer(b" " * 2_000_000),
    "a redirect": Answer(status=302, headers={"Location": "/elsewhere"}),
    "an error": Answer(status=500),
    "a refusal": Answer(status=403),
    "no http": Answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "cut off": Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
    "closed": Answer(raw=b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_unlike_the_documented_one_is_no_notice_of_ec2(server: MetadataServer, lie: str) -> None:
    server.answers[ACTION] = LIES[lie]

    with pytest.raises(SourceError):
        list(ec2(server).poll())
    assert ("GET", "/elsewhere") not in server.requests


@pytest.mark.parametrize(
    "answer", [Answer(status=404), Answer(status=403), Answer(b""), Answer(b"a\r\nb"), Answer(b"x" * 5_000)]
)
def test_without_a_proper_token_nothing_is_asked(server: MetadataServer, answer: Answer) -> None:
    server.answers[TOKEN] = answer

    with pytest.raises(SourceError):
        list(ec2(server).poll())
    assert server.requests == [("PUT", TOKEN)]


def test_a_token_that_is_never_accepted_is_fetched_once_per_poll(server: MetadataServer) -> None:
    server.answers[TOKEN] = Answer(b"made-up")

    with pytest.raises(SourceError, match="status 401"):
        list(ec2(server).poll())
    assert [verb for verb, _ in server.requests] == ["PUT", "GET", "GET", "GET"]


def test_an_endpoint_that_is_not_there_names_the_hop_limit() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        source = Ec2Source(endpoint=f"http://127.0.0.1:{unheard.getsockname()[1]}")
        with pytest.raises(SourceError, match=r"ConnectionRefusedError.*hop limit"):
            list(source.poll())


@pytest.mark.parametrize(
    "slow", [Answer(b"FALSE", first_wait_s=3_600.0), Answer(b" " * 60_000, byte_wait_s=0.05)], ids=["hangs", "drips"]
)
def test_a_request_ends_by_its_timeout_however_the_server_stalls(server: MetadataServer, slow: Answer) -> None:
    server.answers[PREEMPTED] = slow  # for longer than a test may take

    with pytest.raises(SourceError, match="TimeoutError"):
        list(gce(server, timeout_s=0.3).poll())


def test_no_proxy_is_asked(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    assert list(gce(server).poll()) == []


@pytest.mark.parametrize("url", ["https://169.254.169.254", "169.254.169.254", "http://", "http://host/path", ""])
def test_an_endpoint_that_is_no_plain_http_host_is_refused(url: str) -> None:
    with pytest.raises(OptionsError, match=r"^endpoint is"):
        Ec2Source(endpoint=url)


# -- GCE ---------------------------------------------------------------------------------------------------


def test_a_compute_engine_machine_that_nobody_wants_gives_no_notice(server: MetadataServer) -> None:
    assert list(gce(server).poll()) == []
    assert list(gce(server, "maintenance-event").poll()) == []
    assert server.requests == [("GET", PREEMPTED), ("GET", MAINTENANCE)]


def test_a_preempted_machine_has_thirty_seconds(server: MetadataServer) -> None:
    server.answers[PREEMPTED] = Answer(b"TRUE")

    (notice,) = gce(server).poll()

    assert (notice.source, notice.deadline_s, notice.kind) == ("gce preempted", 1_030.0, "order")


def test_a_live_migration_is_no_notice_and_a_termination_is(server: MetadataServer) -> None:
    source = gce(server, "maintenance-event")
    server.answers[MAINTENANCE] = Answer(b"MIGRATE_ON_HOST_MAINTENANCE")
    assert list(source.poll()) == []

    server.answers[MAINTENANCE] = Answer(b"TERMINATE_ON_HOST_MAINTENANCE\n")
    (notice,) = source.poll()
    assert (notice.source, notice.deadline_s) == ("gce maintenance-event", None)


def test_what_the_metadata_server_did_not_say_is_no_notice(server: MetadataServer) -> None:
    server.answers[PREEMPTED] = Answer(b"TRUE", is_google=False)

    with pytest.raises(SourceError, match="'TRUE'"):
        list(gce(server).poll())


@pytest.mark.parametrize("lie", ["html", "empty", "not utf-8", "huge", "a redirect", "an error", "no http", "cut off"])
def test_an_answer_unlike_the_documented_one_is_no_notice_of_gce(server: MetadataServer, lie: str) -> None:
    server.answers[PREEMPTED] = LIES[lie]

    with pytest.raises(SourceError):
        list(gce(server).poll())
    assert ("GET", "/elsewhere") not in server.requests


class Turned:
    """A clock that a test turns."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_question_is_held_back_until_there_is_news_and_the_time_counts_from_then(server: MetadataServer) -> None:
    clock, heard = Turned(), list[Notice]()
    source = gce(server, clock=clock)
    assert list(source.poll()) == []
    assert source.waits
    asking = threading.Thread(target=lambda: heard.extend(source.poll()))
    asking.start()
    while not server.held:
        time.sleep(0.001)
    clock.now_s = 1_017.0
    server.answers[PREEMPTED] = Answer(b"TRUE")
    asking.join()

    assert [(one.received_s, one.deadline_s) for one in heard] == [(1_017.0, 1_047.0)]
    assert source.waits


def test_news_between_two_questions_counts_from_the_one_before(server: MetadataServer) -> None:
    clock = Turned()
    source = gce(server, clock=clock)
    list(source.poll())
    clock.now_s = 1_008.0
    server.answers[PREEMPTED] = Answer(b"TRUE")

    assert [(one.received_s, one.deadline_s) for one in source.poll()] == [(1_008.0, 1_030.0)]


def test_a_server_that_holds_nothing_back_is_not_asked_again_at_once(server: MetadataServer) -> None:
    server.is_holding = False
    source = gce(server)
    list(source.poll())

    assert list(source.poll()) == []
    assert not source.waits


def test_an_etag_that_changes_with_each_answer_is_no_news_and_no_reason_to_ask_at_once(server: MetadataServer) -> None:
    server.is_holding = False
    source, waits = gce(server), []
    for number in range(4):
        server.answers[PREEMPTED] = Answer(b"FALSE" + b" " * number)  # an ETag of its own
        list(source.poll())
        waits.append(source.waits)

    assert waits == [True, False, False, False]


def test_a_server_that_refuses_to_hold_questions_back_is_not_asked_again_at_once(server: MetadataServer) -> None:
    server.refuses_to_hold = True
    source, waits = gce(server), []
    for _ in range(4):
        list(source.poll())
        waits.append(source.waits)

    assert waits == [True, False, False, False]


def test_a_held_back_question_without_a_proper_answer_is_asked_plainly(server: MetadataServer) -> None:
    source = gce(server, held_s=0.2, timeout_s=0.2)
    list(source.poll())
    server.answers[PREEMPTED] = Answer(b"TRUE", first_wait_s=0.5)
    asked = len(server.requests)
    with pytest.raises(SourceError, match="TimeoutError"):
        list(source.poll())
    assert len(server.requests) == asked + 2
    server.answers[PREEMPTED] = Answer(b"TRUE")

    assert [one.source for one in source.poll()] == ["gce preempted"]


def test_a_held_back_question_ends_when_nobody_wants_the_answer_any_more(
    server: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = Watcher(gce(server, held_s=3_000.0), print, poll_s=0.01)
    watcher.start()
    while not server.held:
        time.sleep(0.001)
    watcher.stop()

    assert watcher.join(30.0)
    assert caplog.messages == []


# -- Azure -------------------------------------------------------------------------------------------------


def test_an_azure_machine_that_nobody_wants_gives_no_notice(server: MetadataServer) -> None:
    source = azure(server)

    assert [list(source.poll()), list(source.poll())] == [[], []]
    assert server.requests == [("GET", MACHINE), ("GET", EVENTS), ("GET", EVENTS)]


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy"])
def test_an_event_that_ends_this_machine_has_its_own_deadline(server: MetadataServer, kind: str) -> None:
    server.answers[EVENTS] = event(kind, 30.0)

    (notice,) = azure(server).poll()

    assert (notice.source, notice.kind, notice.received_s) == (f"azure {kind}", "order", 1_000.0)
    assert notice.deadline_s == pytest.approx(1_030.0, abs=2.0)
    assert "602d9444" in notice.reason


def test_an_event_that_has_started_leaves_no_time(server: MetadataServer) -> None:
    server.answers[EVENTS] = event("Preempt", None)

    assert [notice.deadline_s for notice in azure(server).poll()] == [pytest.approx(1_000.0, abs=2.0)]


@pytest.mark.parametrize(
    "said",
    [event("Freeze", 30.0), event("Preempt", 30.0, resources=("trainer_8",)), event("Redeploy", 86_400.0)],
    ids=["is outlived", "another's", "far ahead"],
)
def test_an_event_that_does_not_end_this_machine_soon_is_no_notice(server: MetadataServer, said: Answer) -> None:
    server.answers[EVENTS] = said

    assert list(azure(server).poll()) == []


def events(*said: object) -> Answer:
    return Answer(json.dumps({"DocumentIncarnation": 3, "Events": said}).encode())


def named(kind: str, not_before: object, **more: object) -> dict[str, object]:
    return {"EventId": "A", "EventType": kind, "Resources": ["trainer_7"], "NotBefore": not_before, **more}


ODD_EVENTS = {
    "no object": "Preempt",
    "nothing in it": {},
    "resources that are none": named("Preempt", "", Resources="trainer_7"),
    "a kind that nobody knows": named("Vanish", ""),
    "a time that is none": named("Reboot", "soon"),
    "a time that is no text": named("Reboot", {"at": 3}),
}


@pytest.mark.parametrize("odd", ODD_EVENTS)
def test_an_event_that_cannot_be_read_silences_no_other(server: MetadataServer, odd: str) -> None:
    (preempt,) = json.loads(event("Preempt", 30.0).body)["Events"]
    server.answers[EVENTS] = events(ODD_EVENTS[odd], preempt)
    heard: list[Notice] = []

    Watcher(azure(server), heard.append, poll_s=5.0).ask()

    assert [one.source for one in heard if one.deadline_s is not None] == ["azure Preempt"]


@pytest.mark.parametrize("not_before", ["soon", 3, {"at": 3}, "2026-13-40T99:99:99Z"])
def test_an_event_that_ends_this_machine_at_a_time_that_cannot_be_read_is_notice_without_one(
    server: MetadataServer, caplog: pytest.LogCaptureFixture, not_before: object
) -> None:
    server.answers[EVENTS] = events(named("Reboot", not_before))
    heard: list[Notice] = []
    watcher = Watcher(azure(server), heard.append, poll_s=5.0)

    for _ in range(3):
        watcher.ask()

    assert [(one.source, one.deadline_s) for one in heard] == [("azure Reboot", None)]
    assert len(caplog.messages) == 1
    assert "Azure's event cannot be read: {'EventId': 'A'" in caplog.messages[0]


@pytest.mark.parametrize(("left_s", "deadline_s"), [(30.0, 1_030.0), (86_400.0, None)])
def test_a_time_in_the_form_of_iso_is_read(server: MetadataServer, left_s: float, deadline_s: float | None) -> None:
    server.answers[EVENTS] = events(named("Reboot", utc(time.time() + left_s)))

    found = [one.deadline_s for one in azure(server).poll()]

    assert found == ([] if deadline_s is None else [pytest.approx(deadline_s, abs=2.0)])


EVENT_LIES = {
    **{name: LIES[name] for name in ("html", "empty", "not an object", "not utf-8", "deep", "huge", "a redirect")},
    **{name: LIES[name] for name in ("an error", "a refusal", "no http", "cut off", "closed")},
    "events that are none": Answer(b'{"Events": ["Preempt"]}'),
}


@pytest.mark.parametrize("lie", EVENT_LIES)
def test_an_answer_unlike_the_documented_one_is_no_notice_of_azure(server: MetadataServer, lie: str) -> None:
    server.answers[EVENTS] = EVENT_LIES[lie]

    with pytest.raises(SourceError):
        list(azure(server).poll())
    assert ("GET", "/elsewhere") not in server.requests


# -- where we are ------------------------------------------------------------------------------------------


def dmi(directory: Path, **names: str) -> Path:
    for name, value in names.items():
        (directory / name).write_text(value + "\n")
    return directory


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"sys_vendor": "Amazon EC2"}, (True, False, False)),
        ({"sys_vendor": "Xen", "bios_version": "4.2.amazon"}, (True, False, False)),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, (False, True, False)),
        (
            {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
            (False, False, True),
        ),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, (False, False, False)),
        ({"sys_vendor": "QEMU", "product_name": "Standard PC"}, (False, False, False)),
        ({}, (False, False, False)),
    ],
)
def test_the_machine_is_known_by_its_dmi_tables(
    tmp_path: Path, names: dict[str, str], expected: tuple[bool, bool, bool]
) -> None:
    dmi(tmp_path, **names)

    assert (is_ec2(tmp_path, {}), is_gce(tmp_path), is_azure(tmp_path)) == expected


def test_ec2_is_not_asked_where_its_metadata_are_disabled(tmp_path: Path) -> None:
    assert not is_ec2(dmi(tmp_path, sys_vendor="Amazon EC2"), {"AWS_EC2_METADATA_DISABLED": "true"})


# -- Slurm -------------------------------------------------------------------------------------------------

NOW_S = 1_800_000_000.0


class Times:
    """Two clocks that a test turns by hand."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def monotonic(self) -> float:
        return 1_000.0 + self.passed_s

    def wall(self) -> float:
        return NOW_S + self.passed_s


def program(tmp_path: Path, script: str) -> Path:
    """Make a program that counts its calls in `calls`."""
    path = tmp_path / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def slurm(times: Times, command: Path, **environ: str) -> SlurmSource:
    return SlurmSource(
        command=[str(command), "show", "job"],
        environ={"SLURM_JOB_ID": "42", "PATH": "/usr/bin:/bin", **environ},
        clock=times.monotonic,
        wall_clock=times.wall,
    )


def local(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(unix_s))


def test_a_job_gets_notice_two_minutes_before_the_end_that_slurm_has_set(tmp_path: Path) -> None:
    times = Times()
    source = slurm(times, tmp_path / "absent", SLURM_JOB_END_TIME=f"{NOW_S + 3_600:.0f}")

    times.passed_s = 3_479.0
    assert list(source.poll()) == []
    times.passed_s = 3_480.0
    (notice,) = source.poll()
    assert (notice.source, notice.deadline_s, notice.received_s) == ("slurm time limit", 4_600.0, 4_480.0)
    assert "Slurm job 42" in notice.reason


def test_scontrol_is_asked_for_this_job_once_and_again_after_minutes(tmp_path: Path) -> None:
    times = Times()
    end = local(NOW_S + 3_600)
    source = slurm(times, program(tmp_path, f'echo "JobId=42 JobName=x EndTime={end} Deadline=N/A"'))

    for times.passed_s in (0.0, 5.0, 299.0):
        assert list(source.poll()) == []
    assert calls(tmp_path) == ["show job 42"]
    times.passed_s = 300.0
    list(source.poll())
    assert len(calls(tmp_path)) == 2
    times.passed_s = 3_500.0
    assert [notice.deadline_s for notice in source.poll()] == [pytest.approx(4_600.0)]


def test_scontrol_is_told_to_write_times_as_expected(tmp_path: Path) -> None:
    times = Times()
    command = program(tmp_path, f'[ "$SLURM_TIME_FORMAT" = standard ] && echo "EndTime={local(NOW_S + 60)}"')

    assert len(list(slurm(times, command, SLURM_TIME_FORMAT="%c").poll())) == 1


def test_of_an_array_only_this_job_counts(tmp_path: Path) -> None:
    times = Times()
    lines = f'echo "JobId=41 EndTime={local(NOW_S + 10)}"; echo "JobId=42 EndTime={local(NOW_S + 9_000)}"'

    assert list(slurm(times, program(tmp_path, lines)).poll()) == []


def test_a_limit_that_was_moved_while_the_job_ran_gives_no_early_notice(tmp_path: Path) -> None:
    times = Times()
    command = program(tmp_path, f'echo "JobId=42 EndTime={local(NOW_S + 7_200)}"')
    source = slurm(times, command, SLURM_JOB_END_TIME=f"{NOW_S + 3_600:.0f}")

    times.passed_s = 3_500.0
    assert list(source.poll()) == []
    times.passed_s = 7_100.0
    assert [notice.deadline_s for notice in source.poll()] == [pytest.approx(8_200.0)]


@pytest.mark.parametrize("end", ["Unknown", "None"])
def test_a_job_without_a_limit_gets_no_notice(tmp_path: Path, end: str) -> None:
    times = Times()

    assert list(slurm(times, program(tmp_path, f'echo "JobId=42 EndTime={end}"')).poll()) == []


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo no such job", "echo EndTime=tomorrow", "echo EndTime=9999-99-99T00:00:00", "exec sleep 60"],
)
def test_a_controller_that_gives_no_end_is_not_asked_more_often(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.preemption.slurm._TIMEOUT_S", 1.0)
    times = Times()
    source = slurm(times, program(tmp_path, script))

    for times.passed_s in (0.0, 5.0, 10.0):
        with pytest.raises(SourceError, match="job 42"):
            list(source.poll())
    assert len(calls(tmp_path)) == 1


def test_a_worker_that_is_forked_while_scontrol_starts_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[int] = []

    def forking_before(start: Callable[..., int]) -> Callable[..., int]:
        def start_beside_a_worker(*args: Any, **kwargs: Any) -> int:
            workers.append(os.fork())
            if workers[-1] == 0:
                signal.pause()
                os._exit(0)
            return start(*args, **kwargs)

        return start_beside_a_worker

    # However a process may be started, a worker of a DataLoader is forked at that moment.
    monkeypatch.setattr(os, "posix_spawnp", forking_before(os.posix_spawnp))
    monkeypatch.setattr(subprocess, "_fork_exec", forking_before(subprocess._fork_exec))  # type: ignore[attr-defined]
    times, heard = Times(), list[Notice]()
    source = slurm(times, program(tmp_path, f'echo "JobId=42 EndTime={local(NOW_S + 60)}"'))
    asking = threading.Thread(target=lambda: heard.extend(source.poll()), daemon=True)
    asking.start()
    asking.join(20.0)
    try:
        assert not asking.is_alive()
        assert [one.source for one in heard] == ["slurm time limit"]
        assert len(workers) == 1
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"job 42: .*No such file"):
        list(slurm(Times(), tmp_path / "absent").poll())


@pytest.mark.parametrize("end", ["", "0", "soon", "-5", "1e9", "²"])
def test_an_end_that_is_no_number_is_asked_for(tmp_path: Path, end: str) -> None:
    times = Times()
    source = slurm(times, program(tmp_path, f'echo "JobId=42 EndTime={local(NOW_S + 50)}"'), SLURM_JOB_END_TIME=end)

    assert [notice.deadline_s for notice in source.poll()] == [pytest.approx(1_050.0)]


def test_the_end_of_another_job_long_ago_is_no_notice(tmp_path: Path) -> None:
    times = Times()

    with pytest.raises(SourceError, match="is said to be over for 9000 s"):
        list(slurm(times, tmp_path / "absent", SLURM_JOB_END_TIME=f"{NOW_S - 9_000:.0f}").poll())


# -- a function of the user's, and the watcher -------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "deadline_s"), [(True, None), (90.0, 1_090.0), (5, 1_005.0), (-3.0, 1_000.0), (math.inf, None)]
)
def test_a_check_gives_notice_with_the_seconds_that_it_knows(said: float, deadline_s: float | None) -> None:
    (notice,) = CheckSource(lambda: said, clock=fixed_clock).poll()

    assert (notice.source, notice.deadline_s) == ("callable", deadline_s)


PLAIN = [
    (np.True_, None),
    (np.int64(30), 1_030.0),
    (np.float32(30), 1_030.0),
    (np.array(30), 1_030.0),
    (np.array([True]), None),
    (torch.tensor(True), None),
    (torch.tensor(30), 1_030.0),
    (torch.tensor(30.0, dtype=torch.bfloat16), 1_030.0),
    (Fraction(61, 2), 1_030.5),
    (Decimal(30), 1_030.0),
    (10**400, None),
]


@pytest.mark.parametrize(("said", "deadline_s"), PLAIN, ids=[repr(said)[:20] for said, _ in PLAIN])
def test_a_check_is_taken_by_its_meaning(said: Any, deadline_s: float | None) -> None:
    assert [one.deadline_s for one in CheckSource(lambda: said, clock=fixed_clock).poll()] == [deadline_s]


@pytest.mark.parametrize("said", [None, False, 0.0, np.False_, np.int64(0), np.float32(0), torch.tensor(False), [], ""])
def test_a_check_that_says_nothing_gives_no_notice(said: Any) -> None:
    assert list(CheckSource(lambda: said).poll()) == []


@pytest.mark.parametrize("said", ["yes", [1], object(), timedelta(seconds=30)])
def test_a_check_that_says_something_odd_gives_notice_without_a_time_and_is_complained_of_once(
    caplog: pytest.LogCaptureFixture, said: Any
) -> None:
    heard: list[Notice] = []
    watcher = Watcher(CheckSource(lambda: said), heard.append, poll_s=5.0)

    for _ in range(3):
        watcher.ask()

    assert [one.deadline_s for one in heard] == [None]
    assert len(caplog.messages) == 1
    assert f"check returned {said!r}; it must return None, False, True or the seconds left" in caplog.messages[0]


@pytest.mark.parametrize("said", [math.nan, -math.inf, np.float32("nan"), -(10**400), torch.ones(2), np.ones(2)])
def test_a_check_that_says_nonsense_gives_no_notice(said: Any) -> None:
    with pytest.raises(SourceError, match="check returned"):
        list(CheckSource(lambda: said).poll())


class Scripted:
    """A source that does one thing after another."""

    name = "scripted"

    def __init__(self, *steps: Callable[[], list[Notice]]) -> None:
        self.steps = list(steps)

    def poll(self) -> list[Notice]:
        return self.steps.pop(0)()


def failing() -> list[Notice]:
    raise RuntimeError("disk on fire")


def test_a_failing_source_warns_once_per_outage_and_says_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher(Scripted(failing, failing, failing, list, failing), print, poll_s=5.0)

    with caplog.at_level(logging.DEBUG, "cloudckpt.preemption.notices"):
        for _ in range(5):
            watcher.ask()

    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG", "INFO", "WARNING"]
    assert "disk on fire" in caplog.messages[0]


def test_a_source_whose_error_has_no_text_is_asked_on(caplog: pytest.LogCaptureFixture) -> None:
    def mute() -> list[Notice]:
        raise type("MuteError", (Exception,), {"__repr__": lambda _: 1 // 0})

    watcher = Watcher(Scripted(mute, list), print, poll_s=5.0)
    watcher.ask()
    watcher.ask()
    assert "MuteError, whose text fails with ZeroDivisionError" in caplog.messages[0]


def test_a_check_that_returns_what_has_no_text_is_heard() -> None:
    odd = type("Odd", (), {"__repr__": lambda _: 1 // 0, "__bool__": lambda _: True})
    assert next(iter(CheckSource(odd).poll())).deadline_s is None


def test_a_failing_source_is_asked_less_and_less_often_up_to_a_bound() -> None:
    watcher = Watcher(Scripted(*[failing] * 6, list), print, poll_s=4.0)

    waits_s = []
    for _ in range(7):
        watcher.ask()
        waits_s.append(watcher.wait_s)

    assert waits_s == [8.0, 16.0, 20.0, 20.0, 20.0, 20.0, 4.0]


def said(deadline_s: float | None, reason: str = "r") -> list[Notice]:
    return [Notice(source="scripted", reason=reason, deadline_s=deadline_s, received_s=0.0)]


def test_what_a_source_goes_on_saying_is_one_notice_until_it_has_once_not_said_it() -> None:
    answers = [said(90.0), said(95.0), said(89.5), said(60.0), failing, said(70.0), [], said(200.0), said(None)]
    steps = [answer if callable(answer) else lambda answer=answer: answer for answer in answers]
    heard: list[Notice] = []
    watcher = Watcher(Scripted(*steps), heard.append, poll_s=5.0)

    for _ in answers:
        watcher.ask()

    assert [one.deadline_s for one in heard] == [90.0, 60.0, 200.0]


def test_an_end_that_was_postponed_is_heard_once_the_first_has_passed() -> None:
    answers = [(80.0, 90.0), (85.0, 200.0), (91.0, 200.0), (95.0, 201.0), (200.5, 200.9), (205.0, None), (206.0, 300.0)]
    steps = [lambda deadline_s=deadline_s: said(deadline_s) for _, deadline_s in answers]
    heard: list[Notice] = []
    now_s = 0.0
    watcher = Watcher(Scripted(*steps), heard.append, poll_s=5.0, clock=lambda: now_s)

    for now_s, _ in answers:  # noqa: B007
        watcher.ask()

    assert [one.deadline_s for one in heard] == [90.0, 200.0, 300.0]


def test_a_source_that_hangs_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    clock, release, is_asked = Turned(), threading.Event(), threading.Event()

    def hang() -> list[Notice]:
        is_asked.set()
        release.wait()
        return []

    watcher = Watcher(Scripted(hang), print, poll_s=5.0, clock=clock)
    asking = threading.Thread(target=watcher.ask)
    asking.start()
    is_asked.wait()
    for clock.now_s in (1_060.0, 1_061.0, 1_100.0):
        watcher.look()
    release.set()
    asking.join()
    watcher.look()

    assert caplog.messages == [
        "scripted has not answered for 61 s, so a notice of its is not heard; it must return in bounded time"
    ]


def test_a_source_that_hangs_delays_no_other(server: MetadataServer) -> None:
    server.answers[PREEMPTED] = Answer(b"TRUE", first_wait_s=60.0)
    heard: list[Notice] = []
    sources: list[NoticeSource] = [GceSource(endpoint=server.url, timeout_s=60.0), CheckSource(lambda: True)]
    watchers = [Watcher(source, heard.append, poll_s=0.01) for source in sources]

    for watcher in watchers:
        watcher.start()
    while not heard:
        time.sleep(0.001)
    for watcher in watchers:
        watcher.stop()
    server.closing.set()

    assert heard[0].source == "callable"
    assert [watcher.join(30.0) for watcher in watchers] == [True, True]


def test_seconds_left_never_fall_below_none_at_all() -> None:
    notice = Notice(source="x", reason="y", deadline_s=50.0, received_s=20.0)
    timeless = Notice(source="x", reason="y", deadline_s=None, received_s=20.0)

    assert [notice.seconds_left(now_s) for now_s in (20.0, 49.5, 51.0)] == [30.0, 0.5, 0.0]
    assert timeless.seconds_left(20.0) is None


def test_the_server_of_these_tests_refuses_what_the_real_one_refuses(server: MetadataServer) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    statuses = []
    for verb, path in [("GET", ACTION), ("PUT", TOKEN), ("GET", PREEMPTED)]:
        connection.request(verb, path)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()

    assert statuses == [401, 400, 403]
    assert utc(1_505_722_920.0) == "2017-09-18T08:22:00Z"
