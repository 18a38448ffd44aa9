"""The laws of the test servers: they answer, refuse what a real store refuses, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import fsspec
import psutil
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError

from server_process import end_group_of
from servers import FreshPrefix, GcsServer, S3Server, Server, ServerStartError, fake_gcs, localstack_s3, seaweedfs

LOCALSTACK = Path(__file__).resolve().parents[2] / "localstack"
AWKWARD_KEY = "step-1/a b?c#d%e+é=.bin"


def _group(pid: int) -> list[str]:
    """What still runs in the process group of `pid`."""
    found = []
    for process in psutil.process_iter(["name", "status"]):
        try:
            is_member = os.getpgid(process.pid) == pid
        except ProcessLookupError:
            continue
        if is_member and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid} {process.info['name']}")
    return found


def _until_gone(pid: int) -> None:
    """Wait until the group of `pid` has no process; the suite's own time limit ends a wait in vain."""
    while _group(pid):
        time.sleep(0.05)


def test_an_object_put_around_the_store_is_listed_read_and_deleted(remote_url: FreshPrefix) -> None:
    server, url = remote_url.server, f"{remote_url.url}/{AWKWARD_KEY}"
    server.raw_put(url, b"bytes \x00\xff")
    server.raw_put(f"{remote_url.url}-other/x", b"")
    assert server.raw_list(f"{remote_url.url}/") == [url]
    assert server.raw_get(url) == b"bytes \x00\xff"
    server.raw_delete(url)
    assert server.raw_list(f"{remote_url.url}/") == []
    with pytest.raises(FileNotFoundError):
        server.raw_get(url)


def test_the_storage_options_open_the_same_objects_through_fsspec(remote_url: FreshPrefix) -> None:
    url = f"{remote_url.url}/{AWKWARD_KEY}"
    fs = fsspec.filesystem(
        remote_url.server.scheme, skip_instance_cache=True, use_listings_cache=False, **remote_url.storage_options
    )
    remote_url.server.raw_put(url, b"around")
    assert fs.cat_file(url) == b"around"
    fs.pipe_file(url, b"through")
    assert remote_url.server.raw_get(url) == b"through"


