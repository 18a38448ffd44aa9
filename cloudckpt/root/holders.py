"""Say where the shards of a checkpoint are, of which others may hold some, and whether they are there.

    its own      <prefix>/<attempt>/…
    another's    <prefix of the holder>/<attempt of the holder>/…, or in a copy <own prefix>/<attempt of the holder>/…

A copy has all of them below its own prefix, or none: one look tells. Knows keys and one store; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cloudckpt.errors import IntegrityError, MissingShardError, ObjectNotFoundError
from cloudckpt.format import SHARD_SUFFIX, Index, Manifest, ShardEntry, digest_of, index_key
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.store import Store

__all__ = ["ShardPlaces", "index_of", "is_copied", "lack_of_shared", "shared_keys_of"]


@dataclass(slots=True)
class ShardPlaces:
    """Where the shards of one checkpoint are; asks the store once, where others may hold some. For one thread."""

    store: Store
    checkpoint: Checkpoint
    _is_copied: bool | None = field(default=None, init=False)

    def key(self, entry: ShardEntry) -> str:
        """Return the key of a shard.

        Raises:
            MissingShardError: another checkpoint holds it, which is out of reach from a URL of this one alone.
        """
        prefix = self.checkpoint.prefix
        if entry.holder is None:
            return entry.key(prefix)
        if self._is_copied is None:
            self._is_copied = self._is_here(own := entry.key(prefix, is_copied=True))
            if not (self._is_copied or prefix):
                raise MissingShardError(
                    f"{own} is not there, and {self.checkpoint.url} does not hold it itself: step "
                    f"{entry.holder.step} of epoch {entry.holder.epoch} of the same root does. Read it by the URL of "
                    "the root, or of this step below it; `cloudckpt cp` makes a copy that is complete in itself",
                    key=own,
                )
        return entry.key(prefix, is_copied=self._is_copied)

    def _is_here(self, key: str) -> bool:
        try:
            self.store.head(key)
        except ObjectNotFoundError:
            return False
        return True


def is_copied(manifest: Manifest, below: Mapping[str, int]) -> bool:
    """Tell whether what others hold of a checkpoint stands below its own prefix, too; `below` are names and sizes."""
    for one in manifest.held_elsewhere:
        sizes = [size for name, size in below.items() if name.startswith(f"{one.attempt}/") and _is_shard(name)]
        if (len(sizes), sum(sizes)) != (one.shard_count, one.total_bytes):
            return False
    return True


def lack_of_shared(store: Store, manifest: Manifest, below: Mapping[str, int]) -> str:
    """Say what others should hold of a checkpoint and do not, "" if nothing; a listing of each of them.

    By counts and bytes: which they are only the index tells.
    """
    if is_copied(manifest, below):
        return ""
    for one in manifest.held_elsewhere:
        found = store.list(f"{one.prefix}{one.attempt}/").objects
        sizes = [info.size_bytes for info in found if _is_shard(info.key)]
        if len(sizes) < one.shard_count or sum(sizes) < one.total_bytes:
            return (
                f"step {one.step} of epoch {one.epoch} holds {one.shard_count} shards of it, and {len(sizes)} are there"
            )
    return ""


def shared_keys_of(store: Store, prefix: str, manifest: Manifest) -> frozenset[str]:
    """Return the keys of all shards of a checkpoint that others hold; none of a copy, which has them itself.

    Raises:
        CloudCkptError: nobody can tell.
    """
    held = manifest.held_elsewhere
    if not held or store.list(f"{prefix}{held[0].attempt}/").objects:
        return frozenset()
    index = index_of(store, prefix, manifest)
    return frozenset(entry.key(prefix) for entry in index.shards() if entry.holder is not None)


def index_of(store: Store, prefix: str, manifest: Manifest) -> Index:
    """Read the index of a checkpoint, for what stands in the same room or above; one request.

    Raises:
        IntegrityError: it is not what was committed.
        StorageError: it cannot be read.
    """
    key, committed = prefix + index_key(manifest.attempt), manifest.index
    data = b"" if committed is None else store.read(key, limit_bytes=committed.size_bytes)
    if committed is None or digest_of(data) != committed.sha256:
        raise IntegrityError(f"index {key} is not what was committed")
    return Index.decode(data, key=key)


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIX)
