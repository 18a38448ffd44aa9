"""S3 keeps the contract of all stores: on SeaweedFS and on LocalStack, moved by obstore and by s3fs."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from servers import S3Server
from tests.store.contract import Backend, CredentialContract, RemoteContract


def backend_on(server: S3Server, engine: str, **more: Any) -> Backend:
    if "contract" not in server.buckets():
        server.make_bucket("contract")
    root = f"s3://contract/{secrets.token_hex(6)}/"
    return Backend(
        url=root.rstrip("/"),
        engine=engine,
        storage_options=dict(server.storage_options),
        raw_get=lambda key: server.raw_get(root + key),
        raw_put=lambda key, data: server.raw_put(root + key, data),
        raw_list=lambda: [url.removeprefix(root) for url in server.raw_list(root)],
        raw_clear=lambda: clear(server, root),
        **more,
    )


def clear(server: S3Server, prefix: str) -> None:
    """Remove all objects, and the directories that SeaweedFS keeps listing for a while after its last object."""
    bucket, _, start = prefix.removeprefix("s3://").partition("/")
    remove(server, bucket, [url.removeprefix(f"s3://{bucket}/") for url in server.raw_list(prefix)])
    if not (found := directories(server, bucket, start)):
        return
    remove(server, bucket, found)
    for below in directories(server, bucket, start):  # those with others in them
        clear(server, f"s3://{bucket}/{below}")
        remove(server, bucket, [below])


def directories(server: S3Server, bucket: str, start: str) -> list[str]:
    pages = server.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start, Delimiter="/")
    return [found["Prefix"] for page in pages for found in page.get("CommonPrefixes", ())]


def remove(server: S3Server, bucket: str, keys: list[str]) -> None:
    for first in range(0, len(keys), 1000):
        objects = [{"Key": key} for key in keys[first : first + 1000]]
        server.client.delete_objects(Bucket=bucket, Delete={"Objects": objects})


class OnSeaweedFs(CredentialContract):
    engine: str

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, seaweedfs_server: S3Server) -> Backend:
        secret = str(seaweedfs_server.storage_options["secret"])
        return backend_on(seaweedfs_server, cls.engine, secrets=[secret], server_makes_buckets=True)

    @pytest.fixture(params=["unknown-key", "wrong-secret"])
    def wrong_credentials(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        if request.param == "unknown-key":
            return {"key": "AKIAWRONGWRONGWRONG"}
        return {"secret": "wrong-secret-wrong-secret"}


class TestSeaweedFsByObstore(OnSeaweedFs):
    engine = "obstore"


class TestSeaweedFsByS3fs(OnSeaweedFs):
    engine = "fsspec"


class OnLocalStack(RemoteContract):
    engine: str

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, localstack_server: S3Server) -> Backend:
        return backend_on(localstack_server, cls.engine)


class TestLocalStackByObstore(OnLocalStack):
    engine = "obstore"


@pytest.mark.slow  # each engine, and each server, has the contract by default
class TestLocalStackByS3fs(OnLocalStack):
    engine = "fsspec"
