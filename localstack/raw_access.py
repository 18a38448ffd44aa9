"""Where a running test server is, and a way to look at and tamper with its objects around cloudckpt.

Plain boto3 for S3 and plain HTTP (the JSON API) for GCS: nothing here shares code with the library under test.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

__all__ = ["FreshPrefix", "GcsServer", "S3Server", "Server"]

_REQUEST_TIMEOUT_S = 30.0
_READY_BUCKET = "cloudckpt-is-it-ready"


@dataclass(frozen=True, kw_only=True)
class Server:
    """One running server.

    Attributes:
        name: `seaweedfs`, `localstack` or `fake-gcs`.
        endpoint_url: where it listens, on loopback.
        pid: its process, which leads a process group of its own.
        born_s: when that process began; with `pid` it names the process for good.
        log_path: what it printed.
        storage_options: what to hand to fsspec, and to cloudckpt, to reach it.
        litter: what it leaves outside its directory, to be removed once it has stopped.
    """

    name: str
    endpoint_url: str
    pid: int = 0
    born_s: float = 0.0
    log_path: Path
    storage_options: Mapping[str, Any] = field(repr=False)
    litter: tuple[Path, ...] = field(default=(), repr=False)
    scheme: ClassVar[str]

    def buckets(self) -> list[str]:
        """Return the names of all buckets."""
        raise NotImplementedError

    def make_bucket(self, name: str) -> str:
        """Create a bucket, if somebody else has not done so, and return its URL."""
        raise NotImplementedError

    def raw_get(self, url: str) -> bytes:
        """Return one object's bytes; raise `FileNotFoundError` if there is none."""
        raise NotImplementedError

    def raw_put(self, url: str, data: bytes) -> None:
        """Write one object, over whatever is there."""
        raise NotImplementedError

    def raw_list(self, url_prefix: str) -> list[str]:
        """Return the URLs, sorted, of all objects whose URL starts with `url_prefix`."""
        raise NotImplementedError

    def raw_delete(self, url: str) -> None:
        """Delete one object; raise `FileNotFoundError` if the server says that there is none."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Tell whether the server answers a listing and a write now."""
        raise NotImplementedError

    def close(self) -> None:
        """Close this object's own connections; the server stays up."""
        raise NotImplementedError

    def _split(self, url: str) -> tuple[str, str]:
        parts = urlsplit(url)
        if parts.scheme != self.scheme or not parts.netloc:
            raise ValueError(f"{url!r} is not a {self.scheme}:// URL of {self.name}")
        # Not `parts.path`: a key may hold `?` and `#`.
        bucket, _, key = url.removeprefix(f"{self.scheme}://").partition("/")
        return bucket, key


