"""A file at a URL is there whole or not at all, is what it was written as, and every program reads it."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import ChecksumError, CloudCkptError, OptionsError
from cloudckpt.convert import plain
from cloudckpt.errors import ObjectNotFoundError
from cloudckpt.format import SUMS_SUFFIX
from servers import FreshPrefix
from tests.store.fault_store import Bucket, Crash, FaultKind, FaultStore, opening_the_last


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), value), "n": torch.arange(7)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_BLOCK_BYTES", 1000)


def test_what_torch_saves_torch_loads_from_a_bucket_and_other_programs_too(s3_url: FreshPrefix) -> None:
    url, options = f"{s3_url.url}/a b/model.pt", s3_url.storage_options
    for value in (1.0, 2.0):
        with cloudckpt.open(url, "wb", storage_options=options) as file:
            torch.save(state_of(value), file)
    with cloudckpt.open(url, storage_options=options) as file:
        assert torch.equal(torch.load(file)["w"], state_of(2.0)["w"])
    whole = io.BytesIO()
    torch.save(state_of(2.0), whole)
    with cloudckpt.open(url, storage_options=options) as file:
        assert len(file.read()) == len(whole.getvalue())


def test_all_that_writes_and_reads_files_can(tmp_path: Path) -> None:
    data = os.urandom(54_321)
    with cloudckpt.open(tmp_path / "new" / "f", "wb") as file:
        for start in range(0, len(data), 777):
            file.write(data[start : start + 777])
        assert (file.tell(), file.closed, file.seekable()) == (len(data), False, False)
    assert file.closed
    assert (tmp_path / "new" / "f").read_bytes() == data
    with cloudckpt.open(tmp_path / "new" / "f") as reader:
        assert reader.seek(-5, io.SEEK_END) == len(data) - 5
        assert reader.read() == data[-5:]
        assert (reader.seek(2500), reader.read(3), reader.tell()) == (2500, data[2500:2503], 2503)
        assert (reader.seek(10**9), reader.read()) == (10**9, b"")
        reader.seek(0)
        assert reader.read() == data
    with cloudckpt.open(tmp_path / "array", "wb") as file:
        np.save(file, np.arange(5000))
    with cloudckpt.open(tmp_path / "array") as reader:
        assert np.array_equal(np.load(reader), np.arange(5000))
    with cloudckpt.open(tmp_path / "arrays", "wb") as file:
        np.savez(file, a=np.arange(5000))
        with pytest.raises(io.UnsupportedOperation):
            file.read()
    with cloudckpt.open(tmp_path / "arrays") as reader:
        assert np.array_equal(np.load(reader)["a"], np.arange(5000))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000])
def test_every_size_comes_back(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    with cloudckpt.open(tmp_path / "f", "wb") as file:
        file.write(data)
    with cloudckpt.open(tmp_path / "f") as reader:
        assert reader.read() == data


def test_a_file_that_is_left_by_an_error_or_forgotten_never_was(tmp_path: Path) -> None:
    with cloudckpt.open(tmp_path / "f", "wb") as file:
        file.write(b"before")
    with suppress(KeyError), cloudckpt.open(tmp_path / "f", "wb") as file:
        file.write(b"half of")
        raise KeyError
    with pytest.raises(ValueError, match="is closed"):
        file.write(b"more")
    forgotten = cloudckpt.open(tmp_path / "f", "wb")
    forgotten.write(b"lost")
    del forgotten
    gc.collect()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", f"f{SUMS_SUFFIX}"]
    assert (tmp_path / "f").read_bytes() == b"before"


def test_one_wrong_bit_is_an_error_before_the_bytes_are_handed_out(tmp_path: Path) -> None:
    with cloudckpt.open(tmp_path / "f", "wb") as file:
        file.write(bytes(5000))
    damaged = bytearray(5000)
    damaged[4321] = 1
    (tmp_path / "f").write_bytes(damaged)
    with cloudckpt.open(tmp_path / "f") as reader:
        assert reader.read(4000) == bytes(4000)
        with pytest.raises(ChecksumError, match="block 4 differs"):
            reader.read()
    (tmp_path / "f").write_bytes(bytes(4999))
    with pytest.raises(ChecksumError, match="4999 bytes, and 5000 were written"):
        cloudckpt.open(tmp_path / "f")


def test_a_damage_that_pytorch_s_reader_meets_is_told_as_what_it_is_wherever_it_is(tmp_path: Path) -> None:
    with cloudckpt.open(tmp_path / "x.pt", "wb") as file:
        torch.save({"a": torch.ones(3_000_000), "b": torch.zeros(10)}, file)
    whole = (tmp_path / "x.pt").read_bytes()
    for place in (0, 6_000_000, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "x.pt").write_bytes(damaged)
        reader = cloudckpt.open(tmp_path / "x.pt")
        for _ in range(2):
            with pytest.raises(ChecksumError, match="differs"):
                torch.load(reader)
        reader.close()


def test_a_directory_or_a_pipe_is_not_written_over_and_nothing_appears_beside_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OptionsError, match=rf"{name} is a directory, or else.*the path of a file"):
            cloudckpt.open(tmp_path / name, "wb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_file_of_another_program_is_read_only_if_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"theirs")
    with pytest.raises(ObjectNotFoundError, match="unverified=True"):
        cloudckpt.open(tmp_path / "f")
    with cloudckpt.open(tmp_path / "f", unverified=True) as reader:
        assert reader.read() == b"theirs"
    with pytest.raises(FileNotFoundError):
        cloudckpt.open(tmp_path / "none")
    with pytest.raises(OptionsError, match="give 'rb' or 'wb'"):
        cloudckpt.open(tmp_path / "f", "w")  # type: ignore[call-overload]
    with pytest.raises(OptionsError, match="names no file"):
        cloudckpt.open("s3://bucket/", "wb")


def test_a_file_whose_sums_are_damaged_is_named_and_read_only_if_that_is_asked_for(tmp_path: Path) -> None:
    with cloudckpt.open(tmp_path / "f", "wb") as file:
        file.write(b"whole")
    sums = tmp_path / f"f{SUMS_SUFFIX}"
    sums.write_bytes(sums.read_bytes()[1:])
    with pytest.raises(
        ChecksumError, match=r"'f' at .* the sums beside it are damaged.*write it anew.*unverified=True"
    ):
        cloudckpt.open(tmp_path / "f")
    with cloudckpt.open(tmp_path / "f", unverified=True) as reader:
        assert reader.read() == b"whole"


@pytest.mark.parametrize("is_orphan", [False, True])
def test_an_export_leaves_no_sums_of_the_file_that_it_replaces(tmp_path: Path, *, is_orphan: bool) -> None:
    url = cloudckpt.save(dict(state_of(2.0)), tmp_path / "saved", progress="off").url
    with cloudckpt.open(tmp_path / "x.pt", "wb") as file:
        torch.save(state_of(1.0), file)
    if is_orphan:
        (tmp_path / "x.pt").unlink()
    with pytest.raises(OptionsError, match=r"x\.pt.* already, and nothing was written"):
        cloudckpt.export(url, tmp_path / "x.pt", to="torch", progress="off")
    cloudckpt.export(url, tmp_path / "x.pt", to="torch", overwrite=True, progress="off")
    with cloudckpt.open(tmp_path / "x.pt", unverified=True) as reader:
        assert torch.equal(torch.load(reader)["w"], state_of(2.0)["w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "x.pt"]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultStore]]:
    """Let files be on the store that was pushed last."""
    with opening_the_last(monkeypatch, "cloudckpt.convert.plain.open_store") as pushed:
        yield pushed


def write(clients: list[FaultStore], client: FaultStore, *contents: bytes) -> None:
    clients.append(client)
    for data in contents:
        with cloudckpt.open("memory://bucket/f", "wb") as file:
            file.write(data)


# Of one size, so that only bytes tell them apart.
CONTENTS = [bytes([number]) * 1500 + bytes(1500) for number in range(3)]


@pytest.mark.parametrize("crash", [FaultKind.CRASH_BEFORE, FaultKind.CRASH_AFTER])
@pytest.mark.parametrize("before", range(3))
def test_a_crash_at_any_request_leaves_the_old_file_or_the_new_one_verified(
    clients: list[FaultStore], crash: FaultKind, before: int
) -> None:
    counting = FaultStore(Bucket())
    write(clients, counting, *CONTENTS[:before])
    base = counting.bucket
    counting = FaultStore(base.copy())
    write(clients, counting, b"new" * 1000)
    for number in range(1, counting.op_count + 1):
        bucket = base.copy()
        for data in (b"new" * 1000, b"NEW" * 1000):  # also one cut off after the other
            client = FaultStore(bucket)
            client.crash_at(number, crash)
            with suppress(Crash, CloudCkptError):
                write(clients, client, data)
            clients.append(FaultStore(bucket))
            with suppress(FileNotFoundError), cloudckpt.open("memory://bucket/f") as reader:
                assert reader.read() in (*CONTENTS[max(0, before - 1) : before], b"new" * 1000, b"NEW" * 1000)
            assert before == 0 or "f" in bucket.objects


@pytest.mark.parametrize("crash", [FaultKind.CRASH_BEFORE, FaultKind.CRASH_AFTER])
def test_a_crash_at_any_request_leaves_a_file_of_another_program_readable_as_before_or_the_new_one(
    clients: list[FaultStore], crash: FaultKind
) -> None:
    def theirs() -> Bucket:
        bucket = Bucket()
        bucket.raw_put("f", b"theirs")
        return bucket

    counting = FaultStore(theirs())
    write(clients, counting, b"new")
    for number in range(1, counting.op_count + 1):
        client = FaultStore(theirs())
        client.crash_at(number, crash)
        with suppress(Crash, CloudCkptError):
            write(clients, client, b"new")
        clients.append(FaultStore(client.bucket))
        is_foreign = f"f{SUMS_SUFFIX}" not in client.bucket.raw_list()
        with cloudckpt.open("memory://bucket/f", unverified=is_foreign) as reader:
            assert reader.read() == client.bucket.raw_get("f")
        assert client.bucket.raw_get("f") in (b"theirs", b"new")


def test_of_many_writes_cut_off_one_after_the_other_none_hides_the_file_that_is_there(
    clients: list[FaultStore],
) -> None:
    bucket = Bucket()
    write(clients, FaultStore(bucket), b"first")
    for number in range(20):
        client = FaultStore(bucket)
        client.crash_at(3, FaultKind.CRASH_BEFORE)
        with suppress(Crash, CloudCkptError):
            write(clients, client, b"%5d" % number)
    clients.append(FaultStore(bucket))
    with cloudckpt.open("memory://bucket/f") as reader:
        assert reader.read() == bucket.raw_get("f") == b"first"


def test_an_interrupt_of_a_read_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cloudckpt.open(tmp_path / "x.pt", "wb") as file:
        torch.save(state_of(1.0), file)
    block, reads = plain._Reading._block, 0

    def interrupted(reading: plain._Reading, number: int) -> memoryview:
        nonlocal reads
        reads += 1
        if reads == at:
            raise KeyboardInterrupt
        return block(reading, number)

    def load() -> None:
        with cloudckpt.open(tmp_path / "x.pt") as reader:
            torch.load(reader)

    monkeypatch.setattr(plain._Reading, "_block", interrupted)
    at = 0
    load()
    for at in range(1, reads + 1):  # noqa: B007 (PyTorch's reader passes some over, or tells a closed file)
        reads = 0
        with pytest.raises(KeyboardInterrupt):
            load()
