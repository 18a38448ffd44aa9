"""Turn what an engine's library raised into one of our errors: one table, read by code and status before type.

Never by errno (22 and 5 mean everything) and never by a message. Classes are looked up by qualified name, so that no
library is imported to recognise its errors. The cause that our error carries is a copy without bodies, headers and
queries: stores echo session tokens in error bodies. Pure, but that advice may name a variable of the environment; any
thread may enter.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CloudCkptError,
    CreateNotEnforcedError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    ThrottledError,
    TransientError,
)
from cloudckpt.store.facts import (
    BodyLengthError,
    Facts,
    GarbledReplyError,
    HttpStatusError,
    ObjectSizeError,
    UnsentError,
    facts_of,
)
from cloudckpt.store.redact import hide

__all__ = ["CredentialKind", "EngineError", "ask", "classify", "deletion_error", "is_absence"]

T = TypeVar("T")

CredentialKind = Literal["none", "lasting", "temporary"]
"""What a request was signed with; temporary ones may have expired, and so may any of which nothing is known."""


class EngineError(Exception):
    """What the engine's library said, without anything that may hold a credential."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: type[CloudCkptError]
    advice: str


_AGAIN = _Verdict(TransientError, "it may pass when tried again")
_NOT_READY = _Verdict(
    TransientError,
    "nothing was sent, because the credentials did not come in time; see whether what hands them out can be reached "
    "(the metadata of the instance, a container's service, a log-in, a command), or give them in storage_options",
)
_SLOWER = _Verdict(ThrottledError, "the store asks for fewer requests; lower the concurrency if it goes on")
_DENIED = _Verdict(AccessDeniedError, "let the credentials have {right} below this root")
_ANONYMOUS = _Verdict(
    AccessDeniedError, "the request was anonymous, and the store wants to know who asks; give credentials"
)
_NO_CREDENTIALS = _Verdict(
    AccessDeniedError, "give credentials in storage_options, the environment, a profile or an instance role"
)
_WRONG_KEY = _Verdict(AccessDeniedError, "the access key or its secret is wrong; correct the credentials")
_CLOCK = _Verdict(AccessDeniedError, "the clock of this machine is wrong; synchronise it and try again")
_REFUSED_KEY = _Verdict(AccessDeniedError, "the store does not accept these credentials; correct them")
_EXPIRED = _Verdict(CredentialsExpiredError, "the credentials have expired; renew them, or log in again")
_NOT_RENEWED = _Verdict(
    CredentialsExpiredError, "no credentials could be fetched or renewed; see the cause, or log in again"
)
_NO_BUCKET = _Verdict(BucketNotFoundError, "create the bucket first; cloudckpt never does")
_BUCKET_TWICE = _Verdict(
    BucketNotFoundError,
    "this needs no object, and the store took it for a question about one: endpoint_url seems to hold the bucket "
    "already; give the host alone",
)
_NO_OBJECT = _Verdict(ObjectNotFoundError, "there is no object of that name")
_TAKEN = _Verdict(ObjectExistsError, "an object of that name exists and was left as it is")
_REGION = _Verdict(
    StorageError, "the bucket is in another region; set client_kwargs={'region_name': '{region}'} in storage_options"
)
_FOREIGN = _Verdict(
    TransientError,
    "the answer is not in a store's own words, so it says nothing of the object: that of a proxy or a gateway on the "
    "way, or of another server; see that endpoint_url is the store's own API, and what stands before it",
)
_MUTE = _Verdict(
    StorageError, "the answer to a HEAD does not say why; see that the region and endpoint_url are the bucket's"
)
_COLLISION = _Verdict(StorageError, "an object and a prefix cannot share a name in this store; choose another root")
_TOO_LONG = _Verdict(StorageError, "choose a shorter root")
_NO_STORE = _Verdict(
    TransientError,
    "no object store answered there; see that endpoint_url is the store's own API, and whether a proxy, a login page "
    "or another server stands in its place",
)
_TOO_LARGE = _Verdict(StorageError, "the store refuses objects of that size; lower shard_bytes")
_OTHER_OBJECT = _Verdict(StorageError, "it is not the object that was committed; restore an older step")
_ARCHIVED = _Verdict(StorageError, "the object is archived; restore it from the archive first")
_UNKNOWN_VERB = _Verdict(StorageError, "the store does not implement this request; use a store that does")
_NO_CREATES = _Verdict(
    CreateNotEnforcedError,
    "the store has no create-only writes; use one that has, or pass Options(single_writer=True), which promises that "
    "no other job writes to this root: two jobs could overwrite each other's commits there, and neither would notice",
)
_TLS = _Verdict(StorageError, "the certificate of the endpoint is not trusted; {bundle}")
_OPTIONS = _Verdict(OptionsError, "correct storage_options, the environment or the profile")
_NO_FILE = _Verdict(
    OptionsError,
    "a file that storage_options, the environment or the profile name cannot be opened; put it there, or correct the "
    "name (credentials, certificates, commands)",
)
_ENDING = _Verdict(
    StorageError, "the interpreter is shutting down, and starts no thread any more; save before it does, not in atexit"
)
_PANIC = _Verdict(
    StorageError,
    'the engine met a fault of its own; look for odd characters in storage_options, or pass engine="fsspec"',
)
_FULL = _Verdict(
    StorageError,
    "the store is full, or its quota is used up: free some, raise it, let retention keep fewer checkpoints, or save "
    "elsewhere",
)
_UNKNOWN = _Verdict(StorageError, "see the cause")


