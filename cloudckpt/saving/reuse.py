"""Leave out of a save what the checkpoint before it holds already, byte for byte.

    shard, as it is laid out ──▶ does the base have one like it? ──▶ same blocks? ──▶ same content? ──▶ a reference
                                   ╰─ no, or nobody made its strong digest: one is made, and the shard sent
                                                                  ╰─ no: sent, and no strong digest is made

The *base* is what this job has saved or restored last, so that no reference leaves its line of history. A strong digest
costs a tenth of what sending does, the digests of blocks a hundredth; so what has changed is told by its first block,
and pays nothing: it will most likely change again. Only what a strong digest has found equal is not sent. A rank looks
for its own shards alone; a save by another number of ranks sends all. Threads of the upload enter; what they find is a
value for each shard. Knows layouts and one base; FORMAT invariant 17 is kept by who commits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import xxhash

from cloudckpt.errors import CloudCkptError
from cloudckpt.format import (
    Box,
    Holder,
    Index,
    Origins,
    ShardEntry,
    ShardLayout,
    block_digests,
    content_kind,
    content_of,
    has_blocks,
    hasher_of,
)
from cloudckpt.root import Catalog, Checkpoint, ShardPlaces, index_of

__all__ = ["Reuse", "ReuseMemory", "Sieve"]

logger = logging.getLogger(__name__)

_Row = tuple[str, str, tuple[int, ...], tuple[int, ...], int]
"""Name and dtype of a piece's tensor, its box, and its first byte in the shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """One shard of the base: who holds it, under which number, and what it is."""

    holder: Holder
    number: int
    size_bytes: int
    digests: bytes
    content: bytes


@dataclass(slots=True)
class ReuseMemory:
    """What this rank knows of the shards of one checkpoint, by their layout: of that which it has saved last.

    Attributes:
        digest: of the checkpoint's manifest, "" where nothing is known.
        kind: of the strong digests.
        block_bytes: of the others.
        shards: by layout.
    """

    digest: str = ""
    kind: str = ""
    block_bytes: int = 0
    shards: dict[bytes, _Known] = field(default_factory=dict)

    def learn(self, catalog: Catalog, base: Checkpoint, rank: int) -> None:
        """Read what this rank has written of a checkpoint, unless it is known; raises `CloudCkptError`."""
        if self.digest == base.digest:
            return
        index = index_of(catalog.store, base.prefix, base.manifest)
        own = Holder(base.step, base.epoch, base.attempt)
        self.digest, self.kind, self.block_bytes = base.digest, index.content, index.block_bytes
        # Of several attempts, through DCP, none is referred to: a key has one.
        is_ours = rank in index.ranks and len(index.attempts) == 1
        # Where the base is a copy, those that it names as holders may never have been in this root.
        has_holders = bool(index.holders) and not ShardPlaces.of(catalog.store, base).is_copied
        self.shards = dict(_shards_of(index, rank, own, has_holders=has_holders)) if is_ours else {}


class Reuse:
    """What one rank leaves out of one save."""

    def __init__(self, memory: ReuseMemory, base: Checkpoint | None, *, rank: int, size: int, block_bytes: int) -> None:
        """Begin; nothing is asked of a store.

        Args:
            memory: of this job.
            base: what it has saved or restored last.
            rank: this one.
            size: how many ranks save.
            block_bytes: bytes per digest of this save.
        """
        self._memory, self._rank, self._block_bytes = memory, rank, block_bytes
        self._sieves: dict[str, Sieve] = {}
        self.base = base
        if base is not None and base.world_size != size:
            if rank == 0:
                logger.info(
                    "%s was saved by %d ranks, and now by %d: all of it is sent", base.url, base.world_size, size
                )
            self.base = None

    @property
    def digest(self) -> str:
        """What tells its base from others; "" where there is none."""
        return "" if self.base is None else self.base.digest

    def agree(self, digest: str) -> None:
        """Use the base if all ranks have the same one."""
        if digest != self.digest:
            self.forget_base()

    def forget_base(self) -> None:
        """Send all from now on."""
        self.base = None
        for sieve in self._sieves.values():
            sieve.send_all()

    @property
    def holders(self) -> list[Holder]:
        """Who may hold shards of this save: the base, and who holds shards of that."""
        if self.base is None:
            return []
        others = [Holder(one.step, one.epoch, one.attempt) for one in self.base.manifest.held_elsewhere]
        return [Holder(self.base.step, self.base.epoch, self.base.attempt), *others]

    def at(self, catalog: Catalog) -> Sieve:
        """Return what tells the shards that need not go to a root; the same one each time."""
        url = catalog.store.url
        if url not in self._sieves:
            self._sieves[url] = self._new(catalog)
        return self._sieves[url]

    def _new(self, catalog: Catalog) -> Sieve:
        base, memory = self.base, self._memory
        if base is None or not catalog.holds(base):
            return Sieve({}, [], block_bytes=self._block_bytes)
        try:
            memory.learn(catalog, base, self._rank)
        except CloudCkptError as exc:
            logger.warning("rank %d: what %s holds cannot be told, so all is sent: %s", self._rank, base.url, exc)
            return Sieve({}, [], block_bytes=self._block_bytes)
        known = memory.shards if memory.block_bytes == self._block_bytes else {}
        return Sieve(known, self.holders, block_bytes=self._block_bytes, kind=memory.kind)

    def remember(self, catalog: Catalog, made: Checkpoint) -> None:
        """Keep what the next save needs to know of what this one has committed."""
        if (sieve := self._sieves.get(catalog.store.url)) is not None:
            self._memory.digest, self._memory.kind, self._memory.block_bytes = (
                made.digest,
                sieve.kind,
                self._block_bytes,
            )
            self._memory.shards = sieve.outcome(Holder(made.step, made.epoch, made.attempt))


