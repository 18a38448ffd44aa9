"""Turn HTTP requests into the names of GCS's JSON operations, and its answers into JSON.

Pure values: no sockets, no memory of objects, no threads.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlencode

from benchmarks.sink.s3_words import Body, RefusalError, names_in
from benchmarks.sink.wire import Answer, Request

__all__ = [
    "GcsName",
    "answer_resource",
    "as_json",
    "chunk_of",
    "gcs_error",
    "gcs_name_of",
    "gcs_operation_of",
    "objects_page",
    "parts_of",
    "resource_of",
    "upload_url",
]

_PATH = re.compile(r"/(?:(download|upload)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?/?\Z")
_REWRITE = re.compile(r"(.+)/rewriteTo/b/([^/]+)/o/(.+)\Z")
_MOVE = re.compile(r"(.+)/moveTo/o/(.+)\Z")
_BOUNDARY = re.compile(r'boundary="?([^";]+)"?')
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)\Z")
_PAGE_NAMES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsName:
    """What a request is about; `key` is "" for a bucket, `into` where a rewrite or a move goes."""

    bucket: str
    key: str
    is_upload: bool = False
    is_move: bool = False
    into: tuple[str, str] | None = None


def gcs_name_of(request: Request) -> GcsName | None:
    """Return what a request of the JSON API is about; None for any other request."""
    found = _PATH.match(request.path)
    if not found:
        return None
    api, bucket, key = found.groups()
    rewrite = _REWRITE.match(key or "") if request.method == "POST" else None
    if rewrite:
        return GcsName(bucket=bucket, key=rewrite[1], into=(rewrite[2], rewrite[3]))
    move = _MOVE.match(key or "") if request.method == "POST" else None
    if move:
        return GcsName(bucket=bucket, key=move[1], into=(bucket, move[2]), is_move=True)
    return GcsName(bucket=bucket, key=key or request.query.get("name", ""), is_upload=api == "upload")


def gcs_operation_of(request: Request, name: GcsName) -> str:
    """Name the operation that a request asks for, or `Other`."""
    if name.into:
        return "objects.move" if name.is_move else "objects.rewrite"
    if name.is_upload:
        kind = request.query.get("uploadType", "")
        if "upload_id" in request.query:
            return "objects.insert (chunk)"
        return {"media": "objects.insert", "multipart": "objects.insert", "resumable": "objects.insert (begin)"}.get(
            kind, "Other"
        )
    if request.method == "GET":
        is_list = request.path.rstrip("/").endswith("/o")
        if is_list or not name.key:
            return "objects.list" if is_list else "buckets.get"
        return "objects.get (media)" if request.query.get("alt") == "media" else "objects.get"
    return "objects.delete" if request.method == "DELETE" and name.key else "Other"


def parts_of(request: Request, body: bytes, tail: bytes) -> tuple[str, int, int]:
    """Return an object's name, and how many bytes stand before and behind its own in a multipart upload.

    `body` is the beginning of the payload, `tail` its end; what stands around an object is short.

    Raises:
        RefusalError: that is no multipart upload.
    """
    boundary = _BOUNDARY.search(request.headers.get("content-type", ""))
    first = _BLANK_LINE.search(body)
    # The resource ends at the next boundary, and what follows that begins behind one more blank line.
    second = _BLANK_LINE.search(body, body.find(b"\n--", first.end())) if first else None
    end = tail.rfind(b"--" + boundary[1].encode() + b"--") if boundary else -1
    if not boundary or not first or not second or end < 0:
        raise RefusalError(400, "badRequest")
    resource = json.loads(body[first.end() : body.find(b"\n--", first.end())])
    line_end = 2 if tail[:end].endswith(b"\r\n") else 1
    return str(resource["name"]), second.end(), len(tail) - end + line_end


def chunk_of(request: Request) -> tuple[int, bool]:
    """Return where a chunk of a resumable upload starts, and whether it is the last."""
    found = _RANGE.match(request.headers.get("content-range", ""))
    if not found:
        return 0, True
    first, last, total = found.groups()
    if first is None:  # nothing more: all of it came before
        return int(total) if total != "*" else 0, total != "*"
    return int(first), total != "*" and int(last) + 1 == int(total)


def resource_of(bucket: str, key: str, body: Body) -> dict[str, str]:
    """Describe an object as GCS does."""
    moment = datetime.fromtimestamp(body.modified_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": key,
        "size": str(body.size_bytes),
        "generation": body.generation,
        "metageneration": "1",
        "etag": body.etag,
        "contentType": "application/octet-stream",
        "updated": moment,
        "timeCreated": moment,
    }


def as_json(found: object, status: int = 200, **headers: str) -> Answer:
    """Answer with a JSON document."""
    return Answer(
        status=status, headers={"Content-Type": "application/json", **headers}, body=json.dumps(found).encode()
    )


def answer_resource(bucket: str, key: str, body: Body) -> Answer:
    """Answer with what describes an object."""
    return as_json(resource_of(bucket, key, body))


def gcs_error(status: int, reason: str) -> Answer:
    """Answer with the JSON API's error document."""
    return as_json({"error": {"code": status, "message": reason, "errors": [{"reason": reason}]}}, status)


def upload_url(request: Request, upload_id: str) -> str:
    """Return where the chunks of a resumable upload go."""
    query = urlencode({"uploadType": "resumable", "upload_id": upload_id, "name": request.query.get("name", "")})
    return f"http://{request.headers.get('host', '')}{request.path}?{query}"


def objects_page(
    keys: Sequence[str], find: Callable[[str], Body | None], bucket: str, request: Request
) -> dict[str, object]:
    """Describe one page of a listing over the sorted keys of a bucket."""
    query = request.query
    limit = min(int(query.get("maxResults", _PAGE_NAMES)), _PAGE_NAMES)
    start = bisect_left(keys, query.get("startOffset", ""))
    found = names_in(
        keys[start:], find, query.get("prefix", ""), query.get("delimiter", ""), query.get("pageToken", "")
    )
    page: list[tuple[str, Body | None]] = []
    document: dict[str, object] = {"kind": "storage#objects"}
    for entry in found:
        if len(page) == limit:
            document["nextPageToken"] = page[-1][0]
            break
        page.append(entry)
    document["items"] = [resource_of(bucket, key, body) for key, body in page if body is not None]
    document["prefixes"] = [prefix for prefix, body in page if body is None]
    return document