def _each(verdict: _Verdict, names: str, *, below: str = "") -> dict[str, _Verdict]:
    return {below + name: verdict for name in names.split()}


_BY_CODE: dict[str, _Verdict] = {
    **_each(_SLOWER, "SlowDown Throttling ThrottlingException ThrottledException RequestThrottled TooManyRequests"),
    **_each(_SLOWER, "TooManyRequestsException RequestLimitExceeded BandwidthLimitExceeded KMS.ThrottlingException"),
    # S3 says "reduce your request rate" with the first of these, too
    **_each(_SLOWER, "ServiceUnavailable rateLimitExceeded userRateLimitExceeded PriorRequestNotComplete ServerBusy"),
    **_each(_AGAIN, "InternalError RequestTimeout RequestTimeoutException OperationTimedOut"),
    **_each(_AGAIN, "ConditionalRequestConflict OperationAborted TransactionInProgress"),
    **_each(_AGAIN, "TemporaryRedirect"),  # a young bucket, whose name is still on its way through the store
    # the bytes were spoilt on the way there
    **_each(_AGAIN, "BadDigest IncompleteBody XAmzContentSHA256Mismatch XAmzContentChecksumMismatch InvalidDigest"),
    **_each(_EXPIRED, "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired InvalidToken"),
    **_each(_EXPIRED, "InvalidCredentials authError"),
    **_each(_CLOCK, "RequestTimeTooSkewed RequestInTheFuture"),
    **_each(_WRONG_KEY, "InvalidAccessKeyId SignatureDoesNotMatch"),
    **_each(_DENIED, "AccessDenied AccountProblem AllAccessDisabled KMS.DisabledException KMS.NotFoundException"),
    **_each(_ARCHIVED, "InvalidObjectState"),
    **_each(_NO_BUCKET, "NoSuchBucket ContainerNotFound"),
    **_each(_NO_OBJECT, "NoSuchKey BlobNotFound"),
    **_each(_REGION, "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException"),
    **_each(_OTHER_OBJECT, "InvalidRange"),
    **_each(_TOO_LARGE, "EntityTooLarge"),
    **_each(_FULL, "InsufficientStorage QuotaExceeded XMinioStorageFull StorageFull"),
    **_each(_UNKNOWN_VERB, "NotImplemented MethodNotAllowed"),
    **_each(_TOO_LONG, "KeyTooLongError KeyTooLong"),
    # as SeaweedFS and MinIO say it
    **_each(_COLLISION, "ExistingObjectIsFile ExistingObjectIsDirectory XMinioParentIsObject"),
    **_each(_COLLISION, "XMinioObjectExistsAsDirectory"),
}

