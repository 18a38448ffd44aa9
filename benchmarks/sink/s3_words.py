"""Turn HTTP requests into the names of S3 operations, and S3's answers into XML and headers.

Pure values: no sockets, no memory of objects, no threads.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from itertools import islice
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from benchmarks.sink.arena import Extent
from benchmarks.sink.wire import Answer, Request

__all__ = [
    "Body",
    "RefusalError",
    "error",
    "is_create_only",
    "list_page",
    "names_in",
    "operation_of",
    "range_of",
    "texts_of",
    "xml",
]

_PAGE_KEYS = 1000
_RANGE = re.compile(r"bytes=(\d*)-(\d*)\Z")
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_PLAIN_OPERATIONS = {
    ("PUT", True): "PutObject",
    ("GET", True): "GetObject",
    ("HEAD", True): "HeadObject",
    ("DELETE", True): "DeleteObject",
    ("HEAD", False): "HeadBucket",
    ("PUT", False): "CreateBucket",
}
_UPLOAD_OPERATIONS = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
_SUBRESOURCES = {"x-id"}


class RefusalError(Exception):
    """An answer that ends a request early."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """One stored object, or one part of an upload: where its bytes are, and what a store tells about it.

    Attributes:
        offset_bytes: how many bytes stand before its own in the extents.
    """

    extents: list[Extent]
    size_bytes: int
    etag: str
    modified_s: float
    offset_bytes: int = 0

    @property
    def generation(self) -> str:
        """GCS's number of what is stored."""
        return str(int(self.etag, 16))

    @property
    def etag_xml(self) -> str:
        """The ETag as an element."""
        return f"<ETag>&quot;{self.etag}&quot;</ETag>"

    @property
    def modified_xml(self) -> str:
        """The time of the last change as an element."""
        return time.strftime("<LastModified>%Y-%m-%dT%H:%M:%S.000Z</LastModified>", time.gmtime(self.modified_s))

    @property
    def headers(self) -> dict[str, str]:
        """What a get or a head answers beside the length."""
        return {
            "ETag": f'"{self.etag}"',
            "X-Goog-Generation": self.generation,
            "Last-Modified": formatdate(self.modified_s, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }


def operation_of(request: Request) -> str:
    """Name the S3 operation that a request asks for, or `Other`."""
    query = request.query
    if "uploadId" in query:
        return _UPLOAD_OPERATIONS.get(request.method, "Other")
    if request.method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "DeleteObjects" if "delete" in query else "Other"
    if query.get("list-type") == "2":
        return "ListObjectsV2"
    if any(name not in _SUBRESOURCES and not name.startswith("X-Amz-") for name in query):  # those sign a URL
        return "Other"
    if "x-amz-copy-source" in request.headers:
        return "CopyObject"
    has_key = bool(request.path.strip("/").partition("/")[2])
    return _PLAIN_OPERATIONS.get((request.method, has_key), "Other")


def range_of(header: str | None, size_bytes: int) -> tuple[int, int]:
    """Return the bytes [start, stop) that a `Range` header asks for; all of them without one.

    Raises:
        RefusalError: the range holds no byte of the object.
    """
    match = _RANGE.match(header or "")
    if not match or match.groups() == ("", ""):
        return 0, size_bytes
    first, last = match.groups()
    start = int(first) if first else max(0, size_bytes - int(last))
    stop = min(size_bytes, int(last) + 1) if first and last else size_bytes
    if start >= stop:
        raise RefusalError(416, "InvalidRange")
    return start, stop


def list_page(keys: Sequence[str], find: Callable[[str], Body | None], bucket: str, query: Mapping[str, str]) -> str:
    """Write one page of ListObjectsV2 over the sorted keys of a bucket; what `find` does not find has just gone."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after", "")
    limit = min(int(query.get("max-keys", _PAGE_KEYS)), _PAGE_KEYS)
    found = islice(names_in(keys, find, prefix, delimiter, after), limit + 1)
    page = list(found)
    is_cut, page = len(page) > limit, page[:limit]
    is_url = query.get("encoding-type") == "url"
    encode = quote if is_url else escape
    parts = [
        f"<Name>{bucket}</Name><Prefix>{encode(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys>",
        f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(is_cut).lower()}</IsTruncated>",
        "<EncodingType>url</EncodingType>" if is_url else "",
        f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if is_cut else "",
        *(_list_entry(encode(name), body) for name, body in page),
    ]
    return f"<ListBucketResult>{''.join(parts)}</ListBucketResult>"


def names_in(
    keys: Sequence[str], find: Callable[[str], Body | None], prefix: str, delimiter: str, after: str
) -> Iterator[tuple[str, Body | None]]:
    """Yield keys, and common prefixes once, in order; a page costs what is on it, however many keys there are."""
    at = bisect_left(keys, max(prefix, after))
    while at < len(keys) and (key := keys[at]).startswith(prefix):
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut < 0:
            if key > after and (body := find(key)) is not None:
                yield key, body
            at += 1
            continue
        group = key[: cut + len(delimiter)]
        if group > after:
            yield group, None
        at = bisect_left(keys, group[:-1] + chr(ord(group[-1]) + 1), at)


def _list_entry(name: str, body: Body | None) -> str:
    if body is None:
        return f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"
    return (
        f"<Contents><Key>{name}</Key>{body.modified_xml}{body.etag_xml}"
        f"<Size>{body.size_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def texts_of(document: bytes, name: str) -> list[str]:
    """Return the texts of all elements of that name, whatever their namespace."""
    nodes = ElementTree.fromstring(document).iter()
    return [node.text or "" for node in nodes if node.tag.rpartition("}")[2] == name]


def is_create_only(request: Request) -> bool:
    """Tell whether the request may only make a key that is free."""
    return request.headers.get("if-none-match") == "*" or request.query.get("ifGenerationMatch") == "0"


def xml(text: str, status: int = 200) -> Answer:
    """Answer with an XML document."""
    return Answer(status=status, headers={"Content-Type": "application/xml"}, body=(_XML + text).encode())


def error(status: int, code: str) -> Answer:
    """Answer with S3's error document."""
    return xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)
