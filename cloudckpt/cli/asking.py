"""What all commands ask for, and how each opens it: a URL and its options in, a catalog out, one line if that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError
from cloudckpt.root import Catalog, Checkpoint
from cloudckpt.store import open_store

__all__ = [
    "AsJson",
    "Engine",
    "StorageOptions",
    "TargetStorageOptions",
    "Url",
    "ending",
    "nothing_at",
    "opened",
    "parsed",
    "the_one_at",
]

Url = Annotated[str, typer.Argument(help="A root or a checkpoint: a directory, s3://…, gs://… or any fsspec URL.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        "--storage-options",
        "-o",
        help="fsspec's options for the URL, as JSON; else those of CLOUDCKPT_STORAGE_OPTIONS.",
    ),
]
TargetStorageOptions = Annotated[
    str | None, typer.Option("--target-storage-options", help="fsspec's options for the target, as JSON.")
]
Engine = Annotated[str, typer.Option(help="auto, local, obstore or fsspec.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@contextmanager
def opened(url: str, storage_options: str | None, engine: str) -> Iterator[Catalog]:
    """Open what a command was given; an error of ours inside of the block ends the command with 1."""
    options = parsed(storage_options, "--storage-options")
    with ending(), open_store(url, storage_options=options, engine=engine) as store:
        yield Catalog(store)


@contextmanager
def ending() -> Iterator[None]:
    """Have an error of ours inside of the block end the command with 1."""
    try:
        yield
    except CloudCkptError as exc:
        raise _ended(" ".join(str(exc).split()), status=1) from exc


def parsed(storage_options: str | None, name: str) -> dict[str, object] | None:
    """Return the options that a command got as JSON; another text ends it with 2."""
    if storage_options is None:
        return None
    try:
        options = json.loads(storage_options)
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    # The text is not repeated: it may hold a secret.
    raise _ended(f"{name} is no JSON object; write for example '{{\"anon\": true}}'", status=2)


def _ended(line: str, *, status: int) -> typer.Exit:
    typer.echo(f"cloudckpt: {line}", err=True)
    return typer.Exit(status)


def the_one_at(catalog: Catalog) -> Checkpoint | None:
    """Return the checkpoint that the URL itself is, if it is one."""
    try:
        return catalog.open()
    except CheckpointNotFoundError:
        return None


def nothing_at(catalog: Catalog) -> CheckpointNotFoundError:
    """Say that nothing is committed. A bucket cannot tell an empty root from a missing one, so nothing here does."""
    undecided = len(catalog.places())
    why = f"attempts without a commit: {undecided}; ask again when a save has ended" if undecided else "check the URL"
    return CheckpointNotFoundError(f"no committed checkpoint at {catalog.store.url}; {why}")