_BY_STATUS: dict[int, _Verdict] = {
    301: _NO_STORE,
    302: _NO_STORE,
    303: _NO_STORE,
    307: _NO_STORE,
    308: _NO_STORE,
    403: _DENIED,
    405: _UNKNOWN_VERB,
    408: _AGAIN,
    409: _AGAIN,
    413: _TOO_LARGE,
    416: _OTHER_OBJECT,
    425: _AGAIN,
    429: _SLOWER,
    500: _AGAIN,
    501: _UNKNOWN_VERB,
    502: _AGAIN,
    503: _SLOWER,
    504: _AGAIN,
    507: _FULL,
    511: _NO_STORE,
}

# What these mean is the same, whoever says so. Any other answer that is in no store's words is none.
_SPEAKS_FOR_ITSELF = frozenset({301, 302, 303, 307, 308, 408, 409, 412, 413, 416, 425, 429, *range(500, 600)})

_FACTS = "cloudckpt.store.facts."
_OBSTORE = "obstore.exceptions."
_BOTOCORE = "botocore.exceptions."
_GOOGLE = "google.auth.exceptions."
_PYTHON = "builtins."

# The classes of one exception are tried from the most special to the most general.
_BY_TYPE: dict[str, _Verdict] = {
    **_each(_AGAIN, "BodyLengthError", below=_FACTS),
    **_each(_NO_STORE, "GarbledReplyError", below=_FACTS),
    **_each(_OTHER_OBJECT, "ObjectSizeError", below=_FACTS),
    **_each(_TAKEN, "AlreadyExistsError PreconditionError", below=_OBSTORE),
    **_each(_DENIED, "PermissionDeniedError", below=_OBSTORE),
    **_each(_EXPIRED, "UnauthenticatedError", below=_OBSTORE),
    **_each(_OPTIONS, "UnknownConfigurationKeyError", below=_OBSTORE),
    # the kinds of obstore's HTTP client, as `facts` names them
    **_each(_AGAIN, "Connect Request Timeout Interrupted Decode", below="obstore.HttpError:"),
    # bytes that are no HTTP
    **_each(_NO_STORE, "obstore.HttpError:Parse aiohttp.client_exceptions.ClientResponseError"),
    **_each(_NO_STORE, "InvalidListResponse RedirectElsewhere", below="obstore."),
    # what its replies to puts, heads and gets lack, or have in another form
    **_each(_NO_STORE, "NotPartial NoContentRange UnexpectedRange ParseContentRange BadHeader", below="obstore."),
    **_each(_NO_STORE, "MissingEtag MissingLastModified MissingContentLength", below="obstore."),
    **_each(_NO_STORE, "InvalidLastModified InvalidContentLength", below="obstore."),
    **_each(_REGION, "BareRedirect", below="obstore."),
    **_each(_TLS, "obstore.InvalidCertificate ssl.SSLCertVerificationError"),
    **_each(_NO_CREDENTIALS, "NoCredentialsError PartialCredentialsError", below=_BOTOCORE),
    **_each(_NOT_RENEWED, "CredentialRetrievalError TokenRetrievalError SSOError", below=_BOTOCORE),
    **_each(_OPTIONS, "ProfileNotFound ConfigNotFound ConfigParseError NoRegionError", below=_BOTOCORE),
    **_each(_OPTIONS, "InvalidRegionError ParamValidationError InvalidConfigError", below=_BOTOCORE),
    **_each(_OPTIONS, "UnsupportedS3ConfigurationError InvalidProxiesConfigError", below=_BOTOCORE),
    **_each(_AGAIN, "HTTPClientError ConnectionError IncompleteReadError FlexibleChecksumError", below=_BOTOCORE),
    **_each(_AGAIN, "ResponseStreamingError", below=_BOTOCORE),
    **_each(_NO_STORE, "botocore.parsers.ResponseParserError"),
    **_each(_AGAIN, "requests.exceptions.RequestException"),
    **_each(_OPTIONS, "aiohttp.client_exceptions.InvalidURL aiohttp.client_exceptions.NonHttpUrlClientError"),
    **_each(_AGAIN, "aiohttp.client_exceptions.ClientError aiohttp.http_exceptions.HttpProcessingError"),
    **_each(_NO_CREDENTIALS, "DefaultCredentialsError", below=_GOOGLE),
    **_each(_NOT_RENEWED, "RefreshError", below=_GOOGLE),
    **_each(_AGAIN, "TransportError", below=_GOOGLE),
    **_each(_EXPIRED, "NonRetryableError", below="gcsfs.retry."),
    **_each(_AGAIN, "ChecksumError", below="gcsfs.retry."),
    **_each(_AGAIN, "asyncio.exceptions.CancelledError concurrent.futures._base.CancelledError"),
    **_each(_AGAIN, "TimeoutError ConnectionError", below=_PYTHON),
    **_each(_TAKEN, "FileExistsError", below=_PYTHON),
    **_each(_NO_OBJECT, "AbsentError", below=_FACTS),
    **_each(_DENIED, "ForbiddenError", below=_FACTS),
    # Objects of a store are no files of this machine: what is missing here was to tell how to reach it.
    **_each(_NO_FILE, "FileNotFoundError PermissionError NotADirectoryError IsADirectoryError", below=_PYTHON),
    "pyo3_runtime.PanicException": _PANIC,
}

