"""What credentials may do is enough where it can be, and the right that is missing is named where it is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from urllib.parse import unquote

import pytest
import torch

import cloudckpt
from cloudckpt.errors import AccessDeniedError, CheckpointNotFoundError, CommitUnknownError, StorageError
from cloudckpt.store import probe_create
from cloudckpt.store.probe import _RACES, _proven
from cloudckpt.store.retrying import RetryingStore
from tests.store.engines import GCSFS, OBSTORE_S3, S3FS, Engine
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

HASTY = cloudckpt.Options(
    retry=cloudckpt.RetryPolicy(max_attempts=3, deadline_s=10.0, request_timeout_s=3.0, backoff_base_s=0.01)
)
ON_S3 = [pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore")]
EVERYWHERE = [*ON_S3, pytest.param(GCSFS, id="gcsfs")]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    _proven.clear()
    with ObjectServer() as server:
        yield server
    _proven.clear()


def _deny(server: ObjectServer, when: Callable[[Request], bool]) -> None:
    server.inject(Fault(status=403, code="AccessDenied"), times=-1, when=when)


def _is_listing(request: Request) -> bool:
    return "list-type" in request.query or request.path.rstrip("/").endswith(("/o", "/bucket"))


def _deny_listing(server: ObjectServer) -> None:
    """Deny as S3 does without s3:ListBucket: listings, and whatever is asked of an object that is not there."""

    def is_denied(request: Request) -> bool:
        _, _, key = unquote(request.path).lstrip("/").partition("/")
        is_absent = request.method in ("GET", "HEAD") and ("bucket", key) not in server.objects
        return _is_listing(request) or is_absent

    _deny(server, is_denied)


def _is_write(request: Request) -> bool:
    return request.method in ("PUT", "POST", "DELETE")


def _state() -> dict[str, object]:
    return {"w": torch.arange(8.0)}


def _about(server: ObjectServer, engine: Engine) -> dict[str, object]:
    return {"storage_options": engine.options(server), "engine": engine.kind.engine, "options": HASTY}


@pytest.mark.parametrize("engine", ON_S3)
def test_a_save_needs_no_right_to_list_or_to_delete(server: ObjectServer, engine: Engine) -> None:
    _deny_listing(server)
    _deny(server, lambda request: request.method == "POST")
    cloudckpt.save(_state(), "s3://bucket/run", **_about(server, engine))  # type: ignore[arg-type]
    state = {"w": torch.zeros(8)}
    cloudckpt.load(state, "s3://bucket/run", **_about(server, engine))  # type: ignore[arg-type]
    assert torch.equal(state["w"], torch.arange(8.0))


@pytest.mark.parametrize("engine", ON_S3)
def test_a_single_writer_needs_no_right_to_list(server: ObjectServer, engine: Engine) -> None:
    _deny_listing(server)
    about = {**_about(server, engine), "options": replace(HASTY, single_writer=True)}
    cloudckpt.save(_state(), "s3://bucket/run", **about)  # type: ignore[arg-type]
    state = {"w": torch.zeros(8)}
    cloudckpt.load(state, "s3://bucket/run", **about)  # type: ignore[arg-type]
    assert torch.equal(state["w"], torch.arange(8.0))


@pytest.mark.parametrize("engine", ON_S3)
def test_a_save_needs_no_right_to_list_when_a_reply_is_lost(server: ObjectServer, engine: Engine) -> None:
    _deny_listing(server)
    server.inject(
        Fault(kind=FaultKind.RESET_BEFORE_REPLY), when=lambda request: request.path.endswith("/manifest.json")
    )
    cloudckpt.save(_state(), "s3://bucket/run", **_about(server, engine))  # type: ignore[arg-type]
    assert ("bucket", "run/manifest.json") in server.objects


@pytest.mark.parametrize("engine", ON_S3)
def test_a_manager_that_may_not_list_is_told_the_right(server: ObjectServer, engine: Engine) -> None:
    _deny_listing(server)
    with (
        cloudckpt.CheckpointManager("s3://bucket/run", **_about(server, engine)) as manager,  # type: ignore[arg-type]
        pytest.raises(AccessDeniedError, match="s3:ListBucket"),
    ):
        manager.save(1, _state())


@pytest.mark.parametrize("engine", EVERYWHERE)
def test_a_manager_that_keeps_all_needs_no_right_to_delete(server: ObjectServer, engine: Engine) -> None:
    _deny(server, lambda request: request.method == "DELETE" or "delete" in request.query)
    url, about = f"{engine.scheme}://bucket/run", _about(server, engine)
    for job in range(2):
        with cloudckpt.CheckpointManager(url, sweep_after_s=None, **about) as manager:  # type: ignore[arg-type]
            manager.restore(_state())
            for step in (2 * job, 2 * job + 1):
                manager.save(step, _state())
            assert manager.latest() == manager.checkpoints()[-1]
            assert manager.report().troubles == ()
    keys = server.keys()
    kept = [key for key in keys if not re.search(r"/(epochs|step-[0-9-]*e[0-9]*)/", key)]
    assert [key for key in kept if not key.startswith("run/probe-")] == []
    assert 1 <= len(kept) <= _RACES, "what the probe of the store could not delete, one for each of its races"


@pytest.mark.parametrize("engine", EVERYWHERE)
def test_to_restore_is_enough_to_read(server: ObjectServer, engine: Engine) -> None:
    about = _about(server, engine)
    with cloudckpt.CheckpointManager(f"{engine.scheme}://bucket/run", **about) as manager:  # type: ignore[arg-type]
        manager.save(1, _state())
    _deny(server, _is_write)
    state = {"w": torch.zeros(8)}
    with cloudckpt.CheckpointManager(f"{engine.scheme}://bucket/run", **about) as manager:  # type: ignore[arg-type]
        restored = manager.restore(state)
    assert restored is not None
    assert restored.step == 1
    assert torch.equal(state["w"], torch.arange(8.0))


@pytest.mark.parametrize("engine", ON_S3)
def test_an_absent_checkpoint_without_the_right_to_list_names_that_right(server: ObjectServer, engine: Engine) -> None:
    _deny_listing(server)
    with pytest.raises(AccessDeniedError, match="s3:ListBucket"):
        cloudckpt.load(_state(), "s3://bucket/run", **_about(server, engine))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", EVERYWHERE)
def test_who_may_write_and_not_read_passes_the_probe(server: ObjectServer, engine: Engine) -> None:
    _deny(server, lambda request: not _is_write(request))
    store = RetryingStore(engine.open(server), HASTY.retry)
    probe_create(store)
    store.close()
    assert server.keys() == []


@pytest.mark.parametrize("engine", EVERYWHERE)
@pytest.mark.parametrize(
    ("status", "code"),
    [(405, "MethodNotAllowed"), (400, "KeyTooLongError"), (403, "AccessDenied"), (301, "PermanentRedirect")],
)
def test_a_refused_create_is_no_unknown_commit_though_nothing_can_be_read(
    server: ObjectServer, engine: Engine, status: int, code: str
) -> None:
    server.inject(Fault(status=status, code=code), times=-1)
    store = RetryingStore(engine.open(server), HASTY.retry)
    with pytest.raises(StorageError) as caught:
        store.create("k", b"x")
    store.close()
    assert not isinstance(caught.value, CommitUnknownError)


@pytest.mark.parametrize("engine", EVERYWHERE)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_what_was_never_sent_is_no_unknown_commit(engine: Engine, endpoint: str) -> None:
    with ObjectServer() as server:
        store = RetryingStore(engine.open(server, endpoint_url=endpoint, allow_http=True), HASTY.retry)
        with pytest.raises(StorageError) as caught:
            store.create("k", b"x")
        store.close()
    assert not isinstance(caught.value, CommitUnknownError)
    assert "reached" in str(caught.value)


@pytest.mark.parametrize("engine", EVERYWHERE)
def test_a_missing_bucket_is_not_a_missing_checkpoint(server: ObjectServer, engine: Engine) -> None:
    server.buckets.clear()
    with pytest.raises(StorageError, match="create the bucket") as caught:
        cloudckpt.load(_state(), f"{engine.scheme}://bucket/run", **_about(server, engine))  # type: ignore[arg-type]
    assert not isinstance(caught.value, CheckpointNotFoundError)


@pytest.mark.parametrize("engine", EVERYWHERE)
def test_a_web_servers_404_is_not_a_missing_checkpoint(server: ObjectServer, engine: Engine) -> None:
    page = Fault(status=404, body=b"<html>Not Found</html>", headers={"Content-Type": "text/html"})
    server.inject(page, times=-1)
    with pytest.raises(StorageError, match="endpoint_url"):
        cloudckpt.load(_state(), f"{engine.scheme}://bucket/run", **_about(server, engine))  # type: ignore[arg-type]
