"""Split a URL into folder and file, look at what a folder holds, say what an interrupt left: for both directions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cloudckpt.errors import OptionsError
from cloudckpt.store import Store

__all__ = ["folder_and_name", "objects_in", "telling_interrupts"]


def folder_and_name(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the URL of the folder that a file is in, and the file's name.

    Raises:
        OptionsError: the URL names no file.
    """
    text = os.fspath(url)
    folder, slash, name = text.rpartition("/")
    if not name or name in (".", "..") or (slash and folder.endswith(":/")):
        raise OptionsError(f"{text!r} names no file; give a path, or a URL such as s3://bucket/folder/file")
    return (folder or "/") if slash else ".", name


def objects_in(store: Store, beginning: str = "") -> dict[str, int]:
    """Return name → size in bytes of what lies in a folder itself, not below it; of names that begin so."""
    found: dict[str, int] = {}
    mark = ""
    while True:
        page = store.list(beginning, delimiter="/", mark=mark)
        found |= {info.key: info.size_bytes for info in page.objects}
        if not (mark := page.mark):
            return found


@contextmanager
def telling_interrupts() -> Iterator[None]:
    """Say of a Ctrl-C that nothing was written yet, unless it has a note of what was."""
    try:
        yield
    except KeyboardInterrupt as exc:
        if not getattr(exc, "__notes__", ()):
            exc.add_note("nothing was written")
        raise
