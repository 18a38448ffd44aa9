"""Turn two loss trajectories into one picture: the run left alone below, the interrupted one on top of it.

The lower panel shows the difference of each pair, which is a flat line at zero if nothing was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from events import Start
from matplotlib.axes import Axes
from record import Outcome
from runs import Segment
from trajectory import Comparison, losses_of

__all__ = ["draw"]

_INTERRUPTION_COLOUR = "#b00020"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture to `path` as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(11, 7), height_ratios=(4, 1), layout="constrained"
    )
    _draw_losses(upper, outcome)
    _mark_interruptions_and_restores(upper, outcome.run_b)
    _draw_difference(lower, outcome.comparison)
    figure.suptitle(
        "Training interrupted three times and continued from the bucket, against the same training left alone"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_losses(axes: Axes, outcome: Outcome) -> None:
    losses_a = losses_of(outcome.run_a)
    comparison = outcome.comparison
    axes.plot(list(losses_a), list(losses_a.values()), color="#c8c8c8", linewidth=6, label="A: left alone")
    for process in sorted({row.process for row in comparison.rows}):
        rows = [row for row in comparison.rows if row.process == process]
        axes.plot(
            [row.step for row in rows],
            [row.loss_b for row in rows],
            color=_colour(process),
            linewidth=1.4,
            label=f"B, process {process}: steps {rows[0].step} to {rows[-1].step}",
        )
    axes.set_ylabel("training loss (nats per byte)")
    axes.grid(alpha=0.25)


def _mark_interruptions_and_restores(axes: Axes, run_b: Sequence[Segment]) -> None:
    # Restores are labelled to their left and interruptions to their right, each process at its own height.
    for process, segment in enumerate(run_b, start=1):
        height = max(0.5, 0.97 - 0.08 * process)
        start, last = segment.of(Start)[0], segment.last_step
        if start.restored:
            _mark(axes, start.first - 1, f"process {process} restores step {start.first - 1}", height, process=process)
        if segment.interruption:
            _mark(axes, last.step, f"{segment.interruption.name}, step {last.step}", height)


def _mark(axes: Axes, step: int, text: str, height: float, *, process: int | None = None) -> None:
    colour = _INTERRUPTION_COLOUR if process is None else _colour(process)
    axes.axvline(step, color=colour, linewidth=1.2, linestyle="solid" if process is None else (0, (4, 3)))
    axes.annotate(
        text,
        xy=(step, height),
        xycoords=("data", "axes fraction"),
        xytext=(5 if process is None else -5, 0),
        textcoords="offset points",
        color=colour,
        fontsize=9,
        horizontalalignment="left" if process is None else "right",
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _draw_difference(axes: Axes, comparison: Comparison) -> None:
    rows = [row for row in comparison.rows if row.loss_a is not None]
    differences = [row.loss_b - (row.loss_a or 0.0) for row in rows]
    axes.plot([row.step for row in rows], differences, ".", markersize=3, color="#333333")
    if not any(differences):
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
    axes.set_ylabel("B − A")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def _colour(process: int) -> str:
    return _COLOURS[(process - 1) % len(_COLOURS)]
