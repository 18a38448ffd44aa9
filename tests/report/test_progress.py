"""A person sees once what a save or restore did: a bar on a terminal, a line elsewhere, nothing by choice."""

from __future__ import annotations

import io
import logging
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, OptionsError
from cloudckpt.options import MIB
from cloudckpt.report.progress import Progress, Show, as_bytes

STATE = {"w": torch.arange(MIB, dtype=torch.float32)}


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """No handler of the test runner's: a program that has not asked for a log."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    yield
    root.handlers = handlers


def save_and_restore(root: Path, show: Show) -> None:
    with CheckpointManager(root, progress=show) as manager:
        manager.restore({"w": torch.zeros(MIB)})
        manager.save(1, dict(STATE))
        manager.async_save(2, dict(STATE)).result()
        manager.restore({"w": torch.zeros(MIB)})


@pytest.mark.parametrize("show", ["auto", "line"])
def test_each_save_and_restore_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show
) -> None:
    save_and_restore(tmp_path, show)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == f"cloudckpt: nothing is committed at {tmp_path.as_uri()}: a fresh start"
    assert [line.partition(" in ")[0] for line in lines[1:]] == [
        f"cloudckpt: saved step 1 to {tmp_path.as_uri()}/step-0000000001-e0001: 4.0 MiB",
        f"cloudckpt: saved step 2 to {tmp_path.as_uri()}/step-0000000002-e0001: 4.0 MiB",
        f"cloudckpt: restored step 2 from {tmp_path.as_uri()}/step-0000000002-e0001: 4.0 MiB",
    ]
    assert all(line.endswith("/s)") for line in lines[1:])


def test_the_functions_for_one_url_say_the_same_without_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "c")
    cloudckpt.save(dict(STATE), url)
    cloudckpt.load({"w": torch.zeros(MIB)}, url)
    cloudckpt.read(url)
    lines = capsys.readouterr().err.splitlines()
    place = (tmp_path / "c").as_uri()
    assert [line.partition(" in ")[0] for line in lines] == [
        f"cloudckpt: saved to {place}: 4.0 MiB",
        f"cloudckpt: restored from {place}: 4.0 MiB",
    ]


def test_off_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_and_restore(tmp_path, "off")
    cloudckpt.save(dict(STATE), tmp_path / "c", progress="off")
    assert capsys.readouterr().err == ""


def test_a_line_that_the_log_shows_is_not_shown_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("cloudckpt")
    shown = io.StringIO()
    handler, level = logging.StreamHandler(shown), log.level
    log.addHandler(handler)
    try:
        log.setLevel(logging.INFO)
        save_and_restore(tmp_path, "auto")
        assert capsys.readouterr().err == ""
        assert "saved step 1 of epoch 1" in shown.getvalue()
        log.setLevel(logging.WARNING)
        save_and_restore(tmp_path, "auto")
        assert "cloudckpt: restored step 2" in capsys.readouterr().err
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_a_choice_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="progress is 'loud'; give one of 'auto', 'bar', 'line', 'off'"):
        CheckpointManager(tmp_path, progress="loud")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="progress is True"):
        cloudckpt.save({}, tmp_path / "c", progress=True)  # type: ignore[arg-type]


def test_only_rank_0_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("bar")
    progress.say("a line", rank=1)
    with progress.bar("a bar", rank=1) as bar:
        bar.begin(10)
        bar.move(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_while_bytes_move_and_a_line_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen through a real terminal's other end."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(ours, 65536))
            except OSError:  # the terminal is gone
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(theirs, "w", buffering=1) as terminal, monkeypatch.context() as patched:
        patched.setenv("TERM", "xterm")
        patched.delenv("NO_COLOR", raising=False)
        patched.setattr(sys, "stderr", terminal)
        with CheckpointManager(tmp_path) as manager:
            manager.save(1, dict(STATE))
            manager.restore({"w": torch.zeros(MIB)})
    reader.join(10)
    os.close(ours)
    text = b"".join(seen).decode()
    assert "saving step 1" in text
    assert "4.2/4.2 MB" in text or "4.0/4.0 MiB" in text
    assert "restoring latest" in text
    assert "cloudckpt: saved step 1 to" in text
    assert text.rstrip().splitlines()[-1].endswith("/s)")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_bytes_are_read_in_binary_units(size_bytes: int, text: str) -> None:
    assert as_bytes(size_bytes) == text


class Full(io.StringIO):
    """A stderr whose disk is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


class Bare:
    """What training scripts put in the place of stderr: no `isatty`."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("show", ["auto", "bar", "line"])
@pytest.mark.parametrize("stderr", [Full, Bare, closed, lambda: None], ids=["full", "bare", "closed", "none"])
def test_nothing_that_is_wrong_with_stderr_decides_about_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: Callable[[], object], show: Show
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr())
    save_and_restore(tmp_path, show)
    cloudckpt.save(dict(STATE), tmp_path / "c", progress=show)
    cloudckpt.load({"w": torch.zeros(MIB)}, tmp_path / "c", progress=show)
    monkeypatch.undo()
    assert [one.step for one in CheckpointManager(tmp_path).checkpoints()] == [1, 2]


def test_without_a_terminal_what_is_long_says_now_and_then_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Progress().bar("copying", rank=0, every_s=10.0, clock=lambda: now[0]) as bar:
        bar.begin(100 * MIB)
        for _ in range(10):
            now[0] += 4.0
            bar.move(10 * MIB)
    assert capsys.readouterr().err.splitlines() == [
        "cloudckpt: copying: 30.0 MiB of 100.0 MiB, 2.5 MiB/s, 28 s left",
        "cloudckpt: copying: 60.0 MiB of 100.0 MiB, 2.5 MiB/s, 16 s left",
        "cloudckpt: copying: 90.0 MiB of 100.0 MiB, 2.5 MiB/s, 4 s left",
    ]
