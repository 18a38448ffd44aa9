"""The fsspec engine keeps the laws of remote engines, and its own."""

from __future__ import annotations

import asyncio
import gc
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec.asyn
import pytest
import torch

import cloudckpt
from cloudckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    TransientError,
)
from cloudckpt.options import Options
from cloudckpt.store.fsspec import FsspecStore
from cloudckpt.store.kept import release_idle
from cloudckpt.store.wire import GatherBody
from tests.store.engine_laws import EngineLaws, RefusesSingleDeletes
from tests.store.engines import GCSFS, OBSTORE_S3, S3FS, Engine
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

ON_LOOP = [pytest.param(S3FS, id="s3fs"), pytest.param(GCSFS, id="gcsfs")]


class TestS3fs(EngineLaws):
    engine = S3FS


class TestGcsfs(RefusesSingleDeletes, EngineLaws):
    engine = GCSFS


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        server.put_object("root/there", bytes(100))
        yield server


@pytest.mark.parametrize("engine", ON_LOOP)
def test_a_request_that_was_cancelled_is_no_success(server: ObjectServer, engine: Engine) -> None:
    loop = fsspec.asyn.get_loop()

    async def cancel_all() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    store = engine.open(server)
    server.inject(Fault(kind=FaultKind.STALL))
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(store.put, "k", [memoryview(b"x")])
        while not server.count():
            time.sleep(0.01)
        asyncio.run_coroutine_threadsafe(cancel_all(), loop).result(10)
        with pytest.raises(TransientError):
            put.result(10)
    store.close()


@pytest.mark.parametrize("engine", ON_LOOP)
def test_a_verb_on_fsspecs_own_loop_fails_and_does_not_wait_for_itself(server: ObjectServer, engine: Engine) -> None:
    store = engine.open(server)
    store.head("there")

    async def call() -> None:
        store.head("there")

    with pytest.raises(StorageError, match="RuntimeError"):
        asyncio.run_coroutine_threadsafe(call(), fsspec.asyn.get_loop()).result(10)
    store.close()


@pytest.mark.parametrize("engine", ON_LOOP)
def test_what_is_kept_for_the_next_store_can_be_hung_up(server: ObjectServer, engine: Engine) -> None:
    store = engine.open(server)
    store.head("there")
    assert len(server._connections) == 1
    store.close()
    release_idle()
    assert _hangs_up(server)


@pytest.mark.parametrize("engine", [*ON_LOOP, pytest.param(OBSTORE_S3, id="obstore")])
def test_a_store_that_is_dropped_unclosed_hangs_up_without_a_word(
    server: ObjectServer, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = engine.open(server)
    store.head("there")
    store.list()
    del store
    gc.collect()
    release_idle()
    assert _hangs_up(server)
    assert caplog.records == []


@pytest.mark.parametrize("engine", [S3FS, GCSFS, OBSTORE_S3], ids=str)
def test_stores_of_one_bucket_share_a_connection_and_close_it_for_nobody_else(
    server: ObjectServer, engine: Engine
) -> None:
    same = engine.options(server)  # credentials of Google are the same where they are one object
    first, second = engine.open(server, **same), engine.open(server, root="bucket/other", **same)
    first.put("k", [memoryview(b"x")])
    second.put("k", [memoryview(b"y")])
    assert first._lease is second._lease is not None
    first.close()
    assert second.read("k", limit_bytes=1) == b"y"
    second.close()
    third = engine.open(server)
    assert third.read("k", limit_bytes=1) == b"x"
    kept = third._lease
    third.refresh()
    assert third.read("k", limit_bytes=1) == b"x"
    assert third._lease is not kept
    third.close()


def _hangs_up(server: ObjectServer) -> bool:
    """Wait until the server has no connection any more."""
    for _ in range(1000):
        if not server._connections:
            return True
        time.sleep(0.01)
    return False


def test_a_bodys_reader_may_rewind_and_read_in_steps() -> None:
    body = GatherBody([memoryview(b"abc"), memoryview(b""), memoryview(b"defgh"), memoryview(b"i")])
    assert (len(body), body.tell(), body.read(), body.read(), body.read(5)) == (9, 0, b"abcdefghi", b"", b"")
    assert (body.seek(0), body.read(4), body.tell(), body.read(4), body.read(4)) == (0, b"abcd", 4, b"efgh", b"i")
    assert (body.seek(-2, 2), body.read(), body.seek(2), body.read(2), body.seek(1, 1)) == (7, b"hi", 2, b"cd", 5)


def _wins(store: FsspecStore, key: str, number: int, barrier: threading.Barrier) -> bool:
    barrier.wait()
    try:
        store.create(key, b"%d" % number)
    except ObjectExistsError:
        return False
    return True


class TestMemory:
    """memory:// by the generic wire."""

    @pytest.fixture
    def root(self) -> str:
        return f"memory://tests/{secrets.token_hex(6)}"

    @pytest.fixture
    def store(self, root: str) -> Iterator[FsspecStore]:
        store = FsspecStore(root)
        yield store
        store.close()

    def test_objects_are_written_read_and_overwritten(self, store: FsspecStore) -> None:
        store.put("a/k", [memoryview(b"one"), memoryview(b"two")])
        into = memoryview(bytearray(4))
        assert (store.read("a/k", limit_bytes=6), bytes(store.get("a/k", start=1, stop=5, into=into))) == (
            b"onetwo",
            b"netw",
        )
        store.put("a/k", [memoryview(b"3")])
        assert (store.head("a/k").size_bytes, bytes(into)) == (1, b"netw")

    def test_of_racing_creates_one_wins(self, root: str) -> None:
        stores, barrier = [FsspecStore(root) for _ in range(4)], threading.Barrier(4)

        def attempt(number: int) -> list[bool]:
            return [_wins(stores[number], f"prize-{turn}", number, barrier) for turn in range(20)]

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(attempt, range(4)))
        for turn in range(20):
            winners = [number for number in range(4) if won[number][turn]]
            assert [b"%d" % number for number in winners] == [stores[0].read(f"prize-{turn}", limit_bytes=9)]

    def test_listings_and_deletes_are_those_of_a_bucket(self, store: FsspecStore, root: str) -> None:
        for name in ("step-1/a", "step-12/b", "step-2/c", "top"):
            store.put(name, [memoryview(b"x")])
        assert [info.key for info in store.list("step-1").objects] == ["step-1/a", "step-12/b"]
        listing = store.list(delimiter="/")
        assert ([info.key for info in listing.objects], listing.prefixes) == (
            ["top"],
            ("step-1/", "step-12/", "step-2/"),
        )
        assert store.list("absent/").objects == ()
        store.delete(["step-1/a", "top", "never"])
        assert [info.key for info in store.list().objects] == ["step-12/b", "step-2/c"]
        assert FsspecStore(f"{root}2").list().objects == ()

    def test_what_is_missing_or_too_short_is_told(self, store: FsspecStore) -> None:
        store.put("a/k", [memoryview(b"abc")])
        for verb in (
            store.head,
            lambda key: store.get(key, start=0, stop=1),
            lambda key: store.read(key, limit_bytes=9),
        ):
            for key in ("none", "a"):
                with pytest.raises(ObjectNotFoundError):
                    verb(key)
        with pytest.raises(StorageError, match="3 bytes"):
            store.get("a/k", start=1, stop=5)
        with pytest.raises(StorageError, match="more than the 2 bytes"):
            store.read("a/k", limit_bytes=2)

    def test_a_create_is_exclusive_within_its_one_process(self, store: FsspecStore) -> None:
        assert store.is_create_atomic


