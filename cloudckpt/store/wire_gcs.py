"""Carry verbs to Google Cloud Storage's JSON API, by the session and the credentials of gcsfs.

gcsfs resolves options, credentials and endpoint; its own calls are passed by, because they retry six times whatever
one says, and forget the status of what they raise. Its plain class is used: the one for zonal buckets asks each
bucket's kind by gRPC. See `wire` for threads and limits.
"""

from __future__ import annotations

import asyncio
import email
import json
import os
import re
import secrets
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

import fsspec.config
from aiohttp import ClientResponse, ClientTimeout
from gcsfs.core import GCSFileSystem
from google.auth.exceptions import DefaultCredentialsError
from yarl import URL

from cloudckpt.errors import OptionsError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.buffers import check_length
from cloudckpt.store.classify import CredentialKind, is_absence
from cloudckpt.store.credentials import GcsCredentials
from cloudckpt.store.facts import GarbledReplyError, HttpStatusError
from cloudckpt.store.intake import Intake
from cloudckpt.store.location import check_encrypted
from cloudckpt.store.proof import check_generation, check_object
from cloudckpt.store.redact import hide
from cloudckpt.store.relay import Relay
from cloudckpt.store.terms import PutTerms, checksum_of
from cloudckpt.store.wire import GatherBody, OnLoop, Page, borrowed, check_range, own_options, pass_on, take

__all__ = ["GcsWire", "gcs_filesystem"]

# Emulators and private endpoints have no batches: there deletes go one by one, so many at a time.
_DELETES_AT_ONCE = 16
# Google's limit of calls in one batch.
_BATCH = 100
_PART_STATUS = re.compile(rb"\AHTTP/[0-9.]+ ([0-9]{3})")
_PART_ID = re.compile(r"\A<response-([0-9]+)>\Z")
_REFUSED = ("asynchronous", "loop", "version_aware", "requests_timeout", "timeout")
# Random, so that no object holds it by chance.
_BOUNDARY = f"cloudckpt-{secrets.token_hex(16)}"
# Enough of an error body to find the reason in it.
_ERROR_BYTES = 64 * 1024
_ENDPOINT = re.compile(r"\Ahttps?://[^/\s]+")
_KEY_FILE_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
# What gcsfs would take for a token itself if no such file is there; tokens neither begin nor end so.
_PATH = re.compile(r"\A(?:[/~]|\.{1,2}/)|\.json\Z")
_DEFAULT = "google_default"
_UNREADABLE = (PermissionError, IsADirectoryError, NotADirectoryError)
_OWN_HEADER = "X-GUploader-UploadID"
_OWN_WORDS = b"No such object: "


