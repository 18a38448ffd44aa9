"""Turn s3fs's storage options into obstore's client of one bucket, with the same meaning or not at all.

Endpoint, region and addressing style come from botocore itself, which is asked where it would send a request; so
environment, profile, dual stack, FIPS and acceleration count as they do for s3fs.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import botocore
import botocore.session
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.config import Config
from botocore.httpsession import get_cert_path
from obstore.store import S3Store

from cloudckpt.errors import OptionsError
from cloudckpt.options import Checksum, RetryPolicy
from cloudckpt.store.credentials import AwsCredentials, GcsCredentials
from cloudckpt.store.facts import NOWHERE
from cloudckpt.store.location import ALLOW_HTTP, check_encrypted
from cloudckpt.store.proxies import proxy_of
from cloudckpt.store.ranged import RangeReader
from cloudckpt.store.s3_config import check_bundle, headers_for, refuse_policy

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, S3Config

__all__ = ["ObstoreClient", "S3Options", "client_options", "refuse_rest", "s3_client", "usual_limit_s"]

# Of these, s3fs's file objects and caches take note, and nothing here uses either.
_INERT = (
    *("default_block_size", "default_fill_cache", "default_cache_type", "max_concurrency", "fixed_upload_size"),
    *("local_expiry_check", "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache"),
)
_ENCRYPTION = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}
_ENDPOINT_CONFIG = ("region_name", "use_dualstack_endpoint", "use_fips_endpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObstoreClient:
    """A store of obstore's, what keeps its credentials fresh, and what each object is given on the way.

    Attributes:
        has_generations: whether the store numbers what it stores, as GCS does, and says so in each answer.
        limit_s: seconds that each of its requests may take, the body included.
        ranges: reads ranges of objects without obstore; None: by a proxy, or with keys of the customer's, it does.
    """

    store: ObjectStore
    credentials: AwsCredentials | GcsCredentials | None
    limit_s: float
    attributes: Mapping[str, str] = field(default_factory=dict)
    has_generations: bool = False
    ranges: RangeReader | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """What s3fs's options say, sorted by who needs it; what may hold a credential does not show."""

    keys: tuple[str | None, str | None, str | None] = field(repr=False)
    profile: str | None
    is_anonymous: bool
    client: Mapping[str, object]
    config: Mapping[str, object]
    store: Mapping[str, str | bool] = field(repr=False)
    attributes: Mapping[str, str]
    proxies: Mapping[str, str] | None = field(repr=False)
    own: Mapping[str, object]

    @classmethod
    def read(cls, options: Mapping[str, object], *, signed_payload: bool) -> S3Options:
        """Sort the options; refuse what obstore cannot do, by name, before anything is connected."""
        rest = {name: value for name, value in options.items() if name not in _INERT}
        client, config = _mapping(rest, "client_kwargs"), _mapping(rest, "config_kwargs")
        objects, s3 = _mapping(rest, "s3_additional_kwargs"), _mapping(config, "s3")
        refuse_policy(config)
        is_anonymous = bool(rest.pop("anon", False)) | _is_unsigned(config)
        store = {
            "skip_signature": is_anonymous,
            "unsigned_payload": not s3.pop("payload_signing_enabled", signed_payload),
            "request_payer": bool(rest.pop("requester_pays", False)),
            **_encryption(objects),
        }
        storage_class = objects.pop("StorageClass", None)
        found = cls(
            keys=_keys(rest, client),
            profile=_one_of(rest.pop("profile", None)),
            is_anonymous=is_anonymous,
            client=_client(rest, client),
            config={"s3": s3, **{name: config.pop(name) for name in _ENDPOINT_CONFIG if name in config}},
            store=store,
            attributes={"Storage-Class": str(storage_class)} if storage_class else {},
            proxies=_proxies(config),
            own={name: rest.pop(name) for name in (ALLOW_HTTP,) if name in rest},
        )
        refuse_rest(rest, "storage_options")
        refuse_rest(client, "client_kwargs")
        refuse_rest({name: value for name, value in config.items() if value != "when_required"}, "config_kwargs")
        refuse_rest(objects, "s3_additional_kwargs")
        return found


def refuse_rest(rest: Mapping[str, object], where: str) -> None:
    """Refuse what nobody has taken, by name; its values may be secrets. What is off or empty asks for nothing."""
    left = sorted(name for name, value in rest.items() if value not in (None, False, "", {}, ()))
    if left:
        raise OptionsError(f'{where} {left} cannot be honoured by obstore; leave them out, or pass engine="fsspec"')


