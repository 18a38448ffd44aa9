"""`cloudckpt verify`: whether checkpoints are whole."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, ended
from cloudckpt.cli.command import FOUND
from cloudckpt.cli.printing import LINE_S
from cloudckpt.cli.sizes import Memory, options_within
from cloudckpt.copying import Verified, verify_all
from cloudckpt.copying import verify as look
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.report import as_bytes, plain

__all__ = ["verify"]

_SHOWN = 4


def verify(
    urls: Annotated[list[str], typer.Argument(metavar="URL", help="Checkpoints, or roots: of each its newest one.")],
    *,
    access: Access,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte; else manifest, index, and a listing of the shards.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the roots, oldest first.")] = False,
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Say whether checkpoints are whole, and of one that is not, what is wrong and which older one is.

    Ends with 3 if one is not, and else with 1 if there is none at one of the URLs.
    """
    states: set[str] = set()

    def tell(found: Verified) -> None:
        states.add(found.state)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found)))
        else:
            _print(found)

    is_missing = False
    options = options_within(memory)
    for url in urls:
        reached = {"storage_options": access.options_for(url), "engine": access.engine}
        try:
            if every:
                verify_all(url, deep=deep, **reached, options=options, every_s=LINE_S, on_verified=tell)  # type: ignore[arg-type]
            else:
                tell(look(url, deep=deep, **reached, options=options, every_s=LINE_S))  # type: ignore[arg-type]
        except CheckpointNotFoundError as exc:
            if len(urls) == 1:
                raise
            ended(str(exc), status=1)  # the others are looked at all the same
            is_missing = True
    if states - {"whole"}:
        raise typer.Exit(FOUND)
    if is_missing:
        raise typer.Exit(1)


def _print(found: Verified) -> None:
    step = "" if found.step < 0 else f" (step {found.step}, epoch {found.epoch})"
    size = f"{found.object_count:,} objects, {as_bytes(found.total_bytes)}"
    how = "every byte read" if found.is_deep else "manifest, index, and a listing"
    told = f": {size}; {how}" if found.is_whole else f": {found.reason}" if found.reason else ""
    typer.echo(plain(f"{found.state:10} {found.url}{step}{told}"))
    for damage in found.damages:
        names = ", ".join(damage.tensors[:_SHOWN])
        more = f" and {len(damage.tensors) - _SHOWN} more" if len(damage.tensors) > _SHOWN else ""
        typer.echo(plain(f"           {damage.key}: {damage.problem}{f'; there lie: {names}{more}' if names else ''}"))
    if not found.is_whole:
        instead = found.whole_instead
        typer.echo(plain(f"           whole is: {instead}" if instead else "           no older step that is whole"))
