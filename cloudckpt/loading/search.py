"""Find the checkpoint that is read: the first candidate that is whole. On one rank, which tells the others.

    candidates, best first ──▶ manifest and index read ──▶ Found, or the next one; all corrupt: the first one's error

Keeps FORMAT invariants 1, 11 and 12.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cloudckpt.errors import IntegrityError, MissingShardError
from cloudckpt.format import codec
from cloudckpt.loading.input import decode_index, read_index_bytes
from cloudckpt.ranks import own_failures
from cloudckpt.root import Candidate, Checkpoint, Roots
from cloudckpt.store import Store

__all__ = ["Found", "Search"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What rank 0 tells of the checkpoint that is tried next: its root, and whether values have parts to be read."""

    manifest: bytes
    prefix: str
    index: bytes
    has_parts: bool
    root: int


class Search:
    """Which checkpoint is tried next, on rank 0."""

    def __init__(
        self,
        candidates: Iterator[Candidate],
        roots: Roots,
        doing: str = "restoring",
        over: Callable[[Store], Store] = lambda store: store,
    ) -> None:
        """Search `candidates`, best first.

        Args:
            candidates: checkpoints, or why one cannot be tried.
            roots: where they are.
            doing: what the log says is not done with those that are corrupt.
            over: returns the store through which an index is read.
        """
        self._over = over
        self._candidates = candidates
        self._roots = roots
        self._doing = doing
        self._failures: list[tuple[Checkpoint | None, IntegrityError]] = []

    def next(self) -> Found | None:
        """Return the next candidate whose manifest and index can be read, None if there never was one.

        Raises:
            IntegrityError: there were some, and all are corrupt.
        """
        for candidate in self._candidates:
            try:
                if isinstance(candidate, IntegrityError):
                    raise candidate
                catalog = self._roots.catalog_of(candidate)
                data = read_index_bytes(catalog.with_store(self._over(catalog.store)), candidate)
                index = decode_index(candidate, data)
            except IntegrityError as exc:
                self._note(candidate if isinstance(candidate, Checkpoint) else None, exc)
                continue
            logger.info("rank 0: read manifest and index of %s for all ranks: %d bytes", candidate.url, len(data))
            has_parts = any(map(codec.is_part_name, index.tensors))
            root = self._roots.catalogs.index(catalog)
            return Found(candidate.manifest.encode(), candidate.prefix, data, has_parts, root)
        if self._failures:
            raise self._explained(*self._failures[0])
        return None

    def _explained(self, checkpoint: Checkpoint | None, error: IntegrityError) -> IntegrityError:
        """Tell a checkpoint that was removed while it was read from one that lost a shard."""
        if checkpoint is None or not isinstance(error, MissingShardError):
            return error
        if self._roots.stands(checkpoint):
            return error
        return MissingShardError(f"{checkpoint.url} was pruned while it was read; restore a newer one", key=error.key)

    def _note(self, checkpoint: Checkpoint | None, error: IntegrityError) -> None:
        logger.warning("NOT %s %s: %s", self._doing, error.key if checkpoint is None else checkpoint.url, error)
        self._failures.append((checkpoint, error))

    def may_go_on(self, checkpoint: Checkpoint, failures: Mapping[int, BaseException]) -> bool:
        """Tell whether the ranks failed because bytes are corrupt, so that the next candidate is worth a try."""
        own = own_failures(failures)
        corrupt = [error for _, error in sorted(own.items()) if isinstance(error, IntegrityError)]
        if len(corrupt) < len(own):
            return False
        self._note(checkpoint, corrupt[0])
        return True
