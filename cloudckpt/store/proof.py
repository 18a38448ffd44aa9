"""Tell a store's own answer from whatever else says 200: a login page, a proxy, a server on another port.

An answer is believed for what only a store puts into it: the root of a document, an object's ETag or generation. Where
that is not enough, the object itself is looked at. A listing must be an answer to the question: a proxy may drop what
the question was, or have kept the answer to another one. Knows no engine; any thread may enter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TypeVar

from cloudckpt.options import MIB
from cloudckpt.store.facts import GarbledReplyError

__all__ = [
    "LISTING",
    "PROVEN_BYTES",
    "check_created",
    "check_document",
    "check_generation",
    "check_listed",
    "check_listing",
    "check_object",
    "check_stored",
    "is_document",
]

T = TypeVar("T")

PROVEN_BYTES = MIB
"""Up to this size the answer to a put proves it; what a larger one takes to digest (1.6 ms a MiB) would be missed."""
LISTING = "ListBucketResult"
"""The root of S3's listings."""

# S3's own and nearly every look-alike's; web servers make theirs of times and sizes, or mark them as weak.
_ETAG = re.compile(r'\A"?([0-9a-fA-F]{32})(-\d+)?"?\Z')
_ROOT = re.compile(
    rb"\A(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*<(?:[\w.-]+:)?([\w.-]+)[\s/>]", re.DOTALL
)
# No `<` stands in a key's text.
_INNER_ERROR = re.compile(rb"<(?:[\w.-]+:)?Error[\s/>]")
# Of access points, as buckets are named.
_ALIASES = ("-s3alias", "--ol-s3", "--xa-s3")
_PAGES = frozenset({"text/html", "application/xhtml+xml"})


def is_document(body: bytes, name: str) -> bool:
    """Tell whether `body` is XML whose root is `name`, in whatever namespace."""
    root = _ROOT.match(body)
    return root is not None and root[1] == name.encode()


def check_document(body: bytes, name: str, *, status: int) -> None:
    """Refuse what is no answer that is `name`: what a parser makes of anything else is an answer without content.

    One of a status other than 200 is a proxy's own, or tells of what is still to be done.
    """
    if not is_document(body, name):
        raise GarbledReplyError(f"the reply is no {name}")
    if status != HTTPStatus.OK:
        raise GarbledReplyError(f"the reply is a {name} of status {status}")
    if name == LISTING and _INNER_ERROR.search(body):
        raise GarbledReplyError(f"an error stands in the {name}")


def check_listing(*, bucket: str, name: str | None, entry_count: int, key_count: int, is_last: bool | None) -> None:
    """Refuse a listing of S3's that contradicts itself, or says too little of itself to be taken for an empty one.

    Args:
        bucket: that was asked for.
        name: of the bucket that is listed, by the document.
        entry_count: how many names and prefixes are in it.
        key_count: how many there should be, by the document; 0 if it does not say.
        is_last: whether this is all, by the document; None if it does not say.
    """
    if name is not None and name != bucket and not _is_alias(bucket, name):
        raise GarbledReplyError(f"the reply is a listing of bucket {name!r} in place of {bucket!r}")
    # Not every store counts prefixes.
    if key_count > entry_count:
        raise GarbledReplyError(f"the listing says that it has {key_count} entries, and has {entry_count}")
    if not entry_count and (name is None or is_last is None):
        raise GarbledReplyError("the listing is empty, and says neither of which bucket it is nor that this is all")


def _is_alias(bucket: str, name: str) -> bool:
    """Tell whether a bucket may be known by `name` inside the store: access points are, and a tenant's bucket."""
    return bucket.startswith("arn:") or bucket.endswith(_ALIASES) or bucket.rpartition(":")[2] == name


def check_listed(names: Iterable[str], prefixes: Iterable[str], *, prefix: str, delimiter: str) -> None:
    """Refuse a page of a listing that holds anything that was not asked for: what is missing from it cannot be told.

    Each name starts with `prefix`, and goes on beyond no `delimiter`; each of `prefixes` ends with the first one.
    """
    start = len(prefix)

    def is_asked(name: str) -> bool:
        # The last letter does not count: other tools mark a directory by an object of its name and the delimiter.
        return name.startswith(prefix) and not (delimiter and delimiter in name[start:-1])

    is_answer = all(map(is_asked, names)) and all(
        delimiter and is_asked(name) and name.endswith(delimiter) and len(name) > start for name in prefixes
    )
    if not is_answer:
        raise GarbledReplyError("the reply lists what was not asked for: a proxy or a cache has dropped the query")


def check_object(proof: str | None, content_type: str | None) -> None:
    """Refuse a reply that is no object's: `proof` is its ETag, or its generation on GCS, and none of ours is a page."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if not proof or kind in _PAGES:
        raise GarbledReplyError("the reply is a page of the web" if kind in _PAGES else "the reply is no object")


def check_generation(generation: object) -> None:
    """Refuse a reply without the number that GCS gives to each object that it stores."""
    if not str(generation).isdecimal():
        raise GarbledReplyError("the reply does not say what was stored")


def check_stored(etag: str | None, buffers: Sequence[memoryview], look: Callable[[], tuple[str | None, int]]) -> None:
    """Refuse a reply to a put that does not say that what stands in `buffers` was stored.

    An ETag that is not their digest counts if the object that stands there, whose ETag and size `look` returns, has it.
    Of a large object one that looks like a digest is believed for now: whoever commits looks at all of them at once.
    """
    found, size_bytes = _ETAG.match(etag or ""), sum(buffer.nbytes for buffer in buffers)
    is_likely = found is not None and (size_bytes > PROVEN_BYTES or _is_digest(found, buffers))
    if not etag or not (is_likely or _attempted(look) == (etag, size_bytes)):
        raise GarbledReplyError("the reply does not say what was stored")


def check_created(etag: str | None, data: bytes, look: Callable[[], bytes]) -> None:
    """Refuse a reply to a create that does not prove that `data` was stored; `look` returns what stands there."""
    found = _ETAG.match(etag or "")
    # Another one is no lie yet: that of an object that the store encrypts is no digest of our bytes.
    is_proven = found is not None and _is_digest(found, [memoryview(data)])
    if not is_proven and (not etag or _attempted(look) != data):
        raise GarbledReplyError("the reply does not say what was stored")


def _is_digest(etag: re.Match[str], buffers: Sequence[memoryview]) -> bool:
    digest = hashlib.md5(usedforsecurity=False)
    for buffer in buffers:
        digest.update(buffer)
    return etag[2] is None and etag[1].lower() == digest.hexdigest()


def _attempted(look: Callable[[], T]) -> T | None:
    # What went wrong with a second look is no answer to the first request, and must not be its cause.
    try:
        return look()
    except Exception:  # noqa: BLE001 - nothing is proven, and that is raised
        return None
