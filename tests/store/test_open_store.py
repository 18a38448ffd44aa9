"""A URL leads to one engine; what is wrong with it is said at once, and a secret in it never."""

from __future__ import annotations

import os
import pathlib
import sys
from pathlib import Path

import pytest

from cloudckpt.errors import OptionsError
from cloudckpt.options import Options, RetryPolicy
from cloudckpt.store import open_store

S3 = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "us-east-1"}}
GCS = {"token": "anon"}
SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("url", "engine", "options", "expected"),
    [
        ("s3://bucket/run", "auto", S3, ("obstore", "s3://bucket/run")),
        ("s3a://bucket/run/", "auto", S3, ("obstore", "s3://bucket/run")),
        ("S3://bucket", "auto", S3, ("obstore", "s3://bucket")),
        ("s3://bucket/run", "fsspec", S3, ("fsspec", "s3://bucket/run")),
        ("gs://bucket/run", "auto", GCS, ("fsspec", "gs://bucket/run")),
        ("gcs://bucket/run", "fsspec", GCS, ("fsspec", "gs://bucket/run")),
        ("gs://bucket/run", "obstore", GCS, ("obstore", "gs://bucket/run")),
        ("memory://some/run", "auto", None, ("fsspec", "memory://some/run")),
    ],
)
def test_a_url_and_an_engine_lead_to_one_store(
    url: str, engine: str, options: dict[str, object] | None, expected: tuple[str, str]
) -> None:
    with open_store(url, engine=engine, storage_options=options) as store:
        assert (store.engine, store.url) == expected


@pytest.mark.parametrize("engine", ["auto", "local"])
@pytest.mark.parametrize("form", ["path", "url", "Path", "relative"])
def test_a_path_leads_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, engine: str) -> None:
    monkeypatch.chdir(tmp_path)
    url = {"path": f"{tmp_path}/run", "url": f"file://{tmp_path}/run", "Path": tmp_path / "run", "relative": "run"}[
        form
    ]
    with open_store(url, engine=engine) as store:
        store.put("a", [memoryview(b"x")])
        assert store.engine == "local"
    assert (tmp_path / "run/a").read_bytes() == b"x"


def test_the_url_of_a_store_opens_the_same_store_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "100% mine") as store:
        store.put("a", [memoryview(b"x")])
    with open_store(store.url) as again:
        assert again.read("a", limit_bytes=1) == b"x"


def test_the_policy_of_the_options_is_kept(tmp_path: Path) -> None:
    policy = RetryPolicy(max_attempts=3)
    with open_store(tmp_path, options=Options(retry=policy)) as store:
        assert store._policy is policy


