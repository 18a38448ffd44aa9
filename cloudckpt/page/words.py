"""Say what facts are in the words of the page: spans, times, prices, and a save in one line. Pure functions."""

from __future__ import annotations

from datetime import UTC, datetime

from cloudckpt.page.history import Save
from cloudckpt.report import as_bytes

__all__ = ["metric_name", "percent", "save_words", "span", "utc"]


def span(seconds: float | None) -> str:
    """Return a time in the unit that a person would choose; a dash for one that nobody has written down."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.3g} ms" if seconds else "0 s"
    for limit_s, unit_s, unit in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.3g} {unit}"
    return f"{seconds / 86_400:.1f} days"


def utc(at: datetime) -> str:
    """Return a time in UTC, without the zone."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def percent(share: float | None) -> str:
    """Return a share as people read it."""
    return "–" if share is None else f"{100 * share:.1f} %"


def metric_name(name: str) -> str:
    """Return a metric's name, in quotes if blanks begin or end it: an older save may have one of blanks alone."""
    return name if name and name == name.strip() else f'"{name}"'


def save_words(save: Save) -> str:
    """Say what a save did, in one line."""
    one = save.checkpoint
    said = [
        f"epoch {one.epoch}, {utc(one.created_at)} UTC" if one.step < 0 else f"step {one.step} of epoch {one.epoch}",
        as_bytes(one.total_bytes),
    ]
    if save.seconds is not None:
        phases = ", ".join(f"{name} {span(size)}" for name, size in save.phases.items() if size)
        said.append(f"{span(save.seconds)} ({phases})" if phases else span(save.seconds))
    if (staged_s := save.number("stage_s")) is not None:
        said.append(f"staged in {span(staged_s)}")
    slowest = save.number("slowest_rank")
    if slowest is not None and one.world_size > 1:
        said.append(f"rank {slowest:.0f} was the slowest of {one.world_size}")
    if retries := save.number("retries"):
        said.append(f"{retries:.0f} retries")
    if save.pin is not None:
        said.append(f"pinned: {save.pin}" if save.pin else "pinned")
    return ", ".join(said)
