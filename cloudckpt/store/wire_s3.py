"""Carry verbs to S3 and what speaks like it, by the client that s3fs makes.

s3fs resolves options, credentials and endpoint; its own calls are passed by, because they retry, cache, translate
errors by errno, hide failed deletions and log their arguments. See `wire` for threads and limits.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote_plus

import s3fs
from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped,unused-ignore]
from aiohttp import ClientResponse, ClientSession
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ClientError

from cloudckpt.errors import OptionsError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import ObjectInfo
from cloudckpt.store.classify import CredentialKind, is_absence
from cloudckpt.store.credentials import check_aws_keys
from cloudckpt.store.facts import GarbledReplyError, HttpStatusError, facts_of
from cloudckpt.store.intake import Intake
from cloudckpt.store.location import ALLOW_HTTP, check_encrypted
from cloudckpt.store.proof import (
    LISTING,
    check_created,
    check_document,
    check_listing,
    check_object,
    check_stored,
    is_document,
)
from cloudckpt.store.proxies import is_in_direct_block
from cloudckpt.store.relay import Relay
from cloudckpt.store.s3_config import check_bundle, headers_for, s3_config
from cloudckpt.store.terms import PutTerms, checksum_of
from cloudckpt.store.wire import (
    GatherBody,
    OnLoop,
    Page,
    borrowed,
    check_range,
    own_options,
    pass_on,
    preparing,
    take,
)

__all__ = ["S3Wire"]

logger = logging.getLogger(__name__)

_SINGLE_DELETES = 32
# How stores say that they know no bulk delete: some take it for a post of a form, and do not find one.
_NO_BULK_DELETE = frozenset({"NotImplemented", "MethodNotAllowed", "MalformedXML", "MalformedPOSTRequest"})
_REFUSED = ("asynchronous", "loop", "version_aware")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class _Client(Protocol):
    meta: Any
    _endpoint: Any
    _request_signer: Any

    async def close(self) -> None: ...


class _OneRequestSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore ships no types
    """aiohttp repeats a request on a stale connection by itself; here every repetition is the retry layer's."""

    async def _get_session(self, proxy_url: str | None) -> _Undiverted:
        session: ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False  # noqa: SLF001 - there is no public switch; the tests count requests
        return _Undiverted(session)


