"""Turn what an engine's library raised into one of our errors: one table, read by code and status before type.

Never by errno (22 and 5 mean everything) and never by a message. Classes are looked up by qualified name, so that no
library is imported to recognise its errors. The cause that our error carries is a copy without bodies, headers and
queries: stores echo session tokens in error bodies. Pure; any thread may enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

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
from cloudckpt.store.facts import BodyLengthError, Facts, GarbledReplyError, HttpStatusError, ObjectSizeError, facts_of
from cloudckpt.store.redact import hide

__all__ = ["EngineError", "ask", "classify", "deletion_error", "is_absence"]

T = TypeVar("T")


class EngineError(Exception):
    """What the engine's library said, without anything that may hold a credential."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: type[CloudCkptError]
    advice: str


_AGAIN = _Verdict(TransientError, "it may pass when tried again")
_SLOWER = _Verdict(ThrottledError, "the store asks for fewer requests; lower the concurrency if it goes on")
_DENIED = _Verdict(AccessDeniedError, "let the credentials read, write, list and delete below this root")
_NO_CREDENTIALS = _Verdict(
    AccessDeniedError, "give credentials in storage_options, the environment, a profile or an instance role"
)
_WRONG_KEY = _Verdict(AccessDeniedError, "the access key or its secret is wrong; correct the credentials")
_CLOCK = _Verdict(AccessDeniedError, "the clock of this machine is wrong; synchronise it and try again")
_EXPIRED = _Verdict(CredentialsExpiredError, "the credentials have expired; renew them, or log in again")
_NO_BUCKET = _Verdict(BucketNotFoundError, "create the bucket first; cloudckpt never does")
_NO_OBJECT = _Verdict(ObjectNotFoundError, "there is no object of that name")
_TAKEN = _Verdict(ObjectExistsError, "an object of that name exists and was left as it is")
_REGION = _Verdict(
    StorageError, "the bucket is in another region; set client_kwargs={'region_name': …} in storage_options"
)
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
_TLS = _Verdict(StorageError, "the certificate of the endpoint is not trusted; set client_kwargs={'verify': …}")
_OPTIONS = _Verdict(OptionsError, "correct storage_options, the environment or the profile")
_FULL = _Verdict(StorageError, "the store is full, or its quota is used up; free space")
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
    **_each(_UNKNOWN_VERB, "NotImplemented"),
}

_BY_STATUS: dict[int, _Verdict] = {
    301: _NO_STORE,
    302: _NO_STORE,
    303: _NO_STORE,
    307: _NO_STORE,
    308: _NO_STORE,
    401: _EXPIRED,
    403: _DENIED,
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
    **_each(_NO_STORE, "InvalidListResponse RedirectElsewhere", below="obstore."),
    # what its replies to puts, heads and gets lack, or have in another form
    **_each(_NO_STORE, "NotPartial NoContentRange UnexpectedRange ParseContentRange BadHeader", below="obstore."),
    **_each(_NO_STORE, "MissingEtag MissingLastModified MissingContentLength", below="obstore."),
    **_each(_NO_STORE, "InvalidLastModified InvalidContentLength", below="obstore."),
    **_each(_REGION, "BareRedirect", below="obstore."),
    **_each(_TLS, "obstore.InvalidCertificate ssl.SSLCertVerificationError"),
    **_each(_NO_CREDENTIALS, "NoCredentialsError PartialCredentialsError", below=_BOTOCORE),
    **_each(_EXPIRED, "CredentialRetrievalError TokenRetrievalError SSOError", below=_BOTOCORE),
    **_each(_OPTIONS, "ProfileNotFound ConfigNotFound ConfigParseError NoRegionError", below=_BOTOCORE),
    **_each(_OPTIONS, "InvalidRegionError ParamValidationError InvalidConfigError", below=_BOTOCORE),
    **_each(_OPTIONS, "UnsupportedS3ConfigurationError", below=_BOTOCORE),
    **_each(_AGAIN, "HTTPClientError ConnectionError IncompleteReadError FlexibleChecksumError", below=_BOTOCORE),
    **_each(_AGAIN, "ResponseStreamingError", below=_BOTOCORE),
    **_each(_NO_STORE, "botocore.parsers.ResponseParserError"),
    **_each(_AGAIN, "requests.exceptions.RequestException"),
    **_each(_AGAIN, "aiohttp.client_exceptions.ClientError aiohttp.http_exceptions.HttpProcessingError"),
    **_each(_NO_CREDENTIALS, "DefaultCredentialsError", below=_GOOGLE),
    **_each(_EXPIRED, "RefreshError", below=_GOOGLE),
    **_each(_AGAIN, "TransportError", below=_GOOGLE),
    **_each(_EXPIRED, "NonRetryableError", below="gcsfs.retry."),
    **_each(_AGAIN, "ChecksumError", below="gcsfs.retry."),
    **_each(_AGAIN, "asyncio.exceptions.CancelledError concurrent.futures._base.CancelledError"),
    **_each(_AGAIN, "TimeoutError ConnectionError", below=_PYTHON),
    **_each(_TAKEN, "FileExistsError", below=_PYTHON),
    **_each(_NO_OBJECT, "FileNotFoundError", below=_PYTHON),
    **_each(_DENIED, "PermissionError", below=_PYTHON),
}


