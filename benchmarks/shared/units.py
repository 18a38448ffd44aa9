"""Turn sizes as people write them into bytes, and measured numbers into cells of a table."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*\Z")


def parse_bytes(text: str) -> int:
    """Read a size such as `2GiB`, `64MiB`, `1.5GB` or `4096`.

    Raises:
        ValueError: not a number with one of those units.
    """
    match = _SIZE.match(text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 2GiB, 64MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """Write a size in the largest binary unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
