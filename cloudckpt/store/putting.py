"""Put an object where a put may find it there already: our own, of a request whose answer got lost, is no other's.

For puts that are told to create only. Knows keys and bytes; the retry layer repeats it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cloudckpt.errors import ObjectExistsError, TransientError
from cloudckpt.store.base import Store

__all__ = ["Putting"]

logger = logging.getLogger(__name__)


class Putting:
    """One put, and whether a request of it may have landed."""

    def __init__(self, store: Store, key: str, buffers: Sequence[memoryview]) -> None:
        self._store = store
        self._key = key
        self._buffers = buffers
        self.size_bytes = sum(buffer.nbytes for buffer in buffers)
        self._may_be_there = False

    def step(self) -> None:
        """Make one request, or two; return once the object is there."""
        try:
            self._store.put(self._key, self._buffers)
        except TransientError:
            self._may_be_there = True
            raise
        except ObjectExistsError:
            # A key belongs to one attempt, which puts it once: what stands there whole is ours.
            if not self._may_be_there or self._store.head(self._key).size_bytes != self.size_bytes:
                raise
            logger.warning("put of %r had landed although it failed", self._key)
