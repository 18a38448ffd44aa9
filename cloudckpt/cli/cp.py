"""`cloudckpt cp`: copies of checkpoints, between any two stores."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, TargetStorageOptions, ended
from cloudckpt.cli.printing import LINE_S
from cloudckpt.cli.sizes import Memory, options_within
from cloudckpt.copying import Copied, copy
from cloudckpt.report import as_bytes, plain

__all__ = ["cp"]


def cp(  # noqa: PLR0913 (each option of the command)
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Checkpoints, or roots: of each its newest one.")
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A root, in which each keeps its place.")],
    *,
    access: Access,
    step: Annotated[
        list[int] | None, typer.Option("--step", metavar="N", help="This step of the source; as often as needed.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All checkpoints of the source, its pins and claims: the whole root.")
    ] = False,
    pins: Annotated[
        bool | None,
        typer.Option(
            "--pins/--no-pins",
            help="Pin in the target what is pinned in the source, with its note. Without either: with --all.",
            show_default=False,
        ),
    ] = None,
    own_url: Annotated[
        bool, typer.Option("--own-url", help="Make TARGET the checkpoint itself, in place of a root.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read back what stands in the target, and send what differs.")
    ] = False,
    memory: Memory = None,
    target_storage_options: TargetStorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Copy checkpoints: the same bytes, verified on the way, the manifest last.

    Repeated after a kill it sends what is missing; repeated with --all, what is new. Without --all the claims of the
    source stay behind, so that the rules of jobs in the target remove nothing of what was copied; and its pins, unless
    --pins brings them. A pin that is in the target stays as it is, and none is taken away there.
    Options for the store are for both sides where these are stores of one kind.
    """
    if len({url.partition("://")[0] if "://" in url else "" for url in sources}) > 1:
        raise ended("the sources are on stores of several kinds; copy from one after the other", status=2)
    if step and every:
        raise ended("--step and --all are both given; give one of them", status=2)
    if pins and own_url:
        raise ended("--pins and --own-url are both given, and a checkpoint at a URL of its own has no pin", status=2)

    def tell(copied: Copied) -> None:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(copied)))
        else:
            _print(copied)

    (storage_options, engine), (target_options, target_engine) = access.beside(
        sources[0], target, target_storage_options
    )
    copy(
        sources,
        target,
        steps=step or (),
        every=every,
        pins=pins,
        own_url=own_url,
        check=check,
        storage_options=storage_options,
        target_storage_options=target_options,
        engine=engine,
        target_engine=target_engine,
        options=options_within(memory),
        every_s=LINE_S,
        on_copied=tell,
    )


def _print(copied: Copied) -> None:
    if copied.is_new:
        kept = f"; {copied.kept_count} stood there" if copied.kept_count else ""
        what = f"copied: {copied.sent_count} objects, {as_bytes(copied.sent_bytes)}{kept}"
    elif copied.sent_count:
        what = f"mended: {copied.sent_count} objects, {as_bytes(copied.sent_bytes)}"
    else:
        what = "there already"
    typer.echo(plain(f"{copied.url}: {what}{'; pinned' if copied.is_pinned else ''}"))
