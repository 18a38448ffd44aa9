"""Open the store that a URL names: pick its engine, and put the one retry layer around it.

    dir  ./dir  /dir  file:///dir   local
    s3://  s3a://                   obstore, or fsspec (s3fs) if asked
    gs://  gcs://                   fsspec (gcsfs), or obstore if asked
    az://  abfs://  abfss://        fsspec (adlfs)
    memory:// and all that fsspec knows     fsspec

URLs are strings throughout: a `pathlib.Path` would eat one of their slashes. Nothing is read or written here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal, get_args

from cloudckpt.errors import OptionsError
from cloudckpt.options import Options
from cloudckpt.store.base import Store
from cloudckpt.store.local import LocalStore
from cloudckpt.store.retrying import RetryingStore

__all__ = ["Engine", "open_store"]

Engine = Literal["auto", "local", "obstore", "fsspec"]

_SCHEME = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_BUCKET = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_ACCESS_POINT = re.compile(r"\Aarn:aws[a-z-]*:s3[A-Za-z0-9:._-]*\Z")
_LOCAL = frozenset({"", "file", "local"})
_SAME = {"s3a": "s3", "gcs": "gs"}
_BUCKETS = frozenset({"s3", "gs"})
# Azure writes container@account where others have a bucket.
_AZURE = frozenset({"az", "abfs", "abfss"})
# The first is the default. obstore on gs is opt-in until it was shown on a server that we did not write.
_ENGINES: Mapping[str, tuple[str, ...]] = {
    "s3": ("obstore", "fsspec"),
    "gs": ("fsspec", "obstore"),
    "az": ("fsspec",),
    "abfs": ("fsspec",),
    "abfss": ("fsspec",),
}


def open_store(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | None = None,
) -> RetryingStore:
    """Open the root at `url`. The caller closes the store.

    Args:
        url: a path, or a URL without credentials.
        storage_options: fsspec's own options for that scheme, also when another engine moves the bytes.
        engine: `auto`, `local`, `obstore` or `fsspec`.
        options: patience and payload signing are taken from here.

    Raises:
        OptionsError: the URL, the engine or an option is wrong, or a package is missing; the message says which.
    """
    chosen = options or Options()
    text = os.fspath(url)
    scheme = _scheme_of(text)
    name = _engine_for(scheme, engine)
    if name == "local":
        store: Store = _open_local(text, storage_options)
    else:
        store = _open_remote(_remote_url(text, scheme), name, storage_options, chosen)
    return RetryingStore(store, chosen.retry)


def _scheme_of(url: str) -> str:
    """Return the scheme in its usual spelling, or "" for a path."""
    if url.startswith(("/", ".", "~")):
        return ""
    found = _SCHEME.match(url)
    if found:
        scheme = found[1].lower()
        return _SAME.get(scheme, scheme)
    eaten = _ONE_SLASH.match(url)
    if eaten:
        raise OptionsError(
            f"the URL has one slash after {eaten[1]}: where it needs two; a pathlib.Path eats the other, so pass a str"
        )
    if "://" in url:
        raise OptionsError("the URL has no plain scheme; chained URLs (a::b://) cannot be written to safely")
    return ""


def _engine_for(scheme: str, engine: str) -> str:
    if engine not in get_args(Engine):
        raise OptionsError(f"engine {engine!r} is unknown; give one of {', '.join(get_args(Engine))}")
    offered = ("local",) if scheme in _LOCAL else _ENGINES.get(scheme, ("fsspec",))
    if engine == "auto":
        return offered[0]
    if engine not in offered:
        raise OptionsError(
            f"engine {engine!r} does not serve {scheme + '://' if scheme else 'paths'}; give {' or '.join(offered)}"
        )
    return engine


def _open_local(url: str, storage_options: Mapping[str, object] | None) -> LocalStore:
    if storage_options:
        raise OptionsError(f"a disk has no storage_options, and {', '.join(sorted(storage_options))} were given")
    return LocalStore(url)


def _remote_url(url: str, scheme: str) -> str:
    """Return the URL in its usual spelling; refuse credentials, unrepeated, and what engines would read differently."""
    rest = url[url.index("://") + 3 :].rstrip("/")
    place, _, root = rest.partition("/")
    user, at, _ = place.rpartition("@")
    if (at and (scheme not in _AZURE or ":" in user)) or "?" in url or "#" in url:
        raise OptionsError(
            f"the {scheme}:// URL holds a user, a password, a query or a fragment, which logs and manifests would show "
            "(this message does not); pass credentials in storage_options"
        )
    if scheme in _BUCKETS and not (_BUCKET.match(place) or _ACCESS_POINT.match(place)):
        raise OptionsError(
            f"the {scheme}:// URL does not begin with a bucket's name (it is not repeated here, since it may hold a "
            f"credential); write {scheme}://bucket/prefix"
        )
    if root and any(segment in ("", ".", "..") for segment in root.split("/")):
        raise OptionsError(f"{url!r} has an empty, '.' or '..' segment, which stores read differently; leave it out")
    return f"{scheme}://{rest}"


def _open_remote(url: str, engine: str, storage_options: Mapping[str, object] | None, options: Options) -> Store:
    if engine == "obstore":
        from cloudckpt.store.obstore import ObstoreStore

        return ObstoreStore(
            url, storage_options=storage_options, retry=options.retry, signed_payload=options.signed_payload
        )
    _check_filesystem(url.partition("://")[0])
    from cloudckpt.store.fsspec import FsspecStore

    return FsspecStore(url, storage_options=storage_options, retry=options.retry, signed_payload=options.signed_payload)


def _check_filesystem(scheme: str) -> None:
    """Say what is missing before an engine trips over it."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as exc:
        known = ", ".join(f"{name}://" for name in sorted(fsspec.available_protocols()) if name not in _LOCAL)
        raise OptionsError(f"scheme {scheme}:// is unknown; fsspec knows {known}") from exc
    except ImportError as exc:
        raise OptionsError(f"{scheme}:// needs a package that is not installed: {exc}") from exc
