"""What people get wrong, end to end: each mistake has its error type, names the next action, and loses nothing."""

from __future__ import annotations

import errno
import hashlib
import re
import socket
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import (
    AccessDeniedError,
    BucketNotFoundError,
    CheckpointExistsError,
    CheckpointManager,
    ChecksumError,
    CloudCkptError,
    CreateNotEnforcedError,
    FormatVersionError,
    ManifestError,
    Options,
    OptionsError,
    RetryExhaustedError,
    RetryPolicy,
    StateMismatchError,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.store import RetryingStore
from cloudckpt.store.local import LocalStore
from raw_access import FreshPrefix
from servers import S3Server
from tests.store.fault_disk import FaultDisk

HASTY = Options(
    retry=RetryPolicy(max_attempts=3, deadline_s=8, request_timeout_s=2, connect_timeout_s=1, backoff_base_s=0.01)
)


def state() -> dict[str, object]:
    return {"w": torch.arange(1000.0), "config": {"lr": 3e-4}}


def saved(url: str | Path) -> str:
    """Save a good checkpoint and return where it is."""
    cloudckpt.save(state(), url)
    return str(url)


def assert_intact(url: str | Path) -> None:
    found = cloudckpt.read(url)
    assert torch.equal(found["w"], torch.arange(1000.0))  # type: ignore[arg-type]
    assert found["config"] == {"lr": 3e-4}


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionsError, match=r"s4.*s3") as caught:
        cloudckpt.save(state(), "s4://bucket/x")
    assert "gs" in str(caught.value)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(OptionsError) as caught:
        cloudckpt.save(state(), "s3://AKIAEXAMPLE:hunter2secret@bucket/x")
    assert "hunter2secret" not in str(caught.value)
    assert "storage_options" in str(caught.value)


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_a_missing_bucket_is_named_and_never_made(localstack_server: S3Server, engine: str) -> None:
    # Not SeaweedFS: it makes a bucket for the first object of an administrator.
    options = dict(localstack_server.storage_options)
    with pytest.raises(BucketNotFoundError, match=r"never-made.*create the bucket first"):
        cloudckpt.save(state(), "s3://never-made/x", storage_options=options, engine=engine, options=HASTY)
    assert "never-made" not in localstack_server.buckets()


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_wrong_credentials_are_denied_and_never_shown(s3_url: FreshPrefix, engine: str) -> None:
    options = {**s3_url.storage_options, "key": "AKIAWRONGWRONG", "secret": "canary-secret-canary"}
    with pytest.raises(AccessDeniedError, match="credentials") as caught:
        cloudckpt.save(state(), s3_url.url, storage_options=options, engine=engine, options=HASTY)
    assert "canary-secret-canary" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_an_unreachable_endpoint_fails_within_the_deadline_and_names_itself(engine: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    options = {"key": "k", "secret": "s", "endpoint_url": endpoint}
    with pytest.raises((RetryExhaustedError, StorageError), match="s3://bucket") as caught:
        cloudckpt.load(state(), "s3://bucket/x", storage_options=options, engine=engine, options=HASTY)
    assert caught.value.attempts == 3
    assert caught.value.elapsed_s < 8


@pytest.mark.parametrize(
    ("call", "code", "kind", "advice"),
    [
        ("write", errno.ENOSPC, StorageError, "no room left"),
        ("open_new", errno.EROFS, AccessDeniedError, "read-only"),
        ("open_new", errno.EACCES, AccessDeniedError, "owner and the mode"),
    ],
)
def test_a_full_or_read_only_disk_fails_the_save_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[StorageError], advice: str
) -> None:
    root = tmp_path / "root"
    disk = FaultDisk()
    monkeypatch.setattr(
        "cloudckpt.manager.manager.open_store",
        lambda *_, **__: RetryingStore(LocalStore(str(root), disk=disk), RetryPolicy()),
    )
    with CheckpointManager(root) as manager:
        first = manager.save(1, state())
        disk.fail(call, code, times=1_000)
        with pytest.raises(kind, match=advice) as caught:
            manager.save(2, state())
        assert str(root) in str(caught.value)
        disk.fail(call, code, times=0)
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1]
        assert_intact(first.url)
        manager.save(2, state())


def test_shapes_and_names_that_differ_are_all_listed_and_nothing_is_restored(tmp_path: Path) -> None:
    url = saved(tmp_path / "c")
    target: dict[str, object] = {"w": torch.full((3,), 7.0), "bias": torch.zeros(2)}
    with pytest.raises(StateMismatchError, match="nothing was restored") as caught:
        cloudckpt.load(target, url)
    assert caught.value.mismatched == {"w": ((3,), (1000,))}
    assert caught.value.missing == ("bias",)
    assert caught.value.unexpected == ("config",)
    for word in ("w is (3,) here and (1000,) there", "bias", "config", "strict=False"):
        assert word in str(caught.value)
    assert torch.equal(target["w"], torch.full((3,), 7.0))  # type: ignore[arg-type]


