"""Who goes by a proxy is decided by Python's rules, for every engine and every verb alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.engines import OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_object_server import ObjectServer

ON_S3 = [pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore")]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A proxy that the environment names; it answers as the store would."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ObjectServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        yield proxy


def _put_and_list(engine: Engine, server: ObjectServer, **more: object) -> None:
    store = engine.open(server, **more)
    store.put("k", [memoryview(b"x")])
    store.list()
    store.close()


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("exempt", ["", "other.example", "127.0.0.1:1", "10.0.0.0/8", "no/block", "128.0.0.1"])
def test_a_proxy_serves_what_nobody_exempts(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch, engine: Engine, exempt: str
) -> None:
    monkeypatch.setenv("NO_PROXY", exempt)
    _put_and_list(engine, server)
    assert (server.count(), proxy.count()) == (0, 2)


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("exempt", ["*", "127.0.0.1", "{host_and_port}", "x.example, 127.0.0.0/8", "a,127.0.0.1/32"])
def test_what_is_exempt_is_reached_directly(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch, engine: Engine, exempt: str
) -> None:
    monkeypatch.setenv("NO_PROXY", exempt.format(host_and_port=f"127.0.0.1:{server.port}"))
    _put_and_list(engine, server)
    assert (server.count(), proxy.count()) == (2, 0)


@pytest.mark.parametrize("engine", ON_S3)
def test_a_name_is_exempt_with_what_is_below_it(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setenv("NO_PROXY", ".localhost")
    _put_and_list(engine, server, endpoint_url=f"http://localhost:{server.port}")
    assert (server.count(), proxy.count()) == (2, 0)


@pytest.mark.parametrize("engine", ON_S3)
def test_a_proxy_for_everything_else_serves_no_scheme_that_has_none(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv("ALL_PROXY", proxy.endpoint)
    monkeypatch.setenv("HTTPS_PROXY", proxy.endpoint)
    _put_and_list(engine, server)
    assert (server.count(), proxy.count()) == (2, 0)


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("is_named", [True, False])
def test_proxies_among_the_options_win(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch, engine: Engine, is_named: bool
) -> None:
    monkeypatch.setenv("NO_PROXY", "*" if is_named else "")
    proxies = {"http": proxy.endpoint} if is_named else {}
    _put_and_list(engine, server, config_kwargs={"proxies": proxies})
    assert (server.count(), proxy.count()) == ((0, 2) if is_named else (2, 0))


def test_obstore_on_gcs_goes_by_the_same_rules(
    server: ObjectServer, proxy: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OBSTORE_GCS.open(server)
    store.put("k", [memoryview(b"x")])
    store.close()
    assert (server.count(), proxy.count()) == (0, 1)
    monkeypatch.setenv("NO_PROXY", f"127.0.0.1:{server.port}")
    store = OBSTORE_GCS.open(server)
    store.put("k", [memoryview(b"x")])
    store.close()
    assert (server.count(), proxy.count()) == (1, 1)
