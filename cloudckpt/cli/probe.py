"""`cloudckpt probe`: whether a store can hold a root."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson
from cloudckpt.cli.command import FOUND
from cloudckpt.cli.printing import print_table
from cloudckpt.qualifying import Probe
from cloudckpt.qualifying import probe as ask
from cloudckpt.report import as_bytes, plain

__all__ = ["probe"]


def probe(
    url: Annotated[str, typer.Argument(help="Where a root is to be, or is: nothing of it is touched.")],
    *,
    access: Access,
    size: Annotated[int, typer.Option(min=8, metavar="MIB", help="Of the large object.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Races of 8 creators each.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Qualify a store: write, list, read, race and delete below a prefix of its own, and say what it is good for.

    Ends with 3 if it cannot hold a root.
    """
    found = ask(
        url,
        storage_options=access.options_for(url),
        engine=access.engine,
        large_bytes=size << 20,
        rounds=rounds,
        progress=_say if sys.stderr.isatty() else lambda _: None,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        _print(found)
    if not found.can_hold_root:
        raise typer.Exit(FOUND)


def _say(what: str) -> None:
    typer.echo(f"cloudckpt: looking at: {what}", err=True)


def _print(found: Probe) -> None:
    rows = [("ok" if one.is_good else "NO" if one.is_needed else "-", one.name, one.words) for one in found.findings]
    if found.put_bytes_s and found.get_bytes_s:
        speed = f"put {as_bytes(found.put_bytes_s)}/s in one request, get {as_bytes(found.get_bytes_s)}/s in eight"
        rows.append(("", "throughput", speed))
    print_table(("", "look", "found"), rows)
    if found.left:
        typer.echo(plain(f"left there: {', '.join(found.left)}"))
    typer.echo(f"\n{found.verdict}")