class _Undiverted:
    """A session that follows no redirect: wherever it leads to would be sent the session token."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **arguments: Any) -> ClientResponse:  # noqa: ANN401 - aiobotocore's own
        reply = await self._session.request(method, allow_redirects=False, **arguments)
        # A store says in which region a bucket is, which botocore then uses. Of any other redirect it asks the bucket
        # for its region, is redirected again, and so on.
        is_redirect = reply.status in _REDIRECTS and "x-amz-bucket-region" not in reply.headers
        if is_redirect and not is_document(await reply.read(), "Error"):
            raise HttpStatusError(reply.status)
        return reply


class S3Wire(OnLoop):
    """One bucket behind one client of aiobotocore."""

    def __init__(self, bucket: str, options: Mapping[str, object], *, retry: RetryPolicy, terms: PutTerms) -> None:
        super().__init__()
        own = own_options(options, _REFUSED)
        given = own.pop("config_kwargs", None) or {}
        if not isinstance(given, Mapping):
            raise OptionsError("config_kwargs is no mapping")
        config = s3_config(given, retry=retry, signed_payload=terms.signed_payload)
        if is_in_direct_block(_given_endpoint(own)):
            config = {"proxies": {}, **config}
        self._terms = terms
        self._allowed = {ALLOW_HTTP: options.get(ALLOW_HTTP, False)}
        self._bucket = bucket
        try:
            self._fs = s3fs.S3FileSystem(
                **own,
                config_kwargs={**config, "http_session_cls": _OneRequestSession},
                asynchronous=True,
                loop=self.loop,
                skip_instance_cache=True,
                use_listings_cache=False,
            )
        except KeyError as exc:  # so it says that a name and its synonym were both given
            raise OptionsError(f"s3fs cannot use these storage_options: {exc}") from exc
        self._client: _Client | None = None
        self._deletes_in_bulk = True
        self._keys: ReadOnlyCredentials | None = None

    @property
    def credential_kind(self) -> CredentialKind:
        if self._fs.anon:
            return "none"
        return "temporary" if self._keys is None or self._keys.token else "lasting"

    def region(self) -> str:
        """Return where the store says that the bucket is, or ""; in one request."""
        try:
            reply: Mapping[str, Any] = self.run(self._send("head_bucket"))
        except ClientError as exc:
            reply = exc.response
        return str(reply["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        with borrowed(buffers) as lent:
            body = GatherBody(lent)
            condition = {"IfNoneMatch": "*"} if self._terms.create_only else {}
            reply = self.run(self._send("put_object", Key=name, Body=body, **condition, **self._checksum(lent)))
            check_stored(reply.get("ETag"), lent, lambda: self._described(name))

    def create(self, name: str, data: bytes) -> None:
        checksum = self._checksum([memoryview(data)])
        reply = self.run(self._send("put_object", Key=name, Body=data, IfNoneMatch="*", **checksum))
        check_created(reply.get("ETag"), data, lambda: self.read(name, len(data)))

    def stream(self, name: str, start: int, stop: int, into: Intake) -> None:
        self.relayed(partial(self._get, name, start, stop), into, stop - start)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return self.run(self._read(name, limit_bytes))

    def head(self, name: str) -> ObjectInfo:
        reply = self.run(self._send("head_object", Key=name))
        _check_object(reply)
        return ObjectInfo(key=name, size_bytes=reply["ContentLength"], modified_s=_seconds(reply["LastModified"]))

    def page(self, prefix: str, delimiter: str, mark: str) -> Page:
        asked = {"Prefix": prefix, "Delimiter": delimiter, "ContinuationToken": mark}
        reply = self.run(self._send("list_objects_v2", **{name: text for name, text in asked.items() if text}))
        _check_echo(reply, asked)
        mark = _mark_of(reply)
        contents, prefixes = reply.get("Contents", ()), reply.get("CommonPrefixes", ())
        check_listing(
            bucket=self._bucket,
            name=reply.get("Name"),
            entry_count=len(contents) + len(prefixes),
            key_count=reply.get("KeyCount", 0),
            is_last=None if "IsTruncated" not in reply else not mark,
        )
        return Page(
            objects=[
                ObjectInfo(key=item["Key"], size_bytes=item["Size"], modified_s=_seconds(item["LastModified"]))
                for item in contents
            ],
            prefixes=[item["Prefix"] for item in prefixes],
            mark=mark,
        )

    def delete(self, names: Sequence[str]) -> dict[str, str | Exception]:
        return self._delete_at_once(names) if self._deletes_in_bulk else self._delete_singly(names)

    def _delete_at_once(self, names: Sequence[str]) -> dict[str, str | Exception]:
        objects = [{"Key": name} for name in names]
        try:
            reply = self.run(self._send("delete_objects", Delete={"Objects": objects, "Quiet": True}))
        except ClientError as exc:
            facts = facts_of(exc)
            if facts.status not in (405, 501) and facts.code not in _NO_BULK_DELETE:
                raise
            self._deletes_in_bulk = False
            logger.info("%r takes no bulk deletes (%d %s): one by one", self._bucket, facts.status, facts.code)
            return self._delete_singly(names)
        failed = {item["Key"]: item.get("Code", "") for item in reply.get("Errors", ())}
        return {name: code for name, code in failed.items() if code != "NoSuchKey"}

    def _delete_singly(self, names: Sequence[str]) -> dict[str, str | Exception]:
        failed: dict[str, str | Exception] = {}
        for start in range(0, len(names), _SINGLE_DELETES):
            batch = names[start : start + _SINGLE_DELETES]
            raised = self.run(self._delete_each(batch))
            failed.update(
                {
                    name: error if isinstance(error, Exception) else TimeoutError("cancelled")
                    for name, error in zip(batch, raised, strict=True)
                    if error is not None and not is_absence(error)
                }
            )
        return failed

    def close(self) -> None:
        if self._client is not None:
            self._finalizer.detach()
            self.end(self._client.close())
            self._client = None

    async def _connect(self) -> _Client:
        """Return the client; s3fs makes it once, resolving credentials and endpoint."""
        with preparing():
            client: _Client = await self._fs.set_session()
        if client is not self._client:
            # Also of a profile, and where `use_ssl` is off.
            check_encrypted(client.meta.endpoint_url, self._allowed)
            verify = client._endpoint.http_session._verify  # noqa: SLF001 - as options, environment and profile have it
            if isinstance(verify, str):
                check_bundle(verify)
            with preparing():
                self._keys = await _keys_of(client)
            # Waiting for "100 Continue" costs a round trip, and for ever where a proxy does not pass it on.
            client.meta.events.register("request-created.s3.PutObject", _expect_nothing)
            client.meta.events.register("before-sign.s3.DeleteObjects", _add_md5)
            client.meta.events.register("before-call.s3.HeadBucket", _follow_no_redirect)
            # Of a page of HTML, and of an empty reply, botocore makes a listing of nothing, and a delete of everything.
            client.meta.events.register("before-parse.s3.ListObjectsV2", partial(_check_document, LISTING))
            client.meta.events.register("before-parse.s3.DeleteObjects", partial(_check_document, "DeleteResult"))
            if headers := headers_for(client.meta.endpoint_url):
                client.meta.events.register("before-sign.s3", partial(_add_headers, headers))
            self._finalizer = _close_when_dropped(self, self.loop, client)
            self._client = client
        return client

    def _checksum(self, buffers: Sequence[memoryview]) -> dict[str, str]:
        kind = self._terms.checksum
        return {} if kind is None else {f"Checksum{kind.upper()}": checksum_of(kind, buffers)}

    def _described(self, name: str) -> tuple[str | None, int]:
        reply = self.run(self._send("head_object", Key=name))
        return reply.get("ETag"), reply["ContentLength"]

    async def _send(self, verb: str, **arguments: object) -> dict[str, Any]:
        client = await self._connect()
        method = getattr(client, verb)
        # s3fs adds s3_additional_kwargs (encryption), newer ones also who pays, as far as this verb takes them.
        wanted = self._fs._get_s3_method_kwargs(  # noqa: SLF001
            method, Bucket=self._bucket, **self._fs.req_kw, **arguments
        )
        reply: dict[str, Any] = await method(**wanted)
        return reply

    async def _delete_each(self, names: Sequence[str]) -> list[BaseException | None]:
        return await asyncio.gather(*(self._delete(name) for name in names), return_exceptions=True)

    async def _delete(self, name: str) -> None:
        reply = await self._send("delete_object", Key=name)
        check_object("deleted", reply["ResponseMetadata"]["HTTPHeaders"].get("content-type"))

    async def _get(self, name: str, start: int, stop: int, relay: Relay) -> None:
        reply = await self._send("get_object", Key=name, Range=f"bytes={start}-{stop - 1}")
        async with reply["Body"] as body:
            _check_object(reply)
            check_range(reply.get("ContentRange", ""), reply.get("ContentLength", stop - start), start, stop)
            # Chunk by chunk: 2.0 GB/s on loopback, where `await body.read()` joins them at 0.7.
            await pass_on(_chunks_of(body), relay)

    async def _read(self, name: str, limit_bytes: int) -> bytes:
        reply = await self._send("get_object", Key=name)
        async with reply["Body"] as body:
            _check_object(reply)
            return await take(_chunks_of(body), reply.get("ContentLength"), limit_bytes)


def _given_endpoint(options: Mapping[str, object]) -> str:
    """Return the endpoint as far as options and environment name it: only there does one write an address."""
    client = options.get("client_kwargs")
    given = [options.get("endpoint_url"), client.get("endpoint_url") if isinstance(client, Mapping) else None]
    named = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
    return str(next((url for url in given + named if url), ""))


def _close_when_dropped(
    owner: object, loop: asyncio.AbstractEventLoop, client: _Client
) -> weakref.finalize[..., object]:
    """Close `client` when `owner` is collected without having been closed; aiohttp would complain of it on stderr."""
    finalizer = weakref.finalize(owner, _close_on, loop, client, os.getpid())
    finalizer.atexit = False  # by then the loop is gone, and the sockets go with the process
    return finalizer


def _close_on(loop: asyncio.AbstractEventLoop, client: _Client, pid: int) -> None:
    if pid == os.getpid() and loop.is_running():
        asyncio.run_coroutine_threadsafe(client.close(), loop)


async def _keys_of(client: _Client) -> ReadOnlyCredentials | None:
    """Return what requests are signed with, wherever botocore found it; None if it found nothing."""
    found = client._request_signer._credentials  # noqa: SLF001 - nobody else tells
    if found is None:
        return None
    keys: ReadOnlyCredentials = await found.get_frozen_credentials()
    check_aws_keys(keys)
    return keys


def _follow_no_redirect(context: dict[str, Any], **_: object) -> None:
    """Keep botocore from asking for the bucket's region once more when that very question is redirected, and so on."""
    context.setdefault("s3_redirect", {})["redirected"] = True


