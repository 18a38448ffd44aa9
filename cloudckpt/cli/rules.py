"""Turn what the command line says of what stays into retention rules."""

from __future__ import annotations

import re
from typing import Annotated, Literal, cast

import typer

from cloudckpt.cli.asking import ended
from cloudckpt.errors import OptionsError
from cloudckpt.root import KeepBest, KeepEvery, KeepFor, KeepLast, RetentionRule

__all__ = ["KeepBestOption", "KeepEveryOption", "KeepForOption", "KeepLastOption", "rules_of", "seconds_of"]

KeepLastOption = Annotated[int | None, typer.Option("--keep-last", metavar="N", help="The newest N.")]
KeepBestOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-best",
        metavar="METRIC[:min|max[:N]]",
        help="The N best by a metric (the smallest, one, unless it says so); as often as needed.",
    ),
]
KeepEveryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-every",
        metavar="STEPS|TIME",
        help="Those whose step is a multiple; with a unit (6h), the oldest of each stretch of so much work.",
    ),
]
KeepForOption = Annotated[
    str | None,
    typer.Option("--keep-for", metavar="TIME", help="What is at most so much work old: 3d, 12h, 90min, 45s."),
]

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
# No more digits than a step or a count has; Python refuses to read thousands of them.
_COUNT = re.compile(r"\A[0-9]{1,19}\Z")
_TIME = re.compile(r"\A([0-9]{1,19}(?:\.[0-9]{1,19})?) ?(s|m|min|h|d|w)\Z")


def rules_of(
    keep_last: int | None, keep_best: list[str] | None, keep_every: list[str] | None, keep_for: str | None
) -> list[RetentionRule]:
    """Return the rules that the options name; what is none ends the command with 2."""
    try:
        return [
            *([] if keep_last is None else [KeepLast(keep_last)]),
            *map(_best, keep_best or ()),
            *map(_every, keep_every or ()),
            *([] if keep_for is None else [KeepFor(seconds=seconds_of(keep_for, "--keep-for"))]),
        ]
    except OptionsError as exc:
        raise ended(str(exc), status=2) from exc


def seconds_of(text: str, name: str) -> float:
    """Return a time with its unit in seconds; another text ends the command with 2."""
    found = _TIME.match(text.strip())
    if found is None:
        raise ended(f"{name} is {text!r}; write a number and its unit: 3d, 12h, 90min or 45s", status=2)
    return float(found[1]) * _UNITS_S[found[2]]


def _every(text: str) -> KeepEvery:
    if _COUNT.match(text.strip()):
        return KeepEvery(steps=int(text))
    return KeepEvery(seconds=seconds_of(text, "--keep-every"))


def _best(text: str) -> KeepBest:
    """Read `loss`, `loss:min`, `acc:max:3`; a metric may have colons of its own."""
    metric, mode, count = text, "min", "1"
    name, colon, last = text.rpartition(":")
    if colon and _COUNT.match(last) and name.rpartition(":")[2] in ("min", "max"):
        text, count = name, last
        name, colon, last = text.rpartition(":")
    if colon and last in ("min", "max"):
        metric, mode = name, last
    return KeepBest(metric, n=int(count), mode=cast("Literal['min', 'max']", mode))