def s3_client(
    bucket: str, options: S3Options, retry: RetryPolicy, *, checksum: Checksum | None = None
) -> ObstoreClient:
    """Make the client of one bucket; nothing is sent yet, and credentials are found at the first request."""
    if bucket.startswith("arn:") or bucket.endswith("--x-s3"):
        raise OptionsError('access points and directory buckets need engine="fsspec"')
    session = botocore.session.Session(profile=options.profile)
    origin, region, is_virtual = _where(session, bucket, options)
    check_encrypted(origin, options.own)  # also of a profile, and where `use_ssl` is off
    where = {
        "endpoint": origin,
        "region": region,
        "virtual_hosted_style_request": is_virtual,
        "conditional_put": "etag",
        "s3_express": False,
        **({"checksum_algorithm": checksum} if checksum else {}),
    }
    credentials = _credentials(session, options)
    store = S3Store(
        bucket,
        config=cast("S3Config", {**options.store, **where}),
        client_options=_transport(session, options, origin, retry),
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=retry.request_timeout_s)},
        credential_provider=credentials,
    )
    limit_s = usual_limit_s(retry)
    return ObstoreClient(
        store=store,
        credentials=credentials,
        limit_s=limit_s,
        attributes=options.attributes,
        ranges=_ranges(session, bucket, options, where, credentials, retry),
    )


def usual_limit_s(retry: RetryPolicy) -> float:
    """Return the limit of the first request of an operation: a client has one for all."""
    return retry.limit_s(retry.deadline_s)


def client_options(origin: str, retry: RetryPolicy, proxies: Mapping[str, str] | None = None) -> ClientConfig:
    """Return the limits of one request, its body included; plain HTTP only where the caller wrote http://.

    And the way to the store: by the proxy that `proxies` (scheme → URL) or the environment name for it, else only to
    its own host. Who goes by a proxy is decided here: obstore would read the environment by rules of its own.
    """
    found: ClientConfig = {
        "timeout": timedelta(seconds=usual_limit_s(retry)),
        "connect_timeout": timedelta(seconds=retry.connect_timeout_s),
        "allow_http": origin.startswith("http://"),
    }
    proxy = chosen_proxy(origin, proxies)
    return {**found, **(_by_proxy(proxy) if proxy else _to_one_host(origin))}


def chosen_proxy(origin: str, proxies: Mapping[str, str] | None = None) -> str | None:
    """Return the proxy that `proxies` (scheme → URL), or the environment, name for a store; None if there is none."""
    return proxy_of(origin) if proxies is None else proxies.get(urlsplit(origin).scheme)


def _by_proxy(proxy: str) -> ClientConfig:
    return {"proxy_url": proxy if "://" in proxy else f"http://{proxy}"}


def _to_one_host(origin: str) -> ClientConfig:
    # obstore follows redirects, session token in hand, and has no switch for it: so all hosts but the store's own are
    # behind a proxy at an address where nobody can be.
    return {"proxy_url": f"http://{NOWHERE}", "proxy_excludes": str(urlsplit(origin).hostname)}


