"""Keep the URL of the one checkpoint that DCP is to save or load, and its store, open from the first use to the last.

What travels to another process is how to open the store. Options, which may hold credentials, go only through the pipe
to a process of the same program, and never into a pickle that could be kept (FORMAT invariant 16).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler

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
                "a writer or reader with storage_options cannot be pickled, because they may hold credentials; send it "
                "through multiprocessing, or let the environment or a profile supply them, and pass no storage_options"
            )
        return self._sendable()

    def _sendable(self) -> dict[str, object]:
        return {**self.__dict__, "_catalog": None}


def _received(state: dict[str, object]) -> Address:
    address = Address.__new__(Address)
    address.__dict__.update(state)
    return address


def _send(address: Address) -> tuple[Callable[[dict[str, object]], Address], tuple[dict[str, object]]]:
    return _received, (address._sendable(),)  # noqa: SLF001 (a method of it, where multiprocessing looks for one)


# This pickler serves the pipes and queues of multiprocessing, and what a spawned process is given, alone: such is the
# process in which DCP saves for `AsyncCheckpointerType.PROCESS`.
ForkingPickler.register(Address, _send)