@pytest.mark.parametrize(
    ("url", "engine", "message"),
    [
        ("s3://bucket", "s3fs", "engine 's3fs' is unknown; give one of auto, local, obstore, fsspec"),
        ("s3://bucket", "", "engine '' is unknown"),
        ("s3://bucket", "local", "does not serve s3://; give obstore or fsspec"),
        ("./run", "fsspec", "does not serve paths; give local"),
        ("file:///run", "obstore", "does not serve file://; give local"),
        ("memory://run", "obstore", "does not serve memory://; give fsspec"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_those_that_do(url: str, engine: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        open_store(url, engine=engine)


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionsError, match=r"scheme s4:// is unknown; fsspec knows .*gs://.*s3://"):
        open_store("s4://bucket/run")


def test_a_scheme_whose_package_is_missing_says_what_to_install() -> None:
    with pytest.raises(OptionsError, match="adlfs"):
        open_store("abfs://container@account.dfs.core.windows.net/run")


@pytest.mark.parametrize(
    ("url", "engine", "missing"),
    [
        ("s3://bucket/run", "auto", "s3fs"),
        ("s3://bucket/run", "fsspec", "s3fs"),
        ("s3://bucket/run", "auto", "obstore"),
        ("gs://bucket/run", "auto", "gcsfs"),
        ("gs://bucket/run", "obstore", "gcsfs"),
        ("gs://bucket/run", "obstore", "obstore"),
    ],
)
def test_a_store_whose_package_is_missing_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, url: str, engine: str, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(OptionsError, match=rf"{url[:2]}:// needs {missing}, .*; pip install {missing}$"):
        open_store(url, engine=engine, storage_options={})


@pytest.mark.parametrize(
    ("url", "engine", "others"),
    [("s3://bucket/run", "fsspec", ["gcsfs", "obstore"]), ("gs://bucket/run", "fsspec", ["s3fs", "obstore"])],
)
def test_a_package_is_needed_only_where_its_store_is_used(
    monkeypatch: pytest.MonkeyPatch, url: str, engine: str, others: list[str]
) -> None:
    for name in others:
        monkeypatch.setitem(sys.modules, name, None)
    with open_store(url, engine=engine, storage_options=S3 if url.startswith("s3") else GCS) as store:
        assert store.url == url


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("runs\\7", r"has '\\\\', which"),
        ("runs\n7", r"has '\\n', which"),
        ("runs\udcff", r"has '\\udcff', which"),
        ("x" * 901, "has 901 bytes; choose one of at most 900"),
        ("é" * 451, "has 902 bytes"),
    ],
    ids=["backslash", "line feed", "no text", "long", "long in bytes"],
)
@pytest.mark.parametrize("engine", ["auto", "fsspec"])
def test_a_refused_place_is_told_by_what_is_wrong_with_it(place: str, message: str, engine: str) -> None:
    with pytest.raises(OptionsError, match=message):
        open_store(f"s3://bucket/{place}", engine=engine)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://AKIA:{SECRET}@bucket/run", "a password"),
        (f"s3://{SECRET}@bucket/run", "a password"),
        (f"s3://AKIA:{SECRET}/more@bucket/run", "a bucket's name"),
        (f"s3://AKIA:{SECRET}", "a bucket's name"),
        (f"gs://user:{SECRET}@bucket/run", "a password"),
        (f"abfs://container:{SECRET}@account/run", "a password"),
        (f"ftp://user:{SECRET}@host/run", "a password"),
        (f"az://container/run?sig={SECRET}", "a query"),
        (f"s3://bucket/run?X-Amz-Signature={SECRET}", "a query"),
        (f"s3://bucket/run#{SECRET}", "a fragment"),
        (f"s3:/AKIA:{SECRET}@bucket", "one slash"),
        (f"simplecache::s3://AKIA:{SECRET}@bucket", "chained"),
    ],
    ids=lambda value: value.replace(SECRET, "SECRET"),
)
@pytest.mark.parametrize("engine", ["auto", "fsspec"])
def test_a_url_with_a_credential_is_refused_and_not_repeated(url: str, message: str, engine: str) -> None:
    with pytest.raises(OptionsError, match=message) as caught:
        open_store(url, engine=engine)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__cause__)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (pathlib.PurePosixPath("s3://bucket/run"), "eats the other"),
        ("simplecache::s3://bucket/run", "chained"),
        ("s3://", "bucket's name"),
        ("s3:///run", "bucket's name"),
        ("s3:bucket/run", "write s3://"),
        ("S3A:bucket", "write s3a://"),
        ("gs:bucket/run", "write gs://"),
        ("file:run", "write file://"),
        ("memory:run", "write memory://"),
        ("s3//bucket/run", "write s3://"),
        ("gs://", "bucket's name"),
        ("s3://bucket/a//b", "segment"),
        ("s3://bucket/../other", "segment"),
        ("gs://bucket/./a", "segment"),
        ("file://host/run", "absolute path"),
        ("", "no path"),
        ("~nobody\0/run", "no path"),
        ("file:///run%00", "no path"),
        ("run\ud800", "no path"),
        ("file:///run\ud800", "no path"),
    ],
)
def test_what_names_no_root_is_refused(url: str | os.PathLike[str], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        open_store(url)


@pytest.mark.parametrize("name", ["run:1", "s3", "s3x:y", "./s3:run", "files/2026:12"])
def test_a_colon_may_stand_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(name) as store:
        store.put("a", [memoryview(b"x")])
    assert (tmp_path / name / "a").read_bytes() == b"x"


@pytest.mark.parametrize("url", ["/", "//", "file:///", "file:////"])
def test_the_root_of_the_disk_has_a_url_that_opens_it_again(url: str) -> None:
    with open_store(url) as store, open_store(store.url) as again:
        assert (store.url, again.url) == ("file:///", "file:///")


def test_two_slashes_at_the_start_of_a_path_are_one() -> None:
    with open_store("file:////tmp/run") as store, open_store("//tmp/run") as same:
        assert (store.url, same.url) == ("file:///tmp/run", "file:///tmp/run")


def test_an_access_point_is_a_bucket() -> None:
    arn = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
    with open_store(f"s3://{arn}/run", storage_options=S3, engine="fsspec") as store:
        assert store.url == f"s3://{arn}/run"


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "az://container/run", "./run"])
def test_options_have_names_that_are_texts(url: str) -> None:
    with pytest.raises(OptionsError, match="a name that is a int") as caught:
        open_store(url, storage_options={7: SECRET})  # type: ignore[dict-item]
    assert SECRET not in str(caught.value)


def test_options_for_a_disk_are_refused_by_name_only(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="auto_mkdir, key were given") as caught:
        open_store(tmp_path, storage_options={"key": SECRET, "auto_mkdir": True})
    assert SECRET not in str(caught.value)
