"""The benchmark measures what it says: its sink is a store, its state is checked, its numbers are of real saves."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
import torch
from botocore.config import Config
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import run
from benchmarks.one_process.measure import Measurement, MeasurementError, Spec, measure
from benchmarks.one_process.peers import PEERS, Peer, Place
from benchmarks.shared.report import Results, Row, goals_table, is_met, table
from benchmarks.shared.states import blank, differences, gpt, shapes_of, size_of
from benchmarks.shared.targets import TARGETS
from benchmarks.shared.units import parse_bytes
from benchmarks.sink.arena import Arena, ArenaFullError, Extent
from benchmarks.sink.process import SinkClient, running_sink
from tests.programs import run_to_end

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BUCKET = "bench"


@pytest.fixture(scope="module")
def running() -> Iterator[SinkClient]:
    with running_sink(64 * MIB) as sink:
        yield sink


@pytest.fixture
def sink(running: SinkClient) -> SinkClient:
    running.clear()
    return running


def s3_client(sink: SinkClient, **settings: Any) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=sink.endpoint_url,
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, **settings),
    )


@pytest.fixture
def s3(sink: SinkClient) -> Iterator[Any]:
    client = s3_client(sink)
    yield client
    client.close()


def read(s3: Any, key: str, **how: str) -> bytes:
    with s3.get_object(Bucket=BUCKET, Key=key, **how)["Body"] as body:
        data: bytes = body.read()
    return data


# ---- the sink is a store --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
@pytest.mark.parametrize("size", [0, 1, 4096, 3 * MIB + 17])
def test_sink_gives_back_what_was_put(sink: SinkClient, checksums: str, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    client = s3_client(sink, request_checksum_calculation=checksums)
    client.put_object(Bucket=BUCKET, Key="a/ü b", Body=data[:size])
    assert read(client, "a/ü b") == data[:size]
    assert client.head_object(Bucket=BUCKET, Key="a/ü b")["ContentLength"] == size
    client.close()


@pytest.mark.parametrize(
    ("wanted", "found"), [("bytes=0-0", b"0"), ("bytes=3-5", b"345"), ("bytes=7-", b"789"), ("bytes=-2", b"89")]
)
def test_sink_answers_a_range_with_its_bytes_alone(s3: Any, wanted: str, found: bytes) -> None:
    s3.put_object(Bucket=BUCKET, Key="digits", Body=b"0123456789")
    assert read(s3, "digits", Range=wanted) == found


def test_sink_refuses_a_range_behind_the_end(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="digits", Body=b"0123456789")
    with pytest.raises(ClientError) as caught:
        read(s3, "digits", Range="bytes=10-12")
    assert caught.value.response["Error"]["Code"] == "InvalidRange"


def test_sink_creates_a_key_only_once(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=BUCKET, Key="once", Body=b"second", IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert read(s3, "once") == b"first"


def test_sink_lists_all_pages_and_folds_at_the_delimiter(s3: Any) -> None:
    keys = [f"root/{n:02d}/object" for n in range(5)] + ["root/top", "other"]
    for key in keys:
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="root/", Delimiter="/", MaxKeys=2))
    prefixes = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
    objects = [item["Key"] for page in pages for item in page.get("Contents", [])]
    assert (prefixes, objects, len(pages)) == ([f"root/{n:02d}/" for n in range(5)], ["root/top"], 3)


def test_sink_deletes_one_and_many_and_gives_their_memory_back(sink: SinkClient, s3: Any) -> None:
    for _ in range(4):  # 160 MiB through 64 MiB of memory
        for n in range(4):
            s3.put_object(Bucket=BUCKET, Key=f"k{n}", Body=bytes(10 * MIB))
        s3.delete_object(Bucket=BUCKET, Key="k0")
        s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": f"k{n}"} for n in range(1, 4)]})
        assert sink.stats().objects == 0


def test_sink_joins_the_parts_of_an_upload_in_order(s3: Any) -> None:
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="whole")["UploadId"]
    parts = []
    for number in (2, 1):
        answer = s3.upload_part(
            Bucket=BUCKET, Key="whole", UploadId=upload, PartNumber=number, Body=bytes([number]) * 5000
        )
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    assert "Contents" not in s3.list_objects_v2(Bucket=BUCKET)
    s3.complete_multipart_upload(
        Bucket=BUCKET,
        Key="whole",
        UploadId=upload,
        MultipartUpload={"Parts": sorted(parts, key=lambda p: p["PartNumber"])},
    )
    assert read(s3, "whole") == b"\x01" * 5000 + b"\x02" * 5000
    assert read(s3, "whole", Range="bytes=4999-5000") == b"\x01\x02"


def test_sink_copies_an_object_under_a_second_key(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="from", Body=b"data" * 3000)
    s3.copy_object(Bucket=BUCKET, Key="to", CopySource={"Bucket": BUCKET, "Key": "from"})
    s3.delete_object(Bucket=BUCKET, Key="from")
    assert read(s3, "to") == b"data" * 3000


def chunks(data: bytes, size: int, trailer: bytes = b"") -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return framed + b"0\r\n" + trailer + b"\r\n"


@pytest.mark.parametrize("is_chunked_twice", [False, True])
def test_sink_takes_the_payload_out_of_its_framing(sink: SinkClient, is_chunked_twice: bool) -> None:
    data = bytes(range(256)) * 300
    body = chunks(data, 1000, b"x-amz-checksum-crc32:AAAAAA==\r\n")
    headers = {
        "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "x-amz-decoded-content-length": str(len(data)),
    }
    headers |= {"Transfer-Encoding": "chunked"} if is_chunked_twice else {"Content-Length": str(len(body))}
    connection = http.client.HTTPConnection(urlsplit(sink.endpoint_url).netloc)
    connection.request("PUT", "/bench/framed", body=chunks(body, 777) if is_chunked_twice else body, headers=headers)
    assert connection.getresponse().read() == b""
    connection.request("GET", "/bench/framed")  # on the same connection: nothing of the framing was left on it
    assert connection.getresponse().read() == data
    connection.close()


def test_sink_says_that_it_is_full_and_stays_usable(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="small", Body=b"kept")
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=BUCKET, Key="large", Body=bytes(80 * MIB))
    assert caught.value.response["Error"]["Code"] == "InsufficientStorage"
    assert read(s3, "small") == b"kept"


def test_sink_keeps_objects_of_many_writers_apart(sink: SinkClient) -> None:
    def work(number: int) -> None:
        client = s3_client(sink)
        for turn in range(5):
            client.put_object(Bucket=BUCKET, Key=f"w{number}", Body=bytes([number]) * (200_000 + turn))
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = s3_client(sink)
    assert [read(client, f"w{n}") == bytes([n]) * 200_004 for n in range(8)] == [True] * 8
    client.close()


def test_sink_counts_requests_by_operation(sink: SinkClient, s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="a", Body=b"12345")
    read(s3, "a")
    s3.list_objects_v2(Bucket=BUCKET)
    found = sink.stats()
    assert found.requests == {"PutObject": 1, "GetObject": 1, "ListObjectsV2": 1}
    assert (found.received_bytes, found.sent_bytes) == (5, 5)
    sink.reset()
    assert sink.stats().requests == {}
    assert sink.objects() == {"bench/a": 5}


def test_sink_ends_with_its_parent() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/sink/server.py"), "--memory", "1MiB", "--exit-with-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.stdin.close()
        assert process.wait(timeout=30) == 0


@given(st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), max_size=40))
def test_arena_never_gives_a_byte_to_two_bodies(steps: list[tuple[int, bool]]) -> None:
    arena = Arena(MIB)
    held: list[list[Extent]] = []
    for size, is_release in steps:
        if is_release and held:
            arena.release(held.pop(size % len(held)))
            continue
        try:
            extents = arena.allocate(size)
        except ArenaFullError:
            continue
        assert sum(extent.length_bytes for extent in extents) == size
        held.append(extents)
        taken = sorted((e.start, e.start + e.length_bytes) for body in held for e in body if e.length_bytes)
        assert all(before[1] <= after[0] for before, after in pairwise(taken))
    for body in held:
        arena.release(body)
    assert sum(extent.length_bytes for extent in arena.allocate(MIB)) == MIB
    arena.close()


# ---- the state is checked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MIB, 16 * MIB, 256 * MIB, 2048 * MIB])
def test_state_has_about_the_size_asked_for_and_many_small_tensors(size: int) -> None:
    assert abs(size_of(size) - size) < 0.15 * size
    shapes = shapes_of(size)
    assert len(shapes) >= 16
    assert min(torch.Size(shape).numel() for shape in shapes.values()) * 4 <= 8 * 1024


def test_state_differs_from_a_blank_one_in_every_tensor() -> None:
    assert differences(blank(MIB), MIB) == list(shapes_of(MIB))
    assert differences(gpt(MIB), MIB) == []


def test_one_flipped_bit_a_swap_and_a_missing_tensor_are_differences() -> None:
    size = 16 * MIB
    state = gpt(size)
    largest = max(state, key=lambda name: state[name].numel())
    state[largest].view(torch.int32).view(-1)[-1] ^= 1
    alike = [name for name, tensor in state.items() if tensor.shape == state["ln_f.bias"].shape][:2]
    state[alike[0]], state[alike[1]] = state[alike[1]], state[alike[0]]
    del state["h.3.attn.c_attn.weight"]
    assert set(differences(state, size)) == {largest, *alike, "h.3.attn.c_attn.weight"}


# ---- the numbers are of real saves ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked_measurements")
def test_a_peer_that_does_not_restore_what_was_saved_is_an_error_and_no_number(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    state = gpt(MIB)
    state["ln_f.bias"] += 1
    torch.save(state, place / "state")
    with pytest.raises(MeasurementError, match=r"1 tensors were not restored, for example ln_f\.bias"):
        measure(Spec(peer="torch", op="load", url=str(place), size_bytes=MIB))


def test_a_measurement_counts_time_processor_memory_and_bytes(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    torch.save(gpt(64 * MIB), place / "state")
    found = measure(Spec(peer="torch-new", op="load", url=str(place), size_bytes=64 * MIB))
    assert found.state_bytes == size_of(64 * MIB)
    assert found.wall_s > 0
    assert found.cpu_s > 0
    # `torch.load` makes all tensors anew beside the state: what it allocates must show.
    assert 0.9 * found.state_bytes < found.extra_bytes < 2 * found.state_bytes


def restores_what_it_saved(peer: Peer, place: Place) -> bool:
    state = gpt(MIB)
    peer.save(state, place)
    return differences(peer.load(blank(MIB), place), MIB) == []


# DCP remarks on every single-process save.
@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.is_for_local])
def test_every_peer_for_a_directory_restores_there_what_it_saved(name: str, tmp_path: Path) -> None:
    assert restores_what_it_saved(PEERS[name], Place(url=str(tmp_path / "checkpoint"), storage_options={}))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.is_for_s3])
def test_every_peer_for_s3_restores_there_what_it_saved(name: str, sink: SinkClient) -> None:
    options = {"key": "any", "secret": "any", "endpoint_url": sink.endpoint_url}
    place = Place(url="s3://bench/place", storage_options=options | {"client_kwargs": {"region_name": "us-east-1"}})
    assert restores_what_it_saved(PEERS[name], place)
    assert all(key.startswith("bench/place/") for key in sink.objects())


def test_every_peer_is_measured_once_on_every_target_that_it_writes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda spec: took(0.5))
    output = tmp_path / "out.json"
    targets = ["local", "s3sink"]
    words = ["--quick", "--size", "1MiB", "--directory", str(tmp_path), "--json", str(output)]
    assert run.main([*words, "--targets", ",".join(targets)]) == 0
    expected = {
        (target, name)
        for target in targets
        for name, peer in PEERS.items()
        if (peer.is_for_local if target == "local" else peer.is_for_s3)
    }
    assert counted(json.loads(output.read_text())) == dict.fromkeys(expected, (1, 1))


def counted(results: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (target["target"], row["peer"]): (len(row["runs"]["save"]), len(row["runs"]["load"]))
        for target in results
        for row in target["rows"]
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_quick_benchmark_measures_the_chosen_peer_once_on_every_target(target: str, tmp_path: Path) -> None:
    output, peer = tmp_path / "out.json", "cloudckpt" if target == "local" else "cloudckpt-obstore"
    words = ["--quick", "--size", "16MiB", "--directory", str(tmp_path), "--json", str(output)]
    done = run_to_end([sys.executable, ROOT / "benchmarks/run.py", *words, "--targets", target, "--peers", peer])
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(output.read_text())
    assert counted([found]) == {(target, peer): (1, 1)}
    assert f"### {target}\n" in done.stdout
    (row,) = found["rows"]
    assert row["title"] in done.stdout
    if target.startswith("s3"):
        assert row["runs"]["save"][0]["requests"]["PutObject"] >= 3


def test_an_unknown_peer_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--peers", "cloudckpt,nobody"])
    assert caught.value.code == 2
    assert "nobody unknown; choose from cloudckpt-obstore" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_has_a_row_that_says_so_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.PEERS, "safetensors", replace(PEERS["safetensors"], package="no_such_package"))
    monkeypatch.setattr(run, "measure", lambda spec: took(0.5))
    arguments = ["--targets", "local", "--quick", "--directory", str(tmp_path), "--peers", "torch,safetensors"]
    assert run.main(arguments) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| torch.save / torch.load + copy | **2.00**")
    assert rows[2].startswith("| safetensors save_file / load_file + copy; not installed: no_such_package | – | – |")


def took(seconds: float, extra_bytes: int = 0) -> Measurement:
    return Measurement(state_bytes=10**9, wall_s=seconds, cpu_s=0.5, extra_bytes=extra_bytes, requests={"GetObject": 3})


def results_of(ours_s: float, extra_bytes: int = 0) -> Results:
    stock = Row(peer="dcp", title="stock DCP", runs={"save": [took(4), took(5), took(60)], "load": [took(4)]})
    ours = Row(peer="cloudckpt-obstore", title="ours", runs={"save": [took(ours_s)], "load": [took(0.1, extra_bytes)]})
    return Results(target="s3sink", rows={"dcp": stock, "cloudckpt-obstore": ours})


def test_table_shows_median_spread_ratio_effort_and_requests() -> None:
    lines = table(results_of(ours_s=0.5, extra_bytes=100 * MIB)).splitlines()
    assert "| stock DCP | **0.20** (0.02–0.25) | 1.0 | 0.50 | 0 | 3 |" in lines[4]
    assert (
        lines[5]
        == "| ours | **2.00** (2.00–2.00) | 10.0 | 0.50 | 0 | 3 | **10.00** (10.00–10.00) | 40.0 | 0.50 | 100 | 3 |"
    )


def test_table_names_a_peer_that_failed_and_why() -> None:
    results = results_of(ours_s=1)
    results.rows["cloudckpt-obstore"].runs = {"save": [], "load": []}
    results.rows["cloudckpt-obstore"].failure = "it broke"
    assert table(results).endswith("- **ours failed**: it broke")


@pytest.mark.parametrize(
    ("ours_s", "extra_bytes", "is_good"), [(0.6, 0, True), (0.7, 0, False), (0.6, 577 * MIB, False)]
)
def test_goals_are_met_only_by_the_ratio_and_memory_promised(ours_s: float, extra_bytes: int, is_good: bool) -> None:
    results = [results_of(ours_s, extra_bytes)]
    assert is_met(results) is is_good
    assert ("**no**" in goals_table(results)) is not is_good


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("7", 7), ("1gb", 10**9)])
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_size_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="'two' is not a size"):
        parse_bytes("two")
