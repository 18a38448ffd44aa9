"""`cloudckpt pin` and `unpin`: what stays whatever the rules say, and why."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, Root
from cloudckpt.report import plain
from cloudckpt.root import Pin, Roots, nothing_at, pins_of
from cloudckpt.root import pin as pin_step
from cloudckpt.root import unpin as unpin_step

__all__ = ["pin", "unpin"]

_Step = Annotated[int, typer.Argument(help="Of the checkpoint.")]


def pin(
    url: Root,
    step: Annotated[int | None, typer.Argument(help="Of the checkpoint; without it, what is pinned is listed.")] = None,
    *,
    access: Access,
    note: Annotated[str, typer.Option(help="Why, for those who come after you.")] = "",
    as_json: AsJson = False,
) -> None:
    """Keep a checkpoint, whatever rules and jobs do, until it is unpinned; one that is pinned keeps its note."""
    with access.opened(url) as catalog:
        roots = Roots([catalog])
        found = pins_of(roots) if step is None else [pin_step(roots, step, note)]
        if not (found or catalog.places()):
            raise nothing_at(catalog)
    for one in found:
        _print(one, "is pinned", as_json=as_json)
    if not found and not as_json:
        typer.echo("nothing is pinned")


def unpin(url: Root, step: _Step, *, access: Access, as_json: AsJson = False) -> None:
    """Take the pin of a checkpoint away: rules decide over it from then on, and nothing is removed now."""
    with access.opened(url) as catalog:
        taken = unpin_step(Roots([catalog]), step)
    _print(taken, "is not pinned any more", as_json=as_json)


def _print(pin: Pin, what: str, *, as_json: bool) -> None:
    if as_json:
        facts = {"step": pin.step, "epoch": pin.epoch, "url": pin.url, "note": pin.note}
        typer.echo(json.dumps({**facts, "created_at": pin.created_at.isoformat()}))
    else:
        typer.echo(plain(f"step {pin.step} of epoch {pin.epoch} {what}{f' ({pin.note})' if pin.note else ''}"))
