"""`cloudckpt ls`: what is committed at a URL, what keeps it, and what stands beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, NoCache, Url, cache_of, ended
from cloudckpt.cli.printing import as_age, in_zone, print_table, summary, zone_name
from cloudckpt.cli.rules import KeepBestOption, KeepEveryOption, KeepForOption, KeepLastOption, rules_of
from cloudckpt.options import READERS
from cloudckpt.report import as_bytes, plain
from cloudckpt.root import Catalog, Checkpoint, Overview, Roots, nothing_at, overview, own_bytes, the_one_at, why_kept
from cloudckpt.threads import each

__all__ = ["ls"]

_Kept = Mapping[tuple[int, int], Sequence[str]]
_Pins = Mapping[tuple[int, int], str]
_Own = Mapping[tuple[int, int], int]


def ls(  # noqa: PLR0913 (each option of the command)
    url: Url,
    *,
    access: Access,
    sort: Annotated[
        str,
        typer.Option(
            metavar="step|time|size|METRIC",
            help="step and time: the newest last; size: the largest first; a metric: the smallest first.",
        ),
    ] = "step",
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many: the newest, or by size or metric the first.")
    ] = None,
    utc: Annotated[bool, typer.Option("--utc", help="Times in UTC.")] = False,
    keep_last: KeepLastOption = None,
    keep_best: KeepBestOption = None,
    keep_every: KeepEveryOption = None,
    keep_for: KeepForOption = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--quick",
            help="Look whether what is in the cache still stands, or let it count while its prefix is listed: fewest "
            "requests. Without either: look, unless that takes over ten requests one after the other; then say so.",
            show_default=False,
        ),
    ] = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """List the committed checkpoints below a root, or the one at the URL; apart, what is unreadable or unfinished.

    Where one shares shards with others, two columns say what each holds itself and what others hold of it.
    Rules, if any are given, are not carried out: the column says which of them keep a checkpoint. Ends with 1 if there
    is none to be read. An empty directory counts as a missing one, because in a bucket they are the same.
    """
    rules = rules_of(keep_last, keep_best, keep_every, keep_for)
    with access.opened(url) as catalog:
        found = overview(catalog, cache_of(no_cache=no_cache), is_quick=None if check is None else not check)
        checkpoints = found.checkpoints
        if not checkpoints and not found.unreadable:
            one = the_one_at(catalog)
            if one is None:
                raise catalog.lost() or nothing_at(catalog, undecided=len(found.unfinished))
            checkpoints = [one]
        elif not checkpoints:
            Roots([catalog]).refuse(found.unreadable)
        pins = {one.order: one.note for one in found.pins}
        kept = why_kept(checkpoints, rules, pinned=pins, names=found.names)
        shown = _chosen(checkpoints, sort, limit)
        own = _own(catalog, shown, is_quick=check is False)
        if as_json:
            _print_json(shown, own, found, kept, pins)
        else:
            _print(catalog.store.url, shown, own, kept, is_utc=utc)
            _print_pins(checkpoints, pins)
            _print_others(found)
        if found.unchecked and check is None:
            _tell_unchecked(found)


def _own(catalog: Catalog, checkpoints: Sequence[Checkpoint], *, is_quick: bool) -> _Own:
    """Return the bytes that each holds itself; to be quick, of what shares something, as it was saved."""

    def look(one: Checkpoint) -> int:
        return one.manifest.sent_bytes if is_quick else own_bytes(catalog.store, one)

    found = each(checkpoints, look, threads=READERS, name="cloudckpt-ls")
    return {one.order: size_bytes for one, size_bytes in zip(checkpoints, found, strict=True)}


def _tell_unchecked(found: Overview) -> None:
    requests = "request" if found.check_request_count == 1 else "requests"
    typer.echo(
        f"\n{found.unchecked:,} of these were read before and are still listed, which is all that was looked at; one "
        f"whose removal has only begun may be among them: --check looks at each ({found.check_request_count:,} "
        f"{requests})",
        err=True,
    )


def _chosen(checkpoints: Sequence[Checkpoint], sort: str, limit: int | None) -> Sequence[Checkpoint]:
    if sort in ("step", "time"):
        by_time = sorted(checkpoints, key=lambda one: one.created_at) if sort == "time" else checkpoints
        return by_time[-limit:] if limit else by_time
    if sort == "size":
        found = sorted(checkpoints, key=lambda one: -one.total_bytes)
    else:
        names = sorted({name for one in checkpoints for name in one.metrics})
        if sort not in names:
            raise ended(f"no checkpoint has the metric {sort!r}; --sort step, time, size or {names}", status=1)
        # Those without it last; NaN is smaller than nothing, and comes before them.
        found = sorted(checkpoints, key=lambda one: _rank(one.metrics.get(sort)))
    return found[:limit]


def _rank(value: float | None) -> tuple[int, float]:
    if value is None:
        return 2, 0.0
    return (1, 0.0) if value != value else (0, value)  # noqa: PLR0124 (NaN)


def _print_json(checkpoints: Sequence[Checkpoint], own: _Own, found: Overview, kept: _Kept, pins: _Pins) -> None:
    now_s = time.time()
    for one in checkpoints:
        age_s = round(now_s - one.created_at.timestamp(), 3)
        facts = {"age_s": age_s, "kept": kept[one.order], "pin": pins.get(one.order)}
        typer.echo(json.dumps({**summary(one, own[one.order]), **facts}))
    for other in found.unreadable:
        facts = {"step": other.step, "epoch": other.epoch, "url": other.url, "error": str(other.error)}
        typer.echo(json.dumps(facts))
    for orphan in found.unfinished:
        facts = {"unfinished": orphan.prefix, "object_count": orphan.object_count, "total_bytes": orphan.total_bytes}
        typer.echo(json.dumps({**facts, "age_s": round(orphan.age_s, 3)}))


def _print(url: str, checkpoints: Sequence[Checkpoint], own: _Own, kept: _Kept, *, is_utc: bool) -> None:
    now_s = time.time()
    is_shared = any(own[one.order] < one.total_bytes for one in checkpoints)
    sizes = ("size", "own", "shared") if is_shared else ("size",)
    columns = ("step", "epoch", "age", f"created ({zone_name(is_utc=is_utc)})", *sizes, "ranks", "kept by", "metrics")
    rows = [
        (
            "-" if one.step < 0 else str(one.step),
            str(one.epoch or "-"),
            as_age(now_s - one.created_at.timestamp()),
            in_zone(one.created_at, is_utc=is_utc),
            as_bytes(one.total_bytes),
            *(map(as_bytes, (own[one.order], one.total_bytes - own[one.order])) if is_shared else ()),
            str(one.world_size),
            ", ".join(kept[one.order]) or "-",
            "  ".join(f"{name} {value:.6g}" for name, value in one.metrics.items()),
        )
        for one in checkpoints
    ]
    typer.echo(plain(url))
    print_table(columns, rows, numbers=("step", "epoch", "age", *sizes, "ranks"))


def _print_pins(checkpoints: Sequence[Checkpoint], pins: _Pins) -> None:
    there = {one.order for one in checkpoints}
    lost = "it is not there any more, or not whole; `unpin` lets go of it"
    rows = [
        (str(step), str(epoch), "  ".join(filter(None, [note, "" if (epoch, step) in there else lost])) or "-")
        for (epoch, step), note in sorted(pins.items())
    ]
    if rows:
        typer.echo("\npinned, until `unpin`")
        print_table(("step", "epoch", "note"), rows, numbers=("step", "epoch"))


def _print_others(found: Overview) -> None:
    unreadable, unfinished = found.unreadable, found.unfinished
    rows: list[tuple[str, ...]]
    if unreadable:
        typer.echo(f"\nunreadable: {len(unreadable)}; no rule counts them, and only a delete by hand removes them")
        rows = [(str(one.step), str(one.epoch), f"{type(one.error).__name__}: {one.error}") for one in unreadable]
        print_table(("step", "epoch", "why"), rows, numbers=("step", "epoch"))
    if unfinished:
        typer.echo("\nwithout a commit: a save under way, or what a save or a removal that was cut off has left")
        rows = [
            (one.prefix, f"{one.object_count:,}", as_bytes(one.total_bytes), as_age(one.age_s)) for one in unfinished
        ]
        print_table(("prefix", "objects", "size", "age"), rows, numbers=("objects", "size", "age"))
