"""Read out of a library's exception what it knows: the reply's status and code, or the kind of fault.

For most libraries that is an attribute. obstore tells the status of a reply in its text alone; one function reads
the structured part of it, and nothing else here looks at a message to decide. Pure; no library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

__all__ = [
    "NOWHERE",
    "BodyLengthError",
    "Facts",
    "GarbledReplyError",
    "HttpStatusError",
    "ObjectSizeError",
    "facts_of",
]

# Port 0 is nobody's: where obstore's connection to another host than the store's own ends.
NOWHERE = "127.0.0.1:0"


class HttpStatusError(Exception):
    """A store answered a request of ours with an error status."""

    def __init__(self, status: int, code: str = "", message: str = "", *, retry_after: str = "") -> None:
        super().__init__(f"{status} {code} {message}".strip())
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after


class BodyLengthError(Exception):
    """A reply had fewer or more bytes than were asked for."""

    def __init__(self, got_bytes: int, wanted_bytes: int) -> None:
        super().__init__(f"{got_bytes} bytes came where {wanted_bytes} were asked for")


class GarbledReplyError(Exception):
    """A reply is not in the form that the store speaks."""


class ObjectSizeError(Exception):
    """An object is shorter or longer than whoever committed it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one failure: the reply, if there was one, and the classes of the exceptions."""

    status: int = 0
    code: str = ""
    message: str = ""
    types: tuple[str, ...] = ()
    retry_after_s: float = 0.0


def facts_of(exc: BaseException) -> Facts:
    """Collect what the exception and its causes know; the outermost reply counts."""
    chain = list(_chain(exc))
    types = tuple(name for link in chain for name in _type_names(link))
    # A certificate that is not trusted hides below a connection error, which alone would be worth another try.
    types = tuple(sorted(types, key=lambda name: name != "ssl.SSLCertVerificationError"))
    for link in chain:
        reply = _reply(link)
        if reply.status or reply.code or reply.types:
            return replace(reply, types=reply.types + types)
    return Facts(types=types)


def _chain(exc: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = exc
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _type_names(exc: BaseException) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__]


def _reply(exc: BaseException) -> Facts:
    if isinstance(exc, HttpStatusError):
        seconds = _seconds(exc.retry_after)
        return Facts(status=exc.status, code=exc.code, message=exc.message, retry_after_s=seconds)
    module = type(exc).__module__.partition(".")[0]
    if module == "botocore":
        return _botocore_facts(exc)
    if module == "obstore" or (module == "builtins" and _DEBUG_MARK in str(exc)):
        return _obstore_facts(str(exc))
    if module == "gcsfs":
        return _status(getattr(exc, "code", None))
    if module == "aiohttp":
        # Not `code`: aiohttp calls a reply that it cannot read a 400.
        return _status(getattr(exc, "status", None))
    return Facts()


def _botocore_facts(exc: BaseException) -> Facts:
    response = getattr(exc, "response", None)
    if not isinstance(response, Mapping):
        return Facts()
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(metadata.get("HTTPStatusCode") or 0)
    # Without a body (HEAD) botocore puts the status where the code would be.
    code = "" if code.isdigit() else code
    seconds = _seconds(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
    return Facts(status=status, code=code, message=str(error.get("Message", "")), retry_after_s=seconds)


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
_OTHER_LINE = re.compile(
    r"^ *(?:source|inner): (InvalidListResponse|BareRedirect|NotPartial|NoContentRange|UnexpectedRange|BadHeader"
    r"|ParseContentRange|MissingEtag|(?:Missing|Invalid)(?:LastModified|ContentLength))\b",
    re.MULTILINE,
)
_CERTIFICATE_LINE = re.compile(r"^ *(?:error: )?InvalidCertificate\(?$", re.MULTILINE)
_NOWHERE_LINE = re.compile(rf"^ *{re.escape(NOWHERE)},$", re.MULTILINE)
_CODE_ELEMENT = re.compile(r"<Code>([\w.]{1,80})</Code>")
_MESSAGE_ELEMENT = re.compile(r"<Message>([^<]{1,300})</Message>")


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
        code, message = _CODE_ELEMENT.search(inner), _MESSAGE_ELEMENT.search(inner)
        return Facts(
            status=int(status.group(1)),
            code=code.group(1) if code else "",
            message=message.group(1) if message else "",
        )
    if _CERTIFICATE_LINE.search(debug):
        return Facts(types=("obstore.InvalidCertificate",))
    if _NOWHERE_LINE.search(debug):
        return Facts(types=("obstore.RedirectElsewhere",))
    kind, other = _KIND_LINE.search(debug), _OTHER_LINE.search(debug)
    if kind is not None:
        return Facts(types=(f"obstore.HttpError:{kind.group(1)}",))
    return Facts(types=(f"obstore.{other.group(1)}",)) if other else Facts()
