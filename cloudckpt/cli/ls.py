"""`cloudckpt ls`: which checkpoints are committed at a URL."""

from __future__ import annotations

import json

import typer

from cloudckpt.cli.asking import AsJson, Engine, StorageOptions, Url, nothing_at, opened, the_one_at
from cloudckpt.cli.printing import in_utc, print_table, summary
from cloudckpt.root import Checkpoint, Roots, Unreadable

__all__ = ["ls"]


def ls(url: Url, *, storage_options: StorageOptions = None, engine: Engine = "auto", as_json: AsJson = False) -> None:
    """List the committed checkpoints below a root, oldest first, or the one at the URL; then those that are unreadable.

    Ends with 1 if there is none to be read. An empty directory counts as a missing one, because in a bucket they are
    the same.
    """
    with opened(url, storage_options, engine) as catalog:
        survey = catalog.survey()
        checkpoints = Roots([catalog]).readable(survey) or [one for one in [the_one_at(catalog)] if one]
        if not checkpoints:
            raise nothing_at(catalog)
        if as_json:
            for checkpoint in checkpoints:
                typer.echo(json.dumps(summary(checkpoint)))
            for other in survey.unreadable:
                facts = {"step": other.step, "epoch": other.epoch, "url": other.url, "error": str(other.error)}
                typer.echo(json.dumps(facts))
            return
        columns = ("step", "epoch", "created (UTC)", "bytes", "shards", "ranks", "metrics")
        numbers = ("step", "epoch", "bytes", "shards", "ranks")
        rows = [*map(_row, checkpoints), *map(_unreadable_row, survey.unreadable)]
        print_table(catalog.store.url, columns, rows, numbers=numbers, folded="metrics")


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    return (
        "-" if checkpoint.step < 0 else str(checkpoint.step),
        str(checkpoint.epoch or "-"),
        in_utc(checkpoint.created_at),
        f"{checkpoint.total_bytes:,}",
        str(checkpoint.manifest.shard_count),
        str(checkpoint.world_size),
        "  ".join(f"{name} {value:.6g}" for name, value in checkpoint.metrics.items()),
    )


def _unreadable_row(other: Unreadable) -> tuple[str, ...]:
    return (
        str(other.step),
        str(other.epoch),
        "unreadable",
        "-",
        "-",
        "-",
        f"{type(other.error).__name__}: {other.error}",
    )
