"""The benchmark measures what it says: its sink is a store, its state is checked, its numbers are of real saves."""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import boto3
import pytest
import torch
from botocore.config import Config
from botocore.exceptions import ClientError
from gcsfs.core import GCSFileSystem
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import run
from benchmarks.peers import PEERS, Place, kinds
from benchmarks.peers.install import install
from benchmarks.shared.states import STATES, Shapes, blank, build, bytes_of, differences
from benchmarks.shared.targets import TARGETS, Ground, Target, open_target
from benchmarks.shared.units import parse_bytes
from benchmarks.sink.arena import Arena, ArenaFullError, Extent
from benchmarks.sink.process import SinkClient, running_sink
from benchmarks.speed.cost import cost_of
from benchmarks.speed.plan import Case
from benchmarks.speed.plots import draw_curve
from benchmarks.speed.process import Measurement, MeasurementError, Spec, measure
from benchmarks.speed.report import Results, Row, curve_table, goals_table, is_met, table
from cloudckpt.report import prices_from
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


def test_sink_answers_a_signed_url(sink: SinkClient, s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="digits", Body=b"0123456789")
    client = s3_client(sink, signature_version="s3v4")
    url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": "digits"})
    client.close()
    with urlopen(url) as reply:
        assert reply.read() == b"0123456789"


def test_sink_answers_a_request_that_names_the_server_with_the_path(sink: SinkClient, s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="digits", Body=b"0123456789")
    connection = http.client.HTTPConnection(urlsplit(sink.endpoint_url).netloc)
    connection.request("GET", f"{sink.endpoint_url}/bench/digits")
    assert connection.getresponse().read() == b"0123456789"
    connection.close()


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


# ---- the sink is a GCS, too -----------------------------------------------------------------------------------------


