"""`cloudckpt sweep`: remove what killed jobs and cut-off removals left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, Root, Yes, ensure
from cloudckpt.cli.printing import as_age, print_table
from cloudckpt.cli.removing import DryRun
from cloudckpt.cli.rules import seconds_of
from cloudckpt.report import as_bytes
from cloudckpt.root import Orphan, nothing_at
from cloudckpt.root import sweep as sweep_root

__all__ = ["sweep"]

_OlderThan = Annotated[str, typer.Option(metavar="TIME", help="Spare what was written since: 90min, 1h, 2d.")]


def sweep(
    url: Root,
    *,
    access: Access,
    older_than: _OlderThan = "1h",
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove attempts without a commit, and what pruned checkpoints left; a pinned one is put back, if it can be.

    Nothing of the newest job is touched, running or not. What is shown before is by the local clock, what goes by the
    store's.
    """
    older_than_s = seconds_of(older_than, "--older-than")
    with access.opened(url) as catalog:
        due = sweep_root(catalog, older_than_s=older_than_s, dry_run=True)
        if not due and not catalog.places():
            raise nothing_at(catalog)
        if not (as_json and (yes or dry_run)):
            _print(due, is_aside=as_json)
        if not dry_run:
            if due:
                size = as_bytes(sum(one.total_bytes for one in due))
                ensure(f"Remove what {len(due)} attempts have left, {size}?", is_yes=yes)
            # Also where none is due: what killed writers left on a disk is in no list, and pinned ones are put back.
            due = sweep_root(catalog, older_than_s=older_than_s, dry_run=False)
    if as_json:
        _print_json(due, is_removed=not dry_run)
    elif not dry_run:
        typer.echo(f"removed: {len(due)} attempts, {as_bytes(sum(one.total_bytes for one in due))}")


def _print(orphans: Sequence[Orphan], *, is_aside: bool) -> None:
    if not orphans:
        typer.echo("earlier jobs have left nothing that is old enough", err=is_aside)
        return
    rows = [(one.prefix, f"{one.object_count:,}", as_bytes(one.total_bytes), as_age(one.age_s)) for one in orphans]
    print_table(("prefix", "objects", "size", "age"), rows, numbers=("objects", "size", "age"), is_aside=is_aside)


def _print_json(orphans: Sequence[Orphan], *, is_removed: bool) -> None:
    for one in orphans:
        facts = {"prefix": one.prefix, "object_count": one.object_count, "total_bytes": one.total_bytes}
        typer.echo(json.dumps({**facts, "age_s": round(one.age_s, 3), "removed": is_removed}))
