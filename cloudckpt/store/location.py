"""Split a store's URL into scheme, bucket and root prefix, and keys into what a store is asked for.

Pure values. The path of a URL is taken literally, as fsspec takes it: nothing is percent-decoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cloudckpt.errors import OptionsError
from cloudckpt.store.base import Listing, ObjectInfo, check_key

__all__ = ["Location", "parse_location"]

_URL = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*)://(.*)\Z", re.DOTALL)
# The name of an access point stands behind a slash of its own: arn:aws:s3:region:account:accesspoint/name.
_ACCESS_POINT = re.compile(r"\A(arn:[^/]*?:(?:outpost/[^/]+/)?(?:accesspoint|bucket)[:/][^/]+)(?:/(.*))?\Z", re.DOTALL)
# Azure writes container@account where others have a bucket.
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
            if _is_key(info.key[cut:])
        ]
        below = {prefix[cut:] for prefix in prefixes if _is_key(prefix[cut:].removesuffix("/"))}
        return Listing(objects=tuple(sorted(found, key=lambda info: info.key)), prefixes=tuple(sorted(below)))


def parse_location(url: str, *, needs_bucket: bool = True) -> Location:
    """Read `scheme://bucket/prefix`; credentials inside are refused, and never repeated."""
    match = _URL.match(url)
    if match is None:
        raise OptionsError("a store's URL looks like scheme://bucket/prefix")
    scheme, rest = match.group(1).lower(), match.group(2)
    named = _ACCESS_POINT.match(rest)
    bucket, prefix = (named.group(1), named.group(2) or "") if named else rest.partition("/")[::2]
    user, at, _ = bucket.rpartition("@")
    if at and (scheme not in _CONTAINER_AT_ACCOUNT or ":" in user):
        raise OptionsError(f"the {scheme} URL has credentials or a user in it; pass them in storage_options")
    if needs_bucket and not bucket:
        raise OptionsError(f"the {scheme} URL names no bucket; write {scheme}://bucket/prefix")
    prefix = prefix.strip("/")
    if prefix:
        check_key(prefix)
    return Location(scheme=scheme, bucket=bucket, prefix=prefix)


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except OptionsError:
        return False
    return True
