"""Whole files beside the tensors: one commit over both, streamed, verified, and written back as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    ChecksumError,
    IntegrityError,
    Options,
    OptionsError,
    SourceError,
)
from cloudckpt.options import KIB, MIB
from servers import FreshPrefix
from tests.ranks.processes import run

OPTIONS = Options(shard_bytes=64 * KIB, block_bytes=4 * KIB, span_bytes=16 * KIB)


def tree_in(path: Path, *, large_bytes: int = 300 * KIB) -> Path:
    (path / "sub" / "deeper").mkdir(parents=True)
    (path / "vocab.json").write_bytes(b'{"a": 1}')
    (path / "empty").write_bytes(b"")
    (path / "sub" / "é b.txt").write_bytes("text é".encode())
    (path / "sub" / "deeper" / "large.bin").write_bytes(os.urandom(large_bytes))
    (path / "link.json").symlink_to(path / "vocab.json")
    return path


def contents_of(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def state_of(value: float = 1.0) -> dict[str, object]:
    return {"w": torch.full((5,), value)}


def test_files_come_back_as_they_were_and_the_state_is_none_the_wiser(tmp_path: Path) -> None:
    source = tree_in(tmp_path / "tokenizer")
    files = {"tokenizer/": source, "config.json": str(source / "vocab.json"), "state.json": b"[1]"}
    cloudckpt.save(state_of(), tmp_path / "ckpt", files=files, options=OPTIONS, progress="off")
    found = cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out", options=OPTIONS)
    expected = {f"tokenizer/{path}": data for path, data in contents_of(source).items()}
    expected |= {"config.json": b'{"a": 1}', "state.json": b"[1]"}
    assert contents_of(tmp_path / "out") == expected
    assert sorted(found) == sorted(expected)
    assert cloudckpt.contents(tmp_path / "ckpt").files == {path: len(data) for path, data in expected.items()}
    state = state_of(0.0)
    cloudckpt.load(state, tmp_path / "ckpt", progress="off")
    assert list(cloudckpt.read(tmp_path / "ckpt")) == ["w"]
    assert torch.equal(state["w"], torch.ones(5))  # type: ignore[arg-type]


def test_some_files_are_chosen_by_path_and_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    source = tree_in(tmp_path / "in")
    cloudckpt.save(state_of(), tmp_path / "ckpt", files={"a/": source, "b.json": b"{}"}, progress="off")
    found = cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out", ["a/sub/", "b.json"])
    assert sorted(found) == ["a/sub/deeper/large.bin", "a/sub/é b.txt", "b.json"]
    with pytest.raises(CheckpointNotFoundError, match=r"no file of .* is 'a'; files there: "):
        cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out", "a")
    cloudckpt.save(state_of(), tmp_path / "bare", progress="off")
    with pytest.raises(CheckpointNotFoundError, match="holds no files"):
        cloudckpt.restore_files(tmp_path / "bare", tmp_path / "out")


def test_a_manager_saves_files_in_the_background_and_writes_the_newest_ones_back(
    tmp_path: Path, s3_url: FreshPrefix
) -> None:
    file = tmp_path / "trainer_state.json"
    with CheckpointManager(s3_url.url, storage_options=s3_url.storage_options, progress="off") as manager:
        for step in (1, 2):
            file.write_bytes(b"%d" % step)
            manager.async_save(step, state_of(step), files={"trainer_state.json": file})
            file.write_bytes(b"changed at once")
        manager.wait()
        assert manager.restore_files(tmp_path / "out") == ["trainer_state.json"]
        assert contents_of(tmp_path / "out") == {"trainer_state.json": b"2"}
        manager.restore_files(tmp_path / "out", step=1)
        assert contents_of(tmp_path / "out") == {"trainer_state.json": b"1"}


def test_a_large_file_is_written_back_in_its_place_without_its_size_in_memory(tmp_path: Path) -> None:
    data = os.urandom(MIB) * 80
    (tmp_path / "large").write_bytes(data)
    cloudckpt.save(state_of(), tmp_path / "ckpt", files={"large": tmp_path / "large"}, progress="off")
    cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out")
    assert (tmp_path / "out" / "large").read_bytes() == data


def test_a_damaged_file_is_an_error_and_what_stood_there_stays(tmp_path: Path) -> None:
    cloudckpt.save(state_of(), tmp_path / "ckpt", files={"a": b"x" * 10_000}, options=OPTIONS, progress="off")
    (shard,) = (path for path in (tmp_path / "ckpt").rglob("*.safetensors") if b"x" * 100 in path.read_bytes())
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.index(b"xxxx") + 50] ^= 1
    shard.write_bytes(damaged)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"before")
    with pytest.raises((ChecksumError, IntegrityError)):
        cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out")
    assert contents_of(tmp_path / "out") == {"a": b"before"}


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"../a": b""}, OptionsError, "can be no path"),
        ({"/a": b""}, OptionsError, "can be no path"),
        ({"": b""}, OptionsError, "can be no path"),
        ({"a": b"", "a/b/c": b""}, OptionsError, "'a' is a file, and the folder of 'a/b/c'"),
        ({"a/" + "é" * 128: b""}, OptionsError, "has 256 bytes, and no disk"),
        ({"a": 3}, OptionsError, "is a int"),
        ({3: b""}, OptionsError, "files names 3"),
        (["a"], OptionsError, "files is a list"),
        ({"d/": "/nowhere/at/all"}, SourceError, "cannot be read"),
        ({"a": "/nowhere/at/all"}, SourceError, "cannot be read"),
        ({"a": "/"}, SourceError, "is no file|cannot be read"),
        ({"a": "/dev/null"}, SourceError, "is no file"),
    ],
)
def test_what_is_no_file_is_refused_and_nothing_is_written(
    tmp_path: Path, files: dict[str, bytes], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        cloudckpt.save(state_of(), tmp_path / "ckpt", files=files, progress="off")
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").rglob("manifest.json"))


def test_a_link_that_leads_above_itself_and_a_path_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    with pytest.raises(SourceError, match=r"deep|cannot be read"):
        cloudckpt.save(state_of(), tmp_path / "ckpt", files={"d/": tmp_path / "d"}, progress="off")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a").write_bytes(b"")
    with pytest.raises(OptionsError, match="two files are both 'e/a'"):
        cloudckpt.save(state_of(), tmp_path / "ckpt", files={"e/": tmp_path / "e", "e/a": b""}, progress="off")


def _save_together(url: Path) -> dict[str, int]:
    rank = torch.distributed.get_rank()
    # Only the first rank's machine has the file.
    files = {"a.txt": b"of rank 0"} if rank == 0 else {"a.txt": "/nowhere"}
    cloudckpt.save({"w": torch.ones(4)}, url, files=files, progress="off")
    return dict(cloudckpt.contents(url).files)


def test_of_several_ranks_the_first_ones_files_go(tmp_path: Path) -> None:
    assert run(2, _save_together, tmp_path / "ckpt") == [{"a.txt": 9}] * 2
    cloudckpt.restore_files(tmp_path / "ckpt", tmp_path / "out")
    assert contents_of(tmp_path / "out") == {"a.txt": b"of rank 0"}
