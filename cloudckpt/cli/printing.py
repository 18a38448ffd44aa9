"""How answers look: checkpoints as JSON objects, tables as wide as the terminal, times in UTC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from cloudckpt.root import Checkpoint

__all__ = ["in_utc", "print_table", "short", "summary"]

_PIPE_WIDTH = 10_000


def summary(checkpoint: Checkpoint) -> dict[str, object]:
    """Return what `--json` says of a checkpoint."""
    manifest = checkpoint.manifest
    return {
        "step": manifest.step,
        "epoch": checkpoint.epoch,
        "attempt": checkpoint.attempt,
        "url": checkpoint.url,
        "created_at": manifest.created_at,
        "total_bytes": checkpoint.total_bytes,
        "shard_count": manifest.shard_count,
        "world_size": checkpoint.world_size,
        # As the manifest has them: JSON has no numbers that are not finite.
        "metrics": manifest.metrics,
        "metadata": manifest.metadata,
        "digest": checkpoint.digest,
    }


def in_utc(moment: datetime) -> str:
    """Return a time for people, without the zone."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    folded: str | None = None,
) -> None:
    """Print rows; what goes into a pipe is not cut to the width of a terminal.

    Args:
        title: what stands above.
        columns: their names; none for two without names.
        rows: the cells, as they are to be read.
        numbers: columns that are set to the right.
        folded: the only column that may take several lines; None for all of them.
    """
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        is_whole = folded is not None and column != folded
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold", no_wrap=is_whole)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    (console if console.is_terminal else Console(markup=False, highlight=False, width=_PIPE_WIDTH)).print(table)


def short(text: str, limit: int = 200) -> str:
    """Return a text, or its beginning and its length."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