# What is raised before the first byte of a request can have left.
_UNSENT = frozenset(
    {"obstore.HttpError:Connect", "obstore.InvalidCertificate", "ssl.SSLCertVerificationError", "socket.gaierror"}
    | {"aiohttp.client_exceptions.ClientConnectorError", "aiohttp.client_exceptions.ConnectionTimeoutError"}
    | {_BOTOCORE + "ConnectTimeoutError", _BOTOCORE + "ProxyConnectionError", _GOOGLE + "TransportError"}
    | {_PYTHON + "ConnectionRefusedError"}
)
# Writing and listing need no object, so what they miss is the bucket.
_NEEDS_NO_OBJECT = frozenset({"put", "create", "list"})
# Server faults that come before any effect.
_REFUSED_STATUSES = frozenset({501, 507})

_READ = "s3:GetObject, and s3:ListBucket (without which an absent object is answered so, too),"
_RIGHTS: Mapping[str, Mapping[str, str]] = {
    "s3": {
        **dict.fromkeys(("get", "read", "head"), _READ),
        **dict.fromkeys(("put", "create"), "s3:PutObject"),
        "list": "s3:ListBucket",
        "delete": "s3:DeleteObject",
    },
    "gs": {
        **dict.fromkeys(("get", "read", "head"), "storage.objects.get"),
        **dict.fromkeys(("put", "create"), "storage.objects.create"),
        "list": "storage.objects.list",
        "delete": "storage.objects.delete",
    },
}


def ask(
    call: Callable[[], T],
    *,
    op: str,
    key: str,
    url: str,
    credentials: Callable[[], CredentialKind] = lambda: "temporary",
) -> T:
    """Return what `call` returns, or raise what it raises as one of our errors.

    The raise stands outside the handler, so that our error does not drag the original along as its context. What the
    caller itself was handling takes no part in the judgement. `credentials` is asked after a failure.
    """
    outer = sys.exception()
    try:
        return call()
    except (CloudCkptError, MemoryError):
        raise
    except BaseException as exc:  # the border: whatever a library raises becomes ours, and is raised below
        if not (isinstance(exc, Exception) or _is_panic(exc)):
            raise
        error = classify(exc, op=op, key=key, url=url, credentials=credentials(), outer=outer)
    raise error


