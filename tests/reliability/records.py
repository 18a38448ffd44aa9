"""Count what became of trials, and write it down for the page that `make reliability` makes.

    with Trials(SECTION, "kill -9 of a rank", store="s3", seed=7) as trials:
        for ...:
            trials.count("restored the newest")     # one trial, and what became of it
            trials.lose("step 3 is gone, seed 7")   # one trial that lost or spoiled something

Each test process appends to a file of its own in the folder that `CLOUDCKPT_RELIABILITY` names; without it nothing is
written, and all else is the same: trials of cloudckpt that lost anything fail, and so does a kind of which none ran.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = [
    "FOLDER",
    "IS_WHOLE",
    "OURS",
    "Cell",
    "Record",
    "Section",
    "Trials",
    "added",
    "dose",
    "read_records",
    "write",
]

FOLDER = "CLOUDCKPT_RELIABILITY"
OURS = "cloudckpt"
_SHOWN = 5
# All of it takes hours, in which nothing else is to be learnt: only where figures are made.
IS_WHOLE = FOLDER in os.environ


def dose(whole: int, *, short: int) -> int:
    """Return how many to try: all where figures are made for the page, a part in any other run, long or short."""
    return whole if IS_WHOLE else short


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page: sections stand in the order of their numbers.

    Attributes:
        about: what is tried and what counts as lost, in a few sentences of Markdown.
    """

    number: int
    title: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A line of a section's table. Those of one kind and subject are added up on the page.

    Attributes:
        kind: what was tried.
        subject: on what: `OURS`, or what else people have.
        parameters: name → value, such as the store; the seed, if chance had a part.
        outcomes: what became of it → how often; the trials that lost something are not among them.
        lost: trials that lost what was acknowledged, or gave anything back wrong.
        seconds: it took.
    """

    section: Section
    kind: str
    subject: str
    parameters: dict[str, str]
    outcomes: dict[str, int]
    lost: int
    seconds: float

    @property
    def count(self) -> int:
        return sum(self.outcomes.values()) + self.lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table of a section's own, below the first one: what stands where its row and column meet."""

    section: Section
    table: str
    row: str
    column: str
    text: str


class Trials:
    """The trials of one kind on one subject; leaving the block writes them down.

    Leaving it fails if none ran, and, of cloudckpt, if one was lost.
    """

    def __init__(self, section: Section, kind: str, subject: str = OURS, **parameters: object) -> None:
        self.section, self.kind, self.subject = section, kind, subject
        self.parameters = {name: str(value) for name, value in parameters.items()}
        self.outcomes = Counter[str]()
        self.losses: list[str] = []

    def count(self, outcome: str, times: int = 1) -> None:
        """Note what became of so many trials, none of which lost anything."""
        self.outcomes[outcome] += times

    def lose(self, what: str) -> None:
        """Note a trial that lost something, and how to run it again."""
        self.losses.append(what)

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        record = Record(
            section=self.section,
            kind=self.kind,
            subject=self.subject,
            parameters=self.parameters,
            outcomes=dict(+self.outcomes),
            lost=len(self.losses),
            seconds=time.monotonic() - self._began_s,
        )
        assert record.count, f"no trial of {self.kind!r} ran"
        write(record)
        assert self.subject != OURS or not self.losses, "\n".join(
            [f"{record.lost} of {record.count} trials of {self.kind!r} lost something:", *self.losses[:_SHOWN]]
        )


def write(one: Record | Cell) -> None:
    """Append it to this process's file, if there is to be a page."""
    if folder := os.environ.get(FOLDER):
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"is": type(one).__name__, **asdict(one)}) + "\n")


def read_records(folder: Path) -> Iterator[Record | Cell]:
    """Return what all processes have written."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from map(_decoded, path.read_text(encoding="utf-8").splitlines())


def _decoded(line: str) -> Record | Cell:
    fields: dict[str, Any] = json.loads(line)
    fields["section"] = Section(**fields["section"])
    return Record(**fields) if fields.pop("is") == Record.__name__ else Cell(**fields)


def added(records: Iterable[Record]) -> Record:
    """Return the sum of records of one kind and subject; a parameter shows each of its values once."""
    every = list(records)
    names = sorted({name for record in every for name in record.parameters})
    return Record(
        section=every[0].section,
        kind=every[0].kind,
        subject=every[0].subject,
        parameters={
            name: ", ".join(sorted({record.parameters[name] for record in every if name in record.parameters}))
            for name in names
        },
        outcomes=dict(sum((Counter(record.outcomes) for record in every), Counter[str]())),
        lost=sum(record.lost for record in every),
        seconds=sum(record.seconds for record in every),
    )
