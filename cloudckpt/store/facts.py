"""Read out of a library's exception what it knows: the reply's status and code, or the kind of fault.

For most libraries that is an attribute. obstore tells the status of a reply in its text alone; one function reads
the structured part of it, and nothing else here looks at a message to decide. Pure; no library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cloudckpt.errors import CloudCkptError

__all__ = [
    "NOWHERE",
    "AbsentError",
    "BodyLengthError",
    "Facts",
    "ForbiddenError",
    "GarbledReplyError",
    "HttpStatusError",
    "ObjectSizeError",
    "UnsentError",
    "before_sending",
    "facts_of",
    "is_bare_redirect",
    "is_certificate_refused",
    "refusal",
]

# Port 0 is nobody's: where obstore's connection to another host than the store's own ends.
NOWHERE = "127.0.0.1:0"


class HttpStatusError(Exception):
    """A store answered a request of ours with an error status.

    Attributes:
        retry_after: what the reply's header of that name says, if it has one.
        region: where the bucket is, if the answer says so.
        is_foreign: whether the answer has not the form of a store's, as that of a web server at a wrong endpoint.
    """

    def __init__(
        self,
        status: int,
        code: str = "",
        message: str = "",
        *,
        retry_after: str = "",
        region: str = "",
        is_foreign: bool = False,
    ) -> None:
        super().__init__(f"{status} {code} {message}".strip())
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.region = region
        self.is_foreign = is_foreign


class BodyLengthError(Exception):
    """A reply had fewer or more bytes than were asked for."""

    def __init__(self, got_bytes: int, wanted_bytes: int) -> None:
        super().__init__(f"{got_bytes} bytes came where {wanted_bytes} were asked for")


class GarbledReplyError(Exception):
    """A reply is not in the form that the store speaks."""


class ObjectSizeError(Exception):
    """An object is shorter or longer than whoever committed it said."""


class AbsentError(FileNotFoundError):
    """There is no object of that name, says a filesystem whose objects are files."""


class ForbiddenError(PermissionError):
    """The object may not be read or written, says a filesystem whose objects are files."""


class UnsentError(Exception):
    """What is the cause of this was raised before a request was sent: by options, by connecting, or for credentials."""


@contextmanager
def before_sending() -> Iterator[None]:
    """Mark what fails in the block as of a time when nothing was sent yet; our own errors pass as they are."""
    try:
        yield
    except (CloudCkptError, MemoryError):
        raise
    except Exception as exc:
        raise UnsentError from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one failure: the reply, if there was one, and the classes of the exceptions.

    Attributes:
        types: qualified names of the classes, those that say most first.
        region: where the bucket is, by the reply.
        path: of the file that could not be opened.
        is_foreign: whether the reply has not the form of a store's.
        is_unsent: whether it was raised before a request was sent.
    """

    status: int = 0
    code: str = ""
    message: str = ""
    types: tuple[str, ...] = ()
    retry_after_s: float = 0.0
    region: str = ""
    path: str = ""
    is_foreign: bool = False
    is_unsent: bool = False


# Whatever its HTTP client met, botocore says no more than this; what lies below it tells.
_SAYS_NOTHING = "botocore.exceptions.HTTPClientError"
# A certificate that is not trusted hides below a connection error, which alone would be worth another try.
_CERTIFICATE = "ssl.SSLCertVerificationError"


def facts_of(exc: BaseException, *, outer: BaseException | None = None) -> Facts:
    """Collect what the exception and its causes know; the outermost reply counts.

    `outer` is what was being handled when our call began. Python hangs it onto the end of the chain of whatever is
    raised then; it is the caller's own, and says nothing of our request.
    """
    chain = list(_chain(exc, outer))
    reply = next((found for link in chain if (found := _reply(link)) != Facts()), Facts())
    return replace(
        reply,
        types=reply.types + _types(chain),
        path=next((str(link.filename) for link in chain if isinstance(link, OSError) and link.filename), ""),
        is_unsent=any(isinstance(link, UnsentError) for link in chain),
    )


def _chain(exc: BaseException, outer: BaseException | None) -> Iterator[BaseException]:
    link: BaseException | None = exc
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__context__ if link.__cause__ is None else link.__cause__
        if link is outer:
            return


def _types(chain: Sequence[BaseException]) -> tuple[str, ...]:
    telling = [link for link in chain if not isinstance(link, UnsentError)]
    links = sorted(telling, key=lambda link: _type_names(link)[0] == _SAYS_NOTHING)
    names = [name for link in links for name in _type_names(link)]
    return tuple(sorted(names, key=lambda name: name != _CERTIFICATE))


def _type_names(exc: BaseException) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__]


def _reply(exc: BaseException) -> Facts:
    if isinstance(exc, HttpStatusError):
        return Facts(
            status=exc.status,
            code=exc.code,
            message=exc.message,
            retry_after_s=_seconds(exc.retry_after),
            region=exc.region,
            is_foreign=exc.is_foreign,
        )
    module = type(exc).__module__.partition(".")[0]
    if module == "botocore":
        return _botocore_facts(exc)
    if module == "obstore" or (module == "builtins" and _DEBUG_MARK in str(exc)):
        return _obstore_facts(str(exc))
    if module == "gcsfs":
        return _status(getattr(exc, "code", None))
    if module == "aiohttp":
        # aiohttp calls a reply that it cannot read a 400.
        is_read = not _type_names(exc.__cause__ or exc)[0].startswith(_UNREAD)
        return _status(getattr(exc, "status", None)) if is_read else Facts()
    return Facts()


