"""How answers look: checkpoints as JSON objects, tables as wide as they are, sizes, ages and times for people.

What a store tells may be anybody's text: what would steer a terminal is shown as an escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import typer
from rich.cells import cell_len

from cloudckpt.report import plain
from cloudckpt.root import Checkpoint

__all__ = ["LINE_S", "as_age", "in_zone", "print_facts", "print_table", "short", "summary", "zone_name"]


LINE_S = 10.0
"""How often a command that no terminal shows says how far it is."""


def _shared(checkpoint: Checkpoint, own_bytes: int | None) -> dict[str, object]:
    """Say what of it was sent, how many bytes it holds itself, and which steps hold the rest."""
    manifest, size_bytes = checkpoint.manifest, checkpoint.total_bytes
    held = manifest.held_elsewhere
    facts: dict[str, object] = {}
    if own_bytes is not None:
        facts = {"own_bytes": own_bytes, "shared_bytes": size_bytes - own_bytes}
    if held:
        facts["sent_bytes"] = manifest.sent_bytes
    if held and own_bytes != size_bytes:
        facts["shares_with"] = [
            f"step {one.step} (epoch {one.epoch}): {one.shard_count} shards, {one.total_bytes} bytes" for one in held
        ]
    return facts


def summary(checkpoint: Checkpoint, own_bytes: int | None = None) -> dict[str, object]:
    """Return what `--json` says of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        own_bytes: of the shards that it holds itself; None where nobody has looked.
    """
    manifest = checkpoint.manifest
    return {
        "step": manifest.step,
        "epoch": checkpoint.epoch,
        "attempt": checkpoint.attempt,
        "url": checkpoint.url,
        "created_at": manifest.created_at,
        "total_bytes": checkpoint.total_bytes,
        **_shared(checkpoint, own_bytes),
        "shard_count": manifest.shard_count,
        "world_size": checkpoint.world_size,
        # As the manifest has them: JSON has no numbers that are not finite.
        "metrics": manifest.metrics,
        "metadata": manifest.metadata,
        "digest": checkpoint.digest,
    }


def in_zone(moment: datetime, *, is_utc: bool) -> str:
    """Return a time for people, local or in UTC, without the zone."""
    return f"{moment.astimezone(UTC if is_utc else None):%Y-%m-%d %H:%M:%S}"


def zone_name(*, is_utc: bool) -> str:
    """Return the zone of these times."""
    return "UTC" if is_utc else str(datetime.now().astimezone().tzname())


def as_age(seconds: float) -> str:
    """Return how long ago something was, in its two largest units."""
    left = int(max(0.0, seconds))
    parts: list[str] = []
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size_s)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = (), is_aside: bool = False
) -> None:
    """Print rows below each other; none is cut.

    Args:
        columns: their names; the last one is as wide as each row needs.
        rows: the cells, as they are to be read.
        numbers: columns that are set to the right.
        is_aside: it is not the answer, and goes to stderr.
    """
    lines = [tuple(columns), *(tuple(map(plain, row)) for row in rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    is_right = [name in numbers for name in columns]
    typer.echo("\n".join("  ".join(map(_padded, line, widths, is_right)).rstrip() for line in lines), err=is_aside)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and what is said of them."""
    lines = [(plain(name), plain(text)) for name, text in facts]
    width = max((cell_len(name) for name, _ in lines), default=0)
    typer.echo("\n".join(f"{_padded(name, width)}  {text}".rstrip() for name, text in lines))


def _padded(text: str, width: int, is_right: bool = False) -> str:  # noqa: FBT001, FBT002 (mapped over a row)
    blanks = " " * (width - cell_len(text))
    return blanks + text if is_right else text + blanks


def short(text: str, limit: int = 200) -> str:
    """Return a text, or its beginning and its length."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
