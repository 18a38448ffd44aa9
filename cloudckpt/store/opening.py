"""Open the store that a URL names: pick its engine, and put the one retry layer around it.

    dir  ./dir  /dir  file:///dir   local
    s3://  s3a://                   obstore, or fsspec (s3fs) if asked
    gs://  gcs://                   fsspec (gcsfs), or obstore if asked
    az://  abfs://  abfss://        fsspec (adlfs)
    memory:// and all that fsspec knows     fsspec

URLs are strings throughout: a `pathlib.Path` would eat one of their slashes. Who gives no storage options has those of
the environment, for every URL that is no disk. Nothing is read or written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Literal, get_args

from cloudckpt.errors import OptionsError
from cloudckpt.options import Options
from cloudckpt.store.base import Store
from cloudckpt.store.classify import classify
from cloudckpt.store.local import LocalStore
from cloudckpt.store.location import LOCAL_SCHEMES, scheme_of
from cloudckpt.store.retrying import RetryingStore

__all__ = ["STORAGE_OPTIONS_VARIABLE", "Engine", "environment_options", "open_store"]

Engine = Literal["auto", "local", "obstore", "fsspec"]

STORAGE_OPTIONS_VARIABLE = "CLOUDCKPT_STORAGE_OPTIONS"

# The first is the default. obstore on gs is opt-in until it was shown on a server that we did not write.
_ENGINES: Mapping[str, tuple[str, ...]] = {
    "s3": ("obstore", "fsspec"),
    "gs": ("fsspec", "obstore"),
}


# What a scheme needs beside its engine: listings and deletes go over fsspec's clients in any case.
_PACKAGES: Mapping[str, str] = {"s3": "s3fs", "gs": "gcsfs"}


def open_store(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    options: Options | Mapping[str, object] | None = None,
) -> RetryingStore:
    """Open the root at `url`. The caller closes the store.

    Args:
        url: a path, or a URL without credentials.
        storage_options: fsspec's own options for that scheme, also when another engine moves the bytes; and
            `allow_http`, without which plain http reaches no other machine than this one. None: those of the
            environment's `CLOUDCKPT_STORAGE_OPTIONS`, a JSON object, if it is set; a disk has none. Whatever is given,
            also `{}`, is taken alone: nothing of the environment's is added to it.
        engine: `auto` (the first that this module names for the scheme), `local` (paths and file:// alone), `obstore`
            or `fsspec`.
        options: patience, payload signing and who writes are taken from here.

    Raises:
        OptionsError: the URL, the engine or an option is wrong, or a package is missing; the message says which.
        StorageError: the interpreter is shutting down.
    """
    chosen = Options.of(options)
    text = _text_of(url)
    if storage_options is not None and not isinstance(storage_options, Mapping):
        # Not repeated: it may hold a secret.
        raise OptionsError(f"storage_options is a {type(storage_options).__name__}; give a dict of fsspec's options")
    if odd := [type(name).__name__ for name in storage_options or () if not isinstance(name, str)]:
        raise OptionsError(f"storage_options has a name that is a {odd[0]}; names of fsspec's options are texts")
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
        given = environment_options() if storage_options is None else storage_options
        try:
            store = _open_remote(text, name, given, chosen)
        except RuntimeError as exc:  # so do imports end once the interpreter shuts down
            raise classify(exc, op="open", key="", url=f"{scheme}://") from exc
    opened = RetryingStore(store, chosen.retry, single_writer=chosen.single_writer)
    opened.opens = partial(open_store, storage_options=storage_options, engine=engine, options=chosen)
    return opened


def _text_of(url: object) -> str:
    try:
        text = os.fspath(url)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if isinstance(text, str):
        return text
    raise OptionsError(f"the URL is a {type(url).__name__}; give a path or a URL, such as 's3://bucket/run-7'")


def environment_options() -> Mapping[str, object]:
    """Return the storage options that the environment gives; raises `OptionsError` if they are no JSON object."""
    text = os.environ.get(STORAGE_OPTIONS_VARIABLE, "").strip()
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    # The text is not repeated: it may hold a secret.
    raise OptionsError(
        f"{STORAGE_OPTIONS_VARIABLE} in the environment is no JSON object; write for example '{{\"anon\": true}}'"
    )


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


def _refuse_missing(scheme: str, engine: str) -> None:
    """Refuse a URL whose packages are not installed: an engine would trip over it in the middle of a save."""
    wanted = [*([_PACKAGES[scheme]] if scheme in _PACKAGES else []), *(["obstore"] if engine == "obstore" else [])]
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise OptionsError(
            f"{scheme}:// needs {' and '.join(missing)}, which `pip install cloudckpt` brings, and which this "
            f"environment lacks; pip install {' '.join(missing)}"
        )


def _open_remote(url: str, engine: str, storage_options: Mapping[str, object] | None, options: Options) -> Store:
    _refuse_missing(scheme_of(url), engine)
    # Imported here, so that a run pays for what it uses.
    from cloudckpt.store.terms import PutTerms

    terms = PutTerms(signed_payload=options.signed_payload, checksum=options.checksum, create_only=options.create_only)
    if engine == "obstore":
        from cloudckpt.store.obstore import ObstoreStore

        return ObstoreStore(url, storage_options=storage_options, retry=options.retry, terms=terms)
    from cloudckpt.store.fsspec import FsspecStore

    return FsspecStore(url, storage_options=storage_options, retry=options.retry, terms=terms)