_UNREAD = "aiohttp.http_exceptions."


def _botocore_facts(exc: BaseException) -> Facts:
    response = getattr(exc, "response", None)
    if not isinstance(response, Mapping):
        return Facts()
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    headers: Mapping[str, str] = metadata.get("HTTPHeaders", {})
    code, status = str(error.get("Code", "")), int(metadata.get("HTTPStatusCode") or 0)
    # Without a body (HEAD) botocore puts the status where the code would be.
    code = "" if code.isdigit() else code
    is_head = str(getattr(exc, "operation_name", "")).startswith("Head")
    return Facts(
        status=status,
        code=code,
        message=str(error.get("Message", "")),
        retry_after_s=_seconds(headers.get("retry-after", "")),
        region=str(error.get("Region") or headers.get("x-amz-bucket-region", "")),
        is_foreign=not code and (not is_head or headers.get("content-type", "").startswith("text/html")),
    )


def _seconds(retry_after: object) -> float:
    """Read a header that asks to wait, in seconds; a date, which needs both clocks to agree, counts as none."""
    text = str(retry_after).strip()
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _status(value: object) -> Facts:
    text = str(value)
    return Facts(status=int(text)) if text.isdigit() else Facts()


_DEBUG_MARK = "\n\nDebug source:\n"
# In the debug form every string is quoted and its line ends are escaped, so that no body and no key can
# imitate a line of it.
_STATUS_LINE = re.compile(r"^ *inner: (?:Status|Response) \{\n *status: (\d{3}),$", re.MULTILINE)
_BODY_LINE = re.compile(r'^ *(?:body: )?"(.*)",$', re.MULTILINE)
_KIND_LINE = re.compile(r"HttpError \{\n *kind: (\w+),$", re.MULTILINE)
_PARSE_LINE = re.compile(r"hyper::Error\(\n *Parse\($", re.MULTILINE)
_OTHER_LINE = re.compile(
    r"^ *(?:source|inner): (InvalidListResponse|BareRedirect|NotPartial|NoContentRange|UnexpectedRange|BadHeader"
    r"|ParseContentRange|MissingEtag|(?:Missing|Invalid)(?:LastModified|ContentLength))\b",
    re.MULTILINE,
)
_CERTIFICATE_LINE = re.compile(r"^ *(?:error: )?InvalidCertificate\(?$", re.MULTILINE)
_NOWHERE_LINE = re.compile(rf"^ *{re.escape(NOWHERE)},$", re.MULTILINE)
_CODE_ELEMENT = re.compile(r"<Code>([\w.]{1,80})</Code>")
_MESSAGE_ELEMENT = re.compile(r"<Message>([^<]{1,300})</Message>")
_REGION_ELEMENT = re.compile(r"<Region>([a-z0-9-]{1,40})</Region>")


def _obstore_facts(text: str) -> Facts:
    """Read the reply's status and error code, or the kind of transport fault, from obstore's text."""
    # obstore's classes cannot tell an expired token, a skewed clock, a full store and a throttled one apart, and the
    # structured debug form behind the last mark is the only place where it says.
    _, mark, debug = text.rpartition(_DEBUG_MARK)
    if not mark:
        return Facts()
    status = _STATUS_LINE.search(debug)
    if status is not None:
        body = _BODY_LINE.search(debug, status.end())
        inner = body.group(1) if body else ""
        code = _inner(_CODE_ELEMENT, inner)
        return Facts(
            status=int(status.group(1)),
            code=code,
            message=_inner(_MESSAGE_ELEMENT, inner),
            region=_inner(_REGION_ELEMENT, inner),
            is_foreign=not code,
        )
    if _CERTIFICATE_LINE.search(debug):
        return Facts(types=("obstore.InvalidCertificate",))
    if _NOWHERE_LINE.search(debug):
        return Facts(types=("obstore.RedirectElsewhere",))
    kind, other = _KIND_LINE.search(debug), _OTHER_LINE.search(debug)
    if kind is not None:
        name = "Parse" if _PARSE_LINE.search(debug) else kind.group(1)
        return Facts(types=(f"obstore.HttpError:{name}",))
    return Facts(types=(f"obstore.{other.group(1)}",)) if other else Facts()


def refusal(status: int, header: Callable[[str, str], str], body: bytes) -> HttpStatusError:
    """Return what a reply of S3's, or of GCS's XML API, says that refuses a request; `header` has a default."""
    text = body.decode("utf-8", "replace")
    code = _inner(_CODE_ELEMENT, text)
    return HttpStatusError(
        status,
        code,
        _inner(_MESSAGE_ELEMENT, text),
        retry_after=header("Retry-After", ""),
        region=_inner(_REGION_ELEMENT, text) or header("x-amz-bucket-region", ""),
        is_foreign=not code,
    )


def is_bare_redirect(exc: BaseException) -> bool:
    """Tell whether obstore met a redirect that does not say where to, as S3's to another region are."""
    return "obstore.BareRedirect" in _reply(exc).types


def is_certificate_refused(exc: BaseException) -> bool:
    """Tell whether obstore does not trust the certificate of the endpoint."""
    return "obstore.InvalidCertificate" in _reply(exc).types


def _inner(element: re.Pattern[str], text: str) -> str:
    found = element.search(text)
    return found.group(1) if found else ""
