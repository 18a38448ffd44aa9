"""Turn the runs of trainers into the two tables that people read, and into the section of a page.

Pure values: nothing is measured here.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from benchmarks.shared.report import _processor, _version
from benchmarks.trainers.meter import SAVES_AFTER, Found

__all__ = ["HEADING", "Kill", "Left", "Row", "section", "tables"]

HEADING = "## Beside what they do alone"
_MIB = 1 << 20
_PACKAGES = ("torch", "s3fs", "obstore")
_COMMAND = "python -m benchmarks.integrations --markdown docs/integrations.md"


@dataclass(slots=True, kw_only=True)
class Left:
    """What a kill left that was not there before: objects, multipart uploads that are open, files of a local folder."""

    objects: int = 0
    object_bytes: int = 0
    uploads: int = 0
    upload_bytes: int = 0
    files: int = 0
    file_bytes: int = 0

    @property
    def text(self) -> str:
        """One cell of a table."""
        parts = [
            _counted(self.objects, self.object_bytes, "object"),
            _counted(self.uploads, self.upload_bytes, "**open upload**", "**open uploads**"),
            _counted(self.files, self.file_bytes, "file in `./s3:`", "files in `./s3:`"),
        ]
        return ", ".join(filter(None, parts)) or "nothing"


@dataclass(slots=True, kw_only=True)
class Kill:
    """What became of a save that was killed in its middle.

    Attributes:
        elsewhere: what a resume on another machine found.
        here: what one on the same machine found, where something lies there.
    """

    left: Left = field(default_factory=Left)
    elsewhere: str = ""
    here: str = ""
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Row:
    """One way to save from one framework.

    Attributes:
        is_local: the URL was taken for a path of this machine; the bucket stayed empty.
        is_forgotten: a resume found nothing of a whole save, and would have begun anew.
        packages: whose versions matter.
    """

    way: str
    title: str
    line: str
    packages: Sequence[str] = ()
    saves: list[Found] = field(default_factory=list)
    loads: list[Found] = field(default_factory=list)
    kill: Kill | None = None
    is_local: bool = False
    is_forgotten: bool = False
    error: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether an adapter of ours saves."""
        return self.way.startswith("cloudckpt")

    @property
    def is_wrong(self) -> bool:
        """Whether a kill led to anything but the checkpoint before."""
        return self.kill is not None and self.kill.elsewhere != f"step {SAVES_AFTER[0]}"


def tables(found: Mapping[str, Sequence[Row]], *, size_bytes: int, runs: int, load: float) -> str:
    """Write both tables, and above them with what and how it was measured."""
    rows = [row for each in found.values() for row in each]
    parts = [_header(rows, size_bytes, runs, load), _numbers(found)]
    if not runs:
        parts.pop()
    if any(row.kill for row in rows):
        parts.append(_kills(rows))
    return "\n\n".join(parts)


