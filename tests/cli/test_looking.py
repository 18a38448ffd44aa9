"""`ls`, `show`, `latest` and `probe`: what is there, what keeps it, what it holds; and what stands in its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cloudckpt
from cloudckpt import CheckpointManager, KeepEvery
from cloudckpt.cli import app, command
from cloudckpt.cli.printing import as_age, plain
from cloudckpt.cli.rules import rules_of, seconds_of
from cloudckpt.root import known
from cloudckpt.store import open_store
from servers import FreshPrefix


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(*arguments: str | Path) -> list[dict[str, object]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 to 40; the losses 3, 1, nan, 2; an attempt that was cut off. Nobody changes it."""
    base = tmp_path_factory.mktemp("looking") / "root"
    with CheckpointManager(base, progress="off", save_rng=False) as manager:
        for step, loss in zip((10, 20, 30, 40), (3.0, 1.0, math.nan, 2.0), strict=True):
            state = {"model": {"a": torch.full((step,), float(step)), "b": torch.ones(2, 2)}, "note": "x" * 500}
            manager.save(step, state, metrics={"loss": loss} if step != 40 else {"loss": loss, "only here": 1.0})
    shard = base / "step-0000000050-e0001" / "0123456789abcdef" / "r00000-0000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"x" * 2048)
    return base


def steps(*arguments: str | Path) -> list[object]:
    return [line["step"] for line in lines(*arguments) if "step" in line]


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ((), [10, 20, 30, 40]),
        (("--limit", "2"), [30, 40]),
        (("--sort", "time"), [10, 20, 30, 40]),
        (("--sort", "size"), [40, 30, 20, 10]),
        (("--sort", "size", "--limit", "1"), [40]),
        (("--sort", "loss"), [20, 40, 10, 30]),
        (("--sort", "loss", "--limit", "2"), [20, 40]),
        (("--sort", "only here"), [40, 10, 20, 30]),
    ],
    ids=lambda case: " ".join(map(str, case)),
)
def test_ls_sorts_by_what_it_is_asked_for(root: Path, options: tuple[str, ...], order: list[int]) -> None:
    assert steps("ls", root, *options) == order


def test_ls_by_a_metric_that_nobody_reported_names_those_that_are_there(root: Path) -> None:
    result = run("ls", root, "--sort", "acc")
    assert result.exit_code == 1
    assert "'loss'" in result.stderr


def test_ls_says_which_rule_keeps_a_checkpoint(root: Path) -> None:
    found = lines("ls", root, "--keep-last", "2", "--keep-best", "loss", "--keep-every", "30")
    kept = {line["step"]: line["kept"] for line in found if "step" in line}
    assert kept == {
        10: [],
        20: ["KeepBest(metric='loss', n=1, mode='min')"],
        30: ["KeepLast(n=2)", "KeepEvery(steps=30)"],
        40: ["newest", "KeepLast(n=2)"],
    }
    assert "newest, KeepLast(n=2)" in run("ls", root, "--keep-last", "2").stdout


def test_ls_tells_what_has_no_commit_apart_with_bytes_and_age(root: Path) -> None:
    (orphan,) = [line for line in lines("ls", root) if "unfinished" in line]
    assert (orphan["unfinished"], orphan["object_count"]) == ("step-0000000050-e0001/", 1)
    assert orphan["total_bytes"] == 2048
    assert "step-0000000050-e0001/        1  2.0 KiB" in run("ls", root).stdout


def test_ls_says_what_it_has_not_looked_at_and_looks_when_told(
    s3_url: FreshPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOUDCKPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(known, "_FEW_ROUNDS", 0)
    words = [s3_url.url, "--json", "-o", json.dumps(dict(s3_url.storage_options))]
    with CheckpointManager(s3_url.url, storage_options=s3_url.storage_options, progress="off") as manager:
        for step in (1, 2):
            manager.save(step, {"step": step})
    assert "--check" not in run("ls", *words).stderr, "all was read"
    with open_store(s3_url.url, storage_options=s3_url.storage_options) as store:
        store.delete(["step-0000000001-e0001/manifest.json"])
    found = run("ls", *words)
    assert "2 of these were read before" in found.stderr
    assert "--check looks at each (1 request)" in found.stderr
    assert [json.loads(line).get("step") for line in found.stdout.splitlines()] == [1, 2]
    looked = run("ls", *words, "--check")
    assert looked.stderr == ""
    assert [json.loads(line).get("step") for line in looked.stdout.splitlines()] == [2, None]
    assert run("ls", *words, "--quick").stderr == "", "who asks for it knows"


def test_an_age_is_told_in_its_two_largest_units() -> None:
    assert [as_age(s) for s in (-3, 0, 59.9, 61, 3_600, 3_661, 90_000)] == [
        *("0 s", "0 s", "59 s", "1 min 1 s", "1 h", "1 h 1 min", "1 d 1 h"),
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("loss", ("loss", 1, "min")),
        ("acc:max", ("acc", 1, "max")),
        ("acc:max:3", ("acc", 3, "max")),
        ("val:loss", ("val:loss", 1, "min")),
        ("val:loss:min:2", ("val:loss", 2, "min")),
        ("top:5", ("top:5", 1, "min")),
    ],
)
def test_a_best_rule_is_read_from_its_end(text: str, rule: tuple[str, int, str]) -> None:
    assert rules_of(None, [text], None, None) == [cloudckpt.KeepBest(rule[0], n=rule[1], mode=rule[2])]  # type: ignore[arg-type]


