"""The benchmark of several ranks measures what it says: whole states, all ranks, ratios of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from benchmarks import ranks
from benchmarks.many_ranks.process import (
    RankMeasurement,
    RankSpec,
    Saves,
    _differences,
    _state,
    bytes_of,
    measure_ranks,
    phases_of,
)
from benchmarks.one_process.measure import MeasurementError
from benchmarks.shared.report import Results, Row
from benchmarks.shared.states import shapes_of
from benchmarks.sink.process import SinkClient, running_sink
from tests.ranks.processes import run

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def sink() -> Iterator[SinkClient]:
    with running_sink(64 * MIB) as client:
        yield client


def options_of(sink: SinkClient) -> dict[str, Any]:
    return {
        "key": "any",
        "secret": "any",
        "endpoint_url": sink.endpoint_url,
        "client_kwargs": {"region_name": "us-east-1"},
    }


# ---- what is saved is the state -------------------------------------------------------------------------------------


def parts_that_differ(shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    state, whole = _state(shapes, "fsdp"), _state(shapes, "ddp")
    joined = {name: tensor.full_tensor() for name, tensor in state.items()}  # type: ignore[attr-defined]
    return [name for name in shapes if not torch.equal(joined[name], whole[name])], _differences(state, shapes, "fsdp")


def test_the_parts_of_three_ranks_make_up_the_state_that_a_ddp_rank_holds() -> None:
    shapes = {"uneven": (7, 3), "one_row": (1, 5), "even": (6, 2)}  # two ranks of three have no part of one_row
    assert run(3, parts_that_differ, shapes) == [([], [])] * 3


def test_one_flipped_bit_and_a_blank_tensor_are_differences() -> None:
    shapes = shapes_of(MIB)
    state, blank = _state(shapes, "ddp"), _state(shapes, "ddp", is_blank=True)
    assert _differences(state, shapes, "ddp") == []
    assert _differences(blank, shapes, "ddp") == list(shapes)
    state["wte.weight"].view(torch.int32).view(-1)[-1] ^= 1
    state["ln_f.bias"] = blank["ln_f.bias"]
    assert _differences(state, shapes, "ddp") == ["wte.weight", "ln_f.bias"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_leave_the_whole_state_in_the_sink_once_and_load_it_back(sink: SinkClient) -> None:
    url, options, shapes = "s3://bench/place", options_of(sink), shapes_of(SIZE)
    spec = RankSpec(
        peer="cloudckpt-obstore",
        op="save",
        layout="fsdp",
        url=url,
        ranks=2,
        size_bytes=SIZE,
        storage_options=options,
        stats_url=sink.endpoint_url,
    )
    saved = measure_ranks(spec)
    own = {key: size for key, size in sink.objects().items() if key.startswith("bench/place/")}
    shards = [size for key, size in own.items() if key.endswith(".safetensors")]
    assert saved.state_bytes == bytes_of(shapes)
    assert saved.moved_bytes == sum(own.values())  # what the ranks put is what is there
    assert len(shards) >= 2
    assert 0 <= sum(shards) - saved.state_bytes < 128 * 1024  # the rest is their headers
    assert saved.requests is not None
    assert saved.requests["PutObject"] >= 4  # a shard of each rank, index, manifest
    assert _differences(named(cloudckpt.read(f"{url}/step-0", storage_options=options)), shapes, "ddp") == []

    loaded = measure_ranks(replace(spec, op="load"))  # compares what each rank got
    assert loaded.moved_bytes is not None
    assert loaded.state_bytes <= loaded.moved_bytes < 1.2 * loaded.state_bytes
    row = Row(peer="cloudckpt-obstore", title="ours", runs={"save": [saved], "load": [loaded]})
    rows = {"cloudckpt-obstore": row, "dcp": replace(row, peer="dcp"), "s3torchconnector": replace(row)}
    cells = ranks.table(Results(target="s3sink", rows=rows)).splitlines()[4].split(" | ")
    assert (cells[2:4], cells[9:11]) == (["1.0", "1.0"], ["1.0", "1.0"])


def named(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        flat |= named(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_measurement_with_its_last_words(sink: SinkClient) -> None:
    spec = RankSpec(peer="nobody", op="save", layout="ddp", url="s3://bench/place", ranks=1, size_bytes=MIB)
    with pytest.raises(MeasurementError, match=r"nobody save: rank 0: .*KeyError: 'nobody'"):
        measure_ranks(spec)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_are_stored_once_by_every_peer(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert ranks.main(["--quick", "--bytes", "16MiB", "--layout", "ddp", "--json", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["layout"], found["ranks"]) == ("ddp", 2)
    assert len(found["rows"]) == 4
    measured = [row for row in found["rows"] if ranks.RANK_PEERS[row["peer"]].is_installed]
    assert {row["peer"] for row in measured} >= {"cloudckpt-obstore", "cloudckpt-fsspec", "dcp"}
    for row in measured:
        save, load = (row["runs"][op][0] for op in ("save", "load"))
        assert 1.0 <= save["moved_bytes"] / save["state_bytes"] < 1.1
        assert load["moved_bytes"] >= load["state_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["s3sink", "local"])
def test_the_overhead_of_a_save_is_measured_on_four_ranks(target: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = ["--overhead", "--quick", "--saves", "3", "--target", target, "--json", str(output)]
    assert ranks.main([*arguments, "--directory", str(tmp_path), "--peers", "cloudckpt,cloudckpt-obstore,dcp"]) == 0
    found = json.loads(output.read_text())
    assert found["ranks"] == 4
    assert [len(row["turns"][0]["wall_s"]) for row in found["overhead"]] == [3, 3]


def test_peers_take_turns_and_one_that_fails_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def measured(spec: RankSpec) -> RankMeasurement:
        calls.append((spec.peer, spec.op))
        if spec.peer == "dcp" and spec.op == "load":
            raise MeasurementError("it broke")
        return took(0.5)

    monkeypatch.setattr(ranks, "measure_ranks", measured)
    arguments = ["--target", "local", "--runs", "2", "--bytes", "16MiB", "--directory", str(tmp_path)]
    assert ranks.main(arguments) == 1
    printed = capsys.readouterr().out
    assert calls == [
        ("cloudckpt", "save"),
        ("cloudckpt", "load"),
        ("dcp", "save"),
        ("dcp", "load"),
        ("cloudckpt", "save"),
        ("cloudckpt", "load"),
    ]
    assert "- ranks: 2 processes of one gloo group" in printed
    assert "- **stock DCP failed**: it broke" in printed


@pytest.mark.parametrize("mode", [[], ["--overhead"]])
def test_a_peer_that_is_not_installed_has_a_row_that_says_so_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: list[str]
) -> None:
    monkeypatch.setitem(ranks.RANK_PEERS, "dcp", replace(ranks.RANK_PEERS["dcp"], package="no_such_package"))
    monkeypatch.setattr(ranks, "measure_ranks", lambda spec: took(0.5))
    monkeypatch.setattr(ranks, "count_saves", lambda spec: Saves(wall_s=[0.5, 0.5], phases=[], requests=None))
    assert ranks.main(["--target", "local", "--quick", "--directory", str(tmp_path), *mode]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[-2].startswith("| cloudckpt (fsync of every shard) | **")
    assert rows[-1].startswith("| stock DCP; not installed: no_such_package | – | – | – |")


# ---- tables ---------------------------------------------------------------------------------------------------------


def took(seconds: float) -> RankMeasurement:
    return RankMeasurement(
        state_bytes=10**9,
        wall_s=seconds,
        cpu_s=0.5,
        extra_bytes=3 * MIB,
        requests={"PutObject": 4},
        moved_bytes=15 * 10**8,
    )


def test_table_shows_ratios_against_dcp_and_the_fastest_connector_and_bytes_in_checkpoints() -> None:
    seconds = {"cloudckpt-obstore": 0.5, "dcp": 4.0, "s3torchconnector": 2.0, "s3torchconnector-t4": 1.0}
    rows = {
        name: Row(peer=name, title=name, runs={"save": [took(s)], "load": [took(2 * s)]}) for name, s in seconds.items()
    }
    lines = ranks.table(Results(target="s3sink", rows=rows)).splitlines()
    save = "**2.00** (2.00–2.00) | 8.0 | 2.0 | 0.50 | 3 | 4 | 1.50"
    load = "**1.00** (1.00–1.00) | 8.0 | 2.0 | 0.50 | 3 | 4 | 1.50"
    assert lines[4] == f"| cloudckpt-obstore | {save} | {load} |"
    assert "| 2.0 | 0.5 |" in lines[6]


def test_overhead_table_tells_first_and_later_saves_and_whatever_phases_the_peer_tells() -> None:
    told = [{"plan_s": 0.5, "commit_s": 0.25}, {"plan_s": 0.001, "commit_s": 0.002}, {"plan_s": 0.003}]
    rows = [
        ranks.OverheadRow(peer="a", title="ours", turns=[Saves(wall_s=[1.0, 0.01, 0.03], phases=told, requests=7.0)]),
        ranks.OverheadRow(peer="b", title="other", failure="it broke"),
    ]
    lines = ranks.overhead_table(rows, "local").splitlines()
    assert lines[2] == "| peer | first ms | later ms | requests per later save | plan ms | commit ms |"
    assert lines[4] == "| ours | **1000.0** (1000–1000) | **20.0** (10–30) | 7.0 | 500.0 / 2.0 | 250.0 / 2.0 |"
    assert lines[5] == "| other | – | – | – | – | – |"
    assert lines[-1] == "- **other failed**: it broke"


def test_phases_are_what_a_summary_tells_in_seconds() -> None:
    summary = {"seconds": 2.0, "bytes_per_s": 1e9, "requests": 6.0, "plan_s": 0.5, "upload_s": 1.0}
    assert phases_of(summary) == {"plan_s": 0.5, "upload_s": 1.0}


def test_a_peer_that_cannot_write_to_the_target_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="none of dcp-unsigned writes to local; choose from cloudckpt"):
        ranks.main(["--target", "local", "--peers", "dcp-unsigned"])
