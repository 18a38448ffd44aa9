"""Carry verbs to any other filesystem of fsspec, by its generic calls.

What such a filesystem does beneath one call is its own affair: it may retry, and may write in place, so that a
reader sees a part of an object that is being written. A synchronous one keeps its own time limits. See `wire` for
the asynchronous ones.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import fsspec.core

from cloudckpt.errors import OptionsError
from cloudckpt.options import MIB
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_end, check_limit
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.facts import AbsentError, BodyLengthError, ForbiddenError
from cloudckpt.store.intake import Flow, Intake
from cloudckpt.store.redact import hide
from cloudckpt.store.wire import OnLoop, Page, own_options

__all__ = ["AnyWire"]

# Filesystems with real directories, which a write must make; elsewhere that could make a bucket.
_WITH_DIRECTORIES = frozenset({"file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webdav"})
# Makes a check and the write after it one step within this process, which is all there is of a memory:// store.
_create_lock = threading.RLock()
os.register_at_fork(
    before=_create_lock.acquire, after_in_parent=_create_lock.release, after_in_child=_create_lock.release
)
# Its bytes come as a whole, so that a long range is asked for piece by piece.
_STEP_BYTES = 4 * MIB
_TIME_FIELDS = ("mtime", "modified", "last_modified", "LastModified", "updated", "created")


class AnyWire:
    """One root of one filesystem, whose objects are files: what it calls absent or forbidden is an object."""

    credential_kind: CredentialKind = "temporary"

    def __init__(self, scheme: str, bucket: str, options: Mapping[str, object]) -> None:
        url = f"{scheme}://{bucket}/"  # without the slash, file:// is the working directory
        try:
            self._fs, root = fsspec.core.url_to_fs(
                url, **own_options(options, ()), skip_instance_cache=True, use_listings_cache=False
            )
        except (ValueError, ImportError) as exc:
            # Not chained: what it says may repeat an option.
            raise OptionsError(f"fsspec cannot open {scheme}:// URLs here: {hide(str(exc))}") from None
        self._root = root.rstrip("/") + "/"
        self._loop = OnLoop() if self._fs.async_impl else None
        self._makes_directories = scheme in _WITH_DIRECTORIES

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        self._write(name, b"".join(buffers))

    def create(self, name: str, data: bytes) -> None:
        with _create_lock:
            with suppress(AbsentError):
                self.head(name)
                raise FileExistsError(name)
            self._write(name, data)

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        flow = Flow(into, stop - start)
        for at in range(start, stop, _STEP_BYTES):
            end = min(at + _STEP_BYTES, stop)
            data = self._call("cat_file", self._root + name, start=at, end=end)
            if len(data) != end - at:
                check_end(self.head(name).size_bytes, start, stop)
                raise BodyLengthError(len(data), end - at)
            flow.take(data)

    def read(self, name: str, limit_bytes: int) -> bytes:
        data: bytes = self._call("cat_file", self._root + name, start=0, end=limit_bytes + 1)
        check_limit(len(data), limit_bytes)
        return data

    def head(self, name: str) -> ObjectInfo:
        info = self._call("info", self._root + name)
        if info["type"] != "file":
            raise AbsentError(name)
        return self._described(info)

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        """List everything at once: the generic calls have no pages."""
        directory = self._root + prefix.rpartition("/")[0]
        self._fs.invalidate_cache()
        try:
            entries = self._entries(directory, delimiter)
        except (AbsentError, NotADirectoryError):
            entries = []
        objects = [self._described(entry) for entry in entries if entry["type"] == "file"]
        directories = [self._name(entry) + "/" for entry in entries if entry["type"] == "directory"]
        return Page(
            objects=[info for info in objects if info.key.startswith(prefix)],
            prefixes=[name for name in directories if name.startswith(prefix) and name != prefix],
            mark="",
        )

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        failed: dict[str, str | Exception] = {}
        for name in names:
            try:
                self._call("rm_file", self._root + name)
            except AbsentError:
                continue
            except Exception as exc:  # noqa: BLE001 - the others are deleted all the same, and this is handed back
                failed[name] = exc
        return failed

    def close(self) -> None:
        """Do nothing: fsspec's generic filesystems have no close."""

    def _call(self, name: str, *positional: object, **named: object) -> Any:  # noqa: ANN401 - untyped below
        try:
            if self._loop is None:
                return getattr(self._fs, name)(*positional, **named)
            return self._loop.run(getattr(self._fs, f"_{name}")(*positional, **named))
        except FileNotFoundError as exc:
            raise _told(exc, AbsentError, positional[0]) from exc
        except PermissionError as exc:
            raise _told(exc, ForbiddenError, positional[0]) from exc

    def _write(self, name: str, data: bytes) -> None:
        path = self._root + name
        try:
            self._call("pipe_file", path, data)
        except AbsentError:
            if not self._makes_directories:
                raise
            self._call("makedirs", path.rpartition("/")[0], exist_ok=True)
            self._call("pipe_file", path, data)

    def _entries(self, directory: str, delimiter: str) -> list[dict[str, Any]]:
        if delimiter:
            return list(self._call("ls", directory, detail=True))
        return list(self._call("find", directory, detail=True).values())

    def _name(self, info: Mapping[str, Any]) -> str:
        path: str = self._fs._strip_protocol(info["name"])  # noqa: SLF001 - listings differ in what they strip
        return path.removeprefix(self._root).rstrip("/")

    def _described(self, info: Mapping[str, Any]) -> ObjectInfo:
        return ObjectInfo(key=self._name(info), size_bytes=int(info["size"]), modified_s=_modified_s(info))


def _told(exc: OSError, kind: type[OSError], path: object) -> OSError:
    """Return the error as one of an object, unless it names another file, such as one with a key."""
    named = str(exc.filename or "").strip("/")
    return kind(*exc.args) if str(path).strip("/").endswith(named) else exc


def _modified_s(info: Mapping[str, Any]) -> float:
    for field in _TIME_FIELDS:
        moment = info.get(field)
        if isinstance(moment, datetime):
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if isinstance(moment, int | float):
            return float(moment)
    return time.time()  # a store that does not say: as young as can be, so that nothing is taken for old