@dataclass(frozen=True, slots=True)
class _Found:
    """What became of one shard: the one of the base that it is, if it is one; and its strong digest, if it has one."""

    known: _Known | None = None
    content: bytes = b""


class Sieve:
    """Tells the shards of one save that one root has already."""

    def __init__(
        self, known: dict[bytes, _Known], holders: Sequence[Holder], *, block_bytes: int, kind: str = ""
    ) -> None:
        """Look for shards among those that are `known`, whose strong digests are of a kind, each of a listed holder."""
        self._holders, self._block_bytes = list(holders), block_bytes
        can = hasher_of(kind) is not None
        self.kind = kind if can else content_kind()
        self._known = known if can or not kind else {}
        self._found: dict[int, _Found] = {}
        self._done: list[tuple[bytes, int, bytes, int]] = []

    def send_all(self) -> None:
        """Find nothing from now on, nor what was found before."""
        self._known = {}
        self._found = {number: _Found(None, found.content) for number, found in self._found.items()}

    def unchanged(self, layout: bytes, shard: ShardLayout, buffers: Sequence[memoryview]) -> bytes | None:
        """Return the digests of a shard's blocks if it need not be sent, else None. Any thread.

        Args:
            layout: of its pieces, by `layout_of`.
            shard: where they lie.
            buffers: its header, and its bytes.
        """
        known, views = self._known.get(layout), buffers[1:]
        if known is None or known.size_bytes != shard.size_bytes or known.holder not in self._holders:
            self._found[shard.number] = _Found(None, content_of(self.kind, views))
            return None
        header = memoryview(_with_attempt(shard.header, known.holder.attempt))
        if known.content:
            # The first block tells nearly always what has changed; what it does not tell the strong digest does.
            first = block_digests(_beginning(header, views, self._block_bytes), block_bytes=self._block_bytes)
            is_same = known.digests.startswith(first) and content_of(self.kind, views) == known.content
            self._found[shard.number] = _Found(known, known.content) if is_same else _Found()
            return known.digests if is_same else None
        is_same = has_blocks([header, *views], known.digests, block_bytes=self._block_bytes)
        # If it has stayed once, the next save may leave it out.
        self._found[shard.number] = _Found(None, content_of(self.kind, views) if is_same else b"")
        return None

    def origins(self, layouts: Sequence[bytes], shards: Sequence[ShardLayout], digests: Sequence[bytes]) -> Origins:
        """Return what became of all shards, and keep what the next save needs of it."""
        found = [self._found.get(shard.number, _Found()) for shard in shards]
        self._done = [
            (layout, shard.number, of_shard, shard.size_bytes)
            for layout, shard, of_shard in zip(layouts, shards, digests, strict=True)
        ]
        places = {holder: place for place, holder in enumerate(self._holders, 1)}
        return Origins(
            holder=np.asarray([0 if one.known is None else places[one.known.holder] for one in found], dtype=np.int64),
            number=np.asarray([0 if one.known is None else one.known.number for one in found], dtype=np.int64),
            contents=[one.content for one in found],
        )

    def outcome(self, own: Holder) -> dict[bytes, _Known]:
        """Return what is known of the shards of this save, once it is committed as `own`."""
        outcome = {}
        for layout, number, digests, size_bytes in self._done:
            found = self._found.get(number, _Found())
            outcome[layout] = found.known or _Known(
                holder=own, number=number, size_bytes=size_bytes, digests=digests, content=found.content
            )
        return outcome


def layout_of(chunks: Sequence[Box], shard: ShardLayout) -> bytes:
    """Return what tells how a shard is laid out: alike are those of which each byte is that of the same element."""
    rows: list[_Row] = [
        (chunks[piece.chunk].name, chunks[piece.chunk].dtype, piece.offsets, piece.sizes, piece.start)
        for piece in shard.pieces
    ]
    return _layout(rows)


def _layout(rows: Iterable[_Row]) -> bytes:
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode(list(rows)))


def _shards_of(index: Index, rank: int, own: Holder, *, has_holders: bool) -> Iterable[tuple[bytes, _Known]]:
    rows: dict[int, list[_Row]] = {}
    for name, piece in index.pieces_of(rank):
        row = (name, index.tensors[name].dtype, piece.offsets, piece.sizes, piece.start)
        rows.setdefault(piece.number, []).append(row)
    for number, of_shard in rows.items():
        entry = index.shard(rank, number)
        if entry.holder is None or has_holders:
            yield _layout(of_shard), _known(entry, own)


def _known(entry: ShardEntry, own: Holder) -> _Known:
    return _Known(
        holder=entry.holder or own,
        number=entry.number if entry.holder is None else entry.stored_number,
        size_bytes=entry.size_bytes,
        digests=entry.digests,
        content=entry.content,
    )


def _beginning(header: memoryview, views: Sequence[memoryview], block_bytes: int) -> list[memoryview]:
    """Return whole blocks from the first on, with some of what follows the header, if there is more than one."""
    left = block_bytes - len(header) % block_bytes
    first = [header]
    for view in views:
        first.append(view[:left])
        left -= len(first[-1])
    return first


def _with_attempt(header: bytes, attempt: str) -> bytes:
    """Return the header as the attempt has written it that holds the shard: nothing else of it is another."""
    key = b'"cloudckpt":"'
    at = header.index(key) + len(key)
    return header[:at] + attempt.encode() + header[at + len(attempt) :]
