"""Say where the shards of a checkpoint are, of which others may hold some, and whether they are there.

    its own      <prefix>/<attempt>/…
    another's    <prefix of the holder>/<attempt of the holder>/…, or in a copy <own prefix>/<attempt of the holder>/…

A copy has all of them below its own prefix, and one listing tells; where a copy was ended there are some, and those of
the holders count, if all are there. Knows keys and one store; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cloudckpt.errors import IntegrityError, MissingShardError
from cloudckpt.format import (
    SHARD_SUFFIX,
    Index,
    Manifest,
    ShardEntry,
    digest_of,
    index_key,
    parse_checkpoint_prefix,
)
from cloudckpt.root.checkpoint import Checkpoint
from cloudckpt.store import Store

__all__ = ["ShardPlaces", "index_of", "is_copied", "lack_of_shared", "own_bytes", "shared_keys_of"]


@runtime_checkable
class _Sociable(Protocol):
    def beside(self, url: str) -> Store | None:
        """Return the store of another URL, opened as this one; None where nobody knows how."""


@dataclass(frozen=True, slots=True)
class ShardPlaces:
    """Where the shards of one checkpoint are.

    Attributes:
        store: where all of them are.
        prefix: of the checkpoint there.
        is_copied: whether those that others hold stand below that, too.
    """

    store: Store
    prefix: str
    is_copied: bool = False

    @classmethod
    def of(cls, store: Store, checkpoint: Checkpoint) -> ShardPlaces:
        """Look where they are; one listing if others hold some. From its own URL the root is reached by its form.

        Raises:
            MissingShardError: others hold some, and the URL is not that of a step below their root.
        """
        manifest, prefix = checkpoint.manifest, checkpoint.prefix
        if not (held := manifest.held_elsewhere):
            return cls(store, prefix)
        if prefix:
            return cls(store, prefix, is_copied=_has_its_own(store, prefix, manifest))
        if is_copied(manifest, below := _sizes_below(store, prefix)):
            return cls(store, prefix, is_copied=True)
        above, _, name = store.url.rstrip("/").rpartition("/")
        is_step = parse_checkpoint_prefix(f"{name}/") == (checkpoint.step, checkpoint.epoch)
        root = store.beside(above) if is_step and isinstance(store, _Sociable) else None
        if _is_begun(manifest, below) and (root is None or lack_of_shared(root, manifest, {})):
            return cls(store, prefix, is_copied=True)
        if root is None:
            raise MissingShardError(
                f"{checkpoint.url} shares shards with step {held[0].step} of epoch {held[0].epoch} of its root, and "
                f"neither {held[0].attempt}/ is there nor the root beside it: it was copied by other means. Copy it "
                "with `cloudckpt cp`, which makes it complete in itself",
                key=f"{held[0].attempt}/",
            )
        return cls(root, f"{name}/")

    def key(self, entry: ShardEntry) -> str:
        """Return the key of a shard."""
        return entry.key(self.prefix, is_copied=self.is_copied)


def own_bytes(store: Store, checkpoint: Checkpoint) -> int:
    """Return the bytes of the shards that a checkpoint holds itself; a copy may hold all. A listing if others do."""
    manifest = checkpoint.manifest
    if not manifest.held_elsewhere or _has_its_own(store, checkpoint.prefix, manifest):
        return checkpoint.total_bytes
    return manifest.sent_bytes


def is_copied(manifest: Manifest, below: Mapping[str, int]) -> bool:
    """Tell whether what others hold of a checkpoint stands below its own prefix, too; `below` are names and sizes."""
    for one in manifest.held_elsewhere:
        sizes = [size for name, size in below.items() if name.startswith(f"{one.attempt}/") and _is_shard(name)]
        if len(sizes) < one.shard_count or sum(sizes) < one.total_bytes:
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
    if not manifest.held_elsewhere or _has_its_own(store, prefix, manifest):
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


def _has_its_own(store: Store, prefix: str, manifest: Manifest) -> bool:
    """Tell whether a reader takes what others hold from below the checkpoint's own prefix. A listing, or some more."""
    below = _sizes_below(store, prefix)
    return is_copied(manifest, below) or (_is_begun(manifest, below) and bool(lack_of_shared(store, manifest, below)))


def _is_begun(manifest: Manifest, below: Mapping[str, int]) -> bool:
    return any(name.startswith(f"{one.attempt}/") for one in manifest.held_elsewhere for name in below)


def _sizes_below(store: Store, prefix: str) -> dict[str, int]:
    return {info.key.removeprefix(prefix): info.size_bytes for info in store.list(prefix).objects}


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIX)
