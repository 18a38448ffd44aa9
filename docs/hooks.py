"""Put into the pages of the site what stands elsewhere: files of the repository, the command line, the public names.

    format.md, architecture.md ──▶ the file that the page links to, its links led into the site
    <!-- commands -->          ──▶ each command with its arguments and options, as the code has them
    <!-- names: room, … -->    ──▶ the public names of these rooms, for mkdocstrings; `*`: of all that no other names

MkDocs calls `on_page_markdown`. Nothing is written, so nothing of it can grow old.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Literal, Protocol, Self, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

import cloudckpt
from cloudckpt.cli import app

ROOT = Path(__file__).resolve().parent.parent
# Page of the site → the file that is shown there.
SHOWN = {
    "format.md": "cloudckpt/format/FORMAT.md",
    "architecture.md": "ARCHITECTURE.md",
    "security.md": "SECURITY.md",
}

_LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(#[^)\s]*)?\)")
_NAMES = re.compile(r"^<!-- names: (.*) -->$", re.MULTILINE)
_COMMANDS = "<!-- commands -->"


class _File(Protocol):
    src_uri: str


class _Page(Protocol):
    file: _File


def on_page_markdown(markdown: str, *, page: _Page, **_: object) -> str:
    """Return what MkDocs is to make of a page."""
    return completed(markdown, page.file.src_uri)


def completed(markdown: str, page: str) -> str:
    """Return a page with all that it shows.

    Args:
        markdown: of the page.
        page: below `docs/`.
    """
    source = SHOWN.get(page, f"docs/{page}")
    text = (ROOT / source).read_text(encoding="utf-8") if page in SHOWN else markdown
    text = _LINK.sub(lambda found: f"]({_led(found[1], source)}{found[2] or ''})", text)
    rooms = [room for one in _NAMES.findall(text) for room in one.split(", ")]
    text = _NAMES.sub(lambda found: "\n\n".join(f"::: cloudckpt.{name}" for name in _names(found[1], rooms)), text)
    return text.replace(_COMMANDS, "\n".join(_commands())) if _COMMANDS in text else text


def _led(target: str, source: str) -> str:
    """Return where a link of a file of the repository leads in the site, as seen from a page of it."""
    path = os.path.normpath(PurePosixPath(source).parent / target)
    shown = next((page for page, file in SHOWN.items() if file == path), None)
    return shown or (path.removeprefix("docs/") if path.startswith("docs/") else target)


# -- public names ------------------------------------------------------------------------------------------------------


def _names(wanted: str, rooms: list[str]) -> list[str]:
    """Return the public names of some rooms, in the order of the rooms."""
    by_room: dict[str, list[str]] = {}
    for name in cloudckpt.__all__:
        by_room.setdefault(getattr(cloudckpt, name).__module__.split(".")[1], []).append(name)
    chosen = [room for room in by_room if room not in rooms] if wanted == "*" else wanted.split(", ")
    return [name for room in chosen for name in by_room.get(room, [])]


# -- the command line --------------------------------------------------------------------------------------------------

_SHARED = "Shared"


def _commands() -> Iterator[str]:
    """Yield a section for each command, and one for the options that they share."""
    shared: dict[str, str] = {}
    for one in sorted(app.registered_commands, key=lambda one: str(one.name)):
        parameters = inspect.signature(one.callback or (lambda: None)).parameters.values()
        told = [_Told.of(parameter) for parameter in parameters]
        arguments = [each.words for each in told if each.is_argument]
        yield f"### {one.name}\n\n`{' '.join(['cloudckpt', str(one.name), *arguments, '[OPTIONS]'])}`\n"
        yield f"{inspect.getdoc(one.callback)}\n"
        yield from (each.line for each in told if each.panel != _SHARED)
        yield ""
        for each in told:
            if each.panel == _SHARED:
                # A command that has a use of its own for a short name has the long one alone.
                shared.setdefault(each.words.split()[0].rstrip(","), each.line)
    yield "### Options of all commands that open a store\n"
    yield from shared.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """An argument or an option: how it is written, and what is said of it."""

    words: str
    line: str
    panel: str | None
    is_argument: bool

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Self:
        """Read what typer reads."""
        kind, info = get_args(parameter.annotation)
        is_argument = isinstance(info, ArgumentInfo)
        words = info.metavar or parameter.name.upper() if is_argument else _option(parameter.name, kind, info)
        notes = []
        if parameter.default is inspect.Parameter.empty and not is_argument:
            notes.append("required")
        elif parameter.default not in (inspect.Parameter.empty, None, "", False):
            notes.append(f"default `{parameter.default}`")
        line = f"- `{words}`: {info.help}{f' ({notes[0]})' if notes else ''}"
        return cls(words=words, line=line, panel=info.rich_help_panel, is_argument=is_argument)


def _option(name: str, kind: object, info: OptionInfo) -> str:
    """Return an option as it is written: its names, and what stands behind them."""
    # Inside of `Annotated` the first name stands where a default would.
    given = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    names = ", ".join(given or [f"--{name.replace('_', '-')}"])
    if kind is bool:
        return names
    plain = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    choices = [str(one) for one in get_args(plain[0])] if get_origin(plain[0]) is Literal else []
    return f"{names} {info.metavar or '|'.join(choices) or _VALUES.get(plain[0], 'TEXT')}"


_VALUES: dict[object, str] = {int: "N", float: "NUMBER"}
