"""An object that is appended to is there whole once that has ended, or what was there before is there still."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudckpt.errors import StorageError
from cloudckpt.store import Store, appended, open_store
from servers import FreshPrefix


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, object] | None]:
    if request.param == "s3":
        prefix: FreshPrefix = request.getfixturevalue("s3_url")
        return prefix.url, prefix.storage_options
    return (str(tmp_path / "root") if request.param == "disk" else f"memory://{tmp_path.name}/root"), None


def append_to(store: Store, *, then: Exception | None = None) -> None:
    with appended(store, "a") as append:
        append(memoryview(b"new"))
        if then is not None:
            raise then


def test_an_object_is_what_was_appended(place: tuple[str, dict[str, object] | None]) -> None:
    with open_store(place[0], storage_options=place[1]) as store:
        memory = bytearray(3 << 20)
        with appended(store, "a/b") as append:
            for number in range(3):
                memory[:] = bytes([number]) * len(memory)
                append(memoryview(memory))
        assert store.read("a/b", limit_bytes=1 << 24) == b"".join(bytes([n]) * len(memory) for n in range(3))
        with appended(store, "empty"):
            pass
        assert store.read("empty", limit_bytes=1) == b""


def test_nothing_changes_where_the_block_fails_and_its_own_error_passes(
    place: tuple[str, dict[str, object] | None],
) -> None:
    with open_store(place[0], storage_options=place[1]) as store:
        store.put("a", [memoryview(b"old")])
        failure = StorageError("of another store", op="get", key="other")
        with pytest.raises(StorageError) as raised:
            append_to(store, then=failure)
        assert raised.value is failure
        assert (failure.op, failure.key) == ("get", "other")
        assert store.read("a", limit_bytes=9) == b"old"
        assert [info.key for info in store.list().objects] == ["a"]


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    with open_store(tmp_path / "root") as store:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(StorageError, match="no room left"):
            append_to(store)
        monkeypatch.undo()
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []
