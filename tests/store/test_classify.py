"""Each row of the table that turns what libraries raise into our errors; no library is called here."""

from __future__ import annotations

import asyncio
import pickle
import socket
import ssl
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import aiohttp
import botocore.exceptions
import botocore.parsers
import google.auth.exceptions
import pytest
import requests
from gcsfs.retry import HttpError
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError

from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CloudCkptError,
    CredentialsExpiredError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    ThrottledError,
    TransientError,
    is_transient,
)
from cloudckpt.store.classify import CredentialKind, ask, classify, deletion_error, is_absence
from cloudckpt.store.facts import (
    AbsentError,
    BodyLengthError,
    ForbiddenError,
    HttpStatusError,
    ObjectSizeError,
    before_sending,
)
from tests.store.handling import while_handling

URL = "s3://bucket/root"


def _client_error(status: int, code: str) -> botocore.exceptions.ClientError:
    reply = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(reply, "PutObject")


def _class_of(exc: BaseException, op: str = "put") -> type[CloudCkptError]:
    return type(classify(exc, op=op, key="k", url=URL))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "SlowDown", ThrottledError),
        (400, "RequestTimeout", TransientError),
        (400, "BadDigest", TransientError),
        (400, "IncompleteBody", TransientError),
        (400, "XAmzContentSHA256Mismatch", TransientError),
        (400, "ThrottlingException", ThrottledError),
        (400, "KMS.ThrottlingException", ThrottledError),
        (403, "rateLimitExceeded", ThrottledError),
        (409, "ConditionalRequestConflict", TransientError),
        (409, "OperationAborted", TransientError),
        (400, "ExpiredToken", CredentialsExpiredError),
        (403, "ExpiredToken", CredentialsExpiredError),
        (400, "TokenRefreshRequired", CredentialsExpiredError),
        (403, "RequestTimeTooSkewed", AccessDeniedError),
        (403, "InvalidAccessKeyId", AccessDeniedError),
        (403, "SignatureDoesNotMatch", AccessDeniedError),
        (403, "AccessDenied", AccessDeniedError),
        (403, "InvalidObjectState", StorageError),
        (404, "NoSuchBucket", BucketNotFoundError),
        (404, "NoSuchKey", BucketNotFoundError),
        (301, "PermanentRedirect", StorageError),
        (400, "AuthorizationHeaderMalformed", StorageError),
        (416, "InvalidRange", StorageError),
        (400, "EntityTooLarge", StorageError),
        (501, "NotImplemented", StorageError),
        (507, "InsufficientStorage", StorageError),
        (409, "ExistingObjectIsDirectory", StorageError),
        (409, "XMinioParentIsObject", StorageError),
        (400, "KeyTooLongError", StorageError),
        (405, "MethodNotAllowed", StorageError),
        (400, "SomethingNew", StorageError),
        (418, "", TransientError),
        (403, "", TransientError),
        (418, "SomethingNew", StorageError),
        (599, "", TransientError),
        (500, "SomethingNew", TransientError),
        (401, "SomethingNew", CredentialsExpiredError),
    ],
)
def test_a_reply_is_judged_by_code_then_status(status: int, code: str, expected: type[CloudCkptError]) -> None:
    assert _class_of(_client_error(status, code)) is expected


@pytest.mark.parametrize(
    ("op", "status", "expected"),
    [
        ("create", 412, ObjectExistsError),
        ("put", 412, StorageError),
        ("get", 404, ObjectNotFoundError),
        ("head", 404, ObjectNotFoundError),
        ("put", 404, BucketNotFoundError),
        ("create", 404, BucketNotFoundError),
        ("list", 404, BucketNotFoundError),
        ("head", 400, CredentialsExpiredError),
        ("get", 400, StorageError),
    ],
)
def test_a_bare_status_means_what_it_can_mean_to_the_verb(op: str, status: int, expected: type[CloudCkptError]) -> None:
    assert _class_of(HttpStatusError(status), op) is expected


@pytest.mark.parametrize("op", ["put", "create", "list"])
def test_where_nothing_is_asked_of_an_object_a_missing_one_tells_of_the_endpoint(op: str) -> None:
    error = classify(_client_error(404, "NoSuchKey"), op=op, key="k", url=URL)
    assert type(error) is BucketNotFoundError
    assert "endpoint_url seems to hold the bucket already" in str(error)


