"""fsspec's storage options mean the same on either engine, or are refused by name."""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import botocore
import botocore.session
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.oauth2.credentials import Credentials

from cloudckpt.errors import OptionsError, StorageError, TransientError
from cloudckpt.options import RetryPolicy
from cloudckpt.store import open_store
from cloudckpt.store.fsspec import FsspecStore
from cloudckpt.store.obstore import ObstoreStore
from cloudckpt.store.obstore_s3 import S3Options, _where
from cloudckpt.store.retrying import RetryingStore
from cloudckpt.store.terms import PutTerms
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, VERBS, Engine
from tests.store.handling import while_handling
from tests.store.http_object_server import ObjectServer

ON_S3 = [pytest.param(S3FS, id="s3fs"), pytest.param(OBSTORE_S3, id="obstore")]
ON_GCS = [pytest.param(GCSFS, id="gcsfs"), pytest.param(OBSTORE_GCS, id="obstore")]
KEY_OF_32 = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


def _headers(engine: Engine, server: ObjectServer, **options: object) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return what a put and a create of a small object send."""
    store = engine.open(server, **options)
    store.put("p", [memoryview(b"abc")])
    store.create("c", b"abc")
    store.close()
    put, create = server.requests
    return put.headers, create.headers


# ---- S3: what goes with each object


@pytest.mark.parametrize("engine", ON_S3)
def test_a_body_goes_unsigned_unless_asked_for(server: ObjectServer, engine: Engine) -> None:
    for headers in _headers(engine, server):
        assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert not [name for name in headers if name.startswith(("x-amz-checksum", "content-md5"))]


@pytest.mark.parametrize("engine", ON_S3)
def test_a_signed_body_is_hashed(server: ObjectServer, engine: Engine) -> None:
    large = bytes(range(256)) * 20_000
    store = engine.open(server, terms=PutTerms(signed_payload=True))
    store.put("p", [memoryview(large), memoryview(b"end")])
    store.close()
    assert server.requests[-1].headers["x-amz-content-sha256"] == hashlib.sha256(large + b"end").hexdigest()
    assert server.data("root/p") == large + b"end"


@pytest.mark.parametrize("engine", ON_S3)
def test_signing_may_be_asked_for_as_s3fs_spells_it(server: ObjectServer, engine: Engine) -> None:
    put, _ = _headers(engine, server, config_kwargs={"s3": {"payload_signing_enabled": True}})
    assert put["x-amz-content-sha256"] == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("engine", ON_S3)
def test_only_a_create_is_conditional(server: ObjectServer, engine: Engine) -> None:
    put, create = _headers(engine, server)
    assert (put.get("if-none-match"), create.get("if-none-match")) == (None, "*")


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"ServerSideEncryption": "AES256"}, {"": "AES256"}),
        (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:key", "BucketKeyEnabled": True},
            {"": "aws:kms", "-aws-kms-key-id": "arn:aws:kms:key", "-bucket-key-enabled": "true"},
        ),
        (
            {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": KEY_OF_32},
            {
                "-customer-algorithm": "AES256",
                "-customer-key": base64.b64encode(KEY_OF_32.encode()).decode(),
                "-customer-key-md5": base64.b64encode(hashlib.md5(KEY_OF_32.encode()).digest()).decode(),
            },
        ),
    ],
    ids=["s3", "kms", "customer"],
)
def test_encryption_is_asked_for_with_each_object(
    server: ObjectServer, engine: Engine, given: dict[str, object], sent: dict[str, str]
) -> None:
    prefix = "x-amz-server-side-encryption"
    for headers in _headers(engine, server, s3_additional_kwargs=given):
        found = {name.removeprefix(prefix): text for name, text in headers.items() if name.startswith(prefix)}
        assert found == sent


@pytest.mark.parametrize("engine", ON_S3)
def test_a_storage_class_goes_with_each_object(server: ObjectServer, engine: Engine) -> None:
    for headers in _headers(engine, server, s3_additional_kwargs={"StorageClass": "STANDARD_IA"}):
        assert headers["x-amz-storage-class"] == "STANDARD_IA"


@pytest.mark.parametrize("engine", ON_S3)
def test_the_requester_pays_for_every_verb(server: ObjectServer, engine: Engine) -> None:
    store = engine.open(server, requester_pays=True)
    store.put("k", [memoryview(b"x")])
    store.get("k", start=0, stop=1)
    store.list()
    store.delete(["k"])
    store.close()
    assert [request.headers.get("x-amz-request-payer") for request in server.requests] == ["requester"] * 4


@pytest.mark.parametrize("engine", ON_S3)
def test_a_bulk_delete_carries_the_checksum_that_look_alikes_demand(server: ObjectServer, engine: Engine) -> None:
    server.put_object("root/k", b"x")
    store = engine.open(server)
    store.delete(["k"])
    store.close()
    request = server.requests[-1]
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(request.body).digest()).decode()
    assert server.keys() == []


@pytest.mark.parametrize("engine", ON_S3)
def test_a_bulk_delete_takes_a_thousand_keys_a_request(server: ObjectServer, engine: Engine) -> None:
    with RetryingStore(engine.open(server), RetryPolicy()) as store:
        store.delete([f"k{number}" for number in range(2001)])
    assert server.count("POST") == 3


def test_every_request_says_whose_bucket_it_is_meant_for(server: ObjectServer) -> None:
    store = S3FS.open(server, s3_additional_kwargs={"ExpectedBucketOwner": "111122223333"})
    server.put_object("root/there", bytes(100))
    for name, verb in VERBS.items():
        verb(store)
        if name == "put":
            del server.objects["bucket", "root/fresh"]
    store.close()
    owners = [request.headers.get("x-amz-expected-bucket-owner") for request in server.requests]
    assert owners == ["111122223333"] * len(VERBS)


# ---- S3: where requests go


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("https://bucket.s3.amazonaws.com", "us-east-1", True)),
        (
            {"client_kwargs": {"region_name": "eu-west-1"}},
            ("https://bucket.s3.eu-west-1.amazonaws.com", "eu-west-1", True),
        ),
        (
            {"config_kwargs": {"region_name": "eu-west-1"}},
            ("https://bucket.s3.eu-west-1.amazonaws.com", "eu-west-1", True),
        ),
        ({"use_ssl": False}, ("http://bucket.s3.amazonaws.com", "us-east-1", True)),
        ({"endpoint_url": "http://127.0.0.1:9000"}, ("http://127.0.0.1:9000", "us-east-1", False)),
        ({"endpoint_url": "https://minio.example"}, ("https://minio.example", "us-east-1", False)),
        ({"endpoint_url": "https://gate.example/s3"}, ("https://gate.example/s3", "us-east-1", False)),
        ({"client_kwargs": {"endpoint_url": "https://minio.example"}}, ("https://minio.example", "us-east-1", False)),
        (
            {"endpoint_url": "https://minio.example", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            ("https://bucket.minio.example", "us-east-1", True),
        ),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}}, ("https://s3.amazonaws.com", "us-east-1", False)),
        (
            {"client_kwargs": {"region_name": "us-west-2"}, "config_kwargs": {"s3": {"use_dualstack_endpoint": True}}},
            ("https://bucket.s3.dualstack.us-west-2.amazonaws.com", "us-west-2", True),
        ),
        (
            {"client_kwargs": {"region_name": "us-west-2"}, "config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
            ("https://bucket.s3-accelerate.amazonaws.com", "us-west-2", True),
        ),
        (
            {"client_kwargs": {"region_name": "us-west-2"}, "config_kwargs": {"use_fips_endpoint": True}},
            ("https://bucket.s3-fips.us-west-2.amazonaws.com", "us-west-2", True),
        ),
        (
            {"client_kwargs": {"region_name": "cn-north-1"}},
            ("https://bucket.s3.cn-north-1.amazonaws.com.cn", "cn-north-1", True),
        ),
    ],
)
def test_obstore_sends_where_botocore_would(options: dict[str, object], expected: tuple[str, str, bool]) -> None:
    read = S3Options.read(options, signed_payload=False)
    assert _where(botocore.session.Session(), "bucket", read) == expected


def test_a_bucket_with_dots_is_addressed_by_path() -> None:
    read = S3Options.read({"client_kwargs": {"region_name": "eu-west-1"}}, signed_payload=False)
    origin, _, is_virtual = _where(botocore.session.Session(), "my.bucket", read)
    assert (origin, is_virtual) == ("https://s3.eu-west-1.amazonaws.com", False)


def test_plain_http_is_used_only_where_it_was_written(server: ObjectServer) -> None:
    options = {"key": "K", "secret": "S", "endpoint_url": server.endpoint.replace("http://", "https://")}
    store = ObstoreStore("s3://bucket/root", storage_options=options, retry=RetryPolicy(request_timeout_s=2.0))
    with pytest.raises(TransientError):
        store.create("k", b"x")
    store.close()
    assert server.keys() == []


# ---- what is refused

_REFUSED_BY_OBSTORE = [
    ({"session": object()}, "session"),
    ({"cache_regions": True}, "cache_regions"),
    ({"version_aware": True}, "version_aware"),
    ({"asynchronous": True}, "asynchronous"),
    ({"misspelt": 1}, "misspelt"),
    ({"client_kwargs": {"api_version": "CANARY"}}, "api_version"),
    ({"config_kwargs": {"max_pool_connections": 5}}, "max_pool_connections"),
    ({"config_kwargs": {"signature_version": "s3"}}, "signature_version"),
    ({"config_kwargs": {"retries": {"max_attempts": 9}}}, "retries"),
    ({"config_kwargs": {"request_checksum_calculation": "when_supported"}}, "request_checksum_calculation"),
    ({"s3_additional_kwargs": {"ACL": "CANARY"}}, "ACL"),
    ({"s3_additional_kwargs": {"ExpectedBucketOwner": "CANARY"}}, "ExpectedBucketOwner"),
]


@pytest.mark.parametrize(("options", "name"), _REFUSED_BY_OBSTORE, ids=[name for _, name in _REFUSED_BY_OBSTORE])
def test_what_obstore_cannot_honour_is_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(OptionsError, match=name) as caught:
        ObstoreStore("s3://bucket/root", storage_options=options)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"default_block_size": 5, "default_fill_cache": False, "default_cache_type": "none", "max_concurrency": 3},
        {"skip_instance_cache": True, "use_listings_cache": True, "listings_expiry_time": 5},
        {"version_aware": False, "cache_regions": False, "session": None, "client_kwargs": None, "config_kwargs": {}},
        {"config_kwargs": {"signature_version": botocore.UNSIGNED, "request_checksum_calculation": "when_required"}},
    ],
)
@pytest.mark.parametrize("engine", ON_S3)
def test_what_steers_nothing_here_is_accepted(server: ObjectServer, engine: Engine, options: dict[str, object]) -> None:
    store = engine.open(server, **options)
    store.create("k", b"x")
    store.close()
    assert server.keys() == ["root/k"]


@pytest.mark.parametrize("name", ["retries", "connect_timeout", "read_timeout"])
@pytest.mark.parametrize("engine", ON_S3)
def test_patience_is_set_in_one_place_only(server: ObjectServer, engine: Engine, name: str) -> None:
    with pytest.raises(OptionsError, match=name):
        engine.open(server, config_kwargs={name: 5}).create("k", b"x")


@pytest.mark.parametrize("url", ["s3://bucket/root", "gs://bucket/root"])
@pytest.mark.parametrize("kind", [FsspecStore, ObstoreStore])
def test_a_misspelt_option_is_refused_when_the_store_is_made(url: str, kind: type[FsspecStore | ObstoreStore]) -> None:
    with pytest.raises(OptionsError, match="enpoint_url"):
        kind(url, storage_options={"enpoint_url": "http://127.0.0.1:1"})


@pytest.mark.parametrize("scheme", ["memory", "file", "az", "http"])
def test_obstore_serves_s3_and_gs_alone(scheme: str) -> None:
    with pytest.raises(OptionsError, match='engine="fsspec"'):
        ObstoreStore(f"{scheme}://bucket/root")


@pytest.mark.parametrize("bucket", ["arn:aws:s3:eu-west-1:123456789012:accesspoint/a", "name--use1-az4--x-s3"])
def test_obstore_does_not_serve_special_buckets(bucket: str) -> None:
    store = ObstoreStore(f"s3://{bucket}/root", storage_options={"key": "K", "secret": "S"})
    with pytest.raises(OptionsError, match='engine="fsspec"'):
        store.create("k", b"x")
    store.close()


@pytest.mark.parametrize(
    "url", ["bucket/root", "s3://", "s3:///root", "s3://bucket/a//b", "s3://bucket/../x", "simplecache::s3://bucket/x"]
)
@pytest.mark.parametrize("kind", [FsspecStore, ObstoreStore])
def test_a_url_that_names_no_root_is_refused(url: str, kind: type[FsspecStore | ObstoreStore]) -> None:
    with pytest.raises(OptionsError):
        kind(url)


# ---- GCS


@pytest.mark.parametrize("engine", ON_GCS)
def test_only_a_create_is_conditional_on_gcs(server: ObjectServer, engine: Engine) -> None:
    store = engine.open(server)
    store.put("p", [memoryview(b"abc")])
    store.create("c", b"abc")
    store.close()
    sent = [
        request.query.get("ifGenerationMatch") or request.headers.get("x-goog-if-generation-match")
        for request in server.requests
    ]
    assert sent == [None, "0"]


@pytest.mark.parametrize("engine", ON_GCS)
def test_the_project_of_the_requester_pays(server: ObjectServer, engine: Engine) -> None:
    store = engine.open(server, requester_pays=True, project="my-project")
    store.put("k", [memoryview(b"x")])
    store.get("k", start=0, stop=1)
    store.list()
    store.close()
    sent = [
        request.query.get("userProject") or request.headers.get("x-goog-user-project") for request in server.requests
    ]
    assert sent == ["my-project"] * 3


def test_obstore_wants_to_know_which_project_pays(server: ObjectServer) -> None:
    store = OBSTORE_GCS.open(server, requester_pays=True)
    with pytest.raises(OptionsError, match="project"):
        store.create("k", b"x")
    store.close()


@pytest.mark.parametrize("name", ["session_kwargs", "requests_timeout", "version_aware", "asynchronous"])
def test_what_obstore_cannot_honour_on_gcs_is_refused_by_name(name: str) -> None:
    with pytest.raises(OptionsError, match=name):
        ObstoreStore("gs://bucket/root", storage_options={name: {"CANARY": 1}, "token": Credentials(token="T")})


@pytest.mark.parametrize("engine", ON_GCS)
def test_the_environment_may_name_an_emulator_of_gcs(
    server: ObjectServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    store = engine.kind("gs://bucket/root", storage_options={"token": Credentials(token="T")})
    store.create("k", b"x")
    store.close()
    assert server.keys() == ["root/k"]


# ---- endpoints


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://127.0.0.1:port", "is no URL"),
        ("http://127.0.0.1:9000 ", "has a blank"),
        ("http://127.0.0.1:9000\t", "control|blank|line break"),
        ("http://my host:9000", "has a blank"),
        ("http://", "has no host"),
        ("http://[::1:9000", "is no URL"),
        ("127.0.0.1:9000", "does not begin with http:// or https://"),
        ("ftp://server", "does not begin with http:// or https://"),
        ("http://user:canary@server", "holds a user or a password"),
        ("http://server/?canary=1", "has a query or a fragment"),
    ],
)
@pytest.mark.parametrize("place", ["endpoint_url in storage_options", "client_kwargs", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize("engine", ["obstore", "fsspec"])
def test_an_endpoint_that_is_no_url_is_refused_at_opening(
    engine: str, place: str, endpoint: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, object] = {"key": "k", "secret": "s"}
    if place == "client_kwargs":
        options["client_kwargs"] = {"endpoint_url": endpoint}
    elif place == "AWS_ENDPOINT_URL":
        monkeypatch.setenv(place, endpoint)
    else:
        options["endpoint_url"] = endpoint
    with pytest.raises(OptionsError, match=words) as caught:
        open_store("s3://bucket/root", storage_options=options, engine=engine)
    assert endpoint not in str(caught.value), "it may hold a password"


FAR = ["http://minio:9000", "http://10.0.0.7:9000", "http://localhost.example", "http://127.0.0.1.example:9000"]
NEAR = [
    "http://127.0.0.1:9000",
    "http://localhost:9000",
    "http://s3.localhost:4566",
    "http://[::1]:9000",
    "https://far",
]
ENGINES = [("s3", "obstore"), ("s3", "fsspec"), ("gs", "fsspec"), ("gs", "obstore")]


@pytest.mark.parametrize("endpoint", FAR)
@pytest.mark.parametrize(("scheme", "engine"), ENGINES)
def test_plain_http_to_another_machine_is_refused_at_opening(scheme: str, engine: str, endpoint: str) -> None:
    with pytest.raises(OptionsError, match=r"plain http to another machine.* 'allow_http': True in storage_options"):
        open_store(f"{scheme}://bucket/root", storage_options={"endpoint_url": endpoint}, engine=engine)
    open_store(
        f"{scheme}://bucket/root", storage_options={"endpoint_url": endpoint, "allow_http": True}, engine=engine
    ).close()


@pytest.mark.parametrize("endpoint", NEAR)
@pytest.mark.parametrize(("scheme", "engine"), ENGINES)
def test_what_leaves_this_machine_encrypted_or_not_at_all_needs_no_leave(
    scheme: str, engine: str, endpoint: str
) -> None:
    open_store(f"{scheme}://bucket/root", storage_options={"endpoint_url": endpoint}, engine=engine).close()


@pytest.mark.parametrize(
    ("scheme", "variable", "text"),
    [
        ("s3", "AWS_ENDPOINT_URL", "http://far"),
        ("s3", "AWS_ENDPOINT_URL_S3", "http://far"),
        ("gs", "STORAGE_EMULATOR_HOST", "far:1"),
    ],
)
def test_plain_http_of_the_environment_is_refused_by_its_name(
    scheme: str, variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(OptionsError, match=f"{variable} is plain http"):
        open_store(f"{scheme}://bucket/root")
    monkeypatch.setenv("CLOUDCKPT_STORAGE_OPTIONS", '{"allow_http": true}')
    open_store(f"{scheme}://bucket/root").close()


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("way", ["profile", "use_ssl"])
def test_plain_http_that_shows_late_is_refused_before_anything_is_sent(
    engine: Engine, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {FAR[1]}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    keys: dict[str, object] = {"key": "K", "secret": "S"}
    options = {**keys, "use_ssl": False} if way == "use_ssl" else {**keys, "profile": "lab"}
    store = engine.kind("s3://bucket/root", storage_options=options)
    with pytest.raises(OptionsError, match="plain http to another machine"):
        store.head("k")
    store.close()


@pytest.mark.parametrize("allowed", ["true", 1, None])
def test_leave_for_plain_http_is_true_or_false(allowed: object) -> None:
    with pytest.raises(OptionsError, match=r"storage_options\['allow_http'\] is of type"):
        open_store("s3://bucket/root", storage_options={"endpoint_url": FAR[0], "allow_http": allowed})


@pytest.mark.parametrize("endpoint", ["", 9000, b"http://127.0.0.1:9000"])
@pytest.mark.parametrize("url", ["s3://bucket/root", "gs://bucket/root"])
def test_an_endpoint_that_is_given_is_a_text(url: str, endpoint: object) -> None:
    for options in ({"endpoint_url": endpoint}, {"client_kwargs": {"endpoint_url": endpoint}}):
        with pytest.raises(OptionsError, match=r"endpoint_url.* is (empty|a int|a bytes); write http\(s\)://host:port"):
            open_store(url, storage_options=options)


@pytest.mark.parametrize("url", ["s3://bucket/root", "gs://bucket/root", "az://container/root"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"key": 12345678}, "['key'] is of type int"),
        ({"secret": 1.5}, "['secret'] is of type float"),
        ({"token": True}, "['token'] is of type bool"),
        ({"client_kwargs": {"aws_session_token": 12345678}}, "['client_kwargs']['aws_session_token'] is of type int"),
    ],
)
def test_a_number_where_a_text_is_meant_is_refused_by_name(url: str, options: dict[str, object], name: str) -> None:
    with pytest.raises(OptionsError, match=f"storage_options{re.escape(name)}") as caught:
        open_store(url, storage_options=options)
    assert "12345678" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "127.0.0.1:99999", "http://a b", "ftp://a"])
def test_so_is_one_of_google(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    with pytest.raises(OptionsError, match="STORAGE_EMULATOR_HOST"):
        open_store("gs://bucket/root")


# ---- TLS


class _TlsServer(ObjectServer):
    """The same server behind a certificate of its own."""

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)

    @property
    def endpoint(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _serve(self, connection: object) -> None:
        try:
            super()._serve(self._context.wrap_socket(connection, server_side=True))  # type: ignore[arg-type]
        except OSError:
            connection.close()  # type: ignore[attr-defined]  # the client did not like the certificate


@pytest.fixture(scope="module", params=[False, True], ids=["", "its own authority"])
def certificate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new self-signed certificate of 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=request.param, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + built.public_bytes(pem))
    return path


@pytest.mark.parametrize("engine", ON_S3)
@pytest.mark.parametrize("way", ["off", "bundle", "environment"])
def test_a_certificate_is_trusted_where_the_options_say_so(
    engine: Engine, certificate: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    verify = {"off": False, "bundle": str(certificate), "environment": None}[way]
    client = {"region_name": "us-east-1"} | ({} if verify is None else {"verify": verify})
    with _TlsServer(certificate) as server:
        store = engine.open(server, client_kwargs=client)
        store.put("k", [memoryview(bytes(300_000))])
        assert len(store.get("k", start=0, stop=300_000)) == 300_000
        store.close()
        assert server.count() == 2


@pytest.mark.parametrize("verb", ["create", "list"])
@pytest.mark.parametrize("is_handling", [False, True])
@pytest.mark.parametrize("engine", ON_S3)
def test_a_certificate_that_nobody_vouches_for_is_refused_for_good(
    engine: Engine, certificate: Path, verb: str, is_handling: bool
) -> None:
    with _TlsServer(certificate) as server:
        store = engine.open(server)
        ask = partial(VERBS[verb], store)
        call = partial(while_handling, ValueError("the loss is nan"), ask) if is_handling else ask
        with pytest.raises(StorageError, match="certificate") as caught:
            call()
        store.close()
    assert not isinstance(caught.value, TransientError)
    assert not caught.value.may_have_landed
    assert server.count() == 0
