"""Delete objects that no checkpoint needs, and none that was not meant, whatever a listing has said.

What goes is named by listings. Whoever deletes says below which prefixes it means to, and that is compared with each
key before the first one goes. Keeps FORMAT invariant 7: a manifest goes by itself, through the catalog alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from cloudckpt.errors import StorageError
from cloudckpt.format import MANIFEST_NAME, is_attempt, parse_checkpoint_prefix
from cloudckpt.store import Store

__all__ = ["delete_below", "nested"]

# So many objects in one call, between which it may be stopped; the largest bulk delete of any store.
_BATCH = 1_000


def delete_below(
    store: Store, keys: Sequence[str], *, below: Collection[str], go_on: Callable[[], bool] = lambda: True
) -> bool:
    """Delete objects, batch after batch, while it may go on; tell whether all are deleted.

    Args:
        store: where they are.
        keys: of the objects.
        below: prefixes, each with its slash; every key stands below one of them.
        go_on: asked before each batch.

    Raises:
        StorageError: a key stands elsewhere, or is that of a checkpoint's manifest, and nothing was deleted; or the
            store has refused to delete.
    """
    starts = tuple(below)
    if not all(start.endswith("/") for start in starts):
        raise ValueError(f"{starts!r} are no prefixes of directories")
    for key in keys:
        if not key.startswith(starts) or _is_manifest(key):
            raise StorageError(
                f"a listing has named {key!r} on {store.url}, and only what is below {', '.join(starts)} was to be "
                "deleted, so nothing was; see whether a proxy or a cache in front of the store drops queries",
                op="delete",
                key=key,
            )
    for start in range(0, len(keys), _BATCH):
        if not go_on():
            return False
        store.delete(keys[start : start + _BATCH])
    return True


def nested(prefix: str, keys: Collection[str]) -> list[str]:
    """Return the prefixes of checkpoints that stand below that of another one, or of an attempt that is none."""
    return [
        above
        for key in keys
        if _is_manifest(key) and key.startswith(prefix) and (above := key.removesuffix(MANIFEST_NAME)) != prefix
    ]


def _is_manifest(key: str) -> bool:
    """Tell whether a checkpoint stands or falls with this key; the copy that an attempt keeps of one is none."""
    *above, name = key.split("/")
    if name != MANIFEST_NAME:
        return False
    is_in_attempt = bool(above) and is_attempt(above[-1])
    is_of_ours = not above[:-1] or (len(above) == len(("step", "attempt")) and _is_step(above[0]))
    return not (is_in_attempt and is_of_ours)


def _is_step(name: str) -> bool:
    return parse_checkpoint_prefix(f"{name}/") is not None