class TestAnyFilesystem:
    """A filesystem of fsspec that cloudckpt knows nothing about; here, a disk by its generic calls."""

    def test_it_serves_all_verbs_but_cannot_promise_an_exclusive_create(self, tmp_path: Path) -> None:
        store = FsspecStore(f"file://{tmp_path}/root")
        store.put("a/b/k", [memoryview(b"abc")])
        store.create("c", b"one")
        with pytest.raises(ObjectExistsError):
            store.create("c", b"two")
        assert (tmp_path / "root/a/b/k").read_bytes() == b"abc"
        assert [(info.key, info.size_bytes) for info in store.list().objects] == [("a/b/k", 3), ("c", 3)]
        assert store.list(delimiter="/").prefixes == ("a/",)
        store.delete(["a/b/k", "never"])
        assert [info.key for info in store.list().objects] == ["c"]
        assert not store.is_create_atomic
        store.close()

    @pytest.mark.parametrize("scheme", ["http", "https", "github", "zip", "reference", "data", "simplecache"])
    def test_what_cannot_be_written_or_listed_is_refused_by_name(self, scheme: str) -> None:
        with pytest.raises(OptionsError, match=f"{scheme}://.*wrong address"):
            FsspecStore(f"{scheme}://host/run")

    def test_a_filesystem_without_listings_is_refused_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mute(fsspec.AbstractFileSystem):  # type: ignore[misc]
            protocol = "mute"

        monkeypatch.setattr("cloudckpt.store.fsspec.get_filesystem_class", lambda _: Mute)
        with pytest.raises(OptionsError, match=r"mute://.*be listed"):
            FsspecStore("mute://host/run")

    @pytest.mark.parametrize("page", [b"<html>please log in</html>", None], ids=["portal", "nothing"])
    def test_a_web_server_is_neither_a_checkpoint_nor_a_fresh_start(self, page: bytes | None) -> None:
        with ObjectServer() as server:
            answer = Fault(status=404) if page is None else Fault(status=200, body=page)
            server.inject(answer, times=-1)
            url, options = f"http://127.0.0.1:{server.port}/run", Options(single_writer=True)
            with pytest.raises(OptionsError, match="http://"):
                cloudckpt.CheckpointManager(url, options=options).restore({"w": torch.zeros(1)})
            with pytest.raises(OptionsError, match="http://"):
                cloudckpt.read(url)
            assert server.count() == 0

    def test_a_scheme_that_nobody_knows_is_an_error_of_the_call(self) -> None:
        with pytest.raises(OptionsError, match="nobody"):
            FsspecStore("nobody://root/a").head("k")