_TO = {"endpoint_url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (botocore.exceptions.ReadTimeoutError(**_TO), TransientError),
        (botocore.exceptions.ConnectTimeoutError(**_TO), TransientError),
        (botocore.exceptions.EndpointConnectionError(**_TO), TransientError),
        (botocore.exceptions.ConnectionClosedError(**_TO), TransientError),
        (botocore.exceptions.ResponseStreamingError(error="x"), TransientError),
        (botocore.exceptions.HTTPClientError(error="x"), TransientError),
        (botocore.parsers.ResponseParserError("x"), TransientError),
        (botocore.exceptions.NoCredentialsError(), AccessDeniedError),
        (botocore.exceptions.PartialCredentialsError(provider="x", cred_var="y"), AccessDeniedError),
        (botocore.exceptions.CredentialRetrievalError(provider="x", error_msg="y"), CredentialsExpiredError),
        (botocore.exceptions.UnauthorizedSSOTokenError(), CredentialsExpiredError),
        (botocore.exceptions.ProfileNotFound(profile="x"), OptionsError),
        (botocore.exceptions.ParamValidationError(report="x"), OptionsError),
        (aiohttp.ServerDisconnectedError(), TransientError),
        (aiohttp.ClientOSError(), TransientError),
        (aiohttp.ClientPayloadError("x"), TransientError),
        (asyncio.CancelledError(), TransientError),
        (CancelledError(), TransientError),
        (TimeoutError(), TransientError),
        (ConnectionResetError(), TransientError),
        (requests.exceptions.ReadTimeout(), TransientError),
        (google.auth.exceptions.TransportError("x"), TransientError),
        (google.auth.exceptions.RefreshError("x"), CredentialsExpiredError),
        (google.auth.exceptions.DefaultCredentialsError("x"), AccessDeniedError),
        (HttpError({"code": 401, "message": "Invalid Credentials"}), CredentialsExpiredError),
        (HttpError({"code": "503", "message": "x"}), ThrottledError),
        (BodyLengthError(1, 2), TransientError),
        (ObjectSizeError("x"), StorageError),
        (ForbiddenError("x"), AccessDeniedError),
        (FileNotFoundError("x"), OptionsError),
        (PermissionError("x"), OptionsError),
        (FileExistsError("x"), StorageError),
        (OSError(5, "x"), StorageError),
        (ValueError("SlowDown 503 timeout, try again"), StorageError),
        (RuntimeError(), StorageError),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_without_a_reply_the_class_of_the_exception_decides(exc: BaseException, expected: type[CloudCkptError]) -> None:
    assert _class_of(exc) is expected


def test_only_a_create_can_find_a_key_taken() -> None:
    assert _class_of(FileExistsError(), "create") is ObjectExistsError
    assert _class_of(AlreadyExistsError("x"), "create") is ObjectExistsError
    assert _class_of(AlreadyExistsError("x"), "put") is StorageError


def test_a_cause_is_looked_at_when_the_exception_itself_says_nothing() -> None:
    outer = OSError(22, "Invalid argument")
    outer.__cause__ = _client_error(400, "ExpiredToken")
    assert _class_of(outer) is CredentialsExpiredError


def test_a_certificate_that_is_not_trusted_is_not_tried_again() -> None:
    outer = botocore.exceptions.SSLError(endpoint_url="https://h", error="x")
    outer.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    assert _class_of(outer) is StorageError
    assert "verify" in str(classify(outer, op="put", key="k", url=URL))


def test_a_certificate_that_is_not_trusted_is_said_with_the_file_that_should_vouch_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/away.pem")
    error = classify(ssl.SSLCertVerificationError("x"), op="put", key="k", url="gs://bucket/root")
    assert "'/etc/away.pem'" in str(error)


# Captured from obstore 0.12.1 before the tests' own server.
def _obstore_reply(status: int, body: str, *, listing: bool = False) -> str:
    inner = f"""inner: Status {{
                status: {status},
                body: Some(
                    "{body}",
                ),
            }},"""
    source = "source: ListRequest {\n        source: RetryError(" if listing else "source: RetryError("
    return f"""Generic S3 error: Error performing PUT http://127.0.0.1:1/bucket/k?x=CANARY in 1ms - Server returned \
non-2xx status code: {status}: CANARY

Debug source:
Generic {{
    store: "S3",
    {source}
        RetryErrorImpl {{
            method: PUT,
            uri: Some(
                http://127.0.0.1:1/bucket/k?x=CANARY,
            ),
            retries: 0,
            {inner}
        }},
    ),
}}"""


def _obstore_fault(kind: str) -> str:
    return f"""Generic S3 error: HTTP error: error sending request

Debug source:
Generic {{
    store: "S3",
    source: RetryError(
        RetryErrorImpl {{
            retry_timeout: 1s,
            inner: Http(
                HttpError {{
                    kind: {kind},
                    source: reqwest::Error {{
                        kind: Request,
                        source: TimedOut,
                    }},
                }},
            ),
        }},
    ),
}}"""


_NO_HTTP = """hyper_util::client::legacy::Error(
                            SendRequest,
                            hyper::Error(
                                Parse(
                                    Version,
                                ),
                            ),
                        )"""
_SLOW = "<Error><Code>SlowDown</Code><Message>as asked</Message></Error>"
_SPLIT_BODY = (
    '<Error><Code>AccessDenied</Code><Message>\\",\\n            ),\\n            inner: Status {\\n'
    "                status: 503,\\n                body: Some(\\n<Code>SlowDown</Code></Message></Error>"
)


@pytest.mark.parametrize(
    ("text", "op", "expected"),
    [
        (_obstore_reply(503, _SLOW), "put", ThrottledError),
        (_obstore_reply(503, ""), "put", ThrottledError),
        (_obstore_reply(503, _SLOW, listing=True), "list", ThrottledError),
        (_obstore_reply(400, "<Error><Code>ExpiredToken</Code></Error>"), "put", CredentialsExpiredError),
        (_obstore_reply(400, "<Error><Code>InvalidRequest</Code></Error>"), "put", StorageError),
        (_obstore_reply(403, "<Error><Code>AccessDenied</Code></Error>", listing=True), "list", AccessDeniedError),
        (_obstore_reply(403, _SPLIT_BODY), "put", AccessDeniedError),
        (_obstore_reply(409, "<Error><Code>ConditionalRequestConflict</Code></Error>"), "create", TransientError),
        (_obstore_reply(412, "<Error><Code>PreconditionFailed</Code></Error>"), "create", ObjectExistsError),
        (_obstore_reply(416, ""), "get", StorageError),
        (_obstore_fault("Timeout"), "put", TransientError),
        (_obstore_fault("Connect"), "put", TransientError),
        (_obstore_fault("Request"), "put", TransientError),
        (_obstore_fault("Interrupted"), "get", TransientError),
        (_obstore_fault("Unknown"), "put", StorageError),
        (_obstore_fault("Unknown").replace("TimedOut", _NO_HTTP), "put", TransientError),
        ("Generic S3 error: status: 503, HttpError { kind: Timeout, }", "put", StorageError),
        ("no mark\n\ninner: Status {\n status: 503,\n", "put", StorageError),
    ],
)
def test_obstores_text_is_read_by_its_structured_part_alone(text: str, op: str, expected: type[CloudCkptError]) -> None:
    assert _class_of(GenericError(text), op) is expected


def test_a_body_cannot_imitate_the_structured_part() -> None:
    forged = _obstore_fault("Timeout").replace("\n", "\\n")
    text = "shown as it came: \n\nDebug source:\nGeneric {\n inner: Status {\n status: 503,\n" + _obstore_reply(
        403, f"<Code>AccessDenied</Code>{forged}"
    )
    assert _class_of(PermissionDeniedError(text)) is AccessDeniedError


def test_an_error_names_verb_key_root_code_and_what_to_do() -> None:
    error = classify(_client_error(404, "NoSuchBucket"), op="put", key="a/b", url=URL)
    assert str(error) == (
        "put of 'a/b' in s3://bucket/root failed (404 NoSuchBucket): create the bucket first; cloudckpt never does"
    )
    assert isinstance(error, StorageError)
    assert (error.op, error.key) == ("put", "a/b")


def test_the_cause_keeps_code_and_message_but_no_query_and_no_body() -> None:
    error = classify(GenericError(_obstore_reply(503, _SLOW)), op="put", key="k", url=URL)
    shown = "".join(traceback.format_exception(error))
    assert "503 SlowDown as asked" in shown
    assert "CANARY" not in shown


@pytest.mark.parametrize("op", ["get", "read", "head", "delete"])
def test_a_filesystem_may_say_that_an_object_is_absent(op: str) -> None:
    assert _class_of(AbsentError("x"), op) is ObjectNotFoundError


@pytest.mark.parametrize("op", ["put", "create", "list"])
def test_what_a_write_to_a_filesystem_misses_is_the_place(op: str) -> None:
    assert _class_of(AbsentError("x"), op) is BucketNotFoundError


_NOT_FOUND_BY_THE_CALLER = [
    _client_error(404, "NoSuchKey"),
    HttpStatusError(404, "notFound"),
    AbsentError("x"),
    ObjectNotFoundError("x"),
]


def _fail() -> None:
    raise RuntimeError("of our own call")


def _fail_twice(*, is_explicit: bool) -> None:
    try:
        _fail()
    except RuntimeError as exc:
        raise OSError(5, "once more") from (exc if is_explicit else None)


def _asked(call: Callable[[], None]) -> CloudCkptError:
    with pytest.raises(CloudCkptError) as caught:
        ask(call, op="get", key="k", url=URL)
    return caught.value


@pytest.mark.parametrize("theirs", _NOT_FOUND_BY_THE_CALLER, ids=lambda exc: type(exc).__name__)
@pytest.mark.parametrize("is_explicit", [False, True])
def test_what_the_caller_was_handling_takes_no_part(theirs: Exception, is_explicit: bool) -> None:
    error = while_handling(theirs, lambda: _asked(lambda: _fail_twice(is_explicit=is_explicit)))
    assert type(error) is StorageError


def test_what_a_generator_was_handling_takes_no_part() -> None:
    def asking() -> Iterator[CloudCkptError | None]:
        try:
            raise HttpStatusError(404, "NoSuchKey")  # noqa: TRY301 - a function that handled it could not yield
        except HttpStatusError:
            yield None
            yield _asked(_fail)

    answers = asking()
    next(answers)
    assert type(while_handling(AbsentError(), lambda: next(answers))) is StorageError


def test_what_the_caller_of_a_generator_was_handling_takes_no_part() -> None:
    def asking() -> Iterator[CloudCkptError]:
        yield _asked(_fail)

    answers = asking()
    assert type(while_handling(HttpStatusError(404, "NoSuchKey"), lambda: next(answers))) is StorageError


def test_a_failed_delete_is_not_explained_by_what_the_caller_was_handling() -> None:
    theirs, cause = HttpStatusError(503, "SlowDown"), ValueError("of our own call")
    cause.__context__ = theirs
    assert type(deletion_error({"a": cause}, asked=1, url=URL, outer=theirs)) is StorageError


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (_client_error(403, "AccessDenied"), False),
        (_client_error(405, "MethodNotAllowed"), False),
        (_client_error(409, "ConditionalRequestConflict"), False),
        (_client_error(429, "TooManyRequests"), False),
        (_client_error(400, "KeyTooLongError"), False),
        (_client_error(301, "PermanentRedirect"), False),
        (_client_error(501, "NotImplemented"), False),
        (_client_error(408, "RequestTimeout"), True),
        (_client_error(500, "InternalError"), True),
        (_client_error(503, "SlowDown"), True),
        (botocore.exceptions.ReadTimeoutError(**_TO), True),
        (botocore.exceptions.ConnectionClosedError(**_TO), True),
        (botocore.exceptions.ConnectTimeoutError(**_TO), False),
        (ConnectionRefusedError(), False),
        (ConnectionResetError(), True),
        (socket.gaierror(), False),
        (google.auth.exceptions.TransportError("x"), False),
        (TimeoutError(), True),
        (ValueError("x"), True),
    ],
    ids=repr,
)
def test_a_write_may_have_landed_unless_it_was_refused_or_never_sent(exc: Exception, expected: bool) -> None:
    error = classify(exc, op="create", key="k", url=URL)
    assert isinstance(error, StorageError)
    assert error.may_have_landed is expected


