"""Answer requests for objects as S3 does, as GCS's XML API does, and as GCS's JSON API does, from memory.

Only what the engines send is understood. Knows nothing of sockets; `http_object_server` has them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

__all__ = ["ObjectSpace", "Reply", "Request", "StoredObject", "error_reply", "md5_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client sent; header names are in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes | bytearray = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server says."""

    status: int = 200
    body: bytes | memoryview = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object as the server keeps it."""

    data: bytes | bytearray
    generation: int
    modified_s: float


class ObjectSpace:
    """Buckets and objects, and the answers to requests for them.

    Attributes:
        objects: (bucket, key) → object; tests read and write it around the engines.
        buckets: the buckets that exist.
        page_size: entries per listing page.
        honours_preconditions: whether create-only writes are enforced.
        has_preconditions: whether it knows them at all, or answers 501.
        fail_delete_of: key → error code, told inside a 200 reply to a bulk delete.
        demands_checksum: whether a put without one is refused, as where objects are locked by default.
        demands_condition: whether a put without one is denied, as a bucket's policy may.
        etag_of: what names an object's content; as in S3, the MD5 of its bytes.
        unheard: fields of a listing's query that never arrive, as where a proxy drops them.
        echoes: whether a listing says which question it answers, as that of S3 does.
    """

    def __init__(self, *, buckets: tuple[str, ...] = ("bucket",), page_size: int = 1000) -> None:
        self.objects: dict[tuple[str, str], StoredObject] = {}
        self.buckets = set(buckets)
        self.page_size = page_size
        self.honours_preconditions = True
        self.has_preconditions = True
        self.demands_checksum = False
        self.demands_condition = False
        self.fail_delete_of: dict[str, str] = {}
        self.etag_of: Callable[[StoredObject], str] = md5_of
        self.unheard: frozenset[str] = frozenset()
        self.echoes = True
        self._generation = 0
        self._objects_lock = threading.Lock()

    def put_object(self, key: str, data: bytes | bytearray, *, bucket: str = "bucket") -> StoredObject:
        """Store an object, around the wire."""
        with self._objects_lock:
            return self._store(bucket, key, data)

    def data(self, key: str, *, bucket: str = "bucket") -> bytes:
        """Return an object's bytes, around the wire."""
        return bytes(self.objects[bucket, key].data)

    def keys(self, *, bucket: str = "bucket") -> list[str]:
        """Return the names of all objects, sorted."""
        return sorted(key for owner, key in self.objects if owner == bucket)

    def handle(self, request: Request, *, refused: str = "") -> Reply:
        """Answer one request, with its effect; in a bulk delete the first object stays for the reason `refused`."""
        if request.path.startswith(("/storage/v1/", "/upload/storage/v1/", "/download/storage/v1/")):
            return self._json_dialect(request)
        return self._xml_dialect(request, refused)

    def _store(self, bucket: str, key: str, data: bytes | bytearray) -> StoredObject:
        self._generation += 1
        stored = StoredObject(data=data, generation=self._generation, modified_s=time.time())
        self.objects[bucket, key] = stored
        return stored

    def _xml_dialect(self, request: Request, refused: str) -> Reply:
        bucket, _, key = unquote(request.path).lstrip("/").partition("/")
        if bucket not in self.buckets:
            return error_reply(request, 404, "NoSuchBucket")
        if request.method == "POST" and "delete" in request.query:
            return self._bulk_delete(bucket, request, refused)
        if not key:
            return self._xml_list(bucket, request)
        if request.method == "PUT":
            return self._put(bucket, key, request)
        if request.method == "DELETE":
            found = self.objects.pop((bucket, key), None) is not None
            # S3 answers 204 either way; GCS's XML API answers 404 for a key that is absent
            is_gcs = "authorization" in request.headers and request.headers["authorization"].startswith("Bearer")
            return Reply(status=204) if found or not is_gcs else error_reply(request, 404, "NoSuchKey")
        return self._get(bucket, key, request)

    def _json_dialect(self, request: Request) -> Reply:
        path = request.path.split("/storage/v1/b/", 1)[1]
        bucket, _, rest = path.partition("/o")
        bucket, key = unquote(bucket), unquote(rest.removeprefix("/"))
        if bucket not in self.buckets:
            return error_reply(request, 404, "notFound")
        if request.method == "POST":
            return self._put(bucket, *_uploaded(request))
        return self._json_object(bucket, key, request) if key else self._json_list(bucket, request)

    def _json_object(self, bucket: str, key: str, request: Request) -> Reply:
        found = self.objects.get((bucket, key))
        if found is None:
            return error_reply(request, 404, "notFound")
        if request.query.get("alt") == "media":
            return self._get(bucket, key, request)
        if request.method == "DELETE":
            del self.objects[bucket, key]
            return Reply(status=204)
        return _json_reply(_resource(bucket, key, found))

    def _put(self, bucket: str, key: str, request: Request) -> Reply:
        only_create = (
            request.headers.get("if-none-match") == "*"
            or request.headers.get("x-goog-if-generation-match") == "0"
            or request.query.get("ifGenerationMatch") == "0"
        )
        if refusal := self._refusal(request, only_create):
            return error_reply(request, *refusal)
        if only_create and not self.has_preconditions:
            return error_reply(request, 501, "NotImplemented")
        with self._objects_lock:
            if only_create and self.honours_preconditions and (bucket, key) in self.objects:
                return error_reply(request, 412, "PreconditionFailed")
            stored = self._store(bucket, key, request.body)
        if request.path.startswith("/upload/"):
            return _json_reply(_resource(bucket, key, stored))
        return Reply(headers=self._object_headers(stored))

    def _refusal(self, request: Request, only_create: bool) -> tuple[int, str] | None:
        """Say why a put is refused, whatever its key, if it is."""
        checksums = _checksums(request)
        if (self.demands_checksum and not checksums) or len(checksums) > 1:
            return 400, "InvalidRequest"
        if any(text != _checksum_of(kind, bytes(request.body)) for kind, text in checksums.items()):
            return 400, "BadDigest"
        return (403, "AccessDenied") if self.demands_condition and not only_create else None

    def _get(self, bucket: str, key: str, request: Request) -> Reply:
        stored = self.objects.get((bucket, key))
        if stored is None:
            return error_reply(request, 404, "NoSuchKey")
        headers = self._object_headers(stored)
        wanted = request.headers.get("range")
        if request.method == "HEAD" or wanted is None:
            return Reply(body=memoryview(stored.data), headers=headers)
        size = len(stored.data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if start >= size:
            return error_reply(request, 416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(status=206, body=memoryview(stored.data)[start:stop], headers=headers)

    def _object_headers(self, stored: StoredObject) -> dict[str, str]:
        return {
            "ETag": f'"{self.etag_of(stored)}"',
            "Last-Modified": formatdate(stored.modified_s, usegmt=True),
            "x-goog-generation": str(stored.generation),
        }

    def _page(self, bucket: str, prefix: str, delimiter: str, after: str, limit: int) -> tuple[list[str], str]:
        """The next names and common prefixes after `after`, and the mark to go on from, or ""."""
        names: list[str] = []
        for name in sorted(key for owner, key in self.objects if owner == bucket and key.startswith(prefix)):
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if cut < 0 else name[: cut + len(delimiter)]
            if entry <= after or (names and names[-1] == entry):
                continue
            if len(names) == limit:
                return names, names[-1]
            names.append(entry)
        return names, ""

    def _heard(self, request: Request) -> dict[str, str]:
        return {name: text for name, text in request.query.items() if name not in self.unheard}

    def _xml_list(self, bucket: str, request: Request) -> Reply:
        query = self._heard(request)
        delimiter = query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        limit = min(int(query.get("max-keys", 1000)), self.page_size)
        names, mark = self._page(bucket, query.get("prefix", ""), delimiter, after, limit)
        encode: Callable[[str], str] = quote if query.get("encoding-type") == "url" else escape
        parts = [f"<Name>{bucket}</Name><KeyCount>{len(names)}</KeyCount><MaxKeys>{limit}</MaxKeys>"]
        parts.append(f"<IsTruncated>{'true' if mark else 'false'}</IsTruncated>")
        if self.echoes:
            echo = {"Prefix": encode(query.get("prefix", "")), "Delimiter": encode(delimiter)}
            echo["ContinuationToken"] = escape(query.get("continuation-token", ""))
            parts.extend(f"<{name}>{text}</{name}>" for name, text in echo.items() if text or name == "Prefix")
        parts.extend(["<EncodingType>url</EncodingType>"] if query.get("encoding-type") == "url" else [])
        parts.extend([f"<NextContinuationToken>{escape(mark)}</NextContinuationToken>"] if mark else [])
        for name in names:
            stored = self.objects.get((bucket, name))
            if stored is None or (delimiter and name.endswith(delimiter) and name != query.get("prefix", "")):
                parts.append(f"<CommonPrefixes><Prefix>{encode(name)}</Prefix></CommonPrefixes>")
                continue
            parts.append(
                f"<Contents><Key>{encode(name)}</Key><LastModified>{_iso(stored.modified_s)}</LastModified>"
                f"<ETag>&quot;{self.etag_of(stored)}&quot;</ETag><Size>{len(stored.data)}</Size></Contents>"
            )
        return Reply(body=_xml("ListBucketResult", "".join(parts)), headers={"Content-Type": "application/xml"})

    def _json_list(self, bucket: str, request: Request) -> Reply:
        query = self._heard(request)
        delimiter = query.get("delimiter", "")
        limit = min(int(query.get("maxResults", 1000)), self.page_size)
        names, mark = self._page(bucket, query.get("prefix", ""), delimiter, query.get("pageToken", ""), limit)
        asked = query.get("prefix", "")
        is_prefix = {name: bool(delimiter) and name.endswith(delimiter) and name != asked for name in names}
        stored = {name: self.objects[bucket, name] for name in names if not is_prefix[name]}
        answer: dict[str, object] = {
            "kind": "storage#objects",
            "items": [_resource(bucket, name, found) for name, found in stored.items()],
        }
        answer["prefixes"] = [name for name in names if name not in stored]
        if mark:
            answer["nextPageToken"] = mark
        return _json_reply(answer)

    def _bulk_delete(self, bucket: str, request: Request, refused: str) -> Reply:
        md5 = request.headers.get("content-md5")
        if md5 is None and not any(name.startswith("x-amz-checksum-") for name in request.headers):
            return error_reply(request, 400, "InvalidRequest")
        if md5 is not None and base64.b64decode(md5) != hashlib.md5(request.body).digest():
            return error_reply(request, 400, "BadDigest")
        parts: list[str] = []
        for element in ET.fromstring(bytes(request.body)).iter():
            if not element.tag.endswith("Key"):
                continue
            key = element.text or ""
            code = self.fail_delete_of.get(key) or (refused if not parts else "")
            if not code:
                self.objects.pop((bucket, key), None)
                parts.append(f"<Deleted><Key>{escape(key)}</Key></Deleted>")
            else:
                parts.append(
                    f"<Error><Key>{escape(key)}</Key><Code>{code}</Code><Message>as the test asked</Message></Error>"
                )
        return Reply(body=_xml("DeleteResult", "".join(parts)), headers={"Content-Type": "application/xml"})


def error_reply(request: Request, status: int, code: str, message: str = "no") -> Reply:
    """Return an error in the form of the dialect that the request is in."""
    if "/storage/v1/" in request.path:
        error = {"code": status, "message": message, "errors": [{"reason": code, "message": message}]}
        return replace(_json_reply({"error": error}), status=status)
    inner = f"<Code>{code}</Code><Message>{escape(message)}</Message><RequestId>0</RequestId>"
    return Reply(status=status, body=_xml("Error", inner), headers={"Content-Type": "application/xml"})


def _uploaded(request: Request) -> tuple[str, Request]:
    """Return the name of an upload to the JSON API, and a request whose body is the object's bytes alone."""
    if request.query.get("uploadType") == "media":
        return request.query["name"], request
    boundary = request.headers["content-type"].split("boundary=", 1)[1].strip('"').encode()
    _, resource, media, _ = bytes(request.body).split(b"--" + boundary)
    described = json.loads(resource.partition(b"\r\n\r\n")[2])
    headers = {f"x-amz-checksum-{kind}": text for kind, text in described.items() if kind != "name"}
    body = media.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
    return str(described["name"]), replace(request, body=body, headers={**request.headers, **headers})


def _checksums(request: Request) -> dict[str, str]:
    mark = "x-amz-checksum-"
    return {name.removeprefix(mark): text for name, text in request.headers.items() if name.startswith(mark)}


# Reflected polynomials.
_CRCS = {"crc32": (0xEDB88320, 4), "crc32c": (0x82F63B78, 4), "crc64nvme": (0x9A6C9329AC4BC9B5, 8)}


def _checksum_of(kind: str, data: bytes) -> str:
    """Compute a checksum bit by bit, as nobody else here does."""
    if kind == "sha256":
        return base64.b64encode(hashlib.sha256(data).digest()).decode()
    polynomial, size_bytes = _CRCS[kind]
    ones = (1 << 8 * size_bytes) - 1
    value = ones
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
    return base64.b64encode((value ^ ones).to_bytes(size_bytes, "big")).decode()


def _json_reply(value: object) -> Reply:
    return Reply(body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def _xml(tag: str, inner: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{tag}>{inner}</{tag}>'.encode()


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def md5_of(stored: StoredObject) -> str:
    """Return what names an object's content: the MD5 of its bytes, as in S3."""
    return hashlib.md5(stored.data).hexdigest()


def _resource(bucket: str, key: str, stored: StoredObject) -> dict[str, str]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": key,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "updated": _iso(stored.modified_s),
    }
