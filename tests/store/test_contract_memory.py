"""fsspec's memory filesystem, and the tests' own fault store, keep the contract of all stores."""

from __future__ import annotations

import random
import secrets
import time

import fsspec
import pytest

from cloudckpt.store import RetryingStore
from tests.store.contract import Backend, StoreContract
from tests.store.fault_store import Bucket, FaultStore


class TestMemory(StoreContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        # The filesystem is one for the whole process, so each test has a root of its own.
        root = f"/{secrets.token_hex(8)}/root/"
        files = fsspec.filesystem("memory")

        def raw_list() -> list[str]:
            return sorted(path.removeprefix(root) for path in files.store if path.startswith(root))

        def raw_clear() -> None:
            for key in raw_list():
                del files.store[root + key]

        return Backend(
            url=f"memory:/{root}".rstrip("/"),
            raw_get=lambda key: files.store[root + key].getvalue(),
            raw_put=lambda key, data: files.pipe_file(root + key, data),
            raw_list=raw_list,
            raw_clear=raw_clear,
        )


class TestFaultStoreWithoutFaults(StoreContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        bucket = Bucket(now_s=time.time())
        return Backend(
            url="memory://bucket/root",
            raw_get=bucket.raw_get,
            raw_put=bucket.raw_put,
            raw_list=bucket.raw_list,
            raw_clear=bucket.objects.clear,
            open_with=lambda policy: RetryingStore(
                FaultStore(bucket), policy, sleep=lambda _: None, rng=random.Random(0)
            ),
        )
