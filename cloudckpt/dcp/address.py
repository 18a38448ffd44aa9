"""Keep the URL of the one checkpoint that DCP is to save or load, and its store, open from the first use to the last.

What travels to another process is how to open the store, and no credential (FORMAT invariant 16).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloudckpt.errors import OptionsError
from cloudckpt.options import Options
from cloudckpt.root import Catalog
from cloudckpt.store import open_store

__all__ = ["Address"]


class Address:
    """A URL, how to open it, and what is open there.

    Attributes:
        options: sizes, parallelism, patience.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, object] | None,
        engine: str,
        options: Options | None,
    ) -> None:
        """Remember what to open; takes what a writer or reader takes."""
        self._url = os.fspath(url)
        self._storage_options = storage_options
        self._engine = engine
        self.options = Options.of(options)
        self._catalog: Catalog | None = None

    def move(self, url: str | os.PathLike[str]) -> None:
        """Close what is open, and stand for another URL."""
        self.close()
        self._url = os.fspath(url)

    def catalog(self) -> Catalog:
        """Return what is at the URL; opens the store if it is not open."""
        if self._catalog is None:
            store = open_store(
                self._url, storage_options=self._storage_options, engine=self._engine, options=self.options
            )
            self._catalog = Catalog(store)
        return self._catalog

    def close(self) -> None:
        """Let go of the store."""
        if self._catalog is not None:
            self._catalog.store.close()
        self._catalog = None

    def __getstate__(self) -> dict[str, object]:
        """Pickle without connections; refuses storage options, because they may hold credentials."""
        if self._storage_options:
            raise OptionsError(
                "a writer or reader with storage_options cannot be pickled, because they may hold credentials; let the "
                "environment or a profile supply them, and pass no storage_options"
            )
        return {**self.__dict__, "_catalog": None}
