"""Turn s3fs's `config_kwargs` into botocore's client configuration: one attempt per call, our limits, no checksums.

Pure values, but for a look at a file of certificates.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from cloudckpt.errors import OptionsError
from cloudckpt.options import RetryPolicy

__all__ = ["check_bundle", "headers_for", "refuse_policy", "s3_config"]

# More than any sensible concurrency, since waiting for a free connection would count against the request's time.
_CONNECTIONS = 128
# What the retry policy decides, under the names that botocore gives to it.
_POLICY = ("retries", "connect_timeout", "read_timeout")
_TIGRIS = ("tigris.dev", "t3.storage.dev")


def refuse_policy(config_kwargs: Mapping[str, object]) -> None:
    """Refuse a second place for patience."""
    ours = [name for name in _POLICY if name in config_kwargs]
    if ours:
        raise OptionsError(
            f"config_kwargs {ours} belong to the retry policy; set them in Options(retry=RetryPolicy(…))"
        )


def check_bundle(path: str) -> None:
    """Refuse a file of certificates that has none, by name: the libraries would not name it, or try again."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except OSError as exc:  # what ssl says of a file without a certificate is one, too
        reason = "no certificate is in it" if isinstance(exc, ssl.SSLError) else exc.strerror
        raise OptionsError(
            f"{path!r} has no certificates ({reason}); correct `verify`, AWS_CA_BUNDLE or the profile's ca_bundle"
        ) from exc


def headers_for(endpoint_url: str) -> dict[str, str]:
    """Return what a store at this endpoint wants with each request; refuse one that has a better way in.

    Raises:
        OptionsError: Google Cloud Storage, whose likeness of S3 takes no notice of `If-None-Match`.
    """
    host = urlsplit(endpoint_url).hostname or ""
    if _is_below(host, "storage.googleapis.com"):
        raise OptionsError("Google Cloud Storage by s3:// ignores create-only writes; use gs:// URLs")
    # Elsewhere than where an object was written, it would answer with what it held before.
    return {"X-Tigris-Consistent": "true"} if any(_is_below(host, name) for name in _TIGRIS) else {}


def _is_below(host: str, name: str) -> bool:
    return host == name or host.endswith(f".{name}")


def s3_config(config_kwargs: Mapping[str, object], *, retry: RetryPolicy, signed_payload: bool) -> dict[str, object]:
    """Return botocore's client configuration: the caller's, with one attempt per call and our time limits."""
    refuse_policy(config_kwargs)
    given = config_kwargs.get("s3") or {}
    if not isinstance(given, Mapping):
        raise OptionsError("config_kwargs['s3'] is no mapping")
    return {
        "max_pool_connections": _CONNECTIONS,
        # Without this botocore computes and sends a checksum of each body, which our digests make superfluous.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **config_kwargs,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": retry.connect_timeout_s,
        "read_timeout": None,  # the wire ends what stands still
        "s3": {"payload_signing_enabled": signed_payload, **given},
    }