def test_a_time_has_a_unit() -> None:
    assert [seconds_of(text, "--keep-for") for text in ("3d", "1.5h", "90min", "2m", "45 s")] == [
        *(259_200, 5_400, 5_400, 120, 45),
    ]
    assert run("ls", ".", "--keep-for", "3").exit_code == 2
    assert run("ls", ".", "--keep-last", "0").exit_code == 2
    assert rules_of(None, None, ["7", "6h"], None) == [KeepEvery(steps=7), KeepEvery(seconds=21_600)]


def test_show_groups_tensors_by_prefix_with_their_share(root: Path) -> None:
    (found,) = lines("show", root, "--depth", "1")
    assert found["groups"] == [{"prefix": "model", "tensor_count": 2, "total_bytes": 176, "share": 1.0}]
    shown = run("show", root).stdout
    assert "tensors: 2, values: 1; by prefix" in shown
    assert [word for word in ("model.a", "model.b", "90.9%", "9.1%", "… (502 characters)") if word not in shown] == []
    assert "[2, 2]" not in shown
    assert "[2, 2]" in run("show", root, "--tensors").stdout
    assert "x" * 500 in run("show", root, "--values").stdout


def test_show_reads_one_tensor_or_one_value(root: Path) -> None:
    (found,) = lines("show", root, "--tensor", "model.a")
    assert (found["shape"], found["minimum"], found["mean"], found["std"]) == ([40], 40.0, 40.0, 0.0)
    assert "nan_count    0" in run("show", root, "--tensor", "model.a").stdout
    assert json.loads(run("show", root, "--value", "note").stdout) == "x" * 500
    for option, name in (("--tensor", "model"), ("--value", "nothing")):
        result = run("show", root, option, name)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_latest_prints_a_url_and_nothing_else(root: Path) -> None:
    assert run("latest", root).stdout == f"file://{root}/step-0000000040-e0001\n"
    assert run("latest", root / "step-0000000020-e0001").stdout == f"file://{root}/step-0000000020-e0001\n"
    assert run("latest", root, "--after", "30").stdout.endswith("40-e0001\n")
    assert run("latest", root, "--best", "loss").stdout.endswith("20-e0001\n")
    assert run("latest", root, "--best", "loss", "--mode", "max").stdout.endswith("10-e0001\n")
    assert lines("latest", root)[0]["step"] == 40


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--after", "40"), 1, "--wait"),
        (("--after", "40", "--wait", "--timeout", "0s"), 1, "the newest is of step 40"),
        (("--best", "acc"), 1, "'acc'"),
        (("--best", "loss", "--mode", "low"), 2, "min or max"),
        (("--best", "loss", "--wait"), 2, "--wait"),
        (("--timeout", "3s"), 2, "--wait"),
    ],
    ids=lambda case: " ".join(map(str, case)) if isinstance(case, tuple) else None,
)
def test_latest_ends_with_one_line_where_there_is_none(
    root: Path, options: tuple[str, ...], status: int, words: str
) -> None:
    result = run("latest", root, *options)
    assert (result.exit_code, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert words in line


def test_probe_of_a_disk_says_yes_and_leaves_nothing(tmp_path: Path) -> None:
    result = run("probe", tmp_path / "root", "--rounds", "1", "--size", "8")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"file://{tmp_path}/root can hold a root"
    assert list(tmp_path.iterdir()) == []
    (found,) = lines("probe", tmp_path / "root", "--rounds", "1", "--size", "8")
    assert (found["can_hold_root"], found["needs"]) == (True, {})


def test_probe_of_what_can_hold_no_root_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudckpt.qualifying, "race", lambda *_: False)
    result = run("probe", tmp_path, "--rounds", "1", "--size", "8")
    assert result.exit_code == 3
    assert "cannot hold a root: nobody knows" in result.stdout


