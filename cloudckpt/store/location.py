"""Read a store's URL, once and for every engine: scheme, bucket and root prefix, or a path on a disk.

Pure values. The path of a URL is taken literally, as fsspec takes it: nothing but file:// is percent-decoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from cloudckpt.errors import OptionsError
from cloudckpt.store.base import Listing, ObjectInfo, check_key, is_key

__all__ = [
    "ALLOW_HTTP",
    "LOCAL_SCHEMES",
    "TEXT_OPTIONS",
    "Location",
    "check_encrypted",
    "check_endpoint",
    "check_no_numbers",
    "local_path",
    "named_endpoint",
    "parse_location",
    "scheme_of",
]

# "" stands for a path.
LOCAL_SCHEMES = frozenset({"", "file", "local"})

_URL = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*)://(.*)\Z", re.DOTALL)
_ONE_SLASH = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")
# A colon may stand in the name of a directory, but hardly one that is named like these.
_NO_SLASHES = re.compile(
    r"\A(s3a?|gc?s|az|abfss?|adl|file|memory|https?|s?ftp|ssh|(?:web)?hdfs|oci|oss|hf)(?::(?!/)|(?<!file)//)",
    re.IGNORECASE,
)
_SAME = {"s3a": "s3", "gcs": "gs"}
_WITH_BUCKETS = frozenset({"s3", "gs"})
_BUCKET = re.compile(r"\A(?:[A-Za-z0-9][A-Za-z0-9._-]*|arn:aws[a-z-]*:s3[A-Za-z0-9:._-]*)\Z")
# The name of an access point stands behind a slash of its own: arn:aws:s3:region:account:accesspoint/name.
_ACCESS_POINT = re.compile(r"\A(arn:[^/]*?:(?:outpost/[^/]+/)?(?:accesspoint|bucket)[:/][^/]+)(?:/(.*))?\Z", re.DOTALL)
TEXT_OPTIONS = frozenset(
    (
        *("key", "secret", "token", "username", "password", "profile", "project"),
        *("account_name", "account_key", "sas_token", "connection_string", "tenant_id", "client_id", "client_secret"),
        *("region_name", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
    )
)
"""Options of fsspec's filesystems, and of their clients, that are text also where they look like a number."""
ALLOW_HTTP = "allow_http"
"""The one storage option that is ours: whether plain http may leave this machine."""
# Azure writes container@account where others have a bucket.
_ENDPOINT_VARIABLES = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}
# Google's tools take host:port from it.
_BARE = frozenset({"STORAGE_EMULATOR_HOST"})
_CONTAINER_AT_ACCOUNT = frozenset({"az", "abfs", "abfss"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A root: a bucket and a prefix in it, the prefix without slashes at its ends."""

    scheme: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        """The root as the caller may see it: no credentials, no slash at the end."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def path(self, key: str) -> str:
        """Return the name in the bucket of the object `key`, or refuse a key that could leave the root."""
        return self.path_prefix(check_key(key))

    def path_prefix(self, prefix: str) -> str:
        """Return what the names of all objects below the root that start with `prefix` start with."""
        return f"{self.prefix}/{prefix}" if self.prefix else prefix

    def listing(self, objects: list[ObjectInfo], prefixes: list[str]) -> Listing:
        """Turn names in the bucket into keys below the root.

        Left out are markers of directories (`name/`) and names that no key can have (`a//b`): other tools make them.
        """
        cut = len(self.path_prefix(""))
        found = [
            ObjectInfo(key=info.key[cut:], size_bytes=info.size_bytes, modified_s=info.modified_s)
            for info in objects
            if is_key(info.key[cut:])
        ]
        below = {prefix[cut:] for prefix in prefixes if is_key(prefix[cut:].removesuffix("/"))}
        return Listing(objects=tuple(sorted(found, key=lambda info: info.key)), prefixes=tuple(sorted(below)))


def scheme_of(url: str) -> str:
    """Return a URL's scheme in its usual spelling, or "" for a path.

    Raises:
        OptionsError: it is neither, but a URL that was taken for a path once, or one that stacks filesystems.
    """
    if url.startswith(("/", ".", "~")):
        return ""
    found = _URL.match(url)
    if found:
        scheme = found[1].lower()
        return _SAME.get(scheme, scheme)
    bare = _NO_SLASHES.match(url)
    if bare:
        raise OptionsError(
            f"the URL begins with {bare[0]}, which would be a directory of that name; write {bare[1].lower()}://, or "
            "./ before a path"
        )
    eaten = _ONE_SLASH.match(url)
    if eaten:
        raise OptionsError(
            f"the URL has one slash after {eaten[1]}: where it needs two; a pathlib.Path eats the other, so pass a str"
        )
    if "://" in url:
        raise OptionsError("the URL has no plain scheme; chained URLs (a::b://) cannot be written to safely")
    return ""


def parse_location(url: str) -> Location:
    """Read `scheme://bucket/prefix`, its scheme in the usual spelling.

    Raises:
        OptionsError: it holds what may be a credential, which is not repeated, or what engines would read differently.
    """
    scheme = scheme_of(url)
    if not scheme:
        raise OptionsError("a store's URL looks like scheme://bucket/prefix")
    rest = url.partition("://")[2]
    place = rest.partition("/")[0]
    user, at, _ = place.rpartition("@")
    if (at and (scheme not in _CONTAINER_AT_ACCOUNT or ":" in user)) or "?" in url or "#" in url:
        raise OptionsError(
            f"the {scheme}:// URL holds a user, a password, a query or a fragment, which logs and manifests would show "
            "(this message does not); pass credentials in storage_options"
        )
    if scheme in _WITH_BUCKETS and not _BUCKET.match(place):
        raise OptionsError(
            f"the {scheme}:// URL does not begin with a bucket's name (it is not repeated here, since it may hold a "
            f"credential); write {scheme}://bucket/prefix"
        )
    named = _ACCESS_POINT.match(rest)
    bucket, prefix = named.groups("") if named else (place, rest[len(place) + 1 :])
    prefix = prefix.rstrip("/")
    if prefix:
        check_key(prefix)
    return Location(scheme=scheme, bucket=bucket, prefix=prefix)


def named_endpoint(scheme: str, options: Mapping[str, object]) -> str:
    """Return the server that fsspec's options or the environment name for `scheme`, without credentials; or "".

    With its path: one host may have several gateways.
    """
    _, named = _endpoint(scheme, options)
    parts = urlsplit(named)
    # A profile may name another one, in a file.
    profile = options.get("profile") or os.environ.get("AWS_PROFILE") if scheme == "s3" and not named else ""
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return server if named else f"profile {profile}" if profile else ""


def check_endpoint(scheme: str, options: Mapping[str, object]) -> None:
    """Refuse an endpoint that no request can go to, by who names it; it may hold a credential, and is not repeated."""
    if scheme not in _WITH_BUCKETS:
        return
    for place, given in _given_endpoints(options).items():
        if given is not None and (not isinstance(given, str) or not given):
            what = "is empty" if given == "" else f"is a {type(given).__name__}"
            raise OptionsError(f"{place} {what}; write http(s)://host:port, or leave it out")
    place, named = _endpoint(scheme, options)
    if named and (reason := _fault_of(named, may_be_bare=place in _BARE)):
        raise OptionsError(f"{place} {reason}; write http(s)://host:port")
    if named:
        check_encrypted(named if "://" in named else f"http://{named}", options, place=place)


def check_encrypted(origin: str, options: Mapping[str, object], *, place: str = "the endpoint") -> None:
    """Refuse plain http to another machine, unless the options allow it.

    Whoever is on the way reads weights and session tokens there, and may answer in the store's place: digests tell
    damage, not who wrote a checkpoint.
    """
    allowed = options.get(ALLOW_HTTP, False)
    if not isinstance(allowed, bool):
        raise OptionsError(f"storage_options[{ALLOW_HTTP!r}] is of type {type(allowed).__name__}; give true or false")
    url = urlsplit(origin)
    if url.scheme == "http" and not (allowed or _is_this_machine(url.hostname or "")):
        raise OptionsError(
            f"{place} is plain http to another machine: whoever is on the way could read weights and credentials, and "
            f"change both; write https://, or give {ALLOW_HTTP!r}: True in storage_options where the network is trusted"
        )


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which may be anybody's
        return False


def check_no_numbers(options: Mapping[str, object], where: str = "storage_options") -> None:
    """Refuse numbers where a text is meant, by name: JSON and YAML make them of keys that are digits."""
    for name, value in options.items():
        if name in TEXT_OPTIONS and isinstance(value, int | float | bytes):
            raise OptionsError(
                f"{where}[{name!r}] is of type {type(value).__name__} (it is not repeated here); give a str, in JSON "
                "and YAML in quotes"
            )
        if isinstance(value, Mapping) and name not in TEXT_OPTIONS:
            check_no_numbers(value, f"{where}[{name!r}]")


def _fault_of(named: str, *, may_be_bare: bool) -> str:
    """Return why no request can go to a server; or ""."""
    if any(char.isspace() for char in named):
        return "has a blank in it, perhaps at its end"
    try:
        parts = urlsplit(f"http://{named}" if may_be_bare and "://" not in named else named)
        parts.port  # noqa: B018 - read from the text only now
    except ValueError as exc:
        return f"is no URL ({exc})"
    faults = {
        "does not begin with http:// or https://": parts.scheme not in ("http", "https"),
        "has no host": not parts.hostname,
        "holds a user or a password, which no request carries: credentials go into storage_options": "@"
        in parts.netloc,
        "has a query or a fragment": bool(parts.query or parts.fragment),
    }
    return next((words for words, is_so in faults.items() if is_so), "")


def _endpoint(scheme: str, options: Mapping[str, object]) -> tuple[str, str]:
    """Return who names a server, and its URL as it stands; or empty texts."""
    given = {
        **_given_endpoints(options),
        **{name: os.environ.get(name) for name in _ENDPOINT_VARIABLES.get(scheme, ())},
    }
    return next(((place, str(url)) for place, url in given.items() if url), ("", ""))


def _given_endpoints(options: Mapping[str, object]) -> dict[str, object]:
    inner = options.get("client_kwargs")
    return {
        "endpoint_url in storage_options": options.get("endpoint_url"),
        "client_kwargs['endpoint_url']": inner.get("endpoint_url") if isinstance(inner, Mapping) else None,
    }


def local_path(url: str | os.PathLike[str]) -> str:
    """Return the absolute path that a local URL or path names.

    `dir`, `./dir` and `/abs` are paths as they stand; a leading `~` is the home directory (`./~` is a directory of
    that name). `file:///abs` is percent-decoded, and knows no `~`.

    Raises:
        OptionsError: it is empty, of another scheme or host, or holds a NUL.
    """
    path = os.fspath(url)
    scheme = scheme_of(path)
    if scheme not in LOCAL_SCHEMES:
        raise OptionsError(f"a URL of scheme {scheme} is no path on a disk")
    _refuse_no_name(path)
    if scheme:
        path = path.partition("://")[2]
        # Three slashes: an empty host and an absolute path. Two would make the first directory a host.
        if not path.startswith("/"):
            raise OptionsError(f"{url!r} does not name an absolute path on this machine; write {scheme}:///abs/path")
        path = os.fsdecode(unquote_to_bytes(os.fsencode(path)))
    elif path.startswith("~"):
        path = _expanded(path)
    _refuse_no_name(path)
    # resolve() would follow links, so that the URL shows another place; two slashes at the start are one to the system.
    return re.sub(r"\A//+", "/", os.path.abspath(path))  # noqa: PTH100


def _refuse_no_name(path: str) -> None:
    """Refuse what no disk has a name for, before the system is asked about it."""
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        is_name = False
    if not (path and is_name):
        raise OptionsError(f"{path!r} is no path; give a directory")


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as exc:
        raise OptionsError(
            f"{path!r} names the home directory of nobody; write ./~ for a directory of that name"
        ) from exc