class GcsWire(OnLoop):
    """One bucket behind one session of aiohttp."""

    def __init__(self, bucket: str, options: Mapping[str, object], *, retry: RetryPolicy, terms: PutTerms) -> None:
        super().__init__()
        self._fs = gcs_filesystem(own_options(options, _REFUSED), self.loop)
        check_encrypted(self._fs._location, options)  # noqa: SLF001 - wherever fsspec has it from
        self._credentials = GcsCredentials(self._fs.credentials)
        self._objects = f"b/{quote(bucket, safe='')}/o"
        self._timeout = ClientTimeout(total=None, sock_connect=retry.connect_timeout_s)
        self._terms = terms

    @property
    def credential_kind(self) -> CredentialKind:
        return "none" if self._fs.credentials.credentials is None else "temporary"

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        with borrowed(buffers) as lent:
            if self._terms.create_only or self._terms.checksum:
                return self._put_in_parts(name, lent, create_only=self._terms.create_only)
            # "media" is the plain upload in one request: a resumable one would be two, and could be left half done.
            url = self._url("upload/storage/v1", self._objects, {"uploadType": "media", "name": name})
            headers, body = self._headers({"Content-Type": "application/octet-stream"}), GatherBody(lent)
            return _check_stored(self.run(self._json("POST", url, headers, body)), name, len(body))

    def create(self, name: str, data: bytes) -> None:
        # fake-gcs-server overlooks the precondition of a "media" upload.
        self._put_in_parts(name, [memoryview(data)], create_only=True)

    def _put_in_parts(self, name: str, buffers: Sequence[memoryview], *, create_only: bool) -> None:
        """Upload in one request of two parts: what the object is called, with its checksum, and its bytes."""
        condition = {"ifGenerationMatch": "0"} if create_only else {}
        url = self._url("upload/storage/v1", self._objects, {"uploadType": "multipart", **condition})
        headers = self._headers({"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'})
        kind = self._terms.checksum
        resource = {"name": name} if kind is None else {"name": name, kind: checksum_of(kind, buffers)}
        start, end = (memoryview(part) for part in _around(resource))
        size_bytes = sum(buffer.nbytes for buffer in buffers)
        reply = self.run(self._json("POST", url, headers, GatherBody([start, *buffers, end])))
        _check_stored(reply, name, size_bytes)

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        headers = self._headers({"Range": f"bytes={start}-{stop - 1}"})
        self.relayed(partial(self._get, name, start, stop, headers), into, stop - start)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return self.run(self._read(name, limit_bytes, self._headers()))

    def head(self, name: str) -> ObjectInfo:
        reply = self.run(self._json("GET", self._object_url(name), self._headers()))
        _check_resource(reply, name)
        return _described(reply)

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        asked = {"prefix": prefix, "delimiter": delimiter, "pageToken": mark}
        query = {name: text for name, text in asked.items() if text}
        query["fields"] = "kind,items(name,size,updated),prefixes,nextPageToken"
        url = self._url("storage/v1", self._objects, query)
        reply = self.run(self._json("GET", url, self._headers()))
        if reply.get("kind") != "storage#objects":
            raise GarbledReplyError("the reply is no listing")
        try:
            return Page(
                objects=[_described(item) for item in reply.get("items", ())],
                prefixes=[str(found) for found in reply.get("prefixes", ())],
                mark=str(reply.get("nextPageToken", "")),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise GarbledReplyError("the reply is a listing whose items are none") from exc

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        failed: dict[str, str | Exception] = {}
        is_batched = len(names) > 1 and self._fs.on_google
        size, send = (_BATCH, self._delete_batch) if is_batched else (_DELETES_AT_ONCE, self._delete_each)
        for start in range(0, len(names), size):
            batch, headers = names[start : start + size], self._headers()
            raised = self.run(send(batch, headers))
            failed.update(
                {
                    name: error if isinstance(error, Exception) else TimeoutError("cancelled")
                    for name, error in zip(batch, raised, strict=True)
                    if error is not None and not is_absence(error)
                }
            )
        return failed

    def close(self) -> None:
        if self._fs.session is not None:
            self.end(self._fs.session.close())

    # ---- requests

    def _url(self, api: str, path: str, query: Mapping[str, str]) -> URL:
        # `_get_params` adds who pays, where the requester does.
        text = urlencode(self._fs._get_params(dict(query)), quote_via=quote, safe="")  # noqa: SLF001
        return URL(f"{self._fs._location}/{api}/{path}" + (f"?{text}" if text else ""), encoded=True)  # noqa: SLF001

    def _object_url(self, name: str, api: str = "storage/v1", **query: str) -> URL:
        return self._url(api, f"{self._objects}/{quote(name, safe='')}", query)

    def _headers(self, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the headers of a request, authorised; a token that is near its end is renewed here, off the loop."""
        return self._credentials.authorise(headers or {})

    @asynccontextmanager
    async def _reply(
        self, method: str, url: URL, headers: Mapping[str, str], data: GatherBody | bytes | None = None
    ) -> AsyncIterator[ClientResponse]:
        session = await self._fs._set_session()  # noqa: SLF001
        session._retry_connection = False  # noqa: SLF001 - aiohttp would repeat a request by itself
        async with session.request(
            method, url, headers=headers, timeout=self._timeout, data=data, allow_redirects=False
        ) as reply:
            if reply.status >= HTTPStatus.MULTIPLE_CHOICES:
                raise _status_error(reply, await reply.content.read(_ERROR_BYTES))
            yield reply

    async def _json(
        self, method: str, url: URL, headers: Mapping[str, str], data: GatherBody | bytes | None = None
    ) -> dict[str, Any]:
        async with self._reply(method, url, headers, data) as reply:
            found = _parsed(await reply.read())
        if reply.status != HTTPStatus.OK or "error" in found:
            raise GarbledReplyError(f"the reply of status {reply.status} is a proxy's own, or tells of an error")
        return found

    async def _get(self, name: str, start: int, stop: int, headers: Mapping[str, str], relay: Relay) -> None:
        async with self._download(name, headers) as reply:
            length_bytes = reply.content_length if reply.content_length is not None else stop - start
            check_range(reply.headers.get("Content-Range", ""), length_bytes, start, stop)
            await pass_on(reply.content.iter_any(), relay)

    async def _read(self, name: str, limit_bytes: int, headers: Mapping[str, str]) -> bytes:
        async with self._download(name, headers) as reply:
            return await take(reply.content.iter_any(), reply.content_length, limit_bytes)

    async def _delete_batch(self, names: Sequence[str], headers: Mapping[str, str]) -> list[BaseException | None]:
        url, content_type = self._url("batch/storage", "v1", {}), f'multipart/mixed; boundary="{_BOUNDARY}"'
        calls = [self._object_url(name).raw_path_qs for name in names]
        async with self._reply("POST", url, {**headers, "Content-Type": content_type}, _batch_of(calls)) as reply:
            return _batch_answers(reply.headers.get("Content-Type", ""), await reply.read(), len(names))

    @asynccontextmanager
    async def _download(self, name: str, headers: Mapping[str, str]) -> AsyncIterator[ClientResponse]:
        url = self._object_url(name, "download/storage/v1", alt="media")
        try:
            async with self._reply("GET", url, headers) as reply:
                _check_object(reply)
                yield reply
        except HttpStatusError as exc:
            if exc.status == HTTPStatus.NOT_FOUND and exc.is_foreign:
                # Emulators refuse a download in no form that is a store's; asked to describe the object, they have one.
                about = {header: text for header, text in headers.items() if header != "Range"}
                await self._json("GET", self._object_url(name), about)
            raise

    async def _delete_each(self, names: Sequence[str], headers: Mapping[str, str]) -> list[BaseException | None]:
        return await asyncio.gather(*(self._delete(name, headers) for name in names), return_exceptions=True)

    async def _delete(self, name: str, headers: Mapping[str, str]) -> None:
        async with self._reply("DELETE", self._object_url(name), headers) as reply:
            # fake-gcs-server says so with 200 and a null.
            if reply.status != HTTPStatus.NO_CONTENT and (await reply.read()).strip() != b"null":
                raise GarbledReplyError("the reply does not say that the object was deleted")


def gcs_filesystem(options: Mapping[str, object], loop: AbstractEventLoop) -> GCSFileSystem:
    """Let gcsfs read its options and find credentials, which may ask Google's services; it connects to no bucket."""
    place, path = _key_file(options)
    if path and not os.path.exists(path):  # noqa: PTH110 - a token may be longer than any path can be
        raise OptionsError(
            f"{place} names {path!r}, which does not exist; correct it, or give another token in storage_options"
        )
    # By itself gcsfs would go on without a key file that it cannot read, anonymously.
    found = {"token": _DEFAULT} if place == _KEY_FILE_VARIABLE else {}
    try:
        filesystem = GCSFileSystem(
            **{**options, **found}, asynchronous=True, loop=loop, skip_instance_cache=True, use_listings_cache=False
        )
    except (ValueError, TypeError, KeyError, AttributeError, DefaultCredentialsError, *_UNREADABLE) as exc:
        if not path and isinstance(exc, DefaultCredentialsError | AttributeError):
            raise
        subject = f"the key file {path!r} that {place} names" if path else "these storage_options"
        # Not chained: what it says may repeat a token.
        raise OptionsError(f"gcsfs cannot use {subject}: {hide(str(exc))}") from None
    if not _ENDPOINT.match(filesystem._location):  # noqa: SLF001 - also what STORAGE_EMULATOR_HOST says
        raise OptionsError("endpoint_url (or STORAGE_EMULATOR_HOST) is no URL of a host; write http(s)://host:port")
    return filesystem


def _key_file(options: Mapping[str, object]) -> tuple[str, str]:
    """Return who names a file with a key, and its path; or empty texts."""
    token = options.get("token")
    if isinstance(token, str) and (_PATH.search(token) or os.path.exists(token)):  # noqa: PTH110 - as above
        return "token in storage_options", token
    is_configured = any("token" in fsspec.config.conf.get(protocol, {}) for protocol in ("gs", "gcs"))
    path = os.environ.get(_KEY_FILE_VARIABLE, "")
    if path and (token == _DEFAULT or (token is None and not is_configured)):
        return _KEY_FILE_VARIABLE, path
    return "", ""


def _around(resource: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return what stands before and behind an object's bytes in the body of a multipart upload."""
    start = f"--{_BOUNDARY}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
    middle = f"--{_BOUNDARY}\r\nContent-Type: application/octet-stream\r\n\r\n"
    return (start + middle).encode(), f"\r\n--{_BOUNDARY}--".encode()


def _batch_of(calls: Sequence[str]) -> bytes:
    """Return the body of a batch of deletes, each numbered from 0."""
    head = f"--{_BOUNDARY}\r\nContent-Type: application/http\r\n"
    parts = [f"{head}Content-ID: <{number}>\r\n\r\nDELETE {call} HTTP/1.1\r\n\r\n" for number, call in enumerate(calls)]
    return "\r\n".join([*parts, f"--{_BOUNDARY}--\r\n"]).encode()


def _batch_answers(content_type: str, body: bytes, count: int) -> list[BaseException | None]:
    """Return of each call of a batch what its answer says, by its number; one without an answer has failed."""
    answers: list[BaseException | None] = [GarbledReplyError("the batch has no answer for it") for _ in range(count)]
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    for part in message.walk():
        found, payload = _PART_ID.match(str(part.get("Content-ID", ""))), part.get_payload(decode=True)
        status = _PART_STATUS.match(payload) if isinstance(payload, bytes) else None
        if found and status and int(found[1]) < count:
            code = int(status[1])
            answers[int(found[1])] = None if code < HTTPStatus.MULTIPLE_CHOICES else HttpStatusError(code)
    return answers


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError as exc:
        raise GarbledReplyError(f"{len(body)} bytes that are no JSON") from exc
    if not isinstance(answer, dict):
        raise GarbledReplyError("JSON, but no object")
    return answer


def _check_resource(reply: Mapping[str, Any], name: str) -> None:
    if reply.get("kind") != "storage#object" or reply.get("name") != name:
        raise GarbledReplyError("the reply describes no object of that name")


def _check_stored(reply: Mapping[str, Any], name: str, size_bytes: int) -> None:
    _check_resource(reply, name)
    check_generation(reply.get("generation"))
    check_length(int(reply.get("size", 0)), size_bytes)


def _check_object(reply: ClientResponse) -> None:
    check_object(reply.headers.get("X-Goog-Generation"), reply.headers.get("Content-Type"))


def _status_error(reply: ClientResponse, body: bytes) -> HttpStatusError:
    """Read the reason and the message out of an error body of the JSON API, if it is one."""
    try:
        error = json.loads(body)["error"]
        reasons = error.get("errors") or [{}]
        reason, message = str(reasons[0].get("reason", "")), str(error.get("message", ""))
        is_own = True
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        reason = message = ""
        # Downloads are refused in a line of plain text, under a header that the store's front end alone writes.
        is_own = _OWN_HEADER in reply.headers or body.startswith(_OWN_WORDS)
    retry_after = reply.headers.get("Retry-After", "")
    return HttpStatusError(reply.status, reason, message, retry_after=retry_after, is_foreign=not is_own)


def _described(item: Mapping[str, Any]) -> ObjectInfo:
    moment = datetime.fromisoformat(item["updated"])
    return ObjectInfo(key=item["name"], size_bytes=int(item.get("size", 0)), modified_s=moment.timestamp())
