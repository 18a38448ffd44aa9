"""Turn gcsfs's storage options into obstore's client of one bucket, with the same meaning or not at all.

gcsfs itself reads them: endpoint, project and credentials are those that it would use.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from datetime import timedelta

import fsspec.asyn
from obstore.store import GCSStore

from cloudckpt.errors import OptionsError
from cloudckpt.options import RetryPolicy
from cloudckpt.store.credentials import GcsCredentials
from cloudckpt.store.location import ALLOW_HTTP, check_encrypted
from cloudckpt.store.obstore_s3 import ObstoreClient, chosen_proxy, client_options, refuse_rest, usual_limit_s
from cloudckpt.store.ranged import RangeReader
from cloudckpt.store.wire_gcs import gcs_filesystem

__all__ = ["check_gcs_options", "gcs_client"]

_HONOURED = frozenset({"token", "project", "access", "endpoint_url", "requester_pays"})
# Of these, gcsfs's file objects, caches and bucket making take note, and nothing here uses either.
_INERT = frozenset(
    {"block_size", "cache_timeout", "consistency", "default_location", "check_connection", "secure_serialize"}
    | {"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", ALLOW_HTTP}
)


def check_gcs_options(options: Mapping[str, object]) -> None:
    """Refuse, by name, what obstore cannot do."""
    refuse_rest({name: value for name, value in options.items() if name not in _HONOURED | _INERT}, "storage_options")


def gcs_client(bucket: str, options: Mapping[str, object], retry: RetryPolicy) -> ObstoreClient:
    """Make the client of one bucket; credentials are found here, and nothing is sent to the store yet."""
    honoured = {name: value for name, value in options.items() if name in _HONOURED}
    # Never connected: it only reads the options.
    reader = gcs_filesystem(honoured, fsspec.asyn.get_loop())
    origin: str = reader._location  # noqa: SLF001 - also what STORAGE_EMULATOR_HOST says
    check_encrypted(origin, options)
    if reader.credentials.credentials is None:
        # obstore would ask the metadata server, and write as the instance's own account.
        raise OptionsError('there are no Google credentials, and obstore cannot write without; pass engine="fsspec"')
    transport = client_options(origin, retry)
    payer = reader._get_params({})  # noqa: SLF001
    if payer and not payer["userProject"]:
        raise OptionsError("requester_pays needs the project that pays; set project in storage_options")
    payer_headers = {"x-goog-user-project": str(payer["userProject"])} if payer else {}
    if payer_headers:
        transport["default_headers"] = payer_headers
    credentials = GcsCredentials(reader.credentials)
    store = GCSStore(
        bucket,
        config={"base_url": origin, "skip_signature": False},
        client_options=transport,
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=retry.request_timeout_s)},
        credential_provider=credentials,
    )
    ranges = RangeReader(
        f"{origin}/{bucket}",
        lambda _, headers: credentials.authorise({**payer_headers, **headers}),
        proof="x-goog-generation",
        connect_s=retry.connect_timeout_s,
        context=ssl.create_default_context,
    )
    return ObstoreClient(
        store=store,
        credentials=credentials,
        limit_s=usual_limit_s(retry),
        has_generations=True,
        ranges=None if chosen_proxy(origin) else ranges,
    )
