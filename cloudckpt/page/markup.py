"""Write HTML and SVG in which no text of anybody's can be anything but text.

    tag("td", text, class_="number") ──▶ Html      every str is escaped; only what `tag` has made is not

Pure functions. Characters that steer a terminal or turn the direction of text round are shown as escapes.
"""

from __future__ import annotations

import html

from cloudckpt.report import plain

__all__ = ["Child", "Html", "joined", "raw", "tag"]

_VOID = {"meta", "link", "circle", "rect", "line", "path", "polyline"}


class Html(str):
    """Markup that is safe as it is."""

    __slots__ = ()


Child = str | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: what it holds; None is nothing.
        attributes: `class_` for class, `stroke_width` for stroke-width; None leaves one out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_shown(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Html(f"<{name}{told}/>")
    return Html(f"<{name}{told}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Html:
    """Return several children as one."""
    return Html("".join(one if isinstance(one, Html) else _escaped(one) for one in children if one is not None))


def raw(text: str) -> Html:
    """Take a text of our own for markup: a style or a script of this package."""
    return Html(text)


def _shown(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return html.escape(plain(text))
