"""No credential shows: not in an error, a log at DEBUG, a repr, a pickle, an event, an object, a page or a terminal."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from google.oauth2.credentials import Credentials
from typer.testing import CliRunner

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Options, OptionsError, RetryPolicy
from cloudckpt.cli import app
from cloudckpt.store.retrying import RetryingStore
from tests.reliability.records import Section, Trials, dose
from tests.store.credential_services import credential_service
from tests.store.http_object_server import Fault, FaultKind, ObjectServer

SECTION = Section(
    number=70,
    title="Secrets",
    about="Every kind of credential is a word that nothing else holds. A root is saved to, listed, restored, verified, "
    "looked at by the command and made a page of, while the store answers well or with each kind of fault, among them "
    "errors that repeat what they were sent. Then the word is looked for, as it is, in base64 and in a URL's form, in "
    "all that came out: errors with their causes and attributes, their pickles, every record of every logger at DEBUG, "
    "reprs, events, objects on the store, the page, and what the command printed. Lost is a trial that shows it.",
)
HASTY = Options(retry=RetryPolicy(max_attempts=2, deadline_s=20.0, request_timeout_s=10.0, backoff_base_s=0.001))

Given = tuple[str, str, dict[str, object], dict[str, str], list[str]]
"""Scheme, engine, storage options, environment, secrets."""


def _canary(name: str) -> str:
    return f"CANARY{name}0123456789abcdef"


def _keys(engine: str) -> Callable[[ObjectServer, Path], Given]:
    def make(server: ObjectServer, _: Path) -> Given:
        words = [_canary("SECRET"), _canary("TOKEN")]
        options = {"key": "AKIDKNOWN", "secret": words[0], "token": words[1], "endpoint_url": server.endpoint}
        return "s3", engine, options, {}, words

    return make


def _client_keys(server: ObjectServer, _: Path) -> Given:
    words = [_canary("CLIENTSECRET"), _canary("CLIENTTOKEN")]
    client = {"aws_access_key_id": "AKIDKNOWN", "aws_secret_access_key": words[0], "aws_session_token": words[1]}
    return "s3", "auto", {"client_kwargs": client, "endpoint_url": server.endpoint}, {}, words


def _environment(server: ObjectServer, _: Path) -> Given:
    words = [_canary("ENVSECRET"), _canary("ENVTOKEN")]
    environment = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": words[0], "AWS_SESSION_TOKEN": words[1]}
    return "s3", "auto", {"endpoint_url": server.endpoint}, environment, words


def _profile(server: ObjectServer, folder: Path) -> Given:
    word = _canary("PROFILE")
    (folder / "credentials").write_text(f"[lab]\naws_access_key_id = AKID\naws_secret_access_key = {word}\n")
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials")}
    return "s3", "auto", {"profile": "lab", "endpoint_url": server.endpoint}, environment, [word]


def _customer_key(engine: str) -> Callable[[ObjectServer, Path], Given]:
    def make(server: ObjectServer, _: Path) -> Given:
        word = "CANARYCUSTOMERKEY0123456789abcde"
        assert len(word) == 32
        more: dict[str, object] = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": word}
        options = {"key": "AKID", "secret": "s" * 40, "endpoint_url": server.endpoint, "s3_additional_kwargs": more}
        return "s3", engine, options, {}, [word]

    return make


def _proxy(server: ObjectServer, _: Path) -> Given:
    word = _canary("PROXY")
    proxies = {"http": f"http://user:{word}@127.0.0.1:{server.port}"}
    options = {
        "key": "AKID",
        "secret": "s" * 40,
        "endpoint_url": server.endpoint,
        "config_kwargs": {"proxies": proxies},
    }
    return "s3", "fsspec", options, {}, [word]


def _google_token(engine: str) -> Callable[[ObjectServer, Path], Given]:
    def make(server: ObjectServer, _: Path) -> Given:
        word = _canary("GOOGLE")
        return "gs", engine, {"token": Credentials(token=word), "endpoint_url": server.endpoint}, {}, [word]

    return make


def _authorized_user(server: ObjectServer, folder: Path) -> Given:
    words = [_canary("REFRESH"), _canary("CLIENT")]
    user = {"type": "authorized_user", "client_id": "id", "client_secret": words[1], "refresh_token": words[0]}
    user["token_uri"] = f"{server.endpoint}/no-such-service"
    (folder / "user.json").write_text(json.dumps(user))
    return "gs", "auto", {"token": str(folder / "user.json"), "endpoint_url": server.endpoint}, {}, words


def _service_account(server: ObjectServer, folder: Path) -> Given:
    with credential_service() as service:  # it is gone when it is asked
        path = service.service_account(folder)
    lines = json.loads(Path(path).read_text())["private_key"].splitlines()
    return "gs", "auto", {"token": path, "endpoint_url": server.endpoint}, {}, lines[1:4]


def _options_of_the_environment(server: ObjectServer, _: Path) -> Given:
    word = _canary("VARIABLE")
    options = {"key": "AKID", "secret": word, "endpoint_url": server.endpoint}
    return "s3", "auto", {}, {"CLOUDCKPT_STORAGE_OPTIONS": json.dumps(options)}, [word]


CREDENTIALS: Mapping[str, Callable[[ObjectServer, Path], Given]] = {
    "keys in the options, obstore": _keys("obstore"),
    "keys in the options, s3fs": _keys("fsspec"),
    "keys in client_kwargs": _client_keys,
    "keys in the environment": _environment,
    "a profile": _profile,
    "a customer's own key, obstore": _customer_key("obstore"),
    "a customer's own key, s3fs": _customer_key("fsspec"),
    "a proxy's password": _proxy,
    "a Google token, gcsfs": _google_token("fsspec"),
    "a Google token, obstore": _google_token("obstore"),
    "a Google user's file": _authorized_user,
    "a service account's file": _service_account,
    "CLOUDCKPT_STORAGE_OPTIONS": _options_of_the_environment,
}
FAULTS: Mapping[str, Callable[[str], Fault] | None] = {
    "none": None,
    "403 that repeats what it was sent": lambda told: Fault(status=403, code="SignatureDoesNotMatch", message=told),
    "400 that repeats what it was sent": lambda told: Fault(status=400, body=_echo(told)),
    "500 that repeats what it was sent": lambda told: Fault(status=500, body=_echo(told)),
    "401": lambda _: Fault(status=401, code="Unauthorized"),
    "a web page that repeats what it was sent": lambda told: Fault(status=200, body=f"<html>{told}</html>".encode()),
    "a redirect that repeats what it was sent": lambda told: Fault(
        status=307, body=b"", headers={"Location": f"http://localhost:9/?t={quote(told)}"}
    ),
    "a reset": lambda _: Fault(kind=FaultKind.RESET_BEFORE_REPLY),
    "a reply cut short": lambda _: Fault(kind=FaultKind.SHORT_HONEST),
    "no HTTP": lambda told: Fault(kind=FaultKind.NO_HTTP, body=f"550 {told}\r\n".encode()),
}


def _echo(told: str) -> bytes:
    return f"<Error><Code>ExpiredToken</Code><Message>no</Message><Token-0>{told}</Token-0></Error>".encode()


@contextmanager
def heard() -> Iterator[list[str]]:
    """Hear every record of every logger, as it is formatted."""
    texts: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(self.format(record))

    root, ear = logging.getLogger(), Ear(logging.DEBUG)
    before = root.level
    root.addHandler(ear)
    root.setLevel(logging.DEBUG)
    try:
        yield texts
    finally:
        root.removeHandler(ear)
        root.setLevel(before)


def _told(exc: BaseException) -> list[str]:
    return ["".join(traceback.format_exception(exc)), repr(vars(exc)), repr(pickle.dumps(exc))]


def _use(given: Given, folder: Path, begins: Callable[[], None]) -> Iterator[str]:
    """Do all that one does with a root; yield every text that comes of it. `begins` lets the faults begin."""
    scheme, engine, options, _, _ = given
    url = f"{scheme}://bucket/run"
    about = {"storage_options": options or None, "engine": engine, "options": HASTY}
    events: list[object] = []

    def manage() -> Iterator[str]:
        with CheckpointManager(url, on_event=events.append, progress="off", **about) as manager:  # type: ignore[arg-type]
            yield repr(manager)
            manager.restore({"w": torch.zeros(8)})
            step = len(events)
            manager.save(step, {"w": torch.arange(8.0)}, metadata={"note": "n"})
            yield repr(manager.checkpoints()) + repr(manager.report())

    calls: list[Callable[[], Iterator[str]]] = [
        manage,
        lambda: iter([repr(cloudckpt.verify(url, deep=True, progress="off", **about))]),  # type: ignore[arg-type]
        lambda: iter([repr(cloudckpt.read(url, progress="off", **about))]),  # type: ignore[arg-type]
        lambda: iter([cloudckpt.report_page(url, storage_options=options or None, engine=engine)]),
    ]
    for is_broken in (False, True):
        for call in calls:
            try:
                yield from call()
            except CloudCkptError as exc:
                yield from _told(exc)
        yield repr(events)
        if not is_broken:
            begins()
    simple = {name: value for name, value in options.items() if isinstance(value, str)}
    for command in ("ls", "show", "verify"):
        result = CliRunner().invoke(app, [command, url], env={"CLOUDCKPT_STORAGE_OPTIONS": json.dumps(simple)})
        yield result.output
        if result.exception is not None:
            yield from _told(result.exception)


def _forms(word: str) -> list[str]:
    encoded = base64.b64encode(word.encode()).decode().rstrip("=")
    return [word, quote(word, safe=""), encoded[:-2]]


PAIRS = [(kind, fault) for kind in CREDENTIALS for fault in FAULTS]


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_credential_shows_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stride = dose(1, short=29)
    with Trials(SECTION, "a job with a credential, and a fault") as trials:
        for number, (kind, fault) in enumerate(PAIRS[::stride]):
            folder = tmp_path / str(number)
            folder.mkdir()
            shown = _try(kind, fault, folder, monkeypatch)
            if shown:
                trials.lose(f"{kind}, {fault}: {shown}")
            else:
                trials.count("nothing showed")


def _try(kind: str, fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with ObjectServer() as server, monkeypatch.context() as patch, heard() as logged:
        # What the command and the page wait between requests, in vain.
        patch.setattr("cloudckpt.store.opening.RetryingStore", partial(RetryingStore, sleep=lambda _: None))
        given = CREDENTIALS[kind](server, folder)
        secrets = given[4]
        for name, text in given[3].items():
            patch.setenv(name, text)
        make = FAULTS[fault]

        def begins() -> None:
            if make is not None:
                server.inject(make(" ".join(secrets)), times=-1)

        texts = list(_use(given, folder, begins))
        stored = [repr(bytes(found.data)) for found in server.objects.values()]
    places = {"what was told": texts, "the log": logged, "the store": stored}
    for place, found in places.items():
        for text in found:
            for word in secrets:
                if shown := next((form for form in _forms(word) if form in text), ""):
                    at = text.index(shown)
                    return f"{place} has {shown} in …{text[max(0, at - 100) : at + 60]!r}"
    return ""


URLS = [
    "s3://user:{}@bucket/run",
    "s3://{}@bucket/run",
    "s3://bucket/run?X-Amz-Signature={}",
    "s3://bucket/run#{}",
    "gs://{}@bucket/run",
    "gs://bucket/run?token={}",
    "az://user:{}@account/run",
    "az://container/run?sv=1&sig={}",
    "https://user:{}@host/run",
    "http://host/run?sig={}",
    "sftp://user:{}@host/run",
]


@pytest.mark.parametrize("command", ["ls", "show", "verify", "latest", "sweep", "report"])
def test_no_credential_of_a_url_is_repeated(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = _canary("URL")
    monkeypatch.chdir(tmp_path)
    with Trials(SECTION, "a URL with a credential in it") as trials, heard() as logged:
        for form in URLS:
            url = form.format(word)
            result = CliRunner().invoke(app, [command, url])
            told = [result.output, *logged]
            with pytest.raises(OptionsError) as caught:
                cloudckpt.read(url)
            told += _told(caught.value)
            if any(word in text for text in told):
                trials.lose(f"{command} {form}: {next(text for text in told if word in text)[:200]}")
            else:
                trials.count("refused, and not repeated")
