"""A damaged answer is asked for again; what is damaged twice in the same way is a damaged object, and passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import unquote

import pytest
import torch

from cloudckpt import CheckpointManager, Options, RetryPolicy, StorageError
from cloudckpt.store import RetryingStore
from tests.effort import diagonal
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.fault_store import FaultStore, Op
from tests.store.http_dialects import Request
from tests.store.http_object_server import Fault, ObjectServer

ENGINES = [
    *(pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore-s3")),
    *(pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore-gcs")),
]
PATIENCE = RetryPolicy(max_attempts=4, backoff_base_s=0.01)
NEWEST = "step-0000000002-e0001/"
PARTS = {"manifest": "/manifest.json", "index": "/index.bin", "shard": ".safetensors"}
HEADERS = {
    "ETag": '"d41d8cd98f00b204e9800998ecf8427e"',
    "x-goog-generation": "1",
    "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
    "Content-Type": "application/octet-stream",
}


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


def opened(server: ObjectServer, engine: Engine) -> CheckpointManager:
    return CheckpointManager(
        f"{engine.scheme}://bucket/root",
        storage_options=engine.options(server),
        engine=engine.kind.engine,
        options=Options(retry=PATIENCE),
        progress="off",
    )


def damage(server: ObjectServer, part: str, body: bytes, times: int) -> None:
    """Answer downloads of a part of the newest checkpoint as a store does that has another object there."""

    def hits(request: Request) -> bool:
        name = unquote(request.path)
        return request.method == "GET" and NEWEST in name and name.endswith(PARTS[part])

    fault = Fault(status=200, body=body, headers=HEADERS)
    if part == "shard":
        asked = next(len(found.data) for (_, key), found in server.objects.items() if key.endswith(PARTS[part]))
        content_range = f"bytes 0-{min(asked, len(body)) - 1}/{len(body)}"
        fault = Fault(status=206, body=body[:asked], headers={**HEADERS, "Content-Range": content_range})
    server.inject(fault, times=times, when=hits)


@diagonal(
    "engine, part, kind, times, step",
    ENGINES,
    [pytest.param(part, kind, id=f"{part}-{kind}") for part in PARTS for kind in ("smaller", "larger", "other")],
    [pytest.param(1, 2, id="once"), pytest.param(-1, 1, id="always")],
)
def test_a_restore_asks_again_and_goes_back_only_from_a_damaged_object(
    server: ObjectServer, engine: Engine, part: str, times: int, step: int, kind: str
) -> None:
    with opened(server, engine) as manager:
        for number in (1, 2):
            manager.save(number, {"t": torch.full((1000,), float(number))})
    older = next(key for _, key in server.objects if "step-0000000001" in key and key.endswith(PARTS[part]))
    bodies = {"smaller": b"{}", "larger": bytes(5 << 20), "other": server.data(older)}
    damage(server, part, bodies[kind], times)
    state = {"t": torch.zeros(1000)}
    with opened(server, engine) as manager:
        restored = manager.restore(state)
    assert restored is not None
    assert (restored.step, state["t"][0].item()) == (step, float(step))


def damaged(size: Callable[[Op], int]) -> Callable[[Op], StorageError]:
    def error(op: Op) -> StorageError:
        error = StorageError(f"{size(op)} bytes, which is another object", op=op.verb, key=op.key)
        error.is_other_object = True
        return error

    return error


@pytest.mark.parametrize("verb", ["get", "read"])
def test_another_size_is_believed_when_it_comes_twice(verb: str) -> None:
    inner = FaultStore()
    inner.bucket.raw_put("k", b"abc")
    store = RetryingStore(inner, PATIENCE, sleep=lambda _: None)
    ask = {"get": lambda: bytes(store.get("k", start=0, stop=3)), "read": lambda: store.read("k", limit_bytes=3)}[verb]

    inner.inject(verbs=[verb], error=damaged(lambda _: 7))
    assert ask() == b"abc"
    inner.inject(verbs=[verb], error=damaged(lambda op: op.number), times=2)
    assert ask() == b"abc"
    inner.inject(verbs=[verb], error=damaged(lambda _: 7), times=2)
    with pytest.raises(StorageError, match="7 bytes"):
        ask()
    assert ask() == b"abc"
