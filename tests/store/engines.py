"""Make a store of each remote engine on the tests' own server, with credentials that must never show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from google.oauth2.credentials import Credentials

from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Store
from cloudckpt.store.fsspec import FsspecStore
from cloudckpt.store.obstore import ObstoreStore
from cloudckpt.store.terms import PutTerms
from tests.store.http_object_server import ObjectServer

__all__ = ["CANARY", "GCSFS", "OBSTORE_GCS", "OBSTORE_S3", "S3FS", "VERBS", "Engine"]

CANARY = "CANARY"
_PATIENCE = RetryPolicy(request_timeout_s=20.0, connect_timeout_s=5.0)
_S3_OPTIONS: Mapping[str, object] = {
    "key": "CANARYKEYID0123456789",
    "secret": "CANARYSECRET0123456789",
    "token": "CANARYTOKEN0123456789",
    "client_kwargs": {"region_name": "eu-west-1"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine in front of one dialect."""

    scheme: str
    kind: type[FsspecStore | ObstoreStore]

    def options(self, server: ObjectServer) -> dict[str, object]:
        given = _S3_OPTIONS if self.scheme == "s3" else {"token": Credentials(token="CANARYTOKEN0123456789")}
        return {**given, "endpoint_url": server.endpoint}

    def open(
        self,
        server: ObjectServer,
        *,
        root: str = "bucket/root",
        retry: RetryPolicy = _PATIENCE,
        terms: PutTerms | None = None,
        **more: object,
    ) -> FsspecStore | ObstoreStore:
        options = {**self.options(server), **more}
        return self.kind(f"{self.scheme}://{root}", storage_options=options, retry=retry, terms=terms)


S3FS = Engine(scheme="s3", kind=FsspecStore)
GCSFS = Engine(scheme="gs", kind=FsspecStore)
OBSTORE_S3 = Engine(scheme="s3", kind=ObstoreStore)
OBSTORE_GCS = Engine(scheme="gs", kind=ObstoreStore)

# Each verb once, on an object `there` of 100 bytes, or on a name that is free.
VERBS: Mapping[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("fresh", [memoryview(b"abc")]),
    "create": lambda store: store.create("fresh", b"abc"),
    "get": lambda store: store.get("there", start=10, stop=30),
    "read": lambda store: store.read("there", limit_bytes=100),
    "head": lambda store: store.head("there"),
    "list": lambda store: store.list(),
    "delete": lambda store: store.delete(["there"]),
}
