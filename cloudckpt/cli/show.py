"""`cloudckpt show`: what is in one checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, Url
from cloudckpt.cli.printing import LINE_S, in_zone, print_facts, print_table, short, summary, zone_name
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.format import Index, told_near
from cloudckpt.loading import Group, groups_of, read_index, tensor_numbers
from cloudckpt.report import Progress, as_bytes
from cloudckpt.root import Checkpoint, newest_or_the_one, own_bytes
from cloudckpt.state import OURS

__all__ = ["show"]


def show(  # noqa: PLR0913 (each option of the command)
    url: Url,
    *,
    access: Access,
    depth: Annotated[int, typer.Option(min=1, help="Group tensors by so many parts of their names.")] = 2,
    tensors: Annotated[bool, typer.Option("--tensors", help="List all tensors.")] = False,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="One tensor: reads it, for its smallest, largest, mean, NaNs.")
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="List all values, whole.")] = False,
    value: Annotated[str | None, typer.Option(metavar="NAME", help="One value, whole.")] = None,
    utc: Annotated[bool, typer.Option("--utc", help="Times in UTC.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one checkpoint: its manifest, environment, tensors and values; of a root, the newest."""
    with access.opened(url) as catalog:
        checkpoint = newest_or_the_one(catalog)
        index = read_index(catalog, checkpoint)
        if tensor is not None:
            with Progress().bar("reading", rank=0, every_s=LINE_S) as bar:
                numbers = tensor_numbers(catalog.store, checkpoint, index, tensor, gauge=bar)
            facts = dataclasses.asdict(numbers)
            if as_json:
                typer.echo(json.dumps({name: _json_number(fact) for name, fact in facts.items()}))
            else:
                print_facts((name, _shown(fact)) for name, fact in facts.items())
        elif value is not None:
            names = [name for name in index.values if not name.startswith(OURS)]
            if value not in index.values:
                raise CheckpointNotFoundError(f"{checkpoint.url} has no value {value!r}{told_near(value, names)}")
            typer.echo(json.dumps(index.values[value], ensure_ascii=True))
        elif as_json:
            found = {
                **summary(checkpoint, own_bytes(catalog.store, checkpoint)),
                "tensors": _tensors(index),
                "values": index.values,
            }
            groups = [dataclasses.asdict(group) for group in groups_of(index, depth)]
            typer.echo(json.dumps({**found, "groups": groups, "environment": checkpoint.manifest.environment}))
        else:
            own = own_bytes(catalog.store, checkpoint)
            _print(checkpoint, own, index, groups_of(index, depth), is_utc=utc)
            if tensors:
                rows = [(name, *map(str, facts.values())) for name, facts in _tensors(index).items()]
                _print_titled("tensors", ("name", "dtype", "shape", "chunks"), rows)
            if values or 0 < len(index.values) <= _FEW:
                _print_values(index, is_whole=values)


_FEW = 20


def _json_number(fact: object) -> object:
    # JSON has no numbers that are not finite.
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact


def _shown(fact: object) -> str:
    return f"{fact:.9g}" if isinstance(fact, float) else str(fact)


def _tensors(index: Index) -> dict[str, dict[str, object]]:
    counts = index.piece_counts()
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "chunks": counts[name]}
        for name, tensor in index.tensors.items()
    }


def _print(checkpoint: Checkpoint, own: int, index: Index, groups: list[Group], *, is_utc: bool) -> None:
    created = f"{in_zone(checkpoint.created_at, is_utc=is_utc)} {zone_name(is_utc=is_utc)}"
    facts: Mapping[str, object] = {
        **summary(checkpoint, own),
        "created_at": created,
        "total_bytes": _sized(checkpoint.total_bytes),
        "own_bytes": _sized(own),
        "shared_bytes": _sized(checkpoint.total_bytes - own),
    }
    print_facts((name, str(fact)) for name, fact in {**facts, **checkpoint.manifest.environment}.items())
    rows = [
        (group.prefix, f"{group.tensor_count:,}", as_bytes(group.total_bytes), f"{group.share:.1%}") for group in groups
    ]
    title = f"tensors: {len(index.tensors):,}, values: {len(index.values):,}; by prefix"
    _print_titled(title, ("prefix", "tensors", "size", "share"), rows, numbers=("tensors", "size", "share"))


def _sized(size_bytes: int) -> str:
    return f"{as_bytes(size_bytes)} ({size_bytes:,} bytes)"


def _print_titled(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: tuple[str, ...] = ()
) -> None:
    typer.echo(f"\n{title}")
    print_table(columns, rows, numbers=numbers)


def _print_values(index: Index, *, is_whole: bool) -> None:
    texts = [(name, json.dumps(value)) for name, value in index.values.items()]
    typer.echo("\nvalues")
    print_facts((name, text if is_whole else short(text)) for name, text in texts)
