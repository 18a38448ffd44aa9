"""Draw a run as SVG: when its jobs were at work, what each save took, how large it is, and what was measured.

Pure functions from facts to markup, in units of a drawing `WIDTH` wide. Colours are classes of the page's style. What a
mark stands for is its <title>, which readers, pointers and the page's script show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cloudckpt.page.history import Facts, Job, Save
from cloudckpt.page.markup import Html, joined, tag
from cloudckpt.page.words import metric_name, save_words, span, utc
from cloudckpt.report import as_bytes

__all__ = ["PHASES", "bars_of_bytes", "bars_of_seconds", "lanes", "metric_curve"]

WIDTH = 720.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 12.0, 12.0, 30.0
PHASES = ("plan", "upload", "gather", "commit", "other")
_TICKS = 4
_LANE = 22.0
# More in one lane only cover each other.
_DOTS = 500


@dataclass(frozen=True, slots=True)
class _Scale:
    """From numbers to places, the smaller one first or last."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        # By halves: the whole may be more than a float holds.
        width = self.high / 2 - self.low / 2
        share = (value / 2 - self.low / 2) / width if width > 0 else 0.5
        return self.start + share * (self.stop - self.start)


def lanes(facts: Facts, jobs: Sequence[Job]) -> Html | None:
    """Draw a lane for each of some jobs, a mark for each checkpoint that is there, and what lies between two jobs."""
    seen = [(job, job.seen) for job in jobs]
    at_work = [(job, when) for job, when in seen if when is not None]
    if not at_work:
        return None
    first, last = min(start for _, (start, _) in at_work), max(stop for _, (_, stop) in at_work)
    x = _Scale(0.0, max(1e-3, (last - first).total_seconds()), _LEFT, WIDTH - _RIGHT)

    def place(at: datetime) -> float:
        return x((at - first).total_seconds())

    height = _TOP + _LANE * len(at_work) + _BOTTOM
    drawn: list[Html] = []
    for row, (job, (start, stop)) in enumerate(at_work):
        drawn += _lane(job, (place(start), place(stop)), place, _TOP + _LANE * row)
    rows = {job.epoch: row for row, (job, _) in enumerate(at_work)}
    for one in facts.breaks:
        if one.last_at is not None and one.until is not None and one.job.epoch in rows and one.last_at >= first:
            y = _TOP + _LANE * rows[one.job.epoch] + _LANE / 2
            ends = sorted((place(one.last_at), place(one.until)))
            words = f"epoch {one.job.epoch} went on from step {one.resumed_from[1]} of epoch {one.resumed_from[0]}"
            gap = "" if one.gap_s is None else f"; {span(one.gap_s)} after the last commit before"
            kind = "again" if one.is_same_process else "gap"
            shape = tag("line", x1=ends[0], x2=max(ends[1], ends[0] + 1), y1=y, y2=y)
            drawn.append(tag("g", tag("title", words + gap), shape, class_=f"mark {kind}"))
    return _drawing(height, "When jobs were at work", [*_time_axis(first, last, place, height), *drawn])


def _lane(job: Job, ends: tuple[float, float], place: Callable[[datetime], float], y: float) -> list[Html]:
    middle = y + _LANE / 2
    label = tag("text", f"epoch {job.epoch}", x=_LEFT - 6, y=middle + 4, class_="label end")
    words = f"epoch {job.epoch}: {job.place or 'nobody knows where'}; {len(job.saves)} checkpoints are there"
    if job.began_at is None:
        words += "; when it began is not known"
    box = tag("rect", x=ends[0], y=middle - 6, width=max(3.0, ends[1] - ends[0]), height=12.0, rx=3.0)
    dots = [_dot(save, place(save.checkpoint.created_at), middle) for save in job.saves[-_DOTS:]]
    return [label, tag("g", tag("title", words), box, class_="mark job"), *dots]


def _dot(save: Save, x: float, y: float) -> Html:
    kind = "mark save pinned" if save.pin is not None else "mark save"
    size = 5.0 if save.pin is not None else 3.5
    return tag("g", tag("title", save_words(save)), tag("circle", cx=x, cy=y, r=size), class_=kind, tabindex="0")


def _time_axis(first: datetime, last: datetime, place: Callable[[datetime], float], height: float) -> list[Html]:
    length_s = (last - first).total_seconds()
    marks = []
    for number in range(_TICKS):
        at = first + timedelta(seconds=length_s * number / (_TICKS - 1))
        where = ("start", "middle", "middle", "end")[number]
        text = utc(at)[5:16] if length_s > 86_400 else utc(at)[11:19]
        marks.append(tag("line", x1=place(at), x2=place(at), y1=_TOP, y2=height - _BOTTOM, class_="grid"))
        time = at.isoformat(timespec="seconds")
        marks.append(tag("text", text, x=place(at), y=height - 10, class_=f"label {where}", data_time=time))
    return marks