def ask(call: Callable[[], T], *, op: str, key: str, url: str) -> T:
    """Return what `call` returns, or raise what it raises as one of our errors.

    The raise stands outside the handler, so that our error does not drag the original along as its context.
    """
    try:
        return call()
    except (CloudCkptError, MemoryError):
        raise
    except Exception as exc:  # noqa: BLE001 - the border: whatever a library raises becomes ours, and is raised below
        error = classify(exc, op=op, key=key, url=url)
    raise error


def classify(exc: BaseException, *, op: str, key: str, url: str) -> CloudCkptError:
    """Return our error for `exc`, met by `op` on `key` below the root `url`; unknown means not transient."""
    facts = facts_of(exc)
    verdict = _verdict(facts, op)
    reply = f"{facts.status} {facts.code}".strip() if facts.status else facts.code
    what = reply or (
        str(exc)
        if isinstance(exc, BodyLengthError | GarbledReplyError | ObjectSizeError)
        else facts.types[0].rpartition(".")[2]
    )
    message = f"{op} of {key!r} in {url} failed ({what}): {verdict.advice}"
    error = (
        verdict.error(message, op=op, key=key) if issubclass(verdict.error, StorageError) else verdict.error(message)
    )
    if isinstance(error, ThrottledError):
        error.retry_after_s = facts.retry_after_s
    error.__cause__ = EngineError(_shorn(exc, facts))
    return error


def deletion_error(failures: Mapping[str, str | BaseException], *, asked: int, url: str) -> StorageError:
    """Return our error for objects that a delete left where they were: key → the store's code, or what was raised.

    One that no further try can delete is told first: only if all may pass is the whole worth another try.
    """
    errors = [_single_deletion_error(key, cause, url) for key, cause in failures.items()]
    first = next((error for error in errors if not isinstance(error, TransientError)), errors[0])
    told = type(first)(f"{first}; {len(failures)} of {asked} objects are still there", op="delete", key=first.key)
    told.left_keys = tuple(failures)
    told.__cause__ = first.__cause__
    return told


def _single_deletion_error(key: str, cause: str | BaseException, url: str) -> StorageError:
    exc = HttpStatusError(0, cause) if isinstance(cause, str) else cause
    error = classify(exc, op="delete", key=key, url=url)
    return error if isinstance(error, StorageError) else StorageError(str(error), op="delete", key=key)


def is_absence(exc: BaseException) -> bool:
    """Tell whether `exc` says that there is no such object."""
    return issubclass(_verdict(facts_of(exc), "head").error, ObjectNotFoundError)


def _verdict(facts: Facts, op: str) -> _Verdict:
    if op == "create" and (facts.status == 501 or facts.code == "NotImplemented"):
        return _NO_CREATES
    if facts.code in _BY_CODE:
        return _BY_CODE[facts.code]
    if facts.status:
        return _status_verdict(facts.status, op)
    found = next((_BY_TYPE[name] for name in facts.types if name in _BY_TYPE), _UNKNOWN)
    # What only a create can mean is no answer to another verb.
    return found if op == "create" or found is not _TAKEN else _UNKNOWN


def _status_verdict(status: int, op: str) -> _Verdict:
    if status == 412:
        return _TAKEN if op == "create" else _UNKNOWN
    if status == 404:
        # Writing and listing need no object, so what they miss is the bucket.
        return _NO_BUCKET if op in ("put", "create", "list") else _NO_OBJECT
    if status == 301 and op == "head":
        return _REGION
    if status == 400 and op == "head":
        # The reply to a HEAD has no body, so no code; expired credentials are its usual reason.
        return _EXPIRED
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    # Proxies in front of stores have codes of their own up there (520 to 530 and others).
    return _AGAIN if status >= 512 else _UNKNOWN


def _shorn(exc: BaseException, facts: Facts) -> str:
    """Describe `exc` for the eyes of a person: a reply by its status, code and message, else by the text."""
    name = f"{type(exc).__module__}.{type(exc).__qualname__}"
    if facts.status:
        return hide(f"{name}: {facts.status} {facts.code} {facts.message}").strip()
    first_line = str(exc).partition("\n")[0]
    return hide(f"{name}: {first_line}")[:500]
