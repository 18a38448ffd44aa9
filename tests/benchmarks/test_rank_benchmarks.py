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
from benchmarks import overhead, run
from benchmarks.peers import PEERS
from benchmarks.shared.states import STATES, Shapes, build, bytes_of, differences
from benchmarks.sink.process import SinkClient, running_sink
from benchmarks.speed.process import Measurement, MeasurementError, Saves, Spec, measure, phases_of
from tests.ranks.processes import run as run_ranks

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


def shapes_of(size: int) -> Shapes:
    return STATES["gpt"].shapes(size)


def parts_that_differ(shapes: Shapes) -> tuple[list[str], list[str]]:
    state, whole = build(shapes, "fsdp"), build(shapes)
    joined = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()
    }
    return [name for name in shapes if not torch.equal(joined[name], whole[name])], differences(state, shapes, "fsdp")


def test_the_parts_of_three_ranks_make_up_the_state_that_a_ddp_rank_holds() -> None:
    shapes = {
        "uneven": (7, 3),
        "one_row": (1, 5),
        "even": (6, 2),
        "step": (),
    }  # two ranks of three have no part of one_row
    assert run_ranks(3, parts_that_differ, shapes) == [([], [])] * 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_leave_the_whole_state_in_the_sink_once_and_load_it_back(sink: SinkClient) -> None:
    url, options, shapes = "s3://bench/place", options_of(sink), shapes_of(SIZE)
    spec = Spec(
        peer="cloudckpt-obstore",
        op="save",
        url=url,
        state="gpt",
        ranks=2,
        size_bytes=SIZE,
        storage_options=options,
        stats_url=sink.endpoint_url,
    )
    saved = measure(spec)
    own = {key: size for key, size in sink.objects().items() if key.startswith("bench/place/")}
    shards = [size for key, size in own.items() if key.endswith(".safetensors")]
    assert saved.state_bytes == bytes_of(shapes)
    assert saved.received_bytes == sum(own.values())  # what the ranks put is what is there
    assert len(shards) >= 2
    assert 0 <= sum(shards) - saved.state_bytes < 128 * 1024  # the rest is their headers
    assert saved.requests is not None
    assert saved.requests["PutObject"] >= 4  # a shard of each rank, index, manifest
    assert differences(named(cloudckpt.read(f"{url}/step-0", storage_options=options)), shapes) == []

    loaded = measure(replace(spec, op="load"))  # compares what each rank got
    assert loaded.sent_bytes is not None
    assert loaded.state_bytes <= loaded.sent_bytes < 1.2 * loaded.state_bytes


def named(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        flat |= named(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_measurement_with_its_last_words(sink: SinkClient) -> None:
    spec = Spec(peer="nobody", op="save", url="s3://bench/place", ranks=2, size_bytes=MIB)
    with pytest.raises(MeasurementError, match=r"nobody save: rank [01]: .*KeyError: 'nobody'"):
        measure(spec)


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_are_stored_once_by_every_peer(tmp_path: Path) -> None:
    names = ["cloudckpt-obstore", "cloudckpt-fsspec", "dcp", "s3torchconnector"]
    words = ["--quick", "--size", "16MiB", "--targets", "s3sink", "--ranks", "2", "--layout", "ddp"]
    # Weights alone: around each of AdamW's small tensors torch.save puts more than their bytes.
    assert run.main([*words, "--states", "gpt", "--peers", ",".join(names), "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert (found["case"]["layout"], found["case"]["ranks"]) == ("ddp", 2)
    measured = [row for row in found["rows"] if PEERS[row["peer"]].is_installed]
    assert {row["peer"] for row in measured} >= set(names[:3])
    for row in measured:
        save, load = (row["runs"][op][0] for op in ("save", "load"))
        assert 1.0 <= save["received_bytes"] / save["state_bytes"] < 1.1
        assert load["sent_bytes"] >= load["state_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["s3sink", "local"])
def test_the_overhead_of_a_save_is_measured_on_four_ranks(target: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = ["--saves", "3", "--runs", "1", "--target", target, "--json", str(output)]
    peers = "cloudckpt,cloudckpt-obstore,dcp"
    assert overhead.main([*arguments, "--directory", str(tmp_path), "--peers", peers]) == 0
    found = json.loads(output.read_text())
    assert found["ranks"] == 4
    assert [len(row["turns"][0]["wall_s"]) for row in found["overhead"]] == [3, 3]


def test_peers_take_turns_and_one_that_fails_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def measured(spec: Spec) -> Measurement:
        calls.append((spec.peer, spec.op))
        if spec.peer == "dcp" and spec.op == "load":
            raise MeasurementError("it broke")
        return Measurement(state_bytes=10**9, wall_s=0.5, cpu_s=0.5, extra_bytes=3 * MIB)

    monkeypatch.setattr(run, "measure", measured)
    arguments = ["--targets", "local", "--ranks", "2", "--runs", "2", "--size", "16MiB", "--peers", "cloudckpt,dcp"]
    assert run.main([*arguments, "--directory", str(tmp_path)]) == 1
    ours, theirs = [("cloudckpt", "save"), ("cloudckpt", "load")], [("dcp", "save"), ("dcp", "load")]
    assert calls == [*ours, *theirs, *ours]
    assert "- **stock DCP failed**: it broke" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_has_a_row_among_the_overheads_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(overhead.PEERS, "dcp", replace(PEERS["dcp"], package="no_such_package"))
    monkeypatch.setattr(overhead, "count_saves", lambda spec: Saves(wall_s=[0.5, 0.5], phases=[], requests=None))
    assert overhead.main(["--target", "local", "--directory", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[-2].startswith("| cloudckpt (fsync of every shard) | **")
    assert rows[-1].startswith("| stock DCP; not installed: no_such_package | – | – | – |")


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_overhead_table_tells_first_and_later_saves_and_whatever_phases_the_peer_tells() -> None:
    told = [{"plan_s": 0.5, "commit_s": 0.25}, {"plan_s": 0.001, "commit_s": 0.002}, {"plan_s": 0.003}]
    rows = [
        overhead.OverheadRow(
            peer="a", title="ours", turns=[Saves(wall_s=[1.0, 0.01, 0.03], phases=told, requests=7.0)]
        ),
        overhead.OverheadRow(peer="b", title="other", failure="it broke"),
    ]
    lines = overhead.overhead_table(rows, "local").splitlines()
    assert lines[2] == "| peer | first ms | later ms | requests per later save | plan ms | commit ms |"
    assert lines[4] == "| ours | **1000.0** (1000–1000) | **20.0** (10–30) | 7.0 | 500.0 / 2.0 | 250.0 / 2.0 |"
    assert lines[5] == "| other | – | – | – | – | – |"
    assert lines[-1] == "- **other failed**: it broke"


def test_phases_are_what_a_summary_tells_in_seconds() -> None:
    summary = {"seconds": 2.0, "bytes_per_s": 1e9, "requests": 6.0, "plan_s": 0.5, "upload_s": 1.0}
    assert phases_of(summary) == {"plan_s": 0.5, "upload_s": 1.0}


@pytest.mark.parametrize(("command", "option"), [(run, "--targets"), (overhead, "--target")])
def test_a_peer_that_cannot_write_to_the_target_is_refused_by_name(command: Any, option: str) -> None:
    with pytest.raises(SystemExit, match="none of dcp-unsigned can save so; choose from cloudckpt"):
        command.main([option, "local", "--peers", "dcp-unsigned"])
