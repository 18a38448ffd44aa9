"""`cp`, `verify` and `diff` do what the library does, and end with the status that says what was found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cloudckpt
from cloudckpt.cli import app
from cloudckpt.cli.asking import Access
from servers import FreshPrefix
from tests.copying.roots import files_of, prefix_of, save_steps, shards_of


def called(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_steps(tmp_path / "root", [1, 2])
    return tmp_path / "root"


def damage(checkpoint: Path) -> None:
    path = shards_of(checkpoint)[1]
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


def test_a_whole_checkpoint_ends_with_0_and_one_line(root: Path) -> None:
    done = called("verify", root)
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 1)
    assert done.stdout.startswith("whole ")
    assert "manifest, index, and a listing" in done.stdout
    assert "every byte read" in called("verify", root, "--deep").stdout


def test_damage_ends_with_3_and_names_the_object_its_blocks_its_tensors_and_what_is_whole(root: Path) -> None:
    damage(root / prefix_of(2))
    assert called("verify", root).exit_code == 0
    done = called("verify", root, "--deep")
    assert done.exit_code == 3
    assert "r00000-0001.safetensors: block 0 (bytes 0 to 4096)" in done.stdout
    assert "there lie: " in done.stdout
    assert f"whole is: file://{root}/{prefix_of(1)}" in done.stdout


def test_many_are_looked_at_and_the_status_is_the_worst(root: Path, tmp_path: Path) -> None:
    done = called("verify", root / prefix_of(1), tmp_path / "none", root)
    assert (done.exit_code, len(done.stdout.splitlines()), len(done.stderr.splitlines())) == (1, 2, 1)
    damage(root / prefix_of(2))
    done = called("verify", root / prefix_of(1), tmp_path / "none", root, "--deep")
    assert done.exit_code == 3
    assert called("verify", tmp_path / "none").exit_code == 1


def test_all_of_a_root_in_json_are_one_object_a_line(root: Path) -> None:
    damage(root / prefix_of(1))
    done = called("verify", root, "--all", "--deep", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["step"], one["state"]) for one in found] == [(1, "damaged"), (2, "whole")]
    assert found[0]["damages"][0]["blocks"] == [0, 1]
    assert done.exit_code == 3


def test_a_root_is_copied_and_again_nothing_is(root: Path, tmp_path: Path) -> None:
    done = called("cp", root, tmp_path / "to", "--all")
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 2)
    assert "copied: " in done.stdout
    assert files_of(tmp_path / "to") == files_of(root)
    again = called("cp", root, tmp_path / "to", "--all")
    assert again.stdout.count("there already") == 2


def test_steps_and_a_url_of_its_own_and_json(root: Path, tmp_path: Path) -> None:
    done = called("cp", root, tmp_path / "to", "--step", 1, "--json")
    assert json.loads(done.stdout)["step"] == 1
    assert called("cp", root / prefix_of(1), root, tmp_path / "more").exit_code == 0
    assert called("cp", root, tmp_path / "own", "--own-url").exit_code == 0
    assert cloudckpt.verify(tmp_path / "own").step == 2


def test_pins_come_with_all_and_where_they_are_asked_for(root: Path, tmp_path: Path) -> None:
    assert called("pin", root, 2, "--note", "good").exit_code == 0
    for more, is_pinned in ((("--all",), True), (("--all", "--no-pins"), False), ((), False), (("--pins",), True)):
        target = tmp_path / "-".join(["to", *more])
        done = called("cp", root, target, *more)
        assert done.exit_code == 0
        assert ("; pinned" in done.stdout, (target / "pins").exists()) == (is_pinned, is_pinned)


def test_a_copy_that_is_refused_is_one_line(root: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "to", [2])
    done = called("cp", root, tmp_path / "to")
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "another checkpoint is committed at" in done.stderr


@pytest.mark.parametrize("more", [("--step", "1", "--all"), ("--memory", "1"), ("--pins", "--own-url")])
def test_a_wrong_command_line_ends_with_2(root: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = called("cp", root, tmp_path / "to", *more)
    assert done.exit_code == 2
    assert not (tmp_path / "to").exists()


def test_a_difference_ends_with_3_and_none_with_0(root: Path) -> None:
    done = called("diff", root / prefix_of(1), root)
    assert done.exit_code == 3
    assert "changed tensors: 2" in done.stdout
    assert "metric loss" in done.stdout
    assert "different; " in done.stdout
    same = called("diff", root, root / prefix_of(2))
    assert (same.exit_code, "\nequal; 0 B read" in same.stdout) == (0, True)


def test_differences_in_json_hold_no_number_that_json_lacks(tmp_path: Path) -> None:
    cloudckpt.save({"w": torch.tensor([math.inf, 1.0])}, tmp_path / "a", progress="off")
    cloudckpt.save({"w": torch.tensor([0.0, math.nan]), "more": 1}, tmp_path / "b", progress="off")
    done = called("diff", tmp_path / "a", tmp_path / "b", "--json")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (found["is_equal"], found["only_b"], found["changed"][0]["largest"]) == (False, ["more"], "inf")
    assert called("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "-1").exit_code == 2


def test_options_are_for_both_sides_where_they_are_of_one_kind() -> None:
    access = Access(endpoint_url="http://x", engine="fsspec")
    given, nothing = ({"endpoint_url": "http://x"}, "fsspec"), (None, "auto")
    assert access.beside("s3://a", "s3://b", None) == (given, given)
    assert access.beside("s3://a", "./b", None) == (given, nothing)
    assert access.beside("./a", "s3://b", None) == (nothing, given)
    assert access.beside("s3://a", "gs://b", None) == (given, nothing)
    assert access.beside("s3://a", "gs://b", '{"token": "anon"}') == (given, ({"token": "anon"}, "auto"))
    assert access.beside("s3://a", "s3://b", '{"anon": true}') == (given, ({"anon": True}, "fsspec"))


def test_a_bucket_is_reached_by_the_options_of_the_command_line(
    root: Path, s3_url: FreshPrefix, tmp_path: Path
) -> None:
    options = json.dumps(s3_url.storage_options)
    assert called("cp", root, s3_url.url, "--all", "--storage-options", options).exit_code == 0
    assert called("verify", s3_url.url, "--all", "--deep", "--storage-options", options).exit_code == 0
    assert called("diff", root, s3_url.url, "--target-storage-options", options).exit_code == 0
    done = called("cp", s3_url.url, tmp_path / "back", "--storage-options", options)
    assert done.exit_code == 0, done.stderr