def test_what_fails_before_anything_is_sent_is_an_error_of_the_options() -> None:
    def connect() -> None:
        with before_sending():
            raise ValueError("Invalid endpoint: htp:/x")

    with pytest.raises(OptionsError, match=r"\(ValueError\)") as caught:
        ask(connect, op="create", key="k", url=URL)
    assert "Invalid endpoint" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (botocore.exceptions.EndpointConnectionError(**_TO), TransientError),
        (botocore.exceptions.NoCredentialsError(), AccessDeniedError),
    ],
)
def test_what_fails_before_anything_is_sent_is_judged_by_its_class(exc: Exception, kind: type[CloudCkptError]) -> None:
    def connect() -> None:
        with before_sending():
            raise exc

    with pytest.raises(kind) as caught:
        ask(connect, op="create", key="k", url=URL)
    assert isinstance(caught.value, StorageError)
    assert not caught.value.may_have_landed


@pytest.mark.parametrize("beneath", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")])
def test_a_file_that_a_library_missed_on_the_way_is_told_as_one_of_the_options(beneath: OSError) -> None:
    outer = botocore.exceptions.HTTPClientError(error=beneath)
    outer.__cause__ = beneath
    assert _class_of(outer) is OptionsError


def test_a_file_that_is_missed_is_named() -> None:
    error = classify(FileNotFoundError(2, "No such file", "/etc/token"), op="get", key="k", url=URL)
    assert "'/etc/token'" in str(error)


@pytest.mark.parametrize(
    ("credentials", "kind", "words"),
    [
        ("none", AccessDeniedError, "anonymous"),
        ("lasting", AccessDeniedError, "does not accept"),
        ("temporary", CredentialsExpiredError, "expired"),
    ],
)
def test_only_what_can_expire_is_said_to_have_expired(
    credentials: CredentialKind, kind: type[CloudCkptError], words: str
) -> None:
    error = classify(HttpStatusError(401), op="get", key="k", url=URL, credentials=credentials)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.parametrize("credentials", ["none", "lasting"])
def test_a_bare_400_of_a_head_is_no_expiry_of_what_cannot_expire(credentials: CredentialKind) -> None:
    error = classify(HttpStatusError(400), op="head", key="k", url=URL, credentials=credentials)
    assert type(error) is StorageError
    assert "region" in str(error)


def test_a_bucket_of_another_region_is_told_with_the_region() -> None:
    error = classify(HttpStatusError(400, region="eu-west-3"), op="head", key="k", url=URL)
    assert "'region_name': 'eu-west-3'" in str(error)


@pytest.mark.parametrize(
    ("op", "right"),
    [("list", "s3:ListBucket"), ("put", "s3:PutObject"), ("delete", "s3:DeleteObject"), ("head", "s3:ListBucket")],
)
def test_a_denial_names_the_right_that_is_missing(op: str, right: str) -> None:
    assert right in str(classify(_client_error(403, "AccessDenied"), op=op, key="k", url=URL))


def test_a_denial_of_an_anonymous_request_says_that_it_was_one() -> None:
    error = classify(_client_error(403, "AccessDenied"), op="get", key="k", url=URL, credentials="none")
    assert "anonymous" in str(error)


class PanicException(BaseException):
    """As the bindings of Rust name theirs."""


PanicException.__module__ = "pyo3_runtime"


def test_a_panic_of_an_engine_becomes_an_error() -> None:
    def panic() -> None:
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    with pytest.raises(StorageError, match="storage_options"):
        ask(panic, op="put", key="k", url=URL)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_program_is_no_error_of_a_store(kind: type[BaseException]) -> None:
    def end() -> None:
        raise kind

    with pytest.raises(kind):
        ask(end, op="put", key="k", url=URL)


def test_what_is_raised_drags_no_original_along() -> None:
    def fail() -> None:
        raise _client_error(403, "AccessDenied")

    with pytest.raises(AccessDeniedError) as caught:
        ask(fail, op="put", key="k", url=URL)
    assert caught.value.__context__ is None
    assert "AccessDenied why" in str(caught.value.__cause__)


def test_our_own_errors_and_a_full_memory_pass_as_they_are() -> None:
    for mine in (OptionsError("mine"), MemoryError()):

        def fail(exc: BaseException = mine) -> None:
            raise exc

        with pytest.raises(type(mine)) as caught:
            ask(fail, op="put", key="k", url=URL)
        assert caught.value is mine


def test_every_error_of_the_table_survives_pickling() -> None:
    for exc in (_client_error(503, "SlowDown"), TimeoutError(), botocore.exceptions.ProfileNotFound(profile="x")):
        error = classify(exc, op="put", key="k", url=URL)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_a_failed_delete_tells_first_what_no_further_try_can_mend() -> None:
    error = deletion_error({"a": "SlowDown", "b": "AccessDenied", "c": TimeoutError()}, asked=9, url=URL)
    assert isinstance(error, AccessDeniedError)
    assert (error.key, "3 of 9" in str(error)) == ("b", True)


def test_a_failed_delete_that_may_pass_is_transient() -> None:
    error = deletion_error({"a": "SlowDown", "c": TimeoutError()}, asked=2, url=URL)
    assert is_transient(error)


def test_absence_is_told_from_every_other_failure() -> None:
    assert is_absence(HttpStatusError(404))
    assert is_absence(AbsentError())
    assert not is_absence(FileNotFoundError())
    assert not is_absence(HttpStatusError(404, is_foreign=True))
    assert not is_absence(HttpStatusError(403))
    assert not is_absence(TimeoutError())


@pytest.mark.parametrize("code", ["QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"])
def test_a_store_without_room_is_told_from_any_other_refusal(code: str) -> None:
    full = classify(HttpStatusError(403, code), op="put", key="k", url="s3://bucket/root")
    denied = classify(HttpStatusError(403, "AccessDenied"), op="put", key="k", url="s3://bucket/root")
    assert isinstance(full, StorageError)
    assert isinstance(denied, StorageError)
    assert (full.is_full, denied.is_full) == (True, False)
