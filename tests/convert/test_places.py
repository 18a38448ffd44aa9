"""Conversions find the checkpoint that all commands find, and put nothing where another would be lost or hidden."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cloudckpt
from cloudckpt import CheckpointExistsError, CheckpointManager, OptionsError
from cloudckpt.cli.main import app
from cloudckpt.convert import exporting
from cloudckpt.format import MANIFEST_NAME


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "root", progress="off") as manager:
        manager.save(1, {"w": torch.ones(3)})
    return tmp_path / "root"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    cloudckpt.save({"w": torch.zeros(3)}, tmp_path / "own", progress="off")
    return tmp_path / "own"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exported(url: Path, target: Path, *, to: exporting.Kind = "torch") -> cloudckpt.Exported:
    return cloudckpt.export(url, target, to=to, overwrite=True, progress="off")


def test_an_import_without_a_step_does_not_hide_in_a_root(root: Path, source: Path) -> None:
    before = contents(root)
    with pytest.raises(CheckpointExistsError, match="is a root with steps"):
        cloudckpt.import_(source, root, progress="off")
    assert contents(root) == before


def test_an_import_of_a_step_makes_no_root_of_a_checkpoint(own: Path, source: Path) -> None:
    before = contents(own)
    with pytest.raises(CheckpointExistsError, match="is a checkpoint itself, and no root"):
        cloudckpt.import_(source, own, step=3, progress="off")
    assert contents(own) == before


def test_a_manager_makes_no_root_of_a_checkpoint(own: Path) -> None:
    with CheckpointManager(own, progress="off") as manager, pytest.raises(CheckpointExistsError, match="and no root"):
        manager.save(1, {"w": torch.ones(3)})


def both(root: Path, own: Path) -> Path:
    """Return what is both a root and a checkpoint."""
    for path in own.iterdir():
        path.rename(root / path.name)
    return root


def test_an_export_of_what_is_both_takes_the_newest_step_as_all_commands_do(
    root: Path, own: Path, tmp_path: Path
) -> None:
    done = exported(both(root, own), tmp_path / "out.pt")
    assert "step-0000000001" in done.source
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.ones(3))


def test_a_job_goes_on_in_what_is_both(root: Path, own: Path) -> None:
    with CheckpointManager(both(root, own), progress="off") as manager:
        assert manager.save(2, {"w": torch.ones(3)}).step == 2


INSIDE: dict[str, Callable[[Path, Path], Path]] = {
    "a root": lambda root, own: root / "x.pt",
    "its epochs": lambda root, own: root / "epochs" / "0000000001.json",
    "far below its epochs": lambda root, own: root / "epochs" / "x" / "y" / "z" / "x.pt",
    "its pins": lambda root, own: root / "pins" / "x.json",
    "its names": lambda root, own: root / "pins" / "last" / "step-0000000001-e0001.0",
    "a step": lambda root, own: next(root.glob("step-*")) / "x.pt",
    "a step's attempt": lambda root, own: next(root.glob("step-*/*/index.bin")),
    "a step's manifest": lambda root, own: next(root.glob("step-*/manifest.json")),
    "a checkpoint": lambda root, own: own / "x.pt",
    "a checkpoint's attempt": lambda root, own: next(own.glob("*/index.bin")),
    "a checkpoint's manifest": lambda root, own: own / MANIFEST_NAME,
    "a link into a root": lambda root, own: linked(root) / "0000000001.json",
}


def linked(root: Path) -> Path:
    (root.parent / "link").symlink_to(root / "epochs")
    return root.parent / "link"


def opened(_: Path, target: Path) -> None:
    with cloudckpt.open(target, "wb") as file:
        file.write(b"x")


def reported(url: Path, target: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(url.parent / "root"), "-o", str(target)])
    assert result.exit_code == 1, result.stderr
    raise OptionsError(result.stderr)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "export": exported,
    "open": opened,
    "report": reported,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", INSIDE)
def test_no_file_that_a_user_names_is_written_into_a_checkpoint_or_root(
    place: str, writer: str, root: Path, own: Path
) -> None:
    target = INSIDE[place](root, own)
    target.parent.mkdir(parents=True, exist_ok=True)
    before = contents(root), contents(own)
    with pytest.raises(OptionsError, match=r"no place for other files|is below|a checkpoint's manifest|goes with all"):
        WRITERS[writer](own, target)
    assert (contents(root), contents(own)) == before


def test_a_folder_of_a_root_that_is_none_of_its_own_takes_an_export(root: Path) -> None:
    assert exported(root, root / "weights" / "x.pt").tensor_count == 1
    with pytest.raises(OptionsError, match="a root with checkpoints"):
        exported(root, root, to="dcp")


def test_a_file_name_that_is_no_text_is_refused_by_the_name_that_was_given(own: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xff.pt")
    for write in (exported, opened):
        with pytest.raises(OptionsError, match=r"'x\\udcff.pt'"):
            write(own, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"own"}


def test_a_prefix_that_is_all_of_a_name_is_told_as_that(tmp_path: Path) -> None:
    url = cloudckpt.save({"model": {"": torch.ones(3)}}, tmp_path / "own", progress="off").url
    with pytest.raises(OptionsError, match=r"only 'model\.' itself begins with that prefix"):
        cloudckpt.export(url, tmp_path / "x.safetensors", to="safetensors", prefix="model.", progress="off")


def test_an_export_of_one_file_looks_at_no_other_name(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    listed = exporting.objects_in

    def listing(store: exporting.RetryingStore, beginning: str = "") -> dict[str, int]:
        asked.append(beginning)
        return listed(store, beginning)

    monkeypatch.setattr(exporting, "objects_in", listing)
    exported(own, tmp_path / "x.pt")
    exported(own, tmp_path / "y.safetensors", to="safetensors")
    assert set(asked) == {"x.pt", "y"}