@pytest.mark.parametrize("fixture", ["s3_url", "localstack_url"])
def test_s3_refuses_to_create_over_an_object(request: pytest.FixtureRequest, fixture: str) -> None:
    prefix: FreshPrefix = request.getfixturevalue(fixture)
    bucket, _, key = f"{prefix.url}/claim".removeprefix("s3://").partition("/")
    assert isinstance(prefix.server, S3Server)
    put = prefix.server.client.put_object
    put(Bucket=bucket, Key=key, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refusal:
        put(Bucket=bucket, Key=key, Body=b"second", IfNoneMatch="*")
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert prefix.server.raw_get(f"{prefix.url}/claim") == b"first"


def test_gcs_refuses_to_create_over_an_object(gs_url: FreshPrefix) -> None:
    fs = fsspec.filesystem("gs", skip_instance_cache=True, use_listings_cache=False, **gs_url.storage_options)
    fs.pipe_file(f"{gs_url.url}/claim", b"first", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{gs_url.url}/claim", b"second", mode="create")
    assert gs_url.server.raw_get(f"{gs_url.url}/claim") == b"first"


@pytest.mark.parametrize(
    ("key", "secret", "code"),
    [("cloudckpt", "not-the-secret", "SignatureDoesNotMatch"), ("nobody", "secret", "InvalidAccessKeyId")],
)
def test_seaweedfs_refuses_wrong_credentials(s3_url: FreshPrefix, key: str, secret: str, code: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=s3_url.server.endpoint_url,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    with pytest.raises(ClientError) as refusal:
        client.put_object(Bucket="tests", Key="intruder", Body=b"x")
    client.close()
    assert refusal.value.response["Error"]["Code"] == code
    assert s3_url.server.raw_list("s3://tests/intruder") == []


def test_a_server_listens_on_loopback_only(remote_url: FreshPrefix) -> None:
    process = psutil.Process(remote_url.server.pid)
    listening = {
        connection.laddr.ip
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize("start", [seaweedfs, localstack_s3, fake_gcs])
def test_a_stopped_server_leaves_no_process_and_no_socket(
    start: Callable[[Path], AbstractContextManager[Server]], tmp_path: Path
) -> None:
    with start(tmp_path) as server:
        running = _group(server.pid)
    assert running != []
    _until_gone(server.pid)
    assert [path for path in server.litter if path.exists()] == []
    with pytest.raises(requests.ConnectionError):
        requests.get(server.endpoint_url, timeout=5)


def test_a_server_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    owner_code = (
        "import sys, time, pathlib, servers\n"
        "with servers.fake_gcs(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(3600)\n"
    )
    command = [sys.executable, "-c", owner_code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=LOCALSTACK) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert _group(pid) != []
        owner.send_signal(signal.SIGKILL)
    _until_gone(pid)


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho cannot import that\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setenv("CLOUDCKPT_LOCALSTACK_VENV", str(tmp_path / "venv"))
    with pytest.raises(ServerStartError, match=r"(?s)status 7.*cannot import that"), localstack_s3(tmp_path):
        pytest.fail("a server that had ended was called ready")


def test_a_missing_localstack_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDCKPT_LOCALSTACK_VENV", str(tmp_path / "nowhere"))
    with pytest.raises(ServerStartError, match="make setup-localstack"), localstack_s3(tmp_path):
        pytest.fail("a server that is not installed was called ready")


def _command_line(*arguments: str, state: Path) -> str:
    return subprocess.run(
        [sys.executable, "servers.py", *arguments],
        cwd=LOCALSTACK,
        env={**os.environ, "CLOUDCKPT_SERVERS_DIR": str(state)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_the_command_line_keeps_one_server_up_until_down(tmp_path: Path) -> None:
    first = _command_line("up", "fake-gcs", state=tmp_path)
    try:
        again = _command_line("up", "fake-gcs", state=tmp_path)
        status = _command_line("status", "fake-gcs", state=tmp_path)
        record = json.loads((tmp_path / "fake-gcs.json").read_text())
        server = GcsServer(**{**record, "log_path": Path(record["log_path"]), "litter": ()})
        server.raw_put("gs://cloudckpt/key", b"x")
        listed = server.raw_list("gs://cloudckpt/")
        server.close()
    finally:
        down = _command_line("down", "fake-gcs", state=tmp_path)
    assert first == again == status
    assert listed == ["gs://cloudckpt/key"]
    assert down == "fake-gcs: stopped\n"
    _until_gone(server.pid)
    assert _command_line("status", "fake-gcs", state=tmp_path) == "fake-gcs: not running\n"


def test_a_detached_server_is_ended_although_nobody_buries_it() -> None:
    parent_code = (
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '3600'], start_new_session=True).pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        end_group_of(pid, grace_s=60)
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        parent.kill()


def test_down_leaves_a_stranger_with_a_reused_process_id_alone(tmp_path: Path) -> None:
    _command_line("up", "fake-gcs", state=tmp_path)
    path = tmp_path / "fake-gcs.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "born_s": record["born_s"] - 1}))
    try:
        assert _command_line("down", "fake-gcs", state=tmp_path) == "fake-gcs: not running\n"
        assert _group(record["pid"]) != []
    finally:
        path.write_text(json.dumps(record))
        _command_line("down", "fake-gcs", state=tmp_path)
    _until_gone(record["pid"])


def test_a_bucket_that_is_there_is_made_again_by_nobody(remote_url: FreshPrefix) -> None:
    bucket = urlsplit(remote_url.url).netloc
    remote_url.server.raw_put(f"{remote_url.url}/kept", b"x")
    assert remote_url.server.make_bucket(bucket) == f"{remote_url.server.scheme}://{bucket}"
    assert remote_url.server.raw_get(f"{remote_url.url}/kept") == b"x"
