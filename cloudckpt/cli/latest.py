"""`cloudckpt latest`: the URL of the newest checkpoint, for scripts, and of the next one for evaluation jobs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, AsJson, Url, ended
from cloudckpt.cli.printing import summary
from cloudckpt.cli.rules import seconds_of
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.root import Catalog, Checkpoint, Roots, newest_or_the_one, wait_for_next

__all__ = ["latest"]


def latest(
    url: Url,
    *,
    access: Access,
    after: Annotated[int | None, typer.Option(metavar="STEP", help="One whose step is above it.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for one that is not there yet: above --after, or the next one.")
    ] = False,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer: 90s, 30min, 12h.")] = None,
    best: Annotated[str | None, typer.Option(metavar="METRIC", help="The best by a metric.")] = None,
    mode: Annotated[str, typer.Option(metavar="min|max", help="Which metric is best.")] = "min",
    as_json: AsJson = False,
) -> None:
    """Print the URL of the newest checkpoint: of a root, or the one at the URL.

    Ends with 1 if there is none, or none came in time.
    """
    if best is not None and (wait or after is not None):
        raise ended("--best looks at what is there; give it without --wait and --after", status=2)
    timeout_s = None if timeout is None else seconds_of(timeout, "--timeout")
    if timeout_s is not None and not wait:
        raise ended("--timeout limits --wait; give both", status=2)
    with access.opened(url) as catalog:
        if best is not None:
            found = _best(catalog, best, mode)
        elif wait:
            found = wait_for_next(catalog, after=after, timeout_s=timeout_s)
        else:
            found = _newest(catalog, after)
    typer.echo(json.dumps(summary(found)) if as_json else found.url)


def _best(catalog: Catalog, metric: str, mode: str) -> Checkpoint:
    if mode not in ("min", "max"):
        raise ended(f"--mode is {mode!r}; give min or max", status=2)
    found = Roots([catalog]).best(metric, "min" if mode == "min" else "max")
    if found is None:
        raise CheckpointNotFoundError(f"no checkpoint at {catalog.store.url} has a number for the metric {metric!r}")
    return found


def _newest(catalog: Catalog, after: int | None) -> Checkpoint:
    found = newest_or_the_one(catalog)
    if after is not None and found.step <= after:
        raise CheckpointNotFoundError(
            f"the newest checkpoint at {catalog.store.url} is of step {found.step}, not above {after}; "
            "--wait waits for it"
        )
    return found
