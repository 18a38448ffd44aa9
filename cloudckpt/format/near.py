"""Say which names are near one that is not there: what a person may have meant.

Names are looked at step by step from the top down, because a checkpoint may have hundreds of thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["told_near"]

_COUNT = 3
_LIKENESS = 0.6
_SHOWN = 8


def _near(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three of `names`, or of what stands above them, that are spelled much like `name`, best first."""
    left = list(dict.fromkeys(names))
    prefix = ""
    for step in name.split("."):
        children = {one[len(prefix) :].partition(".")[0]: None for one in left}
        if step not in children:
            rest = name[len(prefix) + len(step) :]
            found = [prefix + child for child in get_close_matches(step, children, _COUNT, _LIKENESS)]
            whole = [one + rest for one in found if any(_is_below(here, one + rest) for here in left)]
            return whole or found
        prefix += f"{step}."
        left = [one for one in left if one.startswith(prefix)]
    return []


def told_near(name: str, names: Iterable[str]) -> str:
    """Return what an error says of a name that is not there: what is near it, and what there is."""
    there = sorted(names)
    found = _near(name, there)
    meant = f"; near it: {', '.join(found)}" if found else ""
    return f"{meant}; it holds {', '.join(there[:_SHOWN])}{', …' if len(there) > _SHOWN else ''}"


def _is_below(name: str, above: str) -> bool:
    return name == above or name.startswith(f"{above}.")
