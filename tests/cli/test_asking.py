"""What the command line says of how a store is reached becomes fsspec's options; what is wrong is told without it."""

from __future__ import annotations

import pytest
import typer

from cloudckpt.cli import asking
from cloudckpt.cli.asking import Access

S3 = "s3://bucket/x"


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["anon=true"], {"anon": True}),
        (["a=3", "b=1.5", "c=null", "d=[1]"], {"a": 3, "b": 1.5, "c": None, "d": [1]}),
        (["key=abc", "secret=a=b c"], {"key": "abc", "secret": "a=b c"}),
        (['key="0123"', "other=0123"], {"key": "0123", "other": "0123"}),
        (
            ["client_kwargs.region_name=eu", "client_kwargs.a.b=1"],
            {"client_kwargs": {"region_name": "eu", "a": {"b": 1}}},
        ),
        (["key="], {"key": ""}),
        (
            ["key=12", "secret=1e5", "token=true", "profile=7", "client_kwargs.aws_session_token=3"],
            {
                "key": "12",
                "secret": "1e5",
                "token": "true",
                "profile": "7",
                "client_kwargs": {"aws_session_token": "3"},
            },
        ),
        (['token={"type": "service_account"}'], {"token": {"type": "service_account"}}),
    ],
)
def test_a_single_option_is_json_where_it_is_and_text_else(texts: list[str], options: dict[str, object]) -> None:
    assert Access(storage_option=texts).options_for(S3) == options


def test_single_options_are_added_to_those_given_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"key": "of the environment", "client_kwargs": {"a": 1}}')
    single = ["client_kwargs.b=2"]
    assert Access(storage_option=single, storage_options='{"anon": true}').options_for(S3) == {
        "anon": True,
        "client_kwargs": {"b": 2},
    }
    assert Access(storage_option=single).options_for(S3) == {
        "key": "of the environment",
        "client_kwargs": {"a": 1, "b": 2},
    }
    assert Access().options_for(S3) is None, "the library takes those of the environment itself"


def test_endpoint_and_profile_are_options_of_the_store() -> None:
    access = Access(endpoint_url="http://127.0.0.1:1", profile="work")
    assert access.options_for(S3) == {"endpoint_url": "http://127.0.0.1:1", "profile": "work"}


@pytest.mark.parametrize(
    ("access", "words"),
    [
        (Access(storage_option=["canary"]), "key=value"),
        (Access(storage_option=["=canary"]), "key=value"),
        (Access(storage_option=["a..b=canary"]), "key=value"),
        (Access(storage_option=["a=1", "a=canary"]), "--storage-option a is given twice"),
        (Access(storage_option=["a=1", "a.b=canary"]), "--storage-option a.b goes below"),
        (Access(storage_option=["endpoint_url=http://a"], endpoint_url="http://canary"), "given twice"),
        (Access(storage_options='{"secret": "canary"'), "--storage-options is no JSON object"),
    ],
)
def test_options_that_contradict_are_a_wrong_command_line_and_not_repeated(
    access: Access, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        access.options_for(S3)
    told = capsys.readouterr().err
    assert ended.value.exit_code == 2
    assert words in told
    assert "canary" not in told
    assert len(told.splitlines()) == 1


def test_a_profile_is_refused_where_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        Access(profile="work").options_for("gs://bucket/x")
    assert "s3://" in capsys.readouterr().err


def test_where_nobody_can_be_asked_leave_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    asking.ensure("Remove all of it?", is_yes=True)
    with pytest.raises(typer.Exit) as ended:
        asking.ensure("Remove all of it?", is_yes=False)
    assert ended.value.exit_code == 2
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [False, typer.Abort()], ids=["no", "ctrl-c"])
def test_only_a_yes_is_leave(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(*_: object, **__: object) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    for name in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(asking.sys, name), "isatty", lambda: True)
    monkeypatch.setattr(asking.typer, "confirm", confirm)
    with pytest.raises(typer.Exit) as ended:
        asking.ensure("Remove all of it?", is_yes=False)
    assert ended.value.exit_code == 1
