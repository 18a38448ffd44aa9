"""`cloudckpt export`: a checkpoint as files that other programs read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, TargetStorageOptions, Url, parsed
from cloudckpt.convert import Exported, Kind
from cloudckpt.convert import export as export_to
from cloudckpt.report import as_bytes, plain

__all__ = ["export"]

_SHOWN = 4


def export(  # noqa: PLR0913 (each option of the command)
    url: Url,
    target: Annotated[
        str, typer.Argument(help="A file (safetensors, torch) or a folder (huggingface, dcp), anywhere.")
    ],
    *,
    access: Access,
    to: Annotated[Kind, typer.Option(help="What to write.")],
    prefix: Annotated[str, typer.Option(help="Take the tensors whose names begin so, without it: model.")] = "",
    max_shard_size: Annotated[
        str | None, typer.Option(help="What one safetensors file may hold: 5GB, 512MiB, a number of bytes.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A folder whose config.json, tokenizer and so on go beside the weights.")
    ] = None,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Leave out what the target cannot hold.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    target_storage_options: TargetStorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Write one checkpoint as safetensors, for Hugging Face, torch.load or torch.distributed.checkpoint.

    Of a root the newest. What is left out is listed; what a target cannot hold is refused, unless it may be left out.
    """
    done = export_to(
        url,
        target,
        to=to,
        prefix=prefix,
        max_shard_bytes=None if max_shard_size is None else _bytes_of(max_shard_size),
        config=config,
        leave_out=leave_out,
        overwrite=force,
        storage_options=access.options_for(url),
        target_storage_options=parsed(target_storage_options, "--target-storage-options"),
        engine=access.engine,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
    else:
        _print(done)


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for end, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


_NUMBER = re.compile(r"\A(?:[0-9]{1,19}(?:\.[0-9]{0,19})?|\.[0-9]{1,19})\Z")


def _bytes_of(text: str) -> int:
    number = text.strip().rstrip("BbKkMmGgTtIi").strip()
    unit = text.strip()[len(number) :].strip().lower()
    if not _NUMBER.match(number) or unit not in _UNITS:
        raise typer.BadParameter(
            f"{text!r} is no size; write 5GB, 512MiB or a number of bytes", param_hint="--max-shard-size"
        )
    return int(float(number) * _UNITS[unit])


def _print(done: Exported) -> None:
    files = f"{len(done.files)} file{'s' * (len(done.files) > 1)}"
    size = as_bytes(done.total_bytes)
    typer.echo(plain(f"{done.url}: {done.tensor_count} tensors, {size} in {files}, from {done.source}"))
    for why, names in _by_reason(done.left_out).items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        typer.echo(plain(f"left out: {', '.join(names[:_SHOWN])}{more}: {why}"))


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, why in left_out.items():
        found[why].append(name)
    return found