def _transport(session: botocore.session.Session, options: S3Options, origin: str, retry: RetryPolicy) -> ClientConfig:
    found = client_options(origin, retry, options.proxies)
    verify = _verify(session, options)
    if verify is False:
        found["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        check_bundle(verify)
        found["root_certificate"] = Path(verify).read_bytes()
    if headers := headers_for(origin):
        found["default_headers"] = headers
    return found


def _ranges(
    session: botocore.session.Session,
    bucket: str,
    options: S3Options,
    where: Mapping[str, object],
    credentials: AwsCredentials | None,
    retry: RetryPolicy,
) -> RangeReader | None:
    origin, region = str(where["endpoint"]), str(where["region"])
    if chosen_proxy(origin, options.proxies) or "sse_customer_key_base64" in options.store:
        return None
    more = headers_for(origin) | ({"x-amz-request-payer": "requester"} if options.store["request_payer"] else {})

    def sign(url: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        wanted = {**more, **headers}
        return wanted if credentials is None else credentials.authorise(url, wanted, region=region)

    return RangeReader(
        origin if where["virtual_hosted_style_request"] else f"{origin}/{bucket}",
        sign,
        proof="etag",
        connect_s=retry.connect_timeout_s,
        context=partial(_trusting, _verify(session, options)),
    )


def _verify(session: botocore.session.Session, options: S3Options) -> object:
    """Return whose certificates are trusted, as botocore says it: a file, or whether any have to be."""
    verify = options.client.get("verify")
    return session.get_config_variable("ca_bundle") if verify is None else verify


def _trusting(verify: object) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else get_cert_path(verify=True))
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _credentials(session: botocore.session.Session, options: S3Options) -> AwsCredentials | None:
    if options.is_anonymous:
        return None
    if any(options.keys):
        return AwsCredentials.given(*options.keys)
    return AwsCredentials(session.get_credentials)


def _where(session: botocore.session.Session, bucket: str, options: S3Options) -> tuple[str, str, bool]:
    """Ask botocore where it would send a request: origin (with the bucket, if that is in the host), region, style."""
    client = session.create_client(
        "s3",
        # It signs nothing; without keys it would look for some, perhaps on the network.
        aws_access_key_id="none",
        aws_secret_access_key="none",  # noqa: S106
        config=Config(signature_version=botocore.UNSIGNED, **options.config),
        **options.client,
    )
    urls: list[str] = []

    def catch(request: AWSRequest, **_: object) -> AWSResponse:
        urls.append(str(request.url))
        return AWSResponse(request.url, 200, {}, _NoBody())

    client.meta.events.register("before-send.s3", catch)
    client.head_object(Bucket=bucket, Key="-")
    url = urlsplit(urls[0])
    is_virtual = (url.hostname or "").startswith(f"{bucket}.")
    base = url.path.removesuffix("/-") if is_virtual else url.path.removesuffix(f"/{bucket}/-")
    return f"{url.scheme}://{url.netloc}{base}", str(client.meta.region_name or "us-east-1"), is_virtual


class _NoBody:
    def stream(self, *_: object, **__: object) -> tuple[()]:
        return ()


def _is_unsigned(config: dict[str, object]) -> bool:
    signature = config.pop("signature_version", None)
    if signature not in (None, "s3v4", botocore.UNSIGNED):
        raise OptionsError(f"config_kwargs['signature_version'] is {signature!r}: obstore signs with s3v4 alone")
    return signature is botocore.UNSIGNED


def _keys(rest: dict[str, object], client: dict[str, object]) -> tuple[str | None, str | None, str | None]:
    return (
        _one_of(rest.pop("key", None), rest.pop("username", None), client.pop("aws_access_key_id", None)),
        _one_of(rest.pop("secret", None), rest.pop("password", None), client.pop("aws_secret_access_key", None)),
        _one_of(rest.pop("token", None), client.pop("aws_session_token", None)),
    )


def _encryption(objects: dict[str, object]) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {}
    for name, setting in _ENCRYPTION.items():
        if (value := objects.pop(name, None)) is not None:
            found[setting] = value if isinstance(value, bool) else str(value)
    customer_key = objects.pop("SSECustomerKey", None)
    if customer_key is None:
        return found
    for implied in ("SSECustomerAlgorithm", "SSECustomerKeyMD5"):
        objects.pop(implied, None)
    raw = customer_key if isinstance(customer_key, bytes) else str(customer_key).encode()
    encoded = base64.b64encode(raw).decode()
    return {**found, "server_side_encryption": "sse-c", "sse_customer_key_base64": encoded}


def _client(rest: dict[str, object], client: dict[str, object]) -> dict[str, object]:
    """Return what botocore's client is made with, from both places where s3fs takes it."""
    found: dict[str, object] = {"use_ssl": rest.pop("use_ssl", True)}
    endpoint_url = rest.pop("endpoint_url", None)
    if endpoint_url:
        found["endpoint_url"] = endpoint_url
    for name in ("endpoint_url", "region_name", "use_ssl", "verify"):
        if (value := client.pop(name, None)) is not None:
            found[name] = value
    return found


def _proxies(config: dict[str, object]) -> Mapping[str, str] | None:
    """Return the proxies that are given, scheme → URL, which may be none; None if the environment is to say."""
    if config.get("proxies") is None:
        return None
    return {scheme: str(url) for scheme, url in _mapping(config, "proxies").items() if url}


def _mapping(options: dict[str, object], name: str) -> dict[str, object]:
    value = options.pop(name, None)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionsError(f"{name} is no mapping")
    return {str(inner): value[inner] for inner in value}


def _one_of(*values: object) -> str | None:
    """Return the one value that was given under several names."""
    given = {str(value) for value in values if value}
    if len(given) > 1:
        raise OptionsError("storage_options give a key, secret or token twice, under two names; give one")
    return given.pop() if given else None
