"""What a put says beside its bytes reaches the store, which refuses what does not agree, or is refused by name here."""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt.errors import ObjectExistsError, OptionsError, StorageError
from cloudckpt.options import KIB, MIB, Checksum, Options, RetryPolicy
from cloudckpt.store import RetryingStore, Store, open_store
from cloudckpt.store.s3_config import headers_for
from cloudckpt.store.terms import PutTerms, checksum_of
from tests.conftest import FreshPrefix
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, FaultKind, ObjectServer
from tests.store.spoiling_proxy import SpoilingProxy

OFFERED = [
    *((OBSTORE_S3, kind) for kind in ("crc64nvme", "sha256")),
    *((S3FS, kind) for kind in ("sha256", "crc32c", "crc32")),
    (GCSFS, "crc32c"),
]
REFUSED: list[tuple[Engine, Checksum]] = [
    *((OBSTORE_S3, kind) for kind in ("crc32", "crc32c")),  # type: ignore[list-item]
    *((GCSFS, kind) for kind in ("sha256", "crc64nvme", "crc32")),  # type: ignore[list-item]
    *((OBSTORE_GCS, kind) for kind in ("sha256", "crc64nvme", "crc32c", "crc32")),  # type: ignore[list-item]
]
CREATING = [
    *(pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore-s3")),
    *(pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore-gcs")),
]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.mark.parametrize(
    ("kind", "digits"),
    [("crc32", "cbf43926"), ("crc32c", "e3069283"), ("sha256", "15e2b0d3c33891ebb0f1ef609ec41942")],
)
def test_a_checksum_is_that_of_the_catalogues(kind: Checksum, digits: str) -> None:
    parts = [memoryview(b"123"), memoryview(b""), memoryview(bytearray(b"456789"))]
    assert base64.b64decode(checksum_of(kind, parts)).hex()[:32] == digits


def test_crc64nvme_is_computed_by_awscrt_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    crt = ModuleType("awscrt")
    crt.checksums = type("checksums", (), {"crc64nvme": staticmethod(lambda data, value: value * 256 + len(data))})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "awscrt", crt)
    assert base64.b64decode(checksum_of("crc64nvme", [memoryview(b"ab"), memoryview(b"c")])).hex() == f"{0x201:016x}"


def test_crc64nvme_by_s3fs_without_awscrt_is_refused_with_what_to_do(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "awscrt", None)
    with pytest.raises(OptionsError, match=r'botocore\[crt\], or pass engine="obstore"'):
        S3FS.open(server, terms=PutTerms(checksum="crc64nvme"))
    assert server.requests == []


@pytest.mark.parametrize(("engine", "kind"), OFFERED)
def test_every_put_has_the_checksum_that_a_locked_bucket_demands(
    server: ObjectServer, engine: Engine, kind: Checksum
) -> None:
    server.demands_checksum = True
    store = engine.open(server, terms=PutTerms(checksum=kind))
    parts = [memoryview(b"head"), memoryview(bytes(range(256))), memoryview(b"tail")]
    store.put("put", parts)
    store.create("created", b"abc")
    assert server.data("root/put") == b"".join(parts)
    assert server.data("root/created") == b"abc"
    assert server.count() == 2
    store.close()


@pytest.mark.parametrize("engine", CREATING[:3])
def test_without_one_such_a_bucket_refuses(server: ObjectServer, engine: Engine) -> None:
    server.demands_checksum = True
    store = engine.open(server)
    with pytest.raises(StorageError):
        store.put("put", [memoryview(b"x")])
    store.close()


@pytest.mark.parametrize(("engine", "kind"), REFUSED)
def test_a_checksum_that_an_engine_cannot_send_is_refused_by_name(
    server: ObjectServer, engine: Engine, kind: Checksum
) -> None:
    with pytest.raises(OptionsError, match=f"checksum='{kind}' cannot be sent by"):
        engine.open(server, terms=PutTerms(checksum=kind))


@pytest.mark.parametrize("more", [{"checksum": "sha256"}, {"create_only": True}])
@pytest.mark.parametrize("url", ["{tmp}", "memory://root/x"])
def test_where_no_server_could_check_they_are_refused(tmp_path: Path, url: str, more: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=next(iter(more))):
        open_store(url.format(tmp=tmp_path), options=Options(**more))


@pytest.mark.parametrize("value", ["md5", "SHA256", True, 5])
def test_an_unknown_checksum_is_refused_with_those_that_are(value: Any) -> None:
    with pytest.raises(OptionsError, match="crc64nvme, sha256, crc32c, crc32"):
        Options(checksum=value)


def test_a_condition_with_every_put_and_with_none_exclude_each_other() -> None:
    with pytest.raises(OptionsError, match="create_only"):
        Options(create_only=True, single_writer=True)


# ---- create_only


@pytest.mark.parametrize("engine", CREATING)
def test_a_bucket_whose_policy_demands_a_condition_takes_a_whole_save(server: ObjectServer, engine: Engine) -> None:
    server.demands_condition = True
    state = {"t": torch.arange(1000)}

    def save(*, create_only: bool) -> None:
        cloudckpt.save(
            state,
            f"{engine.scheme}://bucket/{create_only}",
            storage_options=engine.options(server),
            engine=engine.kind.engine,
            options=Options(create_only=create_only, retry=RetryPolicy(max_attempts=2)),
        )

    save(create_only=True)
    with pytest.raises(cloudckpt.CloudCkptError):
        save(create_only=False)
    saved = [request for request in server.requests if "True" in _name(request) and "delete" not in request.query]
    writes = [request for request in saved if request.method in ("PUT", "POST")]
    assert len(writes) > 3
    assert [request for request in writes if not _is_conditional(request)] == []


def _name(request: Request) -> str:
    return request.path + request.query.get("name", "") + bytes(request.body[:400]).decode("latin-1")


def _is_conditional(request: Request) -> bool:
    headers, query = request.headers, request.query
    return "*" in headers.get("if-none-match", "") or "0" in (
        headers.get("x-goog-if-generation-match"),
        query.get("ifGenerationMatch"),
    )


def patient(store: Store) -> RetryingStore:
    return RetryingStore(store, RetryPolicy(), sleep=lambda _: None, rng=random.Random(0))


@pytest.mark.parametrize("engine", CREATING)
def test_a_put_whose_answer_was_lost_is_no_others(server: ObjectServer, engine: Engine) -> None:
    store = patient(engine.open(server, terms=PutTerms(create_only=True)))
    server.inject(Fault(kind=FaultKind.LOST_ACK))
    store.put("k", [memoryview(b"ours")])
    assert server.data("root/k") == b"ours"
    store.close()


@pytest.mark.parametrize("engine", CREATING)
@pytest.mark.parametrize("lost", [False, True])
def test_a_put_never_replaces_what_stands_there(server: ObjectServer, engine: Engine, lost: bool) -> None:
    server.put_object("root/k", b"theirs")
    store = patient(engine.open(server, terms=PutTerms(create_only=True)))
    if lost:
        server.inject(Fault(kind=FaultKind.RESET_BEFORE_REPLY))
    with pytest.raises(ObjectExistsError) as caught:
        store.put("k", [memoryview(b"ours")])
    assert (caught.value.op, server.data("root/k")) == ("put", b"theirs")
    store.close()


# ---- endpoints with ways of their own


@pytest.mark.parametrize(
    "host", ["t3.storage.dev", "fly.storage.tigris.dev", "bucket.fly.storage.tigris.dev", "t3.tigris.dev:443"]
)
def test_tigris_is_asked_for_its_newest(host: str) -> None:
    assert headers_for(f"https://{host}") == {"X-Tigris-Consistent": "true"}


@pytest.mark.parametrize("url", ["https://s3.amazonaws.com", "http://127.0.0.1:9000", "https://nottigris.dev", ""])
def test_nobody_else_is(url: str) -> None:
    assert headers_for(url) == {}


@pytest.mark.parametrize("engine", [S3FS, OBSTORE_S3], ids=["s3fs", "obstore"])
def test_the_header_goes_with_every_request(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudckpt.store.s3_config._TIGRIS", ("127.0.0.1",))
    store = engine.open(server)
    store.put("k", [memoryview(b"x")])
    store.read("k", limit_bytes=9)
    store.list()
    store.delete(["k"])
    assert {request.headers.get("x-tigris-consistent") for request in server.requests} == {"true"}
    store.close()


@pytest.mark.parametrize("engine", [S3FS, OBSTORE_S3], ids=["s3fs", "obstore"])
@pytest.mark.parametrize("host", ["storage.googleapis.com", "storage.googleapis.com:443"])
def test_google_by_s3_is_sent_to_gs(engine: Engine, host: str) -> None:
    options = {"key": "K", "secret": "S", "endpoint_url": f"https://{host}"}
    store = engine.kind("s3://bucket/root", storage_options=options)
    with pytest.raises(OptionsError, match="use gs:// URLs"):
        store.put("k", [memoryview(b"x")])
    store.close()


# ---- a real server


@pytest.mark.parametrize(
    ("engine", "kind"), [("obstore", "sha256"), ("fsspec", "sha256"), ("fsspec", "crc32c"), ("fsspec", "crc32")]
)
def test_bytes_that_are_spoilt_on_the_way_are_refused_at_the_door(
    s3_url: FreshPrefix, engine: str, kind: Checksum
) -> None:
    data = random.Random(7).randbytes(MIB)
    options = Options(checksum=kind, retry=RetryPolicy(backoff_base_s=0.01))
    endpoint = str(s3_url.server.storage_options["endpoint_url"])
    with SpoilingProxy(endpoint, after=data[: 4 * KIB]) as proxy:
        given = {**s3_url.server.storage_options, "endpoint_url": proxy.endpoint}
        with open_store(s3_url.url, storage_options=given, engine=engine, options=options) as store:
            with pytest.raises(StorageError):
                store.inner.put("spoilt", [memoryview(data)])
            proxy.spoil_next()
            store.put("made-good", [memoryview(data)])
            assert proxy.spoilt == 2
            assert [info.key for info in store.list().objects] == ["made-good"]
            assert store.read("made-good", limit_bytes=MIB) == data
