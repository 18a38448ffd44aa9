"""Turn the records of a run into the page: a table per section, and who lost what.

python -m tests.reliability.page RECORDS PAGE   records of a folder → a Markdown file
"""

from __future__ import annotations

import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.shared.report import versions
from tests.reliability.records import OURS, Cell, Record, added, read_records

__all__ = ["about", "page_of"]

COMMAND = "make reliability"
_USED = ("Python", "torch", "fsspec", "s3fs", "gcsfs", "obstore", "safetensors", "lightning")


def page_of(found: Iterable[Record | Cell], *, machine: str) -> str:
    """Return the page; it depends on nothing but what is given, in whatever order that comes.

    Args:
        machine: with what the run was made, and on what, in one paragraph.
    """
    everything = list(found)
    records = [one for one in everything if isinstance(one, Record)]
    cells = [one for one in everything if isinstance(one, Cell)]
    ours = [record for record in records if record.subject == OURS]
    sections = sorted({one.section for one in everything}, key=lambda section: (section.number, section.title))
    told = (
        f"Written by `{COMMAND}`, not by hand. {sum(record.count for record in ours):,} trials of cloudckpt, in which "
        f"**{sum(record.lost for record in ours):,}** lost a checkpoint that was acknowledged, or gave one back wrong. "
        "Below its rows stand other ways to save, where the same was done to them. What is promised, and what is not: "
        "[Guarantees](guarantees.md). A trial that fails prints what it takes to run it again."
    )
    lines = ["# Nothing is ever lost: the figures", "", told, "", machine]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.about]
        lines += _table([record for record in records if record.section == section])
        lines += _grids([cell for cell in cells if cell.section == section])
    return "\n".join(lines) + "\n"


def about() -> str:
    """Say with what this process runs, and on what, so that nobody's machine is named."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    used = {name: number for name, number in versions().items() if name in _USED and not number.startswith("(")}
    told = ", ".join(f"{name} {number}" for name, number in used.items())
    return f"With {told}, on {platform.system()} with {os.cpu_count()} cores and {memory_gib:.0f} GiB of memory."


def _table(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    order = sorted(records, key=_place)
    lines = ["", "| what was tried | on | trials | lost | what became of them | seconds |", "|---|---|---|---|---|---|"]
    for _, same in groupby(order, _place):
        record = added(same)
        given = "; ".join(f"{name} {value}" for name, value in sorted(record.parameters.items()))
        outcomes = sorted(record.outcomes.items(), key=lambda outcome: (-outcome[1], outcome[0]))
        cells = (
            f"{record.kind} ({given})" if given else record.kind,
            record.subject,
            f"{record.count:,}",
            f"**{record.lost:,}**",
            "; ".join(f"{count:,} {outcome}" for outcome, count in outcomes),
            f"{record.seconds:,.0f}",
        )
        lines.append(f"| {' | '.join(map(_escaped, cells))} |")
    return lines


def _place(record: Record) -> tuple[str, bool, str]:
    return record.kind, record.subject != OURS, record.subject


def _grids(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for table in sorted({cell.table for cell in cells}):
        texts = defaultdict[tuple[str, str], set[str]](set)
        for cell in cells:
            if cell.table == table:
                texts[cell.row, cell.column].add(cell.text)
        columns = sorted({column for _, column in texts})
        lines += [
            "",
            f"### {table}",
            "",
            f"| | {' | '.join(map(_escaped, columns))} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in sorted({row for row, _ in texts}):
            inside = ("; ".join(sorted(texts.get((row, column), {"–"}))) for column in columns)
            lines.append(f"| {' | '.join(map(_escaped, (row, *inside)))} |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(folder: str, page: str) -> None:
    found = list(read_records(Path(folder)))
    if not found:
        raise SystemExit(f"{folder} holds no records: run `{COMMAND}`")
    Path(page).write_text(page_of(found, machine=about()), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