class S3Server(Server):
    """A server that speaks S3."""

    scheme: ClassVar[str] = "s3"

    @cached_property
    def client(self) -> Any:
        """A boto3 client of this server, for requests that the methods here lack."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.storage_options["key"],
            aws_secret_access_key=self.storage_options["secret"],
            region_name="us-east-1",
            config=Config(
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                # urllib3 applies this one to sending a body, too, and a busy server pauses for seconds.
                connect_timeout=_REQUEST_TIMEOUT_S,
                read_timeout=_REQUEST_TIMEOUT_S,
                proxies={},
                # A chunked checksum trailer would put a second framing between a test and the bytes it wrote.
                request_checksum_calculation="when_required",
            ),
        )
        # Older ones wait for ever for leave to send an empty body.
        client.meta.events.register("request-created.s3.PutObject", _expect_nothing)
        return client

    def buckets(self) -> list[str]:
        return [item["Name"] for item in self.client.list_buckets()["Buckets"]]

    def make_bucket(self, name: str) -> str:
        with suppress(self.client.exceptions.BucketAlreadyOwnedByYou, self.client.exceptions.BucketAlreadyExists):
            self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def raw_get(self, url: str) -> bytes:
        bucket, key = self._split(url)
        try:
            with self.client.get_object(Bucket=bucket, Key=key)["Body"] as body:
                return bytes(body.read())
        except self.client.exceptions.NoSuchKey as exc:
            raise FileNotFoundError(url) from exc

    def raw_put(self, url: str, data: bytes) -> None:
        bucket, key = self._split(url)
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def raw_list(self, url_prefix: str) -> list[str]:
        bucket, prefix = self._split(url_prefix)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ()))

    def raw_delete(self, url: str) -> None:
        bucket, key = self._split(url)
        self.client.delete_object(Bucket=bucket, Key=key)

    def is_ready(self) -> bool:
        try:
            if _READY_BUCKET not in self.buckets():
                self.make_bucket(_READY_BUCKET)
            self.raw_put(f"s3://{_READY_BUCKET}/probe", b"x")
            self.raw_delete(f"s3://{_READY_BUCKET}/probe")
            self.client.delete_bucket(Bucket=_READY_BUCKET)
        except (BotoCoreError, ClientError):
            return False
        return True

    def close(self) -> None:
        self.client.close()


class GcsServer(Server):
    """A server that speaks the JSON API of Google Cloud Storage."""

    scheme: ClassVar[str] = "gs"

    @cached_property
    def session(self) -> requests.Session:
        """An HTTP session for requests that the methods here lack."""
        session = requests.Session()
        session.trust_env = False  # no proxy of the caller's: the server is on loopback
        return session

    def _request(self, method: str, path: str, **extra: Any) -> requests.Response:
        answer = self.session.request(method, self.endpoint_url + path, timeout=_REQUEST_TIMEOUT_S, **extra)
        if answer.status_code == requests.codes.not_found:
            raise FileNotFoundError(path)
        answer.raise_for_status()
        return answer

    def _object_path(self, url: str) -> str:
        bucket, key = self._split(url)
        return f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}"

    def buckets(self) -> list[str]:
        return [item["name"] for item in self._request("GET", "/storage/v1/b?project=test").json().get("items", ())]

    def make_bucket(self, name: str) -> str:
        try:
            self._request("POST", "/storage/v1/b", params={"project": "test"}, json={"name": name})
        except requests.HTTPError as exc:
            if exc.response.status_code != requests.codes.conflict:
                raise
        return f"gs://{name}"

    def raw_get(self, url: str) -> bytes:
        return self._request("GET", self._object_path(url), params={"alt": "media"}).content

    def raw_put(self, url: str, data: bytes) -> None:
        bucket, key = self._split(url)
        # One request ("media"): the resumable uploads of fake-gcs-server cost quadratic time.
        query = {"uploadType": "media", "name": key}
        headers = {"Content-Type": "application/octet-stream"}
        self._request("POST", f"/upload/storage/v1/b/{bucket}/o", params=query, data=data, headers=headers)

    def raw_list(self, url_prefix: str) -> list[str]:
        bucket, prefix = self._split(url_prefix)
        names: list[str] = []
        query: dict[str, str] = {"prefix": prefix}
        while True:
            page = self._request("GET", f"/storage/v1/b/{bucket}/o", params=query).json()
            names += [item["name"] for item in page.get("items", ())]
            if not page.get("nextPageToken"):
                return sorted(f"gs://{bucket}/{name}" for name in names)
            query["pageToken"] = page["nextPageToken"]

    def raw_delete(self, url: str) -> None:
        self._request("DELETE", self._object_path(url))

    def is_ready(self) -> bool:
        try:
            if _READY_BUCKET not in self.buckets():
                self.make_bucket(_READY_BUCKET)
            self.raw_put(f"gs://{_READY_BUCKET}/probe", b"x")
            self.raw_delete(f"gs://{_READY_BUCKET}/probe")
            self._request("DELETE", f"/storage/v1/b/{_READY_BUCKET}")
        except (requests.RequestException, FileNotFoundError):
            return False
        return True

    def close(self) -> None:
        self.session.close()


@dataclass(frozen=True, kw_only=True)
class FreshPrefix:
    """An empty prefix of a test's own on a running server.

    Attributes:
        url: where it is, without a trailing slash.
    """

    url: str
    server: Server

    @property
    def storage_options(self) -> dict[str, Any]:
        """The server's options, copied, so that a test may change them."""
        return copy.deepcopy(dict(self.server.storage_options))


def _expect_nothing(request: Any, **_: object) -> None:
    del request.headers["Expect"]  # fine with these headers if there is none
