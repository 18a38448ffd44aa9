"""The obstore engine keeps the laws of remote engines, and its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cloudckpt.errors import AccessDeniedError, StorageError, TransientError
from cloudckpt.options import MIB
from tests.store.engine_laws import EngineLaws, RefusesSingleDeletes
from tests.store.engines import OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_object_server import Fault, ObjectServer


class TestObstoreOnS3(EngineLaws):
    engine = OBSTORE_S3


@pytest.mark.slow  # only on request; the default one for GCS is gcsfs
class TestObstoreOnGcs(RefusesSingleDeletes, EngineLaws):
    engine = OBSTORE_GCS


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.mark.parametrize("engine", [OBSTORE_S3, S3FS], ids=["obstore", "s3fs"])
def test_a_bucket_of_another_region_is_told_with_what_to_set(server: ObjectServer, engine: Engine) -> None:
    server.inject(Fault(status=301, code="PermanentRedirect"), method="PUT", times=-1)
    store = engine.open(server)
    with pytest.raises(StorageError, match="region_name") as caught:
        store.create("k", b"x")
    assert not isinstance(caught.value, TransientError)
    store.close()


@pytest.mark.parametrize("engine", [OBSTORE_S3, S3FS], ids=["obstore", "s3fs"])
@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "MalformedXML"), (501, "")]
)
def test_a_store_without_bulk_deletes_is_asked_for_single_ones_from_then_on(
    server: ObjectServer, engine: Engine, status: int, code: str
) -> None:
    server.inject(Fault(status=status, code=code), method="POST", times=-1)
    server.inject(Fault(status=403, code="AccessDenied"), method="DELETE", when=lambda request: "kept" in request.path)
    names = [f"{number:03}" for number in range(70)]
    for name in [*names, "kept"]:
        server.put_object(f"root/{name}", b"x")
    store = engine.open(server)
    with pytest.raises(AccessDeniedError, match=r"'kept'.*1 of 72 objects"):
        store.delete([*names, "kept", "absent"])
    store.delete(["absent"])
    store.close()
    assert [name for _, name in server.objects] == ["root/kept"]
    assert [request.method for request in server.requests].count("POST") == 1


def test_a_bulk_delete_that_fails_for_another_reason_is_not_tried_singly(server: ObjectServer) -> None:
    server.put_object("root/k", b"x")
    server.inject(Fault(status=503, code="SlowDown"), method="POST")
    store = S3FS.open(server)
    with pytest.raises(TransientError):
        store.delete(["k"])
    store.delete(["k"])
    store.close()
    assert [request.method for request in server.requests] == ["POST", "POST"]


def test_a_put_leaves_other_python_threads_running(server: ObjectServer) -> None:
    store = OBSTORE_S3.open(server)
    large = memoryview(bytes(64 * MIB))
    store.put("k", [large])
    done, turns = threading.Event(), 0

    def put() -> None:
        store.put("k", [large])
        done.set()

    thread = threading.Thread(target=put)
    thread.start()
    while not done.is_set():
        turns += 1
    thread.join()
    store.close()
    # The server shares this interpreter's lock; a put that held it would never be served.
    assert turns > 0
    assert len(server.objects["bucket", "root/k"].data) == 64 * MIB


def test_memory_that_get_returns_outlives_the_store(server: ObjectServer) -> None:
    server.put_object("root/k", b"abc" * 1000)
    store = OBSTORE_S3.open(server)
    view = store.get("k", start=0, stop=3000)
    store.close()
    del store
    assert view == b"abc" * 1000