def _is_panic(exc: BaseException) -> bool:
    """Tell whether it is what Rust's bindings make of a fault of theirs, which is no `Exception`."""
    return type(exc).__name__ == "PanicException"


def classify(
    exc: BaseException,
    *,
    op: str,
    key: str,
    url: str,
    credentials: CredentialKind = "temporary",
    outer: BaseException | None = None,
) -> CloudCkptError:
    """Return our error for `exc`, met by `op` on `key` below the root `url`; unknown means not transient.

    Args:
        exc: what a library raised.
        op: the verb.
        key: the object's.
        url: the store's root.
        credentials: what the request was signed with.
        outer: what was being handled when our call began; see `facts_of`.
    """
    facts = facts_of(exc, outer=outer)
    verdict = _verdict(facts, op, credentials)
    message = f"{op} of {key!r} in {url} failed ({_what(exc, facts)}): {_advice(verdict, facts, op, url)}"
    if not issubclass(verdict.error, StorageError):
        error = verdict.error(message)
    else:
        error = verdict.error(message, op=op, key=key)
        error.may_have_landed = _may_have_landed(facts)
        error.is_other_object = verdict is _OTHER_OBJECT
        error.is_full = verdict is _FULL
    if isinstance(error, ThrottledError):
        error.retry_after_s = facts.retry_after_s
    error.__cause__ = EngineError(_shorn(exc, facts))
    return error


def _what(exc: BaseException, facts: Facts) -> str:
    if reply := f"{facts.status} {facts.code}".strip() if facts.status else facts.code:
        return reply
    if isinstance(exc, BodyLengthError | GarbledReplyError | ObjectSizeError):
        return str(exc)
    name = facts.types[0].rpartition(".")[2] if facts.types else type(exc).__name__
    return f"{name}: {facts.path!r}" if facts.path else name


def _advice(verdict: _Verdict, facts: Facts, op: str, url: str) -> str:
    if url.startswith("s3:"):
        bundle = "set client_kwargs={'verify': …} or AWS_CA_BUNDLE (SSL_CERT_FILE does not count here)"
    else:
        bundle = f"name a file that vouches for it in SSL_CERT_FILE (now {os.environ.get('SSL_CERT_FILE')!r})"
    right = _RIGHTS.get(url.partition("://")[0], {}).get(op, f"the right to {op}")
    advice = verdict.advice.replace("{bundle}", bundle)
    return advice.replace("{right}", right).replace("{region}", facts.region or "…")


def _may_have_landed(facts: Facts) -> bool:
    """Tell whether a write that failed so may have taken effect: not if it was never sent, or was refused."""
    if facts.is_unsent or not _UNSENT.isdisjoint(facts.types) or _is_ending(facts):
        return False
    if facts.is_foreign and facts.status not in _SPEAKS_FOR_ITSELF:
        return True  # whoever said so may have passed the request on
    return not (300 <= facts.status < 500 and facts.status != 408) and facts.status not in _REFUSED_STATUSES


def deletion_error(
    failures: Mapping[str, str | BaseException], *, asked: int, url: str, outer: BaseException | None = None
) -> StorageError:
    """Return our error for objects that a delete left where they were: key → the store's code, or what was raised.

    `outer` is what was being handled when our call began; see `facts_of`.

    One that no further try can delete is told first: only if all may pass is the whole worth another try.
    """
    errors = [_single_deletion_error(key, cause, url, outer) for key, cause in failures.items()]
    first = next((error for error in errors if not isinstance(error, TransientError)), errors[0])
    told = type(first)(f"{first}; {len(failures)} of {asked} objects are still there", op="delete", key=first.key)
    told.left_keys = tuple(failures)
    told.__cause__ = first.__cause__
    return told