def section(page: str, told: str) -> str:
    """Return a page with the tables as its section, in the place of those that it has."""
    rest = re.sub(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", "", page, flags=re.MULTILINE | re.DOTALL).rstrip()
    return f"{rest}\n\n{HEADING}\n\n{told}\n".lstrip()


def _header(rows: Iterable[Row], size_bytes: int, runs: int, load: float) -> str:
    names = dict.fromkeys([*(name for row in rows for name in row.packages), *_PACKAGES])
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    machine = f"{_processor()}, {os.cpu_count()} cores (load average {load:.1f}), Python {platform.python_version()}"
    return "\n".join(
        [
            f"What each trainer does with a URL by itself, and with the one line; written by `{_COMMAND}`.",
            "",
            f"{time.strftime('%Y-%m-%d')}; {machine}; {versions}.",
            f"A state of {size_bytes / 1e6:.0f} MB on one rank; median of {runs} (least–most), a fresh process each.",
        ]
    )


_ABOUT_NUMBERS = """\
Seconds on an in-memory S3 on loopback, for the second save of a training. *Blocked*: until training goes on. *Resume*:
from the trainer's call until its first step, in a new process, with every tensor compared. *Extra*: the most memory
above what was resident before; of a resume, what the optimizer makes anew is a part. × is against the trainer alone,
in the same run."""
_ABOUT_LOCAL = """\
† reports success, and the bucket stays empty: the state is in a folder `./s3:` of that machine, and the seconds are of
its page cache."""
_ABOUT_KILLS = """\
The same trainings on SeaweedFS: step {first} is saved, and everything is killed (`kill -9`) when half of the bytes of
step {second} have gone. What is there beside the first save, and what a new process finds on another machine:"""


def _numbers(found: Mapping[str, Sequence[Row]]) -> str:
    lines = [
        _ABOUT_NUMBERS,
        "",
        "| | the line | save s | × | blocked s | resume s | × | extra MiB: save | resume |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in found.values():
        lines += [_number_line(row, rows) for row in rows]
    if any(row.is_local for rows in found.values() for row in rows):
        lines += ["", _ABOUT_LOCAL]
    return "\n".join(lines)


def _number_line(row: Row, rows: Sequence[Row]) -> str:
    if row.error:
        return f"| {row.title} | {row.line} | {_cell(row.error)} | | | | | | |"
    if not row.saves:  # it was told to end before
        return f"| {row.title} | {row.line} | | | | | | | |"
    cells = [
        _spread(_values(row, "save_s")) + ("†" if row.is_local else ""),
        _ratio(row, rows, "save_s"),
        f"{median(one.blocked_s for one in row.saves):.2f}",
        _resume(row),
        _ratio(row, rows, "load_s"),
        f"{max(one.extra_bytes for one in row.saves) / _MIB:.0f}",
        f"{max(one.extra_bytes for one in row.loads) / _MIB:.0f}" if row.loads else "–",
    ]
    return f"| {row.title} | {row.line} | {' | '.join(cells)} |"


def _ratio(row: Row, rows: Sequence[Row], name: Literal["save_s", "load_s"]) -> str:
    """Return how many times as fast as the trainer alone, where that did the same: it came to the bucket."""
    theirs = [_values(one, name) for one in rows if one.way.startswith("stock") and not one.is_local]
    mine, first = _values(row, name), next(filter(None, theirs), [])
    return f"{median(first) / median(mine):.1f}" if row.is_ours and mine and first else "–"


def _resume(row: Row) -> str:
    if row.is_forgotten:
        return "**begins anew**"
    return _spread(_values(row, "load_s")) if row.loads else "–"


def _values(row: Row, name: Literal["save_s", "load_s"]) -> list[float]:
    return [one.save_s for one in row.saves] if name == "save_s" else [one.load_s for one in row.loads]


def _kills(rows: Iterable[Row]) -> str:
    first, second = SAVES_AFTER
    lines = [
        _ABOUT_KILLS.format(first=first, second=second),
        "",
        "| | the kill leaves | resume finds |",
        "|---|---|---|",
    ]
    for row in rows:
        if row.kill is None:
            continue
        if row.kill.error:
            lines.append(f"| {row.title} | {_cell(row.kill.error)} | |")
            continue
        here = f"; on the same machine: {row.kill.here}" if row.kill.here else ""
        lines.append(f"| {row.title} | {row.kill.left.text} | {_cell(row.kill.elsewhere + here)} |")
    return "\n".join(lines)


def _counted(count: int, size_bytes: int, one: str, many: str = "") -> str:
    if not count:
        return ""
    return f"{count} {one if count == 1 else many or one + 's'} ({size_bytes / 1e6:.0f} MB)"


def _spread(values: Sequence[float]) -> str:
    return f"**{median(values):.2f}** ({min(values):.2f}–{max(values):.2f})"


def _cell(text: str) -> str:
    """Return a text that stays in its cell, and names no folder of one machine."""
    plain = re.sub(r"/\S*?/ckpt-\w+/run-\w+/scratch", ".", text)
    plain = plain.replace("|", "/").replace("<", "(").replace(">", ")")
    return plain if len(plain) <= 160 else f"{plain[:159]}…"
