"""Hand hostile input to every door of the library, in a process whose memory and time are limited.

    caged(function, …) ──▶ a forked process, RLIMIT_AS at what it has and 64 MiB ──▶ what became of each case

A case ends in one of our errors, or is harmless. What else is raised, a second of processor time, or more memory speaks
against it; and so does a file outside of the root, or code that has run.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import string
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from cloudckpt import errors
from cloudckpt.cli import app
from cloudckpt.convert.dcp_metadata import decode_metadata
from cloudckpt.errors import CloudCkptError
from cloudckpt.options import MIB
from cloudckpt.store import open_store
from cloudckpt.store.base import check_key
from tests.format.test_hostile import CASES, KINDS, _mutated
from tests.ranks.processes import fork

__all__ = [
    "ARGUMENTS",
    "FUZZED",
    "OPTIONS",
    "URLS",
    "Found",
    "caged",
    "cases_of_objects",
    "fuzzed",
    "opened",
    "told_by_cli",
]

ROOM_BYTES = 64 * MIB
CASE_S = 1.0

URLS: dict[str, str] = {
    "nothing": "",
    "a blank": " ",
    "a NUL": "a\0b",
    "a NUL in a bucket's name": "s3://bu\0cket/x",
    "a line break": "s3://bucket/a\nb",
    "a tab": "s3://bucket/a\tb",
    "an escape sequence": "s3://bucket/\x1b[2J",
    "up and out": "s3://bucket/../other/x",
    "up in the middle": "s3://bucket/a/../../b",
    "a dot": "s3://bucket/./a",
    "two slashes": "s3://bucket/a//b",
    "no bucket": "s3://",
    "no bucket, but a path": "s3:///etc/passwd",
    "a bucket of dots": "s3://../x",
    "a bucket with a blank": "s3://my bucket/x",
    "a bucket with a port": "s3://bucket:9000/x",
    "a user": "s3://CANARY@bucket/x",
    "a user and a password": "s3://user:CANARY@bucket/x",
    "a query": "s3://bucket/x?X-Amz-Signature=CANARY",
    "a version": "s3://bucket/x?versionId=CANARY",
    "a fragment": "s3://bucket/x#CANARY",
    "one slash": "s3:/bucket/x",
    "no slashes": "s3:bucket/x",
    "capital letters, one slash": "S3:/bucket/x",
    "a chain": "simplecache::s3://bucket/x",
    "a chain to a file": "zip://x::file:///etc/passwd",
    "a scheme of a module": "os.system://x",
    "a scheme of a path": "../x://y",
    "a scheme in braces": "{scheme}://x",
    "a scheme of digits": "3s://bucket/x",
    "an unknown scheme": "gopher://host/x",
    "a javascript URL": "javascript://x/%0aalert(1)",
    "a data URL": "data://text/plain;base64,AAAA",
    "a web page": "http://127.0.0.1:1/x",
    "a web page under TLS": "https://127.0.0.1:1/x",
    "a git repository": "git://x",
    "a reference file": "reference://x",
    "a cluster": "dask://x",
    "a generic one": "generic://x",
    "a relative file URL": "file://etc/passwd",
    "a file URL of another host": "file://host/etc/passwd",
    "a file URL with a NUL": "file:///tmp/a%00b",
    "a UNC path in a URL": "file:////host/share",
    "nobody's home": "~nobody-of-that-name/x",
    "a key without end": "s3://bucket/" + "a" * 5000,
    "segments without end": "s3://bucket/" + "a/" * 5000,
    "a name without end": "a" * 5000,
    "a lone surrogate": "s3://bucket/\ud800",
    "a backslash": "s3://bucket/a\\..\\b",
    "a bucket in Cyrillic": "s3://b\u0443cket/x",
    "a turned slash": "s3://bucket\u2215x",
    "from right to left": "s3://\u202etekcub/x",
    "an access point of nobody": "s3://arn:aws:s3:::x",
    "an ARN of another service": "s3://arn:aws:iam::1:role/x",
    "a percent sign in a bucket": "s3://buc%2fket/x",
    "an at sign in a gs bucket": "gs://a@b/x",
    "a gs bucket of nothing": "gs:///x",
    "an az container with a password": "az://user:CANARY@account/x",
}
"""What could be given as a URL; each is refused where it is opened."""

_S3 = "s3://bucket/run"
OPTIONS: dict[str, tuple[str, Any]] = {
    "a list": (_S3, ["key"]),
    "a text": (_S3, "key=CANARY"),
    "a number": (_S3, 7),
    "an unknown name": (_S3, {"kye": "CANARY"}),
    "a name that is no text": (_S3, {7: "CANARY"}),
    "a key that is a number": (_S3, {"key": 12345678, "secret": "CANARY"}),
    "a secret that is bytes": (_S3, {"key": "k", "secret": b"CANARY"}),
    "a secret with a line break": (_S3, {"key": "k", "secret": "CANARY\nx-amz-acl: public-read"}),
    "a key with a line break": (_S3, {"key": "CANARY\r\nHost: evil", "secret": "s"}),
    "a token with a NUL": (_S3, {"key": "k", "secret": "s", "token": "CANARY\0"}),
    "a token beyond Latin-1": (_S3, {"key": "k", "secret": "s", "token": "CANARY\u0443"}),
    "a key under two names": (_S3, {"key": "a", "username": "b", "secret": "CANARY"}),
    "client_kwargs that are a list": (_S3, {"client_kwargs": ["CANARY"]}),
    "config_kwargs that are a text": (_S3, {"config_kwargs": "CANARY"}),
    "an endpoint of a file": (_S3, {"endpoint_url": "file:///etc/passwd"}),
    "an endpoint without a host": (_S3, {"endpoint_url": "http://"}),
    "an endpoint with a password": (_S3, {"endpoint_url": "https://user:CANARY@host"}),
    "an endpoint with a query": (_S3, {"endpoint_url": "https://host/?CANARY"}),
    "an endpoint with a line break": (_S3, {"endpoint_url": "https://host\r\nx: CANARY"}),
    "an endpoint that is a number": (_S3, {"endpoint_url": 9000}),
    "an endpoint of plain http": (_S3, {"endpoint_url": "http://169.254.169.254/"}),
    "leave for plain http that is a text": (_S3, {"endpoint_url": "http://10.0.0.1", "allow_http": "yes"}),
    "retries of their own": (_S3, {"config_kwargs": {"retries": {"max_attempts": 99}}}),
    "a session of theirs": (_S3, {"session": object()}),
    "a loop of theirs": (_S3, {"loop": object()}),
    "versions": (_S3, {"version_aware": True}),
    "a region with a slash": (_S3, {"key": "k", "secret": "s", "client_kwargs": {"region_name": "../evil"}}),
    "an unknown signature": (_S3, {"config_kwargs": {"signature_version": "none"}}),
    "gs: a token that is a number": ("gs://bucket/run", {"token": 7}),
    "gs: an unknown name": ("gs://bucket/run", {"tokne": "CANARY"}),
    "gs: an endpoint of a file": ("gs://bucket/run", {"endpoint_url": "file:///x"}),
    "gs: an endpoint of plain http": ("gs://bucket/run", {"endpoint_url": "http://far"}),
    "a disk with options": ("./x", {"key": "CANARY"}),
}
"""URL and storage options; each is refused where it is opened."""

ARGUMENTS: dict[str, list[str]] = {
    "no URL": ["ls"],
    "an unknown command": ["frobnicate", "x"],
    "an unknown option": ["ls", "x", "--frobnicate"],
    "a URL that looks like an option": ["ls", "--", "-rf"],
    "an empty URL": ["ls", ""],
    "a URL with a password": ["ls", "s3://user:CANARY@bucket/x"],
    "a URL with a NUL": ["show", "a\0b"],
    "a step of text": ["pin", "x", "seven"],
    "a negative step": ["rm", "x/step-0000000001-e0001", "--grace", "-7"],
    "a count without end": ["prune", "x", "--keep-last", "9" * 5000],
    "a count below nothing": ["prune", "x", "--keep-last", "-1"],
    "a count of text": ["prune", "x", "--keep-last", "all"],
    "a rule of no rule": ["prune", "x", "--keep-best", "loss"],
    "a rule with code": ["prune", "x", "--keep-best", "__import__('os').system('touch ran'):1"],
    "ages of nothing": ["sweep", "x", "--older-than", "soon"],
    "a storage option without a value": ["ls", "s3://b/x", "--storage-option", "key"],
    "a storage option twice": ["ls", "s3://b/x", "--storage-option", "key=a", "--storage-option", "key=b"],
    "an engine of nobody": ["ls", "s3://b/x", "--engine", "telnet"],
    "an endpoint of a file": ["ls", "s3://b/x", "--endpoint-url", "file:///etc/passwd"],
    "a target above the root": ["cp", "x", "s3://bucket/../y"],
    "an export to nothing": ["export", "x", "", "--to", "torch"],
    "an export to an unknown kind": ["export", "x", "y", "--to", "exe"],
    "an import of nothing": ["import", "nothing-here", "y"],
    "an import of a device": ["import", "/dev/zero", "y"],
    "an import of a directory of the system": ["import", "/proc/self/fd", "y"],
    "markup in a URL": ["ls", "[red]x[/red]"],
    "an escape sequence in a URL": ["ls", "s3://b/\x1b]0;x\x07"],
    "a report of nothing": ["report", "nothing-here", "-o", "r.html"],
    "a size of text": ["verify", "x", "--memory", "much"],
    "a size without end": ["verify", "x", "--memory", "9" * 400 + "GiB"],
    "a URL without end": ["ls", "s3://b/" + "a" * 10_000],
}
"""Arguments of the command; each ends with a status and one line, and nothing is made."""


# ---- a process for it


def caged(function: Callable[..., Any], *args: Any) -> Any:
    """Return what `function(*args)` returns in a process with little room, in a folder of its own."""
    process, pipe = fork(_work, function, *args)
    with pipe:
        try:
            is_done, value = pipe.recv()
        except EOFError:
            process.join()
            raise AssertionError(f"the process ended with {process.exitcode}") from None
    process.join()
    assert is_done, value
    return value


def _work(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    try:
        pipe.send((True, function(*args)))
    except BaseException as exc:  # noqa: BLE001 (told to whoever waits)
        pipe.send((False, f"{type(exc).__name__}: {exc}"))


def _with_little_room() -> None:
    with Path("/proc/self/statm").open() as file:
        now_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + ROOM_BYTES, now_bytes + ROOM_BYTES))


Found = tuple[Counter[str], list[str]]
"""What became of cases, and what speaks against some."""


def _judge(cases: Iterable[tuple[str, Callable[[], object]]], found: Found) -> None:
    """Run cases one by one."""
    became, wrong = found
    for name, run in cases:
        began_s = time.process_time()
        try:
            run()
            became["harmless"] += 1
        except CloudCkptError:
            became["refused"] += 1
        except MemoryError:
            wrong.append(f"{name}: it took more than {ROOM_BYTES // MIB} MiB")
        except BaseException as exc:  # noqa: BLE001 (that is the question)
            wrong.append(f"{name}: {type(exc).__module__}.{type(exc).__name__}: {exc}"[:300])
        if (took_s := time.process_time() - began_s) > CASE_S:
            wrong.append(f"{name}: it took {took_s:.1f} s of processor time")


def _no_code_has_run(found: Found) -> Found:
    if hasattr(errors, "woken") or Path("ran").exists():
        found[1].append("code has run")
    return found


# ---- doors


def opened(folder: str) -> Found:
    """Open every hostile URL, and every hostile set of options."""
    os.chdir(folder)
    open_store("s3://bucket/x").close()
    open_store("gs://bucket/x").close()
    _with_little_room()
    found: Found = (Counter(), [])
    _judge(((f"URL: {name}", lambda url=url: _refused(url, None)) for name, url in URLS.items()), found)
    _judge(((f"options: {name}", lambda pair=pair: _refused(*pair)) for name, pair in OPTIONS.items()), found)
    if list(Path().iterdir()):
        found[1].append(f"it has made {list(Path().iterdir())}")
    return _no_code_has_run(found)


def _refused(url: str, options: Any) -> None:
    store = None
    try:
        store = open_store(url, storage_options=options)
        store.head("k")
    except CloudCkptError as exc:
        if "CANARY" in str(exc) + repr(vars(exc)):
            raise AssertionError(f"the error repeats a secret: {exc}") from None
        raise
    finally:
        if store is not None:
            store.close()
    raise AssertionError("it was opened, and answered")


def told_by_cli(folder: str) -> Found:
    """Give the command every hostile set of arguments."""
    os.chdir(folder)
    runner = CliRunner()
    found: Found = (Counter(), [])
    _judge(((name, lambda each=each: _told(runner, each)) for name, each in ARGUMENTS.items()), found)
    if list(Path().iterdir()):
        found[1].append(f"it has made {list(Path().iterdir())}")
    return _no_code_has_run(found)


def _told(runner: CliRunner, arguments: list[str]) -> None:
    logging.root.handlers.clear()  # that of an invocation before, whose terminal is closed
    result = runner.invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if "CANARY" in result.output or "Traceback" in result.output or "\x1b" in result.output:
        raise AssertionError(f"it prints {result.output[:200]!r}")
    if result.exit_code:
        raise CloudCkptError(str(result.exit_code))


def cases_of_objects(folder: str, stride: int) -> Found:
    """Read every `stride`th of the objects that the tests of the format have made by hand."""
    os.chdir(folder)
    found: Found = (Counter(), [])
    made = [(f"{kind}: {name}", make(), KINDS[kind][2]) for kind, name, make in CASES[::stride]]
    _judge(((name, lambda data=data, read=read: read(data)) for name, data, read in made[:3]), found)
    _with_little_room()
    _judge(((name, lambda data=data, read=read: read(data)) for name, data, read in made[3:]), found)
    return _no_code_has_run(found)


# ---- chance


def _objects(chance: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    texts = {kind: json.dumps(record, indent=1).encode() for kind, (record, _, _) in KINDS.items()}
    while True:
        for kind, (_, write, read) in KINDS.items():
            data = write(_mutated(texts[kind], chance))
            yield f"{kind} {data!r}", lambda data=data, read=read: read(data)


def _raw_objects(chance: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """The bytes of an object changed as they lie there, frames and seals included."""
    whole = {kind: write(record) for kind, (record, write, _) in KINDS.items()}
    while True:
        for kind, (_, _, read) in KINDS.items():
            data = _mutated(whole[kind], chance)
            yield f"{kind}, raw {data!r}", lambda data=data, read=read: read(data)


def _pickles(chance: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    import pickle

    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 4]))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([3, 4]), [chunk])
    whole = pickle.dumps(Metadata({"w": tensor, "n": BytesStorageMetadata()}), protocol=2)
    while True:
        data = _mutated(whole, chance)
        yield f".metadata {data!r}", lambda data=data: decode_metadata(data)


def _names(chance: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    letters = string.ascii_letters + string.digits + "/.\\~%?#@:&=+ \0\n\t\x1b\x7f\u00e9\u202e\u2215\ud800*[]{}"
    schemes = ["", "s3://", "gs://", "file://", "file:///", "./", "az://b/", "memory://", "s3:", "http://", "a::"]
    while True:
        text = "".join(chance.choices(letters, k=chance.choice([0, 1, 3, 10, 40])))
        url = chance.choice(schemes) + text
        yield f"key {text!r}", lambda text=text: check_key(text)
        yield f"URL {url!r}", lambda url=url: open_store(url).close()


FUZZED: dict[str, Callable[[random.Random], Iterator[tuple[str, Callable[[], object]]]]] = {
    "manifests, indexes and claims, sealed anew": _objects,
    "manifests, indexes and claims, byte for byte": _raw_objects,
    "DCP's .metadata": _pickles,
    "keys and URLs": _names,
}


def fuzzed(folder: str, kind: str, count: int, seed: int) -> Found:
    """Hand `count` mutants of a kind to their reader."""
    os.chdir(folder)
    cases = FUZZED[kind](random.Random(seed))
    found: Found = (Counter(), [])
    _judge((next(cases) for _ in range(20)), found)  # what is imported late is no case's memory
    _with_little_room()
    _judge((next(cases) for _ in range(count)), found)
    return _no_code_has_run(found)
