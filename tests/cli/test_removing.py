"""`pin`, `unpin`, `rm`, `prune` and `sweep`: what goes is shown and asked for, what stays stays, and all is told."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.cli import app
from tests.programs import fork_program


def run(*arguments: str | Path, answer: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("removing") / "root"
    with CheckpointManager(base, progress="off", save_rng=False) as manager:
        for step, loss in zip((10, 20, 30, 40), (3.0, 1.0, 4.0, 2.0), strict=True):
            manager.save(step, {"a": torch.full((8,), float(step))}, metrics={"loss": loss})
    return base


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "root"))


def steps(root: Path) -> list[int]:
    result = run("ls", root, "--json")
    return [json.loads(line)["step"] for line in result.stdout.splitlines() if '"created_at"' in line]


def fails(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("cloudckpt: ")
    assert [word for word in words if word not in line] == []


def test_what_is_pinned_is_shown_kept_and_let_go(root: Path) -> None:
    assert run("pin", root, "30", "--note", "for the paper").stdout == "step 30 of epoch 1 is pinned (for the paper)\n"
    listed = run("ls", root).stdout
    assert "pinned" in listed.splitlines()[4]
    assert "for the paper" in listed.split("pinned, until `unpin`")[1]
    fails(run("rm", root, "30", "--yes"), 1, "step 30 of epoch 1", "is pinned: for the paper", "unpin it first")
    assert run("prune", root, "--keep-last", "1", "--yes", "--grace", "0").exit_code == 0
    assert steps(root) == [30, 40]
    assert json.loads(run("unpin", root, "30", "--json").stdout)["note"] == "for the paper"
    assert run("prune", root, "--keep-last", "1", "--yes", "--grace", "0").exit_code == 0
    assert steps(root) == [40]
    fails(run("unpin", root, "40"), 1, "step 40 is not pinned", "pinned are: none")
    fails(run("pin", root, "41"), 1, "no committed checkpoint of step 41", "nearest")


def test_pins_are_listed_also_of_what_is_not_there(root: Path) -> None:
    assert run("pin", root).stdout == "nothing is pinned\n"
    run("pin", root, "30", "--note", "a")
    run("pin", root, "20", "--note", "b")
    shutil.rmtree(root / "step-0000000020-e0001")
    (root / "step-0000000030-e0001" / "manifest.json").unlink()
    assert run("pin", root).stdout == "step 20 of epoch 1 is pinned (b)\nstep 30 of epoch 1 is pinned (a)\n"
    assert [json.loads(line)["step"] for line in run("pin", root, "--json").stdout.splitlines()] == [20, 30]
    assert steps(root) == [10, 30, 40]
    listed = run("ls", root).stdout.split("pinned, until `unpin`")[1].splitlines()
    assert "not there any more" in listed[2]
    assert "not there" not in listed[3]


def test_prune_removes_what_no_rule_keeps_and_says_what_stays_and_why(root: Path) -> None:
    result = run("prune", root, "--keep-last", "1", "--keep-best", "loss:min", "--yes", "--grace", "0")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[1:5]]
    assert [(row[0], "goes" in row) for row in rows] == [("10", True), ("20", False), ("30", True), ("40", False)]
    assert "KeepBest(metric='loss', n=1, mode='min')" in result.stdout
    assert "newest, KeepLast(n=1)" in result.stdout
    assert "removed: 2 checkpoints" in result.stdout
    assert steps(root) == [20, 40]
    assert not (root / "step-0000000010-e0001").exists()
    assert torch.equal(cloudckpt.read(root / "step-0000000020-e0001")["a"], torch.full((8,), 20.0))


@pytest.mark.parametrize("command", [("prune", "--keep-last", "1"), ("rm", "10"), ("rm", "40")])
def test_a_dry_run_removes_nothing(root: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    result = run(name, root, *options, "--dry-run")
    assert result.exit_code == 0
    assert "goes" in result.stdout
    assert steps(root) == [10, 20, 30, 40]
    found = [json.loads(line) for line in run(name, root, *options, "-n", "--json").stdout.splitlines()]
    assert {one["removed"] for one in found} == {False}


@pytest.mark.parametrize("command", [("prune", "--keep-last", "1"), ("rm", "10")])
def test_without_a_terminal_and_without_yes_nothing_is_removed(root: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    fails(run(name, root, *options), 2, "Nobody can be asked here, and nothing was changed: pass --yes")
    assert steps(root) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no rule says what is to stay"),
        (("--keep-last", "0"), "n of KeepLast"),
        (("--keep-every", "often"), "--keep-every is 'often'; write a number and its unit"),
        (("--keep-for", "3"), "--keep-for is '3'"),
    ],
)
def test_a_wrong_rule_is_a_wrong_command_line(root: Path, options: tuple[str, ...], words: str) -> None:
    fails(run("prune", root, *options, "--yes"), 2, words)
    assert steps(root) == [10, 20, 30, 40]


def test_a_metric_that_was_never_reported_is_refused_by_name(root: Path) -> None:
    fails(run("prune", root, "--keep-last", "1", "--keep-best", "los", "--yes"), 1, "'los'", "their metrics: loss")
    assert steps(root) == [10, 20, 30, 40]


def test_every_by_time_is_a_rule_by_work(root: Path) -> None:
    result = run("prune", root, "--keep-every", "6h", "--dry-run")
    assert "KeepEvery(seconds=21600.0)" in result.stdout


@pytest.mark.parametrize(
    ("asked", "words"),
    [(("40",), "the next restore goes back to step 30"), (("10", "20", "30", "40"), "nothing is left after that")],
)
def test_the_newest_or_the_last_goes_by_force_alone(root: Path, asked: tuple[str, ...], words: str) -> None:
    fails(run("rm", root, *asked, "--yes"), 1, words, "--force with --yes does it")
    assert steps(root) == [10, 20, 30, 40]
    assert run("rm", root, *asked, "--yes", "--force", "--grace", "0").exit_code == 0
    left = [step for step in (10, 20, 30, 40) if str(step) not in asked]
    with CheckpointManager(root, progress="off") as manager:
        assert manager.all_steps() == left


@pytest.mark.parametrize("command", ["prune", "rm", "sweep", "pin", "unpin"])
def test_where_no_root_is_it_is_said_and_nothing_is_made(tmp_path: Path, command: str) -> None:
    options = {"prune": ("--keep-last", "1"), "sweep": ()}.get(command, ("10",))
    result = run(command, tmp_path / "none", *options)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_was_cut_off_and_is_old_enough(root: Path) -> None:
    cut = root / "step-0000000050-e0001" / "0123456789abcdef" / "r00000-0000.safetensors"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"x" * 2048)
    assert "nothing that is old enough" in run("sweep", root, "--older-than", "0s", "--dry-run").stdout
    with CheckpointManager(root, progress="off", save_rng=False, sweep_after_s=None) as manager:
        manager.restore({"a": torch.zeros(8)})
        manager.save(60, {"a": torch.zeros(8)})
    assert "nothing that is old enough" in run("sweep", root, "--yes").stdout
    result = run("sweep", root, "--older-than", "0s", "--dry-run")
    assert "step-0000000050-e0001/" in result.stdout
    fails(run("sweep", root, "--older-than", "0s"), 2, "Remove what 1 attempts have left, 2.0 KiB?", "pass --yes")
    assert cut.exists()
    (found,) = [
        json.loads(line) for line in run("sweep", root, "--older-than", "0s", "--yes", "--json").stdout.splitlines()
    ]
    assert (found["prefix"], found["removed"]) == ("step-0000000050-e0001/", True)
    assert not cut.exists()


# -- a terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def started(terminal: tuple[int, int], *arguments: str | Path) -> BaseProcess:
    name = os.ttyname(terminal[1])
    process = fork_program("-m", "cloudckpt", *arguments, streams=(name, name, name))
    os.close(terminal[1])
    return process


def interrupt(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)


def status_of(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def read_until(terminal: tuple[int, int], words: str) -> str:
    text = ""
    while words not in text:
        text += os.read(terminal[0], 4096).decode()
    return text


def rest(terminal: tuple[int, int]) -> str:
    text = ""
    try:
        while data := os.read(terminal[0], 4096):
            text += data.decode()
    except OSError:  # how a terminal ends
        pass
    return text


@pytest.mark.slow
def test_who_says_no_has_removed_nothing(root: Path, terminal: tuple[int, int]) -> None:
    process = started(terminal, "rm", root, "40")
    text = read_until(terminal, "[y/N]")
    assert "goes back to step 30" in " ".join(text.split())
    os.write(terminal[0], b"n\n")
    assert "nothing was changed" in rest(terminal)
    assert status_of(process) == 1
    assert steps(root) == [10, 20, 30, 40]


def test_who_interrupts_the_wait_hears_what_was_done_and_what_removes_the_rest(
    root: Path, terminal: tuple[int, int]
) -> None:
    process = started(terminal, "rm", root, "10", "--grace", "600")
    read_until(terminal, "[y/N]")
    os.write(terminal[0], b"y\n")
    read_until(terminal, "their objects go in")
    interrupt(process)
    text = " ".join(rest(terminal).split())
    assert status_of(process) == 130
    assert "interrupted; 1 checkpoints are removed; objects of theirs may be left" in text
    assert f"`cloudckpt sweep file://{root}`" in text.replace("\r", "")
    assert steps(root) == [20, 30, 40]
    assert (root / "step-0000000010-e0001").is_dir()


@pytest.mark.parametrize(
    "rule",
    [
        ("--keep-best", "loss:min:²"),
        ("--keep-every", "9" * 5_000),
        ("--keep-for", "9" * 5_000 + "d"),
        ("--keep-best", "loss:min:" + "9" * 5_000),
    ],
)
def test_a_number_that_is_none_is_a_wrong_command_line_or_no_metric(root: Path, rule: tuple[str, str]) -> None:
    result = run("prune", root, *rule, "--yes")
    assert result.exit_code in (1, 2)
    assert "fault of cloudckpt" not in result.stderr
    assert steps(root) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "--keep-last", "1", "--yes"),
        ("sweep", "--yes"),
        ("rm", "10", "--yes"),
        ("pin", "10"),
        ("unpin", "10"),
        ("pin",),
    ],
    ids=lambda command: command[0],
)
def test_at_the_url_of_a_checkpoint_its_root_is_named(root: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    one = root / "step-0000000010-e0001"
    fails(run(name, one, *options), 1, f"{one} is one checkpoint, not a root", f"give its root, file://{root}")


def test_the_last_one_that_cannot_be_read_goes_by_force_alone(root: Path) -> None:
    for step in (10, 20, 30):
        shutil.rmtree(root / f"step-{step:010}-e0001")
    manifest = root / "step-0000000040-e0001" / "manifest.json"
    manifest.write_bytes(b"damaged")
    fails(run("rm", root, "40", "--yes"), 1, "nothing is left after that", "--force with --yes does it")
    shown = run("rm", root, "40", "--dry-run").stdout
    assert shown.splitlines()[1].split()[:2] == ["40", "1"]
    assert "restore an older step" not in shown
    assert manifest.exists()
    assert run("rm", root, "40", "--yes", "--force", "--grace", "0").exit_code == 0
    assert not manifest.parent.exists()


def test_who_is_asked_sees_what_goes_also_where_the_answer_is_json(root: Path) -> None:
    result = run("rm", root, "10", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "goes" in result.stderr
    assert "has not begun its first save" in result.stderr


def test_an_answer_that_cannot_be_written_does_not_hide_what_was_done(root: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    process = fork_program(
        *("-m", "cloudckpt", "rm", root, "10", "--yes", "--json"), streams=(os.devnull, "/dev/full", str(said))
    )
    assert status_of(process) == 1
    assert "the answer could not be written" in said.read_text()
    assert "1 checkpoints are removed (steps 10)" in said.read_text()
    assert steps(root) == [20, 30, 40]


def test_who_interrupts_the_question_ends_it_as_interrupted(root: Path, terminal: tuple[int, int]) -> None:
    process = started(terminal, "rm", root, "10")
    read_until(terminal, "[y/N]")
    interrupt(process)
    assert "interrupted; nothing was changed" in " ".join(rest(terminal).split())
    assert status_of(process) == 130
    assert steps(root) == [10, 20, 30, 40]
