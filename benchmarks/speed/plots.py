"""Draw results with matplotlib: a bar with its spread for each peer of a case, a line for each peer of a curve.

Why not what draws the report page: that draws a run's own facts in the page's style, and knows neither spread nor
logarithms; matplotlib is what readers of benchmarks have, and comes with the extra `bench` in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.plan import CURVES
from benchmarks.speed.report import Results

__all__ = ["draw_bars", "draw_curve"]

_OPS = ("save", "load")
_OURS = "#1f77b4"
_LIMIT = "#2ca02c"
_OTHER = "#9a9a9a"
_AXES = {
    "size_bytes": "bytes of the state",
    "tensors": "tensors",
    "ranks": "ranks",
    "latency_ms": "ms a request",
}


def draw_bars(results: Results, path: Path) -> None:
    """Write one case's bars to an SVG file: medians, with a line from the least to the greatest run."""
    figure, panels = _figure(height=1.2 + 0.3 * max(1, len(results.rows)))
    figure.suptitle(results.case.title)
    for panel, op in zip(panels, _OPS, strict=True):
        rows = [row for row in results.rows.values() if row.rates(op)]
        middles = [median(row.rates(op)) for row in rows]
        spread = [
            [middle - row.rates(op)[0] for row, middle in zip(rows, middles, strict=True)],
            [row.rates(op)[-1] - middle for row, middle in zip(rows, middles, strict=True)],
        ]
        if rows:
            colours = [_colour(row.peer) for row in rows]
            panel.barh([row.title for row in rows], middles, xerr=spread, capsize=3, color=colours)
        panel.invert_yaxis()
        panel.set_xlabel(f"{op}, GB/s")
    _write(figure, path)


def draw_curve(section: str, points: Sequence[Results], path: Path) -> None:
    """Write one curve to an SVG file: a line through the medians of each peer, in a band from least to greatest."""
    points = sorted(points, key=lambda results: results.case.x)
    figure, panels = _figure(height=4.0)
    figure.suptitle(f"{section} on {points[0].case.target}")
    titles = {row.peer: row.title for results in points for row in results.rows.values()}
    for panel, op in zip(panels, _OPS, strict=True):
        for peer, title in titles.items():
            found = [
                (results.case.x, rates)
                for results in points
                if peer in results.rows and (rates := results.rows[peer].rates(op))
            ]
            places = [x for x, _ in found]
            (line,) = panel.plot(places, [median(rates) for _, rates in found], marker="o", label=title)
            panel.fill_between(
                places,
                [rates[0] for _, rates in found],
                [rates[-1] for _, rates in found],
                color=line.get_color(),
                alpha=0.2,
            )
        if CURVES[section] in ("size_bytes", "tensors"):
            panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel(_AXES[CURVES[section]])
        panel.set_ylabel(f"{op}, GB/s")
    panels[0].legend(fontsize="x-small")
    _write(figure, path)


def _figure(*, height: float) -> tuple[Any, Sequence[Any]]:
    # Without pyplot, which keeps every figure, and asks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    return figure, figure.subplots(1, 2)


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg")


def _colour(peer: str) -> str:
    return _OURS if peer.startswith("cloudckpt") else _LIMIT if peer.startswith("raw-") else _OTHER
