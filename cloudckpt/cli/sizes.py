"""Read sizes as people write them."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudckpt.cli.asking import ended
from cloudckpt.errors import OptionsError
from cloudckpt.options import MIB, Options

__all__ = ["Memory", "options_within"]

Memory = Annotated[
    int | None,
    typer.Option("--memory", min=1, metavar="MIB", help="What transfers may hold: more is faster over a network."),
]


def options_within(memory_mib: int | None) -> Options | None:
    """Return options with that budget, None for the usual ones; one that is too small ends the command with 2."""
    if memory_mib is None:
        return None
    try:
        return Options(memory_budget_bytes=memory_mib * MIB)
    except OptionsError as exc:
        raise ended(f"--memory is {memory_mib}: {exc}", status=2) from exc
