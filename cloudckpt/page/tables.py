"""Write tables, whose cells say by what they are sorted. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cloudckpt.page.markup import Html, tag
from cloudckpt.page.words import span, utc

__all__ = [
    "long_cell",
    "moment",
    "number_cell",
    "pairs",
    "seconds_cell",
    "table_of",
    "time_cell",
    "words_cell",
]


def table_of(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Html]], *, is_sortable: bool = False) -> Html:
    """Return a table; columns are names, and whether they are set to the right and sorted as numbers."""
    heads = [tag("th", name, scope="col", class_="number" if is_number else None) for name, is_number in columns]
    body = [tag("tr", *cells) for cells in rows]
    kind = "sortable" if is_sortable else None
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body), class_=kind)
    return tag("div", table, class_="scroll")


def pairs(rows: Sequence[tuple[str, str]]) -> Html:
    """Return a table of names and what is said of them."""
    cells = [tag("tr", tag("th", name, scope="row"), tag("td", value, class_="long")) for name, value in rows]
    return tag("div", tag("table", tag("tbody", *cells)), class_="scroll")


def words_cell(text: str) -> Html:
    """Return a cell of words."""
    return tag("td", text)


def long_cell(text: str, *, class_: str = "") -> Html:
    """Return a cell of words that may be broken."""
    return tag("td", text, class_=f"long {class_}".rstrip())


def number_cell(value: float | None, words: str) -> Html:
    """Return a cell to be sorted by a number; one that is not known comes last."""
    # As the script reads numbers.
    shown = "" if value is None else repr(value).replace("inf", "Infinity")
    return tag("td", words, class_="number", data_value=shown)


def seconds_cell(value: float | None) -> Html:
    """Return a cell of a time span."""
    return number_cell(value, span(value))


def moment(at: datetime) -> Html:
    """Return a time in UTC, which the page's script turns into that of the reader."""
    return tag("time", utc(at), datetime=at.isoformat(timespec="seconds"), data_time=at.isoformat(timespec="seconds"))


def time_cell(at: datetime | None) -> Html:
    """Return a cell of a time."""
    return words_cell("not known") if at is None else tag("td", moment(at), data_value=at.isoformat())