def bars_of_seconds(saves: Sequence[Save]) -> Html | None:
    """Draw a bar for each save: the seconds of its phases, one upon the other."""
    told = [save for save in saves if save.seconds is not None]
    if not told:
        return None
    highest = max(sum(save.phases.values()) for save in told)

    def parts(save: Save) -> list[tuple[str, float]]:
        return [(name, save.phases[name]) for name in PHASES]

    return _bars(told, parts, highest, span, "Seconds of each save")


def bars_of_bytes(saves: Sequence[Save]) -> Html | None:
    """Draw a bar for each checkpoint: its bytes."""
    highest = max((save.checkpoint.total_bytes for save in saves), default=0)

    def parts(save: Save) -> list[tuple[str, float]]:
        return [("size", float(save.checkpoint.total_bytes))]

    return _bars(saves, parts, float(highest), as_bytes, "Bytes of each checkpoint") if saves else None


def _bars(
    saves: Sequence[Save],
    parts: Callable[[Save], Sequence[tuple[str, float]]],
    highest: float,
    words: Callable[[float], str],
    title: str,
) -> Html:
    height, step = 190.0, (WIDTH - _LEFT - _RIGHT) / len(saves)
    y = _Scale(0.0, highest or 1.0, height - _BOTTOM, _TOP)
    drawn = []
    for number, save in enumerate(saves):
        left, width, base, stack = _LEFT + step * number, min(48.0, max(0.5, step * 0.8)), 0.0, []
        for name, size in parts(save):
            top = y(base + size)
            if y(base) - top > 0.05:
                x = left + (step - width) / 2
                stack.append(tag("rect", x=x, y=top, width=width, height=y(base) - top, class_=f"bar {name}"))
            base += size
        drawn.append(tag("g", tag("title", save_words(save)), *stack, class_="mark", tabindex="0"))
    labels = [
        tag("text", _step(saves[place]), x=_LEFT + step * (place + 0.5), y=height - 10, class_="label middle")
        for place in _places(len(saves))
    ]
    return _drawing(height, title, [*_y_axis(y, 0.0, highest or 1.0, words), *drawn, *labels])


def _step(save: Save) -> str:
    return "-" if save.checkpoint.step < 0 else str(save.checkpoint.step)


def _places(count: int) -> list[int]:
    return sorted({round(number * (count - 1) / 5) for number in range(6)})


def _y_axis(y: _Scale, low: float, high: float, words: Callable[[float], str]) -> list[Html]:
    marks = []
    for number in range(_TICKS):
        share = number / (_TICKS - 1)
        value = low * (1 - share) + high * share
        marks.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        marks.append(tag("text", words(value), x=_LEFT - 6, y=y(value) + 4, class_="label end"))
    return marks


def metric_curve(name: str, facts: Facts, saves: Sequence[Save]) -> Html | None:
    """Draw a metric by step: a line for each job, a mark for each checkpoint; on the axis, those known to be gone."""
    points = [
        (save, value)
        for save in saves
        if (value := save.checkpoint.metrics.get(name)) is not None and math.isfinite(value)
    ]
    if not points:
        return None
    height = 220.0
    steps = [save.checkpoint.step for save, _ in points]
    gone = [(epoch, step) for epoch, step in facts.gone if min(steps) <= step <= max(steps)]
    values = [value for _, value in points]
    x = _Scale(min(steps), max(steps), _LEFT, WIDTH - _RIGHT - 8)
    y = _Scale(min(values), max(values), height - _BOTTOM - 8, _TOP + 4)
    lines = []
    for number, epoch in enumerate(sorted({save.checkpoint.epoch for save, _ in points})):
        places = [(x(save.checkpoint.step), y(value)) for save, value in points if save.checkpoint.epoch == epoch]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        lines.append(tag("polyline", points=path, class_=f"curve line{number % 6}"))
    dots = [_point(name, save, value, x, y) for save, value in points]
    ticks = [_gone(order, x(order[1]), height - _BOTTOM) for order in gone]
    axis = _y_axis(y, min(values), max(values), lambda value: f"{value:.4g}")
    labels = [
        tag("text", str(step), x=x(step), y=height - 10, class_="label middle")
        for step in sorted({min(steps), max(steps)})
    ]
    return _drawing(height, f"{metric_name(name)} by step", [*axis, *lines, *ticks, *dots, *labels])


def _point(name: str, save: Save, value: float, x: _Scale, y: _Scale) -> Html:
    kind = "mark save pinned" if save.pin is not None else "mark save"
    words = f"{metric_name(name)} {value:.6g}; {save_words(save)}"
    dot = tag("circle", cx=x(save.checkpoint.step), cy=y(value), r=5.0 if save.pin is not None else 3.5)
    return tag("g", tag("title", words), dot, class_=kind, tabindex="0")


def _gone(order: tuple[int, int], x: float, bottom: float) -> Html:
    words = f"step {order[1]} of epoch {order[0]}: a job went on from it or from a later one; it is there no more"
    return tag("g", tag("title", words), tag("line", x1=x, x2=x, y1=bottom - 8, y2=bottom), class_="mark gone")


def _drawing(height: float, title: str, children: Iterable[Html]) -> Html:
    drawn = tag(
        "svg",
        tag("title", title),
        joined(*children),
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        class_="drawing",
    )
    return tag("div", drawn, class_="scroll")
