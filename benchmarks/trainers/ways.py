"""One way to save from a framework: what stands in its row, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.trainers.meter import Meter, Task

__all__ = ["Way"]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to save and to resume.

    Attributes:
        title: what it is called in a table.
        line: what one writes for it.
        rest_s: what a save needs after its end until the framework's other processes know of it.
        run: trains, or resumes and ends with `ResumedError`; relative paths are its own scratch folder's.
    """

    title: str
    line: str
    run: Callable[[Task, Meter], None]
    rest_s: float = 0.0
