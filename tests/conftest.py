"""Give tests real object stores on loopback: each server starts when a test first asks, and stops at the end.

With xdist each worker has servers of its own. A test gets an empty prefix, so it may keep what it likes there.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from servers import FreshPrefix, GcsServer, S3Server, Server, fake_gcs, localstack_s3, seaweedfs

ServerT = TypeVar("ServerT", bound=Server)

# In time, since no module above imports gcsfs: its default class asks for the bucket's kind by gRPC, which no
# emulator speaks.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# No test may find the credentials, profile, endpoint or proxy of the person who runs it.
for _name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR_"))]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


@contextmanager
def _running(
    start: Callable[[Path], AbstractContextManager[ServerT]], factory: pytest.TempPathFactory
) -> Iterator[ServerT]:
    directory = factory.mktemp(start.__name__)
    with start(directory) as server:
        yield server
    # The data of a whole run is large, and pytest keeps its directories.
    shutil.rmtree(directory / "data", ignore_errors=True)


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS: a real S3 store that checks signatures."""
    with _running(seaweedfs, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="session")
def localstack_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A LocalStack with S3 alone."""
    with _running(localstack_s3, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="session")
def fake_gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """A fake-gcs-server: the JSON API of GCS."""
    with _running(fake_gcs, tmp_path_factory) as server:
        yield server


def _fresh_prefix(server: Server) -> FreshPrefix:
    if "tests" not in server.buckets():
        server.make_bucket("tests")
    return FreshPrefix(url=f"{server.scheme}://tests/{secrets.token_hex(6)}", server=server)


@pytest.fixture
def s3_url(seaweedfs_server: S3Server) -> FreshPrefix:
    """An empty prefix on SeaweedFS."""
    return _fresh_prefix(seaweedfs_server)


@pytest.fixture
def localstack_url(localstack_server: S3Server) -> FreshPrefix:
    """An empty prefix on LocalStack."""
    return _fresh_prefix(localstack_server)


@pytest.fixture
def gs_url(fake_gcs_server: GcsServer) -> FreshPrefix:
    """An empty prefix on fake-gcs-server."""
    return _fresh_prefix(fake_gcs_server)


@pytest.fixture(params=["s3_url", "localstack_url", "gs_url"])
def remote_url(request: pytest.FixtureRequest) -> FreshPrefix:
    """An empty prefix on each of the servers in turn."""
    prefix: FreshPrefix = request.getfixturevalue(request.param)
    return prefix


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # costs seconds, so only for a run that has such tests

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
