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
from collections.abc import Mapping
from typing import Literal, get_args

from cloudckpt.errors import OptionsError
from cloudckpt.options import Options
from cloudckpt.store.base import Store
from cloudckpt.store.local import LocalStore
from cloudckpt.store.location import LOCAL_SCHEMES, scheme_of
from cloudckpt.store.retrying import RetryingStore

__all__ = ["Engine", "open_store"]

Engine = Literal["auto", "local", "obstore", "fsspec"]

# The first is the default. obstore on gs is opt-in until it was shown on a server that we did not write.
_ENGINES: Mapping[str, tuple[str, ...]] = {
    "s3": ("obstore", "fsspec"),
    "gs": ("fsspec", "obstore"),
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
        engine: `auto` (the first that this module names for the scheme), `local` (paths and file:// alone), `obstore`
            or `fsspec`.
        options: patience, payload signing and who writes are taken from here.

    Raises:
        OptionsError: the URL, the engine or an option is wrong, or a package is missing; the message says which.
    """
    chosen = Options.of(options)
    text = os.fspath(url)
    scheme = scheme_of(text)
    name = _engine_for(scheme, engine)
    if name == "local":
        if storage_options:
            raise OptionsError(f"a disk has no storage_options, and {', '.join(sorted(storage_options))} were given")
        for name in ("checksum", "create_only"):
            if getattr(chosen, name):
                raise OptionsError(f"a disk knows no {name}; leave it out of Options")
        store: Store = LocalStore(text)
    else:
        store = _open_remote(text, name, storage_options, chosen)
    return RetryingStore(store, chosen.retry, single_writer=chosen.single_writer)


def _engine_for(scheme: str, engine: str) -> str:
    if engine not in get_args(Engine):
        raise OptionsError(f"engine {engine!r} is unknown; give one of {', '.join(get_args(Engine))}")
    offered = ("local",) if scheme in LOCAL_SCHEMES else _ENGINES.get(scheme, ("fsspec",))
    if engine == "auto":
        return offered[0]
    if engine not in offered:
        raise OptionsError(
            f"engine {engine!r} does not serve {scheme + '://' if scheme else 'paths'}; give {' or '.join(offered)}"
        )
    return engine


def _open_remote(url: str, engine: str, storage_options: Mapping[str, object] | None, options: Options) -> Store:
    # Imported here, so that a run pays for what it uses.
    from cloudckpt.store.terms import PutTerms

    terms = PutTerms(signed_payload=options.signed_payload, checksum=options.checksum, create_only=options.create_only)
    if engine == "obstore":
        from cloudckpt.store.obstore import ObstoreStore

        return ObstoreStore(url, storage_options=storage_options, retry=options.retry, terms=terms)
    from cloudckpt.store.fsspec import FsspecStore

    return FsspecStore(url, storage_options=storage_options, retry=options.retry, terms=terms)
