"""`cloudckpt report`: a run as one page to look at."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, NoCache, Url, cache_of, ended
from cloudckpt.cli.rules import seconds_of
from cloudckpt.convert import refuse_ours
from cloudckpt.format import SUMS_SUFFIX
from cloudckpt.page import page_of
from cloudckpt.report import plain, prices_from
from cloudckpt.store import open_store

__all__ = ["report"]


def report(
    url: Url,
    *,
    access: Access,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes; - prints it.")
    ] = Path("report.html"),
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='The store\'s prices: {"storage_gib_month": 0.023, "writes_1000": 0.005, "reads_1000": '
            '0.0004, "sent_gib": 0.0, "currency": "USD", "source": "…"}; else the usual ones of S3 and GCS.',
        ),
    ] = None,
    mtbf: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Mean time between failures (90min, 12h, 3d); else interruptions count."),
    ] = None,
    no_cache: NoCache = False,
) -> None:
    """Write a page about a run: when its jobs saved and restored, what that took, its metrics, and what it costs.

    One HTML file that needs no network. It tells what the store tells; a file of that name, or the one that a link of
    that name points to, is overwritten; in the root itself, or in a checkpoint, it is refused.
    """
    mtbf_s = None if mtbf is None else seconds_of(mtbf, "--mtbf")
    chosen = None if prices is None else prices_from(prices)
    target = None if str(output) == "-" else _target(output)
    with access.opened(url) as catalog:
        page = page_of(catalog, cache=cache_of(no_cache=no_cache), prices=chosen, mtbf_s=mtbf_s)
    if target is None:
        sys.stdout.write(page)
        return
    try:
        _write(target, page)
    except OSError as exc:
        raise ended(
            f"the page could not be written to {output}: {exc.strerror}; name another file (-o)", status=1
        ) from exc
    typer.echo(plain(str(output)))


def _target(output: Path) -> Path:
    """Return which file is meant, links followed; where none can be, end the command before anything is read."""
    if output.exists() and not output.is_file() and not output.is_dir():
        return output  # a device or a pipe, perhaps by a link that names no path (/dev/stdout)
    target = Path(os.path.realpath(output))
    if target.is_dir():
        raise ended(f"-o {output} is a directory; name a file in it, such as {output / 'report.html'}", status=1)
    if target.is_symlink():
        raise ended(f"-o {output} is a link that leads in a circle; name a file", status=1)
    if not target.parent.is_dir():
        raise ended(f"-o {output}: there is no directory {target.parent}; make it, or name another file", status=1)
    with open_store(target.parent) as folder:
        refuse_ours(folder, target.name)
    return target


def _write(path: Path, page: str) -> None:
    """Write a file whole or not at all: the one of before is there until then. A device or a pipe is written to."""
    if path.exists() and not path.is_file():
        path.write_text(page, encoding="utf-8")
        return
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(page, encoding="utf-8")
        new.replace(path)
        # Those of what `cloudckpt.open` wrote there would call the page damaged.
        path.with_name(f"{path.name}{SUMS_SUFFIX}").unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
