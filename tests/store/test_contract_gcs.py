"""GCS keeps the contract of all stores: on fake-gcs-server, moved by gcsfs."""

from __future__ import annotations

import secrets

import pytest

from servers import GcsServer
from tests.store.contract import Backend, RemoteContract


class TestFakeGcsByGcsfs(RemoteContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, fake_gcs_server: GcsServer) -> Backend:
        server = fake_gcs_server
        if "contract" not in server.buckets():
            server.make_bucket("contract")
        root = f"gs://contract/{secrets.token_hex(6)}/"

        def raw_clear() -> None:
            for url in server.raw_list(root):
                server.raw_delete(url)

        return Backend(
            url=root.rstrip("/"),
            storage_options=dict(server.storage_options),
            raw_get=lambda key: server.raw_get(root + key),
            raw_put=lambda key, data: server.raw_put(root + key, data),
            raw_list=lambda: [url.removeprefix(root) for url in server.raw_list(root)],
            raw_clear=raw_clear,
        )
