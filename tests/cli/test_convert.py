"""The commands `export` and `import` do what the library does, and say what was left out or why nothing was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cloudckpt
from cloudckpt.cli import app


def called(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"model": {"a": torch.ones(3), "b": torch.zeros(2)}, "step": 4}
    cloudckpt.save(state, tmp_path / "saved", progress="off")
    return tmp_path / "saved"


def test_export_says_what_it_wrote_and_what_it_left_out(saved: Path, tmp_path: Path) -> None:
    done = called("export", saved, tmp_path / "x.safetensors", "--to", "safetensors", "--leave-out")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "2 tensors" in done.stdout
    assert "left out: step: it is a value, and safetensors holds tensors alone" in done.stdout


def test_no_name_of_a_state_or_file_steers_the_terminal(saved: Path, tmp_path: Path) -> None:
    cloudckpt.save({"a": torch.ones(3), "x\x1b[2J": 4}, tmp_path / "odd", progress="off")
    told = [called("export", tmp_path / "odd", tmp_path / "x.safetensors", "--to", "safetensors", "--leave-out")]
    torch.save({"w": torch.ones(1)}, tmp_path / "x\u202e.pt")
    told.append(called("import", tmp_path / "x\u202e.pt", tmp_path / "back"))
    told.append(called("report", saved, "-o", tmp_path / "x\u202e.html"))
    assert [(one.exit_code, "\x1b" in one.stdout, "\u202e" in one.stdout) for one in told] == [(0, False, False)] * 3


def test_export_in_json_is_one_object(saved: Path, tmp_path: Path) -> None:
    done = called("export", saved, tmp_path / "x.pt", "--to", "torch", "--json")
    assert json.loads(done.stdout)["files"] == ["x.pt"]


def test_what_a_target_cannot_hold_is_one_line_with_the_next_action(saved: Path, tmp_path: Path) -> None:
    done = called("export", saved, tmp_path / "x.safetensors", "--to", "safetensors")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "--leave-out" in done.stderr


@pytest.mark.parametrize(
    ("size", "status"), [("5GB", 0), ("1.5 MiB", 0), ("8", 0), ("5parsecs", 2), ("", 2), ("-1", 2), ("0", 1)]
)
def test_a_size_is_read_as_people_write_it(size: str, status: int, saved: Path, tmp_path: Path) -> None:
    done = called(
        "export", saved, tmp_path / "hf", "--to", "huggingface", "--prefix", "model.", "--max-shard-size", size
    )
    assert done.exit_code == status, done.output


def test_import_makes_what_show_shows(saved: Path, tmp_path: Path) -> None:
    assert called("export", saved, tmp_path / "dcp", "--to", "dcp").exit_code == 0
    done = called("import", tmp_path / "dcp", tmp_path / "root", "--step", 7, "--json")
    assert json.loads(done.stdout)["step"] == 7
    shown = called("show", tmp_path / "root")
    assert (shown.exit_code, "model.a" in shown.stdout) == (0, True)


def test_a_source_that_is_refused_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"hello")
    done = called("import", tmp_path / "x.pt", tmp_path / "out")
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert called("import", tmp_path / "x.pt", tmp_path / "out", "--source-storage-options", "no").exit_code == 2