@pytest.fixture
def gcs(sink: SinkClient, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return GCSFileSystem(
        token="anon", endpoint_url=sink.endpoint_url, project="any", skip_instance_cache=True, use_listings_cache=False
    )


# aiohttp remarks on what gcsfs hands it.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 12 * MIB + 5])
def test_gcs_sink_gives_back_what_was_put_in_one_request_or_in_chunks(gcs: Any, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    gcs.pipe_file("bench/whole ü", data[:size])  # in parts, or resumable by its size
    with gcs.open("bench/chunks", "wb", block_size=5 * MIB) as stream:
        stream.write(data[:size])
    assert [gcs.cat_file("bench/whole ü"), gcs.cat_file("bench/chunks")] == [data[:size]] * 2
    assert gcs.info("bench/whole ü")["size"] == size


def test_gcs_sink_lists_renames_and_deletes(gcs: Any, sink: SinkClient) -> None:
    for key in ("a/1", "a/b/2", "c"):
        gcs.pipe_file(f"bench/{key}", key.encode())
    assert sorted(gcs.ls("bench/a", detail=False)) == ["bench/a/1", "bench/a/b"]
    assert gcs.cat_file("bench/a/b/2", start=1, end=3) == b"/b"
    gcs.mv("bench/c", "bench/d")
    gcs.cp_file("bench/d", "bench/e")
    gcs.rm_file("bench/a/1")
    assert sink.objects() == {"bench/a/b/2": 5, "bench/d": 1, "bench/e": 1}
    assert sink.stats().requests["objects.move"] == 1
    with pytest.raises(FileNotFoundError):
        gcs.cat_file("bench/a/1")


def test_gcs_sink_creates_an_object_only_once(gcs: Any) -> None:
    gcs.pipe_file("bench/once", b"first", mode="create")
    with pytest.raises(FileExistsError):
        gcs.pipe_file("bench/once", b"second", mode="create")
    assert gcs.cat_file("bench/once") == b"first"


# ---- the state is checked -------------------------------------------------------------------------------------------


def shapes_of(kind: str, size: int) -> Shapes:
    return STATES[kind].shapes(size)


@pytest.mark.parametrize("size", [MIB, 16 * MIB, 256 * MIB, 2048 * MIB])
@pytest.mark.parametrize("kind", STATES)
def test_state_has_about_the_size_asked_for(kind: str, size: int) -> None:
    least = {"lora": 6 * MIB, "adamw": 4 * MIB, "tensors-10000": 4 * MIB}.get(kind, 0)  # below, none is so small
    assert size < least or abs(bytes_of(shapes_of(kind, size)) - size) < 0.2 * size


def test_states_are_of_the_kinds_that_differ_for_a_checkpoint() -> None:
    counts = {kind: len(shapes_of(kind, 256 * MIB)) for kind in STATES}
    assert [counts[f"tensors-{count}"] for count in (1, 100, 1000, 10000)] == [1, 100, 1000, 10000]
    assert counts["gpt"] >= 100
    assert counts["adamw"] % 4 == 0
    values = [math.prod(shape) for shape in shapes_of("adamw", 256 * MIB).values()]
    assert (min(values), max(values) > MIB) == (1, True)
    assert all(16 in shape for name, shape in shapes_of("lora", 256 * MIB).items() if name.endswith("weight"))


@pytest.mark.parametrize("kind", STATES)
def test_state_differs_from_a_blank_one_in_every_tensor(kind: str) -> None:
    shapes = shapes_of(kind, MIB)
    assert differences(blank(shapes), shapes) == list(shapes)
    assert differences(build(shapes), shapes) == []


def test_one_flipped_bit_a_swap_a_stray_and_a_missing_tensor_are_differences() -> None:
    shapes = shapes_of("gpt", 16 * MIB)
    state = build(shapes)
    largest = max(state, key=lambda name: state[name].numel())
    state[largest].view(torch.int32).view(-1)[-1] ^= 1
    alike = [name for name, tensor in state.items() if tensor.shape == state["ln_f.bias"].shape][:2]
    state[alike[0]], state[alike[1]] = state[alike[1]], state[alike[0]]
    del state["h.3.attn.c_attn.weight"]
    state["stray"] = torch.zeros(1)
    assert set(differences(state, shapes)) == {largest, *alike, "h.3.attn.c_attn.weight", "stray"}


# ---- the numbers are of real saves ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked_measurements")
def test_a_peer_that_does_not_restore_what_was_saved_is_an_error_and_no_number(tmp_path: Path) -> None:
    state = build(shapes_of("gpt", MIB))
    state["ln_f.bias"] += 1
    PEERS["torch"].open(Place(url=str(tmp_path))).save(state, 0)
    with pytest.raises(MeasurementError, match=r"1 tensors were not restored, for example ln_f\.bias"):
        measure(Spec(peer="torch", op="load", url=str(tmp_path), state="gpt", size_bytes=MIB))


def test_a_measurement_counts_time_processor_memory_and_bytes(tmp_path: Path) -> None:
    shapes = shapes_of("gpt", 64 * MIB)
    PEERS["torch"].open(Place(url=str(tmp_path))).save(build(shapes), 0)
    found = measure(Spec(peer="torch-new", op="load", url=str(tmp_path), state="gpt", size_bytes=64 * MIB))
    assert found.state_bytes == bytes_of(shapes)
    assert found.wall_s > 0
    assert found.cpu_s > 0
    # `torch.load` makes all tensors anew beside the state: what it allocates must show.
    assert 0.9 * found.state_bytes < found.extra_bytes < 2 * found.state_bytes


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    directory = tmp_path_factory.mktemp("grounds")
    with ExitStack() as stack:
        names = {"": "local", "s3": "s3sink", "gs": "gcssink"}
        yield {
            scheme: stack.enter_context(open_target(name, size_bytes=32 * MIB, directory=directory))
            for scheme, name in names.items()
        }


# Peers remark on single processes, on themselves, and on what they leave open.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name, peer in PEERS.items() for scheme in sorted(peer.schemes)]
)
def test_every_peer_restores_what_it_saved_wherever_it_writes(
    name: str, scheme: str, grounds: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = PEERS[name]
    if not peer.is_installed:
        pytest.skip(peer.row_title)
    shapes = shapes_of("adamw", MIB)
    with grounds[scheme].ground() as ground:
        for variable, value in ground.environment.items():
            monkeypatch.setenv(variable, value)
        with closing(peer.open(Place(url=ground.url, storage_options=ground.storage_options))) as opened:
            opened.save(build(shapes), 3)
            assert differences(opened.load(blank(shapes), 3), shapes) == []


@pytest.mark.filterwarnings("ignore")
def test_a_client_that_is_shown_the_certificate_saves_behind_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = shapes_of("gpt", MIB)
    with open_target("s3tls", size_bytes=32 * MIB, directory=tmp_path) as target, target.ground() as ground:
        assert ground.storage_options["endpoint_url"].startswith("https://127.0.0.1:")
        for variable, value in ground.environment.items():
            monkeypatch.setenv(variable, value)
        for name in ("cloudckpt-obstore", "cloudckpt-fsspec", "dcp", "raw-obstore"):
            opened = PEERS[name].open(Place(url=f"{ground.url}/{name}", storage_options=ground.storage_options))
            opened.save(build(shapes), 0)
            assert differences(opened.load(blank(shapes), 0), shapes) == []
        assert SinkClient(ground.stats_url).stats().received_bytes >= 4 * bytes_of(shapes)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_peer_is_measured_once_on_every_target_that_it_writes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda spec: took(0.5))
    targets = ["local", "s3sink", "gcssink"]
    words = ["--quick", "--size", "1MiB", "--directory", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run.main([*words, "--targets", ",".join(targets)]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    expected = {
        (target, name)
        for target in targets
        for name, peer in PEERS.items()
        if TARGETS[target].scheme in peer.schemes and not name.endswith("-manager")
    }
    assert counted(found) == {key: (1, 1) if PEERS[key[1]].is_installed else (0, 0) for key in expected}
    assert {"command", "machine", "versions", "prices"} <= found.keys()
    text = (tmp_path / "out/results.md").read_text()
    for case in found["cases"]:
        (picture,) = [path.name for path in (tmp_path / "out").glob(f"*-{case['case']['target']}-*.svg")]
        assert f"]({picture})" in text
        assert case["command"] in text


def counted(found: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (one["case"]["target"], row["peer"]): (len(row["runs"]["save"]), len(row["runs"]["load"]))
        for one in found["cases"]
        for row in one["rows"]
    }


def test_the_suite_measures_each_state_each_target_and_each_number_of_ranks_and_draws_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def opened(name: str, **_: object) -> Iterator[Target]:
        yield _NoTarget()

    monkeypatch.setattr(run, "measure", lambda spec: took(0.5))
    monkeypatch.setattr(run, "open_target", opened)
    monkeypatch.setattr(run, "draw_bars", lambda *_: None)
    curves: dict[tuple[str, str], int] = {}

    def draw(section: str, points: list[Results], _: Path) -> None:
        curves[section, points[0].case.target] = len(points)

    monkeypatch.setattr(run, "draw_curve", draw)
    assert run.main(["--runs", "1", "--out", str(tmp_path)]) == 0
    cases = [one["case"] for one in json.loads((tmp_path / "results.json").read_text())["cases"]]
    assert {case["target"] for case in cases} == TARGETS.keys() - {"s3limited", "s3limitedtls"}
    assert {case["state"] for case in cases} == STATES.keys() - {"gpt"}
    assert {case["ranks"] for case in cases} == {1, 2, 4}
    assert curves == {
        **{(section, target): count for target in ("s3sink", "local") for section, count in COUNTS.items()},
        ("latency", "s3sink"): 4,
    }


COUNTS = {"ranks": 3, "size": 5, "tensors": 4}


class _NoTarget:
    is_local = False

    @contextmanager
    def ground(self) -> Iterator[Ground]:
        yield Ground(url="nowhere")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_quick_benchmark_measures_ours_once_on_every_target(target: str, tmp_path: Path) -> None:
    peer = {"": "cloudckpt", "s3": "cloudckpt-obstore", "gs": "cloudckpt-fsspec"}[TARGETS[target].scheme]
    words = ["--quick", "--size", "16MiB", "--directory", str(tmp_path), "--out", str(tmp_path / "out")]
    done = run_to_end([sys.executable, ROOT / "benchmarks/run.py", *words, "--targets", target, "--peers", peer])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert counted(found) == {(target, peer): (1, 1)}
    assert f"### {target}: " in done.stdout
    (row,) = found["cases"][0]["rows"]
    assert row["title"] in done.stdout
    if TARGETS[target].is_sink:
        save, load = (row["runs"][op][0] for op in ("save", "load"))
        assert sum(save["requests"].values()) >= 3
        assert save["received_bytes"] >= save["state_bytes"] <= load["sent_bytes"]


def test_a_curve_has_a_row_for_each_peer_and_a_picture(tmp_path: Path) -> None:
    points = [replace(results_of(0.5), case=Case(section="ranks", target="s3sink", ranks=n)) for n in (2, 1)]
    lines = curve_table("ranks", "s3sink", points).splitlines()
    assert lines[2] == "| ranks | 1 | 2 |"
    assert lines[6] == "| ours, save | **2.00** (2.00–2.00) | **2.00** (2.00–2.00) |"
    draw_curve("ranks", points, tmp_path / "curve.svg")
    assert "</svg>" in (tmp_path / "curve.svg").read_text()


def test_what_a_save_costs_is_its_requests_and_what_the_store_sends_by_the_users_prices(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"storage_gib_month": 0, "writes_1000": 5, "reads_1000": 2, "sent_gib": 0.5, "currency": "EUR"}')
    requests = {"PutObject": 3, "UploadPart": 2, "GetObject": 4, "HeadObject": 1, "DeleteObject": 9}
    run_on_s3 = replace(took(1), requests=requests, sent_bytes=1 << 30)
    assert cost_of(run_on_s3, prices_from(path)) == pytest.approx((5 * 5 + 5 * 2) / 1000 + 0.5)
    requests = {"objects.insert (begin)": 1, "objects.insert (chunk)": 7, "objects.get (media)": 3}
    assert cost_of(replace(took(1), requests=requests), prices_from(path)) == pytest.approx(0.011)
    assert cost_of(replace(took(1), requests=None), prices_from(path)) is None
    lines = table(results_of(ours_s=0.5), prices_from(path)).splitlines()
    assert lines[2].endswith("| requests | bytes × | EUR per 1,000 |")
    assert lines[5].endswith("| 3 | – | 6 |")


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
    assert len(rows) == 6, "a table of saves, and one of loads"


def test_what_could_not_be_installed_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "not-installed.json"
    told.write_text('{"no-such-package": "no wheel for this Python"}')
    monkeypatch.setattr(kinds, "NOT_INSTALLED", told)
    peer = replace(PEERS["safetensors"], package="no_such_package")
    assert peer.row_title.endswith("not installed: no_such_package (no wheel for this Python)")


def test_a_package_that_cannot_be_installed_keeps_none_from_the_others() -> None:
    asked: list[str] = []

    def pip(requirement: str) -> tuple[int, str]:
        asked.append(requirement)
        return (1, "building\nERROR: no wheel\nhint") if requirement.startswith("bad") else (0, "")

    assert install(["one>=1", "bad_peer>=2", "two"], pip) == {"bad-peer": "ERROR: no wheel"}
    assert asked == ["one>=1", "bad_peer>=2", "two"]


def took(seconds: float, extra_bytes: int = 0) -> Measurement:
    return Measurement(state_bytes=10**9, wall_s=seconds, cpu_s=0.5, extra_bytes=extra_bytes, requests={"GetObject": 3})


def results_of(ours_s: float, extra_bytes: int = 0) -> Results:
    stock = Row(peer="dcp", title="stock DCP", runs={"save": [took(4), took(5), took(60)], "load": [took(4)]})
    ours = Row(peer="cloudckpt-obstore", title="ours", runs={"save": [took(ours_s)], "load": [took(0.1, extra_bytes)]})
    return Results(case=Case(section="peers", target="s3sink"), rows={"dcp": stock, "cloudckpt-obstore": ours})


def test_table_shows_median_spread_ratio_effort_and_requests() -> None:
    lines = table(results_of(ours_s=0.5, extra_bytes=100 * MIB)).splitlines()
    assert lines[4] == "| stock DCP | **0.20** (0.02–0.25) | 1.0 | – | 0.50 | 0 | 3 | – |"
    assert lines[5] == "| ours | **2.00** (2.00–2.00) | 10.0 | – | 0.50 | 0 | 3 | – |"
    assert lines[10] == "| ours | **10.00** (10.00–10.00) | 40.0 | – | 0.50 | 100 | 3 | – |"


def test_table_shows_the_part_of_a_bare_clients_rate() -> None:
    results = results_of(ours_s=0.5)
    results.rows["raw-obstore"] = Row(peer="raw-obstore", title="limit", runs={"save": [took(0.4)], "load": []})
    assert table(results).splitlines()[5].startswith("| ours | **2.00** (2.00–2.00) | 10.0 | 80% |")


def test_a_load_only_peer_has_no_row_among_the_saves() -> None:
    results = results_of(ours_s=0.5)
    results.rows["torch-new"] = replace(results.rows["dcp"], peer="torch-new", title="new", is_load_only=True)
    assert [line[:7] for line in table(results).splitlines() if line.startswith("| new")] == ["| new |"]


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