def _add_headers(headers: Mapping[str, str], request: AWSRequest, **_: object) -> None:
    for name, text in headers.items():
        request.headers[name] = text


def _expect_nothing(request: AWSRequest, **_: object) -> None:
    del request.headers["Expect"]  # fine with these headers if there is none


def _add_md5(request: AWSRequest, **_: object) -> None:
    """Add the checksum that older look-alikes of S3 demand of a bulk delete; botocore sends a CRC32 alone."""
    digest = hashlib.md5(request.body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _chunks_of(body: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - aiobotocore's own
    """Return a reply's body as it comes; entered, one of aiobotocore 2 is aiohttp's reply itself."""
    chunks: AsyncIterator[bytes] = getattr(body, "raw_stream", body).content.iter_any()
    return chunks


def _seconds(moment: datetime) -> float:
    return moment.timestamp()


def _check_object(reply: Mapping[str, Any]) -> None:
    check_object(reply.get("ETag"), reply.get("ContentType"))


def _check_echo(reply: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    """Refuse a listing that says of itself that it answers another question; not every store says."""
    for name, text in asked.items():
        # Some stores write a name in letters that botocore decodes once too often.
        if reply.get(name, text) not in (text, unquote_plus(text)):
            raise GarbledReplyError(
                f"the reply is a listing of another {name}: a proxy or a cache has dropped the query"
            )
    if reply.get("EncodingType", "url") not in ("", "url"):
        raise GarbledReplyError("the reply is a listing in an unknown encoding")


def _mark_of(reply: Mapping[str, Any]) -> str:
    """Return where the next page begins, or "" after the last one; a page that says neither is none."""
    mark = str(reply.get("NextContinuationToken") or "")
    if reply.get("IsTruncated") and not mark:
        raise GarbledReplyError("the reply says that there is more, and not where")
    return mark if reply.get("IsTruncated", bool(mark)) else ""


def _check_document(name: str, response_dict: Mapping[str, Any], **_: object) -> None:
    status, body = response_dict["status_code"], response_dict["body"]
    # botocore has made a 500 of a 200 whose body is no XML.
    is_answer = status < HTTPStatus.MULTIPLE_CHOICES or (status == HTTPStatus.INTERNAL_SERVER_ERROR and body)
    # S3 may begin an answer with 200, and find out then that it is an error.
    if is_answer and not is_document(body, "Error"):
        check_document(body, name, status=status)
