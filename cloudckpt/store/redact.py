"""Keep credentials out of every text: what an engine said, and what its libraries log.

Knows what credentials look like on the wire (headers, elements, fields of a URL) and which ones the caller gave;
decides nothing. Keeps FORMAT 16. Any thread may enter, also right after a fork.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

__all__ = ["hide", "hide_in_logs", "remember_secrets"]

_HIDDEN = "***"
# Shorter ones (the `test` of an emulator) are no secrets, and would blot out half of each message. What merely names
# an account is worth hiding only where it is random, as the key ids of AWS are.
_SHORTEST_SECRET = 8
_SHORTEST_ID = 16
_ID_NAMES = frozenset({"key", "username", "aws_access_key_id"})
# Options whose text is a credential, for s3fs, gcsfs and the other filesystems of fsspec.
_SECRET_NAME = re.compile(r"(?i)key|secret|token|password|username|credential|connection_string|auth")
_SHAPES = (
    # headers, as logged lines (`name:value`) and as dictionaries (`'name': b'value'`)
    re.compile(
        r"(?i)((?:x-amz-security-token|x-amz-server-side-encryption-customer-key|(?:proxy-)?authorization)"
        r"""['"]?\s*[:=]\s*b?['"]?)(?:(?:AWS4-HMAC-SHA256|Bearer|Basic)\s+)?[^'"\r\n]+"""
    ),
    # what a store echoes in an error body, and what a credential service answers
    re.compile(r"(?i)(<(?:Token-0|AWSAccessKeyId|AccessKeyId|SecretAccessKey|SessionToken|SignatureProvided)>)[^<]*"),
    re.compile(
        r"(?i)(\\?[\"'](?:Token|AccessKeyId|SecretAccessKey|SessionToken|SSECustomerKey|access_token|refresh_token"
        r"|id_token|client_secret|private_key)\\?[\"']\s*:\s*b?\\?[\"'])[^\"'\\]*"
    ),
    re.compile(r"(?i)(\b(?:Credential|Signature)=)[^,&\s'\"]+"),
    # a URL's user and password, and its query: presigned URLs carry their signature there
    re.compile(r"(://)[^/@\s'\"]+@"),
    re.compile(r"(https?://[^\s?'\"<>]*\?)[^\s'\"<>)]+"),
)
_LOGGERS = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "urllib3", "requests", "aiohttp", "fsspec", "obstore")
# Where a library logs requests and replies; named here because a logger may be made after the filter is placed.
_TALKATIVE = ("auth", "endpoint", "httpsession", "parsers", "utils", "credentials", "client", "hooks", "tokens")

# A dictionary for its atomic update and copy: a lock might be held at the moment of a fork.
_secrets: dict[str, None] = {}


def remember_secrets(options: Mapping[str, object]) -> None:
    """Hide, from now on, every credential among fsspec storage options wherever it turns up."""
    _secrets.update(dict.fromkeys(_secret_texts(options)))


def _secret_texts(options: Mapping[str, object], *, is_secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        is_named_so = is_secret or bool(_SECRET_NAME.search(name))
        if isinstance(value, Mapping):
            yield from _secret_texts(value, is_secret=is_named_so)
        elif isinstance(value, str) and is_named_so:
            shortest = _SHORTEST_ID if name in _ID_NAMES else _SHORTEST_SECRET
            yield from [value] if len(value) >= shortest else []


def hide(text: str) -> str:
    """Return `text` with everything that is, or looks like, a credential blotted out."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{_HIDDEN}", text)
    return text


class _Hiding(logging.Filter):
    """Blots credentials out of a record before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return True  # arguments that do not fit: the handler will say so
        clean = hide(text)
        if clean != text:
            record.msg, record.args = clean, ()
        return True


_filter = _Hiding()


def hide_in_logs() -> None:
    """Blot credentials out of what the engines' libraries log.

    botocore logs session tokens and customer keys at DEBUG level, so whoever debugs a training run with all
    loggers open would write them to disk. Filters of a logger do not see its children's records, so each logger
    that exists gets its own; asking twice changes nothing.
    """
    existing = [name for name in list(logging.root.manager.loggerDict) if name.split(".")[0] in _LOGGERS]
    for name in {*existing, *_LOGGERS, *(f"botocore.{part}" for part in _TALKATIVE)}:
        logging.getLogger(name).addFilter(_filter)
