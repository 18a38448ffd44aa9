"""Keep credentials out of every text: what an engine said, and what its libraries log.

Knows what credentials look like on the wire (headers, elements, fields of a URL) and which ones the caller gave;
decides nothing. Keeps FORMAT 16. Any thread may enter, also right after a fork.
"""

from __future__ import annotations

import base64
import json
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
    re.compile(
        r"(?i)(\b(?:Credential|Signature|access_token|refresh_token|id_token|client_secret|password)=)[^,&\s'\"]+"
    ),
    # a URL's user and password, and its query: presigned URLs carry their signature there
    re.compile(r"(://)[^/@\s'\"]+@"),
    re.compile(r"(https?://[^\s?'\"<>]*\?)[^\s'\"<>)]+"),
)
_LOGGERS = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "urllib3", "requests", "aiohttp", "fsspec", "obstore")
# Where a library logs requests and replies; named here because a logger may be made after the filter is placed.
_TALKATIVE = ("auth", "endpoint", "httpsession", "parsers", "utils", "credentials", "client", "hooks", "tokens")

# A dictionary for its atomic update and copy: a lock might be held at the moment of a fork.
_secrets: dict[str, re.Pattern[str]] = {}


def remember_secrets(options: Mapping[str, object]) -> None:
    """Hide, from now on, every credential among fsspec storage options wherever it turns up."""
    _secrets.update({text: _shape_of(text) for text in _secret_texts(options) if text not in _secrets})


def _shape_of(secret: str) -> re.Pattern[str]:
    """Return what a secret looks like, as it is and encoded: for a URL or a form, in JSON or a `repr`, in base64."""
    forms = ["".join(map(_letter, secret)), *map(re.escape, _in_base64(secret.encode("utf-8", "surrogatepass")))]
    return re.compile("|".join(forms))


def _letter(letter: str) -> str:
    """Return the pattern of one letter: libraries differ in which of them they encode."""
    if letter.isascii() and letter.isalnum():
        return letter
    percent = "".join(f"(?i:%{byte:02x})" for byte in letter.encode("utf-8", "surrogatepass"))
    # The escape may be escaped once more, as in a `repr` of JSON.
    quoted = re.escape(json.dumps(letter)[1:-1].lstrip("\\"))
    forms = [re.escape(letter), percent, rf"\\+(?i:{quoted})", *([r"\+"] if letter == " " else [])]
    return f"(?:{'|'.join(forms)})"


def _in_base64(secret: bytes) -> Iterator[str]:
    """Yield the letters that a secret alone decides, wherever it stands in what was encoded (behind a user's name)."""
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret).decode()
        known = text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        yield from {known, known.replace("+", "-").replace("/", "_")}


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
        text = _secrets[secret].sub(_HIDDEN, text)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{_HIDDEN}", text)
    return text


_formatter = logging.Formatter()


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
        if record.exc_info:
            told = _formatter.formatException(record.exc_info)
            if (clean := hide(told)) != told:
                # A handler shows the text; one that looks at the error itself would show what is in it.
                record.exc_text, record.exc_info = clean, None
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
