"""What commands ask for, and how each opens it: a URL and its options in, a catalog out; and what they ask a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from cloudckpt.report import plain
from cloudckpt.root import Catalog, ManifestCache
from cloudckpt.store import TEXT_OPTIONS, environment_options, hide, open_store

__all__ = [
    "Access",
    "AsJson",
    "Engine",
    "NoCache",
    "Root",
    "StorageOptions",
    "TargetStorageOptions",
    "Url",
    "Yes",
    "cache_of",
    "ended",
    "ensure",
    "parsed",
]

Url = Annotated[str, typer.Argument(help="A root or a checkpoint: a directory, s3://…, gs://… or any fsspec URL.")]
Root = Annotated[str, typer.Argument(help="A root: a directory, s3://…, gs://… or any fsspec URL.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        "--storage-options",
        "-o",
        help="fsspec's options for the URL, as JSON; else those of CLOUDCKPT_STORAGE_OPTIONS.",
        rich_help_panel="Shared",
    ),
]
TargetStorageOptions = Annotated[
    str | None, typer.Option("--target-storage-options", help="fsspec's options for the target, as JSON.")
]
Engine = Annotated[str, typer.Option(help="auto, local, obstore or fsspec.", rich_help_panel="Shared")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Read all manifests, and keep none on this machine.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


Side = tuple[dict[str, object] | None, str]
"""How one of two URLs is reached: fsspec's options (None: those of the environment), and the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a command reaches what a URL names, as the command line says it.

    Attributes:
        storage_options: JSON, or None.
        storage_option: texts of the form `key=value`.
        endpoint_url: the server, or None.
        profile: of AWS's configuration files, or None.
        engine: what moves the bytes.
    """

    storage_options: str | None = None
    storage_option: Sequence[str] = ()
    endpoint_url: str | None = None
    profile: str | None = None
    engine: str = "auto"

    def options_for(self, url: str) -> dict[str, object] | None:
        """Return fsspec's options for a URL; None where nothing is said, so that the environment's count.

        Single ones are added to the JSON, and where there is none, to the environment's.
        """
        options = parsed(self.storage_options, "--storage-options")
        added = _added(self.storage_option)
        if self.endpoint_url is not None:
            _set(added, ["endpoint_url"], self.endpoint_url, "--endpoint-url")
        if self.profile is not None:
            if not url.lower().startswith(("s3:", "s3a:")):
                raise ended("--profile is for s3:// alone; other stores have no profiles", status=2)
            _set(added, ["profile"], self.profile, "--profile")
        if not added:
            return options
        return _joined(environment_options() if options is None else options, added)

    def beside(self, source: str, target: str, target_options: str | None) -> tuple[Side, Side]:
        """Return how each of two URLs is reached.

        What the options say is for the source, unless that is a disk, and for the target, if it is of the same kind of
        store or the source is a disk. Options of the target's own count alone.
        """
        kinds = [url.partition("://")[0].lower() if "://" in url else "file" for url in (source, target)]
        nothing: Side = (None, "auto")
        is_for_both = kinds[0] in ("file", kinds[1])
        own = parsed(target_options, "--target-storage-options")
        first = nothing if kinds[0] == "file" else (self.options_for(source), self.engine)
        second = nothing if kinds[1] == "file" or not is_for_both else (self.options_for(target), self.engine)
        if kinds == ["file", "file"]:
            first = (self.options_for(source), self.engine)  # a disk has none, and says so
        return first, second if own is None else (own, second[1])

    @contextmanager
    def opened(self, url: str) -> Iterator[Catalog]:
        """Open what a URL names."""
        with open_store(url, storage_options=self.options_for(url), engine=self.engine) as store:
            yield Catalog(store)


def parsed(storage_options: str | None, name: str) -> dict[str, object] | None:
    """Return options that a command got as JSON; another text ends it with 2."""
    if storage_options is None:
        return None
    try:
        options = json.loads(storage_options)
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    # The text is not repeated: it may hold a secret.
    raise ended(f"{name} is no JSON object; write for example '{{\"anon\": true}}'", status=2)


def _added(texts: Sequence[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for text in texts:
        key, is_there, value = text.partition("=")
        path = key.split(".")
        if not is_there or not all(path):
            raise ended(
                "--storage-option is not of the form key=value (it is not repeated here, since it may hold a secret); "
                "write for example anon=true or client_kwargs.region_name=eu-west-1",
                status=2,
            )
        _set(options, path, _typed(value, path[-1]), f"--storage-option {key}")
    return options


def _typed(text: str, name: str) -> object:
    """Return what a text says as JSON, else the text; digits stay text where the option is known to be one."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return text if name in TEXT_OPTIONS and isinstance(value, int | float) else value


def _set(options: dict[str, object], path: Sequence[str], value: object, name: str) -> None:
    *parents, last = path
    for parent in parents:
        inner = options.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ended(f"{name} goes below what another option has given a value", status=2)
        options = inner
    if last in options:
        raise ended(f"{name} is given twice", status=2)
    options[last] = value


def _joined(options: Mapping[str, object], added: Mapping[str, object]) -> dict[str, object]:
    result = dict(options)
    for key, value in added.items():
        old = result.get(key)
        result[key] = _joined(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def ended(line: str, *, status: int) -> typer.Exit:
    """Write one line to stderr, without secrets and whatever it was made of; return what ends the command."""
    typer.echo(f"cloudckpt: {hide(plain(' '.join(line.split())))}", err=True)
    return typer.Exit(status)


def ensure(question: str, *, is_yes: bool) -> None:
    """Ask a person for leave to go on; "no" ends the command with 1, and nobody who could be asked with 2."""
    if is_yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ended(f"{question} Nobody can be asked here, and nothing was changed: pass --yes", status=2)
    try:
        is_yes = typer.confirm(question, err=True)
    except typer.Abort as exc:  # Ctrl-C, or the end of the input
        if isinstance(exc.__context__, KeyboardInterrupt):
            interrupt = KeyboardInterrupt()
            interrupt.add_note("nothing was changed")
            raise interrupt from None
        is_yes = False
    if not is_yes:
        raise ended("nothing was changed", status=1)


def cache_of(*, no_cache: bool) -> ManifestCache | None:
    """Return where manifests are kept on this machine, if anywhere."""
    return None if no_cache else ManifestCache.of_environment()
