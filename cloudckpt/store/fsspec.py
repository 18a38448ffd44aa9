"""Serve the store's verbs over whatever fsspec can open: S3 by s3fs, GCS by gcsfs, anything else by generic calls.

fsspec's file objects, caches, transactions and retries are never used: they publish half-written objects, answer
from memory, and multiply requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from fsspec import AbstractFileSystem, available_protocols, get_filesystem_class

from cloudckpt.errors import OptionsError
from cloudckpt.options import Checksum, RetryPolicy
from cloudckpt.store.location import ALLOW_HTTP, LOCAL_SCHEMES, Location
from cloudckpt.store.terms import PutTerms, checksum_of, refuse_terms
from cloudckpt.store.wire import Wire
from cloudckpt.store.wired import WiredStore

__all__ = ["FsspecStore", "fsspec_wire"]

# Filesystems that write nothing, or list no more than the links on a page: to them a web server's "not found" is an
# empty directory, and a login page is a file. And those that only wrap another one.
_NO_ROOTS = frozenset(
    {"http", "https", "github", "gist", "git", "data", "zip", "tar", "libarchive", "reference", "dask", "wandb"}
    | {"generic", "dir", "cached", "blockcache", "filecache", "simplecache", "asyncwrapper", "async_wrapper"}
)
# What fsspec's metaclass takes, and what is ours.
_COMMON = frozenset({"listings_expiry_time", "max_paths", "use_listings_cache", ALLOW_HTTP})
_CHECKSUMS: Mapping[str, tuple[Checksum, ...]] = {
    "s3": ("crc64nvme", "sha256", "crc32c", "crc32"),
    "gs": ("crc32c",),
}


class FsspecStore(WiredStore):
    """Objects below one root URL, moved by fsspec's libraries. See `Store` for the verbs."""

    engine = "fsspec"

    @property
    def is_create_atomic(self) -> bool:
        # memory:// lives in one process, where a lock of ours makes it so.
        return self._location.scheme in ("s3", "gs", "memory")

    def _check_options(self) -> None:
        """Refuse a scheme that nothing serves, and misspelt options of s3fs and gcsfs, which would else be ignored."""
        _check_filesystem(self._location.scheme)
        known = _known_options(self._location.scheme)
        unknown = sorted(set(self._options) - known) if known else []
        if unknown:
            scheme = self._location.scheme
            raise OptionsError(f"storage_options {unknown} are unknown to fsspec's filesystem for {scheme}://")
        scheme, checksums = self._location.scheme, _CHECKSUMS.get(self._location.scheme, ())
        refuse_terms(self._terms, f"fsspec to {scheme}://", checksums=checksums, creates=scheme in _CHECKSUMS)
        if self._terms.checksum is not None:
            checksum_of(self._terms.checksum, ())  # what it takes is installed, or is named here

    def _connect(self) -> Wire:
        return fsspec_wire(self._location, self._options, retry=self._retry, terms=self._terms)


def fsspec_wire(where: Location, options: Mapping[str, object], *, retry: RetryPolicy, terms: PutTerms) -> Wire:
    """Connect the wire for a location's scheme; its library is imported here, so that a run pays for what it uses."""
    if where.scheme == "s3":
        from cloudckpt.store.wire_s3 import S3Wire

        return S3Wire(where.bucket, options, retry=retry, terms=terms)
    if where.scheme == "gs":
        from cloudckpt.store.wire_gcs import GcsWire

        return GcsWire(where.bucket, options, retry=retry, terms=terms)
    from cloudckpt.store.wire_any import AnyWire

    return AnyWire(where.scheme, where.bucket, options)


def _check_filesystem(scheme: str) -> None:
    """Say what is missing, or cannot be done there, before an engine trips over it."""
    if scheme in _NO_ROOTS:
        raise _no_root(scheme, "written and listed")
    try:
        kind = get_filesystem_class(scheme)
    except ValueError as exc:
        others = LOCAL_SCHEMES | _NO_ROOTS
        known = ", ".join(f"{name}://" for name in sorted(available_protocols()) if name not in others)
        raise OptionsError(f"scheme {scheme}:// is unknown; fsspec knows {known}") from exc
    except ImportError as exc:
        raise OptionsError(f"{scheme}:// needs a package that is not installed: {exc}") from exc
    lists = [getattr(kind, name, None) is not getattr(AbstractFileSystem, name, None) for name in ("ls", "_ls")]
    if not any(lists):
        raise _no_root(scheme, "listed")


def _no_root(scheme: str, missing: str) -> OptionsError:
    return OptionsError(
        f"checkpoints cannot be at {scheme}://: fsspec's filesystem for it holds no objects that can be {missing}, so "
        "that nobody could tell an empty root from a wrong address; give the URL of the bucket or directory itself, "
        "such as s3://bucket/run-7 with endpoint_url in storage_options"
    )


def _known_options(scheme: str) -> set[str]:
    if scheme == "s3":
        from s3fs import S3FileSystem

        # What s3fs does not know itself it hands to aiobotocore's session, which knows a profile.
        return _parameters(S3FileSystem) | {"profile", *_COMMON}
    if scheme == "gs":
        from gcsfs.core import GCSFileSystem

        return _parameters(GCSFileSystem) | _COMMON
    return set()


def _parameters(kind: type) -> set[str]:
    # Of the constructor itself: fsspec's metaclass hides its signature.
    named = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {each.name for each in named if each.kind is not each.VAR_KEYWORD} - {"self"} | {"skip_instance_cache"}
