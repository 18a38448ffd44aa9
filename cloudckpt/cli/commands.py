"""Answer a person at a terminal: what is at a URL, and what is in one checkpoint.

Reads only. Tables for people by default, JSON lines for programs with `--json`; errors go to stderr, one line, with
the next action, and the exit status is 1 (2 where the command line itself is wrong).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError
from cloudckpt.format import Index
from cloudckpt.loading import read_index
from cloudckpt.root import Catalog, Checkpoint
from cloudckpt.store import open_store

__all__ = ["app"]

app = typer.Typer(help=__doc__.splitlines()[0] if __doc__ else None, no_args_is_help=True, add_completion=False)

Url = Annotated[str, typer.Argument(help="A root or a checkpoint: a directory, s3://…, gs://… or any fsspec URL.")]
StorageOptions = Annotated[
    str,
    typer.Option(
        "--storage-options", "-o", help="fsspec's options for the URL, as JSON.", envvar="CLOUDCKPT_STORAGE_OPTIONS"
    ),
]
Engine = Annotated[str, typer.Option(help="auto, local, obstore or fsspec.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]

_PIPE_WIDTH = 10_000


@app.callback()
def _main() -> None:
    """Look at checkpoints on local disk, S3, GCS or any fsspec URL."""


@app.command("ls")
def list_checkpoints(
    url: Url,
    *,
    storage_options: StorageOptions = "{}",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """List the committed checkpoints below a root, oldest first (or the one at the URL)."""
    with _catalog(url, storage_options, engine) as catalog:
        checkpoints = catalog.all() or _the_one_at(catalog)
        if not as_json:
            _print_checkpoints(checkpoints, catalog.store.url)
            return
        for checkpoint in checkpoints:
            typer.echo(json.dumps(_summary(checkpoint)))


@app.command()
def show(
    url: Url,
    *,
    storage_options: StorageOptions = "{}",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """Show one checkpoint: its manifest, tensors and values (of a root: the newest)."""
    with _catalog(url, storage_options, engine) as catalog:
        checkpoint = _open(catalog)
        index = read_index(catalog, checkpoint)
        if not as_json:
            _print_checkpoint(checkpoint, index)
            return
        found = {**_summary(checkpoint), **_contents(index), "environment": checkpoint.manifest.environment}
        typer.echo(json.dumps(found))


@contextmanager
def _catalog(url: str, storage_options: str, engine: str) -> Iterator[Catalog]:
    options = _parsed(storage_options)
    try:
        store = open_store(url, storage_options=options, engine=engine)
        try:
            yield Catalog(store)
        finally:
            store.close()
    except CloudCkptError as exc:
        typer.echo(f"cloudckpt: {exc}", err=True)
        raise typer.Exit(1) from exc


def _parsed(storage_options: str) -> dict[str, object]:
    try:
        options = json.loads(storage_options)
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    # The text is not repeated: it may hold a secret.
    typer.echo("cloudckpt: --storage-options is no JSON object; write for example '{\"anon\": true}'", err=True)
    raise typer.Exit(2)


def _the_one_at(catalog: Catalog) -> list[Checkpoint]:
    try:
        return [catalog.open()]
    except CheckpointNotFoundError:
        return []


def _open(catalog: Catalog) -> Checkpoint:
    """Return the checkpoint at the URL, or the newest below it."""
    try:
        return catalog.open()
    except CheckpointNotFoundError:
        newest = catalog.newest()
        if newest is None:
            raise
        return newest


def _summary(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "step": checkpoint.manifest.step,
        "epoch": checkpoint.epoch,
        "attempt": checkpoint.attempt,
        "url": checkpoint.url,
        "created_at": checkpoint.manifest.created_at,
        "total_bytes": checkpoint.total_bytes,
        "shard_count": checkpoint.manifest.shard_count,
        "world_size": checkpoint.world_size,
        # As the manifest has them: JSON has no numbers that are not finite.
        "metrics": checkpoint.manifest.metrics,
        "metadata": checkpoint.manifest.metadata,
        "digest": checkpoint.digest,
    }


def _contents(index: Index) -> dict[str, object]:
    counts = index.piece_counts()
    tensors = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "chunks": counts[name]}
        for name, tensor in index.tensors.items()
    }
    return {"tensors": tensors, "values": index.values}


def _print_checkpoints(checkpoints: list[Checkpoint], url: str) -> None:
    if not checkpoints:
        typer.echo(f"no committed checkpoint at {url}")
        return
    table = Table(title=url, title_justify="left")
    for column in ("step", "epoch", "created", "bytes", "shards", "ranks", "metrics"):
        is_number = column in ("step", "epoch", "bytes", "shards", "ranks")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=column != "metrics")
    for checkpoint in checkpoints:
        table.add_row(
            "-" if checkpoint.step < 0 else str(checkpoint.step),
            str(checkpoint.epoch or "-"),
            f"{checkpoint.created_at:%Y-%m-%d %H:%M:%S}",
            f"{checkpoint.total_bytes:,}",
            str(checkpoint.manifest.shard_count),
            str(checkpoint.world_size),
            "  ".join(f"{name} {value:.6g}" for name, value in checkpoint.metrics.items()),
        )
    _console().print(table)


def _print_checkpoint(checkpoint: Checkpoint, index: Index) -> None:
    facts = {name: str(value) for name, value in _summary(checkpoint).items()}
    counts = index.piece_counts()
    tensors = [
        (name, tensor.dtype, str(list(tensor.shape)), str(counts[name])) for name, tensor in index.tensors.items()
    ]
    values = [(name, _short(json.dumps(value))) for name, value in index.values.items()]
    rows = [*facts.items(), *checkpoint.manifest.environment.items()]
    _print_table(checkpoint.url, (), rows)
    _print_table("tensors", ("name", "dtype", "shape", "chunks"), tensors)
    _print_table("values", ("name", "value"), values)


def _print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _console() -> Console:
    """Return a console as wide as the terminal; what goes into a pipe is not cut to the width of one."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_PIPE_WIDTH)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
