"""Deletes on Google's own endpoint go in batches, and each answer in one is that of its own object."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gcsfs.core import GCSFileSystem

from cloudckpt.errors import StorageError
from cloudckpt.store import open_store
from cloudckpt.store.wire_gcs import GcsWire, _batch_answers
from servers import FreshPrefix

NAMES = [f"a/{number:04d} with space+and%.bin" for number in range(250)]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the server on loopback for Google's, and note how many calls each batch has."""
    monkeypatch.setattr(GCSFileSystem, "on_google", property(lambda _: True))
    sizes: list[int] = []
    send = GcsWire._delete_batch

    async def noted(self: GcsWire, names: Sequence[str], *rest: object) -> object:
        sizes.append(len(names))
        return await send(self, names, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(GcsWire, "_delete_batch", noted)
    return sizes


def test_deletes_go_in_batches_and_an_absent_object_counts_as_deleted(gs_url: FreshPrefix, batches: list[int]) -> None:
    with open_store(gs_url.url, storage_options=gs_url.storage_options, engine="fsspec") as store:
        for name in [*NAMES[:20], "b/stays"]:
            store.put(name, [memoryview(b"x")])
        store.delete(NAMES)
        assert [info.key for info in store.list().objects] == ["b/stays"]
    assert batches == [100, 100, 50]


def _reply(*parts: tuple[str, str]) -> tuple[str, bytes]:
    texts = [
        f"--b\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\nHTTP/1.1 {status}\r\n"
        'Content-Type: application/json\r\n\r\n{"error": {}}\r\n'
        for number, status in parts
    ]
    return "multipart/mixed; boundary=b", "".join([*texts, "--b--\r\n"]).encode()


def test_each_answer_is_that_of_its_own_object_whatever_their_order() -> None:
    reply = _reply(("2", "503 Service Unavailable"), ("0", "204 No Content"), ("1", "404 Not Found"), ("9", "204 OK"))
    found = _batch_answers(*reply, 4)
    assert found[0] is None
    assert [getattr(error, "status", None) for error in found[1:]] == [404, 503, None]
    assert "no answer" in str(found[3])


@pytest.mark.parametrize("body", [b"", b"<html>a portal</html>", b"--b\r\n\r\nHTTP/1.1 204\r\n--b--"])
@pytest.mark.parametrize("content_type", ["", "text/html", "multipart/mixed; boundary=b", "multipart/mixed"])
def test_a_reply_that_is_no_batch_has_deleted_nothing(content_type: str, body: bytes) -> None:
    assert None not in _batch_answers(content_type, body, 3)


def test_what_a_batch_could_not_delete_is_told(
    gs_url: FreshPrefix, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def garbled(self: GcsWire, names: Sequence[str], *_: object) -> object:
        return _batch_answers("text/html", b"<html>", len(names))

    monkeypatch.setattr(GcsWire, "_delete_batch", garbled)
    with open_store(gs_url.url, storage_options=gs_url.storage_options, engine="fsspec") as store:
        inner = store.inner
        with pytest.raises(StorageError):
            inner.delete(["a/1", "a/2"])