def _single_deletion_error(key: str, cause: str | BaseException, url: str, outer: BaseException | None) -> StorageError:
    exc = HttpStatusError(0, cause) if isinstance(cause, str) else cause
    error = classify(exc, op="delete", key=key, url=url, outer=outer)
    return error if isinstance(error, StorageError) else StorageError(str(error), op="delete", key=key)


def is_absence(exc: BaseException) -> bool:
    """Tell whether `exc` says that there is no such object."""
    return issubclass(_verdict(facts_of(exc), "head", "temporary").error, ObjectNotFoundError)


def _verdict(facts: Facts, op: str, credentials: CredentialKind) -> _Verdict:
    if op == "create" and (facts.status == 501 or facts.code == "NotImplemented"):
        return _NO_CREATES
    found = _reply_verdict(facts, op, credentials) if facts.status or facts.code else _type_verdict(facts, op)
    return _ANONYMOUS if found is _DENIED and credentials == "none" else found


def _reply_verdict(facts: Facts, op: str, credentials: CredentialKind) -> _Verdict:
    if facts.code in _BY_CODE:
        found = _BY_CODE[facts.code]
        return _BUCKET_TWICE if found is _NO_OBJECT and op in _NEEDS_NO_OBJECT else found
    if facts.region and facts.status in (301, 400):
        return _REGION
    if facts.status == 401:
        return {"none": _ANONYMOUS, "lasting": _REFUSED_KEY, "temporary": _EXPIRED}[credentials]
    if facts.is_foreign and facts.status not in _SPEAKS_FOR_ITSELF:
        return _FOREIGN
    if facts.status == 400 and op == "head" and not facts.code:
        # The reply to a HEAD has no body, so no code; expired credentials are its usual reason.
        return _EXPIRED if credentials == "temporary" else _MUTE
    return _status_verdict(facts, op)


def _type_verdict(facts: Facts, op: str) -> _Verdict:
    if _is_ending(facts):
        return _ENDING
    # What is raised before anything was sent, by options or by who connects, is no answer of a store.
    unknown = _OPTIONS if facts.is_unsent else _UNKNOWN
    found = next((_BY_TYPE[name] for name in facts.types if name in _BY_TYPE), unknown)
    if found is _AGAIN and facts.is_unsent and _PYTHON + "TimeoutError" in facts.types:
        return _NOT_READY
    if found is _NO_OBJECT and op in _NEEDS_NO_OBJECT:
        return _NO_BUCKET
    # What only a create can mean is no answer to another verb.
    return found if op == "create" or found is not _TAKEN else _UNKNOWN


def _is_ending(facts: Facts) -> bool:
    """Tell whether threads are refused because the interpreter shuts down: by then its main thread has ended."""
    return _PYTHON + "RuntimeError" in facts.types and not threading.main_thread().is_alive()


def _status_verdict(facts: Facts, op: str) -> _Verdict:
    status = facts.status
    if status == 412:
        return _TAKEN if op == "create" else _UNKNOWN
    if status == 404:
        return _NO_BUCKET if op in _NEEDS_NO_OBJECT else _NO_OBJECT
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    # Proxies in front of stores have codes of their own up there (520 to 530 and others).
    if status >= 512:
        return _AGAIN
    # A status that no store answers with, and no word of one beside it.
    return _UNKNOWN if facts.code or status == 400 else _FOREIGN


def _shorn(exc: BaseException, facts: Facts) -> str:
    """Describe `exc` for the eyes of a person: a reply by its status, code and message, else by the text."""
    said = exc.__cause__ if isinstance(exc, UnsentError) and exc.__cause__ is not None else exc
    name = f"{type(said).__module__}.{type(said).__qualname__}"
    if facts.status:
        return hide(f"{name}: {facts.status} {facts.code} {facts.message}").strip()
    first_line = str(said).partition("\n")[0]
    return hide(f"{name}: {first_line}")[:500]
