"""Create an object by plain puts, for a root's only writer: on stores that have no create-only writes.

Keeps FORMAT invariant 6 as far as nobody else writes there. Knows keys and bytes; the retry layer repeats it.
"""

from __future__ import annotations

import logging
import secrets

from cloudckpt.errors import (
    AccessDeniedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    TransientError,
    is_transient,
)
from cloudckpt.options import KIB
from cloudckpt.store.base import Store

__all__ = ["LoneCreation"]

# Another's object of about our size is told from ours by one read; only a much larger one needs a second look.
_EXCESS_BYTES = 64 * KIB

logger = logging.getLogger(__name__)


class LoneCreation:
    """One create by the only writer, on a store that may have none: a look, a plain put, and a look at what came of it.

    All in one attempt, since a repetition begins with the look, and finds what an earlier one has stored.

    Attributes:
        is_unknown: whether some put may have landed without our knowing.
        is_taken: whether the store has said that the key is taken; never, since nothing asks it to.
    """

    is_taken = False

    def __init__(self, store: Store, key: str, data: bytes) -> None:
        self._store = store
        self._key = key
        self._data = data
        self.is_unknown = False

    def step(self) -> None:
        """Make one attempt; return once the object is known to be ours."""
        is_ours = self._look_before()
        if is_ours is None:
            self._put()
            is_ours = self._is_ours()
        if is_ours is None:
            raise TransientError(f"the store took {self._key!r}, and nothing is there", op="create", key=self._key)
        if not is_ours:
            raise ObjectExistsError(
                f"{self._key!r} on {self._store.url} is another writer's; it was left as it is",
                op="create",
                key=self._key,
            )

    def _look_before(self) -> bool | None:
        try:
            return self._is_ours()
        except AccessDeniedError as exc:
            # Without the right to list, S3 denies an absent object, too; without that to read, one that stands there.
            if type(exc) is not AccessDeniedError or not self._may_read():
                raise
            return None

    def _may_read(self) -> bool:
        """Tell whether what stands beside the key can be read, by an object that is put there and deleted again."""
        above, slash, _ = self._key.rpartition("/")
        beside = f"{above}{slash}probe-{secrets.token_hex(16)}"
        content = b"cloudckpt asks whether it may read what it writes"
        self._store.put(beside, [memoryview(content)])
        try:
            return self._store.read(beside, limit_bytes=KIB) == content
        except AccessDeniedError:
            return False
        finally:
            try:
                self._store.delete([beside])
            except StorageError as exc:
                logger.warning("the probe object %r stays on %s: %s", beside, self._store.url, exc)

    def _put(self) -> None:
        was_unknown, self.is_unknown = self.is_unknown, True
        try:
            self._store.put(self._key, [memoryview(self._data)])
        except StorageError as exc:
            self.is_unknown = was_unknown or (is_transient(exc) and exc.may_have_landed)
            raise

    def _is_ours(self) -> bool | None:
        try:
            return self._store.read(self._key, limit_bytes=len(self._data) + _EXCESS_BYTES) == self._data
        except ObjectNotFoundError:
            return None
        except StorageError as exc:
            # Perhaps too large and no more, which has no type of its own: its size tells.
            if type(exc) is StorageError and self._store.head(self._key).size_bytes != len(self._data):
                return False
            raise
