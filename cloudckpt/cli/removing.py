"""What `rm` and `prune` have in common: show what goes and what stays, ask, remove, wait, and say what was done."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from cloudckpt.cli.asking import ensure
from cloudckpt.cli.printing import LINE_S, as_age, print_table, summary
from cloudckpt.report import as_bytes
from cloudckpt.root import Checkpoint, Plan, Thinning, Unreadable

__all__ = ["DryRun", "Grace", "carry_out"]

DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would go, and remove nothing.")]
Grace = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="From the end of a checkpoint to that of its objects, for readers."),
]


def carry_out(thinning: Thinning, plan: Plan, *, is_yes: bool, is_dry: bool, as_json: bool) -> None:
    """Show a plan, ask, and remove what it names."""
    is_asked = not (is_yes or is_dry)
    if is_asked or not as_json:
        # Whoever is asked sees it, also where the answer is for a program.
        _show(plan, is_aside=as_json)
    if is_dry or not (plan.going or plan.unreadable):
        if as_json:
            _print_json([*plan.going, *plan.unreadable], is_removed=False)
        return
    count = len(plan.going) + len(plan.unreadable)
    size = as_bytes(plan.total_bytes) + (" and what cannot be read" if plan.unreadable else "")
    question = f"Remove {count} checkpoints, {size}?"
    ensure(" ".join([*map(_sentence, plan.warnings), question]), is_yes=is_yes)
    gone = thinning.uncommit(plan)
    try:
        if as_json:
            _print_json(gone, is_removed=True)
        else:
            typer.echo(f"removed: {len(gone)} checkpoints")
    except OSError as exc:
        exc.add_note(thinning.left(gone))
        raise
    object_count = thinning.finish(_Countdown())
    if not as_json and gone:
        size = as_bytes(sum(one.manifest.sent_bytes for one in gone if isinstance(one, Checkpoint)))
        typer.echo(f"and {object_count:,} objects of theirs, {size}")
    if spared := count - len(gone):
        typer.echo(f"cloudckpt: {spared} stay, which were pinned, kept or removed by others meanwhile", err=True)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _print_json(found: Sequence[Checkpoint | Unreadable], *, is_removed: bool) -> None:
    for one in found:
        if isinstance(one, Checkpoint):
            facts = summary(one)
        else:
            facts = {"unreadable": one.error.key, "step": one.step, "epoch": one.epoch, "error": str(one.error)}
        typer.echo(json.dumps({**facts, "removed": is_removed}))


def _show(plan: Plan, *, is_aside: bool) -> None:
    rows = [(one.order, _row(one, "goes", "")) for one in plan.going]
    rows += [
        (one.order, _row(one, "stays", ", ".join(plan.kept.get(one.order, ())) or "not asked for"))
        for one in plan.staying
    ]
    rows += [
        (one.order, (str(one.step), str(one.epoch), "?", "?", "goes", "its manifest cannot be read"))
        for one in plan.unreadable
    ]
    cells = [cells for _, cells in sorted(rows)]
    print_table(
        ("step", "epoch", "age", "size", "", "why"), cells, numbers=("step", "epoch", "age", "size"), is_aside=is_aside
    )
    size = as_bytes(plan.total_bytes) + (" and what cannot be read" if plan.unreadable else "")
    typer.echo(
        f"{len(plan.going) + len(plan.unreadable)} go ({size}), {len(plan.staying)} stay "
        f"({as_bytes(sum(one.total_bytes for one in plan.staying))})",
        err=is_aside,
    )
    if plan.going:
        typer.echo(
            "a job that has restored one of these, and has not begun its first save since, is not known here: stopped "
            "before that, it cannot go on from there again",
            err=is_aside,
        )


def _row(one: Checkpoint, what: str, why: str) -> tuple[str, ...]:
    age = as_age(time.time() - one.created_at.timestamp())
    return str(one.step), str(one.epoch), age, as_bytes(one.total_bytes), what, why


class _Countdown:
    """Says how long it waits: on a terminal each second in one line, else now and then in a line of its own."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._told_s = math.inf

    def __call__(self, left_s: float) -> None:
        if self._is_terminal:
            text = f"cloudckpt: their objects go in {left_s:.0f} s (Ctrl-C leaves them)" if left_s else ""
            typer.echo(f"\r\x1b[K{text}", err=True, nl=False)
        elif left_s and self._told_s - left_s >= LINE_S:
            self._told_s = left_s
            typer.echo(f"cloudckpt: their objects go in {left_s:.0f} s", err=True)
