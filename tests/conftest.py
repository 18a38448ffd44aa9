"""Give tests real object stores on loopback: each server starts when a test first asks, and stops at the end.

All workers of pytest-xdist share them. A test gets an empty prefix, so it may keep what it likes there.
"""

from __future__ import annotations

import functools
import gc
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.session
import pytest
from hypothesis import settings

from servers import FreshPrefix, GcsServer, S3Server, Server
from sharing import Host, Kind, shared_server
from tests import effort

# In time, since no module above imports gcsfs: its default class asks for the bucket's kind by gRPC, which no
# emulator speaks.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# No test may find the credentials, profile, endpoint or proxy of the person who runs it.
for _name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR_"))]:
    del os.environ[_name]
# Nor is anything to be kept in that person's home.
os.environ["CLOUDCKPT_CACHE"] = "off"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Before torch is imported. Workers, ranks and programs share the cores, so that threads of torch would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Each session of botocore reads and parses its description of S3 anew, which is most of the cost of a client; within a
# session it is read once and shared, so it may be shared between sessions.
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)

# `--hypothesis-profile` comes after this.
settings.load_profile(effort.SHORT)

_ADDRESS = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Let the process that outlives the workers own the servers."""
    # A shell starts what runs in its background with interrupts ignored, and tests send some to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        config.stash[_ADDRESS] = config.workerinput["servers"]
        return
    host = Host()
    config.add_cleanup(host.close)
    config.stash[_ADDRESS] = host.address


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where the host is."""
    node.workerinput["servers"] = node.config.stash[_ADDRESS]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Search for no garbage among thousands of modules and tests, neither while they are made nor ever after."""
    gc.disable()
    try:
        return (yield)
    finally:
        if (probe := sys.modules.get("cloudckpt.store.probe")) is not None:
            # Most saves here are the first of their root, and it is eight threads that write in each race.
            probe._RACES = effort.examples(probe._RACES, short=1)
        gc.enable()
        gc.collect()
        gc.freeze()


@contextmanager
def _shared(config: pytest.Config, kind: Kind) -> Iterator[Any]:
    server = shared_server(config.stash[_ADDRESS], kind)
    yield server
    server.close()


@pytest.fixture(scope="session")
def seaweedfs_server(pytestconfig: pytest.Config) -> Iterator[S3Server]:
    """A SeaweedFS: a real S3 store that checks signatures."""
    with _shared(pytestconfig, "seaweedfs") as server:
        yield server


@pytest.fixture(scope="session")
def localstack_server(pytestconfig: pytest.Config) -> Iterator[S3Server]:
    """A LocalStack with S3 alone."""
    with _shared(pytestconfig, "localstack") as server:
        yield server


@pytest.fixture(scope="session")
def fake_gcs_server(pytestconfig: pytest.Config) -> Iterator[GcsServer]:
    """A fake-gcs-server: the JSON API of GCS."""
    with _shared(pytestconfig, "fake-gcs") as server:
        yield server


def _fresh_prefix(server: Server) -> FreshPrefix:
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
    """Begin with the files that take longest; skip what needs a GPU where there is none."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(effort.LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # costs seconds, so only for a run that has such tests

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
