"""An object that is assembled is there whole once that has ended, or what was there before is there still."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudckpt.errors import OptionsError, StorageError
from cloudckpt.store import Store, assembled, assembling, open_store
from servers import FreshPrefix
from tests.store.fault_store import FaultStore


@pytest.fixture(params=["disk", "memory", "s3"])
def place_of(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, object] | None]:
    if request.param == "s3":
        prefix: FreshPrefix = request.getfixturevalue("s3_url")
        return prefix.url, prefix.storage_options
    return (str(tmp_path / "root") if request.param == "disk" else f"memory://{tmp_path.name}/root"), None


@pytest.fixture(params=[1 << 30, 0], ids=["in memory", "in a file"])
def _gathered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "_IN_MEMORY_BYTES", request.param)


def assemble(store: Store, *, then: Exception | None = None) -> None:
    with assembled(store, "a", size_bytes=3) as place:
        place(0, memoryview(b"new"))
        if then is not None:
            raise then


@pytest.mark.parametrize("url", ["s3://bucket/root", "s3a://bucket/root"])
def test_what_s3_takes_by_no_put_is_refused_before_a_byte_is_placed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "_S3_LIMIT_BYTES", 3)
    with assembled(FaultStore(url=url), "a", size_bytes=3) as place:
        place(0, memoryview(b"new"))
    with pytest.raises(OptionsError, match="'a' has 4 bytes or more, and S3 takes no more than 3 by one put; write"):
        assembled(FaultStore(url=url), "a", size_bytes=4).__enter__()
    with assembled(FaultStore(), "a", size_bytes=4):
        pass


@pytest.mark.usefixtures("_gathered")
def test_an_object_is_what_was_placed_in_whatever_order(place_of: tuple[str, dict[str, object] | None]) -> None:
    with open_store(place_of[0], storage_options=place_of[1]) as store:
        memory = bytearray(3 << 20)
        with assembled(store, "a/b", size_bytes=3 * len(memory)) as place:
            for number in (2, 0, 1):
                memory[:] = bytes([number]) * len(memory)
                place(number * len(memory), memoryview(memory))
            place(1, memoryview(b"over"))
        whole = b"".join(bytes([n]) * len(memory) for n in range(3))
        assert store.read("a/b", limit_bytes=1 << 24) == whole[:1] + b"over" + whole[5:]
        with assembled(store, "empty", size_bytes=0):
            pass
        assert store.read("empty", limit_bytes=1) == b""


@pytest.mark.usefixtures("_gathered")
def test_nothing_changes_where_the_block_fails_and_its_own_error_passes(
    place_of: tuple[str, dict[str, object] | None],
) -> None:
    with open_store(place_of[0], storage_options=place_of[1]) as store:
        store.put("a", [memoryview(b"old")])
        failure = StorageError("of another store", op="get", key="other")
        with pytest.raises(StorageError) as raised:
            assemble(store, then=failure)
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
            assemble(store)
        monkeypatch.undo()
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []
