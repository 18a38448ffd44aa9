"""What is wrong with the machine or the options is told as that, by name, and never as an object that is absent."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError
from google.oauth2.credentials import Credentials

import cloudckpt
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, OptionsError, RetryExhaustedError, StorageError
from cloudckpt.store import open_store
from tests.effort import diagonal
from tests.programs import run_to_end
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, VERBS, Engine
from tests.store.handling import while_handling
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

HASTY = cloudckpt.Options(
    retry=cloudckpt.RetryPolicy(max_attempts=3, deadline_s=10.0, request_timeout_s=3.0, backoff_base_s=0.01)
)
ON_S3 = [pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore")]
ON_GCS = [pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore")]
EVERYWHERE = [*ON_S3, pytest.param(GCSFS, id="gcsfs")]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        server.put_object("root/there", bytes(100))
        yield server


def _refusal(engine: Engine, options: dict[str, object], verb: str = "read") -> CloudCkptError:
    store = engine.kind(f"{engine.scheme}://bucket/root", storage_options=options)
    try:
        with pytest.raises(CloudCkptError) as caught:
            VERBS[verb](store)
    finally:
        store.close()
    return caught.value


def _command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have keys come from a command, as a profile may say, and return that command."""
    script = tmp_path / "keys.sh"
    keys = json.dumps({"Version": 1, "AccessKeyId": "K", "SecretAccessKey": "S", "SessionToken": "T"})
    script.write_text(f"#!/bin/sh\necho '{keys}'\n")
    script.chmod(stat.S_IRWXU)
    config = tmp_path / "config"
    config.write_text(f"[default]\nregion = eu-west-1\ncredential_process = {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    return script


# ---- files that are missed


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("verb", ["put", "create", "read", "head", "list"])
def test_a_missing_token_file_of_a_web_identity_is_named(
    server: ObjectServer, engine: Engine, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "away"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
    error = _refusal(engine, {"endpoint_url": server.endpoint}, verb)
    assert isinstance(error, OptionsError)
    assert str(tmp_path / "away") in str(error)
    assert server.count() == 0


def _spoilt(tmp_path: Path, name: str, content: str) -> str:
    """Return a path at which there is nothing that can be used: no file, a directory, or what `content` says."""
    path = tmp_path / name
    if content == "a directory":
        path.mkdir()
    elif content != "no file":
        path.write_text(content)
    return str(path)


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("where", ["verify", "AWS_CA_BUNDLE"])
@pytest.mark.parametrize("content", ["no file", "a directory", "", "junk\n"])
def test_a_file_without_certificates_is_named(
    server: ObjectServer, engine: Engine, where: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = _spoilt(tmp_path, "ca.pem", content), engine.options(server)
    if where == "verify":
        options["client_kwargs"] = {"region_name": "eu-west-1", "verify": path}
    else:
        monkeypatch.setenv(where, path)
    error = _refusal(engine, options)
    assert isinstance(error, OptionsError)
    assert path in str(error)
    assert server.count() == 0


@pytest.mark.parametrize("engine", ON_S3)
def test_a_missing_command_for_keys_is_named(
    server: ObjectServer, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _command(tmp_path, monkeypatch)
    script.unlink()
    error = _refusal(engine, {"endpoint_url": server.endpoint})
    assert isinstance(error, OptionsError)
    assert str(script) in str(error)


@pytest.mark.parametrize("engine", ON_GCS)
@pytest.mark.parametrize("where", ["GOOGLE_APPLICATION_CREDENTIALS", "token"])
@pytest.mark.parametrize(
    "content", ["no file", "a directory", "", '{"type": "service_account", "private_key": ', "[]", "{}"]
)
def test_a_key_file_of_google_that_holds_no_key_is_named_and_nobody_asks_anonymously(
    server: ObjectServer, engine: Engine, where: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = _spoilt(tmp_path, "key.json", content), {"endpoint_url": server.endpoint}
    if where == "token":
        options["token"] = path
    else:
        monkeypatch.setenv(where, path)
    error = _refusal(engine, options)
    assert isinstance(error, OptionsError)
    assert path in str(error)
    assert server.count() == 0


@pytest.mark.parametrize("name", ["../key.json", "./key", "~/key", "/key", "key.json"])
def test_what_can_only_be_the_name_of_a_file_is_no_token(server: ObjectServer, name: str) -> None:
    error = _refusal(GCSFS, {"endpoint_url": server.endpoint, "token": name})
    assert isinstance(error, OptionsError)
    assert f"token in storage_options names {name!r}" in str(error)


@pytest.mark.parametrize("engine", ON_S3)
def test_a_file_that_vanishes_during_a_restore_ends_it_and_no_older_step_is_taken(
    server: ObjectServer, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _command(tmp_path, monkeypatch)
    with _manager(engine, {"endpoint_url": server.endpoint}) as manager:
        manager.save(1, {"w": torch.ones(8)})
        manager.save(2, {"w": torch.full((8,), 2.0)})

    def vanishes(request: Request) -> bool:
        is_shard = request.method == "GET" and request.path.endswith(".safetensors")
        if is_shard:
            script.unlink(missing_ok=True)
        return is_shard

    server.inject(Fault(status=400, code="ExpiredToken"), when=vanishes, times=-1)
    state = {"w": torch.zeros(8)}
    with _manager(engine, {"endpoint_url": server.endpoint}) as manager, pytest.raises(OptionsError, match=r"keys\.sh"):
        manager.restore(state)
    assert torch.equal(state["w"], torch.zeros(8))


def _manager(engine: Engine, options: dict[str, object]) -> cloudckpt.CheckpointManager:
    return cloudckpt.CheckpointManager(
        f"{engine.scheme}://bucket/run",
        storage_options=options,
        engine=engine.kind.engine,  # type: ignore[arg-type]
        options=HASTY,
    )


# ---- what the caller is busy with

_NO_SUCH_KEY = ClientError(
    {"Error": {"Code": "NoSuchKey", "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": 404}},  # type: ignore[typeddict-item]
    "GetObject",
)


@pytest.mark.parametrize("engine", EVERYWHERE)
@pytest.mark.parametrize(
    "theirs",
    [_NO_SUCH_KEY, FileNotFoundError("x"), CheckpointNotFoundError("x")],
    ids=lambda exc: type(exc).__name__,
)
def test_a_restore_from_a_handler_takes_no_older_step_when_the_store_fails(
    server: ObjectServer, engine: Engine, theirs: Exception
) -> None:
    options = engine.options(server)
    with _manager(engine, options) as manager:
        manager.save(1, {"w": torch.ones(8)})
        manager.save(2, {"w": torch.full((8,), 2.0)})
        server.inject(
            Fault(kind=FaultKind.RESET_BEFORE_REPLY), times=-1, when=lambda request: "000002" in str(request.path)
        )
        with pytest.raises(RetryExhaustedError):
            while_handling(theirs, lambda: manager.restore({"w": torch.zeros(8)}))


def test_a_fault_of_a_filesystem_in_memory_is_no_absence_in_a_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store("memory://faulty/run") as store:
        store.put("k", [memoryview(b"x")])

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("of the filesystem")

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", fail)
        with pytest.raises(StorageError) as caught:
            while_handling(FileNotFoundError("x"), lambda: store.read("k", limit_bytes=1))
    assert type(caught.value) is StorageError


# ---- options


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"key": "CANARYKEY\n"}, "'key'"),
        ({"secret": "CANARY\rSECRET"}, "'secret'"),
        ({"token": "CANARY\x00TOKEN"}, "'token'"),
        ({"client_kwargs": {"aws_access_key_id": "CANARY\n"}}, "'aws_access_key_id'"),
        ({"s3_additional_kwargs": {"StorageClass": "CANARY\n"}}, "'StorageClass'"),
        ({"endpoint_url": "http://CANARY\n"}, "'endpoint_url'"),
    ],
)
def test_an_option_that_no_request_can_carry_is_refused_by_name(
    engine: Engine, options: dict[str, object], name: str
) -> None:
    with pytest.raises(OptionsError, match=name) as caught:
        engine.kind("s3://bucket/root", storage_options=options)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("text", ["CANARY0123456789\n", "CANARY\u00fc"])
def test_a_key_of_the_environment_that_no_request_can_carry_is_refused(
    server: ObjectServer, engine: Engine, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(each, text if each == name else "fine")
    error = _refusal(engine, {"endpoint_url": server.endpoint}, "create")
    assert isinstance(error, OptionsError)
    assert "line break" in str(error)
    assert "CANARY" not in f"{error} {error.__cause__}"
    assert server.count() == 0


@pytest.mark.parametrize("engine", ON_GCS)
def test_a_token_that_no_request_can_carry_is_refused(server: ObjectServer, engine: Engine) -> None:
    options = {"token": Credentials(token="CANARY\n"), "endpoint_url": server.endpoint}
    error = _refusal(engine, options, "create")
    assert isinstance(error, OptionsError)
    assert "CANARY" not in f"{error} {error.__cause__}"


@pytest.mark.parametrize("engine", [*EVERYWHERE, pytest.param(OBSTORE_GCS, id="obstore-gcs")])
@pytest.mark.parametrize("endpoint", ["htp:/x", "127.0.0.1:9000"])
def test_an_endpoint_that_is_no_url_is_an_error_of_the_options(
    server: ObjectServer, engine: Engine, endpoint: str
) -> None:
    with pytest.raises(OptionsError, match="does not begin with http:// or https://"):
        _refusal(engine, {**engine.options(server), "endpoint_url": endpoint}, "create")
    assert server.requests == []


# ---- who asks, and where


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anon": True}, "anonymous"),
        ({"key": "K", "secret": "S"}, "does not accept"),
        ({"key": "K", "secret": "S", "token": "T"}, "have expired"),
    ],
)
@pytest.mark.parametrize("verb", ["put", "head", "list"])
def test_a_401_says_expired_only_of_what_can_expire(
    server: ObjectServer, engine: Engine, options: dict[str, object], words: str, verb: str
) -> None:
    server.inject(Fault(status=401, code="Unauthorized"), times=-1)
    assert words in str(_refusal(engine, {**options, "endpoint_url": server.endpoint}, verb))


def test_a_401_of_an_anonymous_request_to_gcs_says_so(server: ObjectServer) -> None:
    server.inject(Fault(status=401, code="required"), times=-1)
    assert "anonymous" in str(_refusal(GCSFS, {"token": "anon", "endpoint_url": server.endpoint}))


@pytest.mark.parametrize("engine", ON_S3)
def test_a_400_of_a_head_says_expired_only_of_what_can_expire(server: ObjectServer, engine: Engine) -> None:
    server.inject(Fault(status=400, code="x"), times=-1)
    options: dict[str, object] = {"key": "K", "secret": "S", "endpoint_url": server.endpoint}
    assert "expired" not in str(_refusal(engine, options, "head"))
    assert "expired" in str(_refusal(engine, {**options, "token": "T"}, "head"))


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("verb", ["put", "create", "get", "read", "head", "list"])
def test_a_bucket_of_another_region_is_told_with_that_region(server: ObjectServer, engine: Engine, verb: str) -> None:
    elsewhere = Fault(status=301, code="PermanentRedirect", headers={"x-amz-bucket-region": "ap-south-2"})
    server.inject(elsewhere, times=-1)
    error = _refusal(engine, engine.options(server), verb)
    assert type(error) is StorageError
    assert "'region_name': 'ap-south-2'" in str(error)


# ---- the end of the program

_LAST = """
import atexit, sys
from google.oauth2.credentials import Credentials
from cloudckpt.errors import StorageError
from cloudckpt.store import open_store

url, engine, endpoint = sys.argv[1:]
keys = {"token": Credentials(token="t")} if url.startswith("gs") else {"key": "k", "secret": "s"}

def last():
    try:
        with open_store(url, engine=engine, storage_options={**keys, "endpoint_url": endpoint}) as store:
            store.create("k", b"x")
            store.list()
        print("done")
    except StorageError as exc:
        print(type(exc).__name__, exc)

atexit.register(last)
"""


@diagonal(
    "engine, before",
    [*EVERYWHERE, pytest.param(OBSTORE_GCS, id="obstore-gcs")],
    [
        pytest.param("", id="unused"),
        pytest.param("import concurrent.futures.thread, fsspec.asyn, gcsfs, obstore, s3fs", id="imported"),
    ],
)
def test_the_first_use_of_a_store_at_exit_works_or_says_why(server: ObjectServer, engine: Engine, before: str) -> None:
    about = [f"{engine.scheme}://bucket/root", engine.kind.engine, f"http://localhost:{server.port}"]
    found = run_to_end([sys.executable, "-c", f"{before}\n{_LAST}", *about])
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(("done", "StorageError")), found.stdout + found.stderr
    assert found.stdout.startswith("done") or "shutting down" in found.stdout
