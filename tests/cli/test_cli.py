"""The command line answers a person and a program, and an error is one line, never a traceback."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import tomllib
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.cli import app, asking
from cloudckpt.store.redact import remember_secrets
from servers import FreshPrefix
from tests.programs import run_forked, run_to_end


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_fails(result: Result, status: int, *words: str) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == status
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("cloudckpt: ")
    assert [word for word in words if word not in line] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("saved") / "root"
    with CheckpointManager(base, progress="off") as manager:
        for step in (9, 100, 1000):
            state = {
                "model": {"layer.weight": torch.full((3, 4), float(step))},
                "epoch": step,
                "[bold]": "[red]x[/red]",
            }
            manager.save(step, state, metrics={"loss": 1 / step, "odd": math.inf}, metadata={"note": ("a", 1)})
    return base


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A root of a test's own, which it may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "root"))


def test_ls_shows_every_checkpoint_of_a_root_oldest_first(root: Path) -> None:
    result = run("ls", root)
    url, columns, *rows = result.stdout.splitlines()
    assert result.exit_code == 0
    assert url == f"file://{root}"
    assert columns.split()[:3] == ["step", "epoch", "age"]
    assert [row.split()[:2] for row in rows] == [["9", "1"], ["100", "1"], ["1000", "1"]]
    assert "inf" in result.stdout


def test_ls_as_json_is_one_object_a_line(root: Path) -> None:
    result = run("ls", root, "--json")
    found = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [one["step"] for one in found] == [9, 100, 1000]
    assert found[0]["metrics"] == {"loss": 1 / 9, "odd": "inf"}
    assert found[0]["metadata"] == {"note": {"$tuple": ["a", 1]}}
    assert found[0]["total_bytes"] > 48
    assert [cloudckpt.read(one["url"], "epoch") for one in found] == [{"epoch": 9}, {"epoch": 100}, {"epoch": 1000}]


def test_ls_of_one_checkpoint_shows_that_one(root: Path, tmp_path: Path) -> None:
    (url,) = [json.loads(line)["url"] for line in run("ls", root, "--json").stdout.splitlines()][:1]
    assert [json.loads(line)["step"] for line in run("ls", url, "--json").stdout.splitlines()] == [9]
    cloudckpt.save({"t": torch.ones(2)}, tmp_path / "alone")
    assert [json.loads(line)["step"] for line in run("ls", tmp_path / "alone", "--json").stdout.splitlines()] == [None]
    assert run("ls", tmp_path / "alone").stdout.splitlines()[2].split()[:2] == ["-", "-"]


@pytest.mark.parametrize("command", ["ls", "show"])
@pytest.mark.parametrize("place", ["empty", "missing"])
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_where_nothing_is_committed_the_status_is_1_and_nothing_is_made(
    tmp_path: Path, command: str, place: str, flags: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    check_fails(run(command, tmp_path / place, *flags), 1, f"no committed checkpoint at file://{tmp_path}/{place};")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_ls_of_attempts_without_a_commit_tells_how_many_are_there(root: Path) -> None:
    for manifest in root.rglob("manifest.json"):
        manifest.unlink()
    check_fails(run("ls", root), 1, "the job of epoch 1 has committed there", "3 attempts stand there without")
    for mark in root.rglob("*.committed"):
        mark.unlink()
    check_fails(run("ls", root), 1, "attempts without a commit: 3;")


def test_ls_of_an_empty_prefix_in_a_bucket_fails_as_that_of_a_directory(s3_url: FreshPrefix) -> None:
    check_fails(run("ls", s3_url.url, "-o", json.dumps(dict(s3_url.storage_options))), 1, s3_url.url, "check the URL")


def test_times_are_local_or_in_utc_and_say_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = datetime.fromisoformat(json.loads(run("show", root, "--json").stdout)["created_at"])
    assert created.utcoffset() == timedelta(0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        local = [run("ls", root).stdout, run("show", root).stdout]
        in_utc = [run("ls", root, "--utc").stdout, run("show", root, "--utc").stdout]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert all(f"{created + timedelta(hours=9):%Y-%m-%d %H:%M:%S}" in text and "JST" in text for text in local)
    assert all(f"{created:%Y-%m-%d %H:%M:%S}" in text and "UTC" in text for text in in_utc)


def test_the_version_is_the_packages() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"cloudckpt {cloudckpt.__version__}\n")


def test_an_error_of_several_lines_is_told_in_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise cloudckpt.StorageError("the store said:\n  no\n")

    monkeypatch.setattr(cloudckpt.root.Catalog, "survey", refuse)
    check_fails(run("ls", root), 1, "the store said: no")


@pytest.mark.parametrize("flags", [(), ("--debug",)], ids=["plain", "debug"])
def test_a_fault_of_ours_is_one_line_and_its_traceback_shows_no_secret(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, storage_options: dict[str, object], **__: object) -> None:
        remember_secrets(storage_options)
        raise ZeroDivisionError(f"canary {storage_options}")

    monkeypatch.setattr(asking, "open_store", fail)
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"secret": "canary-of-16-signs"}')
    result = run("ls", "s3://bucket/x", "--storage-option", "a=1", *flags)
    *traceback, line = result.stderr.splitlines()
    assert result.exit_code == 1
    assert line.startswith("cloudckpt: ZeroDivisionError: canary {'secret': '***'")
    assert "--debug" in line
    assert bool(traceback) == bool(flags)
    assert "canary-of" not in result.stderr


def test_show_of_a_root_shows_the_newest(root: Path) -> None:
    result = run("show", root, "--tensors", "--values")
    assert result.exit_code == 0
    for shown in ("1000", "model.layer.weight", "float32", "[3, 4]", "epoch", "torch", "file://", "[red]x[/red]"):
        assert shown in result.stdout
    assert "0.111" not in result.stdout


def test_show_as_json_has_manifest_tensors_values_and_environment(root: Path) -> None:
    result = run("show", root, "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert result.exit_code == 0
    assert found["step"] == 1000
    assert found["tensors"].pop("cloudckpt.rng.r00000")["dtype"] == "uint8"
    assert found["tensors"] == {"model.layer.weight": {"dtype": "float32", "shape": [3, 4], "chunks": 1}}
    assert found["values"]["epoch"] == 1000
    assert found["environment"]["package.torch"] == torch.__version__


def test_show_of_one_checkpoint_shows_that_one(root: Path) -> None:
    url = json.loads(run("ls", root, "--json").stdout.splitlines()[1])["url"]
    assert json.loads(run("show", url, "--json").stdout)["step"] == 100


def test_what_goes_into_a_pipe_is_not_cut_to_the_width_of_a_terminal(tmp_path: Path) -> None:
    name = ".".join(["transformer"] * 20)
    cloudckpt.save({name: torch.ones(2)}, tmp_path / "c", metrics={f"a rather long metric {n}": n for n in range(9)})
    assert name in run("show", tmp_path / "c", "--tensors").stdout
    assert "a rather long metric 8 8" in run("ls", tmp_path / "c").stdout


@pytest.mark.parametrize("command", ["ls", "show"])
@pytest.mark.parametrize(
    ("url", "words"),
    [("nosuchscheme://x/y", ["nosuchscheme"]), ("s3:/bucket/x", ["slash"]), ("s3://", ["bucket"])],
)
def test_a_wrong_url_fails_in_one_line(command: str, url: str, words: list[str]) -> None:
    check_fails(run(command, url), 1, *words)


def test_credentials_in_a_url_or_in_options_are_not_repeated() -> None:
    check_fails(result := run("ls", "s3://canary:secret@bucket/x"), 1, "credentials")
    assert "canary" not in result.stderr
    check_fails(result := run("ls", "s3://bucket/x", "-o", '{"secret": "canary"'), 2, "--storage-options")
    assert "canary" not in result.stderr


@pytest.mark.parametrize("text", ["nonsense", "[1]", "3", "null"])
def test_options_that_are_no_json_object_fail_with_an_example(text: str) -> None:
    check_fails(run("ls", "s3://bucket/x", "--storage-options", text), 2, '{"anon": true}')


def test_a_corrupt_checkpoint_fails_in_one_line_that_names_the_object(root: Path) -> None:
    (index,) = (root / "step-0000001000-e0001").rglob("index.bin")
    index.write_bytes(b"\x00" + index.read_bytes()[1:])
    check_fails(run("show", root), 1, str(index.relative_to(root)))
    for manifest in root.rglob("manifest.json"):
        manifest.write_text("{}")
    check_fails(run("ls", root), 1, "3 checkpoints are at", "none can be read")


@pytest.mark.parametrize("engine", ["auto", "fsspec"])
def test_ls_and_show_reach_an_object_store_with_options_from_the_environment(
    s3_url: FreshPrefix, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(s3_url.url, storage_options=s3_url.storage_options) as manager:
        manager.save(5, {"t": torch.ones(2)})
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", json.dumps(dict(s3_url.storage_options)))
    assert json.loads(run("ls", s3_url.url, "--json", "--engine", engine).stdout)["step"] == 5
    assert json.loads(run("show", s3_url.url, "--json", "--engine", engine).stdout)["tensors"]["t"]["shape"] == [2]


def test_the_installed_command_runs_and_its_status_is_the_answer(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("cloudckpt"))
    bad = run_to_end([command, "show", str(tmp_path / "x")])
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert "Traceback" not in bad.stderr


def test_ctrl_c_while_the_command_loads_ends_it_with_one_line(tmp_path: Path) -> None:
    # What is loaded interrupts, and turns that into an error of its own, as libraries do.
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except BaseException as exc:\n    raise ImportError('no typer') from exc\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_to_end([sys.executable, "-m", "cloudckpt", "ls", str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "cloudckpt: interrupted; nothing was changed\n"


def test_the_installed_command_is_the_one_that_answers_ctrl_c() -> None:
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert declared == {"cloudckpt": "cloudckpt.__main__:main"}


def test_a_warning_on_the_way_is_told_as_errors_are_and_the_rest_is_listed(root: Path) -> None:
    (root / "step-0000000100-e0001" / "manifest.json").write_text("{}")
    done = run_forked("-m", "cloudckpt", "ls", root, "--json")
    *readable, unreadable = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["step"] for one in readable] == [9, 1000]
    assert (unreadable["step"], unreadable["epoch"]) == (100, 1)
    assert "manifest.json was changed" in unreadable["error"]
    assert "unreadable" in run("ls", root).stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("cloudckpt: a checkpoint's manifest cannot be read: ")
    assert done.returncode == 0


def test_without_a_command_the_help_is_shown() -> None:
    result = run()
    assert "ls" in result.output
    assert "show" in result.output


def answer_into(descriptor: int, arguments: list[str]) -> int:
    """Run the command with its stdout going to a descriptor, as a process has it; return its status."""
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with pytest.MonkeyPatch.context() as patch, os.fdopen(os.dup(1), "w") as stdout:
            patch.setattr(sys, "stdout", stdout)
            with pytest.raises(SystemExit) as ended:
                app(arguments)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show"], ["show", "--json"]], ids=" ".join)
def test_an_answer_that_nobody_can_take_ends_with_one_line(
    root: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        assert answer_into(full.fileno(), [arguments[0], str(root), *arguments[1:]]) == 1
    assert capfd.readouterr().err == "cloudckpt: the answer could not be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["ls"], ["show", "--json"]], ids=" ".join)
def test_a_reader_that_is_gone_is_no_fault(root: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert answer_into(writer, [arguments[0], str(root), *arguments[1:]]) == 141
    os.close(writer)
    assert capfd.readouterr().err == ""


def test_storage_options_of_the_environment_are_those_of_the_library(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"key": "k"}')
    assert run("ls", root).exit_code == 0, "a disk has none"
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", "canary")
    check_fails(run("ls", "s3://bucket/x"), 1, "CLOUDCKPT_STORAGE_OPTIONS in the environment is no JSON object")
