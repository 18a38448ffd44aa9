"""Credentials are found and renewed as s3fs and gcsfs find and renew theirs, on either engine."""

from __future__ import annotations

import pickle
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import NoCredentialsError, PartialCredentialsError
from google.oauth2.credentials import Credentials

from cloudckpt.errors import AccessDeniedError, CredentialsExpiredError, OptionsError, TransientError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Store
from cloudckpt.store.credentials import AwsCredentials
from cloudckpt.store.fsspec import FsspecStore
from cloudckpt.store.obstore import ObstoreStore
from tests.store.credential_services import CredentialService, credential_service
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_object_server import Fault, ObjectServer

ON_S3 = [pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore")]
ON_GCS = [pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore")]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.fixture
def service() -> Iterator[CredentialService]:
    with credential_service() as service:
        yield service


def _signer(server: ObjectServer) -> tuple[str, str, str]:
    """Return key id, region and session token of the last request to S3."""
    headers = server.requests[-1].headers
    match = re.search(r"Credential=([^/]*)/\d+/([^/]*)/s3/", headers["authorization"])
    assert match is not None
    return match.group(1), match.group(2), headers.get("x-amz-security-token", "")


def _put(engine: Engine, server: ObjectServer, options: dict[str, object]) -> None:
    """Put an object from outside of `Engine.open`, whose options have credentials."""
    store = engine.kind(f"{engine.scheme}://bucket/root", storage_options=options)
    try:
        store.put("k", [memoryview(b"x")])
    finally:
        store.close()


# ---- S3


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize(
    "names",
    [
        {"key": "K", "secret": "S", "token": "T"},
        {"username": "K", "password": "S", "token": "T"},
        {"client_kwargs": {"aws_access_key_id": "K", "aws_secret_access_key": "S", "aws_session_token": "T"}},
    ],
)
def test_keys_may_be_given_under_all_names_that_s3fs_knows(
    server: ObjectServer, engine: Engine, names: dict[str, object]
) -> None:
    _put(engine, server, {**names, "endpoint_url": server.endpoint})
    assert _signer(server) == ("K", "us-east-1", "T")


@pytest.mark.parametrize("engine", ON_S3)
def test_keys_may_come_from_the_environment(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "ENVTOKEN")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    _put(engine, server, {"endpoint_url": server.endpoint})
    assert _signer(server) == ("ENVKEY", "eu-north-1", "ENVTOKEN")


@pytest.mark.parametrize("engine", ON_S3)
def test_given_keys_win_over_the_environment(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "ENVTOKEN")
    _put(engine, server, {"key": "K", "secret": "S", "endpoint_url": server.endpoint})
    assert _signer(server) == ("K", "us-east-1", "")


@pytest.mark.parametrize("engine", ON_S3)
def test_a_profile_brings_keys_region_and_endpoint(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = S\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = ap-south-1\nendpoint_url = {server.endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    _put(engine, server, {"profile": "lab"})
    assert _signer(server) == ("LABKEY", "ap-south-1", "")


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_environment_may_name_the_endpoint(
    server: ObjectServer, engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, server.endpoint)
    _put(engine, server, {"key": "K", "secret": "S"})
    assert server.requests[-1].path == "/bucket/root/k"


@pytest.mark.parametrize("engine", ON_S3)
def test_a_profile_that_does_not_exist_is_an_error_of_the_call(server: ObjectServer, engine: Engine) -> None:
    with pytest.raises(OptionsError, match="ProfileNotFound"):
        _put(engine, server, {"profile": "nobody", "endpoint_url": server.endpoint})


@pytest.mark.parametrize("engine", ON_S3)
def test_missing_credentials_are_named_before_anything_is_sent(server: ObjectServer, engine: Engine) -> None:
    with pytest.raises(AccessDeniedError, match="give credentials") as caught:
        _put(engine, server, {"endpoint_url": server.endpoint})
    assert not isinstance(caught.value, CredentialsExpiredError)
    assert server.count() == 0


@pytest.mark.parametrize("engine", ON_S3)
def test_half_a_pair_of_keys_is_refused(server: ObjectServer, engine: Engine) -> None:
    with pytest.raises(AccessDeniedError, match="PartialCredentialsError"):
        _put(engine, server, {"key": "K", "endpoint_url": server.endpoint})
    assert server.count() == 0


@pytest.mark.parametrize("engine", ON_S3)
def test_a_key_under_two_names_is_refused(server: ObjectServer, engine: Engine) -> None:
    with pytest.raises(OptionsError):
        _put(engine, server, {"key": "K", "username": "L", "secret": "S", "endpoint_url": server.endpoint})


@pytest.mark.parametrize("engine", ON_S3)
def test_an_anonymous_request_is_not_signed(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    _put(engine, server, {"anon": True, "endpoint_url": server.endpoint})
    assert "authorization" not in server.requests[-1].headers


@pytest.fixture
def role(service: CredentialService, monkeypatch: pytest.MonkeyPatch) -> CredentialService:
    """The credentials of a container's role."""
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.url)
    return service


@pytest.mark.parametrize("engine", ON_S3)
def test_the_role_of_a_container_is_asked_once(server: ObjectServer, role: CredentialService, engine: Engine) -> None:
    store = engine.kind("s3://bucket/root", storage_options={"endpoint_url": server.endpoint})
    for number in range(5):
        store.put(f"k{number}", [memoryview(b"x")])
    store.close()
    assert (_signer(server)[0], role.count) == ("CANARYKEYID000000001", 1)


@pytest.mark.parametrize("engine", ON_S3)
def test_a_refresh_asks_for_credentials_anew(server: ObjectServer, role: CredentialService, engine: Engine) -> None:
    def is_old(request: object) -> bool:
        return "CANARYTOKEN000000001" in str(request)

    server.inject(Fault(status=400, code="ExpiredToken"), times=-1, when=is_old)
    store = engine.kind("s3://bucket/root", storage_options={"endpoint_url": server.endpoint})
    with pytest.raises(CredentialsExpiredError):
        store.put("k", [memoryview(b"x")])
    store.refresh()
    store.put("k", [memoryview(b"x")])
    store.close()
    assert _signer(server)[2] == "CANARYTOKEN000000002"


def _refreshable(lifetime_s: float, names: Iterator[str]) -> RefreshableCredentials:
    def renew() -> dict[str, str]:
        expiry = datetime.now(UTC) + timedelta(seconds=lifetime_s)
        return {"access_key": next(names), "secret_key": "S", "token": "T", "expiry_time": expiry.isoformat()}

    return RefreshableCredentials.create_from_metadata(renew(), renew, method="test")


def test_keys_that_end_soon_are_renewed_before_they_end() -> None:
    credentials = AwsCredentials(lambda: _refreshable(300, iter(["first", "second", "third"])))
    assert [credentials()["access_key_id"] for _ in range(2)] == ["second", "third"]


def test_keys_that_last_are_kept_and_asked_for_again_within_minutes() -> None:
    credentials = AwsCredentials(lambda: _refreshable(7200, iter(["first", "second"])))
    asked_at = datetime.now(UTC)
    given = [credentials() for _ in range(3)]
    assert [each["access_key_id"] for each in given] == ["first"] * 3
    assert all(
        timedelta(0) < each["expires_at"] - asked_at < timedelta(minutes=5) for each in given if each["expires_at"]
    )


def test_keys_that_were_given_never_end() -> None:
    assert AwsCredentials.given("K", "S", None)()["expires_at"] is None


def test_what_cannot_be_found_is_raised_where_it_is_asked_for() -> None:
    with pytest.raises(NoCredentialsError):
        AwsCredentials(lambda: None).ensure()
    with pytest.raises(PartialCredentialsError):
        AwsCredentials.given("K", None, None)


def test_keys_do_not_show() -> None:
    credentials = AwsCredentials.given("CANARYKEYID0123456789", "CANARYSECRET0123456789", None)
    assert "CANARY" not in repr(credentials)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        pickle.dumps(credentials)


def test_obstores_own_configuration_holds_no_credential(server: ObjectServer) -> None:
    store = OBSTORE_S3.open(server)
    store.put("k", [memoryview(b"x")])
    with store._leased() as wire:
        native = wire._direct._client.store  # type: ignore[attr-defined]
        assert "CANARY" not in f"{native!r} {native.config} {native.client_options} {native.credential_provider}"
    store.close()


# ---- GCS


@pytest.mark.parametrize("engine", ON_GCS)
def test_a_token_is_sent(server: ObjectServer, engine: Engine) -> None:
    _put(engine, server, {"token": Credentials(token="T1"), "endpoint_url": server.endpoint})
    assert server.requests[-1].headers["authorization"] == "Bearer T1"


@pytest.mark.parametrize("engine", ON_S3)
def test_who_hands_out_credentials_and_hangs_is_named_and_not_the_store(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectServer() as server, socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{mute.getsockname()[1]}/c")
        retry = RetryPolicy(request_timeout_s=0.4)
        store = engine.kind("s3://bucket/root", storage_options={"endpoint_url": server.endpoint}, retry=retry)
        for call in (lambda: store.put("k", [memoryview(b"x")]), store.list):
            with pytest.raises(
                TransientError, match="nothing was sent, because the credentials did not come"
            ) as caught:
                call()
            assert not caught.value.may_have_landed
        assert server.count() == 0
        store.close()


@pytest.mark.parametrize("engine", ON_GCS)
def test_the_key_file_of_a_service_account_is_exchanged_for_a_token(
    server: ObjectServer, service: CredentialService, engine: Engine, tmp_path: Path
) -> None:
    path = service.service_account(tmp_path)
    store = engine.kind("gs://bucket/root", storage_options={"token": path, "endpoint_url": server.endpoint})
    for number in range(3):
        store.put(f"k{number}", [memoryview(b"x")])
    store.close()
    assert server.requests[-1].headers["authorization"] == "Bearer CANARYTOKEN000000001"
    assert service.count == 1


@pytest.mark.parametrize("engine", ON_GCS)
def test_a_refresh_fetches_a_new_token(
    server: ObjectServer, service: CredentialService, engine: Engine, tmp_path: Path
) -> None:
    path = service.service_account(tmp_path)
    server.inject(Fault(status=401, code="x"), times=-1, when=lambda request: "000000001" in str(request.headers))
    store = engine.kind("gs://bucket/root", storage_options={"token": path, "endpoint_url": server.endpoint})
    with pytest.raises(CredentialsExpiredError):
        store.create("k", b"x")
    store.refresh()
    store.create("k", b"x")
    store.close()
    assert server.requests[-1].headers["authorization"] == "Bearer CANARYTOKEN000000002"


def test_a_token_that_ends_soon_is_renewed_by_gcsfs(
    server: ObjectServer, service: CredentialService, tmp_path: Path
) -> None:
    service.lifetime_s = 200
    store = FsspecStore(
        "gs://bucket/root",
        storage_options={"token": service.service_account(tmp_path), "endpoint_url": server.endpoint},
    )
    for number in range(3):
        store.put(f"k{number}", [memoryview(b"x")])
    store.close()
    assert server.requests[-1].headers["authorization"] == "Bearer CANARYTOKEN000000003"


def test_a_key_file_that_is_none_is_an_error_and_does_not_show(server: ObjectServer, tmp_path: Path) -> None:
    path = tmp_path / "account.json"
    path.write_text('{"client_secret": "CANARYSECRET0123456789"}')
    store: Store = FsspecStore(
        "gs://bucket/root", storage_options={"token": str(path), "endpoint_url": server.endpoint}
    )
    with pytest.raises(OptionsError, match="refresh_token") as caught:
        store.create("k", b"x")
    assert "CANARY" not in f"{caught.value} {caught.value.__cause__}"
    store.close()


def test_obstore_does_not_write_to_gcs_without_credentials(server: ObjectServer) -> None:
    store = ObstoreStore("gs://bucket/root", storage_options={"token": "anon", "endpoint_url": server.endpoint})
    with pytest.raises(OptionsError, match='engine="fsspec"'):
        store.create("k", b"x")
    assert server.count() == 0
    store.close()


def test_gcsfs_writes_to_an_emulator_without_credentials(server: ObjectServer) -> None:
    _put(GCSFS, server, {"token": "anon", "endpoint_url": server.endpoint})
    assert "authorization" not in server.requests[-1].headers