def test_an_unsupported_value_is_named_with_advice_and_nothing_is_written(tmp_path: Path) -> None:
    class Schedule:
        pass

    with pytest.raises(UnsupportedValueError, match="state_dict") as caught:
        cloudckpt.save({"w": torch.zeros(3), "deep": {"list": [1, Schedule()]}}, tmp_path / "c")
    assert caught.value.key == "deep.list[1]"
    assert "Schedule" in caught.value.type_name
    assert not (tmp_path / "c").exists()


def test_a_url_that_holds_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    url = saved(tmp_path / "c")
    before = sorted(path.name for path in (tmp_path / "c").rglob("*"))
    with pytest.raises(CheckpointExistsError, match="was not changed"):
        cloudckpt.save({"w": torch.zeros(1)}, url)
    assert sorted(path.name for path in (tmp_path / "c").rglob("*")) == before
    assert_intact(url)


def test_a_manifest_of_a_newer_format_asks_for_an_upgrade_and_is_never_gone_past(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state())
        manager.save(2, state())
    manifest = tmp_path / "step-0000000002-e0001" / "manifest.json"
    seal = re.compile(r'(?<="sha256": ")[0-9a-f]{64}(?="\n}\n)')
    newer = seal.sub("", manifest.read_text().replace('"format_version": 1', '"format_version": 3'))
    manifest.chmod(0o600)
    manifest.write_text(newer.replace('"sha256": ""', f'"sha256": "{hashlib.sha256(newer.encode()).hexdigest()}"'))
    with CheckpointManager(tmp_path) as manager:
        for ask in (manager.latest, lambda: manager.restore(state())):
            with pytest.raises(FormatVersionError, match=r"version 3.*upgrade cloudckpt"):
                ask()


@pytest.mark.parametrize("damage", ["truncate", "flip", "extend"])
def test_a_damaged_shard_is_named_and_other_checkpoints_stay_readable(tmp_path: Path, damage: str) -> None:
    good, bad = saved(tmp_path / "good"), saved(tmp_path / "bad")
    shard = next(Path(bad).rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    shard.chmod(0o600)
    shard.write_bytes({"truncate": data[:-1], "extend": data + b"\0", "flip": data}[damage])
    target = {"w": torch.full((1000,), -1.0), "config": {}}
    if damage == "extend":
        # Bytes after the end of what was committed belong to nobody; every committed byte is right.
        cloudckpt.load(target, bad)
        assert torch.equal(target["w"], torch.arange(1000.0))  # type: ignore[arg-type]
    else:
        with pytest.raises(ChecksumError, match=shard.name) as caught:
            cloudckpt.load(target, bad)
        assert shard.name in caught.value.key
        assert torch.equal(target["w"], torch.full((1000,), -1.0))  # type: ignore[arg-type]
    assert_intact(good)


def test_a_file_that_is_no_manifest_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        cloudckpt.load(state(), tmp_path)


def test_a_file_system_without_atomic_create_needs_a_promise(tmp_path: Path) -> None:
    url = f"simplecache::file://{tmp_path}/x"
    with pytest.raises(CloudCkptError) as caught:
        cloudckpt.save(state(), url)
    assert isinstance(caught.value, CreateNotEnforcedError | OptionsError)


def test_the_state_must_be_a_dict_with_names() -> None:
    for wrong in ({}, {1: torch.zeros(1)}, {"cloudckpt.rng": 1}):
        with pytest.raises(OptionsError):
            cloudckpt.save(wrong, "memory://x")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [cloudckpt.save, cloudckpt.load])
def test_a_url_where_the_state_belongs_is_told_so(tmp_path: Path, call: object) -> None:
    with pytest.raises(OptionsError, match=r"the URL stands where the state belongs; call (save|load)\(state, url\)"):
        call(tmp_path / "c", state())  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", [None, 7, b"c", ["c"]], ids=repr)
def test_what_is_no_url_is_refused(url: object) -> None:
    for call in (
        lambda: cloudckpt.save(state(), url),  # type: ignore[arg-type]
        lambda: cloudckpt.load(state(), url),  # type: ignore[arg-type]
        lambda: cloudckpt.read(url),  # type: ignore[arg-type]
        lambda: CheckpointManager(url),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionsError, match=f"the URL is a {type(url).__name__}; give a path or a URL"):
            call()


def test_metrics_and_metadata_that_no_manifest_holds_are_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    halves = {"metrics": {f"{number:0100}": 1.0 for number in range(20_000)}, "metadata": {"log": "x" * (3 << 20)}}
    with pytest.raises(OptionsError, match="move large metadata into the state"):
        cloudckpt.save(state(), tmp_path / "c", **halves)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="move large metadata into the state"):
        cloudckpt.CloudWriter(tmp_path / "c", **halves)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    cloudckpt.save(state(), tmp_path / "c", metadata={"log": "x" * (3 << 20)})
