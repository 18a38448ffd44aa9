"""Say which checkpoints a URL means: the one there, the newest of a root, some of its steps, or all of them.

A URL that ends in the name of a step is taken as that step of the root above it, so that others of the same root can be
told. Knows catalogs and URLs; writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointNotFoundError,
    CredentialsExpiredError,
    ManifestError,
    OptionsError,
    RetryExhaustedError,
    StorageError,
    is_transient,
)
from cloudckpt.format import ShardEntry, Span, checkpoint_prefix, parse_checkpoint_prefix, plan_spans
from cloudckpt.options import MIB, Options
from cloudckpt.root import Catalog, Checkpoint, Roots, Unreadable
from cloudckpt.store import open_store
from cloudckpt.transfer import Gauge, ShardSource, span_bytes_for

__all__ = [
    "LOOK_BYTES",
    "All",
    "Onward",
    "Place",
    "is_of_one_object",
    "opened",
    "runs_of",
    "source_of",
    "spans_of",
    "split_step",
]

LOOK_BYTES = 200 * MIB
"""Of what is in flight in a look: eight reads of the usual spans. With what a process takes that has imported nothing
else, it stays below 256 MiB."""


def split_step(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the root and the prefix of a URL that ends in the name of a step; of another one itself, and ""."""
    text = os.fspath(url)
    above, _, name = text.rstrip("/").rpartition("/")
    if parse_checkpoint_prefix(f"{name}/") is None:
        return text, ""
    return above or ("/" if text.startswith("/") else "."), f"{name}/"


@dataclass(frozen=True, slots=True)
class All:
    """What stands in a root.

    Attributes:
        checkpoints: oldest first.
        unreadable: those whose manifest cannot be read.
        pinned: the prefixes of all that is pinned.
    """

    checkpoints: tuple[Checkpoint, ...]
    unreadable: tuple[Unreadable, ...]
    pinned: frozenset[str]


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL names.

    Attributes:
        catalog: of the root, or of the URL itself.
        prefix: of the one step that the URL names; "" if it names a root, or a URL of its own.
    """

    catalog: Catalog
    prefix: str

    def newest(self) -> Checkpoint | ManifestError:
        """Return the checkpoint there, or the newest of the root; or why that cannot be read.

        Raises:
            CheckpointNotFoundError: nothing is committed there.
            ManifestError: nothing is, and something was.
            StorageError: the store could not be read.
        """
        if self.prefix:
            return self._the_one(self.prefix)
        found = next(Roots([self.catalog]).newest_first(), None) if self.catalog.places() else None
        return self._the_one("") if found is None else found

    def _the_one(self, prefix: str) -> Checkpoint | ManifestError:
        try:
            return self._open(prefix)
        except ManifestError as exc:
            return exc

    def one(self) -> Checkpoint:
        """Return the checkpoint there, or the newest one of the root that can be read; raises as `newest` does."""
        if self.prefix:
            return self._open(self.prefix)
        found = Roots([self.catalog]).newest() if self.catalog.places() else None
        return found or self.catalog.open()

    def _open(self, prefix: str) -> Checkpoint:
        """Return the checkpoint there, also one that stands by its pin alone."""
        try:
            return self.catalog.open(prefix)
        except CheckpointNotFoundError:
            if not prefix or (pinned := self.catalog.pinned(prefix)) is None:
                raise
            return pinned[0]

    def all(self) -> All:
        """Look at all that stands in a root, also by its pin alone; nothing does where the URL is one step."""
        if self.prefix:
            return All((), (), frozenset())
        survey = self.catalog.survey()
        # After the survey: what stood by its pin alone then was pinned before.
        pinned = self.catalog.pins.prefixes()
        seen = {one.prefix for one in survey.checkpoints}
        seen |= {checkpoint_prefix(one.step, one.epoch) for one in survey.unreadable}
        # The survey has those that stand by their pin alone; what is pinned and gone is told of by this look.
        by_pin = [one[0] for prefix in sorted(pinned - seen) if (one := self.catalog.pinned(prefix)) is not None]
        found = sorted([*survey.checkpoints, *by_pin], key=lambda one: one.order)
        return All(tuple(found), tuple(survey.unreadable), frozenset(pinned))

    def steps(self, steps: Sequence[int]) -> list[Checkpoint]:
        """Return the checkpoints of some steps of a root, oldest first; raises as `Catalog.find` does."""
        if self.prefix:
            raise OptionsError(
                f"{self.catalog.store.url} is asked for {self.prefix.rstrip('/')}, which is one step, and for steps "
                f"{', '.join(map(str, steps))}; give the URL of the root"
            )
        return sorted({self.catalog.find(step) for step in steps}, key=lambda one: one.order)


@contextmanager
def opened(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None, engine: str, options: Options
) -> Iterator[Place]:
    """Open what a URL names."""
    root, prefix = split_step(url)
    with open_store(root, storage_options=storage_options, engine=engine, options=options) as store:
        yield Place(Catalog(store), prefix)


def source_of(key: str, entry: ShardEntry, block_bytes: int) -> ShardSource:
    """Return where a shard is, and what it must be."""
    return ShardSource(key=key, size_bytes=entry.size_bytes, digests=entry.digests, block_bytes=block_bytes)


def spans_of(entry: ShardEntry, block_bytes: int, options: Options, *, total_bytes: int) -> list[Span]:
    """Cut a whole shard into spans; it is read together with others, or by itself: `total_bytes` in all."""
    span_bytes = span_bytes_for(total_bytes, block_bytes=block_bytes, options=options)
    whole = [(0, entry.size_bytes)]
    return plan_spans(whole, size_bytes=entry.size_bytes, block_bytes=block_bytes, span_bytes=span_bytes)


def runs_of(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of numbers that follow each other, which ascend, as [first, stop)."""
    cuts = [place for place, (one, after) in enumerate(pairwise(numbers), 1) if after != one + 1]
    for start, stop in pairwise([0, *cuts, len(numbers)]):
        if start < stop:
            yield numbers[start], numbers[stop - 1] + 1


def is_of_one_object(error: StorageError) -> bool:
    """Tell whether a store refuses one object, such as an archived one, and may well give others."""
    is_of_all = isinstance(error, RetryExhaustedError | CredentialsExpiredError | BucketNotFoundError)
    return not (is_of_all or is_transient(error))


@dataclass(frozen=True, slots=True)
class Onward:
    """Tell a gauge, which was told the total, of several transfers as of one."""

    gauge: Gauge | None

    def begin(self, total_bytes: int) -> None:
        """Begin nothing anew."""

    def move(self, size_bytes: int) -> None:
        """Note that so many bytes more have moved."""
        if self.gauge is not None:
            self.gauge.move(size_bytes)
