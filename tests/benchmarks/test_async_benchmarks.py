"""The benchmark of background saves measures what it says: the state at the call, whole times, ratios of one run."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from benchmarks import async_saves
from benchmarks.background import process as async_process
from benchmarks.background.peers import AsyncPeerKind
from benchmarks.background.process import AsyncSpec, Blocked, Lost, Memory, Outcome, Save, measure_async
from benchmarks.background.report import AsyncResults, AsyncRow, goals_of, lost_s, step_ratio, table
from benchmarks.background.yardstick import _host_copy, opened_yardstick
from benchmarks.peers import Place
from benchmarks.shared.child import MeasurementError
from benchmarks.shared.states import STATES, State, build, bytes_of
from benchmarks.sink.process import SinkClient, running_sink
from benchmarks.sink.wire import Connection, Gate, Link

MIB = 1 << 20
GIB = 1 << 30
SIZE = 4 * MIB


@pytest.fixture
def sink() -> Iterator[SinkClient]:
    with running_sink(64 * MIB) as client:
        yield client


def spec_of(part: str, peer: str, url: str, **how: Any) -> AsyncSpec:
    return AsyncSpec(part=part, peer=peer, url=url, size_bytes=SIZE, saves=2, idle_steps=3, width=32, **how)


# ---- what is saved is the state at the call -------------------------------------------------------------------------


class _Late:
    """A peer that does not copy the state, and writes it down only when it is waited for."""

    def __init__(self, place: Place, budget_bytes: int) -> None:
        self._saved: dict[int, State] = {}

    def prepare(self, state: State) -> None:
        """Nothing."""

    def save(self, step: int, state: State) -> _Late:
        self._saved[step] = state
        return self

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> None:
        self._saved = {step: {n: t.clone() for n, t in state.items()} for step, state in self._saved.items()}

    def load(self, step: int, state: State) -> None:
        for name, tensor in state.items():
            tensor.copy_(self._saved[step][name])

    def close(self) -> None:
        """Nothing."""


class _Prompt(_Late):
    """The same, with a copy made before `save` returns."""

    def save(self, step: int, state: State) -> _Late:
        return super().save(step, {name: tensor.clone() for name, tensor in state.items()})


class _Forgetful(_Prompt):
    """Loads the checkpoint but for one value."""

    def load(self, step: int, state: State) -> None:
        super().load(step, state)
        state["ln_f.bias"][0] += 1


def measured_here(monkeypatch: pytest.MonkeyPatch, kind: type[_Late], part: str) -> dict[str, Any]:
    monkeypatch.setitem(async_process.ASYNC_PEERS, "fake", AsyncPeerKind(title="fake", open=kind))  # type: ignore[arg-type]
    return async_process._measure_here(spec_of(part, "fake", "anywhere"))


def test_a_peer_that_lets_the_state_change_before_it_has_a_copy_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match=r"tensors were not restored, for example wte\.weight"):
        measured_here(monkeypatch, _Late, "blocked")
    assert len(measured_here(monkeypatch, _Prompt, "blocked")["saves"]) == 2


@pytest.mark.parametrize("part", ["blocked", "lost", "memory"])
def test_a_checkpoint_with_one_wrong_value_is_no_number(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match=r"1 tensors were not restored, for example ln_f\.bias"):
        measured_here(monkeypatch, _Forgetful, part)


@pytest.mark.slow
def test_the_dcp_peer_writes_to_the_sink_and_its_saves_are_counted(sink: SinkClient) -> None:
    options = {"key": "any", "secret": "any", "endpoint_url": sink.endpoint_url}
    options |= {"client_kwargs": {"region_name": "us-east-1"}}
    found = measure_async(
        spec_of("lost", "dcp", "s3://bench/place", storage_options=options, stats_url=sink.endpoint_url)
    )
    assert isinstance(found, Lost)
    assert found.state_bytes == bytes_of(STATES["gpt"].shapes(SIZE))
    assert [len(save.idle_s) for save in found.saves] == [3, 3]
    assert all(0 < save.blocked_s <= save.total_s for save in found.saves)
    assert all(sum(save.steps_s) <= save.total_s for save in found.saves)
    own = [size for key, size in sink.objects().items() if key.startswith("bench/place/")]
    assert 2 * found.state_bytes <= sum(own) < 2.2 * found.state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("part", ["blocked", "memory"])
def test_a_peer_that_fails_is_named_with_its_last_words(part: str) -> None:
    with pytest.raises(MeasurementError, match=rf"nobody {part}: KeyError: 'nobody'"):
        measure_async(spec_of(part, "nobody", "anywhere"))


# ---- the yardstick and the limit ------------------------------------------------------------------------------------


def test_the_copy_that_saves_are_compared_with_copies_every_byte() -> None:
    state = build(STATES["gpt"].shapes(SIZE)) | {"odd": torch.arange(20 * MIB + 3, dtype=torch.int32).to(torch.uint8)}
    with ThreadPoolExecutor(2) as pool:
        copy = _host_copy(state, pool)
        copy()
    expected = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in state.values()])
    assert torch.equal(copy.buffer, expected)  # type: ignore[attr-defined]
    with opened_yardstick({"odd": state["odd"]}) as copy_s:
        assert copy_s() > 0


def test_a_gate_lets_through_what_its_rate_allows_and_lets_a_late_sleep_be_caught_up() -> None:
    now_s, slept_s = [100.0], []

    def sleep(seconds: float) -> None:
        slept_s.append(round(seconds, 6))
        now_s[0] += seconds

    gate = Gate(100e6, clock=lambda: now_s[0], sleep=sleep)
    gate.take(1_000_000)
    gate.take(1_000_000)
    now_s[0] += 5.0
    gate.take(3_000_000)  # however long nothing passed, 10 ms are given back
    assert slept_s == [0.01, 0.01, 0.02]


class _Counting(Gate):
    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, moved_bytes: int) -> None:
        self.taken.append(moved_bytes)


def test_every_byte_that_a_connection_receives_passes_the_gate_in_small_slices() -> None:
    gate, size = _Counting(), 3 * MIB + 5
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    with far, near, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(far.sendall, bytes(size))
        Connection(near, Link(gate=gate)).fill(memoryview(bytearray(size)))
        sent.result()
    assert (sum(gate.taken), max(gate.taken) <= 256 * 1024) == (size, True)


def test_a_sink_with_a_limit_and_a_low_priority_stores_what_two_connections_put() -> None:
    with running_sink(64 * MIB, total_mb_per_s=100, nice=5) as limited, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(put, [limited] * 2, ["one", "two"])) == [200, 200]
        assert limited.objects() == {"bench/one": MIB, "bench/two": MIB}


def test_a_drained_sink_takes_in_large_bodies_whole_and_keeps_none_of_their_bytes_but_all_of_small_ones(
    sink: SinkClient,
) -> None:
    small, large = b"s" * MIB, b"l" * (9 * MIB)
    with sink.drained():
        assert [put(sink, "small", small), put(sink, "large", large)] == [200, 200]
    assert put(sink, "kept", large) == 200
    assert sink.objects() == {"bench/small": MIB, "bench/large": 9 * MIB, "bench/kept": 9 * MIB}
    assert sink.stats().received_bytes == 19 * MIB
    assert (get(sink, "small"), get(sink, "kept")) == (small, large)
    assert get(sink, "large") != large


def put(sink: SinkClient, key: str, body: bytes = bytes(MIB)) -> int:
    with closing(HTTPConnection(urlsplit(sink.endpoint_url).netloc)) as connection:
        connection.request("PUT", f"/bench/{key}", body=body)
        return connection.getresponse().status


def get(sink: SinkClient, key: str) -> bytes:
    with closing(HTTPConnection(urlsplit(sink.endpoint_url).netloc)) as connection:
        connection.request("GET", f"/bench/{key}")
        return connection.getresponse().read()


# ---- tables and goals -----------------------------------------------------------------------------------------------


def beside(blocked_s: float, slow_s: float) -> Save:
    return Save(blocked_s=blocked_s, total_s=9.0, steps_s=[0.1 + slow_s] * 4, idle_s=[0.1, 0.1, 0.1])


def rows_of(**runs: Outcome) -> list[AsyncRow]:
    return [AsyncRow(peer=peer.replace("_", "-"), title=peer, runs=[run]) for peer, run in runs.items()]


def test_lost_time_is_the_blocked_time_and_what_steps_took_above_an_idle_one() -> None:
    assert lost_s(beside(0.5, 0.05)) == pytest.approx(0.5 + 4 * 0.05)
    assert step_ratio(beside(0.5, 0.05)) == pytest.approx(1.5)
    assert step_ratio(Save(blocked_s=0.5, total_s=0.5, idle_s=[0.1])) is None


def test_lost_goals_are_against_stock_dcp_of_the_same_run_first_and_later_saves_apart() -> None:
    ours = Lost(state_bytes=GIB, saves=[beside(0.6, 0), beside(0.2, 0.05)])
    theirs = Lost(state_bytes=GIB, saves=[beside(1, 0.25), beside(1, 0.75)])
    results = AsyncResults(kind="lost", title="t", target="s3sink", rows=rows_of(cloudckpt_obstore=ours, dcp=theirs))
    later, first = goals_of([results])
    assert (later.found, first.found) == (pytest.approx(0.4 / 4), pytest.approx(0.6 / 2))
    assert (later.is_met, first.is_met) == (True, False)
    assert "| 0.10 |" in table(results).splitlines()[4]


def test_blocked_times_are_in_copies_made_just_before_them() -> None:
    def run(*saves: tuple[float, float]) -> Blocked:
        return Blocked(
            state_bytes=GIB, saves=[Save(copy_s=copy, blocked_s=blocked, total_s=1) for copy, blocked in saves]
        )

    runs = [run((0.1, 0.2), (0.1, 0.12)), run((0.2, 0.6), (0.1, 0.13))]
    row = AsyncRow(peer="cloudckpt", title="ours", runs=runs)
    results = AsyncResults(kind="blocked", title="t", target="local", rows=[row, AsyncRow(peer="dcp", title="dcp")])
    later, first = goals_of([results])
    assert (later.found, first.found) == (pytest.approx(1.25), pytest.approx(2.5))
    lines = table(results).splitlines()
    assert "| **2.50** (2.00–3.00) | **0.125** (0.120–0.130) | **1.25** (1.20–1.30) |" in lines[4]
    assert lines[5] == "| dcp | – | – | – | – | – | – |"


@pytest.mark.parametrize(
    ("budget_bytes", "allowed_mib", "is_met"), [(0, 1024 + 64, True), (256 * MIB, 256 + 64, False)]
)
def test_memory_goals_are_the_budget_or_the_state_and_64_mib(budget_bytes: int, allowed_mib: int, is_met: bool) -> None:
    run = Memory(state_bytes=GIB, peaks_bytes=[1000 * MIB, 1050 * MIB], budget_bytes=budget_bytes)
    results = AsyncResults(kind="memory", title="t", target="s3sink", rows=rows_of(cloudckpt_obstore=run, dcp=run))
    (goal,) = goals_of([results])
    assert (goal.wanted, goal.found, goal.is_met) == (allowed_mib, 1050, is_met)


def test_memory_is_flat_from_the_fifth_save_on() -> None:
    peaks = [100 * MIB, 130 * MIB, 150 * MIB, 150 * MIB, 160 * MIB, 170 * MIB, 177 * MIB]
    run = Memory(state_bytes=GIB, peaks_bytes=peaks, saves=[Save(blocked_s=1, total_s=1)])
    results = AsyncResults(kind="flat", title="t", target="s3sink", rows=rows_of(cloudckpt_obstore=run))
    (goal,) = goals_of([results])
    assert (goal.found, goal.is_met) == (17, False)
    assert "| 100 | 160 | 177 | 7 |" in table(results)


def test_a_peer_that_failed_is_named_and_meets_no_goal() -> None:
    row = AsyncRow(peer="cloudckpt-obstore", title="ours", failure="it broke")
    results = AsyncResults(kind="limited", title="t", target="s3limited", rows=[row])
    assert goals_of([results]) == []
    assert table(results).endswith("- **ours failed**: it broke")


# ---- the command ----------------------------------------------------------------------------------------------------


def run_command(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    output = tmp_path / "out.json"
    common = ["--quick", "--size", "2MiB", "--flat-size", "1MiB", "--directory", str(tmp_path), "--json", str(output)]
    assert async_saves.main([*common, *arguments]) == 0
    results: list[dict[str, Any]] = json.loads(output.read_text())
    return results


def test_a_part_without_its_device_is_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = run_command(tmp_path, "--parts", "gpu")
    assert (found["skipped"], found["rows"]) == ("torch finds no CUDA device here", [])
    assert "Skipped: torch finds no CUDA device here." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["s3sink", "local"])
def test_quick_benchmark_measures_stock_dcp_in_every_part(target: str, tmp_path: Path) -> None:
    found = run_command(
        tmp_path, "--parts", "blocked,lost,limited,memory", "--peers", "dcp,dcp-kept", "--target", target
    )
    counts = {result["kind"]: {row["peer"]: len(row["runs"]) for row in result["rows"]} for result in found[:4]}
    kinds = ("blocked", "lost", "limited")
    assert {kind: counts[kind] for kind in kinds} == {kind: {"dcp": 1, "dcp-kept": 1} for kind in kinds}
    assert [len(row["runs"][0]["peaks_bytes"]) for row in found[-1]["rows"]] == [6, 6]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("forked_measurements")
def test_quick_benchmark_measures_cloudckpt_on_disk(tmp_path: Path) -> None:
    found = run_command(tmp_path, "--parts", "blocked", "--peers", "cloudckpt", "--target", "local")
    assert [(row["peer"], len(row["runs"][0]["saves"])) for row in found[0]["rows"]] == [("cloudckpt", 2)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quick_benchmark_measures_cloudckpt_in_every_part(tmp_path: Path) -> None:
    found = run_command(
        tmp_path,
        *("--parts", "blocked,lost,limited,limited-tls,memory"),
        *("--peers", "cloudckpt-obstore,cloudckpt-obstore-unprepared"),
    )
    assert [row["failure"] for result in found for row in result["rows"]] == [""] * 14


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        async_saves.main(["--parts", "blocked,everything"])
    assert caught.value.code == 2
    assert "everything unknown; choose from blocked, lost" in capsys.readouterr().err
