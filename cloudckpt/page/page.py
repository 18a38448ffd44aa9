"""Turn a root into one HTML page that needs nothing else: what is there, when it came, what it took and what it costs.

    list, manifests, claims, pins ──▶ `Facts` ──▶ sections ──▶ one page, with its style and its script inside

Writes nothing to the store. The page loads nothing from anywhere, and a policy in its head forbids it to: only this
script, by its digest, may run. All text from the store goes through `markup`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.format import EpochClaim
from cloudckpt.options import READERS
from cloudckpt.page.history import facts_of
from cloudckpt.page.markup import raw, tag
from cloudckpt.page.sections import SHOWN, Run, sections
from cloudckpt.report import Prices
from cloudckpt.root import Catalog, Checkpoint, ManifestCache, mistaken_for, overview
from cloudckpt.store import open_store
from cloudckpt.threads import each

__all__ = ["page_of", "report_page"]


def report_page(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    engine: str = "auto",
    prices: Prices | None = None,
    mtbf_s: float | None = None,
) -> str:
    """Return a page about the run at `url`: one HTML document with all that it needs, readable offline.

    It tells what the store tells: of one that was removed nothing is left but, perhaps, that a job went on from it.
    Manifests that are known from before are taken from this machine's cache.

    Args:
        url: a root, or one checkpoint.
        storage_options: fsspec's own options for the URL.
        engine: what moves the bytes, as for `save`.
        prices: of the store; None takes the usual ones of S3 and GCS, and none for other stores.
        mtbf_s: mean seconds between failures of the job, for the best interval; None counts interruptions.

    Raises:
        CheckpointNotFoundError: nothing is committed there.
        OptionsError: `mtbf_s` is not a finite number above 0.
        StorageError: the store could not be listed or read.
    """
    with open_store(url, storage_options=storage_options, engine=engine) as store:
        return page_of(Catalog(store), cache=ManifestCache.of_environment(), prices=prices, mtbf_s=mtbf_s)


def page_of(
    catalog: Catalog,
    *,
    cache: ManifestCache | None = None,
    prices: Prices | None = None,
    mtbf_s: float | None = None,
    now: datetime | None = None,
) -> str:
    """Return the page of what a catalog holds; raises as `report_page` does.

    Args:
        catalog: over a root, or one checkpoint.
        cache: manifests of before.
        prices: of the store; None takes the usual ones, if they are known.
        mtbf_s: mean seconds between failures.
        now: the time of the page; None: the present.
    """
    found = overview(catalog, cache)
    checkpoints = list(found.checkpoints)
    if not checkpoints and not found.unreadable:
        checkpoints = [_the_one_at(catalog, len(found.unfinished))]
    unreadable = frozenset(one.order for one in found.unreadable)
    pins = {pin.order: pin.note for pin in found.pins}
    facts = facts_of(checkpoints, _claims(catalog), pins=pins, unreadable=unreadable, mtbf_s=mtbf_s)
    store, at = catalog.store, now or datetime.now(UTC)
    return _document(Run(url=store.url, at=at, facts=facts, found=found, prices=prices or Prices.of(store)))


def _the_one_at(catalog: Catalog, unfinished: int) -> Checkpoint:
    """Return the checkpoint that the URL itself is."""
    try:
        return catalog.open()
    except CheckpointNotFoundError as exc:
        if (lost := catalog.lost()) is not None:
            raise lost from None
        why = mistaken_for(catalog.store) or "check the URL"
        if unfinished:
            why = f"attempts without a commit: {unfinished}; ask again when a save has ended"
        raise CheckpointNotFoundError(f"no committed checkpoint at {catalog.store.url}; {why}") from exc


def _claims(catalog: Catalog) -> dict[int, EpochClaim]:
    """Return what jobs have said of themselves, by epoch; of the newest, so many as are shown."""
    epochs = catalog.claims.epochs()[:SHOWN]
    read = each(epochs, catalog.claims.read, threads=READERS, name="cloudckpt-page")
    return {epoch: claim for epoch, claim in zip(epochs, read, strict=True) if claim is not None}


def _document(run: Run) -> str:
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"Checkpoints of {run.url}"),
        # The browser would ask for one, and a page that is a file has none.
        tag("link", rel="icon", href="data:,"),
        tag("style", raw(style)),
    )
    body = tag("body", *sections(run), tag("script", raw(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
