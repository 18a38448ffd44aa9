"""The disk keeps the contract of all stores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.store.contract import Backend, StoreContract


class TestLocal(StoreContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Backend:
        root = tmp_path_factory.mktemp("contract") / "root"

        def raw_put(key: str, data: bytes) -> None:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(data)

        def raw_list() -> list[str]:
            found = [Path(directory, name) for directory, _, names in os.walk(root) for name in names]
            return sorted(str(path.relative_to(root)) for path in found)

        return Backend(
            url=str(root),
            raw_get=lambda key: (root / key).read_bytes(),
            raw_put=raw_put,
            raw_list=raw_list,
            raw_clear=lambda: shutil.rmtree(root, ignore_errors=True),
            many_keys=200,  # a disk has no pages, and an fsync for each object
        )
