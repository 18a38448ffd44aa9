"""The store seam: object verbs over one root, and the words that they answer with.

A store knows keys and bytes; it knows nothing of tensors, steps, ranks or manifests. Every backend is
thread-safe, makes exactly one request per verb and item (retries belong to `retrying`, alone), and raises
only errors of `cloudckpt.errors`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from cloudckpt.errors import OptionsError
from cloudckpt.keys import shown
from cloudckpt.store.intake import Intake

__all__ = ["Listing", "ObjectInfo", "Store", "check_delimiter", "check_key", "is_key"]

_KEY_BYTES = 900
_BAD_SEGMENT = re.compile(r"\A\.{0,2}\Z")
# A backslash is a separator to some stores, a lone surrogate how Python shows a name on a disk that is no text.
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object: its key below the root, its size, and when the store last wrote it.

    Attributes:
        modified_s: seconds since 1970, by the store's own clock.
    """

    key: str
    size_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A listing, or one page of it, each part sorted by key.

    Attributes:
        objects: the objects whose key starts with the prefix (with a delimiter: and has no further one).
        prefixes: with a delimiter, the common prefixes, each ending with the delimiter.
        mark: where the next page begins; "" if this is the last one.
    """

    objects: Sequence[ObjectInfo] = field(default_factory=tuple)
    prefixes: Sequence[str] = field(default_factory=tuple)
    mark: str = ""

    @classmethod
    def of_pages(cls, pages: Sequence[Listing]) -> Listing:
        """Return the pages of one listing as a whole."""
        if len(pages) == 1:
            return pages[0]
        objects = {info.key: info for page in pages for info in page.objects}
        prefixes = {prefix for page in pages for prefix in page.prefixes}
        return cls(objects=tuple(objects[key] for key in sorted(objects)), prefixes=tuple(sorted(prefixes)))


@runtime_checkable
class Store(Protocol):
    """Objects below one root URL. Keys are relative to it, `/`-separated, and pass `check_key`."""

    @property
    def url(self) -> str:
        """The root, with its scheme and without credentials or a trailing slash."""

    @property
    def engine(self) -> str:
        """What moves the bytes: `local`, `obstore` or `fsspec`."""

    @property
    def endpoint(self) -> str:
        """The server that the options name (scheme, host, port, path), or "" for the scheme's own; no credentials."""

    @property
    def is_create_atomic(self) -> bool:
        """Whether `create` stays exclusive when two processes race; if not, only `single_writer` may use it."""

    def put(self, key: str, buffers: Sequence[memoryview]) -> None:
        """Write one object whole, as the concatenation of `buffers`, in one request.

        The buffers (C-contiguous, bytes) are the caller's and must not change until this returns. On return
        the object is durable. If this raises, no reader sees a part of it (a whole object may be there).
        """

    def create(self, key: str, data: bytes) -> None:
        """Write one small object if the key is free, in one request.

        Raises:
            ObjectExistsError: the key is taken; the object there, perhaps our own of a lost reply, is unchanged.
            TransientError: unknown whether it landed.
        """

    def get(self, key: str, *, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        """Read the bytes [start, stop) in one request; exactly so many, never fewer.

        `into` (writable, `stop - start` bytes) is filled and returned; without it, new memory is. After an error it
        may hold anything.

        Raises:
            ObjectNotFoundError: no such object.
            TransientError: fewer or more bytes came than were asked for.
        """

    def stream(self, key: str, *, start: int, stop: int, into: Intake) -> None:
        """Read the bytes [start, stop) in one request, handing them on as they come, in order; exactly so many.

        Raises:
            ObjectNotFoundError: no such object.
            TransientError: fewer or more bytes came than were asked for. `into` may have taken some in each case.
            IntakeError: of `into`, passed on.
        """

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        """Read one small object whole, in one request.

        Raises:
            ObjectNotFoundError: no such object.
            StorageError: it is larger than `limit_bytes`; no more than that was held in memory.
        """

    def head(self, key: str) -> ObjectInfo:
        """Describe one object, or raise `ObjectNotFoundError`. Never cached."""

    def list(self, prefix: str = "", *, delimiter: str = "", mark: str = "") -> Listing:
        """List what starts with `prefix` (a plain string prefix, usually ending in `/`), in one request. Never cached.

        Returns the page that begins at `mark`, the first one if that is ""; its own mark leads to the next one. A store
        may return all at once. An empty page without a mark means that there is nothing more; a listing that fails
        raises.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects, in bulk where the store can; a key that is absent counts as deleted.

        Raises:
            StorageError: at least one is still there; the message names the first and their count, and `left_keys`
                all of them, where that is known.
        """

    def refresh(self) -> None:
        """Forget credentials and connections, so that the next request resolves them anew."""

    def close(self) -> None:
        """Release connections and threads. Idempotent; no verb may follow."""


def check_key(key: str) -> str:
    """Return `key` if a store may use it; refuse what could leave the root or mean two things."""
    if not key:
        raise OptionsError("an object key is empty")
    if (size_bytes := len(key.encode("utf-8", "surrogatepass"))) > _KEY_BYTES:
        raise OptionsError(f"object key {shown(key)} has {size_bytes} bytes; choose one of at most {_KEY_BYTES}")
    if refused := _REFUSED.search(key):
        raise OptionsError(
            f"object key {shown(key)} has {refused.group()!r}, which stores refuse or do not all read alike; choose "
            "one without it"
        )
    if any(_BAD_SEGMENT.match(segment) for segment in key.split("/")):
        raise OptionsError(f"object key {shown(key)} has an empty, '.' or '..' segment")
    return key


def is_key(name: str) -> bool:
    """Tell whether a name can be a key; others are foreign, made by other tools, and never listed."""
    try:
        check_key(name)
    except OptionsError:
        return False
    return True


def check_delimiter(delimiter: str) -> None:
    """Refuse to split keys anywhere else than where they have segments."""
    if delimiter not in ("", "/"):
        raise OptionsError(f"delimiter {delimiter!r} is unknown to a store; give '/' or none")
