"""`cloudckpt import`: files that another program wrote as a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, parsed
from cloudckpt.cli.printing import summary
from cloudckpt.convert import Source
from cloudckpt.convert import import_ as import_from
from cloudckpt.report import as_bytes, plain

__all__ = ["import_"]


def import_(  # noqa: PLR0913 (each option of the command)
    source: Annotated[
        str,
        typer.Argument(
            help="A file of torch.save, a .ckpt, a safetensors file or index, a folder of Hugging Face or DCP."
        ),
    ],
    url: Annotated[str, typer.Argument(help="What becomes the checkpoint; with --step the root that gets it.")],
    *,
    access: Access,
    kind: Annotated[Source, typer.Option("--from", help="What the source is; auto looks.")] = "auto",
    step: Annotated[int | None, typer.Option(help="The step in a root; a job that is at work there is fenced.")] = None,
    under: Annotated[str, typer.Option(help="The key of the state below which all stands: model.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at a URL of its own.")] = False,
    source_storage_options: Annotated[
        str | None, typer.Option(help="fsspec's options for the source, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of files of torch.save, Lightning, safetensors, Hugging Face or torch.distributed.checkpoint.

    Nothing in them is run. What is damaged or more than tensors and plain values is refused by name, and then nothing
    is committed.
    """
    checkpoint = import_from(
        source,
        url,
        kind=kind,
        step=step,
        under=under,
        exists="replace" if force else "raise",
        source_storage_options=parsed(source_storage_options, "--source-storage-options"),
        storage_options=access.options_for(url),
        engine=access.engine,
    )
    if as_json:
        typer.echo(json.dumps(summary(checkpoint)))
    else:
        count = checkpoint.manifest.tensor_count
        typer.echo(plain(f"{checkpoint.url}: {count} tensors, {as_bytes(checkpoint.total_bytes)}, from {source}"))
