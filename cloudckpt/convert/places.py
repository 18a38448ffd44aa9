"""Split a URL into folder and file, look at what a folder holds, refuse what is ours, say what an interrupt left.

For all that reads or writes files of other programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cloudckpt.errors import ObjectNotFoundError, OptionsError
from cloudckpt.format import EPOCHS_PREFIX, MANIFEST_NAME, PINS_PREFIX, is_attempt
from cloudckpt.options import Options
from cloudckpt.root import Catalog, refuse_files
from cloudckpt.store import ObjectInfo, RetryingStore, Store, check_key, local_path, open_store

__all__ = ["LEAVING_S", "folder_and_name", "info_of", "objects_in", "refuse_ours", "telling_interrupts"]

LEAVING_S = 10.0
"""What is under way when one ends early is waited for, and then looked after, no longer than this each: a disk that
hangs must not keep an interrupt from ending."""


def folder_and_name(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the URL of the folder that a file is in, and the file's name.

    Raises:
        OptionsError: the URL names no file, or one whose name not all stores take.
    """
    text = os.fspath(url)
    folder, slash, name = text.rpartition("/")
    if not name or name in (".", "..") or (slash and folder.endswith(":/")):
        raise OptionsError(f"{text!r} names no file; give a path, or a URL such as s3://bucket/folder/file")
    check_key(name)
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


def info_of(store: Store, name: str) -> ObjectInfo | None:
    """Return what a store says of a file; None where there is none."""
    try:
        return store.head(name)
    except ObjectNotFoundError:
        return None


def refuse_ours(
    folder: RetryingStore,
    name: str = "",
    storage_options: Mapping[str, object] | None = None,
    options: Options | None = None,
) -> None:
    """Refuse to write a file of another program where it would take the place of something of ours, or hide in it.

    On a disk links are followed before. Two requests for a folder that is none of ours.

    Args:
        folder: where it is to be written.
        name: of the file; "" for several of other names.
        storage_options: by which `folder` was opened.
        options: likewise.

    Raises:
        OptionsError: the folder is a checkpoint, a root, or of such a one's own ones; or it is a manifest's name.
    """
    if name == MANIFEST_NAME:
        raise OptionsError(
            f"{folder.url}/{name} has the name of a checkpoint's manifest, and was not written; give another one"
        )
    refuse_files(Catalog(folder))
    url = folder.url.rstrip("/")
    places = [url]
    if folder.engine == "local" and (real := os.path.realpath(local_path(url))) != local_path(url):
        places.append(real)
    for place in places:
        parts = place.split("/")
        above = [
            "/".join(parts[:-depth])
            for depth in range(1, len(parts))
            if parts[-depth - 1]  # a bucket has nothing above it
            and (is_attempt(parts[-depth]) or f"{parts[-depth]}/" in (EPOCHS_PREFIX, PINS_PREFIX))
        ]
        for one in [*above, *(place for _ in range(place != url))]:
            with open_store(one, storage_options=storage_options, options=Options.of(options)) as store:
                refuse_files(Catalog(store))


@contextmanager
def telling_interrupts(told: str) -> Iterator[Callable[[str], None]]:
    """Say of a Ctrl-C what is true before anything was done, unless it has a note; yield what says that it changed."""

    def tell(now: str) -> None:
        nonlocal told
        told = now

    try:
        yield tell
    except KeyboardInterrupt as exc:
        if not getattr(exc, "__notes__", ()):
            exc.add_note(told)
        raise
