"""`cloudckpt diff`: in what two checkpoints differ."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson
from cloudckpt.cli.command import FOUND
from cloudckpt.cli.printing import LINE_S, print_facts, print_table, short
from cloudckpt.cli.sizes import Memory, options_within
from cloudckpt.copying import Change, Difference
from cloudckpt.copying import diff as compare
from cloudckpt.report import as_bytes, plain

__all__ = ["diff"]


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, or a root: its newest one.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    *,
    access: Access,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Elements no further apart are equal, and NaNs are. Without it: those of equal bits."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show so many of each kind.")] = 40,
    memory: Memory = None,
    target_storage_options: Annotated[
        str | None, typer.Option("--target-storage-options", help="fsspec's options for B, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say in what two checkpoints differ: names, shapes, dtypes, elements, values.

    Ends with 3 if they differ. What their environments and metrics differ in is shown, and does not count.
    """
    (options_a, engine_a), (options_b, engine_b) = access.beside(a, b, target_storage_options)
    found = compare(
        a,
        b,
        tolerance=tolerance,
        storage_options=options_a,
        b_storage_options=options_b,
        engine=engine_a,
        b_engine=engine_b,
        options=options_within(memory),
        every_s=LINE_S,
    )
    if as_json:
        typer.echo(json.dumps(_finite({"is_equal": found.is_equal, **dataclasses.asdict(found)})))
    else:
        _print(found, limit)
    if not found.is_equal:
        raise typer.Exit(FOUND)


def _finite(fact: object) -> object:
    """Return what JSON can say: it has no numbers that are not finite."""
    if isinstance(fact, Mapping):
        return {name: _finite(one) for name, one in fact.items()}
    if isinstance(fact, list | tuple):
        return [_finite(one) for one in fact]
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact


def _print(found: Difference, limit: int) -> None:
    print_facts([("a", found.a), ("b", found.b)])
    head = [
        (f"{kind} {name}", f"{_text(one)}  ->  {_text(other)}")
        for kind, pairs in (("metric", found.metrics), ("environment", found.environment))
        for name, (one, other) in pairs.items()
    ]
    if head:
        print_facts(head[:limit])
    _list("only in a", found.only_a, limit)
    _list("only in b", found.only_b, limit)
    _list("a tensor in one, a value in the other", found.kinds, limit)
    _list("at another place of the state, or in another container", found.paths, limit)
    _pairs("other shapes", {name: tuple(map(list, pair)) for name, pair in found.shapes.items()}, limit)
    _pairs("other dtypes", found.dtypes, limit)
    if found.changed:
        typer.echo(f"\nchanged tensors: {len(found.changed):,}")
        columns = ("largest", "relative", "elements", "NaN a", "NaN b", "name")
        print_table(columns, map(_row, found.changed[:limit]), numbers=columns[:-1])
        _tell_more(len(found.changed), limit)
    _pairs("changed values", {name: tuple(map(_text, pair)) for name, pair in found.values.items()}, limit)
    verdict = "equal" if found.is_equal else "different"
    typer.echo(f"\n{verdict}; {as_bytes(found.read_bytes)} read to tell")


def _row(change: Change) -> tuple[str, ...]:
    share = f"{change.count:,} of {math.prod(change.shape):,}"
    numbers = ("-" if one is None else f"{one:.6g}" for one in (change.largest, change.largest_relative))
    return *numbers, share, *(f"{count:,}" for count in change.nan_counts), change.name


def _text(value: object) -> str:
    return "-" if value is None else short(value if isinstance(value, str) else json.dumps(value), 80)


def _list(title: str, names: Iterable[str], limit: int) -> None:
    lines = list(names)
    if lines:
        typer.echo(f"\n{title}: {len(lines):,}\n" + "\n".join(f"  {plain(name)}" for name in lines[:limit]))
        _tell_more(len(lines), limit)


def _pairs(title: str, pairs: Mapping[str, tuple[object, ...]], limit: int) -> None:
    if pairs:
        typer.echo(f"\n{title}: {len(pairs):,}")
        print_facts((f"  {name}", f"{one}  ->  {other}") for name, (one, other) in list(pairs.items())[:limit])
        _tell_more(len(pairs), limit)


def _tell_more(count: int, limit: int) -> None:
    if count > limit:
        typer.echo(f"  … and {count - limit:,} more (--limit)")
