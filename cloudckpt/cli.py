"""Answer a person at a terminal: what is at a URL, and what is in one checkpoint.

Reads only. Tables for people by default, JSON lines for programs with `--json`; errors go to stderr, one line, with
the next action, and the exit status is 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cloudckpt.catalog import Catalog, Checkpoint
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError
from cloudckpt.index import Index
from cloudckpt.reader import read_index
from cloudckpt.store import open_store

__all__ = ["app"]

app = typer.Typer(help=__doc__.splitlines()[0] if __doc__ else None, no_args_is_help=True, add_completion=False)

Url = Annotated[str, typer.Argument(help="A root or a checkpoint: a directory, s3://…, gs://… or any fsspec URL.")]
StorageOptions = Annotated[
    str, typer.Option("--storage-options", "-o", help="fsspec's options for the URL, as JSON.", envvar="CLOUDCKPT_STORAGE_OPTIONS")
]
Engine = Annotated[str, typer.Option(help="auto, obstore or fsspec.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.callback()
def _main() -> None:
    """Look at checkpoints on local disk, S3, GCS or any fsspec URL."""


@app.command("ls")
def list_checkpoints(url: Url, storage_options: StorageOptions = "{}", engine: Engine = "auto", as_json: AsJson = False) -> None:
    """List the committed checkpoints below a root, oldest first."""
    with _catalog(url, storage_options, engine) as catalog:
        checkpoints = catalog.all()
        if as_json:
            for checkpoint in checkpoints:
                typer.echo(json.dumps(_summary(checkpoint)))
            return
        _print_checkpoints(checkpoints, catalog.store.url)


@app.command()
def show(url: Url, storage_options: StorageOptions = "{}", engine: Engine = "auto", as_json: AsJson = False) -> None:
    """Show one checkpoint: its manifest, tensors and values (of a root: the newest)."""
    with _catalog(url, storage_options, engine) as catalog:
        checkpoint = _open(catalog)
        index = read_index(catalog, checkpoint)
        if as_json:
            typer.echo(json.dumps({**_summary(checkpoint), **_contents(index), "environment": checkpoint.manifest.environment}))
            return
        _print_checkpoint(checkpoint, index)


@contextmanager
def _catalog(url: str, storage_options: str, engine: str) -> Iterator[Catalog]:
    try:
        options = json.loads(storage_options)
        if not isinstance(options, dict):
            raise ValueError("not an object")
    except ValueError as exc:
        typer.echo(f"cloudckpt: --storage-options is no JSON object ({exc}); write e.g. '{{\"anon\": true}}'", err=True)
        raise typer.Exit(2) from exc
    try:
        store = open_store(url, storage_options=options, engine=engine)
        try:
            yield Catalog(store)
        finally:
            store.close()
    except CloudCkptError as exc:
        typer.echo(f"cloudckpt: {exc}", err=True)
        raise typer.Exit(1) from exc


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
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "attempt": checkpoint.attempt,
        "url": checkpoint.url,
        "created_at": checkpoint.manifest.created_at,
        "total_bytes": checkpoint.total_bytes,
        "shard_count": checkpoint.manifest.shard_count,
        "world_size": checkpoint.world_size,
        "metrics": {name: str(value) if value != value else value for name, value in checkpoint.metrics.items()},
        "metadata": msgspec.to_builtins(checkpoint.manifest.metadata),
        "digest": checkpoint.digest,
    }


def _contents(index: Index) -> dict[str, object]:
    tensors = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "chunks": len(tensor.chunks)}
        for name, tensor in index.tensors.items()
    }
    return {"tensors": tensors, "values": index.values}


def _print_checkpoints(checkpoints: list[Checkpoint], url: str) -> None:
    if not checkpoints:
        typer.echo(f"no committed checkpoint at {url}")
        return
    table = Table(title=url, title_justify="left")
    for column in ("step", "epoch", "created", "bytes", "shards", "ranks", "metrics"):
        table.add_column(column, justify="right" if column in ("step", "epoch", "bytes", "shards", "ranks") else "left")
    for checkpoint in checkpoints:
        table.add_row(
            str(checkpoint.step),
            str(checkpoint.epoch),
            f"{checkpoint.created_at:%Y-%m-%d %H:%M:%S}",
            f"{checkpoint.total_bytes:,}",
            str(checkpoint.manifest.shard_count),
            str(checkpoint.world_size),
            _metrics(checkpoint),
        )
    Console().print(table)


def _metrics(checkpoint: Checkpoint) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in checkpoint.metrics.items())


def _print_checkpoint(checkpoint: Checkpoint, index: Index) -> None:
    console = Console()
    facts = Table(show_header=False, title=checkpoint.url, title_justify="left")
    for name, value in _summary(checkpoint).items():
        facts.add_row(name, str(value))
    for name, value in checkpoint.manifest.environment.items():
        facts.add_row(name, value)
    console.print(facts)
    tensors = Table(title="tensors", title_justify="left")
    for column in ("name", "dtype", "shape", "chunks"):
        tensors.add_column(column)
    for name, tensor in index.tensors.items():
        tensors.add_row(name, tensor.dtype, str(list(tensor.shape)), str(len(tensor.chunks)))
    console.print(tensors)
    values = Table(title="values", title_justify="left")
    values.add_column("name")
    values.add_column("value", overflow="fold")
    for name, value in index.values.items():
        values.add_row(name, _short(json.dumps(value)))
    console.print(values)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
