"""Turn requests of S3, or of GCS's JSON API, into memory and back, so fast that the client is the bottleneck.

It hashes no more than 1 MiB, whose ETag is their MD5 as S3's is, and checks no signature; every bucket name exists;
objects live in an `Arena`. What it answers is S3's: put (also `If-None-Match: *`), ranged get, head, ListObjectsV2 with
delimiter and pages, delete, bulk delete, copy and multipart upload; and GCS's insert (media, multipart, resumable),
get, list, delete, move and rewrite. With a certificate it answers behind TLS, too, at a second port. Beside that,
uncounted: `GET /_stats` tells the requests by operation, `GET /_objects` the size of each object, `POST /_reset` zeroes
the counts, `POST /_clear` drops the objects too; from `POST /_drain` to `POST /_keep` large bodies are taken in and not
kept. Loopback only: it is a measuring instrument, not a store; bytes may
change under a reader whose object is removed while it reads.

    python benchmarks/sink/server.py --port 9555 --memory 4GiB --latency-ms 20 --mb-per-s 90

One thread per connection; the maps of objects and counts are under one lock, bodies move outside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from urllib.parse import unquote
from xml.sax.saxutils import escape

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.shared.units import parse_bytes
from benchmarks.sink.arena import Arena, ArenaFullError, Extent
from benchmarks.sink.gcs_words import (
    GcsName,
    answer_resource,
    as_json,
    chunk_of,
    gcs_error,
    gcs_name_of,
    gcs_operation_of,
    objects_page,
    parts_of,
    resource_of,
    upload_url,
)
from benchmarks.sink.s3_words import (
    Body,
    RefusalError,
    error,
    is_create_only,
    list_page,
    operation_of,
    range_of,
    texts_of,
    xml,
)
from benchmarks.sink.wire import Answer, Connection, Drain, Gate, Link, Reader, Request, TlsConnection, body_reader

__all__ = ["Sink", "main"]

_SCRATCH_BYTES = 1 << 20
# What stands around an object in a multipart upload is shorter.
_AROUND_BYTES = 64 << 10
# A client may take the MD5 for the proof of a small put, and ask once more where it gets another ETag.
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Call:
    """One request with its payload, which already lies in the arena; `into` is where a rewrite or a move goes."""

    request: Request
    bucket: str
    key: str
    body: Body
    into: tuple[str, str] | None = None

    @property
    def name(self) -> tuple[str, str]:
        return self.bucket, self.key


class Sink:
    """Objects in memory, behind S3's verbs. `answer` may be called from many threads."""

    def __init__(self, memory_bytes: int, drain: Drain | None = None) -> None:
        self.arena = Arena(memory_bytes)
        self._drain = drain or Drain()
        self._objects: dict[tuple[str, str], Body] = {}
        # Sorted, by their bucket; None since a key has come or gone.
        self._keys: dict[str, list[str]] | None = None
        self._uploads: dict[str, dict[int, Body]] = {}
        self._requests: Counter[str] = Counter()
        self._moved: Counter[str] = Counter()
        self._serials = count(1)
        self._lock = threading.Lock()

    def answer(self, request: Request, connection: Connection) -> Answer:
        """Read the request's payload, do what it asks for, and return the answer."""
        if request.path.startswith("/_"):
            return self._administer(request)
        name = gcs_name_of(request)
        operation = gcs_operation_of(request, name) if name else operation_of(request)
        with self._lock:
            self._requests[operation] += 1
        try:
            return self._perform(operation, self._receive(request, connection, name))
        except RefusalError as refusal:
            if name:
                return gcs_error(refusal.status, refusal.code)
            is_head = request.method == "HEAD"  # which is never answered with a body
            return Answer(status=refusal.status) if is_head else error(refusal.status, refusal.code)

    def _administer(self, request: Request) -> Answer:
        with self._lock:
            if request.path in ("/_drain", "/_keep"):
                self._drain.is_open = request.path == "/_drain"
            if request.path == "/_clear":
                self._drop_all()
            if request.path in ("/_reset", "/_clear"):
                self._requests.clear()
                self._moved.clear()
            report: dict[str, object] = {"requests": self._requests, **self._moved, "objects": len(self._objects)}
            report["cpu_s"] = time.process_time()
            if request.path == "/_objects":
                report = {f"{bucket}/{key}": body.size_bytes for (bucket, key), body in self._objects.items()}
            return Answer(body=json.dumps(report).encode())

    def _drop_all(self) -> None:
        parts = (part for upload in self._uploads.values() for part in upload.values())
        for body in (*self._objects.values(), *parts):
            self.arena.release(body.extents)
        self._objects.clear()
        self._keys = None
        self._uploads.clear()

    def _receive(self, request: Request, connection: Connection, name: GcsName | None) -> _Call:
        reader, size = body_reader(request, connection)
        if request.headers.get("expect", "").lower() == "100-continue":
            connection.invite_body()
        extents = self._place(reader, size)
        try:
            for view in self.arena.views(extents):
                reader.fill(view)
            reader.finish()
        except ConnectionError:
            self.arena.release(extents)
            raise
        self._count_moved("received_bytes", size)
        body = self._body(extents, size)
        if name:
            return _Call(request, name.bucket, name.key, body, name.into)
        bucket, _, key = request.path.lstrip("/").partition("/")
        return _Call(request, bucket, key, body)

    def _place(self, reader: Reader, size_bytes: int) -> list[Extent]:
        try:
            return self.arena.allocate(size_bytes)
        except ArenaFullError as exc:
            _drain(reader, size_bytes)
            raise RefusalError(507, "InsufficientStorage") from exc

    def _perform(self, operation: str, call: _Call) -> Answer:
        try:
            return _VERBS[operation](self, call)
        finally:
            if operation not in _KEEPS_BODY:
                self.arena.release(call.body.extents)

    def _body(self, extents: list[Extent], size_bytes: int) -> Body:
        return Body(extents=extents, size_bytes=size_bytes, etag=self.etag(extents, size_bytes), modified_s=time.time())

    def etag(self, extents: list[Extent], size_bytes: int) -> str:
        """Return what S3 would say of a small body, and anything of its form of a large one."""
        if size_bytes > _HASHED_BYTES:
            return f"{next(self._serials):032x}"
        digest = hashlib.md5(usedforsecurity=False)
        for view in self.arena.views(extents):
            digest.update(view)
        return digest.hexdigest()

    def _bytes(self, body: Body, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes of what lies in the extents of `body`."""
        end = body.offset_bytes + body.size_bytes if stop is None else stop
        return b"".join(self.arena.views(list(self.arena.slice(body.extents, start or body.offset_bytes, end))))

    def _count_moved(self, direction: str, moved_bytes: int) -> None:
        with self._lock:
            self._moved[direction] += moved_bytes

    def put(self, call: _Call) -> Answer:
        self._publish(call, call.body)
        return Answer(headers={"ETag": f'"{call.body.etag}"', "X-Goog-Generation": call.body.generation})

    def _publish(self, call: _Call, body: Body, name: tuple[str, str] | None = None) -> None:
        with self._lock:
            old = self._objects.get(name or call.name)
            is_refused = old is not None and is_create_only(call.request)
            if not is_refused:
                self._objects[name or call.name] = body
                self._keys = self._keys if old else None
        unused = body if is_refused else old
        if unused:
            self.arena.release(unused.extents)
        if is_refused:
            raise RefusalError(412, "PreconditionFailed")

    def get(self, call: _Call) -> Answer:
        body = self._find(call.name)
        start, stop = range_of(call.request.headers.get("range"), body.size_bytes)
        pieces = [(extent.start, extent.length_bytes) for extent in self._slice(body, start, stop)]
        self._count_moved("sent_bytes", stop - start)
        if "range" not in call.request.headers:
            return Answer(headers=body.headers, pieces=pieces)
        content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{body.size_bytes}"}
        return Answer(status=206, headers=body.headers | content_range, pieces=pieces)

    def _slice(self, body: Body, start: int, stop: int) -> Iterator[Extent]:
        return self.arena.slice(body.extents, body.offset_bytes + start, body.offset_bytes + stop)

    def head(self, call: _Call) -> Answer:
        body = self._find(call.name)
        return Answer(headers=body.headers, length_bytes=body.size_bytes)

    def copy(self, call: _Call) -> Answer:
        bucket, _, key = unquote(call.request.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        body = self._copied((bucket, key))
        self._publish(call, body)
        return xml(f"<CopyObjectResult>{body.etag_xml}{body.modified_xml}</CopyObjectResult>")

    def _copied(self, name: tuple[str, str]) -> Body:
        data = self._bytes(self._find(name))
        body = self._body(self.arena.allocate(len(data)), len(data))
        at = 0
        for view in self.arena.views(body.extents):
            view[:] = data[at : at + len(view)]
            at += len(view)
        return body

    def _find(self, name: tuple[str, str]) -> Body:
        with self._lock:
            body = self._objects.get(name)
        if body is None:
            raise RefusalError(404, "NoSuchKey")
        return body

    def delete(self, call: _Call) -> Answer:
        self._remove(call.name)
        return Answer(status=204)

    def _remove(self, name: tuple[str, str]) -> None:
        with self._lock:
            body = self._objects.pop(name, None)
            self._keys = None
        if body:
            self.arena.release(body.extents)

    def delete_many(self, call: _Call) -> Answer:
        keys = texts_of(self._bytes(call.body), "Key")
        for key in keys:
            self._remove((call.bucket, key))
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return xml(f"<DeleteResult>{deleted}</DeleteResult>")

    def create_upload(self, call: _Call) -> Answer:
        upload_id = f"upload-{next(self._serials)}"
        with self._lock:
            self._uploads[upload_id] = {}
        return xml(
            f"<InitiateMultipartUploadResult><Bucket>{call.bucket}</Bucket><Key>{escape(call.key)}</Key>"
            f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
        )

    def put_part(self, call: _Call) -> Answer:
        number = int(call.request.query["partNumber"])
        with self._lock:
            upload = self._uploads.get(call.request.query["uploadId"])
            unused = call.body if upload is None else upload.get(number)
            if upload is not None:
                upload[number] = call.body
        if unused:
            self.arena.release(unused.extents)
        if upload is None:
            raise RefusalError(404, "NoSuchUpload")
        return Answer(headers={"ETag": f'"{call.body.etag}"'})

    def complete_upload(self, call: _Call) -> Answer:
        numbers = [int(text) for text in texts_of(self._bytes(call.body), "PartNumber")]
        parts = self._take_upload(call)
        chosen = [parts.pop(number) for number in numbers]
        for unused in parts.values():
            self.arena.release(unused.extents)
        extents = [extent for part in chosen for extent in part.extents]
        body = self._body(extents, sum(part.size_bytes for part in chosen))
        self._publish(call, body)
        return xml(
            f"<CompleteMultipartUploadResult><Bucket>{call.bucket}</Bucket><Key>{escape(call.key)}</Key>"
            f"{body.etag_xml}</CompleteMultipartUploadResult>"
        )

    def abort_upload(self, call: _Call) -> Answer:
        for part in self._take_upload(call).values():
            self.arena.release(part.extents)
        return Answer(status=204)

    def _take_upload(self, call: _Call) -> dict[int, Body]:
        with self._lock:
            parts = self._uploads.pop(call.request.query["uploadId"], None)
        if parts is None:
            raise RefusalError(404, "NoSuchUpload")
        return parts

    def accept_bucket(self, call: _Call) -> Answer:
        return Answer()

    def list(self, call: _Call) -> Answer:
        keys, find = self._sorted(call.bucket), self._finder(call.bucket)
        return xml(list_page(keys, find, call.bucket, call.request.query))

    def _sorted(self, bucket: str) -> Sequence[str]:
        with self._lock:
            if self._keys is None:
                self._keys = defaultdict(list)
                for owner, key in sorted(self._objects):
                    self._keys[owner].append(key)
            return self._keys[bucket]

    def _finder(self, bucket: str) -> Callable[[str], Body | None]:
        return lambda key: self._objects.get((bucket, key))

    # ---- GCS

    def gcs_insert(self, call: _Call) -> Answer:
        body, key = call.body, call.key
        try:
            if call.request.query.get("uploadType") == "multipart":
                whole = body.size_bytes
                head = self._bytes(body, 0, min(whole, _AROUND_BYTES))
                tail = self._bytes(body, max(0, whole - _AROUND_BYTES), whole)
                key, before, behind = parts_of(call.request, head, tail)
                body = replace(body, size_bytes=whole - before - behind, offset_bytes=before)
        except RefusalError:
            self.arena.release(body.extents)
            raise
        self._publish(call, body, (call.bucket, key))
        return answer_resource(call.bucket, key, body)

    def gcs_begin_upload(self, call: _Call) -> Answer:
        upload_id = f"upload-{next(self._serials)}"
        with self._lock:
            self._uploads[upload_id] = {}
        return Answer(headers={"Location": upload_url(call.request, upload_id)})

    def gcs_insert_chunk(self, call: _Call) -> Answer:
        start, is_last = chunk_of(call.request)
        upload_id = call.request.query["upload_id"]
        with self._lock:
            upload = self._uploads.get(upload_id)
            if upload is not None:
                unused = upload.get(start)
                upload[start] = call.body
        if upload is None:
            self.arena.release(call.body.extents)
            raise RefusalError(404, "notFound")
        if unused:
            self.arena.release(unused.extents)
        if not is_last:
            return Answer(status=308, headers={"Range": f"bytes=0-{start + call.body.size_bytes - 1}"})
        with self._lock:
            parts = self._uploads.pop(upload_id)
        extents = [extent for _, part in sorted(parts.items()) for extent in part.extents]
        body = self._body(extents, sum(part.size_bytes for part in parts.values()))
        self._publish(call, body)
        return answer_resource(call.bucket, call.key, body)

    def gcs_describe(self, call: _Call) -> Answer:
        return answer_resource(call.bucket, call.key, self._find(call.name))

    def gcs_describe_bucket(self, call: _Call) -> Answer:
        return as_json({"kind": "storage#bucket", "name": call.bucket, "id": call.bucket, "location": "US"})

    def gcs_list(self, call: _Call) -> Answer:
        return as_json(objects_page(self._sorted(call.bucket), self._finder(call.bucket), call.bucket, call.request))

    def gcs_delete(self, call: _Call) -> Answer:
        self._find(call.name)
        return self.delete(call)

    def gcs_move(self, call: _Call) -> Answer:
        body, into = self._find(call.name), call.into or call.name
        self._publish(call, body, into)
        with self._lock:
            if into != call.name:
                self._objects.pop(call.name, None)
            self._keys = None
        return answer_resource(*into, body)

    def gcs_rewrite(self, call: _Call) -> Answer:
        body, into = self._copied(call.name), call.into or call.name
        self._publish(call, body, into)
        size = str(body.size_bytes)
        return as_json(
            {
                "kind": "storage#rewriteResponse",
                "done": True,
                "totalBytesRewritten": size,
                "objectSize": size,
                "resource": resource_of(*into, body),
            }
        )

    def refuse(self, call: _Call) -> Answer:
        raise RefusalError(501, "NotImplemented")


_VERBS: Mapping[str, Callable[[Sink, _Call], Answer]] = {
    "PutObject": Sink.put,
    "GetObject": Sink.get,
    "HeadObject": Sink.head,
    "CopyObject": Sink.copy,
    "DeleteObject": Sink.delete,
    "DeleteObjects": Sink.delete_many,
    "CreateMultipartUpload": Sink.create_upload,
    "UploadPart": Sink.put_part,
    "CompleteMultipartUpload": Sink.complete_upload,
    "AbortMultipartUpload": Sink.abort_upload,
    "HeadBucket": Sink.accept_bucket,
    "CreateBucket": Sink.accept_bucket,
    "ListObjectsV2": Sink.list,
    "objects.insert": Sink.gcs_insert,
    "objects.insert (begin)": Sink.gcs_begin_upload,
    "objects.insert (chunk)": Sink.gcs_insert_chunk,
    "objects.get": Sink.gcs_describe,
    "objects.get (media)": Sink.get,
    "objects.list": Sink.gcs_list,
    "objects.delete": Sink.gcs_delete,
    "objects.rewrite": Sink.gcs_rewrite,
    "objects.move": Sink.gcs_move,
    "buckets.get": Sink.gcs_describe_bucket,
    "Other": Sink.refuse,
}
_KEEPS_BODY = frozenset({"PutObject", "UploadPart", "objects.insert", "objects.insert (chunk)"})


def _drain(reader: Reader, size_bytes: int) -> None:
    """Read a payload that has no place, so that the client gets an answer and not a reset."""
    scratch = memoryview(bytearray(_SCRATCH_BYTES))
    while size_bytes:
        step = min(size_bytes, _SCRATCH_BYTES)
        reader.fill(scratch[:step])
        size_bytes -= step
    reader.finish()


def _serve_connection(sock: socket.socket, sink: Sink, link: Link, tls: ssl.SSLContext | None) -> None:
    """Answer one client until it leaves; a thread of its own."""
    with sock:
        try:
            if tls:
                sock = tls.wrap_socket(sock, server_side=True)
            connection = TlsConnection(sock, link) if tls else Connection(sock, link)
            while request := connection.request():
                if not request.path.startswith("/_"):
                    time.sleep(link.latency_s)
                answer = sink.answer(request, connection)
                connection.answer(answer, source=sink.arena)
        except (ConnectionError, ssl.SSLError):
            return  # a client that leaves is no fault of the sink; what it sent was released


def _accept(server: socket.socket, sink: Sink, link: Link, tls: ssl.SSLContext | None) -> None:
    """Answer clients until the process ends."""
    while True:
        sock, _ = server.accept()
        threading.Thread(target=_serve_connection, args=(sock, sink, link, tls), daemon=True).start()


def _exit_when_parent_goes() -> None:
    """End the process when stdin closes, so that a killed benchmark leaves no server behind."""
    sys.stdin.buffer.read()
    os._exit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An in-memory S3 sink on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("4GiB"), help="room for objects")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="added to every request")
    parser.add_argument("--mb-per-s", type=float, default=0.0, help="limit per connection and direction; 0 is none")
    parser.add_argument("--total-mb-per-s", type=float, default=0.0, help="limit of all connections together")
    parser.add_argument("--nice", type=int, default=0, help="0 to 19: how willingly it leaves the processors to others")
    parser.add_argument("--certificate", help="a PEM file with certificate and key: answer behind TLS, too")
    parser.add_argument("--exit-with-stdin", action="store_true", help="stop when stdin closes")
    return parser.parse_args()


def main() -> None:
    """Serve until killed; print the endpoint's URL first, then the one behind TLS."""
    arguments = _arguments()
    gate = Gate(arguments.total_mb_per_s * 1e6) if arguments.total_mb_per_s else None
    link = Link(latency_s=arguments.latency_ms / 1e3, bytes_per_s=arguments.mb_per_s * 1e6, gate=gate)
    tls = None
    if arguments.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments.certificate)
    os.nice(arguments.nice)  # before the first thread: on Linux each has its own, and inherits it
    sink = Sink(arguments.memory, link.drain)
    with _listener(arguments.port) as server, _listener(0) as behind_tls:
        print(f"http://127.0.0.1:{server.getsockname()[1]}", flush=True)
        if arguments.exit_with_stdin:
            threading.Thread(target=_exit_when_parent_goes, daemon=True).start()
        if tls:
            print(f"https://127.0.0.1:{behind_tls.getsockname()[1]}", flush=True)
            threading.Thread(target=_accept, args=(behind_tls, sink, link, tls), daemon=True).start()
        _accept(server, sink, link, None)


def _listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=256)


if __name__ == "__main__":
    main()