# -- what stands there in its place ------------------------------------------------------------------------------


def folder_of_dcp(path: Path) -> None:
    (path / ".metadata").write_bytes(b"")
    (path / "__0_0.distcp").write_bytes(b"")


def folder_of_hugging_face(path: Path) -> None:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (folder_of_dcp, "torch.distributed.checkpoint"),
        (folder_of_hugging_face, "Hugging Face"),
        (None, "check the URL"),
    ],
    ids=["dcp", "hugging face", "empty"],
)
@pytest.mark.parametrize("name", ["ls", "show", "latest"])
def test_what_is_no_root_is_named_for_what_it_is(
    tmp_path: Path, name: str, make: Callable[[Path], None] | None, words: str
) -> None:
    if make:
        make(tmp_path)
    result = run(name, tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("name", ["ls", "show", "latest"])
def test_a_file_is_no_root(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    result = run(name, tmp_path / "model.pt")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "model.pt" in result.stderr


def test_a_directory_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise cloudckpt.AccessDeniedError("no permission to list s3://bucket/x; let it s3:ListBucket", op="list")

    monkeypatch.setattr(cloudckpt.store.RetryingStore, "list", refuse)
    for name in ("ls", "show", "latest"):
        result = run(name, tmp_path)
        assert (result.exit_code, result.stderr) == (
            1,
            "cloudckpt: no permission to list s3://bucket/x; let it s3:ListBucket\n",
        )


# -- how commands end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notes", "is_reading", "line"),
    [
        ((), True, "cloudckpt: interrupted; nothing was changed\n"),
        ((), False, "cloudckpt: interrupted\n"),
        (
            ("2 of 5 copied; run it again to go on",),
            False,
            "cloudckpt: interrupted; 2 of 5 copied; run it again to go on\n",
        ),
    ],
)
def test_an_interrupt_is_one_line_that_says_what_was_done(
    notes: tuple[str, ...], is_reading: bool, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        exc = KeyboardInterrupt()
        for note in notes:
            exc.add_note(note)
        raise exc

    with pytest.raises(command.typer.Exit) as ended:
        command.command(work, is_reading=is_reading)(debug=False)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == line


def test_text_from_a_store_cannot_steer_the_terminal() -> None:
    assert plain("größe 重 ok") == "größe 重 ok"
    assert plain("\x1b[31mred\x07\u202e\n") == "\\x1b[31mred\\x07\\u202e\\n"


def test_every_command_has_the_shared_options() -> None:
    for name in ("ls", "show", "latest", "probe"):
        told = run(name, "--help").stdout
        missing = [
            word
            for word in ("--storage-option ", "--endpoint-url", "--profile", "--engine", "--json", "--debug")
            if word not in told
        ]
        assert missing == [], name


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in run("--help").stdout


def test_ls_and_show_say_how_much_a_checkpoint_holds_itself_and_how_much_others_do(tmp_path: Path) -> None:
    base, alone, whole = tmp_path / "root", tmp_path / "alone", tmp_path / "whole"
    options = cloudckpt.Options(shard_bytes=4096, block_bytes=1024, span_bytes=1024)
    with CheckpointManager(base, options=options, reuse_unchanged=True, progress="off", save_rng=False) as manager:
        for step in (1, 2):
            manager.save(step, {"base": torch.arange(2000), "head": torch.full((300,), float(step))})
    cloudckpt.copy(base, alone)
    cloudckpt.copy(base, whole, every=True)
    held = {
        where: [(one["own_bytes"], one["shared_bytes"]) for one in lines("ls", where)] for where in (base, alone, whole)
    }
    (first, second), (own, shared) = held[base]
    sizes = [int(str(one["total_bytes"])) for one in lines("ls", base)]
    stored = [sum(path.stat().st_size for path in base.rglob(f"*{step}-e0001/*/*.safetensors")) for step in (1, 2)]
    assert (first, second) == (sizes[0], 0)
    assert [first, own] == stored
    assert (own + shared, own < shared) == (sizes[1], True)
    assert held[alone] == [(sizes[1], 0)]
    assert held[whole] == held[base]
    (shown,) = lines("show", base)
    assert (shown["own_bytes"], shown["shared_bytes"]) == (own, shared)
    assert [("shared" in run("ls", where).stdout) for where in (base, alone)] == [True, False]
    assert f"({own:,} bytes)" in run("show", base).stdout
