"""Say what an export will be before its first byte is written: what goes, which files, and who writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Plan", "Taken"]


@dataclass(frozen=True, slots=True)
class Taken:
    """What of a checkpoint goes into an export.

    Attributes:
        tensors: name in the export → name in the checkpoint.
        values: name in the checkpoint → value.
        left_out: name in the checkpoint → why.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an export writes, known before the first byte.

    Attributes:
        taken: what of the checkpoint goes.
        files: names of the files, the one that makes the export complete last. Of several large ones all have the tag
            of the export's hold in their names.
        deciding: names of all files that would make a folder an export of this kind.
        ours: what the names of files of this kind look like; none may be left of another export.
        beginning: of all these names; "" where the folder is the export.
        write: writes them, in order.
    """

    taken: Taken
    files: tuple[str, ...]
    write: Callable[[], None]
    deciding: frozenset[str] = frozenset()
    ours: re.Pattern[str] = re.compile(r"(?!)")
    beginning: str = ""
